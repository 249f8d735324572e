// Layer::save and Layer::load: a layer's content as plain arrays and back. Nothing is decoded on the way.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <tuple>

#include "cache.h"

namespace halfbyte {
namespace {

using State = Layer::State;

// Far above any real ones; the products of counts up to these do not overflow.
constexpr uint64_t kLongest = (uint64_t)1 << 40;  // tokens
constexpr int kMostSequences = 1 << 20;

Status damaged(const std::string& what) { return {Code::bad_value, "the saved layer is damaged: " + what}; }

size_t raw_sinks(const State& s) { return std::min(s.sink_tokens(), s.length); }
size_t raw_tail(const State& s) { return s.length > s.packed_end ? s.length - s.packed_end : 0; }

// Pages that hold the packed tokens of one sequence.
size_t pages_each(const State& s) {
  return s.packed_end > s.sink_tokens() ? (s.packed_end + kPageTokens - 1) / kPageTokens - s.pages_dropped : 0;
}

// ---- save

// Zeroes what a page holds behind its first `used` tokens: leftovers of tokens that were cropped away.
void clear_behind(const State& s, uint8_t* page, size_t used) {
  auto clear_side = [&](Side side, uint8_t* codes, uint8_t* scales, int from) {
    const SideFormat& f = side == Side::k ? s.format.k : s.format.v;
    for (int token = from; token < kBlockTokens; token++) {
      for (int g = 0; g < f.n_groups; g++)
        memset(scales + g * scale_row_bytes(f) + token * f.scale_bytes, 0, f.scale_bytes);
      if (f.bits == kPlainBits) {
        memset(codes + (size_t)token * f.head_dim * 4, 0, f.head_dim * 4);
        continue;
      }
      for (int c = 0; c < f.padded_dim; c++) {
        CodePlace place = side == Side::k ? k_code_place(f.bits, token, c) : v_code_place(f.bits, token, c);
        codes[place.byte] &= f.bits == 4 ? (uint8_t)(0xf0 >> place.shift) : 0;
      }
    }
  };
  for (int head = 0; head < s.config.kv_heads; head++, page += page_head_bytes(s.format))
    for (int block = (int)(used / kBlockTokens); block < kPageBlocks; block++) {
      const int from = block == (int)(used / kBlockTokens) ? (int)(used % kBlockTokens) : 0;
      clear_side(Side::k, page + k_codes_at(s.format, block), page + k_scales_at(s.format, block), from);
      clear_side(Side::v, page + v_codes_at(s.format, block), page + v_scales_at(s.format, block), from);
    }
}

void save_pages(const State& s, LayerParts& out) {
  const size_t each = pages_each(s);
  std::map<std::pair<const uint8_t*, bool>, int32_t> number;  // the last page of a sequence may need clearing
  for (const std::vector<Page>& list : s.pages)
    for (size_t i = 0; i < each; i++) {
      const bool last = i + 1 == each;
      auto [at, fresh] = number.try_emplace({list[i].get(), last}, (int32_t)number.size());
      out.page_table.push_back(at->second);
      if (!fresh) continue;
      out.pages.insert(out.pages.end(), list[i].get(), list[i].get() + s.page_bytes());
      const size_t used = s.packed_end - (s.pages_dropped + i) * kPageTokens;
      if (used < kPageTokens) clear_behind(s, out.pages.data() + out.pages.size() - s.page_bytes(), used);
    }
}

// ---- load

Status check_counts(const State& s, const LayerParts& parts) {
  const uint64_t sink = s.sink_tokens(), window = (uint64_t)s.config.sliding_window;
  if (parts.batch < 1 || parts.batch > kMostSequences) return damaged("batch is " + std::to_string(parts.batch));
  if (parts.length < 1 || parts.length > kLongest) return damaged("length is " + std::to_string(parts.length));
  const uint64_t newest = std::max<uint64_t>(parts.length, sink);
  if (parts.packed_end < sink || parts.packed_end > newest || newest - parts.packed_end > s.tail_capacity())
    return damaged("packed_end is " + std::to_string(parts.packed_end) + " of " + std::to_string(parts.length) +
                   " tokens");
  const uint64_t oldest_needed = window && parts.length > window - 1 ? parts.length - (window - 1) : 0;
  if (parts.first > oldest_needed) return damaged("first is " + std::to_string(parts.first));
  if (parts.pages_dropped > std::min(parts.first, parts.packed_end) / kPageTokens || (parts.pages_dropped && !window))
    return damaged("pages_dropped is " + std::to_string(parts.pages_dropped));
  if (s.config.recipe.offset ? parts.packed_end > sink && !parts.offset_ready : !parts.offset_ready)
    return damaged("offset_ready does not fit the packed tokens");
  return {};
}

Status check_sizes(const State& s, const LayerParts& parts) {
  const size_t rows = (size_t)s.batch * s.config.kv_heads, raw = (raw_sinks(s) + raw_tail(s)) * s.element_bytes();
  const size_t offset_rows = s.config.recipe.offset && s.offset_ready ? rows : 0;
  const size_t dk = s.config.head_dim_k, dv = s.config.head_dim_v, heads = s.config.kv_heads;
  auto optional = [](const std::vector<float>& x, size_t n) { return x.empty() || x.size() == n; };
  struct Size {
    const char* name;
    bool fits;
  };
  for (Size size :
       {Size{"page_table", parts.page_table.size() == s.batch * pages_each(s)},
        Size{"pages", parts.pages.size() % s.page_bytes() == 0}, Size{"raw_k", parts.raw_k.size() == rows * raw * dk},
        Size{"raw_v", parts.raw_v.size() == rows * raw * dv},
        Size{"offset_k", parts.offset_k.size() == offset_rows * dk},
        Size{"offset_v", parts.offset_v.size() == offset_rows * dv},
        Size{"given_offset_k", optional(parts.given_offset_k, heads * dk)},
        Size{"given_offset_v", optional(parts.given_offset_v, heads * dv)},
        Size{"lambda_k", optional(parts.lambda_k, heads * dk)}, Size{"lambda_v", optional(parts.lambda_v, heads * dv)},
        Size{"rotation_k", optional(parts.rotation_k, dk * dk)},
        Size{"rotation_v", optional(parts.rotation_v, dv * dv)},
        Size{"frequencies",
             parts.frequencies.size() <= (s.config.recipe.offset && s.config.recipe.offset_span ? dk / 2 : 0)},
        Size{"counted", parts.counted.empty() || parts.counted.size() == s.batch * s.counted_tokens()}})
    if (!size.fits) return damaged(std::string(size.name) + " has another size than the layer");
  const size_t pages = parts.pages.size() / s.page_bytes();
  for (int32_t page : parts.page_table)
    if (page < 0 || (size_t)page >= pages) return damaged("page_table names a page that is not there");
  return {};
}

bool all_finite(const void* data, Dtype dtype, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!std::isfinite(load_element(data, dtype, i))) return false;
  return true;
}

bool page_is_finite(const State& s, const uint8_t* page) {
  auto side_is_finite = [](const SideFormat& f, const uint8_t* codes, const uint8_t* scales) {
    if (f.bits == kPlainBits) return all_finite(codes, Dtype::float32, code_bytes(f) / 4);
    return all_finite(scales, f.scale_bytes == 4 ? Dtype::float32 : Dtype::float16, (size_t)f.n_groups * kBlockTokens);
  };
  for (int head = 0; head < s.config.kv_heads; head++, page += page_head_bytes(s.format))
    for (int block = 0; block < kPageBlocks; block++)
      if (!side_is_finite(s.format.k, page + k_codes_at(s.format, block), page + k_scales_at(s.format, block)) ||
          !side_is_finite(s.format.v, page + v_codes_at(s.format, block), page + v_scales_at(s.format, block)))
        return false;
  return true;
}

Status check_values(const State& s, const LayerParts& parts) {
  for (size_t at = 0; at < parts.pages.size(); at += s.page_bytes())
    if (!page_is_finite(s, &parts.pages[at])) return damaged("a page holds a scale that is not finite");
  for (const auto* raw : {&parts.raw_k, &parts.raw_v})
    if (!all_finite(raw->data(), s.config.dtype, raw->size() / s.element_bytes()))
      return damaged("a raw token holds a value that is not finite");
  for (const auto* x : {&parts.offset_k, &parts.offset_v, &parts.given_offset_k, &parts.given_offset_v})
    if (!all_finite(x->data(), Dtype::float32, x->size())) return damaged("an offset holds a value that is not finite");
  if (!all_finite(parts.frequencies.data(), Dtype::float32, parts.frequencies.size()))
    return damaged("frequencies holds a value that is not finite");
  for (const auto* x : {&parts.lambda_k, &parts.lambda_v})
    for (float v : *x)
      if (!(v >= 1e-6f) || std::isinf(v)) return damaged("lambda holds a value below 1e-6 or not finite");
  return {};
}

Status load_rotations(State& s, const LayerParts& parts) {
  for (auto [name, matrix, plan] : {std::tuple{"rotation_k", &parts.rotation_k, &s.rotation_k},
                                    std::tuple{"rotation_v", &parts.rotation_v, &s.rotation_v}}) {
    if (matrix->empty()) return damaged(std::string(name) + " is missing");
    if (Status status = check_orthonormal(name, matrix->data(), plan->head_dim); !status.ok())
      return damaged(status.message());
    *plan = make_rotation(Rotation::dense, plan->head_dim, 0, 0, matrix->data());
  }
  return {};
}

void load_pages(State& s, const LayerParts& parts) {
  std::vector<Page> pages;
  for (size_t at = 0; at < parts.pages.size(); at += s.page_bytes()) {
    pages.push_back(make_page(s.page_bytes()));
    memcpy(pages.back().get(), &parts.pages[at], s.page_bytes());
  }
  const size_t each = pages_each(s);
  s.pages.resize(s.batch);
  for (size_t i = 0; i < parts.page_table.size(); i++) s.pages[i / each].push_back(pages[parts.page_table[i]]);
}

// Calls f(side, row, slot of the file, raw storage, slot in it) for every raw token. Sinks that a window has passed are
// zeros in the file, and held again until the next append.
template <class Raw, class F>
void for_raw(const State& s, Raw& sinks, Raw& tail, F f) {
  for (Side side : {Side::k, Side::v})
    for (int row = 0; row < s.batch * s.config.kv_heads; row++) {
      for (size_t t = 0; sinks.capacity && t < raw_sinks(s); t++) f(side, row, t, sinks, t);
      for (size_t t = 0; t < raw_tail(s); t++) f(side, row, raw_sinks(s) + t, tail, t);
    }
}

}  // namespace

