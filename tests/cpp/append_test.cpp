// Appending: any chunking gives identical bytes, blocks pack when the rule says, the offset, and input that is refused.
#include <array>
#include <numeric>
#include <tuple>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// Random cuts of [0, tokens].
std::vector<size_t> cuts(Random& random, size_t tokens) {
  std::vector<size_t> at = {0};
  const int largest = 1 + random.below(40);
  while (at.back() < tokens) at.push_back(std::min(tokens, at.back() + 1 + random.below(largest)));
  return at;
}

TEST(Append, AnyChunkingGivesIdenticalBytes) {
  Random random;
  for (const std::string& name : fast_backends())
    for (int form = 0; form < 12; form++) {
      UseBackend use(name);
      Recipe recipe;
      recipe.k.bits = form % 2 ? 4 : 8, recipe.k.group = form % 3 ? 32 : 16;
      recipe.sink_tokens = form % 4 == 1 ? 32 : 0, recipe.raw_window = form % 4 == 2 ? 32 : 0;
      recipe.offset = form != 5;
      const int d = std::array{64, 80, 18}[form % 3];
      const Dtype dtype = form % 5 ? Dtype::float32 : Dtype::bfloat16;
      const size_t tokens = 140 + random.below(70);
      const Array k = random_array(random, 2, 2, tokens, d, dtype), v = random_array(random, 2, 2, tokens, d, dtype);
      const Array q = random_array(random, 2, 4, 1, d, dtype);
      const std::vector<float> mu = random.normals(2 * d);
      const Rope rope = random_rope(random, d);
      recipe.offset_span = form % 2 ? 16 : 64;
      auto build = [&](const std::vector<size_t>& at) {
        Layer layer = make_layer(config_of(2, d, dtype, recipe));
        if (recipe.offset) must(layer.set_offset(mu.data(), mu.data()));  // else the first chunk's size decides μ
        if (recipe.offset && form % 3) must(set_rope(layer, rope));
        for (size_t i = 1; i < at.size(); i++) must(append(layer, k, v, at[i - 1], at[i]));
        return layer;
      };
      Layer whole = build({0, tokens});
      std::vector<size_t> singly(tokens + 1);
      std::iota(singly.begin(), singly.end(), 0);
      for (const std::vector<size_t>& at : {singly, cuts(random, tokens), cuts(random, tokens)}) {
        Layer parts = build(at);
        EXPECT_EQ(parts.length(), whole.length());
        EXPECT_EQ(parts.packed_tokens(), whole.packed_tokens());
        EXPECT_TRUE(same_bits(decode(parts), decode(whole))) << name << " form " << form;
        EXPECT_TRUE(same_bits(attend(parts, q), attend(whole, q))) << name << " form " << form;
      }
    }
}

TEST(Append, ABlockIsPackedWhenAQueryHasLeftIt) {
  for (int sinks : {0, 32})
    for (int window : {0, 16}) {
      Recipe recipe;
      recipe.sink_tokens = sinks, recipe.raw_window = window;
      Layer layer = make_layer(config_of(1, 32, Dtype::float32, recipe));
      Random random;
      const Array k = random_array(random, 1, 1, 150, 32), v = random_array(random, 1, 1, 150, 32);
      for (size_t n = 1; n <= 150; n++) {
        must(append(layer, k, v, n - 1, n));
        const int packed = (int)((n - 1) / 16 * 16) - sinks - window;  // the block of the newest token stays raw
        ASSERT_EQ(layer.packed_tokens(), (size_t)std::max(0, packed)) << n;
        ASSERT_EQ(layer.length(), n);
        ASSERT_EQ(layer.visible(), n);
      }
    }
}

