// Offsets on the device: means of tokens that are turned back to position 0, and what RoPE makes of K's in a span.
#pragma once

#include "gpu/attend.h"

namespace halfbyte::gpu {

constexpr int kOffsetThreads = 128;

// A channel's pair: the other channel, the number of the pair, and the sign with which the other one adds when the pair
// is turned on. Channels that do not turn are their own.
struct Partner {
  int channel, pair;
  float sign;
};

__device__ __forceinline__ Partner partner_of(const Turn& turn, int c) {
  if (!turn.waves || c >= 2 * turn.pairs) return {c, -1, 0.0f};
  const bool neighbours = turn.pair_gap == 1, second = neighbours ? c % 2 : c >= turn.pairs;
  return {second ? c - turn.pair_gap : c + turn.pair_gap, neighbours ? c / 2 : c % turn.pairs, second ? 1.0f : -1.0f};
}

// cos and sin in the middle of a span.
__device__ __forceinline__ const float* wave_of(const Turn& turn, Partner partner, int span) {
  return turn.waves + ((int64_t)span * turn.pairs + partner.pair) * 2;
}

// The sum over tokens [begin, end) of a channel, turned back by their spans. By the rules of src/append.cpp: runs of
// tokens in float, turned and summed in double. sum_run(from, to, channel): of the tokens that count.
template <class SumRun>
__device__ __forceinline__ double sum_back(const Turn& turn, int begin, int end, int channel, const SumRun& sum_run) {
  const Partner partner = partner_of(turn, channel);
  const int run = turn.waves ? turn.span : kPageTokens;
  double sum = 0.0;
  for (int from = begin; from < end; from += run) {
    const int to = min(from + run, end);
    const float x = sum_run(from, to, channel);
    if (partner.pair < 0) {
      sum += x;
      continue;
    }
    const float* wave = wave_of(turn, partner, from / turn.span);
    sum += (double)x * wave[0] - (double)sum_run(from, to, partner.channel) * (partner.sign * wave[1]);
  }
  return sum;
}

// By a thread block. mu [d] as a span has it, rounded as PyTorch does it: products first.
__device__ __forceinline__ void turn_offset(const Turn& turn, const float* mu, int d, int span, float* turned) {
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    const Partner partner = partner_of(turn, c);
    float x = mu[c];
    if (partner.pair >= 0) {
      const float* wave = wave_of(turn, partner, span);
      x = __fadd_rn(__fmul_rn(x, wave[0]), __fmul_rn(mu[partner.channel], partner.sign * wave[1]));
    }
    turned[c] = x;
  }
}

// By a thread block: R mu; a copy without R. transposed: of R, [d][d].
__device__ __forceinline__ void rotate_offset(const float* transposed, const float* mu, int d, float* rotated) {
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    double sum = transposed ? 0.0 : mu[c];
    if (transposed)
      for (int j = 0; j < d; j++) sum += (double)transposed[j * d + c] * mu[j];
    rotated[c] = (float)sum;
  }
}

}  // namespace halfbyte::gpu
