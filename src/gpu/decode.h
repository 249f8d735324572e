// Codes become vectors again, one simdgroup a vector.
#pragma once

#include "gpu/element.h"

namespace halfbyte::gpu {

struct DecodeSide {
  gpu_global float* out;  // [batch][kv_heads][tokens][d]
  RotationTable rotation;
  gpu_global const float* offset;          // [batch][kv_heads][d] or null
  gpu_global const float* inverse_lambda;  // [kv_heads][d] or null
};

struct DecodeShape {
  PageFormat format;
  int batch, kv_heads;
  int first_token, tokens;
  int out_first, out_tokens;  // position of out's first token, and how many it has
};

// One vector. y: [padded_dim] shared by the simdgroup. All simdgroups of the threadgroup must call it together.
gpu_fn void decode_vector(gpu_const DecodeShape& s, gpu_const Pages& pages, gpu_const DecodeSide& side, bool is_k,
                          int b, int head, int token, bool active, gpu_shared float* y, int lane) {
  gpu_const SideFormat& f = is_k ? s.format.k : s.format.v;
  const int d = f.head_dim, slot = token % kBlockTokens;
  if (active) {
    BlockSide block = block_side(page_of(pages, s.format, b, head, token), s.format, is_k, token);
    for (int c = lane; c < d; c += kSimd) {
      float value = code_value(f, is_k, block.codes, slot, c) * load_scale(f, block.scales, c / f.group, slot);
      y[c] = side.inverse_lambda ? value * side.inverse_lambda[(long long)head * d + c] : value;
    }
  }
  gpu_barrier();
  if (!active) return;
  const long long row = (long long)b * s.kv_heads + head;
  gpu_global float* out = side.out + (row * s.out_tokens + token - s.out_first) * d;
  for (int j = lane; j < d; j += kSimd) {
    float sum = y[j];
    if (side.rotation.r) {
      sum = 0.0f;
      for (int i = 0; i < d; i++) sum += side.rotation.r[i * d + j] * y[i];
    }
    out[j] = side.offset ? sum + side.offset[row * d + j] : sum;
  }
}

}  // namespace halfbyte::gpu
