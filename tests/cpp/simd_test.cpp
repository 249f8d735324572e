// The words that kernels are written in, for each instruction set, against plain C++.
#include <algorithm>
#include <array>

#include "simd_ops.h"
#include "testing.h"

namespace halfbyte {
namespace testing {

static std::vector<const SimdOps*>& built() {
  static std::vector<const SimdOps*> list;
  return list;
}

bool add_simd(const SimdOps* ops) {
  built().push_back(ops);
  return true;
}

}  // namespace testing

namespace {

using namespace testing;
using Floats = std::array<float, 16>;

// Those built whose instructions this CPU has.
std::vector<const SimdOps*> all_ops() {
  const std::vector<std::string> usable = usable_backends();
  std::vector<const SimdOps*> list = built();
  std::erase_if(list,
                [&](const SimdOps* ops) { return std::find(usable.begin(), usable.end(), ops->name) == usable.end(); });
  return list;
}

TEST(Simd, EveryFastBackendIsTested) { EXPECT_EQ(all_ops().size(), fast_backends().size()); }

Floats random_floats(Random& random, float spread = 1.0f) {
  Floats x;
  for (float& value : x) value = spread * random.normal();
  return x;
}

int bytes_of(const std::array<int8_t, 4>& four) {
  int word;
  memcpy(&word, four.data(), 4);
  return word;
}

TEST(Simd, RoundsToNearestEven) {
  Random random;
  for (const SimdOps* ops : all_ops()) {
    Floats x = random_floats(random, 1000.0f), out;
    const Floats ties = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 7.5f, 8.5f, 127.5f};
    std::copy_n(ties.begin(), 8, x.begin());
    ops->round(x.data(), out.data());
    for (int i = 0; i < 16; i++) EXPECT_EQ(out[i], std::nearbyint(x[i])) << ops->name;
  }
}

TEST(Simd, HalvesAndBf16AreThoseOfTheReference) {
  Random random;
  for (const SimdOps* ops : all_ops()) {
    for (int bits = 0; bits < 65536; bits += 16) {
      std::array<uint16_t, 16> raw;
      Floats half, bf16;
      for (int i = 0; i < 16; i++) raw[i] = (uint16_t)(bits + i);
      ops->load_f16(raw.data(), half.data()), ops->load_bf16(raw.data(), bf16.data());
      for (int i = 0; i < 16; i++) {
        const float want = half_to_float(raw[i]);
        ASSERT_TRUE(half[i] == want || (std::isnan(half[i]) && std::isnan(want))) << ops->name << " " << raw[i];
        ASSERT_TRUE(bf16[i] == bf16_to_float(raw[i]) || std::isnan(bf16[i])) << ops->name;
      }
    }
    for (int turn = 0; turn < 1000; turn++) {
      const Floats x = random_floats(random, std::ldexp(1.0f, random.below(40) - 24));
      Floats out;
      std::array<uint16_t, 16> bits;
      ops->round_f16(x.data(), out.data()), ops->store_f16(x.data(), bits.data());
      for (int i = 0; i < 16; i++) {
        ASSERT_EQ(bits[i], float_to_half(x[i])) << ops->name << " " << x[i];
        ASSERT_EQ(out[i], half_to_float(float_to_half(x[i]))) << ops->name << " " << x[i];
      }
    }
  }
}

TEST(Simd, ExponentialsAndTangents) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 2000; turn++) {
      Floats x = random_floats(random, 20.0f), out;
      for (float& value : x) value = -std::fabs(value);
      x[0] = 0.0f, x[1] = -86.9f, x[2] = -1e30f, x[3] = -std::numeric_limits<float>::max();
      ops->exp_negative(x.data(), out.data());
      for (int i = 0; i < 16; i++) {
        const double want = std::exp(std::max((double)x[i], -87.0));
        // 4e-6 of the series; and x · log2(e), a float, is off by a part in 2^24 of itself.
        ASSERT_NEAR(out[i], want, (4e-6 + 1.2e-7 * std::fabs(std::max(x[i], -87.0f))) * want)
            << ops->name << " e^" << x[i];
      }
      ASSERT_EQ(out[0], 1.0f) << ops->name;
      x = random_floats(random, 3.0f), x[0] = 0.0f, x[1] = 100.0f, x[2] = -1e5f;
      ops->tanh(x.data(), out.data());
      for (int i = 0; i < 16; i++) ASSERT_NEAR(out[i], std::tanh(x[i]), 4e-6) << ops->name << " tanh " << x[i];
    }
}

