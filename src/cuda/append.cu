// Takes a token of each sequence into a layer whose length is in device memory.
#include "cuda/layer.h"
#include "cuda/length.cuh"
#include "cuda/offset.cuh"

namespace halfbyte::gpu {
namespace {

// See HalfbyteCudaOffset.
struct OffsetRoom {
  float *offset, *rotated, *span_offset, *span_rotated;
  const float* transposed;
  int span_count;
  bool is_mean;
};

struct AppendSide {
  const uchar* from;
  uchar *sinks, *tail;
  Strides3 from_strides, sink_strides, tail_strides;
  int head_dim;
  OffsetRoom offset;
};

struct AppendCall {
  AppendSide side[2];  // K, V
  LengthRule rule;
  Turn turn;  // of K
  const float* weights;
  int weight_stride, kv_heads, dtype;
};

// Where a raw token lies: the address of its channels in elements, and the array.
struct RawPlace {
  uchar* data;
  int64_t at;
};

__device__ __forceinline__ RawPlace place_of(const AppendSide& side, const LengthRule& rule, int b, int head,
                                             int token) {
  if (token < rule.sink_tokens) return {side.sinks, element_at(side.sink_strides, b, head, token)};
  return {side.tail, element_at(side.tail_strides, b, head, token % rule.tail_slots)};
}

__device__ __forceinline__ void copy_token(const AppendCall& call, const AppendSide& side, int b, int head, int token) {
  const RawPlace to = place_of(side, call.rule, b, head, token);
  const int64_t from = element_at(side.from_strides, b, head, 0);
  for (int c = threadIdx.x; c < side.head_dim; c += blockDim.x)
    if (call.dtype == kFloat32)
      reinterpret_cast<uint*>(to.data)[to.at + c] = reinterpret_cast<const uint*>(side.from)[from + c];
    else
      reinterpret_cast<ushort*>(to.data)[to.at + c] = reinterpret_cast<const ushort*>(side.from)[from + c];
}

// The mean of the first `total` tokens, all raw, K turned back to position 0; padding is left out unless there is
// nothing else. A barrier comes before what reads it.
__device__ void take_mean(const AppendCall& call, const AppendSide& side, const Turn& turn, int b, int head,
                          int total) {
  const float* weights = call.weights + (int64_t)b * call.weight_stride;
  int counted = 0;
  for (int token = 0; token < total; token++) counted += token >= call.weight_stride || weights[token] != 0.0f;
  const auto sum_run = [&](int from, int to, int channel) {
    float sum = 0.0f;
    for (int token = from; token < to; token++) {
      const RawPlace place = place_of(side, call.rule, b, head, token);
      const bool counts = !counted || token >= call.weight_stride || weights[token] != 0.0f;
      sum += counts ? load_value(place.data, call.dtype, place.at + channel) : 0.0f;
    }
    return sum;
  };
  float* mu = side.offset.offset + ((int64_t)b * call.kv_heads + head) * side.head_dim;
  for (int c = threadIdx.x; c < side.head_dim; c += blockDim.x)
    mu[c] = (float)(sum_back(turn, 0, total, c, sum_run) / (counted ? counted : total));
}

// The offset as the spans of these tokens have it.
__device__ void turn_spans(const AppendSide& side, const Turn& turn, int row, Packing tokens) {
  const int d = side.head_dim, first = tokens.begin / turn.span, count = (tokens.end - 1) / turn.span + 1 - first;
  const int64_t to = (int64_t)row * side.offset.span_count * d;
  for (int span = 0; span < count; span++)
    turn_offset(turn, side.offset.offset + (int64_t)row * d, d, first + span, side.offset.span_offset + to + span * d);
  __syncthreads();
  for (int span = 0; span < count; span++)
    rotate_offset(side.offset.transposed, side.offset.span_offset + to + span * d, d,
                  side.offset.span_rotated + to + span * d);
}

// A thread block a (sequence, head) of K, then one of V. What blocks read of the cells is not written in this launch.
__global__ void __launch_bounds__(kOffsetThreads) append_kernel(const __grid_constant__ AppendCall call) {
  const LengthRule& rule = call.rule;
  const AppendSide& side = call.side[blockIdx.x % 2];
  const int row = blockIdx.x / 2, b = row / call.kv_heads, head = row % call.kv_heads;
  const int seen = (int)rule.cells[kSeenCell];
  const bool fits = seen < rule.capacity;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    rule.cells[kLengthCell] = seen + fits;
    rule.cells[kNewCell] = fits;
    if (!fits) rule.cells[kFullCell] = 1;
  }
  if (!fits) return;
  copy_token(call, side, b, head, seen);
  const Packing packing = packing_of(rule, (int)rule.cells[kPackedFromCell], seen + 1, 1);
  if (!side.offset.offset || packing.begin >= packing.end) return;
  const Turn turn = side.offset.span_offset ? call.turn : Turn{};
  if (side.offset.is_mean && packing.begin == rule.sink_tokens && !rule.cells[kOffsetReadyCell]) {
    __syncthreads();  // the token is among those that count
    take_mean(call, side, turn, b, head, rule.warm_up ? min(seen + 1, rule.warm_up) : seen + 1);
    __syncthreads();
    const int64_t at = (int64_t)row * side.head_dim;
    rotate_offset(side.offset.transposed, side.offset.offset + at, side.head_dim, side.offset.rotated + at);
  }
  if (turn.waves) turn_spans(side, turn, row, packing);
}

AppendSide side_of(int64_t head_dim, const HalfbyteCudaView& from, const HalfbyteCudaView& sinks,
                   const HalfbyteCudaView& tail, const HalfbyteCudaOffset& o) {
  return {bytes_of(from.data),
          bytes_of(sinks.data),
          bytes_of(tail.data),
          strides_of(from),
          strides_of(sinks),
          strides_of(tail),
          (int)head_dim,
          {o.offset, o.rotated_offset, o.span_offset, o.span_rotated_offset, o.transposed, (int)o.span_count,
           o.is_mean != 0}};
}

}  // namespace
}  // namespace halfbyte::gpu

using namespace halfbyte;
using namespace halfbyte::gpu;

extern "C" int halfbyte_cuda_append(const HalfbyteCudaAppend* a) {
  const OnDevice device(a->device);
  AppendCall call{};
  call.side[0] = side_of(a->layer.head_dim_k, a->k, a->k_sinks, a->k_tail, a->k_offset);
  call.side[1] = side_of(a->layer.head_dim_v, a->v, a->v_sinks, a->v_tail, a->v_offset);
  call.rule = rule_of(a->at), call.turn = turn_of(a->turn);
  call.weights = a->weights, call.weight_stride = (int)a->weight_stride;
  call.kv_heads = (int)a->layer.kv_heads, call.dtype = (int)a->layer.dtype;
  return launch(append_kernel, (int)(2 * a->batch * a->layer.kv_heads), kOffsetThreads, 0, a->stream, call);
}