TEST(Append, StridesAreFollowed) {
  Random random;
  const Array k = random_array(random, 2, 3, 50, 32), v = random_array(random, 2, 3, 50, 32);
  // [batch, token, head, d], as projections give it, with a gap behind each head.
  const int wide = 40;
  std::vector<float> k_rows(2 * 50 * 3 * wide, NAN), v_rows(2 * 50 * 3 * wide, NAN);
  for (int b = 0; b < 2; b++)
    for (int h = 0; h < 3; h++)
      for (int t = 0; t < 50; t++)
        for (int c = 0; c < 32; c++) {
          const size_t at = (((size_t)b * 50 + t) * 3 + h) * wide + c;
          k_rows[at] = k.get(b, h, t, c), v_rows[at] = v.get(b, h, t, c);
        }
  Layer plain = make_layer(config_of(3, 32)), strided = make_layer(config_of(3, 32));
  must(append(plain, k, v));
  must(strided.append({k_rows.data(), 50 * 3 * wide, wide, 3 * wide}, {v_rows.data(), 50 * 3 * wide, wide, 3 * wide}, 2,
                      50));
  EXPECT_TRUE(same_bits(decode(plain), decode(strided)));
}

// ---- the offset

// Error of what a layer holds against what it was given, root mean square a channel.
double error_of_layer(const Layer& layer, const Array& k, size_t from, size_t to) {
  const Decoded held = decode(layer);
  double sum = 0.0;
  for (size_t t = from; t < to; t++)
    for (int c = 0; c < k.d; c++) sum += std::pow((double)held.k.get(0, 0, t, c) - k.get(0, 0, t, c), 2);
  return std::sqrt(sum / (double)((to - from) * k.d));
}

Array biased(Random& random, size_t tokens, float bias) {
  Array x = random_array(random, 1, 1, tokens, 64);
  for (size_t t = 0; t < tokens; t++)
    for (int c = 0; c < 64; c++) x.set(0, 0, t, c, x.get(0, 0, t, c) + (c % 3 ? bias : -bias));
  return x;
}

TEST(Append, OffsetIsTheMeanOverTheFirstPrefill) {
  Random random;
  const Array k = biased(random, 100, 500.0f);
  Layer layer = make_layer(config_of(1, 64));
  EXPECT_FALSE(layer.has_offset());
  must(append(layer, k, k, 0, 10));
  EXPECT_FALSE(layer.has_offset());
  must(append(layer, k, k, 10, 100));
  EXPECT_TRUE(layer.has_offset());
  EXPECT_LT(error_of_layer(layer, k, 0, 96), 0.15);  // 4 bits of spread 1: 0.08
}

TEST(Append, OffsetIsFixedOnce) {
  Random random;
  const Array near = biased(random, 33, 0.0f), far = biased(random, 40, 500.0f);
  Layer layer = make_layer(config_of(1, 64));
  must(append(layer, near, near));
  const Decoded before = decode(layer);
  must(append(layer, far, far));
  const Decoded after = decode(layer);
  for (size_t t = 0; t < 32; t++)
    for (int c = 0; c < 64; c++) ASSERT_EQ(before.k.get(0, 0, t, c), after.k.get(0, 0, t, c));
  EXPECT_GT(error_of_layer(layer, far, 0, 0 + 1), 100.0);  // token 0 is `near`: a sanity check of the helper
}

TEST(Append, PaddingIsNotCounted) {
  Random random;
  for (size_t first : {1, 20, 60}) {  // padding may come before, or with, the append that fixes the offset
    Array k = biased(random, 60, 500.0f);
    std::vector<uint8_t> counted(60, 1);
    for (size_t t = 0; t < 12; t++) {
      counted[t] = 0;
      for (int c = 0; c < 64; c++) k.set(0, 0, t, c, -3000.0f);
    }
    Layer layer = make_layer(config_of(1, 64)), fooled = make_layer(config_of(1, 64));
    for (auto [from, to] : {std::pair<size_t, size_t>{0, first}, {first, 60}}) {
      if (from == to) continue;
      must(layer.append(k.view(from), k.view(from), 1, to - from, counted.data() + from));
      must(fooled.append(k.view(from), k.view(from), 1, to - from));
    }
    EXPECT_LT(error_of_layer(layer, k, 16, 48), 0.3) << first;
    if (first != 20) {
      EXPECT_GT(error_of_layer(fooled, k, 16, 48), 1.0) << first;
    }
  }
}

