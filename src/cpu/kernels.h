// The CPU kernels, written once over simd.h: rotate, encode, decode, attend. Included inside the target's namespace.
//
// Vectors are worked on sixteen at a time, lane = token: a channel of sixteen tokens is one register, so rotations,
// maxima and packing need no horizontal steps. A buffer of that kind is float [channels][16].

constexpr int kLanes = kBlockTokens;
constexpr float kNothing = -1e30f;   // attend.h's, which a kernel does not include

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

// Sixteen rows of d channels → y [d][16]. Rows behind n repeat row 0, so that every lane holds numbers.
static void load_transposed(const void* const* rows, int n, Dtype dtype, int d, float* y) {
  for (int c = 0; c < d; c += kLanes) {
    int width = d - c < kLanes ? d - c : kLanes;
    f32x16 tile[kLanes];
    for (int t = 0; t < kLanes; t++) {
      const void* row = rows[t < n ? t : 0];
      tile[t] = width == kLanes ? load_channels(row, dtype, c) : load_some_channels(row, dtype, c, width);
    }
    transpose16(tile);
    for (int i = 0; i < width; i++) store(y + (c + i) * kLanes, tile[i]);
  }
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

// ---------------------------------------------------------------------------------------------- rotation

struct Complex {
  f32x16 re, im;
};

HALFBYTE_INLINE Complex load_complex(const float* p) { return {load(p), load(p + kLanes)}; }
HALFBYTE_INLINE void store_complex(float* p, Complex z) { store(p, z.re), store(p + kLanes, z.im); }
HALFBYTE_INLINE Complex add(Complex a, Complex b) { return {add(a.re, b.re), add(a.im, b.im)}; }
HALFBYTE_INLINE Complex sub(Complex a, Complex b) { return {sub(a.re, b.re), sub(a.im, b.im)}; }
HALFBYTE_INLINE Complex times_minus_i(Complex a) { return {a.im, sub(set1(0.0f), a.re)}; }
HALFBYTE_INLINE Complex times(Complex a, float cos, float sin) {
  f32x16 c = set1(cos), s = set1(sin);
  return {fnma(a.im, s, mul(a.re, c)), fma(a.im, c, mul(a.re, s))};
}

// Short DFTs in registers: b_k = Σ_j a_j e^(−2πi jk / radix).
template <int kRadix>
HALFBYTE_INLINE void short_dft(Complex* a) {
  if constexpr (kRadix == 2) {
    Complex sum = add(a[0], a[1]);
    a[1] = sub(a[0], a[1]), a[0] = sum;
  } else if constexpr (kRadix == 3) {
    constexpr float kSin = 0.866025404f;   // sin(2π/3)
    Complex sum = add(a[1], a[2]), turn = times_minus_i(sub(a[1], a[2]));
    Complex mid = {fnma(sum.re, set1(0.5f), a[0].re), fnma(sum.im, set1(0.5f), a[0].im)};
    turn = {mul(turn.re, set1(kSin)), mul(turn.im, set1(kSin))};
    a[0] = add(a[0], sum), a[1] = add(mid, turn), a[2] = sub(mid, turn);
  } else if constexpr (kRadix == 4) {
    Complex s02 = add(a[0], a[2]), d02 = sub(a[0], a[2]);
    Complex s13 = add(a[1], a[3]), d13 = times_minus_i(sub(a[1], a[3]));
    a[0] = add(s02, s13), a[1] = add(d02, d13), a[2] = sub(s02, s13), a[3] = sub(d02, d13);
  } else {
    constexpr float kCos1 = 0.309016994f, kCos2 = -0.809016994f, kSin1 = 0.951056516f, kSin2 = 0.587785252f;
    Complex s14 = add(a[1], a[4]), s23 = add(a[2], a[3]);
    Complex d14 = times_minus_i(sub(a[1], a[4])), d23 = times_minus_i(sub(a[2], a[3]));
    auto even = [&](float c14, float c23) {
      return Complex{fma(s14.re, set1(c14), fma(s23.re, set1(c23), a[0].re)),
                     fma(s14.im, set1(c14), fma(s23.im, set1(c23), a[0].im))};
    };
    auto odd = [&](float c14, float c23) {
      return Complex{fma(d14.re, set1(c14), mul(d23.re, set1(c23))), fma(d14.im, set1(c14), mul(d23.im, set1(c23)))};
    };
    Complex e1 = even(kCos1, kCos2), e2 = even(kCos2, kCos1), o1 = odd(kSin1, kSin2), o2 = odd(kSin2, -kSin1);
    a[0] = add(a[0], add(s14, s23));
    a[1] = add(e1, o1), a[4] = sub(e1, o1), a[2] = add(e2, o2), a[3] = sub(e2, o2);
  }
}

// One Stockham pass, from [n complex][16] to another such buffer.
template <int kRadix>
static void fft_pass(const FftPass& pass, const float* twiddles, const float* from, float* to) {
  constexpr int kStep = 2 * kLanes;
  const int stride = pass.stride, rest = pass.rest;
  for (int p = 0; p < rest; p++) {
    const float* twiddle = twiddles + 2 * kRadix * p;
    for (int q = 0; q < stride; q++) {
      Complex a[kRadix];
      for (int j = 0; j < kRadix; j++) a[j] = load_complex(from + kStep * (q + stride * (p + rest * j)));
      short_dft<kRadix>(a);
      float* out = to + kStep * (q + stride * kRadix * p);
      store_complex(out, a[0]);
      for (int k = 1; k < kRadix; k++)
        store_complex(out + kStep * stride * k, p ? times(a[k], twiddle[2 * k], twiddle[2 * k + 1]) : a[k]);
    }
  }
}

// A prime radix over five: the plain sum, with the roots that follow the pass's twiddles.
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
static float* fft(const RotationPlan& plan, float* a, float* b) {
  for (const FftPass& pass : plan.passes) {
    const float* twiddles = &plan.twiddles[pass.twiddle_at];
    switch (pass.radix) {
      case 2: fft_pass<2>(pass, twiddles, a, b); break;
      case 3: fft_pass<3>(pass, twiddles, a, b); break;
      case 4: fft_pass<4>(pass, twiddles, a, b); break;
      case 5: fft_pass<5>(pass, twiddles, a, b); break;
      default: fft_pass_prime(pass, twiddles, a, b);
    }
    float* swap = a;
    a = b, b = swap;
  }
  return a;
}

HALFBYTE_INLINE void flip_signs(const RotationPlan& plan, float* y) {
  const float* signs = &plan.signs[0];
  for (int c = 0; c < plan.head_dim; c++) store(y + c * kLanes, mul(load(y + c * kLanes), set1(signs[c])));
}

// Forward SRFT of y [d][16]: real FFT by the half-length complex one, then the paper's packing of real and imaginary
// parts. `scratch` is as large as y; the result is in the returned one of the two.
static float* srft_forward(const RotationPlan& plan, float* y, float* scratch) {
  const int d = plan.head_dim, n = d / 2;
  flip_signs(plan, y);
  float* z = fft(plan, y, scratch);
  float* out = z == y ? scratch : y;
  const f32x16 unit = set1(1.0f / __builtin_sqrtf((float)d)), half = set1(__builtin_sqrtf(0.5f / (float)d));
  Complex z0 = load_complex(z);
  store(out, mul(add(z0.re, z0.im), unit));
  store(out + n * kLanes, mul(sub(z0.re, z0.im), unit));
  for (int k = 1; k <= n / 2 + n % 2 && k < n; k++) {
    Complex a = load_complex(z + 2 * kLanes * k), b = load_complex(z + 2 * kLanes * (n - k));
    Complex even = {add(a.re, b.re), sub(a.im, b.im)}, odd = {add(a.im, b.im), sub(b.re, a.re)};   // twice E, O
    Complex turned = times(odd, plan.unpack[2 * k], plan.unpack[2 * k + 1]);
    store(out + k * kLanes, mul(add(even.re, turned.re), half));
    store(out + (n + k) * kLanes, mul(add(even.im, turned.im), half));
    store(out + (n - k) * kLanes, mul(sub(even.re, turned.re), half));
    store(out + (d - k) * kLanes, mul(sub(turned.im, even.im), half));
  }
  return out;
}

static float* srft_inverse(const RotationPlan& plan, float* y, float* scratch) {
  const int d = plan.head_dim, n = d / 2;
  const f32x16 unit = set1(0.5f * __builtin_sqrtf((float)d) / (float)n), half = mul(unit, set1(0.707106781f));
  f32x16 first = mul(load(y), unit), last = mul(load(y + n * kLanes), unit);
  // Real and imaginary parts change places here and at the end: a forward FFT then does the inverse.
  store_complex(scratch, {sub(first, last), add(first, last)});
  for (int k = 1; k <= n / 2 + n % 2 && k < n; k++) {
    Complex a = {mul(load(y + k * kLanes), half), mul(load(y + (n + k) * kLanes), half)};
    Complex b = {mul(load(y + (n - k) * kLanes), half), mul(load(y + (d - k) * kLanes), half)};
    Complex even = {add(a.re, b.re), sub(a.im, b.im)};
    Complex odd = times({sub(a.re, b.re), add(a.im, b.im)}, plan.unpack[2 * k], -plan.unpack[2 * k + 1]);
    store_complex(scratch + 2 * kLanes * k, {add(even.im, odd.re), sub(even.re, odd.im)});
    store_complex(scratch + 2 * kLanes * (n - k), {sub(odd.re, even.im), add(even.re, odd.im)});
  }
  float* z = fft(plan, scratch, y);
  for (int m = 0; m < n; m++) {
    Complex w = load_complex(z + 2 * kLanes * m);
    store_complex(z + 2 * kLanes * m, {w.im, w.re});
  }
  flip_signs(plan, z);
  return z;
}

static float* srht(const RotationPlan& plan, bool inverse, float* y) {
  const int d = plan.head_dim;
  if (!inverse) flip_signs(plan, y);
  for (int h = 1; h < d; h *= 2)
    for (int i = 0; i < d; i += 2 * h)
      for (int j = i; j < i + h; j++) {
        f32x16 a = load(y + j * kLanes), b = load(y + (j + h) * kLanes);
        store(y + j * kLanes, add(a, b));
        store(y + (j + h) * kLanes, sub(a, b));
      }
  const f32x16 unit = set1(1.0f / __builtin_sqrtf((float)d));
  for (int c = 0; c < d; c++) store(y + c * kLanes, mul(load(y + c * kLanes), unit));
  if (inverse) flip_signs(plan, y);
  return y;
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

static float* rotate_lanes(const RotationPlan& plan, bool inverse, float* y, float* scratch) {
  if (plan.kind == Rotation::identity) return y;
  if (plan.kind == Rotation::srht) return srht(plan, inverse, y);
  if (plan.kind == Rotation::dense) {
    inverse ? dense<true>(plan, y, scratch) : dense<false>(plan, y, scratch);
    return scratch;
  }
  return inverse ? srft_inverse(plan, y, scratch) : srft_forward(plan, y, scratch);
}

static void rotate(const RotationPlan& plan, bool inverse, float* x, size_t stride, int n) {
  alignas(64) float y[kMaxHeadDim * kLanes], scratch[kMaxHeadDim * kLanes];
  const void* rows[kLanes];
  for (int i = 0; i < n; i++) rows[i] = x + i * stride;
  load_transposed(rows, n, Dtype::float32, plan.head_dim, y);
  store_transposed(rotate_lanes(plan, inverse, y, scratch), plan.head_dim, x, stride, n);
}

// ---------------------------------------------------------------------------------------------- encode

HALFBYTE_INLINE f32x16 stored_scale(const SideFormat& format, f32x16 scale) {
  return format.scale_bytes == 4 ? scale : round_f16(scale);
}

HALFBYTE_INLINE f32x16 inverse_scale(f32x16 scale) {   // a group of zeros has scale 0, and codes 0
  mask16 used = greater(abs(scale), set1(0.0f));
  return select(used, div(set1(1.0f), select(used, scale, set1(1.0f))), set1(0.0f));
}

// Scale of one group in each lane; y: its channels [channels][16]. The rule is choose_scale's in encode.cpp.
static f32x16 choose_scale(const SideFormat& format, const float* y, int channels) {
  f32x16 high = load(y), low = high;
  for (int c = 1; c < channels; c++) high = max(high, load(y + c * kLanes)), low = min(low, load(y + c * kLanes));
  f32x16 depth = sub(set1(0.0f), low);
  const float half = (float)zero_code(format.bits);
  f32x16 covering = format.signed_scale ? mul(select(greater_equal(high, depth), high, low), set1(-1.0f / half))
                                        : mul(max(high, depth), set1(1.0f / (half - 1.0f)));
  const float* factors = format.signed_scale ? kSearchSigned : kSearch;
  f32x16 best = stored_scale(format, mul(covering, set1(factors[0])));
  if (!format.search) return best;
  f32x16 best_error = set1(0.0f), lowest = set1(-half), highest = set1(half - 1.0f);
  for (int i = 0; i < kSearchSize; i++) {
    f32x16 scale = stored_scale(format, mul(covering, set1(factors[i]))), inverse = inverse_scale(scale);
    f32x16 error = set1(0.0f);
    for (int c = 0; c < channels; c++) {
      f32x16 value = load(y + c * kLanes);
      f32x16 code = min(max(round(mul(value, inverse)), lowest), highest), left = fnma(code, scale, value);
      error = fma(left, left, error);
    }
    mask16 better = i ? greater(best_error, error) : (mask16)0xffff;
    best = select(better, scale, best), best_error = select(better, error, best_error);
  }
  return best;
}

// Rotated vectors and what turns them into codes.
struct Quantiser {
  const float* y;              // [padded_dim][16]
  const float* inverse;        // [padded_dim / 16][16]: 1 / scale of each 16 channels
  f32x16 lowest, highest, zero;
};

// Unsigned codes of one channel.
HALFBYTE_INLINE i32x16 code_of(const Quantiser& from, int channel) {
  f32x16 steps = round(mul(load(from.y + channel * kLanes), load(from.inverse + channel / 16 * kLanes)));
  return to_i32(add(min(max(steps, from.lowest), from.highest), from.zero));
}

// K rows: the four bytes of a lane are four channels, so shifting registers packs them.
template <int kBits>
static void pack_k(const Quantiser& from, int padded_dim, uint8_t* codes) {
  for (int span = 0; span < padded_dim; span += kSpan)
    for (int row = 0; row < (kBits == 4 ? 4 : 8); row++, codes += kRowBytes) {
      int c = span + 4 * row;
      i32x16 word = bit_or(bit_or(code_of(from, c), shift_left<8>(code_of(from, c + 1))),
                           bit_or(shift_left<16>(code_of(from, c + 2)), shift_left<24>(code_of(from, c + 3))));
      if constexpr (kBits == 4) {
        i32x16 high = bit_or(bit_or(code_of(from, c + 16), shift_left<8>(code_of(from, c + 17))),
                             bit_or(shift_left<16>(code_of(from, c + 18)), shift_left<24>(code_of(from, c + 19))));
        word = bit_or(word, shift_left<4>(high));
      }
      store((int32_t*)codes, word);
    }
}

// V rows: the four bytes of a lane are four tokens of one channel, so words of channels change places.
template <int kBits>
static void pack_v(const Quantiser& from, int padded_dim, uint8_t* codes) {
  alignas(64) uint32_t words[kLanes][4];   // [channel][four tokens each]
  for (int c = 0; c < padded_dim; c += kBits == 4 ? kSpan : kLanes) {
    for (int i = 0; i < kLanes; i++) {
      i32x16 byte = code_of(from, c + i);
      if constexpr (kBits == 4) byte = bit_or(byte, shift_left<4>(code_of(from, c + 16 + i)));
      store_low_bytes(words[i], byte);
    }
    for (int row = 0; row < 4; row++, codes += kRowBytes) {
      alignas(64) uint32_t out[kLanes];
      for (int i = 0; i < kLanes; i++) out[i] = words[i][row];
      memcpy(codes, out, kRowBytes);
    }
  }
}

static void pack(const EncodeArgs& args, const Quantiser& from, uint8_t* codes) {
  const int padded_dim = args.format->padded_dim;
  if (args.side == Side::k) {
    if (args.format->bits == 4) pack_k<4>(from, padded_dim, codes);
    else pack_k<8>(from, padded_dim, codes);
  } else {
    if (args.format->bits == 4) pack_v<4>(from, padded_dim, codes);
    else pack_v<8>(from, padded_dim, codes);
  }
}

// Copies the codes of tokens [first, first + n) only; the block's other tokens stay.
static void copy_tokens(const EncodeArgs& args, const uint8_t* from, uint8_t* to) {
  const int bits = args.format->bits;
  for (int t = args.first_lane; t < args.first_lane + args.n; t++)
    for (int c = 0; c < args.format->padded_dim; c++) {
      CodePlace place = args.side == Side::k ? k_code_place(bits, t, c) : v_code_place(bits, t, c);
      int mask = bits == 4 ? 15 << place.shift : 255;
      to[place.byte] = (uint8_t)((to[place.byte] & ~mask) | (from[place.byte] & mask));
    }
}

static void store_scales(const EncodeArgs& args, int group, const float* lanes) {
  const SideFormat& format = *args.format;
  uint8_t* row = args.scales + group * scale_row_bytes(format);
  alignas(64) uint16_t narrow[kLanes];
  store_f16(narrow, load(lanes));
  const uint8_t* from = format.scale_bytes == 4 ? (const uint8_t*)lanes : (const uint8_t*)narrow;
  memcpy(row + args.first_lane * format.scale_bytes, from, args.n * format.scale_bytes);
}

// y [d][16] of the given vectors, rotated, scaled by λ, zero up to padded_dim; in one of the two buffers.
static float* load_rotated(const EncodeArgs& args, float* a, float* b) {
  const int d = args.format->head_dim;
  load_transposed(args.rows, args.n, args.dtype, d, a);
  if (args.offset)
    for (int c = 0; c < d; c++) store(a + c * kLanes, sub(load(a + c * kLanes), set1(args.offset[c])));
  float* y = rotate_lanes(*args.rotation, false, a, b);
  if (args.lambda)
    for (int c = 0; c < d; c++) store(y + c * kLanes, mul(load(y + c * kLanes), set1(args.lambda[c])));
  for (int c = d; c < args.format->padded_dim; c++) store(y + c * kLanes, set1(0.0f));
  return y;
}

static void encode(const EncodeArgs& args) {
  const SideFormat& format = *args.format;
  alignas(64) float a[kMaxHeadDim * kLanes], b[kMaxHeadDim * kLanes];
  alignas(64) float inverse[kMaxHeadDim / 16 * kLanes], scales[kLanes];
  const float* y = load_rotated(args, a, b);
  for (int g = 0; g < format.n_groups; g++) {
    int from = g * format.group, to = from + format.group < format.padded_dim ? from + format.group : format.padded_dim;
    f32x16 scale = choose_scale(format, y + from * kLanes, to - from);
    for (int c = from; c < to; c += 16) store(inverse + c / 16 * kLanes, inverse_scale(scale));
    store(scales, scale);
    store_scales(args, g, scales);
  }
  const float half = (float)zero_code(format.bits);
  const bool whole_range = format.signed_scale || format.search;
  Quantiser from = {y, inverse, set1(whole_range ? -half : 1.0f - half), set1(half - 1.0f), set1(half)};
  if (args.n == kLanes) {
    pack(args, from, args.codes);
    return;
  }
  // Part of a block: shift the lanes to their tokens, pack aside, and take just those.
  alignas(64) float moved[kMaxHeadDim * kLanes], moved_inverse[kMaxHeadDim / 16 * kLanes] = {};
  alignas(64) uint8_t aside[kMaxHeadDim * kLanes];
  for (int c = 0; c < format.padded_dim; c++) {
    for (int i = 0; i < kLanes; i++) moved[c * kLanes + i] = 0.0f;
    for (int i = 0; i < args.n; i++) moved[c * kLanes + args.first_lane + i] = y[c * kLanes + i];
  }
  for (int g = 0; g < format.padded_dim / 16; g++)
    for (int i = 0; i < args.n; i++) moved_inverse[g * kLanes + args.first_lane + i] = inverse[g * kLanes + i];
  from.y = moved, from.inverse = moved_inverse;
  pack(args, from, aside);
  copy_tokens(args, aside, args.codes);
}

// ---------------------------------------------------------------------------------------------- decode

HALFBYTE_INLINE f32x16 load_scales(const SideFormat& format, const uint8_t* scales, int group) {
  const uint8_t* row = scales + group * scale_row_bytes(format);
  return format.scale_bytes == 4 ? load((const float*)row) : load_f16((const uint16_t*)row);
}

static void decode(const DecodeArgs& args) {
  const SideFormat& format = *args.format;
  const int d = format.head_dim, zero = zero_code(format.bits), mask = format.bits == 4 ? 15 : 255;
  alignas(64) float y[kMaxHeadDim * kLanes], scratch[kMaxHeadDim * kLanes];
  for (int c = 0; c < d; c++) {
    alignas(64) float value[kLanes];
    for (int t = 0; t < kLanes; t++) {
      CodePlace place = args.side == Side::k ? k_code_place(format.bits, t, c) : v_code_place(format.bits, t, c);
      value[t] = (float)((args.codes[place.byte] >> place.shift & mask) - zero);
    }
    f32x16 scaled = mul(load(value), load_scales(format, args.scales, c / format.group));
    store(y + c * kLanes, args.inverse_lambda ? mul(scaled, set1(args.inverse_lambda[c])) : scaled);
  }
  float* x = rotate_lanes(*args.rotation, true, y, scratch);
  if (args.offset)
    for (int c = 0; c < d; c++) store(x + c * kLanes, add(load(x + c * kLanes), set1(args.offset[c])));
  store_transposed(x, d, args.out, d, kLanes);
}
