// What the CUDA tests share: a case, random inputs, memory on the device, tables, and the CPU layer to compare with.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>

#include "cuda/halfbyte_cuda.h"
#include "encode.h"
#include "numbers.h"
#include "rotation.h"

namespace halfbyte {

inline bool has_device() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 && halfbyte_cuda_probe(0) == 0;
}

#define HALFBYTE_NEEDS_DEVICE() \
  if (!has_device()) GTEST_SKIP() << "no CUDA device that can run these kernels"

inline void expect_launched(int error) {
  EXPECT_EQ(error, 0) << halfbyte_cuda_error(error);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

// Layers are packed by the fastest kernels there are, and attended, or coded, by the reference.
inline void use_backend(const std::string& name) {
  set_num_threads((int)std::thread::hardware_concurrency());
  ASSERT_TRUE(set_backend(name).ok());
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
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
  float softcap = 0.0f, sharpness = 1.0f;  // sharpness: of the scale
  int pairs = 0;                           // channels that turn with RoPE, and K's offset with them
  bool interleaved = false;
  size_t shift = 0;  // bytes by which queries lie behind an aligned address
};

// RoPE's, in radians a token.
inline std::vector<float> frequencies_of(const Case& c) {
  std::vector<float> out(c.pairs);
  for (int i = 0; i < c.pairs; i++) out[i] = std::pow(1e-4f, (float)i / (float)c.pairs);
  return out;
}

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

inline View view_of(const std::vector<uint8_t>& data, const Case& c, int heads, size_t tokens) {
  const auto d = (ptrdiff_t)c.head_dim;
  return {data.data(), (ptrdiff_t)(heads * tokens) * d, (ptrdiff_t)tokens * d, d};
}

inline HalfbyteCudaView device_view(const void* data, const Case& c, int heads, size_t tokens) {
  const int64_t d = c.head_dim;
  return {data, (int64_t)(heads * tokens) * d, (int64_t)tokens * d, d};
}

inline HalfbyteCudaLayer layer_of(const Case& c) {
  const Recipe& r = c.recipe;
  return {c.kv_heads,      c.head_dim, c.head_dim,   (int64_t)c.dtype, r.k.bits,       r.v.bits,
          r.k.group,       r.v.group,  r.scale_bits, r.search,         r.signed_scale, (int64_t)r.rotation,
          (int64_t)r.seed, 0};
}

inline std::vector<float> transposed(const std::vector<float>& m, int d) {
  std::vector<float> t(m.size());
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) t[(size_t)j * d + i] = m[(size_t)i * d + j];
  return t;
}

// Tables of one side on the device.
struct Tables {
  Tables(const HalfbyteCudaLayer& layer, int d, bool is_v, const std::vector<float>& mu,
         const std::vector<float>& lambda)
      : matrix(make_matrix(layer, d, is_v)),
        rotation(matrix),
        rotation_t(transposed(matrix, d)),
        fragments(make_fragments(layer, is_v, matrix)),
        attend_fragments(make_attend_fragments(layer, is_v, matrix)),
        fast(make_fast(layer, is_v)),
        offset(mu),
        rotated(rotate(matrix, mu, d)),
        factors(lambda),
        inverse(inverse_of(lambda)) {}

  static std::vector<float> make_matrix(const HalfbyteCudaLayer& layer, int d, bool is_v) {
    std::vector<float> m((size_t)d * d);
    halfbyte_cuda_rotation(&layer, is_v, m.data());
    return m;
  }
  static std::vector<uint8_t> make_fragments(const HalfbyteCudaLayer& layer, bool is_v, const std::vector<float>& m) {
    std::vector<uint8_t> bytes(halfbyte_cuda_fragment_bytes(&layer, is_v));
    if (!bytes.empty()) halfbyte_cuda_fragments(&layer, is_v, m.data(), bytes.data());
    return bytes;
  }
  static std::vector<uint8_t> make_attend_fragments(const HalfbyteCudaLayer& layer, bool is_v,
                                                    const std::vector<float>& m) {
    std::vector<uint8_t> bytes(halfbyte_cuda_attend_fragment_bytes(&layer, is_v));
    if (!bytes.empty()) halfbyte_cuda_attend_fragments(&layer, is_v, m.data(), bytes.data());
    return bytes;
  }
  static std::vector<float> make_fast(const HalfbyteCudaLayer& layer, bool is_v) {
    std::vector<float> out(halfbyte_cuda_fast_bytes(&layer, is_v) / sizeof(float));
    if (!out.empty()) halfbyte_cuda_fast(&layer, is_v, out.data());
    return out;
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
    return {identity ? nullptr : rotation.get(),
            identity ? nullptr : rotation_t.get(),
            fragments.get(),
            attend_fragments.get(),
            fast.get(),
            offset.get(),
            rotated.get(),
            factors.get(),
            inverse.get(),
            0,
            0,
            1};
  }

  std::vector<float> matrix;
  OnDevice<float> rotation, rotation_t;
  OnDevice<uint8_t> fragments, attend_fragments;
  OnDevice<float> fast, offset, rotated, factors, inverse;
};

inline std::vector<float> some_lambda(const Case& c, unsigned seed) {
  if (!c.recipe.lambda) return {};
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> between(0.5f, 2.0f);
  std::vector<float> lambda(c.kv_heads * c.head_dim);
  for (float& x : lambda) x = between(engine);
  return lambda;
}

inline Layer make_layer(const Case& c) {
  Result<Layer> layer = Layer::create({c.kv_heads, c.head_dim, c.head_dim, c.dtype, c.recipe, 0, c.window});
  EXPECT_TRUE(layer.ok()) << layer.status().message();
  if (c.recipe.lambda) {
    const std::vector<float> k = some_lambda(c, 1), v = some_lambda(c, 2);
    EXPECT_TRUE(layer.value().set_lambda(k.data(), v.data()).ok());
  }
  if (c.pairs) {
    EXPECT_TRUE(layer.value().set_frequencies(frequencies_of(c).data(), c.pairs, c.interleaved).ok());
  }
  return std::move(layer.value());
}

// With c.prefix random tokens, packed by whatever backend is in use.
inline Layer filled_layer(const Case& c, Random& random) {
  Layer layer = make_layer(c);
  const auto k = random.tensor(c, c.kv_heads, c.prefix, true), v = random.tensor(c, c.kv_heads, c.prefix, false);
  EXPECT_TRUE(
      layer.append(view_of(k, c, c.kv_heads, c.prefix), view_of(v, c, c.kv_heads, c.prefix), c.batch, c.prefix).ok());
  return layer;
}

inline std::vector<int64_t> page_addresses(const LayerParts& parts, const uint8_t* pages, size_t page_bytes) {
  std::vector<int64_t> table;
  for (int32_t i : parts.page_table) table.push_back((int64_t)(pages + i * page_bytes));
  return table;
}

inline double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); i++) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(error / norm);
}

inline std::vector<double> as_doubles(const std::vector<uint8_t>& bytes, Dtype dtype) {
  std::vector<double> out(bytes.size() / dtype_bytes(dtype));
  for (size_t i = 0; i < out.size(); i++) out[i] = load_element(bytes.data(), dtype, i);
  return out;
}

}  // namespace halfbyte
