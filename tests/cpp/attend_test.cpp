// Attention over packed and raw tokens: every backend against plain attention in double, at all tail sizes; masks,
// windows, caps, sinks; exactness where nothing rounds.
#include <array>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// What one layer gives on each backend for the same bytes, next to plain attention over its decoded tokens.
struct Outputs {
  Plain plain;
  std::vector<std::pair<std::string, Array>> by_backend;

  // The reference rounds nothing but its sums; the others share their bytes, so that they must agree among themselves.
  // coarser: how many times as coarse as usual the bytes are, and with them a tie that falls on its other side.
  void check(const std::string& what, double fast_tolerance = kByteRounding, double coarser = 1.0) const {
    const Array* first_fast = nullptr;
    for (const auto& [name, out] : by_backend) {
      const double rounding = output_rounding(out.dtype);
      if (name == "reference") {
        EXPECT_LT(error_of(out, plain), 2e-5 + rounding) << what;
        continue;
      }
      EXPECT_LT(error_of(out, plain), coarser * fast_tolerance + rounding) << what << " " << name;
      if (!first_fast) first_fast = &out;
      EXPECT_LT(mean_error_of(out, *first_fast, plain), coarser * kSameBytes + rounding) << what << " " << name;
      EXPECT_LT(error_of(out, *first_fast, plain), coarser * kOneTie + rounding) << what << " " << name;
    }
  }
};

Outputs attend_everywhere(Layer& layer, const Array& q) {
  const Decoded held = decode(layer);
  Array out = poisoned(q.batch, q.heads, q.tokens, held.v.d, q.dtype);
  Outputs outputs{plain_attention(args_of(q, out), q, held.k, held.v), {}};
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    outputs.by_backend.emplace_back(name, attend(layer, q));
  }
  return outputs;
}

Recipe random_recipe(Random& random, int d) {
  Recipe recipe;
  const int groups[] = {16, 32, 64, 0};
  recipe.k = {random.below(3) ? 4 : 8, groups[random.below(4)]};
  recipe.v = {random.below(3) ? 4 : 8, groups[random.below(4)]};
  recipe.scale_bits = random.below(2) ? 16 : 32;
  recipe.search = random.below(2), recipe.signed_scale = random.below(2), recipe.offset = random.below(2);
  recipe.offset_span = random.below(2) ? 16 : 64;
  recipe.sink_tokens = random.below(4) ? 0 : 16, recipe.raw_window = random.below(4) ? 0 : 16;
  const int rotation = random.below(4);
  recipe.rotation = rotation == 0                     ? Rotation::identity
                    : rotation == 1 && !(d & (d - 1)) ? Rotation::srht
                                                      : Rotation::srft;
  return recipe;
}

std::string describe(const Recipe& r, int d, size_t tokens, int group) {
  return "d " + std::to_string(d) + ", tokens " + std::to_string(tokens) + ", query heads " + std::to_string(group) +
         ", K " + std::to_string(r.k.bits) + "/" + std::to_string(r.k.group) + ", V " + std::to_string(r.v.bits) + "/" +
         std::to_string(r.v.group) + ", sinks " + std::to_string(r.sink_tokens) + ", window " +
         std::to_string(r.raw_window);
}

void check_random_layer(Random& random, int d, size_t tokens, Dtype dtype) {
  const Recipe recipe = random_recipe(random, d);
  const int group = 1 + random.below(9);  // one register tile and more
  Layer layer = make_layer(config_of(2, d, dtype, recipe));
  if (recipe.offset && random.below(3)) must(set_rope(layer, random_rope(random, d)));
  {
    UseBackend use(fast_backends().front());  // the double rotation takes d² cosines a vector
    must(append(layer, random_array(random, 2, 2, tokens, d, dtype), random_array(random, 2, 2, tokens, d, dtype)));
    attend_everywhere(layer, random_array(random, 2, 2 * group, 1, d, dtype))
        .check(describe(recipe, d, tokens, group), byte_rounding(recipe));
  }
}

