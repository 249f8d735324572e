// Attention over simd.h to packed blocks, and what it shares with attend_raw.h. Included inside the target's namespace,
// after kernels.h.
//
// q becomes signed bytes per K group, p·scale becomes bytes per page and V group, and both sums run in integers, four
// products a lane. Codes are unsigned; the zero point's share is taken off once a group (`bias`). Beside 8-bit codes
// one byte would round as coarsely as they do: there both take two, each with a sum of its own.

// ---------------------------------------------------------------------------------------------- softmax of a block

// Which of the 16 tokens from `token` on row r sees.
static mask16 visible_lanes(const Visible& visible, int r, size_t token) {
  size_t lo = visible.lo[r], hi = visible.hi[r];
  if (token >= hi || token + kLanes <= lo) return 0;
  uint32_t lanes = 0xffff;
  if (lo > token) lanes &= 0xffffu << (lo - token);
  if (hi < token + kLanes) lanes &= 0xffffu >> (token + kLanes - hi);
  const uint8_t* mask = visible.mask[r];
  if (!mask) return (mask16)lanes;
  if (hi >= token + kLanes && token >= visible.mask_first)
    return (mask16)lanes & load_mask(mask + (token - visible.mask_first));
  for (int i = 0; i < kLanes; i++)  // the mask covers only part of this block
    if (lanes >> i & 1 && !mask[token + i - visible.mask_first]) lanes &= ~(1u << i);
  return (mask16)lanes;
}

// Tokens [lo, hi) that all of the rows see, as far as bounds alone can tell.
struct Inside {
  size_t lo, hi;
};
static Inside inside_of(const Visible& visible, int first_row, int rows) {
  Inside inside = {0, (size_t)-1};
  for (int r = first_row; r < first_row + rows; r++) {
    if (visible.lo[r] > inside.lo) inside.lo = visible.lo[r];
    if (visible.hi[r] < inside.hi) inside.hi = visible.hi[r];
    if (visible.mask[r]) inside.hi = 0;
  }
  return inside;
}

HALFBYTE_INLINE f32x16 soft_capped(f32x16 scores, float softcap) {
  return softcap > 0.0f ? mul(tanh(mul(scores, set1(1.0f / softcap))), set1(softcap)) : scores;
}

// Folds kTile·16 scores into one row: scores becomes p = e^(score − max), after lifting the row's maximum, sums and acc
// if need be. lanes: which of them the row sees, or null for all.
template <int kTile>
HALFBYTE_INLINE void fold_scores(f32x16* scores, const mask16* lanes, float& row_max, f32x16& row_sums, float* acc,
                                 int channels) {
  f32x16 highest = set1(kNothing);
  for (int i = 0; i < kTile; i++) {
    if (lanes) scores[i] = select(lanes[i], scores[i], set1(kNothing));
    highest = max(highest, scores[i]);
  }
  if (greater(highest, set1(row_max))) {
    float top = reduce_max(highest);
    f32x16 keep = exp_negative(set1(row_max - top));
    row_max = top;
    row_sums = mul(row_sums, keep);
    for (int c = 0; c < channels; c += kLanes) store(acc + c, mul(load(acc + c), keep));
  }
  for (int i = 0; i < kTile; i++) {
    scores[i] = exp_negative(sub(scores[i], set1(row_max)));
    if (lanes) scores[i] = select(lanes[i], scores[i], set1(0.0f));
    row_sums = add(row_sums, scores[i]);
  }
}

// ---------------------------------------------------------------------------------------------- packed blocks

HALFBYTE_INLINE int four_bytes(const int8_t* p) {
  int word;
  memcpy(&word, p, 4);
  return word;
}

// The same address, from where the compiler must load anew: it would else keep every word of a loop broadcast to a
// whole register in memory, and read sixteen times as much.
HALFBYTE_INLINE const int8_t* reloaded(const int8_t* p) {
  asm("" : "+r"(p));
  return p;
}

template <int kBits>
HALFBYTE_INLINE i32x16 dot4(i32x16 acc, u8x64 codes, int four) {
  if constexpr (kBits == 4)
    return dot4_nibble(acc, codes, four);
  else
    return dot4_byte(acc, codes, four);
}

