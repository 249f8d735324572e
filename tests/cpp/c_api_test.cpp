// The C API: the same results as the C++ one, and an error code with a message for everything it can be given.
#include "halfbyte/halfbyte.h"

#include <thread>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

halfbyte_view c_view(const Array& x, size_t from = 0) {
  const View view = x.view(from);
  return {view.data, view.batch_stride, view.head_stride, view.token_stride};
}

halfbyte_config c_config(int kv_heads, int d) {
  halfbyte_config config = halfbyte_default_config();
  config.kv_heads = kv_heads, config.head_dim_k = config.head_dim_v = d;
  return config;
}

struct CLayer {
  halfbyte_layer* layer = nullptr;
  explicit CLayer(const halfbyte_config& config) {
    EXPECT_EQ(halfbyte_create(&config, &layer), HALFBYTE_OK) << halfbyte_last_error();
  }
  ~CLayer() { halfbyte_destroy(layer); }
  CLayer(const CLayer&) = delete;
  operator halfbyte_layer*() const { return layer; }
};

void expect_failed(halfbyte_status got, halfbyte_status want, const std::string& part) {
  EXPECT_EQ(got, want) << part;
  EXPECT_NE(std::string(halfbyte_last_error()).find(part), std::string::npos) << halfbyte_last_error();
}

TEST(CApi, DefaultsAreThoseOfCpp) {
  const halfbyte_recipe c = halfbyte_default_recipe();
  const Recipe recipe;
  EXPECT_EQ(c.rotation, HALFBYTE_SRFT);
  EXPECT_EQ((int)recipe.rotation, HALFBYTE_SRFT);
  EXPECT_EQ((int)Rotation::identity, HALFBYTE_IDENTITY);
  EXPECT_EQ((int)Rotation::srht, HALFBYTE_SRHT);
  EXPECT_EQ((int)Rotation::dense, HALFBYTE_DENSE);
  EXPECT_EQ((int)Dtype::float32, HALFBYTE_FLOAT32);
  EXPECT_EQ((int)Dtype::float16, HALFBYTE_FLOAT16);
  EXPECT_EQ((int)Dtype::bfloat16, HALFBYTE_BFLOAT16);
  const std::vector<int> got = {c.k_bits,     c.k_group,       c.v_bits,       c.v_group,  c.scale_bits,
                                c.offset,     c.search,        c.signed_scale, c.lambda,   c.sink_tokens,
                                c.raw_window, c.offset_tokens, c.offset_span,  (int)c.seed};
  const std::vector<int> want = {recipe.k.bits,      recipe.k.group,     recipe.v.bits,     recipe.v.group,
                                 recipe.scale_bits,  recipe.offset,      recipe.search,     recipe.signed_scale,
                                 recipe.lambda,      recipe.sink_tokens, recipe.raw_window, recipe.offset_tokens,
                                 recipe.offset_span, (int)recipe.seed};
  EXPECT_EQ(got, want);
  const halfbyte_attend_args args = halfbyte_default_attend_args();
  EXPECT_EQ(args.queries, 1);
  EXPECT_EQ(args.scale, 1.0f);
  EXPECT_EQ(args.causal, 1);
  EXPECT_EQ(args.exact, 0);
  EXPECT_EQ(args.mask, nullptr);
}