TEST(Attend, EveryTailSize) {
  Random random;
  for (size_t tokens = 1; tokens <= 65; tokens++) check_random_layer(random, 64, tokens, Dtype::float32);
  for (size_t tokens : {127, 128, 129, 144, 257, 300}) check_random_layer(random, 64, tokens, Dtype::float32);
}

TEST(Attend, EveryHeadSizeAndDtype) {
  Random random;
  for (int d : kHeadDims)
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
      for (size_t tokens : {16, 17, 33, 49, 65, 97}) {
        if (d > 256 && (tokens + (int)dtype) % 3) continue;
        check_random_layer(random, d, tokens, dtype);
      }
}

TEST(Attend, KAndVOfDifferentHeadSize) {
  Random random;
  for (auto [d_k, d_v] : {std::pair{192, 128}, std::pair{64, 256}, std::pair{16, 80}}) {
    LayerConfig config = config_of(2, d_k);
    config.head_dim_v = d_v;
    Layer layer = make_layer(config);
    must(append(layer, random_array(random, 1, 2, 77, d_k), random_array(random, 1, 2, 77, d_v)));
    attend_everywhere(layer, random_array(random, 1, 6, 1, d_k)).check(std::to_string(d_k) + " " + std::to_string(d_v));
  }
}

// How much coarser Λ⁻¹ makes the bytes of queries [1, heads, 1, d]: a byte is as fine as the largest channel of its
// group, and its rounding meets keys that Λ has made as large as λ says.
double growth_by_lambda(const Array& q, const std::vector<float>& lambda, const RotationPlan& rotation, int group) {
  double most = 0.0;
  for (int h = 0; h < q.heads; h++) {
    const float* factors = &lambda[(size_t)h * lambda.size() / q.heads / q.d * q.d];
    std::vector<double> x(q.d), y(q.d);
    for (int c = 0; c < q.d; c++) x[c] = q.get(0, h, 0, c);
    rotate_reference(rotation, false, x.data(), y.data());
    double with = 0.0, without = 0.0;  // squares of the scores' rounding
    for (int from = 0; from < q.d; from += group) {
      double top = 0.0, top_with = 0.0, squares = 0.0;
      for (int c = from; c < from + group; c++) {
        top = std::max(top, std::fabs(y[c])), top_with = std::max(top_with, std::fabs(y[c] / factors[c]));
        squares += (double)factors[c] * factors[c];
      }
      with += top_with * top_with * squares, without += top * top * group;
    }
    most = std::max(most, std::sqrt(with / without));
  }
  return most;
}

TEST(Attend, LambdaCancels) {
  Random random;
  Recipe recipe;
  recipe.lambda = true;
  const LayerConfig config = config_of(2, 96, Dtype::float32, recipe);
  Layer layer = make_layer(config);
  std::vector<float> k_factors, v_factors;
  for (int i = 0; i < 2 * 96; i++)
    k_factors.push_back(std::exp(random.normal())), v_factors.push_back(std::exp(random.normal()));
  must(layer.set_lambda(k_factors.data(), v_factors.data()));
  must(append(layer, random_array(random, 1, 2, 100, 96), random_array(random, 1, 2, 100, 96)));
  const Array q = random_array(random, 1, 4, 1, 96);
  const RotationPlan rotation = make_rotation(recipe.rotation, 96, recipe.seed, config.layer_index);
  const double growth = growth_by_lambda(q, k_factors, rotation, recipe.k.group);
  attend_everywhere(layer, q).check("lambda", kByteRounding, growth);
}

