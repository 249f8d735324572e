// CUDA kernels against the CPU's double-precision reference, on fresh inputs at tail sizes, with poisoned outputs.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "cuda/halfbyte_cuda.h"
#include "encode.h"
#include "numbers.h"

namespace halfbyte {
namespace {

bool has_device() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 && halfbyte_cuda_probe(0) == 0;
}

#define HALFBYTE_NEEDS_DEVICE() \
  if (!has_device()) GTEST_SKIP() << "no CUDA device that can run these kernels"

// Layers are packed by the fastest kernels there are, and attended, or coded, by the reference.
void use_backend(const std::string& name) {
  set_num_threads((int)std::thread::hardware_concurrency());
  ASSERT_TRUE(set_backend(name).ok());
}

// A copy of host values in device memory.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : n_(values.size()) {
    if (!n_) return;
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data_), n_ * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(n_);
    EXPECT_EQ(cudaMemcpy(out.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return out;
  }

 private:
  size_t n_;
  T* data_ = nullptr;
};

struct Case {
  int batch = 1, heads = 4, kv_heads = 2, head_dim = 128;
  Dtype dtype = Dtype::float16;
  Recipe recipe;
  size_t prefix = 100;
  int queries = 1, window = 0;
  bool masked = false, with_sinks = false;
  float softcap = 0.0f;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  // Vectors as keys are: normal values around an offset that is large in a few channels.
  std::vector<uint8_t> tensor(const Case& c, int heads, size_t tokens, bool outliers) {
    std::normal_distribution<float> normal;
    std::vector<uint8_t> bytes(c.batch * heads * tokens * c.head_dim * dtype_bytes(c.dtype));
    for (size_t i = 0; i < bytes.size() / dtype_bytes(c.dtype); i++)
      store_element(bytes.data(), c.dtype, i, normal(engine_) + (outliers && i % c.head_dim % 31 == 3 ? 20.0f : 0.0f));
    return bytes;
  }
  std::mt19937& engine() { return engine_; }

 private:
  std::mt19937 engine_;
};

View view_of(const std::vector<uint8_t>& data, const Case& c, int heads, size_t tokens) {
  const auto d = (ptrdiff_t)c.head_dim;
  return {data.data(), (ptrdiff_t)(heads * tokens) * d, (ptrdiff_t)tokens * d, d};
}

HalfbyteCudaView device_view(const void* data, const Case& c, int heads, size_t tokens) {
  const int64_t d = c.head_dim;
  return {data, (int64_t)(heads * tokens) * d, (int64_t)tokens * d, d};
}

HalfbyteCudaLayer layer_of(const Case& c) {
  const Recipe& r = c.recipe;
  return {c.kv_heads, c.head_dim, c.head_dim, (int64_t)c.dtype, r.k.bits, r.v.bits, r.k.group, r.v.group, r.scale_bits,
          r.search, r.signed_scale, (int64_t)r.rotation, (int64_t)r.seed, 0};
}

std::vector<float> transposed(const std::vector<float>& m, int d) {
  std::vector<float> t(m.size());
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) t[(size_t)j * d + i] = m[(size_t)i * d + j];
  return t;
}

// Tables of one side on the device.
struct Tables {
  Tables(const HalfbyteCudaLayer& layer, int d, bool is_v, const std::vector<float>& mu, const std::vector<float>& lambda)
      : matrix(make_matrix(layer, d, is_v)),
        rotation(matrix),
        rotation_t(transposed(matrix, d)),
        fragments(make_fragments(layer, is_v)),
        offset(mu),
        rotated(rotate(matrix, mu, d)),
        factors(lambda),
        inverse(inverse_of(lambda)) {}

