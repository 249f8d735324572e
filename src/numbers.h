// fp16 and bf16 as bits, for reference code and for hosts; kernels use their instruction set's own conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "halfbyte/halfbyte.hpp"

namespace halfbyte {

inline size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = (float)fraction * bits_to_float(0x33800000);  // subnormal: fraction · 2^−24
  return sign ? -tiny : tiny;
}

// Round to nearest even, overflow to infinity.
inline uint16_t float_to_half(float x) {
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    float shifted = bits_to_float(magnitude) + 0.5f;
    return (uint16_t)(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

inline float bf16_to_float(uint16_t b) { return bits_to_float((uint32_t)b << 16); }

inline uint16_t float_to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load_element(const void* p, Dtype dtype, size_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(p)[i];
  uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return dtype == Dtype::float16 ? half_to_float(bits) : bf16_to_float(bits);
}

inline void store_element(void* p, Dtype dtype, size_t i, float x) {
  if (dtype == Dtype::float32)
    static_cast<float*>(p)[i] = x;
  else
    static_cast<uint16_t*>(p)[i] = dtype == Dtype::float16 ? float_to_half(x) : float_to_bf16(x);
}

}  // namespace halfbyte
