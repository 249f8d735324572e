// Runs independent tasks on a few threads that stay alive between calls.
#pragma once

#include <cstddef>
#include <functional>

namespace halfbyte {

// Calls task(i) for each i in [0, n), on up to num_threads() threads, the caller's included. Tasks may not throw.
void parallel_for(size_t n, const std::function<void(size_t)>& task);

}  // namespace halfbyte
