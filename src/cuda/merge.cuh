// From warps' results to outputs: parts of a segment merge, over the warps of a thread block and over the blocks that
// share it, and go out of code domain.
#pragma once

#include "cuda/rotate.cuh"
#include "cuda/running.cuh"

namespace halfbyte::gpu {

// ---- Parts

// What some tokens gave a row tile, in shared or in global memory. Rows 2p, 2p+1 are plane p:
//   [4 planes][d / 4] of 16 bytes, fp16 results to multiply by the row's `unit`, then [4 planes] of PlaneRows.
// The 16 bytes at `at` hold channels 32m + 2g, + 1 of both rows, then 32m + 16 + 2g, + 1, where m = at / 8 and
// g = at % 8 ^ 2p: so neither threads (g, t) that write all planes nor a warp that reads one meet in a bank.
struct alignas(16) PlaneRows {
  float top[2], sum[2], unit[2], unused[2];
};

constexpr int kPlanes = kTileRows / 2;

static_assert(part_bytes(64) == 16 * 64 + kPlanes * sizeof(PlaneRows));

__device__ __forceinline__ uint4* plane_at(uchar* part, int d, int plane) {
  return reinterpret_cast<uint4*>(part) + plane * (d / 4);
}
__device__ __forceinline__ PlaneRows& rows_at(uchar* part, int d, int plane) {
  return reinterpret_cast<PlaneRows*>(part + 16 * d)[plane];
}

// The power of two in x, which is not negative, or 0; and what brings x to between 1 and 2.
__device__ __forceinline__ float whole_power(float x) { return __uint_as_float(__float_as_uint(x) & 0x7f800000u); }
__device__ __forceinline__ float inverse_power(float x) {
  return __uint_as_float((254u << 23) - (__float_as_uint(x) & 0x7f800000u));
}

__device__ __forceinline__ uint32_t half_pair(float x, float y) { return as_bits(__floats2half2_rn(x, y)); }

// What a thread has of a warp's part: 16 bytes each in places 8 apart, and, of four threads, the rows of a plane.
template <int D>
struct WarpPart {
  uint4 y[D / 32];
  PlaneRows rows;
};

// A warp's result as a part. Weighted averages of codes times scales of less than twice the unit are below 16.
template <int D>
__device__ __forceinline__ WarpPart<D> part_of_warp(Running<D>& r) {
  sum_columns(r);
  const float by0 = inverse_power(r.sum[0]), by1 = inverse_power(r.sum[1]), unit = power_of_two(r.unit_exponent);
  WarpPart<D> part;
#pragma unroll
  for (int m = 0; m < D / 32; m++) {
    const float *a = r.acc[2 * m], *b = r.acc[2 * m + 1];
    part.y[m] = uint4{half_pair(a[0] * by0, a[2] * by0), half_pair(a[1] * by1, a[3] * by1),
                      half_pair(b[0] * by0, b[2] * by0), half_pair(b[1] * by1, b[3] * by1)};
  }
  part.rows = {
      {r.top[0], r.top[1]}, {r.sum[0], r.sum[1]}, {whole_power(r.sum[0]) * unit, whole_power(r.sum[1]) * unit}, {}};
  return part;
}

template <int D>
__device__ __forceinline__ void store_part_of_warp(const WarpPart<D>& part, uchar* to, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint4* plane = plane_at(to, D, t) + (g ^ 2 * t);
#pragma unroll
  for (int m = 0; m < D / 32; m++) plane[8 * m] = part.y[m];
  if (g == 0) rows_at(to, D, t) = part.rows;
}

// A plane of a sum of parts, of which a lane holds 16 bytes' channels in each of kEach places 32 apart.
template <int D>
struct PlaneSum {
  static constexpr int kEach = D > 128 ? D / 128 : 1;
  float y[kEach][8];  // in the order of a part's fp16
  float top[2], sum[2];
};

// Whether a lane has channels at all.
template <int D>
__device__ __forceinline__ bool has_channels(int lane) {
  return D >= 128 || lane < D / 4;
}

// The plane's sum over every groups-th eight (or four) of n parts, from the group-th on.
template <int D>
__device__ __forceinline__ void sum_parts(uchar* parts, int n, int group, int groups, int plane, int lane,
                                          PlaneSum<D>& s) {
  constexpr int kEach = PlaneSum<D>::kEach, kParts = 8 / kEach;  // under way at once
  s.top[0] = s.top[1] = kUnseen, s.sum[0] = s.sum[1] = 0.0f;
  for (int c = 0; c < kEach; c++)
    for (int j = 0; j < 8; j++) s.y[c][j] = 0.0f;
#pragma unroll 1
  for (int from = group * kParts; from < n; from += groups * kParts) {
    uchar* first = parts + from * part_bytes(D);
    const int here = n - from;
    uint4 x[kParts][kEach];
#pragma unroll
    for (int i = 0; i < kParts; i++)
#pragma unroll
      for (int c = 0; c < kEach; c++)
        x[i][c] =
            i < here && has_channels<D>(lane) ? plane_at(first + i * part_bytes(D), D, plane)[lane + 32 * c] : uint4{};
    const int own = lane % kParts;  // the part whose rows this lane has
    PlaneRows rows{{kUnseen, kUnseen}, {}, {}, {}};
    if (own < here) rows = rows_at(first + own * part_bytes(D), D, plane);
    float weight[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float top = fmaxf(s.top[j], from_ordered(__reduce_max_sync(0xffffffffu, ordered_bits(rows.top[j]))));
      const float keep = exp2_fast(rows.top[j] - top), before = exp2_fast(s.top[j] - top);
      weight[j] = rows.unit[j] * keep;
      float sum = rows.sum[j] * keep;
      for (int mask = 1; mask < kParts; mask <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
      s.sum[j] = s.sum[j] * before + sum;
      s.top[j] = top;
      for (int c = 0; c < kEach; c++)
        for (int i = 0; i < 8; i++)
          if (i / 2 % 2 == j) s.y[c][i] *= before;
    }
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const float w0 = __shfl_sync(0xffffffffu, weight[0], i), w1 = __shfl_sync(0xffffffffu, weight[1], i);
#pragma unroll
      for (int c = 0; c < kEach; c++) {
        float* y = s.y[c];
        const float2 a = __half22float2(as_half2(x[i][c].x)), b = __half22float2(as_half2(x[i][c].y));
        const float2 d = __half22float2(as_half2(x[i][c].z)), e = __half22float2(as_half2(x[i][c].w));
        y[0] += a.x * w0, y[1] += a.y * w0, y[2] += b.x * w1, y[3] += b.y * w1;
        y[4] += d.x * w0, y[5] += d.y * w0, y[6] += e.x * w1, y[7] += e.y * w1;
      }
    }
  }
}

template <int D>
__device__ __forceinline__ void multiply_channels(PlaneSum<D>& s, const float* by, int plane, int lane) {
  if (!has_channels<D>(lane)) return;
  const int g = lane % 8 ^ 2 * plane;
  for (int c = 0; c < PlaneSum<D>::kEach; c++) {
    const float* of = by + 32 * (lane / 8 + 4 * c) + 2 * g;
    const float2 low = *reinterpret_cast<const float2*>(of), high = *reinterpret_cast<const float2*>(of + 16);
    float* y = s.y[c];
    y[0] *= low.x, y[1] *= low.y, y[2] *= low.x, y[3] *= low.y;
    y[4] *= high.x, y[5] *= high.y, y[6] *= high.x, y[7] *= high.y;
  }
}

// The plane's results as fp16, and what to multiply them by.
template <int D>
struct HalfPlane {
  uint4 y[PlaneSum<D>::kEach];
  float unit[2];
};

template <int D>
__device__ __forceinline__ HalfPlane<D> as_halves(const PlaneSum<D>& s) {
  float high[2] = {0.0f, 0.0f};
  for (int c = 0; c < PlaneSum<D>::kEach; c++)
    for (int i = 0; i < 8; i++) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], fabsf(s.y[c][i]));
  for (int j = 0; j < 2; j++) high[j] = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(high[j])));
  const float by0 = inverse_power(high[0]), by1 = inverse_power(high[1]);
  HalfPlane<D> out;
  for (int c = 0; c < PlaneSum<D>::kEach; c++) {
    const float* y = s.y[c];
    out.y[c] = uint4{half_pair(y[0] * by0, y[1] * by0), half_pair(y[2] * by1, y[3] * by1),
                     half_pair(y[4] * by0, y[5] * by0), half_pair(y[6] * by1, y[7] * by1)};
  }
  out.unit[0] = whole_power(high[0]), out.unit[1] = whole_power(high[1]);
  return out;
}

