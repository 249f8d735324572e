// Whole blocks of K and V become codes with tensor cores: a warp takes a block of 16 tokens, from its offset and
// rotation to scales, search and packing. Four warps, a team, take a tile of four blocks of one side: a warpgroup,
// which reads R once, where there are such products.
//
// The columns of R are dealt so that a thread has tokens 2g, 2g+1 at the channels that Values says: all of a group of
// 32 at head size 128, and whole words of a K block, or of a V block after one exchange of bytes.
#pragma once

#include "cuda/scales.cuh"

namespace halfbyte::gpu {

constexpr int kTeamWarps = 4;  // a team takes a tile
// Warps of a thread block, as many as registers hold: one thread block fills a multiprocessor.
template <int D>
constexpr int kEncodeWarps = D == 64    ? 20
                             : D == 128 ? 12
                                        : 8;
constexpr int kTerms = 2;  // of R, in fp16: together 22 bits
// Whether a thread block has one side alone, and the second term of R comes part by part for each tile: shared memory
// holds both terms of both sides only up to 64 KB each.
template <int D>
constexpr bool kStreams = D > 128;
constexpr int kParts = 4;     // that a team has room for: steps of that term
constexpr int kPlaces = 512;  // blocks whose places are found at a time

struct EncodeCall {
  EncodeShape shape;
  EncodeSide side[2];  // K, V
  Coding coding[2];
  Pages pages;
  gpu_global const uint4* fragments[2];       // R, see fragment_index
  gpu_global const float* rotated_offset[2];  // R mu, in the order of EncodeSide::offset, or null
  uint32_t limit_bits;                        // the largest codable element, as bits of its dtype
  int* bad;                                   // set to 1 if a value can not be coded
};

// R as B of products: [terms][d / 16 steps], then for each step [2 halves][d columns] of 8 elements that are summed
// over.
HALFBYTE_INLINE constexpr int fragment_index(int d, int step, int half, int column) {
  return (step * 2 + half) * d + column;
}
template <int D>
constexpr int kTermFragments = fragment_index(D, D / 16, 0, 0);
template <int D>
constexpr int kPartFragments = fragment_index(D, 1, 0, 0);

// Where a block comes from and goes to.
struct BlockPlace {
  const uchar* x;   // its first token
  const float* mu;  // R mu; null where there is no offset
  uchar* codes;     // null: the block is one of another warp's, which makes a tile complete
  int scales;       // from `codes` on
  int head;         // and half of it: the side, 0 for K
};

// What a warp stages: the next block, its even tokens and its odd ones, and its rotated offset.
template <int D>
struct Stage {
  uint4 x[2][kBlockTokens / 2][D / 8];  // see stage_slot
  float4 mu[D / 4 + D / kSpan];         // see mu_at
};

// Where channels 8i … 8i + 7 of token 2g or 2g + 1 lie: those of eight tokens are in different banks.
__device__ __forceinline__ int stage_slot(int i, int g) { return i ^ g; }

// Where channels 4i … 4i + 3 of an offset lie: the threads of different t find theirs in different banks.
__device__ __forceinline__ int mu_at(int i) { return i + i / 8; }

// Shared memory of a thread block.
template <int D>
struct EncodeMemory {
  uint4 fragments[kStreams<D> ? 1 : 2][(kStreams<D> ? 1 : kTerms) * kTermFragments<D>];  // first terms, or R, of sides
  Stage<D> stages[kEncodeWarps<D>];
  BlockPlace places[kPlaces];
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
  const int g = lane / 4, t = lane % 4;
  const uchar* first = place.x + 2 * g * token_bytes + t * 16;
#pragma unroll
  for (int i = 0; i < D / 8; i += 4)
#pragma unroll
    for (int odd = 0; odd < 2; odd++)
      copy_async_16(&stage.x[odd][g][stage_slot(i + t, g)], first + odd * token_bytes + i * 16);
  if (place.mu)
#pragma unroll
    for (int i = 0; i < D / 4; i += kSimd)
      if (i + lane < D / 4) copy_async_16_cached(&stage.mu[mu_at(i + lane)], place.mu + 4 * (i + lane));
  copy_async_commit();
}

// Of elements so far, those in even and odd places, as bits: the largest of positive ones, and the largest magnitude of
// negative ones unless there are none. NaN comes last.
struct Largest {
  uint32_t positive = 0, negative = 0;