TEST(CApi, EveryRecipeFieldArrives) {
  Random random;
  const Array x = random_array(random, 1, 1, 100, 64);
  const std::vector<float> frequencies = rope_frequencies(64);
  int interleaved = 0;
  auto through_c = [&](auto change) {
    halfbyte_config config = c_config(1, 64);
    change(config.recipe);
    CLayer layer(config);
    const std::vector<float> ones(64, 1.5f);
    if (config.recipe.lambda) {
      EXPECT_EQ(halfbyte_set_lambda(layer, ones.data(), ones.data()), HALFBYTE_OK);
    }
    const std::vector<float> dense = random_rotation(random, 64);
    if (config.recipe.rotation == HALFBYTE_DENSE) {
      EXPECT_EQ(halfbyte_set_rotation(layer, dense.data(), dense.data()), HALFBYTE_OK) << halfbyte_last_error();
    }
    if (config.recipe.offset_span && config.recipe.offset) {
      EXPECT_EQ(halfbyte_set_frequencies(layer, frequencies.data(), 32, interleaved), HALFBYTE_OK);
    }
    const halfbyte_view view = c_view(x);
    EXPECT_EQ(halfbyte_append(layer, &view, &view, 1, 100, nullptr), HALFBYTE_OK) << halfbyte_last_error();
    std::vector<float> k(6400, NAN), v(6400, NAN);
    EXPECT_EQ(halfbyte_decode(layer, k.data(), v.data()), HALFBYTE_OK);
    k.insert(k.end(), v.begin(), v.end());
    k.push_back((float)halfbyte_bytes(layer)), k.push_back((float)halfbyte_packed_tokens(layer));
    return k;
  };
  const std::vector<float> standard = through_c([](halfbyte_recipe&) {});
  auto differs = [&](const char* field, auto change) { EXPECT_NE(through_c(change), standard) << field; };
  differs("rotation", [](halfbyte_recipe& r) { r.rotation = HALFBYTE_SRHT; });
  differs("rotation", [](halfbyte_recipe& r) { r.rotation = HALFBYTE_DENSE; });
  differs("seed", [](halfbyte_recipe& r) { r.seed = 1; });
  differs("offset", [](halfbyte_recipe& r) { r.offset = 0; });
  differs("k_bits", [](halfbyte_recipe& r) { r.k_bits = 8; });
  differs("v_bits", [](halfbyte_recipe& r) { r.v_bits = 8; });
  differs("k_group", [](halfbyte_recipe& r) { r.k_group = 16; });
  differs("v_group", [](halfbyte_recipe& r) { r.v_group = 16; });
  differs("scale_bits", [](halfbyte_recipe& r) { r.scale_bits = 32; });
  differs("search", [](halfbyte_recipe& r) { r.search = 0; });
  differs("signed_scale", [](halfbyte_recipe& r) { r.signed_scale = 0; });
  differs("lambda", [](halfbyte_recipe& r) { r.lambda = 1; });
  differs("sink_tokens", [](halfbyte_recipe& r) { r.sink_tokens = 16; });
  differs("raw_window", [](halfbyte_recipe& r) { r.raw_window = 16; });
  differs("offset_tokens", [](halfbyte_recipe& r) { r.offset_tokens = 48; });
  differs("offset_span", [](halfbyte_recipe& r) { r.offset_span = 16; });
  differs("offset_span", [](halfbyte_recipe& r) { r.offset_span = 0; });
  differs("interleaved", [&](halfbyte_recipe&) { interleaved = 1; });
}

