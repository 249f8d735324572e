// Attention of several query tokens in one step: the block rule, which depends on positions and not on how tokens came.
#include <array>
#include <thread>

#include "attend.h"
#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

struct Story {
  Recipe recipe;
  int d = 64;
  int sliding_window = 0;
  size_t before = 0, chunk = 0;  // tokens held, then tokens of the step
  float softcap = 0.0f;
  Rope rope = {};
};

// Codes always come from one fast backend: here it is attention that differs.
Status append_coded(Layer& layer, const Array& k, const Array& v, size_t from, size_t to) {
  UseBackend use(fast_backends().front());
  return append(layer, k, v, from, to);
}

Layer start(const Story& story, const Array& k, const Array& v, const std::vector<float>& mu) {
  LayerConfig config = config_of(2, story.d, k.dtype, story.recipe);
  config.sliding_window = story.sliding_window;
  Layer layer = make_layer(config);
  must(layer.set_offset(mu.data(), mu.data()));  // else the first chunk's size would decide μ
  must(set_rope(layer, story.rope));
  if (story.before) must(append_coded(layer, k, v, 0, story.before));
  return layer;
}

AttendArgs chunk_args(const Story& story, const Array& q, Array& out, const Array& k, const Array& v) {
  AttendArgs args = args_of(q, out);
  args.chunk_k = k.view(story.before), args.chunk_v = v.view(story.before), args.softcap = story.softcap;
  return args;
}

Array in_one_step(const Story& story, const Array& q, const Array& k, const Array& v, const std::vector<float>& mu) {
  Layer layer = start(story, k, v, mu);
  must(append_coded(layer, k, v, story.before, story.before + story.chunk));
  Array out = poisoned(q.batch, q.heads, q.tokens, story.d, q.dtype);
  must(layer.attend(chunk_args(story, q, out, k, v)));
  return out;
}

Array token_by_token(const Story& story, const Array& q, const Array& k, const Array& v, const std::vector<float>& mu) {
  Layer layer = start(story, k, v, mu);
  Array all = poisoned(q.batch, q.heads, q.tokens, story.d, q.dtype);
  for (size_t i = 0; i < story.chunk; i++) {
    must(append_coded(layer, k, v, story.before + i, story.before + i + 1));
    AttendArgs args = args_of(q, all);
    args.q = q.view(i), args.queries = 1, args.softcap = story.softcap;
    args.out.data = all.bytes.data() + i * all.d * dtype_bytes(all.dtype);
    must(layer.attend(args));
  }
  return all;
}

// Plain attention by the block rule: token t counts as its codes for a query at p when t lies in a block that was
// complete, raw window aside, before p's own block; else as it was given.
Plain by_the_rule(const Story& story, const Array& q, const Array& k, const Array& v, const std::vector<float>& mu) {
  Layer layer = start(story, k, v, mu);
  Random random;
  must(append(layer, k, v, story.before, k.tokens));
  const Array pad = random_array(random, k.batch, k.heads, 17 + story.recipe.raw_window, k.d, k.dtype);
  layer.record_past(true);
  must(append(layer, pad, pad));  // so that all blocks of the story are packed by now
  const Decoded held = decode(layer);
  const size_t first = layer.first();
  auto packed = [&](int query, size_t t) {
    const size_t block = (story.before + query) / 16 * 16, window = (size_t)story.recipe.raw_window;
    return t >= (size_t)story.recipe.sink_tokens && t < (block > window ? block - window : 0);
  };
  auto pick = [&](const Array& raw, const Array& codes, int b, int h, int query, size_t t, int c) {
    return (double)(packed(query, t) && t >= first ? codes.get(b, h, t - first, c) : raw.get(b, h, t, c));
  };
  Array any = poisoned(q.batch, q.heads, q.tokens, story.d);
  AttendArgs args = chunk_args(story, q, any, k, v);
  return plain_attention(
      args, q, 2, k.tokens, story.d,
      [&](int, int query, size_t t) {
        const size_t p = story.before + query, window = (size_t)story.sliding_window;
        return t <= p && (!window || t + window > p);
      },
      [&](int b, int h, int query, size_t t, int c) { return pick(k, held.k, b, h, query, t, c); },
      [&](int b, int h, int query, size_t t, int c) { return pick(v, held.v, b, h, query, t, c); });
}

