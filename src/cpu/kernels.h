// Encode and decode over simd.h and rotate.h, once for every CPU. Included inside the target's namespace.

// ---------------------------------------------------------------------------------------------- scales

HALFBYTE_INLINE f32x16 stored_scale(const SideFormat& format, f32x16 scale) {
  return format.scale_bytes == 4 ? scale : round_f16(scale);
}

// A group of zeros has scale 0, and codes 0; the inverse of the least scales stays finite, so that 0 times it is 0.
HALFBYTE_INLINE f32x16 inverse_scale(f32x16 scale) {
  constexpr float kLargest = 3.4e38f;
  mask16 used = greater(abs(scale), set1(0.0f));
  f32x16 inverse = div(set1(1.0f), select(used, scale, set1(1.0f)));
  return select(used, max(min(inverse, set1(kLargest)), set1(-kLargest)), set1(0.0f));
}

// The scale of least squared error among the candidates; y: the group's channels [channels][16].
template <int kBits>
static f32x16 search_scale(const SideFormat& format, const float* y, int channels, f32x16 covering) {
  const float* factors = format.signed_scale ? kSearchSigned : kSearch;
  f32x16 best = covering, best_error = covering;
  for (int first = 0; first < kSearchSize; first += kSearchAbreast) {
    f32x16 scales[kSearchAbreast], inverses[kSearchAbreast], errors[kSearchAbreast];
    for (int i = 0; i < kSearchAbreast; i++) {
      scales[i] = stored_scale(format, mul(covering, set1(factors[first + i])));
      inverses[i] = inverse_scale(scales[i]), errors[i] = set1(0.0f);
    }
    for (int c = 0; c < channels; c++) {
      const f32x16 value = take(y + c * kLanes);
      for (int i = 0; i < kSearchAbreast; i++) {
        f32x16 left = fnma(nearest_code<kBits>(value, inverses[i]), scales[i], value);
        errors[i] = fma(left, left, errors[i]);
      }
    }
    for (int i = 0; i < kSearchAbreast; i++) {
      mask16 better = first + i ? greater(best_error, errors[i]) : (mask16)0xffff;
      best = select(better, scales[i], best), best_error = select(better, errors[i], best_error);
    }
  }
  return best;
}

// Scale of one group in each lane. The rule is choose_scale's in encode.cpp.
static f32x16 choose_scale(const SideFormat& format, const float* y, int channels) {
  Extreme extreme = extreme_of(load(y));
  for (int c = 1; c < channels; c++) extreme = widen(extreme, load(y + c * kLanes));
  const float half = (float)zero_code(format.bits);
  const f32x16 covering = format.signed_scale ? mul(value_of(extreme), set1(-1.0f / half))
                                              : mul(abs(value_of(extreme)), set1(1.0f / (half - 1.0f)));
  if (!format.search) return stored_scale(format, covering);
  return format.bits == 4 ? search_scale<4>(format, y, channels, covering)
                          : search_scale<8>(format, y, channels, covering);
}

// ---------------------------------------------------------------------------------------------- codes

// Rotated vectors and what turns them into codes.
struct Quantiser {
  const float* y;        // [padded_dim][16]
  const float* inverse;  // [padded_dim / 16][16]: 1 / scale of each 16 channels
  int lowest;            // unsigned code: 0, or 1 for the paper's symmetric ones
};

// Codes of channels [c, c + 4) as the four bytes of each lane.
template <int kBits>
HALFBYTE_INLINE i32x16 code_word(const Quantiser& from, int c) {
  // Each must be a byte: 4-bit codes, at most 8 too far out, get 32 more until they are limited; 8-bit ones are limited
  // before.
  constexpr int kSpare = kBits == 4 ? 32 : 0;
  constexpr float kOrigin = kRounder + kSpare + (1 << (kBits - 1));
  const f32x16 inverse = load(from.inverse + c / 16 * kLanes);
  auto code = [&](int i) {
    f32x16 code = fma(load(from.y + (c + i) * kLanes), inverse, set1(kOrigin));
    if constexpr (kBits == 8) code = min(max(code, set1(kRounder + (float)from.lowest)), set1(kRounder + 255.0f));
    return code;
  };
  i32x16 word = join_bytes(code(0), code(1), code(2), code(3));
  if constexpr (kBits == 4)
    word = add(limit_bytes(word, kSpare + from.lowest, 15 - from.lowest), set1(from.lowest * 0x01010101));
  return word;
}

// Rows of 16 tokens × 4 channels: K's layout.
template <int kBits>
static void pack_rows(const Quantiser& from, int span, i32x16* rows) {
  for (int row = 0; row < (kBits == 4 ? 4 : 8); row++) {
    rows[row] = code_word<kBits>(from, span + 4 * row);
    if constexpr (kBits == 4) rows[row] = bit_or(rows[row], shift_left<4>(code_word<kBits>(from, span + 16 + 4 * row)));
  }
}

template <int kBits>
static void pack(const EncodeArgs& args, const Quantiser& from, uint8_t* codes) {
  constexpr int kRows = kBits == 4 ? 4 : 8;  // of a span
  for (int span = 0; span < args.format->padded_dim; span += kSpan, codes += kRows * kRowBytes) {
    i32x16 rows[kRows];
    pack_rows<kBits>(from, span, rows);
    // V's rows are 16 channels × 4 tokens: the same sixteen by sixteen bytes, the other way round.
    for (int i = 0; i < kRows && args.side == Side::v; i += 4) transpose_bytes(rows + i);
    for (int i = 0; i < kRows; i++) store((int32_t*)(codes + i * kRowBytes), rows[i]);
  }
}

