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
constexpr int kEncodeWarps = D == 64    ? 20
                             : D == 128 ? 12
                                        : 8;
constexpr int kTerms = 2;  // of R, in fp16: together 22 bits
// Whether R comes part by part for each round of blocks: shared memory holds it for both sides only up to 64 KB each.
template <int D>
constexpr bool kStreams = D > 128;
constexpr int kPlaces = 512;  // blocks whose places are found at a time

struct EncodeCall {
  EncodeShape shape;
  EncodeSide side[2];                    // K, V
  Candidate candidates[2][kSearchSize];  // those of side.factors
  Pages pages;
  gpu_global const uint4* fragments[2];       // R, see fragment_index
  gpu_global const float* rotated_offset[2];  // R mu, in the order of EncodeSide::offset, or null
  uint32_t limit_bits;                        // the largest codable element, as bits of its dtype
  int* bad;                                   // set to 1 if a value can not be coded
};

// R in the order in which threads read it: [d / 32 parts, by channels of x][2 steps][terms][d / 32 spans][2 halves of
// a span][32 lanes] of 16 bytes.
HALFBYTE_INLINE constexpr size_t fragment_index(int d, int step, int term, int span, int half, int lane) {
  return ((((size_t)step * kTerms + term) * (d / kSpan) + span) * 2 + half) * kSimd + lane;
}
template <int D>
constexpr int kFragments = (int)fragment_index(D, D / 16, 0, 0, 0, 0);
template <int D>
constexpr int kPartFragments = (int)fragment_index(D, 2, 0, 0, 0, 0);

// The channel of x that a thread holds as number i (0 … 3) of step `step` of the product.
HALFBYTE_INLINE int input_channel(int step, int t, int i) { return step / 2 * 32 + t * 8 + step % 2 * 4 + i; }

// Where a block comes from and goes to.
struct BlockPlace {
  const uchar* x;   // its first token
  const float* mu;  // R mu; null where there is no offset
  uchar* codes;
  int scales;  // from `codes` on
  int head;    // and half of it: the side, 0 for K
};

// What a warp stages: the next block, each lane's own parts, channels 32i + 8t … + 7 of tokens 2g and 2g+1, and its
// rotated offset.
template <int D>
struct Stage {
  uint4 x[D / kSpan][2][kSimd];
  float4 mu[D / 4];
};

// Shared memory of a thread block.
template <int D>
struct EncodeMemory {
  uint4 fragments[2][kStreams<D> ? kPartFragments<D> : kFragments<D>];  // of both sides, or two parts in turn
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
  const bool both = !kStreams<D> && 2 * all >= (int)gridDim.x * kEncodeWarps<D>;
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
  const BlockSide to = block_side(page_of(call.pages, s.format, b, head, token), s.format, side_index == 0, token);
  const float* mu = call.rotated_offset[side_index];
  return {side.data + 2 * element_at(side.strides, b, head, token - s.data_first),
          mu ? mu + offset_at(side.spans, row, token, D) : nullptr, to.codes, (int)(to.scales - to.codes),
          2 * head + side_index};
}

// Starts copying a block and its offset.
template <int D>
__device__ __forceinline__ void ask_for_block(const EncodeCall& call, const BlockPlace& place, Stage<D>& stage,
                                              int lane) {
  const int64_t token_bytes = 2 * call.side[place.head % 2].strides.token;
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

// Two elements times a power of two in fp16.
template <class T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t x, float scale) {
  if constexpr (std::is_same_v<T, __half>) return as_bits(__hmul2(as_half2(x), __float2half2_rn(scale)));
  return as_bits(__floats2half2_rn(__uint_as_float(x << 16) * scale, __uint_as_float(x & 0xffff0000u) * scale));
}

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

