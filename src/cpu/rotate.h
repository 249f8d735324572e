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
      prefetch(at + done);
      done += 64;
      const bool row_is_done = done >= bytes;
      at += row_is_done ? step : 0, done = row_is_done ? 0 : done;
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

// ---------------------------------------------------------------------------------------------- complex FFT

struct Complex {
  f32x16 re, im;
};

HALFBYTE_INLINE Complex load_complex(const float* p) { return {load(p), load(p + kLanes)}; }
HALFBYTE_INLINE void store_complex(float* p, Complex z) { store(p, z.re), store(p + kLanes, z.im); }
HALFBYTE_INLINE Complex add(Complex a, Complex b) { return {add(a.re, b.re), add(a.im, b.im)}; }
HALFBYTE_INLINE Complex sub(Complex a, Complex b) { return {sub(a.re, b.re), sub(a.im, b.im)}; }
HALFBYTE_INLINE Complex plus_scaled(Complex a, Complex b, float x) {
  return {fma(b.re, set1(x), a.re), fma(b.im, set1(x), a.im)};
}
HALFBYTE_INLINE Complex less_scaled(Complex a, Complex b, float x) {
  return {fnma(b.re, set1(x), a.re), fnma(b.im, set1(x), a.im)};
}
HALFBYTE_INLINE Complex plus_i(Complex a, Complex b) { return {sub(a.re, b.im), add(a.im, b.re)}; }  // a + i·b
HALFBYTE_INLINE Complex less_i(Complex a, Complex b) { return {add(a.re, b.im), sub(a.im, b.re)}; }  // a − i·b
HALFBYTE_INLINE Complex times(Complex a, float cos, float sin) {
  f32x16 c = set1(cos), s = set1(sin);
  return {fnma(a.im, s, mul(a.re, c)), fma(a.im, c, mul(a.re, s))};
}

// cos and sin of 2πk / radix, for odd radices.
template <int kRadix>
struct Roots;
template <>
struct Roots<3> {
  static constexpr float kCos[] = {1.0f, -0.5f, -0.5f}, kSin[] = {0.0f, 0.866025404f, -0.866025404f};
};
template <>
struct Roots<5> {
  static constexpr float kCos[] = {1.0f, 0.309016994f, -0.809016994f, -0.809016994f, 0.309016994f};
  static constexpr float kSin[] = {0.0f, 0.951056516f, 0.587785252f, -0.587785252f, -0.951056516f};
};
template <>
struct Roots<7> {
  static constexpr float kCos[] = {1.0f,          0.623489802f,  -0.222520934f, -0.900968868f,
                                   -0.900968868f, -0.222520934f, 0.623489802f};
  static constexpr float kSin[] = {0.0f,          0.781831482f,  0.974927912f, 0.433883739f,
                                   -0.433883739f, -0.974927912f, -0.781831482f};
};

// Short DFTs in registers: b_k = Σ_j a_j e^(−2πi jk / radix).
template <int kRadix>
HALFBYTE_INLINE void short_dft(Complex* a) {
  if constexpr (kRadix == 2) {
    Complex sum = add(a[0], a[1]);
    a[1] = sub(a[0], a[1]), a[0] = sum;
  } else if constexpr (kRadix == 4) {
    Complex s02 = add(a[0], a[2]), d02 = sub(a[0], a[2]), s13 = add(a[1], a[3]), d13 = sub(a[1], a[3]);
    a[0] = add(s02, s13), a[1] = less_i(d02, d13), a[2] = sub(s02, s13), a[3] = plus_i(d02, d13);
  } else if constexpr (kRadix == 8) {
    constexpr float kHalf = 0.707106781f;  // √½
    Complex even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    short_dft<4>(even), short_dft<4>(odd);
    // Eighth turns, but for √½: (1 − i)·odd[1] and −(1 + i)·odd[3].
    Complex turned1 = {add(odd[1].re, odd[1].im), sub(odd[1].im, odd[1].re)};
    Complex turned3 = {sub(odd[3].im, odd[3].re), add(odd[3].im, odd[3].re)};
    a[0] = add(even[0], odd[0]), a[4] = sub(even[0], odd[0]);
    a[1] = plus_scaled(even[1], turned1, kHalf), a[5] = less_scaled(even[1], turned1, kHalf);
    a[2] = less_i(even[2], odd[2]), a[6] = plus_i(even[2], odd[2]);
    a[3] = {fma(turned3.re, set1(kHalf), even[3].re), fnma(turned3.im, set1(kHalf), even[3].im)};
    a[7] = {fnma(turned3.re, set1(kHalf), even[3].re), fma(turned3.im, set1(kHalf), even[3].im)};
  } else {  // odd: inputs j and radix − j meet the same cosine, and opposite sines
    using Root = Roots<kRadix>;
    constexpr int kPairs = kRadix / 2;
    Complex sums[kPairs], gaps[kPairs], first = a[0];
    for (int j = 0; j < kPairs; j++) {
      sums[j] = add(a[j + 1], a[kRadix - 1 - j]), gaps[j] = sub(a[j + 1], a[kRadix - 1 - j]);
      a[0] = add(a[0], sums[j]);
    }
    for (int k = 1; k <= kPairs; k++) {
      Complex even = first, odd = {set1(0.0f), set1(0.0f)};
      for (int j = 0; j < kPairs; j++) {
        even = plus_scaled(even, sums[j], Root::kCos[(j + 1) * k % kRadix]);
        odd = plus_scaled(odd, gaps[j], Root::kSin[(j + 1) * k % kRadix]);
      }
      a[k] = less_i(even, odd), a[kRadix - k] = plus_i(even, odd);
    }
  }
}

