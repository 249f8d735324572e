// Sixteen vectors into lanes and through a rotation, and back. Included inside the target's namespace, before
// kernels.h.
//
// Vectors are worked on sixteen at a time, lane = token: a channel of sixteen tokens is one register, so rotations,
// maxima and packing need no horizontal steps. A buffer of that kind is float [channels][16].

constexpr int kLanes = kBlockTokens;
constexpr float kNothing = -1e30f;  // attend.h: the score of a token that is not seen

// ---------------------------------------------------------------------------------------------- loading vectors

HALFBYTE_INLINE f32x16 load_channels(const void* p, Dtype dtype, ptrdiff_t at) {
  if (dtype == Dtype::float32) return load((const float*)p + at);
  const uint16_t* bits = (const uint16_t*)p + at;
  return dtype == Dtype::float16 ? load_f16(bits) : load_bf16(bits);
}

// The first n < 16 channels; zeros behind them, and nothing read behind them.
static f32x16 load_some_channels(const void* p, Dtype dtype, ptrdiff_t at, int n) {
  alignas(64) float wide[kLanes] = {};
  uint16_t narrow[kLanes] = {};
  if (dtype == Dtype::float32) {
    memcpy(wide, (const float*)p + at, n * sizeof(float));
    return load(wide);
  }
  memcpy(narrow, (const uint16_t*)p + at, n * sizeof(uint16_t));
  return load_channels(narrow, dtype, 0);
}

// Up to sixteen rows of d channels.
struct Rows {
  const void* const* at;
  int n;
  Dtype dtype;
  int d;
};

// The rows that most likely come next: sixteen more at the same distance. Fetched a few lines at a time all through the
// work on these, because memory can not deliver them at once.
struct Ahead {
  const char* at = nullptr;  // of a row
  ptrdiff_t step = 0, bytes = 0, done = 0;

  // Without a branch, and past the sixteenth row if asked often enough: fetching any address is harmless.
  __attribute__((always_inline)) void fetch() {
    constexpr int kLines = 6;  // for 128 float channels, 24 calls bring what is needed
    for (int i = 0; i < kLines; i++) {
      __builtin_prefetch(at + done, 0, 2);  // not into the first-level cache, which this work fills
      done += 64;
      const ptrdiff_t row_is_done = -(ptrdiff_t)(done >= bytes);  // all bits, or none
      at += step & row_is_done, done &= ~row_is_done;
    }
  }
};

static Ahead ahead_of(const Rows& rows) {
  if (rows.n < kLanes) return {};
  const ptrdiff_t step = (const char*)rows.at[1] - (const char*)rows.at[0];
  return {(const char*)rows.at[0] + kLanes * step, step, rows.d * (rows.dtype == Dtype::float32 ? 4 : 2), 0};
}

// Channels c … c + 15 of sixteen rows, (row − less) · times, turned round into y [16][16].
template <Dtype kDtype>
HALFBYTE_INLINE void load_tile(const void* const rows[kLanes], int c, f32x16 less, f32x16 times, float* y) {
  f32x16 tile[kLanes];
  HALFBYTE_UNROLL for (int t = 0; t < kLanes; t++) tile[t] = mul(sub(load_channels(rows[t], kDtype, c), less), times);
  transpose16(tile);
  HALFBYTE_UNROLL for (int i = 0; i < kLanes; i++) store(y + i * kLanes, tile[i]);
}

// The last d % 16 channels.
static void load_last_tile(const void* const rows[kLanes], Dtype dtype, int c, int width, const float* offset,
                           const float* factors, float* y) {
  const f32x16 less = offset ? load_some_channels(offset, Dtype::float32, c, width) : set1(0.0f);
  const f32x16 times = factors ? load_some_channels(factors, Dtype::float32, c, width) : set1(1.0f);
  f32x16 tile[kLanes];
  for (int t = 0; t < kLanes; t++) tile[t] = mul(sub(load_some_channels(rows[t], dtype, c, width), less), times);
  transpose16(tile);
  for (int i = 0; i < width; i++) store(y + i * kLanes, tile[i]);
}

