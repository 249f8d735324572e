// What only a device has: instructions without a word in C++, shared memory of a launch's size, launches.
//
// tests/cuda/emulator has a file of the same name for machines without a GPU. Nothing else here says PTX or <<<>>>.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace halfbyte::gpu {

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

// c[16×8] += a[16×8] · b[8×8] on tf32: the last 13 bits of a float are ignored. A thread holds a: rows g, g+8 at column
// t, then at t+4; b: column g at rows t, t+4; c: as above.
__device__ __forceinline__ void mma_tf32(float c[4], const float a[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Transposes an 8×8 matrix of fp16 of which each thread holds row g, columns 2t, 2t+1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// (x & mask) | bits in one instruction: the compiler, given two constants, makes it two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// 2^x by the special-function unit, good to 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Starts copying 16 bytes, both ends aligned to 16; they are there for this thread once it has waited for the group.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const uint32_t to = shared_address(shared);
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

// Hopper's copy engine takes a whole tile from one thread, which then is free; elsewhere all threads copy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// Counts the bytes of copies, in phases of one arrival each.
using CopyBarrier = uint64_t;

// By one thread, before a barrier of those who use it.
__device__ __forceinline__ void copy_barrier_start(CopyBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Begins the barrier's next phase, which ends once so many bytes have come.
__device__ __forceinline__ void copy_bulk_expect(CopyBarrier* barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Starts copying; both ends and `bytes` are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Waits for the end of a phase of this parity: 0 for the first one.
__device__ __forceinline__ void copy_bulk_wait(CopyBarrier* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
}

// Brings a line into the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// x, of which the compiler knows nothing: what follows from it is not computed ahead of its use, to wait in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Adds 1 and returns what was there. Whatever this thread knows to be stored is so for whoever counts later.
__device__ __forceinline__ int count_arrival(int* arrivals) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before;
}

// The launch's shared memory, aligned to 16.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// Lets a kernel use `bytes` of shared memory, then launches it; returns the launch's error.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t bytes, void* stream,
           const std::type_identity_t<Parameters>&... arguments) {
  if (bytes > 48 << 10) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return (int)error;
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return (int)cudaGetLastError();
}

}  // namespace halfbyte::gpu
