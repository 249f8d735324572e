// One encoding on the device against the CPU's.
#pragma once

#include "device.h"

namespace halfbyte {

// How packed pages differ from those of the reference, and from what is best for the scales that they hold.
struct Difference {
  double bytes = 0.0, scales = 0.0;  // shares of all that differ from the reference's: bytes of codes, scales
  double factor = 0.0;               // how far a scale is from the nearest candidate, relative
  double code = 0.0;                 // how far a value is from being nearest to its code, of the rms of its vector
  double group_error = 0.0;          // squared error of a group over that with the reference's scale and codes, less 1
  double error = 0.0;                // the same for all groups together
  int groups = 0, others = 0;        // all groups, and those with the scale of another candidate
};

// Values of one vector in double, as docs/format.md defines them.
inline std::vector<double> rotated_vector(const Case& c, const RotationPlan& plan, const uint8_t* data, size_t row,
                                          const float* mu, const float* lambda) {
  std::vector<double> x(c.head_dim), y(c.head_dim);
  for (int i = 0; i < c.head_dim; i++)
    x[i] = (double)load_element(data, c.dtype, row * c.head_dim + i) - (mu ? mu[i] : 0.0f);
  rotate_reference(plan, false, x.data(), y.data());
  for (int i = 0; lambda && i < c.head_dim; i++) y[i] *= lambda[i];
  y.resize((c.head_dim + kSpan - 1) / kSpan * kSpan);
  return y;
}

struct BlockBytes {
  const uint8_t *codes, *scales;
};

// The difference between two packed groups of one token; sums up their squared errors.
inline void compare_group(const SideFormat& f, bool is_k, int token, int group, const std::vector<double>& y,
                          double rms, BlockBytes got, BlockBytes want, Difference& d, double errors[2]) {
  const int from = group * f.group, to = std::min(from + f.group, f.padded_dim), half = zero_code(f.bits);
  const Dtype dtype = f.scale_bytes == 4 ? Dtype::float32 : Dtype::float16;
  const auto scale_of = [&](BlockBytes b) {
    return (double)load_element(b.scales, dtype, group * kBlockTokens + token);
  };
  const auto code_of = [&](BlockBytes b, int channel) {
    const CodePlace at = is_k ? k_code_place(f.bits, token, channel) : v_code_place(f.bits, token, channel);
    return (b.codes[at.byte] >> at.shift & (f.bits == 4 ? 15 : 255)) - half;
  };
  const double scale = scale_of(got), high = *std::max_element(&y[from], &y[from] + (to - from)),
               low = *std::min_element(&y[from], &y[from] + (to - from));
  double factor = high == 0.0 && low == 0.0 ? std::fabs(scale) : 1e9;
  for (double extreme : {high, low}) {
    if (extreme == 0.0 || std::fabs(extreme) < 0.998 * std::max(high, -low))
      continue;  // of two that nearly tie, either may be it
    const double covering = f.signed_scale ? -extreme / half : std::fabs(extreme) / (half - 1);
    for (int i = 0; i < (f.search ? kSearchSize : 1); i++)
      factor = std::min(factor, std::fabs(scale / covering / (f.signed_scale ? kSearchSigned : kSearch)[i] - 1.0));
  }
  d.factor = std::max(d.factor, factor);
  double own[2] = {};
  const int lowest = f.signed_scale || f.search ? -half : 1 - half;
  for (int channel = from; channel < to; channel++) {
    const double in_codes = std::clamp<double>(scale ? y[channel] / scale : 0.0, lowest, half - 1);
    d.code = std::max(d.code, (std::fabs(in_codes - code_of(got, channel)) - 0.5) * std::fabs(scale) / rms);
    for (int i = 0; i < 2; i++) {
      const BlockBytes& b = i ? want : got;
      own[i] += std::pow(y[channel] - code_of(b, channel) * scale_of(b), 2);
    }
  }
  d.group_error = std::max(d.group_error, own[0] / own[1] - 1.0);
  d.groups++, d.others += std::fabs(scale - scale_of(want)) > 0.01 * std::fabs(scale);
  errors[0] += own[0], errors[1] += own[1];
}

inline void compare_side(const Case& c, const PageFormat& pages, bool is_k, const std::vector<uint8_t>& data,
                         const std::vector<float>& offset, const std::vector<float>& lambda, const LayerParts& parts,
                         const std::vector<uint8_t>& got, Difference& difference) {
  const SideFormat& f = is_k ? pages.k : pages.v;
  const RotationPlan plan = make_rotation(c.recipe.rotation, c.head_dim, c.recipe.seed, 0);
  const size_t a_sequence = parts.page_table.size() / c.batch, d = c.head_dim;
  double errors[2] = {};
  for (size_t row = 0; row < (size_t)c.batch * c.kv_heads; row++)
    for (size_t token = 0; token < parts.packed_end; token++) {
      const std::vector<double> y =
          rotated_vector(c, plan, data.data(), row * c.prefix + token, offset.empty() ? nullptr : &offset[row * d],
                         lambda.empty() ? nullptr : &lambda[row % c.kv_heads * d]);
      double squares = 0.0;
      for (double v : y) squares += v * v;
      const size_t page = parts.page_table[row / c.kv_heads * a_sequence + token / kPageTokens];
      const size_t head = (page * c.kv_heads + row % c.kv_heads) * page_head_bytes(pages);
      const int block = (int)(token % kPageTokens / kBlockTokens);
      const size_t codes = head + (is_k ? k_codes_at(pages, block) : v_codes_at(pages, block)),
                   scales = head + (is_k ? k_scales_at(pages, block) : v_scales_at(pages, block));
      for (int group = 0; group < f.n_groups; group++)
        compare_group(f, is_k, (int)(token % kBlockTokens), group, y, std::sqrt(squares / (double)d),
                      {&got[codes], &got[scales]}, {&parts.pages[codes], &parts.pages[scales]}, difference, errors);
    }
  difference.error = std::max(difference.error, errors[0] / errors[1] - 1.0);
}

inline Difference encode_difference(const Case& c, unsigned seed, bool portable) {
  Random random(seed);
  const size_t tokens = c.prefix;
  const auto k = random.tensor(c, c.kv_heads, tokens, true), v = random.tensor(c, c.kv_heads, tokens, false);
  Case whole = c;
  whole.prefix = tokens;
  Layer layer = make_layer(whole);
  const size_t packed = tokens / 16 * 16;  // one more token than whole blocks makes the layer pack them all
  EXPECT_TRUE(layer.append(view_of(k, c, c.kv_heads, tokens), view_of(v, c, c.kv_heads, tokens), c.batch, tokens).ok());
  LayerParts parts;
  EXPECT_TRUE(layer.save(parts).ok());
  EXPECT_EQ(parts.packed_end, packed);

  const HalfbyteCudaLayer described = layer_of(c);
  const size_t page_bytes = c.kv_heads * halfbyte_cuda_page_bytes(&described);
  const OnDevice<uint8_t> pages(std::vector<uint8_t>(parts.pages.size(), 0)), d_k(k), d_v(v);
  const OnDevice<int64_t> table(page_addresses(parts, pages.get(), page_bytes));
  const OnDevice<int32_t> bad(std::vector<int32_t>(1, 0));
  const Tables k_tables(described, c.head_dim, false, parts.offset_k, some_lambda(c, 1));
  const Tables v_tables(described, c.head_dim, true, parts.offset_v, some_lambda(c, 2));
  const bool identity = c.recipe.rotation == Rotation::identity;
  HalfbyteCudaEncode e{};
  e.layer = described, e.k_tables = k_tables.get(identity), e.v_tables = v_tables.get(identity);
  e.pages = {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0, nullptr};
  e.batch = c.batch, e.k = device_view(d_k.get(), c, c.kv_heads, tokens),
  e.v = device_view(d_v.get(), c, c.kv_heads, tokens);
  e.limit = 1e4, e.bad = bad.get(), e.portable = portable;
  // In two parts that meet inside a block, as tokens arrive after a crop.
  const int64_t cut = (int64_t)packed / 2 - 3;
  e.first_token = 0, e.tokens = cut;
  expect_launched(halfbyte_cuda_encode(&e));
  e.first_token = cut, e.tokens = (int64_t)packed - cut;
  expect_launched(halfbyte_cuda_encode(&e));
  EXPECT_EQ(bad.values()[0], 0);

  const std::vector<uint8_t> got = pages.values();
  const PageFormat f = make_page_format(c.recipe, c.head_dim, c.head_dim);
  Difference difference;
  compare_side(c, f, true, k, parts.offset_k, some_lambda(c, 1), parts, got, difference);
  compare_side(c, f, false, v, parts.offset_v, some_lambda(c, 2), parts, got, difference);
  size_t codes = 0, wrong = 0, scales = 0, wrong_scales = 0;
  for (size_t page = 0; page < got.size(); page += page_head_bytes(f))
    for (int block = 0; block < kPageBlocks; block++) {
      const size_t from = page + k_codes_at(f, block), scales_from = page + k_scales_at(f, block);
      for (size_t i = 0; i < block_code_bytes(f); i++) codes++, wrong += got[from + i] != parts.pages[from + i];
      for (size_t i = 0; i < block_scale_bytes(f); i += 2)
        scales++, wrong_scales += memcmp(&got[scales_from + i], &parts.pages[scales_from + i], 2) != 0;
    }
  difference.bytes = (double)wrong / codes, difference.scales = (double)wrong_scales / scales;
  return difference;
}

// Kernels compute in float, tensor cores on terms that hold 22 bits of R: values within rounding of a tie, and scales
// whose errors nearly tie, may fall the other way, and a scale takes its whole group along. Scales of 32 bits differ in
// their last bits throughout.
inline void expect_close(const Difference& d, const Case& c, const std::string& what) {
  const bool fine = c.recipe.k.bits == 8;
  EXPECT_LT(d.bytes, fine ? 2e-2 : 2e-3) << what;
  EXPECT_LT(d.scales, 1e-2) << what;
  EXPECT_LT(d.factor, 5e-4) << what;  // half a unit of fp16's last place
  EXPECT_LT(d.code, 1e-5) << what;    // a few roundings of float, of the largest values
  // Scales that nearly tie leave nearly the same error, but for the last bit of one: 2^-10, 1/8 of a fine step at most.
  EXPECT_LT(d.group_error, fine ? 0.2 : 5e-3) << what;
  EXPECT_LT(d.error, fine ? 2e-4 : 1e-5) << what;
}

}  // namespace halfbyte
