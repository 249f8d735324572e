// Steps of one token in a layer whose length is on the device, against the CPU's double-precision reference.
#pragma once

#include "attend_case.h"

namespace halfbyte {

// A layer's storage on the device, filled with what a layer of the CPU has saved, and the three calls of a step.
class StepLayer {
 public:
  StepLayer(const Case& c, const LayerParts& parts, int64_t capacity, bool portable)
      : c_(c),
        described_(layer_of(c)),
        capacity_(capacity),
        k_tables_(described_, c.head_dim, false, offset_of(parts.offset_k), some_lambda(c, 1)),
        v_tables_(described_, c.head_dim, true, offset_of(parts.offset_v), some_lambda(c, 2)),
        cells_(first_cells(parts)),
        table_(page_places()),
        pool_(pages_of(parts)),
        sinks_k_(raw(parts.raw_k, parts, true)),
        sinks_v_(raw(parts.raw_v, parts, true)),
        tail_k_(raw(parts.raw_k, parts, false)),
        tail_v_(raw(parts.raw_v, parts, false)),
        waves_(waves_of(c, capacity)),
        span_mu_(std::vector<float>(c.pairs ? rows() * c.head_dim * span_count() : 0)),
        span_rotated_(std::vector<float>(c.pairs ? rows() * c.head_dim * span_count() : 0)),
        weights_(std::vector<float>(c.batch * weight_stride(), 1.0f)),
        arrivals_(std::vector<int32_t>(c.batch * c.heads, 0)),
        space_(std::vector<uint8_t>(describe(portable), 0xff)) {
    attend_.space = space_.get();
  }
  StepLayer(const StepLayer&) = delete;

  std::vector<int64_t> cells() const { return cells_.values(); }
  std::vector<uint8_t> pages() const { return pool_.values(); }

  // [batch][heads][1][d] of q; k, v: [batch][kv_heads][1][d].
  std::vector<uint8_t> step(const std::vector<uint8_t>& k, const std::vector<uint8_t>& v,
                            const std::vector<uint8_t>& q) {
    const OnDevice<uint8_t> new_k(k), new_v(v), query(q), out(std::vector<uint8_t>(q.size(), 0xff));
    append_.k = device_view(new_k.get(), c_, c_.kv_heads, 1), append_.v = device_view(new_v.get(), c_, c_.kv_heads, 1);
    attend_.q = device_view(query.get(), c_, c_.heads, 1), attend_.out = device_view(out.get(), c_, c_.heads, 1);
    expect_launched(halfbyte_cuda_append(&append_));
    expect_launched(halfbyte_cuda_encode(&encode_));
    expect_launched(halfbyte_cuda_attend(&attend_));
    for (int32_t n : arrivals_.values()) EXPECT_EQ(n, 0);
    return out.values();
  }

 private:
  size_t rows() const { return (size_t)c_.batch * c_.kv_heads; }
  int64_t slots() const { return 32 + (std::max(c_.recipe.raw_window, c_.recipe.offset_tokens) + 15) / 16 * 16; }
  int64_t span_count() const { return slots() / c_.recipe.offset_span + 2; }
  int64_t weight_stride() const { return slots() + c_.recipe.sink_tokens; }
  int64_t page_bytes() const { return c_.kv_heads * halfbyte_cuda_page_bytes(&described_); }
  // A window's pages are used in turn.
  int64_t page_count() const { return c_.window ? (c_.window + 62) / 64 + 1 : (capacity_ + 63) / 64; }

