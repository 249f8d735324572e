// Attention around packed codes for any geometry: queries to code domain, and from sums over blocks to outputs.
#pragma once

#include "gpu/rotate.h"

namespace halfbyte {
namespace gpu {

gpu_constexpr float kUnseen = -1e30f;  // the maximum of a row that has seen nothing
gpu_constexpr int kRawTokens = 32;     // raw tokens that `finish` scores at a time

// What one call attends to. Positions count from the start of the sequence, as in the CPU's Layer::attend.
struct AttendShape {
  PageFormat format;
  int batch, kv_heads, group, queries;  // group: query heads a KV head
  int dtype;                            // of queries, outputs and raw tokens
  float scale, softcap;
  int length, first, sliding_window, causal;
  int sink_tokens, packed_end, raw_window, warm_up;
  int kept;         // raw values exist from this position on
  int mask_tokens;  // the mask covers the newest ones
  int64_t mask_batch_stride, mask_query_stride;
  Strides3 q_strides, out_strides;
};

// How the offset of K turns with RoPE, a span of tokens at a time; without waves it does not. See docs/format.md.
struct Turn {
  gpu_global const float* waves;  // [spans][pairs][2]: cos and sin in the middle of each span, or null
  int span, pairs;
  int pair_step, pair_gap;  // pair i: channels i · pair_step and i · pair_step + pair_gap
};

struct AttendBuffers {
  gpu_global const uchar* q;
  gpu_global uchar* out;
  gpu_global const uchar* mask;   // 1 = visible, or null
  gpu_global const float* sinks;  // [heads]: one more logit in each softmax, or null
  RotationTable rotation_k, rotation_v;
  gpu_global const float* offset_k;  // [batch][kv_heads][d] or null
  gpu_global const float* offset_v;
  gpu_global const float* inverse_lambda_k;  // [kv_heads][d] or null
  gpu_global const float* inverse_lambda_v;
  Pages pages;
  gpu_global float* partials;  // [slots][partial_floats]
  Turn turn;
};

// Raw tokens that lie one after the other: positions [begin, end), `first` being the one at k and v.
struct RawTokens {
  gpu_global const uchar* k;
  gpu_global const uchar* v;
  Strides3 k_strides, v_strides;
  int first, begin, end;
  int are_sinks;  // seen raw by every query
};

// The tokens a row may see: packed ones in [lo, packed_end), raw ones in [raw_from, hi), sinks from lo.
struct RowSight {
  int lo, hi, packed_end, raw_from;
};

HALFBYTE_INLINE int rows_of(gpu_local const AttendShape& s) { return s.group * s.queries; }
HALFBYTE_INLINE int row_tiles(gpu_local const AttendShape& s) { return (rows_of(s) + kTileRows - 1) / kTileRows; }

// What a row is: a query, and a head of the KV head's group.
struct QueryPlace {
  int query, head;
};

HALFBYTE_INLINE QueryPlace query_place(gpu_local const AttendShape& s, int row) {
  const int query = s.queries == 1 ? 0 : row / s.group;
  QueryPlace place = {query, row - query * s.group};
  return place;
}

// A partial result: acc [kTileRows][padded_dim of V] in code domain, then maxima and sums [kTileRows], in powers of
// two.
HALFBYTE_INLINE int partial_floats(gpu_local const AttendShape& s) { return kTileRows * (s.format.v.padded_dim + 2); }

// First token that a query at `position` sees raw when raw values still exist, as Layer::State::raw_start.
template <class Rule>
HALFBYTE_INLINE int raw_start(gpu_local const Rule& s, int position) {
  if (position < s.warm_up) return s.sink_tokens;
  const int block = position / kBlockTokens * kBlockTokens - s.raw_window;
  return block > s.sink_tokens ? block : s.sink_tokens;
}

HALFBYTE_INLINE RowSight sight_of(gpu_local const AttendShape& s, int row, bool masked) {
  const int position = s.length - s.queries + query_place(s, row).query;
  const int start = raw_start(s, position), held = s.kept < position + 1 ? s.kept : position + 1;
  RowSight sight;
  sight.raw_from = start > held ? start : held;
  sight.lo = s.first;
  sight.hi = masked || !s.causal ? s.length : position + 1;
  if (masked) {
    if (s.length - s.mask_tokens > sight.lo) sight.lo = s.length - s.mask_tokens;
  } else if (s.sliding_window && position + 1 - s.sliding_window > sight.lo) {
    sight.lo = position + 1 - s.sliding_window;
  }
  int end = sight.hi < sight.raw_from ? sight.hi : sight.raw_from;
  sight.packed_end = end < s.packed_end ? end : s.packed_end;
  return sight;
}

gpu_fn bool mask_shows(gpu_local const AttendShape& s, gpu_global const uchar* mask, int b, int row, int token) {
  return !mask || mask[b * s.mask_batch_stride + query_place(s, row).query * s.mask_query_stride + token -
                       (s.length - s.mask_tokens)];
}

// A score as a power of two, soft-capped.
gpu_fn float log2_score(gpu_local const AttendShape& s, float score) {
  return (s.softcap > 0.0f ? s.softcap * tanh(score / s.softcap) : score) * kLog2e;
}

// q · scale of the tile's rows (query heads × queries) to q [d][kTileRows], zeros where there is no row.
template <bool Wide>
gpu_fn void load_queries(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head, int tile,
                         gpu_shared float* q, int tid, int threads) {
  const int d = s.format.k.head_dim, rows = rows_of(s), lane = tid % kSimd;
  for (int slot = tid / kSimd; slot < kTileRows; slot += threads / kSimd) {
    const int row = tile * kTileRows + slot;
    const int64_t at = element_at(s.q_strides, b, head * s.group + row % s.group, row / s.group);
#pragma unroll 4
    for (int c = lane; c < d; c += kSimd)
      q[c * kTileRows + slot] = row < rows ? load_as<Wide>(in.q, s.dtype, at + c) * s.scale : 0.0f;
  }
}

// The tile's queries in code domain: Λ⁻¹ R q · scale to `rotated` [padded_dim][kTileRows], its largest magnitude and
// q·mu·scale of each row to `largest` and `offset`. q [d][kTileRows] is scratch. Ends with a barrier.
template <bool Wide, int D = 0>
gpu_fn void prepare_queries(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head,
                            int tile, gpu_shared float* q, gpu_shared float* rotated, gpu_shared float* largest,
                            gpu_shared float* offset, int tid, int threads) {
  const int d = s.format.k.head_dim, padded = s.format.k.padded_dim, lane = tid % kSimd;
  load_queries<Wide>(s, in, b, head, tile, q, tid, threads);
  gpu_barrier();
  if (in.rotation_k.r) rotate_tile(in.rotation_k.transposed, d, q, rotated, tid, threads);
  for (int at = tid + (in.rotation_k.r ? d * kTileRows : 0); at < padded * kTileRows; at += threads) {
    const float factor = in.rotation_k.factors && at < d * kTileRows ? in.rotation_k.factors[at / kTileRows] : 1.0f;
    rotated[at] = at < d * kTileRows ? q[at] * factor : 0.0f;
  }
  gpu_barrier();
  if (in.rotation_k.factors) {
    for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd)
      FastRotation<D, 1>::forward(in.rotation_k, VectorSpace{rotated + row, 0, kTileRows}, lane);
    gpu_barrier();
  }
  if (in.inverse_lambda_k) {
    for (int at = tid; at < d * kTileRows; at += threads)
      rotated[at] *= in.inverse_lambda_k[(int64_t)head * d + at / kTileRows];
    gpu_barrier();
  }
  for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd) {
    float top = 0.0f, dot = 0.0f;
#pragma unroll 4
    for (int c = lane; c < d; c += kSimd) {
      top = max(top, fabs(rotated[c * kTileRows + row]));
      if (in.offset_k) dot += q[c * kTileRows + row] * in.offset_k[((int64_t)b * s.kv_heads + head) * d + c];
    }
    top = simd_max(top), dot = simd_sum(dot);
    if (lane == 0) largest[row] = top, offset[row] = dot;
  }
  gpu_barrier();
}

