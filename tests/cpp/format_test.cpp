// The format: where codes and scales lie, fp16 and bf16 rounding, and the worked example of docs/format.md.
#include "format.h"

#include <fstream>
#include <set>
#include <sstream>

#include "encode.h"
#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

TEST(Format, EveryCodeHasItsOwnPlace) {
  for (int d : {32, 64, 96, 192, 512})
    for (int bits : {4, 8})
      for (Side side : {Side::k, Side::v}) {
        Recipe recipe;
        recipe.k.bits = recipe.v.bits = bits;
        const SideFormat format = make_side_format(recipe, side, d);
        std::set<std::pair<size_t, int>> places;
        for (int t = 0; t < kBlockTokens; t++)
          for (int c = 0; c < d; c++) {
            const CodePlace place = side == Side::k ? k_code_place(bits, t, c) : v_code_place(bits, t, c);
            EXPECT_LT(place.byte, code_bytes(format));
            EXPECT_TRUE(place.shift == 0 || (bits == 4 && place.shift == 4));
            places.insert({place.byte, place.shift});
          }
        EXPECT_EQ(places.size(), (size_t)kBlockTokens * d);
        EXPECT_EQ(code_bytes(format), (size_t)kBlockTokens * d * bits / 8);
      }
}

TEST(Format, RowsAreAsTheDocumentHasThem) {
  // K, 4 bits, token 3: channels 0…3 are bytes 12…15 of row 0, low nibbles; channel 16 shares channel 0's byte.
  EXPECT_EQ(k_code_place(4, 3, 2).byte, 14u);
  EXPECT_EQ(k_code_place(4, 3, 2).shift, 0);
  EXPECT_EQ(k_code_place(4, 3, 18).byte, 14u);
  EXPECT_EQ(k_code_place(4, 3, 18).shift, 4);
  EXPECT_EQ(k_code_place(4, 3, 39).byte, 4u * 64 + 64 + 15);
  EXPECT_EQ(k_code_place(8, 3, 18).byte, 4u * 64 + 14);
  // V, 4 bits: channel 2's tokens 4…7 are bytes 8…11 of row 1.
  EXPECT_EQ(v_code_place(4, 6, 2).byte, 64u + 10);
  EXPECT_EQ(v_code_place(4, 6, 18).byte, 64u + 10);
  EXPECT_EQ(v_code_place(4, 6, 18).shift, 4);
  EXPECT_EQ(v_code_place(8, 6, 18).byte, 5u * 64 + 10);
}

TEST(Format, AreasOfAPageDoNotOverlap) {
  for (int group : {16, 32, 64, 0})
    for (int scale_bits : {16, 32}) {
      Recipe recipe;
      recipe.k = {4, group}, recipe.v = {8, 32}, recipe.scale_bits = scale_bits;
      const PageFormat page = make_page_format(recipe, 80, 112);
      std::vector<int> uses(page_head_bytes(page), 0);
      auto use = [&](size_t at, size_t n) {
        for (size_t i = at; i < at + n; i++) uses.at(i)++;
      };
      for (int block = 0; block < kPageBlocks; block++) {
        EXPECT_EQ(k_codes_at(page, block) % kRowBytes, 0u);  // rows stay on cache lines
        EXPECT_EQ(v_codes_at(page, block) % kRowBytes, 0u);
        use(k_codes_at(page, block), code_bytes(page.k)), use(v_codes_at(page, block), code_bytes(page.v));
        use(k_scales_at(page, block), scales_bytes(page.k)), use(v_scales_at(page, block), scales_bytes(page.v));
      }
      EXPECT_EQ(*std::max_element(uses.begin(), uses.end()), 1);
      EXPECT_LT(std::count(uses.begin(), uses.end(), 0), 64);
      EXPECT_EQ(page_head_bytes(page) % 64, 0u);
    }
}

TEST(Format, DefaultRecipeTakes138BytesATokenAtHeadSize128) {
  const PageFormat page = make_page_format(Recipe{}, 128, 128);
  EXPECT_EQ(page_head_bytes(page), 138u * kPageTokens);  // 4.31 bits a value
}

TEST(Format, PlainBlocksHoldFloatsAndNoScales) {
  for (auto [d_k, d_v] : {std::pair{16, 16}, std::pair{80, 48}, std::pair{510, 18}}) {
    const PageFormat page = make_page_format(plain_recipe(), d_k, d_v);
    EXPECT_EQ(code_bytes(page.k), 16u * d_k * 4);
    EXPECT_EQ(code_bytes(page.v), 16u * d_v * 4);
    EXPECT_EQ(scales_bytes(page.k) + scales_bytes(page.v), 0u);
    EXPECT_EQ(page_head_bytes(page), 64u * (d_k + d_v) * 4);
    for (int block = 0; block < kPageBlocks; block++) {
      EXPECT_EQ(k_codes_at(page, block), block * 16u * (d_k + d_v) * 4);
      EXPECT_EQ(v_codes_at(page, block), block * 16u * (d_k + d_v) * 4 + 16u * d_k * 4);
      EXPECT_EQ(k_codes_at(page, block) % 64 + v_codes_at(page, block) % 64, 0u);
    }
  }
}

