// Takes a token of each sequence into a layer whose length is in device memory.
#include "cuda/layer.h"
#include "cuda/length.cuh"

namespace halfbyte::gpu {
namespace {

constexpr int kAppendThreads = 128;

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

// A channel's pair: the other channel, the number of the pair, and the sign with which the other one adds when the pair
// is turned on. Channels that do not turn are their own.
struct Partner {
  int channel, pair;
  float sign;
};

__device__ __forceinline__ Partner partner_of(const Turn& turn, int c) {
  if (!turn.waves || c >= 2 * turn.pairs) return {c, -1, 0.0f};
  const bool neighbours = turn.pair_gap == 1, second = neighbours ? c % 2 : c >= turn.pairs;
  return {second ? c - turn.pair_gap : c + turn.pair_gap, neighbours ? c / 2 : c % turn.pairs, second ? 1.0f : -1.0f};
}

// x cos ± other sin, rounded as PyTorch does it: products first.
__device__ __forceinline__ float turned(const Turn& turn, Partner partner, int span, float x, float other, float way) {
  if (partner.pair < 0) return x;
  const float* wave = turn.waves + ((int64_t)span * turn.pairs + partner.pair) * 2;
  return __fadd_rn(__fmul_rn(x, wave[0]), __fmul_rn(other, way * partner.sign * wave[1]));
}

// R mu of `count` offsets that lie one after the other; a copy without R.
__device__ void rotate_offsets(const AppendSide& side, const float* mu, float* rotated, int count) {
  const int d = side.head_dim;
  for (int at = threadIdx.x; at < count * d; at += blockDim.x) {
    const float* from = mu + at / d * d;
    double sum = side.offset.transposed ? 0.0 : from[at % d];
    if (side.offset.transposed)
      for (int j = 0; j < d; j++) sum += (double)side.offset.transposed[j * d + at % d] * from[j];
    rotated[at] = (float)sum;
  }
}

// The weighted mean of the first `total` tokens, all raw, K turned back to position 0; a barrier comes after it.
__device__ void take_mean(const AppendCall& call, const AppendSide& side, const Turn& turn, int b, int head,
                          int total) {
  const float* weights = call.weights + (int64_t)b * call.weight_stride;
  float all = 0.0f;
  for (int token = 0; token < total; token++) all += token < call.weight_stride ? weights[token] : 1.0f;
  const bool padding_alone = all == 0.0f;
  const int64_t row = ((int64_t)b * call.kv_heads + head) * side.head_dim;
  for (int c = threadIdx.x; c < side.head_dim; c += blockDim.x) {
    const Partner partner = partner_of(turn, c);
    float sum = 0.0f;
    for (int token = 0; token < total; token++) {
      const RawPlace place = place_of(side, call.rule, b, head, token);
      const float weight = padding_alone || token >= call.weight_stride ? 1.0f : weights[token];
      const float x = load_value(place.data, call.dtype, place.at + c);
      const float other = load_value(place.data, call.dtype, place.at + partner.channel);
      sum += weight * turned(turn, partner, turn.waves ? token / turn.span : 0, x, other, -1.0f);
    }
    side.offset.offset[row + c] = sum / (padding_alone ? (float)total : all);
  }
  __syncthreads();
  rotate_offsets(side, side.offset.offset + row, side.offset.rotated + row, 1);
}

// The offset as the spans of these tokens have it.
__device__ void turn_spans(const AppendSide& side, const Turn& turn, int row, Packing tokens) {
  const int d = side.head_dim, first = tokens.begin / turn.span, count = (tokens.end - 1) / turn.span + 1 - first;
  const float* mu = side.offset.offset + (int64_t)row * d;
  const int64_t to = (int64_t)row * side.offset.span_count * d;
  for (int at = threadIdx.x; at < count * d; at += blockDim.x) {
    const Partner partner = partner_of(turn, at % d);
    side.offset.span_offset[to + at] = turned(turn, partner, first + at / d, mu[at % d], mu[partner.channel], 1.0f);
  }
  __syncthreads();
  rotate_offsets(side, side.offset.span_offset + to, side.offset.span_rotated + to, count);
}

// A thread block a (sequence, head) of K, then one of V. What blocks read of the cells is not written in this launch.
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendCall call) {
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
  return launch(append_kernel, (int)(2 * a->batch * a->layer.kv_heads), kAppendThreads, 0, a->stream, call);
}
