// How the offset of K turns with RoPE: each span of tokens has the one that RoPE makes of mu in the span's middle.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "format.h"

namespace halfbyte {

constexpr int kTurnSpans = 16;  // spans whose waves lie side by side: one SIMD register
constexpr int kMaxPairs = kMaxHeadDim / 2;

// The tables of one RoPE; see docs/format.md.
struct Turn {
  int span = 0;                            // tokens that share an offset
  int pairs = 0;                           // pair i is channels i · pair_step and i · pair_step + pair_gap:
  int pair_step = 1, pair_gap = 0;         // 2i and 2i + 1 when interleaved, else i and i + pairs
  std::vector<float> frequencies;          // [pairs], radians a token
  std::vector<float> cos, sin;             // [pairs][16]: in the middle of spans 0 to 15
  std::vector<double> step_cos, step_sin;  // [pairs]: from a span to the sixteenth behind it

  bool interleaved() const { return pair_step == 2; }
  size_t span_of(size_t token) const { return token / (size_t)span; }
  double middle_of(size_t span_index) const { return (double)(span_index * (size_t)span + (size_t)(span - 1) / 2); }
};

// Throws std::bad_alloc.
std::shared_ptr<const Turn> make_turn(int span, const float* frequencies, int pairs, bool interleaved);

// cos and sin by which sixteen spans are further than the first sixteen; in double, so that steps may add up.
struct Phase {
  double cos[kMaxPairs], sin[kMaxPairs];

  Phase(const Turn& turn, size_t sixteenth);
  void step(const Turn& turn);
};

// mu [head_dim] as the span has it.
void turn_offset(const Turn& turn, const float* mu, int head_dim, size_t span, float* out);

// sum [head_dim] += x [head_dim], of tokens in the span, turned back to where mu is.
void add_turned_back(const Turn& turn, const float* x, int head_dim, size_t span, double* sum);

}  // namespace halfbyte
