// How one call of attend is cut into tiles of rows and splits of tokens, run on threads, and merged: what Layer::attend
// and RawCache::attend share.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <new>
#include <vector>

#include "attend.h"
#include "cache.h"
#include "threads.h"

namespace halfbyte {

constexpr size_t kSmallestSplit = 512;  // tokens that are worth a task of their own
constexpr size_t kTasksAThread = 8;     // tasks so many that it does not matter who gets the last one
constexpr size_t kPagesACall = 128;     // pages that a kernel call is told of, and the offsets of their spans
constexpr size_t kExactSplit = 4096;    // tokens of a task where results may not depend on the number of tasks

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Floats that start on a cache line; they grow and stay.
class Floats {
 public:
  float* take(size_t n) {
    if (n > lines_.size() * kLine) lines_.resize((n + kLine - 1) / kLine);
    return lines_.empty() ? nullptr : lines_[0].x;
  }
  size_t bytes() const { return lines_.capacity() * sizeof(Line); }

 private:
  static constexpr size_t kLine = 16;
  struct alignas(64) Line {
    float x[kLine];
  };
  std::vector<Line> lines_;
};

// Working memory of one thread, kept between calls so that a decoding step allocates nothing.
struct Scratch {
  Floats q, rotated, acc;  // [rows of a tile][channels]
  Floats offsets, phases;  // of an offset that turns: [rows of a tile][spans], [sixteens of spans][2][pairs]
  Floats k, v;             // one block, decoded
  std::vector<const uint8_t*> pages;
  Floats partial_max, partial_sum, partial_acc;  // of a call whose tokens are split: see run

  size_t bytes() const {
    return q.bytes() + rotated.bytes() + acc.bytes() + offsets.bytes() + phases.bytes() + k.bytes() + v.bytes() +
           pages.capacity() * sizeof(pages[0]);
  }
};

inline Scratch& scratch() {
  thread_local Scratch of_this_thread;
  return of_this_thread;
}

// What is common to all tasks of one call. Rows of one (sequence, KV head): query-major, its query heads inside.
struct Plan {
  const AttendArgs& args;
  Dtype dtype;
  int batch, kv_heads, head_dim_k, head_dim_v;
  size_t length, first;  // tokens seen; oldest held
  size_t sliding_window;

  int group() const { return args.heads / kv_heads; }
  int rows() const { return group() * args.queries; }
  size_t position(int query) const { return length - args.queries + query; }
  size_t q_stride() const { return round_up(head_dim_k, 16); }
  size_t acc_stride() const { return round_up(head_dim_v, kSpan); }
  size_t mask_first() const { return args.mask ? length - args.mask_tokens : 0; }

  // [lo, hi) that a query may see at all.
  size_t lo(int query) const {
    if (args.mask) return std::max(first, mask_first());
    size_t p = position(query);
    return sliding_window && p + 1 > sliding_window ? std::max(first, p + 1 - sliding_window) : first;
  }
  size_t hi(int query) const { return args.mask || !args.causal ? length : position(query) + 1; }
};

inline Status check(const AttendArgs& args, int kv_heads, size_t length, int batch) {
  auto bad = [](std::string message) { return Status{Code::bad_argument, std::move(message)}; };
  if (!batch || !length) return bad("attend on an empty cache; append first");
  if (args.heads < 1 || args.heads % kv_heads)
    return bad("heads is " + std::to_string(args.heads) + "; it takes a multiple of kv_heads, " +
               std::to_string(kv_heads));
  if (args.queries < 1 || (size_t)args.queries > length)
    return bad("queries is " + std::to_string(args.queries) + "; the cache holds " + std::to_string(length) +
               " tokens");
  if (args.mask && args.mask_tokens > length)
    return bad("mask_tokens is " + std::to_string(args.mask_tokens) + "; the cache holds " + std::to_string(length));
  if (!args.q.data || !args.out.data) return bad("attend needs the addresses of q and out");
  if (!std::isfinite(args.scale)) return bad("scale is " + std::to_string(args.scale) + "; it takes a finite number");
  if (!(args.softcap >= 0.0f && std::isfinite(args.softcap)))
    return bad("softcap is " + std::to_string(args.softcap) + "; it takes a positive number, or 0 for none");
  return {};
}

// Rows [first_row, first_row + n) of one (sequence, KV head), with their running softmax in the original domain.
struct Tile {
  const Plan& plan;
  int b, head, first_row, n;
  float* q;  // [n][q_stride]: q · scale
  Softmax state;