// −zero · Σ bytes, in every lane.
template <int kBits>
HALFBYTE_INLINE i32x16 zero_bias(const int8_t* bytes, int n) {
  i32x16 sum = set1(0);
  for (int i = 0; i < n; i += 4) sum = dot4<kBits>(sum, row_of(kBits == 4 ? 8 : 128), four_bytes(bytes + i));
  return sub(set1(0), sum);
}

// What one unit of weight on the zero code adds to a sum.
template <int kBits>
HALFBYTE_INLINE int zero_share() {
  alignas(64) int32_t share[kLanes];
  store(share, dot4<kBits>(set1(0), row_of(zero_code(kBits)), 1));
  return share[0];
}

template <int kBits>
constexpr int kParts = kBits == 8 ? 2 : 1;  // bytes that q, or a weight, takes beside such codes
constexpr float kFiner = 254.0f;            // steps of the second byte in one of the first: rests of ±1/2 fill ±127

// The sum of row r out of those of its parts; sums [parts][kRows].
template <int kRows, int kBits>
HALFBYTE_INLINE f32x16 joined(const i32x16* sums, int r) {
  const f32x16 sum = to_f32(sums[r]);
  return kParts<kBits> == 1 ? sum : fma(to_f32(sums[kRows * (kParts<kBits> - 1) + r]), set1(1.0f / kFiner), sum);
}

// Query rows as signed bytes, one scale a K group. Rows lie at constant distances, so that one address serves them all.
struct PackedQuery {
  alignas(64) int8_t bytes[kParts<8>][kMaxRows][kMaxHeadDim];
  float scale[kMaxRows][kMaxHeadDim / 16];
  int bias[kParts<8>][kMaxRows][kMaxHeadDim / 16];
};

template <int kBits>
static void quantise_query(const SideFormat& format, const float* q, int rows, PackedQuery& out) {
  for (int r = 0; r < rows; r++, q += format.padded_dim)
    for (int g = 0; g < format.n_groups; g++) {
      const int from = g * format.group;
      const int to = from + format.group < format.padded_dim ? from + format.group : format.padded_dim;
      f32x16 top = set1(0.0f);
      for (int c = from; c < to; c += kLanes) top = max(top, abs(load(q + c)));
      const float largest = reduce_max(top);
      const f32x16 inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
      for (int c = from; c < to; c += kLanes) {
        f32x16 x = mul(load(q + c), inverse);
        for (int part = 0; part < kParts<kBits>; part++) {
          const i32x16 byte = to_i32(x);
          store_low_bytes(out.bytes[part][r] + c, byte);
          x = mul(sub(x, to_f32(byte)), set1(kFiner));
        }
      }
      out.scale[r][g] = largest / 127.0f;
      for (int part = 0; part < kParts<kBits>; part++) {
        alignas(64) int32_t bias[kLanes];
        store(bias, zero_bias<kBits>(out.bytes[part][r] + from, to - from));
        out.bias[part][r][g] = bias[0];
      }
    }
}

// Loads codes while asking for the same place of the next page, `ahead` bytes on.
HALFBYTE_INLINE u8x64 stream_row(const uint8_t* codes, ptrdiff_t ahead) {
  __builtin_prefetch((const char*)((uintptr_t)codes + ahead));
  return load_row(codes);
}

// Integer sums of kRows rows over one span of K codes: low over its first 16 channels, high over the others.
// When both belong to one group, low and high are the same accumulators.
template <int kRows, int kBits>
HALFBYTE_INLINE void score_span(const int8_t* q, const uint8_t* codes, ptrdiff_t ahead, i32x16* low, i32x16* high) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    u8x64 row = stream_row(codes + i * kRowBytes, ahead);
    u8x64 low_row = kBits == 4 ? low_nibbles(row) : row;
    u8x64 high_row = kBits == 4 ? high_nibbles(row) : stream_row(codes + (4 + i) * kRowBytes, ahead);
