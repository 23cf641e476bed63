#pragma once

#include <cstdint>
#include <type_traits>

#include "common/max_pool.h"
#include "ops/partial_shuffle_plan.h"

// Channels last: one pixel at a time, its channels shuffled, back in place, copied or pooled.

namespace fastnas::shuffle {

// Calls body(groups), usual numbers as constants, for which its loops are vectorised.
template <class Body>
FASTNAS_INLINE inline void with_groups(int64_t groups, const Body& body) {
  switch (groups) {
    case 2:
      return body(std::integral_constant<int64_t, 2>{});
    case 4:
      return body(std::integral_constant<int64_t, 4>{});
    case 8:
      return body(std::integral_constant<int64_t, 8>{});
    default:
      return body(groups);
  }
}

// The channels of a shuffled pixel: `first` holds those of group 0, `rest` those of the other groups.
template <class T, class Groups>
FASTNAS_INLINE inline void shuffle_pixel(T* out, const T* first, const T* rest, int64_t channels, Groups groups) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    out[c * groups] = first[c];
    for (int64_t k = 1; k < groups; ++k) out[c * groups + k] = rest[(k - 1) * channels + c];
  });
}

template <class T, class Groups>
FASTNAS_INLINE inline void unshuffle_pixel(T* first, T* rest, const T* in, int64_t channels, Groups groups) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    first[c] = in[c * groups];
    for (int64_t k = 1; k < groups; ++k) rest[(k - 1) * channels + c] = in[c * groups + k];
  });
}

template <class T>
FASTNAS_INLINE inline void copy_pixel(T* out, const T* in, int64_t channels) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE { out[c] = in[c]; });
}

// The four pixels that pixel (h, i) of the result pools; `outside` for those beyond the edge.
template <class T>
struct Window {
  T* pixel[4];

  FASTNAS_INLINE Window(const Map<T>& x, const Sizes& s, int64_t b, int64_t h, int64_t i, T* outside) {
    const bool right = 2 * i + 1 < s.bypass_width, below = 2 * h + 1 < s.bypass_height;
    T* first = x.at(b, 0, 2 * h, 2 * i);
    pixel[0] = first;
    pixel[1] = right ? first + x.w : outside;
    pixel[2] = below ? first + x.h : outside;
    pixel[3] = right && below ? first + x.h + x.w : outside;
  }
};

}  // namespace fastnas::shuffle
