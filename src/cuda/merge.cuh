// From warps' results to outputs: merging over the warps of a block, over the blocks that share a segment, and out of
// code domain.
#pragma once

#include "cuda/rotate.cuh"
#include "cuda/running.cuh"

namespace halfbyte::gpu {

// ---- Within a thread block

// Raw results of `slots` warps to the first slot, relative to the block's maxima.
template <int D>
__device__ __forceinline__ void merge_raw(const Work& work, int slots, int threads) {
#pragma unroll 1
  for (int at = threadIdx.x; at < kTileRows * raw_pitch(D); at += threads) {
    const int row = at / raw_pitch(D);
    const float top = from_ordered(work.tops[row]);
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < slots; i++)
      sum += work.raw[i * kTileRows * raw_pitch(D) + at] * exp2_fast(work.raw_tops[i * kTileRows + row] - top);
    work.raw[at] = sum;
  }
  if (threadIdx.x < kTileRows) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < slots; i++) {
      const int at = i * kTileRows + threadIdx.x;
      sum += work.raw_sums[at] * exp2_fast(work.raw_tops[at] - from_ordered(work.tops[threadIdx.x]));
    }
    work.raw_sum[threadIdx.x] = sum;
  }
}

// All warps' results, of which raw ones in `slots` slots, into half as many slots, in a fixed order. Starts with the
// barrier after which all maxima are known, ends with one.
template <int D>
__device__ __forceinline__ void merge_warps(Running<D>& r, const Work& work, int warps, int slots, int warp, int lane) {
  const int g = lane / 4, t = lane % 4, half = warps / 2;
  sum_columns(r);
  for (int j = 0; j < 2; j++)
    if (g == 0) atomicMax(&work.tops[2 * t + j], ordered_bits(r.top[j]));
  __syncthreads();
  float keep[2];
  for (int j = 0; j < 2; j++) {
    keep[j] = exp2_fast(r.top[j] - from_ordered(work.tops[2 * t + j]));
    if (g == 0) work.sums[warp * kTileRows + 2 * t + j] = r.sum[j] * keep[j];
  }
  const float unit = power_of_two(r.unit_exponent);
  rescale(r, keep[0] * unit, keep[1] * unit);
  float* slot = work.slots + warp % half * kTileRows * D + lane;
  if (warp >= half)
    for (int i = 0; i < D / 16; i++)
      for (int j = 0; j < 4; j++) slot[(i * 4 + j) * kSimd] = r.acc[i][j];
  merge_raw<D>(work, slots, warps * kSimd);
  __syncthreads();
  if (warp < half)
    for (int i = 0; i < D / 16; i++)
      for (int j = 0; j < 4; j++) slot[(i * 4 + j) * kSimd] += r.acc[i][j];
#pragma unroll 1
  for (int row = warp; row < kTileRows; row += warps) {
    const float sum = simd_sum(lane < warps ? work.sums[lane * kTileRows + row] : 0.0f);
    if (lane == 0) work.packed_sum[row] = sum;
  }
  __syncthreads();
}

// The sum of n slots to the first one, times Λ⁻¹ where it is given, and the rows' largest magnitudes to work.largest,
// which holds zeros. Ends with a barrier.
template <int D>
__device__ __forceinline__ void sum_slots(const Work& work, int n, const float* inverse_lambda, int threads) {
#pragma unroll 1
  for (int unit = threadIdx.x; unit < D / 16 * kSimd; unit += threads) {
    const int i = unit / kSimd, lane = unit % kSimd, g = lane / 4, t = lane % 4;
    float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int slot = 0; slot < n; slot++)
      for (int j = 0; j < 4; j++) y[j] += work.slots[slot * kTileRows * D + (4 * i + j) * kSimd + lane];
    if (inverse_lambda) {
      const float2 factor = *reinterpret_cast<const float2*>(inverse_lambda + 16 * i + 2 * g);
      y[0] *= factor.x, y[1] *= factor.x, y[2] *= factor.y, y[3] *= factor.y;
    }
    float high0 = fmaxf(fabsf(y[0]), fabsf(y[2])), high1 = fmaxf(fabsf(y[1]), fabsf(y[3]));
    for (int mask = 4; mask < kSimd; mask <<= 1) {
      high0 = fmaxf(high0, __shfl_xor_sync(0xffffffffu, high0, mask));  // a row's unit
      high1 = fmaxf(high1, __shfl_xor_sync(0xffffffffu, high1, mask));  // a row's unit
    }
    if (g == 0) atomicMax(&work.largest[2 * t], __float_as_uint(high0));
    if (g == 0) atomicMax(&work.largest[2 * t + 1], __float_as_uint(high1));
    for (int j = 0; j < 4; j++) work.slots[(4 * i + j) * kSimd + lane] = y[j];
  }
  __syncthreads();
}

