// The CPU kernels for AVX-512 with VNNI.
#define HALFBYTE_TARGET_AVX512 1
#include <string.h>
#include <immintrin.h>
#include "../backend.h"

namespace halfbyte::avx512 {
namespace {

#include "simd.h"

#include "rotate.h"

#include "kernels.h"

#include "attend.h"

#include "score_offsets.h"

#include "attend_raw.h"

#include "peak.h"

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte {

extern const Backend kAvx512Backend = {
    "avx512",       avx512::supported, avx512::kRegisterRows, avx512::peak,          avx512::rotate,
    avx512::encode, avx512::decode,    avx512::score_offsets, avx512::attend_packed, avx512::attend_raw};

}  // namespace halfbyte
