// CUDA's bf16, as far as kernels use it: a value that comes from a float and becomes one.
#pragma once

#include "numbers.h"

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(halfbyte::float_to_bf16(x)) {}
  operator float() const { return halfbyte::bf16_to_float(bits); }

  unsigned short bits;
};
