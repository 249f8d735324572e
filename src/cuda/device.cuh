// What only a device has: instructions without a word in C++, shared memory of a launch's size, launches.
//
// tests/cuda/emulator has a file of the same name for machines without a GPU. Nothing else here says PTX or <<<>>>.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace halfbyte::gpu {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

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

// This thread's warp in its thread block, as a number that the compiler knows to be the same for the whole warp.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// A barrier of the four warps of a team, from warp 4 · team on: for few teams, as there are 15 such barriers.
__device__ __forceinline__ void team_barrier(int team) { asm volatile("bar.sync %0, 128;" ::"r"(1 + team) : "memory"); }

// ---- Products of a warpgroup: four warps, from a multiple of four on, that multiply 64 rows by one B in shared memory

// sm_90a alone has them; elsewhere each warp calls mma.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroupProducts = true;
#else
constexpr bool kWarpgroupProducts = false;
#endif

// B [16×columns] in shared memory: two halves of 8 rows, `half_bytes` apart, each a column of 16 bytes after the other.
using MatrixPlace = uint64_t;
__device__ __forceinline__ MatrixPlace matrix_place(const void* shared, int half_bytes) {
  constexpr uint64_t kEightColumns = 128;
  return shared_address(shared) >> 4 | (uint64_t)half_bytes >> 4 << 16 | kEightColumns >> 4 << 32;
}
__device__ __forceinline__ MatrixPlace matrix_behind(MatrixPlace place, int bytes) { return place + (bytes >> 4); }

// By each thread that has written what a product reads, before a barrier of those who start it.
__device__ __forceinline__ void fence_for_products() {
  if constexpr (kWarpgroupProducts) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Keeps what is written to sums before, and read of them behind, where it is.
template <int N>
__device__ __forceinline__ void pin_sums(float (&sums)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])::"memory");
}

// Before the first of some products to these sums.
template <int N>
__device__ __forceinline__ void product_start(float (&sums)[N][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  pin_sums(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Starts c[64×N] += a[64×16] · b[16×N] on fp16, summed in float. Each warp has 16 rows of a and c, as in mma: c is
// [8 columns at a time][4].
__device__ __forceinline__ void warpgroup_mma(float (&c)[8][4], const uint32_t a[4], MatrixPlace b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"
      "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

__device__ __forceinline__ void warpgroup_mma(float (&c)[16][4], const uint32_t a[4], MatrixPlace b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"
      "%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]),
        "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]),
        "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]),
        "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]),
        "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]),
        "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

__device__ __forceinline__ void product_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all products of this thread's warpgroup, which were to these sums.
template <int N>
__device__ __forceinline__ void product_wait(float (&sums)[N][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin_sums(sums);
#endif
}

// Four 8×8 matrices of fp16 from shared memory, of which lane 8 m + r names row r of number m: a thread gets row g,
// columns 2t, 2t+1 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
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

// before · 2^8 + high · 2^4 + low, of codes that are clamped to 0 … 15.
__device__ __forceinline__ uint32_t pack_nibbles(int high, int low, uint32_t before) {
  uint32_t y;
  asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(high), "r"(low), "r"(before));
  return y;
}

// before · 2^16 + high · 2^8 + low, of codes that are clamped to 0 … 255.
__device__ __forceinline__ uint32_t pack_bytes(int high, int low, uint32_t before) {
  uint32_t y;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(high), "r"(low), "r"(before));
  return y;
}

// 1 / x by the special-function unit, good to 2^-23; subnormal numbers count as 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x by the special-function unit, good to 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts copying 16 bytes, both ends aligned to 16; they are there for this thread once it has waited for the group.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const uint32_t to = shared_address(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// The same by way of the L1 cache, for what the multiprocessor copies again and again.
__device__ __forceinline__ void copy_async_16_cached(void* shared, const void* global) {
  const uint32_t to = shared_address(shared);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
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
