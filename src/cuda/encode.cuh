// Whole blocks of K and V become codes with tensor cores: a warp takes a block of 16 tokens, from its offset and
// rotation to scales, search and packing.
//
// The columns of R are dealt so that thread (g = lane / 4, t = lane % 4) has tokens 2g, 2g+1 at channels 4t … 4t+3 and
// 16+4t … 16+4t+3 of each span: whole words of a K block, and of a V block after one exchange of bytes.
#pragma once

#include "cuda/scales.cuh"

namespace halfbyte::gpu {

// Warps of a thread block, as many as registers hold: one thread block fills a multiprocessor.
template <int D>
constexpr int kEncodeWarps = D == 64 ? 24 : D == 128 ? 16 : 8;
// Sides whose R shared memory holds.
template <int D>
constexpr int kSides = D > 128 ? 1 : 2;
constexpr int kPlaces = 512;  // blocks whose places are found at a time

struct EncodeCall {
  EncodeShape shape;
  EncodeSide side[2];                    // K, V
  Candidate candidates[2][kSearchSize];  // those of side.factors
  Pages pages;
  gpu_global const uint4* fragments[2];  // R, see fragment_index
  uint32_t limit_bits;                   // the largest codable element, as bits of its dtype
  int* bad;                              // set to 1 if a value can not be coded
};

// R in fp16, in the order in which threads read it: [d / 32 spans][d / 16 steps][2][32 lanes] of 16 bytes.
HALFBYTE_INLINE constexpr size_t fragment_index(int d, int span, int step, int part, int lane) {
  return (((size_t)span * (d / 16) + step) * 2 + part) * kSimd + lane;
}
HALFBYTE_INLINE constexpr size_t fragment_count(int d) { return fragment_index(d, d / kSpan, 0, 0, 0); }

// The channel of x that a thread holds as number i (0 … 3) of step `step` of the product.
HALFBYTE_INLINE int input_channel(int step, int t, int i) { return step / 2 * 32 + t * 8 + step % 2 * 4 + i; }

// Where a block comes from and goes to.
struct BlockPlace {
  const uchar* x;   // its first token
  const float* mu;  // null where there is no offset
  uchar* codes;
  int scales;  // from `codes` on
  int head;    // and half of it: the side, 0 for K
};

// What a warp stages: the next block, each lane's own parts, channels 32i + 8t … + 7 of tokens 2g and 2g+1, and its
// offset, four channels each: floats as they came, then what Centring takes.
template <int D>
struct Stage {
  uint4 x[D / kSpan][2][kSimd];
  uint4 mu[D / 4];
};

// Shared memory of a thread block.
template <int D>
struct EncodeMemory {
  uint4 fragments[kSides<D>][fragment_count(D)];
  Stage<D> stages[kEncodeWarps<D>];
  BlockPlace places[kPlaces];
  int next;  // the first place that no warp has taken yet
};

// What a thread block packs: so many blocks of 16 tokens of K, then of V, from `first` of all those of a side on.
struct Share {
  int first[2], count[2];
};

template <int D>
__device__ __forceinline__ Share share_of(const TokenRange& range) {
  const int all = range.batch * range.kv_heads * (range.tokens / kBlockTokens);
  const bool both = kSides<D> == 2 && 2 * all >= (int)gridDim.x * kEncodeWarps<D>;
  const int half = gridDim.x / 2, block = blockIdx.x;
  Share share{};
  for (int side = 0; side < 2; side++) {
    const int sharers = both ? gridDim.x : side == 0 ? half : gridDim.x - half;
    const int number = both || side == 0 ? block : block - half;
    if (number < 0 || number >= sharers) continue;
    share.first[side] = (int)((long long)all * number / sharers);
    share.count[side] = (int)((long long)all * (number + 1) / sharers) - share.first[side];
  }
  return share;
}

// Block i of a side.
template <int D>
__device__ __forceinline__ BlockPlace block_place(const EncodeCall& call, int side_index, int i) {
  const EncodeShape& s = call.shape;
  const EncodeSide& side = call.side[side_index];
  const int blocks = s.range.tokens / kBlockTokens, row = i / blocks;
  const int b = row / s.range.kv_heads, head = row % s.range.kv_heads;
  const int token = s.range.first_token + i % blocks * kBlockTokens;
  const BlockSide to =
      block_side(page_of(call.pages, s.format, b, head, token), s.format, side_index == 0, token);
  return {side.data + 2 * element_at(side.strides, b, head, token - s.data_first),
          side.offset ? side.offset + offset_at(side.spans, row, token, D) : nullptr, to.codes,
          (int)(to.scales - to.codes), 2 * head + side_index};
}

// Starts copying a block and its offset. token_bytes: from one token to the next.
template <int D>
__device__ __forceinline__ void ask_for_block(const BlockPlace& place, int64_t token_bytes, Stage<D>& stage,
                                              int lane) {
  const uchar* first = place.x + lane / 4 * 2 * token_bytes + lane % 4 * 16;
  const uchar* second = first + token_bytes;
#pragma unroll
  for (int i = 0; i < D / kSpan; i++) {
    copy_async_16(&stage.x[i][0][lane], first + i * 64);
    copy_async_16(&stage.x[i][1][lane], second + i * 64);
  }
  if (place.mu)
#pragma unroll
    for (int i = 0; i < D / 4; i += kSimd)
      if (i + lane < D / 4) copy_async_16(&stage.mu[i + lane], place.mu + 4 * (i + lane));
  copy_async_commit();
}

// (x − μ) · scale in fp16, four channels at a time: good to 2^-11 of itself, as fp16 input is.
template <class T>
struct Centring {
  __half2 scale;
  __device__ explicit Centring(float scale_) : scale(__float2half2_rn(scale_)) {}

