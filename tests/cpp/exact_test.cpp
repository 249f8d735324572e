// Attention without rounding to hide behind: vectors kept as floats, and float32 attention whose results are the same
// however queries are batched.
#include <array>
#include <numeric>

#include "testing.h"

namespace halfbyte {
namespace {

using namespace testing;

// Sums in float32 against sums in double, in units of the output's size.
constexpr double kFloatSums = 2e-5;

// ---- bits = 32

TEST(Plain, TakesNothingThatCodesWouldNeed) {
  for (int d : kHeadDims) EXPECT_TRUE(plain_recipe().check(d).ok()) << d;
  auto expect_bad = [](auto change, const std::string& part) {
    Recipe recipe = plain_recipe();
    change(recipe);
    const Status status = recipe.check(64);
    EXPECT_EQ(status.code(), Code::bad_argument) << part;
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  };
  expect_bad([](Recipe& r) { r.rotation = Rotation::srft; }, "bits of 32 take rotation identity");
  expect_bad([](Recipe& r) { r.rotation = Rotation::srht; }, "bits of 32 take rotation identity");
  expect_bad([](Recipe& r) { r.offset = true; }, "offset false");
  expect_bad([](Recipe& r) { r.lambda = true; }, "lambda false");
  expect_bad([](Recipe& r) { r.k.bits = 8; }, "k_bits and v_bits take 32 together");
  expect_bad([](Recipe& r) { r.v.bits = 4; }, "k_bits and v_bits take 32 together");
  expect_bad([](Recipe& r) { r.k.bits = r.v.bits = 16; }, "k_bits is 16; it takes 4 or 8, which have kernels, or 32");
  expect_bad([](Recipe& r) { r.offset_tokens = 24; }, "offset_tokens is 24");
  expect_bad([](Recipe& r) { r.offset_tokens = -16; }, "offset_tokens is -16");
}

struct Shape {
  int d_k, d_v;
  Dtype dtype;
};

LayerConfig config_of(const Shape& shape, int kv_heads, const Recipe& recipe) {
  LayerConfig config = testing::config_of(kv_heads, shape.d_k, shape.dtype, recipe);
  config.head_dim_v = shape.d_v;
  return config;
}

// The floats of every token, to the bit.
bool holds(const Layer& layer, const Array& k, const Array& v) {
  const Decoded held = decode(layer);
  auto same = [](const Array& a, const Array& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); i++)
      if (float_to_bits(a.flat(i)) != float_to_bits(b.flat(i))) return false;
    return true;
  };
  return same(held.k, k) && same(held.v, v);
}

void check_plain(Random& random, const Shape& shape, size_t tokens) {
  const Array k = random_array(random, 2, 2, tokens, shape.d_k, shape.dtype);
  const Array v = random_array(random, 2, 2, tokens, shape.d_v, shape.dtype);
  const size_t newest = std::min<size_t>(tokens, 1 + random.below(20));
  const Array one = random_array(random, 2, 6, 1, shape.d_k, shape.dtype);
  const Array some = random_array(random, 2, 6, newest, shape.d_k, shape.dtype);
  Array any = poisoned(2, 6, newest, shape.d_v, shape.dtype);
  const Plain of_one = plain_attention(args_of(one, any), one, k, v),
              of_some = plain_attention(args_of(some, any), some, k, v);
  for (const std::string& name : usable_backends()) {
    UseBackend use(name);
    Recipe recipe = plain_recipe();
    recipe.sink_tokens = 16 * random.below(3), recipe.raw_window = 16 * random.below(3);
    Layer layer = make_layer(config_of(shape, 2, recipe));
    if (newest < tokens) must(append(layer, k, v, 0, tokens - newest));
    must(append(layer, k, v, tokens - newest, tokens));
    const std::string what = name + ", d " + std::to_string(shape.d_k) + " and " + std::to_string(shape.d_v) +
                             ", tokens " + std::to_string(tokens);
    EXPECT_TRUE(holds(layer, k, v)) << what;
    for (bool exact : {false, true}) {
      AttendArgs args = args_of(some, any);
      args.exact = exact, args.chunk_k = k.view(tokens - newest), args.chunk_v = v.view(tokens - newest);
      must(layer.attend(args));
      EXPECT_LT(error_of(any, of_some), kFloatSums + output_rounding(shape.dtype)) << what << ", exact " << exact;
      Array out = poisoned(2, 6, 1, shape.d_v, shape.dtype);
      args = args_of(one, out), args.exact = exact;
      must(layer.attend(args));
      EXPECT_LT(error_of(out, of_one), kFloatSums + output_rounding(shape.dtype)) << what << ", exact " << exact;
    }
  }
}

