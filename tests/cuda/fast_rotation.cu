// The transforms of src/gpu/rotate.h alone, in more head sizes than CUDA's own kernels use them.
#include "fast_rotation.h"

#include "cuda/device.cuh"
#include "gpu/vectors.h"

namespace halfbyte {
namespace {

template <int D>
__global__ void turn(gpu::RotationTable table, const float* x, float* there, float* back) {
  __shared__ float memory[gpu::kSimdFloats];
  constexpr int kVectors = gpu::vectors_of(D);
  const int lane = threadIdx.x;
  const gpu::VectorSpace space = {memory, D, 1};
  for (int i = lane; i < kVectors * D; i += gpu::kSimd) memory[i] = x[i] * table.factors[i % D];
  gpu_simd_barrier();
  gpu::FastRotation<D, kVectors>::forward(table, space, lane);
  for (int i = lane; i < kVectors * D; i += gpu::kSimd) there[i] = memory[i];
  gpu_simd_barrier();
  gpu::FastRotation<D, kVectors>::back(table, space, lane);
  for (int i = lane; i < kVectors * D; i += gpu::kSimd) back[i] = memory[i] * gpu::back_factor(table, i % D);
}

}  // namespace

int fast_rotation_vectors(int d) { return gpu::vectors_of(d); }

int launch_fast_rotation(int d, const float* factors, const float* roots, const float* x, float* there, float* back) {
  const gpu::RotationTable table = {nullptr, nullptr, factors, roots};
  switch (d) {
    case 64:
      return gpu::launch(turn<64>, 1, gpu::kSimd, 0, nullptr, table, x, there, back);
    case 80:
      return gpu::launch(turn<80>, 1, gpu::kSimd, 0, nullptr, table, x, there, back);
    case 96:
      return gpu::launch(turn<96>, 1, gpu::kSimd, 0, nullptr, table, x, there, back);
    case 128:
      return gpu::launch(turn<128>, 1, gpu::kSimd, 0, nullptr, table, x, there, back);
    default:
      return gpu::launch(turn<256>, 1, gpu::kSimd, 0, nullptr, table, x, there, back);
  }
}

}  // namespace halfbyte
