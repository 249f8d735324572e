// The rotation R in shared memory: SRFT as a Stockham FFT, SRHT as butterflies, any other as a matrix product.
#pragma once

#include "gpu/element.h"

namespace halfbyte {
namespace gpu {

// R of one side. All null: the identity.
struct RotationTable {
  gpu_global const float* r;           // any R as a matrix [d][d], y_i = Σ r[i][j] x_j, or null
  gpu_global const float* transposed;  // [d][d]
  gpu_global const float* factors;     // SRFT and SRHT: [d] signs times norm, 1/√(2d) and 1/√d; or null
  gpu_global const float* roots;       // SRFT: [d] pairs (cos, sin) of −2πk / d
};

// Where the channels of some vectors lie.
struct VectorSpace {
  gpu_shared float* x;
  int vector_step, channel_step;
};

gpu_fn gpu_shared float* channel_at(VectorSpace space, int vector, int channel) {
  return space.x + vector * space.vector_step + channel * space.channel_step;
}

// ---- Complex numbers and small transforms: a[k] ← Σ a[j] e^(−2πi jk / radix)

gpu_constexpr float kSqrt2 = 1.41421356237310f;
gpu_constexpr float kSin60 = 0.866025403784439f;
gpu_constexpr float kCos72 = 0.309016994374947f;
gpu_constexpr float kSin72 = 0.951056516295154f;
gpu_constexpr float kCos144 = -0.809016994374947f;
gpu_constexpr float kSin144 = 0.587785252292473f;

struct Complex {
  float re, im;
};

gpu_fn Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
gpu_fn Complex sub(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
gpu_fn Complex times(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
gpu_fn Complex plus_scaled(Complex a, Complex b, float x) { return {a.re + b.re * x, a.im + b.im * x}; }
gpu_fn Complex plus_i(Complex a, Complex b, float x) { return {a.re - b.im * x, a.im + b.re * x}; }  // a + i·x·b
gpu_fn Complex conjugate(Complex a) { return {a.re, -a.im}; }

gpu_fn Complex load_complex(VectorSpace space, int vector, int i) {
  return {*channel_at(space, vector, 2 * i), *channel_at(space, vector, 2 * i + 1)};
}
gpu_fn void store_complex(VectorSpace space, int vector, int i, Complex z) {
  *channel_at(space, vector, 2 * i) = z.re, *channel_at(space, vector, 2 * i + 1) = z.im;
}
gpu_fn Complex root_at(gpu_global const float* roots, int k) { return {roots[2 * k], roots[2 * k + 1]}; }

template <int Radix>
struct Dft;

template <>
struct Dft<2> {
  gpu_fn void run(gpu_local Complex* a) {
    const Complex odd = sub(a[0], a[1]);
    a[0] = add(a[0], a[1]), a[1] = odd;
  }
};

template <>
struct Dft<3> {
  gpu_fn void run(gpu_local Complex* a) {
    const Complex sum = add(a[1], a[2]), difference = sub(a[1], a[2]), middle = plus_scaled(a[0], sum, -0.5f);
    a[0] = add(a[0], sum);
    a[1] = plus_i(middle, difference, -kSin60), a[2] = plus_i(middle, difference, kSin60);
  }
};

template <>
struct Dft<4> {
  gpu_fn void run(gpu_local Complex* a) {
    const Complex even = add(a[0], a[2]), even_less = sub(a[0], a[2]), odd = add(a[1], a[3]),
                  odd_less = sub(a[1], a[3]);
    a[0] = add(even, odd), a[2] = sub(even, odd);
    a[1] = plus_i(even_less, odd_less, -1.0f), a[3] = plus_i(even_less, odd_less, 1.0f);
  }
};

template <>
struct Dft<5> {
  gpu_fn void run(gpu_local Complex* a) {
    const Complex near = add(a[1], a[4]), far = add(a[2], a[3]), near_less = sub(a[1], a[4]),
                  far_less = sub(a[2], a[3]);
    const Complex first = plus_scaled(plus_scaled(a[0], near, kCos72), far, kCos144);
    const Complex second = plus_scaled(plus_scaled(a[0], near, kCos144), far, kCos72);
    a[0] = add(a[0], add(near, far));
    a[1] = plus_i(plus_i(first, near_less, -kSin72), far_less, -kSin144);
    a[4] = plus_i(plus_i(first, near_less, kSin72), far_less, kSin144);
    a[2] = plus_i(plus_i(second, near_less, -kSin144), far_less, kSin72);
    a[3] = plus_i(plus_i(second, near_less, kSin144), far_less, -kSin72);
  }
};

template <>
struct Dft<8> {
  gpu_fn void run(gpu_local Complex* a) {
    Complex even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    Dft<4>::run(even), Dft<4>::run(odd);
    const float diagonal = 0.5f * kSqrt2;
    odd[1] = times(odd[1], Complex{diagonal, -diagonal}), odd[2] = times(odd[2], Complex{0.0f, -1.0f});
    odd[3] = times(odd[3], Complex{-diagonal, -diagonal});
    for (int k = 0; k < 4; k++) a[k] = add(even[k], odd[k]), a[k + 4] = sub(even[k], odd[k]);
  }
};

// ---- The complex FFT of length D/2, in place: one simdgroup, `Vectors` vectors at a time

HALFBYTE_INLINE constexpr int radix_of(int length) {
  return length % 8 == 0 ? 8 : length % 4 == 0 ? 4 : length % 2 == 0 ? 2 : length % 3 == 0 ? 3 : 5;
}
HALFBYTE_INLINE constexpr int rounds_of(int items) { return (items + kSimd - 1) / kSimd; }

// One Stockham pass: `Length` is what is left to transform of D/2. All lanes read before any of them writes.
template <int D, int Length, int Vectors>
gpu_fn void fft_pass(gpu_global const float* roots, VectorSpace space, int lane) {
  constexpr int kRadix = radix_of(Length), kRest = Length / kRadix, kStride = D / 2 / Length;
  constexpr int kEach = D / 2 / kRadix, kRounds = rounds_of(Vectors * kEach);
  Complex a[kRounds][kRadix];
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, at = i % kEach;
    if (i < Vectors * kEach)
      for (int j = 0; j < kRadix; j++) a[r][j] = load_complex(space, i / kEach, at + j * (kStride * kRest));
  }
  gpu_simd_barrier();
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, p = i % kEach / kStride, q = i % kStride;
    if (i >= Vectors * kEach) continue;
    Dft<kRadix>::run(a[r]);
    for (int k = 0; k < kRadix; k++) {
      if (k && kRest > 1) a[r][k] = times(a[r][k], root_at(roots, 2 * kStride * p * k));
      store_complex(space, i / kEach, q + kStride * (kRadix * p + k), a[r][k]);
    }
  }
  gpu_simd_barrier();
}

template <int D, int Length, int Vectors>
struct Fft {
  gpu_fn void run(gpu_global const float* roots, VectorSpace space, int lane) {
    fft_pass<D, Length, Vectors>(roots, space, lane);
    Fft<D, Length / radix_of(Length), Vectors>::run(roots, space, lane);
  }
};

template <int D, int Vectors>
struct Fft<D, 1, Vectors> {
  gpu_fn void run(gpu_global const float*, VectorSpace, int) {}
};

// ---- Between the FFT of neighbouring channels as complex numbers and that of real channels. X_k and X_(n−k) of the
// latter come from Z_k and Z_(n−k) of the former, n = D/2; docs/format.md says where their parts lie.

template <int D, int Vectors>
gpu_fn void unpack_spectrum(gpu_global const float* roots, VectorSpace space, int lane) {
  constexpr int kHalf = D / 2, kEach = kHalf / 2 + 1, kRounds = rounds_of(Vectors * kEach);
  Complex a[kRounds], b[kRounds];
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, k = i % kEach;
    if (i >= Vectors * kEach) continue;
    a[r] = load_complex(space, i / kEach, k);
    b[r] = load_complex(space, i / kEach, k ? kHalf - k : 0);
  }
  gpu_simd_barrier();
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, k = i % kEach, vector = i / kEach;
    if (i >= Vectors * kEach) continue;
    if (k == 0) {
      *channel_at(space, vector, 0) = kSqrt2 * (a[r].re + a[r].im);
      *channel_at(space, vector, kHalf) = kSqrt2 * (a[r].re - a[r].im);
      continue;
    }
    const Complex even = add(a[r], conjugate(b[r])), odd = sub(a[r], conjugate(b[r]));
    const Complex turned = times(Complex{odd.im, -odd.re}, root_at(roots, k));
    const Complex low = add(even, turned), high = sub(even, turned);
    *channel_at(space, vector, k) = low.re, *channel_at(space, vector, kHalf + k) = low.im;
    if (2 * k == kHalf) continue;  // its own partner
    *channel_at(space, vector, kHalf - k) = high.re, *channel_at(space, vector, D - k) = -high.im;
  }
  gpu_simd_barrier();
}

