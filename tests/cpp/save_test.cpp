// Saved layers: what comes back is the layer to the bit, and damaged arrays give an error or a layer that works.
#include <algorithm>
#include <fstream>
#include <sstream>

#include "encode.h"
#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// A layer of one of the recipes in use; forms() differ in what they hold, too.
struct Form {
  const char* name;
  Recipe recipe;
  size_t tokens;
  int sliding_window = 0;
  size_t cropped_to = 0;          // 0: not cropped
  std::vector<size_t> rows = {};  // for select; none: not selected
  int d_k = 32, d_v = 32;
  Dtype dtype = Dtype::float32;
  bool offset_given = false, padded = false, recorded = false, turns = false;
};

std::vector<Form> forms() {
  Recipe no_offset, paper, lambda, g16, k8v4, sinks, window, both, warm_up;
  no_offset.offset = false;
  paper.offset = paper.search = paper.signed_scale = false, paper.scale_bits = 32, paper.k = paper.v = {4, 0};
  lambda.lambda = true;
  g16.k.group = g16.v.group = 16;
  k8v4.k.bits = 8;
  sinks.sink_tokens = 32, window.raw_window = 128, both.sink_tokens = 16, both.raw_window = 16,
  warm_up.offset_tokens = 48;
  Recipe by_block, plain_sinks = plain_recipe();
  by_block.offset_span = 16;
  plain_sinks.sink_tokens = 80, plain_sinks.raw_window = 16;
  return {
      {"one token", {}, 1},
      {"default", {}, 150},
      {"whole pages", {}, 129},
      {"no offset", no_offset, 100, 0, 0, {}, 80, 48, Dtype::bfloat16},
      {"paper", paper, 70, 0, 0, {}, 16, 18, Dtype::float16},
      {"lambda", lambda, 90},
      {"groups of 16", g16, 90, 0, 0, {}, 48, 80},
      {"K 8 bits", k8v4, 90, 0, 0, {}, 128, 64, Dtype::bfloat16},
      {"plain", plain_recipe(), 90, 0, 0, {}, 18, 16, Dtype::float16},
      {"plain with sinks", plain_sinks, 150, 0, 0, {1, 0}},
      {"fewer than the sinks", sinks, 20},
      {"sinks", sinks, 120, 0, 0, {0, 0, 1}},
      {"sinks and window", both, 120, 0, 55},
      {"offset given", {}, 12, 0, 0, {}, 32, 32, Dtype::float32, true},
      {"offset waits", {}, 12, 0, 0, {1, 1}, 32, 32, Dtype::float32, false, true},
      {"warm up", warm_up, 40, 0, 0, {}, 32, 32, Dtype::float32, false, true},
      {"warm", warm_up, 90, 0, 0, {}, 32, 32, Dtype::float32, false, true},
      {"warm up again", warm_up, 60, 0, 20, {}, 32, 32, Dtype::float32, false, true, true},
      {"half a block cropped", {}, 200, 0, 69},
      {"cropped inside the newest append", {}, 100, 0, 69, {}, 32, 32, Dtype::float32, false, false, true},
      {"shared pages", {}, 200, 0, 0, {0, 0, 0, 1}},
      {"shared and half a page", {}, 200, 0, 69, {1, 1}},
      {"sliding", {}, 300, 100},
      {"sliding, wide raw window", window, 300, 5},
      {"sliding with sinks", both, 200, 30, 0, {1, 0, 1}},
      {"sliding plain", plain_recipe(), 200, 40},
      {"turning", {}, 200, 0, 0, {1, 0, 1}, 32, 32, Dtype::float32, false, true, false, true},
      {"turning block by block", by_block, 200, 0, 69, {}, 18, 32, Dtype::float32, true, false, true, true},
      {"turning and sliding", {}, 300, 100, 0, {}, 32, 32, Dtype::bfloat16, false, false, false, true},
      {"turning, offset waits", {}, 12, 0, 0, {}, 32, 32, Dtype::float32, false, true, false, true},
  };
}

LayerConfig config_of(const Form& form) {
  LayerConfig config = testing::config_of(2, form.d_k, form.dtype, form.recipe);
  config.head_dim_v = form.d_v, config.sliding_window = form.sliding_window, config.layer_index = 3;
  return config;
}

