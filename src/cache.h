// What one layer's cache holds: pages of packed blocks, and the tokens kept raw around them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend.h"
#include "numbers.h"

namespace halfbyte {

// Bytes of one page for all KV heads; shared between sequences until one of them writes.
using Page = std::shared_ptr<uint8_t>;
Page make_page(size_t bytes);  // throws std::bad_alloc
// Adds n pages. Many at once lie one after the other in huge pages, from where each gives its memory back by itself.
void make_pages(std::vector<Page>& pages, size_t n, size_t bytes);  // throws std::bad_alloc
void recycle(std::vector<Page>& spare, Page&& page);  // keeps a page that nobody else holds, if there is room

// Short enough to sit inside the string: reporting it needs no memory.
inline Status out_of_memory() { return {Code::out_of_memory, "out of memory"}; }

// Address of one vector of a view whose elements take `bytes`.
inline const uint8_t* row_of(const View& view, size_t bytes, int b, int head, size_t token) {
  ptrdiff_t at = b * view.batch_stride + head * view.head_stride + (ptrdiff_t)token * view.token_stride;
  return static_cast<const uint8_t*>(view.data) + at * (ptrdiff_t)bytes;
}

// K and V of a few tokens as they came: [batch][kv_heads][capacity][head_dim] each.
struct RawTokens {
  std::vector<uint8_t> k, v;
  size_t capacity = 0;
};

struct Layer::State {
  LayerConfig config;
  PageFormat format;
  RotationPlan rotation_k, rotation_v;
  int batch = 0;

  // Tokens [0, sink) raw in `sinks`; [sink, packed_end) packed; [packed_end, length) raw in `tail`, whose slot 0 is
  // token packed_end. Tokens below `first` have left a sliding window; once it has passed the sinks and the offset is
  // fixed, those are gone.
  size_t length = 0, first = 0, packed_end = 0;
  size_t pages_dropped = 0;              // whole pages gone from the front of every sequence
  std::vector<std::vector<Page>> pages;  // [batch]: page i starts at token (pages_dropped + i) · kPageTokens
  RawTokens sinks, tail;
  std::vector<Page> spare;  // reserved and not in use; its capacity is how many may wait here

  // The last append, if of several tokens. `before`: the tail before it, for its queries. `undo`, while record_past:
  // what it packed, as raw tokens [undo_start, packed_end), so that crop can go back inside it.
  RawTokens before, undo;
  size_t before_start = 0, chunk_start = 0, undo_start = 0;
  bool record_past = false;

  bool offset_ready = false;
  std::vector<float> offset_k, offset_v;  // [batch][kv_heads][head_dim], once ready
  std::vector<float> given_k, given_v;    // [kv_heads][head_dim]: set_offset's, or empty
  std::shared_ptr<const Turn> turn;       // by which offset_k turns from span to span; null: it does not
  std::vector<uint8_t> tail_counted;      // [batch][counted_tokens]: 0 for padding, which the offset leaves out
  std::vector<float> lambda_k, lambda_v, inverse_lambda_k, inverse_lambda_v;  // [kv_heads][head_dim] or empty

  size_t sink_tokens() const { return (size_t)config.recipe.sink_tokens; }
  size_t element_bytes() const { return dtype_bytes(config.dtype); }
  size_t page_bytes() const { return config.kv_heads * page_head_bytes(format); }
  int head_dim(Side side) const { return side == Side::k ? config.head_dim_k : config.head_dim_v; }

  // Tokens that stay raw until their mean is the offset.
  size_t warm_up() const {
    const bool wanted = config.recipe.offset && (given_k.empty() || given_v.empty());
    return wanted ? (size_t)config.recipe.offset_tokens : 0;
  }
  size_t tail_capacity() const {
    return kBlockTokens +
           (size_t)std::max(config.recipe.raw_window, config.recipe.offset ? config.recipe.offset_tokens : 0);
  }
  size_t counted_tokens() const { return tail_capacity() + sink_tokens(); }
  // First token, behind the sinks, that a query at `position` sees raw when raw values still exist.
  size_t raw_start(size_t position) const {
    if (position < warm_up()) return sink_tokens();
    size_t window = (size_t)config.recipe.raw_window;
    size_t block = position / kBlockTokens * kBlockTokens;
    return std::max(block > window ? block - window : 0, sink_tokens());
  }
  // Address of one raw token's vector.
  const uint8_t* raw_at(const RawTokens& raw, Side side, int b, int head, size_t slot) const {
    const std::vector<uint8_t>& data = side == Side::k ? raw.k : raw.v;
    return data.data() +
           (((size_t)b * config.kv_heads + head) * raw.capacity + slot) * head_dim(side) * element_bytes();
  }
  const float* offset_of(Side side, int b, int head) const {
    const std::vector<float>& data = side == Side::k ? offset_k : offset_v;
    return data.empty() ? nullptr : data.data() + ((size_t)b * config.kv_heads + head) * head_dim(side);
  }
  const float* lambda_of(Side side, int head, bool inverse) const {
    const std::vector<float>& data =
        side == Side::k ? (inverse ? inverse_lambda_k : lambda_k) : (inverse ? inverse_lambda_v : lambda_v);
    return data.empty() ? nullptr : data.data() + (size_t)head * head_dim(side);
  }
  uint8_t* page_head(int b, size_t token, int head) const {
    return pages[b][token / kPageTokens - pages_dropped].get() + head * page_head_bytes(format);
  }
  RawTokens make_raw(size_t capacity) const;
  float largest_codable() const;  // magnitude of a K, V or given offset
};

// The offset of one sequence and head, on its way along the tokens.
class MovingOffset {
 public:
  MovingOffset(const Layer::State& s, Side side, int b, int head)
      : turn_(side == Side::k ? s.turn.get() : nullptr), mu_(s.offset_of(side, b, head)), head_dim_(s.head_dim(side)) {}

  // [head_dim], or null where there is none; good until the next call.
  const float* at(size_t token) {
    if (!turn_ || !mu_) return mu_;
    const size_t span = turn_->span_of(token);
    if (span != span_) turn_offset(*turn_, mu_, head_dim_, span_ = span, turned_);
    return turned_;
  }

 private:
  const Turn* turn_;
  const float* mu_;
  int head_dim_;
  size_t span_ = (size_t)-1;
  alignas(64) float turned_[kMaxHeadDim];
};

inline std::vector<float> inverse_of(const std::vector<float>& x) {
  std::vector<float> out;
  for (float v : x) out.push_back(1.0f / v);
  return out;
}

// The packed block that starts at token `block`, as vectors [16][head_dim] in the original domain.
void decode_tokens(const Layer::State& s, Side side, int b, int head, size_t block, float* out);

}  // namespace halfbyte