template <int D>
__device__ __forceinline__ void store_plane(const HalfPlane<D>& x, uchar* part, int plane, int lane) {
  if (has_channels<D>(lane))
    for (int c = 0; c < PlaneSum<D>::kEach; c++) plane_at(part, D, plane)[lane + 32 * c] = x.y[c];
}

// To where warps read it as B of a product.
template <int D>
__device__ __forceinline__ void store_fragments(const HalfPlane<D>& x, const Work& work, int plane, int lane) {
  if (!has_channels<D>(lane)) return;
  const int g = lane % 8 ^ 2 * plane;
  for (int c = 0; c < PlaneSum<D>::kEach; c++) {
    const int step = 2 * (lane / 8 + 4 * c);
    uint32_t* to = reinterpret_cast<uint32_t*>(work.fragments + step * kSimd + 8 * plane + g % 4) + g / 4;
    to[0] = x.y[c].x, to[8] = x.y[c].y, to[2 * kSimd] = x.y[c].z, to[2 * kSimd + 8] = x.y[c].w;
  }
}

// ---- Raw tokens

// What raw tokens gave a segment, in global memory: [kTileRows][raw_pitch], then maxima and sums as Work has them.
HALFBYTE_INLINE constexpr int raw_bytes(int d) { return kTileRows * (raw_pitch(d) + 2) * 4; }

