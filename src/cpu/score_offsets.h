// q·mu of an offset that turns, for sixteen spans at once: lane = span. Included inside the target's namespace, after
// attend.h.
//
// A pair of channels (a, b) turned by an angle adds even · cos + odd · sin to q·mu, with even = q_a mu_a + q_b mu_b and
// odd = q_b mu_a − q_a mu_b. What all sixteen spans have turned by already goes into even and odd; the rest is a table.

template <int kRows>
struct PairProducts {
  alignas(64) float even[kRows][kMaxPairs], odd[kRows][kMaxPairs];
};

// Products of every pair, zeros behind the last one, and in `fixed` the share of the channels that do not turn.
template <int kRows>
static void multiply_pairs(const OffsetScoreArgs& args, int first_row, PairProducts<kRows>& out, float* fixed) {
  const Turn& turn = *args.turn;
  const int pairs = turn.pairs;
  for (int r = 0; r < kRows; r++) {
    const float* q = args.q + (first_row + r) * args.q_stride;
    for (int i = 0; i < pairs; i++) {
      const int a = i * turn.pair_step, b = a + turn.pair_gap;
      out.even[r][i] = q[a] * args.mu[a] + q[b] * args.mu[b];
      out.odd[r][i] = q[b] * args.mu[a] - q[a] * args.mu[b];
    }
    for (int i = pairs; i % kLanes; i++) out.even[r][i] = out.odd[r][i] = 0.0f;
    fixed[r] = 0.0f;
    for (int c = 2 * pairs; c < args.head_dim; c++) fixed[r] += q[c] * args.mu[c];
  }
}

// The same with every pair turned on by a phase, [2][pairs, filled up to sixteen]: its cos and sin.
template <int kRows>
HALFBYTE_INLINE void turn_on(const PairProducts<kRows>& from, const float* phase, int pairs, PairProducts<kRows>& to) {
  for (int i = 0; i < pairs; i += kLanes) {
    const f32x16 cosine = load(phase + i), sine = load(phase + pairs + i);
    for (int r = 0; r < kRows; r++) {
      const f32x16 even = load(from.even[r] + i), odd = load(from.odd[r] + i);
      store(to.even[r] + i, fma(odd, sine, mul(even, cosine)));
      store(to.odd[r] + i, fnma(even, sine, mul(odd, cosine)));
    }
  }
}

template <int kRows>
static void score_offsets_rows(const OffsetScoreArgs& args, int first_row) {
  const Turn& turn = *args.turn;
  const int pairs = turn.pairs, padded = (pairs + kLanes - 1) / kLanes * kLanes;
  PairProducts<kRows> products, turned;
  float fixed[kRows];
  multiply_pairs<kRows>(args, first_row, products, fixed);
  for (int n = 0; n < args.sixteens; n++) {
    turn_on<kRows>(products, args.phases + (size_t)n * 2 * padded, padded, turned);
    f32x16 even[kRows], odd[kRows];  // two sums a row: twice as many that do not wait for each other
    for (int r = 0; r < kRows; r++) even[r] = set1(fixed[r]), odd[r] = set1(0.0f);
    for (int i = 0; i < pairs; i++) {
      const f32x16 cosine = load(&turn.cos[i * kLanes]), sine = load(&turn.sin[i * kLanes]);
      for (int r = 0; r < kRows; r++) {
        even[r] = fma(set1(turned.even[r][i]), cosine, even[r]);
        odd[r] = fma(set1(turned.odd[r][i]), sine, odd[r]);
      }
    }
    for (int r = 0; r < kRows; r++)
      store(args.out + (first_row + r) * args.out_stride + n * kLanes, add(even[r], odd[r]));
  }
}

static void score_offsets(const OffsetScoreArgs& args) {
  for_row_parts(args.rows, [&]<int kRows>(int first) { score_offsets_rows<kRows>(args, first); });
}
