// What every kernel body needs: elements of any dtype, where a token's codes and scales lie, sums over a simdgroup.
#pragma once

#include "gpu/gpu.h"

namespace halfbyte {
namespace gpu {

gpu_constexpr float kLog2e = 1.44269504088896f;

// Dtype of the public API, as a number.
enum ElementType { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

gpu_fn float load_value(gpu_global const uchar* p, int dtype, int64_t i) {
  if (dtype == kFloat32) return ((gpu_global const float*)p)[i];
  ushort bits = ((gpu_global const ushort*)p)[i];
  return dtype == kFloat16 ? half_bits_to_float(bits) : bits_as_float((uint)bits << 16);
}

// The same where the caller has branched on the width already, so that loads in a loop need not wait for one another.
template <bool Wide>
gpu_fn float load_as(gpu_global const uchar* p, int dtype, int64_t i) {
  if (Wide) return ((gpu_global const float*)p)[i];
  const ushort bits = ((gpu_global const ushort*)p)[i];
  const float as_half = half_bits_to_float(bits), as_bf16 = bits_as_float((uint)bits << 16);
  return dtype == kFloat16 ? as_half : as_bf16;
}

gpu_fn ushort float_to_bf16_bits(float x) {
  uint bits = float_as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (ushort)(bits >> 16 | 0x40);
  return (ushort)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

gpu_fn void store_value(gpu_global uchar* p, int dtype, int64_t i, float x) {
  if (dtype == kFloat32)
    ((gpu_global float*)p)[i] = x;
  else
    ((gpu_global ushort*)p)[i] = dtype == kFloat16 ? float_to_half_bits(x) : float_to_bf16_bits(x);
}

// Over the `lanes` neighbouring lanes, a power of two, that x is one of.
gpu_fn float lanes_sum(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask >>= 1) x += gpu_lane_xor(x, mask);
  return x;
}

gpu_fn float lanes_max(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask >>= 1) x = max(x, gpu_lane_xor(x, mask));
  return x;
}

gpu_fn float simd_sum(float x) { return lanes_sum(x, kSimd); }
gpu_fn float simd_max(float x) { return lanes_max(x, kSimd); }

// Strides of a [batch, heads, tokens, channels] array in elements; channels are contiguous.
struct Strides3 {
  int64_t batch, head, token;
};

gpu_fn int64_t element_at(gpu_local const Strides3& s, int b, int head, int token) {
  return b * s.batch + head * s.head + token * s.token;
}

// The pages of a layer. table[b][i] is the byte offset from `pool` of the page with tokens 64·(first_page + i) onwards.
struct Pages {
  gpu_global uchar* pool;
  gpu_global const int64_t* table;  // [batch][table_stride]
  int table_stride;
  int first_page;
};

gpu_fn gpu_global uchar* page_of(gpu_local const Pages& pages, gpu_local const PageFormat& format, int b, int head,
                                 int token) {
  int64_t page = pages.table[(int64_t)b * pages.table_stride + token / kPageTokens - pages.first_page];
  return pages.pool + page + head * page_head_bytes(format);
}

// One side of one block.
struct BlockSide {
  gpu_global uchar* codes;
  gpu_global uchar* scales;
};

gpu_fn BlockSide block_side(gpu_global uchar* page, gpu_local const PageFormat& format, bool is_k, int token) {
  int block = token % kPageTokens / kBlockTokens;
  return {page + (is_k ? k_codes_at(format, block) : v_codes_at(format, block)),
          page + (is_k ? k_scales_at(format, block) : v_scales_at(format, block))};
}

gpu_fn float load_scale(gpu_local const SideFormat& f, gpu_global const uchar* scales, int group, int token) {
  return load_value(scales, f.scale_bytes == 4 ? kFloat32 : kFloat16, group * kBlockTokens + token);
}

gpu_fn float code_value(gpu_local const SideFormat& f, bool is_k, gpu_global const uchar* codes, int token,
                        int channel) {
  CodePlace place = is_k ? k_code_place(f.bits, token, channel) : v_code_place(f.bits, token, channel);
  int code = codes[place.byte] >> place.shift & (f.bits == 4 ? 15 : 255);
  return (float)(code - zero_code(f.bits));
}

}  // namespace gpu
}  // namespace halfbyte
