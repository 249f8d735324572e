// Whole blocks of K and V become codes with tensor cores: rotation as a matrix product, then scales, search and
// packing.
//
// The output channels (K) or tokens (V) are dealt to the columns of the product so that each thread ends up with whole
// words of the format. R is split in two fp16 or three bf16 terms, whose products are exact and summed in float.
#pragma once

#include "cuda/mma.cuh"
#include "gpu/encode.h"

namespace halfbyte::gpu {

constexpr int kEncodeWarps = 8;

struct EncodeCall {
  EncodeShape shape;
  EncodeSide side[2];  // K, V
  Pages pages;
  gpu_global const uint4* fragments[2];       // R, see fragment_index
  gpu_global const float* rotated_offset[2];  // R mu, in the order of EncodeSide::offset, or null
  uint32_t limit_bits;                        // the largest codable element, as bits of its dtype
  int* bad;                                   // set to 1 if a value can not be coded
};

template <class T>
constexpr int kTerms = 2;  // fp16: 22 bits of R
template <>
constexpr int kTerms<__nv_bfloat16> = 3;  // bf16: 24 bits

// R in the order in which threads read it: [terms][d / 32 spans][d / 16 steps][2][32 lanes] of 16 bytes.
HALFBYTE_INLINE size_t fragment_index(int d, int term, int span, int step, int part, int lane) {
  return ((((size_t)term * (d / kSpan) + span) * (d / 16) + step) * 2 + part) * kSimd + lane;
}

// The channel of x that a thread holds as number i (0 … 3) of step `step` of the product.
HALFBYTE_INLINE int input_channel(int step, int t, int i) { return step / 2 * 32 + t * 8 + step % 2 * 4 + i; }

template <class T>
__device__ __forceinline__ void mma_as(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  if constexpr (kTerms<T> == 3)
    mma_bf16(c, a, b0, b1);
  else
    mma(c, a, b0, b1);
}

// Thread-private results of one block: K: tokens 2g, 2g+1 by channels 4t … 4t+3 and 16+4t … of each span; V: tokens
// 4t … 4t+3 by channels 2g, 2g+1, 16+2g, 16+2g+1.
template <int D>
struct Values {
  float y[D / kSpan][4][4];
};

template <bool IsK>
struct DealOf {
  static constexpr int kTokens = IsK ? 2 : 4;
  static constexpr int kEach = IsK ? 8 : 4;                                 // channels of a token in a span
  static constexpr int kFirstMask = IsK ? 1 : 4, kLastMask = IsK ? 2 : 16;  // lanes that share a token