// (row − offset) · factors → y [d][16]; offset and factors [d] may be null. Lanes behind n repeat row 0, so that every
// lane holds numbers. Row by row, a register holds sixteen offsets: nothing has to be spread over lanes.
template <Dtype kDtype>
static void load_transposed(const Rows& given, const float* offset, const float* factors, float* y, Ahead& ahead) {
  const void* rows[kLanes];
  for (int t = 0; t < kLanes; t++) rows[t] = given.at[t < given.n ? t : 0];
  int c = 0;
  for (; c + kLanes <= given.d; c += kLanes) {
    ahead.fetch();
    load_tile<kDtype>(rows, c, offset ? load(offset + c) : set1(0.0f), factors ? load(factors + c) : set1(1.0f),
                      y + c * kLanes);
  }
  if (c < given.d) load_last_tile(rows, kDtype, c, given.d - c, offset, factors, y + c * kLanes);
}

static void load_transposed(const Rows& rows, const float* offset, const float* factors, float* y, Ahead& ahead) {
  switch (rows.dtype) {
    case Dtype::float32:
      load_transposed<Dtype::float32>(rows, offset, factors, y, ahead);
      break;
    case Dtype::float16:
      load_transposed<Dtype::float16>(rows, offset, factors, y, ahead);
      break;
    case Dtype::bfloat16:
      load_transposed<Dtype::bfloat16>(rows, offset, factors, y, ahead);
      break;
  }
}

static void load_transposed(const Rows& rows, const float* offset, const float* factors, float* y) {
  Ahead nothing;
  load_transposed(rows, offset, factors, y, nothing);
}

