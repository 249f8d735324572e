// Attention of one new token over packed codes, and over fp16 as given: one thread, one KV head, by backend and shape.
#include <benchmark/benchmark.h>

#include "inputs.h"

namespace halfbyte::bench {
namespace {

template <class Cache>
void attend(benchmark::State& state, const std::string& backend, Cache& cache, const Tokens& tokens) {
  must(set_backend(backend));
  set_num_threads(1);
  Attention attention(tokens);
  for (auto _ : state) {
    must(cache.attend(attention.args));
    benchmark::DoNotOptimize(attention.out.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed((int64_t)(state.iterations() * tokens.count));
  state.SetBytesProcessed((int64_t)(state.iterations() * cache.bytes()));
}

void attend_packed(benchmark::State& state, const std::string& backend) {
  Recipe recipe;
  recipe.k = {(int)state.range(3), (int)state.range(1)}, recipe.v = {(int)state.range(3), (int)state.range(2)};
  const Tokens tokens((int)state.range(0), (int)state.range(4), (size_t)state.range(5));
  must(set_backend(fast_backends().front()));  // packing is not what is measured
  Layer layer = make_layer(tokens.head_dim, recipe);
  must(layer.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, tokens.count));
  attend(state, backend, layer, tokens);
}

void attend_raw(benchmark::State& state, const std::string& backend) {
  const Tokens tokens((int)state.range(0), (int)state.range(1), (size_t)state.range(2));
  RawCache cache(1, tokens.head_dim, Dtype::float16);
  must(cache.append(tokens.view(tokens.k), tokens.view(tokens.v), 1, tokens.count));
  attend(state, backend, cache, tokens);
}

const bool registered = [] {
  const std::vector<int64_t> head_dims = {64, 128, 256}, query_heads = {1, 4, 6}, lengths = {1024, 8192};
  for (const std::string& name : fast_backends()) {
    auto* packed = benchmark::RegisterBenchmark(("attend/packed/" + name).c_str(), attend_packed, name);
    packed->ArgNames({"d", "k_group", "v_group", "bits", "gqa", "tokens"})->MinTime(0.02);
    for (int64_t d : head_dims)
      for (auto [k_group, v_group] : {std::pair{32, 0}, {32, 32}, {16, 16}, {0, 0}})
        for (int64_t bits : {4, 8})
          for (int64_t heads : query_heads)
            for (int64_t tokens : lengths) packed->Args({d, k_group, v_group, bits, heads, tokens});
    auto* raw = benchmark::RegisterBenchmark(("attend/fp16/" + name).c_str(), attend_raw, name);
    raw->ArgNames({"d", "gqa", "tokens"})->MinTime(0.02)->ArgsProduct({head_dims, query_heads, lengths});
  }
  return true;
}();

}  // namespace
}  // namespace halfbyte::bench
