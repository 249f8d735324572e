// Steps whose length is on the device against the CPU's reference: blocks that fill, offsets to find, windows.
#include "step_case.h"

namespace halfbyte {
namespace {

class CudaStep : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { HALFBYTE_NEEDS_DEVICE(); }
  // Codes of values near a tie may differ from the CPU's, which the tolerance of attention does not know: a bit more.
  void expect_close(const Case& c, int steps) {
    EXPECT_LT(step_distance(c, 3, steps, GetParam()), tolerance(c.dtype, GetParam()) + 2e-3);
  }
};

TEST_P(CudaStep, MatchesReferenceAcrossBlocks) {
  Case c;
  c.batch = 2, c.prefix = 50, c.recipe.sink_tokens = 16;
  expect_close(c, 20);
}

TEST_P(CudaStep, MatchesReferenceWhereAStepFindsTheOffset) {
  Case c;
  c.prefix = 5, c.pairs = 32, c.head_dim = 64, c.dtype = Dtype::bfloat16;
  expect_close(c, 14);
}

TEST_P(CudaStep, MatchesReferenceWithAWindowOfPagesInTurn) {
  Case c;
  c.prefix = 90, c.window = 70, c.head_dim = 64, c.recipe.raw_window = 16;
  expect_close(c, 30);
}

TEST_P(CudaStep, MatchesReferenceForAnyGeometry) {
  Case c;
  c.prefix = 40, c.head_dim = 80, c.dtype = Dtype::float32, c.recipe.offset = false, c.recipe.lambda = true;
  expect_close(c, 10);
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaStep, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

}  // namespace
}  // namespace halfbyte
