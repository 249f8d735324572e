// Encoding and decoding in the Metal text against the reference: every entry point, fresh inputs, partial ranges,
// poisoned memory, and the same bytes in any order of threads.
#include <array>

#include "metal.h"

namespace halfbyte {
namespace {

using namespace testing;

constexpr uint8_t kPoison = 0xa5;

struct Case {
  int d = 128, batch = 2, kv_heads = 2, first = 0, tokens = 16, data_first = 0, first_page = 0;
  Side side = Side::k;
  Dtype dtype = Dtype::float32;
  Recipe recipe;
  bool offset = true, lambda = false;
  int span = 0;  // tokens that share an offset; 0: all
};

// Everything that one call reads and writes.
struct Memory {
  Case c;
  PageFormat format;
  RotationPlan plan;
  Array x;  // [batch, kv_heads, tokens from data_first on, d]
  std::vector<float> offset, lambda, inverse_lambda, rotation;
  std::vector<int64_t> table;
  std::vector<uint8_t> pool;
  int pages;  // of a sequence
  SpanNumbers spans;

  // [d] of the span that a token is in.
  const float* offset_of(int b, int head, int token) const {
    const int64_t at = spans.span ? token / spans.span - spans.first : 0;
    return &offset[(((size_t)b * c.kv_heads + head) * spans.count + at) * c.d];
  }
  const SideFormat& side() const { return c.side == Side::k ? format.k : format.v; }
};

Memory make_memory(const Case& c, Random& random) {
  const std::vector<float> matrix =
      c.recipe.rotation == Rotation::dense ? random_rotation(random, c.d) : std::vector<float>();
  Memory m{c,
           make_page_format(c.recipe, c.d, c.d),
           make_rotation(c.recipe.rotation, c.d, 7, 3, matrix.data()),
           random_array(random, c.batch, c.kv_heads, c.first + c.tokens - c.data_first, c.d, c.dtype),
           {},
           {},
           {},
           {},
           {},
           {},
           (c.first + c.tokens + kPageTokens - 1) / kPageTokens - c.first_page,
           {0, 0, 1}};
  if (c.span) {
    m.spans = {c.span, random.below(c.first / c.span + 1), 0};
    m.spans.count = (c.first + c.tokens - 1) / c.span - m.spans.first + 1;
  }
  m.rotation = rotation_buffer(m.plan);
  if (c.offset) m.offset = random.normals((size_t)c.batch * c.kv_heads * m.spans.count * c.d, 3.0f);
  for (int i = 0; c.lambda && i < c.kv_heads * c.d; i++) m.lambda.push_back(random.factor());
  for (float l : m.lambda) m.inverse_lambda.push_back(1.0f / l);
  const int64_t page_bytes = (int64_t)(c.kv_heads * page_head_bytes(m.format));
  for (int i = 0; i < c.batch * m.pages; i++) m.table.push_back((c.batch * m.pages - 1 - i) * page_bytes);
  m.pool.assign(c.batch * m.pages * page_bytes, kPoison);
  return m;
}

std::string kernel_name(const Memory& m, const char* verb) {
  return std::string(verb) + "_d" + std::to_string(m.c.d) + "_int" + std::to_string(m.side().bits);
}

LayerNumbers numbers_of(const Memory& m) {
  return layer_numbers(m.c.recipe, m.c.batch, m.c.kv_heads, m.c.dtype, m.pages, m.c.first_page);
}

std::vector<uint8_t> encode(const Memory& m, unsigned schedule, int* bad) {
  const Case& c = m.c;
  const EncodeNumbers numbers{numbers_of(m),     c.side == Side::k, c.first,  c.tokens, c.data_first,
                              view_numbers(m.x), c.offset,          c.lambda, m.spans};
  const float limit = c.recipe.scale_bits == 16 ? 1e4f : 1e15f;
  std::vector<uint8_t> pool = m.pool;
  run_kernel(kernel_name(m, "encode"),
             {bound(numbers), bound(limit), bound(m.x.bytes), bound(m.rotation), bound(m.offset), bound(m.lambda),
              bound(m.table), pool.data(), bad},
             code_groups(c.batch * c.kv_heads * c.tokens, c.d), 128, schedule);
  return pool;
}

// One block out of a pool; what the call has not to touch is found in it as well.
Block block_of(const Memory& m, const std::vector<uint8_t>& pool, int b, int head, int block) {
  Block out(m.c.recipe, m.c.side, m.c.d);
  const int page = block / kPageBlocks - m.c.first_page, in_page = block % kPageBlocks;
  const uint8_t* at = &pool[m.table[(size_t)b * m.pages + page] + head * page_head_bytes(m.format)];
  const bool is_k = m.c.side == Side::k;
  memcpy(out.codes.data(), at + (is_k ? k_codes_at : v_codes_at)(m.format, in_page), out.codes.size());
  memcpy(out.scales.data(), at + (is_k ? k_scales_at : v_scales_at)(m.format, in_page), out.scales.size());
  return out;
}

// The part of the input that falls in a block.
Input input_of(const Memory& m, int b, int head, int block) {
  const int from = std::max(m.c.first, block * kBlockTokens);
  const int to = std::min(m.c.first + m.c.tokens, (block + 1) * kBlockTokens);
  Input in{m.plan, Array(1, 1, kBlockTokens, m.c.d, m.c.dtype), {}, {}, to - from, from % kBlockTokens};
  for (int t = from; t < to; t++)
    for (int i = 0; i < m.c.d; i++) in.x.set(0, 0, t - from, i, m.x.get(b, head, t - m.c.data_first, i));
  if (m.c.offset) in.offset.assign(m.offset_of(b, head, from), m.offset_of(b, head, from) + m.c.d);
  if (m.c.lambda) in.lambda.assign(&m.lambda[(size_t)head * m.c.d], &m.lambda[(size_t)head * m.c.d] + m.c.d);
  return in;
}

Block reference_block(const Memory& m, const Input& in) {
  Block block(m.c.recipe, m.c.side, m.c.d);
  encode_reference(args_of(in, block));
  return block;
}

// Bytes of a pool that are not poison any more.
size_t touched(const std::vector<uint8_t>& pool) {
  return pool.size() - (size_t)std::count(pool.begin(), pool.end(), kPoison);
}

void expect_reference_codes(const Memory& m, const std::vector<uint8_t>& pool, size_t* differing, size_t* all) {
  std::vector<uint8_t> untouched = pool;  // each block that is right is poisoned again
  for (int b = 0; b < m.c.batch; b++)
    for (int head = 0; head < m.c.kv_heads; head++)
      for (int block = m.c.first / kBlockTokens; block * kBlockTokens < m.c.first + m.c.tokens; block++) {
        const Input in = input_of(m, b, head, block);
        const Block got = block_of(m, pool, b, head, block), want = reference_block(m, in);
        expect_equivalent(in, targets(in, got.format), got, want, differing, kernel_name(m, "encode"));
        if (::testing::Test::HasFatalFailure()) return;
        *all += (size_t)in.n * got.format.padded_dim;
        const Block poison(m.c.recipe, m.c.side, m.c.d);
        for (int lane = 0; lane < kBlockTokens; lane++) {
          if (lane >= in.first_lane && lane < in.first_lane + in.n) continue;
          for (int c = 0; c < got.format.padded_dim; c++) ASSERT_EQ(got.code(lane, c), poison.code(lane, c));
        }
        const int in_page = block % kPageBlocks;
        uint8_t* at = &untouched[m.table[(size_t)b * m.pages + block / kPageBlocks - m.c.first_page] +
                                 head * page_head_bytes(m.format)];
        const bool is_k = m.c.side == Side::k;
        memset(at + (is_k ? k_codes_at : v_codes_at)(m.format, in_page), kPoison, got.codes.size());
        memset(at + (is_k ? k_scales_at : v_scales_at)(m.format, in_page), kPoison, got.scales.size());
      }
  EXPECT_EQ(touched(untouched), 0u) << "written outside the blocks of " << kernel_name(m, "encode");
}

void expect_decoded_token(const Memory& m, const std::vector<uint8_t>& pool, int b, int head, int token,
                          const uint8_t* got) {
  const int d = m.c.d, lane = token % kBlockTokens;
  const Block block = block_of(m, pool, b, head, token / kBlockTokens);
  std::vector<double> y(d), x(d);
  double norm = 0.0;
  for (int i = 0; i < d; i++) {
    y[i] = (double)block.code(lane, i) * block.scale(lane, i / block.format.group);
    if (m.c.lambda) y[i] *= m.inverse_lambda[(size_t)head * d + i];
    norm += y[i] * y[i];
  }
  rotate_reference(m.plan, true, y.data(), x.data());
  for (int i = 0; i < d; i++) {
    const double mu = m.c.offset ? m.offset_of(b, head, token)[i] : 0.0;
    // A float FFT's rounding, and the last bit of the sum.
    ASSERT_NEAR(load_element(got, Dtype::float32, i), x[i] + mu, 2e-6 * std::sqrt(norm) + 1e-6 * std::fabs(mu))
        << kernel_name(m, "decode") << ", channel " << i;
  }
}

// Encodes, decodes in any order of threads, and compares with the reference on the same bytes.
void expect_decoded(const Memory& m, Random& random) {
  const Case& c = m.c;
  int bad = 0;
  const std::vector<uint8_t> pool = encode(m, 0, &bad);
  const int out_first = c.first - random.below(c.first + 1), out_tokens = c.first + c.tokens - out_first + 2;
  const DecodeNumbers numbers{numbers_of(m), c.side == Side::k, c.first,  c.tokens, out_first,
                              out_tokens,    c.offset,          c.lambda, m.spans};
  Array first(0, 0, 0, c.d);
  for (unsigned schedule : schedules(random)) {
    Array out = poisoned(c.batch, c.kv_heads, out_tokens, c.d);
    run_kernel(kernel_name(m, "decode"),
               {bound(numbers), bound(m.rotation), bound(m.offset), bound(m.inverse_lambda), bound(m.table),
                bound(pool), out.bytes.data()},
               code_groups(c.batch * c.kv_heads * c.tokens, c.d), 128, schedule);
    if (::testing::Test::HasFatalFailure()) return;
    if (first.bytes.empty()) first = out;
    ASSERT_TRUE(same_bits(out, first)) << kernel_name(m, "decode") << " depends on the order of threads";
  }
  for (int b = 0; b < c.batch; b++)
    for (int head = 0; head < c.kv_heads; head++)
      for (int t = 0; t < out_tokens; t++) {
        const int token = out_first + t;
        if (token >= c.first && token < c.first + c.tokens)
          expect_decoded_token(m, pool, b, head, token, &first.bytes[first.at(b, head, t, 0) * sizeof(float)]);
        else
          for (int i = 0; i < c.d; i++) ASSERT_TRUE(std::isnan(first.get(b, head, t, i))) << "written outside";
        if (::testing::Test::HasFatalFailure()) return;
      }
}

Recipe random_recipe(Random& random, int d, int bits) {
  Recipe r;
  const int groups[] = {16, 32, 64, 0};
  r.k = {bits, groups[random.below(4)]}, r.v = {bits, groups[random.below(4)]};
  r.scale_bits = random.below(2) ? 16 : 32, r.search = random.below(3) > 0, r.signed_scale = random.below(3) > 0;
  const bool power_of_two = (d & (d - 1)) == 0;
  r.rotation = (Rotation)std::array{1, 1, 1, power_of_two ? 2 : 1, 3, 0}[random.below(6)];
  return r;
}

// A call that starts anywhere and packs any number of tokens; data and pages begin before or at the first of them.
Case random_case(Random& random, int d, int bits, Side side) {
  Case c;
  c.d = d, c.side = side, c.recipe = random_recipe(random, d, bits);
  c.batch = 1 + random.below(2), c.kv_heads = 1 + random.below(2);
  c.first = random.below(150), c.tokens = 1 + random.below(40);
  c.data_first = std::max(0, c.first - random.below(5)), c.first_page = random.below(c.first / kPageTokens + 1);
  c.dtype = (Dtype)random.below(3), c.offset = random.below(2), c.lambda = random.below(2);
  c.span = std::array{0, 16, 64}[random.below(3)];
  return c;
}

void expect_codes_in_any_order(const Memory& m, Random& random, size_t* differing, size_t* all) {
  std::vector<uint8_t> first;
  for (unsigned schedule : schedules(random)) {
    int bad = 0;
    const std::vector<uint8_t> pool = encode(m, schedule, &bad);
    ASSERT_EQ(bad, 0);
    if (first.empty()) first = pool;
    ASSERT_TRUE(pool == first) << kernel_name(m, "encode") << " depends on the order of threads";
  }
  expect_reference_codes(m, first, differing, all);
}

TEST(MetalEncode, CodesAsWellAsTheReferenceInAnyOrderOfThreads) {
  Random random;
  size_t differing = 0, all = 0;
  for (int d : kMetalDims)
    for (int bits : {4, 8})
      for (Side side : {Side::k, Side::v})
        for (int turn = 0; turn < 3; turn++) {
          expect_codes_in_any_order(make_memory(random_case(random, d, bits, side), random), random, &differing, &all);
          if (HasFatalFailure()) return;
        }
  EXPECT_LT((double)differing / (double)all, 1e-2);  // ties, and groups whose scales nearly tie
}

// Small and quick: what the mutations of barriers run.
TEST(MetalBarriers, CodeWithEachFastRotation) {
  Random random;
  size_t differing = 0, all = 0;
  for (Rotation rotation : {Rotation::srft, Rotation::srht}) {
    Case c;
    c.d = 64, c.batch = c.kv_heads = 1, c.tokens = 8, c.recipe.rotation = rotation;
    expect_codes_in_any_order(make_memory(c, random), random, &differing, &all);
    if (HasFatalFailure()) return;
    expect_decoded(make_memory(c, random), random);
    if (HasFatalFailure()) return;
  }
}

// What is shipped as default, at every rotation and with all of a scale's candidates: the reference's bytes, ties
// apart.
TEST(MetalEncode, GivesTheReferencesBytes) {
  Random random;
  for (int d : kMetalDims)
    for (Rotation rotation : {Rotation::srft, Rotation::srht, Rotation::dense, Rotation::identity})
      for (Side side : {Side::k, Side::v}) {
        if (rotation == Rotation::srht && (d & (d - 1))) continue;
        Case c;
        c.d = d, c.side = side, c.recipe.rotation = rotation, c.tokens = 33, c.lambda = true;
        const Memory m = make_memory(c, random);
        size_t differing = 0, all = 0;
        int bad = 0;
        expect_reference_codes(m, encode(m, 0, &bad), &differing, &all);
        if (HasFatalFailure()) return;
        EXPECT_LT((double)differing / (double)all, 2e-3) << d << " rotation " << (int)rotation;
      }
}

TEST(MetalEncode, FlagsWhatCanNotBeCoded) {
  Random random;
  for (float value : {1.0f, 2e4f, INFINITY, -INFINITY, NAN})
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      Case c;
      c.dtype = dtype;
      Memory m = make_memory(c, random);
      store_element(m.x.bytes.data(), dtype, (size_t)random.below((int)m.x.size()), value);
      int bad = 0;
      encode(m, 0, &bad);
      EXPECT_EQ(bad, value != 1.0f) << value;
    }
}

TEST(MetalEncode, ZerosAndTinyValuesHaveCodes) {
  Random random;
  for (float value : {0.0f, 1e-39f, 1e-30f, -1e-7f})
    for (int scale_bits : {16, 32}) {
      Case c;
      c.recipe.scale_bits = scale_bits, c.offset = false;
      Memory m = make_memory(c, random);
      for (size_t i = 0; i < m.x.size(); i++) store_element(m.x.bytes.data(), c.dtype, i, value);
      int bad = 0;
      const Block block = block_of(m, encode(m, 0, &bad), 0, 0, 0);
      for (int channel = 0; channel < c.d; channel++)
        EXPECT_TRUE(std::isfinite((float)block.code(0, channel) * block.scale(0, channel / block.format.group)));
    }
}

// Codes come back through each way of holding R.
TEST(MetalDecode, GivesBackWhatTheReferenceDoes) {
  Random random;
  for (int d : kMetalDims)
    for (int bits : {4, 8})
      for (Side side : {Side::k, Side::v})
        for (int turn = 0; turn < 3; turn++) {
          Case c = random_case(random, d, bits, side);
          expect_decoded(make_memory(c, random), random);
          if (HasFatalFailure()) return;
        }
}

}  // namespace
}  // namespace halfbyte