  // −μ as the sum of two fp16 values.
  static __device__ __forceinline__ uint4 prepared(float4 mu) {
    const __half2 a = __floats2half2_rn(-mu.x, -mu.y), b = __floats2half2_rn(-mu.z, -mu.w);
    const float2 near_a = __half22float2(a), near_b = __half22float2(b);
    return {as_bits(a), as_bits(b), as_bits(__floats2half2_rn(-mu.x - near_a.x, -mu.y - near_a.y)),
            as_bits(__floats2half2_rn(-mu.z - near_b.x, -mu.w - near_b.y))};
  }
  __device__ __forceinline__ uint2 operator()(uint32_t x, uint32_t y, uint4 mu) const {
    return {as_bits(__hadd2(__hfma2(as_half2(x), scale, as_half2(mu.x)), as_half2(mu.z))),
            as_bits(__hadd2(__hfma2(as_half2(y), scale, as_half2(mu.y)), as_half2(mu.w)))};
  }
};

template <>
struct Centring<__nv_bfloat16> {
  float scale;
  __device__ explicit Centring(float scale_) : scale(scale_) {}

  static __device__ __forceinline__ uint4 prepared(float4 mu) {
    return {__float_as_uint(mu.x), __float_as_uint(mu.y), __float_as_uint(mu.z), __float_as_uint(mu.w)};
  }
  __device__ __forceinline__ uint32_t centred(uint32_t x, uint32_t mu0, uint32_t mu1) const {
    return as_bits(__floats2half2_rn(__fmaf_rn(__uint_as_float(x << 16), scale, -__uint_as_float(mu0)),
                                     __fmaf_rn(__uint_as_float(x & 0xffff0000u), scale, -__uint_as_float(mu1))));
  }
  __device__ __forceinline__ uint2 operator()(uint32_t x, uint32_t y, uint4 mu) const {
    return {centred(x, mu.x, mu.y), centred(y, mu.z, mu.w)};
  }
};

// Largest magnitudes so far of elements in even and odd places, as bits: those of NaN come last.
__device__ __forceinline__ void note_largest(uint4 x, uint32_t& largest) {
  for (uint32_t word : {x.x, x.y, x.z, x.w}) largest = __vmaxu2(largest, word & 0x7fff7fffu);
}

template <class T>
__device__ __forceinline__ uint32_t magnitude_bits(uint32_t largest) {
  const uint32_t bits = max(largest & 0xffff, largest >> 16);
  if constexpr (std::is_same_v<T, __half>) return __float_as_uint(__half2float(__ushort_as_half((ushort)bits)));
  return bits << 16;
}

// Prepares the offset for Centring by the power of two it returns, which brings the largest magnitude of x and μ to
// between 4 and 8: their differences are below 16, these rotated below 256, and what fp16 loses below is 2^-27 of the
// largest. Powers that fp16 does not hold are left out for fp16 input, which needs none.
template <class T, int D>
__device__ __forceinline__ float prepare_block(bool has_offset, Stage<D>& stage, uint32_t& largest, int lane) {
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < D / kSpan; i++) note_largest(stage.x[i][0][lane], own), note_largest(stage.x[i][1][lane], own);
  largest = __vmaxu2(largest, own);
  constexpr int kEach = (D / 4 + kSimd - 1) / kSimd;
  float4 mu[kEach];
  uint32_t bits = magnitude_bits<T>(own);
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const bool is_there = has_offset && lane + i * kSimd < D / 4;
    mu[i] = is_there ? *reinterpret_cast<const float4*>(&stage.mu[lane + i * kSimd]) : float4{};
    for (float x : {mu[i].x, mu[i].y, mu[i].z, mu[i].w}) bits = max(bits, __float_as_uint(fabsf(x)));
  }
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  const int exponent = (int)(__reduce_max_sync(0xffffffffu, bits) >> 23);  // of 2^0: 127
  const int power = max(min(129 - exponent, kIsHalf ? 15 : 120), kIsHalf ? -14 : -120);
  const float scale = __uint_as_float((uint32_t)(127 + power) << 23);
