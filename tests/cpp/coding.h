// What tests of encoding share: one block, its input, and when the codes of two kernels are equally good.
#pragma once

#include <numeric>

#include "encode.h"
#include "testing.h"

namespace halfbyte::testing {

// One side of one block, its bytes poisoned.
struct Block {
  SideFormat format;
  Side side;
  std::vector<uint8_t> codes, scales;

  Block(const Recipe& recipe, Side side, int d)
      : format(make_side_format(recipe, side, d)),
        side(side),
        codes(code_bytes(format), 0xa5),
        scales(scales_bytes(format), 0xa5) {}

  int code(int token, int channel) const {
    CodePlace place =
        side == Side::k ? k_code_place(format.bits, token, channel) : v_code_place(format.bits, token, channel);
    return (codes[place.byte] >> place.shift & (format.bits == 4 ? 15 : 255)) - zero_code(format.bits);
  }
  float scale(int token, int group) const {
    return load_element(scales.data(), format.scale_bytes == 4 ? Dtype::float32 : Dtype::float16,
                        (size_t)group * kBlockTokens + token);
  }
};

struct Input {
  RotationPlan rotation;
  Array x;  // [1, 1, 16, d]
  std::vector<float> offset, lambda;
  int n = kBlockTokens, first_lane = 0;
};

inline Input random_input(Random& random, const Recipe& recipe, int d, Dtype dtype, bool offset, bool lambda) {
  std::vector<float> matrix;
  if (recipe.rotation == Rotation::dense) matrix = random_rotation(random, d);
  Input in{make_rotation(recipe.rotation, d, 3, 1, matrix.data()),
           random_array(random, 1, 1, kBlockTokens, d, dtype),
           {},
           {},
           kBlockTokens,
           0};
  if (offset) in.offset = random.normals(d);
  if (lambda)
    for (int c = 0; c < d; c++) in.lambda.push_back(std::exp(0.5f * random.normal()));
  return in;
}

// What packs an input into a block.
inline EncodeArgs args_of(const Input& in, Block& block) {
  EncodeArgs args{&block.format,
                  &in.rotation,
                  block.side,
                  in.x.dtype,
                  {},
                  in.n,
                  in.first_lane,
                  in.offset.empty() ? nullptr : in.offset.data(),
                  in.lambda.empty() ? nullptr : in.lambda.data(),
                  block.codes.data(),
                  block.scales.data()};
  for (int i = 0; i < in.n; i++) args.rows[i] = in.x.bytes.data() + in.x.at(0, 0, i, 0) * dtype_bytes(in.x.dtype);
  return args;
}

// Rotated vectors in double [16][padded_dim], what the codes should stand for.
inline std::vector<double> targets(const Input& in, const SideFormat& format) {
  std::vector<double> y((size_t)kBlockTokens * format.padded_dim), x(format.head_dim);
  for (int t = 0; t < in.n; t++) {
    for (int c = 0; c < format.head_dim; c++)
      x[c] = (double)in.x.get(0, 0, t, c) - (in.offset.empty() ? 0.0f : in.offset[c]);
    double* row = &y[(size_t)t * format.padded_dim];
    rotate_reference(in.rotation, false, x.data(), row);
    for (int c = 0; c < format.head_dim && !in.lambda.empty(); c++) row[c] *= in.lambda[c];
  }
  return y;
}

inline double squared_error(const Block& block, const double* y, int lane, int from, int to) {
  double sum = 0.0;
  for (int c = from; c < to; c++) {
    double e = y[c] - (double)block.code(lane, c) * block.scale(lane, c / block.format.group);
    sum += e * e;
  }
  return sum;
}

// A float kernel may take the other of two nearly equal scales, or the other side of a tie; so each group is judged by
// what the definition promises: its squared error is the reference's, and its codes are the nearest ones for its scale.
inline void expect_equivalent(const Input& in, const std::vector<double>& y, const Block& fast, const Block& reference,
                              size_t* differing, const std::string& what) {
  const SideFormat& f = fast.format;
  const int half = zero_code(f.bits), lowest = f.signed_scale || f.search ? -half : 1 - half;
  for (int i = 0; i < in.n; i++)
    for (int g = 0; g < f.n_groups; g++) {
      const int lane = in.first_lane + i, from = g * f.group, to = std::min(from + f.group, f.padded_dim);
      const double* row = &y[(size_t)i * f.padded_dim];
      const double scale = fast.scale(lane, g);
      double rounding = 2e-6 * std::sqrt(std::inner_product(row, row + f.padded_dim, row, 0.0));  // of a float FFT
      if (f.scale_bytes == 2)  // a candidate near the middle of two halves may round to the other one
        rounding += 5e-4 * std::sqrt(std::inner_product(row + from, row + to, row + from, 0.0));
      ASSERT_LE(std::sqrt(squared_error(fast, row, lane, from, to)),
                std::sqrt(squared_error(reference, row, lane, from, to)) + rounding)
          << what << " lane " << lane << " group " << g;
      for (int c = from; c < to; c++) {
        const double nearest = std::clamp(row[c] / scale, (double)lowest, half - 1.0);
        // 1e-5 of the code range: the rotation's float rounding, in steps.
        if (scale != 0.0)
          ASSERT_NEAR(fast.code(lane, c), nearest, 0.5 + 1e-5 * half) << what << " channel " << c;
        else
          ASSERT_EQ(fast.code(lane, c), 0) << what;
        *differing += fast.code(lane, c) != reference.code(lane, c);
      }
    }
}

}  // namespace halfbyte::testing
