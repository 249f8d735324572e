// The bytes of a block: host, CPU kernels and GPU kernels agree here and nowhere else. docs/format.md is its prose.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Everything here is force-inlined: kernels are compiled for several instruction sets, and a function body shared
// between them by the linker could carry instructions that the running CPU does not have. src/gpu/gpu.h has its own
// words, among them those for the address spaces that Metal wants named.
#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE static inline __attribute__((always_inline))
#define gpu_local
#define gpu_constexpr constexpr
#endif

namespace halfbyte {

gpu_constexpr int kBlockTokens = 16;  // tokens of a block: one SIMD register of 32-bit lanes
gpu_constexpr int kPageBlocks = 4;    // blocks of a page
gpu_constexpr int kPageTokens = kBlockTokens * kPageBlocks;
gpu_constexpr int kSpan = 32;      // channels that share rows: the low nibbles hold 16 of them, the high nibbles 16
gpu_constexpr int kRowBytes = 64;  // codes of 4 channels × 16 tokens (K) or 16 channels × 4 tokens (V)
gpu_constexpr int kMaxHeadDim = 512;
gpu_constexpr int kPlainBits = 32;  // "codes" that are the vectors themselves: float [16 tokens][head_dim], no scales

// Scale candidates, as factors of the scale that just covers the group. The signed ones start above 1: with the
// largest magnitude on −2^(bits−1), a little more room serves the other side.
gpu_constexpr int kSearchSize = 6;
gpu_constexpr float kSearch[kSearchSize] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};
gpu_constexpr float kSearchSigned[kSearchSize] = {1.0f, 1.1f, 1.05f, 0.95f, 0.9f, 0.85f};

// How K, or V, of one layer is laid out in a block.
struct SideFormat {
  int head_dim = 0;
  int padded_dim = 0;  // head_dim rounded up to a span
  int bits = 4;        // kPlainBits: floats, not codes
  int group = 32;      // channels a scale; the whole vector counts as padded_dim
  int n_groups = 0;
  int scale_bytes = 2;  // 2: fp16, 4: fp32
  bool search = true;
  bool signed_scale = true;
};

// group 0: one scale a vector.
HALFBYTE_INLINE SideFormat side_format(int head_dim, int bits, int group, int scale_bytes, bool search,
                                       bool signed_scale) {
  SideFormat format;
  format.head_dim = head_dim;
  format.padded_dim = (head_dim + kSpan - 1) / kSpan * kSpan;
  format.bits = bits;
  format.group = group == 0 || group > format.padded_dim ? format.padded_dim : group;
  format.n_groups = bits == kPlainBits ? 0 : (format.padded_dim + format.group - 1) / format.group;
  format.scale_bytes = scale_bytes;
  format.search = search;
  format.signed_scale = signed_scale;
  return format;
}

HALFBYTE_INLINE int zero_code(int bits) { return 1 << (bits - 1); }  // codes are stored unsigned

HALFBYTE_INLINE int rows_per_span(int bits) { return bits == 4 ? 4 : 8; }
HALFBYTE_INLINE size_t code_bytes(gpu_local const SideFormat& f) {
  if (f.bits == kPlainBits) return (size_t)kBlockTokens * f.head_dim * 4;
  return (size_t)(f.padded_dim / kSpan) * rows_per_span(f.bits) * kRowBytes;
}
HALFBYTE_INLINE size_t scale_row_bytes(gpu_local const SideFormat& f) { return (size_t)kBlockTokens * f.scale_bytes; }
HALFBYTE_INLINE size_t scales_bytes(gpu_local const SideFormat& f) { return f.n_groups * scale_row_bytes(f); }

// Where one code lives: a byte of the block's code area, and the shift inside it.
struct CodePlace {
  size_t byte;
  int shift;
};

// K rows: lane = token, the four bytes of a lane = four neighbouring channels.
HALFBYTE_INLINE CodePlace k_code_place(int bits, int token, int channel) {
  int span = channel / kSpan, within = channel % kSpan;
  int row = bits == 4 ? span * 4 + within % 16 / 4 : span * 8 + within / 4;
  return {(size_t)row * kRowBytes + token * 4 + within % 4, bits == 4 && within >= 16 ? 4 : 0};
}

// V rows: lane = channel, the four bytes of a lane = four neighbouring tokens.
HALFBYTE_INLINE CodePlace v_code_place(int bits, int token, int channel) {
  int span = channel / kSpan, within = channel % kSpan;
  int row = bits == 4 ? span * 4 + token / 4 : span * 8 + within / 16 * 4 + token / 4;
  return {(size_t)row * kRowBytes + within % 16 * 4 + token % 4, bits == 4 && within >= 16 ? 4 : 0};
}

// One KV head's part of a page: the codes of its blocks (K then V of each), then their scales (K then V of each).
struct PageFormat {
  SideFormat k, v;
};

HALFBYTE_INLINE size_t block_code_bytes(gpu_local const PageFormat& p) { return code_bytes(p.k) + code_bytes(p.v); }
HALFBYTE_INLINE size_t block_scale_bytes(gpu_local const PageFormat& p) {
  return scales_bytes(p.k) + scales_bytes(p.v);
}
HALFBYTE_INLINE size_t page_head_bytes(gpu_local const PageFormat& p) {
  size_t bytes = kPageBlocks * (block_code_bytes(p) + block_scale_bytes(p));
  return (bytes + 63) / 64 * 64;  // so that every head's rows stay on cache lines
}
HALFBYTE_INLINE size_t k_codes_at(gpu_local const PageFormat& p, int block) { return block * block_code_bytes(p); }
HALFBYTE_INLINE size_t v_codes_at(gpu_local const PageFormat& p, int block) {
  return k_codes_at(p, block) + code_bytes(p.k);
}
HALFBYTE_INLINE size_t k_scales_at(gpu_local const PageFormat& p, int block) {
  return kPageBlocks * block_code_bytes(p) + block * block_scale_bytes(p);
}
HALFBYTE_INLINE size_t v_scales_at(gpu_local const PageFormat& p, int block) {
  return k_scales_at(p, block) + scales_bytes(p.k);
}

}  // namespace halfbyte
