// Runs GPU kernels on Linux, one fiber a thread: a threadgroup's fibers switch at barriers and shuffles alone, in an
// order of the caller's choice. A barrier or shuffle that not all threads reach is an error, not a hang.
#pragma once

#include <functional>
#include <string>

namespace emulator {

constexpr int kLanes = 32;  // of a simdgroup
constexpr int kTeam = 128;  // threads of four simdgroups that wait for each other
constexpr int kMaxThreads = 1024, kMaxSharedBytes = 32 << 10;

struct Launch {
  int groups, threads;   // threads of a group
  unsigned schedule;     // 0: threads and groups in order, 1: in reverse, else shuffled with this seed
  int shared_bytes = 0;  // of a group's memory where the launch says it, as CUDA's does; a multiple of 4
};

// Runs `body` for each thread of each group; returns what went wrong, or nothing. Under ThreadSanitizer only barriers
// order the threads of a group, and nothing orders groups.
std::string run(const Launch& launch, const std::function<void(unsigned group, unsigned thread)>& body);

// For mutations: the barrier at this line of the kernels' text does nothing, or nothing in odd threads. 0: all work.
void skip_barrier(int line, bool odd_threads_only);

// ---- What kernels call; `line` is where they do

void barrier(int line);
void simd_barrier(int line);
// The value of lane `lane ^ from`, or of lane `from`.
unsigned shuffle_xor(unsigned value, unsigned from, int line);
unsigned shuffle(unsigned value, unsigned from, int line);
// The group's memory: the same for all of its threads, of exactly that size, full of NaN.
float* shared_floats(int n, int line);
// That of Launch::shared_bytes.
void* shared_memory();

// Once all lanes of the simdgroup are here, `combine` sees what each brought, lane by lane, and may change it.
using Combine = void (*)(void* const* brought, int lanes);
void together(Combine combine, void* mine, int line);
// The same for the kTeam threads from a multiple of it on.
void all_of_team(Combine combine, void* mine, int line);
// What a thread wrote before its fence is seen by those whose fence comes later.
void fence();

struct Place {
  unsigned group, thread;
  const Launch* launch;
};
Place place();
// The run fails, for a reason that the caller has found.
void refuse(const char* what, int line);

}  // namespace emulator