Layer layer_of(Random& random, const Form& form) {
  Layer layer = make_layer(config_of(form));
  auto per_head = [&](int d) { return random.normals(2 * d, 0.3f); };
  if (form.turns) must(set_rope(layer, random_rope(random, form.d_k)));
  if (form.offset_given) must(layer.set_offset(per_head(form.d_k).data(), per_head(form.d_v).data()));
  if (form.recipe.lambda) {
    std::vector<float> k, v;
    for (int i = 0; i < 2 * form.d_k; i++) k.push_back(random.factor());
    for (int i = 0; i < 2 * form.d_v; i++) v.push_back(random.factor());
    must(layer.set_lambda(k.data(), v.data()));
  }
  const Array k = random_array(random, 2, 2, form.tokens, form.d_k, form.dtype);
  const Array v = random_array(random, 2, 2, form.tokens, form.d_v, form.dtype);
  std::vector<uint8_t> counted(2 * form.tokens, 1);
  for (size_t i = 0; form.padded && i < counted.size(); i++) counted[i] = random.below(3) > 0;
  layer.record_past(form.recorded);
  if (form.sliding_window) {
    for (size_t t = 0; t < form.tokens; t++) must(append(layer, k, v, t, t + 1));
  } else {
    must(layer.append(k.view(), v.view(), 2, form.tokens, form.padded ? counted.data() : nullptr));
  }
  layer.record_past(false);
  if (form.cropped_to) must(layer.crop(form.cropped_to));
  if (!form.rows.empty()) must(layer.select(form.rows));
  return layer;
}

// Everything a caller can see of two layers, without changing them.
void expect_same(Layer& a, Layer& b, Random& random) {
  EXPECT_EQ(a.length(), b.length());
  EXPECT_EQ(a.first(), b.first());
  EXPECT_EQ(a.packed_tokens(), b.packed_tokens());
  EXPECT_EQ(a.batch(), b.batch());
  EXPECT_EQ(a.has_offset(), b.has_offset());
  EXPECT_EQ(difference(save(a), save(b)), "");
  EXPECT_TRUE(same_bits(decode(a), decode(b)));
  const Array q = random_array(random, a.batch(), 4, 1, a.config().head_dim_k, a.config().dtype);
  EXPECT_TRUE(same_bits(attend(a, q), attend(b, q)));
}

void append_to_both(Layer& a, Layer& b, size_t tokens, Random& random) {
  const LayerConfig& config = a.config();
  const Array k = random_array(random, a.batch(), 2, tokens, config.head_dim_k, config.dtype);
  const Array v = random_array(random, a.batch(), 2, tokens, config.head_dim_v, config.dtype);
  must(append(a, k, v)), must(append(b, k, v));
  const Array q = random_array(random, a.batch(), 4, tokens, config.head_dim_k, config.dtype);
  Array of_a = poisoned(a.batch(), 4, tokens, config.head_dim_v, config.dtype), of_b = of_a;
  AttendArgs args = args_of(q, of_a);
  args.chunk_k = k.view(), args.chunk_v = v.view();
  must(a.attend(args));
  args.out = of_b.out();
  must(b.attend(args));
  EXPECT_TRUE(same_bits(of_a, of_b));
}

TEST(Save, LayersComeBackAndGoOnAsTheyWere) {
  Random random;
  for (const std::string& name : fast_backends())
    for (const Form& form : forms()) {
      SCOPED_TRACE(name + ", " + form.name);
      UseBackend use(name);
      Layer layer = layer_of(random, form), loaded = load(config_of(form), save(layer));
      expect_same(layer, loaded, random);
      append_to_both(layer, loaded, 1, random);  // a single token: from here on neither can go back into an append
      append_to_both(layer, loaded, 37, random);
      expect_same(layer, loaded, random);
      const size_t length = layer.length() - 11;
      must(layer.crop(length)), must(loaded.crop(length));
      expect_same(layer, loaded, random);
      append_to_both(layer, loaded, 20, random);
      const std::vector<size_t> rows(3, (size_t)layer.batch() - 1);
      must(layer.select(rows)), must(loaded.select(rows));
      append_to_both(layer, loaded, 1, random);
      expect_same(layer, loaded, random);
    }
}