// The way back, to the conjugate of Z: the FFT of that is the conjugate of the inverse one.
template <int D, int Vectors>
gpu_fn void pack_spectrum(gpu_global const float* roots, VectorSpace space, int lane) {
  constexpr int kHalf = D / 2, kEach = kHalf / 2 + 1, kRounds = rounds_of(Vectors * kEach);
  Complex a[kRounds], b[kRounds];
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, k = i % kEach, vector = i / kEach;
    if (i >= Vectors * kEach) continue;
    a[r] = Complex{*channel_at(space, vector, k), *channel_at(space, vector, kHalf + k)};
    b[r] = Complex{*channel_at(space, vector, kHalf - k), -*channel_at(space, vector, k ? D - k : 0)};
  }
  gpu_simd_barrier();
  for (int r = 0; r < kRounds; r++) {
    const int i = r * kSimd + lane, k = i % kEach, vector = i / kEach;
    if (i >= Vectors * kEach) continue;
    if (k == 0) {
      store_complex(space, vector, 0, {kSqrt2 * (a[r].re + a[r].im), -kSqrt2 * (a[r].re - a[r].im)});
      continue;
    }
    const Complex sum = add(a[r], b[r]), turned = times(conjugate(root_at(roots, k)), sub(a[r], b[r]));
    store_complex(space, vector, k, conjugate(plus_i(sum, turned, 1.0f)));
    if (2 * k < kHalf) store_complex(space, vector, kHalf - k, plus_i(sum, turned, -1.0f));
  }
  gpu_simd_barrier();
}

