// Threads: every task once, results that do not depend on their number, concurrent callers, forks, a foreign runtime.
#include "threads.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

void expect_each_once(size_t n) {
  std::vector<std::atomic<int>> calls(n);
  parallel_for(n, [&](size_t i) { calls[i]++; });
  for (size_t i = 0; i < n; i++) ASSERT_EQ(calls[i], 1) << i << " of " << n;
}

TEST(Threads, EveryTaskRunsOnce) {
  for (int threads : {1, 2, 3, 5, 2}) {  // and the pool is made anew when the number changes
    UseThreads use(threads);
    for (size_t n : {0, 1, 2, 3, 7, 64, 1000}) expect_each_once(n);
  }
}

TEST(Threads, AtLeastOne) {
  UseThreads use(0);
  EXPECT_EQ(num_threads(), 1);
  expect_each_once(10);
}

TEST(Threads, ManyCallersAtOnce) {
  UseThreads use(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++)
    callers.emplace_back([] {
      for (int turn = 0; turn < 200; turn++) expect_each_once(17);
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(Threads, ResultsDoNotDependOnTheirNumber) {
  Random random;
  for (size_t tokens : {65, 1030, 3000}) {
    const Array k = random_array(random, 1, 1, tokens, 64), v = random_array(random, 1, 1, tokens, 64);
    const Array q = random_array(random, 1, 5, 1, 64);
    UseThreads one(1);
    Layer layer = make_layer(config_of(1, 64));
    must(append(layer, k, v));
    const Decoded held = decode(layer);
    const Array want = attend(layer, q);
    Array any = poisoned(1, 5, 1, 64);
    const Plain plain = plain_attention(args_of(q, any), q, held.k, held.v);
    for (int threads : {2, 3, 5}) {
      UseThreads use(threads);
      Layer other = make_layer(config_of(1, 64));
      must(append(other, k, v));
      EXPECT_TRUE(same_bits(decode(other), held)) << threads;  // codes to the bit
      // Partial softmaxes start from their own maxima, so p's bytes may round the other way; then the merge rounds.
      EXPECT_LT(error_of(attend(other, q), want, plain), 3e-3) << threads << " threads, " << tokens << " tokens";
      UseBackend reference("reference");  // no bytes: the merge alone
      const Array merged = attend(layer, q);
      EXPECT_LT(error_of(merged, plain), 2e-5) << threads;
    }
  }
}

// Tiles that do not divide among the threads are split by tokens: any batch, any number of threads, one answer.
TEST(Threads, AnyBatchIsSharedAmongAnyThreads) {
  Random random;
  for (int batch : {1, 3, 5})
    for (size_t queries : {1, 20}) {
      const size_t tokens = 2100;
      const Array k = random_array(random, batch, 1, tokens, 32), q = random_array(random, batch, 5, queries, 32);
      Layer layer = make_layer(config_of(1, 32));
      must(append(layer, k, k, 0, tokens - queries));
      must(append(layer, k, k, tokens - queries, tokens));
      auto attend_with = [&](int threads) {
        UseThreads use(threads);
        Array out = poisoned(batch, 5, queries, 32);
        AttendArgs args = args_of(q, out);
        args.chunk_k = args.chunk_v = k.view(tokens - queries);
        must(layer.attend(args));
        return out;
      };
      const Array want = attend_with(1);
      Plain scale{{},
                  std::vector<double>(batch * 5 * queries, 0.05)};  // means of about 2000 values of size 1, with peaks
      for (int threads : {2, 3, 4, 7, 16})
        EXPECT_LT(mean_error_of(attend_with(threads), want, scale), 1e-2) << batch << " " << queries << " " << threads;
    }
}

// The work of one user of one layer; returns all outputs of its decode steps.
std::vector<uint8_t> decode_steps(Layer& layer, const Array& k, const Array& q, size_t from, size_t to) {
  std::vector<uint8_t> outputs;
  for (size_t t = from; t < to; t++) {
    EXPECT_TRUE(append(layer, k, k, t, t + 1).ok());
    const Array out = attend(layer, q);
    outputs.insert(outputs.end(), out.bytes.begin(), out.bytes.end());
  }
  return outputs;
}

TEST(Threads, LayersMayBeUsedFromDifferentThreads) {
  Random random;
  UseThreads use(2);
  const Array k = random_array(random, 1, 2, 700, 64), q = random_array(random, 1, 4, 1, 64);
  auto start = [&] {
    Layer layer = make_layer(config_of(2, 64));
    must(append(layer, k, k, 0, 640));
    return layer;
  };
  Layer alone = start(), a = start(), b = start();
  const std::vector<uint8_t> want = decode_steps(alone, k, q, 640, 700);
  std::vector<uint8_t> of_a, of_b;
  std::thread first([&] { of_a = decode_steps(a, k, q, 640, 700); }),
      second([&] { of_b = decode_steps(b, k, q, 640, 700); });
  first.join(), second.join();
  EXPECT_EQ(of_a, want);
  EXPECT_EQ(of_b, want);
}

// Copies share pages until one of them writes; reading them from two threads must be safe, and so must going apart.
TEST(Threads, CopiesMayBeUsedFromDifferentThreads) {
  Random random;
  UseThreads use(1);
  const Array k = random_array(random, 1, 2, 100, 64), q = random_array(random, 1, 4, 1, 64);
  for (int turn = 0; turn < 10; turn++) {
    Layer a = make_layer(config_of(2, 64)), b, c;
    must(append(a, k, k, 0, 40));
    must(b.copy_from(a)), must(c.copy_from(a));
    std::vector<uint8_t> of_a, of_b;
    std::thread first([&] { of_a = decode_steps(a, k, q, 40, 100); }),
        second([&] { of_b = decode_steps(b, k, q, 40, 100); });
    first.join(), second.join();
    const std::vector<uint8_t> want = decode_steps(c, k, q, 40, 100);
    EXPECT_EQ(of_a, want);
    EXPECT_EQ(of_b, want);
  }
}

#if !defined(__SANITIZE_THREAD__)  // which ends a forked child that starts threads
TEST(Threads, AForkedChildHasItsOwn) {
  Random random;
  UseThreads use(3);
  Layer layer = make_layer(config_of(2, 64));
  const Array k = random_array(random, 1, 2, 2000, 64), q = random_array(random, 1, 4, 1, 64);
  must(append(layer, k, k));
  const Array want = attend(layer, q);
  for (int turn = 0; turn < 5; turn++) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);  // a child that waits for threads it does not have would wait for ever
      const bool same = same_bits(attend(layer, q), want);
      _exit(same && append(layer, k, k, 0, 100).ok() ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    EXPECT_TRUE(same_bits(attend(layer, q), want));  // and the parent goes on
  }
}
#endif

// A stand-in for an OpenMP runtime: counts its calls and starts threads of its own.
std::atomic<int> foreign_calls{0}, foreign_threads{0};
void foreign_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  foreign_calls++, foreign_threads = (int)threads;
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

TEST(Threads, AForeignRuntimeRunsTheTasks) {
  UseThreads use(3);
  use_openmp(foreign_parallel);
  foreign_calls = 0;
  for (size_t n : {0, 1, 2, 50}) {
    foreign_threads = 0;
    expect_each_once(n);
    EXPECT_EQ(foreign_threads, n > 1 ? 3 : 0) << n;  // never a smaller team, and none for a single task
  }
  EXPECT_EQ(foreign_calls, 2);
  use_openmp(nullptr);
  expect_each_once(50);
  EXPECT_EQ(foreign_calls, 2);
}

TEST(Threads, AThreadThatDoesNotStartIsDoneWithout) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_getattr_default_np(&attributes), 0);
  size_t before = 0;
  pthread_attr_getstacksize(&attributes, &before);
  pthread_attr_setstacksize(&attributes, size_t{1} << 48);  // more than there are addresses
  ASSERT_EQ(pthread_setattr_default_np(&attributes), 0);
  UseThreads use(7);
  expect_each_once(50);
  pthread_attr_setstacksize(&attributes, before);
  ASSERT_EQ(pthread_setattr_default_np(&attributes), 0);
  pthread_attr_destroy(&attributes);
  expect_each_once(50);
}

TEST(Threads, ReadBandwidthIsANumber) {
  const int before = num_threads();
  EXPECT_GT(read_bandwidth(1 << 20, 2, 3), 1e6);
  EXPECT_EQ(num_threads(), before);
}

}  // namespace
}  // namespace halfbyte
