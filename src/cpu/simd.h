// Sixteen 32-bit lanes on any CPU: the words that kernels.h is written in. Included inside the target's namespace; this
// file and those of its words are the only CPU files that test the target (HALFBYTE_TARGET_AVX512, _AVX2, _NEON, or
// none: plain arrays).
//
//   f32x16, i32x16   sixteen floats, sixteen ints (lane = token, or lane = channel)
//   u8x64            one row of codes
//   mask16           one bit a lane
//   reduce_add       by halves: the sum of sixteen equal numbers is exact, so a running sum may be taken out and put
//                    back
//   Extreme          of the values met so far, in each lane, that of largest magnitude; the positive one of two equals
//   limit_bytes      each byte b of the lanes → min(max(b − less, 0), most)
//   transpose_bytes  four registers as 16 × 16 bytes, [register · 4 + byte][lane], to [lane][register · 4 + byte]
//   dot4             acc + Σ of four codes × four signed bytes, in each lane. Codes are unsigned; a target may count
//                    8-bit ones from any origin, so the zero point's share is taken off as dot4 of row_of(zero code)
//   dot4_weights     the same with nibbles and four unsigned bytes
//   sum_four         the sums over the lanes of four registers
//   flip             a row with some bits of the bytes of each lane turned over
//   take             load, for a value that several instructions read
//   sub_too          sub, where adds are many: on a unit that multiplies if the CPU adds on others
//   nearest_code     the integer next to value · inverse, kept within those of kBits; for 4, the product is in ±15
//   join_bytes       from registers of kRounder + (0 … 255), the bytes of each lane

using mask16 = uint16_t;

// Adding it to |x| < 2^22 rounds x to even and leaves it as an integer in the low bits.
constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23

// For loops over a fixed array of registers: left to itself the compiler may keep the array in memory.
#define HALFBYTE_UNROLL _Pragma("GCC unroll 16")

#if HALFBYTE_TARGET_AVX512

constexpr int kRegisterRows = 6;   // query rows whose accumulators fit the 32 registers
constexpr int kRegisterSums = 8;   // sums that keep its multipliers busy; divides kDenseTile
constexpr int kSearchAbreast = 6;  // scales tried at once; divides kSearchSize

using f32x16 = __m512;
using i32x16 = __m512i;
using u8x64 = __m512i;

HALFBYTE_INLINE f32x16 set1(float x) { return _mm512_set1_ps(x); }
HALFBYTE_INLINE f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
HALFBYTE_INLINE f32x16 take(const float* p) {
  f32x16 x = load(p);
  asm("" : "+v"(x));  // or g++ loads it anew as the operand of each instruction that reads it
  return x;
}
HALFBYTE_INLINE void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x); }
HALFBYTE_INLINE f32x16 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HALFBYTE_INLINE f32x16 load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
HALFBYTE_INLINE void store_f16(uint16_t* p, f32x16 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
HALFBYTE_INLINE f32x16 round_f16(f32x16 x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
HALFBYTE_INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
HALFBYTE_INLINE f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
HALFBYTE_INLINE f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
HALFBYTE_INLINE f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
HALFBYTE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
HALFBYTE_INLINE f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fnmadd_ps(a, b, c); }
HALFBYTE_INLINE f32x16 sub_too(f32x16 a, f32x16 b) { return fnma(b, set1(1.0f), a); }
HALFBYTE_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
HALFBYTE_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
HALFBYTE_INLINE f32x16 abs(f32x16 a) { return _mm512_abs_ps(a); }
HALFBYTE_INLINE f32x16 round(f32x16 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HALFBYTE_INLINE mask16 greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
HALFBYTE_INLINE mask16 greater_equal(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
HALFBYTE_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) { return _mm512_mask_blend_ps(m, no, yes); }
HALFBYTE_INLINE float reduce_add(f32x16 a) { return _mm512_reduce_add_ps(a); }
HALFBYTE_INLINE float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a); }
HALFBYTE_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) { return _mm512_scalef_ps(x, n); }

using Extreme = f32x16;
HALFBYTE_INLINE Extreme extreme_of(f32x16 x) { return x; }
HALFBYTE_INLINE Extreme widen(Extreme e, f32x16 x) {
  return _mm512_range_ps(e, x, 7);
}  // larger magnitude, its own sign
HALFBYTE_INLINE f32x16 value_of(Extreme e) { return e; }

