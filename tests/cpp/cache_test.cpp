// Life of a cache: create, crop, select, copy on write, reset, sliding windows, bytes held; and the raw baseline.
#include <fstream>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

Layer filled(const Array& k, const Array& v, const Recipe& recipe = {}, int sliding_window = 0) {
  LayerConfig config = config_of(k.heads, k.d, k.dtype, recipe);
  config.sliding_window = sliding_window;
  Layer layer = make_layer(config);
  must(append(layer, k, v));
  return layer;
}

// Tokens [from, to) of a, as far as bits go.
bool same_tokens(const Array& a, const Array& b, size_t from, size_t to) {
  for (int i = 0; i < a.batch; i++)
    for (int h = 0; h < a.heads; h++)
      for (size_t t = from; t < to; t++)
        for (int c = 0; c < a.d; c++)
          if (a.get(i, h, t, c) != b.get(i, h, t, c)) return false;
  return true;
}

TEST(Cache, NamesBadConfigs) {
  auto expect_bad = [](const LayerConfig& config, const std::string& part) {
    const Result<Layer> layer = Layer::create(config);
    EXPECT_FALSE(layer.ok()) << part;
    EXPECT_EQ(layer.status().code(), Code::bad_argument);
    EXPECT_NE(layer.status().message().find(part), std::string::npos) << layer.status().message();
  };
  for (int d : {0, -2, 14, 17, 65, 514, 1024}) {
    expect_bad(config_of(1, d), "head_dim is " + std::to_string(d));
    LayerConfig config = config_of(1, 64);
    config.head_dim_v = d;
    expect_bad(config, "head_dim is " + std::to_string(d));
  }
  expect_bad(config_of(0, 64), "kv_heads is 0");
  LayerConfig config = config_of(1, 64);
  config.sliding_window = 1, expect_bad(config, "sliding_window is 1");
  config.sliding_window = -4, expect_bad(config, "sliding_window is -4");
  auto with = [](auto change) {
    LayerConfig config = config_of(1, 80);
    change(config.recipe);
    return config;
  };
  expect_bad(with([](Recipe& r) { r.rotation = Rotation::srht; }), "srht needs a power of two");
  expect_bad(with([](Recipe& r) { r.k.bits = 3; }), "k_bits is 3");
  expect_bad(with([](Recipe& r) { r.v.bits = 16; }), "v_bits is 16");
  expect_bad(with([](Recipe& r) { r.k.group = 8; }), "k_group is 8");
  expect_bad(with([](Recipe& r) { r.v.group = 128; }), "v_group is 128");
  expect_bad(with([](Recipe& r) { r.scale_bits = 8; }), "scale_bits is 8");
  expect_bad(with([](Recipe& r) { r.sink_tokens = 4; }), "sink_tokens is 4");
  expect_bad(with([](Recipe& r) { r.raw_window = -16; }), "raw_window is -16");
}

TEST(Cache, CropThenAppend) {
  Random random;
  for (const std::string& name : fast_backends())
    for (int form = 0; form < 3; form++) {
      UseBackend use(name);
      Recipe recipe;
      recipe.sink_tokens = form == 1 ? 32 : 0, recipe.raw_window = form == 2 ? 16 : 0;
      const Array k = random_array(random, 2, 2, 150, 64), v = random_array(random, 2, 2, 150, 64);
      const std::vector<float> mu = random.normals(2 * 64);
      Layer never = make_layer(config_of(2, 64, Dtype::float32, recipe));
      must(never.set_offset(mu.data(), mu.data()));
      must(append(never, k, v));
      const Decoded whole = decode(never);
      for (size_t length : {1, 15, 16, 31, 33, 64, 70, 96, 127, 128, 129, 143, 149, 150, 400}) {
        Layer layer = make_layer(config_of(2, 64, Dtype::float32, recipe));
        must(layer.set_offset(mu.data(), mu.data()));
        layer.record_past(length % 2);
        must(append(layer, k, v));
        must(layer.crop(length));
        ASSERT_EQ(layer.length(), std::min<size_t>(length, 150));
        // Codes stay codes; what the last append had packed and the rule now wants raw is as it was given.
        const size_t sinks = recipe.sink_tokens, codes = std::max(sinks, sinks + layer.packed_tokens());
        ASSERT_TRUE(same_tokens(decode(layer).k, whole.k, 0, std::min(codes, layer.length()))) << name << " " << length;
        ASSERT_TRUE(same_tokens(decode(layer).k, k, codes, layer.length())) << name << " " << length;
        while (layer.length() < 150) {
          const size_t to = std::min<size_t>(150, layer.length() + 1 + random.below(20));
          must(append(layer, k, v, layer.length(), to));
        }
        // The rule looks at positions alone, so the same tokens are codes as if nothing had been cropped.
        const Decoded held = decode(layer);
        EXPECT_EQ(layer.packed_tokens(), never.packed_tokens()) << name << " " << length;
        EXPECT_TRUE(same_bits(held, whole)) << name << " " << length;
        const Array q = random_array(random, 2, 4, 1, 64);
        EXPECT_TRUE(same_bits(attend(layer, q), attend(never, q))) << name << " " << length;
      }
    }
}

