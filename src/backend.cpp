// Which kernels run: the best that the CPU supports, unless HALFBYTE_BACKEND or set_backend says otherwise.
#include "backend.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "attend.h"
#include "decode.h"
#include "encode.h"
#include "numbers.h"
#include "threads.h"

namespace halfbyte {
namespace {

bool always() { return true; }

void rotate_rows_reference(const RotationPlan& plan, bool inverse, float* x, size_t stride, int n) {
  std::vector<double> from(plan.head_dim), to(plan.head_dim);
  for (int i = 0; i < n; i++) {
    float* row = x + i * stride;
    from.assign(row, row + plan.head_dim);
    rotate_reference(plan, inverse, from.data(), to.data());
    for (int c = 0; c < plan.head_dim; c++) row[c] = (float)to[c];
  }
}

const Backend* const kBackends[] = {
#if HALFBYTE_HAS_AVX512
    &kAvx512Backend,
#endif
#if HALFBYTE_HAS_AVX2VNNI
    &kAvx2VnniBackend,
#endif
#if HALFBYTE_HAS_AVX2
    &kAvx2Backend,
#endif
#if HALFBYTE_HAS_NEON
    &kNeonBackend,
#endif
    &kScalarBackend,   &kReferenceBackend,
};

const Backend* find(const std::string& name) {
  for (const Backend* backend : kBackends)
    if (name == backend->name && backend->supported()) return backend;
  return nullptr;
}

const Backend* choose() {
  if (const char* name = std::getenv("HALFBYTE_BACKEND"))
    if (const Backend* named = find(name)) return named;
  for (const Backend* backend : kBackends)
    if (backend->supported()) return backend;
  return &kScalarBackend;
}

std::atomic<const Backend*>& chosen() {
  static std::atomic<const Backend*> backend = choose();
  return backend;
}

}  // namespace

extern const Backend kReferenceBackend = {"reference",
                                          always,
                                          kMaxRows,
                                          nullptr,
                                          rotate_rows_reference,
                                          encode_reference,
                                          decode_reference,
                                          score_offsets_reference,
                                          attend_packed_reference,
                                          attend_raw_reference};

const Backend& current_backend() { return *chosen().load(std::memory_order_relaxed); }

const Backend* backend_at(int i) { return i >= 0 && (size_t)i < std::size(kBackends) ? kBackends[i] : nullptr; }

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> list;
  for (const Backend* backend : kBackends) list.push_back({backend->name, backend->supported()});
  return list;
}

std::string backend() { return current_backend().name; }

Status set_backend(const std::string& name) {
  if (const Backend* named = find(name)) {
    chosen() = named;
    return {};
  }
  std::string usable;
  for (const Backend* backend : kBackends)
    if (backend->supported()) usable += std::string(usable.empty() ? "" : ", ") + backend->name;
  return {Code::bad_argument, "backend is '" + name + "'; on this CPU it takes one of " + usable};
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
#define HALFBYTE_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.push_back(name)
  HALFBYTE_FEATURE("avx2");
  HALFBYTE_FEATURE("fma");
  HALFBYTE_FEATURE("avx512f");
  HALFBYTE_FEATURE("avx512bw");
  HALFBYTE_FEATURE("avx512vl");
  HALFBYTE_FEATURE("avx512dq");
  HALFBYTE_FEATURE("avx512vnni");
  HALFBYTE_FEATURE("avx512bf16");
#undef HALFBYTE_FEATURE
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) features.push_back("dotprod");
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) features.push_back("i8mm");
#endif
  return features;
}

const char* version() { return HALFBYTE_VERSION; }
const char* commit() { return HALFBYTE_COMMIT; }

}  // namespace halfbyte
