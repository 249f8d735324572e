// How one simdgroup holds whole vectors: a lane has 16 neighbouring channels, half a span, of one of them.
#pragma once

#include "gpu/rotate.h"

namespace halfbyte {
namespace gpu {

gpu_constexpr int kPart = kSpan / 2;         // channels of a lane
gpu_constexpr int kSimdFloats = 16 * kSimd;  // shared memory that the vectors of a simdgroup take at most

// Lanes of a vector, a power of two so that they can exchange values; those behind the padded head hold zeros.
HALFBYTE_INLINE constexpr int lanes_of(int head_dim) {
  int lanes = 2;
  while (lanes * kPart < head_dim) lanes *= 2;
  return lanes;
}
HALFBYTE_INLINE constexpr int vectors_of(int head_dim) { return kSimd / lanes_of(head_dim); }

// Some tokens of all sequences and KV heads, taken as one list of vectors.
struct TokenRange {
  int batch, kv_heads;
  int first_token, tokens;  // of each sequence
};

// Where the offset of a token lies, [batch][kv_heads][count][d]: each serves `span` tokens, the first of them from
// token span · first on. span 0: one for all tokens.
struct OffsetSpans {
  int span = 0, first = 0, count = 1;
};

gpu_fn int64_t offset_at(OffsetSpans spans, int row, int token, int d) {
  return ((int64_t)row * spans.count + (spans.span ? token / spans.span - spans.first : 0)) * d;
}

struct VectorPlace {
  bool active;
  int b, head, token;
};

gpu_fn VectorPlace place_of(TokenRange range, int i) {
  const int row = i / range.tokens;
  return {row < range.batch * range.kv_heads, row / range.kv_heads, row % range.kv_heads,
          range.first_token + i % range.tokens};
}

// R x or Rᵀ x for one lane's channels: matrix [d][d] as rows of what is summed over. x: [d] of the lane's vector.
gpu_fn void multiply_part(gpu_global const float* matrix, int d, gpu_shared const float* x, int first,
                          gpu_local float* out) {
  for (int j = 0; j < kPart; j++) out[j] = 0.0f;
  for (int i = 0; i < d; i++)
    for (int j = 0; j < kPart; j++)
      if (first + j < d) out[j] += matrix[i * d + first + j] * x[i];
}

// Codes of a lane's channels, as stored, one a byte: word i holds channels 4i … 4i + 3. Both lanes of a span have its
// bytes at 4 bits: the low nibbles are the even lane's.
gpu_fn uint span_word(uint own, int bits, int lane) {
  const uint other = gpu_lane_xor(own, 1);
  return bits == 8 ? own : lane % 2 ? other | own << 4 : own | other << 4;
}

// At 4 bits the two lanes of a span deal with half of its words each.
gpu_fn bool owns_word(int word, int bits, int lane) { return bits == 8 || word / 2 == lane % 2; }

}  // namespace gpu
}  // namespace halfbyte
