#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"

// Vectors of one register. Everything here is inlined into a kernel that is compiled for an instruction set
// (common/simd.h). GCC 12 keeps vectors that are wider than its registers in memory.

namespace fastnas {

template <class T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> index __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Index = typename VectorOf<T>::index;

template <class T>
FASTNAS_INLINE inline Vec<T> get(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
FASTNAS_INLINE inline void put(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The same for code that serves vectors and single numbers alike.
template <class T>
FASTNAS_INLINE inline void read(const T* p, Vec<T>& v) {
  v = get(p);
}
template <class T>
FASTNAS_INLINE inline void read(const T* p, T& v) {
  v = *p;
}
template <class T>
FASTNAS_INLINE inline void write(T* p, const Vec<T>& v) {
  put(p, v);
}
template <class T>
FASTNAS_INLINE inline void write(T* p, const T& v) {
  *p = v;
}

// a where x and y are the same bit by bit, else b; lane by lane where they are vectors. In integers, because GCC 12
// makes comparisons of vectors that decide about more than one thing with a branch a lane.
template <class V>
FASTNAS_INLINE inline V if_same(V x, V y, V a, V b) {
  if constexpr (std::is_arithmetic_v<V>) {
    return std::memcmp(&x, &y, sizeof x) == 0 ? a : b;
  } else {
    using T = std::remove_cvref_t<decltype(x[0])>;
    constexpr bool kSingle = sizeof(T) == 4;
    typedef std::conditional_t<kSingle, uint32_t, uint64_t> Bits __attribute__((vector_size(kVectorBytes)));
    const Bits apart = (Bits)x ^ (Bits)y;
    const Index<T> differs = (Index<T>)(apart | -apart) >> (kSingle ? 31 : 63);
    return (V)(((Index<T>)a & ~differs) | ((Index<T>)b & differs));
  }
}

// body(pixel, channel, value of the type to read) for every channel of every pixel, as whole vectors while they last.
template <class T, class Body>
FASTNAS_INLINE inline void for_each_value(int64_t pixels, int64_t channels, const Body& body) {
  if (channels == kLanes<T>) {
    for (int64_t p = 0; p < pixels; ++p) body(p, int64_t{0}, Vec<T>{});
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    int64_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>) body(p, c, Vec<T>{});
    for (; c < channels; ++c) body(p, c, T{});
  }
}

// The same for pixels without gaps of few channels: several pixels make a vector, then channel counts from the first
// one, and what is read by channel has to be repeated. body(first pixel, channel, value).
template <class T, class Body>
FASTNAS_INLINE inline void for_each_dense_value(int64_t pixels, int64_t channels, const Body& body) {
  const int64_t together = kLanes<T> / channels, whole = pixels / together;
  for (int64_t p = 0; p < whole; ++p) body(p * together, int64_t{0}, Vec<T>{});
  for (int64_t p = whole * together; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) body(p, c, T{});
}

}  // namespace fastnas