// A power of two, as the warp's lanes agree, that brings the largest magnitude to between 4 and 8. Those that fp16 does
// not hold are left out for fp16 input, which needs none.
template <class T>
__device__ __forceinline__ float scale_for(uint32_t bits) {
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  const int exponent = (int)(__reduce_max_sync(0xffffffffu, bits) >> 23);  // of 2^0: 127
  const int power = max(min(129 - exponent, kIsHalf ? 15 : 120), kIsHalf ? -14 : -120);
  return __uint_as_float((uint32_t)(127 + power) << 23);
}

// Notes the largest element of a block and returns the power of two that its values are multiplied by, so that fp16
// holds what bf16 does but for what is below 2^-27 of the largest.
template <class T, int D>
__device__ __forceinline__ float prepare_block(const Stage<D>& stage, uint32_t& largest, int lane) {
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < D / kSpan; i++) note_largest(stage.x[i][0][lane], own), note_largest(stage.x[i][1][lane], own);
  largest = __vmaxu2(largest, own);
  return scale_for<T>(magnitude_bits<T>(own));
}

// Where the sum of a rotated block starts: −R mu · scale.
template <int D>
__device__ __forceinline__ void start_block(bool has_offset, const Stage<D>& stage, float scale, Values<D>& v, int t) {
#pragma unroll
  for (int span = 0; span < D / kSpan; span++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 mu = has_offset ? stage.mu[span * 8 + half * 4 + t] : float4{};
#pragma unroll
      for (int token = 0; token < 2; token++)
        v.at(span, token, 4 * half) = mu.x * -scale, v.at(span, token, 4 * half + 1) = mu.y * -scale,
                              v.at(span, token, 4 * half + 2) = mu.z * -scale,
                              v.at(span, token, 4 * half + 3) = mu.w * -scale;
    }
}

// Adds R's part for channels 32i … 32i + 31 of x.
template <class T, int D>
__device__ __forceinline__ void add_product(const uint4* part, const Stage<D>& stage, int i, float scale, Values<D>& v,
                                            int lane) {
  const uint4 x0 = stage.x[i][0][lane], x1 = stage.x[i][1][lane];
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const uint32_t a[4] = {scaled_pair<T>(step ? x0.z : x0.x, scale), scaled_pair<T>(step ? x1.z : x1.x, scale),
                           scaled_pair<T>(step ? x0.w : x0.y, scale), scaled_pair<T>(step ? x1.w : x1.y, scale)};
#pragma unroll
    for (int term = 0; term < kTerms; term++)
#pragma unroll
      for (int span = 0; span < D / kSpan; span++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint4 r = part[fragment_index(D, step, term, span, half, lane)];
          mma(v.y[span][2 * half], a, r.x, r.y);
          mma(v.y[span][2 * half + 1], a, r.z, r.w);
        }
  }
}