// The summed results of thread `lane` in the i-th 16 channels as fp16, each row divided by its largest magnitude:
// channels 16i + 2g, + 1 of row 2t, then of row 2t + 1.
__device__ __forceinline__ uint2 unit_pairs(const Work& work, int i, int lane) {
  const int t = lane % 4;
  const float* y = work.slots + 4 * i * kSimd + lane;
  uint32_t pair[2];
  for (int j = 0; j < 2; j++) {
    const float largest = __uint_as_float(work.largest[2 * t + j]), inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
    pair[j] = as_bits(__floats2half2_rn(y[j * kSimd] * inverse, y[(j + 2) * kSimd] * inverse));
  }
  return uint2{pair[0], pair[1]};
}

// ---- Between the blocks that share a segment

// A block's result in global memory.
struct Partial {
  uint2* pairs;    // [d / 16][32], see unit_pairs
  float* top;      // [kTileRows]
  float* sum;      // [kTileRows]
  float* largest;  // [kTileRows], to multiply by
};

HALFBYTE_INLINE constexpr int partial_bytes(int d) { return 16 * d + 4 * kTileRows * 4; }
HALFBYTE_INLINE constexpr int raw_bytes(int d) { return kTileRows * (raw_pitch(d) + 1) * 4 / 16 * 16 + 16; }

__device__ __forceinline__ Partial partial_at(const AttendCall& call, int d, int slot) {
  uchar* at = reinterpret_cast<uchar*>(call.buffers.partials) + (long long)slot * partial_bytes(d);
  float* rows = reinterpret_cast<float*>(at + 16 * d);
  return {reinterpret_cast<uint2*>(at), rows, rows + kTileRows, rows + 2 * kTileRows};
}

// What raw tokens gave a segment, relative to the first sharer's maxima: [kTileRows][raw_pitch], then the sums.
__device__ __forceinline__ float* raw_partial_at(const AttendCall& call, int d, int segments, int segment) {
  uchar* after =
      reinterpret_cast<uchar*>(call.buffers.partials) + (long long)(call.blocks + segments) * partial_bytes(d);
  return reinterpret_cast<float*>(after + (long long)segment * raw_bytes(d));
}

template <int D>
__device__ __forceinline__ void store_partial(const Work& work, const Partial& to, float* raw, int threads) {
#pragma unroll 1
  for (int unit = threadIdx.x; unit < D / 16 * kSimd; unit += threads)
    to.pairs[unit] = unit_pairs(work, unit / kSimd, unit % kSimd);
  if (threadIdx.x < kTileRows) {
    to.top[threadIdx.x] = from_ordered(work.tops[threadIdx.x]), to.sum[threadIdx.x] = work.packed_sum[threadIdx.x];
    to.largest[threadIdx.x] = __uint_as_float(work.largest[threadIdx.x]);
  }
#pragma unroll 1
  for (int at = threadIdx.x; raw && at < kTileRows * (raw_pitch(D) + 1); at += threads)
    raw[at] = at < kTileRows * raw_pitch(D) ? work.raw[at] : work.raw_sum[at - kTileRows * raw_pitch(D)];
}

