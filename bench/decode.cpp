// Unpacking a whole cache to float32: one thread, one KV head, by backend, head size, group and bits.
#include <benchmark/benchmark.h>

#include "inputs.h"

namespace halfbyte::bench {
namespace {

constexpr size_t kTokens = 2048;

void decode(benchmark::State& state, const std::string& backend) {
  const int head_dim = (int)state.range(0);
  Recipe recipe;
  recipe.k = recipe.v = {(int)state.range(2), (int)state.range(1)};
  const Tokens tokens(head_dim, 1, kTokens);
  must(set_backend(fast_backends().front()));  // packing is not what is measured
  Layer layer = make_layer(head_dim, recipe);
  must(layer.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, kTokens));
  std::vector<float> k(kTokens * head_dim), v(kTokens * head_dim);
  must(set_backend(backend));
  set_num_threads(1);
  for (auto _ : state) {
    must(layer.decode(k.data(), v.data()));
    benchmark::DoNotOptimize(k.data());
    benchmark::DoNotOptimize(v.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed((int64_t)(state.iterations() * 2 * kTokens));
}

const bool registered = [] {
  for (const std::string& name : fast_backends())
    benchmark::RegisterBenchmark(("decode/" + name).c_str(), decode, name)
        ->ArgNames({"d", "group", "bits"})
        ->MinTime(0.02)
        ->ArgsProduct({{64, 128, 256}, {32, 16, 0}, {4, 8}});
  return true;
}();

}  // namespace
}  // namespace halfbyte::bench
