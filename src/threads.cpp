// Threads for tasks: those of an OpenMP runtime already in the process, or an own pool whose workers claim task numbers
// from a counter, spin a little for the next job, then sleep.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "halfbyte/halfbyte.hpp"

namespace halfbyte {
namespace {

// Decode steps follow each other within microseconds, so a worker looks for work this often before it sleeps.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  explicit Pool(int workers) : asked_(workers) {
    try {
      for (int i = 0; i < workers; i++) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are, and the caller, do the work.
    }
  }
  ~Pool() {
    stop_ = true;
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(size_t n, const std::function<void(size_t)>& task) {
    task_ = &task, n_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_.store((int)threads_.size(), std::memory_order_relaxed);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    claim();
    for (int i = 0; busy_.load(std::memory_order_acquire); i++) {
      if (i < kSpins)
        pause();
      else
        std::this_thread::yield();  // a worker may be waiting for this very core
    }
  }

  int asked() const { return asked_; }

 private:
  void claim() {
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) (*task_)(i);
  }

  void work() {
    for (unsigned seen = 0;;) {
      for (int i = 0; i < kSpins && job_.load(std::memory_order_acquire) == seen; i++) pause();
      job_.wait(seen, std::memory_order_acquire);
      if (stop_) return;
      seen++;
      claim();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int asked_;  // workers, of which threads_ may have fewer
  std::vector<std::thread> threads_;
  std::atomic<unsigned> job_{0};
  std::atomic<size_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(size_t)>* task_ = nullptr;
  size_t n_ = 0;
};

std::atomic<OpenMpParallel> openmp = nullptr;

void run_on_openmp(OpenMpParallel parallel, size_t n, const std::function<void(size_t)>& task, int threads) {
  struct Job {
    std::atomic<size_t> next{0};
    size_t n;
    const std::function<void(size_t)>& task;
  } job{{}, n, task};
  auto claim = [](void* data) {
    Job& job = *static_cast<Job*>(data);
    for (size_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;) job.task(i);
  };
  parallel(claim, &job, (unsigned)threads, 0);
}

std::mutex mutex;  // one parallel_for at a time; a second caller runs its tasks itself
std::unique_ptr<Pool> pool;
int wanted = (int)std::thread::hardware_concurrency();

// A forked child has no workers: it forgets the pool it inherited and makes its own when needed.
void forget_pool() {
  (void)pool.release();
  new (&mutex) std::mutex;
}

const int at_fork = pthread_atfork(nullptr, nullptr, forget_pool);

}  // namespace

void parallel_for(size_t n, const std::function<void(size_t)>& task) {
  const int threads = (int)std::min<size_t>(n, (size_t)wanted);
  OpenMpParallel parallel = openmp.load(std::memory_order_relaxed);
  if (threads > 1 && parallel) {
    // All of them even for fewer tasks: GNU's runtime ends the threads that a smaller team leaves over, and the next
    // larger one has to start them anew.
    run_on_openmp(parallel, n, task, wanted);
    return;
  }
  std::unique_lock lock(mutex, std::try_to_lock);
  if (threads <= 1 || !lock.owns_lock()) {
    for (size_t i = 0; i < n; i++) task(i);
    return;
  }
  if (!pool || pool->asked() != wanted - 1) pool = std::make_unique<Pool>(wanted - 1);
  pool->run(n, task);
}

void use_openmp(OpenMpParallel parallel) { openmp = parallel; }

void set_num_threads(int n) { wanted = n < 1 ? 1 : n; }
int num_threads() { return wanted; }

}  // namespace halfbyte
