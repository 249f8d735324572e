// Reference attention in double: scores, softmax and weighted sum written out, one token at a time.
#include "attend.h"

#include <algorithm>
#include <cmath>

#include "decode.h"
#include "numbers.h"

namespace halfbyte {
namespace {

bool sees(const Visible& visible, int row, size_t token) {
  if (token < visible.lo[row] || token >= visible.hi[row]) return false;
  const uint8_t* mask = visible.mask[row];
  return !mask || mask[token - visible.mask_first];
}

double capped(double score, float softcap) { return softcap > 0.0f ? softcap * std::tanh(score / softcap) : score; }

// Adds the tokens [begin, end) to one row's running softmax. score(t) and value(t, c) give token t's numbers.
template <class Score, class Value>
void attend_row(Softmax& state, const Visible& visible, int row, size_t begin, size_t end, int channels, Score score,
                Value value) {
  double max = state.max[row], sum = state.sum[row];
  std::vector<double> acc(channels);
  float* out = state.acc + row * state.acc_stride;
  for (int c = 0; c < channels; c++) acc[c] = out[c];
  for (size_t t = begin; t < end; t++) {
    if (!sees(visible, row, t)) continue;
    double s = capped(score(t), visible.softcap), top = std::max(max, s);
    double keep = std::exp(max - top), p = std::exp(s - top);
    sum = sum * keep + p;
    for (int c = 0; c < channels; c++) acc[c] = acc[c] * keep + p * value(t, c);
    max = top;
  }
  state.max[row] = (float)max;
  state.sum[row] = (float)sum;
  for (int c = 0; c < channels; c++) out[c] = (float)acc[c];
}

}  // namespace

void attend_packed_reference(const AttendPackedArgs& args, Softmax& state) {
  const PageFormat& format = *args.format;
  auto block_of = [&](size_t token) { return (token - args.first_token) % kPageTokens / kBlockTokens; };
  auto page_of = [&](size_t token) { return args.pages[(token - args.first_token) / kPageTokens]; };
  for (int r = 0; r < args.visible.rows; r++) {
    const float* q = args.q + (size_t)r * format.k.padded_dim;
    auto score = [&](size_t t) {
      const uint8_t* page = page_of(t);
      int block = (int)block_of(t);
      const OffsetScores& offset = args.q_offset;
      const size_t page_index = (t - args.first_token) / kPageTokens;
      double s = offset.at[r * offset.row + page_index * offset.page + block * offset.block];
      for (int c = 0; c < format.k.head_dim; c++)
        s += (double)q[c] * decode_code(format.k, Side::k, page + k_codes_at(format, block),
                                        page + k_scales_at(format, block), (int)(t % kBlockTokens), c);
      return s;
    };
    auto value = [&](size_t t, int c) {
      const uint8_t* page = page_of(t);
      int block = (int)block_of(t);
      return (double)decode_code(format.v, Side::v, page + v_codes_at(format, block), page + v_scales_at(format, block),
                                 (int)(t % kBlockTokens), c);
    };
    attend_row(state, args.visible, r, args.begin, args.end, format.v.head_dim, score, value);
  }
}

void score_offsets_reference(const OffsetScoreArgs& args) {
  const Turn& turn = *args.turn;
  for (int r = 0; r < args.rows; r++)
    for (int i = 0; i < args.sixteens * kTurnSpans; i++) {
      const float* q = args.q + r * args.q_stride;
      double sum = 0.0;
      for (int c = 2 * turn.pairs; c < args.head_dim; c++) sum += (double)q[c] * args.mu[c];
      for (int pair = 0; pair < turn.pairs; pair++) {
        const double angle = turn.frequencies[pair] * turn.middle_of(args.first_span + i);
        const double cosine = std::cos(angle), sine = std::sin(angle);
        const int a = pair * turn.pair_step, b = a + turn.pair_gap;
        sum += q[a] * (args.mu[a] * cosine - args.mu[b] * sine) + q[b] * (args.mu[b] * cosine + args.mu[a] * sine);
      }
      args.out[r * args.out_stride + i] = (float)sum;
    }
}

void attend_raw_reference(const AttendRawArgs& args, Softmax& state) {
  for (int r = 0; r < args.visible.rows; r++) {
    const float* q = args.q + r * args.q_stride;
    auto score = [&](size_t t) {
      double s = 0.0;
      ptrdiff_t row = (ptrdiff_t)(t - args.first_token) * args.k_stride;
      for (int c = 0; c < args.head_dim_k; c++) s += (double)q[c] * load_element(args.k, args.dtype, row + c);
      return s;
    };
    auto value = [&](size_t t, int c) {
      return (double)load_element(args.v, args.dtype, (ptrdiff_t)(t - args.first_token) * args.v_stride + c);
    };
    attend_row(state, args.visible, r, args.begin, args.end, args.head_dim_v, score, value);
  }
}

void merge_softmax(float& max, float& sum, float* acc, float other_max, float other_sum, const float* other_acc,
                   int n) {
  float top = std::max(max, other_max);
  float keep = std::exp(max - top), take = std::exp(other_max - top);
  for (int c = 0; c < n; c++) acc[c] = acc[c] * keep + other_acc[c] * take;
  sum = sum * keep + other_sum * take;
  max = top;
}

}  // namespace halfbyte
