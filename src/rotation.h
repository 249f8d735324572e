// The rotation R of a code: what it is (reference, in double) and the tables that a kernel needs to apply it.
#pragma once

#include <cstdint>
#include <vector>

#include "halfbyte/halfbyte.hpp"

namespace halfbyte {

// One Stockham pass of the complex FFT: `length` = radix · rest, over `stride` interleaved transforms.
struct FftPass {
  int radix = 0;
  int rest = 0;
  int stride = 0;
  int twiddle_at = 0;  // into RotationPlan::twiddles: [rest][radix] pairs (cos, sin) of −2π·p·k / length
};

// Where an output of the last pass belongs: its real part, and half of head_dim behind it the imaginary one times sign.
struct FftPlace {
  int channel;
  float sign;  // −1 for an output that mirrors the one wanted
};

constexpr int kFftSlots = 8;   // complex transforms side by side that sixteen-point transforms of real numbers leave
constexpr int kDenseTile = 8;  // rows of a dense R that a kernel finds side by side

// R and its inverse for vectors of head_dim channels, as tables for the kernels.
struct RotationPlan {
  Rotation kind = Rotation::identity;
  int head_dim = 0;
  std::vector<float> signs;    // [head_dim] ±1
  std::vector<float> factors;  // SRFT, SRHT: [head_dim] signs times the norm that the kernels' transform leaves out
  // SRFT: a real first pass if fft_slots > 1, then complex FFTs of length head_dim / 2 / fft_slots side by side.
  int fft_slots = 1;
  std::vector<FftPass> passes;
  std::vector<float> twiddles;    // pairs (cos, sin): of the real pass [length][slots], then of each other
  std::vector<FftPlace> places;   // [head_dim / 2]
  std::vector<float> half_roots;  // [head_dim / 2] pairs (cos, sin) / 2 of −2πk / head_dim
  std::vector<float> matrix;      // dense: R as [rows / kDenseTile][columns][kDenseTile rows], zeros around it

  __attribute__((always_inline)) size_t dense_at(int row, int column) const {
    const int padded = (head_dim + kDenseTile - 1) / kDenseTile * kDenseTile;
    return (size_t)(row / kDenseTile * padded + column) * kDenseTile + row % kDenseTile;
  }
};

// dense: `matrix` is R, row-major, or null for one that comes later.
RotationPlan make_rotation(Rotation kind, int head_dim, uint64_t seed, int layer_index, const float* matrix = nullptr);

// R of a dense rotation, row-major; empty when there is none.
std::vector<float> matrix_of(const RotationPlan& plan);

// Ok when every entry of R Rᵀ is within 1e-3 of the identity's. `name` is the argument's, for the message.
Status check_orthonormal(const char* name, const float* matrix, int head_dim);

// Reference: out = R x, or Rᵀ x when inverse, straight from the definition. x, out: [head_dim], may not overlap.
void rotate_reference(const RotationPlan& plan, bool inverse, const double* x, double* out);

// R as a matrix [head_dim][head_dim], in double.
std::vector<double> rotation_matrix(const RotationPlan& plan);

}  // namespace halfbyte
