// The loops behind the measured roofs do the work that they are credited with, and the roofs are plausible.
#include "backend.h"

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

TEST(Machine, ReadingReadsEveryWord) {
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    for (size_t n : {256, 512, 4096}) {
      std::vector<float> data(n, 1.0f);
      EXPECT_EQ(current_backend().peak(Peak::read, 0, data.data(), n), (float)n) << name;
    }
  }
}

// 1.0f is the bytes 0, 0, 128, 63: low nibbles 0, 0, 0, 15, so that each dot4 adds 15 · 63 to each of 16 lanes.
TEST(Machine, RoundsComputeWhatTheyAreCountedFor) {
  const std::vector<float> ones(kPeakFloats, 1.0f);
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    for (int chains : {2, 4, 6, 12})
      for (size_t rounds : {1, 7, 100}) {
        const float starts = (float)(chains * (chains - 1) / 2);
        EXPECT_EQ(current_backend().peak(Peak::dot4, chains, ones.data(), rounds),
                  16 * (starts + chains * rounds * 15 * 63))
            << name << ", " << chains << " chains";
        EXPECT_EQ(current_backend().peak(Peak::fma, chains, ones.data(), rounds), 16.0f * chains * (1 + rounds))
            << name << ", " << chains << " chains";
      }
  }
}

TEST(Machine, RoofsExistAndThreadsAreLeftAsTheyWere) {
  UseThreads threads(1);
  for (const std::string& name : fast_backends()) {
    UseBackend use(name);
    EXPECT_GT(dot_peak(2), 0.0) << name;
    EXPECT_GT(fma_peak(2), 0.0) << name;
    for (size_t bytes : {1024, 100000, 1 << 20}) EXPECT_GT(read_bandwidth(bytes, 2, 3), 0.0) << name << ", " << bytes;
    EXPECT_EQ(num_threads(), 1);
  }
  UseBackend use("reference");
  EXPECT_EQ(dot_peak(1), 0.0);
  EXPECT_EQ(fma_peak(1), 0.0);
  EXPECT_GT(read_bandwidth(1 << 20, 1, 3), 0.0);
}

}  // namespace
}  // namespace halfbyte
