// Codes become vectors again, several a simdgroup.
#pragma once

#include "gpu/vectors.h"

namespace halfbyte {
namespace gpu {

struct DecodeSide {
  gpu_global float* out;  // [batch][kv_heads][out_tokens][d]
  RotationTable rotation;
  gpu_global const float* offset;          // as `spans` says, or null
  gpu_global const float* inverse_lambda;  // [kv_heads][d] or null
  OffsetSpans spans;
};

struct DecodeShape {
  PageFormat format;
  TokenRange range;
  int out_first, out_tokens;  // position of out's first token, and how many it has
};

// Λ⁻¹ ŷ of the simdgroup's vectors to x [vectors][d], each lane the channels of its half span.
gpu_fn void load_codes(gpu_local const DecodeShape& s, gpu_local const Pages& pages, gpu_local const DecodeSide& side,
                       bool is_k, VectorPlace place, int d, int first, gpu_shared float* x) {
  const SideFormat f = is_k ? s.format.k : s.format.v;
  const int slot = place.token % kBlockTokens;
  const BlockSide block =
      block_side(page_of(pages, s.format, place.b, place.head, place.token), s.format, is_k, place.token);
  const float scale = load_scale(f, block.scales, first / f.group, slot);
  for (int c = first; c < min(first + kPart, d); c++) {
    const float value = code_value(f, is_k, block.codes, slot, c) * scale;
    x[c] = side.inverse_lambda ? value * side.inverse_lambda[(int64_t)place.head * d + c] : value;
  }
}

// Channels side by side in lanes, for stores that lie together.
gpu_fn void store_vector(gpu_local const DecodeShape& s, gpu_local const DecodeSide& side, VectorPlace place, int d,
                         gpu_shared const float* x, int lane) {
  const int row = place.b * s.range.kv_heads + place.head;
  const int64_t mu = offset_at(side.spans, row, place.token, d);
  gpu_global float* out = side.out + ((int64_t)row * s.out_tokens + place.token - s.out_first) * d;
  for (int c = lane; c < d; c += kSimd) {
    float value = x[c];
    if (side.rotation.factors) value *= back_factor(side.rotation, c);
    if (side.rotation.r) {
      value = 0.0f;
      for (int i = 0; i < d; i++) value += side.rotation.r[i * d + c] * x[i];
    }
    out[c] = side.offset ? value + side.offset[mu + c] : value;
  }
}

// Vectors first, first + 1, … of the range, as many as a simdgroup holds. x: [kSimdFloats] shared by it.
template <int D>
gpu_fn void decode_vectors(gpu_local const DecodeShape& s, gpu_local const Pages& pages,
                           gpu_local const DecodeSide& side, bool is_k, int first, gpu_shared float* x, int lane) {
  const int d = D ? D : is_k ? s.format.k.head_dim : s.format.v.head_dim, lanes = lanes_of(d);
  const VectorPlace own = place_of(s.range, first + lane / lanes);
  const int channel = lane % lanes * kPart;
  if (own.active && channel < d) load_codes(s, pages, side, is_k, own, d, channel, x + lane / lanes * d);
  gpu_simd_barrier();
  if (side.rotation.factors) FastRotation<D, vectors_of(D)>::back(side.rotation, VectorSpace{x, d, 1}, lane);
  for (int v = 0; v < kSimd / lanes; v++) {
    const VectorPlace place = place_of(s.range, first + v);
    if (place.active) store_vector(s, side, place, d, x + v * d, lane);
  }
}

}  // namespace gpu
}  // namespace halfbyte