// The codes are those of vectors rotated by hand, so scores and outputs are too.
TEST(Attend, DenseRotationCancels) {
  Random random;
  for (auto [d_k, d_v] : {std::pair{64, 90}, std::pair{18, 128}}) {
    Recipe recipe;
    recipe.rotation = Rotation::dense;
    LayerConfig config = config_of(2, d_k, Dtype::float32, recipe);
    config.head_dim_v = d_v;
    Layer layer = make_layer(config);
    must(layer.set_rotation(random_rotation(random, d_k).data(), random_rotation(random, d_v).data()));
    const Array k = random_array(random, 1, 2, 100, d_k), v = random_array(random, 1, 2, 100, d_v);
    must(append(layer, k, v));
    const Array q = random_array(random, 1, 6, 1, d_k);
    attend_everywhere(layer, q).check("dense " + std::to_string(d_k));
    const Decoded held = decode(layer);
    for (size_t i = 0; i < k.size(); i++) ASSERT_NEAR(held.k.flat(i), k.flat(i), 0.7f) << d_k;  // a few 4-bit steps
    for (size_t i = 0; i < v.size(); i++) ASSERT_NEAR(held.v.flat(i), v.flat(i), 0.9f) << d_v;
  }
}

// ---- exact: inputs whose bytes and codes round nothing, so that even byte kernels must be right to float precision

Recipe exact_recipe(int bits) {
  Recipe recipe;
  recipe.rotation = Rotation::identity, recipe.offset = false, recipe.search = recipe.signed_scale = false;
  recipe.scale_bits = 32, recipe.k = recipe.v = {bits, 0};
  return recipe;
}

// Integers up to `top`, reached by channel 0 of every token: codes at scale 1.
Array integers(Random& random, int batch, int heads, size_t tokens, int d, int top) {
  Array x(batch, heads, tokens, d);
  for (int b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++)
      for (size_t t = 0; t < tokens; t++)
        for (int c = 0; c < d; c++) x.set(b, h, t, c, c == 0 ? (float)top : (float)(random.below(2 * top + 1) - top));
  return x;
}

// Whole-vector K groups, one query of integers that reach 127, one visible token: p is one byte, and a sink turns the
// score into a number that can be read off the output.
TEST(Attend, ScoresAreExactWhenTheQueryIsBytes) {
  Random random;
  for (int bits : {4, 8})
    for (int d : kHeadDims) {
      const size_t tokens = 49;
      const int top = bits == 4 ? 7 : 127;
      Layer layer = make_layer(config_of(1, d, Dtype::float32, exact_recipe(bits)));
      const Array k = integers(random, 1, 1, tokens, d, top), v = integers(random, 1, 1, tokens, d, top);
      must(append(layer, k, v));
      ASSERT_EQ(layer.packed_tokens(), 48u);
      const Array q = integers(random, 1, 3, 1, d, 127);
      for (const std::string& name : fast_backends()) {
        UseBackend use(name);
        for (size_t seen = 0; seen < 48; seen++) {
          std::vector<uint8_t> mask(tokens, 0);
          mask[seen] = 1;
          const std::vector<float> sinks(3, 0.5f);
          Array out = poisoned(1, 3, 1, d);
          AttendArgs args = args_of(q, out);
          args.scale = 1.0f / (float)(127 * top * 10);  // scores of a few units
          args.mask = mask.data(), args.mask_tokens = tokens, args.sinks = sinks.data();
          must(layer.attend(args));
          for (int h = 0; h < 3; h++) {
            double score = 0.0;
            for (int c = 0; c < d; c++) score += (double)q.get(0, h, 0, c) * k.get(0, 0, seen, c) * args.scale;
            const double p = 1.0 / (1.0 + std::exp(0.5 - score));
            for (int c = 0; c < d; c++)
              ASSERT_NEAR(out.get(0, h, 0, c), p * v.get(0, 0, seen, c), 5e-6 * top)
                  << name << " d " << d << " token " << seen;
          }
        }
      }
    }
}

