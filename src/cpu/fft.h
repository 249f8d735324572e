// Fourier transforms of real vectors of any even length, sixteen in lanes. Included by rotate.h.

struct Complex {
  f32x16 re, im;
};

HALFBYTE_INLINE Complex take_complex(const float* p) { return {take(p), take(p + kLanes)}; }
HALFBYTE_INLINE void store_complex(float* p, Complex z) { store(p, z.re), store(p + kLanes, z.im); }
HALFBYTE_INLINE Complex add(Complex a, Complex b) { return {add(a.re, b.re), add(a.im, b.im)}; }
HALFBYTE_INLINE Complex sub(Complex a, Complex b) { return {sub_too(a.re, b.re), sub_too(a.im, b.im)}; }
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
  } else if constexpr (kRadix > 1) {  // odd: inputs j and radix − j meet the same cosine, and opposite sines
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

// Part of the DFT of `kLength` real numbers, one output of each two that mirror each other: slots[0] = the sums of x at
// even and at odd places, and from slots[kLength / 4] the outputs 1, 5, 9 …; between them the same of half the length.
template <int kLength>
HALFBYTE_INLINE void real_dft(const f32x16* x, Complex* slots) {
  if constexpr (kLength == 2) {
    slots[0] = {x[0], x[1]};
  } else {
    constexpr float kCos[] = {1.0f, 0.923879533f, 0.707106781f, 0.382683432f};  // of n sixteenths of a turn
    constexpr float kSin[] = {0.0f, 0.382683432f, 0.707106781f, 0.923879533f};
    constexpr int kHalf = kLength / 2, kQuarter = kLength / 4;
    f32x16 sums[kHalf];
    Complex* odd = slots + kQuarter;
    HALFBYTE_UNROLL for (int n = 0; n < kHalf; n++) sums[n] = add(x[n], x[n + kHalf]);
    HALFBYTE_UNROLL for (int n = 0; n < kQuarter; n++) {
      const int quarter_on = n + kQuarter;  // whose gap counts −i times
      odd[n] = {sub_too(x[n], x[n + kHalf]), sub_too(x[quarter_on + kHalf], x[quarter_on])};
      if (n) odd[n] = times(odd[n], kCos[16 / kLength * n], -kSin[16 / kLength * n]);
    }
    short_dft<kQuarter>(odd);
    real_dft<kHalf>(sums, slots);
  }
}

// The first pass where 16 divides the length: y [d][16] becomes kFftSlots complex transforms side by side. That of slot
// 0 is of real numbers, two in a complex one.
static void real_pass(const RotationPlan& plan, const float* y, float* to, Ahead& ahead) {
  constexpr int kRadix = 2 * kFftSlots, kStep = 2 * kLanes * kFftSlots;
  const int length = plan.head_dim / kRadix;
  for (int n = 0; n < length; n++) {
    ahead.fetch();
    f32x16 x[kRadix];
    Complex slots[kFftSlots];
    HALFBYTE_UNROLL for (int j = 0; j < kRadix; j++) x[j] = take(y + kLanes * (n + length * j));
    real_dft<kRadix>(x, slots);
    store(to + kStep * (n / 2) + kLanes * (n % 2), slots[0].re);
    store(to + kStep * ((n + length) / 2) + kLanes * ((n + length) % 2), slots[0].im);
    const float* twiddle = &plan.twiddles[2 * kFftSlots * n];
    HALFBYTE_UNROLL for (int s = 1; s < kFftSlots; s++)
        store_complex(to + kStep * n + 2 * kLanes * s, times(slots[s], twiddle[2 * s], twiddle[2 * s + 1]));
  }
}

// Where a pass leaves its results: complex numbers [n][16] for the next one …
struct SideBySide {
  float* to;
  __attribute__((always_inline)) void put(int i, Complex z) const { store_complex(to + 2 * kLanes * i, z); }
};

// … or, after the last, real parts at their channels and imaginary ones n behind them.
struct Apart {
  float* to;
  const FftPlace* places;
  int n;
  __attribute__((always_inline)) void put(int i, Complex z) const {
    float* real = to + kLanes * places[i].channel;
    store(real, z.re);
    store(real + kLanes * n, mul(z.im, set1(places[i].sign)));
  }
};

// One Stockham pass from [n complex][16].
template <int kRadix, class Output>
static void fft_pass(const FftPass& pass, const float* twiddles, const float* from, Output out, Ahead& ahead) {
  constexpr int kStep = 2 * kLanes;
  const int stride = pass.stride, rest = pass.rest;
  for (int p = 0; p < rest; p++) {
    const float* twiddle = twiddles + 2 * kRadix * p;
    for (int q = 0; q < stride; q++) {
      ahead.fetch();
      Complex a[kRadix];
      const float* in = from + kStep * (q + stride * p);
      HALFBYTE_UNROLL for (int j = 0; j < kRadix; j++) a[j] = take_complex(in + kStep * stride * rest * j);
      short_dft<kRadix>(a);
      if (p) HALFBYTE_UNROLL for (int k = 1; k < kRadix; k++) a[k] = times(a[k], twiddle[2 * k], twiddle[2 * k + 1]);
      HALFBYTE_UNROLL for (int k = 0; k < kRadix; k++) out.put(q + stride * (kRadix * p + k), a[k]);
    }
  }
}

// A prime radix over seven: the plain sum, with the roots that follow the pass's twiddles.
template <class Output>
static void fft_pass_prime(const FftPass& pass, const float* twiddles, const float* from, Output out) {
  constexpr int kStep = 2 * kLanes;
  const int radix = pass.radix, stride = pass.stride, rest = pass.rest;
  const float* roots = twiddles + 2 * radix * rest;
  for (int p = 0; p < rest; p++)
    for (int q = 0; q < stride; q++)
      for (int k = 0; k < radix; k++) {
        Complex sum = take_complex(from + kStep * (q + stride * p));
        for (int j = 1; j < radix; j++) {
          const float* root = roots + 2 * (j * k % radix);
          sum = add(sum, times(take_complex(from + kStep * (q + stride * (p + rest * j))), root[0], root[1]));
        }
        const float* twiddle = twiddles + 2 * (radix * p + k);
        out.put(q + stride * (radix * p + k), times(sum, twiddle[0], twiddle[1]));
      }
}

template <class Output>
static void fft_pass(const FftPass& pass, const float* twiddles, const float* from, Output out, Ahead& ahead) {
  switch (pass.radix) {
    case 2:
      return fft_pass<2>(pass, twiddles, from, out, ahead);
    case 3:
      return fft_pass<3>(pass, twiddles, from, out, ahead);
    case 4:
      return fft_pass<4>(pass, twiddles, from, out, ahead);
    case 5:
      return fft_pass<5>(pass, twiddles, from, out, ahead);
    case 7:
      return fft_pass<7>(pass, twiddles, from, out, ahead);
    case 8:
      return fft_pass<8>(pass, twiddles, from, out, ahead);
    default:
      return fft_pass_prime(pass, twiddles, from, out);
  }
}

// Slot 0 took two real numbers for a complex one: turns its outputs, each at its channel, into those of the real ones.
static void split_pairs(const RotationPlan& plan, float* y) {
  constexpr float kRootHalf = 0.707106781f;
  const f32x16 half = set1(0.5f);
  const int n = plan.head_dim / 2, step = plan.fft_slots;
  auto load_at = [&](int c) { return Complex{load(y + c * kLanes), load(y + (n + c) * kLanes)}; };
  const Complex ends = load_at(0);
  store(y, mul(add(ends.re, ends.im), set1(kRootHalf)));
  store(y + n * kLanes, mul(sub(ends.re, ends.im), set1(kRootHalf)));
  for (int c = step; c <= n / 2; c += step) {
    const Complex a = load_at(c), b = load_at(n - c);
    const Complex even = {add(a.re, b.re), sub(a.im, b.im)}, odd = {add(a.im, b.im), sub(b.re, a.re)};  // twice E, O
    const Complex turned = times(odd, plan.half_roots[2 * c], plan.half_roots[2 * c + 1]);
    store(y + c * kLanes, fma(even.re, half, turned.re));
    store(y + (n + c) * kLanes, fma(even.im, half, turned.im));
    store(y + (n - c) * kLanes, sub(mul(even.re, half), turned.re));
    store(y + (2 * n - c) * kLanes, fnma(even.im, half, turned.im));
  }
}

// X = DFT of y [d][16], half-complex: X_0 / √2, Re X_1 …, then X_{d/2} / √2, Im X_1 …; it ends up in y or `scratch`,
// which is returned.
static float* real_fft(const RotationPlan& plan, float* y, float* scratch, Ahead& ahead) {
  float *from = y, *to = scratch;
  auto swap = [&] {
    float* filled = to;
    to = from, from = filled;
  };
  if (plan.fft_slots > 1) real_pass(plan, from, to, ahead), swap();
  for (const FftPass& pass : plan.passes) {
    const float* twiddles = &plan.twiddles[pass.twiddle_at];
    if (pass.rest > 1)
      fft_pass(pass, twiddles, from, SideBySide{to}, ahead);
    else
      fft_pass(pass, twiddles, from, Apart{to, &plan.places[0], plan.head_dim / 2}, ahead);
    swap();
  }
  split_pairs(plan, from);
  return from;
}
