// Entry points for Metal, for torch.mps.compile_shader and mx.fast.metal_kernel. tools/flatten_metal.py makes one text
// of this file and what it includes, python/halfbyte/halfbyte.metal in the package.
//
// D is 64, 80, 96, 128 or 256; K and V have heads of that size. Buffers are bound in this order:
//
//   encode_d{D}_int{4,8}  one side of new tokens to codes; kEncodeThreads threads a group, each group packs
//                         kEncodeSimds · vectors_of(D) vectors of batch · kv_heads · tokens
//     0 EncodeNumbers  1 float limit  2 data  3 float rotation[]  4 float offset[batch][kv_heads][spans][D]
//     5 float lambda[kv_heads][D]  6 int64 table[batch][table_stride]  7 uchar pool[]  8 int32 bad[1]
//   decode_d{D}_int{4,8}  codes of one side to float; threads as encode
//     0 DecodeNumbers  1 float rotation[]  2 float offset[batch][kv_heads][spans][D]
//     3 float inverse_lambda[kv_heads][D]
//     4 int64 table[batch][table_stride]  5 uchar pool[]  6 float out[batch][kv_heads][out_tokens][D]
//   attend_d{D}           packed tokens [begin, end); kAttendThreads threads a group,
//                         batch · kv_heads · tiles · splits groups, tiles = ⌈heads / kv_heads · queries / 8⌉
//     0 AttendNumbers  1 AttendReals  2 q  3 float rotation_k[]  4 float offset_k[batch][kv_heads][D]
//     5 float inverse_lambda_k[kv_heads][D]  6 uchar mask  7 int64 table[batch][table_stride]  8 uchar pool[]
//     9 float partials[groups][8 · (D rounded up to 32s + 2)]
//     10 float waves[spans][turn_pairs][2], cos and sin in the middle of spans 0, 1, …, if K's offset turns
//   finish_d{D}           merges the splits and attends to raw tokens; kFinishThreads threads a group,
//                         batch · kv_heads · tiles groups; partials are read if splits > 0
//     0 AttendNumbers  1 AttendReals  2 q  3 out  4 uchar mask  5 float sinks[heads]  6 float rotation_v[]
//     7 float offset_v[batch][kv_heads][D]  8 float inverse_lambda_v[kv_heads][D]  9 float partials[]
//     10 k  11 v of the first span of raw tokens  12 k  13 v of the second  14 k  15 v of the third
//
// The …Numbers are in gpu/arguments.h; AttendReals is floats. rotation: srft D factors (sign / √(2D)), then D pairs (cos, sin) of −2πk / D; srht D factors (sign / √D);
// dense R [D][D], then its transpose; identity nothing. Where a recipe has no offset, λ, mask or sinks, or fewer spans,
// has_… is 0 and any buffer will do. pool + table[b][i] is the page of tokens 64·(first_page + i) onwards, all KV
// heads. `bad` becomes 1 when a value can not be coded, and is never cleared.
#include "gpu/attend_packed.h"
#include "gpu/decode.h"
#include "gpu/encode.h"

#include "gpu/arguments.h"