TEST(Plain, EveryTailSizeIsKeptAndAttendedTo) {
  Random random;
  for (size_t tokens = 1; tokens <= 65; tokens++) check_plain(random, {18, 18, Dtype::float32}, tokens);
}

TEST(Plain, EveryHeadSizeAndDtypeIsKeptAndAttendedTo) {
  Random random;
  for (auto [d_k, d_v] : {std::pair{16, 16}, std::pair{80, 80}, std::pair{128, 128}, std::pair{256, 256},
                          std::pair{80, 48}, std::pair{16, 256}, std::pair{512, 510}})
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
      for (size_t tokens : {17, 33, 97}) check_plain(random, {d_k, d_v, dtype}, tokens);
}

// Codes bound what they can hold; floats do not.
TEST(Plain, LargeValuesAreKept) {
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    Array x(1, 1, 40, 32, dtype);
    const float largest = dtype == Dtype::float16    ? 65504.0f
                          : dtype == Dtype::bfloat16 ? bf16_to_float(0x7f7f)
                                                     : 3.4e38f;
    for (size_t t = 0; t < 40; t++)
      for (int c = 0; c < 32; c++) x.set(0, 0, t, c, (t + c) % 2 ? largest : -largest / 4);
    Layer layer = make_layer(config_of({32, 32, dtype}, 1, plain_recipe()));
    const Status status = append(layer, x, x);
    EXPECT_TRUE(status.ok()) << status.message();
    if (!status.ok()) continue;
    EXPECT_TRUE(holds(layer, x, x));
    x.set(0, 0, 7, 3, INFINITY);
    EXPECT_EQ(append(layer, x, x).code(), Code::bad_value);
  }
}

TEST(Plain, LooseVectorsComeBackAsTheyWere) {
  Random random;
  for (int d : {16, 80, 510}) {
    const std::vector<float> x = random.normals(37 * d, 1e5f);
    for (Side side : {Side::k, Side::v}) {
      std::vector<float> out(x.size(), NAN);
      must(roundtrip(x.data(), out.data(), 37, d, plain_recipe(), side, nullptr, nullptr, 0));
      EXPECT_EQ(out, x);
    }
  }
}

// ---- any life of a layer, next to lists of tokens

// Tokens are drawn from a pool; a sequence is a list of their numbers there.
using Sequences = std::vector<std::vector<size_t>>;

Array gather(const Array& pool, const Sequences& sequences, size_t from, size_t to) {
  Array x((int)sequences.size(), pool.heads, to - from, pool.d, pool.dtype);
  const size_t bytes = pool.d * dtype_bytes(pool.dtype);
  for (int b = 0; b < x.batch; b++)
    for (int h = 0; h < x.heads; h++)
      for (size_t t = from; t < to; t++)
        memcpy(&x.bytes[x.at(b, h, t - from, 0) * dtype_bytes(x.dtype)],
               &pool.bytes[pool.at(0, h, sequences[b][t], 0) * dtype_bytes(pool.dtype)], bytes);
  return x;
}

struct Walk {
  Random& random;
  LayerConfig config;
  Array pool_k, pool_v;
  Layer layer = make_layer(config);
  Sequences sequences = Sequences(1);
  size_t first = 0, newest = 0;  // oldest token held; tokens of the last append, 0 when something came after it

  Walk(Random& random, const LayerConfig& config)
      : random(random),
        config(config),
        pool_k(random_array(random, 1, config.kv_heads, 100, config.head_dim_k, config.dtype)),
        pool_v(random_array(random, 1, config.kv_heads, 100, config.head_dim_v, config.dtype)) {}

