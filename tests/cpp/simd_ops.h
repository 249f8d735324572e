// The words of src/cpu/simd.h as functions over arrays, so that tests can call those of any instruction set.
#pragma once

#include <stdint.h>

namespace halfbyte::testing {

struct SimdOps {
  const char* name;                           // of the backend that is built from them
  void (*round)(const float* x, float* out);  // all arrays of floats: [16]
  void (*round_f16)(const float* x, float* out);
  void (*exp_negative)(const float* x, float* out);
  void (*tanh)(const float* x, float* out);
  void (*load_f16)(const uint16_t* x, float* out);
  void (*load_bf16)(const uint16_t* x, float* out);
  void (*store_f16)(const float* x, uint16_t* out);
  void (*fused)(const float* a, const float* b, const float* c, float* fma, float* fnma);
  void (*bounds)(const float* a, const float* b, float* max, float* min, float* abs);
  uint16_t (*greater)(const float* a, const float* b);
  uint16_t (*greater_equal)(const float* a, const float* b);
  void (*select)(uint16_t mask, const float* yes, const float* no, float* out);
  float (*reduce_add)(const float* x);
  void (*sum_four)(const float* x, float* sums);  // x [4][16]
  float (*reduce_max)(const float* x);
  void (*transpose16)(float* x);                          // [16][16]
  void (*store_low_bytes)(const float* x, uint8_t* out);  // of x rounded to ints
  void (*extreme)(const float* x, int n, float* out);     // x [n][16]
  void (*limit_bytes)(const int32_t* x, int less, int most, int32_t* out);
  void (*transpose_bytes)(int32_t* rows);  // [4][16]
  void (*nearest_codes)(const float* x, const float* inverse, float* four_bits, float* eight_bits);
  void (*join_bytes)(const float* x, int32_t* out);  // x [4][16] from 0 to 255
  void (*sums)(const int32_t* a, const int32_t* b, int32_t* sum, int32_t* gap, int32_t* shifted);
  uint16_t (*load_mask)(const uint8_t* x);
  void (*nibbles)(const uint8_t* row, int four, int32_t* low, int32_t* high);  // row [64]: dot products of both halves
  void (*weights)(const uint8_t* row, int flipped, int four, int32_t* low);    // of row's low nibbles, flipped before
  void (*bytes)(const uint8_t* row, int four, int32_t* out, int32_t* zero);    // of row and of a row of zero codes
};

// Makes one instruction set known to the tests; each calls it as the program starts.
bool add_simd(const SimdOps* ops);

}  // namespace halfbyte::testing
