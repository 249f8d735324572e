// What fast_rotation_test.cpp calls of fast_rotation.cu.
#pragma once

namespace halfbyte {

// Vectors that one call takes.
int fast_rotation_vectors(int d);

// R x to `there` and Rᵀ of that to `back`, all [vectors][d] on the device. roots: null for SRHT. d: 64, 80, 96, 128,
// 256. Returns a CUDA error number.
int launch_fast_rotation(int d, const float* factors, const float* roots, const float* x, float* there, float* back);

}  // namespace halfbyte
