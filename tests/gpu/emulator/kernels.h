// The entry points of the shipped Metal text, by name.
#pragma once

#include <vector>

struct Kernel {
  const char* name;
  int buffers;  // bound from 0 on
  void (*call)(void* const* buffers, unsigned group, unsigned tid);
};

const std::vector<Kernel>& kernels();
