// The emulator behind a C function, for Python: tests/python/metal_standin.py calls it as PyTorch calls Metal.
#include <cstring>
#include <string>

#include "emulator/emulator.h"
#include "emulator/kernels.h"

// Runs a kernel on buffers 0, 1, …; "" when nothing went wrong. The text lives until the next call.
extern "C" const char* halfbyte_emulator_run(const char* name, void* const* buffers, int n_buffers, int groups,
                                             int threads, unsigned schedule) {
  static std::string error;
  error = std::string("no kernel ") + name;
  for (const Kernel& kernel : kernels()) {
    if (std::strcmp(kernel.name, name)) continue;
    if (n_buffers != kernel.buffers) {
      error = std::to_string(n_buffers) + " buffers, takes " + std::to_string(kernel.buffers);
      break;
    }
    error = emulator::run({groups, threads, schedule},
                          [&](unsigned group, unsigned tid) { kernel.call(buffers, group, tid); });
  }
  return error.c_str();
}