TEST(Save, AnyBackendLoadsTheSameLayer) {
  Random random;
  for (const Form& form : forms()) {
    SCOPED_TRACE(form.name);
    Layer layer = layer_of(random, form);
    const LayerParts parts = save(layer);
    const Decoded want = decode(layer);
    for (const std::string& name : usable_backends()) {
      Layer loaded = [&] {
        UseBackend use(name);
        Layer loaded = load(config_of(form), parts);
        EXPECT_EQ(difference(save(loaded), parts), "") << name;
        return loaded;
      }();
      EXPECT_TRUE(same_bits(decode(loaded), want)) << name;
    }
  }
}

TEST(Save, SharedPagesAreSavedAndLoadedOnce) {
  Random random;
  const size_t tokens = 64 * 10 + 20;
  const Array x = random_array(random, 2, 2, tokens, 64);
  Layer layer = make_layer(testing::config_of(2, 64));
  must(append(layer, x, x, 0, tokens - 1)), must(append(layer, x, x, tokens - 1, tokens));
  const LayerParts apart = save(layer);
  const size_t bytes_apart = layer.bytes();
  std::vector<int32_t> numbers(2 * 11);
  for (int i = 0; i < 22; i++) numbers[i] = i;
  EXPECT_EQ(apart.page_table, numbers);
  must(layer.select({1, 1, 0, 1}));
  const LayerParts shared = save(layer);
  EXPECT_EQ(shared.pages.size(), apart.pages.size());
  std::vector<int32_t> table;
  for (int sequence : {0, 0, 1, 0})
    for (int i = 0; i < 11; i++) table.push_back(sequence * 11 + i);
  EXPECT_EQ(shared.page_table, table);
  Layer loaded = load(layer.config(), shared);
  EXPECT_LT(loaded.bytes(), bytes_apart + bytes_apart / 3);  // the raw tokens of two more sequences
  // One beam writes: the others keep what they had.
  const Array more = random_array(random, 4, 2, 30, 64);
  must(append(layer, more, more)), must(append(loaded, more, more));
  expect_same(layer, loaded, random);
}

// What a crop left behind in a page must not reach a file.
TEST(Save, SlotsWithoutATokenAreZero) {
  Random random;
  for (const Recipe& recipe : {Recipe{},
                               [] {
                                 Recipe r;
                                 r.k = {8, 16}, r.v = {8, 0}, r.scale_bits = 32;
                                 return r;
                               }(),
                               plain_recipe()})
    for (size_t left : {65, 69, 80, 83, 100, 127}) {
      const PageFormat format = make_page_format(recipe, 48, 32);
      LayerConfig config = testing::config_of(2, 48, Dtype::float32, recipe);
      config.head_dim_v = 32;
      Layer layer = make_layer(config);
      const Array k = random_array(random, 1, 2, 300, 48), v = random_array(random, 1, 2, 300, 32);
      must(append(layer, k, v));
      must(layer.crop(left));
      ASSERT_EQ(layer.packed_tokens(), left);
      const LayerParts parts = save(layer);
      ASSERT_EQ(parts.page_table.size(), 2u);
      const size_t page_head = page_head_bytes(format);
      for (int head = 0; head < 2; head++) {
        const uint8_t* page = parts.pages.data() + (2 + head) * page_head;
        for (size_t slot = 0; slot < 64; slot++) {
          const int block = (int)slot / 16, token = (int)slot % 16;
          for (Side side : {Side::k, Side::v}) {
            const SideFormat& f = side == Side::k ? format.k : format.v;
            const uint8_t* codes = page + (side == Side::k ? k_codes_at(format, block) : v_codes_at(format, block));
            const uint8_t* scales = page + (side == Side::k ? k_scales_at(format, block) : v_scales_at(format, block));
            int set = 0;
            for (int g = 0; g < f.n_groups; g++)
              for (int i = 0; i < f.scale_bytes; i++) set |= scales[(g * 16 + token) * f.scale_bytes + i];
            for (int c = 0; c < (f.bits == kPlainBits ? 4 * f.head_dim : f.padded_dim); c++) {
              if (f.bits == kPlainBits) {
                set |= codes[token * 4 * f.head_dim + c];
                continue;
              }
              const CodePlace place = side == Side::k ? k_code_place(f.bits, token, c) : v_code_place(f.bits, token, c);
              set |= codes[place.byte] >> place.shift & (f.bits == 4 ? 15 : 255);
            }
            EXPECT_EQ(set != 0, 64 + slot < left) << "slot " << slot << ", left " << left;
          }
        }
      }
    }
}

