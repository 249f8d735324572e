// Decode attention on packed codes with tensor cores: split over the tokens, merged by the last block to finish.
//
// The format's rows are mma fragments as they are. A 32-bit word of a K row holds four channels of one token, of a V
// row four tokens of one channel; thread (g, t) takes words 2g and 2g+1 of row t. With tokens (K) or channels (V) as
// the 16 rows of A and query heads as the 8 columns of B, scores leave the first product where the second one, after an
// 8×8 transposition, wants its weights: only the order in which sums run differs from the channels' own.
#pragma once

#include "cuda/attend_raw.cuh"
#include "cuda/length.cuh"
#include "cuda/merge.cuh"

namespace halfbyte::gpu {

// The two columns (rows of the row tile) of a thread.
struct Columns {
  float factor[2],
      offset[2];           // score · log_base = factor · product + offset, and what the turning part of K's offset adds
  int open_from, open_to;  // seen by all columns of the tile
};

__device__ __forceinline__ float log_base(const AttendShape& s) { return s.softcap > 0.0f ? 1.0f : kLog2e; }

// The packed tokens that a column sees.
struct PackedSight {
  int lo, end;
};

__device__ __forceinline__ PackedSight packed_sight(const AttendShape& s, const RowSight& sight) {
  return {max(sight.lo, s.sink_tokens), sight.packed_end};  // sinks are raw
}

// How groups lie: each half of a span has its own, each span (or two, or more) has, or the whole head has one.
enum Groups { kHalves, kSpans, kWhole };

HALFBYTE_INLINE constexpr int most_groups(int d, Groups kind) {
  return kind == kWhole ? 1 : d / kSpan * (kind == kHalves ? 2 : 1);
}

// Scales of tokens 2g, 2g+1. Scale: __half or float, as stored.
template <class Scale>
__device__ __forceinline__ float2 scale_pair(const uint8_t* scales, int group, int g) {
  const uint8_t* row = scales + group * (int)(kBlockTokens * sizeof(Scale));
  if constexpr (sizeof(Scale) == 4)
    return reinterpret_cast<const float2*>(row)[g];
  else
    return __half22float2(reinterpret_cast<const __half2*>(row)[g]);
}

// Scales of tokens 4t and 4t+2, then 4t+1 and 4t+3, divided by 2^unit_exponent.
template <class Scale>
__device__ __forceinline__ void unit_scales(const uint8_t* scales, int group, int t, float unit, __half2& even,
                                            __half2& odd) {
  const uint8_t* row = scales + group * (int)(kBlockTokens * sizeof(Scale));
  if constexpr (sizeof(Scale) == 4) {
    const float4 four = reinterpret_cast<const float4*>(row)[t];
    even = __floats2half2_rn(four.x * unit, four.z * unit), odd = __floats2half2_rn(four.y * unit, four.w * unit);
  } else {
    const uint2 four = reinterpret_cast<const uint2*>(row)[t];
    const __half2 factor = __float2half2_rn(unit);
    even = __hmul2(as_half2(__byte_perm(four.x, four.y, 0x5410)), factor);
    odd = __hmul2(as_half2(__byte_perm(four.x, four.y, 0x7632)), factor);
  }
}

// Both 16-channel halves of a span as A fragments. words: the thread's pair in the span's first row.
template <int Bits>
__device__ __forceinline__ void expand_span(const uint8_t* words, uint32_t first[4], uint32_t second[4]) {
  const uint2 w = *reinterpret_cast<const uint2*>(words);
  if constexpr (Bits == 4) {
    expand_low(w.x, first[0], first[2]), expand_low(w.y, first[1], first[3]);
    expand_high(w.x, second[0], second[2]), expand_high(w.y, second[1], second[3]);
  } else {
    const uint2 w2 = *reinterpret_cast<const uint2*>(words + 4 * kRowBytes);
    expand_bytes(w.x, first[0], first[2]), expand_bytes(w.y, first[1], first[3]);
    expand_bytes(w2.x, second[0], second[2]), expand_bytes(w2.y, second[1], second[3]);
  }
}

template <int Bits>
constexpr int kSpanBytes = Bits * kRowBytes;

// Bytes of a tile's codes.
HALFBYTE_INLINE constexpr int tile_codes(int d, int k_bits, int v_bits) {
  return kTileBlocks * (d / kSpan) * (k_bits + v_bits) * kRowBytes;
}

// Products of 16 tokens with the 8 columns: tokens 2g, 2g+1 by columns 2t, 2t+1.
template <int D, int Bits, Groups Kind, class Scale>
__device__ __forceinline__ void score_block(int shift, const uint8_t* codes, const uint8_t* scales,
                                            const uint32_t q[D / 16][2], int lane, float product[4]) {
  const int g = lane / 4, t = lane % 4;
  const uint8_t* words = codes + t * kRowBytes + g * 8;
  for (int j = 0; j < 4; j++) product[j] = 0.0f;
#pragma unroll
  for (int span = 0; span < D / kSpan; span++) {
    uint32_t first[4], second[4];
    expand_span<Bits>(words + span * kSpanBytes<Bits>, first, second);
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int group = Kind == kHalves ? 2 * span + 1 : span >> shift;
    mma(part, first, q[2 * span][0], q[2 * span][1]);
    if constexpr (Kind == kHalves) {
      const float2 s = scale_pair<Scale>(scales, 2 * span, g);
      product[0] += part[0] * s.x, product[1] += part[1] * s.x, product[2] += part[2] * s.y,
          product[3] += part[3] * s.y;
      for (int j = 0; j < 4; j++) part[j] = 0.0f;
    }
    mma(part, second, q[2 * span + 1][0], q[2 * span + 1][1]);
    const float2 s = scale_pair<Scale>(scales, group, g);
    product[0] += part[0] * s.x, product[1] += part[1] * s.x, product[2] += part[2] * s.y, product[3] += part[3] * s.y;
  }
}

// Adds 16 tokens' values. w_even, w_odd: weights of tokens 4t, 4t+2 and 4t+1, 4t+3 in column g.
template <int D, int Bits, Groups Kind, class Scale>
__device__ __forceinline__ void add_block(int shift, const uint8_t* codes, const uint8_t* scales, __half2 w_even,
                                          __half2 w_odd, float unit, int lane, Running<D>& r) {
  const int g = lane / 4, t = lane % 4;
  const uint8_t* words = codes + t * kRowBytes + g * 8;
  __half2 even, odd;
  uint32_t b0 = 0, b1 = 0;
#pragma unroll
  for (int span = 0; span < D / kSpan; span++) {
    uint32_t first[4], second[4];
    expand_span<Bits>(words + span * kSpanBytes<Bits>, first, second);
    if (span == 0 || Kind != kWhole) {
      unit_scales<Scale>(scales, Kind == kHalves ? 2 * span : span >> shift, t, unit, even, odd);
      b0 = as_bits(__hmul2(w_even, even)), b1 = as_bits(__hmul2(w_odd, odd));
    }
    mma(r.acc[2 * span], first, b0, b1);
    if constexpr (Kind == kHalves) {
      unit_scales<Scale>(scales, 2 * span + 1, t, unit, even, odd);
      b0 = as_bits(__hmul2(w_even, even)), b1 = as_bits(__hmul2(w_odd, odd));
    }
    mma(r.acc[2 * span + 1], second, b0, b1);
  }
}

// Blocks that a warp takes at once: one by one needs half the instructions in memory, which a short call waits for.
HALFBYTE_INLINE constexpr int at_once(int d) { return d > 128 ? 1 : 2; }

// Exponent of the largest of V's scales in Blocks blocks, within what fp16 can divide by. scales: V's of the first.
template <class Scale, int Blocks>
__device__ __forceinline__ int largest_exponent(int groups, const uint8_t* scales, int block_scales, int lane) {
  const Scale* row =
      reinterpret_cast<const Scale*>(scales + lane / kBlockTokens % Blocks * block_scales) + lane % kBlockTokens;
  uint32_t largest = 0;
  for (int group = 0; group < groups; group++)
    largest = max(largest, __float_as_uint((float)row[group * kBlockTokens]) & 0x7fffffffu);
  const int exponent = (int)(__reduce_max_sync(0xffffffffu, largest) >> 23) - 127;
  return min(max(exponent, -14), 14);
}

// The items [from, to) of a segment whose offsets are turned together. They lie where warps will merge, which has room
// for so many spans.
struct Piece {
  int to;
  Spans spans;
};

// The next piece, before item `end`. before: tiles of the sequence before item 0's.
__device__ __forceinline__ Piece next_piece(const AttendCall& call, int before, int from, int end) {
  const Turn& turn = call.buffers.turn;
  if (!turn.waves) return {end, {}};
  const int room = call.warps / 2 * call.shape.format.k.head_dim, shift = span_shift(turn);
  const int to = min(end, from + ((room - 1) << shift) / kTileTokens);
  const int first = (before + from) * kTileTokens >> shift, last = ((before + to) * kTileTokens - 1) >> shift;
  return {to, {first, max(last + 1 - first, 0)}};
}

// What `warps` warps turn of some spans, this one from span `from` on.
template <int D>
__device__ __forceinline__ void turn_spans(const Turn& turn, const Turning& to, Spans spans, int from, int warps,
                                           int lane) {
  constexpr int kSteps = 2;
#pragma unroll 1
  for (; from < spans.n; from += 16 * warps) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int step = 0; step < D / 16; step += kSteps) {
      Waves<kSteps> waves;
      ask_for_waves(turn, spans, from, step, lane, waves);
      turn_steps(to, step, waves, lane, sum);
    }
    store_turned(to, spans, from, sum, lane);
  }
}