  static std::vector<float> make_matrix(const HalfbyteCudaLayer& layer, int d, bool is_v) {
    std::vector<float> m((size_t)d * d);
    halfbyte_cuda_rotation(&layer, is_v, m.data());
    return m;
  }
  static std::vector<uint8_t> make_fragments(const HalfbyteCudaLayer& layer, bool is_v) {
    std::vector<uint8_t> bytes(halfbyte_cuda_fragment_bytes(&layer, is_v));
    if (!bytes.empty()) halfbyte_cuda_fragments(&layer, is_v, bytes.data());
    return bytes;
  }
  static std::vector<float> rotate(const std::vector<float>& m, const std::vector<float>& x, int d) {
    std::vector<float> y(x.size());
    for (size_t row = 0; row < x.size() / d; row++)
      for (int i = 0; i < d; i++) {
        double sum = 0.0;
        for (int j = 0; j < d; j++) sum += (double)m[(size_t)i * d + j] * x[row * d + j];
        y[row * d + i] = (float)sum;
      }
    return y;
  }
  static std::vector<float> inverse_of(const std::vector<float>& x) {
    std::vector<float> out;
    for (float v : x) out.push_back(1.0f / v);
    return out;
  }
  HalfbyteCudaTables get(bool identity) const {
    return {identity ? nullptr : rotation.get(), identity ? nullptr : rotation_t.get(), fragments.get(), offset.get(),
            rotated.get(), factors.get(), inverse.get()};
  }

  std::vector<float> matrix;
  OnDevice<float> rotation, rotation_t;
  OnDevice<uint8_t> fragments;
  OnDevice<float> offset, rotated, factors, inverse;
};

std::vector<float> some_lambda(const Case& c, unsigned seed) {
  if (!c.recipe.lambda) return {};
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> between(0.5f, 2.0f);
  std::vector<float> lambda(c.kv_heads * c.head_dim);
  for (float& x : lambda) x = between(engine);
  return lambda;
}

Layer make_layer(const Case& c) {
  Result<Layer> layer =
      Layer::create({c.kv_heads, c.head_dim, c.head_dim, c.dtype, c.recipe, 0, c.window});
  EXPECT_TRUE(layer.ok()) << layer.status().message();
  if (c.recipe.lambda) {
    const std::vector<float> k = some_lambda(c, 1), v = some_lambda(c, 2);
    EXPECT_TRUE(layer.value().set_lambda(k.data(), v.data()).ok());
  }
  return std::move(layer.value());
}

std::vector<int64_t> page_addresses(const LayerParts& parts, const uint8_t* pages, size_t page_bytes) {
  std::vector<int64_t> table;
  for (int32_t i : parts.page_table) table.push_back((int64_t)(pages + i * page_bytes));
  return table;
}

double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); i++) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

std::vector<double> as_doubles(const std::vector<uint8_t>& bytes, Dtype dtype) {
  std::vector<double> out(bytes.size() / dtype_bytes(dtype));
  for (size_t i = 0; i < out.size(); i++) out[i] = load_element(bytes.data(), dtype, i);
  return out;
}

// ---- attention

// The same attention by the reference layer and by the device on the layer's own bytes; the distance between them.
double attend_distance(const Case& c, unsigned seed, bool portable) {
  const std::string fastest = backends().front().name;
  use_backend(fastest);
  Random random(seed);
  Layer layer = make_layer(c);
  const auto k = random.tensor(c, c.kv_heads, c.prefix, true), v = random.tensor(c, c.kv_heads, c.prefix, false);
  EXPECT_TRUE(layer.append(view_of(k, c, c.kv_heads, c.prefix), view_of(v, c, c.kv_heads, c.prefix), c.batch, c.prefix).ok());
  LayerParts before;
  EXPECT_TRUE(layer.save(before).ok());
  const auto chunk_k = random.tensor(c, c.kv_heads, c.queries, true), chunk_v = random.tensor(c, c.kv_heads, c.queries, false);
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
  a.pages = {table.get(), (int64_t)(parts.page_table.size() / c.batch), (int64_t)parts.pages_dropped};
  a.batch = c.batch, a.heads = c.heads, a.queries = c.queries, a.causal = 1, a.scale = args.scale, a.softcap = c.softcap;
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
  if (tail < (int64_t)held.length) a.raw[a.n_raw++] = {raw_k_view, raw_v_view, tail - sink, tail, (int64_t)held.length, 0};
  a.kept = c.queries == 1 ? (int64_t)parts.packed_end : std::min<int64_t>(tail, (int64_t)held.length);
  if (c.queries > 1)
    a.raw[a.n_raw++] = {device_view(d_chunk_k.get(), c, c.kv_heads, c.queries),
                        device_view(d_chunk_v.get(), c, c.kv_heads, c.queries), (int64_t)held.length,
                        std::max<int64_t>((int64_t)held.length, c.recipe.sink_tokens), (int64_t)parts.length, 0};

  a.portable = portable;
  const OnDevice<uint8_t> space(std::vector<uint8_t>(halfbyte_cuda_attend_space(&a), 0xff));
  const OnDevice<int32_t> arrivals(std::vector<int32_t>(c.batch * c.heads * c.queries, 0));
  a.space = space.get(), a.arrivals = arrivals.get();
  EXPECT_EQ(halfbyte_cuda_attend(&a), 0);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (int32_t n : arrivals.values()) EXPECT_EQ(n, 0);
  return relative_error(as_doubles(out.values(), c.dtype), as_doubles(want, c.dtype));
}

