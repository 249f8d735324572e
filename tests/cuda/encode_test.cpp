// Encoding and decoding on the device against the CPU's double-precision reference.
#include "encode_case.h"

namespace halfbyte {
namespace {

class CudaEncode : public testing::TestWithParam<bool> {};

TEST_P(CudaEncode, GivesTheReferenceBytes) {
  HALFBYTE_NEEDS_DEVICE();
  use_backend("reference");
  int groups = 0, others = 0;
  for (int d : {128, 64, 256, 80})
    for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32})
      for (int group : {32, 0, 16})
        for (bool search : {true, false})
          for (int bits : {4, 8}) {
            if ((d == 256 || d == 80) && (dtype != Dtype::float16 || bits == 8))
              continue;  // the reference takes d² each
            Case c;
            c.head_dim = d, c.dtype = dtype, c.prefix = 97, c.batch = search ? 2 : 1;
            c.recipe.k = {bits, group}, c.recipe.v = {bits, group}, c.recipe.search = search;
            if (group == 16 && d != 80) c.recipe.rotation = Rotation::srht;
            c.recipe.lambda = group == 0, c.recipe.signed_scale = bits == 4 || group == 32;
            const Difference difference = encode_difference(c, (unsigned)(d + group + search), GetParam());
            expect_close(difference, c,
                         text("d", d, " g", group, " bits ", bits, " search ", search, " dtype ", (int)dtype));
            groups += difference.groups, others += difference.others;
          }
  // Candidates whose errors tie within float's rounding are rare; codes of a scale before it is rounded would give
  // eight times as many.
  EXPECT_LT(others, 3e-5 * groups) << "of " << groups;
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
  const std::string fastest = backends().front().name;
  for (int d : {16, 80, 128, 512}) {
    use_backend(fastest);
    Case c;
    c.head_dim = d, c.prefix = 113, c.batch = 2, c.recipe.lambda = true, c.dtype = Dtype::float32;
    Random random(d);
    Layer layer = filled_layer(c, random);
    LayerParts parts;
    ASSERT_TRUE(layer.save(parts).ok());
    const size_t n = c.batch * c.kv_heads * c.prefix * d;
    std::vector<float> want_k(n), want_v(n);
    use_backend("reference");
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
                                  {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0, nullptr},
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
