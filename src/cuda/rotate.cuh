// Rotation of a row tile by tensor cores: queries to code domain, results back.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/work.cuh"

namespace halfbyte::gpu {

// The matrix as A of the product, in the order in which threads read it: [d / 16 tiles of 16 results][d / 16 steps of
// 16 that are summed over][32 lanes] of 16 bytes. It is in fp16, and R of K once more as what that leaves: errors of
// queries come back as relative errors of weights, as many times larger as scores are.
HALFBYTE_INLINE constexpr int fragment_at(int d, int tile, int step, int lane) {
  return (tile * (d / 16) + step) * kSimd + lane;
}

constexpr int kQueryTerms = 2;

// Which element of the matrix a lane holds as number e (0 … 7) of a fragment: row and column.
struct Element {
  int row, column;
};

// K: R by queries as 16-byte loads bring them; scores want four neighbouring channels as pairs of every other one.
HALFBYTE_INLINE Element query_element(int tile, int step, int lane, int e) {
  const int g = lane / 4, t = lane % 4, reg = e / 2;
  return {16 * tile + 4 * (g / 2) + g % 2 + 2 * (reg % 2), step / 2 * 32 + t * 8 + step % 2 * 4 + reg / 2 * 2 + e % 2};
}

// V: the transpose of R, so that a thread has two neighbouring channels of the result.
HALFBYTE_INLINE Element result_element(int tile, int step, int lane, int e) {
  const int g = lane / 4, t = lane % 4, reg = e / 2;
  return {16 * tile + 2 * g + reg % 2, 16 * step + reg / 2 * 8 + 2 * t + e % 2};
}

// A tile's fragments on their way from memory.
template <int D>
__device__ __forceinline__ void load_fragments(const uint4* fragments, int tile, int lane, uint4 a[D / 16]) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) a[step] = fragments[fragment_at(D, tile, step, lane)];
}

// Adds 16 results by 8 rows to c. b: [D / 16] of the rows.
template <int D>
__device__ __forceinline__ void multiply_tile(const uint4 a[D / 16], const uint2 b[D / 16], float c[4]) {
  float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two sums, neither of which waits for the other
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    const uint32_t words[4] = {a[step].x, a[step].y, a[step].z, a[step].w};
    mma(step % 2 ? odd : c, words, b[step].x, b[step].y);
  }
  for (int j = 0; j < 4; j++) c[j] += odd[j];
}

// ---- Queries

// A thread's part of its row g of queries as they are: channels 32p + 8t … + 7 in words[p]. Zeros where there is no
// row.
template <int D>
struct QueryRow {
  uint4 words[D / 32];
};

template <int D>
__device__ __forceinline__ QueryRow<D> load_row(const AttendCall& call, int b, int head, int tile, int lane) {
  const AttendShape& s = call.shape;
  const int g = lane / 4, t = lane % 4, row = tile * kTileRows + g;
  const QueryPlace place = query_place(s, row);
  const uchar* from = call.buffers.q + 2 * element_at(s.q_strides, b, head * s.group + place.head, place.query);
  QueryRow<D> out;
#pragma unroll
  for (int p = 0; p < D / 32; p++)
    out.words[p] = row < rows_of(s) ? *reinterpret_cast<const uint4*>(from + 2 * (32 * p + 8 * t)) : uint4{0, 0, 0, 0};
  return out;
}

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// Of the row that four neighbouring lanes hold: an exponent that brings its largest element near 1.
template <int D>
__device__ __forceinline__ int row_exponent(const QueryRow<D>& row, int dtype) {
  uint32_t most = 0;  // of elements in even and odd places, as bits
#pragma unroll
  for (int p = 0; p < D / 32; p++)
#pragma unroll
    for (int i = 0; i < 4; i++) most = __vmaxu2(most, word_of(row.words[p], i) & 0x7fff7fff);
  for (int mask = 1; mask < 4; mask <<= 1) most = __vmaxu2(most, __shfl_xor_sync(0xffffffffu, most, mask));
  const uint32_t bits = max(most & 0xffff, most >> 16);
  const float largest = dtype == kBfloat16 ? bits_as_float(bits << 16) : half_bits_to_float((ushort)bits);
  return min(max((int)(float_as_bits(largest) >> 23) - 127, -100), 100);
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float((uint32_t)(exponent + 127) << 23);
}

// The row as B of a product, times `unit`.
template <int D>
__device__ __forceinline__ void unit_row(const QueryRow<D>& row, int dtype, float unit, uint2 out[D / 16]) {
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t pair[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t word = word_of(row.words[step / 2], step % 2 * 2 + i);
      const float2 x = dtype == kBfloat16 ? float2{bits_as_float(word << 16), bits_as_float(word & 0xffff0000u)}
                                          : __half22float2(as_half2(word));
      pair[i] = as_bits(__floats2half2_rn(x.x * unit, x.y * unit));
    }
    out[step] = uint2{pair[0], pair[1]};
  }
}

