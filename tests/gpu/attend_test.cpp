// Attention in the Metal text against the CPU's reference layer on the same bytes: tail sizes, every geometry and
// recipe, whatever narrows it, poisoned memory, and the same bits in any order of threads.
#include <array>

#include "metal.h"

namespace halfbyte {
namespace {

using namespace testing;

struct Case {
  int d = 128, batch = 1, heads = 4, kv_heads = 2, queries = 1, window = 0;
  size_t prefix = 100;
  Dtype dtype = Dtype::float32;
  Recipe recipe;
  bool masked = false, with_sinks = false;
  float softcap = 0.0f;
  int splits = 2;
  int pairs = 0;  // of channels in which the offset of K turns
  bool interleaved = false;
};

std::string describe(const Case& c) {
  return "d " + std::to_string(c.d) + ", " + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + " heads, " +
         std::to_string(c.queries) + " queries after " + std::to_string(c.prefix) + ", K" +
         std::to_string(c.recipe.k.bits) + "V" + std::to_string(c.recipe.v.bits) + ", splits " +
         std::to_string(c.splits);
}

// A layer after its newest tokens arrived, what it held before, and those tokens' queries.
struct Scene {
  Case c;
  LayerConfig config;
  Layer layer;
  LayerParts before, parts;
  Array chunk_k, chunk_v, q;
  std::vector<uint8_t> mask;
  std::vector<float> sinks;
  AttendArgs args;
};

void give_lambda(Layer& layer, const Case& c, Random& random) {
  std::vector<float> k, v;
  for (int i = 0; i < c.kv_heads * c.d; i++) k.push_back(random.factor()), v.push_back(random.factor());
  must(layer.set_lambda(k.data(), v.data()));
}

Scene make_scene(const Case& c, Random& random) {
  const LayerConfig config = config_of(c.kv_heads, c.d, c.dtype, c.recipe);
  Scene s{c,
          config,
          {},
          {},
          {},
          random_array(random, c.batch, c.kv_heads, c.queries, c.d, c.dtype),
          random_array(random, c.batch, c.kv_heads, c.queries, c.d, c.dtype),
          random_array(random, c.batch, c.heads, c.queries, c.d, c.dtype),
          {},
          {},
          {}};
  s.config.sliding_window = c.window, s.config.layer_index = 2;
  s.layer = make_layer(s.config);
  if (c.recipe.lambda) give_lambda(s.layer, c, random);
  if (c.recipe.rotation == Rotation::dense) {
    const std::vector<float> k = random_rotation(random, c.d), v = random_rotation(random, c.d);
    must(s.layer.set_rotation(k.data(), v.data()));
  }
  if (c.pairs) {
    std::vector<float> frequencies;
    for (int i = 0; i < c.pairs; i++) frequencies.push_back(std::pow(10.0f, -3.0f * (float)i / (float)c.pairs));
    must(s.layer.set_frequencies(frequencies.data(), c.pairs, c.interleaved));
  }
  // Keys as models have them: a constant that is large in some channels.
  Array k = random_array(random, c.batch, c.kv_heads, c.prefix, c.d, c.dtype);
  const Array v = random_array(random, c.batch, c.kv_heads, c.prefix, c.d, c.dtype);
  for (size_t i = 3; i < k.size(); i += 31) store_element(k.bytes.data(), c.dtype, i / 31 * 31 + 3, 9.0f);
  must(append(s.layer, k, v));
  s.before = save(s.layer);
  must(append(s.layer, s.chunk_k, s.chunk_v));
  s.parts = save(s.layer);
  s.args.heads = c.heads, s.args.queries = c.queries, s.args.scale = 1.0f / std::sqrt((float)c.d);
  s.args.softcap = c.softcap;
  if (c.with_sinks) s.sinks = random.normals(c.heads);
  if (c.masked) {
    s.args.mask_tokens = s.layer.visible() - 3;
    for (size_t i = 0; i < c.batch * c.queries * s.args.mask_tokens; i++) s.mask.push_back(random.below(4) != 0);
    s.args.mask_query_stride = (ptrdiff_t)s.args.mask_tokens;
    s.args.mask_batch_stride = c.queries * s.args.mask_query_stride;
  }
  return s;
}

// The pointers are set here: a Scene may have moved since.
Array reference_attention(Scene& s) {
  UseBackend reference("reference");
  Array out = poisoned(s.c.batch, s.c.heads, s.c.queries, s.c.d, s.c.dtype);
  s.args.q = s.q.view(), s.args.out = out.out(), s.args.chunk_k = s.chunk_k.view(), s.args.chunk_v = s.chunk_v.view();
  s.args.mask = s.mask.empty() ? nullptr : s.mask.data(), s.args.sinks = s.sinks.empty() ? nullptr : s.sinks.data();
  must(s.layer.attend(s.args));
  return out;
}

// Raw tokens: the sinks and the tail, as saved; for several queries the tail before them and their own.
void add_raw(const Scene& s, AttendNumbers& n, std::vector<const std::vector<uint8_t>*>& buffers) {
  const Case& c = s.c;
  const LayerParts& held = c.queries == 1 ? s.parts : s.before;
  const int64_t length = (int64_t)held.length, packed = (int64_t)held.packed_end;
  const int64_t sink = std::min<int64_t>(c.recipe.sink_tokens, length);
  const int64_t raw = (int64_t)(held.raw_k.size() / dtype_bytes(c.dtype) / c.batch / c.kv_heads / c.d);
  const ViewNumbers view{c.kv_heads * raw * c.d, raw * c.d, c.d};
  auto add = [&](const ViewNumbers& at, int64_t first, int64_t begin, int64_t end, bool are_sinks,
                 const std::vector<uint8_t>& k, const std::vector<uint8_t>& v) {
    n.raw[n.n_raw++] = {at, at, first, begin, end, are_sinks};
    buffers.push_back(&k), buffers.push_back(&v);
  };
  if (sink) add(view, 0, 0, sink, true, held.raw_k, held.raw_v);
  if (packed < length) add(view, packed - sink, packed, length, false, held.raw_k, held.raw_v);
  n.kept = std::min(packed, length);
  if (c.queries > 1)
    add(view_numbers(s.chunk_k), length, std::max<int64_t>(length, c.recipe.sink_tokens), (int64_t)s.parts.length,
        false, s.chunk_k.bytes, s.chunk_v.bytes);
}

AttendNumbers numbers_of(const Scene& s) {
  const Case& c = s.c;
  const LayerParts& p = s.parts;
  AttendNumbers n{};
  n.layer = layer_numbers(c.recipe, c.batch, c.kv_heads, c.dtype, (int64_t)p.page_table.size() / c.batch,
                          (int64_t)p.pages_dropped);
  n.heads = c.heads, n.queries = c.queries, n.causal = 1, n.length = (int64_t)p.length, n.first = (int64_t)p.first;
  n.sliding_window = c.window, n.sink_tokens = c.recipe.sink_tokens, n.packed_end = (int64_t)p.packed_end;
  n.raw_window = c.recipe.raw_window;
  n.begin = std::max<int64_t>((int64_t)p.first, c.recipe.sink_tokens), n.end = n.packed_end;
  n.splits = n.begin < n.end ? c.splits : 0;
  n.q = n.out = view_numbers(s.q);
  n.has_mask = !s.mask.empty(), n.mask_tokens = (int64_t)s.args.mask_tokens;
  n.mask_batch_stride = s.args.mask_batch_stride, n.mask_query_stride = s.args.mask_query_stride;
  n.has_sinks = !s.sinks.empty(), n.has_offset_k = !p.offset_k.empty(), n.has_offset_v = !p.offset_v.empty();
  if (c.pairs) n.turn_span = c.recipe.offset_span, n.turn_pairs = c.pairs, n.turn_interleaved = c.interleaved;
  n.has_inverse_lambda_k = !p.lambda_k.empty(), n.has_inverse_lambda_v = !p.lambda_v.empty();
  return n;
}

// cos and sin in the middle of each span: [spans][pairs][2].
std::vector<float> waves_of(const Scene& s) {
  std::vector<float> waves;
  const int span = s.c.recipe.offset_span;
  for (int middle = (span - 1) / 2; middle < (int)s.parts.length + span; middle += span)
    for (float frequency : s.parts.frequencies)
      waves.push_back((float)std::cos((double)frequency * middle)),
          waves.push_back((float)std::sin((double)frequency * middle));
  return waves;
}

std::vector<float> inverses(const std::vector<float>& values) {
  std::vector<float> out;
  for (float x : values) out.push_back(1.0f / x);
  return out;
}

std::vector<float> rotation_of(const Scene& s, const std::vector<float>& matrix) {
  return rotation_buffer(make_rotation(s.c.recipe.rotation, s.c.d, s.c.recipe.seed, s.config.layer_index,
                                       matrix.empty() ? nullptr : matrix.data()));
}

Array metal_attention(const Scene& s, unsigned schedule, bool with_raw = true) {
  const Case& c = s.c;
  const LayerParts& p = s.parts;
  AttendNumbers n = numbers_of(s);
  std::vector<const std::vector<uint8_t>*> raw;
  if (with_raw) add_raw(s, n, raw);
  const std::vector<uint8_t> nothing;
  while (raw.size() < 6) raw.push_back(&nothing);
  const float reals[2] = {s.args.scale, s.args.softcap};
  const PageFormat format = make_page_format(c.recipe, c.d, c.d);
  std::vector<int64_t> table;
  for (int32_t i : p.page_table) table.push_back(i * (int64_t)(c.kv_heads * page_head_bytes(format)));
  const std::vector<float> rotation_k = rotation_of(s, p.rotation_k), rotation_v = rotation_of(s, p.rotation_v);
  const std::vector<float> waves = waves_of(s), inverse_k = inverses(p.lambda_k), inverse_v = inverses(p.lambda_v);
  const int tiles = (c.heads / c.kv_heads * c.queries + 7) / 8, segments = c.batch * c.kv_heads * tiles;
  std::vector<float> partials((size_t)segments * n.splits * 8 * (format.v.padded_dim + 2), NAN);
  Array out = poisoned(c.batch, c.heads, c.queries, c.d, c.dtype);
  const std::string size = std::to_string(c.d);
  if (n.splits)
    run_kernel("attend_d" + size,
               {bound(n), bound(reals), bound(s.q.bytes), bound(rotation_k), bound(p.offset_k), bound(inverse_k),
                bound(s.mask), bound(table), bound(p.pages), partials.data(), bound(waves)},
               segments * (int)n.splits, 128, schedule);
  run_kernel("finish_d" + size,
             {bound(n), bound(reals), bound(s.q.bytes), out.bytes.data(), bound(s.mask), bound(s.sinks),
              bound(rotation_v), bound(p.offset_v), bound(inverse_v), bound(partials), bound(*raw[0]), bound(*raw[1]),
              bound(*raw[2]), bound(*raw[3]), bound(*raw[4]), bound(*raw[5])},
             segments, 256, schedule);
  return out;
}

// Rounding of outputs at random signs: float32's own sums, fp16's 2^-11, bf16's 2^-8.
double tolerance(Dtype dtype) { return dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 5e-4 : 4e-3; }

double relative_error(const Array& got, const Array& want) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); i++) {
    error += std::pow((double)got.flat(i) - want.flat(i), 2);
    norm += (double)want.flat(i) * want.flat(i);
  }
  return std::isnan(error) ? INFINITY : std::sqrt(error / norm);
}

