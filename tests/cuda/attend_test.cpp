// Attention on the device against the CPU's double-precision reference: fresh inputs, tail sizes, poisoned outputs.
#include "attend_case.h"

namespace halfbyte {
namespace {

class CudaAttend : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { HALFBYTE_NEEDS_DEVICE(); }
  void expect_close(const Case& c, unsigned seed, const std::string& what) {
    EXPECT_LT(attend_distance(c, seed, GetParam()), tolerance(c.dtype, GetParam())) << what;
  }
};

TEST_P(CudaAttend, MatchesReferenceAtTailSizes) {
  for (size_t prefix : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 129, 257, 1000}) {
    Case c;
    c.prefix = prefix, c.batch = 2;
    expect_close(c, (unsigned)prefix, text("prefix ", prefix));
  }
}

TEST_P(CudaAttend, MatchesReferenceForEveryGeometry) {
  for (int d : {16, 64, 80, 96, 128, 256, 512})
    for (int group : {1, 4, 6, 16})
      for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32}) {
        Case c;
        c.head_dim = d, c.kv_heads = 2, c.heads = 2 * group, c.dtype = dtype, c.prefix = 150;
        expect_close(c, (unsigned)(d + group), text("head_dim ", d, ", group ", group));
      }
}

TEST_P(CudaAttend, MatchesReferenceForEveryRecipe) {
  for (int d : {64, 128, 256})
    for (int k_bits : {4, 8})
      for (int v_bits : {4, 8})
        for (int group : {0, 16, 32, 64})
          for (int scale_bits : {16, 32}) {
            Case c;
            c.head_dim = d, c.prefix = 200;
            c.recipe.k = {k_bits, group}, c.recipe.v = {v_bits, group == 64 ? 0 : group},
            c.recipe.scale_bits = scale_bits;
            c.recipe.lambda = group == 32, c.recipe.rotation = group == 64 ? Rotation::identity : Rotation::srft;
            if (group == 0) c.recipe.rotation = Rotation::srht;
            c.recipe.offset = scale_bits == 16;
            expect_close(c, (unsigned)(d + k_bits * 3 + v_bits + group),
                         text("K", k_bits, "V", v_bits, " g", group, " d", d));
          }
}

TEST_P(CudaAttend, MatchesReferenceForSeveralQueries) {
  for (int queries : {2, 5, 16, 17, 33, 64})
    for (size_t prefix : {5, 16, 40, 130}) {
      Case c;
      c.heads = 6, c.queries = queries, c.prefix = prefix;
      expect_close(c, (unsigned)(queries + prefix), text(queries, " queries after ", prefix));
    }
}

TEST_P(CudaAttend, MatchesReferenceWithWhatNarrowsAttention) {
  for (int queries : {1, 7})
    for (int kind = 0; kind < 6; kind++) {
      Case c;
      c.queries = queries, c.prefix = 300, c.batch = 2, c.heads = 6;
      c.masked = kind == 0 || kind == 5, c.with_sinks = kind == 1, c.softcap = kind == 2 ? 5.0f : 0.0f;
      c.window = kind == 3 || kind == 5 ? 100 : 0;
      c.recipe.sink_tokens = kind == 4 ? 16 : 0, c.recipe.raw_window = kind == 4 ? 32 : 0;
      expect_close(c, (unsigned)kind, text("kind ", kind, ", queries ", queries));
    }
}

TEST_P(CudaAttend, TurnsTheOffsetOfK) {
  for (int d : {64, 128, 256, 80})
    for (int span : {16, 64})
      for (int part : {2, 3}) {  // all pairs turn, or two of three
        Case c;
        c.head_dim = d, c.pairs = d / part, c.interleaved = part == 3, c.recipe.offset_span = span;
        c.prefix = 330, c.batch = 2, c.heads = part == 3 ? 10 : 4, c.queries = part == 3 ? 2 : 1;
        expect_close(c, (unsigned)(d + span + part), text("d", d, " span ", span, " pairs ", c.pairs));
      }
}

TEST_P(CudaAttend, TakesQueriesAtAnyAddress) {
  Case c;
  c.shift = 2;
  expect_close(c, 13, "an element behind");
}

TEST_P(CudaAttend, FollowsScoresThatRise) {
  Case c;  // the largest score so far is passed again and again
  c.prefix = 400, c.sharpness = 4.0f;
  expect_close(c, 12, "sharp");
}

TEST_P(CudaAttend, KeepsPrecisionForTinyAndLargeValues) {
  Case c;  // all weights count: flat attention over values far from 1
  c.prefix = 3000, c.recipe.offset = false;
  expect_close(c, 11, "flat");
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaAttend, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

}  // namespace
}  // namespace halfbyte