TEST(Simd, LaneByLane) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 200; turn++) {
      Floats a = random_floats(random), b = random_floats(random), c = random_floats(random), x, y, z;
      for (int i = 0; i < 4; i++) b[random.below(16)] = a[random.below(16)], b[i] = a[i];
      ops->fused(a.data(), b.data(), c.data(), x.data(), y.data());
      for (int i = 0; i < 16; i++) {
        ASSERT_NEAR(x[i], (double)a[i] * b[i] + c[i], 2e-6) << ops->name;
        ASSERT_NEAR(y[i], c[i] - (double)a[i] * b[i], 2e-6) << ops->name;
      }
      ops->bounds(a.data(), b.data(), x.data(), y.data(), z.data());
      uint16_t greater = 0, at_least = 0;
      for (int i = 0; i < 16; i++) {
        ASSERT_EQ(x[i], std::max(a[i], b[i])) << ops->name;
        ASSERT_EQ(y[i], std::min(a[i], b[i])) << ops->name;
        ASSERT_EQ(z[i], std::fabs(a[i])) << ops->name;
        greater |= (uint16_t)((a[i] > b[i]) << i), at_least |= (uint16_t)((a[i] >= b[i]) << i);
      }
      ASSERT_EQ(ops->greater(a.data(), b.data()), greater) << ops->name;
      ASSERT_EQ(ops->greater_equal(a.data(), b.data()), at_least) << ops->name;
      const auto mask = (uint16_t)random.below(65536);
      ops->select(mask, a.data(), c.data(), x.data());
      for (int i = 0; i < 16; i++) ASSERT_EQ(x[i], mask >> i & 1 ? a[i] : c[i]) << ops->name;
    }
}

TEST(Simd, AcrossLanes) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 200; turn++) {
      const Floats x = random_floats(random);
      double sum = 0.0;
      for (float value : x) sum += value;
      ASSERT_NEAR(ops->reduce_add(x.data()), sum, 1e-5) << ops->name;
      ASSERT_EQ(ops->reduce_max(x.data()), *std::max_element(x.begin(), x.end())) << ops->name;
      Floats equal;
      equal.fill(x[0]);
      ASSERT_EQ(ops->reduce_add(equal.data()), 16.0f * x[0]) << ops->name;
      std::array<float, 256> square, turned;
      for (float& value : square) value = random.normal();
      turned = square;
      ops->transpose16(turned.data());
      for (int i = 0; i < 256; i++) ASSERT_EQ(turned[i], square[i % 16 * 16 + i / 16]) << ops->name << " " << i;
    }
}

TEST(Simd, SumsOfFourAtOnce) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 100; turn++) {
      std::array<float, 64> x;
      std::array<float, 4> sums;
      for (float& element : x)
        element = (float)(random.below(2001) - 1000);  // whole numbers: any order gives the same sum
      ops->sum_four(x.data(), sums.data());
      for (int i = 0; i < 4; i++) {
        float want = 0.0f;
        for (int j = 0; j < 16; j++) want += x[16 * i + j];
        ASSERT_EQ(sums[i], want) << ops->name;
      }
    }
}

TEST(Simd, BytesAndMasks) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 200; turn++) {
      Floats x;
      std::array<uint8_t, 16> out, bytes;
      uint16_t mask = 0;
      for (int i = 0; i < 16; i++) {
        x[i] = (float)(random.below(256) - (turn % 2 ? 128 : 0));
        bytes[i] = random.below(2) ? (uint8_t)random.below(256) : 0;
        mask |= (uint16_t)((bytes[i] != 0) << i);
      }
      ops->store_low_bytes(x.data(), out.data());
      for (int i = 0; i < 16; i++) ASSERT_EQ(out[i], (uint8_t)(int)x[i]) << ops->name;
      ASSERT_EQ(ops->load_mask(bytes.data()), mask) << ops->name;
    }
}

TEST(Simd, ExtremesKeepTheirSign) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 200; turn++) {
      const int n = 1 + random.below(20);
      std::vector<float> x = random.normals(16 * n);
      for (int i = 0; i < n && turn % 2; i++) x[16 * i] = random.below(2) ? 3.0f : -3.0f;  // the positive one of equals
      Floats out;
      ops->extreme(x.data(), n, out.data());
      for (int lane = 0; lane < 16; lane++) {
        float high = x[lane], low = x[lane];
        for (int i = 1; i < n; i++) high = std::max(high, x[16 * i + lane]), low = std::min(low, x[16 * i + lane]);
        const float want = high >= -low ? high : low;
        ASSERT_EQ(out[lane], want) << ops->name << " n " << n;
      }
    }
}