#pragma GCC unroll 16
    for (int s = 0; s < kRows * kParts<kBits>; s++) {
      const int8_t* bytes = q + (s / kRows * kMaxRows + s % kRows) * kMaxHeadDim + 4 * i;
      low[s] = dot4<kBits>(low[s], low_row, four_bytes(bytes));
      high[s] = dot4<kBits>(high[s], high_row, four_bytes(bytes + 16));
    }
  }
}

// scores[r] += q·k of kRows rows and the 16 tokens of one block.
template <int kRows, int kBits>
HALFBYTE_INLINE void score_block(const SideFormat& format, const PackedQuery& q, int first_row, const uint8_t* codes,
                                 const uint8_t* scales, ptrdiff_t ahead, f32x16* scores) {
  constexpr int kSpanBytes = (kBits == 4 ? 4 : 8) * kRowBytes, kSums = kRows * kParts<kBits>;
  const int8_t* bytes = q.bytes[0][first_row];
  auto start = [&](int g, i32x16* sums) {
    for (int i = 0; i < kSums; i++) sums[i] = set1(q.bias[i / kRows][first_row + i % kRows][g]);
  };
  auto finish = [&](int g, const i32x16* sums) {
    f32x16 scale = load_scales(format, scales, g);
    for (int r = 0; r < kRows; r++)
      scores[r] = fma(mul(joined<kRows, kBits>(sums, r), scale), set1(q.scale[first_row + r][g]), scores[r]);
  };
  if (format.group == 16) {
    for (int c = 0, g = 0; c < format.padded_dim; c += kSpan, g += 2, codes += kSpanBytes) {
      i32x16 low[kSums], high[kSums];
      start(g, low), start(g + 1, high);
      score_span<kRows, kBits>(bytes + c, codes, ahead, low, high);
      finish(g, low), finish(g + 1, high);
    }
    return;
  }
  for (int c = 0, g = 0; c < format.padded_dim; g++) {
    i32x16 sums[kSums];
    start(g, sums);
    for (int end = c + format.group; c < end && c < format.padded_dim; c += kSpan, codes += kSpanBytes)
      score_span<kRows, kBits>(bytes + c, codes, ahead, sums, sums);
    finish(g, sums);
  }
}

// The blocks of one page make one tile: what a softmax step, a scale of p and an update of acc cost beside their
// sixteen lanes is shared by four blocks. p's bytes stay fine enough: see the error test of attend_test.cpp.
struct PageTile {
  const uint8_t* page;
  int first, last;  // blocks with tokens that some row may see
  ptrdiff_t ahead;  // from this page to the next one
};

// p·scale of one V group as bytes, with the scale that undoes it and the zero point's share. With nibbles, where a
// scale is negative its codes are turned over instead (15 − code), so that all eight bits of a byte hold magnitude.
template <int kRows, int kBits>
struct Weights {
  static constexpr int kSums = kRows * kParts<kBits>;
  alignas(64) int8_t bytes[kSums][kPageTokens];
  alignas(64) uint8_t flips[kPageTokens];  // 255 where codes are turned over; nibbles only
  float scale[kRows];
  int bias[kSums];
};