// q·mu of an offset that turns is Σ product · wave over pairs: those products to [pairs][kTileRows][2], and to `offset`
// what the channels behind the pairs add. q: as prepare_queries left it. Ends with a barrier.
gpu_fn void turn_products(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head,
                          gpu_shared const float* q, gpu_shared float* products, gpu_shared float* offset, int tid,
                          int threads) {
  const int d = s.format.k.head_dim, lane = tid % kSimd;
  gpu_global const float* mu = in.offset_k + ((int64_t)b * s.kv_heads + head) * d;
  for (int at = tid; at < in.turn.pairs * kTileRows; at += threads) {
    const int row = at % kTileRows, x = at / kTileRows * in.turn.pair_step, y = x + in.turn.pair_gap;
    const float qx = q[x * kTileRows + row], qy = q[y * kTileRows + row];
    products[2 * at] = qx * mu[x] + qy * mu[y], products[2 * at + 1] = qy * mu[x] - qx * mu[y];
  }
  for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd) {
    float dot = 0.0f;
    for (int c = 2 * in.turn.pairs + lane; c < d; c += kSimd) dot += q[c * kTileRows + row] * mu[c];
    dot = simd_sum(dot);
    if (lane == 0) offset[row] = dot;
  }
  gpu_barrier();
}