// Copies the codes of tokens [first, first + n) only; the block's other tokens stay.
static void copy_tokens(const EncodeArgs& args, const uint8_t* from, uint8_t* to) {
  const int bits = args.format->bits;
  for (int t = args.first_lane; t < args.first_lane + args.n; t++)
    for (int c = 0; c < args.format->padded_dim; c++) {
      CodePlace place = args.side == Side::k ? k_code_place(bits, t, c) : v_code_place(bits, t, c);
      int mask = bits == 4 ? 15 << place.shift : 255;
      to[place.byte] = (uint8_t)((to[place.byte] & ~mask) | (from[place.byte] & mask));
    }
}

static void store_scales(const EncodeArgs& args, int group, const float* lanes) {
  const SideFormat& format = *args.format;
  uint8_t* row = args.scales + group * scale_row_bytes(format);
  alignas(64) uint16_t narrow[kLanes];
  store_f16(narrow, load(lanes));
  const uint8_t* from = format.scale_bytes == 4 ? (const uint8_t*)lanes : (const uint8_t*)narrow;
  memcpy(row + args.first_lane * format.scale_bytes, from, args.n * format.scale_bytes);
}

// y [d][16] of the given vectors, rotated, scaled by λ, zero up to padded_dim; in one of the two buffers.
static float* load_rotated(const EncodeArgs& args, float* a, float* b) {
  const int d = args.format->head_dim;
  const Rows rows = {args.rows, args.n, args.dtype, d};
  Ahead ahead = ahead_of(rows);
  load_transposed(rows, args.offset, load_factors(*args.rotation), a, ahead);
  float* y = rotate_forward(*args.rotation, a, b, ahead);
  if (args.lambda)
    for (int c = 0; c < d; c++) store(y + c * kLanes, mul(load(y + c * kLanes), set1(args.lambda[c])));
  for (int c = d; c < args.format->padded_dim; c++) store(y + c * kLanes, set1(0.0f));
  return y;
}

// Part of a block: shifts the lanes to their tokens, packs aside, and takes just those.
template <int kBits>
static void pack_some(const EncodeArgs& args, Quantiser from) {
  const int padded_dim = args.format->padded_dim;
  alignas(64) float moved[kMaxHeadDim * kLanes] = {}, inverse[kMaxHeadDim / 16 * kLanes] = {};
  alignas(64) uint8_t aside[kMaxHeadDim * kLanes];
  for (int c = 0; c < padded_dim; c++)
    memcpy(moved + c * kLanes + args.first_lane, from.y + c * kLanes, args.n * sizeof(float));
  for (int g = 0; g < padded_dim / 16; g++)
    memcpy(inverse + g * kLanes + args.first_lane, from.inverse + g * kLanes, args.n * sizeof(float));
  from.y = moved, from.inverse = inverse;
  pack<kBits>(args, from, aside);
  copy_tokens(args, aside, args.codes);
}

template <int kBits>
static void pack_block(const EncodeArgs& args, const Quantiser& from) {
  if (args.n == kLanes)
    pack<kBits>(args, from, args.codes);
  else
    pack_some<kBits>(args, from);
}

static void encode(const EncodeArgs& args) {
  const SideFormat& format = *args.format;
  alignas(64) float a[kMaxHeadDim * kLanes], b[kMaxHeadDim * kLanes];
  alignas(64) float inverse[kMaxHeadDim / 16 * kLanes], scales[kLanes];
  const float* y = load_rotated(args, a, b);
  for (int g = 0; g < format.n_groups; g++) {
    int from = g * format.group, to = from + format.group < format.padded_dim ? from + format.group : format.padded_dim;
    f32x16 scale = choose_scale(format, y + from * kLanes, to - from), one_over = inverse_scale(scale);
    for (int c = from; c < to; c += 16) store(inverse + c / 16 * kLanes, one_over);
    store(scales, scale);
    store_scales(args, g, scales);
  }
  const Quantiser from = {y, inverse, format.signed_scale || format.search ? 0 : 1};
  if (format.bits == 4)
    pack_block<4>(args, from);
  else
    pack_block<8>(args, from);
}

// ---------------------------------------------------------------------------------------------- decode

HALFBYTE_INLINE f32x16 load_scales(const SideFormat& format, const uint8_t* scales, int group) {
  const uint8_t* row = scales + group * scale_row_bytes(format);
  return format.scale_bytes == 4 ? load((const float*)row) : load_f16((const uint16_t*)row);
}

static void decode(const DecodeArgs& args) {
  const SideFormat& format = *args.format;
  const int d = format.head_dim, zero = zero_code(format.bits), mask = format.bits == 4 ? 15 : 255;
  alignas(64) float y[kMaxHeadDim * kLanes], scratch[kMaxHeadDim * kLanes];
  for (int c = 0; c < d; c++) {
    alignas(64) float value[kLanes];
    for (int t = 0; t < kLanes; t++) {
      CodePlace place = args.side == Side::k ? k_code_place(format.bits, t, c) : v_code_place(format.bits, t, c);
      value[t] = (float)((args.codes[place.byte] >> place.shift & mask) - zero);
    }
    f32x16 scaled = mul(load(value), load_scales(format, args.scales, c / format.group));
    store(y + c * kLanes, args.inverse_lambda ? mul(scaled, set1(args.inverse_lambda[c])) : scaled);
  }
  float* x = rotate_back(*args.rotation, y, scratch);
  if (args.offset)
    for (int c = 0; c < d; c++) store(x + c * kLanes, add(load(x + c * kLanes), set1(args.offset[c])));
  store_transposed(x, d, args.out, d, kLanes);
}