  int query(int r) const { return (first_row + r) / plan.group(); }
  int query_head(int r) const { return head * plan.group() + (first_row + r) % plan.group(); }
};

inline void load_queries(const Tile& tile) {
  const Plan& plan = tile.plan;
  const View& view = plan.args.q;
  for (int r = 0; r < tile.n; r++) {
    ptrdiff_t at =
        tile.b * view.batch_stride + tile.query_head(r) * view.head_stride + tile.query(r) * view.token_stride;
    float* q = tile.q + r * plan.q_stride();
    load_elements(view.data, plan.dtype, at, plan.head_dim_k, plan.args.scale, q);
    std::fill(q + plan.head_dim_k, q + plan.q_stride(), 0.0f);
  }
}

// Kernels that round queries to bytes would make a number of a query that is none: its row is NaN.
inline void spoil_undefined(Tile& tile) {
  for (int r = 0; r < tile.n; r++) {
    const float* q = tile.q + r * tile.plan.q_stride();
    int32_t largest = 0;  // bits of magnitudes order as they do, infinity and NaN last
    for (int c = 0; c < tile.plan.head_dim_k; c++)
      largest = std::max(largest, std::bit_cast<int32_t>(q[c]) & 0x7fffffff);
    if (largest >= 0x7f800000) tile.state.sum[r] = NAN;
  }
}

inline void start(Softmax& state, int rows) {
  std::fill_n(state.max, rows, kNothing);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.acc, rows * state.acc_stride, 0.0f);
}

// What the rows of a tile see inside tokens [begin, end), given each query's own [lo, hi).
template <class Lo, class Hi>
inline Visible visible_rows(const Tile& tile, size_t begin, size_t end, Lo lo, Hi hi) {
  const Plan& plan = tile.plan;
  Visible visible;
  visible.rows = tile.n;
  visible.mask_first = plan.mask_first();
  visible.softcap = plan.args.softcap;
  for (int r = 0; r < tile.n; r++) {
    const int query = tile.query(r);
    visible.lo[r] = std::max({begin, plan.lo(query), (size_t)lo(query)});
    visible.hi[r] = std::max(visible.lo[r], std::min({end, plan.hi(query), (size_t)hi(query)}));
    visible.mask[r] = plan.args.mask
                          ? plan.args.mask + tile.b * plan.args.mask_batch_stride + query * plan.args.mask_query_stride
                          : nullptr;
  }
  return visible;
}

// Narrows [begin, end) to what any row sees; false when that is nothing.
inline bool narrow(const Visible& visible, size_t& begin, size_t& end) {
  size_t lo = end, hi = begin;
  for (int r = 0; r < visible.rows; r++)
    if (visible.lo[r] < visible.hi[r]) lo = std::min(lo, visible.lo[r]), hi = std::max(hi, visible.hi[r]);
  begin = lo, end = hi;
  return lo < hi;
}

// K and V of consecutive tokens as numbers; row 0 is token `first`.
struct Rows {
  Dtype dtype;
  const void* k;
  const void* v;
  ptrdiff_t k_stride, v_stride;  // elements
  size_t first;
};

// Attends to tokens [begin, end) of `rows`.
template <class Lo>
inline void attend_rows(Tile& tile, const Rows& rows, size_t begin, size_t end, Lo lo) {
  const Plan& plan = tile.plan;
  const size_t run_begin = begin;
  Visible visible = visible_rows(tile, begin, end, lo, [&](int) { return end; });
  if (!narrow(visible, begin, end)) return;
  // Exact: one block a call, so that a row's sums run in the same order whatever else the call holds.
  if (plan.args.exact) begin = std::max(run_begin, begin / kBlockTokens * kBlockTokens);
  for (size_t t = begin, next; t < end; t = next) {
    next = plan.args.exact ? std::min(end, (t / kBlockTokens + 1) * kBlockTokens) : end;
    current_backend().attend_raw(
        {rows.dtype, plan.head_dim_k, plan.head_dim_v, rows.k, rows.v, rows.k_stride, rows.v_stride, rows.first, t,
         next, tile.q, plan.q_stride(), visible, plan.args.exact},
        tile.state);
  }
}

inline void store_row(const Tile& tile, int r, float max, float sum, const float* acc) {
  const Plan& plan = tile.plan;
  const MutableView& out = plan.args.out;
  if (plan.args.sinks) {  // one more logit in the denominator
    const float sink = plan.args.sinks[tile.query_head(r)], top = std::max(max, sink);
    sum = sum * std::exp(max - top) + std::exp(sink - top);
    max -= top;
  } else {
    max = 0.0f;
  }
  const float norm = sum == 0.0f ? 0.0f : std::exp(max) / sum;  // a row that sees nothing gives zeros
  ptrdiff_t at = tile.b * out.batch_stride + tile.query_head(r) * out.head_stride + tile.query(r) * out.token_stride;
  store_elements(acc, norm, plan.head_dim_v, out.data, plan.dtype, at);
}

// ---------------------------------------------------------------------------------------------- splitting and merging

