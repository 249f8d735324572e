// A warp's rotated block becomes scales and codes: extremes of groups, the search among scales, rounding.
#pragma once

#include "cuda/mma.cuh"
#include "gpu/encode.h"

namespace halfbyte::gpu {

// Of a block, what thread (g = lane / 4, t = lane % 4) of a warp has: tokens 2g, 2g+1 by a quarter of the channels, in
// rows of eight that share nibbles or, with 8 bits, follow each other: 4 from first_channel on, and 4 that come 16
// later.
template <int D>
struct Values {
  static constexpr int kOwn = D / 4, kRows = kOwn / 8;

  float y[D / 8][4];  // as a product has it: two channels of the one token, then of the other

  __device__ __forceinline__ float& at(int token, int i) { return y[i / 2][token * 2 + i % 2]; }
  // The first channel of a thread's row.
  static __host__ __device__ __forceinline__ constexpr int first_channel(int t, int row) {
    return (t * kRows + row) / 4 * kSpan + (t * kRows + row) % 4 * 4;
  }
};

__device__ __forceinline__ float inverse_scale(float scale) {
  return fabsf(scale) > 1e-37f ? reciprocal_fast(scale) : 0.0f;
}

// How a side is coded; what threads need of it again and again.
struct Coding {
  struct Candidate {
    float factor, least, most;  // of the covering scale; as far as rounding it to fp16 moves it
  } candidates[kSearchSize];
  float to_covering;  // what a group's extreme, or its magnitude, is multiplied by: docs/format.md
  int bits, group, scale_bytes;
  bool search, signed_scale;
  bool spares_lowest;  // codes end one above the lowest that their bits hold
};

// ---- Rounding
//
// Values are in units of the covering scale, times kUnit. A code is rounded where an integer is a unit of the smallest
// subnormal numbers: its bits are the code, and there is no offset to take off. Times kCodeFactor it is kUnit times
// itself.

constexpr float kCodeUnit = 0x1p-149f, kCodeFactor = 0x1p126f, kUnit = kCodeUnit * kCodeFactor;

template <int Bits>
constexpr float kZero = 1 << (Bits - 1);  // the stored code of 0

// With 4 bits and the factors of kSearch and kSearchSigned the second candidate meets no bound, and the other ones of
// the first four only the upper: their lowest value is at most 8.43 below zero.
HALFBYTE_INLINE constexpr bool meets_no_lower(int bits, int number) { return bits == 4 && number < 4; }

// What brings a value to its code with a candidate's scale, times that scale in units of the covering one: to 0 … 1,
// but for an offset, where there is a lower bound to meet, else to the code itself.
constexpr float kDirect = kCodeUnit / kUnit;
template <int Bits>
constexpr float kClamping = 1.0f / (((1 << Bits) - 1) * kUnit);

// Adds the squared error of a value with a candidate to `error`; back: minus its scale times kCodeFactor.
template <int Bits, int Number>
__device__ __forceinline__ void note_error(float x, const float* there, const float* back, float* error) {
  constexpr float kHalf = 1 << (Bits - 1), kLevels = 2 * kHalf - 1;
  constexpr bool kNoLower = meets_no_lower(Bits, Number), kNoUpper = kNoLower && Number == 1;
  float code;
  if constexpr (kNoLower) {
    code = x * there[Number];
    if constexpr (!kNoUpper) code = fminf(code, (kHalf - 1.0f) * kCodeUnit);
  } else {
    const float clamped = __saturatef(__fmaf_rn(x, there[Number], kHalf / kLevels));
    code = __fmaf_rn(clamped, kLevels * kCodeUnit, -kHalf * kCodeUnit);
  }
  const float e = __fmaf_rn(code, back[Number], x);
  error[Number] = __fmaf_rn(e, e, error[Number]);
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

// ---- Groups

// A group of which a thread has values From … From + N − 1 of both tokens, and neighbouring lanes the others.
template <int D, int Bits, int From, int N>
struct GroupCoder {
  const Coding& coding;
  Values<D>& v;
  int lanes;      // that share the group: 1, 2 or 4
  float scale;    // that the block's values have been multiplied by, a power of two
  float unscale;  // 1 / scale

  __device__ __forceinline__ float find_covering(int token) {
    const unsigned first = __float_as_uint(v.at(token, From));
    Extremes e = {(int)first, first};
#pragma unroll
    for (int i = 0; i < N; i += 2) note_extremes(v.at(token, From + i), v.at(token, From + i + 1), e);
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
      if (mask < lanes) {
        e.high = max(e.high, __shfl_xor_sync(0xffffffffu, e.high, mask));
        e.low = max(e.low, __shfl_xor_sync(0xffffffffu, e.low, mask));
      }
    const float extreme = extreme_of(e);
    return (coding.signed_scale ? extreme : fabsf(extreme)) * coding.to_covering;
  }

  // Of the candidates' scales the one with the least error, the first of equals. to_units: what brings a scale to units
  // of the covering one.
  __device__ __forceinline__ float search(int token, float to_units, const float scales[kSearchSize]) {
    float there[kSearchSize], back[kSearchSize], error[kSearchSize] = {};
#pragma unroll
    for (int c = 0; c < kSearchSize; c++) {
      // Codes are those of the rounded scale, unless it is so small that rounding it moves the bounds.
      const Coding::Candidate& candidate = coding.candidates[c];
      const float rounded = scales[c] * to_units, near = fminf(fmaxf(rounded, candidate.least), candidate.most);
      there[c] = reciprocal_fast(near) * (meets_no_lower(Bits, c) ? kDirect : kClamping<Bits>);
      back[c] = rounded * -kCodeFactor;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float x = v.at(token, From + i);
      note_error<Bits, 0>(x, there, back, error), note_error<Bits, 1>(x, there, back, error);
      note_error<Bits, 2>(x, there, back, error), note_error<Bits, 3>(x, there, back, error);
      note_error<Bits, 4>(x, there, back, error), note_error<Bits, 5>(x, there, back, error);
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
      if (mask < lanes)
#pragma unroll
        for (int c = 0; c < kSearchSize; c++) error[c] += __shfl_xor_sync(0xffffffffu, error[c], mask);
    float least = error[0], best = scales[0];
#pragma unroll
    for (int c = 1; c < kSearchSize; c++)
      if (error[c] < least) least = error[c], best = scales[c];
    return best;
  }

  // Replaces the values by their stored codes, as bits, but for the bounds. in_units: the scale.
  __device__ __forceinline__ void quantise(int token, float in_units) {
    const float there = inverse_scale(in_units) * kDirect;
    if (coding.spares_lowest) {
      const float lowest = in_units * (kUnit - kUnit * kZero<Bits>);
#pragma unroll
      for (int i = 0; i < N; i++) v.at(token, From + i) = fmaxf(v.at(token, From + i), lowest);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      float& x = v.at(token, From + i);
      x = __fmaf_rn(x, there, kZero<Bits> * kCodeUnit);
    }
  }

  __device__ __forceinline__ float code_token(int token) {
    const float covering = find_covering(token), inverse = inverse_scale(covering);
    float scales[kSearchSize];
#pragma unroll
    for (int c = 0; c < kSearchSize; c++) scales[c] = covering * unscale * coding.candidates[c].factor;
    if (coding.scale_bytes == 2)
#pragma unroll
      for (int c = 0; c < kSearchSize; c += 2) {
        const float2 rounded = __half22float2(__floats2half2_rn(scales[c], scales[c + 1]));
        scales[c] = rounded.x, scales[c + 1] = rounded.y;
      }
#pragma unroll
    for (int i = 0; i < N; i++) v.at(token, From + i) *= inverse * kUnit;
    const float to_units = scale * inverse, chosen = coding.search ? search(token, to_units, scales) : scales[0];
    quantise(token, chosen * to_units);
    return chosen;
  }

  // to: where the group's scale of the thread's first token goes. `writes`: of the lanes that share a group, one.
  __device__ __forceinline__ void run(uint8_t* to, bool writes) {
    const float chosen[2] = {code_token(0), code_token(1)};
    if (!writes) return;
    if (coding.scale_bytes == 4)
      *reinterpret_cast<float2*>(to) = {chosen[0], chosen[1]};
    else
      *reinterpret_cast<uint32_t*>(to) = as_bits(__floats2half2_rn(chosen[0], chosen[1]));
  }
};

// Writes the scales of a block and replaces its values by stored codes, as GroupCoder::quantise does.
template <int Bits, int D>
__device__ __forceinline__ void code_block(const Coding& coding, float scale, Values<D>& v, uint8_t* scales, int lane) {
  constexpr int kOwn = Values<D>::kOwn;
  const float unscale = __uint_as_float(0x7f000000u - __float_as_uint(scale));
  const bool whole = coding.group != kSpan;
  const int t = lane % 4;
  const auto code = [&]<int From, int N>(int sharers, int group) {
    GroupCoder<D, Bits, From, N>{coding, v, sharers, scale, unscale}.run(
        scales + (group * kBlockTokens + 2 * (lane / 4)) * coding.scale_bytes, t % sharers == 0);
  };
  if constexpr (kOwn <= kSpan) {
    code.template operator()<0, kOwn>(whole ? 4 : kSpan / kOwn, whole ? 0 : t / (kSpan / kOwn));
  } else if (whole) {
    code.template operator()<0, kOwn>(4, 0);
  } else {
    code.template operator()<0, kSpan>(1, 2 * t);
    code.template operator()<kSpan, kSpan>(1, 2 * t + 1);
  }
}

}  // namespace halfbyte::gpu
