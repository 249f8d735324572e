// Runs independent tasks on a few threads that stay alive between calls.
#pragma once

#include <cstddef>
#include <functional>

namespace halfbyte {

// Calls task(i) for each i in [0, n), on up to num_threads() threads, the caller's included. Tasks may not throw.
void parallel_for(size_t n, const std::function<void(size_t)>& task);

// The entry of a GNU-style OpenMP runtime: calls work(data) on `threads` threads, the caller's included, and waits.
using OpenMpParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Runs tasks on that runtime's threads from now on; null goes back to the own pool. In a process whose OpenMP threads
// spin between parallel regions, a second set of threads would compete with them for the same cores.
void use_openmp(OpenMpParallel parallel);

}  // namespace halfbyte
