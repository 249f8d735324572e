// Encoding: every backend against the reference, nibble by nibble; ranges, search, partial blocks, extremes.
#include <array>

#include "coding.h"

namespace halfbyte {
namespace {

using namespace testing;

void encode(const Input& in, Block& block) { current_backend().encode(args_of(in, block)); }

std::vector<Recipe> recipes() {
  std::vector<Recipe> list;
  for (int bits : {4, 8})
    for (int group : {16, 32, 64, 0})
      for (int form = 0; form < 4; form++) {
        Recipe recipe;
        recipe.k = recipe.v = {bits, group};
        recipe.search = form & 1, recipe.signed_scale = form & 2;
        recipe.scale_bits = (form + group / 16) % 2 ? 16 : 32;
        list.push_back(recipe);
      }
  return list;
}

TEST(Encode, EveryBackendCodesAsWellAsTheReference) {
  Random random;
  const std::vector<Recipe> all = recipes();
  int turn = 0;
  for (int d : kHeadDims)
    for (size_t i = 0; i < all.size(); i += 3, turn++) {  // 3 and 32 share no factor: every recipe meets several sizes
      Recipe recipe = all[(i + turn) % all.size()];
      const Dtype dtype = std::array{Dtype::float32, Dtype::float16, Dtype::bfloat16}[turn % 3];
      const Side side = turn % 2 ? Side::k : Side::v;
      if (turn % 7 == 0 && d <= 256)
        recipe.rotation = Rotation::dense;
      else if (d > 256 && turn % 3)
        recipe.rotation = Rotation::identity;  // the double rotation takes d² cosines a vector
      Input in = random_input(random, recipe, d, dtype, turn % 4 < 2, turn % 5 == 0);
      if (turn % 2) in.n = 1 + random.below(16), in.first_lane = random.below(17 - in.n);
      Block reference(recipe, side, d);
      {
        UseBackend use("reference");
        encode(in, reference);
      }
      const std::vector<double> y = targets(in, reference.format);
      for (const std::string& name : fast_backends()) {
        UseBackend use(name);
        Block fast(recipe, side, d);
        encode(in, fast);
        size_t differing = 0;
        expect_equivalent(in, y, fast, reference, &differing, name + " d " + std::to_string(d));
        // A whole group differs when two of six scales tie to 1e-7: a handful in all.
        EXPECT_LE(differing, (size_t)in.n * d / 10 + fast.format.group) << name << " d " << d;
      }
    }
}

// Integers under the scale 1: no rounding anywhere, so all backends must give the very same bytes.
TEST(Encode, NibblesLieWhereTheFormatSays) {
  Random random;
  for (int bits : {4, 8})
    for (int d : kHeadDims)
      for (Side side : {Side::k, Side::v}) {
        Recipe recipe;
        recipe.rotation = Rotation::identity, recipe.search = recipe.signed_scale = false, recipe.scale_bits = 32;
        recipe.k = recipe.v = {bits, 0};
        const int top = zero_code(bits) - 1;
        Input in = random_input(random, recipe, d, Dtype::float32, false, false);
        for (int t = 0; t < kBlockTokens; t++)
          for (int c = 0; c < d; c++)
            in.x.set(0, 0, t, c, c == t % d ? (float)top : (float)(random.below(2 * top + 1) - top));
        for (const std::string& name : usable_backends()) {
          UseBackend use(name);
          Block block(recipe, side, d);
          encode(in, block);
          for (int t = 0; t < kBlockTokens; t++) {
            ASSERT_NEAR(block.scale(t, 0), 1.0f, 1e-6f) << name;
            for (int c = 0; c < block.format.padded_dim; c++)
              ASSERT_EQ(block.code(t, c), c < d ? (int)in.x.get(0, 0, t, c) : 0)
                  << name << " token " << t << " channel " << c;
          }
        }
      }
}

TEST(Encode, PartOfABlockLeavesItsOtherTokensAlone) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int bits : {4, 8})
      for (Side side : {Side::k, Side::v})
        for (int lane = 0; lane < kBlockTokens; lane += 3) {
          Recipe recipe;
          recipe.k = recipe.v = {bits, 16};
          Input in = random_input(random, recipe, 80, Dtype::float32, true, false);
          Block whole(recipe, side, 80), part(recipe, side, 80);
          encode(in, whole);
          in.n = 1 + random.below(kBlockTokens - lane), in.first_lane = lane;
          const Block before = part;
          encode(in, part);
          for (int t = 0; t < kBlockTokens; t++) {
            const bool written = t >= lane && t < lane + in.n;
            for (int c = 0; c < part.format.padded_dim; c++)
              ASSERT_EQ(part.code(t, c), written ? whole.code(t - lane, c) : before.code(t, c))
                  << name << " token " << t;
            for (int g = 0; g < part.format.n_groups; g++)
              ASSERT_EQ(float_to_bits(part.scale(t, g)),
                        float_to_bits(written ? whole.scale(t - lane, g) : before.scale(t, g)));
          }
        }
  }
}

