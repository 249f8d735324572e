// The instructions behind the tensor-core kernels: codes to fp16 pairs, mma.sync, transposition, asynchronous copies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace halfbyte::gpu {

__device__ __forceinline__ uint32_t as_bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

// c[16×8] += a[16×16] · b[16×8] on fp16, summed in float. A thread (g = lane / 4, t = lane % 4) holds a: rows g, g+8 at
// columns 2t, 2t+1, then the same rows at 2t+8, 2t+9; b: column g at rows 2t, 2t+1, then 2t+8, 2t+9; c: rows g, g+8 at
// columns 2t, 2t+1. The 16 summed positions may be named in any order that a and b share.
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8×8 matrix of fp16 of which each thread holds row g, columns 2t, 2t+1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// 0x6400 is 1024 in fp16, where a unit is the last bit: or-ing a code in gives 1024 + code, exactly.
constexpr uint32_t kMagic = 0x64006400;

// (x & mask) | bits in one instruction: the compiler, given two constants, makes it two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

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

// 2^x and tanh by the special-function unit, good to 2^-22 of the largest result.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_fast(float x) {
  const float power = exp2_fast(fminf(fmaxf(x, -20.0f), 20.0f) * 2.88539008177793f);  // e^2x
  return 1.0f - __fdividef(2.0f, power + 1.0f);
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits until at most `pending` (1 … 7) groups of copies of this thread are under way.
__device__ __forceinline__ void copy_async_wait(int pending) {
  switch (pending) {
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    case 3:
      return copy_async_wait<3>();
    case 4:
      return copy_async_wait<4>();
    case 5:
      return copy_async_wait<5>();
    case 6:
      return copy_async_wait<6>();
    case 7:
      return copy_async_wait<7>();
    default:
      return copy_async_wait<0>();
  }
}

}  // namespace halfbyte::gpu