TEST(Append, AllPaddingIsCountedRatherThanNothing) {
  Random random;
  const Array k = biased(random, 40, 500.0f);
  const std::vector<uint8_t> counted(40, 0);
  Layer layer = make_layer(config_of(1, 64));
  must(layer.append(k.view(), k.view(), 1, 40, counted.data()));
  EXPECT_LT(error_of_layer(layer, k, 0, 32), 0.15);
}

TEST(Append, GivenOffsetHoldsForOneSideAndUntilPacking) {
  Random random;
  const Array k = biased(random, 40, 500.0f);
  std::vector<float> mu;
  for (int c = 0; c < 64; c++) mu.push_back(c % 3 ? 500.0f : -500.0f);
  Layer layer = make_layer(config_of(1, 64));
  must(append(layer, k, k, 0, 16));
  must(layer.set_offset(mu.data(), nullptr));  // V's is still found by itself
  must(append(layer, k, k, 16, 40));
  EXPECT_LT(error_of_layer(layer, k, 0, 32), 0.15);
  const Status late = layer.set_offset(mu.data(), mu.data());
  EXPECT_EQ(late.code(), Code::bad_argument);
  EXPECT_NE(late.message().find("after tokens were packed"), std::string::npos) << late.message();
  Recipe without;
  without.offset = false;
  Layer bare = make_layer(config_of(1, 64, Dtype::float32, without));
  EXPECT_EQ(bare.set_offset(mu.data(), mu.data()).code(), Code::bad_argument);
  EXPECT_FALSE(bare.has_offset());
}

TEST(Append, AnOffsetThatCanNotBeCodedIsRefused) {
  Layer layer = make_layer(config_of(1, 32));
  std::vector<float> mu(32, 1e4f);
  must(layer.set_offset(mu.data(), mu.data()));
  for (float wrong : {NAN, INFINITY, -1.001e4f}) {
    mu[31] = wrong;
    EXPECT_EQ(layer.set_offset(nullptr, mu.data()).code(), Code::bad_value) << wrong;
  }
  LayerParts parts;
  must(append(layer, Array(1, 1, 20, 32), Array(1, 1, 20, 32)));
  must(layer.save(parts));
  EXPECT_EQ(parts.given_offset_v, std::vector<float>(32, 1e4f));  // what was there before
}

// ---- offset_tokens

struct Given {
  Array k, v;
  std::vector<uint8_t> counted;  // [batch, tokens]
};

Given given(Random& random, size_t tokens, Dtype dtype = Dtype::float32) {
  Given x{random_array(random, 2, 2, tokens, 32, dtype, 3.0f), random_array(random, 2, 2, tokens, 48, dtype, 3.0f),
          std::vector<uint8_t>(2 * tokens)};
  for (uint8_t& byte : x.counted) byte = random.below(3) > 0;
  return x;
}

LayerConfig warm_up_config(int offset_tokens, int sinks = 0, int window = 0, Dtype dtype = Dtype::float32) {
  Recipe recipe;
  recipe.offset_tokens = offset_tokens, recipe.sink_tokens = sinks, recipe.raw_window = window;
  LayerConfig config = config_of(2, 32, dtype, recipe);
  config.head_dim_v = 48;
  return config;
}

void append_given(Layer& layer, const Given& x, size_t from, size_t to) {
  std::vector<uint8_t> counted;
  for (size_t b = 0; b < 2; b++)
    counted.insert(counted.end(), &x.counted[b * x.k.tokens + from], &x.counted[b * x.k.tokens] + to);
  must(layer.append(x.k.view(from), x.v.view(from), 2, to - from, counted.data()));
}

