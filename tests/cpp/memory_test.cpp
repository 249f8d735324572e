// Out of memory in any call, at any of its allocations: an error, never an exception, and the cache as before.
#include <atomic>
#include <new>
#include <thread>

#include "halfbyte/halfbyte.h"
#include "testing.h"
#include "threads.h"

namespace {

// Allocations left before they fail; negative: none fail. `forever`: all after that fail too, else just that one.
std::atomic<long> left{-1};
std::atomic<bool> forever{false}, failed{false};

bool fails() {
  if (left.load(std::memory_order_relaxed) < 0) return false;
  const long before = left.fetch_sub(1);
  if (before > 0) return false;
  if (forever) left = 0;
  failed = true;
  return true;
}

void* allocate(size_t bytes, size_t alignment) {
  if (fails()) throw std::bad_alloc();
  void* p = alignment <= alignof(std::max_align_t)
                ? std::malloc(bytes ? bytes : 1)
                : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!p) throw std::bad_alloc();
  return p;
}

// Apart, so that compilers do not see new and free meet and take them for a mistake.
[[gnu::noinline]] void release(void* p) { std::free(p); }

}  // namespace

void* operator new(size_t bytes) { return allocate(bytes, 1); }
void* operator new[](size_t bytes) { return allocate(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, (size_t)alignment); }
void* operator new[](size_t bytes, std::align_val_t alignment) { return allocate(bytes, (size_t)alignment); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { release(p); }

namespace halfbyte {
namespace {

using namespace testing;

// Makes the n-th allocation from now fail while it lives.
class FailAt {
 public:
  FailAt(long n, bool all_after) { failed = false, forever = all_after, left = n; }
  ~FailAt() { left = -1; }
  FailAt(const FailAt&) = delete;
};

// Calls call() with its 0th, 1st, … allocation failing until none fails any more; `check` looks at the state after each
// failure. Returns how many allocations the call makes. A call that fails must leave things so that it can be repeated.
template <class Call, class Check>
int fail_everywhere(Call call, Check check) {
  parallel_for(64, [](size_t) {});  // the threads exist already
  for (int n = 0;; n++) {
    Status status;
    for (bool all_after : {false, true}) {
      {
        FailAt fail(n, all_after);
        status = call();
      }
      if (!failed) break;
      EXPECT_EQ(status.code(), Code::out_of_memory) << "allocation " << n << ": " << status.message();
      check();
      if (::testing::Test::HasFailure()) return n;
    }
    if (!failed) {
      EXPECT_TRUE(status.ok()) << status.message();
      return n;
    }
  }
}

struct Case {
  const char* name;
  size_t held, more;
  Recipe recipe;
  int rows;  // sequences made by select after the first append
  int sliding_window;
  bool recorded = false;
};

std::vector<Case> cases() {
  Recipe sinks, no_offset, warm_up;
  sinks.sink_tokens = 32, sinks.raw_window = 16;
  no_offset.offset = false;
  warm_up.offset_tokens = 32;
  return {{"empty", 0, 100, {}, 1, 0},
          {"empty and short", 0, 5, {}, 1, 0},
          {"empty with sinks", 0, 100, sinks, 1, 0},
          {"before the offset", 9, 3, {}, 1, 0},
          {"offset is fixed", 9, 60, {}, 1, 0},
          {"in place", 70, 3, {}, 1, 0},
          {"in the page", 70, 30, {}, 1, 0},
          {"new pages", 70, 300, {}, 1, 0},
          {"shared pages", 70, 40, {}, 3, 0},
          {"sinks", 20, 40, sinks, 1, 0},
          {"no offset", 10, 90, no_offset, 1, 0},
          {"sliding", 300, 70, {}, 2, 100},
          {"warm up goes on", 9, 20, warm_up, 1, 0},
          {"warm up ends", 20, 40, warm_up, 1, 0},
          {"warm up at once", 0, 100, warm_up, 1, 0},
          {"recorded", 70, 40, {}, 1, 0, true},
          {"recorded from the start", 0, 200, sinks, 1, 0, true}};
}

Layer layer_of(const Case& c, const Array& k) {
  LayerConfig config = config_of(2, 64, Dtype::float32, c.recipe);
  config.sliding_window = c.sliding_window;
  Layer layer = make_layer(config);
  layer.record_past(c.recorded);
  if (c.held) {
    must(append(layer, k, k, 0, c.held));
    if (c.rows > 1) must(layer.select(std::vector<size_t>(c.rows, 0)));
  }
  return layer;
}

TEST(Memory, AppendFailsWithoutATrace) {
  Random random;
  for (int threads : {1, 2})
    for (const Case& c : cases()) {
      SCOPED_TRACE(c.name);
      UseThreads use(threads);
      const Array k = random_array(random, 1, 2, c.held, 64);
      const Array more = random_array(random, c.held ? c.rows : 1, 2, c.more, 64);
      Layer layer = layer_of(c, k), untouched = layer_of(c, k);
      const size_t bytes = layer.bytes();
      const int allocations = fail_everywhere([&] { return append(layer, more, more); },
                                              [&] {
                                                EXPECT_EQ(layer.length(), c.held);
                                                EXPECT_EQ(layer.visible(), untouched.visible());
                                                EXPECT_EQ(layer.packed_tokens(), untouched.packed_tokens());
                                                EXPECT_EQ(layer.batch(), untouched.batch());
                                                EXPECT_EQ(layer.bytes(), bytes);
                                                EXPECT_EQ(layer.has_offset(), untouched.has_offset());
                                                if (c.held) {
                                                  EXPECT_EQ(difference(save(layer), save(untouched)), "");
                                                }
                                              });
      if (c.more > 20) {
        EXPECT_GT(allocations, 2);
      }
      must(append(untouched, more, more));  // the last try went through: as if the others had never been
      EXPECT_TRUE(same_bits(decode(layer), decode(untouched)));
    }
}

TEST(Memory, AttendFailsWithoutATrace) {
  Random random;
  for (int threads : {1, 3}) {
    UseThreads use(threads);
    Layer layer = make_layer(config_of(1, 64));
    const Array k = random_array(random, 1, 1, 3000, 64);
    must(append(layer, k, k));
    const Array q = random_array(random, 1, 2, 1, 64);
    const Array want = attend(layer, q);
    Array out = want;
    auto step = [&] { return layer.attend(args_of(q, out)); };
    std::thread([&] { EXPECT_GT(fail_everywhere(step, [] {}), 1); }).join();  // it has no working memory yet
    EXPECT_TRUE(same_bits(attend(layer, q), want));
    if (threads == 1) {
      EXPECT_EQ(fail_everywhere(step, [] {}), 0);  // a decoding step allocates nothing
    }
  }
}

TEST(Memory, OtherCallsFailWithoutATrace) {
  Random random;
  Recipe recipe;
  recipe.lambda = true, recipe.sink_tokens = 16;
  const LayerConfig config = config_of(2, 64, Dtype::float32, recipe);
  EXPECT_GT(fail_everywhere([&] { return Layer::create(config).status(); }, [] {}), 4);

  Layer layer = make_layer(config);
  const std::vector<float> ones(2 * 64, 1.0f), twos(2 * 64, 2.0f);
  must(layer.set_lambda(ones.data(), ones.data()));
  const size_t bytes = layer.bytes();
  auto unchanged = [&] { EXPECT_EQ(layer.bytes(), bytes); };
  EXPECT_GT(fail_everywhere([&] { return layer.set_offset(twos.data(), twos.data()); }, unchanged), 1);
  EXPECT_GT(fail_everywhere([&] { return layer.set_frequencies(ones.data(), 32); }, [] {}), 3);
  EXPECT_GT(fail_everywhere([&] { return layer.set_lambda(twos.data(), ones.data()); }, [] {}), 3);

  Recipe rotated;
  rotated.rotation = Rotation::dense;
  Layer dense = make_layer(config_of(1, 64, Dtype::float32, rotated));
  const std::vector<float> r = random_rotation(random, 64);
  EXPECT_GT(fail_everywhere([&] { return dense.set_rotation(r.data(), r.data()); }, [] {}), 2);

  const Array k = random_array(random, 3, 2, 100, 64);
  must(append(layer, k, k));
  Decoded held = decode(layer);
  const Decoded before = held;
  auto as_before = [&] { EXPECT_TRUE(same_bits(decode(layer), before)); };
  fail_everywhere([&] { return layer.decode((float*)held.k.bytes.data(), (float*)held.v.bytes.data()); }, as_before);
  const std::vector<size_t> rows = {0, 1, 2};
  EXPECT_GT(fail_everywhere([&] { return layer.select(rows); }, as_before), 3);
  as_before();
  Layer copy;
  EXPECT_GT(fail_everywhere([&] { return copy.copy_from(layer); }, as_before), 3);
  EXPECT_TRUE(same_bits(decode(copy), before));
  fail_everywhere([&] { return copy.crop(50); }, as_before);
  fail_everywhere([&] { return layer.reset(), Status{}; }, [] {});
  EXPECT_EQ(layer.length(), 0u);
}

TEST(Memory, CropIntoTheNewestAppendFailsWithoutATrace) {
  Random random;
  const Array k = random_array(random, 2, 2, 100, 64), more = random_array(random, 2, 2, 20, 64);
  for (size_t length : {70, 80}) {
    Layer layer = make_layer(config_of(2, 64)), untouched = make_layer(config_of(2, 64));
    layer.record_past(true), untouched.record_past(true);
    must(append(layer, k, k)), must(append(untouched, k, k));
    const LayerParts before = save(layer);
    const size_t bytes = layer.bytes();
    EXPECT_GT(fail_everywhere([&] { return layer.crop(length); },
                              [&] {
                                EXPECT_EQ(layer.bytes(), bytes);
                                EXPECT_EQ(difference(save(layer), before), "");
                              }),
              1);
    must(untouched.crop(length));
    must(append(layer, more, more)), must(append(untouched, more, more));
    EXPECT_EQ(difference(save(layer), save(untouched)), "");
  }
}

TEST(Memory, SaveAndLoadFailWithoutATrace) {
  Random random;
  for (const Case& c : cases()) {
    if (!c.held) continue;
    SCOPED_TRACE(c.name);
    const Array k = random_array(random, 1, 2, c.held, 64);
    Layer layer = layer_of(c, k);
    const LayerParts want = save(layer), other = save(layer_of(cases()[3], random_array(random, 1, 2, 9, 64)));
    LayerParts parts = other;
    const size_t bytes = layer.bytes();
    EXPECT_GT(fail_everywhere([&] { return layer.save(parts); },
                              [&] {
                                EXPECT_EQ(difference(parts, other), "");  // not half of a layer
                                EXPECT_EQ(layer.bytes(), bytes);
                              }),
              1);
    EXPECT_EQ(difference(parts, want), "");
    EXPECT_GT(fail_everywhere([&] { return Layer::load(layer.config(), parts).status(); }, [] {}), 4);
    EXPECT_EQ(difference(save(load(layer.config(), parts)), want), "");
  }
}

TEST(Memory, CCallsReportItToo) {
  halfbyte_config config = halfbyte_default_config();
  config.kv_heads = 1, config.head_dim_k = config.head_dim_v = 64;
  halfbyte_layer* layer = nullptr;
  auto status_of = [](halfbyte_status status) {
    return status == HALFBYTE_OK ? Status{}
                                 : Status{status == HALFBYTE_OUT_OF_MEMORY ? Code::out_of_memory : Code::bad_value, ""};
  };
  fail_everywhere([&] { return status_of(halfbyte_create(&config, &layer)); }, [&] { EXPECT_EQ(layer, nullptr); });
  ASSERT_NE(layer, nullptr);
  const std::vector<float> x(100 * 64, 1.0f);
  const halfbyte_view view = {x.data(), 6400, 6400, 64};
  fail_everywhere([&] { return status_of(halfbyte_append(layer, &view, &view, 1, 100, nullptr)); },
                  [&] { EXPECT_EQ(halfbyte_length(layer), 0u); });
  halfbyte_layer* copy = nullptr;
  fail_everywhere([&] { return status_of(halfbyte_copy(layer, &copy)); }, [&] { EXPECT_EQ(copy, nullptr); });
  EXPECT_EQ(halfbyte_length(copy), 100u);
  halfbyte_destroy(copy);
  halfbyte_destroy(layer);
}

}  // namespace
}  // namespace halfbyte
