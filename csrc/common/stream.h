#pragma once

#ifdef __linux__
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/vector.h"

// Stores that go past the caches. An ordinary one first reads the line that it is about to overwrite, a third of the
// traffic of a copy; where results are too large to be found in a cache again, that is for nothing.

namespace fastnas {

// Whether results of so many bytes are too large for the cache that the cores share: they would fill half of it. What
// is above 64 MB is shared with others, as a rule.
inline bool past_caches(int64_t bytes) {
  static constexpr int64_t kUsual = 32 << 20, kMost = 64 << 20;
  static const int64_t half = [] {
    int64_t shared = 0;
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
    shared = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::min(shared > 0 ? shared : kUsual, kMost) / 2;
  }();
  return bytes >= half;
}

// Element types that are stored as they are summed.
template <class T>
constexpr bool kStreams = std::is_same_v<T, acc_t<T>>;

// What has been streamed is seen by other threads once this was called.
inline void end_of_stream() {
#ifdef __x86_64__
  asm volatile("sfence" ::: "memory");
#endif
}

// Whether a line begins at p.
template <class T>
FASTNAS_INLINE inline bool is_line(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// A vector at p, which is aligned to it.
template <class T>
FASTNAS_INLINE inline void stream(T* p, Vec<T> v) {
#ifdef __x86_64__
  if constexpr (kIsa != Isa::kBaseline) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vec<T>*>(p)) : "v"(v));
    return;
  }
#endif
  put(p, v);
}

// out[i] = value(i, v) for i < n, v being of the type to give: lines of out past the caches, the rest as usual.
template <class T, class Value>
FASTNAS_INLINE inline void stream_each(T* out, int64_t n, const Value& value) {
  int64_t i = 0;
  for (; i < n && !is_line(out + i); ++i) out[i] = value(i, T{});
  for (; i + kLanes<T> <= n; i += kLanes<T>) stream(out + i, value(i, Vec<T>{}));
  for (; i < n; ++i) out[i] = value(i, T{});
}

template <class T>
FASTNAS_INLINE inline void stream_copy(T* out, const T* in, int64_t n) {
  stream_each(out, n, [&](int64_t i, auto v) FASTNAS_INLINE {
    read(in + i, v);
    return v;
  });
}

// The same, or as usual where a result is not so large.
template <class T>
FASTNAS_INLINE inline void copy_out(T* out, const T* in, int64_t n, bool large) {
  if constexpr (kStreams<T>) {
    if (large) return stream_copy(out, in, n);
  }
  std::memcpy(out, in, n * sizeof(T));
}

}  // namespace fastnas
