// RawCache: the tuned baseline, K and V kept as given.
#include <cstring>

#include "huge_pages.h"
#include "tile.h"

namespace halfbyte {

using Bytes = std::vector<uint8_t, HugePages<uint8_t>>;

struct RawCache::State {
  int kv_heads, head_dim;
  Dtype dtype;
  int batch = 0;
  size_t length = 0, capacity = 0;
  Bytes k, v;  // [batch][kv_heads][capacity][head_dim]
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
    Bytes new_k(rows * capacity * row), new_v(rows * capacity * row);
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