// Adds partial results [from, to), whose weights are [to − from][kTileRows], to slots: thread groups of d threads, each
// of which has two units, take them in turn, and each group has a slot.
template <int D>
__device__ __forceinline__ void add_partials(const AttendCall& call, int first_slot, int from, int to,
                                             const float* weights, const Work& work, int groups, int threads) {
#pragma unroll 1
  for (int thread = threadIdx.x; thread < groups * D; thread += threads) {
    const int group = thread / D, unit = 2 * (thread % D), i = unit / kSimd, lane = unit % kSimd;
    float y[8] = {};
#pragma unroll 8
    for (int k = from + group; k < to; k += groups) {
      const uint4 x = reinterpret_cast<const uint4*>(partial_at(call, D, first_slot + k).pairs)[thread % D];
      const float4 weight = reinterpret_cast<const float4*>(weights + (k - from) * kTileRows)[unit / 2 % 2];
      const float2 a = __half22float2(as_half2(x.x)), b = __half22float2(as_half2(x.y));
      const float2 c = __half22float2(as_half2(x.z)), d = __half22float2(as_half2(x.w));
      y[0] += a.x * weight.x, y[2] += a.y * weight.x, y[1] += b.x * weight.y, y[3] += b.y * weight.y;
      y[4] += c.x * weight.z, y[6] += c.y * weight.z, y[5] += d.x * weight.w, y[7] += d.y * weight.w;
    }
    for (int j = 0; j < 4; j++) {
      float2* at = reinterpret_cast<float2*>(work.slots + group * kTileRows * D + (4 * i + j) * kSimd + lane);
      const float2 before = from ? *at : float2{0.0f, 0.0f};
      *at = float2{before.x + y[j], before.y + y[4 + j]};
    }
  }
}

// All n partial results of a segment to slots, of which it returns the number, and to this block's sums and raw
// results.
template <int D>
__device__ __forceinline__ int merge_partials(const AttendCall& call, int first_slot, int n, const float* raw,
                                              const Work& work, int warp, int lane) {
  const int threads = call.warps * kSimd, groups = max(1, threads / D);
#pragma unroll 1
  for (int i = threadIdx.x; i < n * kTileRows; i += threads)
    atomicMax(&work.tops[i % kTileRows],
              ordered_bits(partial_at(call, D, first_slot + i / kTileRows).top[i % kTileRows]));
  __syncthreads();
#pragma unroll 1
  for (int row = warp; row < kTileRows; row += call.warps) {
    float sum = 0.0f;
#pragma unroll 4
    for (int k = lane; k < n; k += kSimd) {
      const Partial part = partial_at(call, D, first_slot + k);
      sum += part.sum[row] * exp2_fast(part.top[row] - from_ordered(work.tops[row]));
    }
    sum = simd_sum(sum);
    if (lane == 0) work.packed_sum[row] = sum;
  }
  const int at_once = raw_slots(D, call.warps) * raw_pitch(D);  // weights lie where raw results come later
  for (int from = 0; from < n; from += at_once) {
    const int to = min(n, from + at_once);
    if (from) __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (to - from) * kTileRows; i += threads) {
      const Partial part = partial_at(call, D, first_slot + from + i / kTileRows);
      const int row = i % kTileRows;
      work.raw[i] = part.largest[row] * exp2_fast(part.top[row] - from_ordered(work.tops[row]));
    }
    __syncthreads();
    add_partials<D>(call, first_slot, from, to, work.raw, work, groups, threads);
  }
  __syncthreads();
  const Partial part = partial_at(call, D, first_slot);
#pragma unroll 1
  for (int at = threadIdx.x; at < kTileRows * (raw_pitch(D) + 1); at += threads) {
    const bool is_sum = at >= kTileRows * raw_pitch(D);
    const int row = is_sum ? at - kTileRows * raw_pitch(D) : at / raw_pitch(D);
    const float value = raw[at] * exp2_fast(part.top[row] - from_ordered(work.tops[row]));
    if (is_sum)
      work.raw_sum[row] = value;
    else
      work.raw[at] = value;
  }
  if (threadIdx.x < kTileRows) work.largest[threadIdx.x] = 0;
  __syncthreads();
  return groups;
}

