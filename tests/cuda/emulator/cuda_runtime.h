// CUDA's words for device code, on the fibers of tests/gpu/emulator: one a thread, which switch at what waits for other
// threads, and nowhere else.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda_runtime_api.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // thread blocks run one after the other
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace emulated {

// The caller's place, as a default argument.
struct Where {
  const char* file;
  int line;
  static constexpr Where current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// A mutation: whether the word at this place is the one that does nothing.
bool is_left_out(const Where& where);

struct Index {
  unsigned x;
};
inline Index thread() { return {emulator::place().thread}; }
inline Index block() { return {emulator::place().group}; }
inline Index threads() { return {(unsigned)emulator::place().launch->threads}; }
inline Index blocks() { return {(unsigned)emulator::place().launch->groups}; }

template <class To, class From>
To as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &value, sizeof to);
  return to;
}

template <class T>
T exchange(T value, unsigned lane, unsigned (*words)(unsigned, unsigned, int), const Where& where) {
  if (is_left_out(where)) return value;
  if constexpr (sizeof(T) == 8) {
    const uint64_t bits = as<uint64_t>(value), low = words((unsigned)bits, lane, where.line);
    return as<T>(low | (uint64_t)words((unsigned)(bits >> 32), lane, where.line) << 32);
  } else {
    return as<T>(words(as<unsigned>(value), lane, where.line));
  }
}

// The same for all lanes of a warp: of what each brings.
unsigned largest_of_warp(unsigned value, int line);
unsigned any_of_warp(unsigned value, int line);

}  // namespace emulated

#define threadIdx emulated::thread()
#define blockIdx emulated::block()
#define blockDim emulated::threads()
#define gridDim emulated::blocks()

inline void __syncthreads(emulated::Where where = emulated::Where::current()) {
  if (!emulated::is_left_out(where)) emulator::barrier(where.line);
}
inline void __syncwarp(emulated::Where where = emulated::Where::current()) {
  if (!emulated::is_left_out(where)) emulator::simd_barrier(where.line);
}
inline void __threadfence() { emulator::fence(); }

// Masks name all lanes wherever the kernels exchange anything.
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane, emulated::Where where = emulated::Where::current()) {
  return emulated::exchange(value, lane, emulator::shuffle, where);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, emulated::Where where = emulated::Where::current()) {
  return emulated::exchange(value, mask, emulator::shuffle_xor, where);
}
inline bool __any_sync(unsigned, bool value, emulated::Where where = emulated::Where::current()) {
  return emulated::is_left_out(where) ? value : emulated::any_of_warp(value, where.line) != 0;
}
inline unsigned __ballot_sync(unsigned, bool value, emulated::Where where = emulated::Where::current()) {
  const unsigned own = (unsigned)value << emulated::thread().x % 32;
  return emulated::is_left_out(where) ? own : emulated::any_of_warp(own, where.line);
}
inline unsigned __reduce_max_sync(unsigned, unsigned value, emulated::Where where = emulated::Where::current()) {
  return emulated::is_left_out(where) ? value : emulated::largest_of_warp(value, where.line);
}
// Signed ones by the order of unsigned ones: the sign bit turned.
inline int __reduce_max_sync(unsigned, int value, emulated::Where where = emulated::Where::current()) {
  return (int)(__reduce_max_sync(~0u, (unsigned)value ^ 0x80000000u, where) ^ 0x80000000u);
}
inline int __reduce_min_sync(unsigned, int value, emulated::Where where = emulated::Where::current()) {
  return ~__reduce_max_sync(~0u, ~value, where);
}

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline unsigned atomicMax(unsigned* p, unsigned value) {  // fibers switch nowhere in here
  const unsigned before = *p;
  if (value > before) *p = value;
  return before;
}

inline float __uint_as_float(unsigned bits) { return emulated::as<float>(bits); }
inline unsigned __float_as_uint(float x) { return emulated::as<unsigned>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN becomes 0

// Byte i of the result is the one of y:x that digit i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  const unsigned low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  return (a >> 16 > b >> 16 ? a & 0xffff0000 : b & 0xffff0000) | low;
}

// fabs, rint, exp2 and tanh of floats are C++'s.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned __vimax3_u16x2(unsigned a, unsigned b, unsigned c) { return __vmaxu2(__vmaxu2(a, b), c); }
// Signed ones by the order of unsigned ones: the sign bits turned.
inline unsigned __vimax3_s16x2(unsigned a, unsigned b, unsigned c) {
  return __vimax3_u16x2(a ^ 0x80008000u, b ^ 0x80008000u, c ^ 0x80008000u) ^ 0x80008000u;
}
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
inline unsigned __vimax3_u32(unsigned a, unsigned b, unsigned c) { return max(max(a, b), c); }
