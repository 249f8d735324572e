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
  int twiddle_at = 0;   // into RotationPlan::twiddles: [rest][radix] pairs (cos, sin) of −2π·p·k / length
};

// R and its inverse for vectors of head_dim channels, as tables for the kernels.
struct RotationPlan {
  Rotation kind = Rotation::identity;
  int head_dim = 0;
  std::vector<float> signs;      // [head_dim] ±1
  std::vector<FftPass> passes;   // SRFT: complex FFT of length head_dim / 2
  std::vector<float> twiddles;   // pairs (cos, sin)
  std::vector<float> unpack;     // SRFT: [head_dim / 2] pairs (cos, sin) of −2πk / head_dim
};

RotationPlan make_rotation(Rotation kind, int head_dim, uint64_t seed, int layer_index);

// Reference: out = R x, or Rᵀ x when inverse, straight from the definition. x, out: [head_dim], may not overlap.
void rotate_reference(const RotationPlan& plan, bool inverse, const double* x, double* out);

// R as a matrix [head_dim][head_dim], in double.
std::vector<double> rotation_matrix(const RotationPlan& plan);

}  // namespace halfbyte