void check_story(Random& random, const Story& story, Dtype dtype = Dtype::float32) {
  const size_t total = story.before + story.chunk;
  const Array k = random_array(random, 2, 2, total, story.d, dtype),
              v = random_array(random, 2, 2, total, story.d, dtype);
  const Array q = random_array(random, 2, 4, story.chunk, story.d, dtype);
  const std::vector<float> mu = random.normals(2 * story.d, 0.3f);
  const Plain plain = [&] {
    UseBackend use(fast_backends().front());  // to decode as it was coded
    return by_the_rule(story, q, k, v, mu);
  }();
  const std::string what = std::to_string(story.before) + " + " + std::to_string(story.chunk) + " tokens, d " +
                           std::to_string(story.d) + ", window " + std::to_string(story.sliding_window);
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    const Array once = in_one_step(story, q, k, v, mu), each = token_by_token(story, q, k, v, mu);
    const double tolerance = (name == "reference" ? 2e-5 : kByteRounding) + output_rounding(dtype);
    EXPECT_LT(error_of(once, plain), tolerance) << name << ", one step: " << what;
    EXPECT_LT(error_of(each, plain), tolerance) << name << ", token by token: " << what;
    // Both read the same codes; the bytes of p depend on which tokens share a pass, and that on the step.
    EXPECT_LT(error_of(once, each, plain), (name == "reference" ? 1e-5 : kByteRounding / 2) + output_rounding(dtype))
        << name << ": " << what;
  }
}

TEST(Steps, AnyChunkAgreesWithTokenByToken) {
  Random random;
  for (size_t before : {0, 1, 15, 16, 17, 31, 40, 64, 90})
    for (size_t chunk : {1, 2, 3, 7, 16, 17, 33}) check_story(random, {{}, 32, 0, before, chunk, 0.0f});
}

TEST(Steps, SinksAndRawWindow) {
  Random random;
  for (int sinks : {0, 16, 32})
    for (int window : {0, 16, 48})
      for (auto [before, chunk] :
           {std::pair{0, 9}, std::pair{10, 20}, std::pair{33, 5}, std::pair{70, 40}, std::pair{64, 2}}) {
        Story story{{}, 32, 0, (size_t)before, (size_t)chunk, 0.0f};
        story.recipe.sink_tokens = sinks, story.recipe.raw_window = window;
        check_story(random, story);
      }
}

TEST(Steps, SlidingWindows) {
  Random random;
  for (int window : {2, 5, 16, 20, 40})
    for (auto [before, chunk] :
         {std::pair{0, 30}, std::pair{10, 3}, std::pair{50, 1}, std::pair{63, 4}, std::pair{100, 20}}) {
      // Before the step the cache may hold no more than the window, as it does when it grows token by token.
      check_story(random, {{}, 32, window, (size_t)before, (size_t)chunk, 0.0f});
    }
}

TEST(Steps, HeadSizesAndDtypes) {
  Random random;
  for (int d : {16, 18, 80, 128, 256})
    for (Dtype dtype : {Dtype::float16, Dtype::bfloat16}) check_story(random, {{}, d, 0, 40, 11, 0.0f}, dtype);
}

TEST(Steps, Softcap) {
  Random random;
  check_story(random, {{}, 64, 0, 40, 11, 2.0f});
}

TEST(Steps, OffsetsThatTurn) {
  Random random;
  for (int span : {16, 64})
    for (auto [before, chunk, window] : {std::array{40, 30, 0}, {100, 17, 50}, {120, 20, 0}, {64, 1, 0}}) {
      Story story{{}, 32, window, (size_t)before, (size_t)chunk, window ? 3.0f : 0.0f, random_rope(random, 32)};
      story.recipe.offset_span = span;
      check_story(random, story);
    }
}

