// The words of simd.h for AVX2: two registers of eight lanes. With AVX-VNNI (__AVXVNNI__) dot products of bytes are one
// instruction.

constexpr int kRegisterRows = 2;  // sixteen registers, two to a vector
constexpr int kRegisterSums = 4;
constexpr int kSearchAbreast = 1;

struct f32x16 {
  __m256 lo, hi;
};
struct i32x16 {
  __m256i lo, hi;
};
struct u8x64 {
  __m256i lo, hi;
};

HALFBYTE_INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HALFBYTE_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HALFBYTE_INLINE void store(float* p, f32x16 x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
HALFBYTE_INLINE f32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
HALFBYTE_INLINE __m256 widen_bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HALFBYTE_INLINE f32x16 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
HALFBYTE_INLINE void store_f16(uint16_t* p, f32x16 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
}
HALFBYTE_INLINE f32x16 round_f16(f32x16 x) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT)),
          _mm256_cvtph_ps(_mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT))};
}
HALFBYTE_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HALFBYTE_INLINE f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
HALFBYTE_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE f32x16 abs(f32x16 a) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
HALFBYTE_INLINE f32x16 round(f32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
HALFBYTE_INLINE mask16 lanes_of(__m256 lo, __m256 hi) {
  return (mask16)(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8);
}
HALFBYTE_INLINE mask16 greater(f32x16 a, f32x16 b) {
  return lanes_of(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
}
HALFBYTE_INLINE mask16 greater_equal(f32x16 a, f32x16 b) {
  return lanes_of(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
}
HALFBYTE_INLINE __m256 lanes_from(int bits) {
  __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each));
}
HALFBYTE_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, lanes_from(m)), _mm256_blendv_ps(no.hi, yes.hi, lanes_from(m >> 8))};
}
HALFBYTE_INLINE float reduce_add(f32x16 a) {
  __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
HALFBYTE_INLINE float reduce_max(f32x16 a) {
  __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
HALFBYTE_INLINE __m256 scale_by_power(__m256 x, __m256 n) {  // n in [−126, 127]: 2^n through the exponent bits
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
HALFBYTE_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) {
  return {scale_by_power(x.lo, n.lo), scale_by_power(x.hi, n.hi)};
}

struct Extreme {
  f32x16 high, low;
};
HALFBYTE_INLINE Extreme extreme_of(f32x16 x) { return {x, x}; }
HALFBYTE_INLINE Extreme widen(Extreme e, f32x16 x) { return {max(e.high, x), min(e.low, x)}; }
HALFBYTE_INLINE f32x16 value_of(Extreme e) {
  return select(greater_equal(e.high, sub(set1(0.0f), e.low)), e.high, e.low);
}

HALFBYTE_INLINE i32x16 set1(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
HALFBYTE_INLINE i32x16 add(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
HALFBYTE_INLINE i32x16 sub(i32x16 a, i32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
HALFBYTE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int kBits>
HALFBYTE_INLINE i32x16 shift_left(i32x16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
HALFBYTE_INLINE f32x16 to_f32(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
HALFBYTE_INLINE i32x16 to_i32(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
HALFBYTE_INLINE void store(int32_t* p, i32x16 a) {
  _mm256_storeu_si256((__m256i*)p, a.lo), _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
HALFBYTE_INLINE i32x16 bits_of(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
HALFBYTE_INLINE i32x16 limit_bytes(i32x16 a, int less, int most) {
  __m256i down = _mm256_set1_epi8((char)less), top = _mm256_set1_epi8((char)most);
  return {_mm256_min_epu8(_mm256_subs_epu8(a.lo, down), top), _mm256_min_epu8(_mm256_subs_epu8(a.hi, down), top)};
}
HALFBYTE_INLINE void transpose_bytes(i32x16 r[4]) {
  const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13,
                                        2, 6, 10, 14, 3, 7, 11, 15);
  __m256i lo[4], hi[4];
  for (int i = 0; i < 4; i++) lo[i] = _mm256_shuffle_epi8(r[i].lo, turn), hi[i] = _mm256_shuffle_epi8(r[i].hi, turn);
  // Now 128-bit pieces change places: piece j of row i becomes piece i of row j.
  r[0] = {_mm256_permute2x128_si256(lo[0], lo[1], 0x20), _mm256_permute2x128_si256(lo[2], lo[3], 0x20)};
  r[1] = {_mm256_permute2x128_si256(lo[0], lo[1], 0x31), _mm256_permute2x128_si256(lo[2], lo[3], 0x31)};
  r[2] = {_mm256_permute2x128_si256(hi[0], hi[1], 0x20), _mm256_permute2x128_si256(hi[2], hi[3], 0x20)};
  r[3] = {_mm256_permute2x128_si256(hi[0], hi[1], 0x31), _mm256_permute2x128_si256(hi[2], hi[3], 0x31)};
}
HALFBYTE_INLINE void store_low_bytes(void* p, i32x16 a) {
  __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1,
                                  -1, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i lo = _mm256_shuffle_epi8(a.lo, pick), hi = _mm256_shuffle_epi8(a.hi, pick);
  int words[4] = {_mm256_extract_epi32(lo, 0), _mm256_extract_epi32(lo, 4), _mm256_extract_epi32(hi, 0),
                  _mm256_extract_epi32(hi, 4)};
  _mm_storeu_si128((__m128i*)p, _mm_setr_epi32(words[0], words[1], words[2], words[3]));
}

HALFBYTE_INLINE u8x64 load_row(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
HALFBYTE_INLINE u8x64 row_of(int code) { return {_mm256_set1_epi8((char)code), _mm256_set1_epi8((char)code)}; }
HALFBYTE_INLINE u8x64 low_nibbles(u8x64 row) {
  __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(row.lo, low), _mm256_and_si256(row.hi, low)};
}
HALFBYTE_INLINE u8x64 high_nibbles(u8x64 row) {
  return low_nibbles({_mm256_srli_epi16(row.lo, 4), _mm256_srli_epi16(row.hi, 4)});
}

// acc + Σ of four unsigned × four signed bytes, in each lane: one instruction with VNNI. Without it pairs are summed in
// 16 bits first, which hold nibbles (15·127·2, 15·255·2), but not every two bytes.
HALFBYTE_INLINE __m256i dot4_half(__m256i acc, __m256i of_unsigned, __m256i of_signed) {
#if __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, of_unsigned, of_signed);
#elif __AVX512VNNI__  // the same in AVX-512's encoding, for tests where there is no AVX-VNNI
  return _mm256_dpbusd_epi32(acc, of_unsigned, of_signed);
#else
  const __m256i pairs = _mm256_maddubs_epi16(of_unsigned, of_signed);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
HALFBYTE_INLINE __m256i dot4_byte_half(__m256i acc, __m256i codes, __m256i b) {
#if __AVXVNNI__ || __AVX512VNNI__
  return dot4_half(acc, codes, b);
#else  // counted from 128: |−128|·127·2 fits
  __m256i centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  return dot4_half(acc, _mm256_abs_epi8(centred), _mm256_sign_epi8(b, centred));
#endif
}
HALFBYTE_INLINE i32x16 dot4_nibble(i32x16 acc, u8x64 codes, int four) {
  __m256i b = _mm256_set1_epi32(four);
  return {dot4_half(acc.lo, codes.lo, b), dot4_half(acc.hi, codes.hi, b)};
}
HALFBYTE_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 codes, int four) {
  __m256i b = _mm256_set1_epi32(four);
  return {dot4_half(acc.lo, b, codes.lo), dot4_half(acc.hi, b, codes.hi)};
}
HALFBYTE_INLINE i32x16 dot4_byte(i32x16 acc, u8x64 codes, int four) {
  __m256i b = _mm256_set1_epi32(four);
  return {dot4_byte_half(acc.lo, codes.lo, b), dot4_byte_half(acc.hi, codes.hi, b)};
}
HALFBYTE_INLINE void sum_four(const f32x16 x[4], float* sums) {
  __m256 a = _mm256_hadd_ps(_mm256_add_ps(x[0].lo, x[0].hi), _mm256_add_ps(x[1].lo, x[1].hi));
  __m256 b = _mm256_hadd_ps(_mm256_add_ps(x[2].lo, x[2].hi), _mm256_add_ps(x[3].lo, x[3].hi));
  __m256 c = _mm256_hadd_ps(a, b);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
}
HALFBYTE_INLINE u8x64 flip(u8x64 row, int four) {
  __m256i b = _mm256_set1_epi32(four);
  return {_mm256_xor_si256(row.lo, b), _mm256_xor_si256(row.hi, b)};
}
HALFBYTE_INLINE mask16 load_mask(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return (mask16)~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
}
HALFBYTE_INLINE void transpose8(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20), r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
HALFBYTE_INLINE void transpose16(f32x16 r[16]) {
  __m256 quarter[4][8];  // (row half, column half)
  for (int i = 0; i < 8; i++) {
    quarter[0][i] = r[i].lo, quarter[1][i] = r[i].hi, quarter[2][i] = r[i + 8].lo, quarter[3][i] = r[i + 8].hi;
  }
  for (int i = 0; i < 4; i++) transpose8(quarter[i]);
  for (int i = 0; i < 8; i++) r[i] = {quarter[0][i], quarter[2][i]}, r[i + 8] = {quarter[1][i], quarter[3][i]};
}
