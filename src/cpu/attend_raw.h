// Attention over simd.h to tokens kept as given: the newest ones of a packed layer, and the baseline. Included inside
// the target's namespace, after attend.h.

template <Dtype kDtype>
HALFBYTE_INLINE f32x16 load_as(const void* p, ptrdiff_t at) {
  return load_channels(p, kDtype, at);
}

// Tokens are asked for this far ahead, and into the second-level cache: with K and V of 256 channels, the tokens at
// hand and the next ones do not fit the first.
constexpr int kAhead = 32;
constexpr int kWeighWords = kRegisterRows > 2 ? 4 : 2;  // registers of V at once, so that each weight is loaded once

template <Dtype kDtype>
HALFBYTE_INLINE void ask_ahead(const void* p, ptrdiff_t at, ptrdiff_t stride, int c) {
  constexpr int kBytes = kDtype == Dtype::float32 ? 4 : 2;
  if (c * kBytes % 64 == 0) __builtin_prefetch((const char*)p + (at + kAhead * stride) * kBytes, 0, 2);
}

// Scores of kRows rows against four tokens each time, so that a q register serves four dot products.
template <int kRows, Dtype kDtype>
HALFBYTE_INLINE void score_raw(const AttendRawArgs& args, int first_row, ptrdiff_t token, int tokens,
                               float (*scores)[kLanes]) {
  constexpr int kTokens = 4;
  const int d = args.head_dim_k, whole = d / kLanes * kLanes;
  for (int t = 0; t < kLanes; t += kTokens) {
    f32x16 sums[kRows][kTokens];
    ptrdiff_t rows[kTokens];
    for (int i = 0; i < kTokens; i++) {
      rows[i] = (token + (t + i < tokens ? t + i : tokens - 1)) * args.k_stride;
      for (int r = 0; r < kRows; r++) sums[r][i] = set1(0.0f);
    }
    for (int c = 0; c < d; c += kLanes) {
      f32x16 k[kTokens];
      for (int i = 0; i < kTokens; i++) {
        k[i] =
            c < whole ? load_as<kDtype>(args.k, rows[i] + c) : load_some_channels(args.k, kDtype, rows[i] + c, d - c);
        ask_ahead<kDtype>(args.k, rows[i] + c, args.k_stride, c);
      }
      for (int r = 0; r < kRows; r++) {
        f32x16 q = load(args.q + (first_row + r) * args.q_stride + c);
        for (int i = 0; i < kTokens; i++) sums[r][i] = fma(q, k[i], sums[r][i]);
      }
    }
    for (int r = 0; r < kRows; r++) sum_four(sums[r], scores[r] + t);
  }
}

// acc += Σ p·v of kWords · 16 channels from `c` on.
template <int kRows, int kWords, Dtype kDtype>
HALFBYTE_INLINE void weigh_raw_words(const AttendRawArgs& args, ptrdiff_t token, int tokens, const float (*p)[kLanes],
                                     int c, float* acc, size_t acc_stride) {
  const int left = args.head_dim_v - c;
  f32x16 sums[kRows][kWords];
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWords; w++) sums[r][w] = load(acc + r * acc_stride + c + w * kLanes);
  for (int t = 0; t < tokens; t++) {
    const ptrdiff_t at = (token + t) * args.v_stride + c;
    f32x16 v[kWords];
    for (int w = 0; w < kWords; w++) {
      const ptrdiff_t word = at + w * kLanes;
      v[w] = left >= kWords * kLanes ? load_as<kDtype>(args.v, word) : load_some_channels(args.v, kDtype, word, left);
      ask_ahead<kDtype>(args.v, word, args.v_stride, w * kLanes);
    }
    for (int r = 0; r < kRows; r++)
      for (int w = 0; w < kWords; w++) sums[r][w] = fma(v[w], set1(p[r][t]), sums[r][w]);
  }
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWords; w++) store(acc + r * acc_stride + c + w * kLanes, sums[r][w]);
}

