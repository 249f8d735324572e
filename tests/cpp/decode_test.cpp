// Decoding: every backend against the reference on random bytes; round trips and their error; what a layer gives back.
#include "decode.h"

#include <array>

#include "encode.h"
#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

TEST(Decode, EveryBackendReadsRandomBytesAsTheReferenceDoes) {
  Random random;
  int turn = 0;
  for (int d : kHeadDims)
    for (int group : {16, 32, 64, 0})
      for (int bits : {4, 8}) {
        Recipe recipe;
        recipe.k = recipe.v = {bits, group};
        recipe.scale_bits = ++turn % 2 ? 16 : 32;
        if (d > 128 && turn % 4) recipe.rotation = Rotation::identity;  // the double rotation takes d² cosines a vector
        const Side side = turn / 2 % 2 ? Side::k : Side::v;
        const SideFormat format = make_side_format(recipe, side, d);
        const RotationPlan rotation = make_rotation(recipe.rotation, d, 1, 2);
        std::vector<uint8_t> codes(code_bytes(format)), scales(scales_bytes(format));
        for (uint8_t& byte : codes) byte = (uint8_t)random.below(256);
        for (size_t i = 0; i < (size_t)format.n_groups * kBlockTokens; i++)
          store_element(scales.data(), recipe.scale_bits == 16 ? Dtype::float16 : Dtype::float32, i, random.normal());
        const std::vector<float> offset = random.normals(d);
        std::vector<float> lambda;
        // λ within a factor of 2 either way: a group's step is set by its largest λ and undone by each channel's own.
        for (int c = 0; c < d; c++) lambda.push_back(std::exp2(std::clamp(random.normal() / 2, -1.0f, 1.0f)));
        auto decoded = [&](const std::string& name) {
          UseBackend use(name);
          std::vector<float> out((size_t)kBlockTokens * d, NAN);
          current_backend().decode({&format, &rotation, side, turn % 3 ? offset.data() : nullptr,
                                    turn % 5 ? nullptr : lambda.data(), codes.data(), scales.data(), out.data()});
          return out;
        };
        const std::vector<float> want = decoded("reference");
        double size = 1.0;
        for (float x : want) size = std::max(size, (double)std::fabs(x));
        for (const std::string& name : fast_backends()) {
          const std::vector<float> got = decoded(name);
          // Float rounding of an FFT, in units of the largest value.
          for (size_t i = 0; i < got.size(); i++) ASSERT_NEAR(got[i], want[i], 2e-6 * size) << name << " d " << d;
        }
      }
}

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < a.size(); i++) error += std::pow((double)a[i] - b[i], 2), size += (double)b[i] * b[i];
  return error / size;
}

std::vector<float> through_codes(const std::vector<float>& x, int d, const Recipe& recipe, Side side) {
  std::vector<float> out(x.size(), NAN);
  must(roundtrip(x.data(), out.data(), x.size() / d, d, recipe, side, nullptr, nullptr, 0));
  return out;
}

TEST(Decode, RoundTripsLoseWhatTheDesignMeasured) {
  Random random;
  const std::vector<float> x = random.normals(2000 * 128);
  struct Case {
    Codec codec;
    bool search, signed_scale;
    double error;  // squared, of Gaussian groups: docs/decisions/signed-scales.md
  };
  for (const Case& c :
       {Case{{4, 16}, true, true, 5.16e-3}, Case{{4, 32}, true, true, 6.71e-3}, Case{{4, 0}, true, true, 9.44e-3},
        Case{{4, 32}, false, false, 9.40e-3}, Case{{4, 32}, false, true, 7.38e-3}})
    for (const std::string& name : usable_backends()) {
      UseBackend use(name);
      Recipe recipe;
      recipe.k = c.codec, recipe.search = c.search, recipe.signed_scale = c.signed_scale;
      const size_t n = name == "reference" ? 200 * 128 : x.size();
      const std::vector<float> some(x.begin(), x.begin() + n);
      // 2000 vectors: the sample's own spread is under 1 %, of 200 under 3 %.
      EXPECT_NEAR(relative_error(through_codes(some, 128, recipe, Side::k), some), c.error, 0.05 * c.error) << name;
    }
}

TEST(Decode, EightBitsLoseLittle) {
  Random random;
  for (int d : kHeadDims) {
    const std::vector<float> x = random.normals(17 * d);
    for (const std::string& name : fast_backends()) {
      UseBackend use(name);
      Recipe recipe;
      recipe.k = recipe.v = {8, 32};
      for (Side side : {Side::k, Side::v})
        EXPECT_LT(relative_error(through_codes(x, d, recipe, side), x), 4e-5) << name << d;
    }
  }
}

TEST(Decode, OffsetAndLambdaCancel) {
  Random random;
  const int d = 96;
  std::vector<float> x = random.normals(40 * d), mu = random.normals(d, 100.0f), lambda;
  for (size_t i = 0; i < x.size(); i++) x[i] += mu[i % d];
  // λ within a factor of 2 either way: a group's step is set by its largest λ and undone by each channel's own.
  for (int c = 0; c < d; c++) lambda.push_back(std::exp2(std::clamp(random.normal() / 2, -1.0f, 1.0f)));
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    Recipe recipe;
    recipe.k.bits = 8;
    std::vector<float> out(x.size(), NAN);
    must(roundtrip(x.data(), out.data(), 40, d, recipe, Side::k, mu.data(), lambda.data(), 0));
    // 8 bits of values near 1 (up to 4 times more noise by λ), whatever the offset of 100: lost without subtraction.
    for (size_t i = 0; i < x.size(); i++) ASSERT_NEAR(out[i], x[i], 0.5) << name;
    double squares = 0.0;
    for (size_t i = 0; i < x.size(); i++) squares += std::pow(out[i] - x[i], 2) / x.size();
    EXPECT_LT(std::sqrt(squares), 0.1) << name;
  }
}

TEST(Decode, LayerGivesRawTokensExactlyAndPackedOnesAsTheirRoundTrip) {
  Random random;
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
    for (const std::string& name : fast_backends()) {
      UseBackend use(name);
      Recipe recipe;
      recipe.offset = false, recipe.sink_tokens = 16;
      LayerConfig config = config_of(2, 80, dtype, recipe);
      config.head_dim_v = 48, config.layer_index = 2;
      Layer layer = make_layer(config);
      const Array k = random_array(random, 2, 2, 75, 80, dtype), v = random_array(random, 2, 2, 75, 48, dtype);
      must(append(layer, k, v));
      EXPECT_EQ(layer.packed_tokens(), 48u);  // 16 sinks, 48 packed, 11 raw
      const Decoded held = decode(layer);
      for (Side side : {Side::k, Side::v}) {
        const Array &given = side == Side::k ? k : v, &got = side == Side::k ? held.k : held.v;
        for (int b = 0; b < 2; b++)
          for (int h = 0; h < 2; h++) {
            std::vector<float> rows, expected((size_t)48 * given.d);
            for (size_t t = 16; t < 64; t++)
              for (int c = 0; c < given.d; c++) rows.push_back(given.get(b, h, t, c));
            must(roundtrip(rows.data(), expected.data(), 48, given.d, recipe, side, nullptr, nullptr, 2));
            for (size_t t = 0; t < 75; t++)
              for (int c = 0; c < given.d; c++) {
                const bool packed = t >= 16 && t < 64;
                ASSERT_EQ(got.get(b, h, t, c), packed ? expected[(t - 16) * given.d + c] : given.get(b, h, t, c))
                    << name << " token " << t << " channel " << c;
              }
          }
      }
    }
}

}  // namespace
}  // namespace halfbyte
