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

// The conversions of halves choose among results instead of branching, so that loops over them become vectors.
inline float half_to_float(uint16_t h) {
  const int32_t magnitude = h & 0x7fff, sign = h & 0x8000;
  const float tiny = (float)magnitude * bits_to_float(0x33800000);            // subnormal: fraction · 2^−24
  const int32_t rebase = 112 << 23, more = magnitude >= 0x7c00 ? rebase : 0;  // twice for infinity and NaN
  const uint32_t bits = magnitude < 0x400 ? float_to_bits(tiny) : (uint32_t)((magnitude << 13) + rebase) + more;
  return bits_to_float(bits | (uint32_t)sign << 16);
}

// Round to nearest even, overflow to infinity.
inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const int32_t magnitude = bits & 0x7fffffff, least = 0x38800000;  // of the normal ones
  // Subnormal: adding 0.5 leaves the rounded fraction in the low bits.
  const float shifted = bits_to_float((uint32_t)(magnitude < least ? magnitude : least)) + 0.5f;
  const int32_t tiny = (int32_t)float_to_bits(shifted) - 0x3f000000;
  int32_t half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  half = magnitude < least ? tiny : half;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return (uint16_t)(half | (int32_t)(bits >> 16 & 0x8000));
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

// to[i] = element (at + i) · scale.
inline void load_elements(const void* from, Dtype dtype, size_t at, int n, float scale, float* to) {
  const float* floats = static_cast<const float*>(from) + at;
  const uint16_t* bits = static_cast<const uint16_t*>(from) + at;
  if (dtype == Dtype::float32)
    for (int i = 0; i < n; i++) to[i] = floats[i] * scale;
  else if (dtype == Dtype::float16)
    for (int i = 0; i < n; i++) to[i] = half_to_float(bits[i]) * scale;
  else
    for (int i = 0; i < n; i++) to[i] = bf16_to_float(bits[i]) * scale;
}

// element (at + i) = from[i] · scale.
inline void store_elements(const float* from, float scale, int n, void* to, Dtype dtype, size_t at) {
  float* floats = static_cast<float*>(to) + at;
  uint16_t* bits = static_cast<uint16_t*>(to) + at;
  if (dtype == Dtype::float32)
    for (int i = 0; i < n; i++) floats[i] = from[i] * scale;
  else if (dtype == Dtype::float16)
    for (int i = 0; i < n; i++) bits[i] = float_to_half(from[i] * scale);
  else
    for (int i = 0; i < n; i++) bits[i] = float_to_bf16(from[i] * scale);
}

}  // namespace halfbyte