// A zero query: every p is 1, every weight the same byte, and the output is the mean of the values.
TEST(Attend, MeansAreExactWhenWeightsAreEqual) {
  Random random;
  for (int bits : {4, 8})
    for (int d : kHeadDims)
      for (size_t tokens : {1, 16, 17, 31, 33, 48, 64, 65, 81, 97, 129}) {
        Layer layer = make_layer(config_of(1, d, Dtype::float32, exact_recipe(bits)));
        const int top = bits == 4 ? 7 : 127;
        const Array v = integers(random, 1, 1, tokens, d, top);
        must(append(layer, random_array(random, 1, 1, tokens, d), v));
        for (const std::string& name : fast_backends()) {
          UseBackend use(name);
          const Array out = attend(layer, Array(1, 2, 1, d));
          for (int c = 0; c < d; c++) {
            double mean = 0.0;
            for (size_t t = 0; t < tokens; t++) mean += v.get(0, 0, t, c) / (double)tokens;
            for (int h = 0; h < 2; h++)
              ASSERT_NEAR(out.get(0, h, 0, c), mean, 1e-5 * top) << name << " d " << d << " " << tokens;
          }
        }
      }
}

// q·k = q·(k − μ) + q·μ and Σ p v = Σ p (v − μ) + μ: K, V are integers whose codes are exact with and without μ (8
// bits, scale 1, held there by channel 0), so that nothing but μ's arithmetic is left to differ.
TEST(Attend, AnyOffsetLeavesUnquantisedAttentionUnchanged) {
  Random random;
  for (int d : {16, 80, 128}) {
    const size_t tokens = 49;
    Array k = integers(random, 1, 2, tokens, d, 60), v = integers(random, 1, 2, tokens, d, 60);
    for (int h = 0; h < 2; h++)
      for (size_t t = 0; t < tokens; t++) k.set(0, h, t, 0, 127), v.set(0, h, t, 0, 127);
    const Array q = random_array(random, 1, 4, 1, d, Dtype::float32, 1.0f / 60);
    auto with_offset = [&](const std::string& name, int spread) {
      UseBackend use(name);
      Recipe recipe = exact_recipe(8);
      recipe.offset = true;
      Layer layer = make_layer(config_of(2, d, Dtype::float32, recipe));
      std::vector<float> mu_k, mu_v;
      for (int i = 0; i < 2 * d; i++)
        for (std::vector<float>* mu : {&mu_k, &mu_v})
          mu->push_back(i % d && spread ? (float)(random.below(2 * spread + 1) - spread) : 0.0f);
      must(layer.set_offset(mu_k.data(), mu_v.data()));
      must(append(layer, k, v));
      const Decoded held = decode(layer);
      for (size_t i = 0; i < k.size(); i++) EXPECT_NEAR(held.k.flat(i), k.flat(i), 1e-4);  // nothing was rounded
      return attend(layer, q);
    };
    Array any = poisoned(1, 4, 1, d);
    const Plain plain = plain_attention(args_of(q, any), q, k, v);
    for (int spread : {0, 1, 20, 60}) {
      EXPECT_LT(error_of(with_offset("reference", spread), plain), 1e-5) << d << " " << spread;
      for (const std::string& name : fast_backends())
        EXPECT_LT(error_of(with_offset(name, spread), plain), kTwoByteRounding) << name << " " << d << " " << spread;
    }
  }
}

// A huge offset is added back whole: keys with a bias of 3000 a channel, which not even 8 bits could carry.
TEST(Attend, OffsetCarriesKeyBiases) {
  Random random;
  Array k = random_array(random, 1, 1, 200, 64), v = random_array(random, 1, 1, 200, 64);
  for (size_t t = 0; t < 200; t++)
    for (int c = 0; c < 64; c++) k.set(0, 0, t, c, k.get(0, 0, t, c) + (c % 2 ? 3000.0f : -3000.0f));
  Recipe recipe;
  recipe.k.bits = recipe.v.bits = 8;
  Layer layer = make_layer(config_of(1, 64, Dtype::float32, recipe));
  must(append(layer, k, v));
  const Array q = random_array(random, 1, 8, 1, 64);
  Array any = poisoned(1, 8, 1, 64);
  const Plain plain = plain_attention(args_of(q, any), q, k, v);
  // q·μ is a float near 3000, good to 3e-4; what is left is the 8-bit codes' own.
  EXPECT_LT(error_of(attend(layer, q), plain), 0.06);
  recipe.offset = false;
  Layer bare = make_layer(config_of(1, 64, Dtype::float32, recipe));
  must(append(bare, k, v));
  EXPECT_GT(error_of(attend(bare, q), plain), 0.2);
}

