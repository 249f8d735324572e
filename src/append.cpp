// Layer::append: check, fix the offset, pack the blocks that are complete, keep the newest tokens raw.
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <type_traits>

#include "cache.h"
#include "encode.h"
#include "threads.h"

namespace halfbyte {
namespace {

// fp16 scales reach 65504 · 8; a vector of 512 channels, offset included, stays under it when each value does this.
constexpr float kLargestForHalfScales = 1e4f;
constexpr float kLargestForFloatScales = 1e15f;  // squares of 512 such channels, rotated, stay finite in float
constexpr float kLargestFloat = 3.4028235e38f;   // vectors kept as floats only have to be finite

using State = Layer::State;

struct Chunk {
  const View* k;
  const View* v;
  int batch;
  size_t tokens;
  const uint8_t* counted;
};

// Address of one token's vector, wherever it lies raw: in the chunk, in the tail, or among the sinks.
const uint8_t* find_raw(const State& s, const Chunk& chunk, Side side, int b, int head, size_t token) {
  if (token >= s.length)
    return row_of(side == Side::k ? *chunk.k : *chunk.v, s.element_bytes(), b, head, token - s.length);
  if (token < s.sink_tokens()) return s.raw_at(s.sinks, side, b, head, token);
  return s.raw_at(s.tail, side, b, head, token - s.packed_end);
}

// ---- checking

// Largest magnitude of d values as bits: for floats of one sign, bits order as values do, and NaN comes last.
template <class Bits>
Bits largest_bits(const uint8_t* row, int d) {
  constexpr Bits kMagnitude = (Bits)((Bits)-1 >> 1);
  constexpr int kParallel = 16;  // independent maxima, so that the compiler can use vectors
  std::make_signed_t<Bits> largest[kParallel] = {};
  const Bits* bits = reinterpret_cast<const Bits*>(row);
  int c = 0;
  for (; c + kParallel <= d; c += kParallel)
    for (int i = 0; i < kParallel; i++) {
      auto magnitude = (std::make_signed_t<Bits>)(bits[c + i] & kMagnitude);
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
  for (; c < d; c++) largest[0] = std::max(largest[0], (std::make_signed_t<Bits>)(bits[c] & kMagnitude));
  return (Bits)*std::max_element(largest, largest + kParallel);
}

float largest_of(const uint8_t* row, Dtype dtype, int d) {
  if (dtype == Dtype::float32) return bits_to_float(largest_bits<uint32_t>(row, d));
  uint16_t bits = largest_bits<uint16_t>(row, d);
  return dtype == Dtype::float16 ? half_to_float(bits) : bf16_to_float(bits);
}

const uint8_t* chunk_row(const State& s, const Chunk& chunk, Side side, int b, int head, size_t token) {
  return row_of(side == Side::k ? *chunk.k : *chunk.v, s.element_bytes(), b, head, token);
}

// Whether one head's new tokens can be coded; writes the position of the first that cannot.
bool head_is_codable(const State& s, const Chunk& chunk, Side side, int b, int head, float limit, size_t* where) {
  for (size_t t = 0; t < chunk.tokens; t++)
    if (!(largest_of(chunk_row(s, chunk, side, b, head, t), s.config.dtype, s.head_dim(side)) <= limit)) {
      *where = t;
      return false;
    }
  return true;
}

Status uncodable(const State& s, const Chunk& chunk, Side side, int b, int head, size_t t) {
  std::string where = std::string(side == Side::k ? "K" : "V") + " of sequence " + std::to_string(b) + ", head " +
                      std::to_string(head) + ", token " + std::to_string(s.length + t);
  float largest = largest_of(chunk_row(s, chunk, side, b, head, t), s.config.dtype, s.head_dim(side));
  if (!std::isfinite(largest)) return {Code::bad_value, where + " holds a NaN or an infinity; the cache is as before"};
  const char* range = s.config.recipe.scale_bits == 16 ? "16 codes values up to 10000, use scale_bits=32"
                                                       : "32 codes values up to 1e15";
  return {Code::bad_value,
          where + " holds " + std::to_string(largest) + ": scale_bits=" + range + "; the cache is as before"};
}

Status check_values(const State& s, const Chunk& chunk) {
  const float limit = s.largest_codable();
  const size_t heads = s.config.kv_heads, rows = 2 * heads * chunk.batch;
  std::atomic<bool> all_good = true;
  auto check = [&](size_t row, size_t* where) {
    const Side side = row % 2 ? Side::v : Side::k;
    return head_is_codable(s, chunk, side, (int)(row / 2 / heads), (int)(row / 2 % heads), limit, where);
  };
  auto quick = [&](size_t row) {
    size_t where;
    if (!check(row, &where)) all_good = false;
  };
  if (chunk.tokens < 64) {  // a decode step: not worth waking threads for
    for (size_t row = 0; row < rows; row++) quick(row);
  } else {
    parallel_for(rows, std::ref(quick));
  }
  for (size_t row = 0, where = 0; !all_good && row < rows; row++)
    if (!check(row, &where))
      return uncodable(s, chunk, row % 2 ? Side::v : Side::k, (int)(row / 2 / heads), (int)(row / 2 % heads), where);
  return {};
}

Status check_shape(const State& s, const Chunk& chunk) {
  if (!chunk.k->data || !chunk.v->data) return {Code::bad_argument, "append needs the addresses of K and V"};
  if (chunk.batch < 1) return {Code::bad_argument, "batch is " + std::to_string(chunk.batch) + "; it takes 1 or more"};
  if (s.batch && chunk.batch != s.batch)
    return {Code::bad_argument, "batch is " + std::to_string(chunk.batch) + ", but the cache holds " +
                                    std::to_string(s.batch) + " sequences"};
  if (s.config.recipe.lambda && (s.lambda_k.empty() || s.lambda_v.empty()))
    return {Code::bad_argument, "the recipe uses lambda, and set_lambda was not called"};
  if (s.config.recipe.rotation == Rotation::dense && (s.rotation_k.matrix.empty() || s.rotation_v.matrix.empty()))
    return {Code::bad_argument, "the recipe's rotation is dense, and set_rotation was not called for K and V"};
  return {};
}

// ---- the offset

bool is_counted(const State& s, const Chunk& chunk, int b, size_t token) {
  if (token < s.length) return s.tail_counted.empty() || s.tail_counted[s.tail_counted.size() / s.batch * b + token];
  return !chunk.counted || chunk.counted[(size_t)b * chunk.tokens + (token - s.length)];
}

void add_row(const uint8_t* row, Dtype dtype, int d, float* sum) {
  if (dtype == Dtype::float32) {
    for (int c = 0; c < d; c++) sum[c] += reinterpret_cast<const float*>(row)[c];
    return;
  }
  const auto* bits = reinterpret_cast<const uint16_t*>(row);
  if (dtype == Dtype::bfloat16)
    for (int c = 0; c < d; c++) sum[c] += bf16_to_float(bits[c]);
  else
    for (int c = 0; c < d; c++) sum[c] += half_to_float(bits[c]);
}

// mu of one sequence and head: the mean over the tokens held now, or the first offset_tokens of them, turned back if it
// turns; padding is left out unless there is nothing else.
void mean_of_head(const State& s, const Chunk& chunk, Side side, int b, int head, float* mu) {
  constexpr size_t kRun = kPageTokens;  // tokens summed in float before they join the double sums
  const Turn* turn = side == Side::k ? s.turn.get() : nullptr;
  const size_t run_tokens = turn ? (size_t)turn->span : kRun;
  const int d = s.head_dim(side);
  const size_t held = s.length + chunk.tokens, total = s.warm_up() ? std::min(held, s.warm_up()) : held;
  double sum[kMaxHeadDim] = {};
  size_t n = 0;
  for (bool all : {false, true}) {
    for (size_t from = 0; from < total; from += run_tokens) {
      float run[kMaxHeadDim] = {};
      for (size_t t = from; t < std::min(from + run_tokens, total); t++) {
        if (!all && !is_counted(s, chunk, b, t)) continue;
        add_row(find_raw(s, chunk, side, b, head, t), s.config.dtype, d, run);
        n++;
      }
      if (turn) add_turned_back(*turn, run, d, turn->span_of(from), sum);
      for (int c = 0; !turn && c < d; c++) sum[c] += run[c];
    }
    if (n) break;
  }
  for (int c = 0; c < d; c++) mu[c] = (float)(sum[c] / (double)n);
}

struct Offset {
  std::vector<float> k, v;  // [batch][kv_heads][head_dim]
};

Offset make_offset(const State& s, const Chunk& chunk) {
  auto fill = [&](Side side, const std::vector<float>& given) {
    const size_t d = s.head_dim(side), heads = s.config.kv_heads;
    std::vector<float> mu(chunk.batch * heads * d);
    auto fill_row = [&](size_t row) {
      const size_t head = row % heads;
      if (given.empty())
        mean_of_head(s, chunk, side, (int)(row / heads), (int)head, &mu[row * d]);
      else
        std::copy_n(&given[head * d], d, &mu[row * d]);
    };
    parallel_for(chunk.batch * heads, std::ref(fill_row));
    return mu;
  };
  return {fill(Side::k, s.given_k), fill(Side::v, s.given_v)};
}

// Which of the tokens that can ever be raw with nothing packed count for the offset: [batch][counted_tokens].
std::vector<uint8_t> counted_with(const State& s, const Chunk& chunk) {
  const size_t tokens = s.counted_tokens(),
               seen = std::min(s.length + chunk.tokens, s.warm_up() ? s.warm_up() : tokens);
  std::vector<uint8_t> counted((size_t)chunk.batch * tokens, 1);
  for (int b = 0; b < chunk.batch; b++)
    for (size_t t = 0; t < seen; t++) counted[(size_t)b * tokens + t] = is_counted(s, chunk, b, t);
  return counted;
}

// ---- packing

// For each sequence, the first one whose tokens are all the same: beam search hands a prompt over once for every beam.
std::vector<int> first_twins(const State& s, const Chunk& chunk) {
  auto same = [&](int a, int b) {
    if (chunk.counted && memcmp(chunk.counted + a * chunk.tokens, chunk.counted + b * chunk.tokens, chunk.tokens))
      return false;
    for (size_t t = 0; t < chunk.tokens; t++)
      for (int head = 0; head < s.config.kv_heads; head++)
        for (Side side : {Side::k, Side::v})
          if (memcmp(chunk_row(s, chunk, side, a, head, t), chunk_row(s, chunk, side, b, head, t),
                     s.head_dim(side) * s.element_bytes()))
            return false;
    return true;
  };
  std::vector<int> first(chunk.batch);
  for (int b = 0; b < chunk.batch; b++) {
    first[b] = b;
    for (int a = 0; a < b && s.length == 0 && first[b] == b; a++)
      if (first[a] == a && same(a, b)) first[b] = a;
  }
  return first;
}

// Pages that this append will write: new ones, and own copies of shared ones. Throws std::bad_alloc before any change.
// dropped: how many pages before them there are none of.
std::vector<std::vector<Page>> pages_for(const State& s, const std::vector<int>& twins, size_t dropped, size_t from,
                                         size_t to) {
  std::vector<std::vector<Page>> pages = s.pages;
  size_t spare = s.spare.size();  // taken from the back; append forgets them once nothing can fail
  auto take_page = [&] { return spare ? s.spare[--spare] : make_page(s.page_bytes()); };
  pages.resize(twins.size());
  if (from == to) return pages;
  for (size_t b = 0; b < pages.size(); b++) {
    std::vector<Page>& list = pages[b];
    if (twins[b] != (int)b) {
      list = pages[twins[b]];
      continue;
    }
    const size_t first_written = from / kPageTokens - dropped;
    // use_count 2: the state's list and this copy of it.
    if (first_written < list.size() && list[first_written].use_count() > 2) {
      Page own = take_page();
      memcpy(own.get(), list[first_written].get(), s.page_bytes());
      list[first_written] = own;
    }
    const size_t needed = (to + kPageTokens - 1) / kPageTokens - dropped;
    if (list.size() >= needed) continue;
    const size_t held = list.size();
    list.reserve(needed);
    while (spare && list.size() < needed) list.push_back(take_page());
    make_pages(list, needed - list.size(), s.page_bytes());
    // Kernels read whole blocks; what they mask must be numbers.
    for (size_t i = held; i < needed; i++) memset(list[i].get(), 0, s.page_bytes());
  }
  return pages;
}

// Packs tokens [from, to) of one block: K or V of one sequence and head.
void pack_block(State& s, const Chunk& chunk, Side side, int b, int head, size_t from, size_t to,
                MovingOffset& offset) {
  const SideFormat& format = side == Side::k ? s.format.k : s.format.v;
  uint8_t* page = s.page_head(b, from, head);
  const int block = (int)(from % kPageTokens / kBlockTokens);
  EncodeArgs args{&format,
                  side == Side::k ? &s.rotation_k : &s.rotation_v,
                  side,
                  s.config.dtype,
                  {},
                  (int)(to - from),
                  (int)(from % kBlockTokens),
                  offset.at(from),
                  s.lambda_of(side, head, false),
                  page + (side == Side::k ? k_codes_at(s.format, block) : v_codes_at(s.format, block)),
                  page + (side == Side::k ? k_scales_at(s.format, block) : v_scales_at(s.format, block))};
  for (size_t t = from; t < to; t++) args.rows[t - from] = find_raw(s, chunk, side, b, head, t);
  encode_block(args);
}

void pack(State& s, const Chunk& chunk, const std::vector<int>& twins, size_t from, size_t to) {
  if (from == to) return;
  const size_t heads = (size_t)chunk.batch * s.config.kv_heads;
  const size_t first_block = from / kBlockTokens, blocks = (to - 1) / kBlockTokens + 1 - first_block;
  constexpr size_t kBlocksEach = 8;  // blocks a task
  const size_t parts = (blocks + kBlocksEach - 1) / kBlocksEach;
  auto pack_part = [&](size_t task) {
    const int b = (int)(task / parts / s.config.kv_heads), head = (int)(task / parts % s.config.kv_heads);
    if (twins[b] != b) return;  // on the pages of another
    const size_t begin = first_block + task % parts * kBlocksEach,
                 end = std::min(begin + kBlocksEach, first_block + blocks);
    MovingOffset offset_k(s, Side::k, b, head), offset_v(s, Side::v, b, head);
    for (size_t block = begin; block < end; block++) {
      const size_t lo = std::max(from, block * kBlockTokens), hi = std::min(to, (block + 1) * kBlockTokens);
      pack_block(s, chunk, Side::k, b, head, lo, hi, offset_k);
      pack_block(s, chunk, Side::v, b, head, lo, hi, offset_v);
    }
  };
  parallel_for(heads * parts, std::ref(pack_part));  // std::ref: a std::function of it needs no memory
}

// Fills raw storage with tokens [from, to), slot 0 = `from`.
void copy_raw(const State& s, const Chunk& chunk, size_t from, size_t to, RawTokens& out) {
  for (Side side : {Side::k, Side::v})
    for (int b = 0; b < chunk.batch; b++)
      for (int head = 0; head < s.config.kv_heads; head++)
        for (size_t t = from; t < to; t++) {
          auto* slot = const_cast<uint8_t*>(s.raw_at(out, side, b, head, t - from));
          memcpy(slot, find_raw(s, chunk, side, b, head, t), s.head_dim(side) * s.element_bytes());
        }
}

// Adds this chunk's tokens to the tail in place: the decode step's usual case, in which nothing is packed.
void extend_tail(State& s, const Chunk& chunk, size_t from) {
  for (Side side : {Side::k, Side::v})
    for (int b = 0; b < chunk.batch; b++)
      for (int head = 0; head < s.config.kv_heads; head++)
        for (size_t t = std::max(from, s.length); t < s.length + chunk.tokens; t++) {
          auto* slot = const_cast<uint8_t*>(s.raw_at(s.tail, side, b, head, t - s.packed_end));
          memcpy(slot, find_raw(s, chunk, side, b, head, t), s.head_dim(side) * s.element_bytes());
        }
}

// Raw copies of what an append of several tokens is about to pack, as far as a crop may come back for it.
constexpr size_t kUndoTokens = 64;

void keep_undo(const State& s, const Chunk& chunk, size_t packed_from, size_t packed_end, RawTokens& undo,
               size_t& start) {
  const size_t length = s.length + chunk.tokens;
  start = std::max(packed_from, s.raw_start(length > kUndoTokens + 1 ? length - kUndoTokens - 1 : 0));
  if (!s.record_past || chunk.tokens == 1 || start >= packed_end) return;
  undo = s.make_raw(packed_end - start);
  copy_raw(s, chunk, start, packed_end, undo);
}

// The first token that a query at `position` sees, as far as it is still held.
size_t first_seen(const State& s, size_t position) {
  const size_t window = (size_t)s.config.sliding_window;
  if (!window || s.record_past) return s.first;
  return std::max(s.first, position > window - 1 ? position - (window - 1) : 0);
}

void drop_behind_window(State& s) {
  if (!s.config.sliding_window || s.record_past) return;
  s.first = first_seen(s, s.length);
  if (s.offset_ready && s.first >= s.sink_tokens()) s.sinks = {};
  const size_t gone = std::min(s.first, s.packed_end) / kPageTokens;
  if (gone <= s.pages_dropped) return;
  for (std::vector<Page>& list : s.pages) {
    const size_t n = std::min(list.size(), gone - s.pages_dropped);
    for (size_t i = 0; i < n; i++) recycle(s.spare, std::move(list[i]));
    list.erase(list.begin(), list.begin() + n);
  }
  s.pages_dropped = gone;
}

}  // namespace

float Layer::State::largest_codable() const {
  if (format.k.bits == kPlainBits) return kLargestFloat;
  return config.recipe.scale_bits == 16 ? kLargestForHalfScales : kLargestForFloatScales;
}

Status Layer::append(const View& k, const View& v, int batch, size_t tokens, const uint8_t* counted,
                     bool answered) try {
  State& s = *state_;
  const Chunk chunk{&k, &v, batch, tokens, counted};
  if (Status status = check_shape(s, chunk); !status.ok()) return status;
  if (tokens == 0) return {};
  if (Status status = check_values(s, chunk); !status.ok()) return status;
  const size_t length = s.length + tokens, sink = s.sink_tokens();
  // A block that crop left half packed is filled up packed; then whole blocks go, as far as the rule has raw tokens.
  const size_t filled = (s.packed_end + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  const size_t packed_end = std::max(std::min(filled, std::max(length, sink)), s.raw_start(length - 1));
  const size_t packed_from = s.packed_end;
  // What no query will see of a first chunk is never packed; of a later one it is, and goes at the end.
  const size_t skipped = answered && !s.length ? std::min(first_seen(s, length), packed_end) / kPageTokens : 0;
  const size_t dropped = std::max(skipped, s.pages_dropped), pack_from = std::max(packed_from, dropped * kPageTokens);
  const size_t capacity = s.tail_capacity();
  if (!s.batch) s.batch = batch;  // make_raw sizes by it
  RawTokens sinks, tail, before, undo;
  size_t undo_start = 0;
  const bool moves = packed_end != packed_from || !s.tail.capacity;
  if (moves) tail = s.make_raw(capacity);
  if (sink && s.length < sink) sinks = s.make_raw(sink);
  // Only queries of several tokens look back at the tail as it was.
  const bool keep_before = tokens > 1 && s.length > packed_from;
  if (keep_before && !moves) before = s.tail;
  keep_undo(s, chunk, filled, packed_end, undo, undo_start);
  const std::vector<int> twins = first_twins(s, chunk);
  std::vector<std::vector<Page>> pages = pages_for(s, twins, dropped, pack_from, packed_end);
  std::vector<uint8_t> counted_so_far;
  if (!s.offset_ready) counted_so_far = counted_with(s, chunk);
  const bool fixes_offset = packed_end != packed_from && !s.offset_ready;
  Offset offset;
  if (fixes_offset) offset = make_offset(s, chunk);
  // Nothing below allocates.
  if (!s.offset_ready) s.tail_counted.swap(counted_so_far);
  if (fixes_offset) s.offset_k.swap(offset.k), s.offset_v.swap(offset.v), s.offset_ready = true;
  s.pages.swap(pages);
  pages.clear();
  while (!s.spare.empty() && s.spare.back().use_count() > 1) s.spare.pop_back();  // those that s.pages took
  drop_behind_window(s);
  s.pages_dropped = std::max(s.pages_dropped, skipped);
  pack(s, chunk, twins, pack_from, packed_end);
  if (sinks.capacity) {
    copy_raw(s, chunk, 0, std::min(sink, length), sinks);
    s.sinks = std::move(sinks);
  }
  s.before = {};
  if (moves) {
    if (length > packed_end) copy_raw(s, chunk, packed_end, length, tail);
    if (keep_before) before = std::move(s.tail);
    s.tail = std::move(tail);
  } else {
    extend_tail(s, chunk, packed_end);
  }
  s.before = std::move(before);
  s.undo = std::move(undo), s.undo_start = undo_start;
  s.before_start = std::min(packed_from, s.length);
  if (packed_from % kBlockTokens) s.before_start = std::min(filled, length);  // those tokens exist packed only
  s.chunk_start = s.length;
  s.packed_end = packed_end;
  s.length = length;
  if (answered) drop_behind_window(s);
  return {};
} catch (const std::bad_alloc&) {
  if (!state_->length) state_->batch = 0;
  return out_of_memory();
}

}  // namespace halfbyte
