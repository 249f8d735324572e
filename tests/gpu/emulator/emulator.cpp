// Fibers on ucontext, and what the sanitizers have to be told of them. Where none is at work, switches go by _setjmp,
// which asks nothing of the kernel and is ten times as fast.
//
// This file itself is compiled without sanitizers: the exchange of values between lanes is the hardware's business, not
// a memory access of the kernel.
#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a mistake

#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(EMULATOR_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(EMULATOR_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_barrier, at_simd_barrier, together, all_of_team, done };

// Two tags in turn: a thread that is one barrier ahead must not be taken for one that has arrived here.
struct Tags {
  char of[2];
};

struct Fiber {
  State state = State::ready;
  int line = 0, barriers = 0, simd_barriers = 0;
  Combine combine = nullptr;
  void* mine = nullptr;
};

struct Context {
  ucontext_t whole;
#if !defined(EMULATOR_ADDRESS) && !defined(EMULATOR_THREAD)
  jmp_buf saved;
  bool is_saved = false;
#endif
};

// What threads of the same number share in all groups: the same thread to ThreadSanitizer, so that a stack used again
// is not taken for a race.
struct Worker {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Context context;
  bool started = false;
  void* asan_stack = nullptr;
#if defined(EMULATOR_THREAD)
  void* tsan = __tsan_create_fiber(0);
#endif
};

struct Group {
  std::vector<Fiber> fibers;
  unsigned index = 0;
  Tags barrier_tags = {};
  char shared_tag = 0;
  std::vector<Tags> simd_tags;
  std::unique_ptr<float[]> shared;
  int shared_floats = 0;      // once a thread has asked for it
  int wrong_shared_line = 0;  // where it is too much, or another size
  std::string error;
};

Context host;
Group* group;
int self;
const std::function<void(unsigned, unsigned)>* kernel;
int skipped_line;
bool skipped_by_odd_only;
std::deque<Worker> workers;                         // a context can not be moved
std::vector<std::unique_ptr<float[]>> used_memory;  // of the launch's groups that are done
const Launch* launched;
char start_tag, end_tag;  // of a launch

#if defined(EMULATOR_ADDRESS)
const void* host_stack;
size_t host_stack_bytes;
void* host_asan_stack;
#elif defined(EMULATOR_THREAD)
void* host_tsan;
#endif

void release([[maybe_unused]] char* tag) {
#if defined(EMULATOR_THREAD)
  __tsan_release(tag);
#endif
}

void acquire([[maybe_unused]] char* tag) {
#if defined(EMULATOR_THREAD)
  __tsan_acquire(tag);
#endif
}

void change(Context& from, Context& to) {
#if defined(EMULATOR_ADDRESS) || defined(EMULATOR_THREAD)
  swapcontext(&from.whole, &to.whole);
#else
  from.is_saved = true;
  if (_setjmp(from.saved)) return;
  if (to.is_saved) _longjmp(to.saved, 1);
  setcontext(&to.whole);
#endif
}

void switch_to_host() {
  [[maybe_unused]] Worker& worker = workers[self];
#if defined(EMULATOR_ADDRESS)
  __sanitizer_start_switch_fiber(&worker.asan_stack, host_stack, host_stack_bytes);
#elif defined(EMULATOR_THREAD)
  __tsan_switch_to_fiber(host_tsan, 1);  // 1: a switch orders nothing
#endif
  change(worker.context, host);
#if defined(EMULATOR_ADDRESS)
  __sanitizer_finish_switch_fiber(worker.asan_stack, &host_stack, &host_stack_bytes);
#endif
}

void switch_to_fiber(int thread) {
  self = thread;
#if defined(EMULATOR_ADDRESS)
  __sanitizer_start_switch_fiber(&host_asan_stack, workers[thread].stack.get(), kStackBytes);
#elif defined(EMULATOR_THREAD)
  __tsan_switch_to_fiber(workers[thread].tsan, 1);
#endif
  change(host, workers[thread].context);
#if defined(EMULATOR_ADDRESS)
  __sanitizer_finish_switch_fiber(host_asan_stack, nullptr, nullptr);
#endif
}

// The same fiber runs a thread of one group after the other.
void fiber_main() {
#if defined(EMULATOR_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  for (;;) {
    acquire(&start_tag);
    (*kernel)(group->index, (unsigned)self);
    release(&end_tag);
    group->fibers[self].state = State::done;
    switch_to_host();
  }
}

void wait(State state, int line) {
  Fiber& fiber = group->fibers[self];
  fiber.state = state, fiber.line = line;
  switch_to_host();
}

