// Vectors become codes, one simdgroup a vector: any head size, recipe and dtype. docs/format.md is what it computes.
#pragma once

#include "gpu/element.h"

namespace halfbyte::gpu {

// K or V of new tokens, and how they are coded.
struct EncodeSide {
  gpu_global const uchar* data;
  Strides3 strides;
  RotationTable rotation;
  gpu_global const float* offset;  // [batch][kv_heads][d] or null
  gpu_global const float* lambda;  // [kv_heads][d] or null
  float factors[kSearchSize];      // of the covering scale; the first alone without search
};

struct EncodeShape {
  PageFormat format;
  int batch, kv_heads, dtype;
  int first_token;  // position of the first token to pack
  int tokens;       // of each sequence
  int data_first;   // position of the token that lies first in `data`
  float limit;      // larger magnitudes can not be coded
};

gpu_fn float round_scale(gpu_const SideFormat& f, float scale) {
  return f.scale_bytes == 4 ? scale : half_bits_to_float(float_to_half_bits(scale));
}

gpu_fn int lowest_code(gpu_const SideFormat& f) {
  return f.signed_scale || f.search ? -zero_code(f.bits) : 1 - zero_code(f.bits);
}

gpu_fn float quantise(float y, float scale, float low, float high) {
  return scale == 0.0f ? 0.0f : min(max(rint(y / scale), low), high);
}

// The scale of channels [from, to) of y, the same in every lane.
gpu_fn float choose_scale(gpu_const SideFormat& f, gpu_const float* factors, gpu_shared const float* y, int from,
                          int to, int lane) {
  float high = -1e38f, low = 1e38f;
  for (int c = from + lane; c < to; c += kSimd) high = max(high, y[c]), low = min(low, y[c]);
  high = simd_max(high), low = -simd_max(-low);
  const float half = (float)zero_code(f.bits), extreme = high >= -low ? high : low;
  const float covering = f.signed_scale ? -extreme / half : fabs(extreme) / (half - 1.0f);
  float best = round_scale(f, covering * factors[0]), best_error = 1e38f;
  for (int i = 0; f.search && i < kSearchSize; i++) {
    const float scale = round_scale(f, covering * factors[i]);
    float error = 0.0f;
    for (int c = from + lane; c < to; c += kSimd) {
      float e = y[c] - quantise(y[c], scale, (float)lowest_code(f), half - 1.0f) * scale;
      error += e * e;
    }
    error = simd_sum(error);
    if (error < best_error) best_error = error, best = scale;
  }
  return best;
}

// Codes of one token's channels [from, to): both nibbles of a byte belong to the token, so lanes never share a byte.
gpu_fn void store_codes(gpu_const SideFormat& f, bool is_k, gpu_global uchar* codes, gpu_shared const float* codes_of,
                        int token, int lane) {
  const int zero = zero_code(f.bits), pairs = f.bits == 4;
  for (int c = lane; c < f.padded_dim; c += kSimd) {
    if (pairs && c % kSpan >= 16) continue;
    CodePlace place = is_k ? k_code_place(f.bits, token, c) : v_code_place(f.bits, token, c);
    int byte = (int)codes_of[c] + zero;
    if (pairs) byte |= ((int)codes_of[c + 16] + zero) << 4;
    codes[place.byte] = (uchar)byte;
  }
}

// One vector. x, y: [padded_dim] shared by the simdgroup. All simdgroups of the threadgroup must call it together.
gpu_fn void encode_vector(gpu_const EncodeShape& s, gpu_const Pages& pages, gpu_const EncodeSide& side, bool is_k,
                          int b, int head, int token, bool active, gpu_shared float* x, gpu_shared float* y,
                          gpu_global int* bad, int lane) {
  gpu_const SideFormat& f = is_k ? s.format.k : s.format.v;
  const int d = f.head_dim;
  if (active) {
    const long long row = element_at(side.strides, b, head, token - s.data_first);
    gpu_global const float* offset = side.offset ? side.offset + ((long long)b * s.kv_heads + head) * d : side.offset;
    for (int c = lane; c < d; c += kSimd) {
      float value = load_value(side.data, s.dtype, row + c);
      if (!(fabs(value) <= s.limit)) *bad = 1;
      x[c] = offset ? value - offset[c] : value;
    }
  }
  gpu_barrier();
  if (active) {
    for (int i = lane; i < f.padded_dim; i += kSimd) {
      float sum = i < d ? x[i] : 0.0f;
      if (side.rotation.r && i < d) {
        sum = 0.0f;
        for (int j = 0; j < d; j++) sum += side.rotation.transposed[j * d + i] * x[j];
      }
      y[i] = side.lambda && i < d ? sum * side.lambda[(long long)head * d + i] : sum;
    }
  }
  gpu_barrier();
  if (active) {
    BlockSide block = block_side(page_of(pages, s.format, b, head, token), s.format, is_k, token);
    const int slot = token % kBlockTokens;
    for (int g = 0; g < f.n_groups; g++) {
      const int from = g * f.group, to = min(from + f.group, f.padded_dim);
      const float scale = choose_scale(f, side.factors, y, from, to, lane);
      if (lane == 0)
        store_value(block.scales, f.scale_bytes == 4 ? kFloat32 : kFloat16, g * kBlockTokens + slot, scale);
      for (int c = from + lane; c < to; c += kSimd)
        x[c] = quantise(y[c], scale, (float)lowest_code(f), (float)(zero_code(f.bits) - 1));
    }
  }
  gpu_barrier();
  if (active) {
    BlockSide block = block_side(page_of(pages, s.format, b, head, token), s.format, is_k, token);
    store_codes(f, is_k, block.codes, x, token % kBlockTokens, lane);
  }
}

}  // namespace halfbyte::gpu