// The greatest of raw tokens' scores in a row.
__device__ __forceinline__ float raw_top(const Work& work, int slots, int row) {
  float top = kUnseen;
#pragma unroll 1
  for (int i = 0; i < slots; i++) top = fmaxf(top, work.raw_tops[i * kTileRows + row]);
  return top;
}

// Raw results of `slots` warps to `to`, by threads `thread` of `threads`.
template <int D>
__device__ __forceinline__ void merge_raw(const Work& work, int slots, float* to, int thread, int threads) {
#pragma unroll 1
  for (int at = thread; at < kTileRows * raw_pitch(D); at += threads) {
    const int row = at / raw_pitch(D);
    const float top = raw_top(work, slots, row);
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < slots; i++)
      sum += work.raw[i * kTileRows * raw_pitch(D) + at] * exp2_fast(work.raw_tops[i * kTileRows + row] - top);
    to[at] = sum;
  }
}

// A row's sum of them, and its maximum, to where they belong.
template <int D>
__device__ __forceinline__ void sum_raw(const Work& work, int slots, float* to, int row) {
  const float top = raw_top(work, slots, row);
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < slots; i++)
    sum += work.raw_sums[i * kTileRows + row] * exp2_fast(work.raw_tops[i * kTileRows + row] - top);
  if (to == work.raw) {
    work.raw_top[row] = top, work.raw_sum[row] = sum;
  } else {
    to[kTileRows * raw_pitch(D) + row] = top;
    to[kTileRows * (raw_pitch(D) + 1) + row] = sum;
  }
}

// Starts copying what merge_raw has left in global memory to where it would be without other blocks.
template <int D>
__device__ __forceinline__ void fetch_raw(const float* from, const Work& work, int threads) {
  constexpr int kRaw = kTileRows * raw_pitch(D) / 4, kAll = raw_bytes(D) / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < kAll; i += threads)
    copy_async_16(i < kRaw ? work.raw + 4 * i : work.raw_top + 4 * (i - kRaw), from + 4 * i);
  copy_async_commit();
}

// ---- Between the blocks that share a segment

__device__ __forceinline__ uchar* shared_part(const AttendCall& call, int d, int slot) {
  return reinterpret_cast<uchar*>(call.buffers.partials) + (long long)slot * part_bytes(d);
}

// Of the segment's raw tokens, which its first block takes.
__device__ __forceinline__ float* shared_raw(const AttendCall& call, int d, int segments, int segment) {
  return reinterpret_cast<float*>(shared_part(call, d, call.blocks + segments) + (long long)segment * raw_bytes(d));
}