// Rounding of outputs (fp16 2^-11, bf16 2^-8) and, in the tensor-core kernel, of queries, weights and scaled weights to
// fp16, at random signs.
double tolerance(Dtype dtype, bool portable) {
  if (dtype == Dtype::bfloat16) return 4e-3;
  if (dtype == Dtype::float16) return portable ? 5e-4 : 1e-3;
  return 1e-5;   // float32 has portable kernels alone
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
    expect_close(c, (unsigned)prefix, "prefix " + std::to_string(prefix));
  }
}

TEST_P(CudaAttend, MatchesReferenceForEveryGeometry) {
  for (int d : {16, 64, 80, 96, 128, 256, 512})
    for (int group : {1, 4, 6, 16})
      for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32}) {
        Case c;
        c.head_dim = d, c.kv_heads = 2, c.heads = 2 * group, c.dtype = dtype, c.prefix = 150;
        expect_close(c, (unsigned)(d + group), "head_dim " + std::to_string(d) + ", group " + std::to_string(group));
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
            c.recipe.k = {k_bits, group}, c.recipe.v = {v_bits, group == 64 ? 0 : group}, c.recipe.scale_bits = scale_bits;
            c.recipe.lambda = group == 32, c.recipe.rotation = group == 64 ? Rotation::identity : Rotation::srft;
            c.recipe.offset = scale_bits == 16;
            expect_close(c, (unsigned)(d + k_bits * 3 + v_bits + group), "K" + std::to_string(k_bits) + "V" +
                         std::to_string(v_bits) + " g" + std::to_string(group) + " d" + std::to_string(d));
          }
}

TEST_P(CudaAttend, MatchesReferenceForSeveralQueries) {
  for (int queries : {2, 3, 5, 16, 17, 33, 64})
    for (size_t prefix : {5, 16, 40, 130}) {
      Case c;
      c.heads = 12, c.queries = queries, c.prefix = prefix;
      expect_close(c, (unsigned)(queries + prefix), std::to_string(queries) + " queries after " + std::to_string(prefix));
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
      expect_close(c, (unsigned)kind, "kind " + std::to_string(kind) + ", queries " + std::to_string(queries));
    }
}

