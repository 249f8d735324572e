// The CPU kernels for Arm's NEON with the dot product extension (Armv8.2 and later).
#define HALFBYTE_TARGET_NEON 1
#include <string.h>
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#include "../backend.h"

namespace halfbyte::neon {
namespace {

#include "simd.h"

#include "rotate.h"

#include "kernels.h"

#include "attend.h"

#include "score_offsets.h"

#include "attend_raw.h"

#include "peak.h"

bool supported() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // Apple's 64-bit desktop CPUs all have it
#endif
}

}  // namespace
}  // namespace halfbyte::neon

namespace halfbyte {

extern const Backend kNeonBackend = {
    "neon",       neon::supported, neon::kRegisterRows, neon::peak,          neon::rotate,
    neon::encode, neon::decode,    neon::score_offsets, neon::attend_packed, neon::attend_raw};

}  // namespace halfbyte
