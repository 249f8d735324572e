// A warp's rotated block becomes scales and codes: extremes of groups, the search among scales, rounding.
#pragma once

#include "cuda/mma.cuh"
#include "gpu/encode.h"

namespace halfbyte::gpu {

// Of a block, what thread (g, t) of a warp has: tokens 2g, 2g+1 by channels 4t … 4t+3 and 16+4t … of each span.
template <int D>
struct Values {
  float y[D / kSpan][4][4];

  // Number i (0 … 7) of its channels in a span.
  __device__ __forceinline__ float& at(int span, int token, int i) { return y[span][i / 2][token * 2 + i % 2]; }
};

// 1.5 · 2^23, where a unit is the last bit: adding it rounds to the nearest integer, ties to even.
constexpr float kRound = 12582912.0f;

__device__ __forceinline__ float inverse_scale(float scale) {
  return fabsf(scale) > 1e-37f ? __fdividef(1.0f, scale) : 0.0f;
}

// ---- The search
//
// Values are in units of the covering scale, times kUnit. A code is rounded where an integer is a unit of the smallest
// subnormal numbers, so that rounding leaves no offset to take off; times kCodeFactor it is kUnit times itself.

constexpr float kCodeUnit = 0x1p-149f, kCodeFactor = 0x1p126f, kUnit = kCodeUnit * kCodeFactor;

// What brings a value to its code with a candidate's factor f: times 1 / (levels f kUnit) to 0 … 1, but for an offset,
// or times kCodeUnit / (f kUnit) to the code itself.
struct Candidate {
  float clamping, direct;
};

// With 4 bits and the factors of kSearch and kSearchSigned the second candidate meets no bound, and the other ones of
// the first four only the upper: their lowest value is at most 8.43 below zero.
HALFBYTE_INLINE constexpr bool meets_no_lower(int bits, int number) { return bits == 4 && number < 4; }

// Adds the squared errors of eight values with a candidate to `error`. there: its `direct` or, where there is a lower
// bound to meet, `clamping`; back: minus its scale, in units of the covering one, times kCodeFactor.
template <int Bits, int Number>
__device__ __forceinline__ void note_errors(float there, float back, const float x[8], float& error) {
  constexpr float kHalf = 1 << (Bits - 1), kLevels = 2 * kHalf - 1;
  constexpr bool kNoLower = meets_no_lower(Bits, Number), kNoUpper = kNoLower && Number == 1;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float code;
    if constexpr (kNoLower) {
      code = x[i] * there;
      if constexpr (!kNoUpper) code = fminf(code, (kHalf - 1.0f) * kCodeUnit);
    } else {
      const float clamped = __saturatef(__fmaf_rn(x[i], there, kHalf / kLevels));
      code = __fmaf_rn(clamped, kLevels * kCodeUnit, -kHalf * kCodeUnit);
    }
    const float e = __fmaf_rn(code, back, x[i]);
    error = __fmaf_rn(e, e, error);
  }
}

// Errors of a thread's own group, summed over the lanes that share its tokens: candidate c of token j is
// [c / 2][2j + c % 2].
using ErrorSums = float[kSearchSize / 2][4];

// Adds what the lanes have of one group. A product with ones sums them up and gives each to the lane of the group:
// column 2t + c % 2 is that of lane t.
__device__ __forceinline__ void add_errors(const float errors[2][kSearchSize], bool even_column, bool odd_column,
                                           ErrorSums& sums) {
#pragma unroll
  for (int c = 0; c < kSearchSize; c++) {
    const float one = (c % 2 ? odd_column : even_column) ? 1.0f : 0.0f;
    float rest[2];  // what tf32 leaves of each
    for (int token = 0; token < 2; token++)
      rest[token] = errors[token][c] - __uint_as_float(__float_as_uint(errors[token][c]) & 0xffffe000u);
    const float a[4] = {errors[0][c], errors[1][c], rest[0], rest[1]};
    mma_tf32(sums[c / 2], a, one, one);
  }
}

// ---- Extremes

// Of floats as integers: among signed ones the largest is the largest float, among unsigned ones the smallest float,
// unless all have the other sign: then both are the largest magnitude.
struct Extremes {
  int high;
  unsigned low;
};

__device__ __forceinline__ void note_extremes(float a, float b, Extremes& e) {
  e.high = __vimax3_s32(e.high, (int)__float_as_uint(a), (int)__float_as_uint(b));
  e.low = __vimax3_u32(e.low, __float_as_uint(a), __float_as_uint(b));
}

__device__ __forceinline__ float extreme_of(const Extremes& e) {
  const float high = __uint_as_float((unsigned)e.high), low = __uint_as_float(e.low);
  return high >= -low ? high : low;
}

template <class Word>
__device__ __forceinline__ Word larger_of_lanes(Word keep, Word give, int mask) {
  return max(keep, __shfl_xor_sync(0xffffffffu, give, mask));
}