// at_once(D) blocks of 16 tokens, of a tile in shared memory, join the running softmax. codes, scales: of the first
// block; turned: q·mu of the rows, [spans][kTileRows] from the sequence's first span on, of which those of the tile
// exist; or null.
template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale>
__device__ __forceinline__ void attend_blocks(const AttendCall& call, const uint8_t* codes, const uint8_t* scales,
                                              const float* turned, const Work& work, int token,
                                              const uint32_t q[D / 16][2], const Columns& columns, int lane,
                                              Running<D>& r) {
  const AttendShape& s = call.shape;
  constexpr int kBlocks = at_once(D);
  constexpr int kCodesK = D / kSpan * kSpanBytes<KBits>, kCodesV = D / kSpan * kSpanBytes<VBits>;
  const int k_scales = s.format.k.n_groups * (int)(kBlockTokens * sizeof(Scale));
  const int block_scales = k_scales + s.format.v.n_groups * (int)(kBlockTokens * sizeof(Scale));
  const int g = lane / 4, t = lane % 4;
  float score[kBlocks][4], offset[2] = {columns.offset[0], columns.offset[1]};
#pragma unroll
  for (int i = 0; i < kBlocks; i++) {
    if (turned && (i == 0 || call.buffers.turn.span == kBlockTokens)) {
      const int span = (token + i * kBlockTokens) >> span_shift(call.buffers.turn);
      const float2 own = reinterpret_cast<const float2*>(turned + span * kTileRows)[t];
      offset[0] = columns.offset[0] + own.x * log_base(s);
      offset[1] = columns.offset[1] + own.y * log_base(s);
    }
    score_block<D, KBits, KGroups, Scale>(call.k_shift, codes + i * (kCodesK + kCodesV), scales + i * block_scales, q,
                                          lane, score[i]);
    for (int j = 0; j < 4; j++) score[i][j] = score[i][j] * columns.factor[j & 1] + offset[j & 1];
  }
  if (s.softcap > 0.0f)  // otherwise factor and offset hold log2(e) already
    for (int i = 0; i < kBlocks; i++)
      for (int j = 0; j < 4; j++) score[i][j] = s.softcap * kLog2e * tanh_fast(score[i][j] / s.softcap);
  if (call.buffers.mask || token < columns.open_from || token + kBlocks * kBlockTokens > columns.open_to) {
    uint32_t seen[2];
    for (int j = 0; j < 2; j++) {
      const PackedSight sight = packed_sight(s, work.sights[2 * t + j]);
      seen[j] = bits_between(token, sight.lo, sight.end);
    }
    const SegmentPlace& at = work.segment->place;
    if (call.buffers.mask) take_mask(call, at.b, at.tile, token, lane, seen);
    for (int i = 0; i < kBlocks; i++)
      for (int j = 0; j < 4; j++)
        if (!(seen[j & 1] >> (i * kBlockTokens + 2 * g + j / 2) & 1)) score[i][j] = -INFINITY;
  }
  float high0 = fmaxf(score[0][0], score[0][2]), high1 = fmaxf(score[0][1], score[0][3]);
  for (int i = 1; i < kBlocks; i++) {
    high0 = fmaxf(high0, fmaxf(score[i][0], score[i][2]));
    high1 = fmaxf(high1, fmaxf(score[i][1], score[i][3]));
  }
  if (__any_sync(0xffffffffu, high0 > r.top[0] + kSlack || high1 > r.top[1] + kSlack)) raise_tops(r, high0, high1);
  const int exponent = largest_exponent<Scale, kBlocks>(s.format.v.n_groups, scales + k_scales, block_scales, lane);
  if (exponent > r.unit_exponent) {
    const float keep = power_of_two(r.unit_exponent - exponent);
    rescale(r, keep, keep);
    r.unit_exponent = exponent;
  }
  const float unit = power_of_two(-r.unit_exponent);
  const float base0 = kWeightBias - r.top[0], base1 = kWeightBias - r.top[1];
#pragma unroll
  for (int i = 0; i < kBlocks; i++) {
    const float p0 = exp2_fast(score[i][0] + base0), p1 = exp2_fast(score[i][1] + base1);
    const float p2 = exp2_fast(score[i][2] + base0), p3 = exp2_fast(score[i][3] + base1);
    r.sum[0] += p0 + p2, r.sum[1] += p1 + p3;
    const __half2 even = as_half2(transpose_8x8(as_bits(__floats2half2_rn(p0, p1))));
    const __half2 odd = as_half2(transpose_8x8(as_bits(__floats2half2_rn(p2, p3))));
    add_block<D, VBits, VGroups, Scale>(call.v_shift, codes + i * (kCodesK + kCodesV) + kCodesK,
                                        scales + i * block_scales + k_scales, even, odd, unit, lane, r);
  }
}

