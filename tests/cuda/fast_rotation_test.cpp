// The transforms that Metal's kernels share, on a CUDA device against the definition.
#include "fast_rotation.h"

#include <numbers>

#include "device.h"
#include "rotation.h"

namespace halfbyte {
namespace {

TEST(CudaFastRotation, FollowsTheDefinitionThereAndBack) {
  HALFBYTE_NEEDS_DEVICE();
  std::mt19937 engine(std::random_device{}());
  std::normal_distribution<float> normal;
  for (int d : {64, 80, 96, 128, 256})
    for (Rotation kind : {Rotation::srft, Rotation::srht}) {
      if (kind == Rotation::srht && (d & (d - 1))) continue;
      const RotationPlan plan = make_rotation(kind, d, 5, 2);
      std::vector<float> factors, roots, x((size_t)fast_rotation_vectors(d) * d);
      for (int k = 0; k < d && kind == Rotation::srft; k++)
        for (double part : {std::cos(2 * std::numbers::pi * k / d), -std::sin(2 * std::numbers::pi * k / d)})
          roots.push_back((float)part);
      for (float sign : plan.signs)
        factors.push_back(sign / std::sqrt((kind == Rotation::srft ? 2.0f : 1.0f) * (float)d));
      for (float& value : x) value = normal(engine);
      const std::vector<float> poison(x.size(), NAN);
      const OnDevice<float> d_factors(factors), d_roots(roots), d_x(x), d_there(poison), d_back(poison);
      expect_launched(launch_fast_rotation(d, d_factors.get(), d_roots.get(), d_x.get(), d_there.get(), d_back.get()));
      const std::vector<float> there = d_there.values(), back = d_back.values();
      for (size_t v = 0; v < x.size(); v += d) {
        const std::vector<double> in(&x[v], &x[v] + d);
        std::vector<double> want(d);
        rotate_reference(plan, false, in.data(), want.data());
        // Float rounding of eight additions, of vectors of length √d ≤ 16.
        for (int i = 0; i < d; i++) {
          ASSERT_NEAR(there[v + i], want[i], 1e-5) << d << " channel " << i;
          ASSERT_NEAR(back[v + i], x[v + i], 1e-5) << d << " channel " << i;
        }
      }
    }
}

}  // namespace
}  // namespace halfbyte