TEST(Format, GroupsCoverThePaddedHead) {
  struct Case {
    int d, group, padded, resolved, groups;
  };
  for (const Case& c :
       {Case{80, 0, 96, 96, 1}, Case{80, 64, 96, 64, 2}, Case{16, 32, 32, 32, 1}, Case{18, 16, 32, 16, 2},
        Case{16, 64, 32, 32, 1}, Case{112, 64, 128, 64, 2}, Case{510, 16, 512, 16, 32}}) {
    Recipe recipe;
    recipe.k.group = c.group;
    const SideFormat format = make_side_format(recipe, Side::k, c.d);
    EXPECT_EQ(format.padded_dim, c.padded) << c.d;
    EXPECT_EQ(format.group, c.resolved) << c.d;
    EXPECT_EQ(format.n_groups, c.groups) << c.d;
  }
}

// ---- fp16 and bf16

TEST(Numbers, EveryHalfSurvivesTheRoundTrip) {
  for (int bits = 0; bits < 65536; bits++) {
    const float x = half_to_float((uint16_t)bits);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(x))));
    } else {
      ASSERT_EQ(float_to_half(x), bits) << x;
    }
  }
  EXPECT_EQ(half_to_float(0x3c00), 1.0f);
  EXPECT_EQ(half_to_float(0x7bff), 65504.0f);
  EXPECT_EQ(half_to_float(0x0001), std::ldexp(1.0f, -24));
}

// Rounds a double to the nearest multiple of the unit that `digits` bits of fraction give, ties to even.
double round_to(double x, int digits, int lowest_exponent) {
  if (x == 0.0) return 0.0;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest_exponent) - digits);
  return std::nearbyint(x / unit) * unit;
}

TEST(Numbers, HalfAndBf16RoundToNearestEven) {
  Random random;
  for (int i = 0; i < 200000; i++) {
    const float x = random.normal() * std::ldexp(1.0f, random.below(40) - 26);
    if (std::fabs(x) < 65504.0f) {
      ASSERT_EQ(half_to_float(float_to_half(x)), (float)round_to(x, 10, -14)) << x;
    }
    ASSERT_EQ(bf16_to_float(float_to_bf16(x)), (float)round_to(x, 7, -126)) << x;
  }
  EXPECT_EQ(half_to_float(float_to_half(2049.0f)), 2048.0f);  // a tie: to even
  EXPECT_EQ(half_to_float(float_to_half(2051.0f)), 2052.0f);
  EXPECT_TRUE(std::isinf(half_to_float(float_to_half(65520.0f))));
  EXPECT_EQ(half_to_float(float_to_half(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(NAN))));
}

// ---- the worked example

// Head size 16, SRFT, seed 0, layer 0, no offset, K side of the default recipe; x_c = (c − 5)² / 8 − 3.
std::string worked_example() {
  constexpr int d = 16;
  float x[d];
  double exact[d], y[d];
  for (int c = 0; c < d; c++) exact[c] = x[c] = (float)((c - 5) * (c - 5)) / 8.0f - 3.0f;
  const RotationPlan rotation = make_rotation(Rotation::srft, d, 0, 0);
  rotate_reference(rotation, false, exact, y);
  const SideFormat format = make_side_format(Recipe{}, Side::k, d);
  std::vector<uint8_t> codes(code_bytes(format)), scales(scales_bytes(format));
  EncodeArgs args{&format, &rotation, Side::k, Dtype::float32, {x},          1,
                  0,       nullptr,   nullptr, codes.data(),   scales.data()};
  encode_reference(args);

  std::string text;
  char number[64];
  auto line = [&](const char* name, const char* form, auto value, int n) {
    text += name;
    for (int i = 0; i < n; i++) {
      std::snprintf(number, sizeof number, form, value(i));
      text += std::string(" ") + number;
    }
    text += "\n";
  };
  line("signs ", "%+.0f", [&](int i) { return (double)rotation.signs[i]; }, d);
  line("x     ", "%g", [&](int i) { return (double)x[i]; }, d);
  line("y     ", "%.4f", [&](int i) { return y[i]; }, d);
  line("scale ", "%.10g", [&](int) { return (double)load_element(scales.data(), Dtype::float16, 0); }, 1);
  line("scale's fp16 bits", "%04x", [&](int) { return scales[0] | scales[1] << 8; }, 1);
  line(
      "codes, signed  ", "%d",
      [&](int c) {
        const CodePlace place = k_code_place(4, 0, c);
        return (codes[place.byte] >> place.shift & 15) - 8;
      },
      d);
  line(
      "codes, stored  ", "%d",
      [&](int c) {
        const CodePlace place = k_code_place(4, 0, c);
        return codes[place.byte] >> place.shift & 15;
      },
      d);
  for (int row = 0; row < 4; row++) {
    std::snprintf(number, sizeof number, "row %d, bytes 0-3 ", row);
    const std::string name = number;
    line(name.c_str(), "%02x", [&](int i) { return codes[row * kRowBytes + i]; }, 4);
  }
  return text;
}

TEST(Format, WorkedExampleOfTheDocumentIsWhatTheReferenceComputes) {
  std::ifstream file(HALFBYTE_SOURCE_DIR "/docs/format.md");
  ASSERT_TRUE(file) << "docs/format.md";
  std::stringstream document;
  document << file.rdbuf();
  EXPECT_NE(document.str().find(worked_example()), std::string::npos) << "docs/format.md should hold these lines:\n"
                                                                      << worked_example();
}

}  // namespace
}  // namespace halfbyte
