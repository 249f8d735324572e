// Attention of a tile of rows to packed blocks: a simdgroup unpacks each code once, for 4 or 8 rows.
// docs/decisions/rows-of-a-simdgroup.md counts what that costs.
#pragma once

#include "gpu/attend.h"

namespace halfbyte {
namespace gpu {

gpu_constexpr int kAttendSimds = 4;  // each takes its own tokens
gpu_constexpr int kAttendThreads = kAttendSimds * kSimd;

// Positions [begin, end).
struct TokenSpan {
  int begin, end;
};

// One of `parts` parts, as equal as whole blocks allow.
HALFBYTE_INLINE TokenSpan part_of(TokenSpan all, int part, int parts) {
  const int first = all.begin / kBlockTokens, blocks = (all.end + kBlockTokens - 1) / kBlockTokens - first;
  const int from = (first + (int)((int64_t)blocks * part / parts)) * kBlockTokens;
  const int to = (first + (int)((int64_t)blocks * (part + 1) / parts)) * kBlockTokens;
  return {from > all.begin ? from : all.begin, to < all.end ? to : all.end};
}

// ---- Rows in the registers of a simdgroup

// Lanes that share the channels of a token's K, four neighbouring ones each at a time, and how often they do so.
HALFBYTE_INLINE constexpr int token_lanes(int spans) { return spans <= 2 ? kSimd / 2 : kSimd; }
HALFBYTE_INLINE constexpr int quads_of(int spans) { return spans <= 4 ? 1 : spans / 4; }
// Rows that fit in registers beside so many spans of channels.
HALFBYTE_INLINE constexpr int most_rows(int spans) { return spans <= 4 ? kTileRows : kTileRows / 2; }

// A lane's share of `Rows` rows over heads of up to `Spans` spans. Its own row is lane % Rows.
template <int Spans, int Rows>
struct PackedRows {
  float q[quads_of(Spans)][4][Rows];  // in code domain; entry r is of row r ^ lane % Rows
  float values[Spans][Rows];          // Σ p ŷ of channels i · 32 + lane
  float top, sum;                     // of the own row: largest score, Σ p over the lane's tokens
};

// Largest and sum over the lanes that have the same row.
template <int Rows>
gpu_fn float row_max(float x) {
  for (int mask = Rows; mask < kSimd; mask *= 2) x = max(x, gpu_lane_xor(x, mask));
  return x;
}
template <int Rows>
gpu_fn float row_sum(float x) {
  for (int mask = Rows; mask < kSimd; mask *= 2) x += gpu_lane_xor(x, mask);
  return x;
}

// The code in a word from bit `shift` on, exactly: in the last places of 2^23.
gpu_fn float code_in(uint word, int shift, int bits) {
  const uint code = word >> shift & (bits == 4 ? 15u : 255u);
  return bits_as_float(0x4b000000u | code) - (8388608.0f + (float)zero_code(bits));
}

// Lane r has the factor of row r.
template <int Spans, int Rows>
gpu_fn void scale_values(gpu_local PackedRows<Spans, Rows>& rows, float factors) {
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    const float factor = gpu_lane_get(factors, r);
#pragma unroll
    for (int i = 0; i < Spans; i++) rows.values[i][r] *= factor;
  }
}

// ---- Scores

// Adds up N values of N · Step lanes so that each lane has one sum, which is that of its first value: value i of a lane
// is for the lane whose number differs by i · Step. Halves of the values change lanes: no lane asks which one it is.
template <int N, int Step>
gpu_fn float sum_between_lanes(gpu_local float* values) {
#pragma unroll
  for (int n = N / 2; n > 0; n /= 2)
#pragma unroll
    for (int i = 0; i < n; i++) values[i] += gpu_lane_xor(values[i + n], n * Step);
  return values[0];
}

// q · ŷ of one token over the lane's channels, and those of lanes that differ from it in the row alone.
template <int Spans, int Rows>
gpu_fn float part_of_score(gpu_local const SideFormat& f, BlockSide k, int token,
                           gpu_local const PackedRows<Spans, Rows>& rows, int lane) {
  float sums[Rows] = {};
#pragma unroll
  for (int i = 0; i < quads_of(Spans); i++) {
    const int channel = min((i * kSimd + lane % token_lanes(Spans)) * 4, f.padded_dim - 4);
    const CodePlace place = k_code_place(f.bits, token, channel);
    const uint word = *(gpu_global const uint*)(k.codes + place.byte) >> place.shift;
    const float scale = load_scale(f, k.scales, channel / f.group, token);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float value = code_in(word, 8 * j, f.bits) * scale;
#pragma unroll
      for (int r = 0; r < Rows; r++) sums[r] += value * rows.q[i][j][r];
    }
  }
  return sum_between_lanes<Rows, 1>(sums);
}

