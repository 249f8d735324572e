// Rotations: the definition, orthonormality and inverses of SRFT, SRHT and identity, for every backend.
#include "rotation.h"

#include <bit>
#include <complex>
#include <numbers>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// Head sizes of all tests, and two whose half is a prime over five: 34 = 2·17, 502 = 2·251.
std::vector<int> head_dims() {
  std::vector<int> dims = kHeadDims;
  dims.insert(dims.end(), {22, 34, 90});
  if (!std::getenv("HALFBYTE_TEST_QUICK")) dims.push_back(502);
  return dims;
}

// splitmix64 as published, one word after the other; the library jumps to its words by counter.
std::vector<double> published_signs(uint64_t state, int n) {
  std::vector<double> signs;
  for (int i = 0; i < n; i++) {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    signs.push_back((z ^ (z >> 31)) >> 63 ? -1.0 : 1.0);
  }
  return signs;
}

// y of the definition: DFT of the signed vector; row 0, d/2 real, between them √2·Re, behind them √2·Im.
std::vector<double> srft_by_definition(const std::vector<float>& x, const std::vector<double>& signs) {
  const int d = (int)x.size(), half = d / 2;
  std::vector<double> y(d);
  for (int k = 0; k <= half; k++) {
    std::complex<double> sum = 0.0;
    for (int j = 0; j < d; j++)
      sum += signs[j] * (double)x[j] * std::polar(1.0, -2.0 * std::numbers::pi * ((long)j * k % d) / d);
    const bool edge = k == 0 || k == half;
    y[k] = sum.real() * std::sqrt((edge ? 1.0 : 2.0) / d);
    if (!edge) y[half + k] = sum.imag() * std::sqrt(2.0 / d);
  }
  return y;
}

std::vector<double> srht_by_definition(const std::vector<float>& x, const std::vector<double>& signs) {
  const int d = (int)x.size();
  std::vector<double> y(d);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++)
      y[i] += (std::popcount((unsigned)(i & j)) % 2 ? -1 : 1) * signs[j] * x[j] / std::sqrt(d);
  return y;
}

std::vector<float> unit_vector(Random& random, int d) {
  std::vector<float> x = random.normals(d);
  double squares = 0.0;
  for (float value : x) squares += (double)value * value;
  for (float& value : x) value /= (float)std::sqrt(squares);
  return x;
}

std::vector<float> rotated(const std::vector<float>& x, int d, Recipe recipe, int layer_index, bool inverse = false,
                           const float* matrix = nullptr) {
  std::vector<float> out(x.size(), NAN);
  must(rotate(x.data(), out.data(), x.size() / d, d, recipe, layer_index, inverse, matrix));
  return out;
}

Recipe recipe_of(Rotation rotation, uint64_t seed = 0) {
  Recipe recipe;
  recipe.rotation = rotation, recipe.seed = seed;
  return recipe;
}

TEST(Rotation, SignsAreThePublishedSplitmix64) {
  // Its first words from state 0: E220A839…, 6E789E6A…, 06C45D18…, F88BB8A8…: top bits 1, 0, 0, 1.
  const RotationPlan plan = make_rotation(Rotation::srft, 16, 0, 0);
  EXPECT_EQ(std::vector<float>(plan.signs.begin(), plan.signs.begin() + 4), (std::vector<float>{-1, 1, 1, -1}));
  for (uint64_t seed : {0ull, 7ull, ~0ull}) {
    const std::vector<double> words = published_signs(seed, 4 * 512);
    for (int layer : {0, 3})
      for (int c : {0, 1, 255, 511})
        EXPECT_EQ(make_rotation(Rotation::srft, 512, seed, layer).signs[c], words[layer * 512 + c])
            << seed << " " << layer;
  }
}

