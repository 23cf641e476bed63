#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/vector.h"
#include "ops/stages/copy_channels.h"
#include "ops/stages/map.h"

// The inner loops of partial_join, on rows of pixels.

namespace fastnas {

// The highest of the 2x2 window of each pixel of row y at stride 2, rounding up, the first one where several are equal.
// body(pixel, channel, highest, which one as a number: 0 and 1 above, 2 and 3 below).
template <class T, class Body>
FASTNAS_INLINE inline void for_each_window(const Map& m, const T* image, int64_t y, const Body& body) {
  const int64_t row = m.width * m.pixel;
  const T* above = image + 2 * y * row;
  const bool down = 2 * y + 1 < m.height;
  for_each_value<T>(ceil_div(m.width, 2), m.channels, [&](int64_t x, int64_t c, auto v) FASTNAS_INLINE {
    const T* p = above + 2 * x * m.pixel + c;
    const bool right = 2 * x + 1 < m.width;
    auto highest = v, which = v - v;
    read(p, highest);
    const auto offer = [&](int64_t at, int number) FASTNAS_INLINE {
      read(p + at, v);
      const auto before = highest;
      highest = v > highest ? v : highest;
      which = if_same(highest, before, which, decltype(v){} + static_cast<T>(number));
    };
    if (right) offer(m.pixel, 1);
    if (down) offer(row, 2);
    if (right && down) offer(row + m.pixel, 3);
    body(x, c, highest, which);
  });
}

// A row of pixels `pixel` elements apart, and what it counts in a sum.
template <class T>
struct WeightedRow {
  const T* data;
  int64_t pixel;
  T weight;
};

// sum (+)= weight * row of N rows, in registers meanwhile; sum has no gaps.
template <int N, bool Add, class T>
FASTNAS_INLINE inline void sum_some_rows(T* sum, const WeightedRow<T>* rows, int64_t width, int64_t channels) {
  for_each_value<T>(width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
    decltype(v) s{};
    if constexpr (Add) read(sum + p * channels + c, s);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      read(rows[n].data + p * rows[n].pixel + c, v);
      s += v * rows[n].weight;
    }
    write(sum + p * channels + c, s);
  });
}

// sum = the sum of weight * row over all rows.
template <class T>
FASTNAS_INLINE inline void sum_rows(T* sum, const std::vector<WeightedRow<T>>& rows, int64_t width, int64_t channels) {
  const WeightedRow<T>* row = rows.data();
  int64_t left = static_cast<int64_t>(rows.size());
  const auto some = [&](auto count, auto add) FASTNAS_INLINE {
    sum_some_rows<count, add>(sum, row, width, channels);
    row += count;
    left -= count;
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::true_type add;
  constexpr std::false_type begin;
  if (left == 0) std::fill_n(sum, width * channels, T(0));
  if (left == 1) some(one, begin);
  if (left == 2) some(two, begin);
  if (left == 3) some(three, begin);
  if (left >= 4) some(four, begin);
  while (left >= 2) some(two, add);
  if (left == 1) some(one, add);
}

// What the rows of a source have given to a dot product, lane by lane.
template <class T>
struct LaneSums {
  double lanes[kLanes<T>] = {};

  FASTNAS_INLINE void add(Vec<T> v) {
    for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] += v[i];
  }
  double sum() const {
    double total = 0;
    for (double lane : lanes) total += lane;
    return total;
  }
};

// sums[n] += the products of row n and `with`, which has no gaps, for N rows.
template <int N, class T>
FASTNAS_INLINE inline void dot_some_rows(LaneSums<T>* sums, const T* with, const WeightedRow<T>* rows, int64_t width,
                                         int64_t channels) {
  Vec<T> total[N];
  for (int n = 0; n < N; ++n) total[n] = Vec<T>{};
  for_each_value<T>(width, channels, [&](int64_t p, int64_t c, auto d) FASTNAS_INLINE {
    auto v = d;
    read(with + p * channels + c, d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      read(rows[n].data + p * rows[n].pixel + c, v);
      if constexpr (sizeof(v) == sizeof(T))
        sums[n].lanes[0] += v * d;
      else
        total[n] += v * d;
    }
  });
  for (int n = 0; n < N; ++n) sums[n].add(total[n]);
}

// The same for all rows; weights do not matter. Chains of additions side by side do not wait for each other.
template <class T>
FASTNAS_INLINE inline void dot_rows(LaneSums<T>* sums, const T* with, const std::vector<WeightedRow<T>>& rows,
                                    int64_t width, int64_t channels) {
  const int64_t count = static_cast<int64_t>(rows.size());
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) dot_some_rows<4>(sums + n, with, rows.data() + n, width, channels);
  for (; n + 2 <= count; n += 2) dot_some_rows<2>(sums + n, with, rows.data() + n, width, channels);
  if (n < count) dot_some_rows<1>(sums + n, with, rows.data() + n, width, channels);
}

// The first `count` channels of each pixel of a row become zero.
template <class T>
FASTNAS_INLINE inline void clear_channels(T* out, int64_t pixel, int64_t count, int64_t width) {
  const auto clear = [&](auto known) FASTNAS_INLINE {
    for (int64_t x = 0; x < width; ++x) std::memset(out + x * pixel, 0, known * sizeof(T));
  };
  if (count == 4) return clear(std::integral_constant<int64_t, 4>{});
  if (count == 8) return clear(std::integral_constant<int64_t, 8>{});
  if (count == 16) return clear(std::integral_constant<int64_t, 16>{});
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < count; ++c) out[x * pixel + c] = 0;
}

}  // namespace fastnas