// q · ŷ of the lane's row for the block's token first + lane / Rows.
template <int Spans, int Rows>
gpu_fn float packed_score(gpu_local const SideFormat& f, BlockSide k, int first,
                          gpu_local const PackedRows<Spans, Rows>& rows, int lane) {
  constexpr int kTokens = token_lanes(Spans) / Rows;
  float parts[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; i++) parts[i] = part_of_score(f, k, first + (i ^ lane / Rows), rows, lane);
  return sum_between_lanes<kTokens, Rows>(parts);
}

// q·mu of the lane's row in the span of a token, as far as it turns. products: from this row on.
template <int Rows>
gpu_fn float turned_offset(gpu_local const Turn& turn, gpu_shared const float* products, int token, int lane) {
  gpu_global const float* waves = turn.waves + (int64_t)(token / turn.span) * turn.pairs * 2;
  float sum = 0.0f;
  for (int i = lane / Rows; i < turn.pairs; i += kSimd / Rows)
    sum += products[i * kTileRows * 2] * waves[2 * i] + products[i * kTileRows * 2 + 1] * waves[2 * i + 1];
  return row_sum<Rows>(sum);
}

// ---- Values

// Adds four tokens of the block. Lane from + t · Rows + r has the weight of token first + t in row r.
template <int Spans, int Rows>
gpu_fn void add_packed(gpu_local const SideFormat& f, BlockSide v, int first, float weights, int from,
                       gpu_local PackedRows<Spans, Rows>& rows, int lane) {
  uint words[Spans];
#pragma unroll
  for (int i = 0; i < Spans; i++) {
    const CodePlace place = v_code_place(f.bits, first, min(i * kSpan, f.padded_dim - kSpan) + lane);
    words[i] = *(gpu_global const uint*)(v.codes + place.byte) >> place.shift;
  }
#pragma unroll
  for (int t = 0; t < 4; t++) {
    float weight[Rows];
#pragma unroll
    for (int r = 0; r < Rows; r++) weight[r] = gpu_lane_get(weights, from + t * Rows + r);
#pragma unroll
    for (int i = 0; i < Spans; i++) {
      float value = code_in(words[i], 8 * t, f.bits);
      if (f.n_groups > 1)  // else weights have the scale
        value *= load_scale(f, v.scales, min(i * kSpan + lane, f.padded_dim - 1) / f.group, first + t);
#pragma unroll
      for (int r = 0; r < Rows; r++) rows.values[i][r] += weight[r] * value;
    }
  }
}

// ---- Blocks

// What the lanes of a row see of the sequence.
struct RowPlace {
  int row;  // of all rows of the KV head
  RowSight sight;
  TokenSpan tokens;  // of the simdgroup
};