TEST(Cache, ABlockThatCropHalvedIsFilledPacked) {
  Random random;
  const Array k = random_array(random, 1, 1, 100, 64), v = random_array(random, 1, 1, 100, 64);
  Layer layer = filled(k, v);
  const Decoded whole = decode(layer);
  ASSERT_EQ(layer.packed_tokens(), 96u);
  must(layer.crop(69));
  EXPECT_EQ(layer.packed_tokens(), 69u);
  for (size_t t = 69; t < 85; t++) {
    must(append(layer, k, v, t, t + 1));
    ASSERT_EQ(layer.packed_tokens(), std::min<size_t>(t + 1, 80)) << t;
    ASSERT_TRUE(same_tokens(decode(layer).k, whole.k, 0, std::min<size_t>(t + 1, 80))) << t;
  }
}

// ---- crop into the newest append

// Outputs of the newest `tokens` tokens of k, v, appended as one step.
Array attend_step(Layer& layer, const Array& q, const Array& k, const Array& v) {
  Array out = poisoned(q.batch, q.heads, q.tokens, v.d, q.dtype);
  AttendArgs args = args_of(q, out);
  args.chunk_k = k.view(), args.chunk_v = v.view(), args.exact = true;
  must(layer.attend(args));
  return out;
}

struct Rejection {
  Recipe recipe;
  int sliding_window = 0;
  size_t before = 0, accepted = 0, rejected = 0, after = 0;  // tokens; the last append holds `accepted` + `rejected`
};

void check_rejection(Random& random, const Rejection& c) {
  const size_t kept = c.before + c.accepted, drafted = kept + c.rejected;
  const Array k = random_array(random, 2, 2, drafted, 32), v = random_array(random, 2, 2, drafted, 32);
  const Array other_k = random_array(random, 2, 2, c.after, 32), other_v = random_array(random, 2, 2, c.after, 32);
  const Array q = random_array(random, 2, 4, c.after, 32), one = random_array(random, 2, 4, 1, 32);
  const std::vector<float> mu = random.normals(2 * 32, 0.3f);
  LayerConfig config = config_of(2, 32, Dtype::float32, c.recipe);
  config.sliding_window = c.sliding_window;
  Layer layer = make_layer(config), never = make_layer(config);
  for (Layer* each : {&layer, &never}) {
    each->record_past(true);
    if (c.recipe.offset) must(each->set_offset(mu.data(), mu.data()));
    if (c.before) must(append(*each, k, v, 0, c.before));
  }
  must(append(layer, k, v, c.before, drafted));
  must(layer.crop(kept));
  if (c.accepted) must(append(never, k, v, c.before, kept));
  const std::string what = backend() + ": " + std::to_string(c.before) + " + " + std::to_string(c.accepted) + " + " +
                           std::to_string(c.rejected) + ", then " + std::to_string(c.after) + "; sinks " +
                           std::to_string(c.recipe.sink_tokens) + ", window " + std::to_string(c.recipe.raw_window) +
                           ", sliding " + std::to_string(c.sliding_window) + ", bits " +
                           std::to_string(c.recipe.k.bits);
  EXPECT_EQ(difference(save(layer), save(never)), "") << what << ", cropped";
  EXPECT_TRUE(same_bits(attend(layer, one), attend(never, one))) << what << ", cropped";
  must(append(layer, other_k, other_v)), must(append(never, other_k, other_v));
  EXPECT_EQ(difference(save(layer), save(never)), "") << what;
  EXPECT_TRUE(same_bits(attend_step(layer, q, other_k, other_v), attend_step(never, q, other_k, other_v))) << what;
  EXPECT_TRUE(same_bits(attend(layer, one), attend(never, one))) << what;
}