// ---- From partial results to outputs

// What `finish` works on, all shared: q, y and out, [channels][kTileRows].
struct FinishSpace {
  gpu_shared float* q;
  gpu_shared float* y;
  gpu_shared float* out;
  gpu_shared float* weights;  // [kTileRows][kRawTokens]
  gpu_shared float* top;      // [kTileRows]
  gpu_shared float* sum;      // [kTileRows]
};

HALFBYTE_INLINE constexpr int finish_floats(int k_dim, int v_padded, int v_dim) {
  return kTileRows * (k_dim + v_padded + v_dim + kRawTokens + 2);
}

gpu_fn FinishSpace finish_space(gpu_local const PageFormat& f, gpu_shared float* at) {
  FinishSpace space;
  space.q = at;
  space.y = space.q + kTileRows * f.k.head_dim;
  space.out = space.y + kTileRows * f.v.padded_dim;
  space.weights = space.out + kTileRows * f.v.head_dim;
  space.top = space.weights + kTileRows * kRawTokens;
  space.sum = space.top + kTileRows;
  return space;
}

// Log-sum-exp over `n` partial results of one tile, to y, top and sum. Ends with a barrier.
gpu_fn void merge_partials(gpu_local const AttendShape& s, gpu_global const float* partials, int n, FinishSpace space,
                           int tid, int threads) {
  const int padded = s.format.v.padded_dim, each = partial_floats(s), lane = tid % kSimd;
  gpu_global const float* tops = partials + kTileRows * padded;
  gpu_global const float* sums = tops + kTileRows;
  for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd) {
    float top = kUnseen, sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < n; i += kSimd) top = max(top, tops[(int64_t)i * each + row]);
    top = simd_max(top);
#pragma unroll 4
    for (int i = lane; i < n; i += kSimd)
      sum += sums[(int64_t)i * each + row] * exp2(tops[(int64_t)i * each + row] - top);
    sum = simd_sum(sum);
    if (lane == 0) space.top[row] = top, space.sum[row] = sum;
  }
  gpu_barrier();
  for (int from = 0; from == 0 || from < n; from += kRawTokens) {  // so many partial results at a time
    const int some = min(kRawTokens, n - from);
    for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd)
      if (lane < some)
        space.weights[row * kRawTokens + lane] = exp2(tops[(int64_t)(from + lane) * each + row] - space.top[row]);
    gpu_barrier();
    for (int at = 4 * tid; at < kTileRows * padded; at += 4 * threads) {  // four channels of a row
      const int row = at / padded;
      gpu_shared const float* weights = space.weights + row * kRawTokens;
      gpu_shared float* y = space.y + at % padded * kTileRows + row;
      gpu_global const float4* first = (gpu_global const float4*)(partials + (int64_t)from * each + at);
      float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 16
      for (int i = 0; i < some; i++) {
        const float4 part = first[(int64_t)i * (each / 4)];
        const float weight = weights[i];
        acc[0] += part.x * weight, acc[1] += part.y * weight, acc[2] += part.z * weight, acc[3] += part.w * weight;
      }
      for (int i = 0; i < 4; i++) y[i * kTileRows] = from ? y[i * kTileRows] + acc[i] : acc[i];
    }
    gpu_barrier();
  }
}