  template <int D>
  static __device__ __forceinline__ float& at(Values<D>& v, int span, int token, int i) {
    return IsK ? v.y[span][i / 2][token * 2 + i % 2] : v.y[span][i / 2 * 2 + token / 2][i % 2 * 2 + token % 2];
  }
  // Channel of number i of a span, and token of number `token` of a block.
  static __device__ __forceinline__ int channel(int i, int g, int t) {
    return IsK ? i / 4 * 16 + 4 * t + i % 4 : i / 2 * 16 + 2 * g + i % 2;
  }
  static __device__ __forceinline__ int token(int token, int g, int t) { return IsK ? 2 * g + token : 4 * t + token; }
  static __device__ __forceinline__ float max_over_lanes(float x) {
    for (int mask = kFirstMask; mask <= kLastMask; mask <<= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
  }
  static __device__ __forceinline__ float sum_over_lanes(float x) {
    for (int mask = kFirstMask; mask <= kLastMask; mask <<= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
  }
};

// 1.5 · 2^23, where a unit is the last bit: adding it rounds to the nearest integer, ties to even.
constexpr float kRound = 12582912.0f;

__device__ __forceinline__ float quantise_fast(float y, float inverse, float low, float high) {
  return fminf(fmaxf(__fadd_rn(__fmaf_rn(y, inverse, kRound), -kRound), low), high);
}

__device__ __forceinline__ float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : __fdividef(1.0f, scale); }

// The scale of spans [From, From + Spans) of one token; see choose_scale.
template <bool IsK, int D, int Spans>
__device__ __forceinline__ float choose_scale_fast(const SideFormat& f, const float* factors, Values<D>& v, int from,
                                                   int token) {
  using Deal = DealOf<IsK>;
  float high = -1e38f, low = 1e38f;
#pragma unroll
  for (int s = 0; s < Spans; s++)
#pragma unroll
    for (int i = 0; i < Deal::kEach; i++) {
      const float y = Deal::at(v, from + s, token, i);
      high = fmaxf(high, y), low = fminf(low, y);
    }
  high = Deal::max_over_lanes(high), low = -Deal::max_over_lanes(-low);
  const float half = (float)zero_code(f.bits), extreme = high >= -low ? high : low;
  const float covering = f.signed_scale ? -extreme / half : fabsf(extreme) / (half - 1.0f);
  float best = round_scale(f, covering * factors[0]), best_error = 1e38f;
  for (int c = 0; f.search && c < kSearchSize; c++) {
    const float scale = round_scale(f, covering * factors[c]), inverse = inverse_scale(scale);
    float error = 0.0f;
#pragma unroll
    for (int s = 0; s < Spans; s++)
#pragma unroll
      for (int i = 0; i < Deal::kEach; i++) {
        const float y = Deal::at(v, from + s, token, i);
        const float e = y - quantise_fast(y, inverse, -half, half - 1.0f) * scale;
        error += e * e;
      }
    error = Deal::sum_over_lanes(error);
    if (error < best_error) best_error = error, best = scale;
  }
  return best;
}

// Replaces spans [from, from + Spans) of all tokens by kRound + stored code, and writes their scales as group `group`.
template <bool IsK, int D, int Spans>
__device__ __forceinline__ void code_group(const SideFormat& f, const float* factors, Values<D>& v, int from, int group,
                                           uint8_t* scales, int g, int t) {
  using Deal = DealOf<IsK>;
  const float low = (float)lowest_code(f), high = (float)(zero_code(f.bits) - 1), zero = (float)zero_code(f.bits);
#pragma unroll
  for (int token = 0; token < Deal::kTokens; token++) {
    const float scale = choose_scale_fast<IsK, D, Spans>(f, factors, v, from, token), inverse = inverse_scale(scale);
#pragma unroll
    for (int s = 0; s < Spans; s++)
#pragma unroll
      for (int i = 0; i < Deal::kEach; i++) {
        float& y = Deal::at(v, from + s, token, i);
        y = quantise_fast(y, inverse, low, high) + (zero + kRound);
      }
    if (IsK ? t == 0 : g == 0)
      store_value(scales, f.scale_bytes == 4 ? kFloat32 : kFloat16, group * kBlockTokens + Deal::token(token, g, t),
                  scale);
  }
}

// Word of four codes, one a byte. Each is kRound + code, whose lowest byte is the code.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// The thread's words of every span; v holds kRound + stored code.
template <bool IsK, int D>
__device__ __forceinline__ void store_words(const SideFormat& f, Values<D>& v, uint8_t* codes, int g, int t) {
  using Deal = DealOf<IsK>;
  uint8_t* words = codes + t * kRowBytes + g * 8;
#pragma unroll
  for (int span = 0; span < D / kSpan; span++) {
    uint32_t w[2][2];  // [half of the span][token (K) or channel (V)]
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        w[half][j] = IsK ? pack_bytes(Deal::at(v, span, j, 4 * half), Deal::at(v, span, j, 4 * half + 1),
                                      Deal::at(v, span, j, 4 * half + 2), Deal::at(v, span, j, 4 * half + 3))
                         : pack_bytes(Deal::at(v, span, 0, 2 * half + j), Deal::at(v, span, 1, 2 * half + j),
                                      Deal::at(v, span, 2 % Deal::kTokens, 2 * half + j),
                                      Deal::at(v, span, 3 % Deal::kTokens, 2 * half + j));
    uint8_t* to = words + span * rows_per_span(f.bits) * kRowBytes;
    if (f.bits == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(w[0][0] | w[1][0] << 4, w[0][1] | w[1][1] << 4);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(w[0][0], w[0][1]);
      *reinterpret_cast<uint2*>(to + 4 * kRowBytes) = make_uint2(w[1][0], w[1][1]);
    }
  }
}

// Largest magnitudes so far of elements in even and odd places, as bits: those of NaN come last.
__device__ __forceinline__ void note_largest(uint4 x, uint32_t& largest) {
  for (uint32_t word : {x.x, x.y, x.z, x.w}) largest = __vmaxu2(largest, word & 0x7fff7fffu);
}

// y = Λ (R x − R mu) of one block.
template <class T, bool IsK, int D>
__device__ __forceinline__ void rotate_block(const EncodeCall& call, const EncodeSide& side, const uint4* fragments,
                                             int b, int head, int first_token, int g, int t, Values<D>& v,
                                             uint32_t& largest) {
  using Deal = DealOf<IsK>;
  const EncodeShape& s = call.shape;
  const bool has_offset = call.rotated_offset[IsK ? 0 : 1] != nullptr, has_lambda = side.lambda != nullptr;
  // Where there is none, some other floats are read and not used: a load that is always valid needs no branch.
  const float* other = reinterpret_cast<const float*>(call.fragments[IsK ? 0 : 1]);
  const float* offset =
      has_offset ? call.rotated_offset[IsK ? 0 : 1] + offset_at(side.spans, b * s.range.kv_heads + head, first_token, D)
                 : other;
  const float* lambda = has_lambda ? side.lambda + (long long)head * D : other;
#pragma unroll
  for (int span = 0; span < D / kSpan; span++)
#pragma unroll
    for (int i = 0; i < Deal::kEach; i++) {
      const float mu = offset[span * kSpan + Deal::channel(i, g, t)], start = has_offset ? -mu : 0.0f;
#pragma unroll
      for (int token = 0; token < Deal::kTokens; token++) Deal::at(v, span, token, i) = start;
    }
  // Rows of the product: tokens 2g, 2g+1 (K); its columns: tokens 4(g/2) + g%2, and two further (V).
  const int token0 = first_token - s.data_first + (IsK ? 2 * g : 4 * (g / 2) + g % 2);
  const long long row[2] = {element_at(side.strides, b, head, token0),
                            element_at(side.strides, b, head, token0 + (IsK ? 1 : 2))};
  constexpr int kPairs = D / 32, kAhead = kPairs < 4 ? kPairs : 4;  // channels 32·pair + 8t … + 7 of both tokens
  uint4 x[kAhead][2];
#pragma unroll
  for (int pair = 0; pair < kPairs; pair++) {
    if (pair % kAhead == 0)
#pragma unroll
      for (int i = 0; i < kAhead; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          x[i][j] = *reinterpret_cast<const uint4*>(side.data + 2 * (row[j] + (pair + i) * 32 + t * 8));
    const uint4 x0 = x[pair % kAhead][0], x1 = x[pair % kAhead][1];
    note_largest(x0, largest), note_largest(x1, largest);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t lo[2] = {h ? x0.z : x0.x, h ? x1.z : x1.x}, hi[2] = {h ? x0.w : x0.y, h ? x1.w : x1.y};
#pragma unroll
      for (int term = 0; term < kTerms<T>; term++)
#pragma unroll
        for (int span = 0; span < D / kSpan; span++)
#pragma unroll
          for (int part = 0; part < 2; part++) {
            const uint4 r = fragments[fragment_index(D, term, span, 2 * pair + h, part, g * 4 + t)];
            if constexpr (IsK) {
              const uint32_t a[4] = {lo[0], lo[1], hi[0], hi[1]};
              mma_as<T>(v.y[span][2 * part], a, r.x, r.y);
              mma_as<T>(v.y[span][2 * part + 1], a, r.z, r.w);
            } else {
              const uint32_t a[4] = {r.x, r.y, r.z, r.w};
              mma_as<T>(v.y[span][2 * part], a, lo[0], hi[0]);
              mma_as<T>(v.y[span][2 * part + 1], a, lo[1], hi[1]);
            }
          }
    }
  }
#pragma unroll
  for (int span = 0; span < D / kSpan; span++)
#pragma unroll
    for (int i = 0; i < Deal::kEach; i++) {
      const float given = lambda[span * kSpan + Deal::channel(i, g, t)], factor = has_lambda ? given : 1.0f;
#pragma unroll
      for (int token = 0; token < Deal::kTokens; token++) Deal::at(v, span, token, i) *= factor;
    }
}

template <class T, bool IsK, int D>
__device__ __forceinline__ void encode_blocks(const EncodeCall& call, const uint4* fragments, int first, int step) {
  const EncodeShape& s = call.shape;
  const SideFormat& f = IsK ? s.format.k : s.format.v;
  const EncodeSide& side = call.side[IsK ? 0 : 1];
  const TokenRange& range = s.range;
  const int lane = threadIdx.x % kSimd, g = lane / 4, t = lane % 4, blocks = range.tokens / kBlockTokens;
  const int all = range.batch * range.kv_heads * blocks;
  uint32_t largest = 0;
  for (int i = first; i < all; i += step) {
    const int token = range.first_token + i % blocks * kBlockTokens, head = i / blocks % range.kv_heads,
              b = i / blocks / range.kv_heads;
    Values<D> v;
    rotate_block<T, IsK, D>(call, side, fragments, b, head, token, g, t, v, largest);
    const BlockSide block = block_side(page_of(call.pages, s.format, b, head, token), s.format, IsK, token);
    if (f.group == kSpan) {
#pragma unroll
      for (int span = 0; span < D / kSpan; span++)
        code_group<IsK, D, 1>(f, side.factors, v, span, span, block.scales, g, t);
    } else {
      code_group<IsK, D, D / kSpan>(f, side.factors, v, 0, 0, block.scales, g, t);
    }
    store_words<IsK, D>(f, v, block.codes, g, t);
  }
  if (max(largest & 0xffff, largest >> 16) > call.limit_bits) *call.bad = 1;
}

// Even thread blocks take K, odd ones V; R's fragments lie in shared memory.
template <class T, int D>
__device__ __forceinline__ void encode_whole_blocks(const EncodeCall& call, uint4* fragments) {
  const bool is_k = blockIdx.x % 2 == 0;
  const int n = (int)fragment_index(D, kTerms<T>, 0, 0, 0, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) fragments[i] = call.fragments[is_k ? 0 : 1][i];
  __syncthreads();
  const int first = blockIdx.x / 2 * kEncodeWarps + threadIdx.x / kSimd, step = gridDim.x / 2 * kEncodeWarps;
  if (is_k)
    encode_blocks<T, true, D>(call, fragments, first, step);
  else
    encode_blocks<T, false, D>(call, fragments, first, step);
}

template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps* kSimd, 2) encode_kernel(const __grid_constant__ EncodeCall call) {
  uint4* fragments = shared_memory<uint4>();
  encode_whole_blocks<T, D>(call, fragments);
}

}  // namespace halfbyte::gpu