TEST(Undo, RejectedTokensLeaveNoTrace) {
  Random random;
  for (const std::string& name : fast_backends())
    for (int i = 0; i < 150; i++) {
      UseBackend use(name);
      Rejection c;
      if (i % 5 == 0) c.recipe = plain_recipe();
      c.recipe.sink_tokens = 16 * random.below(3), c.recipe.raw_window = 16 * random.below(4);
      c.before = 1 + random.below(100), c.rejected = 1 + random.below(64);
      c.accepted = std::max<size_t>(c.rejected == 1, random.below(30));  // the last append is of several tokens
      c.after = 1 + random.below(40);
      if (c.accepted && i % 3 == 0) c.sliding_window = 2 + random.below(80);
      check_rejection(random, c);
    }
}

TEST(Undo, EveryLengthOfADraftCanBeRejected) {
  Random random;
  for (size_t before : {1, 15, 16, 17, 31, 32, 64, 70})
    for (size_t rejected = 2; rejected <= 64; rejected += 1 + before % 3)
      check_rejection(random, {{}, 0, before, 0, rejected, 3});
}

TEST(Undo, AFirstPromptCanBeRejectedInPart) {
  Random random;
  for (size_t accepted : {1, 10, 16, 17, 40, 200})
    for (size_t rejected : {1, 5, 20, 64}) check_rejection(random, {{}, 0, 0, accepted, rejected, 20});
}

TEST(Undo, DeeperCropsKeepCodes) {
  Random random;
  const Array k = random_array(random, 1, 1, 300, 64), v = random_array(random, 1, 1, 300, 64);
  for (size_t length : {1, 100, 201, 220}) {
    Layer layer = make_layer(config_of(1, 64));
    layer.record_past(true);
    must(append(layer, k, v));
    const Decoded whole = decode(layer);
    must(layer.crop(length));
    EXPECT_EQ(layer.packed_tokens(), length);
    EXPECT_TRUE(same_tokens(decode(layer).k, whole.k, 0, length));
  }
}

TEST(Undo, OnlySeveralTokensAtOnceAreKeptForItAndOnlyIfAskedFor) {
  Random random;
  const Array k = random_array(random, 1, 1, 101, 64), v = random_array(random, 1, 1, 101, 64);
  Layer layer = make_layer(config_of(1, 64)), singly = make_layer(config_of(1, 64)),
        unasked = make_layer(config_of(1, 64));
  layer.record_past(true), singly.record_past(true);
  must(append(layer, k, v, 0, 100)), must(append(unasked, k, v, 0, 100));
  EXPECT_GE(layer.bytes(), unasked.bytes() + 2 * 64 * 64 * sizeof(float));  // the newest 64 tokens that it packed, raw
  must(append(layer, k, v, 100, 101));
  for (size_t t = 0; t < 101; t++) must(append(singly, k, v, t, t + 1));
  for (Layer* each : {&layer, &singly, &unasked}) {
    must(each->crop(90));
    EXPECT_EQ(each->packed_tokens(), 90u);
  }
}