TEST(OffsetTokens, MuIsTheMeanOverThatManyTokensWithoutPadding) {
  Random random;
  for (int n : {16, 48, 64})
    for (auto [sinks, window] : {std::pair{0, 0}, std::pair{32, 0}, std::pair{0, 32}, std::pair{16, 80}})
      for (Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
        const Given x = given(random, 200, dtype);
        Layer layer = make_layer(warm_up_config(n, sinks, window, dtype));
        std::vector<size_t> at = cuts(random, 200);
        for (size_t i = 1; i < at.size(); i++) append_given(layer, x, at[i - 1], at[i]);
        const LayerParts parts = save(layer);
        for (int b = 0; b < 2; b++)
          for (int h = 0; h < 2; h++)
            for (int c = 0; c < 48; c++) {
              double k = 0.0, v = 0.0, counted = 0.0;
              for (int t = 0; t < n; t++) {
                if (!x.counted[b * 200 + t]) continue;
                counted++, v += x.v.get(b, h, t, c);
                if (c < 32) k += x.k.get(b, h, t, c);
              }
              if (c < 32) {
                EXPECT_NEAR(parts.offset_k[(b * 2 + h) * 32 + c], k / counted, 1e-5);
              }
              EXPECT_NEAR(parts.offset_v[(b * 2 + h) * 48 + c], v / counted, 1e-5);
            }
      }
}

TEST(OffsetTokens, EverythingIsRawUntilThen) {
  Random random;
  for (int n : {16, 48})
    for (int sinks : {0, 16, 64}) {
      const Given x = given(random, 130);
      Layer layer = make_layer(warm_up_config(n, sinks));
      for (size_t length = 1; length <= 130; length++) {
        append_given(layer, x, length - 1, length);
        const int block = ((int)length - 1) / 16 * 16, packed = (int)length <= n ? 0 : std::max(0, block - sinks);
        ASSERT_EQ(layer.packed_tokens(), (size_t)packed) << n << " " << sinks << " " << length;
        ASSERT_EQ(layer.has_offset(), packed > 0) << n << " " << sinks << " " << length;
      }
    }
}

TEST(OffsetTokens, AnyChunkingGivesTheSameBytes) {
  Random random;
  for (const std::string& name : fast_backends())
    for (int form = 0; form < 8; form++) {
      UseBackend use(name);
      const LayerConfig config = warm_up_config(16 * (1 + random.below(4)), 16 * random.below(3), 16 * random.below(3));
      const size_t tokens = 1 + random.below(150);
      const Given x = given(random, tokens);
      auto build = [&](const std::vector<size_t>& at) {
        Layer layer = make_layer(config);
        for (size_t i = 1; i < at.size(); i++) append_given(layer, x, at[i - 1], at[i]);
        return save(layer);
      };
      std::vector<size_t> singly(tokens + 1);
      std::iota(singly.begin(), singly.end(), 0);
      const LayerParts whole = build({0, tokens});
      for (const std::vector<size_t>& at : {singly, cuts(random, tokens), cuts(random, tokens)})
        EXPECT_EQ(difference(build(at), whole), "") << name << ", " << tokens << " tokens";
    }
}

// What was the offset of tokens that are no longer there must not outlive them.
TEST(OffsetTokens, CropBelowThemForgetsTheOffset) {
  Random random;
  for (size_t tokens : {50, 60, 64, 65, 100, 112})
    for (size_t left : {1, 16, 20, 33, 47}) {
      if (tokens - left > 64) continue;
      for (int sinks : {0, 16}) {
        const Given x = given(random, tokens), other = given(random, 130);
        Layer layer = make_layer(warm_up_config(48, sinks)), never = make_layer(warm_up_config(48, sinks));
        layer.record_past(true);
        append_given(layer, x, 0, tokens);
        ASSERT_TRUE(layer.has_offset());
        must(layer.crop(left));
        EXPECT_FALSE(layer.has_offset()) << tokens << " " << left;
        append_given(never, x, 0, left);
        EXPECT_EQ(difference(save(layer), save(never)), "") << tokens << " " << left << ", cropped";
        append_given(layer, other, left, 130), append_given(never, other, left, 130);
        EXPECT_EQ(difference(save(layer), save(never)), "") << tokens << " " << left << ", gone on";
      }
    }
}