// Λ⁻¹ of a head may be of any size: an exponent that brings its largest factor near 1.
template <int D>
__device__ __forceinline__ int lambda_exponent(const float* inverse_lambda, int lane) {
  float most = 0.0f;
#pragma unroll
  for (int c = lane; c < D; c += kSimd) most = fmaxf(most, fabsf(inverse_lambda[c]));
  return (int)(float_as_bits(simd_max(most)) >> 23) - 127;
}

// A thread's part of the queries of a row tile, and of R by them, on their way from memory.
template <int D>
struct Rotated {
  QueryRow<D> row;
  uint4 a[kQueryTerms][D / 16];  // of the warp's next 16 results
};

template <int D>
__device__ __forceinline__ void ask_for_matrix(const AttendCall& call, int term, int i, int lane, Rotated<D>& r) {
  load_fragments<D>(call.fragments[0] + term * fragment_at(D, D / 16, 0, 0), i, lane, r.a[term]);
}

template <int D>
__device__ __forceinline__ void ask_for_rotation(const AttendCall& call, int b, int head, int tile, int warp, int lane,
                                                 Rotated<D>& r) {
  r.row = load_row<D>(call, b, head, tile, lane);
#pragma unroll
  for (int term = kQueryTerms - 1; term >= 0; term--) ask_for_matrix(call, term, warp, lane, r);
}

// The row tile's queries in code domain, of unit size, to work.fragments, and their factors: all but q·mu of a score.
template <int D>
__device__ __forceinline__ void rotate_queries(const AttendCall& call, int head, Rotated<D>& r, const Work& work,
                                               int warp, int lane) {
  const AttendShape& s = call.shape;
  const int exponent = row_exponent(r.row, s.dtype), g = lane / 4, t = lane % 4;
  uint2 q[D / 16];
  unit_row(r.row, s.dtype, power_of_two(-exponent), q);
  const float* lambda = call.buffers.inverse_lambda_k ? call.buffers.inverse_lambda_k + (long long)head * D : nullptr;
  const int of_lambda = lambda ? lambda_exponent<D>(lambda, lane) : 0;
  if (warp == 0 && t == 0) work.factor[g] = s.scale * power_of_two(exponent) * power_of_two(of_lambda);
#pragma unroll 1
  for (int i = warp; i < D / 16; i += call.warps) {
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int term = kQueryTerms - 1; term >= 0; term--) {  // the small ones first
      multiply_tile<D>(r.a[term], q, c);
      if (i + call.warps < D / 16) ask_for_matrix(call, term, i + call.warps, lane, r);
    }
    if (lambda) {
      const Element first = query_element(i, 0, lane, 0);
      const float unit = power_of_two(-of_lambda), low = lambda[first.row] * unit, high = lambda[first.row + 2] * unit;
      c[0] *= low, c[1] *= low, c[2] *= high, c[3] *= high;
    }
    // Channels 4(g/2) + g%2, + 2 of rows 2t, 2t+1: half of what threads (2t, g/2) and (2t+1, g/2) want.
    uint32_t* to = reinterpret_cast<uint32_t*>(work.fragments + i * kSimd + 8 * t + g / 2) + g % 2;
    to[0] = as_bits(__floats2half2_rn(c[0], c[2])), to[8] = as_bits(__floats2half2_rn(c[1], c[3]));
  }
}

// ---- q·mu

// x as the sum of two fp16, of 22 bits together.
struct Split {
  uint32_t whole, rest;
};

__device__ __forceinline__ Split split_pair(float x, float y) {
  const __half2 whole = __floats2half2_rn(x, y);
  const float2 back = __half22float2(whole);
  return {as_bits(whole), as_bits(__floats2half2_rn(x - back.x, y - back.y))};
}

// q·mu of an offset that turns is Σ product · wave over pairs, with
//   products (qx mu_x + qy mu_y, qy mu_x − qx mu_y) and waves (cos, sin):
// a row's products, of unit size, as B of a product: pair p is in step p / 8, thread p % 8 / 2, half p % 2.
// is_row: or zeros.
template <int D>
__device__ __forceinline__ void turn_products(const AttendCall& call, const float* mu, bool is_row, long long q_at,
                                              int slot, const Work& work, int lane) {
  const AttendShape& s = call.shape;
  const Turn& turn = call.buffers.turn;
  constexpr int kEach = D / 2 / kSimd;
  float2 product[kEach] = {};
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    if (!is_row) break;
    const int pair = lane + i * kSimd, x = min(pair, turn.pairs - 1) * turn.pair_step, y = x + turn.pair_gap;
    const float in = pair < turn.pairs ? s.scale : 0.0f;
    const float qx = load_as<false>(call.buffers.q, s.dtype, q_at + x) * in;
    const float qy = load_as<false>(call.buffers.q, s.dtype, q_at + y) * in;
    product[i] = float2{qx * mu[x] + qy * mu[y], qy * mu[x] - qx * mu[y]};
    most = fmaxf(most, fmaxf(fabsf(product[i].x), fabsf(product[i].y)));
  }
  const int exponent = min(max((int)(float_as_bits(simd_max(most)) >> 23) - 127, -100), 100);
  const float unit = power_of_two(-exponent);
  if (lane == 0) work.turn_factor[slot] = power_of_two(exponent);
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int pair = lane + i * kSimd;
    const Split split = split_pair(product[i].x * unit, product[i].y * unit);
    uint32_t* to = reinterpret_cast<uint32_t*>(work.products + pair / 8 * kSimd + slot * 4 + pair % 8 / 2) + pair % 2;
    to[0] = split.whole, to[2] = split.rest;
  }
}