TEST(Rotation, SrftIsTheSignedDftOfItsDefinition) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int d : head_dims()) {
      const std::vector<float> x = unit_vector(random, d);
      const std::vector<double> signs = published_signs(5, 2 * 512 + d);
      const std::vector<double> want = srft_by_definition(x, {signs.begin() + 2 * 512, signs.end()});
      const std::vector<float> got = rotated(x, d, recipe_of(Rotation::srft, 5), 2);
      for (int i = 0; i < d; i++) ASSERT_NEAR(got[i], want[i], 1e-6) << name << " d " << d << " row " << i;
    }
  }
}

TEST(Rotation, SrhtIsTheSignedHadamardOfItsDefinition) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int d : {16, 32, 64, 128, 256, 512}) {
      const std::vector<float> x = unit_vector(random, d);
      const std::vector<double> want = srht_by_definition(x, published_signs(0, d));
      const std::vector<float> got = rotated(x, d, recipe_of(Rotation::srht), 0);
      for (int i = 0; i < d; i++) ASSERT_NEAR(got[i], want[i], 1e-6) << name << " d " << d << " row " << i;
    }
  }
}

// Rᵀ R = I, from the d rotated unit vectors.
void expect_orthonormal(Rotation rotation, int d, const std::string& name) {
  std::vector<float> unit((size_t)d * d, 0.0f);
  for (int i = 0; i < d; i++) unit[(size_t)i * d + i] = 1.0f;
  const std::vector<float> columns = rotated(unit, d, recipe_of(rotation, 11), 1);
  double worst = 0.0;
  for (int i = 0; i < d; i++)
    for (int j = 0; j <= i; j++) {
      double dot = 0.0;
      for (int c = 0; c < d; c++) dot += (double)columns[(size_t)i * d + c] * columns[(size_t)j * d + c];
      worst = std::max(worst, std::fabs(dot - (i == j)));
    }
  EXPECT_LT(worst, 1e-6) << name << " d " << d;
}

TEST(Rotation, SrftIsOrthonormal) {
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (int d : head_dims())
      if (name != "reference" || d <= 128) expect_orthonormal(Rotation::srft, d, name);  // d³ cosines otherwise
  }
}

TEST(Rotation, SrhtIsOrthonormal) {
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    for (int d : {16, 64, 128, 256, 512}) expect_orthonormal(Rotation::srht, d, name);
  }
}

TEST(Rotation, InverseUndoesAnyNumberOfVectors) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    for (Rotation rotation : {Rotation::identity, Rotation::srft, Rotation::srht})
      for (int d : head_dims()) {
        if (rotation == Rotation::srht && (d & (d - 1))) continue;
        for (int n : {1, 2, 15, 16, 17, 33}) {
          if (name == "reference" && (n > 2 || d > 256)) continue;
          const std::vector<float> x = random.normals((size_t)n * d);
          const std::vector<float> y = rotated(x, d, recipe_of(rotation), 0);
          const std::vector<float> back = rotated(y, d, recipe_of(rotation), 0, true);
          // Values reach about 4; FFTs of up to 9 passes lose a few units in the last place.
          for (size_t i = 0; i < x.size(); i++) ASSERT_NEAR(back[i], x[i], 5e-6) << name << " d " << d << " n " << n;
          if (rotation == Rotation::identity) {
            ASSERT_EQ(y, x);
          }
        }
      }
  }
}

TEST(Rotation, DenseIsTheMatrixAndItsTranspose) {
  Random random;
  const Recipe recipe = recipe_of(Rotation::dense);
  for (int d : head_dims()) {
    if (d > 256) continue;  // d³ to make one
    const std::vector<float> r = random_rotation(random, d);
    for (const std::string& name : usable_backends()) {
      UseBackend use(name);
      for (int n : {1, 16, 33}) {
        const std::vector<float> x = random.normals((size_t)n * d);
        const std::vector<float> y = rotated(x, d, recipe, 0, false, r.data()),
                                 z = rotated(x, d, recipe, 0, true, r.data());
        for (int i = 0; i < n * d; i++) {
          double forward = 0.0, inverse = 0.0;
          for (int j = 0; j < d; j++) {
            forward += (double)r[(size_t)(i % d) * d + j] * x[i / d * d + j];
            inverse += (double)r[(size_t)j * d + i % d] * x[i / d * d + j];
          }
          // A running sum of size 2 rounds d times by up to 1.2e-7: √d of that, and four times as much for the worst of
          // many.
          ASSERT_NEAR(y[i], forward, 1e-5) << name << " d " << d << " n " << n << " at " << i;
          ASSERT_NEAR(z[i], inverse, 1e-5) << name << " d " << d << " n " << n << " at " << i;
        }
      }
    }
  }
}