// ---- what the bytes of q and of p·scale add, beside what the codes cost

double mean_square(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum / (double)a.size();
}

// Mean squares: the kernels against double on the same codes, and the codes against what was packed.
struct Errors {
  double kernels = 0.0, codes = 0.0;
};

Errors errors_of(Random& random, int d, const Recipe& recipe, float spread) {
  const size_t tokens = 1041;  // the last block is raw
  Layer layer = make_layer(config_of(1, d, Dtype::float32, recipe));
  const Array k = random_array(random, 1, 1, tokens, d), v = random_array(random, 1, 1, tokens, d);
  must(append(layer, k, v));
  const Decoded held = decode(layer);
  const Array q = random_array(random, 1, 32, 1, d, Dtype::float32, spread);  // scores of that spread
  const Array out = attend(layer, q);
  Array any = poisoned(1, 32, 1, d);
  const Plain codes = plain_attention(args_of(q, any), q, held.k, held.v),
              packed = plain_attention(args_of(q, any), q, k, v);
  std::vector<double> got(out.size());
  for (size_t i = 0; i < out.size(); i++) got[i] = out.flat(i);
  return {mean_square(got, codes.out), mean_square(codes.out, packed.out)};
}

// One byte beside 4-bit codes, two beside 8-bit ones: what is rounded stays small beside what the codes cost. A second
// byte that is missing on either side costs as much as 8-bit codes or several times that. The groups of V are taken
// together: where a few tokens have all the weight, one layer's 32 queries scatter by a third.
TEST(Attend, BytesAddASmallPartOfTheCodesError) {
  Random random;
  for (const std::string& name : fast_backends())
    for (int k_bits : {4, 8})
      for (int v_bits : {4, 8})
        for (float spread : {0.3f, 1.0f, 3.0f}) {
          UseBackend use(name);
          Errors sum;
          for (int group : {0, 32, 16}) {
            Recipe recipe;
            recipe.k.bits = k_bits, recipe.v = {v_bits, group};
            const Errors errors = errors_of(random, 64 << random.below(2), recipe, spread);
            sum.kernels += errors.kernels, sum.codes += errors.codes;
          }
          const double share = std::sqrt(sum.kernels / sum.codes);
          EXPECT_LT(share, k_bits == 8 && v_bits == 8 ? 0.02 : 0.1)
              << name << " K bits " << k_bits << " V bits " << v_bits << " spread " << spread;
          EXPECT_GT(share, 1e-3);  // or it is not the bytes that were measured
        }
}

// ---- softmax variants

TEST(Attend, SoftcapAndSinks) {
  Random random;
  for (size_t tokens : {5, 16, 40, 77}) {
    Layer layer = make_layer(config_of(2, 64));
    must(append(layer, random_array(random, 2, 2, tokens, 64), random_array(random, 2, 2, tokens, 64)));
    const Decoded held = decode(layer);
    const Array q = random_array(random, 2, 6, 1, 64, Dtype::float32, 2.0f);
    const std::vector<float> sinks = random.normals(6, 3.0f);
    for (float softcap : {0.0f, 1.5f, 30.0f})
      for (const float* sink : {(const float*)nullptr, sinks.data()}) {
        Array any = poisoned(2, 6, 1, 64);
        AttendArgs args = args_of(q, any);
        args.softcap = softcap, args.sinks = sink;
        const Plain plain = plain_attention(args, q, held.k, held.v);
        for (const std::string& name : usable_backends()) {
          UseBackend use(name);
          Array out = poisoned(2, 6, 1, 64);
          args.out = out.out();
          must(layer.attend(args));
          // Twice the usual query, twice the usual error of its bytes.
          EXPECT_LT(error_of(out, plain), name == "reference" ? 2e-5 : 2 * kByteRounding) << name << " " << softcap;
        }
      }
  }
}