  __device__ __forceinline__ void note(uint32_t a, uint32_t b) {
    positive = __vimax3_s16x2(positive, a, b), negative = __vimax3_u16x2(negative, a, b);
  }
  __device__ __forceinline__ uint32_t magnitude() const {
    const uint32_t both = __vmaxu2(positive, negative & 0x7fff7fffu);
    return max(both & 0xffff, both >> 16);
  }
};

// A block's elements in fp16, as a product takes them.
template <int D>
struct Rows {
  uint32_t a[D / 16][4];
};

// Loads a staged block, notes its largest element and returns the power of two that its values are multiplied by, which
// the warp's lanes agree on: bf16's largest comes to between 4 and 8, so that fp16 holds all but what is below 2^-27 of
// it.
template <class T, int D>
__device__ __forceinline__ float load_block(const Stage<D>& stage, Rows<D>& x, Largest& largest, int lane) {
  const int matrix = lane / 8, row = lane % 8;
  Largest own;
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    load_matrices(x.a[i], &stage.x[matrix % 2][row][stage_slot(2 * i + matrix / 2, row)]);
    own.note(x.a[i][0], x.a[i][1]), own.note(x.a[i][2], x.a[i][3]);
  }
  largest.note(own.positive, own.negative);
  if constexpr (std::is_same_v<T, __half>) return 1.0f;
  const int exponent = (int)(__reduce_max_sync(0xffffffffu, own.magnitude()) >> 7);  // of 2^0: 127
  const float scale = __uint_as_float((uint32_t)(127 + max(min(129 - exponent, 120), -120)) << 23);
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (uint32_t& pair : x.a[i])
      pair =
          as_bits(__floats2half2_rn(__uint_as_float(pair << 16) * scale, __uint_as_float(pair & 0xffff0000u) * scale));
  return scale;
}

// Where the sum of a rotated block starts: −R mu · scale.
template <int D>
__device__ __forceinline__ void start_block(bool has_offset, const Stage<D>& stage, float scale, Values<D>& v, int t) {
#pragma unroll
  for (int row = 0; row < Values<D>::kRows; row++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 mu = has_offset ? stage.mu[mu_at(Values<D>::first_channel(t, row) / 4 + 4 * half)] : float4{};
#pragma unroll
      for (int token = 0; token < 2; token++) {
        const int i = row * 8 + half * 4;
        v.at(token, i) = mu.x * -scale, v.at(token, i + 1) = mu.y * -scale;
        v.at(token, i + 2) = mu.z * -scale, v.at(token, i + 3) = mu.w * -scale;
      }
    }
}

// Adds x, from step `first` on, times `Steps` steps of `Terms` terms of R. Of a warpgroup, where it multiplies as one:
// the sums are there after product_wait.
template <int D, int Steps, int Terms>
__device__ __forceinline__ void add_product(const uint4* fragments, const Rows<D>& x, int first, Values<D>& v,
                                            int lane) {
  constexpr int kColumns = D == 64 ? 64 : 128;  // of a product
  if constexpr (kWarpgroupProducts) {
    const MatrixPlace matrix = matrix_place(fragments, fragment_index(D, 0, 1, 0) * 16);
    product_start(v.y);
#pragma unroll
    for (int i = 0; i < Steps * Terms; i++)
#pragma unroll
      for (int column = 0; column < D; column += kColumns)
        warpgroup_mma(reinterpret_cast<float (&)[kColumns / 8][4]>(v.y[column / 8]), x.a[first + i % Steps],
                      matrix_behind(matrix, fragment_index(D, i, 0, column) * 16));
    product_commit();
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(fragments) + lane;  // of columns g: 2t, 2t+1
#pragma unroll
    for (int i = 0; i < Steps * Terms; i++)
#pragma unroll
      for (int column = 0; column < D; column += 8)
        mma(v.y[column / 8], x.a[first + i % Steps], words[fragment_index(D, i, 0, column) * 4],
            words[fragment_index(D, i, 1, column) * 4]);
  }
}

template <int D>
__device__ __forceinline__ void multiply(Values<D>& v, const float* lambda, int t) {
#pragma unroll
  for (int row = 0; row < Values<D>::kRows; row++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 l = *reinterpret_cast<const float4*>(lambda + Values<D>::first_channel(t, row) + 16 * half);
#pragma unroll
      for (int token = 0; token < 2; token++) {
        const int i = row * 8 + half * 4;
        v.at(token, i) *= l.x, v.at(token, i + 1) *= l.y, v.at(token, i + 2) *= l.z, v.at(token, i + 3) *= l.w;
      }
    }
}

