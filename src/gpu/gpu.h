// The GPU dialect, one word a concept: kernel bodies use these and plain C++, and nothing else here may test the
// target.
#pragma once

#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

#define gpu_fn static __device__ __forceinline__
#define gpu_global  // address spaces, which CUDA infers
#define gpu_shared
#define gpu_const const
#define gpu_barrier() __syncthreads()    // of the threadgroup, reached by all of its threads
#define gpu_simd_barrier() __syncwarp()  // of the simdgroup
#define gpu_lane_xor(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define gpu_lane_get(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define HALFBYTE_INLINE static __host__ __device__ __forceinline__

#include "format.h"

namespace halfbyte::gpu {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

constexpr int kSimd = 32;  // lanes that exchange values by gpu_lane_xor

gpu_fn float half_bits_to_float(ushort bits) { return __half2float(__ushort_as_half(bits)); }
gpu_fn ushort float_to_half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
gpu_fn float bits_as_float(uint bits) { return __uint_as_float(bits); }
gpu_fn uint float_as_bits(float x) { return __float_as_uint(x); }

}  // namespace halfbyte::gpu
