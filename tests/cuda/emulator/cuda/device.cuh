// src/cuda/device.cuh for machines without a GPU: what each instruction does, by its definition in the PTX manual.
//
// Asynchronous copies happen when they are waited for, not before: until then their destination holds poison, in every
// thread's eyes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <algorithm>
#include <functional>
#include <type_traits>

namespace emulated {

// Of a warp: c[16×8] += a[16×16] · b[16×8].
void mma(float c[4], const uint32_t a[4], const uint32_t b[2], bool is_bf16, int line);
uint32_t transpose_8x8(uint32_t x, int line);
void load_matrices(uint32_t x[4], const void* row, int line);

// Products of the four warps of a team. `start` takes the sums [n][4] away and leaves poison; those that a commit has
// followed are done by `wait`, which gives the sums back.
struct Matrix {
  const char* at;
  int half_bytes;
};
void start_products(float (*sums)[4], int n);
void start_product(float (*sums)[4], int n, const uint32_t a[4], Matrix b, int line);
void commit_products();
void wait_for_products(int line);
void team_barrier(int line);

// Of the thread that calls. `start` poisons the destination; `finish` gives what to copy, one after the other.
struct Copy {
  void* to;
  const void* from;
};
void start_copy(Copy copy, int line);
void end_group();
bool finish_copy(int pending_groups, Copy& copy);

// Of a barrier that counts bytes: its phase is over once all that it expects has been asked for and someone waits.
void start_barrier(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, int bytes, int line);
void start_bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, int line);
void wait_for_phase(uint64_t* barrier, int parity, int line);

// A launch; returns an error number, whose text says more.
int run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& thread);

}  // namespace emulated

namespace halfbyte::gpu {

using emulated::Where;

inline void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
  const uint32_t b[2] = {b0, b1};
  if (!emulated::is_left_out(where)) emulated::mma(c, a, b, false, where.line);
}
inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
  const uint32_t b[2] = {b0, b1};
  if (!emulated::is_left_out(where)) emulated::mma(c, a, b, true, where.line);
}
inline uint32_t transpose_8x8(uint32_t x, Where where = Where::current()) {
  return emulated::is_left_out(where) ? x : emulated::transpose_8x8(x, where.line);
}

inline void load_matrices(uint32_t (&x)[4], const void* row, Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::load_matrices(x, row, where.line);
}

inline int warp_number() { return (int)threadIdx.x / 32; }
inline void team_barrier(int, Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::team_barrier(where.line);
}

#ifdef EMULATOR_ADDRESS
constexpr bool kWarpgroupProducts = false;  // one of the builds takes the other way
#else
constexpr bool kWarpgroupProducts = true;
#endif
using MatrixPlace = emulated::Matrix;
inline MatrixPlace matrix_place(const void* shared, int half_bytes) {
  return {static_cast<const char*>(shared), half_bytes};
}
inline MatrixPlace matrix_behind(MatrixPlace place, int bytes) { return {place.at + bytes, place.half_bytes}; }
inline void fence_for_products() {}
template <int N>
void product_start(float (&sums)[N][4], Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::start_products(sums, N);
}
template <int N>
void warpgroup_mma(float (&c)[N][4], const uint32_t a[4], MatrixPlace b, Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::start_product(c, N, a, b, where.line);
}
inline void product_commit(Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::commit_products();
}
template <int N>
void product_wait(float (&)[N][4], Where where = Where::current()) {
  if (kWarpgroupProducts && !emulated::is_left_out(where)) emulated::wait_for_products(where.line);
}

inline uint32_t pack_nibbles(int high, int low, uint32_t before) {
  return before << 8 | std::clamp(high, 0, 15) << 4 | std::clamp(low, 0, 15);
}
inline uint32_t pack_bytes(int high, int low, uint32_t before) {
  return before << 16 | std::clamp(high, 0, 255) << 8 | std::clamp(low, 0, 255);
}

inline float reciprocal_fast(float x) { return 1.0f / x; }

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

// Results too small for a normal number are 0.
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline void copy_async_16(void* shared, const void* global, Where where = Where::current()) {
  emulated::start_copy({shared, global}, where.line);
  memset(shared, 0xff, 16);
}
inline void copy_async_16_cached(void* shared, const void* global, Where where = Where::current()) {
  copy_async_16(shared, global, where);
}
inline void copy_async_commit() { emulated::end_group(); }
inline void copy_async_wait(int pending, Where where = Where::current()) {
  emulated::Copy copy;
  while (!emulated::is_left_out(where) && emulated::finish_copy(pending, copy)) memcpy(copy.to, copy.from, 16);
}

#ifdef EMULATOR_ADDRESS
constexpr bool kBulkCopies = false;  // one of the builds takes the other way
#else
constexpr bool kBulkCopies = true;
#endif
using CopyBarrier = uint64_t;
inline void copy_barrier_start(CopyBarrier* barrier) { emulated::start_barrier(barrier); }
inline void copy_bulk_expect(CopyBarrier* barrier, int bytes, Where where = Where::current()) {
  emulated::expect_bytes(barrier, bytes, where.line);
}
inline void copy_bulk(void* shared, const void* global, int bytes, CopyBarrier* barrier,
                      Where where = Where::current()) {
  emulated::start_bulk_copy(shared, global, bytes, barrier, where.line);
}
inline void copy_bulk_wait(CopyBarrier* barrier, int parity, Where where = Where::current()) {
  if (!emulated::is_left_out(where)) emulated::wait_for_phase(barrier, parity, where.line);
}

inline void prefetch(const void*) {}

inline int opaque(int x) { return x; }
inline int count_arrival(int* arrivals) {
  emulator::fence();
  return atomicAdd(arrivals, 1);
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

template <class... Parameters>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t bytes, void*,
           const std::type_identity_t<Parameters>&... arguments) {
  return emulated::run(blocks, threads, bytes, [&] { kernel(arguments...); });
}

}  // namespace halfbyte::gpu
