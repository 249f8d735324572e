// The GPU dialect, one word a concept: kernel bodies use these and plain C++14, and nothing else here may test the
// target.
#pragma once

#if defined(__METAL_VERSION__)

#include <metal_stdlib>

#define gpu_fn static inline
#define gpu_global device
#define gpu_shared threadgroup
#define gpu_local thread
#define gpu_constexpr constant constexpr
#define gpu_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)
#define gpu_simd_barrier() simdgroup_barrier(mem_flags::mem_threadgroup)
#define gpu_lane_xor(value, mask) simd_shuffle_xor(value, (ushort)(mask))
#define gpu_lane_get(value, lane) simd_shuffle(value, (ushort)(lane))
#define gpu_raise(flag) atomic_store_explicit((device atomic_int*)(flag), 1, memory_order_relaxed)
#ifndef gpu_shared_floats  // float4: aligned for reads of four
#define gpu_shared_floats(name, n)          \
  threadgroup float4 name##_fours[(n) / 4]; \
  threadgroup float* name = (threadgroup float*)name##_fours
#endif
#define HALFBYTE_INLINE static inline

using namespace metal;

#else

#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#define gpu_fn static __device__ __forceinline__
#define gpu_global  // address spaces, which CUDA infers
#define gpu_shared
#define gpu_local
#define gpu_constexpr constexpr          // of a namespace
#define gpu_barrier() __syncthreads()    // of the threadgroup, reached by all of its threads
#define gpu_simd_barrier() __syncwarp()  // of the simdgroup
#define gpu_lane_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define gpu_lane_get(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define gpu_raise(flag) (*(flag) = 1)  // by any number of threads
#define HALFBYTE_INLINE static __host__ __device__ __forceinline__

#endif

#include "format.h"

namespace halfbyte {
namespace gpu {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

gpu_constexpr int kSimd = 32;  // lanes that exchange values by gpu_lane_xor

#if defined(__METAL_VERSION__)
gpu_fn float half_bits_to_float(ushort bits) { return (float)as_type<half>(bits); }
gpu_fn ushort float_to_half_bits(float x) { return as_type<ushort>((half)x); }
gpu_fn float bits_as_float(uint bits) { return as_type<float>(bits); }
gpu_fn uint float_as_bits(float x) { return as_type<uint>(x); }
#else
gpu_fn float half_bits_to_float(ushort bits) { return __half2float(__ushort_as_half(bits)); }
gpu_fn ushort float_to_half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
gpu_fn float bits_as_float(uint bits) { return __uint_as_float(bits); }
gpu_fn uint float_as_bits(float x) { return __float_as_uint(x); }
#endif

}  // namespace gpu
}  // namespace halfbyte