HALFBYTE_INLINE i32x16 set1(int x) { return _mm512_set1_epi32(x); }
HALFBYTE_INLINE i32x16 add(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
HALFBYTE_INLINE i32x16 sub(i32x16 a, i32x16 b) { return _mm512_sub_epi32(a, b); }
HALFBYTE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return _mm512_or_si512(a, b); }
template <int kBits>
HALFBYTE_INLINE i32x16 shift_left(i32x16 a) {
  return _mm512_slli_epi32(a, kBits);
}
HALFBYTE_INLINE f32x16 to_f32(i32x16 a) { return _mm512_cvtepi32_ps(a); }
HALFBYTE_INLINE i32x16 to_i32(f32x16 a) { return _mm512_cvtps_epi32(a); }
HALFBYTE_INLINE void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a); }
HALFBYTE_INLINE void store_low_bytes(void* p, i32x16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
HALFBYTE_INLINE i32x16 bits_of(f32x16 a) { return _mm512_castps_si512(a); }
HALFBYTE_INLINE i32x16 limit_bytes(i32x16 a, int less, int most) {
  return _mm512_min_epu8(_mm512_subs_epu8(a, _mm512_set1_epi8((char)less)), _mm512_set1_epi8((char)most));
}
template <int kBits>
HALFBYTE_INLINE f32x16 nearest_code(f32x16 value, f32x16 inverse) {
  const f32x16 rounded = fma(value, inverse, set1(kRounder));
  if constexpr (kBits == 4) {  // 0 … 15, then −16 … −1, by the integer's last five bits
    const f32x16 up = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7);
    const f32x16 down = _mm512_setr_ps(-8, -8, -8, -8, -8, -8, -8, -8, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutex2var_ps(up, bits_of(rounded), down);
  }
  constexpr float kHalf = 1 << (kBits - 1);
  return sub(min(max(rounded, set1(kRounder - kHalf)), set1(kRounder + kHalf - 1.0f)), set1(kRounder));
}
HALFBYTE_INLINE i32x16 join_bytes(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  i32x16 word = _mm512_mask_shuffle_epi8(bits_of(a), 0x2222222222222222, bits_of(b), low);
  word = _mm512_mask_shuffle_epi8(word, 0x4444444444444444, bits_of(c), low);
  return _mm512_mask_shuffle_epi8(word, 0x8888888888888888, bits_of(d), low);
}
HALFBYTE_INLINE void transpose_bytes(i32x16 r[4]) {
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i a = _mm512_shuffle_epi8(r[0], turn), b = _mm512_shuffle_epi8(r[1], turn);
  __m512i c = _mm512_shuffle_epi8(r[2], turn), d = _mm512_shuffle_epi8(r[3], turn);
  // Now 128-bit pieces change places: piece j of row i becomes piece i of row j.
  __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
  __m512i ab_high = _mm512_shuffle_i32x4(a, b, 0xee), cd_high = _mm512_shuffle_i32x4(c, d, 0xee);
  r[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), r[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
  r[2] = _mm512_shuffle_i32x4(ab_high, cd_high, 0x88), r[3] = _mm512_shuffle_i32x4(ab_high, cd_high, 0xdd);
}

HALFBYTE_INLINE u8x64 load_row(const uint8_t* p) { return _mm512_loadu_si512(p); }
HALFBYTE_INLINE u8x64 row_of(int code) { return _mm512_set1_epi8((char)code); }
HALFBYTE_INLINE u8x64 low_nibbles(u8x64 row) { return _mm512_and_si512(row, _mm512_set1_epi8(15)); }
HALFBYTE_INLINE u8x64 high_nibbles(u8x64 row) { return low_nibbles(_mm512_srli_epi16(row, 4)); }
HALFBYTE_INLINE i32x16 dot4_nibble(i32x16 acc, u8x64 codes, int four) {
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(four));
}
HALFBYTE_INLINE i32x16 dot4_byte(i32x16 acc, u8x64 codes, int four) { return dot4_nibble(acc, codes, four); }
HALFBYTE_INLINE void sum_four(const f32x16 x[4], float* sums) {
  f32x16 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  f32x16 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  f32x16 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));  // a quad in each 128 bits
  __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}
HALFBYTE_INLINE i32x16 dot4_weights(i32x16 acc, u8x64 codes, int four) {
  return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four), codes);
}
HALFBYTE_INLINE u8x64 flip(u8x64 row, int four) { return _mm512_xor_si512(row, _mm512_set1_epi32(four)); }
HALFBYTE_INLINE mask16 load_mask(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return _mm_test_epi8_mask(bytes, bytes);
}
HALFBYTE_INLINE void transpose16(f32x16 r[16]) {
  f32x16 t[16];
  for (int i = 0; i < 16; i += 4) {  // 4×4 blocks inside each 128-bit lane
    f32x16 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    f32x16 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) {  // then the lanes themselves
    f32x16 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    f32x16 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88), r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88), r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif HALFBYTE_TARGET_AVX2

#include "simd_avx2.h"

#elif HALFBYTE_TARGET_NEON

#include "simd_neon.h"