// ---- The kernel

// Brings `bytes` bytes into the L2 cache, by one of `threads` threads.
__device__ __forceinline__ void prefetch_all(const void* from, int bytes, int thread, int threads) {
#pragma unroll 1
  for (int at = thread * kLine; at < bytes; at += threads * kLine) prefetch(static_cast<const char*>(from) + at);
}

// What finish_segment reads beside parts.
template <int D>
__device__ __forceinline__ void prefetch_for_finish(const AttendCall& call, int b, int head, int thread, int threads) {
  prefetch_all(call.fragments[1], 2 * D * D, thread, threads);
  const float* mu = call.buffers.offset_v;
  if (mu) prefetch_all(mu + ((long long)b * call.shape.kv_heads + head) * D, D * 4, thread, threads);
}

// What warps turn after the first spans of each, of which the first is `from`.
__device__ __forceinline__ void prefetch_waves(const Turn& turn, Spans spans, int from, int lane) {
  const int bytes = turn.pairs * 8, n = min(spans.n - from, 16);
  if (n > 0) prefetch_all(turn.waves + (long long)(spans.first + from) * turn.pairs * 2, n * bytes, lane, kSimd);
}

// What the scores of a piece's tokens come from, to shared memory, by the whole block: the first warps, `rotating` in
// number, rotate queries, the others take q·mu, and all of them turn offsets. meanwhile: what each warp does while its
// first loads are under way.
template <int D, class Meanwhile>
__device__ __forceinline__ void prepare_segment(const AttendCall& call, int rotating, const SegmentPlace& at,
                                                const Piece& piece, const Work& work, int warp, int lane,
                                                const Meanwhile& meanwhile) {
  const AttendShape& s = call.shape;
  const int helpers = call.warps - rotating, helper = helpers ? warp - rotating : warp;
  Rotated<D> rotated = {};  // defined on all ways, or the compiler keeps it in memory
  if (warp < rotating) ask_for_rotation(call, at.b, at.head, at.tile, warp, lane, rotated);
  meanwhile();
  if (warp < rotating) rotate_queries(call, at.head, rotated, work, warp, lane);
  const int from = 16 * (warp < rotating ? warp + helpers : helper);
  Waves<D / 16> waves = {};
  if (from < piece.spans.n) ask_for_waves(call.buffers.turn, piece.spans, from, 0, lane, waves);
  prefetch_waves(call.buffers.turn, piece.spans, from + 16 * call.warps, lane);
  if (helper >= 0) dot_offsets<D>(call, at.b, at.head, at.tile, work, helper, helpers ? helpers : call.warps, lane);
  if (threadIdx.x < kTileRows) {
    const int row = min(at.tile * kTileRows + (int)threadIdx.x, rows_of(s) - 1);
    work.sights[threadIdx.x] = sight_of(s, row, call.buffers.mask != nullptr);
  }
  __syncthreads();
  if (from < piece.spans.n) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    turn_steps(turning(work), 0, waves, lane, sum);
    store_turned(turning(work), piece.spans, from, sum, lane);
    turn_spans<D>(call.buffers.turn, turning(work), piece.spans, from + 16 * call.warps, call.warps, lane);
  }
  if (call.buffers.turn.waves) __syncthreads();
}