// Of 1, 2 or 4 groups, of which four lanes have a part each: the largest word of group t % Groups.
template <int Groups, class Word>
__device__ __forceinline__ Word deal_largest(const Word (&words)[Groups], int t) {
  if constexpr (Groups == 1) {
    const Word pair = larger_of_lanes(words[0], words[0], 2);
    return larger_of_lanes(pair, pair, 1);
  } else {
    const bool upper = t & 2, odd = t & 1;
    const Word even_word =
        Groups == 2 ? larger_of_lanes(words[0], words[0], 2)
                    : larger_of_lanes(upper ? words[Groups - 2] : words[0], upper ? words[0] : words[Groups - 2], 2);
    const Word odd_word =
        Groups == 2 ? larger_of_lanes(words[1], words[1], 2)
                    : larger_of_lanes(upper ? words[Groups - 1] : words[1], upper ? words[1] : words[Groups - 1], 2);
    return larger_of_lanes(odd ? odd_word : even_word, odd ? even_word : odd_word, 1);
  }
}

// ---- Groups

// How a side is coded; what threads need of it again and again.
struct Coding {
  const SideFormat& f;
  const float* factors;
  const Candidate* candidates;
  float lane_factor;  // factors[lane]
  float low, levels;  // the lowest code, and how far it is to the highest one
  float per_level;    // 1 / levels
  float to_covering;  // what a group's extreme, or its magnitude, is multiplied by: docs/format.md
  float scale;        // that a block's values have been multiplied by, a power of two
  float unscale;      // 1 / scale

  __device__ __forceinline__ Coding(const SideFormat& format, const float* factors_, const Candidate* candidates_,
                                    float scale_, int lane)
      : f(format), factors(factors_), candidates(candidates_), scale(scale_) {
    lane_factor = factors[min(lane, kSearchSize - 1)];
    unscale = __uint_as_float(0x7f000000u - __float_as_uint(scale));
    const float half = (float)zero_code(f.bits);
    low = (float)lowest_code(f), levels = half - 1.0f - low, per_level = __fdividef(1.0f, levels);
    to_covering = f.signed_scale ? __fdividef(-1.0f, half) : __fdividef(1.0f, half - 1.0f);
  }
};

// Spans [From, From + Spans) of the block: Spans groups, or one. Each lane deals with one group, number t % Groups,
// as far as scales go: a group's scale is computed once.
template <int D, int Bits, int From, int Spans, int Groups>
struct GroupCoder {
  static __device__ __forceinline__ int owner(int span) { return Groups == 1 ? 0 : span; }
  static __device__ __forceinline__ float from_owner(float x, int span) {
    return Groups == 1 ? x : __shfl_sync(0xffffffffu, x, (threadIdx.x % kSimd & ~3u) + span);
  }

  static __device__ __forceinline__ void find_covering(const Coding& coding, Values<D>& v, int t, float covering[2]) {
#pragma unroll
    for (int token = 0; token < 2; token++) {
      int highs[Groups];
      unsigned lows[Groups];
#pragma unroll
      for (int group = 0; group < Groups; group++) {
        const int first = From + group * (Spans / Groups);
        const unsigned bits = __float_as_uint(v.at(first, token, 0));
        Extremes e = {(int)bits, bits};
#pragma unroll
        for (int s = 0; s < Spans / Groups; s++)
#pragma unroll
          for (int i = 0; i < 8; i += 2) note_extremes(v.at(first + s, token, i), v.at(first + s, token, i + 1), e);
        highs[group] = e.high, lows[group] = e.low;
      }
      const float extreme = extreme_of({deal_largest(highs, t), deal_largest(lows, t)});
      covering[token] = (coding.f.signed_scale ? extreme : fabsf(extreme)) * coding.to_covering;
    }
  }

  // Whether the lane's column of ones is the one that gives a span's errors to its owner: those of even candidates, or
  // of odd ones.
  static __device__ __forceinline__ bool is_column(int lane, int span, int odd) {
    return Groups == 1 ? lane / 4 % 2 == odd : lane / 4 == 2 * span + odd;
  }