  size_t length() const { return sequences[0].size(); }

  void append_tokens() {
    const bool recorded = random.below(2);
    layer.record_past(recorded);
    const size_t n = std::array{1, 1, 2, 5, 17, 40, 90}[random.below(7)], from = length();
    for (auto& sequence : sequences)
      for (size_t i = 0; i < n; i++) sequence.push_back(random.below(100));
    const bool answered = random.below(3) == 0;
    const Array k = gather(pool_k, sequences, from, from + n), v = gather(pool_v, sequences, from, from + n);
    must(layer.append(k.view(), v.view(), k.batch, n, nullptr, answered));
    const size_t window = config.sliding_window, next = answered ? length() : from;
    if (window && !recorded && next > window - 1) first = std::max(first, next - (window - 1));
    newest = answered ? 0 : n;
  }

  void attend_newest() {
    if (!newest) return;
    const size_t n = random.below(2) ? newest : 1, from = length() - newest, window = config.sliding_window;
    const int heads = config.kv_heads * (1 + random.below(3));
    const Array chunk_k = gather(pool_k, sequences, from, length()),
                chunk_v = gather(pool_v, sequences, from, length());
    const Array q = random_array(random, (int)sequences.size(), heads, n, config.head_dim_k, config.dtype);
    Array out = poisoned(q.batch, heads, n, config.head_dim_v, config.dtype);
    AttendArgs args = args_of(q, out);
    args.chunk_k = chunk_k.view(), args.chunk_v = chunk_v.view(), args.exact = random.below(2);
    const Array k = gather(pool_k, sequences, 0, length()), v = gather(pool_v, sequences, 0, length());
    const Plain plain = plain_attention(
        args, q, config.kv_heads, length(), config.head_dim_v,
        [&](int, int i, size_t t) {
          const size_t p = length() - n + i;
          return t <= p && t >= first && (!window || t + window > p);
        },
        [&](int b, int h, int, size_t t, int c) { return (double)k.get(b, h, t, c); },
        [&](int b, int h, int, size_t t, int c) { return (double)v.get(b, h, t, c); });
    must(layer.attend(args));
    EXPECT_LT(error_of(out, plain), kFloatSums + output_rounding(config.dtype)) << n << " queries";
  }

  void crop() {
    const size_t to = random.below(3) ? length() - random.below((int)std::min<size_t>(length(), 70))
                                      : 1 + random.below((int)length());
    const bool past_gone = first > 0 && to < length() && to < first + config.sliding_window - 1;
    EXPECT_EQ(layer.crop(to).code(), past_gone ? Code::bad_argument : Code::ok) << to << " of " << length();
    if (past_gone || to == length()) return;
    for (auto& sequence : sequences) sequence.resize(to);
    newest = 0;
  }

  void select() {
    std::vector<size_t> rows(1 + random.below(3));
    for (size_t& row : rows) row = random.below((int)sequences.size());
    must(layer.select(rows));
    Sequences selected;
    for (size_t row : rows) selected.push_back(sequences[row]);
    sequences = selected, newest = 0;
  }

  // Goes on with a copy; what happens to the original must not matter.
  void copy() {
    Layer other;
    must(other.copy_from(layer));
    const Array junk_k = gather(pool_k, Sequences(sequences.size(), std::vector<size_t>(30, 1)), 0, 30);
    const Array junk_v = gather(pool_v, Sequences(sequences.size(), std::vector<size_t>(30, 1)), 0, 30);
    must(append(layer, junk_k, junk_v));
    layer = std::move(other);
  }

  void save_and_load() {
    layer = load(config, save(layer));
    newest = 0;
  }

  void step() {
    if (!length()) {
      append_tokens();
      return;
    }
    switch (random.below(12)) {
      case 0:
      case 1:
        crop();
        break;
      case 2:
        select();
        break;
      case 3:
        copy();
        break;
      case 4:
        save_and_load();
        break;
      default:
        append_tokens();
    }
    if (length() > 300) {
      layer.reset();
      sequences = Sequences(1 + random.below(2)), first = newest = 0;
    }
  }