namespace halfbyte {
namespace gpu {

gpu_constexpr int kEncodeSimds = 4;
gpu_constexpr int kEncodeThreads = kEncodeSimds * kSimd;
gpu_constexpr int kFinishThreads = 256;

// ---- From a caller's numbers to what the bodies take

gpu_fn Strides3 strides_of(constant ViewNumbers& n) { return {n.batch_stride, n.head_stride, n.token_stride}; }

gpu_fn OffsetSpans offset_spans(constant SpanNumbers& n) {
  OffsetSpans spans;
  spans.span = (int)n.span, spans.first = (int)n.first, spans.count = (int)n.count;
  return spans;
}

gpu_fn PageFormat page_format(int d, constant LayerNumbers& n) {
  const int scale_bytes = (int)n.scale_bits / 8;
  return {side_format(d, (int)n.k_bits, (int)n.k_group, scale_bytes, n.search != 0, n.signed_scale != 0),
          side_format(d, (int)n.v_bits, (int)n.v_group, scale_bytes, n.search != 0, n.signed_scale != 0)};
}

gpu_fn RotationTable rotation_table(int d, int64_t rotation, device const float* tables) {
  RotationTable table = {nullptr, nullptr, nullptr, nullptr};
  if (rotation == 3) table.r = tables, table.transposed = tables + d * d;
  if (rotation == 1 || rotation == 2) table.factors = tables;
  if (rotation == 1) table.roots = tables + d;
  return table;
}

// ---- Entry points but for their shared memory

template <int D, int Bits>
gpu_fn void encode_entry(constant EncodeNumbers& n, constant float& limit, device const uchar* data,
                         device const float* rotation, device const float* offset, device const float* lambda,
                         device const int64_t* table, device uchar* pool, device int* bad, threadgroup float* x,
                         uint group, uint tid) {
  EncodeShape s;
  s.format = page_format(D, n.layer);
  const bool is_k = n.is_k != 0;
  if (is_k)
    s.format.k.bits = Bits;
  else
    s.format.v.bits = Bits;
  s.range = {(int)n.layer.batch, (int)n.layer.kv_heads, (int)n.first_token, (int)n.tokens};
  s.dtype = (int)n.layer.dtype, s.data_first = (int)n.data_first, s.limit = limit;
  EncodeSide side;
  side.data = data, side.strides = strides_of(n.data), side.rotation = rotation_table(D, n.layer.rotation, rotation);
  side.offset = n.has_offset ? offset : nullptr, side.lambda = n.has_lambda ? lambda : nullptr;
  side.spans = offset_spans(n.offset);
  for (int i = 0; i < kSearchSize; i++) side.factors[i] = n.layer.signed_scale ? kSearchSigned[i] : kSearch[i];
  const Pages pages = {pool, table, (int)n.layer.table_stride, (int)n.layer.first_page};
  const int simd = (int)tid / kSimd;
  encode_vectors<D>(s, pages, side, is_k, ((int)group * kEncodeSimds + simd) * vectors_of(D), x + simd * kSimdFloats,
                    bad, (int)tid % kSimd);
}

template <int D, int Bits>
gpu_fn void decode_entry(constant DecodeNumbers& n, device const float* rotation, device const float* offset,
                         device const float* inverse_lambda, device const int64_t* table, device uchar* pool,
                         device float* out, threadgroup float* x, uint group, uint tid) {
  DecodeShape s;
  s.format = page_format(D, n.layer);
  const bool is_k = n.is_k != 0;
  if (is_k)
    s.format.k.bits = Bits;
  else
    s.format.v.bits = Bits;
  s.range = {(int)n.layer.batch, (int)n.layer.kv_heads, (int)n.first_token, (int)n.tokens};
  s.out_first = (int)n.out_first, s.out_tokens = (int)n.out_tokens;
  const DecodeSide side = {out, rotation_table(D, n.layer.rotation, rotation), n.has_offset ? offset : nullptr,
                           n.has_inverse_lambda ? inverse_lambda : nullptr, offset_spans(n.offset)};
  const Pages pages = {pool, table, (int)n.layer.table_stride, (int)n.layer.first_page};
  const int simd = (int)tid / kSimd;
  decode_vectors<D>(s, pages, side, is_k, ((int)group * kEncodeSimds + simd) * vectors_of(D), x + simd * kSimdFloats,
                    (int)tid % kSimd);
}

gpu_fn AttendShape attend_shape(int d, constant AttendNumbers& n, constant AttendReals& x) {
  AttendShape s;
  s.format = page_format(d, n.layer);
  s.batch = (int)n.layer.batch, s.kv_heads = (int)n.layer.kv_heads, s.group = (int)(n.heads / n.layer.kv_heads);
  s.queries = (int)n.queries, s.dtype = (int)n.layer.dtype, s.scale = x.scale, s.softcap = x.softcap;
  s.length = (int)n.length, s.first = (int)n.first, s.sliding_window = (int)n.sliding_window, s.causal = (int)n.causal;
  s.sink_tokens = (int)n.sink_tokens, s.packed_end = (int)n.packed_end, s.raw_window = (int)n.raw_window;
  s.warm_up = (int)n.warm_up, s.kept = (int)n.kept, s.mask_tokens = (int)n.mask_tokens;
  s.mask_batch_stride = n.mask_batch_stride, s.mask_query_stride = n.mask_query_stride;
  s.q_strides = strides_of(n.q), s.out_strides = strides_of(n.out);
  return s;
}

// A (sequence, KV head, tile of rows), in the order in which groups take them.
struct Segment {
  int b, head, tile;
};

gpu_fn Segment segment_of(thread const AttendShape& s, int i) {
  const int tiles = row_tiles(s);
  return {i / tiles / s.kv_heads, i / tiles % s.kv_heads, i % tiles};
}

template <int D>
gpu_fn void attend_entry(constant AttendNumbers& n, constant AttendReals& reals, device const uchar* q,
                         device const float* rotation_k, device const float* offset_k,
                         device const float* inverse_lambda_k, device const uchar* mask, device const int64_t* table,
                         device uchar* pool, device float* partials, device const float* waves, threadgroup float* memory,
                         uint group, uint tid) {
  const AttendShape s = attend_shape(D, n, reals);
  AttendBuffers in = {};
  in.q = q, in.mask = n.has_mask ? mask : nullptr, in.rotation_k = rotation_table(D, n.layer.rotation, rotation_k);
  in.offset_k = n.has_offset_k ? offset_k : nullptr;
  in.inverse_lambda_k = n.has_inverse_lambda_k ? inverse_lambda_k : nullptr;
  in.pages = {pool, table, (int)n.layer.table_stride, (int)n.layer.first_page};
  in.partials = partials;
  const int pairs = (int)n.turn_pairs;
  in.turn.waves = n.turn_span ? waves : nullptr, in.turn.span = (int)n.turn_span, in.turn.pairs = pairs;
  in.turn.pair_step = n.turn_interleaved ? 2 : 1, in.turn.pair_gap = n.turn_interleaved ? 1 : pairs;
  const int splits = (int)n.splits;
  const Segment at = segment_of(s, (int)group / splits);
  const TokenSpan tokens = part_of({(int)n.begin, (int)n.end}, (int)group % splits, splits);
  attend_packed<D, (D + kSpan - 1) / kSpan>(s, in, at.b, at.head, at.tile, tokens, memory,
                                            in.partials + (int64_t)group * partial_floats(s), (int)tid);
}

gpu_fn RawTokens raw_tokens(constant RawNumbers& n, device const uchar* k, device const uchar* v) {
  return {k, v, strides_of(n.k), strides_of(n.v), (int)n.first, (int)n.begin, (int)n.end, (int)n.are_sinks};
}

template <int D>
gpu_fn void finish_entry(constant AttendNumbers& n, constant AttendReals& reals, device const uchar* q,
                         device uchar* out, device const uchar* mask, device const float* sinks,
                         device const float* rotation_v, device const float* offset_v,
                         device const float* inverse_lambda_v, device const float* partials, device const uchar* k0,
                         device const uchar* v0, device const uchar* k1, device const uchar* v1,
                         device const uchar* k2, device const uchar* v2, threadgroup float* memory, uint group,
                         uint tid) {
  const AttendShape s = attend_shape(D, n, reals);
  AttendBuffers in = {};
  in.q = q, in.out = out, in.mask = n.has_mask ? mask : nullptr, in.sinks = n.has_sinks ? sinks : nullptr;
  in.rotation_v = rotation_table(D, n.layer.rotation, rotation_v);
  in.offset_v = n.has_offset_v ? offset_v : nullptr;
  in.inverse_lambda_v = n.has_inverse_lambda_v ? inverse_lambda_v : nullptr;
  const RawTokens raw[kMaxRaw] = {raw_tokens(n.raw[0], k0, v0), raw_tokens(n.raw[1], k1, v1),
                                  raw_tokens(n.raw[2], k2, v2)};
  const int splits = (int)n.splits;
  const Segment at = segment_of(s, (int)group);
  partials += (int64_t)group * splits * partial_floats(s);
  if (s.dtype == kFloat32)
    finish<true, D>(s, in, raw, (int)n.n_raw, partials, splits, at.b, at.head, at.tile, memory, (int)tid,
                    kFinishThreads);
  else
    finish<false, D>(s, in, raw, (int)n.n_raw, partials, splits, at.b, at.head, at.tile, memory, (int)tid,
                     kFinishThreads);
}

}  // namespace gpu
}  // namespace halfbyte