TEST(Save, AnEmptyLayerHoldsNothingToSave) {
  Layer layer = make_layer(testing::config_of(1, 64));
  LayerParts parts;
  EXPECT_EQ(layer.save(parts).code(), Code::bad_argument);
}

TEST(Save, ARecordedPastIsSaved) {
  Random random;
  LayerConfig config = testing::config_of(1, 32);
  config.sliding_window = 20;
  Layer layer = make_layer(config);
  layer.record_past(true);
  const Array x = random_array(random, 1, 1, 200, 32);
  must(append(layer, x, x));
  Layer loaded = load(config, save(layer));
  EXPECT_EQ(loaded.visible(), 200u);
  EXPECT_TRUE(same_bits(decode(loaded), decode(layer)));
}

// ---- damage

void expect_refused(const LayerConfig& config, const LayerParts& parts, const std::string& part) {
  const Result<Layer> loaded = Layer::load(config, parts);
  ASSERT_FALSE(loaded.ok()) << part;
  EXPECT_EQ(loaded.status().code(), Code::bad_value) << part;
  EXPECT_NE(loaded.status().message().find(part), std::string::npos) << loaded.status().message();
}

TEST(Damage, IsNamed) {
  Random random;
  Form form = forms()[1];
  form.recipe.lambda = true;
  const LayerConfig config = config_of(form);
  const LayerParts good = save(layer_of(random, form));
  auto refused = [&](const std::string& part, auto change) {
    LayerParts bad = good;
    change(bad);
    expect_refused(config, bad, part);
  };
  refused("batch is 0", [](LayerParts& p) { p.batch = 0; });
  refused("batch is -1", [](LayerParts& p) { p.batch = -1; });
  refused("length is 0", [](LayerParts& p) { p.length = 0; });
  refused("length is", [](LayerParts& p) { p.length = UINT64_MAX; });
  refused("packed_end is", [](LayerParts& p) { p.packed_end = p.length + 1; });
  refused("packed_end is", [](LayerParts& p) { p.packed_end -= 64; });
  refused("first is 1", [](LayerParts& p) { p.first = 1; });
  refused("pages_dropped is 1", [](LayerParts& p) { p.pages_dropped = 1; });
  refused("offset_ready", [](LayerParts& p) { p.offset_ready = false; });
  refused("page_table", [](LayerParts& p) { p.page_table.pop_back(); });
  refused("page_table", [](LayerParts& p) { p.page_table[0] = -1; });
  refused("page_table", [](LayerParts& p) { p.page_table[0] = (int32_t)p.page_table.size(); });
  refused("pages", [](LayerParts& p) { p.pages.pop_back(); });
  refused("raw_k", [](LayerParts& p) { p.raw_k.push_back(0); });
  refused("raw_v", [](LayerParts& p) { p.raw_v.clear(); });
  refused("offset_k", [](LayerParts& p) { p.offset_k.pop_back(); });
  refused("offset_v", [](LayerParts& p) { p.offset_v.push_back(0.0f); });
  refused("given_offset_k", [](LayerParts& p) { p.given_offset_k = {1.0f}; });
  refused("given_offset_v", [](LayerParts& p) { p.given_offset_v = {1.0f}; });
  refused("lambda_k", [](LayerParts& p) { p.lambda_k.pop_back(); });
  refused("lambda_v", [](LayerParts& p) { p.lambda_v.pop_back(); });
  refused("frequencies has another size", [](LayerParts& p) { p.frequencies.resize(17); });
  refused("frequencies holds", [](LayerParts& p) { p.frequencies = {1.0f, INFINITY}; });
  refused("lambda is missing", [](LayerParts& p) { p.lambda_v.clear(); });
  refused("counted", [](LayerParts& p) { p.counted = {1}; });
  refused("an offset", [](LayerParts& p) { p.offset_k[3] = NAN; });
  refused("lambda holds", [](LayerParts& p) { p.lambda_k[3] = 0.0f; });
  refused("a raw token", [](LayerParts& p) { store_element(p.raw_k.data(), Dtype::float32, 2, INFINITY); });
  refused("a page", [](LayerParts& p) { std::fill(p.pages.begin(), p.pages.end(), 0x7e); });
  EXPECT_FALSE(Layer::load(testing::config_of(2, 63), good).ok());
  expect_refused(testing::config_of(2, 64, Dtype::float32, form.recipe), good, "damaged");
  LayerParts turning = good;
  turning.frequencies = {1.0f};
  EXPECT_TRUE(Layer::load(config, turning).ok());
  LayerConfig fixed = config;
  fixed.recipe.offset_span = 0;
  EXPECT_TRUE(Layer::load(fixed, good).ok());
  expect_refused(fixed, turning, "frequencies has another size");
}

