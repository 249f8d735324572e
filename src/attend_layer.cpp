// Layer::attend: which rows see which tokens packed, and which raw.
#include <cstring>

#include "tile.h"

namespace halfbyte {
namespace {

using State = Layer::State;

// First token that this query sees raw: its own block's start, but not below what still exists raw.
size_t raw_from(const State& s, const Plan& plan, int query) {
  const size_t p = plan.position(query), kept = plan.args.queries == 1 ? s.packed_end : s.before_start;
  return std::max(s.raw_start(p), std::min(kept, p + 1));
}

// Rotates rows [n][stride] in place; the kernel takes a block of them.
void rotate_rows(const RotationPlan& plan, bool inverse, float* x, size_t stride, int n) {
  for (int r = 0; r < n; r += kBlockTokens)
    current_backend().rotate(plan, inverse, x + r * stride, stride, std::min(n - r, kBlockTokens));
}

// Λ⁻¹ R q for the kernels.
void rotate_queries(const State& s, const Tile& tile, float* rotated) {
  const Plan& plan = tile.plan;
  const int d = plan.head_dim_k, padded = s.format.k.padded_dim;
  const float* inverse_lambda = s.lambda_of(Side::k, tile.head, true);
  for (int r = 0; r < tile.n; r++) {
    const float* q = tile.q + r * plan.q_stride();
    std::copy_n(q, d, rotated + r * padded);
    std::fill(rotated + r * padded + d, rotated + (r + 1) * padded, 0.0f);
  }
  rotate_rows(s.rotation_k, false, rotated, padded, tile.n);
  for (int r = 0; inverse_lambda && r < tile.n; r++)
    for (int c = 0; c < d; c++) rotated[r * padded + c] *= inverse_lambda[c];
}

// Sixteen sums side by side: one sum would wait for each addition.
float dot(const float* a, const float* b, int n) {
  float sums[16] = {}, sum = 0.0f;
  int c = 0;
  for (; c + 16 <= n; c += 16)
    for (int i = 0; i < 16; i++) sums[i] += a[c + i] * b[c + i];
  for (; c < n; c++) sum += a[c] * b[c];
  for (float part : sums) sum += part;
  return sum;
}

// q·mu for the kernels: one number a row, or one a row and span on the way along pages.
class QueryOffsets {
 public:
  QueryOffsets(const State& s, const Tile& tile)
      : tile_(tile), turn_(s.turn.get()), mu_(s.offset_of(Side::k, tile.b, tile.head)) {
    const Plan& plan = tile.plan;
    for (int r = 0; !turn_ && r < tile.n; r++) {
      const float* q = tile.q + r * plan.q_stride();
      fixed_[r] = mu_ ? dot(q, mu_, plan.head_dim_k) : 0.0f;
    }
  }

  // Of the pages with tokens [from, to).
  OffsetScores of_pages(size_t from, size_t to) {
    if (!turn_) return {fixed_, 1, 0, 0};
    constexpr size_t kSixteen = kTurnSpans;
    const size_t first = turn_->span_of(from) / kSixteen, sixteens = turn_->span_of(to - 1) / kSixteen + 1 - first;
    const size_t stride = sixteens * kSixteen, pages = kPageTokens / (size_t)turn_->span;
    float* out = scratch().offsets.take(tile_.n * stride);
    current_backend().score_offsets({turn_, tile_.plan.head_dim_k, mu_, tile_.q, tile_.plan.q_stride(), tile_.n,
                                     phases_from(first, sixteens), first * kSixteen, (int)sixteens, out, stride});
    return {out + (turn_->span_of(from) - first * kSixteen), stride, pages, pages / kPageBlocks};
  }

 private:
  const float* phases_from(size_t first, size_t sixteens) const {
    const size_t padded = round_up(turn_->pairs, 16);
    float* out = scratch().phases.take(sixteens * 2 * padded);
    Phase phase(*turn_, first);
    for (size_t n = 0; n < sixteens; n++, out += 2 * padded) {
      if (n) phase.step(*turn_);
      for (int i = 0; i < turn_->pairs; i++) out[i] = (float)phase.cos[i], out[padded + i] = (float)phase.sin[i];
    }
    return out - sixteens * 2 * padded;
  }