template <int kRows, int kBits>
HALFBYTE_INLINE void quantise_weights(const PageFormat& format, const f32x16 (*p)[kPageBlocks], const PageTile& tile,
                                      int group, Weights<kRows, kBits>& out) {
  constexpr float kTop = kBits == 4 ? 255.0f : 127.0f;
  f32x16 scales[kPageBlocks], zero[kPageBlocks];  // zero: what a unit of weight is to add for the zero point
  for (int i = 0; i < kPageBlocks; i++) {
    scales[i] = load_scales(format.v, tile.page + v_scales_at(format, i), group);
    zero[i] = set1((float)-zero_share<kBits>());
    if constexpr (kBits == 4) {  // s·(u − 8) = |s|·((15 − u) − 7) for s < 0
      const mask16 negative = greater(set1(0.0f), scales[i]);
      scales[i] = abs(scales[i]);
      zero[i] = select(negative, set1(-7.0f), set1(-8.0f));
      store_low_bytes(out.flips + i * kLanes, to_i32(select(negative, set1(255.0f), set1(0.0f))));
    }
  }
  for (int r = 0; r < kRows; r++) {
    f32x16 weight[kPageBlocks], top = set1(0.0f), bias[kParts<kBits>];
    for (f32x16& sum : bias) sum = set1(0.0f);
    for (int i = 0; i < kPageBlocks; i++) weight[i] = mul(p[r][i], scales[i]), top = max(top, abs(weight[i]));
    const float largest = reduce_max(top);
    const f32x16 inverse = set1(largest > 0.0f ? kTop / largest : 0.0f);
    for (int i = 0; i < kPageBlocks; i++) {
      f32x16 x = mul(weight[i], inverse);
      for (int part = 0; part < kParts<kBits>; part++) {
        const i32x16 byte = to_i32(x);
        store_low_bytes(out.bytes[part * kRows + r] + i * kLanes, byte);
        bias[part] = fma(to_f32(byte), zero[i], bias[part]);
        x = mul(sub(x, to_f32(byte)), set1(kFiner));
      }
    }
    out.scale[r] = largest * (1.0f / kTop);
    for (int part = 0; part < kParts<kBits>; part++)
      out.bias[part * kRows + r] = (int)reduce_add(bias[part]);  // a sum of whole numbers below 2^24
  }
}

// acc += Σ p·value of one span of nibbles; `low` weighs its first 16 channels, `high` the others.
template <int kRows>
HALFBYTE_INLINE void weigh_nibbles(const Weights<kRows, 4>& low, const Weights<kRows, 4>& high, const uint8_t* flips,
                                   const uint8_t* codes, size_t block_bytes, ptrdiff_t ahead, float* acc,
                                   size_t acc_stride) {
  i32x16 low_sums[kRows], high_sums[kRows];
  const int8_t *low_bytes = reloaded(low.bytes[0]), *high_bytes = &low == &high ? low_bytes : reloaded(high.bytes[0]);
  for (int r = 0; r < kRows; r++) low_sums[r] = set1(low.bias[r]), high_sums[r] = set1(high.bias[r]);
#pragma GCC unroll 4
  for (int block = 0; block < kPageBlocks; block++, codes += block_bytes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int four = block * kLanes + 4 * i;  // tokens
      const u8x64 row = flip(stream_row(codes + i * kRowBytes, ahead), four_bytes((const int8_t*)flips + four));
      const u8x64 low_row = low_nibbles(row), high_row = high_nibbles(row);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        low_sums[r] = dot4_weights(low_sums[r], low_row, four_bytes(low_bytes + r * kPageTokens + four));
        high_sums[r] = dot4_weights(high_sums[r], high_row, four_bytes(high_bytes + r * kPageTokens + four));
      }
    }
  for (int r = 0; r < kRows; r++) {
    float* out = acc + r * acc_stride;
    store(out, fma(to_f32(low_sums[r]), set1(low.scale[r]), load(out)));
    store(out + 16, fma(to_f32(high_sums[r]), set1(high.scale[r]), load(out + 16)));
  }
}

// acc += Σ p·value of 16 channels of 8-bit codes.
template <int kRows>
HALFBYTE_INLINE void weigh_bytes(const Weights<kRows, 8>& weights, const uint8_t* codes, size_t block_bytes,
                                 ptrdiff_t ahead, float* acc, size_t acc_stride) {
  constexpr int kSums = Weights<kRows, 8>::kSums;
  i32x16 sums[kSums];
  const int8_t* bytes = reloaded(weights.bytes[0]);
  for (int i = 0; i < kSums; i++) sums[i] = set1(weights.bias[i]);
#pragma GCC unroll 4
  for (int block = 0; block < kPageBlocks; block++, codes += block_bytes)
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) {
      const u8x64 four_tokens = stream_row(codes + row * kRowBytes, ahead);
#pragma GCC unroll 16
      for (int i = 0; i < kSums; i++)
        sums[i] = dot4_byte(sums[i], four_tokens, four_bytes(bytes + i * kPageTokens + block * kLanes + 4 * row));
    }
  for (int r = 0; r < kRows; r++) {
    float* out = acc + r * acc_stride;
    store(out, fma(joined<kRows, 8>(sums, r), set1(weights.scale[r]), load(out)));
  }
}