TEST(OffsetTokens, CodesThatStayKeepTheirOffset) {
  Random random;
  const Given x = given(random, 120);
  Layer layer = make_layer(warm_up_config(48));
  for (size_t t = 0; t < 100; t++) append_given(layer, x, t, t + 1);
  const LayerParts before = save(layer);
  must(layer.crop(20));
  EXPECT_TRUE(layer.has_offset());
  EXPECT_EQ(layer.packed_tokens(), 20u);
  append_given(layer, x, 20, 120);
  EXPECT_EQ(save(layer).offset_k, before.offset_k);
}

TEST(OffsetTokens, AGivenOffsetNeedsNoWaiting) {
  Random random;
  const Given x = given(random, 100);
  const std::vector<float> mu_k = random.normals(2 * 32), mu_v = random.normals(2 * 48);
  Layer both = make_layer(warm_up_config(64)), never = make_layer(warm_up_config(0)),
        one = make_layer(warm_up_config(64));
  must(both.set_offset(mu_k.data(), mu_v.data())), must(never.set_offset(mu_k.data(), mu_v.data()));
  must(one.set_offset(mu_k.data(), nullptr));
  for (size_t t = 0; t < 40; t++) {
    for (Layer* layer : {&both, &never, &one}) append_given(*layer, x, t, t + 1);
    ASSERT_EQ(both.packed_tokens(), t / 16 * 16);
    ASSERT_EQ(one.packed_tokens(), 0u);
  }
  EXPECT_TRUE(same_bits(decode(both), decode(never)));
  append_given(one, x, 40, 100);
  const LayerParts parts = save(one);
  for (int b = 0; b < 2; b++) EXPECT_TRUE(std::equal(mu_k.begin(), mu_k.end(), &parts.offset_k[b * 2 * 32])) << b;
  EXPECT_NE(std::vector<float>(parts.offset_v.begin(), parts.offset_v.begin() + 2 * 48), mu_v);
}

TEST(OffsetTokens, AnOffsetGivenAfterACropIsUsed) {
  Random random;
  const Given x = given(random, 100);
  const std::vector<float> mu(2 * 48, 0.5f);
  for (int n : {0, 48}) {
    Layer layer = make_layer(warm_up_config(n));
    layer.record_past(true);
    append_given(layer, x, 0, 60);
    must(layer.crop(10));
    ASSERT_EQ(layer.packed_tokens(), 0u);
    must(layer.set_offset(mu.data(), mu.data()));
    append_given(layer, x, 10, 100);
    EXPECT_EQ(save(layer).offset_v, std::vector<float>(2 * 2 * 48, 0.5f)) << n;
  }
}

// ---- refused input

// The layer must be as if the refused append had never been: same tokens, same attention, same bytes later.
void expect_refused(Layer& layer, Layer& untouched, const Array& k, const Array& v, const Array& bad_k,
                    const Array& bad_v, Code code, const std::vector<std::string>& parts) {
  const size_t bytes = layer.bytes(), length = layer.length();
  const Status status = append(layer, bad_k, bad_v);
  EXPECT_EQ(status.code(), code);
  for (const std::string& part : parts)
    EXPECT_NE(status.message().find(part), std::string::npos) << "'" << part << "' in: " << status.message();
  EXPECT_EQ(layer.length(), length);
  EXPECT_EQ(layer.bytes(), bytes);
  if (length) {
    EXPECT_TRUE(same_bits(decode(layer), decode(untouched)));
  }
  must(append(layer, k, v)), must(append(untouched, k, v));
  EXPECT_TRUE(same_bits(decode(layer), decode(untouched)));
}

TEST(Append, NamesTheTokenThatIsNotANumber) {
  Random random;
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
    for (float bad : {NAN, INFINITY, -INFINITY})
      for (size_t tokens : {1, 17, 80})  // a decode step, a short chunk, one that is checked by threads
        for (int side = 0; side < 2; side++) {
          const size_t held = random.below(3) * 13;
          Layer layer = make_layer(config_of(2, 80, dtype)), untouched = make_layer(config_of(2, 80, dtype));
          if (held) {
            const Array x = random_array(random, 2, 2, held, 80, dtype);
            must(append(layer, x, x)), must(append(untouched, x, x));
          }
          const Array k = random_array(random, 2, 2, tokens, 80, dtype),
                      v = random_array(random, 2, 2, tokens, 80, dtype);
          Array bad_k = k, bad_v = v;
          const int b = random.below(2), h = random.below(2), c = random.below(80);
          const size_t t = random.below((int)tokens);
          (side ? bad_v : bad_k).set(b, h, t, c, bad);
          const std::string where = std::string(side ? "V" : "K") + " of sequence " + std::to_string(b) + ", head " +
                                    std::to_string(h) + ", token " + std::to_string(held + t) + " ";
          expect_refused(layer, untouched, k, v, bad_k, bad_v, Code::bad_value, {where, "NaN or an infinity"});
        }
}