// y [d][16] → n rows of d floats, `stride` apart.
static void store_transposed(const float* y, int d, float* rows, size_t stride, int n) {
  for (int c = 0; c < d; c += kLanes) {
    int width = d - c < kLanes ? d - c : kLanes;
    f32x16 tile[kLanes];
    for (int i = 0; i < kLanes; i++) tile[i] = i < width ? load(y + (c + i) * kLanes) : set1(0.0f);
    transpose16(tile);
    for (int t = 0; t < n; t++) {
      if (width == kLanes) {
        store(rows + t * stride + c, tile[t]);
      } else {
        alignas(64) float some[kLanes];
        store(some, tile[t]);
        memcpy(rows + t * stride + c, some, width * sizeof(float));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- rotations
//
// Each takes y [d][16] and as much scratch, and returns the one of the two that holds the result. plan.factors (signs
// and norm) come first on the way forward, where loading applies them, and last on the way back.

#include "fft.h"

// Half-complex y [d][16] ↔ Hartley, each result halved and times its factor if there are any [d]: the inverse of a real
// FFT is that FFT between two of these.
static void hartley(int d, const float* factors, float* y) {
  constexpr float kRoot2 = 1.41421356f;
  const int n = d / 2;
  auto put = [&](int c, f32x16 value) { store(y + c * kLanes, factors ? mul(value, set1(0.5f * factors[c])) : value); };
  for (int c : {0, n}) put(c, mul(load(y + c * kLanes), set1(kRoot2)));
  for (int c = 1; c <= n / 2; c++) {
    const f32x16 re = load(y + c * kLanes), im = load(y + (n + c) * kLanes);
    const f32x16 mirror_re = load(y + (n - c) * kLanes), mirror_im = load(y + (d - c) * kLanes);
    put(c, sub(re, im)), put(d - c, add(re, im));
    put(n - c, sub(mirror_re, mirror_im)), put(n + c, add(mirror_re, mirror_im));
  }
}

// Hadamard transform of kRadix channels in registers.
template <int kRadix>
HALFBYTE_INLINE void short_hadamard(f32x16* a) {
  if constexpr (kRadix > 1) {
    constexpr int kHalf = kRadix / 2;
    HALFBYTE_UNROLL for (int i = 0; i < kHalf; i++) {
      const f32x16 sum = add(a[i], a[i + kHalf]);
      a[i + kHalf] = sub_too(a[i], a[i + kHalf]), a[i] = sum;
    }
    short_hadamard<kHalf>(a), short_hadamard<kHalf>(a + kHalf);
  }
}

template <int kRadix>
static void hadamard_pass(int d, int stride, float* y, Ahead& ahead) {
  for (int block = 0; block < d; block += kRadix * stride)
    for (int c = block; c < block + stride; c++) {
      ahead.fetch();
      f32x16 a[kRadix];
      HALFBYTE_UNROLL for (int i = 0; i < kRadix; i++) a[i] = take(y + (c + i * stride) * kLanes);
      short_hadamard<kRadix>(a);
      HALFBYTE_UNROLL for (int i = 0; i < kRadix; i++) store(y + (c + i * stride) * kLanes, a[i]);
    }
}

static void hadamard(int d, float* y, Ahead& ahead) {
  hadamard_pass<16>(d, 1, y, ahead);
  int stride = 16;
  if (d >= 256) hadamard_pass<16>(d, stride, y, ahead), stride *= 16;
  if (d / stride == 8) hadamard_pass<8>(d, stride, y, ahead);
  if (d / stride == 4) hadamard_pass<4>(d, stride, y, ahead);
  if (d / stride == 2) hadamard_pass<2>(d, stride, y, ahead);
}

// y = R x, or Rᵀ x, for x [d][16]; rows of y up to the next multiple of kDenseTile are overwritten.
template <bool kInverse>
static void dense(const RotationPlan& plan, const float* x, float* y) {
  const int d = plan.head_dim;
  for (int to = 0; to < d; to += kRegisterSums) {
    f32x16 sums[kRegisterSums];
    for (f32x16& sum : sums) sum = set1(0.0f);
    for (int from = 0; from < d; from++) {
      const float* r = &plan.matrix[kInverse ? plan.dense_at(from, to) : plan.dense_at(to, from)];
      const f32x16 value = load(x + from * kLanes);
      for (int i = 0; i < kRegisterSums; i++) sums[i] = fma(set1(r[kInverse ? i * kDenseTile : i]), value, sums[i]);
    }
    for (int i = 0; i < kRegisterSums; i++) store(y + (to + i) * kLanes, sums[i]);
  }
}

static float* rotate_forward(const RotationPlan& plan, float* y, float* scratch, Ahead& ahead) {
  switch (plan.kind) {
    case Rotation::identity:
      for (int c = 0; c < plan.head_dim; c += kLanes / 2) ahead.fetch();  // as often as the others
      return y;
    case Rotation::srft:
      return real_fft(plan, y, scratch, ahead);
    case Rotation::srht:
      hadamard(plan.head_dim, y, ahead);
      return y;
    case Rotation::dense:
      dense<false>(plan, y, scratch);
      return scratch;
  }
  return y;
}

static float* rotate_back(const RotationPlan& plan, float* y, float* scratch) {
  Ahead nothing;
  switch (plan.kind) {
    case Rotation::identity:
      return y;
    case Rotation::srft:
      hartley(plan.head_dim, nullptr, y);
      y = real_fft(plan, y, scratch, nothing);
      hartley(plan.head_dim, &plan.factors[0], y);
      return y;
    case Rotation::srht:
      hadamard(plan.head_dim, y, nothing);
      for (int c = 0; c < plan.head_dim; c++) store(y + c * kLanes, mul(load(y + c * kLanes), set1(plan.factors[c])));
      return y;
    case Rotation::dense:
      dense<true>(plan, y, scratch);
      return scratch;
  }
  return y;
}

HALFBYTE_INLINE const float* load_factors(const RotationPlan& plan) {
  return plan.factors.empty() ? nullptr : &plan.factors[0];
}

static void rotate(const RotationPlan& plan, bool inverse, float* x, size_t stride, int n) {
  alignas(64) float y[kMaxHeadDim * kLanes], scratch[kMaxHeadDim * kLanes];
  const void* rows[kLanes];
  for (int i = 0; i < n; i++) rows[i] = x + i * stride;
  Ahead nothing;
  load_transposed({rows, n, Dtype::float32, plan.head_dim}, nullptr, inverse ? nullptr : load_factors(plan), y,
                  nothing);
  const float* turned = inverse ? rotate_back(plan, y, scratch) : rotate_forward(plan, y, scratch, nothing);
  store_transposed(turned, plan.head_dim, x, stride, n);
}
