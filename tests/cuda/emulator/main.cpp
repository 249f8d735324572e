// Runs the tests of tests/cuda on the emulator. HALFBYTE_LEAVE_OUT=FILE:LINE is a mutation, HALFBYTE_SCHEDULE a fixed
// order of threads; see settings.h.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "settings.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (const char* place = std::getenv("HALFBYTE_LEAVE_OUT")) {
    const std::string text = place;
    const size_t colon = text.rfind(':');
    halfbyte_emulator_leave_out(text.substr(0, colon).c_str(), std::stoi(text.substr(colon + 1)));
  }
  if (const char* schedule = std::getenv("HALFBYTE_SCHEDULE")) halfbyte_emulator_schedule(std::atoi(schedule));
  return RUN_ALL_TESTS();
}
