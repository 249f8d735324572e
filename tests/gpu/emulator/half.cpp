// The product's own conversions, which tests/cpp checks against all 65536 values.
#include "half.h"

#include "numbers.h"

half::half(float x) : bits(halfbyte::float_to_half(x)) {}
half::operator float() const { return halfbyte::half_to_float(bits); }
