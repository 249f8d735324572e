// Compiles the shipped text as it is, as C++14.
#include <halfbyte.metal>

#include <utility>

#include "kernels.h"

namespace {

// What parameter I of N is called with: a buffer, or the thread's place.
template <class T, size_t I, size_t N>
struct Argument;
template <class T, size_t I, size_t N>
struct Argument<T*, I, N> {
  static T* get(void* const* buffers, unsigned, unsigned) { return static_cast<T*>(buffers[I]); }
};
template <class T, size_t I, size_t N>
struct Argument<T&, I, N> {
  static T& get(void* const* buffers, unsigned, unsigned) { return *static_cast<T*>(buffers[I]); }
};
template <size_t I, size_t N>
struct Argument<uint, I, N> {
  static uint get(void* const*, unsigned group, unsigned tid) { return I + 2 == N ? group : tid; }
};

template <class F>
struct Caller;
template <class... T>
struct Caller<void (*)(T...)> {
  static constexpr int kBuffers = (int)sizeof...(T) - 2;
  template <size_t... I>
  static void call(void (*f)(T...), void* const* buffers, unsigned group, unsigned tid, std::index_sequence<I...>) {
    f(Argument<T, I, sizeof...(T)>::get(buffers, group, tid)...);
  }
  static void call(void (*f)(T...), void* const* buffers, unsigned group, unsigned tid) {
    call(f, buffers, group, tid, std::index_sequence_for<T...>());
  }
};

#define KERNEL(name)                                                                                   \
  Kernel {                                                                                             \
    #name, Caller<decltype(&name)>::kBuffers, [](void* const* buffers, unsigned group, unsigned tid) { \
      Caller<decltype(&name)>::call(&name, buffers, group, tid);                                       \
    }                                                                                                  \
  }
#define KERNELS(D)                                                                                                \
  KERNEL(encode_d##D##_int4), KERNEL(encode_d##D##_int8), KERNEL(decode_d##D##_int4), KERNEL(decode_d##D##_int8), \
      KERNEL(attend_d##D), KERNEL(finish_d##D)

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> all = {KERNELS(64), KERNELS(80), KERNELS(96), KERNELS(128), KERNELS(256)};
  return all;
}