  void check() {
    ASSERT_EQ(layer.length(), length());
    ASSERT_EQ(layer.first(), first);
    if (!length()) return;
    ASSERT_EQ(layer.batch(), (int)sequences.size());
    ASSERT_TRUE(holds(layer, gather(pool_k, sequences, first, length()), gather(pool_v, sequences, first, length())));
    attend_newest();
  }
};

TEST(Plain, AnyLifeOfALayerKeepsEveryBit) {
  Random random;
  for (int life = 0; life < 24; life++) {
    Recipe recipe = plain_recipe();
    recipe.sink_tokens = 16 * (life % 3), recipe.raw_window = 16 * (life / 3 % 3);
    const Dtype dtype = std::array{Dtype::float32, Dtype::float16, Dtype::bfloat16}[random.below(3)];
    LayerConfig config = config_of({life % 2 ? 16 : 18, life % 4 ? 16 : 80, dtype}, 1 + random.below(2), recipe);
    config.sliding_window = random.below(3) ? 0 : 2 + random.below(70);
    const std::vector<std::string> names = usable_backends();
    UseBackend use(names[life % names.size()]);
    UseThreads threads(1 + life % 3);
    Walk walk(random, config);
    for (int i = 0; i < 40; i++) {
      walk.step();
      walk.check();
      if (HasFailure()) {
        ADD_FAILURE() << "life " << life << ", step " << i << ", " << backend() << ", sinks " << recipe.sink_tokens
                      << ", raw window " << recipe.raw_window << ", sliding window " << config.sliding_window;
        return;
      }
    }
  }
}

// ---- exact: one token at a time, or in any chunks

struct Setting {
  Recipe recipe;
  Shape shape{32, 32, Dtype::float32};
  int batch = 1, kv_heads = 1, group = 1, sliding_window = 0;
  size_t quiet = 0, tokens = 100;  // tokens without queries, appended at once; all tokens
  size_t cropped = 0;              // tokens appended behind the quiet ones and cropped again, when they are codes
  float softcap = 0.0f;
  bool sinks = false, mask = false;

  int heads() const { return kv_heads * group; }
  bool offset_given() const { return recipe.offset && !recipe.offset_tokens; }
};

std::string describe(const Setting& s) {
  const Recipe& r = s.recipe;
  std::string text = backend();
  for (auto [name, value] : {std::pair<const char*, int>{"K bits", r.k.bits},
                             {"d_k", s.shape.d_k},
                             {"d_v", s.shape.d_v},
                             {"dtype", (int)s.shape.dtype},
                             {"batch", s.batch},
                             {"heads", s.heads()},
                             {"group", s.group},
                             {"sinks", r.sink_tokens},
                             {"raw window", r.raw_window},
                             {"offset tokens", r.offset_tokens},
                             {"sliding", s.sliding_window},
                             {"quiet", (int)s.quiet},
                             {"cropped", (int)s.cropped},
                             {"tokens", (int)s.tokens},
                             {"mask", s.mask},
                             {"logits", s.sinks}})
    text += std::string(", ") + name + " " + std::to_string(value);
  return text;
}

struct Input {
  Array k, v, q, rejected_k, rejected_v;
  std::vector<float> mu_k, mu_v, sinks;
  std::vector<uint8_t> mask, counted;  // [batch, tokens, tokens]; [batch, tokens]
  size_t mask_first = 0;

