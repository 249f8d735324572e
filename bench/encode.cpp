// Packing vectors: one thread, by backend, rotation, head size, group, bits and scale search.
#include <benchmark/benchmark.h>

#include "inputs.h"

namespace halfbyte::bench {
namespace {

constexpr size_t kVectors = 2048;

void encode(benchmark::State& state, const std::string& backend, Rotation rotation) {
  const int head_dim = (int)state.range(0);
  Recipe recipe;
  recipe.rotation = rotation, recipe.k = {(int)state.range(2), (int)state.range(1)},
  recipe.search = state.range(3) != 0;
  const std::vector<float> x = normals(kVectors * head_dim, 0);
  must(set_backend(backend));
  set_num_threads(1);
  for (auto _ : state) {
    must(encode_only(x.data(), kVectors, head_dim, recipe, Side::k));
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed((int64_t)(state.iterations() * kVectors));
}

const bool registered = [] {
  for (const std::string& name : fast_backends())
    for (auto [label, rotation] :
         {std::pair{"srft", Rotation::srft}, {"srht", Rotation::srht}, {"none", Rotation::identity}})
      benchmark::RegisterBenchmark(("encode/" + std::string(label) + "/" + name).c_str(), encode, name, rotation)
          ->ArgNames({"d", "group", "bits", "search"})
          ->MinTime(0.02)
          ->ArgsProduct({{64, 128, 256}, {32, 16, 0}, {4, 8}, {0, 1}});
  return true;
}();

}  // namespace
}  // namespace halfbyte::bench