TEST(Append, FindsABadNumberAtEveryChannel) {
  Random random;
  for (int d : {16, 18, 30, 64, 80})
    for (int c = 0; c < d; c++) {
      Layer layer = make_layer(config_of(1, d));
      Array k = random_array(random, 1, 1, 2, d), v = k;
      k.set(0, 0, 1, c, -NAN);
      EXPECT_EQ(append(layer, k, v).code(), Code::bad_value) << d << " " << c;
      EXPECT_EQ(append(layer, v, k).code(), Code::bad_value) << d << " " << c;
    }
}

TEST(Append, NamesValuesTooLargeForTheirScales) {
  Random random;
  for (auto [scale_bits, most, over] : {std::tuple{16, 1e4f, 1.1e4f}, std::tuple{32, 1e15f, 1e16f}}) {
    Recipe recipe;
    recipe.scale_bits = scale_bits;
    Layer layer = make_layer(config_of(1, 512, Dtype::float32, recipe));
    Layer untouched = make_layer(config_of(1, 512, Dtype::float32, recipe));
    Array k = random_array(random, 1, 1, 40, 512, Dtype::float32, 0.2f * most);
    for (size_t t = 0; t < 40; t++)
      for (int c = 0; c < 512; c++) k.set(0, 0, t, c, std::clamp(k.get(0, 0, t, c), -most, most));
    Array large = k;
    large.set(0, 0, 33, 7, over);
    expect_refused(layer, untouched, k, k, large, k, Code::bad_value,
                   {"K of sequence 0, head 0, token 33 ", "scale_bits=" + std::to_string(scale_bits)});
    EXPECT_TRUE(all_finite(decode(layer).k));  // the largest values allowed stay numbers
    double worst = 0.0;
    const Decoded held = decode(layer);
    for (size_t t = 0; t < 32; t++)
      for (int c = 0; c < 512; c++)
        worst = std::max(worst, std::fabs((double)held.k.get(0, 0, t, c) - k.get(0, 0, t, c)));
    EXPECT_LT(worst, 0.15 * most);
  }
}

void expect_bad(const Status& status, const std::string& part) {
  EXPECT_EQ(status.code(), Code::bad_argument);
  EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
}

TEST(Append, NamesBadShapes) {
  Random random;
  Layer layer = make_layer(config_of(1, 32));
  const Array x = random_array(random, 3, 1, 20, 32);
  expect_bad(layer.append(x.view(), x.view(), 0, 1), "batch is 0");
  expect_bad(layer.append({}, x.view(), 1, 1), "addresses");
  expect_bad(layer.append(x.view(), {}, 1, 1), "addresses");
  EXPECT_EQ(layer.batch(), 0);
  must(layer.append(x.view(), x.view(), 2, 20));
  expect_bad(layer.append(x.view(), x.view(), 3, 1), "batch is 3, but the cache holds 2");
  must(layer.append(x.view(), x.view(), 2, 0));
  EXPECT_EQ(layer.length(), 20u);
  Recipe recipe;
  recipe.lambda = true;
  Layer needs = make_layer(config_of(1, 32, Dtype::float32, recipe));
  expect_bad(needs.append(x.view(), x.view(), 1, 20), "set_lambda");
}