  Input(Random& random, const Setting& s)
      : k(random_array(random, s.batch, s.kv_heads, s.tokens, s.shape.d_k, s.shape.dtype)),
        v(random_array(random, s.batch, s.kv_heads, s.tokens, s.shape.d_v, s.shape.dtype)),
        q(random_array(random, s.batch, s.heads(), s.tokens, s.shape.d_k, s.shape.dtype)),
        rejected_k(random_array(random, s.batch, s.kv_heads, s.cropped, s.shape.d_k, s.shape.dtype)),
        rejected_v(random_array(random, s.batch, s.kv_heads, s.cropped, s.shape.d_v, s.shape.dtype)),
        mu_k(random.normals(s.kv_heads * s.shape.d_k, 0.3f)),
        mu_v(random.normals(s.kv_heads * s.shape.d_v, 0.3f)),
        sinks(random.normals(s.heads())),
        mask(s.mask ? s.batch * s.tokens * s.tokens : 0),
        counted(s.batch * s.tokens) {
    for (uint8_t& byte : counted) byte = random.below(5) > 0;
    mask_first = random.below(5);
    for (size_t i = 0; i < mask.size(); i++) {
      const size_t p = i / s.tokens % s.tokens, t = i % s.tokens, window = s.sliding_window;
      mask[i] = t <= p && (!window || t + window > p) && random.below(6) > 0;
    }
  }

  bool sees(const Setting& s, int b, size_t p, size_t t) const {
    if (s.mask) return t >= mask_first && mask[(b * s.tokens + p) * s.tokens + t];
    return t <= p && (!s.sliding_window || t + s.sliding_window > p);
  }
};

Status append_counted(Layer& layer, const Input& in, size_t from, size_t to) {
  std::vector<uint8_t> counted;
  for (int b = 0; b < in.k.batch; b++)
    counted.insert(counted.end(), &in.counted[b * in.k.tokens + from], &in.counted[b * in.k.tokens] + to);
  return layer.append(in.k.view(from), in.v.view(from), in.k.batch, to - from, counted.data());
}

Layer start(const Setting& s, const Input& in) {
  LayerConfig config = config_of(s.shape, s.kv_heads, s.recipe);
  config.sliding_window = s.sliding_window;
  Layer layer = make_layer(config);
  if (s.offset_given()) must(layer.set_offset(in.mu_k.data(), in.mu_v.data()));
  if (s.quiet) must(append_counted(layer, in, 0, s.quiet));
  for (size_t t = 0; t < s.cropped; t++) must(append(layer, in.rejected_k, in.rejected_v, t, t + 1));
  if (s.cropped) must(layer.crop(s.quiet));
  return layer;
}

// Outputs of the tokens behind the quiet ones; at[i] to at[i + 1] is one step.
Array attend_in_steps(const Setting& s, const Input& in, const std::vector<size_t>& at) {
  Layer layer = start(s, in);
  Array out = poisoned(s.batch, s.heads(), s.tokens, s.shape.d_v, s.shape.dtype);
  for (size_t i = 1; i < at.size(); i++) {
    const size_t from = at[i - 1], to = at[i];
    must(append_counted(layer, in, from, to));
    AttendArgs args = args_of(in.q, out);
    args.exact = true, args.queries = (int)(to - from), args.softcap = s.softcap;
    args.q = in.q.view(from), args.chunk_k = in.k.view(from), args.chunk_v = in.v.view(from);
    args.out.data = out.bytes.data() + from * out.d * dtype_bytes(out.dtype);
    if (s.sinks) args.sinks = in.sinks.data();
    if (s.mask) {
      args.mask_tokens = to > in.mask_first ? to - in.mask_first : 0;
      args.mask = &in.mask[from * s.tokens + in.mask_first];
      args.mask_query_stride = (ptrdiff_t)s.tokens, args.mask_batch_stride = (ptrdiff_t)(s.tokens * s.tokens);
    }
    must(layer.attend(args));
  }
  return out;
}

