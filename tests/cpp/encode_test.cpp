// Encoding: every backend against the reference, nibble by nibble; ranges, search, partial blocks, extremes.
#include "encode.h"

#include <array>
#include <numeric>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// One side of one block, its bytes poisoned.
struct Block {
  SideFormat format;
  Side side;
  std::vector<uint8_t> codes, scales;

  Block(const Recipe& recipe, Side side, int d)
      : format(make_side_format(recipe, side, d)),
        side(side),
        codes(code_bytes(format), 0xa5),
        scales(scales_bytes(format), 0xa5) {}

  int code(int token, int channel) const {
    CodePlace place =
        side == Side::k ? k_code_place(format.bits, token, channel) : v_code_place(format.bits, token, channel);
    return (codes[place.byte] >> place.shift & (format.bits == 4 ? 15 : 255)) - zero_code(format.bits);
  }
  float scale(int token, int group) const {
    return load_element(scales.data(), format.scale_bytes == 4 ? Dtype::float32 : Dtype::float16,
                        (size_t)group * kBlockTokens + token);
  }
};

struct Input {
  RotationPlan rotation;
  Array x;  // [1, 1, 16, d]
  std::vector<float> offset, lambda;
  int n = kBlockTokens, first_lane = 0;
};

Input random_input(Random& random, const Recipe& recipe, int d, Dtype dtype, bool offset, bool lambda) {
  std::vector<float> matrix;
  if (recipe.rotation == Rotation::dense) matrix = random_rotation(random, d);
  Input in{make_rotation(recipe.rotation, d, 3, 1, matrix.data()),
           random_array(random, 1, 1, kBlockTokens, d, dtype),
           {},
           {},
           kBlockTokens,
           0};
  if (offset) in.offset = random.normals(d);
  if (lambda)
    for (int c = 0; c < d; c++) in.lambda.push_back(std::exp(0.5f * random.normal()));
  return in;
}

void encode(const Input& in, Block& block) {
  EncodeArgs args{&block.format,
                  &in.rotation,
                  block.side,
                  in.x.dtype,
                  {},
                  in.n,
                  in.first_lane,
                  in.offset.empty() ? nullptr : in.offset.data(),
                  in.lambda.empty() ? nullptr : in.lambda.data(),
                  block.codes.data(),
                  block.scales.data()};
  for (int i = 0; i < in.n; i++) args.rows[i] = in.x.bytes.data() + in.x.at(0, 0, i, 0) * dtype_bytes(in.x.dtype);
  current_backend().encode(args);
}

// Rotated vectors in double [16][padded_dim], what the codes should stand for.
std::vector<double> targets(const Input& in, const SideFormat& format) {
  std::vector<double> y((size_t)kBlockTokens * format.padded_dim), x(format.head_dim);
  for (int t = 0; t < in.n; t++) {
    for (int c = 0; c < format.head_dim; c++)
      x[c] = (double)in.x.get(0, 0, t, c) - (in.offset.empty() ? 0.0f : in.offset[c]);
    double* row = &y[(size_t)t * format.padded_dim];
    rotate_reference(in.rotation, false, x.data(), row);
    for (int c = 0; c < format.head_dim && !in.lambda.empty(); c++) row[c] *= in.lambda[c];
  }
  return y;
}

double squared_error(const Block& block, const double* y, int lane, int from, int to) {
  double sum = 0.0;
  for (int c = from; c < to; c++) {
    double e = y[c] - (double)block.code(lane, c) * block.scale(lane, c / block.format.group);
    sum += e * e;
  }
  return sum;
}

// A float kernel may take the other of two nearly equal scales, or the other side of a tie; so each group is judged by
// what the definition promises: its squared error is the reference's, and its codes are the nearest ones for its scale.
void expect_equivalent(const Input& in, const std::vector<double>& y, const Block& fast, const Block& reference,
                       size_t* differing, const std::string& what) {
  const SideFormat& f = fast.format;
  const int half = zero_code(f.bits), lowest = f.signed_scale || f.search ? -half : 1 - half;
  for (int i = 0; i < in.n; i++)
    for (int g = 0; g < f.n_groups; g++) {
      const int lane = in.first_lane + i, from = g * f.group, to = std::min(from + f.group, f.padded_dim);
      const double* row = &y[(size_t)i * f.padded_dim];
      const double scale = fast.scale(lane, g);
      double rounding = 2e-6 * std::sqrt(std::inner_product(row, row + f.padded_dim, row, 0.0));  // of a float FFT
      if (f.scale_bytes == 2)  // a candidate near the middle of two halves may round to the other one
        rounding += 5e-4 * std::sqrt(std::inner_product(row + from, row + to, row + from, 0.0));
      ASSERT_LE(std::sqrt(squared_error(fast, row, lane, from, to)),
                std::sqrt(squared_error(reference, row, lane, from, to)) + rounding)
          << what << " lane " << lane << " group " << g;
      for (int c = from; c < to; c++) {
        const double nearest = std::clamp(row[c] / scale, (double)lowest, half - 1.0);
        // 1e-5 of the code range: the rotation's float rounding, in steps.
        if (scale != 0.0)
          ASSERT_NEAR(fast.code(lane, c), nearest, 0.5 + 1e-5 * half) << what << " channel " << c;
        else
          ASSERT_EQ(fast.code(lane, c), 0) << what;
        *differing += fast.code(lane, c) != reference.code(lane, c);
      }
    }
}

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
