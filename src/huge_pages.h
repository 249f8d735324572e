// Memory for what is read from end to end: it asks for huge pages, since a new 4 KiB page every few tokens costs a
// reader more than the bytes on it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if __linux__
#include <sys/mman.h>
#endif

namespace halfbyte {

constexpr size_t kHugePage = 2 << 20;

// Memory on cache lines, to be given back by std::free; throws std::bad_alloc. From 2 MiB on its whole huge pages are
// asked for: a wish, small pages are as right, and what is behind the last whole one takes no more than is touched.
inline void* allocate_huge(size_t bytes) {
  constexpr size_t kLine = 64;
  const size_t alignment = bytes < kHugePage ? kLine : kHugePage;
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!p) throw std::bad_alloc();
#if __linux__
  if (bytes >= kHugePage) (void)madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return p;
}

// Gives the system back what [p, p + bytes) alone has of small pages, inside memory that stays allocated.
inline void forget_memory(uint8_t* p, size_t bytes) {
#if __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = ((uintptr_t)p + kPage - 1) / kPage * kPage, end = ((uintptr_t)p + bytes) / kPage * kPage;
  if (begin < end) (void)madvise((void*)begin, end - begin, MADV_DONTNEED);
#else
  (void)p, (void)bytes;
#endif
}

template <class T>
struct HugePages {
  using value_type = T;
  HugePages() = default;
  template <class U>
  HugePages(const HugePages<U>&) {}

  T* allocate(size_t n) { return static_cast<T*>(allocate_huge(n * sizeof(T))); }
  void deallocate(T* p, size_t) { std::free(p); }
  bool operator==(const HugePages&) const { return true; }
};

}  // namespace halfbyte
