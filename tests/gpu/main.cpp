// Runs the tests; a barrier of the kernels is left out if HALFBYTE_SKIP_BARRIER names its line, and left out by odd
// threads alone if HALFBYTE_SPLIT_BARRIER does.
#include <gtest/gtest.h>

#include <cstdlib>

#include "emulator/emulator.h"
#include "halfbyte/halfbyte.hpp"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  // One: the CPU library is not compiled for ThreadSanitizer, which would miss what orders its threads.
  halfbyte::set_num_threads(1);
  if (const char* line = std::getenv("HALFBYTE_SKIP_BARRIER")) emulator::skip_barrier(std::atoi(line), false);
  if (const char* line = std::getenv("HALFBYTE_SPLIT_BARRIER")) emulator::skip_barrier(std::atoi(line), true);
  return RUN_ALL_TESTS();
}
