// What the tests of the Metal text share: its kernels run on the emulator, and a layer's tables as they take them.
#pragma once

#include <cmath>
#include <numbers>

#include "coding.h"
#include "emulator/emulator.h"
#include "emulator/kernels.h"
#include "gpu/arguments.h"

namespace halfbyte::testing {

using gpu::AttendNumbers;
using gpu::DecodeNumbers;
using gpu::EncodeNumbers;
using gpu::LayerNumbers;
using gpu::SpanNumbers;
using gpu::ViewNumbers;

constexpr int kMetalDims[] = {64, 80, 96, 128, 256};

// In order, reversed, and two shuffles: results must not depend on it.
inline std::vector<unsigned> schedules(Random& random) {
  return {0, 1, 2 + (unsigned)random.below(1 << 30), 2 + (unsigned)random.below(1 << 30)};
}

// Address of what a kernel only reads, and may have been declared const.
template <class T>
void* bound(const std::vector<T>& values) {
  static float nothing[16] = {};  // Metal binds something everywhere
  return values.empty() ? static_cast<void*>(nothing) : const_cast<T*>(values.data());
}
template <class T>
void* bound(const T& value) {
  return const_cast<T*>(&value);
}

inline void run_kernel(const std::string& name, const std::vector<void*>& buffers, int groups, int threads,
                       unsigned schedule) {
  for (const Kernel& kernel : kernels()) {
    if (name != kernel.name) continue;
    ASSERT_EQ((int)buffers.size(), kernel.buffers) << name;
    const std::string error = emulator::run(
        {groups, threads, schedule}, [&](unsigned group, unsigned tid) { kernel.call(buffers.data(), group, tid); });
    ASSERT_EQ(error, "") << name << ", schedule " << schedule;
    return;
  }
  FAIL() << "no kernel " << name;
}

// R as the kernels take it.
inline std::vector<float> rotation_buffer(const RotationPlan& plan) {
  const int d = plan.head_dim;
  std::vector<float> out;
  if (plan.kind == Rotation::srft || plan.kind == Rotation::srht)
    for (float sign : plan.signs)
      out.push_back(sign / std::sqrt((plan.kind == Rotation::srft ? 2.0f : 1.0f) * (float)d));
  if (plan.kind == Rotation::srft)
    for (int k = 0; k < d; k++)
      out.push_back((float)std::cos(2 * std::numbers::pi * k / d)),
          out.push_back((float)-std::sin(2 * std::numbers::pi * k / d));
  if (plan.kind == Rotation::dense) {
    out = matrix_of(plan);
    for (int i = 0; i < d * d; i++) out.push_back(out[(size_t)(i % d) * d + i / d]);
  }
  return out;
}

inline LayerNumbers layer_numbers(const Recipe& recipe, int batch, int kv_heads, Dtype dtype, int64_t table_stride,
                                  int64_t first_page) {
  return {batch,
          kv_heads,
          (int64_t)dtype,
          (int64_t)recipe.rotation,
          recipe.k.bits,
          recipe.k.group,
          recipe.v.bits,
          recipe.v.group,
          recipe.scale_bits,
          recipe.search,
          recipe.signed_scale,
          table_stride,
          first_page};
}

inline ViewNumbers view_numbers(const Array& x) {
  const int64_t d = x.d, tokens = (int64_t)x.tokens;
  return {x.heads * tokens * d, tokens * d, d};
}

// Groups that encode or decode n vectors; docs/metal.md.
inline int code_groups(int n, int d) {
  int lanes = 2;
  while (lanes * 16 < d) lanes *= 2;
  const int each = 4 * 32 / lanes;
  return (n + each - 1) / each;
}

}  // namespace halfbyte::testing