void start(Group& g, int threads) {
  while ((int)workers.size() < threads) workers.emplace_back();
  g.fibers = std::vector<Fiber>(threads);
  g.simd_tags.resize((threads + kLanes - 1) / kLanes);
  for (int i = 0; i < threads; i++) {
    Worker& worker = workers[i];
    if (std::exchange(worker.started, true)) continue;
    ucontext_t& context = worker.context.whole;
    getcontext(&context);
    context.uc_stack.ss_sp = worker.stack.get(), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
  }
#if defined(EMULATOR_THREAD)
  host_tsan = __tsan_get_current_fiber();
#endif
}

// By the host, so that the memory is no thread's.
void allocate_shared(Group& g) {
  g.shared.reset(new float[g.shared_floats]);
  std::fill_n(g.shared.get(), g.shared_floats, std::numeric_limits<float>::quiet_NaN());
  release(&g.shared_tag);
}

void run_thread(Group& g, int thread) {
  switch_to_fiber(thread);
  if (g.shared || !g.shared_floats) return;
  allocate_shared(g);
  switch_to_fiber(thread);
}

std::string failure(const char* what, int thread, int line) {
  return std::string(what) + ", thread " + std::to_string(thread) + ", line " + std::to_string(line);
}

// Lets the lanes of a simdgroup go on, together, if all of them wait at one place. False: none of them waits.
bool resolve_simd(Group& g, int first, int lanes) {
  Fiber* fibers = &g.fibers[first];
  int waiting = 0, some = 0;
  for (int i = 0; i < lanes; i++)
    if (fibers[i].state == State::together || fibers[i].state == State::at_simd_barrier) waiting++, some = i;
  if (!waiting) return false;
  void* brought[kLanes];
  for (int i = 0; i < lanes; i++) {
    if (fibers[i].state != fibers[some].state || fibers[i].line != fibers[some].line ||
        fibers[i].combine != fibers[some].combine) {
      g.error = failure("a shuffle or simdgroup barrier that not all lanes reach", first + i, fibers[some].line);
      return true;
    }
    brought[i] = fibers[i].mine;
  }
  if (fibers[0].state == State::together) self = first, fibers[0].combine(brought, lanes);
  for (int i = 0; i < lanes; i++) fibers[i].state = State::ready;
  return true;
}

// Lets teams go on all of whose threads wait for each other at one place. False: there is none.
bool resolve_teams(Group& g) {
  bool moved = false;
  for (int first = 0; first + kTeam <= (int)g.fibers.size(); first += kTeam) {
    Fiber* fibers = &g.fibers[first];
    void* brought[kTeam];
    bool all_wait = true;
    for (int i = 0; i < kTeam; i++) {
      all_wait &= fibers[i].state == State::all_of_team && fibers[i].line == fibers[0].line &&
                  fibers[i].combine == fibers[0].combine;
      brought[i] = fibers[i].mine;
    }
    if (!all_wait) continue;
    self = first, fibers[0].combine(brought, kTeam);
    for (int i = 0; i < kTeam; i++) fibers[i].state = State::ready;
    moved = true;
  }
  return moved;
}

// All threads wait for more than their simdgroup or are done: lets them go on. False: the group is done, or wrong.
bool resolve(Group& g) {
  if (resolve_teams(g)) return true;
  const int n = (int)g.fibers.size();
  int waiting = 0;
  for (const Fiber& fiber : g.fibers) waiting += fiber.state != State::done;
  if (!waiting) return false;
  for (int i = 0; i < n; i++)
    if (g.fibers[i].state != State::at_barrier || g.fibers[i].line != g.fibers[0].line) {
      g.error = failure("a barrier that not all threads reach", i, g.fibers[0].line);
      return false;
    }
  for (Fiber& fiber : g.fibers) fiber.state = State::ready;
  return true;
}

void arrange(std::vector<int>& order, unsigned schedule, std::mt19937& random) {
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
}

std::vector<int> numbers(int n) {
  std::vector<int> out(n);
  for (int i = 0; i < n; i++) out[i] = i;
  return out;
}

// Runs threads [first, first + n), whole simdgroups, until all of them wait at a barrier or are done.
void run_part(Group& g, int first, int n, const Launch& launch, std::mt19937& random) {
  std::vector<int> order = numbers(n);
  bool moved = true;
  while (moved && g.error.empty()) {
    if (launch.schedule > 1) arrange(order, launch.schedule, random);
    for (int i = 0; i < n; i++) {
      const int thread = first + (launch.schedule == 1 ? n - 1 - i : order[i]);
      if (g.fibers[thread].state == State::ready) run_thread(g, thread);
    }
    moved = false;
    for (int simd = first; simd < first + n; simd += kLanes)
      moved |= resolve_simd(g, simd, std::min(kLanes, first + n - simd));
  }
}