  std::vector<float> offset_of(const std::vector<float>& mu) const {
    return mu.empty() && c_.recipe.offset ? std::vector<float>(rows() * c_.head_dim) : mu;
  }
  static std::vector<int64_t> first_cells(const LayerParts& parts) {
    std::vector<int64_t> cells(HALFBYTE_CUDA_CELLS);
    cells[0] = (int64_t)parts.length, cells[3] = (int64_t)parts.packed_end, cells[4] = !parts.offset_k.empty();
    return cells;
  }
  std::vector<int64_t> page_places() const {
    std::vector<int64_t> places;
    for (int64_t b = 0; b < c_.batch; b++)
      for (int64_t i = 0; i < (capacity_ + 63) / 64; i++)
        places.push_back((b * page_count() + i % page_count()) * page_bytes());
    return places;
  }
  std::vector<uint8_t> pages_of(const LayerParts& parts) const {
    std::vector<uint8_t> pool(c_.batch * page_count() * page_bytes());
    const size_t each = parts.page_table.size() / c_.batch;
    for (size_t i = 0; i < parts.page_table.size(); i++) {
      const size_t page = (parts.pages_dropped + i % each) % page_count();
      std::copy_n(parts.pages.begin() + parts.page_table[i] * page_bytes(), page_bytes(),
                  pool.begin() + (i / each * page_count() + page) * page_bytes());
    }
    return pool;
  }
  // Saved raw tokens to their slots: the sinks, or the tail's ring. Bytes that no token has are poisoned.
  std::vector<uint8_t> raw(const std::vector<uint8_t>& saved, const LayerParts& parts, bool sinks) const {
    const size_t width = c_.head_dim * dtype_bytes(c_.dtype), sink = c_.recipe.sink_tokens;
    const size_t tokens = saved.size() / width / rows(), room = sinks ? sink : slots();
    std::vector<uint8_t> out(rows() * room * width);
    for (size_t row = 0; row < rows(); row++)
      for (size_t i = 0; i < tokens; i++) {
        const bool is_sink = i < std::min<size_t>(sink, parts.length);
        const size_t slot = is_sink ? i : (parts.packed_end + i - sink) % slots();
        if (is_sink == sinks)
          std::copy_n(saved.begin() + (row * tokens + i) * width, width, out.begin() + (row * room + slot) * width);
      }
    return out;
  }

  // Returns the bytes of scratch memory.
  int64_t describe(bool portable) {
    const Recipe& r = c_.recipe;
    const bool identity = r.rotation == Rotation::identity;
    const HalfbyteCudaLength at{cells_.get(),  capacity_,    slots(),
                                r.sink_tokens, r.raw_window, c_.recipe.offset ? r.offset_tokens : 0,
                                c_.window};
    const HalfbyteCudaPages pages{table_.get(), (capacity_ + 63) / 64, 0, pool_.get()};
    const HalfbyteCudaTurn turn{waves_.get(), r.offset_span, c_.pairs, c_.interleaved};
    const HalfbyteCudaView k_sinks = device_view(sinks_k_.get(), c_, c_.kv_heads, r.sink_tokens),
                           v_sinks = device_view(sinks_v_.get(), c_, c_.kv_heads, r.sink_tokens),
                           k_tail = device_view(tail_k_.get(), c_, c_.kv_heads, slots()),
                           v_tail = device_view(tail_v_.get(), c_, c_.kv_heads, slots());
    append_ = {described_,
               at,
               c_.batch,
               {},
               {},
               k_sinks,
               v_sinks,
               k_tail,
               v_tail,
               offset_room(k_tables_, true),
               offset_room(v_tables_, false),
               turn,
               weights_.get(),
               weight_stride(),
               0,
               nullptr};
    encode_.layer = attend_.layer = described_, encode_.at = attend_.at = at, encode_.pages = attend_.pages = pages;
    encode_.batch = attend_.batch = c_.batch, encode_.portable = attend_.portable = portable;
    encode_.k_tables = attend_.k = k_tables_.get(identity), encode_.v_tables = attend_.v = v_tables_.get(identity);
    if (c_.pairs) {
      encode_.k_tables.offset = span_mu_.get(), encode_.k_tables.rotated_offset = span_rotated_.get();
      encode_.k_tables.offset_span = r.offset_span, encode_.k_tables.offset_count = span_count();
    }
    encode_.k = k_tail, encode_.v = v_tail, encode_.limit = 1e4;
    encode_.bad = reinterpret_cast<int32_t*>(cells_.get() + 5);
    attend_.heads = c_.heads, attend_.queries = attend_.causal = 1, attend_.scale = 1.0 / std::sqrt(c_.head_dim);
    attend_.sliding_window = c_.window, attend_.sink_tokens = at.sink_tokens, attend_.raw_window = at.raw_window;
    attend_.warm_up = at.warm_up, attend_.turn = turn, attend_.n_raw = 2, attend_.arrivals = arrivals_.get();
    attend_.raw[0] = {k_sinks, v_sinks, 0, 0, 0, 1}, attend_.raw[1] = {k_tail, v_tail, 0, 0, 0, 0};
    return halfbyte_cuda_attend_space(&attend_);
  }
  HalfbyteCudaOffset offset_room(const Tables& tables, bool is_k) {
    if (!c_.recipe.offset) return {};
    const bool identity = c_.recipe.rotation == Rotation::identity, turns = is_k && c_.pairs;
    return {identity ? nullptr : tables.rotation_t.get(),
            tables.offset.get(),
            tables.rotated.get(),
            turns ? span_mu_.get() : nullptr,
            turns ? span_rotated_.get() : nullptr,
            span_count(),
            1};
  }