#pragma unroll
  for (int i = 0; i < kEach; i++)
    if (lane + i * kSimd < D / 4)
      stage.mu[lane + i * kSimd] =
          Centring<T>::prepared({mu[i].x * scale, mu[i].y * scale, mu[i].z * scale, mu[i].w * scale});
  __syncwarp();
  return scale;
}

// y = R (x − μ) · scale of the block in `stage`.
template <class T, int D>
__device__ __forceinline__ void rotate_block(const uint4* fragments, const Stage<D>& stage, float scale, Values<D>& v,
                                             int lane) {
  const Centring<T> centre(scale);
#pragma unroll
  for (int span = 0; span < D / kSpan; span++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) v.y[span][i][j] = 0.0f;
  constexpr int kUnroll = D > 128 ? 1 : D / kSpan;
#pragma unroll kUnroll
  for (int i = 0; i < D / kSpan; i++) {
    const uint4 x0 = stage.x[i][0][lane], x1 = stage.x[i][1][lane];
    const uint4 mu0 = stage.mu[i * 8 + lane % 4 * 2], mu1 = stage.mu[i * 8 + lane % 4 * 2 + 1];
    const uint2 low[2] = {centre(x0.x, x0.y, mu0), centre(x0.z, x0.w, mu1)};
    const uint2 high[2] = {centre(x1.x, x1.y, mu0), centre(x1.z, x1.w, mu1)};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t a[4] = {low[h].x, high[h].x, low[h].y, high[h].y};
#pragma unroll
      for (int span = 0; span < D / kSpan; span++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
          const uint4 r = fragments[fragment_index(D, span, 2 * i + h, part, lane)];
          mma(v.y[span][2 * part], a, r.x, r.y);
          mma(v.y[span][2 * part + 1], a, r.z, r.w);
        }
    }
  }
}

template <int D>
__device__ __forceinline__ void multiply(Values<D>& v, const float* lambda, int t) {
#pragma unroll
  for (int span = 0; span < D / kSpan; span++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 l = *reinterpret_cast<const float4*>(lambda + span * kSpan + half * 16 + 4 * t);
#pragma unroll
      for (int token = 0; token < 2; token++)
        v.at(span, token, 4 * half) *= l.x, v.at(span, token, 4 * half + 1) *= l.y,
            v.at(span, token, 4 * half + 2) *= l.z, v.at(span, token, 4 * half + 3) *= l.w;
    }
}

// Word of four codes, one a byte. Each is kRound + code, whose lowest byte is the code.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// From words of two tokens, four channels each, to those of two channels, tokens 4m … 4m+3 each, where m = g / 2: even
// g gets the first two channels, odd g the last two.
__device__ __forceinline__ uint2 turn_words(uint2 w, int g) {
  const bool odd = g % 2;
  const uint32_t own = __byte_perm(w.x, w.y, odd ? 0x7362 : 0x5140);
  const uint32_t other = __shfl_xor_sync(0xffffffffu, __byte_perm(w.x, w.y, odd ? 0x5140 : 0x7362), 4);
  return {__byte_perm(own, other, odd ? 0x1054 : 0x5410), __byte_perm(own, other, odd ? 0x3276 : 0x7632)};
}