Status Layer::save(LayerParts& parts) const try {
  const State& s = *state_;
  if (!s.length) return {Code::bad_argument, "an empty layer holds nothing to save"};
  LayerParts out;
  out.batch = s.batch, out.length = s.length, out.first = s.first;
  out.packed_end = s.packed_end, out.pages_dropped = s.pages_dropped, out.offset_ready = s.offset_ready;
  save_pages(s, out);
  const size_t raw = raw_sinks(s) + raw_tail(s);
  out.raw_k.resize(s.batch * s.config.kv_heads * raw * s.config.head_dim_k * s.element_bytes());
  out.raw_v.resize(s.batch * s.config.kv_heads * raw * s.config.head_dim_v * s.element_bytes());
  for_raw(s, s.sinks, s.tail, [&](Side side, int row, size_t at, const RawTokens& from, size_t slot) {
    const size_t bytes = s.head_dim(side) * s.element_bytes();
    memcpy(&(side == Side::k ? out.raw_k : out.raw_v)[(row * raw + at) * bytes],
           s.raw_at(from, side, row / s.config.kv_heads, row % s.config.kv_heads, slot), bytes);
  });
  out.offset_k = s.offset_k, out.offset_v = s.offset_v, out.given_offset_k = s.given_k, out.given_offset_v = s.given_v;
  out.lambda_k = s.lambda_k, out.lambda_v = s.lambda_v, out.counted = s.tail_counted;
  out.rotation_k = matrix_of(s.rotation_k), out.rotation_v = matrix_of(s.rotation_v);
  if (s.turn) out.frequencies = s.turn->frequencies, out.interleaved = s.turn->interleaved();
  parts = std::move(out);
  return {};
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

Result<Layer> Layer::load(const LayerConfig& config, const LayerParts& parts) try {
  Result<Layer> made = create(config);
  if (!made.ok()) return made;
  State& s = *made.value().state_;
  if (Status status = check_counts(s, parts); !status.ok()) return status;
  s.batch = parts.batch, s.length = parts.length, s.first = parts.first, s.chunk_start = parts.length;
  s.packed_end = parts.packed_end, s.pages_dropped = parts.pages_dropped, s.offset_ready = parts.offset_ready;
  if (Status status = check_sizes(s, parts); !status.ok()) return status;
  if (Status status = check_values(s, parts); !status.ok()) return status;
  if (config.recipe.lambda) {  // checked by now; set_lambda would refuse once tokens are packed
    if (parts.lambda_k.empty() || parts.lambda_v.empty()) return damaged("lambda is missing");
    s.lambda_k = parts.lambda_k, s.lambda_v = parts.lambda_v;
    s.inverse_lambda_k = inverse_of(s.lambda_k), s.inverse_lambda_v = inverse_of(s.lambda_v);
  }
  if (config.recipe.rotation == Rotation::dense)
    if (Status status = load_rotations(s, parts); !status.ok()) return status;
  if (config.recipe.offset) {
    s.offset_k = parts.offset_k, s.offset_v = parts.offset_v;
    s.given_k = parts.given_offset_k, s.given_v = parts.given_offset_v;
    if (!parts.frequencies.empty())
      s.turn = make_turn(config.recipe.offset_span, parts.frequencies.data(), (int)parts.frequencies.size(),
                         parts.interleaved);
  }
  s.tail_counted = parts.counted;
  load_pages(s, parts);
  s.tail = s.make_raw(s.tail_capacity());
  if (s.sink_tokens()) s.sinks = s.make_raw(s.sink_tokens());
  const size_t raw = raw_sinks(s) + raw_tail(s);
  for_raw(s, s.sinks, s.tail, [&](Side side, int row, size_t at, RawTokens& to, size_t slot) {
    const size_t bytes = s.head_dim(side) * s.element_bytes();
    memcpy(const_cast<uint8_t*>(s.raw_at(to, side, row / s.config.kv_heads, row % s.config.kv_heads, slot)),
           &(side == Side::k ? parts.raw_k : parts.raw_v)[(row * raw + at) * bytes], bytes);
  });
  return made;
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

}  // namespace halfbyte