// Sizes whose product wraps around to what the arrays hold.
TEST(Damage, HugeCountsAreRefusedWithoutUsingThem) {
  Recipe recipe;
  recipe.offset = false;
  LayerParts parts;
  parts.batch = 1 << 30, parts.length = parts.packed_end = (uint64_t)1 << 40, parts.offset_ready = true;
  EXPECT_FALSE(Layer::load(testing::config_of(2, 32, Dtype::float32, recipe), parts).ok());
}

// A window may have passed tokens that are still raw, but their pages cannot be gone.
TEST(Damage, PagesAreNotGoneBeforeTheyAreWritten) {
  Random random;
  Recipe recipe;
  recipe.raw_window = 128, recipe.offset = false;
  LayerConfig config = testing::config_of(2, 32, Dtype::float32, recipe);
  config.sliding_window = 2;
  Layer layer = make_layer(config);
  const Array x = random_array(random, 1, 2, 100, 32);
  for (size_t t = 0; t < 100; t++) must(append(layer, x, x, t, t + 1));
  LayerParts parts = save(layer);
  ASSERT_EQ(parts.packed_end, 0u);
  parts.pages_dropped = 1;
  expect_refused(config, parts, "pages_dropped is 1");
}

// ---- damage at random

// Uses a loaded layer in every way; values are whatever the damage made of them.
void use(Layer& layer, Random& random) {
  const LayerConfig config = layer.config();
  const int batch = layer.batch();
  auto append_some = [&](size_t tokens, bool exact) {
    const Array k = random_array(random, layer.batch(), config.kv_heads, tokens, config.head_dim_k, config.dtype);
    const Array v = random_array(random, layer.batch(), config.kv_heads, tokens, config.head_dim_v, config.dtype);
    must(append(layer, k, v));
    const Array q = random_array(random, layer.batch(), config.kv_heads, tokens, config.head_dim_k, config.dtype);
    Array out = poisoned(layer.batch(), config.kv_heads, tokens, config.head_dim_v, config.dtype);
    AttendArgs args = args_of(q, out);
    args.chunk_k = k.view(), args.chunk_v = v.view(), args.exact = exact;
    must(layer.attend(args));
  };
  decode(layer);
  const Array q = random_array(random, batch, config.kv_heads, 1, config.head_dim_k, config.dtype);
  attend(layer, q);
  if (random.below(2)) append_some(1, true);
  append_some(20, random.below(2));
  (void)layer.crop(layer.length() - random.below((int)std::min<size_t>(layer.length(), 100)));  // a window may refuse
  must(layer.select({(size_t)random.below(batch), (size_t)random.below(batch)}));
  append_some(random.below(2) ? 1 : 90, false);
  decode(layer);
  save(layer);
  EXPECT_GT(layer.bytes(), 0u);
}

uint64_t odd_number(Random& random, uint64_t value) {
  constexpr uint64_t kOnes = UINT64_MAX;
  const uint64_t numbers[] = {0,
                              1,
                              2,
                              15,
                              16,
                              17,
                              31,
                              48,
                              63,
                              64,
                              65,
                              127,
                              128,
                              129,
                              1000,
                              1u << 20,
                              0x7fffffff,
                              0x80000000,
                              0xffffffff,
                              (uint64_t)1 << 32,
                              ((uint64_t)1 << 40) - 1,
                              (uint64_t)1 << 40,
                              ((uint64_t)1 << 40) + 1,
                              (uint64_t)1 << 62,
                              (uint64_t)1 << 63,
                              kOnes,
                              kOnes - 15,
                              kOnes - 63};
  const uint64_t steps[] = {1, 2, 15, 16, 17, 64, 128};
  if (random.below(2)) return numbers[random.below((int)std::size(numbers))];
  const uint64_t step = steps[random.below((int)std::size(steps))];
  return random.below(2) ? value + step : value - step;
}