TEST(Encode, SymmetricCodesWithoutSearchStayInsideSeven) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (bool search : {false, true}) {
      Recipe recipe;
      recipe.signed_scale = false, recipe.search = search;
      const Input in = random_input(random, recipe, 128, Dtype::float32, false, false);
      Block block(recipe, Side::k, 128);
      encode(in, block);
      int lowest = 0;
      for (int t = 0; t < kBlockTokens; t++)
        for (int c = 0; c < 128; c++) lowest = std::min(lowest, block.code(t, c));
      EXPECT_GE(lowest, search ? -8 : -7) << name;
      for (int t = 0; t < kBlockTokens; t++)
        for (int g = 0; g < 4; g++) EXPECT_GT(block.scale(t, g), 0.0f) << name;
    }
  }
}

TEST(Encode, SignedScalePutsTheExtremeOnMinusEight) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    Recipe recipe;
    recipe.search = false, recipe.rotation = Rotation::identity;
    const Input in = random_input(random, recipe, 128, Dtype::float32, false, false);
    Block block(recipe, Side::k, 128);
    encode(in, block);
    for (int t = 0; t < kBlockTokens; t++)
      for (int g = 0; g < 4; g++) {
        int extreme = 32 * g;
        for (int c = 32 * g; c < 32 * (g + 1); c++)
          if (std::fabs(in.x.get(0, 0, t, c)) > std::fabs(in.x.get(0, 0, t, extreme))) extreme = c;
        EXPECT_EQ(block.code(t, extreme), -8) << name;
        EXPECT_EQ(std::signbit(block.scale(t, g)), !std::signbit(in.x.get(0, 0, t, extreme))) << name;
      }
  }
}

TEST(Encode, SearchNeverCostsAccuracy) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (bool signed_scale : {false, true}) {
      Recipe plain;
      plain.search = false, plain.signed_scale = signed_scale, plain.scale_bits = 32;
      Recipe searched = plain;
      searched.search = true;
      const Input in = random_input(random, plain, 96, Dtype::float32, true, false);
      Block a(plain, Side::v, 96), b(searched, Side::v, 96);
      encode(in, a), encode(in, b);
      const std::vector<double> y = targets(in, a.format);
      for (int t = 0; t < kBlockTokens; t++)
        EXPECT_LE(squared_error(b, &y[t * 96], t, 0, 96), 1.0001 * squared_error(a, &y[t * 96], t, 0, 96)) << name;
    }
  }
}

TEST(Encode, ExtremesStayNumbers) {
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int scale_bits : {16, 32})
      for (float value : {0.0f, 1e-30f, 1e-7f, 1e4f, -1e4f}) {
        Recipe recipe;
        recipe.scale_bits = scale_bits, recipe.k.group = 0;
        Random random;
        Input in = random_input(random, recipe, 512, Dtype::float32, true, false);
        // With the signs of the rotation the energy meets in one channel: √512 · 2e4, the largest a scale must hold.
        for (int t = 0; t < kBlockTokens; t++)
          for (int c = 0; c < 512; c++) in.x.set(0, 0, t, c, value * in.rotation.signs[c]);
        for (int c = 0; c < 512; c++) in.offset[c] = -value * in.rotation.signs[c];
        Block block(recipe, Side::k, 512);
        encode(in, block);
        for (int t = 0; t < kBlockTokens; t++) {
          ASSERT_TRUE(std::isfinite(block.scale(t, 0))) << name << " " << value;
          const double top = 2.0 * value * std::sqrt(512.0);
          EXPECT_NEAR((double)block.code(t, 0) * block.scale(t, 0), top, 0.07 * std::fabs(top) + 1e-5) << name;
        }
      }
  }
}

}  // namespace
}  // namespace halfbyte
