// Random vectors and caches for the benches and the instruction counts, the same in every run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "halfbyte/halfbyte.hpp"
#include "numbers.h"

namespace halfbyte::bench {

// A bench that measured a failed call would be worse than none.
inline void must(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

// n normal values, drawn once and then repeated: drawing takes longer than most benches.
inline std::vector<float> normals(size_t n, size_t from) {
  static const std::vector<float> drawn = [] {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(99991);  // a prime, so that no two vectors are the same
    for (float& value : x) value = normal(engine);
    return x;
  }();
  std::vector<float> x(n);
  for (size_t i = 0; i < n; i++) x[i] = drawn[(from + i) % drawn.size()];
  return x;
}

// Backends that run here, without the reference, which is not meant to be quick.
inline std::vector<std::string> fast_backends() {
  std::vector<std::string> names;
  for (const BackendInfo& info : backends())
    if (info.usable && info.name != "reference") names.push_back(info.name);
  return names;
}

// K, V and queries in fp16: one sequence, one KV head.
struct Tokens {
  int head_dim, heads;
  size_t count;
  std::vector<uint16_t> k, v;  // [count, head_dim]
  std::vector<uint16_t> q;     // [heads, queries, head_dim]

  Tokens(int head_dim, int heads, size_t count, size_t queries = 1)
      : head_dim(head_dim),
        heads(heads),
        count(count),
        k(halves(count, 0)),
        v(halves(count, 33331)),
        q(halves(heads * queries, 77773)) {}

  View view(const std::vector<uint16_t>& x, size_t from = 0) const {
    return {x.data() + from * head_dim, 0, (ptrdiff_t)(count * head_dim), head_dim};
  }

 private:
  std::vector<uint16_t> halves(size_t n, size_t from) const {
    std::vector<uint16_t> x;
    for (float value : normals(n * head_dim, from)) x.push_back(float_to_half(value));
    return x;
  }
};

inline Layer make_layer(int head_dim, const Recipe& recipe) {
  Result<Layer> layer = Layer::create({1, head_dim, head_dim, Dtype::float16, recipe});
  must(layer.status());
  if (!recipe.offset || !recipe.offset_span) return std::move(layer.value());
  std::vector<float> frequencies;  // of a RoPE over all channels
  for (int i = 0; i < head_dim / 2; i++) frequencies.push_back((float)std::pow(1e6, -2.0 * i / head_dim));
  must(layer.value().set_frequencies(frequencies.data(), head_dim / 2));
  return std::move(layer.value());
}

// The newest `queries` tokens attend to a cache; the output is kept here.
struct Attention {
  std::vector<uint16_t> out;
  AttendArgs args;

  explicit Attention(const Tokens& tokens, int queries = 1) : out(tokens.q.size()) {
    const ptrdiff_t d = tokens.head_dim, head = queries * d;
    const size_t chunk = tokens.count - queries;
    args.q = {tokens.q.data(), 0, head, d};
    args.out = {out.data(), 0, head, d};
    args.heads = tokens.heads, args.queries = queries, args.scale = 1.0f / std::sqrt((float)d);
    if (queries > 1) args.chunk_k = tokens.view(tokens.k, chunk), args.chunk_v = tokens.view(tokens.v, chunk);
  }
};

}  // namespace halfbyte::bench