// acc[r] += Σ p·value over the tokens of one page.
template <int kRows, int kBits>
HALFBYTE_INLINE void weigh_tile(const PageFormat& format, const f32x16 (*p)[kPageBlocks], const PageTile& tile,
                                float* acc, size_t acc_stride) {
  const SideFormat& v = format.v;
  const size_t block_bytes = block_code_bytes(format);
  const uint8_t* codes = tile.page + v_codes_at(format, 0);
  Weights<kRows, kBits> weights;
  if constexpr (kBits == 8) {
    for (int c = 0, g = 0; c < v.padded_dim; g++) {
      quantise_weights<kRows, 8>(format, p, tile, g, weights);
      for (int end = c + v.group; c < end && c < v.padded_dim; c += 16, codes += 4 * kRowBytes)
        weigh_bytes<kRows>(weights, codes, block_bytes, tile.ahead, acc + c, acc_stride);
    }
  } else if (v.group == 16) {
    Weights<kRows, 4> high;
    for (int c = 0, g = 0; c < v.padded_dim; c += kSpan, g += 2, codes += 4 * kRowBytes) {
      quantise_weights<kRows, 4>(format, p, tile, g, weights);
      quantise_weights<kRows, 4>(format, p, tile, g + 1, high);
      alignas(64) uint8_t flips[kPageTokens];
      for (int t = 0; t < kPageTokens; t++) flips[t] = (weights.flips[t] & 15) | (high.flips[t] & 240);
      weigh_nibbles<kRows>(weights, high, flips, codes, block_bytes, tile.ahead, acc + c, acc_stride);
    }
  } else {
    for (int c = 0, g = 0; c < v.padded_dim; g++) {
      quantise_weights<kRows, 4>(format, p, tile, g, weights);
      for (int end = c + v.group; c < end && c < v.padded_dim; c += kSpan, codes += 4 * kRowBytes)
        weigh_nibbles<kRows>(weights, weights, weights.flips, codes, block_bytes, tile.ahead, acc + c, acc_stride);
    }
  }
}

// Scores of kRows rows and one page; blocks that no row sees score nothing.
template <int kRows, int kBits>
HALFBYTE_INLINE void score_tile(const AttendPackedArgs& args, const PackedQuery& q, int first_row, size_t page,
                                const PageTile& tile, f32x16 (*scores)[kPageBlocks]) {
  const PageFormat& format = *args.format;
  for (int i = 0; i < kPageBlocks; i++) {
    f32x16 block[kRows];
    const bool seen = i >= tile.first && i < tile.last;
    const float* offset =
        args.q_offset.at + first_row * args.q_offset.row + page * args.q_offset.page + i * args.q_offset.block;
    for (int r = 0; r < kRows; r++) block[r] = set1(seen ? offset[r * args.q_offset.row] : kNothing);
    if (seen)
      score_block<kRows, kBits>(format.k, q, first_row, tile.page + k_codes_at(format, i),
                                tile.page + k_scales_at(format, i), tile.ahead, block);
    for (int r = 0; r < kRows; r++) scores[r][i] = soft_capped(block[r], args.visible.softcap);
  }
}

// Which tokens of one page the rows of a call may see.
static PageTile tile_at(const AttendPackedArgs& args, size_t page) {
  const size_t token = args.first_token + page * kPageTokens, page_end = token + kPageTokens;
  const size_t begin = args.begin > token ? args.begin - token : 0;
  const size_t end = (args.end < page_end ? args.end : page_end) - token;
  const bool is_last = page_end >= args.end;
  return {args.pages[page], (int)(begin / kLanes), (int)((end + kLanes - 1) / kLanes),
          is_last ? 0 : (ptrdiff_t)((uintptr_t)args.pages[page + 1] - (uintptr_t)args.pages[page])};
}