void expect_reference(const Case& c, Random& random, bool all_schedules = false) {
  Scene s = make_scene(c, random);
  const Array want = reference_attention(s), got = metal_attention(s, 0);
  EXPECT_LT(relative_error(got, want), tolerance(c.dtype)) << describe(c);
  if (!all_schedules) return;
  for (unsigned schedule : schedules(random))
    EXPECT_TRUE(same_bits(metal_attention(s, schedule), got)) << describe(c) << ": depends on the order of threads";
}

// Small and quick: what the mutations of barriers run.
TEST(MetalBarriers, AttendWithEachStep) {
  Random random;
  for (Rotation rotation : {Rotation::srft, Rotation::dense})
    for (Dtype dtype : {Dtype::float32, Dtype::float16}) {
      Case c;
      c.d = 64, c.heads = 6, c.kv_heads = 1, c.prefix = 50, c.dtype = dtype;
      c.recipe.rotation = rotation, c.recipe.lambda = true, c.pairs = dtype == Dtype::float16 ? 32 : 0;
      expect_reference(c, random, true);
    }
}

// Without any raw token, as no layer asks: packed ones alone.
TEST(MetalBarriers, AttendToPackedTokensAlone) {
  Random random;
  Case c;
  c.d = 64, c.heads = 2, c.kv_heads = 1, c.prefix = 40;
  Scene s = make_scene(c, random);
  reference_attention(s);  // completes s.args
  Array k(1, 1, s.layer.visible(), c.d), v = k;
  must(s.layer.decode(reinterpret_cast<float*>(k.bytes.data()), reinterpret_cast<float*>(v.bytes.data())));
  const Plain want = plain_attention(
      s.args, s.q, 1, k.tokens, c.d, [&](int, int, size_t t) { return t < s.parts.packed_end; },
      [&](int b, int h, int, size_t t, int i) { return (double)k.get(b, h, t, i); },
      [&](int b, int h, int, size_t t, int i) { return (double)v.get(b, h, t, i); });
  for (unsigned schedule : schedules(random)) EXPECT_LT(error_of(metal_attention(s, schedule, false), want), 1e-5);
}

