// The CPU kernels for AVX2 with AVX-VNNI: processors without AVX-512 that multiply bytes in one instruction.
#define HALFBYTE_TARGET_AVX2 1
#include <cpuid.h>
#include <string.h>
#include <immintrin.h>
#include "../backend.h"

namespace halfbyte::avx2vnni {
namespace {

#include "simd.h"

#include "rotate.h"

#include "kernels.h"

#include "attend.h"

#include "score_offsets.h"

#include "attend_raw.h"

#include "peak.h"

bool supported() {
#if __AVXVNNI__
  unsigned eax = 0, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax >> 4 & 1)) return false;
#else  // HALFBYTE_EVEX_VNNI
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) return false;
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace
}  // namespace halfbyte::avx2vnni

namespace halfbyte {

extern const Backend kAvx2VnniBackend = {
    "avx2vnni",       avx2vnni::supported, avx2vnni::kRegisterRows, avx2vnni::peak,          avx2vnni::rotate,
    avx2vnni::encode, avx2vnni::decode,    avx2vnni::score_offsets, avx2vnni::attend_packed, avx2vnni::attend_raw};

}  // namespace halfbyte