// Of two rows the words of a thread's two tokens, four channels each. Gives those of one row's four channels, tokens
// 4m … 4m+3 each, where m = g / 2: the first row's to even g, the second's to odd g.
__device__ __forceinline__ uint4 turn_words(uint2 first, uint2 second, int g) {
  const bool odd = g % 2;
  const uint2 keep = odd ? second : first, give = odd ? first : second;
  const uint32_t own01 = __byte_perm(keep.x, keep.y, 0x5140), own23 = __byte_perm(keep.x, keep.y, 0x7362);
  const uint32_t got01 = __shfl_xor_sync(0xffffffffu, __byte_perm(give.x, give.y, 0x5140), 4);
  const uint32_t got23 = __shfl_xor_sync(0xffffffffu, __byte_perm(give.x, give.y, 0x7362), 4);
  const uint32_t low = odd ? 0x1054 : 0x5410, high = odd ? 0x3276 : 0x7632;
  return {__byte_perm(own01, got01, low), __byte_perm(own01, got01, high), __byte_perm(own23, got23, low),
          __byte_perm(own23, got23, high)};
}

// v holds stored codes, as bits, but for the bounds.
template <int Bits, int D>
__device__ __forceinline__ void store_words(bool is_k, Values<D>& v, uint8_t* codes, int lane) {
  const int g = lane / 4, t = lane % 4;
  const auto code = [&](int token, int i) { return (int)__float_as_uint(v.at(token, i)); };
  const auto nibbles = [&](int token, int i) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 3; j >= 0; j--) word = pack_nibbles(code(token, i + 4 + j), code(token, i + j), word);
    return word;
  };
  const auto bytes = [&](int token, int i) {
    return pack_bytes(code(token, i + 1), code(token, i), pack_bytes(code(token, i + 3), code(token, i + 2), 0));
  };
  constexpr int kHalves = Bits == 4 ? 1 : 2;  // of a row, whose words are stored apart
#pragma unroll
  for (int row = 0; row < Values<D>::kRows; row += 2) {
    const int channel = Values<D>::first_channel(t, row);
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
      uint2 w[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = (row + i) * 8 + half * 4;
        if constexpr (Bits == 4)
          w[i] = {nibbles(0, at), nibbles(1, at)};
        else
          w[i] = {bytes(0, at), bytes(1, at)};
      }
      if (is_k) {
        uint8_t* to = codes + k_code_place(Bits, 2 * g, channel + 16 * half).byte;
        *reinterpret_cast<uint2*>(to) = w[0], *reinterpret_cast<uint2*>(to + kRowBytes) = w[1];
      } else {
        uint8_t* to = codes + v_code_place(Bits, g / 2 * 4, channel + g % 2 * 4 + 16 * half).byte;
        *reinterpret_cast<uint4*>(to) = turn_words(w[0], w[1], g);
      }
    }
  }
}

template <int D>
__device__ __forceinline__ void code_rotated(const EncodeCall& call, const BlockPlace& place, float scale, Values<D>& v,
                                             int lane) {
  const int side = place.head % 2;
  const Coding& coding = call.coding[side];
  if (call.side[side].lambda) multiply(v, call.side[side].lambda + (int64_t)(place.head / 2) * D, lane % 4);
  if (coding.bits == 4) {
    code_block<4>(coding, scale, v, place.codes + place.scales, lane);
    store_words<4>(side == 0, v, place.codes, lane);
  } else {
    code_block<8>(coding, scale, v, place.codes + place.scales, lane);
    store_words<8>(side == 0, v, place.codes, lane);
  }
}

// Adds x times R, of which one term is in shared memory, and the other comes part by part to where the team's four
// blocks were staged, whose elements are in registers by now: others are on their way while it multiplies by one.
template <int D>
__device__ __forceinline__ void add_streamed_product(const uint4* first_term, gpu_global const uint4* second_term,
                                                     Stage<D>* stages, const Rows<D>& x, Values<D>& v, int team,
                                                     int lane) {
  static_assert(kTeamWarps * sizeof(Stage<D>) >= kParts * kPartFragments<D> * sizeof(uint4));
  uint4* parts = reinterpret_cast<uint4*>(stages);
  const auto ask = [&](int i) {
    if (i < D / 16)
#pragma unroll
      for (int j = 0; j < kPartFragments<D>; j += kTeamWarps * kSimd) {
        const int at = j + threadIdx.x % (kTeamWarps * kSimd);
        copy_async_16(parts + i % kParts * kPartFragments<D> + at, second_term + i * kPartFragments<D> + at);
      }
    copy_async_commit();
  };
  team_barrier(team);  // the blocks are no longer read
#pragma unroll
  for (int i = 0; i + 1 < kParts; i++) ask(i);
  add_product<D, D / 16, 1>(first_term, x, 0, v, lane);
  product_wait(v.y);
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    copy_async_wait(kParts - 2);
    fence_for_products();
    team_barrier(team);  // the part is there, and the one before is no longer read
    ask(i + kParts - 1);
    add_product<D, 1, 1>(parts + i % kParts * kPartFragments<D>, x, i, v, lane);
    product_wait(v.y);
  }
  team_barrier(team);  // the parts are no longer read
}