  Case c_;
  HalfbyteCudaLayer described_;
  int64_t capacity_;
  Tables k_tables_, v_tables_;
  OnDevice<int64_t> cells_, table_;
  OnDevice<uint8_t> pool_, sinks_k_, sinks_v_, tail_k_, tail_v_;
  OnDevice<float> waves_, span_mu_, span_rotated_, weights_;
  OnDevice<int32_t> arrivals_;
  HalfbyteCudaAppend append_{};
  HalfbyteCudaEncode encode_{};
  HalfbyteCudaAttend attend_{};
  OnDevice<uint8_t> space_;
};

// The largest distance of any of `steps` steps after the prefix.
inline double step_distance(const Case& c, unsigned seed, int steps, bool portable) {
  const std::string fastest = backends().front().name;
  use_backend(fastest);
  Random random(seed);
  Layer layer = filled_layer(c, random);
  LayerParts parts;
  EXPECT_TRUE(layer.save(parts).ok());
  StepLayer there(c, parts, (int64_t)c.prefix + steps, portable);
  double worst = 0.0;
  for (int i = 0; i < steps; i++) {
    const auto new_k = random.tensor(c, c.kv_heads, 1, true), new_v = random.tensor(c, c.kv_heads, 1, false),
               q = random.tensor(c, c.heads, 1, false);
    EXPECT_TRUE(layer.append(view_of(new_k, c, c.kv_heads, 1), view_of(new_v, c, c.kv_heads, 1), c.batch, 1).ok());
    std::vector<uint8_t> want(q.size());
    AttendArgs args;
    args.q = view_of(q, c, c.heads, 1);
    args.out = {want.data(), args.q.batch_stride, args.q.head_stride, args.q.token_stride};
    args.heads = c.heads, args.queries = 1, args.scale = 1.0f / std::sqrt((float)c.head_dim);
    use_backend("reference");
    EXPECT_TRUE(layer.attend(args).ok());
    use_backend(fastest);
    const double distance = relative_error(as_doubles(there.step(new_k, new_v, q), c.dtype), as_doubles(want, c.dtype));
    worst = distance <= worst ? worst : distance;  // NaN as well
  }
  const std::vector<int64_t> cells = there.cells();
  EXPECT_EQ(cells[0], (int64_t)c.prefix + steps);
  EXPECT_EQ(cells[5] | cells[6], 0);
  const std::vector<uint8_t> full = there.pages();  // one more has no room: nothing changes but the flag
  const auto last = random.tensor(c, c.kv_heads, 1, true);
  there.step(last, last, random.tensor(c, c.heads, 1, false));
  EXPECT_EQ(there.cells()[0], cells[0]);
  EXPECT_EQ(there.cells()[6], 1);
  EXPECT_EQ(there.pages(), full);
  return worst;
}

}  // namespace halfbyte
