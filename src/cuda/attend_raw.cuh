// Attention to raw tokens by tensor cores: a warp takes 16 of them at a time, as they lie in memory.
#pragma once

#include "cuda/rotate.cuh"
#include "cuda/running.cuh"
#include "cuda/sight.cuh"

namespace halfbyte::gpu {

// Rows g and g + 8 of 16 tokens, or the last one's where there are fewer: see QueryRow.
template <int D>
struct RawRows {
  uint4 words[D / 32][2];
};

template <int D>
__device__ __forceinline__ RawRows<D> load_raw(const uchar* data, const Strides3& strides, int b, int head, int first,
                                               int n, int lane) {
  const int g = lane / 4, t = lane % 4;
  RawRows<D> out;
#pragma unroll
  for (int p = 0; p < D / 32; p++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const long long at = element_at(strides, b, head, first + min(g + 8 * half, n - 1));
      out.words[p][half] = *reinterpret_cast<const uint4*>(data + 2 * (at + 32 * p + 8 * t));
    }
  return out;
}

// What a warp's rows ask of raw tokens. sight: of columns 2t, 2t+1.
template <int D>
struct RawQueries {
  QueryRow<D> row;
  RowSight sight[2];
};

// Scores of tokens g and g + 8 (0, 1 and 2, 3) in columns 2t, 2t+1, as powers of two, −inf where a row does not see.
template <int D>
__device__ __forceinline__ void score_raw_block(const AttendCall& call, const RawTokens& raw, int b, int head, int tile,
                                                int from, int n, const RawQueries<D>& q, int lane, float score[4]) {
  const AttendShape& s = call.shape;
  const RawRows<D> k = load_raw<D>(raw.k, raw.k_strides, b, head, from - raw.first, n, lane);
  const bool is_bf16 = s.dtype == kBfloat16;
  for (int j = 0; j < 4; j++) score[j] = 0.0f;
#pragma unroll
  for (int p = 0; p < D / 32; p++)
#pragma unroll
    for (int h = 0; h < 4; h += 2) {
      const uint32_t a[4] = {word_of(k.words[p][0], h), word_of(k.words[p][1], h), word_of(k.words[p][0], h + 1),
                             word_of(k.words[p][1], h + 1)};
      if (is_bf16)
        mma_bf16(score, a, word_of(q.row.words[p], h), word_of(q.row.words[p], h + 1));
      else
        mma(score, a, word_of(q.row.words[p], h), word_of(q.row.words[p], h + 1));
    }
  uint32_t seen[2];
  for (int j = 0; j < 2; j++) {
    const RowSight& sight = q.sight[j];
    seen[j] = bits_between(from, raw.are_sinks ? sight.lo : max(sight.lo, sight.raw_from), min(sight.hi, from + n));
  }
  if (call.buffers.mask) take_mask(call, b, tile, from, lane, seen);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float x = score[j] * s.scale;
    score[j] = seen[j % 2] >> (lane / 4 + j / 2 * 8) & 1
                   ? (s.softcap > 0.0f ? s.softcap * tanh_fast(x / s.softcap) : x) * kLog2e
                   : -INFINITY;
  }
}

// Weights of two tokens as B. What bf16 can not hold of them is taken off, so that their sums leave it out as well.
__device__ __forceinline__ uint32_t take_weights(bool is_bf16, float& p0, float& p1) {
  if (!is_bf16) return transpose_8x8(as_bits(__floats2half2_rn(p0, p1)));
  const uint32_t pair = __byte_perm(__float_as_uint(p0), __float_as_uint(p1), 0x7632);
  p0 = __uint_as_float(pair << 16), p1 = __uint_as_float(pair & 0xffff0000u);
  return transpose_8x8(pair);
}

// n tokens from `from` on join the running softmax, in the order of raw_channel.
template <int D>
__device__ __forceinline__ void attend_raw_block(const AttendCall& call, const RawTokens& raw, int b, int head,
                                                 int tile, int from, int n, const RawQueries<D>& q, int lane,
                                                 Running<D>& r) {
  const bool is_bf16 = call.shape.dtype == kBfloat16;
  float score[4];
  score_raw_block<D>(call, raw, b, head, tile, from, n, q, lane, score);
  raise_tops(r, fmaxf(score[0], score[2]), fmaxf(score[1], score[3]));
  const float base0 = kWeightBias - r.top[0], base1 = kWeightBias - r.top[1];
  float p0 = exp2_fast(score[0] + base0), p1 = exp2_fast(score[1] + base1);
  float p2 = exp2_fast(score[2] + base0), p3 = exp2_fast(score[3] + base1);
  const uint32_t w0 = take_weights(is_bf16, p0, p1), w1 = take_weights(is_bf16, p2, p3);
  r.sum[0] += p0 + p2, r.sum[1] += p1 + p3;
  const RawRows<D> v = load_raw<D>(raw.v, raw.v_strides, b, head, from - raw.first, n, lane);
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    uint32_t a[4];
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = transpose_8x8(word_of(v.words[i / 2][j / 2], i % 2 * 2 + j % 2));
    if (is_bf16)
      mma_bf16(r.acc[i], a, w0, w1);
    else
      mma(r.acc[i], a, w0, w1);
  }
}