  const Tile& tile_;
  const Turn* turn_;
  const float* mu_;
  float fixed_[kMaxRows];
};

// Σ p ŷ → Rᵀ Λ⁻¹ Σ p ŷ + mu Σ p.
void leave_code_domain(const State& s, Tile& tile) {
  const int d = tile.plan.head_dim_v;
  const float* mu = s.offset_of(Side::v, tile.b, tile.head);
  const float* inverse_lambda = s.lambda_of(Side::v, tile.head, true);
  Softmax& state = tile.state;
  for (int r = 0; inverse_lambda && r < tile.n; r++)
    for (int c = 0; c < d; c++) state.acc[r * state.acc_stride + c] *= inverse_lambda[c];
  rotate_rows(s.rotation_v, true, state.acc, state.acc_stride, tile.n);
  for (int r = 0; mu && r < tile.n; r++)
    for (int c = 0; c < d; c++) state.acc[r * state.acc_stride + c] += mu[c] * state.sum[r];
}

// Packed tokens [begin, end) block by block as they decode: queries and weights keep their float32.
void attend_decoded(const State& s, Tile& tile, size_t begin, size_t end, const Visible& visible) {
  const Plan& plan = tile.plan;
  float* k = scratch().k.take(kBlockTokens * plan.head_dim_k);
  float* v = scratch().v.take(kBlockTokens * plan.head_dim_v);
  for (size_t block = begin / kBlockTokens * kBlockTokens; block < end; block += kBlockTokens) {
    decode_tokens(s, Side::k, tile.b, tile.head, block, k);
    decode_tokens(s, Side::v, tile.b, tile.head, block, v);
    current_backend().attend_raw(
        {Dtype::float32, plan.head_dim_k, plan.head_dim_v, k, v, plan.head_dim_k, plan.head_dim_v, block,
         std::max(begin, block), std::min(end, block + kBlockTokens), tile.q, plan.q_stride(), visible, true},
        tile.state);
  }
}

void attend_packed_part(const State& s, Tile& tile, size_t split, size_t splits) {
  const Plan& plan = tile.plan;
  size_t begin = s.sink_tokens(), end = s.packed_end;
  auto packed_until = [&](int query) { return raw_from(s, plan, query); };
  Visible whole = visible_rows(tile, begin, end, [](int) { return 0; }, packed_until);
  if (!narrow(whole, begin, end)) return;
  share(plan, split, splits, kPageTokens, begin, end);
  if (begin >= end) return;
  Visible visible = visible_rows(tile, begin, end, [](int) { return 0; }, packed_until);
  if (plan.args.exact || s.format.k.bits == kPlainBits) {
    attend_decoded(s, tile, begin, end, visible);
    return;
  }
  QueryOffsets offsets(s, tile);
  float* rotated = scratch().rotated.take((size_t)tile.n * s.format.k.padded_dim);
  rotate_queries(s, tile, rotated);
  std::vector<const uint8_t*>& pages = scratch().pages;
  for (size_t from = begin / kPageTokens * kPageTokens; from < end; from += kPagesACall * kPageTokens) {
    const size_t to = std::min(end, from + kPagesACall * kPageTokens);
    pages.clear();
    for (size_t token = from; token < to; token += kPageTokens) pages.push_back(s.page_head(tile.b, token, tile.head));
    current_backend().attend_packed(
        {&s.format, pages.data(), from, std::max(begin, from), to, rotated, offsets.of_pages(from, to), visible},
        tile.state);
  }
  leave_code_domain(s, tile);
}

// The block that the newest tokens began in the middle of: its raw tokens of the old tail and of the chunk, side by
// side.
struct JoinedBlock {
  alignas(64) uint8_t k[kBlockTokens * kMaxHeadDim * sizeof(float)], v[kBlockTokens * kMaxHeadDim * sizeof(float)];
};

Rows join(const State& s, const Tile& tile, size_t from, size_t to, JoinedBlock& out) {
  const AttendArgs& args = tile.plan.args;
  for (Side side : {Side::k, Side::v}) {
    const size_t bytes = s.head_dim(side) * s.element_bytes();
    for (size_t t = from; t < to; t++)
      memcpy((side == Side::k ? out.k : out.v) + (t - from) * bytes,
             t < s.chunk_start ? s.raw_at(s.before, side, tile.b, tile.head, t - s.before_start)
                               : row_of(side == Side::k ? args.chunk_k : args.chunk_v, s.element_bytes(), tile.b,
                                        tile.head, t - s.chunk_start),
             bytes);
  }
  return {s.config.dtype, out.k, out.v, s.head_dim(Side::k), s.head_dim(Side::v), from};
}

// Sinks, then the newest tokens: from the tail for one query, from the old tail and the chunk for several.
void attend_raw_parts(const State& s, Tile& tile) {
  const AttendArgs& args = tile.plan.args;
  const size_t sink = std::min(s.sink_tokens(), s.length);
  auto stored = [&](const RawTokens& raw, size_t first) {
    return Rows{s.config.dtype,
                s.raw_at(raw, Side::k, tile.b, tile.head, 0),
                s.raw_at(raw, Side::v, tile.b, tile.head, 0),
                s.head_dim(Side::k),
                s.head_dim(Side::v),
                first};
  };
  auto from_own_block = [&](int query) { return raw_from(s, tile.plan, query); };
  if (s.sinks.capacity) attend_rows(tile, stored(s.sinks, 0), 0, sink, [](int) { return 0; });
  if (args.queries == 1) {
    if (s.packed_end < s.length)
      attend_rows(tile, stored(s.tail, s.packed_end), s.packed_end, s.length, from_own_block);
    return;
  }
  size_t chunk_from = std::max(s.chunk_start, sink);
  if (s.before_start < s.chunk_start) {
    const size_t block = s.chunk_start / kBlockTokens * kBlockTokens, from = std::max(s.before_start, block);
    if (s.before_start < block)
      attend_rows(tile, stored(s.before, s.before_start), s.before_start, block, from_own_block);
    if (from < s.chunk_start) {
      JoinedBlock joined;
      chunk_from = std::min(s.length, block + kBlockTokens);
      attend_rows(tile, join(s, tile, from, chunk_from, joined), from, chunk_from, from_own_block);
    }
  }
  const Rows chunk = {s.config.dtype,
                      row_of(args.chunk_k, s.element_bytes(), tile.b, tile.head, 0),
                      row_of(args.chunk_v, s.element_bytes(), tile.b, tile.head, 0),
                      args.chunk_k.token_stride,
                      args.chunk_v.token_stride,
                      s.chunk_start};
  if (chunk_from < s.length) attend_rows(tile, chunk, chunk_from, s.length, from_own_block);
}

}  // namespace

size_t attend_scratch_bytes() { return scratch().bytes(); }

Status Layer::attend(const AttendArgs& args) {
  const State& s = *state_;
  if (Status status = check(args, s.config.kv_heads, s.length, s.batch); !status.ok()) return status;
  if (args.queries > 1) {
    if (!args.chunk_k.data || !args.chunk_v.data)
      return {Code::bad_argument, "attend with queries > 1 needs chunk_k and chunk_v, their tokens' raw K and V"};
    if (s.chunk_start + args.queries != s.length)
      return {Code::bad_argument, "queries is " + std::to_string(args.queries) + ", but the last append held " +
                                      std::to_string(s.length - s.chunk_start) + " tokens"};
  }
  const Plan plan{args,
                  s.config.dtype,
                  s.batch,
                  s.config.kv_heads,
                  s.config.head_dim_k,
                  s.config.head_dim_v,
                  s.length,
                  s.first,
                  (size_t)s.config.sliding_window};
  return run(plan, packed_tokens(), [&](Tile& tile, size_t split, size_t splits) {
    attend_packed_part(s, tile, split, splits);
    if (split == 0) attend_raw_parts(s, tile);
  });
}

}  // namespace halfbyte