TEST(Attend, LargeScoresStayFinite) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    Layer layer = make_layer(config_of(1, 64));
    must(
        append(layer, random_array(random, 1, 1, 70, 64, Dtype::float32, 1000.0f), random_array(random, 1, 1, 70, 64)));
    EXPECT_TRUE(all_finite(attend(layer, random_array(random, 1, 2, 1, 64, Dtype::float32, 1000.0f)))) << name;
  }
}

TEST(Attend, MasksDecideAlone) {
  Random random;
  for (size_t tokens : {17, 40, 65, 100})
    for (size_t covered : {tokens, tokens - 7, tokens - 16}) {
      Layer layer = make_layer(config_of(2, 64));
      must(append(layer, random_array(random, 2, 2, tokens, 64), random_array(random, 2, 2, tokens, 64)));
      const Decoded held = decode(layer);
      const Array q = random_array(random, 2, 4, 1, 64);
      std::vector<uint8_t> mask(2 * covered);
      for (uint8_t& byte : mask) byte = random.below(3) > 0;
      for (size_t i = 0; i < std::min<size_t>(covered, 20); i++) mask[i] = 0;  // left padding of sequence 0
      Array any = poisoned(2, 4, 1, 64);
      AttendArgs args = args_of(q, any);
      args.mask = mask.data(), args.mask_tokens = covered, args.mask_batch_stride = (ptrdiff_t)covered;
      const size_t first = tokens - covered;
      const Plain plain = plain_attention(
          args, q, 2, tokens, 64, [&](int b, int, size_t t) { return t >= first && mask[b * covered + t - first]; },
          [&](int b, int h, int, size_t t, int c) { return (double)held.k.get(b, h, t, c); },
          [&](int b, int h, int, size_t t, int c) { return (double)held.v.get(b, h, t, c); });
      for (const std::string& name : usable_backends()) {
        UseBackend use(name);
        Array out = poisoned(2, 4, 1, 64);
        args.out = out.out();
        must(layer.attend(args));
        EXPECT_LT(error_of(out, plain), name == "reference" ? 2e-5 : kByteRounding)
            << name << " " << tokens << " " << covered;
      }
    }
}

TEST(Attend, RowThatSeesNothingIsZero) {
  Random random;
  Layer layer = make_layer(config_of(1, 64));
  must(append(layer, random_array(random, 1, 1, 50, 64), random_array(random, 1, 1, 50, 64)));
  const std::vector<uint8_t> mask(50, 0);
  const std::vector<float> sinks = {0.0f, -1e4f, 1e4f};
  const Array q = random_array(random, 1, 3, 1, 64);
  for (const std::string& name : usable_backends())
    for (const float* sink : {(const float*)nullptr, sinks.data()}) {
      UseBackend use(name);
      Array out = poisoned(1, 3, 1, 64);
      AttendArgs args = args_of(q, out);
      args.mask = mask.data(), args.mask_tokens = 50, args.sinks = sink;
      must(layer.attend(args));
      for (size_t i = 0; i < out.size(); i++) ASSERT_EQ(out.flat(i), 0.0f) << name;
    }
}