#else  // plain C++: the compiler's own vectors, correct on any CPU

constexpr int kRegisterRows = 1;
constexpr int kRegisterSums = 2;
constexpr int kSearchAbreast = 1;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

HALFBYTE_INLINE f32x16 set1(float x) { return x - f32x16{}; }
HALFBYTE_INLINE f32x16 load(const float* p) {
  f32x16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
HALFBYTE_INLINE void store(float* p, f32x16 x) { memcpy(p, &x, sizeof x); }
static f32x16 load_f16(const uint16_t* p) {
  f32x16 x;
  for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
  return x;
}
static f32x16 load_bf16(const uint16_t* p) {
  f32x16 x;
  for (int i = 0; i < 16; i++) x[i] = bf16_to_float(p[i]);
  return x;
}
static void store_f16(uint16_t* p, f32x16 x) {
  for (int i = 0; i < 16; i++) p[i] = float_to_half(x[i]);
}
static f32x16 round_f16(f32x16 x) {
  uint16_t bits[16];
  store_f16(bits, x);
  return load_f16(bits);
}
HALFBYTE_INLINE f32x16 add(f32x16 a, f32x16 b) { return a + b; }
HALFBYTE_INLINE f32x16 sub(f32x16 a, f32x16 b) { return a - b; }
HALFBYTE_INLINE f32x16 mul(f32x16 a, f32x16 b) { return a * b; }
HALFBYTE_INLINE f32x16 div(f32x16 a, f32x16 b) { return a / b; }
HALFBYTE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }
HALFBYTE_INLINE f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return c - a * b; }
HALFBYTE_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
HALFBYTE_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
HALFBYTE_INLINE f32x16 abs(f32x16 a) { return (f32x16)((i32x16)a & 0x7fffffff); }
HALFBYTE_INLINE f32x16 round(f32x16 a) {  // to even, for |a| < 2^22: adding 1.5 · 2^23 pushes the fraction out
  f32x16 shift = set1(12582912.0f);
  return (a + shift) - shift;
}
static mask16 lanes_of(i32x16 yes) {
  int m = 0;
  for (int i = 0; i < 16; i++) m |= (yes[i] & 1) << i;
  return (mask16)m;
}
HALFBYTE_INLINE mask16 greater(f32x16 a, f32x16 b) { return lanes_of(a > b); }
HALFBYTE_INLINE mask16 greater_equal(f32x16 a, f32x16 b) { return lanes_of(a >= b); }
HALFBYTE_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) {
  i32x16 each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return ((each & (int)m) != 0) ? yes : no;
}
static float reduce_add(f32x16 a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a[i] += a[i + n];
  return a[0];
}
static float reduce_max(f32x16 a) {
  float s = a[0];
  for (int i = 1; i < 16; i++) s = a[i] > s ? a[i] : s;
  return s;
}
struct Extreme {
  f32x16 high, low;
};
HALFBYTE_INLINE Extreme extreme_of(f32x16 x) { return {x, x}; }
HALFBYTE_INLINE Extreme widen(Extreme e, f32x16 x) { return {max(e.high, x), min(e.low, x)}; }
HALFBYTE_INLINE f32x16 value_of(Extreme e) {
  return select(greater_equal(e.high, sub(set1(0.0f), e.low)), e.high, e.low);
}
HALFBYTE_INLINE i32x16 set1(int x) { return x - i32x16{}; }
HALFBYTE_INLINE i32x16 add(i32x16 a, i32x16 b) { return (i32x16)((u32x16)a + (u32x16)b); }
HALFBYTE_INLINE i32x16 sub(i32x16 a, i32x16 b) { return (i32x16)((u32x16)a - (u32x16)b); }
HALFBYTE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return a | b; }
template <int kBits>
HALFBYTE_INLINE i32x16 shift_left(i32x16 a) {
  return (i32x16)((u32x16)a << kBits);
}
HALFBYTE_INLINE f32x16 to_f32(i32x16 a) { return __builtin_convertvector(a, f32x16); }
HALFBYTE_INLINE i32x16 to_i32(f32x16 a) { return __builtin_convertvector(round(a), i32x16); }
HALFBYTE_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) { return x * (f32x16)((to_i32(n) + 127) << 23); }
HALFBYTE_INLINE void store(int32_t* p, i32x16 a) { memcpy(p, &a, sizeof a); }
HALFBYTE_INLINE i32x16 bits_of(f32x16 a) { return (i32x16)a; }
static i32x16 limit_bytes(i32x16 a, int less, int most) {
  u8x64 down = (uint8_t)less - u8x64{}, top = (uint8_t)most - u8x64{}, bytes = (u8x64)a;
  bytes = bytes > down ? bytes - down : u8x64{};
  return (i32x16)(bytes < top ? bytes : top);
}
static void transpose_bytes(i32x16 r[4]) {
  uint8_t from[4][16][4], to[4][16][4];
  memcpy(from, r, sizeof from);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[i / 4][j][i % 4] = from[j / 4][i][j % 4];
  memcpy(r, to, sizeof to);
}
static void store_low_bytes(void* p, i32x16 a) {
  for (int i = 0; i < 16; i++) static_cast<uint8_t*>(p)[i] = (uint8_t)a[i];
}