template <class T>
void damage(Random& random, std::vector<T>& x) {
  switch (random.below(6)) {
    case 0:
      x.clear();
      break;
    case 1:
      x.resize(x.size() - std::min<size_t>(x.size(), 1 + random.below(70)));
      break;
    case 2:
      x.resize(x.size() + 1 + random.below(70));
      break;
    case 3:
      x.resize(x.size() * (size_t)random.below(3));
      break;
    default:
      for (int i = random.below(4); i >= 0 && !x.empty(); i--) {
        T& item = x[random.below((int)x.size())];
        uint8_t bytes[sizeof(T)];
        memcpy(bytes, &item, sizeof(T));
        bytes[random.below(sizeof(T))] ^= (uint8_t)(1 << random.below(8));
        if (random.below(3) == 0)
          std::fill_n(bytes, sizeof(T), (uint8_t)(random.below(2) ? 0xff : 0x7c));  // NaN; large
        memcpy(&item, bytes, sizeof(T));
      }
  }
}

void damage_counts(Random& random, LayerParts& parts) {
  switch (random.below(7)) {
    case 0:
      parts.batch = (int)odd_number(random, (uint64_t)parts.batch);
      break;
    case 1:
      parts.length = odd_number(random, parts.length);
      break;
    case 2:
      parts.first = odd_number(random, parts.first);
      break;
    case 3:
      parts.packed_end = odd_number(random, parts.packed_end);
      break;
    case 4:
      parts.pages_dropped = odd_number(random, parts.pages_dropped);
      break;
    case 5:
      parts.offset_ready = !parts.offset_ready;
      break;
    case 6: {  // all of it further on, as in a long sliding sequence
      const uint64_t shift = 64 * (uint64_t)random.below(1 << 20);
      parts.length += shift, parts.first += shift, parts.packed_end += shift, parts.pages_dropped += shift / 64;
    }
  }
}

void damage_arrays(Random& random, LayerParts& parts) {
  switch (random.below(13)) {
    case 0:
      damage(random, parts.page_table);
      break;
    case 1:
      damage(random, parts.pages);
      break;
    case 2:
      damage(random, parts.raw_k);
      break;
    case 3:
      damage(random, parts.raw_v);
      break;
    case 4:
      damage(random, parts.offset_k);
      break;
    case 5:
      damage(random, parts.offset_v);
      break;
    case 6:
      damage(random, parts.given_offset_k);
      break;
    case 7:
      damage(random, parts.given_offset_v);
      break;
    case 8:
      damage(random, parts.lambda_k);
      break;
    case 9:
      damage(random, parts.lambda_v);
      break;
    case 10:
      damage(random, parts.counted);
      break;
    case 11:
      damage(random, parts.frequencies);
      break;
    case 12:
      parts.interleaved = !parts.interleaved;
      break;
  }
}

// Makes the arrays as long as the counts say, so that wrong counts get as far as they can.
void fit_arrays(const LayerConfig& config, LayerParts& parts) {
  const uint64_t sink = config.recipe.sink_tokens, last = (parts.packed_end + 63) / 64;
  const uint64_t pages = parts.packed_end > sink && last > parts.pages_dropped ? last - parts.pages_dropped : 0;
  const uint64_t raw =
      std::min(sink, parts.length) + (parts.length > parts.packed_end ? parts.length - parts.packed_end : 0);
  if (parts.batch < 1 || parts.batch > 8 || pages > 100 || raw > 1000) return;
  const size_t rows = (size_t)parts.batch * config.kv_heads, bytes = dtype_bytes(config.dtype);
  const size_t offsets = config.recipe.offset && parts.offset_ready ? rows : 0;
  parts.page_table.resize(parts.batch * pages);
  if (parts.pages.empty() && pages)
    parts.pages.resize(config.kv_heads *
                       page_head_bytes(make_page_format(config.recipe, config.head_dim_k, config.head_dim_v)));
  parts.raw_k.resize(rows * raw * config.head_dim_k * bytes),
      parts.raw_v.resize(rows * raw * config.head_dim_v * bytes);
  parts.offset_k.resize(offsets * config.head_dim_k), parts.offset_v.resize(offsets * config.head_dim_v);
  parts.counted.clear();
}

