// Vectors become codes, several a simdgroup: any head size, recipe and dtype. docs/format.md is what it computes.
#pragma once

#include "gpu/vectors.h"

namespace halfbyte {
namespace gpu {

// K or V of new tokens, and how they are coded.
struct EncodeSide {
  gpu_global const uchar* data;
  Strides3 strides;
  RotationTable rotation;
  gpu_global const float* offset;  // as `spans` says, or null
  gpu_global const float* lambda;  // [kv_heads][d] or null
  float factors[kSearchSize];      // of the covering scale; the first alone without search
  OffsetSpans spans;
};

struct EncodeShape {
  PageFormat format;
  TokenRange range;  // what to pack
  int dtype;
  int data_first;  // position of the token that lies first in `data`
  float limit;     // larger magnitudes can not be coded
};

gpu_fn float round_scale(gpu_local const SideFormat& f, float scale) {
  return f.scale_bytes == 4 ? scale : half_bits_to_float(float_to_half_bits(scale));
}

HALFBYTE_INLINE int lowest_code(gpu_local const SideFormat& f) {
  return f.signed_scale || f.search ? -zero_code(f.bits) : 1 - zero_code(f.bits);
}

// 0 for scales of 0, and for those whose inverse overflows: their groups are zeros to any precision that matters.
gpu_fn float inverse_of(float scale) { return fabs(scale) > 1e-37f ? 1.0f / scale : 0.0f; }

gpu_fn float quantise(float y, float inverse, float low, float high) { return min(max(rint(y * inverse), low), high); }

// The scale of the group that `lanes` neighbouring lanes hold, the same in each of them.
gpu_fn float choose_scale(gpu_local const SideFormat& f, gpu_local const float* factors, gpu_local const float* y,
                          int lanes) {
  float high = y[0], low = y[0];
  for (int j = 1; j < kPart; j++) high = max(high, y[j]), low = min(low, y[j]);
  high = lanes_max(high, lanes), low = -lanes_max(-low, lanes);
  const float zero = (float)zero_code(f.bits), extreme = high >= -low ? high : low;
  const float covering = f.signed_scale ? -extreme / zero : fabs(extreme) / (zero - 1.0f);
  float best = round_scale(f, covering * factors[0]), best_error = 1e38f;
  for (int i = 0; f.search && i < kSearchSize; i++) {
    const float scale = round_scale(f, covering * factors[i]), inverse = inverse_of(scale);
    float error = 0.0f;
    for (int j = 0; j < kPart; j++) {
      const float e = y[j] - quantise(y[j], inverse, (float)lowest_code(f), zero - 1.0f) * scale;
      error += e * e;
    }
    error = lanes_sum(error, lanes);
    if (error < best_error) best_error = error, best = scale;
  }
  return best;
}

// (value − μ) · factor of the simdgroup's vectors to x [vectors][d], lanes side by side in memory.
gpu_fn void load_vectors(gpu_local const EncodeShape& s, gpu_local const EncodeSide& side, int first, int vectors,
                         int d, gpu_shared float* x, gpu_global int* bad, int lane) {
  for (int v = 0; v < vectors; v++) {
    const VectorPlace place = place_of(s.range, first + v);
    if (!place.active) continue;
    const int64_t row = element_at(side.strides, place.b, place.head, place.token - s.data_first);
    const int64_t at = offset_at(side.spans, place.b * s.range.kv_heads + place.head, place.token, d);
    for (int c = lane; c < d; c += kSimd) {
      const float value = load_value(side.data, s.dtype, row + c);
      // As bits, where NaN comes last: compilers may take it that there is none.
      if ((float_as_bits(value) & 0x7fffffffu) > float_as_bits(s.limit)) gpu_raise(bad);
      const float centred = side.offset ? value - side.offset[at + c] : value;
      x[v * d + c] = side.rotation.factors ? centred * side.rotation.factors[c] : centred;
    }
  }
}

// y = Λ R (x − μ) of the lane's channels; zeros behind the head.
gpu_fn void take_channels(gpu_local const EncodeSide& side, int head, int d, gpu_shared const float* x, int first,
                          gpu_local float* y) {
  if (side.rotation.r)
    multiply_part(side.rotation.transposed, d, x, first, y);
  else
    for (int j = 0; j < kPart; j++) y[j] = first + j < d ? x[first + j] : 0.0f;
  if (side.lambda)
    for (int j = 0; j < kPart; j++)
      if (first + j < d) y[j] *= side.lambda[(int64_t)head * d + first + j];
}

// Packs vectors first, first + 1, … of the range, as many as a simdgroup holds. x: [kSimdFloats] shared by it.
template <int D>
gpu_fn void encode_vectors(gpu_local const EncodeShape& s, gpu_local const Pages& pages,
                           gpu_local const EncodeSide& side, bool is_k, int first, gpu_shared float* x,
                           gpu_global int* bad, int lane) {
  const SideFormat f = is_k ? s.format.k : s.format.v;
  const int d = D ? D : f.head_dim, lanes = lanes_of(d), part = lane % lanes, channel = part * kPart;
  load_vectors(s, side, first, kSimd / lanes, d, x, bad, lane);
  gpu_simd_barrier();
  if (side.rotation.factors) FastRotation<D, vectors_of(D)>::forward(side.rotation, VectorSpace{x, d, 1}, lane);

  const VectorPlace place = place_of(s.range, first + lane / lanes);
  float y[kPart];
  take_channels(side, place.head, d, x + lane / lanes * d, channel, y);
  const int group_lanes = f.group == f.padded_dim ? lanes : f.group / kPart;
  const float scale = choose_scale(f, side.factors, y, group_lanes), inverse = inverse_of(scale);
  const float low = (float)lowest_code(f), high = (float)(zero_code(f.bits) - 1);

  const bool writes = place.active && channel < f.padded_dim;
  const int token = writes ? place.token : s.range.first_token, slot = token % kBlockTokens;
  const BlockSide block =
      block_side(page_of(pages, s.format, writes ? place.b : 0, writes ? place.head : 0, token), s.format, is_k, token);
  if (writes && part % group_lanes == 0)
    store_value(block.scales, f.scale_bytes == 4 ? kFloat32 : kFloat16, channel / f.group * kBlockTokens + slot, scale);
  for (int i = 0; i < kPart / 4; i++) {
    uint own = 0;
    for (int j = 0; j < 4; j++)
      own |= (uint)((int)quantise(y[4 * i + j], inverse, low, high) + zero_code(f.bits)) << 8 * j;
    const uint word = span_word(own, f.bits, lane);
    if (!writes || !owns_word(i, f.bits, lane)) continue;
    const int c = (f.bits == 8 ? channel : channel / kSpan * kSpan) + 4 * i;
    if (is_k)
      *(gpu_global uint*)(block.codes + k_code_place(f.bits, slot, c).byte) = word;
    else
      for (int j = 0; j < 4; j++) block.codes[v_code_place(f.bits, slot, c + j).byte] = (uchar)(word >> 8 * j);
  }
}

}  // namespace gpu
}  // namespace halfbyte
