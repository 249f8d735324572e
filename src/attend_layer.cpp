// Layer::attend and RawCache::attend: which rows see which tokens, the split over threads, and the merge.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>

#include "attend.h"
#include "cache.h"
#include "threads.h"

namespace halfbyte {
namespace {

constexpr size_t kSmallestSplit = 512;  // tokens that are worth a task of their own
constexpr size_t kTasksAThread = 8;     // tasks so many that it does not matter who gets the last one
constexpr size_t kPagesACall = 1024;    // pages that a kernel call is told of
constexpr size_t kExactSplit = 4096;    // tokens of a task where results may not depend on the number of tasks

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

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
  Floats k, v;             // one block, decoded
  std::vector<const uint8_t*> pages;
  Floats partial_max, partial_sum, partial_acc;  // of a call whose tokens are split: see run

  size_t bytes() const {
    return q.bytes() + rotated.bytes() + acc.bytes() + k.bytes() + v.bytes() + pages.capacity() * sizeof(pages[0]);
  }
};

Scratch& scratch() {
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

Status check(const AttendArgs& args, int kv_heads, size_t length, int batch) {
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

void load_queries(const Tile& tile) {
  const Plan& plan = tile.plan;
  const View& view = plan.args.q;
  for (int r = 0; r < tile.n; r++) {
    ptrdiff_t at =
        tile.b * view.batch_stride + tile.query_head(r) * view.head_stride + tile.query(r) * view.token_stride;
    float* q = tile.q + r * plan.q_stride();
    for (int c = 0; c < plan.head_dim_k; c++) q[c] = load_element(view.data, plan.dtype, at + c) * plan.args.scale;
    std::fill(q + plan.head_dim_k, q + plan.q_stride(), 0.0f);
  }
}

void start(Softmax& state, int rows) {
  std::fill_n(state.max, rows, kNothing);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.acc, rows * state.acc_stride, 0.0f);
}

// What the rows of a tile see inside tokens [begin, end), given each query's own [lo, hi).
template <class Lo, class Hi>
Visible visible_rows(const Tile& tile, size_t begin, size_t end, Lo lo, Hi hi) {
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
bool narrow(const Visible& visible, size_t& begin, size_t& end) {
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
void attend_rows(Tile& tile, const Rows& rows, size_t begin, size_t end, Lo lo) {
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

void store_row(const Tile& tile, int r, float max, float sum, const float* acc) {
  const Plan& plan = tile.plan;
  const MutableView& out = plan.args.out;
  if (plan.args.sinks) {  // one more logit in the denominator
    const float sink = plan.args.sinks[tile.query_head(r)], top = std::max(max, sink);
    sum = sum * std::exp(max - top) + std::exp(sink - top);
    max -= top;
  } else {
    max = 0.0f;
  }
  const float norm = sum > 0.0f ? std::exp(max) / sum : 0.0f;  // a row that sees nothing gives zeros
  ptrdiff_t at = tile.b * out.batch_stride + tile.query_head(r) * out.head_stride + tile.query(r) * out.token_stride;
  for (int c = 0; c < plan.head_dim_v; c++) store_element(out.data, plan.dtype, at + c, acc[c] * norm);
}

// ---------------------------------------------------------------------------------------------- splitting and merging

// In how many parts to cut the tokens of each tile: as few as give every thread the same number of tasks, or many.
size_t splits_of(size_t tiles, size_t threads, size_t packed_tokens) {
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

void merge_splits(const Plan& plan, const Cut& cut, const Partials& partials) {
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
Status run(const Plan& plan, size_t packed_tokens, AttendTile attend_tile) try {
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
void share(const Plan& plan, size_t split, size_t splits, size_t unit, size_t& begin, size_t& end) {
  if (plan.args.exact) {
    begin = std::max(begin, split * kExactSplit), end = std::min(end, (split + 1) * kExactSplit);
    return;
  }
  const size_t first = begin / unit, units = (end + unit - 1) / unit - first;
  const size_t lo = (first + units * split / splits) * unit, hi = (first + units * (split + 1) / splits) * unit;
  begin = std::max(begin, lo), end = std::min(end, hi);
}

// ---------------------------------------------------------------------------------------------- packed layers

using State = Layer::State;

// First token that this query sees raw: its own block's start, but not below what still exists raw.
size_t raw_from(const State& s, const Plan& plan, int query) {
  const size_t p = plan.position(query), kept = plan.args.queries == 1 ? s.packed_end : s.before_start;
  return std::max(s.raw_start(p), std::min(kept, p + 1));
}

// Rotates rows [n][stride] in place; the kernel takes a block of them.
void rotate_rows(const RotationPlan& plan, bool inverse, float* x, size_t stride, int n) {
  for (int r = 0; r < n; r += kBlockTokens)
    current_backend().rotate(plan, inverse, x + r * stride, stride, std::min(n - r, kBlockTokens));
}

// Λ⁻¹ R q for the kernels, and q·mu.
void rotate_queries(const State& s, const Tile& tile, float* rotated, float* q_offset) {
  const Plan& plan = tile.plan;
  const int d = plan.head_dim_k, padded = s.format.k.padded_dim;
  const float* mu = s.offset_of(Side::k, tile.b, tile.head);
  const float* inverse_lambda = s.lambda_of(Side::k, tile.head, true);
  for (int r = 0; r < tile.n; r++) {
    const float* q = tile.q + r * plan.q_stride();
    float dot = 0.0f;
    for (int c = 0; mu && c < d; c++) dot += q[c] * mu[c];
    q_offset[r] = dot;
    std::copy_n(q, d, rotated + r * padded);
    std::fill(rotated + r * padded + d, rotated + (r + 1) * padded, 0.0f);
  }
  rotate_rows(s.rotation_k, false, rotated, padded, tile.n);
  for (int r = 0; inverse_lambda && r < tile.n; r++)
    for (int c = 0; c < d; c++) rotated[r * padded + c] *= inverse_lambda[c];
}

// Σ p ŷ → Rᵀ Λ⁻¹ Σ p ŷ + mu Σ p.
void leave_code_domain(const State& s, Tile& tile) {
  const int d = tile.plan.head_dim_v;
  const float* mu = s.offset_of(Side::v, tile.b, tile.head);
  const float* inverse_lambda = s.lambda_of(Side::v, tile.head, true);
  Softmax& state = tile.state;
  for (int r = 0; inverse_lambda && r < tile.n; r++)
    for (int c = 0; c < d; c++) state.acc[r * state.acc_stride + c] *= inverse_lambda[c];
  rotate_rows(s.rotation_v, true, state.acc, state.acc_stride, tile.n);
  for (int r = 0; mu && r < tile.n; r++)
    for (int c = 0; c < d; c++) state.acc[r * state.acc_stride + c] += mu[c] * state.sum[r];
}

// Packed tokens [begin, end) block by block as they decode: queries and weights keep their float32.
void attend_decoded(const State& s, Tile& tile, size_t begin, size_t end, const Visible& visible) {
  const Plan& plan = tile.plan;
  float* k = scratch().k.take(kBlockTokens * plan.head_dim_k);
  float* v = scratch().v.take(kBlockTokens * plan.head_dim_v);
  for (size_t block = begin / kBlockTokens * kBlockTokens; block < end; block += kBlockTokens) {
    decode_tokens(s, Side::k, tile.b, tile.head, block, k);
    decode_tokens(s, Side::v, tile.b, tile.head, block, v);
    current_backend().attend_raw(
        {Dtype::float32, plan.head_dim_k, plan.head_dim_v, k, v, plan.head_dim_k, plan.head_dim_v, block,
         std::max(begin, block), std::min(end, block + kBlockTokens), tile.q, plan.q_stride(), visible, true},
        tile.state);
  }
}

void attend_packed_part(const State& s, Tile& tile, size_t split, size_t splits) {
  const Plan& plan = tile.plan;
  size_t begin = s.sink_tokens(), end = s.packed_end;
  auto packed_until = [&](int query) { return raw_from(s, plan, query); };
  Visible whole = visible_rows(tile, begin, end, [](int) { return 0; }, packed_until);
  if (!narrow(whole, begin, end)) return;
  share(plan, split, splits, kPageTokens, begin, end);
  if (begin >= end) return;
  Visible visible = visible_rows(tile, begin, end, [](int) { return 0; }, packed_until);
  if (plan.args.exact || s.format.k.bits == kPlainBits) {
    attend_decoded(s, tile, begin, end, visible);
    return;
  }
  float q_offset[kMaxRows];
  float* rotated = scratch().rotated.take((size_t)tile.n * s.format.k.padded_dim);
  rotate_queries(s, tile, rotated, q_offset);
  std::vector<const uint8_t*>& pages = scratch().pages;
  for (size_t from = begin / kPageTokens * kPageTokens; from < end; from += kPagesACall * kPageTokens) {
    const size_t to = std::min(end, from + kPagesACall * kPageTokens);
    pages.clear();
    for (size_t token = from; token < to; token += kPageTokens) pages.push_back(s.page_head(tile.b, token, tile.head));
    current_backend().attend_packed(
        {&s.format, pages.data(), from, std::max(begin, from), to, rotated, q_offset, visible}, tile.state);
  }
  leave_code_domain(s, tile);
}

// The block that the newest tokens began in the middle of: its raw tokens of the old tail and of the chunk, side by
// side.
struct JoinedBlock {
  alignas(64) uint8_t k[kBlockTokens * kMaxHeadDim * sizeof(float)], v[kBlockTokens * kMaxHeadDim * sizeof(float)];
};

Rows join(const State& s, const Tile& tile, size_t from, size_t to, JoinedBlock& out) {
  const AttendArgs& args = tile.plan.args;
  for (Side side : {Side::k, Side::v}) {
    const size_t bytes = s.head_dim(side) * s.element_bytes();
    for (size_t t = from; t < to; t++)
      memcpy((side == Side::k ? out.k : out.v) + (t - from) * bytes,
             t < s.chunk_start ? s.raw_at(s.before, side, tile.b, tile.head, t - s.before_start)
                               : row_of(side == Side::k ? args.chunk_k : args.chunk_v, s.element_bytes(), tile.b,
                                        tile.head, t - s.chunk_start),
             bytes);
  }
  return {s.config.dtype, out.k, out.v, s.head_dim(Side::k), s.head_dim(Side::v), from};
}

// Sinks, then the newest tokens: from the tail for one query, from the old tail and the chunk for several.
void attend_raw_parts(const State& s, Tile& tile) {
  const AttendArgs& args = tile.plan.args;
  const size_t sink = std::min(s.sink_tokens(), s.length);
  auto stored = [&](const RawTokens& raw, size_t first) {
    return Rows{s.config.dtype,
                s.raw_at(raw, Side::k, tile.b, tile.head, 0),
                s.raw_at(raw, Side::v, tile.b, tile.head, 0),
                s.head_dim(Side::k),
                s.head_dim(Side::v),
                first};
  };
  auto from_own_block = [&](int query) { return raw_from(s, tile.plan, query); };
  if (sink) attend_rows(tile, stored(s.sinks, 0), 0, sink, [](int) { return 0; });
  if (args.queries == 1) {
    if (s.packed_end < s.length)
      attend_rows(tile, stored(s.tail, s.packed_end), s.packed_end, s.length, from_own_block);
    return;
  }
  size_t chunk_from = std::max(s.chunk_start, sink);
  if (s.before_start < s.chunk_start) {
    const size_t block = s.chunk_start / kBlockTokens * kBlockTokens, from = std::max(s.before_start, block);
    if (s.before_start < block)
      attend_rows(tile, stored(s.before, s.before_start), s.before_start, block, from_own_block);
    if (from < s.chunk_start) {
      JoinedBlock joined;
      chunk_from = std::min(s.length, block + kBlockTokens);
      attend_rows(tile, join(s, tile, from, chunk_from, joined), from, chunk_from, from_own_block);
    }
  }
  const Rows chunk = {s.config.dtype,
                      row_of(args.chunk_k, s.element_bytes(), tile.b, tile.head, 0),
                      row_of(args.chunk_v, s.element_bytes(), tile.b, tile.head, 0),
                      args.chunk_k.token_stride,
                      args.chunk_v.token_stride,
                      s.chunk_start};
  if (chunk_from < s.length) attend_rows(tile, chunk, chunk_from, s.length, from_own_block);
}

}  // namespace

size_t attend_scratch_bytes() { return scratch().bytes(); }

Status Layer::attend(const AttendArgs& args) {
  const State& s = *state_;
  if (Status status = check(args, s.config.kv_heads, s.length, s.batch); !status.ok()) return status;
  if (args.queries > 1) {
    if (!args.chunk_k.data || !args.chunk_v.data)
      return {Code::bad_argument, "attend with queries > 1 needs chunk_k and chunk_v, their tokens' raw K and V"};
    if (s.chunk_start + args.queries != s.length)
      return {Code::bad_argument, "queries is " + std::to_string(args.queries) + ", but the last append held " +
                                      std::to_string(s.length - s.chunk_start) + " tokens"};
  }
  const Plan plan{args,
                  s.config.dtype,
                  s.batch,
                  s.config.kv_heads,
                  s.config.head_dim_k,
                  s.config.head_dim_v,
                  s.length,
                  s.first,
                  (size_t)s.config.sliding_window};
  return run(plan, packed_tokens(), [&](Tile& tile, size_t split, size_t splits) {
    attend_packed_part(s, tile, split, splits);
    if (split == 0) attend_raw_parts(s, tile);
  });
}

// ---------------------------------------------------------------------------------------------- the raw baseline

struct RawCache::State {
  int kv_heads, head_dim;
  Dtype dtype;
  int batch = 0;
  size_t length = 0, capacity = 0;
  std::vector<uint8_t> k, v;  // [batch][kv_heads][capacity][head_dim]
  size_t head_bytes() const { return capacity * head_dim * dtype_bytes(dtype); }
};

RawCache::RawCache(int kv_heads, int head_dim, Dtype dtype)
    : state_(new State{kv_heads, head_dim, dtype, 0, 0, 0, {}, {}}) {}
RawCache::~RawCache() = default;
size_t RawCache::length() const { return state_->length; }
size_t RawCache::bytes() const { return state_->k.capacity() + state_->v.capacity(); }

Status RawCache::append(const View& k, const View& v, int batch, size_t tokens) try {
  State& s = *state_;
  if (s.batch && batch != s.batch) return {Code::bad_argument, "batch is " + std::to_string(batch) + ", not as before"};
  s.batch = batch;
  const size_t row = s.head_dim * dtype_bytes(s.dtype), rows = (size_t)batch * s.kv_heads;
  if (s.length + tokens > s.capacity) {
    const size_t capacity = std::max(s.length + tokens, 2 * s.length);
    std::vector<uint8_t> new_k(rows * capacity * row), new_v(rows * capacity * row);
    for (size_t i = 0; i < rows && s.length; i++) {
      memcpy(&new_k[i * capacity * row], &s.k[i * s.head_bytes()], s.length * row);
      memcpy(&new_v[i * capacity * row], &s.v[i * s.head_bytes()], s.length * row);
    }
    s.k.swap(new_k), s.v.swap(new_v), s.capacity = capacity;
  }
  for (size_t i = 0; i < rows; i++)
    for (size_t t = 0; t < tokens; t++) {
      auto from = [&](const View& view) {
        ptrdiff_t at = (ptrdiff_t)(i / s.kv_heads) * view.batch_stride +
                       (ptrdiff_t)(i % s.kv_heads) * view.head_stride + (ptrdiff_t)t * view.token_stride;
        return static_cast<const uint8_t*>(view.data) + at * (ptrdiff_t)dtype_bytes(s.dtype);
      };
      memcpy(&s.k[i * s.head_bytes() + (s.length + t) * row], from(k), row);
      memcpy(&s.v[i * s.head_bytes() + (s.length + t) * row], from(v), row);
    }
  s.length += tokens;
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Status RawCache::attend(const AttendArgs& args) {
  const State& s = *state_;
  if (Status status = check(args, s.kv_heads, s.length, s.batch); !status.ok()) return status;
  const Plan plan{args, s.dtype, s.batch, s.kv_heads, s.head_dim, s.head_dim, s.length, 0, 0};
  return run(plan, s.length, [&](Tile& tile, size_t split, size_t splits) {
    size_t begin = 0, end = s.length;
    share(plan, split, splits, kBlockTokens, begin, end);
    const size_t at = ((size_t)tile.b * s.kv_heads + tile.head) * s.head_bytes();
    if (begin < end)
      attend_rows(tile, {s.dtype, &s.k[at], &s.v[at], s.head_dim, s.head_dim, 0}, begin, end, [](int) { return 0; });
  });
}

}  // namespace halfbyte
