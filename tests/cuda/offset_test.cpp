// Offsets found on the device against those of the CPU's layer, and what they are rotated and turned.
#include "attend_case.h"

namespace halfbyte {
namespace {

double worst(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  double most = 0.0, of = 1e-30;
  for (size_t i = 0; i < want.size(); i++) {
    most = std::max(most, std::isnan(got[i]) ? 1e30 : std::fabs((double)got[i] - want[i]));
    of = std::max(of, std::fabs((double)want[i]));
  }
  return most / of;
}

// mu [rows][d] in `count` spans from `first` on, turned.
std::vector<float> turned(const Case& c, const std::vector<float>& mu, int first, int count) {
  const std::vector<float> waves = waves_of(c, (size_t)(first + count) * c.recipe.offset_span);
  const int d = c.head_dim, gap = c.interleaved ? 1 : c.pairs, step = c.interleaved ? 2 : 1;
  std::vector<float> out;
  for (size_t row = 0; row < mu.size(); row += d)
    for (int span = first; span < first + count; span++) {
      std::vector<float> x(mu.begin() + (ptrdiff_t)row, mu.begin() + (ptrdiff_t)row + d);
      for (int i = 0; i < c.pairs; i++) {
        const float cos = waves[(span * c.pairs + i) * 2], sin = waves[(span * c.pairs + i) * 2 + 1];
        const float a = mu[row + i * step], b = mu[row + i * step + gap];
        x[i * step] = a * cos - b * sin, x[i * step + gap] = b * cos + a * sin;
      }
      out.insert(out.end(), x.begin(), x.end());
    }
  return out;
}

// Where one side's offsets go; all of it poisoned.
struct Room {
  Room(const Tables& tables, size_t floats, int span_count)
      : transposed(tables.rotation_t.get()),
        mu(std::vector<float>(floats, NAN)),
        rotated(std::vector<float>(floats, NAN)),
        span_mu(std::vector<float>(floats * span_count, NAN)),
        span_rotated(std::vector<float>(floats * span_count, NAN)),
        spans(span_count) {}
  HalfbyteCudaOffset get() const {
    return {transposed, mu.get(), rotated.get(), span_mu.get(), span_rotated.get(), spans, 0};
  }
  const float* transposed;
  OnDevice<float> mu, rotated, span_mu, span_rotated;
  int spans;
};

// The tokens lie in two arrays, as those a layer holds raw and those of an append do. Some of every sequence are
// padding.
void expect_offsets(const Case& c, bool padded, unsigned seed) {
  Random random(seed);
  const size_t tokens = c.prefix, held = std::min<size_t>(tokens, 13), rest = tokens - held;
  const auto k = random.tensor(c, c.kv_heads, tokens, true), v = random.tensor(c, c.kv_heads, tokens, false);
  std::vector<uint8_t> counted(c.batch * tokens, 1);
  std::vector<float> weights, counts(c.batch);
  for (uint8_t& x : counted) x = !padded || random.engine()() % 4 != 0;
  for (size_t i = 0; i < counted.size(); i++) weights.push_back(counted[i]), counts[i / tokens] += counted[i];
  Layer layer = make_layer(c);
  ASSERT_TRUE(
      layer
          .append(view_of(k, c, c.kv_heads, tokens), view_of(v, c, c.kv_heads, tokens), c.batch, tokens, counted.data())
          .ok());
  LayerParts parts;
  ASSERT_TRUE(layer.save(parts).ok());

  const HalfbyteCudaLayer described = layer_of(c);
  const Tables k_tables(described, c.head_dim, false, {}, {}), v_tables(described, c.head_dim, true, {}, {});
  const int first = 1, spans = c.pairs ? 3 : 0;
  const size_t floats = parts.offset_k.size();
  const Room k_room(k_tables, floats, spans), v_room(v_tables, floats, 0);
  const OnDevice<uint8_t> d_k(k), d_v(v);
  const OnDevice<float> waves(waves_of(c, std::max<size_t>(tokens, (first + spans) * c.recipe.offset_span))),
      d_weights(weights), d_counts(counts);
  HalfbyteCudaOffsets call{};
  call.layer = described, call.batch = c.batch, call.total = (int64_t)tokens;
  call.turn = {waves.get(), c.recipe.offset_span, c.pairs, c.interleaved};
  const HalfbyteCudaView k_all = device_view(d_k.get(), c, c.kv_heads, tokens),
                         v_all = device_view(d_v.get(), c, c.kv_heads, tokens);
  call.raw[call.n_raw++] = {k_all, v_all, 0, 0, (int64_t)held, 1};
  if (rest) {  // an array of its own, whose first token is at position `held`
    const int64_t skipped = (int64_t)(held * c.head_dim * dtype_bytes(c.dtype));
    HalfbyteCudaView k_rest = k_all, v_rest = v_all;
    k_rest.data = d_k.get() + skipped, v_rest.data = d_v.get() + skipped;
    call.raw[call.n_raw++] = {k_rest, v_rest, (int64_t)held, (int64_t)held, (int64_t)tokens, 0};
  }
  if (padded) call.weights = d_weights.get(), call.counts = d_counts.get(), call.weight_stride = (int64_t)tokens;
  call.first_span = first, call.k = k_room.get(), call.v = v_room.get();
  const OnDevice<double> space(std::vector<double>(halfbyte_cuda_offsets_space(&call) / sizeof(double), NAN));
  call.space = space.get();
  expect_launched(halfbyte_cuda_offsets(&call));

  const std::string what = text(tokens, " tokens, d ", c.head_dim, padded ? ", padded" : "");
  const std::vector<float> mu = k_room.mu.values();
  EXPECT_LT(worst(mu, parts.offset_k), 1e-6) << what;
  EXPECT_LT(worst(v_room.mu.values(), parts.offset_v), 1e-6) << what;
  EXPECT_LT(worst(k_room.rotated.values(), Tables::rotate(k_tables.matrix, mu, c.head_dim)), 1e-6) << what;
  EXPECT_LT(worst(v_room.rotated.values(), Tables::rotate(v_tables.matrix, v_room.mu.values(), c.head_dim)), 1e-6);
  if (!spans) return;
  const std::vector<float> span_mu = k_room.span_mu.values();
  EXPECT_LT(worst(span_mu, turned(c, mu, first, spans)), 1e-6) << what;
  EXPECT_LT(worst(k_room.span_rotated.values(), Tables::rotate(k_tables.matrix, span_mu, c.head_dim)), 1e-6) << what;
}

Case offset_case(size_t tokens, int head_dim, int pairs) {
  Case c;
  c.prefix = tokens, c.head_dim = head_dim, c.pairs = pairs, c.batch = 2;
  c.recipe.offset_tokens = 0;  // all of them
  return c;
}

TEST(CudaOffset, MatchesTheCpuAtAnyLength) {
  HALFBYTE_NEEDS_DEVICE();
  for (size_t tokens : {17, 64, 65, 130, 1000})
    for (bool padded : {false, true}) expect_offsets(offset_case(tokens, 64, 0), padded, (unsigned)tokens);
}

TEST(CudaOffset, MatchesTheCpuWhereItTurns) {
  HALFBYTE_NEEDS_DEVICE();
  for (int d : {64, 80, 256})
    for (int span : {16, 64})
      for (bool interleaved : {false, true}) {
        Case c = offset_case(200, d, interleaved ? d / 2 : d / 4);
        c.interleaved = interleaved, c.recipe.offset_span = span;
        c.dtype = d == 80 ? Dtype::float32 : d == 256 ? Dtype::bfloat16 : Dtype::float16;
        expect_offsets(c, span == 16, (unsigned)(d + span));
      }
}

// So many sequences that a thread block sums several pages; not among what check.py runs, as it takes a second.
TEST(CudaOffsetParts, MatchTheCpuWhereOneSumsSeveralPages) {
  HALFBYTE_NEEDS_DEVICE();
  Case c = offset_case(130, 64, 32);
  c.batch = 500, c.kv_heads = 1, c.heads = 1;
  expect_offsets(c, true, 9);
}

}  // namespace
}  // namespace halfbyte