// Starts copying part i of R, which all threads do together.
template <int D>
__device__ __forceinline__ void ask_for_part(gpu_global const uint4* fragments, int i, EncodeMemory<D>& memory) {
  const uint4* from = fragments + i * kPartFragments<D>;
  for (int j = threadIdx.x; j < kPartFragments<D>; j += blockDim.x)
    copy_async_16(&memory.fragments[i % 2][j], from + j);
  copy_async_commit();
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

template <int D>
__device__ __forceinline__ void code_rotated(const EncodeCall& call, const BlockPlace& place, float scale, Values<D>& v,
                                             int lane) {
  const int side_index = place.head % 2;
  const EncodeSide& side = call.side[side_index];
  if (side.lambda) multiply(v, side.lambda + (int64_t)(place.head / 2) * D, lane % 4);
  const Coding coding(side_index ? call.shape.format.v : call.shape.format.k, side.factors, call.candidates[side_index],
                      scale, lane);
  if (coding.f.bits == 4)
    code_and_store<4>(coding, v, place, lane);
  else
    code_and_store<8>(coding, v, place, lane);
}

// A warp's part of the first `count` places. While it codes a block, the next one is on its way. Warps take turns as
// they come: the scheduler prefers some, and equal shares would leave the others alone at the end.
template <class T, int D>
__device__ __forceinline__ void encode_places(const EncodeCall& call, EncodeMemory<D>& memory, int count,
                                              uint32_t& largest) {
  const int lane = threadIdx.x % kSimd;
  Stage<D>& stage = memory.stages[threadIdx.x / kSimd];
  int n = take_next(memory.next, lane);
  if (n < count) ask_for_block(call, memory.places[n], stage, lane);
  while (n < count) {
    const BlockPlace place = memory.places[n];
    copy_async_wait(0);
    const int next = take_next(memory.next, lane);
    __syncwarp();  // the others' part of the offset is there as well
    const float scale = prepare_block<T>(stage, largest, lane);
    Values<D> v;
    start_block(place.mu != nullptr, stage, scale, v, lane % 4);
#pragma unroll
    for (int i = 0; i < D / kSpan; i++)
      add_product<T>(memory.fragments[place.head % 2] + i * kPartFragments<D>, stage, i, scale, v, lane);
    __syncwarp();  // the offset is no longer read
    if (next < count) ask_for_block(call, memory.places[next], stage, lane);
    code_rotated(call, place, scale, v, lane);
    n = next;
  }
}

// The same in rounds, as R comes in parts that all warps wait for: one is on its way while they multiply by another.
template <class T, int D>
__device__ __forceinline__ void encode_in_rounds(const EncodeCall& call, EncodeMemory<D>& memory, int count,
                                                 gpu_global const uint4* fragments, uint32_t& largest) {
  const int lane = threadIdx.x % kSimd;
  Stage<D>& stage = memory.stages[threadIdx.x / kSimd];
  int n = threadIdx.x / kSimd;
  if (n < count) ask_for_block(call, memory.places[n], stage, lane);
  ask_for_part(fragments, 0, memory);
  for (int first = 0; first < count; first += kEncodeWarps<D>) {
    const BlockPlace place = memory.places[min(n, count - 1)];
    float scale = 1.0f;
    Values<D> v;
#pragma unroll 1
    for (int i = 0; i < D / kSpan; i++) {
      copy_async_wait(0);
      __syncthreads();  // the part is there, and the one before is no longer read
      const bool last = i + 1 == D / kSpan;
      if (!last || first + kEncodeWarps<D> < count) ask_for_part(fragments, last ? 0 : i + 1, memory);
      if (i == 0) {
        if (n < count) scale = prepare_block<T>(stage, largest, lane);
        start_block(place.mu != nullptr, stage, scale, v, lane % 4);
      }
      add_product<T>(memory.fragments[i % 2], stage, i, scale, v, lane);
    }
    const bool more = n + kEncodeWarps<D> < count;
    __syncwarp();  // the offset is no longer read
    if (more) ask_for_block(call, memory.places[n + kEncodeWarps<D>], stage, lane);
    if (n < count) code_rotated(call, place, scale, v, lane);
    n += kEncodeWarps<D>;
  }
}

template <class T, int D>
__device__ __forceinline__ void encode_whole_blocks(const EncodeCall& call, EncodeMemory<D>& memory) {
  const Share share = share_of<D>(call.shape.range);
  const int all = share.count[0] + share.count[1];
  if constexpr (!kStreams<D>)
#pragma unroll
    for (int side = 0; side < 2; side++)
      if (share.count[side])
        for (int j = threadIdx.x; j < kFragments<D>; j += blockDim.x)
          memory.fragments[side][j] = call.fragments[side][j];
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
    if constexpr (kStreams<D>)
      encode_in_rounds<T>(call, memory, count, call.fragments[share.count[0] ? 0 : 1], largest);
    else
      encode_places<T>(call, memory, count, largest);
  }
  if (max(largest & 0xffff, largest >> 16) > call.limit_bits) *call.bad = 1;
}

template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps<D>* kSimd, 1) encode_kernel(const __grid_constant__ EncodeCall call) {
  encode_whole_blocks<T>(call, *shared_memory<EncodeMemory<D>>());
}

}  // namespace halfbyte::gpu
