// Helpers for the C++ tests: random input with a printed seed, arrays of any dtype, plain attention, error measures.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "halfbyte/halfbyte.hpp"
#include "numbers.h"

namespace halfbyte::testing {

// Head sizes of the tests: powers of two, multiples of 16 and 32, one that is neither, primes inside (17 · 2 · 15).
// HALFBYTE_TEST_QUICK leaves one of each kind, for emulators.
inline const std::vector<int> kHeadDims = std::getenv("HALFBYTE_TEST_QUICK")
                                              ? std::vector{18, 80, 112, 128}
                                              : std::vector{16, 18, 64, 80, 96, 112, 128, 192, 256, 510, 512};

// Fresh for every run, so that runs add up; HALFBYTE_TEST_SEED repeats one.
inline uint64_t test_seed() {
  static const uint64_t seed = [] {
    const char* given = std::getenv("HALFBYTE_TEST_SEED");
    uint64_t value = given ? std::strtoull(given, nullptr, 10) : std::random_device{}();
    std::printf("[   SEED   ] HALFBYTE_TEST_SEED=%llu repeats this run\n", (unsigned long long)value);
    std::fflush(stdout);
    return value;
  }();
  return seed;
}

class Random {
 public:
  Random() : engine_(test_seed()) {}
  int below(int n) { return (int)(engine_() % (uint64_t)n); }
  float normal() { return normal_(engine_); }
  float factor() { return std::exp2((float)below(2001) / 1000.0f - 1.0f); }  // a λ, between 1/2 and 2
  std::vector<float> normals(size_t n, float spread = 1.0f) {
    std::vector<float> x(n);
    for (float& value : x) value = spread * normal();
    return x;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// A random orthogonal matrix [d, d], row-major: Gram-Schmidt in double.
inline std::vector<float> random_rotation(Random& random, int d) {
  std::vector<std::vector<double>> rows;
  for (int i = 0; i < d; i++) {
    const std::vector<float> normals = random.normals(d);
    std::vector<double> row(normals.begin(), normals.end());
    double squares = 0.0;
    for (const std::vector<double>& other : rows) {
      double dot = 0.0;
      for (int c = 0; c < d; c++) dot += row[c] * other[c];
      for (int c = 0; c < d; c++) row[c] -= dot * other[c];
    }
    for (double x : row) squares += x * x;
    for (double& x : row) x /= std::sqrt(squares);
    rows.push_back(row);
  }
  std::vector<float> matrix;
  for (const std::vector<double>& row : rows) matrix.insert(matrix.end(), row.begin(), row.end());
  return matrix;
}

class UseBackend {
 public:
  explicit UseBackend(const std::string& name) : before_(backend()) { EXPECT_TRUE(set_backend(name).ok()) << name; }
  ~UseBackend() { (void)set_backend(before_); }
  UseBackend(const UseBackend&) = delete;

 private:
  std::string before_;
};

class UseThreads {
 public:
  explicit UseThreads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~UseThreads() { set_num_threads(before_); }
  UseThreads(const UseThreads&) = delete;

 private:
  int before_;
};

inline std::vector<std::string> usable_backends() {
  std::vector<std::string> names;
  for (const BackendInfo& info : backends())
    if (info.usable) names.push_back(info.name);
  return names;
}

inline std::vector<std::string> fast_backends() {
  std::vector<std::string> names = usable_backends();
  std::erase(names, "reference");
  return names;
}

// [batch, heads, tokens, d] of one dtype, contiguous.
struct Array {
  int batch = 0, heads = 0;
  size_t tokens = 0;
  int d = 0;
  Dtype dtype = Dtype::float32;
  std::vector<uint8_t> bytes;

  Array(int batch, int heads, size_t tokens, int d, Dtype dtype = Dtype::float32)
      : batch(batch),
        heads(heads),
        tokens(tokens),
        d(d),
        dtype(dtype),
        bytes(batch * heads * tokens * d * dtype_bytes(dtype)) {}

  size_t at(int b, int h, size_t t, int c) const { return (((size_t)b * heads + h) * tokens + t) * d + c; }
  float get(int b, int h, size_t t, int c) const { return load_element(bytes.data(), dtype, at(b, h, t, c)); }
  void set(int b, int h, size_t t, int c, float x) { store_element(bytes.data(), dtype, at(b, h, t, c), x); }
  size_t size() const { return (size_t)batch * heads * tokens * d; }
  float flat(size_t i) const { return load_element(bytes.data(), dtype, i); }

  View view(size_t from = 0) const {
    return {bytes.data() + from * d * dtype_bytes(dtype), (ptrdiff_t)(heads * tokens * d), (ptrdiff_t)(tokens * d), d};
  }
  MutableView out() { return {bytes.data(), (ptrdiff_t)(heads * tokens * d), (ptrdiff_t)(tokens * d), d}; }
};

inline Array random_array(Random& random, int batch, int heads, size_t tokens, int d, Dtype dtype = Dtype::float32,
                          float spread = 1.0f) {
  Array x(batch, heads, tokens, d, dtype);
  for (size_t i = 0; i < x.size(); i++) store_element(x.bytes.data(), dtype, i, spread * random.normal());
  return x;
}

// Outputs start as NaN, so that whatever a kernel forgets to write shows.
inline Array poisoned(int batch, int heads, size_t tokens, int d, Dtype dtype = Dtype::float32) {
  Array x(batch, heads, tokens, d, dtype);
  for (size_t i = 0; i < x.size(); i++)
    store_element(x.bytes.data(), dtype, i, std::numeric_limits<float>::quiet_NaN());
  return x;
}

inline Array from_floats(int batch, int heads, size_t tokens, int d, const std::vector<float>& values) {
  Array x(batch, heads, tokens, d);
  memcpy(x.bytes.data(), values.data(), x.bytes.size());
  return x;
}

// Vectors kept as floats: what goes wrong with it is bookkeeping, not rounding.
inline Recipe plain_recipe() {
  Recipe recipe;
  recipe.rotation = Rotation::identity, recipe.offset = false, recipe.k.bits = recipe.v.bits = 32;
  return recipe;
}

inline LayerConfig config_of(int kv_heads, int d, Dtype dtype = Dtype::float32, Recipe recipe = {}) {
  LayerConfig config;
  config.kv_heads = kv_heads, config.head_dim_k = config.head_dim_v = d;
  config.dtype = dtype, config.recipe = recipe;
  return config;
}

inline Layer make_layer(const LayerConfig& config) {
  Result<Layer> layer = Layer::create(config);
  EXPECT_TRUE(layer.ok()) << layer.status().message();
  return std::move(layer.value());
}

inline void must(const Status& status) { ASSERT_TRUE(status.ok()) << status.message(); }

// Appends tokens [from, to) of two arrays.
inline Status append(Layer& layer, const Array& k, const Array& v, size_t from, size_t to) {
  return layer.append(k.view(from), v.view(from), k.batch, to - from);
}
inline Status append(Layer& layer, const Array& k, const Array& v) { return append(layer, k, v, 0, k.tokens); }

// What a layer holds, as floats; poisoned first, so that an unwritten token is never equal to another.
struct Decoded {
  Array k, v;
};
inline Decoded decode(const Layer& layer) {
  const LayerConfig& config = layer.config();
  Decoded held{poisoned(layer.batch(), config.kv_heads, layer.visible(), config.head_dim_k),
               poisoned(layer.batch(), config.kv_heads, layer.visible(), config.head_dim_v)};
  must(layer.decode(reinterpret_cast<float*>(held.k.bytes.data()), reinterpret_cast<float*>(held.v.bytes.data())));
  return held;
}

inline LayerParts save(const Layer& layer) {
  LayerParts parts;
  must(layer.save(parts));
  return parts;
}
inline Layer load(const LayerConfig& config, const LayerParts& parts) {
  Result<Layer> layer = Layer::load(config, parts);
  EXPECT_TRUE(layer.ok()) << layer.status().message();
  return layer.ok() ? std::move(layer.value()) : make_layer(config);
}

// The first field in which two saved layers differ, or "": so that a failure names it.
inline std::string difference(const LayerParts& a, const LayerParts& b) {
  std::string name;
  auto compare = [&](const char* field, const auto& x, const auto& y) {
    if (name.empty() && x != y) name = field;
  };
  compare("batch", a.batch, b.batch), compare("length", a.length, b.length), compare("first", a.first, b.first);
  compare("packed_end", a.packed_end, b.packed_end), compare("pages_dropped", a.pages_dropped, b.pages_dropped);
  compare("offset_ready", a.offset_ready, b.offset_ready), compare("page_table", a.page_table, b.page_table);
  compare("pages", a.pages, b.pages), compare("raw_k", a.raw_k, b.raw_k), compare("raw_v", a.raw_v, b.raw_v);
  compare("offset_k", a.offset_k, b.offset_k), compare("offset_v", a.offset_v, b.offset_v);
  compare("given_offset_k", a.given_offset_k, b.given_offset_k);
  compare("given_offset_v", a.given_offset_v, b.given_offset_v);
  compare("lambda_k", a.lambda_k, b.lambda_k), compare("lambda_v", a.lambda_v, b.lambda_v);
  compare("frequencies", a.frequencies, b.frequencies), compare("interleaved", a.interleaved, b.interleaved);
  compare("counted", a.counted, b.counted);
  return name;
}

// Frequencies of RoPE over `rotated` channels, in radians a token.
inline std::vector<float> rope_frequencies(int rotated, double base = 1e4) {
  std::vector<float> frequencies;
  for (int i = 0; i < rotated / 2; i++) frequencies.push_back((float)std::pow(base, -2.0 * i / rotated));
  return frequencies;
}

// Any of those that a layer may be told of: over all channels or some, pairs side by side or half a head apart.
struct Rope {
  std::vector<float> frequencies;
  bool interleaved = false;
};
inline Rope random_rope(Random& random, int d) {
  return {rope_frequencies(d / 2 / (1 + random.below(2)) * 2, random.below(2) ? 1e4 : 1e6), random.below(2) == 1};
}
inline Status set_rope(Layer& layer, const Rope& rope) {
  return layer.set_frequencies(rope.frequencies.data(), (int)rope.frequencies.size(), rope.interleaved);
}

// x [d] as RoPE turns it at a position, in double.
inline std::vector<double> turned(const Rope& rope, const float* x, int d, double position) {
  std::vector<double> out(x, x + d);
  const int pairs = (int)rope.frequencies.size();
  for (int i = 0; i < pairs; i++) {
    const int a = rope.interleaved ? 2 * i : i, b = rope.interleaved ? 2 * i + 1 : i + pairs;
    const double angle = (double)rope.frequencies[i] * position, c = std::cos(angle), s = std::sin(angle);
    out[a] = c * x[a] - s * x[b], out[b] = c * x[b] + s * x[a];
  }
  return out;
}

// Keys with a constant before RoPE, ± `bias` in every channel, beside a rest of spread 1.
inline Array turning_keys(Random& random, const Rope& rope, int batch, int heads, size_t tokens, int d, float bias,
                          Dtype dtype = Dtype::float32) {
  Array k = random_array(random, batch, heads, tokens, d, dtype);
  for (int b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++) {
      std::vector<float> constant(d);
      for (float& c : constant) c = random.below(2) ? bias : -bias;
      for (size_t t = 0; t < tokens; t++) {
        const std::vector<double> here = turned(rope, constant.data(), d, (double)t);
        for (int c = 0; c < d; c++) k.set(b, h, t, c, k.get(b, h, t, c) + (float)here[c]);
      }
    }
  return k;
}

inline bool same_bits(const Array& a, const Array& b) { return a.bytes == b.bytes; }
inline bool same_bits(const Decoded& a, const Decoded& b) { return same_bits(a.k, b.k) && same_bits(a.v, b.v); }
inline bool all_finite(const Array& x) {
  for (size_t i = 0; i < x.size(); i++)
    if (!std::isfinite(x.flat(i))) return false;
  return true;
}

// The newest `queries` positions of a layer attended by q [batch, heads, queries, d_k] into a poisoned output.
inline AttendArgs args_of(const Array& q, Array& out) {
  AttendArgs args;
  args.q = q.view(), args.out = out.out();
  args.heads = q.heads, args.queries = (int)q.tokens;
  args.scale = 1.0f / std::sqrt((float)q.d);
  return args;
}
inline Array attend(Layer& layer, const Array& q) {
  Array out = poisoned(q.batch, q.heads, q.tokens, layer.config().head_dim_v, q.dtype);
  must(layer.attend(args_of(q, out)));
  return out;
}

// Plain attention in double over K, V [batch, kv_heads, tokens, d], and the size its errors are measured against.
struct Plain {
  std::vector<double> out;   // [batch, heads, queries, d_v]
  std::vector<double> size;  // [batch, heads, queries]: Σ p · root mean square of v; never near zero as outputs can be
};

// sees(b, query, token) decides visibility; k_of(b, kv_head, query, token, c) and v_of give the values.
template <class Sees, class Key, class Value>
Plain plain_attention(const AttendArgs& args, const Array& q, int kv_heads, size_t tokens, int d_v, Sees sees, Key k_of,
                      Value v_of) {
  Plain plain;
  for (int b = 0; b < q.batch; b++)
    for (int h = 0; h < q.heads; h++)
      for (int i = 0; i < args.queries; i++) {
        const int kv = h / (q.heads / kv_heads);
        std::vector<double> scores(tokens, -INFINITY);
        double top = args.sinks ? args.sinks[h] : -INFINITY;
        for (size_t t = 0; t < tokens; t++) {
          if (!sees(b, i, t)) continue;
          double s = 0.0;
          for (int c = 0; c < q.d; c++) s += (double)q.get(b, h, i, c) * k_of(b, kv, i, t, c);
          s *= args.scale;
          scores[t] = args.softcap > 0.0f ? args.softcap * std::tanh(s / args.softcap) : s;
          top = std::max(top, scores[t]);
        }
        double sum = args.sinks ? std::exp(args.sinks[h] - top) : 0.0, size = 0.0;
        std::vector<double> out(d_v);
        for (size_t t = 0; t < tokens; t++) {
          if (scores[t] == -INFINITY) continue;
          double p = std::exp(scores[t] - top), squares = 0.0;
          sum += p;
          for (int c = 0; c < d_v; c++) {
            double v = v_of(b, kv, i, t, c);
            out[c] += p * v, squares += v * v;
          }
          size += p * std::sqrt(squares / d_v);
        }
        for (double x : out) plain.out.push_back(sum > 0.0 ? x / sum : 0.0);
        plain.size.push_back(sum > 0.0 ? size / sum : 1.0);
      }
  return plain;
}

// The usual case: one set of keys and values for all queries, causal.
inline Plain plain_attention(const AttendArgs& args, const Array& q, const Array& k, const Array& v) {
  const size_t first_query = k.tokens - args.queries;
  return plain_attention(
      args, q, k.heads, k.tokens, v.d, [&](int, int i, size_t t) { return t <= first_query + i; },
      [&](int b, int h, int, size_t t, int c) { return (double)k.get(b, h, t, c); },
      [&](int b, int h, int, size_t t, int c) { return (double)v.get(b, h, t, c); });
}

// Largest |a − b| in units of `size`; infinity when a holds anything not finite.
inline double error_of(const Array& a, const std::vector<double>& b, const std::vector<double>& size) {
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); i++) {
    double error = std::fabs(a.flat(i) - b[i]) / size[i / a.d];
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}
inline double error_of(const Array& a, const Plain& plain) { return error_of(a, plain.out, plain.size); }
inline double error_of(const Array& a, const Array& b, const Plain& plain) {
  std::vector<double> values(b.size());
  for (size_t i = 0; i < b.size(); i++) values[i] = b.flat(i);
  return error_of(a, values, plain.size);
}

// The same, root mean square.
inline double mean_error_of(const Array& a, const Array& b, const Plain& plain) {
  double squares = 0.0;
  for (size_t i = 0; i < a.size(); i++) squares += std::pow((a.flat(i) - b.flat(i)) / plain.size[i / a.d], 2);
  return std::isnan(squares) ? INFINITY : std::sqrt(squares / (double)a.size());
}

// Rounding of the output dtype, in units of its size: outputs of a few times the size are common.
inline double output_rounding(Dtype dtype) {
  return dtype == Dtype::float32 ? 1e-6 : dtype == Dtype::float16 ? 4e-3 : 3e-2;
}

// Kernels turn q into bytes, within 1/254 of its group's largest, and p·scale too: scores of spread 1 are off by under
// 1 %, and the worst of a run's million outputs by some 3 %.
constexpr double kByteRounding = 0.06;
// Beside 8-bit codes they are two bytes, 254 times as fine: sums in float32 are then half of the error.
constexpr double kTwoByteRounding = 1e-3;
inline double byte_rounding(const Recipe& recipe) {
  return recipe.k.bits == 8 && recipe.v.bits == 8 ? kTwoByteRounding : kByteRounding;
}
// Backends share those bytes; they differ by the order of float sums, root mean square. Where one of them falls on the
// other side of a tie, a score moves by up to 1/127 of a product, and one row's outputs with it.
constexpr double kSameBytes = 1e-3;
constexpr double kOneTie = 1e-2;

}  // namespace halfbyte::testing