// One block into the running softmax. offset: q·mu of the lane's row.
template <int Spans, int Rows>
gpu_fn void attend_block(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head, int block,
                         gpu_local const RowPlace& at, float offset, gpu_local PackedRows<Spans, Rows>& rows,
                         int lane) {
  constexpr int kAtOnce = kSimd / Rows, kTimes = kBlockTokens / kAtOnce;  // tokens: one score a lane
  gpu_local const SideFormat& fv = s.format.v;
  gpu_global uchar* page = page_of(in.pages, s.format, b, head, block);
  const BlockSide k = block_side(page, s.format, true, block), v = block_side(page, s.format, false, block);
  float weights[kTimes], top = kUnseen;  // scores at first
#pragma unroll
  for (int i = 0; i < kTimes; i++) {
    const float score = log2_score(s, packed_score(s.format.k, k, i * kAtOnce, rows, lane) + offset);
    const int token = block + i * kAtOnce + lane / Rows;
    const bool seen = token >= max(at.sight.lo, at.tokens.begin) && token < min(at.sight.packed_end, at.tokens.end) &&
                      mask_shows(s, in.mask, b, at.row, token);
    weights[i] = seen ? score : kUnseen;
    top = max(top, weights[i]);
  }
  top = max(rows.top, row_max<Rows>(top));
  const float keep = exp2(rows.top - top);
  rows.top = top, rows.sum *= keep;
  scale_values(rows, keep);
#pragma unroll
  for (int i = 0; i < kTimes; i++) {
    float weight = weights[i] > kUnseen ? exp2(weights[i] - top) : 0.0f;
    rows.sum += weight;
    if (fv.n_groups == 1) weight *= load_scale(fv, v.scales, 0, i * kAtOnce + lane / Rows);
#pragma unroll
    for (int t = 0; t < kAtOnce; t += 4) add_packed(fv, v, i * kAtOnce + t, weight, t * Rows, rows, lane);
  }
}

// ---- A threadgroup

// What a threadgroup works on, all shared.
struct PackedSpace {
  gpu_shared float* q;         // [head_dim of K][kTileRows]; later the simdgroups' maxima and sums
  gpu_shared float* rotated;   // [padded_dim of K][kTileRows]; later Σ p ŷ [kTileRows][padded_dim of V]
  gpu_shared float* largest;   // [kTileRows]
  gpu_shared float* offset;    // [kTileRows]
  gpu_shared float* products;  // [pairs][kTileRows][2], of an offset of K that turns
};

// padded: the larger one of K and V.
HALFBYTE_INLINE constexpr int attend_floats(int k_dim, int padded, int pairs) {
  return kTileRows * (k_dim + padded + 2 + 2 * pairs);
}

gpu_fn PackedSpace packed_space(gpu_local const PageFormat& f, gpu_shared float* at) {
  PackedSpace space;
  space.q = at;
  space.rotated = space.q + kTileRows * f.k.head_dim;
  space.largest = space.rotated + kTileRows * max(f.k.padded_dim, f.v.padded_dim);
  space.offset = space.largest + kTileRows;
  space.products = space.offset + kTileRows;
  return space;
}

// Rows first, first + 1, … of the tile over a simdgroup's tokens.
template <int Spans, int Rows>
gpu_fn void attend_rows(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head, int tile,
                        int first, TokenSpan tokens, PackedSpace space, gpu_local PackedRows<Spans, Rows>& rows,
                        int lane) {
#pragma unroll
  for (int i = 0; i < quads_of(Spans); i++) {
    const int channel = (i * kSimd + lane % token_lanes(Spans)) * 4;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int r = 0; r < Rows; r++)
        rows.q[i][j][r] = channel < s.format.k.padded_dim
                              ? space.rotated[(channel + j) * kTileRows + first + (r ^ lane % Rows)]
                              : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < Spans; i++)
#pragma unroll
    for (int r = 0; r < Rows; r++) rows.values[i][r] = 0.0f;
  rows.top = kUnseen, rows.sum = 0.0f;
  RowPlace at;
  const int own = first + lane % Rows;
  at.row = min(tile * kTileRows + own, rows_of(s) - 1), at.tokens = tokens;
  at.sight = sight_of(s, at.row, in.mask != nullptr);
  float turned = 0.0f;
  for (int block = tokens.begin / kBlockTokens * kBlockTokens; block < tokens.end; block += kBlockTokens) {
    if (in.turn.waves && (block <= tokens.begin || block % in.turn.span == 0))
      turned = turned_offset<Rows>(in.turn, space.products + 2 * own, block, lane);
    attend_block(s, in, b, head, block, at, space.offset[own] + turned, rows, lane);
  }
}

