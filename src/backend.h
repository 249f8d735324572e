// The kernels one instruction set offers, and which of them is in use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "rotation.h"
#include "turn.h"

namespace halfbyte {

// Rows (query heads × query tokens) that one kernel call may carry: enough for each block to be read once for many
// rows, few enough for their state to stay in a core's own cache.
constexpr int kMaxRows = 64;

// Up to 16 vectors of one side become codes of one block.
struct EncodeArgs {
  const SideFormat* format;
  const RotationPlan* rotation;
  Side side;
  Dtype dtype;
  const void* rows[kBlockTokens];  // the vectors, channels contiguous; [n] of them given
  int n;
  int first_lane;       // token slot of rows[0]
  const float* offset;  // [head_dim] or null
  const float* lambda;  // [head_dim] or null
  uint8_t* codes;       // the block's code area of this side
  uint8_t* scales;      // and its scale area
};

// The inverse: all 16 tokens of one block, in the original domain.
struct DecodeArgs {
  const SideFormat* format;
  const RotationPlan* rotation;
  Side side;
  const float* offset;
  const float* inverse_lambda;  // [head_dim] or null
  const uint8_t* codes;
  const uint8_t* scales;
  float* out;  // [16, head_dim]
};

// What the rows of one call may see, in absolute token positions; masks are byte rows indexed by position − mask_first.
struct Visible {
  int rows;
  size_t lo[kMaxRows], hi[kMaxRows];  // [lo, hi) of each row
  const uint8_t* mask[kMaxRows];      // or null
  size_t mask_first;
  float softcap;
};

// Running softmax of each row: maximum, denominator, and Σ p·value in `acc`.
struct Softmax {
  float max[kMaxRows];
  float sum[kMaxRows];
  float* acc;  // [rows][acc_stride]
  size_t acc_stride;
};

// q·mu of sixteen spans after another, for an offset that turns.
struct OffsetScoreArgs {
  const Turn* turn;
  int head_dim;
  const float* mu;  // [head_dim], as before RoPE
  const float* q;   // [rows][q_stride]: q · scale
  size_t q_stride;
  int rows;
  const float* phases;  // [sixteens][2][pairs]: cos and sin by which each sixteen is further than the first one
  size_t first_span;    // a multiple of 16
  int sixteens;
  float* out;  // [rows][out_stride]: of spans first_span …
  size_t out_stride;
};

// Where the share of the offset in a score lies: of row r and block b of page p of a call, at[r · row + p · page +
// b · block]. Strides of 0: blocks or pages that share it.
struct OffsetScores {
  const float* at;
  size_t row, page, block;
};

// Attention over packed blocks. Scores come out of code domain queries; acc stays in code domain too.
struct AttendPackedArgs {
  const PageFormat* format;
  const uint8_t* const* pages;  // one KV head's part of each page; pages[0] starts at token first_token
  size_t first_token;
  size_t begin, end;      // tokens to read: the union of what the rows may see
  const float* q;         // [rows][padded_dim of K]: Λ⁻¹ R q · scale
  OffsetScores q_offset;  // q·mu · scale
  Visible visible;
};

// Attention over tokens kept as given: K row t at k + t·stride, V alike.
struct AttendRawArgs {
  Dtype dtype;
  int head_dim_k, head_dim_v;
  const void* k;
  const void* v;
  ptrdiff_t k_stride, v_stride;  // elements
  size_t first_token;            // position of row 0
  size_t begin, end;
  const float* q;  // [rows][q_stride]: q · scale, zeros behind head_dim_k
  size_t q_stride;
  Visible visible;
  bool one_order;  // sums run in the same order however many rows there are
};

// What a machine's limits are measured in; see machine.cpp.
enum class Peak { read, dot4, fma };
constexpr size_t kPeakFloats = 1024;  // operands that stay in the first-level cache

struct Backend {
  const char* name;
  bool (*supported)();
  int rows;  // rows that fill its registers; tiles are multiples of it
  // Reads n floats, or runs n rounds of `chains` independent dot4 or fma over data [kPeakFloats]; null: not timed.
  // The result only keeps the work from being optimised away.
  float (*peak)(Peak what, int chains, const float* data, size_t n);
  // Rotates up to 16 vectors [n][stride] in place.
  void (*rotate)(const RotationPlan&, bool inverse, float* x, size_t stride, int n);
  void (*encode)(const EncodeArgs&);
  void (*decode)(const DecodeArgs&);
  void (*score_offsets)(const OffsetScoreArgs&);
  void (*attend_packed)(const AttendPackedArgs&, Softmax&);
  void (*attend_raw)(const AttendRawArgs&, Softmax&);
};

const Backend& current_backend();
const Backend* backend_at(int i);  // best first; null past the end

extern const Backend kReferenceBackend;
extern const Backend kScalarBackend;
#if HALFBYTE_HAS_AVX2
extern const Backend kAvx2Backend;
#endif
#if HALFBYTE_HAS_AVX2VNNI
extern const Backend kAvx2VnniBackend;
#endif
#if HALFBYTE_HAS_AVX512
extern const Backend kAvx512Backend;
#endif
#if HALFBYTE_HAS_NEON
extern const Backend kNeonBackend;
#endif

}  // namespace halfbyte