TEST(CApi, AttendsAsCppDoes) {
  Random random;
  for (auto [chunk, exact] : {std::pair<size_t, bool>{1, false}, {7, false}, {1, true}, {7, true}}) {
    const Array k = random_array(random, 2, 2, 90 + chunk, 64), v = random_array(random, 2, 2, 90 + chunk, 64);
    const Array q = random_array(random, 2, 4, chunk, 64);
    const std::vector<float> sinks = random.normals(4);
    std::vector<uint8_t> mask(2 * chunk * (90 + chunk), 1), counted(2 * 90, 1);
    for (uint8_t& byte : mask) byte = random.below(4) > 0;
    for (uint8_t& byte : counted) byte = random.below(4) > 0;
    Array want = poisoned(2, 4, chunk, 64), got = poisoned(2, 4, chunk, 64);

    Layer layer = make_layer(config_of(2, 64));
    must(layer.append(k.view(), v.view(), 2, 90, counted.data()));
    must(append(layer, k, v, 90, 90 + chunk));
    AttendArgs args = args_of(q, want);
    args.chunk_k = k.view(90), args.chunk_v = v.view(90), args.softcap = 5.0f, args.sinks = sinks.data();
    args.exact = exact;
    args.mask = mask.data(), args.mask_tokens = 90 + chunk;
    args.mask_query_stride = (ptrdiff_t)args.mask_tokens,
    args.mask_batch_stride = (ptrdiff_t)(chunk * args.mask_tokens);
    must(layer.attend(args));

    CLayer c(c_config(2, 64));
    halfbyte_view k_view = c_view(k), v_view = c_view(v);
    ASSERT_EQ(halfbyte_append(c, &k_view, &v_view, 2, 90, counted.data()), HALFBYTE_OK);
    k_view = c_view(k, 90), v_view = c_view(v, 90);
    ASSERT_EQ(halfbyte_append(c, &k_view, &v_view, 2, chunk, nullptr), HALFBYTE_OK);
    halfbyte_attend_args c_args = halfbyte_default_attend_args();
    const MutableView out = got.out();
    c_args.q = c_view(q), c_args.out = {out.data, out.batch_stride, out.head_stride, out.token_stride};
    c_args.heads = 4, c_args.queries = (int)chunk, c_args.scale = args.scale;
    c_args.exact = exact;
    c_args.chunk_k = k_view, c_args.chunk_v = v_view, c_args.softcap = 5.0f, c_args.sinks = sinks.data();
    c_args.mask = mask.data(), c_args.mask_tokens = args.mask_tokens;
    c_args.mask_query_stride = args.mask_query_stride, c_args.mask_batch_stride = args.mask_batch_stride;
    ASSERT_EQ(halfbyte_attend(c, &c_args), HALFBYTE_OK) << halfbyte_last_error();
    EXPECT_TRUE(same_bits(got, want));
    EXPECT_TRUE(all_finite(got));
    args.exact = !exact;  // which makes a difference that must have arrived
    must(layer.attend(args));
    EXPECT_FALSE(same_bits(got, want));
    EXPECT_EQ(halfbyte_length(c), layer.length());
    EXPECT_EQ(halfbyte_visible(c), layer.visible());
    EXPECT_EQ(halfbyte_packed_tokens(c), layer.packed_tokens());
    EXPECT_EQ(halfbyte_bytes(c), layer.bytes());
    EXPECT_EQ(halfbyte_batch(c), 2);
  }
}

TEST(CApi, CropSelectCopyReset) {
  Random random;
  const Array x = random_array(random, 2, 1, 100, 32);
  CLayer layer(c_config(1, 32));
  const halfbyte_view view = c_view(x);
  const std::vector<float> mu(32, 0.25f);
  ASSERT_EQ(halfbyte_set_offset(layer, mu.data(), mu.data()), HALFBYTE_OK);
  ASSERT_EQ(halfbyte_append(layer, &view, &view, 2, 100, nullptr), HALFBYTE_OK);
  halfbyte_layer* copy = nullptr;
  ASSERT_EQ(halfbyte_copy(layer, &copy), HALFBYTE_OK);
  ASSERT_EQ(halfbyte_crop(layer, 30), HALFBYTE_OK);
  const size_t rows[] = {1, 0, 1};
  ASSERT_EQ(halfbyte_select(layer, rows, 3), HALFBYTE_OK);
  EXPECT_EQ(halfbyte_batch(layer), 3);
  EXPECT_EQ(halfbyte_length(layer), 30u);
  EXPECT_EQ(halfbyte_length(copy), 100u);
  EXPECT_EQ(halfbyte_batch(copy), 2);
  ASSERT_EQ(halfbyte_reset(layer), HALFBYTE_OK);
  EXPECT_EQ(halfbyte_length(layer), 0u);
  ASSERT_EQ(halfbyte_record_past(layer, 1), HALFBYTE_OK);
  halfbyte_destroy(copy);
}