// kRows rows over pages [begin, end): load, score, softmax, weigh.
template <int kRows, int kBitsK, int kBitsV>
static void attend_packed_rows(const AttendPackedArgs& args, const PackedQuery& q, int first_row, size_t begin,
                               size_t end, Softmax& state) {
  const PageFormat& format = *args.format;
  const Inside inside = inside_of(args.visible, first_row, kRows);
  float* acc = state.acc + first_row * state.acc_stride;
  f32x16 sums[kRows], p[kRows][kPageBlocks];
  for (int r = 0; r < kRows; r++) sums[r] = set1(state.sum[first_row + r] / kLanes);
  for (size_t page = begin; page < end; page++) {
    const PageTile tile = tile_at(args, page);
    const size_t token = args.first_token + page * kPageTokens;
    const bool all = token >= inside.lo && token + kPageTokens <= inside.hi;
    score_tile<kRows, kBitsK>(args, q, first_row, page, tile, p);
    for (int r = 0; r < kRows; r++) {
      mask16 lanes[kPageBlocks];
      for (int i = 0; !all && i < kPageBlocks; i++) {
        const bool seen = i >= tile.first && i < tile.last;
        lanes[i] = seen ? visible_lanes(args.visible, first_row + r, token + i * kLanes) : (mask16)0;
      }
      fold_scores<kPageBlocks>(p[r], all ? nullptr : lanes, state.max[first_row + r], sums[r],
                               acc + r * state.acc_stride, format.v.padded_dim);
    }
    weigh_tile<kRows, kBitsV>(format, p, tile, acc, state.acc_stride);
  }
  for (int r = 0; r < kRows; r++) state.sum[first_row + r] = reduce_add(sums[r]);
}

template <int kRows>
static void attend_packed_bits(const AttendPackedArgs& args, const PackedQuery& q, int first_row, size_t begin,
                               size_t end, Softmax& state) {
  const bool wide_k = args.format->k.bits == 8, wide_v = args.format->v.bits == 8;
  if (wide_k && wide_v)
    attend_packed_rows<kRows, 8, 8>(args, q, first_row, begin, end, state);
  else if (wide_k)
    attend_packed_rows<kRows, 8, 4>(args, q, first_row, begin, end, state);
  else if (wide_v)
    attend_packed_rows<kRows, 4, 8>(args, q, first_row, begin, end, state);
  else
    attend_packed_rows<kRows, 4, 4>(args, q, first_row, begin, end, state);
}

// Calls f.operator()<kRows>(first) when n == kRows, for kRows up to what the registers hold.
template <int kRows, class F>
HALFBYTE_INLINE void with_rows(int n, int first, F f) {
  if constexpr (kRows > 1) {
    if (n < kRows) {
      with_rows<kRows - 1>(n, first, f);
      return;
    }
  }
  f.template operator()<kRows>(first);
}

// Splits the rows in parts that fit the registers, as even as can be.
template <class F>
HALFBYTE_INLINE void for_row_parts(int rows, F f) {
  const int parts = (rows + kRegisterRows - 1) / kRegisterRows;
  for (int i = 0, first = 0; i < parts; i++) {
    const int n = (rows - first + parts - i - 1) / (parts - i);
    with_rows<kRegisterRows>(n, first, f);
    first += n;
  }
}

static void attend_packed(const AttendPackedArgs& args, Softmax& state) {
  constexpr size_t kSegment = 4;  // pages that stay in cache while each part of the rows passes over them
  PackedQuery q;
  const SideFormat& k = args.format->k;
  k.bits == 8 ? quantise_query<8>(k, args.q, args.visible.rows, q) : quantise_query<4>(k, args.q, args.visible.rows, q);
  const size_t pages = (args.end - args.first_token + kPageTokens - 1) / kPageTokens;
  for (size_t begin = (args.begin - args.first_token) / kPageTokens; begin < pages; begin += kSegment) {
    const size_t end = begin + kSegment < pages ? begin + kSegment : pages;
    for_row_parts(args.visible.rows,
                  [&]<int kRows>(int first) { attend_packed_bits<kRows>(args, q, first, begin, end, state); });
  }
}