// A team's part of the first `tiles` tiles of places. While it codes one, the next one is on its way.
template <class T, int D>
__device__ __forceinline__ void encode_places(const EncodeCall& call, EncodeMemory<D>& memory, int tiles,
                                              gpu_global const uint4* second_term, Largest& largest) {
  constexpr int kTeams = kEncodeWarps<D> / kTeamWarps;
  const int lane = threadIdx.x % kSimd, warp = warp_number(), team = warp / kTeamWarps;
  Stage<D>& stage = memory.stages[warp];
  const BlockPlace* places = memory.places + warp % kTeamWarps;
  if (team < tiles) ask_for_block(call, places[team * kTeamWarps], stage, lane);
  copy_async_wait(team < tiles);
  fence_for_products();
  __syncthreads();  // R is there
  for (int n = team; n < tiles; n += kTeams) {
    const BlockPlace place = places[n * kTeamWarps];
    copy_async_wait(0);
    __syncwarp();  // the others' part of the block is there as well
    Values<D> v;
    Rows<D> x;
    const float scale = load_block<T>(stage, x, largest, lane);
    start_block(place.mu != nullptr, stage, scale, v, lane % 4);
    if constexpr (kStreams<D>) {
      add_streamed_product(memory.fragments[0], second_term, &stage - warp % kTeamWarps, x, v, team, lane);
    } else {
      add_product<D, D / 16, kTerms>(memory.fragments[place.head % 2], x, 0, v, lane);
      __syncwarp();  // the block is no longer read
    }
    if (n + kTeams < tiles) ask_for_block(call, places[(n + kTeams) * kTeamWarps], stage, lane);
    if constexpr (!kStreams<D>) product_wait(v.y);
    if (place.codes) code_rotated(call, place, scale, v, lane);
  }
}

template <class T, int D>
__device__ __forceinline__ void encode_whole_blocks(const EncodeCall& call, EncodeMemory<D>& memory) {
  const Share share = share_of<D>(call.shape.range);
  const auto tiles_of = [&](int side) { return (share.count[side] + kTeamWarps - 1) / kTeamWarps; };
  const int all = tiles_of(0) + tiles_of(1);
  const auto ask_for_fragments = [&](int side, int slot) {
    constexpr int kCount = sizeof(memory.fragments[0]) / sizeof(uint4);
    for (int j = threadIdx.x; j < kCount; j += blockDim.x)
      copy_async_16(&memory.fragments[slot][j], call.fragments[side] + j);
  };
  const int first_side = share.count[0] ? 0 : 1;
  if (kStreams<D>) {
    ask_for_fragments(first_side, 0);
  } else {
    if (share.count[0]) ask_for_fragments(0, 0);
    if (share.count[1]) ask_for_fragments(1, 1);
  }
  copy_async_commit();
  Largest largest;
  for (int from = 0; from < all; from += kPlaces / kTeamWarps) {
    __syncthreads();  // the places before these are no longer read
    const int tiles = min(kPlaces / kTeamWarps, all - from);
    for (int n = threadIdx.x; n < tiles * kTeamWarps; n += blockDim.x) {
      const int i = from * kTeamWarps + n, side = i < tiles_of(0) * kTeamWarps ? 0 : 1;
      const int of_side = side ? i - tiles_of(0) * kTeamWarps : i, last = share.count[side] - 1;
      memory.places[n] = block_place<D>(call, side, share.first[side] + min(of_side, last));
      if (of_side > last) memory.places[n].codes = nullptr;
    }
    __syncthreads();
    encode_places<T>(call, memory, tiles, call.fragments[first_side] + kTermFragments<D>, largest);
  }
  if (largest.magnitude() > call.limit_bits) *call.bad = 1;
}

template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps<D>* kSimd, 1) encode_kernel(const __grid_constant__ EncodeCall call) {
  encode_whole_blocks<T>(call, *shared_memory<EncodeMemory<D>>());
}

}  // namespace halfbyte::gpu
