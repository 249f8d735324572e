// Reference encode: rotate in double, choose each group's scale, round, pack. The bit-level definition is
// docs/format.md.
#include "encode.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace halfbyte {
namespace {

float round_scale(const SideFormat& format, double scale) {
  return format.scale_bytes == 4 ? (float)scale : half_to_float(float_to_half((float)scale));
}

// Codes of a symmetric recipe without search stay within ±(half − 1), as the paper has it; all others use −half too.
int lowest_code(const SideFormat& format) {
  int half = zero_code(format.bits);
  return format.signed_scale || format.search ? -half : 1 - half;
}

int quantise(const SideFormat& format, double y, float scale) {
  if (scale == 0.0f) return 0;
  double code = std::nearbyint(y / scale);
  return (int)std::clamp<double>(code, lowest_code(format), zero_code(format.bits) - 1);
}

double squared_error(const SideFormat& format, const double* y, int channels, float scale) {
  double error = 0.0;
  for (int i = 0; i < channels; i++) {
    double e = y[i] - (double)quantise(format, y[i], scale) * scale;
    error += e * e;
  }
  return error;
}

void store_scale(const SideFormat& format, uint8_t* scales, int group, int lane, float scale) {
  size_t at = (size_t)group * kBlockTokens + lane;
  store_element(scales, format.scale_bytes == 4 ? Dtype::float32 : Dtype::float16, at, scale);
}

void store_code(const EncodeArgs& args, int lane, int channel, int code) {
  int bits = args.format->bits;
  CodePlace place = args.side == Side::k ? k_code_place(bits, lane, channel) : v_code_place(bits, lane, channel);
  int mask = bits == 4 ? 15 << place.shift : 255;
  uint8_t& byte = args.codes[place.byte];
  byte = (uint8_t)((byte & ~mask) | (code + zero_code(bits)) << place.shift);
}

}  // namespace

SideFormat make_side_format(const Recipe& recipe, Side side, int head_dim) {
  const Codec& codec = side == Side::k ? recipe.k : recipe.v;
  return side_format(head_dim, codec.bits, codec.group, recipe.scale_bits / 8, recipe.search, recipe.signed_scale);
}

PageFormat make_page_format(const Recipe& recipe, int head_dim_k, int head_dim_v) {
  return {make_side_format(recipe, Side::k, head_dim_k), make_side_format(recipe, Side::v, head_dim_v)};
}

float choose_scale(const SideFormat& format, const double* y, int channels) {
  double high = *std::max_element(y, y + channels), low = *std::min_element(y, y + channels);
  double extreme = high >= -low ? high : low;
  int half = zero_code(format.bits);
  double covering = format.signed_scale ? -extreme / half : std::fabs(extreme) / (half - 1);
  const float* factors = format.signed_scale ? kSearchSigned : kSearch;
  float best = round_scale(format, covering * factors[0]);
  if (!format.search) return best;
  double best_error = squared_error(format, y, channels, best);
  for (int i = 1; i < kSearchSize; i++) {
    float scale = round_scale(format, covering * factors[i]);
    double error = squared_error(format, y, channels, scale);
    if (error < best_error) best_error = error, best = scale;
  }
  return best;
}

void encode_block(const EncodeArgs& args) {
  const SideFormat& format = *args.format;
  if (format.bits != kPlainBits) {
    current_backend().encode(args);
    return;
  }
  for (int i = 0; i < args.n; i++) {
    float* row = reinterpret_cast<float*>(args.codes) + (size_t)(args.first_lane + i) * format.head_dim;
    for (int c = 0; c < format.head_dim; c++) row[c] = load_element(args.rows[i], args.dtype, c);
  }
}

void encode_reference(const EncodeArgs& args) {
  const SideFormat& format = *args.format;
  int d = format.head_dim;
  std::vector<double> x(d), y(format.padded_dim, 0.0);
  for (int i = 0; i < args.n; i++) {
    for (int c = 0; c < d; c++)
      x[c] = (double)load_element(args.rows[i], args.dtype, c) - (args.offset ? args.offset[c] : 0.0f);
    rotate_reference(*args.rotation, false, x.data(), y.data());
    if (args.lambda)
      for (int c = 0; c < d; c++) y[c] *= args.lambda[c];
    int lane = args.first_lane + i;
    for (int g = 0; g < format.n_groups; g++) {
      int from = g * format.group, to = std::min(from + format.group, format.padded_dim);
      float scale = choose_scale(format, &y[from], to - from);
      store_scale(format, args.scales, g, lane, scale);
      for (int c = from; c < to; c++) store_code(args, lane, c, quantise(format, y[c], scale));
    }
  }
}

}  // namespace halfbyte