TEST(MetalAttend, MatchesTheReferenceAtTailSizes) {
  Random random;
  for (size_t prefix : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130}) {
    Case c;
    c.d = 64, c.prefix = prefix, c.splits = 1 + random.below(3);
    expect_reference(c, random, prefix == 65);
  }
}

// Query heads a KV head: few, so that simdgroups share tokens alone; up to a tile; more than a tile. Four blocks or
// more, so that each simdgroup has some.
TEST(MetalAttend, MatchesTheReferenceForEveryGeometryInAnyOrderOfThreads) {
  Random random;
  for (int d : kMetalDims)
    for (int fewest : {1, 5, 9}) {
      Case c;
      c.d = d, c.kv_heads = fewest == 1 ? 2 : 1, c.heads = c.kv_heads * (fewest + (int)random.below(4));
      c.batch = 1 + random.below(2), c.splits = 1, c.prefix = 85 + random.below(30);
      c.dtype = (Dtype)random.below(3), c.recipe.lambda = random.below(2);
      c.recipe.k.bits = random.below(2) ? 4 : 8, c.recipe.v.bits = random.below(2) ? 4 : 8;
      expect_reference(c, random, fewest == 5);
    }
}

TEST(MetalAttend, MatchesTheReferenceForEveryRecipe) {
  Random random;
  for (int k_bits : {4, 8})
    for (int v_bits : {4, 8})
      for (int group : {0, 16, 32, 64}) {
        Case c;
        c.d = std::array{64, 80, 96, 128}[random.below(4)], c.prefix = 70, c.heads = 2, c.kv_heads = 1;
        c.recipe.k = {k_bits, group}, c.recipe.v = {v_bits, group == 64 ? 0 : group};
        c.recipe.scale_bits = random.below(2) ? 16 : 32, c.recipe.signed_scale = random.below(2);
        c.recipe.lambda = group == 32, c.recipe.offset = group != 16;
        const bool power_of_two = (c.d & (c.d - 1)) == 0;
        const Rotation special = v_bits == 8 ? Rotation::dense : power_of_two ? Rotation::srht : Rotation::identity;
        c.recipe.rotation = group == 64 ? special : Rotation::srft;
        expect_reference(c, random);
      }
}