// ---- Entry points

#define HALFBYTE_AT uint group [[threadgroup_position_in_grid]], uint tid [[thread_position_in_threadgroup]]

#define HALFBYTE_CODE_KERNELS(D, Bits)                                                                               \
  [[max_total_threads_per_threadgroup(halfbyte::gpu::kEncodeThreads)]] kernel void encode_d##D##_int##Bits(          \
      constant halfbyte::gpu::EncodeNumbers& numbers [[buffer(0)]], constant float& limit [[buffer(1)]],             \
      device const uchar* data [[buffer(2)]], device const float* rotation [[buffer(3)]],                            \
      device const float* offset [[buffer(4)]], device const float* lambda [[buffer(5)]],                            \
      device const int64_t* table [[buffer(6)]], device uchar* pool [[buffer(7)]], device int* bad [[buffer(8)]],    \
      HALFBYTE_AT) {                                                                                                 \
    gpu_shared_floats(memory, halfbyte::gpu::kEncodeSimds * halfbyte::gpu::kSimdFloats);                             \
    halfbyte::gpu::encode_entry<D, Bits>(numbers, limit, data, rotation, offset, lambda, table, pool, bad, memory,   \
                                         group, tid);                                                                \
  }                                                                                                                  \
  [[max_total_threads_per_threadgroup(halfbyte::gpu::kEncodeThreads)]] kernel void decode_d##D##_int##Bits(          \
      constant halfbyte::gpu::DecodeNumbers& numbers [[buffer(0)]], device const float* rotation [[buffer(1)]],      \
      device const float* offset [[buffer(2)]], device const float* inverse_lambda [[buffer(3)]],                    \
      device const int64_t* table [[buffer(4)]], device uchar* pool [[buffer(5)]], device float* out [[buffer(6)]],  \
      HALFBYTE_AT) {                                                                                                 \
    gpu_shared_floats(memory, halfbyte::gpu::kEncodeSimds * halfbyte::gpu::kSimdFloats);                             \
    halfbyte::gpu::decode_entry<D, Bits>(numbers, rotation, offset, inverse_lambda, table, pool, out, memory, group, \
                                         tid);                                                                       \
  }

