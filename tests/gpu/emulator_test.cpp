// The emulator itself: that it runs what is right, and says what is wrong.
#include "emulator/emulator.h"

#include <gtest/gtest.h>

#include <vector>

namespace {

using emulator::Launch;

const std::vector<unsigned> kSchedules = {0, 1, 2, 3};

std::string error_of(const Launch& launch, const std::function<void(unsigned, unsigned)>& body) {
  return emulator::run(launch, body);
}

TEST(Emulator, RunsEveryThreadOfEveryGroupOnce) {
  for (unsigned schedule : kSchedules) {
    std::vector<int> seen(3 * 96);
    EXPECT_EQ(error_of({3, 96, schedule}, [&](unsigned group, unsigned tid) { seen[group * 96 + tid]++; }), "");
    EXPECT_EQ(seen, std::vector<int>(3 * 96, 1));
  }
}

TEST(Emulator, ExchangesValuesBetweenLanes) {
  for (unsigned schedule : kSchedules)
    EXPECT_EQ(error_of({1, 64, schedule},
                       [](unsigned, unsigned tid) {
                         EXPECT_EQ(emulator::shuffle_xor(tid, 5, 1), tid ^ 5);
                         EXPECT_EQ(emulator::shuffle(tid, 7, 2), tid / 32 * 32 + 7);
                       }),
              "");
}

TEST(Emulator, SharesPoisonedMemoryBetweenBarriers) {
  for (unsigned schedule : kSchedules)
    EXPECT_EQ(error_of({2, 64, schedule},
                       [](unsigned, unsigned tid) {
                         float* memory = emulator::shared_floats(64, 1);
                         EXPECT_NE(memory[tid], memory[tid]);  // NaN
                         emulator::barrier(2);
                         memory[tid] = (float)tid;
                         emulator::barrier(3);
                         EXPECT_EQ(memory[63 - tid], (float)(63 - tid));
                       }),
              "");
}

TEST(Emulator, OrderOfThreadsShowsWhereBarriersAreMissing) {
  std::vector<int> last;
  for (unsigned schedule : {0u, 1u}) {
    int winner = -1;
    EXPECT_EQ(error_of({1, 64, schedule}, [&](unsigned, unsigned tid) { winner = (int)tid; }), "");
    last.push_back(winner);
  }
  EXPECT_EQ(last, (std::vector<int>{63, 0}));
}

TEST(Emulator, RefusesABarrierThatNotAllThreadsReach) {
  for (unsigned schedule : kSchedules) {
    const auto half = [](unsigned, unsigned tid) {
      if (tid < 32) emulator::barrier(17);
    };
    EXPECT_NE(error_of({1, 64, schedule}, half).find("a barrier that not all threads reach"), std::string::npos);
    const auto two_places = [](unsigned, unsigned tid) { emulator::barrier(tid < 32 ? 17 : 18); };
    EXPECT_NE(error_of({1, 64, schedule}, two_places).find("a barrier that not all threads reach"), std::string::npos);
  }
}

TEST(Emulator, RefusesAShuffleThatNotAllLanesReach) {
  for (unsigned schedule : kSchedules) {
    const auto odd = [](unsigned, unsigned tid) {
      if (tid % 2) emulator::shuffle_xor(tid, 1, 4);
    };
    EXPECT_NE(error_of({1, 32, schedule}, odd).find("not all lanes reach"), std::string::npos);
    const auto mixed = [](unsigned, unsigned tid) {
      if (tid % 2)
        emulator::shuffle(tid, 0, 4);
      else
        emulator::simd_barrier(4);
    };
    EXPECT_NE(error_of({1, 32, schedule}, mixed).find("not all lanes reach"), std::string::npos);
    const auto beyond = [](unsigned, unsigned tid) { emulator::shuffle(tid, 20, 4); };
    EXPECT_NE(error_of({1, 16, schedule}, beyond).find("lane that does not exist"), std::string::npos);
  }
}

TEST(Emulator, RefusesWhatMetalDoesNotHave) {
  EXPECT_NE(error_of({1, 1025, 0}, [](unsigned, unsigned) {}), "");
  EXPECT_NE(error_of({1, 32, 0}, [](unsigned, unsigned) { emulator::shared_floats(8193, 9); }), "");
  EXPECT_EQ(error_of({1, 32, 0}, [](unsigned, unsigned) { emulator::shared_floats(8192, 9); }), "");
}

}  // namespace
