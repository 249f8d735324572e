// Offsets that turn with RoPE: the angles, what they do to scores on every backend, and that bookkeeping never depends
// on the frequencies.
#include "turn.h"

#include "attend.h"
#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

Layer turning_layer(int heads, int d, const Rope& rope, int span, const std::vector<float>* mu = nullptr,
                    int sliding_window = 0) {
  LayerConfig config = config_of(heads, d);
  config.recipe.offset_span = span, config.sliding_window = sliding_window;
  Layer layer = make_layer(config);
  must(set_rope(layer, rope));
  if (mu) must(layer.set_offset(mu->data(), mu->data()));
  return layer;
}

double length_of(const float* x, int d) {
  double squares = 0.0;
  for (int c = 0; c < d; c++) squares += (double)x[c] * x[c];
  return std::sqrt(squares);
}

// Waves are floats, so that a turned offset is as good as a float: also a million tokens and more away.
TEST(Turn, OffsetIsTurnedToTheMiddleOfItsSpan) {
  Random random;
  for (int d : kHeadDims)
    for (int span : {16, 64}) {
      const Rope rope = random_rope(random, d);
      const auto turn = make_turn(span, rope.frequencies.data(), (int)rope.frequencies.size(), rope.interleaved);
      const std::vector<float> mu = random.normals(d, 100.0f);
      for (size_t index : {0, 1, 15, 16, 17, 255, 4096, 16383, 1 << 20}) {
        std::vector<float> got(d, NAN);
        turn_offset(*turn, mu.data(), d, index, got.data());
        const std::vector<double> want = turned(rope, mu.data(), d, (double)index * span + (span - 1) / 2);
        for (int c = 0; c < d; c++) ASSERT_NEAR(got[c], want[c], 4e-7 * length_of(mu.data(), d)) << d << " " << index;
        std::vector<double> back(d, 0.0);
        add_turned_back(*turn, got.data(), d, index, back.data());
        for (int c = 0; c < d; c++) ASSERT_NEAR(back[c], mu[c], 8e-7 * length_of(mu.data(), d)) << d << " " << index;
      }
    }
}

// Layers of a model share the tables of the few kinds of RoPE that it has, and no others.
TEST(Turn, LayersShareTablesOfTheSameRope) {
  const std::vector<float> one = {1.0f, 0.1f, 0.01f}, other = {1.0f, 0.1f, 0.02f};
  const auto first = make_turn(64, one.data(), 3, false), second = make_turn(64, other.data(), 3, false);
  EXPECT_EQ(make_turn(64, one.data(), 3, false), first);
  EXPECT_EQ(make_turn(64, other.data(), 3, false), second);
  EXPECT_NE(first, second);
  for (const auto& turn :
       {make_turn(16, one.data(), 3, false), make_turn(64, one.data(), 3, true), make_turn(64, one.data(), 2, false)})
    EXPECT_NE(turn, first);
  EXPECT_EQ(second->frequencies, other);
}