// Tells that this block's part is stored; true for the last of a segment's blocks, which then sees them all.
__device__ __forceinline__ bool is_last(int* arrivals, int sharers) {
  __shared__ int arrived;
  __syncthreads();  // all of it is stored
  if (threadIdx.x == 0) {
    arrived = count_arrival(arrivals);  // reaches what the barriers order
    if (arrived == sharers - 1) *arrivals = 0;
  }
  __syncthreads();
  return arrived == sharers - 1;
}

// ---- Out of code domain

// Of a row whose packed tokens gave `sum`, relative to `top`, and results to be multiplied by `unit`.
__device__ __forceinline__ OutputRow output_row(const AttendCall& call, const Work& work, int b, int head, int row,
                                                float top, float sum, float unit) {
  const AttendShape& s = call.shape;
  const int slot = row % kTileRows, in_tile = min(row, rows_of(s) - 1);
  const QueryPlace place = query_place(s, in_tile);
  const int of_head = head * s.group + place.head;
  const float raw_top = work.raw_top[slot];
  float all_top = fmaxf(top, raw_top), sink = 0.0f;
  if (call.buffers.sinks) sink = call.buffers.sinks[of_head] * kLog2e, all_top = fmaxf(all_top, sink);
  const float keep = exp2_fast(top - all_top), keep_raw = exp2_fast(raw_top - all_top);
  float all = sum * keep + work.raw_sum[slot] * keep_raw;
  if (call.buffers.sinks) all += exp2_fast(sink - all_top + kWeightBias);  // one more logit in the denominator
  const float norm = all > 0.0f ? 1.0f / all : 0.0f;                       // a row that sees nothing gives zeros
  return {call.buffers.out + 2 * element_at(s.out_strides, b, of_head, place.query), unit * keep * norm,
          sum * keep * norm, keep_raw * norm};
}

__device__ __forceinline__ uint32_t pack_pair(int dtype, float x, float y) {
  if (dtype == kBfloat16) return float_to_bf16_bits(x) | (uint32_t)float_to_bf16_bits(y) << 16;
  return half_pair(x, y);
}

// From what sums of parts left in shared memory, once all have come to the barrier here, to outputs:
// (Rᵀ Λ⁻¹ Σ p ŷ + mu Σ p + Σ p v) / Σ p.
template <int D>
__device__ __forceinline__ void write_outputs(const AttendCall& call, int b, int head, int tile, const Work& work,
                                              int warp, int lane) {
  const AttendShape& s = call.shape;
  const int g = lane / 4, t = lane % 4;
  const float* mu = call.buffers.offset_v ? call.buffers.offset_v + ((long long)b * s.kv_heads + head) * D : nullptr;
  uint4 a[D / 16] = {};  // in every warp: left open, it would be live from one segment to the next
  float2 offset{0.0f, 0.0f};
  const auto load = [&](int i) {
    load_fragments<D>(call.fragments[1], i, lane, a);
    if (mu) offset = *reinterpret_cast<const float2*>(mu + 16 * i + 2 * g);
  };
  if (warp < D / 16) load(warp);
  __syncthreads();
  if (warp >= D / 16) return;
  uint2 y[D / 16];
#pragma unroll
  for (int step = 0; step < D / 16; step++) y[step] = work.fragments[step * kSimd + lane];
#pragma unroll 1
  for (int i = warp;; load(i)) {
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_tile<D>(a, y, c);
    for (int j = 0; j < 2; j++) {
      const int slot = 2 * t + j, channel = 16 * i + 2 * g;
      if (tile * kTileRows + slot >= rows_of(s)) continue;
      const OutputRow row = work.outputs[slot];
      const float2 raw = *reinterpret_cast<const float2*>(work.raw + slot * raw_pitch(D) + channel);
      reinterpret_cast<uint32_t*>(row.to)[channel / 2] =
          pack_pair(s.dtype, c[j] * row.of_codes + offset.x * row.of_offset + raw.x * row.of_raw,
                    c[j + 2] * row.of_codes + offset.y * row.of_offset + raw.y * row.of_raw);
    }
    i += call.warps;
    if (i >= D / 16) return;
  }
}

// ---- All of it

// Planes of a row tile that have rows.
__device__ __forceinline__ int planes_of(const AttendShape& s, int tile) {
  return (min(kTileRows, rows_of(s) - tile * kTileRows) + 1) / 2;
}