#define HALFBYTE_KERNELS(D, Padded)                                                                                  \
  HALFBYTE_CODE_KERNELS(D, 4)                                                                                        \
  HALFBYTE_CODE_KERNELS(D, 8)                                                                                        \
  [[max_total_threads_per_threadgroup(halfbyte::gpu::kAttendThreads)]] kernel void attend_d##D(                      \
      constant halfbyte::gpu::AttendNumbers& numbers [[buffer(0)]],                                                  \
      constant halfbyte::gpu::AttendReals& reals [[buffer(1)]], device const uchar* q [[buffer(2)]],                 \
      device const float* rotation_k [[buffer(3)]], device const float* offset_k [[buffer(4)]],                      \
      device const float* inverse_lambda_k [[buffer(5)]], device const uchar* mask [[buffer(6)]],                    \
      device const int64_t* table [[buffer(7)]], device uchar* pool [[buffer(8)]],                                   \
      device float* partials [[buffer(9)]], device const float* waves [[buffer(10)]], HALFBYTE_AT) {                 \
    gpu_shared_floats(memory, halfbyte::gpu::attend_floats(D, Padded, D / 2));                                       \
    halfbyte::gpu::attend_entry<D>(numbers, reals, q, rotation_k, offset_k, inverse_lambda_k, mask, table, pool,     \
                                   partials, waves, memory, group, tid);                                                    \
  }                                                                                                                  \
  [[max_total_threads_per_threadgroup(halfbyte::gpu::kFinishThreads)]] kernel void finish_d##D(                      \
      constant halfbyte::gpu::AttendNumbers& numbers [[buffer(0)]],                                                  \
      constant halfbyte::gpu::AttendReals& reals [[buffer(1)]], device const uchar* q [[buffer(2)]],                 \
      device uchar* out [[buffer(3)]], device const uchar* mask [[buffer(4)]],                                       \
      device const float* sinks [[buffer(5)]], device const float* rotation_v [[buffer(6)]],                         \
      device const float* offset_v [[buffer(7)]], device const float* inverse_lambda_v [[buffer(8)]],                \
      device const float* partials [[buffer(9)]], device const uchar* k0 [[buffer(10)]],                             \
      device const uchar* v0 [[buffer(11)]], device const uchar* k1 [[buffer(12)]],                                  \
      device const uchar* v1 [[buffer(13)]], device const uchar* k2 [[buffer(14)]],                                  \
      device const uchar* v2 [[buffer(15)]], HALFBYTE_AT) {                                                          \
    gpu_shared_floats(memory, halfbyte::gpu::finish_floats(D, Padded, D));                                           \
    halfbyte::gpu::finish_entry<D>(numbers, reals, q, out, mask, sinks, rotation_v, offset_v, inverse_lambda_v,      \
                                   partials, k0, v0, k1, v1, k2, v2, memory, group, tid);                            \
  }

HALFBYTE_KERNELS(64, 64)
HALFBYTE_KERNELS(80, 96)
HALFBYTE_KERNELS(96, 96)
HALFBYTE_KERNELS(128, 128)
HALFBYTE_KERNELS(256, 256)