// What a score gets back is q · (what was taken off), to the rounding of a float sum of so many products.
TEST(Turn, EveryBackendGivesTheScoresOfTheTurnedOffset) {
  Random random;
  for (const std::string& name : usable_backends())
    for (int d : kHeadDims)
      for (int rows : {1, 2, 5, 6, 7, 13, kMaxRows}) {
        UseBackend use(name);
        const Rope rope = random_rope(random, d);
        const int pairs = (int)rope.frequencies.size(), padded = (pairs + 15) / 16 * 16, sixteens = 1 + random.below(3);
        const auto turn = make_turn(64, rope.frequencies.data(), pairs, rope.interleaved);
        const std::vector<float> mu = random.normals(d, 10.0f), q = random.normals((size_t)rows * (d + 3));
        const size_t first = 16 * (size_t)random.below(1000), spans = (size_t)sixteens * 16;
        std::vector<float> phases((size_t)sixteens * 2 * padded);
        Phase phase(*turn, first / 16);
        for (int n = 0; n < sixteens; n++, phase.step(*turn))
          for (int i = 0; i < pairs; i++) {
            phases[(size_t)n * 2 * padded + i] = (float)phase.cos[i];
            phases[(size_t)n * 2 * padded + padded + i] = (float)phase.sin[i];
          }
        std::vector<float> out(rows * (spans + 1), NAN);
        current_backend().score_offsets({turn.get(), d, mu.data(), q.data(), (size_t)d + 3, rows, phases.data(), first,
                                         sixteens, out.data(), spans + 1});
        for (size_t i = 0; i < spans; i += 1 + random.below(5)) {
          std::vector<float> here(d);
          turn_offset(*turn, mu.data(), d, first + i, here.data());
          for (int r = 0; r < rows; r++) {
            const float* row = &q[(size_t)r * (d + 3)];
            double want = 0.0;
            for (int c = 0; c < d; c++) want += (double)row[c] * here[c];
            ASSERT_NEAR(out[r * (spans + 1) + i], want, 1e-6 * length_of(row, d) * length_of(mu.data(), d))
                << name << " d " << d << " rows " << rows << " span " << first + i;
          }
        }
        for (int r = 0; r < rows; r++) ASSERT_TRUE(std::isnan(out[r * (spans + 1) + spans]));
      }
}

// Far more pages than a kernel call is told of, in splits, from a first token in the middle of a sixteen of spans.
TEST(Turn, LongLayersAttendToWhatTheyDecode) {
  Random random;
  for (int span : {16, 64})
    for (int window : {0, 9000}) {
      const Rope rope{rope_frequencies(16), false};
      const size_t tokens = 20000;
      const std::vector<float> mu = random.normals(16, 8.0f);
      Layer layer = turning_layer(1, 16, rope, span, &mu, window);
      const Array k = random_array(random, 1, 1, tokens, 16), v = random_array(random, 1, 1, tokens, 16);
      for (size_t from = 0; from < tokens; from += 1000) must(append(layer, k, v, from, from + 1000));
      const Array q = random_array(random, 1, 3, 1, 16, Dtype::float32, 0.3f);
      const Decoded held = decode(layer);
      Array out = poisoned(1, 3, 1, 16);
      const Plain plain = plain_attention(args_of(q, out), q, held.k, held.v);
      for (const std::string& name : fast_backends())
        for (int threads : {1, 3}) {
          UseBackend use(name);
          UseThreads limit(threads);
          EXPECT_LT(error_of(attend(layer, q), plain), kByteRounding) << name << " " << span << " " << window;
        }
    }
}

TEST(Turn, FrequenciesOfZeroAreAFixedOffset) {
  Random random;
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    const Array k = random_array(random, 2, 2, 300, 80), v = random_array(random, 2, 2, 300, 80);
    const Array q = random_array(random, 2, 4, 1, 80);
    Layer fixed = make_layer(config_of(2, 80)), still = turning_layer(2, 80, {std::vector<float>(40, 0.0f)}, 64);
    must(append(fixed, k, v)), must(append(still, k, v));
    LayerParts want = save(fixed), got = save(still);
    EXPECT_EQ(got.frequencies, std::vector<float>(40, 0.0f));
    got.frequencies.clear();
    EXPECT_EQ(difference(got, want), "");
    EXPECT_TRUE(same_bits(decode(fixed), decode(still)));
    Array any = poisoned(2, 4, 1, 80);
    const Decoded held = decode(fixed);
    EXPECT_LT(error_of(attend(still, q), attend(fixed, q), plain_attention(args_of(q, any), q, held.k, held.v)), 1e-5);
    // And none at all undo what was set.
    Layer undone = turning_layer(2, 80, random_rope(random, 80), 64);
    must(undone.set_frequencies(nullptr, 0));
    must(append(undone, k, v));
    EXPECT_EQ(difference(save(undone), want), "");
  }
}

