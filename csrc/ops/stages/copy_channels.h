#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simd.h"

namespace fastnas {

// The first `count` channels of `width` pixels, from one place to another.
template <class T>
FASTNAS_INLINE inline void copy_channels(T* out, int64_t out_pixel, const T* in, int64_t in_pixel, int64_t count,
                                         int64_t width) {
  const auto copy = [&](auto known) FASTNAS_INLINE {
    for (int64_t x = 0; x < width; ++x) std::memcpy(out + x * out_pixel, in + x * in_pixel, known * sizeof(T));
  };
  if (count == 4) return copy(std::integral_constant<int64_t, 4>{});
  if (count == 8) return copy(std::integral_constant<int64_t, 8>{});
  if (count == 16) return copy(std::integral_constant<int64_t, 16>{});
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < count; ++c) out[x * out_pixel + c] = in[x * in_pixel + c];
}

}  // namespace fastnas