TEST(Cache, CropToNothingAndResetStartAnew) {
  Random random;
  const Array k = random_array(random, 2, 1, 70, 64), v = random_array(random, 2, 1, 70, 64);
  const std::vector<float> mu = random.normals(64);
  for (bool by_crop : {false, true}) {
    Layer layer = make_layer(config_of(1, 64)), fresh = make_layer(config_of(1, 64));
    must(layer.set_offset(mu.data(), nullptr)), must(fresh.set_offset(mu.data(), nullptr));
    must(append(layer, k, v));
    if (by_crop)
      must(layer.crop(0));
    else
      layer.reset();
    EXPECT_EQ(layer.length(), 0u);
    EXPECT_EQ(layer.batch(), 0);
    EXPECT_FALSE(layer.has_offset());
    EXPECT_LE(layer.bytes(), 64 * sizeof(float));  // the offset it was given, nothing else
    const Array q = random_array(random, 2, 1, 1, 64);
    Array out = poisoned(2, 1, 1, 64);
    EXPECT_FALSE(layer.attend(args_of(q, out)).ok());
    const Array k1 = random_array(random, 1, 1, 40, 64);  // another batch
    must(append(layer, k1, k1)), must(append(fresh, k1, k1));
    EXPECT_TRUE(same_bits(decode(layer), decode(fresh)));
  }
}

TEST(Cache, SelectReordersRepeatsAndDrops) {
  Random random;
  Recipe recipe;
  recipe.sink_tokens = 16;
  const Array k = random_array(random, 3, 2, 90, 64), v = random_array(random, 3, 2, 90, 64);
  for (const std::vector<size_t>& rows : {std::vector<size_t>{2, 0, 1}, {1, 1, 1, 0}, {2}, {0, 2}}) {
    Layer layer = filled(k, v, recipe);
    const Decoded before = decode(layer);
    must(layer.select(rows));
    ASSERT_EQ(layer.batch(), (int)rows.size());
    const Decoded after = decode(layer);
    for (size_t i = 0; i < rows.size(); i++)
      for (int h = 0; h < 2; h++)
        for (size_t t = 0; t < 90; t++)
          for (int c = 0; c < 64; c++) {
            ASSERT_EQ(after.k.get((int)i, h, t, c), before.k.get((int)rows[i], h, t, c));
            ASSERT_EQ(after.v.get((int)i, h, t, c), before.v.get((int)rows[i], h, t, c));
          }
  }
  Layer layer = filled(k, v, recipe);
  for (const std::vector<size_t>& rows : {std::vector<size_t>{3}, {0, 1, 7}, {}}) {
    EXPECT_EQ(layer.select(rows).code(), Code::bad_argument);
    EXPECT_EQ(layer.batch(), 3);
  }
}

// Beams that share pages go apart: what one writes, the others must not see.
TEST(Cache, SharedPagesAreCopiedOnWrite) {
  Random random;
  for (size_t tokens : {64, 70, 100, 129, 200}) {
    const Array k = random_array(random, 1, 2, tokens, 64), v = random_array(random, 1, 2, tokens, 64);
    const std::vector<float> mu(2 * 64, 0.0f);
    auto start = [&](int batch) {
      Layer layer = make_layer(config_of(2, 64));
      must(layer.set_offset(mu.data(), mu.data()));
      must(append(layer, k, v));
      if (batch > 1) must(layer.select(std::vector<size_t>(batch, 0)));
      return layer;
    };
    Layer beams = start(3);
    const Array more = random_array(random, 3, 2, 40, 64);
    must(append(beams, more, more));
    const Decoded held = decode(beams);
    for (int b = 0; b < 3; b++) {  // each beam alone
      Layer alone = start(1);
      must(alone.append({more.bytes.data() + more.at(b, 0, 0, 0) * 4, 0, 40 * 64, 64},
                        {more.bytes.data() + more.at(b, 0, 0, 0) * 4, 0, 40 * 64, 64}, 1, 40));
      const Decoded one = decode(alone);
      for (int h = 0; h < 2; h++)
        for (size_t t = 0; t < tokens + 40; t++)
          for (int c = 0; c < 64; c++) ASSERT_EQ(held.k.get(b, h, t, c), one.k.get(0, h, t, c)) << b << " " << t;
    }
  }
}

