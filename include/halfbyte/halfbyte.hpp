// The C++ API of Halfbyte: a KV cache kept in 4 or 8 bits, and attention computed on its packed codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace halfbyte {

// What a call reports. Nothing in this library prints, exits or throws across its API; a failed call leaves the
// object as it was.
enum class Code { ok, bad_argument, bad_value, out_of_memory, unsupported };

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}
  bool ok() const { return code_ == Code::ok; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::ok;
  std::string message_;
};

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  T& value() { return *value_; }

 private:
  Status status_;
  std::optional<T> value_;
};

enum class Dtype { float32, float16, bfloat16 };
enum class Rotation { identity, srft, srht, dense };  // dense: given by set_rotation

// How K, or V, becomes codes. `bits`: 4, 8, or 32 for no code at all: lossless, to tell bookkeeping from rounding.
// `group`: channels that share a scale: 16, 32, 64, or 0 for the whole vector.
struct Codec {
  int bits = 4;
  int group = 32;
};

// y = diag(lambda) · R · (x − mu); s = scale of y's group; code = clamp(rint(y / s)). See docs/format.md.
struct Recipe {
  Rotation rotation = Rotation::srft;
  uint64_t seed = 0;   // of the rotation's signs
  bool offset = true;  // mu = mean over the tokens held when the first block is packed
  Codec k{4, 32};
  Codec v{4, 0};
  int scale_bits = 16;       // 16: fp16, 32: fp32
  bool search = true;        // pick the scale among six by squared error
  bool signed_scale = true;  // the scale's sign puts the largest magnitude on the code −2^(bits−1)
  bool lambda = false;       // per-channel factors, given by set_lambda
  int sink_tokens = 0;       // first tokens kept raw; a multiple of 16
  int raw_window = 0;        // newest whole blocks kept raw besides the unfinished one; a multiple of 16 tokens
  int offset_tokens = 0;     // > 0: mu is the mean over so many first tokens, raw until then: the same however tokens
                             // arrive. A multiple of 16
  int offset_span = 64;      // once set_frequencies says how: mu of K turns with RoPE, so many tokens sharing it. 16 or
                             // 64; 0: it never does

  // Ok when this recipe can code vectors of `head_dim` channels.
  Status check(int head_dim) const;
};

struct LayerConfig {
  int kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;
  Dtype dtype = Dtype::float32;  // of K, V, queries and outputs
  Recipe recipe;
  int layer_index = 0;     // selects the rotation's signs, together with the seed
  int sliding_window = 0;  // 0: every token stays visible
};

// A [batch, heads, tokens, channels] array: strides in elements, channels contiguous.
struct View {
  const void* data = nullptr;
  ptrdiff_t batch_stride = 0;
  ptrdiff_t head_stride = 0;
  ptrdiff_t token_stride = 0;
};

struct MutableView {
  void* data = nullptr;
  ptrdiff_t batch_stride = 0;
  ptrdiff_t head_stride = 0;
  ptrdiff_t token_stride = 0;
};

struct AttendArgs {
  View q;           // [batch, heads, queries, head_dim_k]: the newest `queries` positions; NaN out where not finite
  MutableView out;  // [batch, heads, queries, head_dim_v]
  int heads = 0;    // a multiple of kv_heads; head h reads KV head h / (heads / kv_heads)
  int queries = 1;
  float scale = 1.0f;             // of the scores
  View chunk_k, chunk_v;          // raw K, V of those newest tokens; needed when queries > 1
  const uint8_t* mask = nullptr;  // [batch, queries, mask_tokens], 1 = visible; covers the newest mask_tokens
  ptrdiff_t mask_batch_stride = 0;
  ptrdiff_t mask_query_stride = 0;
  size_t mask_tokens = 0;
  bool causal = true;            // without a mask: token p sees tokens up to p (inside the sliding window)
  bool exact = false;            // float32 throughout, and the same bits however queries are batched; slower
  float softcap = 0.0f;          // c > 0: score → c · tanh(score / c)
  const float* sinks = nullptr;  // [heads]: one more logit in each softmax, with no value
};

// The content of a layer as plain arrays, the same on every backend: what a cache file is made of. docs/format.md has
// the bytes of a page. Empty arrays where the layer has no such thing.
struct LayerParts {
  int batch = 0;
  uint64_t length = 0;         // tokens seen
  uint64_t first = 0;          // oldest token held; 0 unless sliding
  uint64_t packed_end = 0;     // tokens [sink_tokens, packed_end) are packed
  uint64_t pages_dropped = 0;  // pages gone from the front; 0 unless sliding
  bool offset_ready = false;
  std::vector<int32_t> page_table;                    // [batch, pages a sequence]: index into `pages`
  std::vector<uint8_t> pages;                         // [pages, kv_heads, bytes of a page's head]; shared ones once
  std::vector<uint8_t> raw_k, raw_v;                  // [batch, kv_heads, raw tokens, head_dim] in the layer's dtype:
                                                      // the sinks, then tokens [packed_end, length)
  std::vector<float> offset_k, offset_v;              // [batch, kv_heads, head_dim]
  std::vector<float> given_offset_k, given_offset_v;  // [kv_heads, head_dim]: set_offset's
  std::vector<float> lambda_k, lambda_v;              // [kv_heads, head_dim]
  std::vector<float> rotation_k, rotation_v;          // [head_dim, head_dim]: set_rotation's
  std::vector<float> frequencies;                     // [pairs]: set_frequencies's
  bool interleaved = false;
  std::vector<uint8_t> counted;  // [batch, tokens]: 0 for padding, while the offset waits
};

