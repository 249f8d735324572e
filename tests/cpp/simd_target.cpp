// simd.h compiled for one instruction set, for simd_test.cpp; HALFBYTE_SIMD names it and becomes its namespace.
#include <string.h>
#if __has_include(<immintrin.h>)
#include <immintrin.h>
#elif __has_include(<arm_neon.h>)
#include <arm_neon.h>
#endif
#include "format.h"
#include "numbers.h"
#include "simd_ops.h"

#define HALFBYTE_TEXT_OF(name) #name
#define HALFBYTE_TEXT(name) HALFBYTE_TEXT_OF(name)

namespace halfbyte::HALFBYTE_SIMD {
namespace {

#include "cpu/simd.h"

i32x16 load_ints(const int32_t* x) {
  i32x16 ints;
  memcpy(&ints, x, sizeof ints);
  return ints;
}

const testing::SimdOps kOps = {
    HALFBYTE_TEXT(HALFBYTE_SIMD),
    [](const float* x, float* out) { store(out, round(load(x))); },
    [](const float* x, float* out) { store(out, round_f16(load(x))); },
    [](const float* x, float* out) { store(out, exp_negative(load(x))); },
    [](const float* x, float* out) { store(out, tanh(load(x))); },
    [](const uint16_t* x, float* out) { store(out, load_f16(x)); },
    [](const uint16_t* x, float* out) { store(out, load_bf16(x)); },
    [](const float* x, uint16_t* out) { store_f16(out, load(x)); },
    [](const float* a, const float* b, const float* c, float* with_plus, float* with_minus) {
      store(with_plus, fma(load(a), load(b), load(c))), store(with_minus, fnma(load(a), load(b), load(c)));
    },
    [](const float* a, const float* b, float* larger, float* smaller, float* magnitude) {
      store(larger, max(load(a), load(b))), store(smaller, min(load(a), load(b))), store(magnitude, abs(load(a)));
    },
    [](const float* a, const float* b) -> uint16_t { return greater(load(a), load(b)); },
    [](const float* a, const float* b) -> uint16_t { return greater_equal(load(a), load(b)); },
    [](uint16_t mask, const float* yes, const float* no, float* out) { store(out, select(mask, load(yes), load(no))); },
    [](const float* x) { return reduce_add(load(x)); },
    [](const float* x, float* out) {
      f32x16 rows[4];
      for (int i = 0; i < 4; i++) rows[i] = load(x + 16 * i);
      sum_four(rows, out);
    },
    [](const float* x) { return reduce_max(load(x)); },
    [](float* x) {
      f32x16 rows[16];
      for (int i = 0; i < 16; i++) rows[i] = load(x + 16 * i);
      transpose16(rows);
      for (int i = 0; i < 16; i++) store(x + 16 * i, rows[i]);
    },
    [](const float* x, uint8_t* out) { store_low_bytes(out, to_i32(load(x))); },
    [](const float* x, int n, float* out) {
      Extreme e = extreme_of(load(x));
      for (int i = 1; i < n; i++) e = widen(e, load(x + 16 * i));
      store(out, value_of(e));
    },
    [](const int32_t* x, int less, int most, int32_t* out) { store(out, limit_bytes(load_ints(x), less, most)); },
    [](int32_t* rows) {
      i32x16 r[4];
      for (int i = 0; i < 4; i++) r[i] = load_ints(rows + 16 * i);
      transpose_bytes(r);
      for (int i = 0; i < 4; i++) store(rows + 16 * i, r[i]);
    },
    [](const float* x, const float* inverse, float* four_bits, float* eight_bits) {
      store(four_bits, nearest_code<4>(load(x), load(inverse)));
      store(eight_bits, nearest_code<8>(load(x), load(inverse)));
    },
    [](const float* x, int32_t* out) {
      f32x16 r[4];
      for (int i = 0; i < 4; i++) r[i] = add(take(x + 16 * i), set1(kRounder));
      store(out, join_bytes(r[0], r[1], r[2], r[3]));
    },
    [](const int32_t* a, const int32_t* b, int32_t* sum, int32_t* gap, int32_t* shifted) {
      store(sum, add(load_ints(a), load_ints(b))), store(gap, sub(load_ints(a), load_ints(b)));
      store(shifted, bit_or(shift_left<8>(load_ints(a)), load_ints(b)));
    },
    [](const uint8_t* x) -> uint16_t { return load_mask(x); },
    [](const uint8_t* row, int four, int32_t* low, int32_t* high) {
      store(low, dot4_nibble(set1(0), low_nibbles(load_row(row)), four));
      store(high, dot4_nibble(set1(0), high_nibbles(load_row(row)), four));
    },
    [](const uint8_t* row, int flipped, int four, int32_t* low) {
      store(low, dot4_weights(set1(0), low_nibbles(flip(load_row(row), flipped)), four));
    },
    [](const uint8_t* row, int four, int32_t* out, int32_t* zero) {
      store(out, dot4_byte(set1(0), load_row(row), four)), store(zero, dot4_byte(set1(0), row_of(128), four));
    },
};

const bool added = testing::add_simd(&kOps);

}  // namespace
}  // namespace halfbyte::HALFBYTE_SIMD