// One Stockham pass, from [n complex][16] to another such buffer.
template <int kRadix>
static void fft_pass(const FftPass& pass, const float* twiddles, const float* from, float* to, Ahead& ahead) {
  constexpr int kStep = 2 * kLanes;
  const int stride = pass.stride, rest = pass.rest;
  for (int p = 0; p < rest; p++) {
    const float* twiddle = twiddles + 2 * kRadix * p;
    for (int q = 0; q < stride; q++) {
      ahead.fetch();
      Complex a[kRadix];
      for (int j = 0; j < kRadix; j++) a[j] = load_complex(from + kStep * (q + stride * (p + rest * j)));
      short_dft<kRadix>(a);
      if (p)
        for (int k = 1; k < kRadix; k++) a[k] = times(a[k], twiddle[2 * k], twiddle[2 * k + 1]);
      float* out = to + kStep * (q + stride * kRadix * p);
      for (int k = 0; k < kRadix; k++) store_complex(out + kStep * stride * k, a[k]);
    }
  }
}

// A prime radix over seven: the plain sum, with the roots that follow the pass's twiddles.
static void fft_pass_prime(const FftPass& pass, const float* twiddles, const float* from, float* to) {
  constexpr int kStep = 2 * kLanes;
  const int radix = pass.radix, stride = pass.stride, rest = pass.rest;
  const float* roots = twiddles + 2 * radix * rest;
  for (int p = 0; p < rest; p++)
    for (int q = 0; q < stride; q++)
      for (int k = 0; k < radix; k++) {
        Complex sum = load_complex(from + kStep * (q + stride * p));
        for (int j = 1; j < radix; j++) {
          const float* root = roots + 2 * (j * k % radix);
          sum = add(sum, times(load_complex(from + kStep * (q + stride * (p + rest * j))), root[0], root[1]));
        }
        const float* twiddle = twiddles + 2 * (radix * p + k);
        store_complex(to + kStep * (q + stride * (radix * p + k)), times(sum, twiddle[0], twiddle[1]));
      }
}

// Complex FFT of length n; the result is in the returned buffer, `a` or `b`.
static float* fft(const RotationPlan& plan, float* a, float* b, Ahead& ahead) {
  for (const FftPass& pass : plan.passes) {
    const float* twiddles = &plan.twiddles[pass.twiddle_at];
    switch (pass.radix) {
      case 2:
        fft_pass<2>(pass, twiddles, a, b, ahead);
        break;
      case 3:
        fft_pass<3>(pass, twiddles, a, b, ahead);
        break;
      case 4:
        fft_pass<4>(pass, twiddles, a, b, ahead);
        break;
      case 5:
        fft_pass<5>(pass, twiddles, a, b, ahead);
        break;
      case 7:
        fft_pass<7>(pass, twiddles, a, b, ahead);
        break;
      case 8:
        fft_pass<8>(pass, twiddles, a, b, ahead);
        break;
      default:
        fft_pass_prime(pass, twiddles, a, b);
    }
    float* swap = a;
    a = b, b = swap;
  }
  return a;
}