HALFBYTE_INLINE u8x64 load_row(const uint8_t* p) {
  u8x64 row;
  memcpy(&row, p, sizeof row);
  return row;
}
HALFBYTE_INLINE u8x64 row_of(int code) { return (uint8_t)code - u8x64{}; }
HALFBYTE_INLINE u8x64 low_nibbles(u8x64 row) { return row & 15; }
HALFBYTE_INLINE u8x64 high_nibbles(u8x64 row) { return row >> 4; }
static i32x16 dot4_nibble(i32x16 acc, u8x64 codes, int four) {
  i32x16 words = (i32x16)codes;
  return acc + (words & 255) * (int)(int8_t)four + (words >> 8 & 255) * (int)(int8_t)(four >> 8) +
         (words >> 16 & 255) * (int)(int8_t)(four >> 16) + (words >> 24 & 255) * (four >> 24);
}
HALFBYTE_INLINE i32x16 dot4_byte(i32x16 acc, u8x64 codes, int four) { return dot4_nibble(acc, codes, four); }
static void sum_four(const f32x16 x[4], float* sums) {
  for (int i = 0; i < 4; i++) sums[i] = reduce_add(x[i]);
}
static i32x16 dot4_weights(i32x16 acc, u8x64 codes, int four) {
  i32x16 words = (i32x16)codes;
  return acc + (words & 255) * (four & 255) + (words >> 8 & 255) * (four >> 8 & 255) +
         (words >> 16 & 255) * (four >> 16 & 255) + (words >> 24 & 255) * (four >> 24 & 255);
}
HALFBYTE_INLINE u8x64 flip(u8x64 row, int four) { return (u8x64)((i32x16)row ^ four); }
static mask16 load_mask(const uint8_t* p) {
  int m = 0;
  for (int i = 0; i < 16; i++) m |= (p[i] != 0) << i;
  return (mask16)m;
}
static void transpose16(f32x16 r[16]) {
  float from[16][16], to[16][16];
  memcpy(from, r, sizeof from);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[i][j] = from[j][i];
  memcpy(r, to, sizeof to);
}

#endif

#if !HALFBYTE_TARGET_AVX512
HALFBYTE_INLINE f32x16 take(const float* p) { return load(p); }
HALFBYTE_INLINE f32x16 sub_too(f32x16 a, f32x16 b) { return sub(a, b); }
template <int kBits>
HALFBYTE_INLINE f32x16 nearest_code(f32x16 value, f32x16 inverse) {
  constexpr float kHalf = 1 << (kBits - 1);
  const f32x16 code = max(fma(value, inverse, set1(kRounder)), set1(kRounder - kHalf));
  return sub(min(code, set1(kRounder + kHalf - 1.0f)), set1(kRounder));
}
HALFBYTE_INLINE i32x16 join_bytes(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {  // they add up without carries
  constexpr uint32_t kRounderBits = 0x4b400000u * 0x01010101u;               // kRounder's share in the sum
  i32x16 low = add(bits_of(a), shift_left<8>(bits_of(b)));
  i32x16 high = add(shift_left<16>(bits_of(c)), shift_left<24>(bits_of(d)));
  return sub(add(low, high), set1((int)kRounderBits));
}
#endif

// e^x for x <= 0, relative error under 4e-6 + 1.2e-7·|x| (the polynomial's, and x's own rounding); below −87 it is
// e^−87, which no float sum notices.
HALFBYTE_INLINE f32x16 exp_negative(f32x16 x) {
  f32x16 t = mul(max(x, set1(-87.0f)), set1(1.44269504f)), n = round(t), f = sub(t, n);
  f32x16 p = set1(1.33335581e-3f);  // Taylor coefficients of 2^f, |f| <= 1/2
  p = fma(p, f, set1(9.61812911e-3f));
  p = fma(p, f, set1(5.55041087e-2f));
  p = fma(p, f, set1(2.40226507e-1f));
  p = fma(p, f, set1(6.93147181e-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// tanh by exp: odd, saturating.
HALFBYTE_INLINE f32x16 tanh(f32x16 x) {
  f32x16 e = exp_negative(mul(abs(x), set1(-2.0f)));
  f32x16 t = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  return select(greater(set1(0.0f), x), sub(set1(0.0f), t), t);
}
