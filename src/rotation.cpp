// Signs, FFT tables and the reference rotation (system of the source paper: y = pack(F · diag(s) · x), arXiv
// 2605.05699).
#include "rotation.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>

#include "format.h"

namespace halfbyte {
namespace {

constexpr double kTau = 2.0 * std::numbers::pi;

// splitmix64's output function: one well-mixed word per counter, so channel j's sign needs no history.
uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

float sign_of_channel(uint64_t seed, int layer_index, int channel) {
  uint64_t counter = 1 + (uint64_t)layer_index * 512 + (uint64_t)channel;
  return mix(seed + 0x9E3779B97F4A7C15ull * counter) >> 63 ? -1.0f : 1.0f;
}

void push_root(std::vector<float>& table, double turns, double length = 1.0) {
  table.push_back((float)(length * std::cos(kTau * turns)));
  table.push_back((float)(length * std::sin(kTau * turns)));
}

int next_radix(int length) {
  for (int radix : {8, 4, 2, 3, 5, 7})
    if (length % radix == 0) return radix;
  for (int radix = 11; radix * radix <= length; radix += 2)
    if (length % radix == 0) return radix;
  return length;  // prime
}

// The real pass's twiddles, and where the last pass's results belong.
void plan_slots(RotationPlan& plan) {
  // Frequencies, of the sixteen of a real pass, that a slot holds in src/cpu/fft.h: one of each two that mirror.
  constexpr int kFrequencies[kFftSlots] = {0, 4, 2, 10, 1, 5, 9, 13};
  const int d = plan.head_dim, half = d / 2;
  if (d % (2 * kFftSlots) == 0 && d > 2 * kFftSlots) {
    plan.fft_slots = kFftSlots;
    for (int i = 0; i < half / kFftSlots; i++)
      for (int frequency : kFrequencies) push_root(plan.twiddles, -(double)i * frequency / d);
  }
  for (int i = 0; i < half; i++) {
    const int slot = i % plan.fft_slots, k = kFrequencies[slot] + 2 * (i - slot);
    plan.places.push_back(slot && k > half ? FftPlace{d - k, -1.0f} : FftPlace{slot ? k : i, 1.0f});
    push_root(plan.half_roots, -(double)i / d, 0.5);
  }
}

void plan_fft(RotationPlan& plan) {
  plan_slots(plan);
  for (int length = plan.head_dim / 2 / plan.fft_slots, stride = plan.fft_slots; length > 1;) {
    FftPass pass{next_radix(length), 0, stride, (int)plan.twiddles.size()};
    pass.rest = length / pass.radix;
    for (int p = 0; p < pass.rest; p++)
      for (int k = 0; k < pass.radix; k++) push_root(plan.twiddles, -(double)p * k / length);
    if (pass.radix > 8) {  // a prime radix: its own roots follow its twiddles
      for (int k = 0; k < pass.radix; k++) push_root(plan.twiddles, -(double)k / pass.radix);
    }
    plan.passes.push_back(pass);
    length = pass.rest;
    stride *= pass.radix;
  }
}

// Row i of the SRFT matrix before the signs, at column j.
double srft_entry(int d, int i, int j) {
  int half = d / 2;
  double norm = std::sqrt(1.0 / d);
  if (i == 0) return norm;
  if (i == half) return j % 2 ? -norm : norm;
  int k = i < half ? i : i - half;
  double angle = kTau * ((long)k * j % d) / d;
  return std::sqrt(2.0) * norm * (i < half ? std::cos(angle) : -std::sin(angle));
}

double srht_entry(int d, int i, int j) {
  double norm = std::sqrt(1.0 / d);
  return __builtin_parity((unsigned)(i & j)) ? -norm : norm;
}

double entry_of(const RotationPlan& plan, int i, int j) {
  if (plan.kind == Rotation::dense) return plan.matrix[plan.dense_at(i, j)];
  return plan.signs[j] * (plan.kind == Rotation::srft ? srft_entry : srht_entry)(plan.head_dim, i, j);
}

}  // namespace

RotationPlan make_rotation(Rotation kind, int head_dim, uint64_t seed, int layer_index, const float* matrix) {
  RotationPlan plan;
  plan.kind = kind;
  plan.head_dim = head_dim;
  for (int j = 0; j < head_dim; j++) plan.signs.push_back(sign_of_channel(seed, layer_index, j));
  if (kind == Rotation::srft) plan_fft(plan);
  if (kind == Rotation::srft || kind == Rotation::srht) {
    const double norm = std::sqrt((kind == Rotation::srft ? 2.0 : 1.0) / head_dim);
    for (float sign : plan.signs) plan.factors.push_back(sign * (float)norm);
  }
  if (kind == Rotation::dense && matrix) {
    plan.matrix.resize(plan.dense_at((head_dim - 1) / kDenseTile * kDenseTile + kDenseTile, 0));
    for (int i = 0; i < head_dim; i++)
      for (int j = 0; j < head_dim; j++) plan.matrix[plan.dense_at(i, j)] = matrix[(size_t)i * head_dim + j];
  }
  return plan;
}

std::vector<float> matrix_of(const RotationPlan& plan) {
  std::vector<float> matrix;
  for (int i = 0; !plan.matrix.empty() && i < plan.head_dim; i++)
    for (int j = 0; j < plan.head_dim; j++) matrix.push_back(plan.matrix[plan.dense_at(i, j)]);
  return matrix;
}

Status check_orthonormal(const char* name, const float* matrix, int head_dim) {
  constexpr double kLargest = 1e-3;  // scores and outputs are off by as much, which 4-bit codes drown
  double worst = 0.0;
  for (int i = 0; i < head_dim; i++) {
    double dots[kMaxHeadDim] = {};  // of column i with those up to it: RᵀR = I as well when R is square
    for (int row = 0; row < head_dim; row++)
      for (int j = 0; j <= i; j++)
        dots[j] += (double)matrix[(size_t)row * head_dim + i] * matrix[(size_t)row * head_dim + j];
    for (int j = 0; j <= i; j++)
      worst = std::max(worst, std::isnan(dots[j]) ? INFINITY : std::fabs(dots[j] - (i == j)));
  }
  if (worst <= kLargest) return {};
  return {Code::bad_argument, std::string(name) + " is not orthonormal: an entry of R R^T is " + std::to_string(worst) +
                                  " away from the identity's; it takes a matrix [head_dim, head_dim] within 0.001"};
}

std::vector<double> rotation_matrix(const RotationPlan& plan) {
  const int d = plan.head_dim;
  std::vector<double> r((size_t)d * d);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) r[(size_t)i * d + j] = plan.kind == Rotation::identity ? i == j : entry_of(plan, i, j);
  return r;
}

void rotate_reference(const RotationPlan& plan, bool inverse, const double* x, double* out) {
  int d = plan.head_dim;
  if (plan.kind == Rotation::identity) {
    for (int j = 0; j < d; j++) out[j] = x[j];
    return;
  }
  for (int i = 0; i < d; i++) out[i] = 0.0;
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      const double r = entry_of(plan, i, j);
      if (inverse)
        out[j] += r * x[i];
      else
        out[i] += r * x[j];
    }
}

}  // namespace halfbyte