// ---------------------------------------------------------------------------------------------- rotations
//
// Each takes y [d][16] and as much scratch, and returns the one of the two that holds the result. plan.factors (signs
// and norm) come first on the way forward, where loading applies them, and last on the way back.

constexpr float kRoot2 = 1.41421356f;

// Real FFT by the half-length complex one, then the paper's packing of real and imaginary parts.
static float* srft_forward(const RotationPlan& plan, float* y, float* scratch, Ahead& ahead) {
  const int d = plan.head_dim, n = d / 2;
  float* z = fft(plan, y, scratch, ahead);
  float* out = z == y ? scratch : y;
  Complex z0 = load_complex(z);
  store(out, mul(add(z0.re, z0.im), set1(kRoot2)));
  store(out + n * kLanes, mul(sub(z0.re, z0.im), set1(kRoot2)));
  for (int k = 1; k <= n / 2 + n % 2 && k < n; k++) {
    Complex a = load_complex(z + 2 * kLanes * k), b = load_complex(z + 2 * kLanes * (n - k));
    Complex even = {add(a.re, b.re), sub(a.im, b.im)}, odd = {add(a.im, b.im), sub(b.re, a.re)};  // twice E, O
    Complex turned = times(odd, plan.unpack[2 * k], plan.unpack[2 * k + 1]);
    store(out + k * kLanes, add(even.re, turned.re));
    store(out + (n + k) * kLanes, add(even.im, turned.im));
    store(out + (n - k) * kLanes, sub(even.re, turned.re));
    store(out + (d - k) * kLanes, sub(turned.im, even.im));
  }
  return out;
}

static float* srft_inverse(const RotationPlan& plan, float* y, float* scratch) {
  const int d = plan.head_dim, n = d / 2;
  f32x16 first = mul(load(y), set1(kRoot2)), last = mul(load(y + n * kLanes), set1(kRoot2));
  // Real and imaginary parts change places here and at the end: a forward FFT then does the inverse.
  store_complex(scratch, {sub(first, last), add(first, last)});
  for (int k = 1; k <= n / 2 + n % 2 && k < n; k++) {
    Complex a = {load(y + k * kLanes), load(y + (n + k) * kLanes)};
    Complex b = {load(y + (n - k) * kLanes), load(y + (d - k) * kLanes)};
    Complex even = {add(a.re, b.re), sub(a.im, b.im)};
    Complex odd = times({sub(a.re, b.re), add(a.im, b.im)}, plan.unpack[2 * k], -plan.unpack[2 * k + 1]);
    store_complex(scratch + 2 * kLanes * k, {add(even.im, odd.re), sub(even.re, odd.im)});
    store_complex(scratch + 2 * kLanes * (n - k), {sub(odd.re, even.im), add(even.re, odd.im)});
  }
  Ahead nothing;
  float* z = fft(plan, scratch, y, nothing);
  for (int m = 0; m < n; m++) {
    Complex w = load_complex(z + 2 * kLanes * m);
    store_complex(z + 2 * kLanes * m, {mul(w.im, set1(plan.factors[2 * m])), mul(w.re, set1(plan.factors[2 * m + 1]))});
  }
  return z;
}

static void hadamard(int d, float* y) {
  for (int h = 1; h < d; h *= 2)
    for (int i = 0; i < d; i += 2 * h)
      for (int j = i; j < i + h; j++) {
        f32x16 a = load(y + j * kLanes), b = load(y + (j + h) * kLanes);
        store(y + j * kLanes, add(a, b));
        store(y + (j + h) * kLanes, sub(a, b));
      }
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
      return y;
    case Rotation::srft:
      return srft_forward(plan, y, scratch, ahead);
    case Rotation::srht:
      hadamard(plan.head_dim, y);
      return y;
    case Rotation::dense:
      dense<false>(plan, y, scratch);
      return scratch;
  }
  return y;
}

static float* rotate_back(const RotationPlan& plan, float* y, float* scratch) {
  switch (plan.kind) {
    case Rotation::identity:
      return y;
    case Rotation::srft:
      return srft_inverse(plan, y, scratch);
    case Rotation::srht:
      hadamard(plan.head_dim, y);
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