TEST(MetalAttend, MatchesTheReferenceWhereTheOffsetTurns) {
  Random random;
  for (int d : {64, 80, 128})
    for (int span : {16, 64})
      for (bool interleaved : {false, true}) {
        Case c;
        c.d = d, c.recipe.offset_span = span, c.interleaved = interleaved, c.pairs = random.below(2) ? d / 2 : 20;
        c.prefix = 150 + random.below(60), c.queries = 1 + random.below(3), c.recipe.lambda = random.below(2);
        expect_reference(c, random, span == 16 && d == 64);
      }
}

TEST(MetalAttend, MatchesTheReferenceForSeveralQueries) {
  Random random;
  for (int queries : {2, 3, 5, 16, 17, 33}) {
    Case c;
    c.d = 64, c.heads = 3, c.kv_heads = 1, c.queries = queries, c.prefix = std::array{5, 16, 40, 90}[random.below(4)];
    expect_reference(c, random, queries == 5);
  }
}

TEST(MetalAttend, MatchesTheReferenceWithWhatNarrowsAttention) {
  Random random;
  for (int queries : {1, 7})
    for (int kind = 0; kind < 6; kind++) {
      Case c;
      c.d = 64, c.queries = queries, c.prefix = 150, c.batch = 1 + random.below(2);
      c.masked = kind == 0 || kind == 5, c.with_sinks = kind == 1, c.softcap = kind == 2 ? 5.0f : 0.0f;
      c.window = kind == 3 || kind == 5 ? 100 : 0;
      c.recipe.sink_tokens = kind == 4 ? 16 : 0, c.recipe.raw_window = kind == 4 ? 32 : 0;
      expect_reference(c, random, kind == 5);
    }
}

}  // namespace
}  // namespace halfbyte