TEST(Steps, MaskMayShowTheFuture) {  // bidirectional spans, as image tokens have them
  Random random;
  const Story story{{}, 32, 0, 37, 12, 0.0f};
  const Array k = random_array(random, 1, 2, 49, 32), v = random_array(random, 1, 2, 49, 32);
  const Array q = random_array(random, 1, 2, 12, 32);
  const std::vector<float> mu(64, 0.0f);
  std::vector<uint8_t> mask(12 * 49);
  for (uint8_t& byte : mask) byte = random.below(2);
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    Layer layer = start(story, k, v, mu);
    must(append_coded(layer, k, v, 37, 49));
    Array out = poisoned(1, 2, 12, 32);
    AttendArgs args = chunk_args(story, q, out, k, v);
    args.mask = mask.data(), args.mask_tokens = 49, args.mask_query_stride = 49;
    must(layer.attend(args));
    // Tokens of the query's own block and behind are raw, those before it codes.
    Layer packed = start(story, k, v, mu);
    must(append_coded(packed, k, v, 37, 49)), must(append_coded(packed, k, v, 0, 17));
    const Decoded held = decode(packed);
    auto pick = [&](const Array& raw, const Array& codes, int h, int i, size_t t, int c) {
      return (double)(t < (37 + (size_t)i) / 16 * 16 ? codes.get(0, h, t, c) : raw.get(0, h, t, c));
    };
    const Plain plain = plain_attention(
        args, q, 2, 49, 32, [&](int, int i, size_t t) { return mask[i * 49 + t] != 0; },
        [&](int, int h, int i, size_t t, int c) { return pick(k, held.k, h, i, t, c); },
        [&](int, int h, int i, size_t t, int c) { return pick(v, held.v, h, i, t, c); });
    EXPECT_LT(error_of(out, plain), name == "reference" ? 2e-5 : kByteRounding) << name;
  }
}

TEST(Steps, WithoutCausalityAllTokensAreSeen) {
  Random random;
  const Story story{{}, 32, 0, 20, 5, 0.0f};
  const Array k = random_array(random, 1, 2, 25, 32), v = random_array(random, 1, 2, 25, 32);
  const Array q = random_array(random, 1, 2, 5, 32);
  Layer layer = start(story, k, v, std::vector<float>(64, 0.0f));
  must(append(layer, k, v, 20, 25));
  Array out = poisoned(1, 2, 5, 32), masked = poisoned(1, 2, 5, 32);
  AttendArgs args = chunk_args(story, q, out, k, v);
  args.causal = false;
  must(layer.attend(args));
  const std::vector<uint8_t> mask(5 * 25, 1);
  args = chunk_args(story, q, masked, k, v);
  args.mask = mask.data(), args.mask_tokens = 25, args.mask_query_stride = 25;
  must(layer.attend(args));
  for (size_t i = 0; i < out.size(); i++) EXPECT_NEAR(out.flat(i), masked.flat(i), 1e-5);
}

// Whatever the head size, the queries and the prefix, a thread keeps less than 1 MiB: no prefix is ever decoded whole.
TEST(Steps, WorkingMemoryIsBounded) {
  Random random;
  UseThreads use(1);
  std::thread([&] {  // one that has no working memory yet
    for (bool exact : {false, true})
      for (int d : {64, 512}) {
        const size_t prefix = 100000 / d, queries = 40;
        Layer layer = make_layer(config_of(1, d));
        must(append(layer, random_array(random, 1, 1, prefix, d), random_array(random, 1, 1, prefix, d)));
        const Array k = random_array(random, 1, 1, queries, d), q = random_array(random, 1, 8, queries, d);
        must(append(layer, k, k));
        Array out = poisoned(1, 8, queries, d);
        AttendArgs args = args_of(q, out);
        args.chunk_k = args.chunk_v = k.view(), args.exact = exact;
        must(layer.attend(args));
        EXPECT_TRUE(all_finite(out));
        EXPECT_LT(attend_scratch_bytes(), 1u << 20) << d;
      }
    EXPECT_GT(attend_scratch_bytes(), 64u * 512 * sizeof(float));  // or something else is counted
  })
      .join();
}

}  // namespace
}  // namespace halfbyte
