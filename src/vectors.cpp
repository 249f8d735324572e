// Codes for loose vectors, outside any cache: round trips for evaluation, encode timing, rotation.
#include <algorithm>

#include "decode.h"
#include "encode.h"
#include "threads.h"

namespace halfbyte {
namespace {

// One side of one block, apart from any page.
struct Block {
  std::vector<uint8_t> codes, scales;
  explicit Block(const SideFormat& format) : codes(code_bytes(format)), scales(scales_bytes(format)) {}
};

constexpr size_t kVectorsEach = 1024;  // vectors a task

// Calls task(from, to) for runs of whole blocks.
template <class Task>
void for_runs(size_t n, Task task) {
  parallel_for((n + kVectorsEach - 1) / kVectorsEach,
               [&](size_t i) { task(i * kVectorsEach, std::min(n, (i + 1) * kVectorsEach)); });
}

EncodeArgs encode_args(const SideFormat& format, const RotationPlan& rotation, Side side, const float* x, int n,
                       Block& block) {
  EncodeArgs args{
      &format, &rotation, side, Dtype::float32, {}, n, 0, nullptr, nullptr, block.codes.data(), block.scales.data()};
  for (int i = 0; i < n; i++) args.rows[i] = x + (size_t)i * format.head_dim;
  return args;
}

// The recipe's rotation, once recipe and matrix are known to fit.
Result<RotationPlan> plan_of(const Recipe& recipe, int head_dim, int layer_index, const float* matrix) {
  if (Status status = recipe.check(head_dim); !status.ok()) return status;
  const bool dense = recipe.rotation == Rotation::dense;
  if (dense != (matrix != nullptr))
    return Status(Code::bad_argument, dense ? "the recipe's rotation is dense, and no matrix was given"
                                            : "a matrix was given, and the recipe's rotation is not dense");
  if (dense)
    if (Status status = check_orthonormal("matrix", matrix, head_dim); !status.ok()) return status;
  return make_rotation(recipe.rotation, head_dim, recipe.seed, layer_index, matrix);
}

}  // namespace

Status roundtrip(const float* x, float* out, size_t n, int head_dim, const Recipe& recipe, Side side, const float* mu,
                 const float* lambda, int layer_index, const float* matrix) {
  Result<RotationPlan> plan = plan_of(recipe, head_dim, layer_index, matrix);
  if (!plan.ok()) return plan.status();
  const RotationPlan& rotation = plan.value();
  const SideFormat format = make_side_format(recipe, side, head_dim);
  std::vector<float> inverse_lambda;
  for (int c = 0; lambda && c < head_dim; c++) inverse_lambda.push_back(1.0f / lambda[c]);
  for_runs(n, [&](size_t from, size_t to) {
    Block block(format);
    std::vector<float> vectors((size_t)kBlockTokens * head_dim);
    for (size_t i = from; i < to; i += kBlockTokens) {
      const int count = (int)std::min<size_t>(kBlockTokens, to - i);
      EncodeArgs args = encode_args(format, rotation, side, x + i * head_dim, count, block);
      args.offset = mu, args.lambda = lambda;
      encode_block(args);
      decode_block({&format, &rotation, side, mu, lambda ? inverse_lambda.data() : nullptr, block.codes.data(),
                    block.scales.data(), vectors.data()});
      std::copy_n(vectors.data(), (size_t)count * head_dim, out + i * head_dim);
    }
  });
  return {};
}

Status encode_only(const float* x, size_t n, int head_dim, const Recipe& recipe, Side side, const float* matrix) {
  Result<RotationPlan> plan = plan_of(recipe, head_dim, 0, matrix);
  if (!plan.ok()) return plan.status();
  const RotationPlan& rotation = plan.value();
  const SideFormat format = make_side_format(recipe, side, head_dim);
  for_runs(n, [&](size_t from, size_t to) {
    Block block(format);
    for (size_t i = from; i < to; i += kBlockTokens)
      encode_block(
          encode_args(format, rotation, side, x + i * head_dim, (int)std::min<size_t>(kBlockTokens, to - i), block));
  });
  return {};
}

Status rotate(const float* x, float* out, size_t n, int head_dim, const Recipe& recipe, int layer_index, bool inverse,
              const float* matrix) {
  Result<RotationPlan> plan = plan_of(recipe, head_dim, layer_index, matrix);
  if (!plan.ok()) return plan.status();
  const RotationPlan& rotation = plan.value();
  for_runs(n, [&](size_t from, size_t to) {
    std::copy_n(x + from * head_dim, (to - from) * head_dim, out + from * head_dim);
    for (size_t i = from; i < to; i += kBlockTokens)
      current_backend().rotate(rotation, inverse, out + i * head_dim, head_dim,
                               (int)std::min<size_t>(kBlockTokens, to - i));
  });
  return {};
}

}  // namespace halfbyte