// Sums n parts, by groups of warps that take some each, to parts at `to`; or, where that is null, to outputs.
struct Pass {
  uchar* from;
  int n, groups;
  uchar* to;
};

// A plane's part of a pass, by a warp. raw: where sums of raw tokens belong, if they are not known yet.
template <int D>
__device__ __forceinline__ void sum_plane(const AttendCall& call, const Segment& segment, const Work& work,
                                          const Pass& pass, float* raw, int group, int plane, int lane) {
  uchar* const to = pass.to ? pass.to + group * part_bytes(D) : nullptr;
  PlaneSum<D> sum;
  sum_parts<D>(pass.from, pass.n, group, pass.groups, plane, lane, sum);
  if (!to && call.buffers.inverse_lambda_v)
    multiply_channels<D>(sum, call.buffers.inverse_lambda_v + (long long)segment.place.head * D, plane, lane);
  const HalfPlane<D> halves = as_halves(sum);
  if (lane < 2) {
    const int row = 2 * plane + lane;
    const float row_top = lane ? sum.top[1] : sum.top[0], row_sum = lane ? sum.sum[1] : sum.sum[0];
    const float unit = lane ? halves.unit[1] : halves.unit[0];
    if (raw) sum_raw<D>(work, segment.raw_slots, raw, row);
    if (to) {
      PlaneRows& rows = rows_at(to, D, plane);
      rows.top[lane] = row_top, rows.sum[lane] = row_sum, rows.unit[lane] = unit;
    } else {
      work.outputs[row] = output_row(call, work, segment.place.b, segment.place.head,
                                     segment.place.tile * kTileRows + row, row_top, row_sum, unit);
    }
  }
  if (to)
    store_plane(halves, to, plane, lane);
  else
    store_fragments(halves, work, plane, lane);
}

// What the warps of this block hold of a segment to outputs; or, where blocks share the segment, to memory for the last
// of them to do so. Parts are summed in a fixed order: over the warps, over the blocks, of which each warp takes some,
// and over what that gives.
template <int D>
__device__ __forceinline__ void finish_segment(const AttendCall& call, Running<D>& running, const Work& work, int warp,
                                               int lane) {
  warp = opaque(warp), lane = opaque(lane);
  const WarpPart<D> part = part_of_warp(running);
  if (call.buffers.turn.waves) __syncthreads();  // all have read the offsets, which lie where parts will
  store_part_of_warp(part, work.parts + warp * part_bytes(D), lane);
  __syncthreads();
  const AttendShape& s = call.shape;
  const Segment segment = *work.segment;
  const Sharers sharers = segment.sharers;
  const int planes = planes_of(s, segment.place.tile), segments = s.batch * s.kv_heads * row_tiles(s);
  uchar* const own = shared_part(call, D, blockIdx.x + segment.place.index);
  // The last warps sum planes; the others, or all where there are no others, merge what the first block has of raw
  // ones.
  const int others = call.warps > planes ? call.warps - planes : call.warps;
  float* const raw = sharers.n == 1 ? work.raw : shared_raw(call, D, segments, segment.place.index);
  float* new_raw = (int)blockIdx.x == sharers.first ? raw : nullptr;
  if (new_raw && warp < others) merge_raw<D>(work, segment.raw_slots, raw, threadIdx.x, others * kSimd);
  Pass pass{work.parts, call.warps, 1, sharers.n == 1 ? nullptr : own};
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (int i = call.warps - 1 - warp; i < planes * pass.groups; i += call.warps) {
      const int group = (unsigned)i / (unsigned)planes;
      sum_plane<D>(call, segment, work, pass, new_raw, group, i - group * planes, lane);
    }
    if (!pass.to) break;
    if (pass.to == own) {
      if (!is_last(call.arrivals + segment.place.index, sharers.n)) return;
      fetch_raw<D>(raw, work, call.warps * kSimd);
      new_raw = nullptr;
      pass = {shared_part(call, D, sharers.first + segment.place.index), sharers.n, max(call.warps / planes, 1),
              work.parts};
    } else {
      copy_async_wait(0);
      __syncthreads();
      pass = {work.parts, pass.groups, 1, nullptr};
    }
  }
  write_outputs<D>(call, segment.place.b, segment.place.head, segment.place.tile, work, warp, lane);
}

}  // namespace halfbyte::gpu
