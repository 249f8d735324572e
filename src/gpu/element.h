// What every kernel body needs: elements of any dtype, where a token's codes and scales lie, sums over a simdgroup.
#pragma once

#include "gpu/gpu.h"

namespace halfbyte::gpu {

constexpr float kLog2e = 1.44269504088896f;

// Dtype of the public API, as a number.
enum ElementType { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

gpu_fn float load_value(gpu_global const uchar* p, int dtype, long long i) {
  if (dtype == kFloat32) return ((gpu_global const float*)p)[i];
  ushort bits = ((gpu_global const ushort*)p)[i];
  return dtype == kFloat16 ? half_bits_to_float(bits) : bits_as_float((uint)bits << 16);
}

gpu_fn ushort float_to_bf16_bits(float x) {
  uint bits = float_as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (ushort)(bits >> 16 | 0x40);
  return (ushort)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

gpu_fn void store_value(gpu_global uchar* p, int dtype, long long i, float x) {
  if (dtype == kFloat32) ((gpu_global float*)p)[i] = x;
  else ((gpu_global ushort*)p)[i] = dtype == kFloat16 ? float_to_half_bits(x) : float_to_bf16_bits(x);
}

gpu_fn float simd_sum(float x) {
  for (int mask = kSimd / 2; mask > 0; mask >>= 1) x += gpu_lane_xor(x, mask);
  return x;
}

gpu_fn float simd_max(float x) {
  for (int mask = kSimd / 2; mask > 0; mask >>= 1) x = max(x, gpu_lane_xor(x, mask));
  return x;
}

// Strides of a [batch, heads, tokens, channels] array in elements; channels are contiguous.
struct Strides3 {
  long long batch, head, token;
};

gpu_fn long long element_at(gpu_const Strides3& s, int b, int head, int token) {
  return b * s.batch + head * s.head + token * s.token;
}

// The pages of a layer. table[b][i] is the byte offset from `pool` of the page with tokens 64·(first_page + i) onwards.
struct Pages {
  gpu_global uchar* pool;
  gpu_global const long long* table;   // [batch][table_stride]
  int table_stride;
  int first_page;
};

gpu_fn gpu_global uchar* page_of(gpu_const Pages& pages, gpu_const PageFormat& format, int b, int head, int token) {
  long long page = pages.table[(long long)b * pages.table_stride + token / kPageTokens - pages.first_page];
  return pages.pool + page + head * page_head_bytes(format);
}

// One side of one block.
struct BlockSide {
  gpu_global uchar* codes;
  gpu_global uchar* scales;
};

gpu_fn BlockSide block_side(gpu_global uchar* page, gpu_const PageFormat& format, bool is_k, int token) {
  int block = token % kPageTokens / kBlockTokens;
  return {page + (is_k ? k_codes_at(format, block) : v_codes_at(format, block)),
          page + (is_k ? k_scales_at(format, block) : v_scales_at(format, block))};
}

gpu_fn float load_scale(gpu_const SideFormat& f, gpu_global const uchar* scales, int group, int token) {
  return load_value(scales, f.scale_bytes == 4 ? kFloat32 : kFloat16, group * kBlockTokens + token);
}

gpu_fn float code_value(gpu_const SideFormat& f, bool is_k, gpu_global const uchar* codes, int token, int channel) {
  CodePlace place = is_k ? k_code_place(f.bits, token, channel) : v_code_place(f.bits, token, channel);
  int code = codes[place.byte] >> place.shift & (f.bits == 4 ? 15 : 255);
  return (float)(code - zero_code(f.bits));
}

// R as a dense matrix, so that any rotation costs the same. Null for the identity.
struct RotationTable {
  gpu_global const float* r;           // [d][d], y_i = Σ r[i][j] x_j
  gpu_global const float* transposed;  // [d][d]
};

// out[row][i] = Σ_j m[j][i] x[row][j] for four rows: m is the transposed table to rotate, the plain one to rotate back.
gpu_fn void rotate_four(gpu_global const float* m, int d, int i, gpu_shared const float* x, int stride, float out[4]) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 16
  for (int j = 0; j < d; j++) {
    float r = m[j * d + i];
    for (int row = 0; row < 4; row++) sum[row] += r * x[row * stride + j];
  }
  for (int row = 0; row < 4; row++) out[row] = sum[row];
}

}  // namespace halfbyte::gpu