  // The candidates' factors with the least errors, the first of equals.
  static __device__ __forceinline__ void search(const Coding& coding, Values<D>& v, int lane, const float covering[2],
                                                float best[2]) {
    const float inverse[2] = {inverse_scale(covering[0]), inverse_scale(covering[1])};
    float theres[2][kSearchSize], backs[2][kSearchSize];
#pragma unroll
    for (int token = 0; token < 2; token++)
#pragma unroll
      for (int c = 0; c < kSearchSize; c++) {
        const Candidate& candidate = coding.candidates[c];
        const float scale = round_scale(coding.f, covering[token] * coding.unscale * coding.factors[c]);
        const float rounded = scale * (coding.scale * inverse[token]), factor = coding.factors[c];
        // Codes are those of the rounded scale, unless it is so small that rounding it moves the bounds.
        const float near = fabsf(rounded - factor) < factor * 0x1p-10f ? __fdividef(factor, rounded) : 1.0f;
        theres[token][c] = (meets_no_lower(Bits, c) ? candidate.direct : candidate.clamping) * near;
        backs[token][c] = rounded * -kCodeFactor;
      }
    ErrorSums sums = {};
#pragma unroll
    for (int group = 0; group < Groups; group++) {
      float errors[2][kSearchSize] = {};
#pragma unroll
      for (int s = 0; s < Spans / Groups; s++)
#pragma unroll
        for (int token = 0; token < 2; token++) {
          const int span = group * (Spans / Groups) + s;
          const float factor = from_owner(inverse[token], span) * kUnit;
          float x[8];
#pragma unroll
          for (int i = 0; i < 8; i++) x[i] = v.at(From + span, token, i) * factor;
          note_errors<Bits, 0>(from_owner(theres[token][0], span), from_owner(backs[token][0], span), x,
                               errors[token][0]);
          note_errors<Bits, 1>(from_owner(theres[token][1], span), from_owner(backs[token][1], span), x,
                               errors[token][1]);
          note_errors<Bits, 2>(from_owner(theres[token][2], span), from_owner(backs[token][2], span), x,
                               errors[token][2]);
          note_errors<Bits, 3>(from_owner(theres[token][3], span), from_owner(backs[token][3], span), x,
                               errors[token][3]);
          note_errors<Bits, 4>(from_owner(theres[token][4], span), from_owner(backs[token][4], span), x,
                               errors[token][4]);
          note_errors<Bits, 5>(from_owner(theres[token][5], span), from_owner(backs[token][5], span), x,
                               errors[token][5]);
        }
      add_errors(errors, is_column(lane, group, 0), is_column(lane, group, 1), sums);
    }
#pragma unroll
    for (int token = 0; token < 2; token++) {
      unsigned least = ~0u;  // an error's last bits give way to its number
#pragma unroll
      for (int c = 0; c < kSearchSize; c++)
        least = min(least, (__float_as_uint(sums[c / 2][token * 2 + c % 2]) & ~7u) | (unsigned)c);
      best[token] = __shfl_sync(0xffffffffu, coding.lane_factor, least & 7);
    }
  }

  // Replaces the values by kRound + stored code.
  static __device__ __forceinline__ void quantise(const Coding& coding, Values<D>& v, const float scale[2]) {
    const float start = -coding.low * coding.per_level, round = kRound + coding.low + (float)(1 << (Bits - 1));
    const float inverse[2] = {inverse_scale(scale[0]) * coding.unscale * coding.per_level,
                              inverse_scale(scale[1]) * coding.unscale * coding.per_level};
#pragma unroll
    for (int span = 0; span < Spans; span++)
#pragma unroll
      for (int token = 0; token < 2; token++) {
        const float factor = from_owner(inverse[token], span);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float& y = v.at(From + span, token, i);
          y = __fmaf_rn(__saturatef(__fmaf_rn(y, factor, start)), coding.levels, round);
        }
      }
  }

  static __device__ __forceinline__ void run(const Coding& coding, Values<D>& v, uint8_t* scales, int lane) {
    const int g = lane / 4, t = lane % 4;
    float covering[2], factor[2] = {coding.factors[0], coding.factors[0]}, scale[2];
    find_covering(coding, v, t, covering);
    if (coding.f.search) search(coding, v, lane, covering, factor);
#pragma unroll
    for (int token = 0; token < 2; token++)
      scale[token] = round_scale(coding.f, covering[token] * coding.unscale * factor[token]);
    quantise(coding, v, scale);
    if (t >= Groups) return;
    const int at = (Groups == 1 ? 0 : From + t) * kBlockTokens + 2 * g;
    if (coding.f.scale_bytes == 4)
      *reinterpret_cast<float2*>(scales + at * 4) = {scale[0], scale[1]};
    else
      *reinterpret_cast<uint32_t*>(scales + at * 2) = as_bits(__floats2half2_rn(scale[0], scale[1]));
  }
};

// Writes the scales of a block and replaces its values by kRound + stored code.
template <int Bits, int D>
__device__ __forceinline__ void code_block(const Coding& coding, Values<D>& v, uint8_t* scales, int lane) {
  constexpr int kSpans = D / kSpan;
  if (coding.f.group != kSpan) {
    GroupCoder<D, Bits, 0, kSpans, 1>::run(coding, v, scales, lane);
  } else if constexpr (kSpans <= 4) {
    GroupCoder<D, Bits, 0, kSpans, kSpans>::run(coding, v, scales, lane);
  } else {
    GroupCoder<D, Bits, 0, 4, 4>::run(coding, v, scales, lane);
    GroupCoder<D, Bits, 4, 4, 4>::run(coding, v, scales, lane);
  }
}

}  // namespace halfbyte::gpu