template <int kRows, Dtype kDtype>
HALFBYTE_INLINE void weigh_raw(const AttendRawArgs& args, ptrdiff_t token, int tokens, const float (*p)[kLanes],
                               float* acc, size_t acc_stride) {
  int c = 0;
  for (; args.head_dim_v - c >= kWeighWords * kLanes; c += kWeighWords * kLanes)
    weigh_raw_words<kRows, kWeighWords, kDtype>(args, token, tokens, p, c, acc, acc_stride);
  for (; c < args.head_dim_v; c += kLanes)
    weigh_raw_words<kRows, 1, kDtype>(args, token, tokens, p, c, acc, acc_stride);
}

template <int kRows, Dtype kDtype>
static void attend_raw_rows(const AttendRawArgs& args, int first_row, size_t begin, size_t end, Softmax& state) {
  const Inside inside = inside_of(args.visible, first_row, kRows);
  float* acc = state.acc + first_row * state.acc_stride;
  alignas(64) float scores[kRows][kLanes];
  f32x16 sums[kRows];
  for (int r = 0; r < kRows; r++) sums[r] = set1(state.sum[first_row + r] / kLanes);
  for (size_t token = begin; token < end; token += kLanes) {
    const int tokens = end - token < (size_t)kLanes ? (int)(end - token) : kLanes;
    const ptrdiff_t row = (ptrdiff_t)(token - args.first_token);
    score_raw<kRows, kDtype>(args, first_row, row, tokens, scores);
    const bool all = tokens == kLanes && token >= inside.lo && token + kLanes <= inside.hi;
    for (int r = 0; r < kRows; r++) {
      mask16 lanes = all ? (mask16)0xffff : visible_lanes(args.visible, first_row + r, token);
      if (tokens < kLanes) lanes &= (mask16)((1u << tokens) - 1);
      f32x16 p = soft_capped(load(scores[r]), args.visible.softcap);
      fold_scores<1>(&p, &lanes, state.max[first_row + r], sums[r], acc + r * state.acc_stride, args.head_dim_v);
      store(scores[r], p);
    }
    weigh_raw<kRows, kDtype>(args, row, tokens, scores, acc, state.acc_stride);
  }
  for (int r = 0; r < kRows; r++) state.sum[first_row + r] = reduce_add(sums[r]);
}

template <int kRows>
static void attend_raw_dtype(const AttendRawArgs& args, int first_row, size_t begin, size_t end, Softmax& state) {
  switch (args.dtype) {
    case Dtype::float32:
      attend_raw_rows<kRows, Dtype::float32>(args, first_row, begin, end, state);
      break;
    case Dtype::float16:
      attend_raw_rows<kRows, Dtype::float16>(args, first_row, begin, end, state);
      break;
    case Dtype::bfloat16:
      attend_raw_rows<kRows, Dtype::bfloat16>(args, first_row, begin, end, state);
      break;
  }
}

// ---- many rows: a few blocks become floats once, keys with tokens in lanes, and all parts of the rows use them

constexpr int kWideBlocks = 2;
constexpr int kWideTokens = kWideBlocks * kLanes;

struct WideTokens {
  alignas(64) float k[kMaxHeadDim][kWideTokens];
  alignas(64) float v[kWideTokens][kMaxHeadDim];
};

static void widen_tokens(const AttendRawArgs& args, size_t begin, int tokens, WideTokens& out) {
  const int d_k = args.head_dim_k, d_v = args.head_dim_v;
  const size_t bytes = args.dtype == Dtype::float32 ? 4 : 2;
  const ptrdiff_t row = (ptrdiff_t)(begin - args.first_token);
  for (int block = 0; block < tokens; block += kLanes) {
    const int n = tokens - block < kLanes ? tokens - block : kLanes;
    const void* rows[kLanes];
    for (int i = 0; i < n; i++) rows[i] = (const char*)args.k + (row + block + i) * args.k_stride * (ptrdiff_t)bytes;
    alignas(64) float k[kMaxHeadDim * kLanes];
    load_transposed({rows, n, args.dtype, d_k}, nullptr, nullptr, k);
    for (int c = 0; c < d_k; c++) store(out.k[c] + block, load(k + c * kLanes));
  }
  for (int t = 0; t < tokens; t++)
    for (int c = 0; c < d_v; c += kLanes) {
      const ptrdiff_t at = (row + t) * args.v_stride + c;
      store(out.v[t] + c, d_v - c >= kLanes ? load_channels(args.v, args.dtype, at)
                                            : load_some_channels(args.v, args.dtype, at, d_v - c));
    }
}

