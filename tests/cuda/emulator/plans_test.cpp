// What only an emulator can be asked: other devices, whose work is split in other ways, and to notice what is wrong.
#include "attend_case.h"
#include "encode_case.h"
#include "settings.h"
#include "step_case.h"

namespace halfbyte {
namespace {

class Emulated : public testing::Test {
 protected:
  void TearDown() override { halfbyte_emulator_device(132, 227 << 10); }
};

// Two sequences of two KV heads are four segments of ten tiles. 36 KB hold the rings of two warps, so that a segment
// can be split in five: among few multiprocessors, blocks take whole segments or cross from one into the next, with
// equal shares and unequal ones; among many, several blocks share one.
TEST_F(Emulated, EverySplitOfTheWorkGivesTheSame) {
  for (int shared_kilobytes : {36, 227})
    for (int processors : {1, 2, 3, 4, 7, 8, 40})
      for (int kind = 0; kind < 2; kind++) {
        halfbyte_emulator_device(processors, shared_kilobytes << 10);
        Case c;
        c.batch = 2, c.prefix = 330, c.queries = kind ? 3 : 1, c.heads = kind ? 10 : 4, c.window = kind ? 200 : 0;
        EXPECT_LT(attend_distance(c, (unsigned)processors, false), tolerance(c.dtype, false))
            << processors << " multiprocessors with " << shared_kilobytes << " KB, kind " << kind;
      }
}

// Two warps of head size 64 have room for the turned offsets of 226 blocks.
TEST_F(Emulated, OffsetsThatTurnComeInSeveralPieces) {
  halfbyte_emulator_device(1, 24 << 10);
  Case c;
  c.head_dim = 64, c.heads = 2, c.prefix = 4000, c.pairs = 32, c.recipe.offset_span = 16;
  EXPECT_LT(attend_distance(c, 3, false), tolerance(c.dtype, false));
}

// More spans than two warps take at a time, and at head size 256 than all of them do: some warps rotate queries as
// well.
TEST_F(Emulated, EveryWarpTurnsSpansOfItsOwn) {
  halfbyte_emulator_device(1, 227 << 10);
  for (int d : {64, 128, 256}) {
    Case c;
    c.head_dim = d, c.kv_heads = 1, c.heads = 2, c.prefix = 3000, c.pairs = d / 2, c.recipe.offset_span = 16;
    EXPECT_LT(attend_distance(c, (unsigned)d, false), tolerance(c.dtype, false)) << d;
  }
}

TEST_F(Emulated, PartsOfThePortableKernelMerge) {
  for (int processors : {1, 2, 3}) {
    halfbyte_emulator_device(processors, 227 << 10);
    Case c;
    c.batch = 2, c.prefix = 700;
    EXPECT_LT(attend_distance(c, (unsigned)processors, true), tolerance(c.dtype, true)) << processors;
  }
}

TEST_F(Emulated, EveryOrderOfThreadsGivesTheSame) {
  Case c;
  c.prefix = 330, c.batch = 2, c.heads = 6;
  halfbyte_emulator_device(8, 36 << 10);
  for (int schedule = 0; schedule < 12; schedule++) {
    halfbyte_emulator_schedule(schedule);
    EXPECT_LT(attend_distance(c, 1, false), tolerance(c.dtype, false)) << schedule;
  }
  halfbyte_emulator_schedule(-1);
}

// What check.py runs while a word of the kernels does nothing: little, and all of them, in several orders of threads.
class Mutations : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    halfbyte_emulator_device(8, 36 << 10);
    halfbyte_emulator_schedule(GetParam());
  }
  void TearDown() override {
    halfbyte_emulator_device(132, 227 << 10);
    halfbyte_emulator_schedule(-1);
  }
};

TEST_P(Mutations, Attend) {
  for (bool portable : {false, true})
    for (int kind = 0; kind < 6; kind++) {
      Case c;
      halfbyte_emulator_device(kind == 0 ? 2 : 8, 36 << 10);  // 2: warps have several tiles
      // A window that begins where some lanes see nothing of a warp's first tile; four warps.
      if (kind == 3) c.queries = 7, c.window = 85, halfbyte_emulator_device(8, 54 << 10);
      c.prefix = 330, c.heads = 6, c.recipe.lambda = kind == 1, c.recipe.sink_tokens = kind == 1 ? 16 : 0;
      if (kind == 0) c.sharpness = 4.0f, c.pairs = 40;
      if (kind == 1) c.masked = true;
      if (kind == 4) c.head_dim = 256, c.recipe.lambda = true, halfbyte_emulator_device(8, 227 << 10);
      if (kind == 2) c.dtype = Dtype::bfloat16, c.recipe.k.group = c.recipe.v.group = 16;
      if (kind == 5) c.dtype = Dtype::bfloat16, c.prefix = 20;  // all raw
      ASSERT_LT(attend_distance(c, 7, portable), tolerance(c.dtype, portable)) << kind;
    }
}

// Blocks that cross from one segment into the next; offsets in several pieces; more parts of a segment than are merged
// at once.
TEST_P(Mutations, AttendInParts) {
  Case c;
  c.batch = 2, c.prefix = 330;
  halfbyte_emulator_device(3, 36 << 10);
  ASSERT_LT(attend_distance(c, 7, false), tolerance(c.dtype, false));
  c.head_dim = 64, c.batch = c.kv_heads = 1, c.heads = 2;
  c.prefix = 2200, c.pairs = 32, c.recipe.offset_span = 16;
  halfbyte_emulator_device(1, 20 << 10);
  ASSERT_LT(attend_distance(c, 7, false), tolerance(c.dtype, false));
  c.prefix = 9000, c.pairs = 0;
  halfbyte_emulator_device(132, 20 << 10);
  ASSERT_LT(attend_distance(c, 7, false), tolerance(c.dtype, false));
}

TEST_P(Mutations, Encode) {
  halfbyte_emulator_device(2, 227 << 10);
  Case parts;  // of R
  parts.head_dim = 256, parts.prefix = 65, parts.batch = 3;
  expect_close(encode_difference(parts, 5, false), parts, "parts");
  ASSERT_FALSE(HasFailure());
  for (Dtype dtype : {Dtype::float16, Dtype::bfloat16})
    for (bool portable : {false, true}) {
      Case c;
      c.head_dim = 64, c.dtype = dtype, c.prefix = 65;
      if (dtype == Dtype::float16 && !portable) c.batch = 6;  // teams take several tiles of K
      expect_close(encode_difference(c, 5, portable), c, portable ? "portable" : "tensor cores");
      ASSERT_FALSE(HasFailure());
    }
}

// The step that packs a block, and those around it.
TEST_P(Mutations, Step) {
  halfbyte_emulator_device(8, 100 << 10);
  for (bool portable : {false, true}) {
    Case c;
    c.prefix = 30, c.pairs = 32, c.heads = 6, c.head_dim = 64;
    ASSERT_LT(step_distance(c, 5, 4, portable), tolerance(c.dtype, portable) + 2e-3) << portable;
    c.prefix = 5;  // a step finds the offset
    ASSERT_LT(step_distance(c, 5, 14, portable), tolerance(c.dtype, portable) + 2e-3) << portable;
  }
}

INSTANTIATE_TEST_SUITE_P(Orders, Mutations, testing::Values(0, 1, 2, 3));

}  // namespace
}  // namespace halfbyte
