// An allocator for what is read from end to end: it asks for huge pages, since a new 4 KiB page every few tokens costs
// a reader more than the bytes on it.
#pragma once

#include <cstdlib>
#include <new>

#if __linux__
#include <sys/mman.h>
#endif

namespace halfbyte {

template <class T>
struct HugePages {
  using value_type = T;
  HugePages() = default;
  template <class U>
  HugePages(const HugePages<U>&) {}

  T* allocate(size_t n) {
    constexpr size_t kLine = 64, kHugePage = 2 << 20;
    const size_t alignment = n * sizeof(T) < kHugePage ? kLine : kHugePage;
    const size_t bytes = (n * sizeof(T) + alignment - 1) / alignment * alignment;
    void* p = std::aligned_alloc(alignment, bytes);
    if (!p) throw std::bad_alloc();
#if __linux__
    if (alignment == kHugePage) (void)madvise(p, bytes, MADV_HUGEPAGE);  // a wish: small pages are as right
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const HugePages&) const { return true; }
};

}  // namespace halfbyte