// Merges the parts of each row and writes them to `partial`. A simdgroup has part `part` of `parts` of its rows.
template <int Spans, int Rows>
gpu_fn void merge_parts(gpu_local const AttendShape& s, int first, int part, int parts, int n_rows, PackedSpace space,
                        gpu_local PackedRows<Spans, Rows>& rows, gpu_global float* partial, int tid) {
  const int padded = s.format.v.padded_dim, lane = tid % kSimd;
  gpu_shared float* tops = space.q;  // [parts][kTileRows]
  gpu_shared float* sums = tops + kAttendSimds * kTileRows;
  const float sum = row_sum<Rows>(rows.sum);
  if (lane < Rows) tops[part * kTileRows + first + lane] = rows.top, sums[part * kTileRows + first + lane] = sum;
  gpu_barrier();  // and all have read space.rotated
  float top = kUnseen;
  for (int i = 0; i < parts; i++) top = max(top, tops[i * kTileRows + first + lane % Rows]);
  scale_values(rows, exp2(rows.top - top));
  for (int turn = 0; turn < parts; turn++) {
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      gpu_shared float* merged = space.rotated + (first + r) * padded + lane;
#pragma unroll
      for (int i = 0; i < Spans; i++)
        if (turn == part && i * kSpan < padded)
          merged[i * kSpan] = (turn ? merged[i * kSpan] : 0.0f) + rows.values[i][r];
    }
    gpu_barrier();
  }
  for (int at = tid; at < kTileRows * padded; at += kAttendThreads)
    partial[at] = at < n_rows * padded ? space.rotated[at] : 0.0f;
  if (tid >= kTileRows) return;
  float all = kUnseen, total = 0.0f;
  for (int i = 0; i < parts && tid < n_rows; i++) all = max(all, tops[i * kTileRows + tid]);
  for (int i = 0; i < parts && tid < n_rows; i++)
    total += sums[i * kTileRows + tid] * exp2(tops[i * kTileRows + tid] - all);
  partial[kTileRows * padded + tid] = all;
  partial[kTileRows * (padded + 1) + tid] = total;
}

// Some packed tokens for the n_rows rows of a tile, up to `Rows` of them in a simdgroup.
template <int Spans, int Rows>
gpu_fn void attend_tile(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head, int tile,
                        int n_rows, TokenSpan tokens, PackedSpace space, gpu_global float* partial, int tid) {
  const int sets = n_rows > Rows ? kTileRows / Rows : 1;  // of simdgroups that share rows
  const int simd = tid / kSimd, first = simd % sets * Rows, part = simd / sets, parts = kAttendSimds / sets;
  PackedRows<Spans, Rows> rows;
  attend_rows(s, in, b, head, tile, first, part_of(tokens, part, parts), space, rows, tid % kSimd);
  merge_parts(s, first, part, parts, n_rows, space, rows, partial, tid);
}

// Packed tokens for one tile of rows: queries to code domain, softmax, sums of values in code domain. Run by a
// threadgroup of kAttendThreads. D: head size of K and V, 0 if known at run time alone; Spans: the most they have.
template <int D, int Spans>
gpu_fn void attend_packed(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head, int tile,
                          TokenSpan tokens, gpu_shared float* memory, gpu_global float* partial, int tid) {
  const PackedSpace at = packed_space(s.format, memory);
  if (s.dtype == kFloat32)
    prepare_queries<true, D>(s, in, b, head, tile, at.q, at.rotated, at.largest, at.offset, tid, kAttendThreads);
  else
    prepare_queries<false, D>(s, in, b, head, tile, at.q, at.rotated, at.largest, at.offset, tid, kAttendThreads);
  if (in.turn.waves) turn_products(s, in, b, head, at.q, at.products, at.offset, tid, kAttendThreads);
  const int n_rows = min(rows_of(s) - tile * kTileRows, kTileRows);
  if (most_rows(Spans) == kTileRows / 2 || n_rows <= kTileRows / 2)
    attend_tile<Spans, kTileRows / 2>(s, in, b, head, tile, n_rows, tokens, at, partial, tid);
  else
    attend_tile<Spans, most_rows(Spans)>(s, in, b, head, tile, n_rows, tokens, at, partial, tid);
}

}  // namespace gpu
}  // namespace halfbyte
