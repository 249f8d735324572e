// The CPU kernels for plain C++, for any CPU.
#include <string.h>
#include "../backend.h"
#include "../numbers.h"

namespace halfbyte::scalar {
namespace {

#include "simd.h"

#include "rotate.h"

#include "kernels.h"

#include "attend.h"

#include "score_offsets.h"

#include "attend_raw.h"

#include "peak.h"

bool supported() { return true; }

}  // namespace
}  // namespace halfbyte::scalar

namespace halfbyte {

extern const Backend kScalarBackend = {
    "scalar",       scalar::supported, scalar::kRegisterRows, scalar::peak,          scalar::rotate,
    scalar::encode, scalar::decode,    scalar::score_offsets, scalar::attend_packed, scalar::attend_raw};

}  // namespace halfbyte
