// What the tensor-core kernels build on instructions: codes to fp16 pairs, tanh.
#pragma once

#include "cuda/device.cuh"

namespace halfbyte::gpu {

__device__ __forceinline__ uint32_t as_bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

// 0x6400 is 1024 in fp16, where a unit is the last bit: or-ing a code in gives 1024 + code, exactly.
constexpr uint32_t kMagic = 0x64006400;

// Low nibbles of bytes 0 and 2, then of bytes 1 and 3, as fp16 codes −8 … 7.
__device__ __forceinline__ void expand_low(uint32_t w, uint32_t& even, uint32_t& odd) {
  const __half2 bias = __float2half2_rn(1032.0f);
  even = as_bits(__hsub2(as_half2(and_or(w, 0x000f000f, kMagic)), bias));
  odd = as_bits(__hsub2(as_half2(and_or(w >> 8, 0x000f000f, kMagic)), bias));
}

// High nibbles: 1024 + 16·code, brought down by one exact multiply-add.
__device__ __forceinline__ void expand_high(uint32_t w, uint32_t& even, uint32_t& odd) {
  const __half2 sixteenth = __float2half2_rn(0.0625f), bias = __float2half2_rn(-72.0f);
  even = as_bits(__hfma2(as_half2(and_or(w, 0x00f000f0, kMagic)), sixteenth, bias));
  odd = as_bits(__hfma2(as_half2(and_or(w >> 8, 0x00f000f0, kMagic)), sixteenth, bias));
}

// Bytes 0 and 2, then 1 and 3, as fp16 codes −128 … 127.
__device__ __forceinline__ void expand_bytes(uint32_t w, uint32_t& even, uint32_t& odd) {
  const __half2 bias = __float2half2_rn(1152.0f);
  even = as_bits(__hsub2(as_half2(__byte_perm(w, kMagic, 0x7250)), bias));
  odd = as_bits(__hsub2(as_half2(__byte_perm(w, kMagic, 0x7351)), bias));
}

// By the special-function unit, good to 2^-22 of the largest result.
__device__ __forceinline__ float tanh_fast(float x) {
  const float power = exp2_fast(fminf(fmaxf(x, -20.0f), 20.0f) * 2.88539008177793f);  // e^2x
  return 1.0f - __fdividef(2.0f, power + 1.0f);
}

}  // namespace halfbyte::gpu
