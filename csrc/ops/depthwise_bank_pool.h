#pragma once

#include <algorithm>
#include <cstdint>

#include "common/max_pool.h"
#include "ops/depthwise_bank_plan.h"

// Pools of 3 x 3 over maps in lanes. A place outside the map is replaced by the nearest one inside, which lies in the
// same window: the maximum, and the first of equals in row-major order, are those of the window without it.

namespace fastnas::bank {

// One row of windows over a map whose rows are `pitch` apart: places 0 to 8 of window x begin at at(x, place).
template <class A>
struct WindowRow {
  int64_t row[3];
  int64_t width, stride;

  WindowRow(int64_t y, const Sizes& s, int64_t pitch) : width(s.width), stride(s.stride) {
    for (int k = 0; k < 3; ++k) row[k] = std::clamp<int64_t>(y * stride + k - 1, 0, s.height - 1) * pitch;
  }
  FASTNAS_INLINE int64_t at(int64_t x, int place) const {
    return row[place / 3] + std::clamp<int64_t>(x * stride + place % 3 - 1, 0, width - 1) * kLanes<A>;
  }
};

template <class A>
void max_row(A* out, int64_t out_column, const A* x, const WindowRow<A>& windows, int64_t columns) {
  vectorised([&]() FASTNAS_INLINE {
    for (int64_t i = 0; i < columns; ++i) {
      const A* p[9];
      for (int k = 0; k < 9; ++k) p[k] = x + windows.at(i, k);
      A* y = out + i * out_column;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        A best = p[0][lane];
        for (int k = 1; k < 9; ++k) best = larger(best, p[k][lane]);
        y[lane] = best;
      }
    }
  });
}

// Adds g to dx at the maximum of each window. `winners` has room for one row of the result. The places of the window
// are served one after another, so that neighbouring windows do not wait for each other's sums.
template <class A>
void add_max_row_gradient(A* dx, const A* g, const A* x, A* winners, const WindowRow<A>& in_x,
                          const WindowRow<A>& in_dx, int64_t columns) {
  vectorised([&]() FASTNAS_INLINE {
    for (int64_t i = 0; i < columns; ++i) {
      const A* p[9];
      for (int k = 0; k < 9; ++k) p[k] = x + in_x.at(i, k);
      A* winner = winners + i * kLanes<A>;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        A best = p[0][lane], place = A(0);
        for (int k = 1; k < 9; ++k) {
          const A v = p[k][lane];
          const bool taken = takes(v, best);
          best = taken ? v : best;
          place = taken ? A(k) : place;
        }
        winner[lane] = place;
      }
    }
    for (int k = 0; k < 9; ++k)
      for (int64_t i = 0; i < columns; ++i) {
        A* to = dx + in_dx.at(i, k);
        const A *winner = winners + i * kLanes<A>, *from = g + i * kLanes<A>;
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) to[lane] += winner[lane] == A(k) ? from[lane] : A(0);
      }
  });
}

// Divides `rows` rows of the result, from row `top` on, by how many places of each window lie inside the map.
template <class A>
void divide_by_places(Pixels<A> y, int64_t top, int64_t rows, const Sizes& s) {
  const auto inside = [&s](int64_t i, int64_t size) {
    return std::min(size, i * s.stride + 2) - std::max<int64_t>(0, i * s.stride - 1);
  };
  vectorised([&]() FASTNAS_INLINE {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < s.out_width; ++c) {
        const A places = static_cast<A>(inside(top + r, s.height) * inside(c, s.width));
        A* p = y.data + r * y.row + c * y.column;
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) p[lane] /= places;
      }
  });
}

}  // namespace fastnas::bank