TEST_P(CudaAttend, KeepsPrecisionForTinyAndLargeValues) {
  Case c;   // all weights count: flat attention over values far from 1
  c.prefix = 3000, c.recipe.offset = false;
  expect_close(c, 11, "flat");
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaAttend, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

// ---- encode and decode

// Codes that differ from the reference's, as a share of all, after checking that none differs by more than one unit
// where the scales agree.
struct Difference {
  double codes, scales;
};

Difference encode_difference(const Case& c, unsigned seed, bool portable) {
  Random random(seed);
  const size_t tokens = c.prefix;
  const auto k = random.tensor(c, c.kv_heads, tokens, true), v = random.tensor(c, c.kv_heads, tokens, false);
  Case whole = c;
  whole.prefix = tokens;
  Layer layer = make_layer(whole);
  const size_t packed = tokens / 16 * 16;   // one more token than whole blocks makes the layer pack them all
  EXPECT_TRUE(layer.append(view_of(k, c, c.kv_heads, tokens), view_of(v, c, c.kv_heads, tokens), c.batch, tokens).ok());
  LayerParts parts;
  EXPECT_TRUE(layer.save(parts).ok());
  EXPECT_EQ(parts.packed_end, packed);

  const HalfbyteCudaLayer described = layer_of(c);
  const size_t page_bytes = c.kv_heads * halfbyte_cuda_page_bytes(&described);
  const OnDevice<uint8_t> pages(std::vector<uint8_t>(parts.pages.size(), 0)), d_k(k), d_v(v);
  const OnDevice<int64_t> table(page_addresses(parts, pages.get(), page_bytes));
  const OnDevice<int32_t> bad(std::vector<int32_t>(1, 0));
  const Tables k_tables(described, c.head_dim, false, parts.offset_k, some_lambda(c, 1));
  const Tables v_tables(described, c.head_dim, true, parts.offset_v, some_lambda(c, 2));
  const bool identity = c.recipe.rotation == Rotation::identity;
  HalfbyteCudaEncode e{};
  e.layer = described, e.k_tables = k_tables.get(identity), e.v_tables = v_tables.get(identity);
  e.pages = {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0};
  e.batch = c.batch, e.k = device_view(d_k.get(), c, c.kv_heads, tokens), e.v = device_view(d_v.get(), c, c.kv_heads, tokens);
  e.limit = 1e4, e.bad = bad.get(), e.portable = portable;
  // In two parts that meet inside a block, as tokens arrive after a crop.
  const int64_t cut = (int64_t)packed / 2 - 3;
  e.first_token = 0, e.tokens = cut;
  EXPECT_EQ(halfbyte_cuda_encode(&e), 0);
  e.first_token = cut, e.tokens = (int64_t)packed - cut;
  EXPECT_EQ(halfbyte_cuda_encode(&e), 0);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(bad.values()[0], 0);

  const std::vector<uint8_t> got = pages.values();
  const PageFormat f = make_page_format(c.recipe, c.head_dim, c.head_dim);
  size_t codes = 0, wrong = 0, scales = 0, wrong_scales = 0;
  for (size_t page = 0; page < got.size(); page += page_head_bytes(f))
    for (int block = 0; block < kPageBlocks; block++) {
      const size_t from = page + k_codes_at(f, block), scales_from = page + k_scales_at(f, block);
      for (size_t i = 0; i < block_code_bytes(f); i++) codes++, wrong += got[from + i] != parts.pages[from + i];
      for (size_t i = 0; i < block_scale_bytes(f); i += 2)
        scales++, wrong_scales += memcmp(&got[scales_from + i], &parts.pages[scales_from + i], 2) != 0;
    }
  return {(double)wrong / codes, (double)wrong_scales / scales};
}

class CudaEncode : public testing::TestWithParam<bool> {};

// Both compute in float: values within rounding of a tie, and scales whose errors nearly tie, may fall the other way, and
// a scale takes its whole group along. Scales of 32 bits differ in their last bits throughout, so codes alone are bound.
TEST_P(CudaEncode, GivesTheReferenceBytes) {
  HALFBYTE_NEEDS_DEVICE();
  use_backend("reference");
  for (int d : {64, 128, 256, 80})
    for (Dtype dtype : {Dtype::float16, Dtype::bfloat16, Dtype::float32})
      for (int group : {32, 0, 16})
        for (bool search : {true, false})
          for (int bits : {4, 8}) {
            if ((d == 256 || d == 80) && (dtype != Dtype::float16 || bits == 8)) continue;   // the reference takes d² each
            Case c;
            c.head_dim = d, c.dtype = dtype, c.prefix = 97, c.batch = 2;
            c.recipe.k = {bits, group}, c.recipe.v = {bits, group}, c.recipe.search = search;
            c.recipe.lambda = group == 0, c.recipe.signed_scale = bits == 4 || group == 32;
            const Difference difference = encode_difference(c, (unsigned)(d + group + search), GetParam());
            const std::string what = "d" + std::to_string(d) + " g" + std::to_string(group) + " bits " + std::to_string(bits) +
                                     " search " + std::to_string(search) + " dtype " + std::to_string((int)dtype);
            EXPECT_LT(difference.codes, bits == 4 ? 2e-3 : 2e-2) << what;
            EXPECT_LT(difference.scales, 1e-2) << what;
          }
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaEncode, testing::Bool(),
                         [](const auto& info) { return info.param ? "Portable" : "TensorCores"; });

TEST(CudaEncode, FlagsWhatCanNotBeCoded) {
  HALFBYTE_NEEDS_DEVICE();
  Case c;
  const HalfbyteCudaLayer described = layer_of(c);
  const Tables tables(described, c.head_dim, false, {}, {}), v_tables(described, c.head_dim, true, {}, {});
  for (float value : {1.0f, 2e4f, INFINITY, NAN})
    for (int64_t portable : {0, 1}) {
      Random random(3);
      auto k = random.tensor(c, c.kv_heads, 16, false);
      store_element(k.data(), c.dtype, 777, value);
      const OnDevice<uint8_t> data(k), pages(std::vector<uint8_t>(c.kv_heads * halfbyte_cuda_page_bytes(&described), 0));
      const OnDevice<int64_t> table(std::vector<int64_t>{(int64_t)pages.get()});
      const OnDevice<int32_t> bad(std::vector<int32_t>(1, 0));
      HalfbyteCudaEncode e{};
      e.layer = described, e.k_tables = tables.get(false), e.v_tables = v_tables.get(false);
      e.pages = {table.get(), 1, 0}, e.batch = 1, e.tokens = 16, e.limit = 1e4, e.bad = bad.get(), e.portable = portable;
      e.k = e.v = device_view(data.get(), c, c.kv_heads, 16);
      ASSERT_EQ(halfbyte_cuda_encode(&e), 0);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      EXPECT_EQ(bad.values()[0], value != 1.0f) << value;
    }
}

TEST(CudaDecode, GivesBackWhatTheReferenceDoes) {
  HALFBYTE_NEEDS_DEVICE();
  use_backend("reference");
  for (int d : {16, 80, 128, 512}) {
    Case c;
    c.head_dim = d, c.prefix = 113, c.batch = 2, c.recipe.lambda = true, c.dtype = Dtype::float32;
    Random random(d);
    Layer layer = make_layer(c);
    const auto k = random.tensor(c, c.kv_heads, c.prefix, true), v = random.tensor(c, c.kv_heads, c.prefix, false);
    ASSERT_TRUE(layer.append(view_of(k, c, c.kv_heads, c.prefix), view_of(v, c, c.kv_heads, c.prefix), c.batch, c.prefix).ok());
    LayerParts parts;
    ASSERT_TRUE(layer.save(parts).ok());
    const size_t n = c.batch * c.kv_heads * c.prefix * d;
    std::vector<float> want_k(n), want_v(n);
    ASSERT_TRUE(layer.decode(want_k.data(), want_v.data()).ok());
    const HalfbyteCudaLayer described = layer_of(c);
    const OnDevice<uint8_t> pages(parts.pages);
    const OnDevice<int64_t> table(page_addresses(parts, pages.get(), c.kv_heads * halfbyte_cuda_page_bytes(&described)));
    const Tables k_tables(described, d, false, parts.offset_k, some_lambda(c, 1));
    const Tables v_tables(described, d, true, parts.offset_v, some_lambda(c, 2));
    const OnDevice<float> out_k(std::vector<float>(n, NAN)), out_v(std::vector<float>(n, NAN));
    const HalfbyteCudaDecode call{described, k_tables.get(false), v_tables.get(false),
                                  {table.get(), (int64_t)(parts.page_table.size() / c.batch), 0},
                                  c.batch, 0, (int64_t)parts.packed_end, 0, (int64_t)c.prefix, out_k.get(), out_v.get(), nullptr};
    ASSERT_EQ(halfbyte_cuda_decode(&call), 0);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (const auto& [got, want] : {std::pair{out_k.values(), want_k}, std::pair{out_v.values(), want_v}})
      for (size_t i = 0; i < n; i++) {
        if (i / d % c.prefix < parts.packed_end) ASSERT_NEAR(got[i], want[i], 2e-5 * (1 + std::fabs(want[i]))) << d << " " << i;
        else ASSERT_TRUE(std::isnan(got[i])) << "written behind the packed tokens";
      }
  }
}

}  // namespace
}  // namespace halfbyte
