// Life of a layer's cache apart from append and attend: create, crop, select, copy, decode, count.
#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <set>
#include <tuple>

#include "decode.h"
#include "encode.h"
#include "huge_pages.h"
#include "threads.h"

namespace halfbyte {
namespace {

Status bad(std::string message) { return {Code::bad_argument, std::move(message)}; }

Status check_codec(const char* name, const Codec& codec) {
  if (codec.bits != 4 && codec.bits != 8 && codec.bits != kPlainBits)
    return bad(std::string(name) + "_bits is " + std::to_string(codec.bits) +
               "; it takes 4 or 8, which have kernels, or 32 (kept as floats)");
  if (codec.group != 0 && codec.group != 16 && codec.group != 32 && codec.group != 64)
    return bad(std::string(name) + "_group is " + std::to_string(codec.group) +
               "; it takes 16, 32, 64, or 0 for the whole vector");
  return {};
}

Status check_head_dim(const Recipe& recipe, const char* name, int d) {
  if (d < 16 || d > kMaxHeadDim || d % 2)
    return bad(std::string(name) + " is " + std::to_string(d) + "; it takes an even number from 16 to 512");
  if (recipe.rotation == Rotation::srht && (d & (d - 1)))
    return bad("rotation srht needs a power of two, and " + std::string(name) + " is " + std::to_string(d) +
               "; use srft");
  return {};
}

// Copies row i of `from` ([rows][bytes]) to row j of `to` for each rows[j] == i.
template <class T>
std::vector<T> gather(const std::vector<T>& from, const std::vector<size_t>& rows, size_t batch) {
  size_t each = from.size() / batch;
  std::vector<T> to;
  to.reserve(each * rows.size());
  for (size_t row : rows) to.insert(to.end(), from.begin() + row * each, from.begin() + (row + 1) * each);
  return to;
}

RawTokens gather(const RawTokens& from, const std::vector<size_t>& rows, size_t batch) {
  return {gather(from.k, rows, batch), gather(from.v, rows, batch), from.capacity};
}

// Before a crop to `length`: makes raw again what the newest append packed and the tokens up to `length` would have
// raw.
void restore_raw(Layer::State& s, size_t length) {
  const size_t raw_from = std::max(s.raw_start(length - 1), s.sink_tokens());
  if (!s.undo.capacity || raw_from < s.undo_start || raw_from >= s.packed_end || length <= raw_from) return;
  RawTokens tail = s.make_raw(s.tail_capacity());
  for (Side side : {Side::k, Side::v})
    for (int row = 0; row < s.batch * s.config.kv_heads; row++)
      for (size_t t = raw_from; t < length; t++) {
        const int b = row / s.config.kv_heads, head = row % s.config.kv_heads;
        const uint8_t* from = t < s.packed_end ? s.raw_at(s.undo, side, b, head, t - s.undo_start)
                                               : s.raw_at(s.tail, side, b, head, t - s.packed_end);
        memcpy(const_cast<uint8_t*>(s.raw_at(tail, side, b, head, t - raw_from)), from,
               s.head_dim(side) * s.element_bytes());
      }
  s.tail = std::move(tail);
  s.packed_end = raw_from;
}

// With nothing packed, the offset waits again for the first block that is.
void forget_offset(Layer::State& s) {
  if (!s.config.recipe.offset) return;
  s.offset_ready = false;
  s.offset_k = {}, s.offset_v = {};
  const size_t each = s.tail_counted.size() / s.batch;
  for (size_t i = 0; i < s.tail_counted.size(); i++)
    if (i % each >= s.length) s.tail_counted[i] = 1;
}

}  // namespace

Status Recipe::check(int head_dim) const {
  for (auto [name, codec] : {std::pair{"k", k}, std::pair{"v", v}})
    if (Status status = check_codec(name, codec); !status.ok()) return status;
  if ((k.bits == kPlainBits) != (v.bits == kPlainBits)) return bad("k_bits and v_bits take 32 together");
  if (k.bits == kPlainBits && (rotation != Rotation::identity || offset || lambda))
    return bad("bits of 32 take rotation identity, offset false and lambda false: nothing is coded");
  if (scale_bits != 16 && scale_bits != 32)
    return bad("scale_bits is " + std::to_string(scale_bits) + "; it takes 16 or 32");
  for (auto [name, tokens] : {std::pair{"sink_tokens", sink_tokens}, std::pair{"raw_window", raw_window},
                              std::pair{"offset_tokens", offset_tokens}})
    if (tokens < 0 || tokens % kBlockTokens)
      return bad(std::string(name) + " is " + std::to_string(tokens) + "; it takes a multiple of 16");
  if (offset_span != 0 && offset_span != kBlockTokens && offset_span != kPageTokens)
    return bad("offset_span is " + std::to_string(offset_span) + "; it takes 16, 64, or 0 for an offset that is fixed");
  return check_head_dim(*this, "head_dim", head_dim);
}

Page make_page(size_t bytes) {
  constexpr std::align_val_t kLine{64};
  auto* data = static_cast<uint8_t*>(::operator new(bytes, kLine));
  return {data, [](uint8_t* p) { ::operator delete(p, kLine); }};
}

void make_pages(std::vector<Page>& pages, size_t n, size_t bytes) {
  pages.reserve(pages.size() + n);
  if (n * bytes < kHugePage) {
    while (n--) pages.push_back(make_page(bytes));
    return;
  }
  const std::shared_ptr<void> piece(allocate_huge(n * bytes), std::free);
  for (size_t i = 0; i < n; i++) {
    auto give_back = [piece, bytes](uint8_t* page) {
      if (piece.use_count() > 1) forget_memory(page, bytes);  // the last page frees the piece
    };
    pages.emplace_back(static_cast<uint8_t*>(piece.get()) + i * bytes, give_back);
  }
}

void recycle(std::vector<Page>& spare, Page&& page) {
  if (page.use_count() == 1 && spare.size() < spare.capacity()) spare.push_back(std::move(page));
}

RawTokens Layer::State::make_raw(size_t capacity) const {
  size_t rows = (size_t)batch * config.kv_heads * capacity * element_bytes();
  return {std::vector<uint8_t>(rows * config.head_dim_k), std::vector<uint8_t>(rows * config.head_dim_v), capacity};
}

Layer::Layer() : state_(std::make_unique<State>()) {}
Layer::~Layer() = default;
Layer::Layer(Layer&&) noexcept = default;
Layer& Layer::operator=(Layer&&) noexcept = default;

Result<Layer> Layer::create(const LayerConfig& config) try {
  if (config.kv_heads < 1) return bad("kv_heads is " + std::to_string(config.kv_heads) + "; it takes 1 or more");
  if (config.sliding_window < 0 || config.sliding_window == 1)
    return bad("sliding_window is " + std::to_string(config.sliding_window) + "; it takes 0 (none) or 2 and more");
  for (int d : {config.head_dim_k, config.head_dim_v})
    if (Status status = config.recipe.check(d); !status.ok()) return status;
  Layer layer;
  State& s = *layer.state_;
  s.config = config;
  s.format = make_page_format(config.recipe, config.head_dim_k, config.head_dim_v);
  s.rotation_k = make_rotation(config.recipe.rotation, config.head_dim_k, config.recipe.seed, config.layer_index);
  s.rotation_v = make_rotation(config.recipe.rotation, config.head_dim_v, config.recipe.seed, config.layer_index);
  s.packed_end = s.sink_tokens();
  s.offset_ready = !config.recipe.offset;
  return layer;
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

void Layer::reset() {  // allocates nothing: it cannot fail
  State& s = *state_;
  State fresh;
  fresh.config = s.config, fresh.format = s.format, fresh.record_past = s.record_past;
  fresh.packed_end = s.sink_tokens();
  fresh.offset_ready = !s.config.recipe.offset;
  fresh.rotation_k = std::move(s.rotation_k), fresh.rotation_v = std::move(s.rotation_v);
  fresh.turn = std::move(s.turn);
  for (std::vector<Page>& list : s.pages)
    for (Page& page : list) recycle(s.spare, std::move(page));
  fresh.spare = std::move(s.spare);
  for (auto member : {&State::given_k, &State::given_v, &State::lambda_k, &State::lambda_v, &State::inverse_lambda_k,
                      &State::inverse_lambda_v})
    fresh.*member = std::move(s.*member);
  s = std::move(fresh);
}

Status Layer::crop(size_t length) {
  State& s = *state_;
  if (length >= s.length) return {};
  if (length == 0) {
    reset();
    return {};
  }
  // The next query, at `length`, sees window − 1 tokens before itself: those must still be held.
  if (s.first > 0 && length < s.first + s.config.sliding_window - 1)
    return bad("crop to " + std::to_string(length) + " tokens, but a sliding layer has dropped the tokens before " +
               std::to_string(s.first) + ", which the next query would see; call record_past first");
  try {
    restore_raw(s, length);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
  s.length = length;
  // Codes stay codes: what is left of a packed block whose raw values are gone is never unpacked.
  s.packed_end = std::max(std::min(s.packed_end, length), s.sink_tokens());
  s.chunk_start = length;
  s.before = {}, s.undo = {};
  if (s.packed_end == s.sink_tokens()) forget_offset(s);
  size_t pages_kept = (s.packed_end + kPageTokens - 1) / kPageTokens;
  const size_t kept = std::max(pages_kept, s.pages_dropped) - s.pages_dropped;
  for (auto& list : s.pages)
    for (; list.size() > kept; list.pop_back()) recycle(s.spare, std::move(list.back()));
  return {};
}

Status Layer::select(const std::vector<size_t>& rows) {
  State& s = *state_;
  for (size_t row : rows)
    if (row >= (size_t)s.batch)
      return bad("select asks for sequence " + std::to_string(row) + " of " + std::to_string(s.batch));
  if (rows.empty()) return bad("select needs one sequence or more");
  try {
    std::vector<std::vector<Page>> pages;
    for (size_t row : rows) pages.push_back(s.pages[row]);
    RawTokens sinks = gather(s.sinks, rows, s.batch), tail = gather(s.tail, rows, s.batch);
    std::vector<float> offset_k = gather(s.offset_k, rows, s.batch), offset_v = gather(s.offset_v, rows, s.batch);
    std::vector<uint8_t> counted = gather(s.tail_counted, rows, s.batch);
    s.pages.swap(pages);
    s.sinks = std::move(sinks), s.tail = std::move(tail), s.before = {}, s.undo = {}, s.chunk_start = s.length;
    s.offset_k.swap(offset_k), s.offset_v.swap(offset_v), s.tail_counted.swap(counted);
    s.batch = (int)rows.size();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
  return {};
}

Status Layer::copy_from(const Layer& other) {
  try {
    state_ = std::make_unique<State>(*other.state_);
    state_->spare = {};  // the other's to use
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
  return {};
}

Status Layer::reserve(int batch, size_t tokens) try {
  State& s = *state_;
  if (batch < 1) return bad("batch is " + std::to_string(batch) + "; it takes 1 or more");
  // A window lies anywhere on the pages, and the page that grows is one more.
  const size_t window = (size_t)s.config.sliding_window;
  const size_t held = window ? std::min(tokens, window + 2 * kPageTokens) : tokens;
  const size_t pages = (size_t)batch * ((held + kPageTokens - 1) / kPageTokens);
  std::vector<Page> spare;
  make_pages(spare, pages, s.page_bytes());
  s.spare = std::move(spare);
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Status Layer::set_offset(const float* k, const float* v) try {
  State& s = *state_;
  auto given = [&](const float* from, int d, const std::vector<float>& before) {
    return from ? std::vector<float>(from, from + (size_t)s.config.kv_heads * d) : before;
  };
  if (!s.config.recipe.offset) return bad("set_offset on a recipe without offset");
  if (s.packed_end > s.sink_tokens()) return bad("set_offset after tokens were packed; set it before");
  const float limit = s.largest_codable();
  for (auto [from, d] : {std::pair{k, s.config.head_dim_k}, std::pair{v, s.config.head_dim_v}})
    for (int i = 0; from && i < s.config.kv_heads * d; i++)
      if (!(std::abs(from[i]) <= limit))
        return {Code::bad_value, "the offset holds " + std::to_string(from[i]) + "; it takes values up to " +
                                     std::to_string((int64_t)limit)};
  std::vector<float> given_k = given(k, s.config.head_dim_k, s.given_k),
                     given_v = given(v, s.config.head_dim_v, s.given_v);
  s.given_k.swap(given_k), s.given_v.swap(given_v);
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Status Layer::set_lambda(const float* k, const float* v) try {
  State& s = *state_;
  if (!s.config.recipe.lambda) return bad("set_lambda on a recipe without lambda");
  if (s.packed_end > s.sink_tokens()) return bad("set_lambda after tokens were packed; set it before");
  for (auto [from, d] : {std::pair{k, s.config.head_dim_k}, std::pair{v, s.config.head_dim_v}})
    for (int i = 0; from && i < s.config.kv_heads * d; i++)
      if (!(from[i] >= 1e-6f) || std::isinf(from[i])) return bad("lambda holds a value below 1e-6 or not finite");
  for (auto [from, d, lambda, inverse] : {std::tuple{k, s.config.head_dim_k, &s.lambda_k, &s.inverse_lambda_k},
                                          std::tuple{v, s.config.head_dim_v, &s.lambda_v, &s.inverse_lambda_v}}) {
    if (!from) continue;
    std::vector<float> given(from, from + (size_t)s.config.kv_heads * d), inverse_given = inverse_of(given);
    lambda->swap(given), inverse->swap(inverse_given);
  }
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Status Layer::set_rotation(const float* k, const float* v) try {
  State& s = *state_;
  if (s.config.recipe.rotation != Rotation::dense) return bad("set_rotation on a recipe whose rotation is not dense");
  if (s.packed_end > s.sink_tokens()) return bad("set_rotation after tokens were packed; set it before");
  RotationPlan plan_k = s.rotation_k, plan_v = s.rotation_v;
  for (auto [name, from, plan] : {std::tuple{"k", k, &plan_k}, std::tuple{"v", v, &plan_v}}) {
    if (!from) continue;
    if (Status status = check_orthonormal(name, from, plan->head_dim); !status.ok()) return status;
    *plan = make_rotation(Rotation::dense, plan->head_dim, 0, 0, from);
  }
  std::swap(s.rotation_k, plan_k), std::swap(s.rotation_v, plan_v);
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Status Layer::set_frequencies(const float* frequencies, int pairs, bool interleaved) try {
  State& s = *state_;
  if (!s.config.recipe.offset || !s.config.recipe.offset_span)
    return bad("set_frequencies on a recipe without offset, or whose offset_span is 0");
  if (s.packed_end > s.sink_tokens()) return bad("set_frequencies after tokens were packed; set it before");
  if (pairs < 0 || pairs > s.config.head_dim_k / 2)
    return bad("pairs is " + std::to_string(pairs) + "; it takes 0 to " + std::to_string(s.config.head_dim_k / 2));
  for (int i = 0; i < pairs; i++)
    if (!std::isfinite(frequencies[i])) return bad("frequencies holds a value that is not finite");
  s.turn = pairs ? make_turn(s.config.recipe.offset_span, frequencies, pairs, interleaved) : nullptr;
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

void decode_tokens(const Layer::State& s, Side side, int b, int head, size_t block, float* out) {
  const bool k = side == Side::k;
  MovingOffset offset(s, side, b, head);
  const uint8_t* page = s.page_head(b, block, head);
  const int at = (int)(block % kPageTokens / kBlockTokens);
  decode_block({k ? &s.format.k : &s.format.v, k ? &s.rotation_k : &s.rotation_v, side, offset.at(block),
                s.lambda_of(side, head, true), page + (k ? k_codes_at(s.format, at) : v_codes_at(s.format, at)),
                page + (k ? k_scales_at(s.format, at) : v_scales_at(s.format, at)), out});
}

Status Layer::decode(float* k_out, float* v_out) const try {
  const State& s = *state_;
  const size_t visible = s.length - s.first, sink = std::min(s.sink_tokens(), s.length);
  auto decode_head = [&](size_t task) {
    const Side side = task % 2 ? Side::v : Side::k;
    const int row = (int)(task / 2), b = row / s.config.kv_heads, head = row % s.config.kv_heads, d = s.head_dim(side);
    float* out = (side == Side::k ? k_out : v_out) + (size_t)row * visible * d;
    auto raw = [&](const RawTokens& tokens, size_t from, size_t to, size_t slot0) {
      for (size_t t = std::max(from, s.first); t < to; t++)
        for (int c = 0; c < d; c++)
          out[(t - s.first) * d + c] = load_element(s.raw_at(tokens, side, b, head, t - slot0), s.config.dtype, c);
    };
    raw(s.sinks, 0, sink, 0);
    alignas(64) float block[kBlockTokens * kMaxHeadDim];
    for (size_t t = std::max(s.sink_tokens(), s.first) / kBlockTokens * kBlockTokens; t < s.packed_end;
         t += kBlockTokens) {
      decode_tokens(s, side, b, head, t, block);
      for (size_t i = std::max(t, s.first); i < std::min(t + kBlockTokens, s.packed_end); i++)
        std::copy_n(&block[(i - t) * d], d, &out[(i - s.first) * d]);
    }
    raw(s.tail, s.packed_end, s.length, s.packed_end);
  };
  parallel_for((size_t)s.batch * s.config.kv_heads * 2, std::ref(decode_head));
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

size_t Layer::bytes() const {
  const State& s = *state_;
  std::set<const uint8_t*> unique;
  size_t total = 0;
  for (const auto& list : s.pages) {
    total += list.capacity() * sizeof(Page);
    for (const Page& page : list) unique.insert(page.get());
  }
  total += (unique.size() + s.spare.size()) * s.page_bytes() + s.spare.capacity() * sizeof(Page);
  for (const RawTokens* raw : {&s.sinks, &s.tail, &s.before, &s.undo}) total += raw->k.capacity() + raw->v.capacity();
  for (const auto* numbers : {&s.offset_k, &s.offset_v, &s.given_k, &s.given_v, &s.lambda_k, &s.lambda_v,
                              &s.inverse_lambda_k, &s.inverse_lambda_v, &s.rotation_k.matrix, &s.rotation_v.matrix})
    total += numbers->capacity() * sizeof(float);
  if (s.turn) total += s.turn->frequencies.capacity() * sizeof(float);
  return total + s.tail_counted.capacity();
}

void Layer::record_past(bool on) { state_->record_past = on; }
const LayerConfig& Layer::config() const { return state_->config; }
size_t Layer::length() const { return state_->length; }
size_t Layer::first() const { return state_->first; }
size_t Layer::visible() const { return state_->length - state_->first; }
size_t Layer::packed_tokens() const {
  size_t from = std::max(state_->sink_tokens(), state_->pages_dropped * kPageTokens);
  return state_->packed_end > from ? state_->packed_end - from : 0;
}
int Layer::batch() const { return state_->batch; }
bool Layer::has_offset() const { return state_->offset_ready && state_->config.recipe.offset; }

}  // namespace halfbyte