// Attention in double over what each query should see: a block's codes once the query has left it, else raw tokens.
Plain by_the_rule(const Setting& s, const Input& in) {
  const size_t sink = s.recipe.sink_tokens, window = s.recipe.raw_window;
  Setting kept = s;
  kept.sliding_window = 0;
  Layer layer = start(kept, in);
  const size_t codes_stay =
      (sink + layer.packed_tokens() + 15) / 16 * 16;  // a block that crop halved is filled up packed
  must(append_counted(layer, in, s.quiet, s.tokens));
  const Array pad_k(s.batch, s.kv_heads, 17 + window + s.recipe.offset_tokens, s.shape.d_k, s.shape.dtype);
  const Array pad_v(s.batch, s.kv_heads, pad_k.tokens, s.shape.d_v, s.shape.dtype);
  must(append(layer, pad_k, pad_v));  // so that all blocks are packed by now
  const Decoded held = decode(layer);
  auto packed = [&](size_t p, size_t t) {
    const size_t block = p / 16 * 16;
    const bool warm = p >= (size_t)s.recipe.offset_tokens;
    return t >= sink && (t < codes_stay || (warm && t + window < block));
  };
  const AttendArgs args = [&] {
    Array any(1, 1, 1, 16);
    AttendArgs args = args_of(in.q, any);
    args.queries = (int)(s.tokens - s.quiet), args.softcap = s.softcap,
    args.sinks = s.sinks ? in.sinks.data() : nullptr;
    return args;
  }();
  Array newest(s.batch, s.heads(), s.tokens - s.quiet, s.shape.d_k, s.shape.dtype);
  for (int b = 0; b < s.batch; b++)
    for (int h = 0; h < s.heads(); h++)
      for (size_t i = 0; i < newest.tokens; i++)
        for (int c = 0; c < newest.d; c++) newest.set(b, h, i, c, in.q.get(b, h, s.quiet + i, c));
  return plain_attention(
      args, newest, s.kv_heads, s.tokens, s.shape.d_v,
      [&](int b, int i, size_t t) { return in.sees(s, b, s.quiet + i, t); },
      [&](int b, int h, int i, size_t t, int c) {
        return (double)(packed(s.quiet + i, t) ? held.k : in.k).get(b, h, t, c);
      },
      [&](int b, int h, int i, size_t t, int c) {
        return (double)(packed(s.quiet + i, t) ? held.v : in.v).get(b, h, t, c);
      });
}

std::vector<size_t> cuts(Random& random, size_t from, size_t to) {
  std::vector<size_t> at = {from};
  const int largest = 1 + random.below(60);
  while (at.back() < to) at.push_back(std::min(to, at.back() + 1 + random.below(largest)));
  return at;
}

void check_setting(Random& random, const Setting& s) {
  const Input in(random, s);
  std::vector<size_t> singly(s.tokens - s.quiet + 1);
  std::iota(singly.begin(), singly.end(), s.quiet);
  const Array want = [&] {
    UseThreads one(1);
    return attend_in_steps(s, in, singly);
  }();
  for (int threads : {1, 2, 3}) {
    UseThreads use(threads);
    const Array got =
        attend_in_steps(s, in, threads == 2 ? std::vector{s.quiet, s.tokens} : cuts(random, s.quiet, s.tokens));
    EXPECT_TRUE(same_bits(got, want)) << threads << " threads, " << describe(s);
  }
  Plain plain = by_the_rule(s, in);
  for (double& size : plain.size)
    if (size == 0.0) size = 1.0;  // a row that sees a sink alone: zeros
  Array newest(s.batch, s.heads(), s.tokens - s.quiet, s.shape.d_v, s.shape.dtype);
  for (int b = 0; b < s.batch; b++)
    for (int h = 0; h < s.heads(); h++)
      for (size_t i = 0; i < newest.tokens; i++)
        for (int c = 0; c < newest.d; c++) newest.set(b, h, i, c, want.get(b, h, s.quiet + i, c));
  EXPECT_LT(error_of(newest, plain), kFloatSums + output_rounding(s.shape.dtype)) << describe(s);
}