double error_of_keys(const Layer& layer, const Array& k) {
  const Decoded held = decode(layer);
  double squares = 0.0;
  for (size_t i = 0; i < k.size(); i++) squares += std::pow((double)held.k.flat(i) - k.flat(i), 2);
  return std::sqrt(squares / (double)k.size());
}

// What it is for: a constant before RoPE, ten times the rest. A fixed mu fits the slowest channels alone.
TEST(Turn, KeysThatTurnCostLess) {
  Random random;
  for (bool interleaved : {false, true}) {
    const Rope rope{rope_frequencies(64, 1e6), interleaved};
    const Array k = turning_keys(random, rope, 1, 1, 1000, 64, 10.0f);
    auto error = [&](const Rope& told, int span) {
      Layer layer = turning_layer(1, 64, told, span);
      must(append(layer, k, k));
      return error_of_keys(layer, k);
    };
    const double fixed = error({}, 64), other_pairs = error({rope.frequencies, !interleaved}, 64),
                 pages = error(rope, 64), blocks = error(rope, 16);
    EXPECT_LT(pages, 0.8 * fixed);
    EXPECT_LT(blocks, 0.9 * pages);
    EXPECT_GT(other_pairs, 1.2 * pages);
  }
}

// mu is the mean of the keys as they were before the middles of their spans turned them, padding left out.
TEST(Turn, TheOffsetIsTheMeanOfKeysTurnedBack) {
  Random random;
  for (int span : {16, 64}) {
    const Rope rope = random_rope(random, 64);
    const Array k = random_array(random, 2, 2, 150, 64);
    std::vector<uint8_t> counted(300);
    for (uint8_t& c : counted) c = random.below(4) > 0;
    Layer layer = turning_layer(2, 64, rope, span);
    must(layer.append(k.view(), k.view(), 2, 9, std::vector<uint8_t>(18, 1).data()));
    must(layer.append(k.view(9), k.view(9), 2, 141, counted.data()));
    const LayerParts parts = save(layer);
    const Rope back = [&] {
      Rope negative = rope;
      for (float& frequency : negative.frequencies) frequency = -frequency;
      return negative;
    }();
    for (int b = 0; b < 2; b++)
      for (int h = 0; h < 2; h++) {
        std::vector<double> sum(64, 0.0);
        int n = 0;
        for (size_t t = 0; t < 150; t++) {
          if (t >= 9 && !counted[b * 141 + t - 9]) continue;
          std::vector<float> row;
          for (int c = 0; c < 64; c++) row.push_back(k.get(b, h, t, c));
          const std::vector<double> x = turned(back, row.data(), 64, (double)(t / span * span + (span - 1) / 2));
          for (int c = 0; c < 64; c++) sum[c] += x[c];
          n++;
        }
        for (int c = 0; c < 64; c++) ASSERT_NEAR(parts.offset_k[(b * 2 + h) * 64 + c], sum[c] / n, 1e-6);
      }
    EXPECT_EQ(parts.offset_v.size(), parts.offset_k.size());  // V's stays where it is: the mean of the same tokens
    for (int c = 0, n = 0; c < 64; c++, n = 0) {
      double sum = 0.0;
      for (size_t t = 0; t < 150; t++)
        if (t < 9 || counted[t - 9]) sum += k.get(0, 0, t, c), n++;
      ASSERT_NEAR(parts.offset_v[c], sum / n, 1e-6);
    }
  }
}

