// The words of simd.h for Arm's NEON with the dot product extension: four registers of four lanes.

constexpr int kRegisterRows = 2;  // 32 registers, four to a vector
constexpr int kRegisterSums = 4;
constexpr int kSearchAbreast = 1;

struct f32x16 {
  float32x4_t v[4];
};
struct i32x16 {
  int32x4_t v[4];
};
struct u8x64 {
  uint8x16_t v[4];
};

// The registers of a T, each from f(i).
template <class T, class F>
HALFBYTE_INLINE T each(F f) {
  return {f(0), f(1), f(2), f(3)};
}

HALFBYTE_INLINE f32x16 set1(float x) {
  return each<f32x16>([=](int) { return vdupq_n_f32(x); });
}
HALFBYTE_INLINE f32x16 load(const float* p) {
  return each<f32x16>([=](int i) { return vld1q_f32(p + 4 * i); });
}
HALFBYTE_INLINE void store(float* p, f32x16 x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
HALFBYTE_INLINE f32x16 load_f16(const uint16_t* p) {
  return each<f32x16>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
HALFBYTE_INLINE f32x16 load_bf16(const uint16_t* p) {
  return each<f32x16>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
HALFBYTE_INLINE void store_f16(uint16_t* p, f32x16 x) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
HALFBYTE_INLINE f32x16 round_f16(f32x16 x) {
  return each<f32x16>([=](int i) { return vcvt_f32_f16(vcvt_f16_f32(x.v[i])); });
}
HALFBYTE_INLINE f32x16 add(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 sub(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 mul(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 div(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return each<f32x16>([=](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) {
  return each<f32x16>([=](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return each<f32x16>([=](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 abs(f32x16 a) {
  return each<f32x16>([=](int i) { return vabsq_f32(a.v[i]); });
}
HALFBYTE_INLINE f32x16 round(f32x16 a) {
  return each<f32x16>([=](int i) { return vrndnq_f32(a.v[i]); });
}

// One bit of each of sixteen bytes that are all ones or all zeros.
HALFBYTE_INLINE mask16 mask_of(uint8x16_t bytes) {
  const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t bits = vandq_u8(bytes, weights);
  return (mask16)(vaddv_u8(vget_low_u8(bits)) | vaddv_u8(vget_high_u8(bits)) << 8);
}
template <class F>
HALFBYTE_INLINE mask16 compare(F f) {  // f(i): uint32x4_t of lanes 4·i …
  uint16x8_t low = vcombine_u16(vmovn_u32(f(0)), vmovn_u32(f(1))),
             high = vcombine_u16(vmovn_u32(f(2)), vmovn_u32(f(3)));
  return mask_of(vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
HALFBYTE_INLINE mask16 greater(f32x16 a, f32x16 b) {
  return compare([=](int i) { return vcgtq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE mask16 greater_equal(f32x16 a, f32x16 b) {
  return compare([=](int i) { return vcgeq_f32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) {
  const uint32x4_t weights = {1, 2, 4, 8};
  return each<f32x16>([=](int i) { return vbslq_f32(vtstq_u32(vdupq_n_u32(m >> 4 * i), weights), yes.v[i], no.v[i]); });
}
HALFBYTE_INLINE float reduce_add(f32x16 a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}
HALFBYTE_INLINE float reduce_max(f32x16 a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
HALFBYTE_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) {  // n in [−126, 127]: 2^n through the exponent bits
  return each<f32x16>([=](int i) {
    int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(bits));
  });
}
struct Extreme {
  f32x16 high, low;
};
HALFBYTE_INLINE Extreme extreme_of(f32x16 x) { return {x, x}; }
HALFBYTE_INLINE Extreme widen(Extreme e, f32x16 x) { return {max(e.high, x), min(e.low, x)}; }
HALFBYTE_INLINE f32x16 value_of(Extreme e) {
  return select(greater_equal(e.high, sub(set1(0.0f), e.low)), e.high, e.low);
}

HALFBYTE_INLINE i32x16 set1(int x) {
  return each<i32x16>([=](int) { return vdupq_n_s32(x); });
}
HALFBYTE_INLINE i32x16 add(i32x16 a, i32x16 b) {
  return each<i32x16>([=](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE i32x16 sub(i32x16 a, i32x16 b) {
  return each<i32x16>([=](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
HALFBYTE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) {
  return each<i32x16>([=](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
template <int kBits>
HALFBYTE_INLINE i32x16 shift_left(i32x16 a) {
  return each<i32x16>([=](int i) { return vshlq_n_s32(a.v[i], kBits); });
}
HALFBYTE_INLINE f32x16 to_f32(i32x16 a) {
  return each<f32x16>([=](int i) { return vcvtq_f32_s32(a.v[i]); });
}
HALFBYTE_INLINE i32x16 to_i32(f32x16 a) {
  return each<i32x16>([=](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
HALFBYTE_INLINE void store(int32_t* p, i32x16 a) {
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, a.v[i]);
}
HALFBYTE_INLINE void store_low_bytes(void* p, i32x16 a) {
  int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1])),
            high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8((int8_t*)p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
HALFBYTE_INLINE i32x16 bits_of(f32x16 a) {
  return each<i32x16>([=](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
HALFBYTE_INLINE i32x16 limit_bytes(i32x16 a, int less, int most) {
  const uint8x16_t down = vdupq_n_u8((uint8_t)less), top = vdupq_n_u8((uint8_t)most);
  return each<i32x16>(
      [=](int i) { return vreinterpretq_s32_u8(vminq_u8(vqsubq_u8(vreinterpretq_u8_s32(a.v[i]), down), top)); });
}
HALFBYTE_INLINE void transpose_bytes(i32x16 r[4]) {
  const uint8x16_t turn = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  i32x16 from[4] = {r[0], r[1], r[2], r[3]};
  for (int j = 0; j < 4; j++)  // piece j of row i becomes piece i of row j
    r[j] =
        each<i32x16>([&](int i) { return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(from[i].v[j]), turn)); });
}

HALFBYTE_INLINE u8x64 load_row(const uint8_t* p) {
  return each<u8x64>([=](int i) { return vld1q_u8(p + 16 * i); });
}
HALFBYTE_INLINE u8x64 row_of(int code) {
  return each<u8x64>([=](int) { return vdupq_n_u8((uint8_t)code); });
}
HALFBYTE_INLINE u8x64 low_nibbles(u8x64 row) {
  return each<u8x64>([=](int i) { return vandq_u8(row.v[i], vdupq_n_u8(15)); });
}
HALFBYTE_INLINE u8x64 high_nibbles(u8x64 row) {
  return each<u8x64>([=](int i) { return vshrq_n_u8(row.v[i], 4); });
}
HALFBYTE_INLINE i32x16 dot4_nibble(i32x16 acc, u8x64 codes, int four) {
  const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return each<i32x16>([=](int i) { return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(codes.v[i]), b); });
}
HALFBYTE_INLINE i32x16 dot4_byte(i32x16 acc, u8x64 codes, int four) {  // counted from 128, so that both are signed
  return dot4_nibble(acc, each<u8x64>([=](int i) { return veorq_u8(codes.v[i], vdupq_n_u8(128)); }), four);
}
HALFBYTE_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 codes, int four) {
  const uint8x16_t b = vreinterpretq_u8_s32(vdupq_n_s32(four));
  return each<i32x16>(
      [=](int i) { return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(acc.v[i]), codes.v[i], b)); });
}
HALFBYTE_INLINE u8x64 flip(u8x64 row, int four) {
  const uint8x16_t b = vreinterpretq_u8_s32(vdupq_n_s32(four));
  return each<u8x64>([=](int i) { return veorq_u8(row.v[i], b); });
}
HALFBYTE_INLINE void sum_four(const f32x16 x[4], float* sums) {
  float32x4_t s[4];
  for (int i = 0; i < 4; i++) s[i] = vaddq_f32(vaddq_f32(x[i].v[0], x[i].v[1]), vaddq_f32(x[i].v[2], x[i].v[3]));
  vst1q_f32(sums, vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3])));
}
HALFBYTE_INLINE mask16 load_mask(const uint8_t* p) {
  uint8x16_t bytes = vld1q_u8(p);
  return mask_of(vtstq_u8(bytes, bytes));
}
HALFBYTE_INLINE void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even)), c = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
  b = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd)), d = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
}
HALFBYTE_INLINE void transpose16(f32x16 r[16]) {
  HALFBYTE_UNROLL for (int i = 0; i < 16; i++) transpose4(r[i / 4 * 4].v[i % 4], r[i / 4 * 4 + 1].v[i % 4],
                                                          r[i / 4 * 4 + 2].v[i % 4], r[i / 4 * 4 + 3].v[i % 4]);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < i; j++)
      for (int row = 0; row < 4; row++) {
        float32x4_t swap = r[4 * i + row].v[j];
        r[4 * i + row].v[j] = r[4 * j + row].v[i], r[4 * j + row].v[i] = swap;
      }
}