// ---- Out of code domain

// What a row's results are multiplied by in the end.
__device__ __forceinline__ float norm_of(const AttendCall& call, const Work& work, int head, int tile, int slot) {
  const AttendShape& s = call.shape;
  const float sum = work.packed_sum[slot] + work.raw_sum[slot];
  if (!call.buffers.sinks) return sum > 0.0f ? 1.0f / sum : 0.0f;  // a row that sees nothing gives zeros
  // One more logit in the denominator.
  const int row = min(tile * kTileRows + slot, rows_of(s) - 1);
  const float sink = call.buffers.sinks[head * s.group + row % s.group] * kLog2e;
  const float own = from_ordered(work.tops[slot]) - kWeightBias, top = fmaxf(own, sink), keep = exp2_fast(own - top);
  return keep / (sum * keep + exp2_fast(sink - top));
}

__device__ __forceinline__ uint32_t pack_pair(int dtype, float x, float y) {
  if (dtype == kBfloat16) return float_to_bf16_bits(x) | (uint32_t)float_to_bf16_bits(y) << 16;
  return as_bits(__floats2half2_rn(x, y));
}

// Σ p ŷ in n slots and Σ p v of raw tokens to outputs: (Rᵀ Λ⁻¹ Σ p ŷ + mu Σ p + Σ p v) / Σ p.
template <int D>
__device__ __forceinline__ void finish_tile(const AttendCall& call, int b, int head, int tile, const Work& work, int n,
                                            int warp, int lane) {
  const AttendShape& s = call.shape;
  const AttendBuffers& in = call.buffers;
  const int threads = call.warps * kSimd, g = lane / 4, t = lane % 4;
  if (threadIdx.x < kTileRows) work.norm[threadIdx.x] = norm_of(call, work, head, tile, threadIdx.x);
  sum_slots<D>(work, n, in.inverse_lambda_v ? in.inverse_lambda_v + (long long)head * D : nullptr, threads);
#pragma unroll 1
  for (int unit = threadIdx.x; unit < D / 16 * kSimd; unit += threads) {
    const int i = unit / kSimd, of = unit % kSimd / 4, rows = unit % 4;
    const uint2 pairs = unit_pairs(work, i, unit % kSimd);
    uint32_t* to = reinterpret_cast<uint32_t*>(work.fragments + i * kSimd + 8 * rows + of % 4) + of / 4;
    to[0] = pairs.x, to[8] = pairs.y;
  }
  __syncthreads();
  if (warp >= D / 16) return;
  uint2 y[D / 16];
  for (int step = 0; step < D / 16; step++) y[step] = work.fragments[step * kSimd + lane];
  const float* mu = in.offset_v ? in.offset_v + ((long long)b * s.kv_heads + head) * D : nullptr;
#pragma unroll 1
  for (int i = warp; i < D / 16; i += call.warps) {
    uint4 a[D / 16];
    load_fragments<D>(call.fragments[1], i, lane, a);
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_tile<D>(a, y, c);
    const int channel = 16 * i + 2 * g;
    const float2 offset = mu ? *reinterpret_cast<const float2*>(mu + channel) : float2{0.0f, 0.0f};
    for (int j = 0; j < 2; j++) {
      const int slot = 2 * t + j, row = tile * kTileRows + slot;
      if (row >= rows_of(s)) continue;
      const float largest = __uint_as_float(work.largest[slot]), sum = work.packed_sum[slot], norm = work.norm[slot];
      const float2 raw = *reinterpret_cast<const float2*>(work.raw + slot * raw_pitch(D) + channel);
      const long long at = element_at(s.out_strides, b, head * s.group + row % s.group, row / s.group) + channel;
      *reinterpret_cast<uint32_t*>(in.out + 2 * at) =
          pack_pair(s.dtype, (c[j] * largest + offset.x * sum + raw.x) * norm,
                    (c[j + 2] * largest + offset.y * sum + raw.y) * norm);
    }
  }
}

}  // namespace halfbyte::gpu
