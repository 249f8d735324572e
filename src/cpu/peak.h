// The loops that machine.cpp times to learn the most this instruction set can read and compute. Included inside the
// target's namespace, after kernels.h and attend.h.

// Four streams: memory answers them faster than one, whose next 4 KiB page the processor does not fetch ahead.
static float read_all(const float* data, size_t n) {
  constexpr int kStreams = 4, kWords = 4;
  const size_t part = n / kStreams;
  f32x16 sums[kStreams];
  for (int s = 0; s < kStreams; s++) sums[s] = set1(0.0f);
  for (size_t i = 0; i + kWords * kLanes <= part; i += kWords * kLanes)
    for (int s = 0; s < kStreams; s++)
      for (int w = 0; w < kWords; w++) sums[s] = add(sums[s], load(data + s * part + i + w * kLanes));
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// rounds × kChains dot4 over rows of codes [kPeakFloats]; every chain is an accumulator of its own.
template <int kChains>
static float dot_rounds(const float* data, size_t rounds) {
  const uint8_t* codes = (const uint8_t*)data;
  i32x16 sums[kChains];
  int fours[kChains];
  for (int c = 0; c < kChains; c++) sums[c] = set1(c), fours[c] = four_bytes((const int8_t*)codes + 4 * c);
  for (size_t i = 0; i < rounds; i++) {
    const u8x64 row = low_nibbles(load_row(codes + i % (kPeakFloats / kLanes) * kRowBytes));
    for (int c = 0; c < kChains; c++) sums[c] = dot4_nibble(sums[c], row, fours[c]);
  }
  f32x16 sum = set1(0.0f);
  for (int c = 0; c < kChains; c++) sum = add(sum, to_f32(sums[c]));
  return reduce_add(sum);
}

// rounds × kChains fma.
template <int kChains>
static float fma_rounds(const float* data, size_t rounds) {
  f32x16 sums[kChains], factors[kChains];
  for (int c = 0; c < kChains; c++) sums[c] = set1(data[c]), factors[c] = set1(data[c]);
  for (size_t i = 0; i < rounds; i++) {
    const f32x16 x = load(data + i % (kPeakFloats / kLanes) * kLanes);
    for (int c = 0; c < kChains; c++) sums[c] = fma(x, factors[c], sums[c]);
  }
  for (int c = 1; c < kChains; c++) sums[0] = add(sums[0], sums[c]);
  return reduce_add(sums[0]);
}

template <int kChains>
static float compute_rounds(Peak what, const float* data, size_t rounds) {
  return what == Peak::dot4 ? dot_rounds<kChains>(data, rounds) : fma_rounds<kChains>(data, rounds);
}

static float peak(Peak what, int chains, const float* data, size_t n) {
  if (what == Peak::read) return read_all(data, n);
  switch (chains) {
    case 2:
      return compute_rounds<2>(what, data, n);
    case 4:
      return compute_rounds<4>(what, data, n);
    case 6:
      return compute_rounds<6>(what, data, n);
    default:
      return compute_rounds<12>(what, data, n);
  }
}