// Σ p ŷ → Rᵀ Λ⁻¹ Σ p ŷ + mu Σ p, from y to out. Ends with a barrier.
template <int D>
gpu_fn void leave_code_domain(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, int b, int head,
                              FinishSpace space, int tid, int threads) {
  const int d = s.format.v.head_dim;
  if (in.inverse_lambda_v) {
    for (int at = tid; at < d * kTileRows; at += threads)
      space.y[at] *= in.inverse_lambda_v[(int64_t)head * d + at / kTileRows];
    gpu_barrier();
  }
  if (in.rotation_v.factors) {
    for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd)
      FastRotation<D, 1>::back(in.rotation_v, VectorSpace{space.y + row, 0, kTileRows}, tid % kSimd);
    gpu_barrier();
  }
  if (in.rotation_v.r)
    rotate_tile(in.rotation_v.r, d, space.y, space.out, tid, threads);
  else
    for (int at = tid; at < d * kTileRows; at += threads)
      space.out[at] = space.y[at] * (in.rotation_v.factors ? back_factor(in.rotation_v, at / kTileRows) : 1.0f);
  gpu_barrier();
  if (in.offset_v) {
    gpu_global const float* mu = in.offset_v + ((int64_t)b * s.kv_heads + head) * d;
#pragma unroll 4
    for (int at = tid; at < d * kTileRows; at += threads)
      space.out[at] += mu[at / kTileRows] * space.sum[at % kTileRows];
    gpu_barrier();
  }
}

// Scores of n raw tokens from `from` to weights [kTileRows][kRawTokens], one token a simdgroup at a time.
template <bool Wide>
gpu_fn void score_raw(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, gpu_local const RawTokens& raw,
                      int b, int head, int tile, int from, int n, FinishSpace space, int tid, int threads) {
  const int d = s.format.k.head_dim, lane = tid % kSimd, row = min(tile * kTileRows + lane % kTileRows, rows_of(s) - 1);
  const RowSight sight = sight_of(s, row, in.mask != nullptr);
  for (int i = tid / kSimd; i < n; i += threads / kSimd) {
    const int token = from + i;
    const int64_t at = element_at(raw.k_strides, b, head, token - raw.first);
    float dots[kTileRows] = {};
#pragma unroll 4
    for (int c = lane; c < d; c += kSimd) {
      const float k = load_as<Wide>(raw.k, s.dtype, at + c);
      for (int r = 0; r < kTileRows; r++) dots[r] += k * space.q[c * kTileRows + r];
    }
    float mine = 0.0f;  // lane r keeps row r's
    for (int r = 0; r < kTileRows; r++) {
      const float dot = simd_sum(dots[r]);
      mine = lane == r ? dot : mine;
    }
    const bool seen = token >= (raw.are_sinks ? sight.lo : max(sight.lo, sight.raw_from)) && token < sight.hi &&
                      mask_shows(s, in.mask, b, row, token);
    if (lane < kTileRows) space.weights[lane * kRawTokens + i] = seen ? log2_score(s, mine) : kUnseen;
  }
}