// The cache of one attention layer: [batch] sequences of equal length, kv_heads each.
class Layer {
 public:
  static Result<Layer> create(const LayerConfig& config);
  Layer();
  ~Layer();
  Layer(Layer&&) noexcept;
  Layer& operator=(Layer&&) noexcept;

  // Adds `tokens` tokens to each sequence. `counted` ([batch, tokens] or null): 0 marks padding, left out of the
  // offset. Fails on a non-finite value, naming it; the layer is then as before. `answered`: these tokens' own queries
  // will not come, so a sliding layer keeps at once only what later ones see, and no crop can take the tokens back.
  Status append(const View& k, const View& v, int batch, size_t tokens, const uint8_t* counted = nullptr,
                bool answered = false);
  Status attend(const AttendArgs& args);

  // Newest visible() tokens as float32 [batch, kv_heads, visible, head_dim].
  Status decode(float* k_out, float* v_out) const;

  // Allocates now the pages that `batch` sequences of up to `tokens` tokens need, to be used before any new ones; pages
  // that become free are kept up to that number. A sliding layer needs those of its window only.
  Status reserve(int batch, size_t tokens);

  Status crop(size_t length);                      // forgets the tokens at positions >= length
  Status select(const std::vector<size_t>& rows);  // sequence i becomes a copy of the old rows[i]; pages are shared
  Status copy_from(const Layer& other);
  void reset();

  // Content to arrays and back, nothing decoded. load checks every count, size and value, and takes the config of the
  // layer that was saved.
  Status save(LayerParts& parts) const;
  static Result<Layer> load(const LayerConfig& config, const LayerParts& parts);

  // mu and lambda as float32 [kv_heads, head_dim]; null leaves that side alone. mu: as large as K and V may be; lambda:
  // finite, 1e-6 or more. Only while nothing is packed.
  Status set_offset(const float* k, const float* v);
  Status set_lambda(const float* k, const float* v);
  // R of a dense recipe, for all heads: float32 [head_dim, head_dim] row-major, y = R (x − mu), orthonormal within
  // 1e-3. Null leaves that side alone. Only while nothing is packed; append needs both.
  Status set_rotation(const float* k, const float* v);
  // RoPE's frequencies, float32 [pairs] in radians a token: from now on mu of K, set or found, is K as before RoPE, and
  // the tokens of a span of recipe.offset_span have it turned to where the middle of the span is. Pair i is channels i
  // and i + pairs, or 2i and 2i + 1 when interleaved; channels behind 2 · pairs, and pairs of frequency 0, keep mu as
  // it is. 0 pairs undo it. Any frequencies are exact: they only decide how well mu fits. Only while nothing is packed.
  Status set_frequencies(const float* frequencies, int pairs, bool interleaved = false);
  // While on, a crop finds what the newest append changed: tokens behind a sliding window, and raw values of its last
  // 64 tokens, which are exact again.
  void record_past(bool on);

  const LayerConfig& config() const;
  size_t length() const;         // tokens seen by each sequence
  size_t first() const;          // oldest token still held (0 unless sliding)
  size_t visible() const;        // length() − first()
  size_t packed_tokens() const;  // tokens held as codes, a sequence
  int batch() const;
  bool has_offset() const;
  size_t bytes() const;  // everything held: pages with their slack, raw tokens, offsets, lambda

  struct State;

 private:
  std::unique_ptr<State> state_;
};

// The tuned baseline: the same attention over K, V kept as given. Contiguous, grown by doubling.
class RawCache {
 public:
  RawCache(int kv_heads, int head_dim, Dtype dtype);
  ~RawCache();
  Status append(const View& k, const View& v, int batch, size_t tokens);
  Status attend(const AttendArgs& args);
  size_t length() const;
  size_t bytes() const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

enum class Side { k, v };

// Vectors [n, head_dim] → codes → vectors [n, head_dim], as the cache would give them back. mu, lambda: [head_dim] or
// null. matrix, here and below: R of a dense recipe as for Layer::set_rotation, null for all others.
Status roundtrip(const float* x, float* out, size_t n, int head_dim, const Recipe& recipe, Side side, const float* mu,
                 const float* lambda, int layer_index, const float* matrix = nullptr);

// Codes the vectors into blocks and drops them; what `bench encode` times.
Status encode_only(const float* x, size_t n, int head_dim, const Recipe& recipe, Side side,
                   const float* matrix = nullptr);

// R x (or Rᵀ x) for n vectors.
Status rotate(const float* x, float* out, size_t n, int head_dim, const Recipe& recipe, int layer_index, bool inverse,
              const float* matrix = nullptr);

struct BackendInfo {
  std::string name;
  bool usable;
};
std::vector<BackendInfo> backends();          // built into this library, best first
std::string backend();                        // the one in use
Status set_backend(const std::string& name);  // also: environment variable HALFBYTE_BACKEND
std::vector<std::string> cpu_features();

void set_num_threads(int n);
int num_threads();

// Median read bandwidth over `bytes` with `threads` threads, in bytes per second: the most the backend in use can read.
double read_bandwidth(size_t bytes, int threads, int repeats);

// The most that the backend in use computes with `threads` threads, in operations per second, a product and a sum being
// two: signed bytes times 4-bit codes, and float32. 0 for the reference, which is not made for speed.
double dot_peak(int threads);
double fma_peak(int threads);

const char* version();
const char* commit();

}  // namespace halfbyte