// q·mu of the rows to work.offset; of an offset that turns, that of the channels behind the pairs, and the products of
// the others. Rows are dealt to `helpers` warps.
template <int D>
__device__ __forceinline__ void dot_offsets(const AttendCall& call, int b, int head, int tile, const Work& work,
                                            int helper, int helpers, int lane) {
  const AttendShape& s = call.shape;
  const AttendBuffers& in = call.buffers;
  const float* mu = in.offset_k + ((long long)b * s.kv_heads + head) * D;
  const int first = in.turn.waves ? 2 * in.turn.pairs : 0;
#pragma unroll 1
  for (int slot = helper; slot < kTileRows; slot += helpers) {
    const int row = tile * kTileRows + slot;
    const bool is_row = row < rows_of(s);
    const QueryPlace place = query_place(s, row);
    const long long at = element_at(s.q_strides, b, head * s.group + place.head, place.query);
    float dot = 0.0f;
    if (is_row && in.offset_k && first < D) {
#pragma unroll
      for (int c = lane; c < D; c += kSimd)
        if (c >= first) dot += load_as<false>(in.q, s.dtype, at + c) * mu[c];
      dot = simd_sum(dot);
    }
    if (lane == 0) work.offset[slot] = dot * s.scale;
    if (in.turn.waves) turn_products<D>(call, mu, is_row, at, slot, work, lane);
  }
}

// ---- Offsets that turn

// Spans of tokens, of which a warp takes 16 at a time, as rows of A.
struct Spans {
  int first, n;
};

// A thread's waves of 16 spans, on their way from memory, in some steps of a product: pairs 8i + 2t, + 1 of rows g and
// g + 8 in of[i]. Those behind the last pair are any: their products are zeros.
template <int Steps>
struct Waves {
  float4 of[Steps][2];
};

// From span `from` of the spans on, and from step `first` on.
template <int Steps>
__device__ __forceinline__ void ask_for_waves(const Turn& turn, Spans spans, int from, int first, int lane,
                                              Waves<Steps>& waves) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const auto* row = reinterpret_cast<const float4*>(
        turn.waves + (long long)(spans.first + min(from + g + 8 * half, spans.n - 1)) * turn.pairs * 2);
#pragma unroll
    for (int i = 0; i < Steps; i++) waves.of[i][half] = row[min(4 * (first + i) + t, turn.pairs / 2 - 1)];
  }
}

// What turning reads and writes in shared memory.
struct Turning {
  const uint4* products;
  const float* factor;
  float* turned;  // [spans][kTileRows]
};

__device__ __forceinline__ Turning turning(const Work& work) { return {work.products, work.turn_factor, work.slots}; }

// Adds what those steps give of q·mu in the 16 spans, but for the rows' factors.
template <int Steps>
__device__ __forceinline__ void turn_steps(const Turning& to, int first, const Waves<Steps>& waves, int lane,
                                           float sum[4]) {
#pragma unroll
  for (int i = 0; i < Steps; i++) {
    uint32_t whole[4], rest[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 wave = waves.of[i][half];
      const Split low = split_pair(wave.x, wave.y), high = split_pair(wave.z, wave.w);
      whole[half] = low.whole, rest[half] = low.rest, whole[half + 2] = high.whole, rest[half + 2] = high.rest;
    }
    const uint4 b = to.products[(first + i) * kSimd + lane];
    mma(sum, rest, b.x, b.y);
    mma(sum, whole, b.z, b.w);
    mma(sum, whole, b.x, b.y);
  }
}

__device__ __forceinline__ void store_turned(const Turning& to, Spans spans, int from, const float sum[4], int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (from + g + 8 * half < spans.n)
      *reinterpret_cast<float2*>(to.turned + (from + g + 8 * half) * kTileRows + 2 * t) =
          float2{sum[2 * half] * to.factor[2 * t], sum[2 * half + 1] * to.factor[2 * t + 1]};
}

}  // namespace halfbyte::gpu
