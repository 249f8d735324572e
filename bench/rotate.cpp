// The rotation alone, forward and back: one thread, by backend, kind and head size.
#include <benchmark/benchmark.h>

#include "inputs.h"

namespace halfbyte::bench {
namespace {

constexpr size_t kVectors = 2048;

void rotate_vectors(benchmark::State& state, const std::string& backend, Rotation kind) {
  const int head_dim = (int)state.range(0);
  Recipe recipe;
  recipe.rotation = kind;
  const std::vector<float> x = normals(kVectors * head_dim, 0);
  std::vector<float> out(x.size());
  must(set_backend(backend));
  set_num_threads(1);
  for (auto _ : state) {
    must(rotate(x.data(), out.data(), kVectors, head_dim, recipe, 0, state.range(1) != 0));
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed((int64_t)(state.iterations() * kVectors));
}

const bool registered = [] {
  for (const std::string& name : fast_backends()) {
    auto add = [&](const char* kind, Rotation rotation, const std::vector<int64_t>& head_dims) {
      benchmark::RegisterBenchmark((std::string("rotate/") + kind + "/" + name).c_str(), rotate_vectors, name, rotation)
          ->ArgNames({"d", "inverse"})
          ->MinTime(0.02)
          ->ArgsProduct({head_dims, {0, 1}});
    };
    add("srft", Rotation::srft, {64, 80, 96, 112, 128, 192, 256});
    add("srht", Rotation::srht, {64, 128, 256});
  }
  return true;
}();

}  // namespace
}  // namespace halfbyte::bench
