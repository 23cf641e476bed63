#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ops/depthwise_bank_taps.h"

// Weight gradients of depthwise_bank: for each tap the sum over pixels of input times gradient, lane by lane.

namespace fastnas::bank {

// A chain of additions stays near this many pixels long, so that rounding errors do not pile up as in one long sum.
constexpr int64_t kChain = 64;

// Adds the products of a tile of Columns gradients, `Step` pixels apart, in one row. `x` is the input of the first tap.
template <int Columns, int Step, int Dilation, int Stride, class V, int Rows, int Size, class A>
FASTNAS_INLINE inline void add_products(V (&sum)[Rows][Size], const A* x, int64_t tap_row, const A* g) {
  V gradient[Columns];
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) gradient[c] = get<V>(g + c * Step * kLanes<A>);
#pragma GCC unroll 5
  for (int i = 0; i < Rows; ++i) {
    const A* p = one_pointer(x + i * tap_row);
#pragma GCC unroll 64
    for (int place = 0; place < (Columns - 1) * Step * Stride + (Size - 1) * Dilation + 1; ++place) {
      const V in = get<V>(p + place * kLanes<A>);
#pragma GCC unroll 5
      for (int j = 0; j < Size; ++j) {
        const int apart = place - j * Dilation, c = apart / (Step * Stride);
        if (apart >= 0 && apart % (Step * Stride) == 0 && c < Columns) sum[i][j] += in * gradient[c];
      }
    }
  }
}

// Rows x Size taps stay in registers while the pixels pass, and an input serves all taps of a row that meet in it. With
// a dilation the gradients of a tile are that far apart, so that they share inputs too. x: under the first tap.
template <class V, int Rows, int Size, int Dilation, int Stride, class A>
FASTNAS_INLINE inline void correlate_rows(A* sums, const Pixels<const A>& x, int64_t tap_row, const Pixels<const A>& g,
                                          int64_t rows, int64_t columns) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A);
  constexpr int kColumns = 4, kStep = Stride == 1 ? Dilation : 1;
  for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
    V sum[Rows][Size];
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Size; ++j) sum[i][j] = V{};
    for (int64_t r = 0; r < rows; ++r) {
      int64_t c = 0;
      for (; c + kColumns * kStep <= columns; c += kColumns * kStep)
        for (int64_t shift = c; shift < c + kStep; ++shift)
          add_products<kColumns, kStep, Dilation, Stride>(sum, x.at(r, shift) + lane, tap_row, g.at(r, shift) + lane);
      for (; c < columns; ++c) add_products<1, 1, Dilation, Stride>(sum, x.at(r, c) + lane, tap_row, g.at(r, c) + lane);
    }
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Size; ++j) {
        A* to = sums + (i * Size + j) * kLanes<A> + lane;
        put<V>(to, get<V>(to) + sum[i][j]);
      }
  }
}

// The same for any size and dilation, tap by tap in sets of kTaps.
template <class V, int Stride, class A>
FASTNAS_INLINE inline void correlate_any(A* sums, const Taps& taps, const Pixels<const A>& x, int64_t pitch,
                                         const Pixels<const A>& g, int64_t rows, int64_t columns) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A), kTaps = 8;
  const int64_t count = taps.rows * taps.columns;
  for (int64_t first = 0; first < count; first += kTaps)
    for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
      V sum[kTaps];
      const A* p[kTaps];
      for (int64_t k = 0; k < kTaps; ++k) {
        const int64_t tap = std::min(first + k, count - 1);  // the last one again, for nothing
        sum[k] = V{};
        p[k] = x.data + tap / taps.columns * taps.down * pitch + tap % taps.columns * taps.right * kLanes<A> + lane;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
          const V gradient = get<V>(g.at(r, c) + lane);
          for (int k = 0; k < kTaps; ++k) sum[k] += get<V>(p[k] + r * x.row + c * Stride * kLanes<A>) * gradient;
        }
      for (int64_t k = 0; k < std::min(kTaps, count - first); ++k) {
        A* to = sums + (first + k) * kLanes<A> + lane;
        put<V>(to, get<V>(to) + sum[k]);
      }
    }
}

template <class V, int Size, int Dilation, int Stride, class A>
FASTNAS_INLINE inline void correlate_known(A* sums, const Pixels<const A>& x, int64_t tap_row, const Pixels<const A>& g,
                                           int64_t rows, int64_t columns) {
  constexpr int kRows = std::min(Size, (kRegisters - 5) / Size);
  constexpr int kLeft = Size % kRows;
  const auto from = [&](int64_t i) FASTNAS_INLINE { return Pixels<const A>{x.data + i * tap_row, x.row, x.column}; };
  int64_t i = 0;
  for (; i + kRows <= Size; i += kRows)
    correlate_rows<V, kRows, Size, Dilation, Stride>(sums + i * Size * kLanes<A>, from(i), tap_row, g, rows, columns);
  if constexpr (kLeft > 0)
    correlate_rows<V, kLeft, Size, Dilation, Stride>(sums + i * Size * kLanes<A>, from(i), tap_row, g, rows, columns);
}

template <class V, int Stride, class A>
FASTNAS_INLINE inline void correlate_chain(A* sums, const Taps& taps, const Pixels<const A>& x, int64_t pitch,
                                           const Pixels<const A>& g, int64_t rows, int64_t columns) {
  const int64_t kind = taps.right <= 2 ? 10 * taps.columns + taps.right : 0, tap_row = taps.down * pitch;
  if (kind == 31) return correlate_known<V, 3, 1, Stride>(sums, x, tap_row, g, rows, columns);
  if (kind == 51) return correlate_known<V, 5, 1, Stride>(sums, x, tap_row, g, rows, columns);
  if (kind == 32) return correlate_known<V, 3, 2, Stride>(sums, x, tap_row, g, rows, columns);
  if (kind == 52) return correlate_known<V, 5, 2, Stride>(sums, x, tap_row, g, rows, columns);
  correlate_any<V, Stride>(sums, taps, x, pitch, g, rows, columns);
}

// sums[tap] += the products at rows x columns pixels of the result, the first row of which is number `first` there and
// begins at g. A step there is one of `stride` pixels, 1 or 2, in x.
template <class A>
void correlate(A* sums, const Taps& taps, const Maps<A>& x, int64_t stride, const Pixels<const A>& g, int64_t first,
               int64_t rows, int64_t columns) {
  vectorised([&]() FASTNAS_INLINE {
    using V = Vec<A>;
    const int64_t step = std::max<int64_t>(1, kChain / columns);
    for (int64_t top = 0; top < rows; top += step) {
      const A* under = x.at((first + top) * stride + taps.top, taps.left);
      const Pixels<const A> from{under, stride * x.pitch, stride * kLanes<A>}, gs{g.at(top, 0), g.row, g.column};
      const int64_t n = std::min(step, rows - top);
      if (stride == 1) {
        correlate_chain<V, 1>(sums, taps, from, x.pitch, gs, n, columns);
      } else {
        correlate_chain<V, 2>(sums, taps, from, x.pitch, gs, n, columns);
      }
    }
  });
}

}  // namespace fastnas::bank