// In how many parts to cut the tokens of each tile: as few as give every thread the same number of tasks, or many.
inline size_t splits_of(size_t tiles, size_t threads, size_t packed_tokens) {
  const size_t most = std::max<size_t>(1, packed_tokens / kSmallestSplit);
  size_t splits = 1;
  while (splits < most && tiles * splits % threads && tiles * splits < kTasksAThread * threads) splits++;
  return splits;
}

// How rows and tokens of one call are cut into tasks: tiles of `rows` rows, times splits.
struct Cut {
  int parts, rows;
  size_t tiles, splits, acc_size;

  Cut(const Plan& plan, size_t packed_tokens) {
    const int step = current_backend().rows, most = kMaxRows / step * step;
    parts = (plan.rows() + most - 1) / most;
    rows = std::min(most, (int)round_up((plan.rows() + parts - 1) / parts, step));
    tiles = (size_t)plan.batch * plan.kv_heads * parts;
    // Exact: the same cuts whatever the threads and the queries.
    splits = plan.args.exact ? plan.length / kExactSplit + 1 : splits_of(tiles, (size_t)num_threads(), packed_tokens);
    acc_size = (size_t)rows * plan.acc_stride();
  }

  Tile tile(const Plan& plan, size_t i, float* q, float* acc) const {
    const int first_row = (int)(i % parts) * rows;
    return {plan,
            (int)(i / parts / plan.kv_heads),
            (int)(i / parts % plan.kv_heads),
            first_row,
            std::min(rows, plan.rows() - first_row),
            q,
            {{}, {}, acc, plan.acc_stride()}};
  }
};

// Partial results of all tasks: maxima and sums [tiles][splits][rows], accumulators [tiles][splits][rows][acc_stride].
struct Partials {
  float *max, *sum, *acc;
};

inline void merge_splits(const Plan& plan, const Cut& cut, const Partials& partials) {
  for (size_t i = 0; i < cut.tiles; i++) {
    Tile tile = cut.tile(plan, i, nullptr, nullptr);
    for (int r = 0; r < tile.n; r++) {
      const size_t at = i * cut.splits * cut.rows + r;
      float* acc = partials.acc + i * cut.splits * cut.acc_size + r * plan.acc_stride();
      for (size_t split = 1; split < cut.splits; split++)
        merge_softmax(partials.max[at], partials.sum[at], acc, partials.max[at + split * cut.rows],
                      partials.sum[at + split * cut.rows], acc + split * cut.acc_size, plan.head_dim_v);
      store_row(tile, r, partials.max[at], partials.sum[at], acc);
    }
  }
}

// Runs attend_tile(tile, split, splits) for every tile of rows and every split of the tokens, then merges and stores.
template <class AttendTile>
inline Status run(const Plan& plan, size_t packed_tokens, AttendTile attend_tile) try {
  const Cut cut(plan, packed_tokens);
  const size_t tasks = cut.tiles * cut.splits;
  const bool split = cut.splits > 1;
  Scratch& own = scratch();
  const Partials partials = {own.partial_max.take(split ? tasks * cut.rows : 0),
                             own.partial_sum.take(split ? tasks * cut.rows : 0),
                             own.partial_acc.take(split ? tasks * cut.acc_size : 0)};
  std::atomic<bool> failed = false;
  auto attend_task = [&](size_t task) {
    try {
      Scratch& here = scratch();
      float* acc = split ? partials.acc + task * cut.acc_size : here.acc.take(cut.acc_size);
      Tile tile = cut.tile(plan, task / cut.splits, here.q.take(cut.rows * plan.q_stride()), acc);
      if (tile.n <= 0) return;
      load_queries(tile);
      start(tile.state, tile.n);
      attend_tile(tile, task % cut.splits, cut.splits);
      spoil_undefined(tile);
      for (int r = 0; r < tile.n; r++) {
        if (split) {
          partials.max[task * cut.rows + r] = tile.state.max[r];
          partials.sum[task * cut.rows + r] = tile.state.sum[r];
        } else {
          store_row(tile, r, tile.state.max[r], tile.state.sum[r], acc + r * plan.acc_stride());
        }
      }
    } catch (const std::bad_alloc&) {  // a task may not throw: its thread could be a worker
      failed = true;
    }
  };
  parallel_for(tasks, std::ref(attend_task));
  if (failed) return out_of_memory();
  if (split) merge_splits(plan, cut, partials);
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

// The split's share of [begin, end), cut where `unit` divides.
inline void share(const Plan& plan, size_t split, size_t splits, size_t unit, size_t& begin, size_t& end) {
  if (plan.args.exact) {
    begin = std::max(begin, split * kExactSplit), end = std::min(end, (split + 1) * kExactSplit);
    return;
  }
  const size_t first = begin / unit, units = (end + unit - 1) / unit - first;
  const size_t lo = (first + units * split / splits) * unit, hi = (first + units * (split + 1) / splits) * unit;
  begin = std::max(begin, lo), end = std::min(end, hi);
}

}  // namespace halfbyte