// This thread's part of the prepared queries: B fragments, and what its two columns may see.
template <int D>
__device__ __forceinline__ void take_queries(const AttendCall& call, const Work& work, int lane, uint32_t q[D / 16][2],
                                             Columns& columns) {
  const AttendShape& s = call.shape;
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const uint2 pair = work.fragments[i * kSimd + lane];
    q[i][0] = pair.x, q[i][1] = pair.y;
  }
  PackedSight sight[2];
  for (int j = 0; j < 2; j++) {
    const int column = 2 * (lane % 4) + j;
    columns.factor[j] = work.factor[column] * log_base(s), columns.offset[j] = work.offset[column] * log_base(s);
    sight[j] = packed_sight(s, work.sights[column]);
  }
  columns.open_from = __reduce_max_sync(0xffffffffu, max(sight[0].lo, sight[1].lo));
  columns.open_to = __reduce_min_sync(0xffffffffu, min(sight[0].end, sight[1].end));
}

// This warp's tiles of a segment, of which a piece is prepared, from item `item` on to before `end`, join its running
// softmax. before: tiles of the sequence before item 0's; ask: for the next tile, to a slot.
template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale, class Ask>
__device__ __forceinline__ void attend_tiles(const AttendCall& call, const Work& work, Piece piece, int before,
                                             int& item, int end, Ring& ring, const Ask& ask, int warp, int lane,
                                             Running<D>& running) {
  constexpr int kCodes = tile_codes(D, KBits, VBits);
  const Turn& turn = call.buffers.turn;
  uint32_t q[D / 16][2];
  Columns columns{};
  take_queries<D>(call, work, lane, q, columns);
  clear(running);
  int to = piece.to;
  const float* turned = turn.waves ? work.slots - piece.spans.first * kTileRows : nullptr;
#pragma unroll 1
  while (true) {
    for (; item < to; item += call.warps) {
      wait_for_tile(call, ring);
      const uint8_t* stage = ring.memory + ring.slot * call.bytes;
#pragma unroll 1
      for (int i = 0; i < kTileBlocks; i += at_once(D))
        attend_blocks<D, KBits, VBits, KGroups, VGroups, Scale>(
            call, stage + i * (kCodes / kTileBlocks), stage + kCodes + i * ((call.bytes - kCodes) / kTileBlocks),
            turned, work, (before + item) * kTileTokens + i * kBlockTokens, q, columns, lane, running);
      __syncwarp();  // before the slot is filled again
      ask(work.segment->place, ring.slot);
      next_slot(call, ring);
    }
    if (to >= end) return;
    const Piece next = next_piece(call, before, to, end);
    __syncthreads();  // all have read the offsets of the piece before
    turn_spans<D>(turn, turning(work), next.spans, 16 * warp, call.warps, lane);
    __syncthreads();
    to = next.to, turned = work.slots - next.spans.first * kTileRows;
  }
}