TEST(CApi, EveryErrorHasACodeAndAMessage) {
  halfbyte_layer* layer = reinterpret_cast<halfbyte_layer*>(1);
  halfbyte_config config = c_config(1, 63);
  expect_failed(halfbyte_create(&config, &layer), HALFBYTE_BAD_ARGUMENT, "head_dim is 63");
  EXPECT_EQ(layer, nullptr);
  config = c_config(1, 64);
  config.dtype = 7, expect_failed(halfbyte_create(&config, &layer), HALFBYTE_BAD_ARGUMENT, "dtype is 7");
  config.dtype = 0, config.recipe.rotation = -1;
  expect_failed(halfbyte_create(&config, &layer), HALFBYTE_BAD_ARGUMENT, "rotation is -1");
  expect_failed(halfbyte_create(nullptr, &layer), HALFBYTE_BAD_ARGUMENT, "config is NULL");
  config = c_config(1, 64);
  expect_failed(halfbyte_create(&config, nullptr), HALFBYTE_BAD_ARGUMENT, "layer is NULL");

  CLayer good(config);
  Array x(1, 1, 20, 64);
  const halfbyte_view view = c_view(x);
  expect_failed(halfbyte_append(nullptr, &view, &view, 1, 20, nullptr), HALFBYTE_BAD_ARGUMENT, "layer is NULL");
  expect_failed(halfbyte_append(good, nullptr, &view, 1, 20, nullptr), HALFBYTE_BAD_ARGUMENT, "k is NULL");
  expect_failed(halfbyte_append(good, &view, nullptr, 1, 20, nullptr), HALFBYTE_BAD_ARGUMENT, "v is NULL");
  expect_failed(halfbyte_attend(good, nullptr), HALFBYTE_BAD_ARGUMENT, "args is NULL");
  x.set(0, 0, 13, 5, NAN);
  expect_failed(halfbyte_append(good, &view, &view, 1, 20, nullptr), HALFBYTE_BAD_VALUE,
                "K of sequence 0, head 0, token 13");
  EXPECT_EQ(halfbyte_length(good), 0u);
  expect_failed(halfbyte_decode(good, nullptr, nullptr), HALFBYTE_BAD_ARGUMENT, "k_out is NULL");
  expect_failed(halfbyte_select(good, nullptr, 0), HALFBYTE_BAD_ARGUMENT, "rows is NULL");
  expect_failed(halfbyte_copy(good, nullptr), HALFBYTE_BAD_ARGUMENT, "copy is NULL");
  expect_failed(halfbyte_set_rotation(good, nullptr, nullptr), HALFBYTE_BAD_ARGUMENT, "not dense");
  expect_failed(halfbyte_set_lambda(good, nullptr, nullptr), HALFBYTE_BAD_ARGUMENT, "without lambda");
  expect_failed(halfbyte_set_backend("mmx"), HALFBYTE_BAD_ARGUMENT, "scalar");
  expect_failed(halfbyte_set_backend(nullptr), HALFBYTE_BAD_ARGUMENT, "name is NULL");
  halfbyte_destroy(nullptr);
  EXPECT_EQ(halfbyte_length(nullptr), 0u);
  EXPECT_EQ(halfbyte_bytes(nullptr), 0u);
}

TEST(CApi, ErrorsBelongToTheirThread) {
  expect_failed(halfbyte_set_backend("mmx"), HALFBYTE_BAD_ARGUMENT, "mmx");
  std::thread([] {
    EXPECT_STREQ(halfbyte_last_error(), "");
    expect_failed(halfbyte_set_backend("altivec"), HALFBYTE_BAD_ARGUMENT, "altivec");
  }).join();
  EXPECT_NE(std::string(halfbyte_last_error()).find("mmx"), std::string::npos);
}

TEST(CApi, BackendsThreadsVersion) {
  int usable = -1, i = 0;
  for (; halfbyte_backend_name(i, &usable); i++) {
    EXPECT_EQ(backends()[i].name, halfbyte_backend_name(i, nullptr));
    EXPECT_EQ(usable, backends()[i].usable);
  }
  EXPECT_EQ(i, (int)backends().size());
  UseBackend use(backend());
  ASSERT_EQ(halfbyte_set_backend("scalar"), HALFBYTE_OK);
  EXPECT_STREQ(halfbyte_backend(), "scalar");
  UseThreads threads(2);
  halfbyte_set_num_threads(3);
  EXPECT_EQ(halfbyte_num_threads(), 3);
  EXPECT_STREQ(halfbyte_version(), version());
  EXPECT_STREQ(halfbyte_commit(), commit());
}

}  // namespace
}  // namespace halfbyte
