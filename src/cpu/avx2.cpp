// The CPU kernels for AVX2 with FMA and F16C.
#define HALFBYTE_TARGET_AVX2 1
#include <string.h>
#include <immintrin.h>
#include "../backend.h"

namespace halfbyte::avx2 {
namespace {

#include "simd.h"

#include "rotate.h"

#include "kernels.h"

#include "attend.h"

#include "score_offsets.h"

#include "attend_raw.h"

#include "peak.h"

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C came before both
}

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte {

extern const Backend kAvx2Backend = {
    "avx2",       avx2::supported, avx2::kRegisterRows, avx2::peak,          avx2::rotate,
    avx2::encode, avx2::decode,    avx2::score_offsets, avx2::attend_packed, avx2::attend_raw};

}  // namespace halfbyte