TEST(Attend, StridedQueriesAndOutputs) {
  Random random;
  Layer layer = make_layer(config_of(2, 32));
  must(append(layer, random_array(random, 2, 2, 40, 32), random_array(random, 2, 2, 40, 32)));
  const Array q = random_array(random, 2, 4, 1, 32);
  const Array want = attend(layer, q);
  // [batch, query, head, d] as transformers hands them over, with a gap of 8 behind each head.
  std::vector<float> wide_q(2 * 4 * 40), wide_out(2 * 4 * 40, NAN);
  for (int b = 0; b < 2; b++)
    for (int h = 0; h < 4; h++)
      for (int c = 0; c < 32; c++) wide_q[(b * 4 + h) * 40 + c] = q.get(b, h, 0, c);
  Array any = poisoned(2, 4, 1, 32);
  AttendArgs args = args_of(q, any);
  args.q = {wide_q.data(), 160, 40, 160}, args.out = {wide_out.data(), 160, 40, 160};
  must(layer.attend(args));
  for (int b = 0; b < 2; b++)
    for (int h = 0; h < 4; h++)
      for (int c = 0; c < 40; c++) {
        const float got = wide_out[(b * 4 + h) * 40 + c];
        if (c < 32) {
          ASSERT_EQ(got, want.get(b, h, 0, c));
        } else {
          ASSERT_TRUE(std::isnan(got)) << "written outside the output";
        }
      }
}

TEST(Attend, NamesBadArguments) {
  Random random;
  Layer layer = make_layer(config_of(2, 64));
  const Array q = random_array(random, 1, 4, 1, 64);
  Array out = poisoned(1, 4, 1, 64);
  AttendArgs good = args_of(q, out);
  auto expect_bad = [&](const AttendArgs& args, const std::string& part) {
    const Status status = layer.attend(args);
    EXPECT_EQ(status.code(), Code::bad_argument) << part;
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  };
  expect_bad(good, "empty cache");
  must(append(layer, random_array(random, 1, 2, 20, 64), random_array(random, 1, 2, 20, 64)));
  must(layer.attend(good));
  AttendArgs args = good;
  args.heads = 3, expect_bad(args, "heads is 3");
  args.heads = 0, expect_bad(args, "heads is 0");
  args = good, args.queries = 0, expect_bad(args, "queries is 0");
  args = good, args.queries = 21, expect_bad(args, "queries is 21");
  args = good, args.queries = 2, expect_bad(args, "chunk_k");
  args = good, args.queries = 2, args.chunk_k = args.chunk_v = q.view(), expect_bad(args, "queries is 2");
  const std::vector<uint8_t> mask(40, 1);
  args = good, args.mask = mask.data(), args.mask_tokens = 21, expect_bad(args, "mask_tokens is 21");
  args = good, args.q.data = nullptr, expect_bad(args, "addresses");
  args = good, args.out.data = nullptr, expect_bad(args, "addresses");
  args = good, args.scale = NAN, expect_bad(args, "scale is nan");
  args = good, args.softcap = -1.0f, expect_bad(args, "softcap is -1");
  args = good, args.softcap = INFINITY, expect_bad(args, "softcap is inf");
}

TEST(Attend, AQueryThatIsNotFiniteGivesNaNAndTheOthersTheirs) {
  Random random;
  const Array k = random_array(random, 1, 1, 1500, 64);
  Layer layer = make_layer(config_of(1, 64));
  must(append(layer, k, k));
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int threads : {1, 2}) {  // with two, the tokens are split and merged
      UseThreads several(threads);
      Array q = random_array(random, 1, 4, 1, 64);
      const Array want = attend(layer, q);
      q.set(0, 1, 0, 5, NAN), q.set(0, 3, 0, 63, -INFINITY);
      const Array got = attend(layer, q);
      for (int head = 0; head < 4; head++)
        for (int c = 0; c < 64; c++) {
          if (head % 2)
            ASSERT_TRUE(std::isnan(got.get(0, head, 0, c))) << name << " " << head;
          else
            ASSERT_EQ(got.get(0, head, 0, c), want.get(0, head, 0, c)) << name << " " << head;
        }
    }
  }
}

}  // namespace
}  // namespace halfbyte