// The channel of acc[i][j].
__device__ __forceinline__ int raw_channel(int i, int j, int g) {
  return i / 2 * 32 + g / 2 * 8 + i % 2 * 4 + j / 2 * 2 + g % 2;
}

// The new token to its place, by the warp that reads it next.
template <int D>
__device__ __forceinline__ void keep_new_token(const NewToken& from, const RawTokens& to, int b, int head, int lane) {
  const int64_t k = element_at(to.k_strides, b, head, to.end - 1 - to.first);
  const int64_t v = element_at(to.v_strides, b, head, to.end - 1 - to.first);
#pragma unroll
  for (int c = lane; c < D; c += kSimd) {
    ((ushort*)to.k)[k + c] = ((const ushort*)from.k)[element_at(from.k_strides, b, head, 0) + c];
    ((ushort*)to.v)[v + c] = ((const ushort*)from.v)[element_at(from.v_strides, b, head, 0) + c];
  }
  __syncwarp();
}

// Brings what this warp will read of raw tokens first, if any, into the L2 cache.
template <int D>
__device__ __forceinline__ void prefetch_raw(const AttendCall& call, int b, int head, int slots, int warp, int lane) {
  const int slot = call.warps - 1 - warp;
  if (slot >= slots) return;
  int before = 0;  // blocks of spans so far
#pragma unroll 1
  for (int i = 0; i < call.n_raw; i++) {
    const RawTokens& raw = call.raw[i];
    const int from = raw.begin + (slot - before) * kBlockTokens;
    if (from >= raw.begin && from < raw.end) {
      const int token = min(from + lane % kBlockTokens, raw.end - 1) - raw.first;
      const uchar* row = lane < kBlockTokens ? raw.k + 2 * element_at(raw.k_strides, b, head, token)
                                             : raw.v + 2 * element_at(raw.v_strides, b, head, token);
#pragma unroll
      for (int at = 0; at < 2 * D; at += kLine) prefetch(row + at);
    }
    before += (raw.end - raw.begin + kBlockTokens - 1) / kBlockTokens;
  }
}

// This warp's part of the raw tokens, if any, to its slot in shared memory.
template <int D>
__device__ __forceinline__ void attend_raw(const AttendCall& call, int b, int head, int tile, int slots,
                                           const Work& work, int warp, int lane) {
  const int slot = call.warps - 1 - warp;
  if (slot >= slots) return;
  RawQueries<D> q;
  q.row = load_row<D>(call, b, head, tile, lane);
  for (int j = 0; j < 2; j++)
    q.sight[j] = sight_of(call.shape, min(tile * kTileRows + 2 * (lane % 4) + j, rows_of(call.shape) - 1),
                          call.buffers.mask != nullptr);
  Running<D> r;
  clear(r);
  int turn = 0;
#pragma unroll 1
  for (int i = 0; i < call.n_raw; i++)
#pragma unroll 1
    for (int from = call.raw[i].begin; from < call.raw[i].end; from += kBlockTokens, turn++)
      if (turn % (unsigned)slots == (unsigned)slot) {
        const int n = min(kBlockTokens, call.raw[i].end - from);
        if (call.new_token.k && i == call.n_raw - 1 && from + n == call.raw[i].end)
          keep_new_token<D>(call.new_token, call.raw[i], b, head, lane);
        attend_raw_block<D>(call, call.raw[i], b, head, tile, from, n, q, lane, r);
      }
  const int g = lane / 4, t = lane % 4;
  sum_columns(r);
  for (int j = 0; j < 2; j++)
    if (g == 0)
      work.raw_tops[slot * kTileRows + 2 * t + j] = r.top[j], work.raw_sums[slot * kTileRows + 2 * t + j] = r.sum[j];
  float* to = work.raw + slot * kTileRows * raw_pitch(D);
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) to[(2 * t + j % 2) * raw_pitch(D) + raw_channel(i, j, g)] = r.acc[i][j];
}

}  // namespace halfbyte::gpu
