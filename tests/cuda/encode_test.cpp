// Encoding and decoding on the device against the CPU's double-precision reference.
#include "device.h"

namespace halfbyte {
namespace {

// Codes that differ from the reference's, as a share of all, after checking that none differs by more than one unit
// where the scales agree.
struct Difference {
  double codes, scales;
};

Difference encode_difference(const Case& c, unsigned seed, bool portable) {
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
  size_t codes = 0, wrong = 0, scales = 0, wrong_scales = 0;
  for (size_t page = 0; page < got.size(); page += page_head_bytes(f))
    for (int block = 0; block < kPageBlocks; block++) {
      const size_t from = page + k_codes_at(f, block), scales_from = page + k_scales_at(f, block);
      for (size_t i = 0; i < block_code_bytes(f); i++) codes++, wrong += got[from + i] != parts.pages[from + i];
      for (size_t i = 0; i < block_scale_bytes(f); i += 2)
        scales++, wrong_scales += memcmp(&got[scales_from + i], &parts.pages[scales_from + i], 2) != 0;
    }
  return {(double)wrong / codes, (double)wrong_scales / scales};
}

class CudaEncode : public testing::TestWithParam<bool> {};

// Both compute in float: values within rounding of a tie, and scales whose errors nearly tie, may fall the other way,
// and a scale takes its whole group along. Scales of 32 bits differ in their last bits throughout, so codes alone are
// bound.
TEST_P(CudaEncode, GivesTheReferenceBytes) {
  HALFBYTE_NEEDS_DEVICE();
  use_backend("reference");
  for (int d : {64, 128, 256, 80})
    for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32})
      for (int group : {32, 0, 16})
        for (bool search : {true, false})
          for (int bits : {4, 8}) {
            if ((d == 256 || d == 80) && (dtype != Dtype::float16 || bits == 8))
              continue;  // the reference takes d² each
            Case c;
            c.head_dim = d, c.dtype = dtype, c.prefix = 97, c.batch = 2;
            c.recipe.k = {bits, group}, c.recipe.v = {bits, group}, c.recipe.search = search;
            c.recipe.lambda = group == 0, c.recipe.signed_scale = bits == 4 || group == 32;
            const Difference difference = encode_difference(c, (unsigned)(d + group + search), GetParam());
            const std::string what =
                text("d", d, " g", group, " bits ", bits, " search ", search, " dtype ", (int)dtype);
            EXPECT_LT(difference.codes, bits == 4 ? 2e-3 : 2e-2) << what;
            EXPECT_LT(difference.scales, 1e-2) << what;
          }
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaEncode, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

TEST(CudaEncode, FlagsWhatCanNotBeCoded) {
  HALFBYTE_NEEDS_DEVICE();
  Case c;
  const HalfbyteCudaLayer described = layer_of(c);
  const Tables tables(described, c.head_dim, false, {}, {}), v_tables(described, c.head_dim, true, {}, {});
  for (float value : {1.0f, 2e4f, INFINITY, NAN})
    for (int64_t portable : {0, 1}) {
      Random random(3);
      auto k = random.tensor(c, c.kv_heads, 16, false);
      store_element(k.data(), c.dtype, 777, value);
      const OnDevice<uint8_t> data(k),
          pages(std::vector<uint8_t>(c.kv_heads * halfbyte_cuda_page_bytes(&described), 0));
      const OnDevice<int64_t> table(std::vector<int64_t>{(int64_t)pages.get()});
      const OnDevice<int32_t> bad(std::vector<int32_t>(1, 0));
      HalfbyteCudaEncode e{};
      e.layer = described, e.k_tables = tables.get(false), e.v_tables = v_tables.get(false);
      e.pages = {table.get(), 1, 0, nullptr}, e.batch = 1, e.tokens = 16, e.limit = 1e4, e.bad = bad.get(),
      e.portable = portable;
      e.k = e.v = device_view(data.get(), c, c.kv_heads, 16);
      expect_launched(halfbyte_cuda_encode(&e));
      EXPECT_EQ(bad.values()[0], value != 1.0f) << value;
    }
}

TEST(CudaDecode, GivesBackWhatTheReferenceDoes) {
  HALFBYTE_NEEDS_DEVICE();
  use_backend("reference");
  for (int d : {16, 80, 128, 512}) {
    Case c;
    c.head_dim = d, c.prefix = 113, c.batch = 2, c.recipe.lambda = true, c.dtype = Dtype::float32;
    Random random(d);
    Layer layer = make_layer(c);
    const auto k = random.tensor(c, c.kv_heads, c.prefix, true), v = random.tensor(c, c.kv_heads, c.prefix, false);
    ASSERT_TRUE(
        layer.append(view_of(k, c, c.kv_heads, c.prefix), view_of(v, c, c.kv_heads, c.prefix), c.batch, c.prefix).ok());
    LayerParts parts;
    ASSERT_TRUE(layer.save(parts).ok());
    const size_t n = c.batch * c.kv_heads * c.prefix * d;
    std::vector<float> want_k(n), want_v(n);
    ASSERT_TRUE(layer.decode(want_k.data(), want_v.data()).ok());
    const HalfbyteCudaLayer described = layer_of(c);
    const OnDevice<uint8_t> pages(parts.pages);
    const OnDevice<int64_t> table(
        page_addresses(parts, pages.get(), c.kv_heads * halfbyte_cuda_page_bytes(&described)));
    const Tables k_tables(described, d, false, parts.offset_k, some_lambda(c, 1));
    const Tables v_tables(described, d, true, parts.offset_v, some_lambda(c, 2));
    const OnDevice<float> out_k(std::vector<float>(n, NAN)), out_v(std::vector<float>(n, NAN));
    const HalfbyteCudaDecode call{described,
                                  k_tables.get(false),
                                  v_tables.get(false),
                                  {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0},
                                  c.batch,
                                  0,
                                  (int64_t)parts.packed_end,
                                  0,
                                  (int64_t)c.prefix,
                                  out_k.get(),
                                  out_v.get(),
                                  0,
                                  nullptr};
    expect_launched(halfbyte_cuda_decode(&call));
    for (const auto& [got, want] : {std::pair{out_k.values(), want_k}, std::pair{out_v.values(), want_v}})
      for (size_t i = 0; i < n; i++) {
        if (i / d % c.prefix < parts.packed_end)
          ASSERT_NEAR(got[i], want[i], 2e-5 * (1 + std::fabs(want[i]))) << d << " " << i;
        else
          ASSERT_TRUE(std::isnan(got[i])) << "written behind the packed tokens";
      }
  }
}

}  // namespace
}  // namespace halfbyte