// This thread block's part of a call: its tiles, and whatever segments it is the last one to work on. Without packed
// tokens that any query sees, a block has a segment.
template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale>
__device__ __forceinline__ void attend_items(const AttendCall& call, float* memory) {
  const AttendShape& s = call.shape;
  const int warp = threadIdx.x / kSimd, lane = threadIdx.x % kSimd;
  const auto [first_segment, first, last] = items_of(call, blockIdx.x);
  const int raw_slots_here = raw_slots(D, call.warps);
  const Work work = work_at(memory, call.plan, raw_slots_here);
  SegmentPlace at = segment_place(s, first_segment);
  Ring ring = start_ring(call, memory, at, first + warp, last, warp, lane);
  const auto ask = [&](const SegmentPlace& from, int slot) {
    constexpr int kScales =
        kTileBlocks * (most_groups(D, KGroups) + most_groups(D, VGroups)) * kBlockTokens * (int)sizeof(Scale);
    ask_for_tile<tile_codes(D, KBits, VBits), kScales>(call, ring, from, slot, lane);
  };

  int item = first + warp, begin = first;  // this warp's next tile; the segment's first one
  do {
    const int end = min(last, (at.index + 1) * call.n_tiles);
    const Sharers sharers = sharers_of(call, at.index);
    const int before = call.first_tile - at.index * call.n_tiles;  // tiles of the sequence before item 0's
    const int slots = (int)blockIdx.x == sharers.first ? min(raw_slots_here, call.raw_blocks) : 0;
    if (begin != first) __syncthreads();  // the last segment is finished
    if (threadIdx.x == 0) *work.segment = {at, sharers, slots};
    // Whoever asks for tiles waits once memory has enough to do: for half of them at first, for the others once nobody
    // waits for this warp.
    const auto fill = [&](int from, int to) {
#pragma unroll 1
      for (int slot = from; slot < to && begin == first; slot++) ask(at, slot);
    };
    const int rotating = min(call.warps, D / 16), early = (call.stages + 1) / 2;
    const Piece piece = next_piece(call, before, begin, end);
    prepare_segment<D>(call, rotating, at, piece, work, warp, lane, [&] {
      prefetch_raw<D>(call, at.b, at.head, slots, warp, lane);
      fill(0, early);
      if (warp < rotating) prefetch_for_finish<D>(call, at.b, at.head, threadIdx.x, rotating * kSimd);
    });
    fill(early, call.stages);
    attend_raw<D>(call, at.b, at.head, at.tile, slots, work, warp, lane);
    Running<D> running;
    attend_tiles<D, KBits, VBits, KGroups, VGroups, Scale>(call, work, piece, before, item, end, ring, ask, warp, lane,
                                                           running);
    finish_segment<D>(call, running, work, warp, lane);
    at = work.segment->place;
    begin = end, next_segment(s, at);
  } while (begin < last);
}

template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale>
__global__ void __launch_bounds__(max_warps(D) * kSimd, 1) attend_kernel(const __grid_constant__ AttendCall call) {
  float* work = shared_memory<float>();
  attend_items<D, KBits, VBits, KGroups, VGroups, Scale>(call, work);
}

// ---- The same for a length in device memory

struct AttendStep {
  AttendCall call;  // without the counts; raw: sinks, if there can be any, and the tail's slots
  LengthRule rule;
  int processors;
};

template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale>
__global__ void __launch_bounds__(max_warps(D) * kSimd, 1)
    attend_step_kernel(const __grid_constant__ AttendStep launched) {
  float* work = shared_memory<float>();
  __shared__ uint64_t memory[sizeof(AttendCall) / 8];
  AttendCall& call = copy_call(launched.call, memory);
  if (threadIdx.x == 0) take_length(call, launched.rule, launched.processors);
  __syncthreads();
  if ((int)blockIdx.x >= call.blocks) return;
  attend_items<D, KBits, VBits, KGroups, VGroups, Scale>(call, work);
}

}  // namespace halfbyte::gpu