// out += Σ weight · v, a thread one channel of four rows. Rows whose weight is 0 may hold anything finite.
template <bool Wide>
gpu_fn void add_raw(gpu_local const AttendShape& s, gpu_local const RawTokens& raw, int b, int head, int from, int n,
                    FinishSpace space, int tid, int threads) {
  const int d = s.format.v.head_dim;
  for (int at = tid; at < d * (kTileRows / 4); at += threads) {
    const int channel = at % d, row = at / d * 4;
    const int64_t first = element_at(raw.v_strides, b, head, from - raw.first) + channel;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 16
    for (int t = 0; t < n; t++) {
      const float v = load_as<Wide>(raw.v, s.dtype, first + t * raw.v_strides.token);
      for (int r = 0; r < 4; r++) sum[r] += v * space.weights[(row + r) * kRawTokens + t];
    }
    for (int r = 0; r < 4; r++) space.out[channel * kTileRows + row + r] += sum[r];
  }
}

// Adds raw tokens to the running softmax in top, sum and out, kRawTokens at a time.
template <bool Wide>
gpu_fn void attend_raw(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in,
                       gpu_local const RawTokens& raw, int b, int head, int tile, FinishSpace space, int tid,
                       int threads) {
  const int d = s.format.v.head_dim, lane = tid % kSimd;
  for (int from = raw.begin; from < raw.end; from += kRawTokens) {
    const int n = min(kRawTokens, raw.end - from);
    score_raw<Wide>(s, in, raw, b, head, tile, from, n, space, tid, threads);
    gpu_barrier();
    for (int row = tid / kSimd; row < kTileRows; row += threads / kSimd) {
      const float score = lane < n ? space.weights[row * kRawTokens + lane] : kUnseen;
      const float top = space.top[row], new_top = max(top, simd_max(score)), keep = exp2(top - new_top);
      const float p = score > kUnseen ? exp2(score - new_top) : 0.0f, total = simd_sum(p);
      for (int c = lane; c < d; c += kSimd) space.out[c * kTileRows + row] *= keep;
      space.weights[row * kRawTokens + lane] = p;
      gpu_simd_barrier();  // all lanes have read the old ones
      if (lane == 0) space.top[row] = new_top, space.sum[row] = space.sum[row] * keep + total;
    }
    gpu_barrier();
    add_raw<Wide>(s, raw, b, head, from, n, space, tid, threads);
    gpu_barrier();
  }
}

// Partial results [n] of one tile of rows, and the raw tokens, to finished outputs. Run by a whole threadgroup.
template <bool Wide, int D = 0>
gpu_fn void finish(gpu_local const AttendShape& s, gpu_local const AttendBuffers& in, gpu_local const RawTokens* raw,
                   int n_raw, gpu_global const float* partials, int n, int b, int head, int tile,
                   gpu_shared float* memory, int tid, int threads) {
  FinishSpace space = finish_space(s.format, memory);
  load_queries<Wide>(s, in, b, head, tile, space.q, tid, threads);
  merge_partials(s, partials, n, space, tid, threads);
  leave_code_domain<D>(s, in, b, head, space, tid, threads);
  for (int i = 0; i < n_raw; i++) attend_raw<Wide>(s, in, raw[i], b, head, tile, space, tid, threads);
  const int d = s.format.v.head_dim;
  for (int at = tid; at < kTileRows * d; at += threads) {
    const int slot = at / d, row = tile * kTileRows + slot, query_head = head * s.group + row % s.group;
    if (row >= rows_of(s)) continue;
    float sum = space.sum[slot], norm;
    if (in.sinks) {  // one more logit in the denominator
      const float sink = in.sinks[query_head] * kLog2e, top = max(space.top[slot], sink);
      norm = exp2(space.top[slot] - top);
      norm /= sum * norm + exp2(sink - top);
    } else {
      norm = sum > 0.0f ? 1.0f / sum : 0.0f;  // a row that sees nothing gives zeros
    }
    store_value(in.out, s.dtype, element_at(s.out_strides, b, query_head, row / s.group) + at % d,
                space.out[at % d * kTileRows + slot] * norm);
  }
}

}  // namespace gpu
}  // namespace halfbyte