// y_k = Σ (−1)^popcount(k & c) x_c, its own inverse but for the norm.
template <int D, int Vectors>
gpu_fn void hadamard(VectorSpace space, int lane) {
  for (int step = 1; step < D; step *= 2) {
    for (int i = lane; i < Vectors * (D / 2); i += kSimd) {
      const int pair = i % (D / 2), low = pair / step * (2 * step) + pair % step;
      gpu_shared float* a = channel_at(space, i / (D / 2), low);
      gpu_shared float* b = channel_at(space, i / (D / 2), low + step);
      const float difference = *a - *b;
      *a += *b, *b = difference;
    }
    gpu_simd_barrier();
  }
}

// Rotations that have a fast transform, in place, by one simdgroup, of `Vectors` vectors with D channels. D = 0: a head
// size that is not known when compiling, which takes the matrix instead.
template <int D, int Vectors>
struct FastRotation {
  // x holds channel · factor.
  gpu_fn void forward(RotationTable table, VectorSpace space, int lane) {
    if (!table.roots) return hadamard<D, Vectors>(space, lane);
    Fft<D, D / 2, Vectors>::run(table.roots, space, lane);
    unpack_spectrum<D, Vectors>(table.roots, space, lane);
  }
  // Leaves channels that `back_factor` has yet to multiply.
  gpu_fn void back(RotationTable table, VectorSpace space, int lane) {
    if (!table.roots) return hadamard<D, Vectors>(space, lane);
    pack_spectrum<D, Vectors>(table.roots, space, lane);
    Fft<D, D / 2, Vectors>::run(table.roots, space, lane);
  }
};

template <int Vectors>
struct FastRotation<0, Vectors> {
  gpu_fn void forward(RotationTable, VectorSpace, int) {}
  gpu_fn void back(RotationTable, VectorSpace, int) {}
};

gpu_fn float back_factor(RotationTable table, int channel) {
  const float factor = table.factors[channel];
  return table.roots && channel % 2 ? -factor : factor;  // conjugate
}

// ---- Any rotation, as a matrix

gpu_constexpr int kTileRows = 8;  // vectors that share the reading of a matrix, of codes, of raw tokens

// out[i][row] = Σ_j m[j][i] x[j][row], x and out being [d][kTileRows]: m is the transposed table to rotate, the plain
// one to rotate back. Four lanes share two channels, a quarter of the sum each. Run by a whole threadgroup; d is even.
gpu_fn void rotate_tile(gpu_global const float* m, int d, gpu_shared const float* x, gpu_shared float* out, int tid,
                        int threads) {
  const int lane = tid % kSimd, part = lane / 8;
  for (int first = tid / kSimd * 8; first < d / 2; first += threads / kSimd * 8) {
    const int pair = first + lane % 8;
    float sum[2][kTileRows] = {};
    if (pair < d / 2) {
#pragma unroll 16  // loads under way
      for (int j = part; j < d; j += 4) {
        const float2 r = ((gpu_global const float2*)m)[j * (d / 2) + pair];
        const float4 low = ((gpu_shared const float4*)x)[2 * j], high = ((gpu_shared const float4*)x)[2 * j + 1];
        const float rows[kTileRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int row = 0; row < kTileRows; row++) sum[0][row] += r.x * rows[row], sum[1][row] += r.y * rows[row];
      }
    }
    for (int row = 0; row < kTileRows; row++)
      for (int e = 0; e < 2; e++) {
        const float two = sum[e][row] + gpu_lane_xor(sum[e][row], 8), whole = two + gpu_lane_xor(two, 16);
        if (part == row / 2 && pair < d / 2) out[(2 * pair + e) * kTileRows + row] = whole;
      }
  }
}

}  // namespace gpu
}  // namespace halfbyte