Setting random_setting(Random& random, bool small) {
  Setting s;
  const int form = random.below(6);
  if (form == 0) s.recipe = plain_recipe();
  if (form == 1) s.recipe.offset = false;
  if (form == 2 || form == 3) s.recipe.offset_tokens = 16 * (1 + random.below(3));
  if (s.recipe.k.bits == 4) s.recipe.k = {random.below(2) ? 4 : 8, std::array{16, 32, 64, 0}[random.below(4)]};
  s.recipe.sink_tokens = std::array{0, 0, 16, 32}[random.below(4)];
  s.recipe.raw_window = std::array{0, 0, 16, 48}[random.below(4)];
  const int dims[] = {16, 80, 128, 18, 256};
  s.shape.d_k = small ? 16 : dims[random.below(5)],
  s.shape.d_v = random.below(2) || small ? s.shape.d_k : dims[random.below(5)];
  s.shape.dtype = std::array{Dtype::float32, Dtype::float16, Dtype::bfloat16}[random.below(3)];
  s.batch = 1 + random.below(2), s.kv_heads = 1 + random.below(2), s.group = std::array{1, 1, 2, 5}[random.below(4)];
  s.sliding_window = random.below(3) ? 0 : 2 + random.below(90);
  s.tokens = small ? 1 + random.below(60) : 60 + random.below(140);
  s.softcap = random.below(4) ? 0.0f : 2.0f, s.sinks = random.below(4) == 0, s.mask = random.below(4) == 0;
  if (random.below(4) == 0 && !small) s.quiet = 1 + random.below(50);
  if (s.quiet && !s.sliding_window && !s.recipe.offset_tokens && random.below(2)) s.cropped = 30;
  return s;
}

TEST(Exact, ResultsDoNotDependOnHowQueriesAreBatched) {
  Random random;
  for (const std::string& name : usable_backends())
    for (int i = 0; i < (name == "reference" ? 6 : 40); i++) {
      UseBackend use(name);
      check_setting(random, random_setting(random, name == "reference"));
    }
}

TEST(Exact, TokensThatSlideOutLeaveTheSameBits) {  // the oldest visible token lies anywhere in its block
  Random random;
  for (const std::string& name : fast_backends())
    for (int window : {2, 7, 16, 33, 64, 100})
      for (const Recipe& recipe : {Recipe{}, plain_recipe()}) {
        UseBackend use(name);
        Setting s;
        s.recipe = recipe, s.sliding_window = window, s.tokens = 170;
        check_setting(random, s);
      }
}

TEST(Exact, ManyTasksGiveTheSameBits) {  // past the number of tokens at which the work is cut
  Random random;
  for (const std::string& name : fast_backends())
    for (int form = 0; form < 6; form++) {
      UseBackend use(name);
      Setting s;
      s.recipe = form % 2 ? plain_recipe() : Recipe{};
      s.recipe.sink_tokens = form == 2 ? 32 : 0, s.recipe.raw_window = form == 3 ? 32 : 0;
      s.sliding_window = form == 4 ? 40 : form == 5 ? 4100 : 0;
      s.shape = {16, 16, Dtype::float32}, s.quiet = 4070, s.tokens = 4140, s.group = 2;
      check_setting(random, s);
    }
}

TEST(Exact, RawTokensGiveTheSameBits) {  // the baseline of benchmarks
  Random random;
  for (const std::string& name : usable_backends())
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
      UseBackend use(name);
      const Array k = random_array(random, 2, 2, 77, 80, dtype), v = random_array(random, 2, 2, 77, 80, dtype);
      const Array q = random_array(random, 2, 6, 77, 80, dtype);
      auto in_steps = [&](const std::vector<size_t>& at, int threads) {
        UseThreads use_threads(threads);
        RawCache cache(2, 80, dtype);
        Array out = poisoned(2, 6, 77, 80, dtype);
        for (size_t i = 1; i < at.size(); i++) {
          must(cache.append(k.view(at[i - 1]), v.view(at[i - 1]), 2, at[i] - at[i - 1]));
          AttendArgs args = args_of(q, out);
          args.exact = true, args.queries = (int)(at[i] - at[i - 1]), args.q = q.view(at[i - 1]);
          args.out.data = out.bytes.data() + at[i - 1] * 80 * dtype_bytes(dtype);
          must(cache.attend(args));
        }
        return out;
      };
      std::vector<size_t> singly(78);
      std::iota(singly.begin(), singly.end(), 0);
      const Array want = in_steps(singly, 1);
      for (int threads : {1, 2, 3}) EXPECT_TRUE(same_bits(in_steps(cuts(random, 0, 77), threads), want)) << name;
    }
}

}  // namespace
}  // namespace halfbyte