template <int kRows>
static void attend_wide_rows(const AttendRawArgs& args, const WideTokens& wide, int first_row, size_t token, int tokens,
                             Softmax& state) {
  const Inside inside = inside_of(args.visible, first_row, kRows);
  const bool all = tokens == kWideTokens && token >= inside.lo && token + kWideTokens <= inside.hi;
  const float* q = args.q + first_row * args.q_stride;
  float* acc = state.acc + first_row * state.acc_stride;
  f32x16 scores[kRows][kWideBlocks];
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < kWideBlocks; i++) scores[r][i] = set1(0.0f);
  for (int c = 0; c < args.head_dim_k; c++)
    for (int r = 0; r < kRows; r++)
      for (int i = 0; i < kWideBlocks; i++)
        scores[r][i] = fma(load(wide.k[c] + i * kLanes), set1(q[r * args.q_stride + c]), scores[r][i]);
  alignas(64) float p[kRows][kWideTokens];
  for (int r = 0; r < kRows; r++) {
    mask16 lanes[kWideBlocks];
    for (int i = 0; i < kWideBlocks; i++) {
      const int left = tokens - i * kLanes;
      lanes[i] = left > 0 ? visible_lanes(args.visible, first_row + r, token + i * kLanes) : (mask16)0;
      if (left > 0 && left < kLanes) lanes[i] &= (mask16)((1u << left) - 1);
      scores[r][i] = soft_capped(scores[r][i], args.visible.softcap);
    }
    f32x16 sums = set1(0.0f);
    float sum = state.sum[first_row + r], before = state.max[first_row + r];
    fold_scores<kWideBlocks>(scores[r], all ? nullptr : lanes, state.max[first_row + r], sums,
                             acc + r * state.acc_stride, args.head_dim_v);
    if (before != state.max[first_row + r]) sum *= reduce_max(exp_negative(set1(before - state.max[first_row + r])));
    state.sum[first_row + r] = sum + reduce_add(sums);
    for (int i = 0; i < kWideBlocks; i++) store(p[r] + i * kLanes, scores[r][i]);
  }
  for (int c = 0; c < args.head_dim_v; c += kLanes) {
    f32x16 sums[kRows];
    for (int r = 0; r < kRows; r++) sums[r] = load(acc + r * state.acc_stride + c);
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < kRows; r++) sums[r] = fma(load(wide.v[t] + c), set1(p[r][t]), sums[r]);
    for (int r = 0; r < kRows; r++) store(acc + r * state.acc_stride + c, sums[r]);
  }
}

static void attend_wide(const AttendRawArgs& args, Softmax& state) {
  WideTokens wide;
  for (size_t token = args.begin; token < args.end; token += kWideTokens) {
    const int tokens = args.end - token < (size_t)kWideTokens ? (int)(args.end - token) : kWideTokens;
    widen_tokens(args, token, tokens, wide);
    for_row_parts(args.visible.rows,
                  [&]<int kRows>(int first) { attend_wide_rows<kRows>(args, wide, first, token, tokens, state); });
  }
}

static void attend_raw(const AttendRawArgs& args, Softmax& state) {
  constexpr int kWideRows = 8;     // from more rows on, widening pays
  constexpr size_t kSegment = 64;  // tokens that stay in cache while each part of the rows passes over them
  if (args.one_order || args.visible.rows > kWideRows) {
    attend_wide(args, state);
    return;
  }
  for (size_t begin = args.begin; begin < args.end; begin += kSegment) {
    const size_t end = begin + kSegment < args.end ? begin + kSegment : args.end;
    for_row_parts(args.visible.rows,
                  [&]<int kRows>(int first) { attend_raw_dtype<kRows>(args, first, begin, end, state); });
  }
}