TEST(Rotation, DenseMatricesMustBeOrthonormalAndGiven) {
  Random random;
  for (int d : {16, 18, 64}) {
    const std::vector<float> good = random_rotation(random, d);
    auto refusal = [&](std::vector<float> matrix, int at, float value) {
      matrix[at] = value;
      float x[64] = {};
      const Status status = rotate(x, x, 1, d, recipe_of(Rotation::dense), 0, false, matrix.data());
      EXPECT_EQ(status.code(), status.ok() ? Code::ok : Code::bad_argument);
      return status.message();
    };
    const int last = d * d - 1;
    EXPECT_EQ(refusal(good, last, good[last] + 2e-4f), "");
    EXPECT_NE(refusal(good, last, good[last] + 2e-2f).find("matrix is not orthonormal"), std::string::npos);
    EXPECT_NE(refusal(good, last, NAN).find("an entry of R R^T is inf"), std::string::npos) << refusal(good, last, NAN);
    EXPECT_NE(refusal(good, 0, INFINITY).find("takes a matrix [head_dim, head_dim] within 0.001"), std::string::npos);
    EXPECT_NE(refusal(std::vector<float>(d * d), 0, 0.0f).find("is 1.0"), std::string::npos);
    float x[64] = {};
    EXPECT_NE(rotate(x, x, 1, d, recipe_of(Rotation::dense), 0, false).message().find("no matrix"), std::string::npos);
    EXPECT_NE(rotate(x, x, 1, d, recipe_of(Rotation::srft), 0, false, good.data()).message().find("not dense"),
              std::string::npos);
  }
}

TEST(Rotation, WritesOnlyItsVectors) {
  Random random;
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    const int d = 18, stride = 32, n = 3;
    const RotationPlan plan = make_rotation(Rotation::srft, d, 0, 0);
    std::vector<float> x = random.normals((size_t)(n + 1) * stride);
    const std::vector<float> before = x;
    current_backend().rotate(plan, false, x.data(), stride, n);
    for (size_t i = 0; i < x.size(); i++)
      if (i / stride >= n || i % stride >= d) {
        ASSERT_EQ(x[i], before[i]) << name << " " << i;
      }
  }
}

TEST(Rotation, LayersAndSeedsDiffer) {
  const RotationPlan a = make_rotation(Rotation::srft, 128, 0, 0), b = make_rotation(Rotation::srft, 128, 0, 1);
  const RotationPlan c = make_rotation(Rotation::srft, 128, 1, 0);
  EXPECT_NE(a.signs, b.signs);
  EXPECT_NE(a.signs, c.signs);
}

TEST(Rotation, RefusesWhatItCannotRotate) {
  float x[512] = {};
  for (int d : {0, 2, 14, 15, 17, 513, 514, -16}) {
    const Status status = rotate(x, x, 1, d, recipe_of(Rotation::srft), 0, false);
    EXPECT_EQ(status.code(), Code::bad_argument) << d;
    EXPECT_NE(status.message().find("head_dim is " + std::to_string(d)), std::string::npos) << status.message();
  }
  const Status status = rotate(x, x, 1, 96, recipe_of(Rotation::srht), 0, false);
  EXPECT_EQ(status.code(), Code::bad_argument);
  EXPECT_NE(status.message().find("srht needs a power of two"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace halfbyte
