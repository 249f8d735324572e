// What this machine can do at most: bytes read, dot4 and fma operations a second. The roofs that benches measure
// against.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "backend.h"
#include "huge_pages.h"
#include "threads.h"

namespace halfbyte {
namespace {

constexpr int kRepeats = 5;
constexpr double kWarmUpSeconds = 0.05;

class UseThreads {
 public:
  explicit UseThreads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~UseThreads() { set_num_threads(before_); }
  UseThreads(const UseThreads&) = delete;

 private:
  int before_;
};

std::atomic<float> sink;  // so that the loops are not optimised away

template <class Work>
double seconds_of(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

// Operations a second of `what` with so many independent chains on each of `threads` threads.
double compute_rate(Peak what, int chains, int threads) {
  constexpr size_t kRounds = 1 << 16;  // 15 · 127 · 4 each: int32 sums have room
  const Backend& backend = current_backend();
  const auto data = std::make_unique<float[]>(kPeakFloats);
  std::fill_n(data.get(), kPeakFloats, 1.0f);
  auto once = [&] {
    return seconds_of(
        [&] { parallel_for(threads, [&](size_t) { sink = backend.peak(what, chains, data.get(), kRounds); }); });
  };
  // New threads start on their maker's core, and the system takes a while to move them to idle ones.
  for (double warm = 0.0; warm < kWarmUpSeconds;) warm += once();
  double least = once();
  for (int i = 1; i < kRepeats; i++) least = std::min(least, once());
  const double operations = 16 * (what == Peak::dot4 ? 8 : 2);  // of one word: lanes × (four products and sums, or one)
  return operations * chains * kRounds * threads / least;
}

double peak_rate(Peak what, int threads) {
  if (!current_backend().peak) return 0.0;
  UseThreads use(threads);
  double best = 0.0;
  for (int chains : {2, 4, 6, 12}) best = std::max(best, compute_rate(what, chains, threads));
  return best;
}

}  // namespace

double read_bandwidth(size_t bytes, int threads, int repeats) try {
  constexpr size_t kBytesEach = 64 << 20;  // read in one timing: small sets are read several times
  const size_t part = bytes / sizeof(float) / threads / 64 * 64;
  if (!part) return 0.0;
  const std::vector<float, HugePages<float>> data(part * threads, 1.0f);
  const Backend& backend = current_backend().peak ? current_backend() : kScalarBackend;
  const size_t passes = std::max<size_t>(1, kBytesEach / bytes);
  UseThreads use(threads);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; i++)
    seconds.push_back(seconds_of([&] {
      parallel_for(threads, [&](size_t t) {
        for (size_t pass = 0; pass < passes; pass++) sink = backend.peak(Peak::read, 0, data.data() + t * part, part);
      });
    }));
  return (double)(part * threads * sizeof(float) * passes) / median(seconds);
} catch (const std::bad_alloc&) {
  return 0.0;
}

double dot_peak(int threads) { return peak_rate(Peak::dot4, threads); }
double fma_peak(int threads) { return peak_rate(Peak::fma, threads); }

}  // namespace halfbyte
