// Attention on the device against the CPU's double-precision reference: fresh inputs, tail sizes, poisoned outputs.
#include "device.h"

namespace halfbyte {
namespace {

// The same attention by the reference layer and by the device on the layer's own bytes; the distance between them.
double attend_distance(const Case& c, unsigned seed, bool portable) {
  const std::string fastest = backends().front().name;
  use_backend(fastest);
  Random random(seed);
  Layer layer = make_layer(c);
  const auto k = random.tensor(c, c.kv_heads, c.prefix, true), v = random.tensor(c, c.kv_heads, c.prefix, false);
  EXPECT_TRUE(
      layer.append(view_of(k, c, c.kv_heads, c.prefix), view_of(v, c, c.kv_heads, c.prefix), c.batch, c.prefix).ok());
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
  args.heads = c.heads, args.queries = c.queries, args.scale = 1.0f / std::sqrt((float)c.head_dim);
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
  const OnDevice<uint8_t> pages(parts.pages), d_q(q), d_mask(mask), out(std::vector<uint8_t>(q.size(), 0xff));
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
  a.q = device_view(d_q.get(), c, c.heads, c.queries), a.out = device_view(out.get(), c, c.heads, c.queries);
  a.mask = d_mask.get(), a.mask_tokens = (int64_t)args.mask_tokens, a.mask_batch_stride = args.mask_batch_stride;
  a.mask_query_stride = args.mask_query_stride, a.sinks = d_sinks.get();

  // Raw tokens: the sinks and the tail, as saved; for several queries the tail before them and their own.
  const LayerParts& held = c.queries == 1 ? parts : before;
  const int64_t sink = std::min<int64_t>(c.recipe.sink_tokens, held.length);
  const size_t raw = held.raw_k.size() / dtype_bytes(c.dtype) / c.batch / c.kv_heads / c.head_dim;
  const OnDevice<uint8_t> raw_k(held.raw_k), raw_v(held.raw_v), d_chunk_k(chunk_k), d_chunk_v(chunk_v);
  const HalfbyteCudaView raw_k_view = device_view(raw_k.get(), c, c.kv_heads, raw);
  const HalfbyteCudaView raw_v_view = device_view(raw_v.get(), c, c.kv_heads, raw);
  if (sink) a.raw[a.n_raw++] = {raw_k_view, raw_v_view, 0, 0, sink, 1};
  const int64_t tail = (int64_t)held.packed_end;
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

  a.portable = portable;
  const OnDevice<uint8_t> space(std::vector<uint8_t>(halfbyte_cuda_attend_space(&a), 0xff));
  const OnDevice<int32_t> arrivals(std::vector<int32_t>(c.batch * c.heads * c.queries, 0));
  a.space = space.get(), a.arrivals = arrivals.get();
  expect_launched(halfbyte_cuda_attend(&a));
  for (int32_t n : arrivals.values()) EXPECT_EQ(n, 0);
  return relative_error(as_doubles(out.values(), c.dtype), as_doubles(want, c.dtype));
}

// Rounding of outputs (fp16 2^-11, bf16 2^-8) and, in the tensor-core kernel, of queries, weights and scaled weights to
// fp16, at random signs.
double tolerance(Dtype dtype, bool portable) {
  if (dtype == Dtype::bfloat16) return 4e-3;
  if (dtype == Dtype::float16) return portable ? 5e-4 : 1e-3;
  return 1e-5;  // float32 has portable kernels alone
}

class CudaAttend : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override { HALFBYTE_NEEDS_DEVICE(); }
  void expect_close(const Case& c, unsigned seed, const std::string& what) {
    EXPECT_LT(attend_distance(c, seed, GetParam()), tolerance(c.dtype, GetParam())) << what;
  }
};

TEST_P(CudaAttend, MatchesReferenceAtTailSizes) {
  for (size_t prefix : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 129, 257, 1000}) {
    Case c;
    c.prefix = prefix, c.batch = 2;
    expect_close(c, (unsigned)prefix, text("prefix ", prefix));
  }
}

TEST_P(CudaAttend, MatchesReferenceForEveryGeometry) {
  for (int d : {16, 64, 80, 96, 128, 256, 512})
    for (int group : {1, 4, 6, 16})
      for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32}) {
        Case c;
        c.head_dim = d, c.kv_heads = 2, c.heads = 2 * group, c.dtype = dtype, c.prefix = 150;
        expect_close(c, (unsigned)(d + group), text("head_dim ", d, ", group ", group));
      }
}

TEST_P(CudaAttend, MatchesReferenceForEveryRecipe) {
  for (int d : {64, 128, 256})
    for (int k_bits : {4, 8})
      for (int v_bits : {4, 8})
        for (int group : {0, 16, 32, 64})
          for (int scale_bits : {16, 32}) {
            Case c;
            c.head_dim = d, c.prefix = 200;
            c.recipe.k = {k_bits, group}, c.recipe.v = {v_bits, group == 64 ? 0 : group},
            c.recipe.scale_bits = scale_bits;
            c.recipe.lambda = group == 32, c.recipe.rotation = group == 64 ? Rotation::identity : Rotation::srft;
            c.recipe.offset = scale_bits == 16;
            expect_close(c, (unsigned)(d + k_bits * 3 + v_bits + group),
                         text("K", k_bits, "V", v_bits, " g", group, " d", d));
          }
}

TEST_P(CudaAttend, MatchesReferenceForSeveralQueries) {
  for (int queries : {2, 3, 5, 16, 17, 33, 64})
    for (size_t prefix : {5, 16, 40, 130}) {
      Case c;
      c.heads = 12, c.queries = queries, c.prefix = prefix;
      expect_close(c, (unsigned)(queries + prefix), text(queries, " queries after ", prefix));
    }
}

TEST_P(CudaAttend, MatchesReferenceWithWhatNarrowsAttention) {
  for (int queries : {1, 7})
    for (int kind = 0; kind < 6; kind++) {
      Case c;
      c.queries = queries, c.prefix = 300, c.batch = 2, c.heads = 6;
      c.masked = kind == 0 || kind == 5, c.with_sinks = kind == 1, c.softcap = kind == 2 ? 5.0f : 0.0f;
      c.window = kind == 3 || kind == 5 ? 100 : 0;
      c.recipe.sink_tokens = kind == 4 ? 16 : 0, c.recipe.raw_window = kind == 4 ? 32 : 0;
      expect_close(c, (unsigned)kind, text("kind ", kind, ", queries ", queries));
    }
}

TEST_P(CudaAttend, KeepsPrecisionForTinyAndLargeValues) {
  Case c;  // all weights count: flat attention over values far from 1
  c.prefix = 3000, c.recipe.offset = false;
  expect_close(c, 11, "flat");
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaAttend, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

}  // namespace
}  // namespace halfbyte
