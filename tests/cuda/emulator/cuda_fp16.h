// CUDA's fp16, each operation rounded once from a wider one, by the product's own conversions, which tests/cpp checks
// against all 65536 values.
#pragma once

#include "cuda_runtime.h"
#include "numbers.h"

struct __half {
  __half() = default;
  __half(float x) : bits(halfbyte::float_to_half(x)) {}
  operator float() const { return halfbyte::half_to_float(bits); }

  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return emulated::as<__half>(bits); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {(float)a.x * (float)b.x, (float)a.y * (float)b.y}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {(float)a.x - (float)b.x, (float)a.y - (float)b.y}; }
// Products and sums are exact in double.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {(float)((double)(float)a.x * (float)b.x + (float)c.x), (float)((double)(float)a.y * (float)b.y + (float)c.y)};
}