// Loads damaged arrays; true when a layer came of it, which was then used.
bool survives(const LayerConfig& config, const LayerParts& parts, Random& random) {
  try {
    Result<Layer> loaded = Layer::load(config, parts);
    if (!loaded.ok()) {
      EXPECT_NE(loaded.status().message(), "");
      return false;
    }
    use(loaded.value(), random);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "load or use threw: " << error.what();
  }
  return true;
}

std::string counts_of(const LayerParts& p) {
  return "batch " + std::to_string(p.batch) + ", length " + std::to_string(p.length) + ", first " +
         std::to_string(p.first) + ", packed_end " + std::to_string(p.packed_end) + ", pages_dropped " +
         std::to_string(p.pages_dropped) + ", offset_ready " + std::to_string(p.offset_ready);
}

TEST(Damage, AtRandomGivesAnErrorOrALayerThatWorks) {
  Random random;
  UseBackend use_backend(fast_backends().front());
  int loaded = 0, refused = 0;
  for (Form form : forms()) {
    form.d_k = std::min(form.d_k, 32), form.d_v = std::min(form.d_v, 18);  // many small ones rather than few large ones
    const LayerConfig config = config_of(form);
    const LayerParts good = save(layer_of(random, form));
    for (int i = 0; i < 160; i++) {
      LayerParts bad = good;
      const bool fits = i % 2;
      for (int n = random.below(3); n >= 0; n--)
        fits || random.below(3) == 0 ? damage_counts(random, bad) : damage_arrays(random, bad);
      if (fits) fit_arrays(config, bad);
      (survives(config, bad, random) ? loaded : refused)++;
      ASSERT_FALSE(HasFailure()) << form.name << ": " << counts_of(bad);
    }
  }
  // Both outcomes, often: else this test would have lost its aim.
  EXPECT_GT(loaded, 300) << loaded << " of " << loaded + refused;
  EXPECT_GT(refused, 300) << refused << " of " << loaded + refused;
}

// ---- the worked example of docs/format.md

std::string worked_example() {
  Layer layer = make_layer(testing::config_of(1, 16, Dtype::float32, plain_recipe()));
  Array k(1, 1, 70, 16), v(1, 1, 70, 16);
  for (size_t t = 0; t < 70; t++)
    for (int c = 0; c < 16; c++) k.set(0, 0, t, c, (float)t + (float)c / 16.0f), v.set(0, 0, t, c, -(float)t);
  must(append(layer, k, v));
  must(layer.select({0, 0}));
  const LayerParts parts = save(layer);
  std::stringstream text;
  text << "batch " << parts.batch << ", length " << parts.length << ", first " << parts.first << ", packed_end "
       << parts.packed_end << ", pages_dropped " << parts.pages_dropped << ", offset_ready " << parts.offset_ready
       << "\n";
  text << "page_table";
  for (int32_t page : parts.page_table) text << " " << page;
  text << "\npages   " << parts.pages.size() << " bytes\nraw_k   " << parts.raw_k.size() << " bytes, raw_v "
       << parts.raw_v.size() << " bytes\n";
  auto floats = [&](const char* what, const std::vector<uint8_t>& bytes, size_t at) {
    text << what << " at byte " << at << ":";
    for (size_t i = 0; i < 2; i++) text << " " << load_element(bytes.data() + at, Dtype::float32, i);
    text << "\n";
  };
  const PageFormat format = make_page_format(plain_recipe(), 16, 16);
  floats("pages, K of token 17", parts.pages, k_codes_at(format, 1) + 16 * 4);
  floats("pages, V of token 17", parts.pages, v_codes_at(format, 1) + 16 * 4);
  floats("raw_k, sequence 1, token 64", parts.raw_k, 6 * 16 * 4);
  return text.str();
}

TEST(Save, WorkedExampleOfTheDocumentIsWhatSaveGives) {
  std::ifstream file(HALFBYTE_SOURCE_DIR "/docs/format.md");
  ASSERT_TRUE(file) << "docs/format.md";
  std::stringstream document;
  document << file.rdbuf();
  EXPECT_NE(document.str().find(worked_example()), std::string::npos) << "docs/format.md should hold these lines:\n"
                                                                      << worked_example();
}

}  // namespace
}  // namespace halfbyte
