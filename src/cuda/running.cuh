// One warp's running softmax over tokens, for the eight rows of a row tile.
#pragma once

#include "cuda/mma.cuh"
#include "gpu/attend.h"

namespace halfbyte::gpu {

// Weights are held as 2^(score − top + kWeightBias) in fp16; `top` lags behind by up to kSlack, which saves rescaling.
constexpr float kSlack = 8.0f;
constexpr float kWeightBias = 4.0f;

template <int D>
struct Running {
  float acc[D / 16][4];  // Σ weight · scale / unit · code: channels 16i + 2g, + 2g+1 by columns 2t, 2t+1
  float top[2], sum[2];  // of columns 2t, 2t+1; sums of this thread's tokens alone
  int unit_exponent;     // of V's scales: all so far are below 2^(unit_exponent + 1)
};

template <int D>
__device__ __forceinline__ void clear(Running<D>& r) {
  for (int i = 0; i < D / 16; i++)
    for (int j = 0; j < 4; j++) r.acc[i][j] = 0.0f;
  r.top[0] = r.top[1] = kUnseen;
  r.sum[0] = r.sum[1] = 0.0f;
  r.unit_exponent = -14;
}

template <int D>
__device__ __forceinline__ void rescale(Running<D>& r, float column0, float column1) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    r.acc[i][0] *= column0, r.acc[i][1] *= column1;
    r.acc[i][2] *= column0, r.acc[i][3] *= column1;
  }
}

// Raises `top` of both columns to the maxima of these scores; all threads of a column hold the same.
template <int D>
__device__ __forceinline__ void raise_tops(Running<D>& r, float high0, float high1) {
  for (int mask = 4; mask < kSimd; mask <<= 1) {
    high0 = fmaxf(high0, __shfl_xor_sync(0xffffffffu, high0, mask));
    high1 = fmaxf(high1, __shfl_xor_sync(0xffffffffu, high1, mask));
  }
  const float top0 = fmaxf(r.top[0], high0), top1 = fmaxf(r.top[1], high1);
  const float keep0 = exp2f(r.top[0] - top0), keep1 = exp2f(r.top[1] - top1);
  r.top[0] = top0, r.top[1] = top1;
  r.sum[0] *= keep0, r.sum[1] *= keep1;
  rescale(r, keep0, keep1);
}

// This thread's sums to those of the whole columns.
template <int D>
__device__ __forceinline__ void sum_columns(Running<D>& r) {
  for (int mask = 4; mask < kSimd; mask <<= 1)
    for (int j = 0; j < 2; j++) r.sum[j] += __shfl_xor_sync(0xffffffffu, r.sum[j], mask);
}

// Floats as unsigned numbers of the same order.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned bits) {
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

}  // namespace halfbyte::gpu