// The angle is that of the token, wherever its page lies by now.
TEST(Turn, WindowsThatSlideKeepTheAnglesOfTheirTokens) {
  Random random;
  const Rope rope = random_rope(random, 32);
  const std::vector<float> mu = random.normals(64, 5.0f);
  const Array k = random_array(random, 1, 2, 700, 32), v = random_array(random, 1, 2, 700, 32);
  for (int span : {16, 64}) {
    Layer whole = turning_layer(2, 32, rope, span, &mu), sliding = turning_layer(2, 32, rope, span, &mu, 150);
    must(append(whole, k, v));
    for (size_t t = 0; t < 700; t++) must(append(sliding, k, v, t, t + 1));
    ASSERT_GT(sliding.first(), 128u);
    const Decoded all = decode(whole), left = decode(sliding);
    for (int h = 0; h < 2; h++)
      for (size_t t = sliding.first(); t < 700; t++)
        for (int c = 0; c < 32; c++)
          ASSERT_EQ(left.k.get(0, h, t - sliding.first(), c), all.k.get(0, h, t, c)) << "token " << t;
    const Array q = random_array(random, 1, 4, 1, 32);
    Array out = poisoned(1, 4, 1, 32);
    const Plain plain = plain_attention(args_of(q, out), q, left.k, left.v);
    for (const std::string& name : fast_backends()) {
      UseBackend use(name);
      EXPECT_LT(error_of(attend(sliding, q), plain), kByteRounding) << name;
    }
  }
}

// crop, then append, is append; selected sequences keep their own mu; a copy and a reset layer keep the frequencies.
TEST(Turn, CropSelectCopyAndResetKeepIt) {
  Random random;
  const Rope rope = random_rope(random, 64);
  const Array k = turning_keys(random, rope, 2, 1, 400, 64, 5.0f), v = random_array(random, 2, 1, 400, 64);
  Layer layer = turning_layer(1, 64, rope, 64), straight = turning_layer(1, 64, rope, 64);
  must(append(layer, k, v, 0, 100)), must(append(straight, k, v, 0, 100));
  must(append(layer, k, v, 100, 333)), must(layer.crop(112)), must(append(layer, k, v, 112, 400));
  must(append(straight, k, v, 100, 112)), must(append(straight, k, v, 112, 400));
  EXPECT_TRUE(same_bits(decode(layer), decode(straight)));
  Layer copy;
  must(copy.copy_from(layer));
  must(layer.select({1, 0, 1}));
  const Decoded before = decode(copy), after = decode(layer);
  for (auto [row, from] : {std::pair{0, 1}, {1, 0}, {2, 1}})
    for (size_t t = 0; t < 400; t++)
      for (int c = 0; c < 64; c++) ASSERT_EQ(after.k.get(row, 0, t, c), before.k.get(from, 0, t, c));
  copy.reset();
  Layer fresh = turning_layer(1, 64, rope, 64);
  must(append(copy, k, v)), must(append(fresh, k, v));
  EXPECT_EQ(difference(save(copy), save(fresh)), "");
}

TEST(Turn, NamesWhatItDoesNotTake) {
  const std::vector<float> frequencies(17, 1.0f);
  auto refused = [](const Status& status, const std::string& part) {
    EXPECT_EQ(status.code(), Code::bad_argument);
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  };
  Layer layer = make_layer(config_of(1, 32));
  refused(layer.set_frequencies(frequencies.data(), 17), "pairs is 17; it takes 0 to 16");
  refused(layer.set_frequencies(frequencies.data(), -1), "pairs is -1; it takes 0 to 16");
  refused(layer.set_frequencies(std::vector<float>{1.0f, NAN}.data(), 2), "not finite");
  Recipe recipe;
  recipe.offset_span = 32;
  refused(Layer::create(config_of(1, 32, Dtype::float32, recipe)).status(), "offset_span is 32; it takes 16, 64, or 0");
  recipe.offset_span = 0;
  refused(make_layer(config_of(1, 32, Dtype::float32, recipe)).set_frequencies(frequencies.data(), 4), "offset_span");
  refused(make_layer(config_of(1, 32, Dtype::float32, plain_recipe())).set_frequencies(frequencies.data(), 4),
          "offset");
  Random random;
  const Array x = random_array(random, 1, 1, 33, 32);
  must(append(layer, x, x));
  refused(layer.set_frequencies(frequencies.data(), 4), "after tokens were packed");
}

}  // namespace
}  // namespace halfbyte