std::string run_group(const Launch& launch, unsigned index, std::mt19937& random) {
  Group g;
  g.index = index;
  group = &g;
  start(g, launch.threads);
  g.shared_floats = launch.shared_bytes / (int)sizeof(float);
  if (g.shared_floats) allocate_shared(g);
  // Simdgroups go from barrier to barrier one after the other, as far apart as they can get, or all in step.
  const int each = launch.schedule < 2 || launch.schedule % 2 == 0 ? kLanes : launch.threads;
  std::vector<int> parts = numbers((launch.threads + each - 1) / each);
  if (launch.schedule == 1) arrange(parts, 1, random);
  do {
    if (launch.schedule > 1) arrange(parts, launch.schedule, random);
    for (int part : parts) run_part(g, part * each, std::min(each, launch.threads - part * each), launch, random);
  } while (g.error.empty() && resolve(g));
  if (g.wrong_shared_line && g.error.empty())
    g.error = failure("threadgroup memory of another size, or too much of it", 0, g.wrong_shared_line);
#if defined(EMULATOR_THREAD)  // memory used again would be taken for a race
  used_memory.push_back(std::move(g.shared));
#endif
  if (!g.error.empty()) workers.clear();  // they are in the middle of something
  return g.error;
}

}  // namespace

std::string run(const Launch& launch, const std::function<void(unsigned, unsigned)>& body) {
  if (launch.threads < 1 || launch.threads > kMaxThreads) return "a group has 1 to 1024 threads";
  kernel = &body, launched = &launch;
  release(&start_tag);
  std::mt19937 random(launch.schedule);
  std::vector<int> order = numbers(launch.groups);
  arrange(order, launch.schedule, random);
  std::string error;
  for (size_t i = 0; i < order.size() && error.empty(); i++) {
    error = run_group(launch, (unsigned)order[i], random);
    if (!error.empty()) error = "group " + std::to_string(order[i]) + ": " + error;
  }
  acquire(&end_tag);
  used_memory.clear();
  return error;
}

void skip_barrier(int line, bool odd_threads_only) { skipped_line = line, skipped_by_odd_only = odd_threads_only; }

static bool is_skipped(int line) { return line == skipped_line && (self % 2 || !skipped_by_odd_only); }

void barrier(int line) {
  if (is_skipped(line)) return;
  char* tag = &group->barrier_tags.of[group->fibers[self].barriers++ % 2];
  release(tag);
  wait(State::at_barrier, line);
  acquire(tag);
}

void simd_barrier(int line) {
  if (is_skipped(line)) return;
  char* tag = &group->simd_tags[self / kLanes].of[group->fibers[self].simd_barriers++ % 2];
  release(tag);
  wait(State::at_simd_barrier, line);
  acquire(tag);
}

static void wait_together(State state, Combine combine, void* mine, int line) {
  Fiber& fiber = group->fibers[self];
  fiber.combine = combine, fiber.mine = mine;
  wait(state, line);
}

void together(Combine combine, void* mine, int line) { wait_together(State::together, combine, mine, line); }
void all_of_team(Combine combine, void* mine, int line) { wait_together(State::all_of_team, combine, mine, line); }

namespace {

struct Shuffle {
  unsigned value, from;
  bool is_xor;
  int line;
};

void shuffle_all(void* const* brought, int lanes) {
  unsigned values[kLanes];
  for (int i = 0; i < lanes; i++) values[i] = static_cast<Shuffle*>(brought[i])->value;
  for (int i = 0; i < lanes; i++) {
    Shuffle& own = *static_cast<Shuffle*>(brought[i]);
    const unsigned from = own.is_xor ? (unsigned)i ^ own.from : own.from;
    if (from >= (unsigned)lanes)
      refuse("a shuffle from a lane that does not exist", own.line);
    else
      own.value = values[from];
  }
}

}  // namespace

unsigned shuffle_xor(unsigned value, unsigned from, int line) {
  Shuffle own = {value, from, true, line};
  together(shuffle_all, &own, line);
  return own.value;
}

unsigned shuffle(unsigned value, unsigned from, int line) {
  Shuffle own = {value, from, false, line};
  together(shuffle_all, &own, line);
  return own.value;
}

void fence() {
  static char tag;
  release(&tag);
  acquire(&tag);
}

Place place() { return {group->index, (unsigned)self, launched}; }

void refuse(const char* what, int line) {
  if (group->error.empty()) group->error = failure(what, self, line);
}

void* shared_memory() {
  acquire(&group->shared_tag);
  return group->shared.get();
}

float* shared_floats(int n, int line) {
  Group& g = *group;
  if (!g.shared) {
    g.shared_floats = n;
    switch_to_host();
  }
  acquire(&g.shared_tag);
  if (n != g.shared_floats || n * (int)sizeof(float) > kMaxSharedBytes) g.wrong_shared_line = line;
  return g.shared.get();
}

}  // namespace emulator
