// Metal's half, as far as kernels use it: a value that comes from a float and becomes one.
#pragma once

struct half {
  half() = default;
  explicit half(float x);  // to nearest, ties to even
  explicit operator float() const;

  unsigned short bits;
};