TEST(Append, DenseRotationIsNeededCheckedAndKept) {
  Random random;
  Recipe recipe;
  recipe.rotation = Rotation::dense;
  const int d = 34;
  Layer layer = make_layer(config_of(2, d, Dtype::float32, recipe));
  const Array x = random_array(random, 1, 2, 100, d);
  const std::vector<float> k = random_rotation(random, d), v = random_rotation(random, d);
  must(layer.set_rotation(k.data(), nullptr));
  expect_bad(append(layer, x, x), "set_rotation was not called");
  std::vector<float> skewed = v;
  skewed[1] += 0.1f;
  expect_bad(layer.set_rotation(nullptr, skewed.data()), "v is not orthonormal");
  must(layer.set_rotation(nullptr, v.data()));
  must(append(layer, x, x));
  expect_bad(layer.set_rotation(k.data(), v.data()), "after tokens were packed");
  expect_bad(make_layer(config_of(1, d)).set_rotation(k.data(), v.data()), "not dense");

  Layer copy;
  must(copy.copy_from(layer));
  LayerParts parts;
  must(layer.save(parts));
  EXPECT_EQ(parts.rotation_k, k);
  EXPECT_EQ(parts.rotation_v, v);
  Result<Layer> loaded = Layer::load(layer.config(), parts);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const Decoded held = decode(layer);
  must(layer.crop(0));  // as reset does
  must(append(layer, x, x));
  for (Layer* other : {&layer, &copy, &loaded.value()}) EXPECT_TRUE(same_bits(decode(*other), held));
  must(copy.crop(40)), must(loaded.value().crop(40)), must(layer.crop(40));
  for (Layer* other : {&copy, &loaded.value(), &layer}) must(append(*other, x, x));
  EXPECT_TRUE(same_bits(decode(copy), decode(layer)));
  EXPECT_TRUE(same_bits(decode(loaded.value()), decode(layer)));
}

TEST(Append, SavedRotationsAreChecked) {
  Random random;
  Recipe recipe;
  recipe.rotation = Rotation::dense;
  Layer layer = make_layer(config_of(1, 32, Dtype::float32, recipe));
  const std::vector<float> r = random_rotation(random, 32);
  must(layer.set_rotation(r.data(), r.data()));
  const Array x = random_array(random, 1, 1, 40, 32);
  must(append(layer, x, x));
  LayerParts good;
  must(layer.save(good));
  auto refusal = [&](auto change) {
    LayerParts parts = good;
    change(parts);
    return Layer::load(layer.config(), parts).status().message();
  };
  EXPECT_EQ(refusal([](LayerParts&) {}), "");
  EXPECT_NE(refusal([](LayerParts& p) { p.rotation_k.clear(); }).find("rotation_k is missing"), std::string::npos);
  EXPECT_NE(refusal([](LayerParts& p) { p.rotation_v.pop_back(); }).find("rotation_v has another size"),
            std::string::npos);
  EXPECT_NE(refusal([](LayerParts& p) { p.rotation_k[5] = NAN; }).find("rotation_k is not orthonormal"),
            std::string::npos);
  EXPECT_NE(refusal([](LayerParts& p) { p.rotation_v[0] += 1.0f; }).find("rotation_v is not orthonormal"),
            std::string::npos);
}

TEST(Append, NamesBadLambda) {
  Recipe recipe;
  recipe.lambda = true;
  Layer layer = make_layer(config_of(1, 32, Dtype::float32, recipe));
  for (float bad : {0.0f, -1.0f, NAN, INFINITY}) {
    std::vector<float> lambda(32, 1.0f);
    lambda[31] = bad;
    EXPECT_EQ(layer.set_lambda(lambda.data(), lambda.data()).code(), Code::bad_argument) << bad;
  }
  const std::vector<float> good(32, 2.0f);
  EXPECT_EQ(make_layer(config_of(1, 32)).set_lambda(good.data(), good.data()).code(), Code::bad_argument);
  must(layer.set_lambda(good.data(), good.data()));
  Random random;
  const Array x = random_array(random, 1, 1, 20, 32);
  must(append(layer, x, x));
  EXPECT_EQ(layer.set_lambda(good.data(), good.data()).code(), Code::bad_argument);
}

}  // namespace
}  // namespace halfbyte