// The words of every span; v holds kRound + stored code.
template <int Bits, int D>
__device__ __forceinline__ void store_words(bool is_k, Values<D>& v, uint8_t* codes, int lane) {
  const int g = lane / 4, t = lane % 4;
  uint8_t* to = codes + (is_k ? t * kRowBytes + g * 8 : g / 2 * kRowBytes + t * 16 + g % 2 * 8);
#pragma unroll
  for (int span = 0; span < D / kSpan; span++) {
    uint2 w[2];  // halves of the span
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const auto word = [&](int token) {
        return pack_bytes(v.at(span, token, 4 * half), v.at(span, token, 4 * half + 1), v.at(span, token, 4 * half + 2),
                          v.at(span, token, 4 * half + 3));
      };
      w[half] = {word(0), word(1)};
    }
    uint8_t* row = to + span * rows_per_span(Bits) * kRowBytes;
    if constexpr (Bits == 4) {
      const uint2 both = {w[0].x | w[1].x << 4, w[0].y | w[1].y << 4};
      *reinterpret_cast<uint2*>(row) = is_k ? both : turn_words(both, g);
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint2*>(row + half * 4 * kRowBytes) = is_k ? w[half] : turn_words(w[half], g);
    }
  }
}

template <int Bits, int D>
__device__ __forceinline__ void code_and_store(const Coding& coding, Values<D>& v, const BlockPlace& place, int lane) {
  code_block<Bits>(coding, v, place.codes + place.scales, lane);
  store_words<Bits>(place.head % 2 == 0, v, place.codes, lane);
}

__device__ __forceinline__ int take_next(int& next, int lane) {
  int n = 0;
  if (lane == 0) n = atomicAdd(&next, 1);
  return __shfl_sync(0xffffffffu, n, 0);
}

// A warp's part of the first `count` places. While it codes a block, the next one is on its way. Warps take turns as
// they come: the scheduler prefers some, and equal shares would leave the others alone at the end.
template <class T, int D>
__device__ __forceinline__ void encode_places(const EncodeCall& call, EncodeMemory<D>& memory, int count, int first_side,
                                              uint32_t& largest) {
  const int lane = threadIdx.x % kSimd;
  Stage<D>& stage = memory.stages[threadIdx.x / kSimd];
  const auto ask = [&](int n) {
    const BlockPlace& place = memory.places[n];
    ask_for_block(place, 2 * call.side[place.head % 2].strides.token, stage, lane);
  };
  int n = take_next(memory.next, lane);
  if (n < count) ask(n);
  while (n < count) {
    const BlockPlace place = memory.places[n];
    const int side_index = place.head % 2;
    const EncodeSide& side = call.side[side_index];
    copy_async_wait(0);
    const int next = take_next(memory.next, lane);
    const float scale = prepare_block<T>(place.mu != nullptr, stage, largest, lane);
    Values<D> v;
    rotate_block<T>(memory.fragments[kSides<D> == 2 ? side_index - first_side : 0], stage, scale, v, lane);
    __syncwarp();  // the offset is no longer read
    if (next < count) ask(next);
    if (side.lambda) multiply(v, side.lambda + (int64_t)(place.head / 2) * D, lane % 4);
    const Coding coding(side_index ? call.shape.format.v : call.shape.format.k, side.factors,
                        call.candidates[side_index], scale, lane);
    if (coding.f.bits == 4)
      code_and_store<4>(coding, v, place, lane);
    else
      code_and_store<8>(coding, v, place, lane);
    n = next;
  }
}

template <class T, int D>
__device__ __forceinline__ void encode_whole_blocks(const EncodeCall& call, EncodeMemory<D>& memory) {
  const Share share = share_of<D>(call.shape.range);
  const int first_side = share.count[0] ? 0 : 1, all = share.count[0] + share.count[1];
#pragma unroll
  for (int i = 0; i < kSides<D>; i++)
    if (first_side + i < 2 && share.count[first_side + i])
      for (int j = threadIdx.x; j < (int)fragment_count(D); j += blockDim.x)
        memory.fragments[i][j] = call.fragments[first_side + i][j];
  uint32_t largest = 0;
  for (int from = 0; from < all; from += kPlaces) {
    __syncthreads();  // the places before these are no longer read
    const int count = min(kPlaces, all - from);
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
      const int i = from + n, side = i < share.count[0] ? 0 : 1;
      memory.places[n] = block_place<D>(call, side, share.first[side] + i - (side ? share.count[0] : 0));
    }
    if (threadIdx.x == 0) memory.next = 0;
    __syncthreads();
    encode_places<T>(call, memory, count, first_side, largest);
  }
  if (max(largest & 0xffff, largest >> 16) > call.limit_bits) *call.bad = 1;
}

template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps<D>* kSimd, 1) encode_kernel(const __grid_constant__ EncodeCall call) {
  encode_whole_blocks<T>(call, *shared_memory<EncodeMemory<D>>());
}

}  // namespace halfbyte::gpu