TEST(Simd, IntegersAndTheirBytes) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 200; turn++) {
      std::array<int32_t, 16> a, b, sum, gap, shifted, limited;
      for (int i = 0; i < 16; i++)
        a[i] = (int32_t)(random.below(1 << 30) * 4u + random.below(4)), b[i] = random.below(1 << 30);
      ops->sums(a.data(), b.data(), sum.data(), gap.data(), shifted.data());
      const int less = random.below(256), most = random.below(256);
      ops->limit_bytes(a.data(), less, most, limited.data());
      for (int i = 0; i < 16; i++) {
        ASSERT_EQ((uint32_t)sum[i], (uint32_t)a[i] + (uint32_t)b[i]) << ops->name;
        ASSERT_EQ((uint32_t)gap[i], (uint32_t)a[i] - (uint32_t)b[i]) << ops->name;
        ASSERT_EQ((uint32_t)shifted[i], (uint32_t)a[i] << 8 | (uint32_t)b[i]) << ops->name;
        for (int j = 0; j < 32; j += 8)
          ASSERT_EQ(limited[i] >> j & 255, std::min(std::max((a[i] >> j & 255) - less, 0), most)) << ops->name;
      }
      std::array<std::array<std::array<uint8_t, 4>, 16>, 4> from, to;  // [row][lane][byte]
      for (auto& row : from)
        for (auto& lane : row)
          for (uint8_t& byte : lane) byte = (uint8_t)random.below(256);
      to = from;
      ops->transpose_bytes(reinterpret_cast<int32_t*>(&to));
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
          ASSERT_EQ(to[i / 4][j][i % 4], from[j / 4][i][j % 4]) << ops->name << " " << i << " " << j;
    }
}

// All quarters of a step that a candidate scale can make of a group: ties go to even, and what is too far out comes
// back.
TEST(Simd, NearestCodesStayInTheirRange) {
  for (const SimdOps* ops : all_ops())
    for (int bits : {4, 8}) {
      const float half = (float)(1 << (bits - 1)), reach = bits == 4 ? 15.0f : 200.0f;
      for (float first = -reach; first <= reach; first += 4.0f) {
        std::array<float, 16> x, inverse, codes[2];
        for (int i = 0; i < 16; i++) inverse[i] = std::exp2((float)(i - 8)), x[i] = first + 0.25f * i;
        for (int i = 0; i < 16; i++) x[i] = std::min(x[i], reach) / inverse[i];
        ops->nearest_codes(x.data(), inverse.data(), codes[0].data(), codes[1].data());
        for (int i = 0; i < 16; i++)
          ASSERT_EQ(codes[bits == 8][i], std::clamp(std::nearbyint(x[i] * inverse[i]), -half, half - 1.0f))
              << ops->name << " " << bits << " bits, " << x[i] * inverse[i];
      }
    }
}

TEST(Simd, JoinsBytes) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 100; turn++) {
      std::array<std::array<float, 16>, 4> x;
      for (auto& row : x)
        for (float& value : row) value = turn ? (float)random.below(256) : 255.0f;
      std::array<uint8_t, 64> bytes;
      ops->join_bytes(x[0].data(), reinterpret_cast<int32_t*>(bytes.data()));
      for (int i = 0; i < 64; i++) ASSERT_EQ(bytes[i], x[i % 4][i / 4]) << ops->name << " " << i;
    }
}

TEST(Simd, DotProductsOfCodesAreExact) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 2000; turn++) {
      std::array<uint8_t, 64> row;
      std::array<int8_t, 4> four;
      // Extremes often: they are what 16-bit intermediates could not hold.
      for (uint8_t& byte : row) byte = turn % 3 ? (uint8_t)random.below(256) : random.below(2) ? 0 : 255;
      for (int8_t& byte : four) byte = (int8_t)(turn % 2 ? random.below(255) - 127 : random.below(2) ? 127 : -127);
      std::array<int32_t, 16> low, high, bytes, zero;
      ops->nibbles(row.data(), bytes_of(four), low.data(), high.data());
      ops->bytes(row.data(), bytes_of(four), bytes.data(), zero.data());
      for (int i = 0; i < 16; i++) {
        int want_low = 0, want_high = 0, want = 0;
        for (int j = 0; j < 4; j++) {
          const int code = row[4 * i + j];
          want_low += (code & 15) * four[j], want_high += (code >> 4) * four[j], want += (code - 128) * four[j];
        }
        ASSERT_EQ(low[i], want_low) << ops->name;
        ASSERT_EQ(high[i], want_high) << ops->name;
        ASSERT_EQ(bytes[i] - zero[i], want) << ops->name;
      }
    }
}

TEST(Simd, WeightsAreUnsignedAndRowsCanBeFlipped) {
  Random random;
  for (const SimdOps* ops : all_ops())
    for (int turn = 0; turn < 500; turn++) {
      std::array<uint8_t, 64> row;
      std::array<int8_t, 4> four, flipped;
      for (uint8_t& byte : row) byte = (uint8_t)random.below(256);
      for (int8_t& byte : four) byte = (int8_t)(turn % 3 ? random.below(256) : 255);
      for (int8_t& byte : flipped) byte = (int8_t)(random.below(2) ? 0 : turn % 3 ? 0x0f : 0xff);
      std::array<int32_t, 16> low;
      ops->weights(row.data(), bytes_of(flipped), bytes_of(four), low.data());
      for (int i = 0; i < 16; i++) {
        int want = 0;
        for (int j = 0; j < 4; j++) want += ((row[4 * i + j] ^ (uint8_t)flipped[j]) & 15) * (uint8_t)four[j];
        ASSERT_EQ(low[i], want) << ops->name;
      }
    }
}

}  // namespace
}  // namespace halfbyte