TEST(Cache, CopiesAreIndependent) {
  Random random;
  const Array k = random_array(random, 2, 2, 100, 64), v = random_array(random, 2, 2, 100, 64);
  const Array other = random_array(random, 2, 2, 60, 64);
  Layer layer = filled(k, v);
  const Decoded before = decode(layer);
  Layer copy = make_layer(config_of(1, 32));
  must(copy.copy_from(layer));
  EXPECT_TRUE(same_bits(decode(copy), before));
  must(append(copy, other, other));
  EXPECT_TRUE(same_bits(decode(layer), before));  // the copy's write is the copy's
  must(layer.crop(37));
  must(append(layer, other, other));
  const Decoded of_copy = decode(copy);
  EXPECT_TRUE(same_tokens(of_copy.k, before.k, 0, 96));
  Layer again = filled(k, v);
  must(append(again, other, other));
  EXPECT_TRUE(same_bits(decode(again), of_copy));
  layer.reset();
  EXPECT_TRUE(same_bits(decode(copy), of_copy));
}

TEST(Cache, BytesShowSharing) {
  Random random;
  const size_t tokens = 64 * 20 + 5;
  const Array x = random_array(random, 1, 2, tokens, 64);
  Layer one = filled(x, x);
  const size_t alone = one.bytes();
  must(one.select({0, 0, 0, 0}));
  EXPECT_LT(one.bytes(), alone + alone / 2);  // four raw tails and lists of pages; its pages once
  const size_t shared = one.bytes();
  const Array more = random_array(random, 4, 2, 20, 64);
  must(append(one, more, more));
  EXPECT_GT(one.bytes(), shared);
  EXPECT_LT(one.bytes(), shared + alone);  // the page written and new ones, four times
}

TEST(Cache, BytesAreAsTheFormatPromises) {
  Random random;
  const size_t tokens = 64 * 100;
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    const Array x = random_array(random, 1, 2, tokens, 128, dtype);
    Layer layer = filled(x, x);
    const size_t pages = 2 * 138 * tokens;  // 138 bytes a token and KV head
    EXPECT_GE(layer.bytes(), pages);
    EXPECT_LT(layer.bytes(), pages + pages / 40);  // the raw tail: 16 tokens of 512 bytes a side and head
  }
}

TEST(Cache, NothingIsLeftBehindByCropAndAppend) {
  Random random;
  const Array x = random_array(random, 1, 1, 640, 64);
  Layer layer = filled(x, x);
  const size_t once = layer.bytes();
  for (int i = 0; i < 20; i++) {
    must(layer.crop(64 + random.below(500)));
    EXPECT_LE(layer.bytes(), once + 4096);
    must(append(layer, x, x, layer.length(), 640));
  }
  EXPECT_LE(layer.bytes(), once + 4096);
}

// ---- sliding windows

// Bytes of this process that are in memory.
[[maybe_unused]] size_t resident() {
  size_t total = 0, pages = 0;
  std::ifstream("/proc/self/statm") >> total >> pages;
  return pages * 4096;
}

// A long prefill's pages lie in huge ones: they hold what pages made singly hold, and a crop frees what it cuts off.
TEST(Cache, ManyPagesAtOnceAreAsPagesMadeSingly) {
  Random random;
  Recipe recipe;
  const size_t tokens = 4096, kept = 100;  // some 4.5 MB of pages
  const Array k = random_array(random, 1, 4, tokens, 256), v = random_array(random, 1, 4, tokens, 256);
  const std::vector<float> mu = random.normals(4 * 256);
  Layer whole = make_layer(config_of(4, 256, Dtype::float32, recipe));
  Layer parts = make_layer(config_of(4, 256, Dtype::float32, recipe));
  for (Layer* layer : {&whole, &parts}) must(layer->set_offset(mu.data(), mu.data()));
  must(append(whole, k, v));
  for (size_t at = 0; at < tokens; at += 512) must(append(parts, k, v, at, at + 512));
  const Array q = random_array(random, 1, 4, 1, 256);
  EXPECT_TRUE(same_bits(attend(whole, q), attend(parts, q)));
  for (Layer* layer : {&whole, &parts}) must(layer->crop(kept));
  EXPECT_TRUE(same_bits(attend(whole, q), attend(parts, q)));
  for (Layer* layer : {&whole, &parts}) must(append(*layer, k, v, kept, tokens));
  EXPECT_TRUE(same_bits(attend(whole, q), attend(parts, q)));
#ifndef __SANITIZE_ADDRESS__  // whose allocator keeps what is freed
  if (const size_t before = resident()) {
    const size_t bytes = whole.bytes();
    must(whole.crop(kept));
    EXPECT_LT(resident() + (bytes - whole.bytes()) / 2, before);
  }
#endif
}

