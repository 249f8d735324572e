// Tables of an offset that turns, and turning: the one place where its angles are computed.
#include "turn.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace halfbyte {
namespace {

// cos and sin of every pair in the middle of a span.
struct Waves {
  float cos[kMaxPairs], sin[kMaxPairs];

  Waves(const Turn& turn, size_t span) {
    const Phase phase(turn, span / kTurnSpans);
    const size_t lane = span % kTurnSpans;
    for (int i = 0; i < turn.pairs; i++) {
      const double c = turn.cos[i * kTurnSpans + lane], s = turn.sin[i * kTurnSpans + lane];
      cos[i] = (float)(phase.cos[i] * c - phase.sin[i] * s);
      sin[i] = (float)(phase.sin[i] * c + phase.cos[i] * s);
    }
  }
};

Turn compute_turn(int span, const float* frequencies, int pairs, bool interleaved) {
  Turn turn;
  turn.span = span, turn.pairs = pairs;
  turn.pair_step = interleaved ? 2 : 1, turn.pair_gap = interleaved ? 1 : pairs;
  turn.frequencies.assign(frequencies, frequencies + pairs);
  for (double frequency : turn.frequencies) {
    for (size_t lane = 0; lane < kTurnSpans; lane++) {
      turn.cos.push_back((float)std::cos(frequency * turn.middle_of(lane)));
      turn.sin.push_back((float)std::sin(frequency * turn.middle_of(lane)));
    }
    turn.step_cos.push_back(std::cos(frequency * (kTurnSpans * span)));
    turn.step_sin.push_back(std::sin(frequency * (kTurnSpans * span)));
  }
  return turn;
}

// (cos, sin) *= (other_cos, other_sin) as complex numbers.
void multiply(double* cos, double* sin, const double* other_cos, const double* other_sin, int pairs) {
  for (int i = 0; i < pairs; i++) {
    const double c = cos[i] * other_cos[i] - sin[i] * other_sin[i];
    sin[i] = sin[i] * other_cos[i] + cos[i] * other_sin[i];
    cos[i] = c;
  }
}

}  // namespace

std::shared_ptr<const Turn> make_turn(int span, const float* frequencies, int pairs, bool interleaved) {
  // The layers of a model want one of few, and computing its waves takes longer than making a layer.
  thread_local std::array<std::weak_ptr<const Turn>, 8> recent;
  thread_local size_t oldest = 0;
  for (const std::weak_ptr<const Turn>& held : recent)
    if (std::shared_ptr<const Turn> turn = held.lock())
      if (turn->span == span && turn->interleaved() == interleaved &&
          std::equal(turn->frequencies.begin(), turn->frequencies.end(), frequencies, frequencies + pairs))
        return turn;
  const auto turn = std::make_shared<const Turn>(compute_turn(span, frequencies, pairs, interleaved));
  recent[oldest++ % recent.size()] = turn;
  return turn;
}

Phase::Phase(const Turn& turn, size_t sixteenth) {
  const int pairs = turn.pairs;
  for (int i = 0; i < pairs; i++) cos[i] = 1.0, sin[i] = 0.0;
  if (!sixteenth) return;
  double power_cos[kMaxPairs], power_sin[kMaxPairs];  // step ^ (1, 2, 4, …)
  std::copy_n(turn.step_cos.data(), pairs, power_cos), std::copy_n(turn.step_sin.data(), pairs, power_sin);
  for (;;) {
    if (sixteenth & 1) multiply(cos, sin, power_cos, power_sin, pairs);
    sixteenth >>= 1;
    if (!sixteenth) return;
    for (int i = 0; i < pairs; i++) {
      const double c = power_cos[i] * power_cos[i] - power_sin[i] * power_sin[i];
      power_sin[i] = 2.0 * power_sin[i] * power_cos[i];
      power_cos[i] = c;
    }
  }
}

void Phase::step(const Turn& turn) { multiply(cos, sin, turn.step_cos.data(), turn.step_sin.data(), turn.pairs); }

void turn_offset(const Turn& turn, const float* mu, int head_dim, size_t span, float* out) {
  const Waves waves(turn, span);
  std::copy_n(mu, head_dim, out);
  for (int i = 0; i < turn.pairs; i++) {
    const int a = i * turn.pair_step, b = a + turn.pair_gap;
    out[a] = mu[a] * waves.cos[i] - mu[b] * waves.sin[i];
    out[b] = mu[b] * waves.cos[i] + mu[a] * waves.sin[i];
  }
}

void add_turned_back(const Turn& turn, const float* x, int head_dim, size_t span, double* sum) {
  const Waves waves(turn, span);
  for (int i = 0; i < turn.pairs; i++) {
    const int a = i * turn.pair_step, b = a + turn.pair_gap;
    sum[a] += (double)x[a] * waves.cos[i] + (double)x[b] * waves.sin[i];
    sum[b] += (double)x[b] * waves.cos[i] - (double)x[a] * waves.sin[i];
  }
  for (int c = 2 * turn.pairs; c < head_dim; c++) sum[c] += x[c];
}

}  // namespace halfbyte
