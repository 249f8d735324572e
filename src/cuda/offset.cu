// Finds the offsets of a layer from its first tokens, and turns that of K to spans.
#include "cuda/offset.cuh"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/layer.h"

namespace halfbyte::gpu {
namespace {

constexpr int kMostBlocks = 2048;  // that sum; a few for each multiprocessor

struct OffsetSide {
  const float* transposed;
  float *offset, *rotated, *span_offset, *span_rotated;
  int head_dim;
};

struct OffsetsCall {
  OffsetSide side[2];  // K, V; offset null: not wanted
  Turn turn;           // of K
  RawTokens raw[3];    // the tokens, one span after the other
  int n_raw, total, kv_heads, dtype;
  const float *weights, *counts;
  int weight_stride;
  int parts, part_tokens, width;  // width: the larger head size
  double* sums;                   // [row][side][part][width]
  int first_span, span_count;
};

// A thread block a part of a (sequence, head, side).
template <bool Wide>
__global__ void __launch_bounds__(kOffsetThreads) sum_kernel(const __grid_constant__ OffsetsCall call) {
  const int of = blockIdx.x / call.parts, part = blockIdx.x % call.parts, row = of / 2, is_v = of % 2;
  const OffsetSide& side = call.side[is_v];
  if (!side.offset) return;
  const int b = row / call.kv_heads, head = row % call.kv_heads;
  const float* weights = call.weights ? call.weights + (int64_t)b * call.weight_stride : nullptr;
  const auto sum_run = [&](int from, int to, int channel) {
    float sum = 0.0f;
    for (int i = 0; i < call.n_raw; i++) {
      const RawTokens& raw = call.raw[i];
      const uchar* data = is_v ? raw.v : raw.k;
      const Strides3& strides = is_v ? raw.v_strides : raw.k_strides;
      const int last = min(to, raw.end);
#pragma unroll 8
      for (int token = max(from, raw.begin); token < last; token++) {
        const float x = load_as<Wide>(data, call.dtype, element_at(strides, b, head, token - raw.first) + channel);
        sum += weights && weights[token] == 0.0f ? 0.0f : x;
      }
    }
    return sum;
  };
  const int begin = part * call.part_tokens, end = min(begin + call.part_tokens, call.total);
  for (int c = threadIdx.x; c < side.head_dim; c += blockDim.x)
    call.sums[(int64_t)blockIdx.x * call.width + c] = sum_back(is_v ? Turn{} : call.turn, begin, end, c, sum_run);
}

// A thread block a (sequence, head, side): its parts to the mean, and R mu.
__global__ void __launch_bounds__(kOffsetThreads) mean_kernel(const __grid_constant__ OffsetsCall call) {
  const int row = blockIdx.x / 2, d = call.side[blockIdx.x % 2].head_dim;
  const OffsetSide& side = call.side[blockIdx.x % 2];
  if (!side.offset) return;
  const double n = call.counts ? call.counts[row / call.kv_heads] : call.total;
  const double* sums = call.sums + (int64_t)blockIdx.x * call.parts * call.width;
  float* mu = side.offset + (int64_t)row * d;
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    double sum = 0.0;
#pragma unroll 8
    for (int part = 0; part < call.parts; part++) sum += sums[(int64_t)part * call.width + c];
    mu[c] = (float)(sum / n);
  }
  __syncthreads();
  rotate_offset(side.transposed, mu, d, side.rotated + (int64_t)row * d);
}

// A thread block a span of a (sequence, head) of K.
__global__ void __launch_bounds__(kOffsetThreads) turn_kernel(const __grid_constant__ OffsetsCall call) {
  const OffsetSide& side = call.side[0];
  const int row = blockIdx.x / call.span_count, d = side.head_dim;
  float* turned = side.span_offset + (int64_t)blockIdx.x * d;
  turn_offset(call.turn, side.offset + (int64_t)row * d, d, call.first_span + blockIdx.x % call.span_count, turned);
  __syncthreads();
  rotate_offset(side.transposed, turned, d, side.span_rotated + (int64_t)blockIdx.x * d);
}

OffsetsCall call_of(const HalfbyteCudaOffsets& o) {
  OffsetsCall call{};
  for (int is_v = 0; is_v < 2; is_v++) {
    const HalfbyteCudaOffset& side = is_v ? o.v : o.k;
    call.side[is_v] = {side.transposed,          side.offset,
                       side.rotated_offset,      side.span_offset,
                       side.span_rotated_offset, (int)(is_v ? o.layer.head_dim_v : o.layer.head_dim_k)};
  }
  call.turn = turn_of(o.turn);
  call.n_raw = (int)o.n_raw, call.total = (int)o.total;
  for (int i = 0; i < call.n_raw; i++) call.raw[i] = raw_of(o.raw[i]);
  call.kv_heads = (int)o.layer.kv_heads, call.dtype = (int)o.layer.dtype;
  call.weights = o.weights, call.counts = o.counts, call.weight_stride = (int)o.weight_stride;
  const int sides = 2 * (int)o.batch * call.kv_heads, pages = (call.total + kPageTokens - 1) / kPageTokens;
  const int most = std::max(1, std::min(pages, kMostBlocks / std::max(sides, 1)));
  call.part_tokens = (pages + most - 1) / most * kPageTokens;  // no span is in two parts
  call.parts = call.part_tokens ? (call.total + call.part_tokens - 1) / call.part_tokens : 0;
  call.width = std::max(call.side[0].head_dim, call.side[1].head_dim);
  call.sums = o.space, call.first_span = (int)o.first_span, call.span_count = (int)o.k.span_count;
  return call;
}

}  // namespace
}  // namespace halfbyte::gpu

using namespace halfbyte;
using namespace halfbyte::gpu;

extern "C" int halfbyte_cuda_offsets(const HalfbyteCudaOffsets* o) {
  const OnDevice device(o->device);
  const OffsetsCall call = call_of(*o);
  const int rows = (int)o->batch * call.kv_heads;
  if (call.n_raw) {
    const auto sum = call.dtype == kFloat32 ? sum_kernel<true> : sum_kernel<false>;
    if (int error = launch(sum, 2 * rows * call.parts, kOffsetThreads, 0, o->stream, call)) return error;
    if (int error = launch(mean_kernel, 2 * rows, kOffsetThreads, 0, o->stream, call)) return error;
  }
  return call.span_count ? launch(turn_kernel, rows * call.span_count, kOffsetThreads, 0, o->stream, call) : 0;
}

extern "C" int64_t halfbyte_cuda_offsets_space(const HalfbyteCudaOffsets* o) {
  const OffsetsCall call = call_of(*o);
  return (int64_t)2 * o->batch * call.kv_heads * call.parts * call.width * (int64_t)sizeof(double);
}
