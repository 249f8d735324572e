// One attention on the device against the CPU's double-precision reference.
#pragma once

#include "device.h"

namespace halfbyte {

// cos and sin of each pair in the middle of spans 0, 1, …, as many as `tokens` touch: [spans][pairs][2].
inline std::vector<float> waves_of(const Case& c, size_t tokens) {
  std::vector<float> out;
  const int span = c.recipe.offset_span;
  for (size_t first = 0; c.pairs && first < tokens; first += span)
    for (float frequency : frequencies_of(c)) {
      const double angle = (double)frequency * (double)(first + (span - 1) / 2);
      out.push_back((float)std::cos(angle)), out.push_back((float)std::sin(angle));
    }
  return out;
}

// Rows of tokens whose last one is poison.
inline std::vector<uint8_t> without_last(std::vector<uint8_t> rows, size_t row_bytes, size_t token_bytes) {
  for (size_t end = row_bytes; end <= rows.size(); end += row_bytes)
    std::fill_n(rows.begin() + (ptrdiff_t)(end - token_bytes), token_bytes, 0xff);
  return rows;
}

inline std::vector<uint8_t> behind(size_t shift, std::vector<uint8_t> bytes) {
  bytes.insert(bytes.begin(), shift, 0);
  return bytes;
}

// The same attention by the reference layer and by the device on the layer's own bytes; the distance between them. Odd
// seeds: the call brings the newest token, where it is one that stays raw.
inline double attend_distance(const Case& c, unsigned seed, bool portable) {
  const std::string fastest = backends().front().name;
  use_backend(fastest);
  Random random(seed);
  Layer layer = filled_layer(c, random);
  LayerParts before;
  EXPECT_TRUE(layer.save(before).ok());
  const auto chunk_k = random.tensor(c, c.kv_heads, c.queries, true),
             chunk_v = random.tensor(c, c.kv_heads, c.queries, false);
  const View new_k = view_of(chunk_k, c, c.kv_heads, c.queries), new_v = view_of(chunk_v, c, c.kv_heads, c.queries);
  EXPECT_TRUE(layer.append(new_k, new_v, c.batch, c.queries).ok());
  LayerParts parts;
  EXPECT_TRUE(layer.save(parts).ok());

  const auto q = random.tensor(c, c.heads, c.queries, false);
  std::vector<uint8_t> want(q.size()), mask;
  std::vector<float> sinks(c.with_sinks ? c.heads : 0);
  for (float& x : sinks) x = std::normal_distribution<float>()(random.engine());
  AttendArgs args;
  args.q = view_of(q, c, c.heads, c.queries);
  args.out = {want.data(), args.q.batch_stride, args.q.head_stride, args.q.token_stride};
  args.heads = c.heads, args.queries = c.queries, args.scale = c.sharpness / std::sqrt((float)c.head_dim);
  args.chunk_k = new_k, args.chunk_v = new_v, args.softcap = c.softcap;
  args.sinks = sinks.empty() ? nullptr : sinks.data();
  if (c.masked) {
    args.mask_tokens = layer.visible() - 3;
    mask.resize(c.batch * c.queries * args.mask_tokens);
    for (uint8_t& m : mask) m = random.engine()() % 4 != 0;
    args.mask = mask.data(), args.mask_query_stride = (ptrdiff_t)args.mask_tokens;
    args.mask_batch_stride = c.queries * args.mask_query_stride;
  }
  use_backend("reference");
  EXPECT_TRUE(layer.attend(args).ok());
  use_backend(fastest);

  const HalfbyteCudaLayer described = layer_of(c);
  const size_t page_bytes = c.kv_heads * halfbyte_cuda_page_bytes(&described);
  EXPECT_EQ(parts.pages.size() % page_bytes, 0u);
  const OnDevice<uint8_t> pages(parts.pages), d_q(behind(c.shift, q)), d_mask(mask),
      out(std::vector<uint8_t>(q.size(), 0xff));
  const OnDevice<int64_t> table(page_addresses(parts, pages.get(), page_bytes));
  const OnDevice<float> d_sinks(sinks);
  const Tables k_tables(described, c.head_dim, false, parts.offset_k, some_lambda(c, 1));
  const Tables v_tables(described, c.head_dim, true, parts.offset_v, some_lambda(c, 2));
  const bool identity = c.recipe.rotation == Rotation::identity;
  HalfbyteCudaAttend a{};
  a.layer = described, a.k = k_tables.get(identity), a.v = v_tables.get(identity);
  a.pages = {table.get(), (int64_t)(parts.page_table.size() / c.batch), (int64_t)parts.pages_dropped, nullptr};
  a.batch = c.batch, a.heads = c.heads, a.queries = c.queries, a.causal = 1, a.scale = args.scale,
  a.softcap = c.softcap;
  a.length = (int64_t)parts.length, a.first = (int64_t)parts.first, a.sliding_window = c.window;
  a.sink_tokens = c.recipe.sink_tokens, a.packed_end = (int64_t)parts.packed_end, a.raw_window = c.recipe.raw_window;
  a.q = device_view(d_q.get() + c.shift, c, c.heads, c.queries), a.out = device_view(out.get(), c, c.heads, c.queries);
  a.mask = d_mask.get(), a.mask_tokens = (int64_t)args.mask_tokens, a.mask_batch_stride = args.mask_batch_stride;
  a.mask_query_stride = args.mask_query_stride, a.sinks = d_sinks.get();

  // Raw tokens: the sinks and the tail, as saved; for several queries the tail before them and their own.
  const LayerParts& held = c.queries == 1 ? parts : before;
  const int64_t sink = std::min<int64_t>(c.recipe.sink_tokens, held.length);
  const size_t raw = held.raw_k.size() / dtype_bytes(c.dtype) / c.batch / c.kv_heads / c.head_dim;
  const int64_t tail = (int64_t)held.packed_end;
  const bool brings_token = c.queries == 1 && seed % 2 && tail < (int64_t)held.length;
  const size_t token_bytes = brings_token ? c.head_dim * dtype_bytes(c.dtype) : 0;
  const OnDevice<uint8_t> raw_k(without_last(held.raw_k, std::max<size_t>(raw * token_bytes, 1), token_bytes)),
      raw_v(without_last(held.raw_v, std::max<size_t>(raw * token_bytes, 1), token_bytes)), d_chunk_k(chunk_k),
      d_chunk_v(chunk_v);
  const HalfbyteCudaView raw_k_view = device_view(raw_k.get(), c, c.kv_heads, raw);
  const HalfbyteCudaView raw_v_view = device_view(raw_v.get(), c, c.kv_heads, raw);
  if (sink) a.raw[a.n_raw++] = {raw_k_view, raw_v_view, 0, 0, sink, 1};
  if (tail < (int64_t)held.length)
    a.raw[a.n_raw++] = {raw_k_view, raw_v_view, tail - sink, tail, (int64_t)held.length, 0};
  a.kept = c.queries == 1 ? (int64_t)parts.packed_end : std::min<int64_t>(tail, (int64_t)held.length);
  if (c.queries > 1)
    a.raw[a.n_raw++] = {device_view(d_chunk_k.get(), c, c.kv_heads, c.queries),
                        device_view(d_chunk_v.get(), c, c.kv_heads, c.queries),
                        (int64_t)held.length,
                        std::max<int64_t>((int64_t)held.length, c.recipe.sink_tokens),
                        (int64_t)parts.length,
                        0};

  const OnDevice<float> waves(waves_of(c, parts.length));
  a.turn = {waves.get(), c.recipe.offset_span, c.pairs, c.interleaved};
  a.portable = portable;
  if (brings_token) {
    a.new_k = device_view(d_chunk_k.get(), c, c.kv_heads, 1);
    a.new_v = device_view(d_chunk_v.get(), c, c.kv_heads, 1);
  }
  const OnDevice<uint8_t> space(std::vector<uint8_t>(halfbyte_cuda_attend_space(&a), 0xff));
  const OnDevice<int32_t> arrivals(std::vector<int32_t>(c.batch * c.heads * c.queries, 0));
  a.space = space.get(), a.arrivals = arrivals.get();
  expect_launched(halfbyte_cuda_attend(&a));
  for (int32_t n : arrivals.values()) EXPECT_EQ(n, 0);
  EXPECT_EQ(raw_k.values(), held.raw_k);
  EXPECT_EQ(raw_v.values(), held.raw_v);
  return relative_error(as_doubles(out.values(), c.dtype), as_doubles(want, c.dtype));
}

// Rounding of outputs (fp16 2^-11, bf16 2^-8) and, in the tensor-core kernel, of queries, weights and scaled weights to
// fp16, at random signs.
inline double tolerance(Dtype dtype, bool portable) {
  if (dtype == Dtype::bfloat16) return 4e-3;
  if (dtype == Dtype::float16) return portable ? 5e-4 : 1e-3;
  return 1e-5;  // float32 has portable kernels alone
}

}  // namespace halfbyte