TEST(Cache, SlidingWindowsDropPages) {
  Random random;
  for (int window : {2, 16, 100, 200}) {
    LayerConfig config = config_of(1, 32);
    config.sliding_window = window;
    Layer layer = make_layer(config);
    const Array x = random_array(random, 1, 1, 1000, 32);
    size_t most = 0;
    for (size_t t = 0; t < 1000; t++) {
      must(append(layer, x, x, t, t + 1));
      most = std::max(most, layer.bytes());
      ASSERT_EQ(layer.length(), t + 1);
      ASSERT_EQ(layer.visible(), std::min<size_t>(t + 1, window));
    }
    const size_t page = 64 * 42 + 64, raw = 2 * 16 * 32 * 4;
    EXPECT_LT(most, (window / 64 + 3) * (page + 32) + raw + 4096) << window;
    // One more step of the same sequence on a layer that never dropped anything.
    config.sliding_window = 0;
    Layer kept = make_layer(config);
    for (size_t t = 0; t < 1000; t++) must(append(kept, x, x, t, t + 1));
    std::vector<uint8_t> mask(1000, 0);
    std::fill(mask.end() - window, mask.end(), 1);
    const Array q = random_array(random, 1, 2, 1, 32);
    Array out = poisoned(1, 2, 1, 32);
    AttendArgs args = args_of(q, out);
    args.mask = mask.data(), args.mask_tokens = 1000;
    must(kept.attend(args));
    const Array got = attend(layer, q);
    for (size_t i = 0; i < out.size(); i++)
      EXPECT_NEAR(got.flat(i), out.flat(i), 0.02) << window;  // bytes of p by pass
  }
}

TEST(Cache, SlidingCropNeedsItsPast) {
  Random random;
  LayerConfig config = config_of(1, 32);
  config.sliding_window = 40;
  const Array x = random_array(random, 1, 1, 300, 32);
  Layer layer = make_layer(config);
  for (size_t t = 0; t < 200; t++) must(append(layer, x, x, t, t + 1));
  const Status status = layer.crop(150);
  EXPECT_EQ(status.code(), Code::bad_argument);
  EXPECT_NE(status.message().find("record_past"), std::string::npos) << status.message();
  EXPECT_EQ(layer.length(), 200u);
  EXPECT_EQ(layer.crop(198).code(), Code::bad_argument);  // the next query would miss a token of its window
  must(layer.crop(199));                                  // the newest append can always be undone
  EXPECT_EQ(layer.length(), 199u);

  layer.record_past(true);
  must(append(layer, x, x, 199, 260));
  must(layer.crop(210));
  layer.record_past(false);
  must(append(layer, x, x, 210, 211));
  Layer never = make_layer(config);
  for (size_t t = 0; t < 211; t++) must(append(never, x, x, t, t + 1));
  EXPECT_EQ(layer.visible(), never.visible());
  const Decoded a = decode(layer), b = decode(never);
  EXPECT_TRUE(same_tokens(a.k, b.k, 0, 208 - layer.first()));  // codes are codes, however the tokens came
  const Array q = random_array(random, 1, 2, 1, 32);
  const Array got = attend(layer, q), want = attend(never, q);
  Array any = poisoned(1, 2, 1, 32);
  const Plain plain = plain_attention(args_of(q, any), q, b.k, b.v);
  EXPECT_LT(error_of(got, want, plain), 0.1);  // tokens of the half packed block are codes in one and raw in the other
  EXPECT_LT(error_of(want, plain), kByteRounding);
}

TEST(Cache, AnsweredTokensLeaveOnlyTheWindow) {
  Random random;
  const size_t page = 64 * 42 + 64 + 16, raw = 2 * 16 * 32 * 4;
  for (size_t tokens : {1, 39, 40, 64, 103, 104, 1000})
    for (int sinks : {0, 16}) {
      Recipe recipe;
      recipe.sink_tokens = sinks;
      LayerConfig config = config_of(1, 32, Dtype::float32, recipe);
      config.sliding_window = 40;
      const Array x = random_array(random, 2, 1, tokens + 1, 32), q = random_array(random, 2, 2, 1, 32);
      Layer layer = make_layer(config), other = make_layer(config);
      must(layer.append(x.view(), x.view(), 2, tokens, nullptr, true));
      must(append(other, x, x, 0, tokens));
      EXPECT_EQ(layer.visible(), std::min<size_t>(tokens, 39));
      // A window lies on two pages at most, and its sinks are gone.
      if (tokens >= 64) {
        EXPECT_LT(layer.bytes(), 2 * (2 * page + raw) + 2048) << tokens;
      }
      EXPECT_TRUE(tokens < 40 || !layer.crop(tokens - 1).ok()) << tokens;
      // From the next token on nothing tells them apart.
      for (Layer* each : {&layer, &other}) must(append(*each, x, x, tokens, tokens + 1));
      EXPECT_EQ(layer.first(), other.first());
      EXPECT_EQ(layer.packed_tokens(), other.packed_tokens());
      const Decoded a = decode(layer), b = decode(other);
      EXPECT_TRUE(same_tokens(a.k, b.k, 0, a.k.tokens) && same_tokens(a.v, b.v, 0, a.v.tokens)) << tokens;
      const Array got = attend(layer, q), want = attend(other, q);
      for (size_t i = 0; i < got.size(); i++) EXPECT_EQ(got.flat(i), want.flat(i)) << tokens;
    }
}

TEST(Cache, AnsweredTokensStayWhileThePastIsRecorded) {
  Random random;
  LayerConfig config = config_of(1, 32);
  config.sliding_window = 40;
  const Array x = random_array(random, 1, 1, 300, 32);
  Layer layer = make_layer(config), whole = filled(x, x);
  layer.record_past(true);
  must(layer.append(x.view(), x.view(), 1, 300, nullptr, true));
  EXPECT_EQ(layer.visible(), 300u);
  must(layer.crop(100)), must(whole.crop(100));
  EXPECT_TRUE(same_tokens(decode(layer).k, decode(whole).k, 0, 100));
}

// ---- the raw baseline

TEST(RawCache, AttendsToWhatItWasGiven) {
  Random random;
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
    for (int d : {16, 18, 64, 80, 128, 256})
      for (size_t tokens : {1, 15, 16, 17, 65, 600}) {
        const Array k = random_array(random, 2, 2, tokens, d, dtype), v = random_array(random, 2, 2, tokens, d, dtype);
        const Array q = random_array(random, 2, 2 * (1 + random.below(7)), 1, d, dtype);
        Array any = poisoned(q.batch, q.heads, 1, d, dtype);
        const Plain plain = plain_attention(args_of(q, any), q, k, v);
        for (const std::string& name : usable_backends()) {
          UseBackend use(name);
          RawCache cache(2, d, dtype);
          for (size_t t = 0; t < tokens;) {
            const size_t n = std::min(tokens - t, (size_t)1 + random.below(100));
            must(cache.append(k.view(t), v.view(t), 2, n));
            t += n;
          }
          EXPECT_EQ(cache.length(), tokens);
          EXPECT_GE(cache.bytes(), 2 * k.bytes.size());
          Array out = poisoned(q.batch, q.heads, 1, d, dtype);
          must(cache.attend(args_of(q, out)));
          EXPECT_LT(error_of(out, plain), 2e-5 + output_rounding(dtype)) << name << " d " << d << " tokens " << tokens;
        }
      }
}

}  // namespace
}  // namespace halfbyte
