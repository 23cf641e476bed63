#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "common/dtype.h"
#include "common/vector.h"

// The arithmetic of depthwise_bank. Maps lie "in lanes": pixel by pixel, and at each pixel one value of each of
// kLanes planes (images times channels). A tap of any kernel is then one multiply-add of whole aligned vectors, at
// any width, dilation and stride, and no vector is partly idle on small maps.

namespace fastnas::bank {

// Values at one pixel: one cache line, which is one vector of AVX-512 and some of the others.
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

// Vectors in memory need not be aligned, which only a copy can say: template arguments lose such attributes.
template <class V, class A>
FASTNAS_INLINE inline V get(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class A>
FASTNAS_INLINE inline void put(A* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Keeps the compiler from turning offsets from p, which instructions hold for nothing, into pointers of their own.
template <class A>
FASTNAS_INLINE inline const A* one_pointer(const A* p) {
  asm("" : "+r"(p));
  return p;
}

// A rectangle of pixels in lanes; steps in elements.
template <class A>
struct Pixels {
  A* data;
  int64_t row, column;

  FASTNAS_INLINE A* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

// Maps of one size, with zeros around them, in one buffer; `data` is the first pixel of the first map.
template <class A>
struct Maps {
  const A* data;
  int64_t pitch, height, width;

  FASTNAS_INLINE const A* at(int64_t r, int64_t c) const { return data + r * pitch + c * kLanes<A>; }
};

// What a sum takes from one map: `rows` x `columns` values, rows `down` and columns `right` pixels apart, the first one
// (top, left) from the pixel at hand. The map begins `map` elements after the first one. The weights of the taps lie in
// the same order from `weight` on.
struct Taps {
  int64_t top, left, down, right, rows, columns, map, weight;
};

// Without the rows of taps that only see zeros from pixels in rows [first, last] of a map.
template <class A>
FASTNAS_INLINE inline Taps inside(Taps taps, int64_t first, int64_t last, int64_t height) {
  for (; taps.rows > 0 && last + taps.top < 0; --taps.rows) {
    taps.top += taps.down;
    taps.weight += taps.columns * kLanes<A>;
  }
  while (taps.rows > 0 && first + taps.top + (taps.rows - 1) * taps.down >= height) --taps.rows;
  return taps;
}

// Adds one map's taps to a tile of sums. An input is loaded once for the taps of a row that meet in it. Whole: the tile
// is as wide as the map and under the middle of the taps, so that what it would read beyond is zero.
template <int Size, int Dilation, int Stride, bool Whole, class V, int Rows, int Columns, class A>
FASTNAS_INLINE inline void add_taps(V (&sum)[Rows][Columns], const A* in, int64_t pitch, const Taps& taps,
                                    const A* weights) {
  constexpr int reach = (Size - 1) * Dilation;
  constexpr int begin = Whole ? reach / 2 : 0, end = (Columns - 1) * Stride + 1 + (Whole ? reach / 2 : reach);
  for (int64_t i = 0; i < taps.rows; ++i) {
    V w[Size];
#pragma GCC unroll 5
    for (int j = 0; j < Size; ++j) w[j] = get<V>(weights + (i * Size + j) * kLanes<A>);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const A* p = one_pointer(in + (i * taps.down + r * Stride) * pitch);
#pragma GCC unroll 64
      for (int place = begin; place < end; ++place) {
        const V x = get<V>(p + place * kLanes<A>);
#pragma GCC unroll 5
        for (int j = 0; j < Size; ++j) {
          const int apart = place - j * Dilation, c = apart / Stride;
          if (apart >= 0 && apart % Stride == 0 && c < Columns) sum[r][c] += x * w[j];
        }
      }
    }
  }
}

// The same for any size and dilation: a load for each product.
template <int Stride, class V, int Rows, int Columns, class A>
FASTNAS_INLINE inline void add_any_taps(V (&sum)[Rows][Columns], const A* in, int64_t pitch, const Taps& taps,
                                        const A* weights) {
  for (int64_t i = 0; i < taps.rows; ++i)
    for (int64_t j = 0; j < taps.columns; ++j, weights += kLanes<A>) {
      const V w = get<V>(weights);
      for (int r = 0; r < Rows; ++r) {
        const A* p = one_pointer(in + (i * taps.down + r * Stride) * pitch + j * taps.right * kLanes<A>);
        for (int c = 0; c < Columns; ++c) sum[r][c] += get<V>(p + c * Stride * kLanes<A>) * w;
      }
    }
}

// The kernels of NAS: 3x3 and 5x5, plain and dilated. At stride 2 gradients go back through 1, 2 or 3 taps a row.
template <int Stride, bool Whole, class V, int Rows, int Columns, class A>
FASTNAS_INLINE inline void add_map(V (&sum)[Rows][Columns], const A* in, int64_t pitch, const Taps& taps,
                                   const A* weights) {
  if constexpr (Rows * Columns >= 8) {
    const int64_t kind = taps.right <= 2 ? 10 * taps.columns + taps.right : 0;
    if (kind == 31) return add_taps<3, 1, Stride, Whole>(sum, in, pitch, taps, weights);
    if (kind == 51) return add_taps<5, 1, Stride, Whole>(sum, in, pitch, taps, weights);
    if (kind == 32) return add_taps<3, 2, Stride, Whole>(sum, in, pitch, taps, weights);
    if (kind == 52) return add_taps<5, 2, Stride, Whole>(sum, in, pitch, taps, weights);
    if (kind == 21) return add_taps<2, 1, Stride, false>(sum, in, pitch, taps, weights);
  }
  add_any_taps<Stride>(sum, in, pitch, taps, weights);
}

// What a sum consists of: maps, the sum of whose first `gated` becomes zero where the ReLU of `x`, if given, is closed.
template <class A>
struct Sum {
  std::span<const Taps> maps;
  size_t gated;
  const A* weights;
  Pixels<const A> x;  // NaN passes, as in torch.relu's gradient
};

// Tiles over rows x columns pixels; the last ones move back over their neighbours instead of shrinking. They go down
// the map, so that what the next one needs besides is a row of inputs.
template <class V, int Rows, int Columns, int Stride, class A>
FASTNAS_INLINE inline void sum_tiles(const Pixels<A>& out, const Maps<A>& in, int64_t first, int64_t rows,
                                     int64_t columns, const Sum<A>& of) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A);
  for (int64_t j = 0; j < columns; j += Columns) {
    const int64_t left = std::min(j, columns - Columns);
    for (int64_t i = 0; i < rows; i += Rows) {
      const int64_t top = std::min(i, rows - Rows), row = (first + top) * Stride;
      for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
        for (int r = 0; of.maps.empty() && r < Rows; ++r)
          for (int c = 0; c < Columns; ++c) put(out.at(top + r, left + c) + lane, V{});
        // Each map has a sum of its own: rounding errors of one long chain would pile up.
        for (size_t k = 0; k < of.maps.size(); ++k) {
          const Taps taps = inside<A>(of.maps[k], row, row + (Rows - 1) * Stride, in.height);
          const A* from = in.at(row + taps.top, left * Stride + taps.left) + taps.map + lane;
          const A* weights = of.weights + taps.weight + lane;
          V sum[Rows][Columns];
          for (int r = 0; r < Rows; ++r)
            for (int c = 0; c < Columns; ++c) sum[r][c] = V{};
          const bool centred = 2 * taps.left == -(taps.columns - 1) * taps.right;
          if (Stride == 1 && Columns >= 8 && in.width == Columns && centred) {
            add_map<Stride, Stride == 1 && Columns >= 8>(sum, from, in.pitch, taps, weights);
          } else {
            add_map<Stride, false>(sum, from, in.pitch, taps, weights);
          }
          const bool gate = of.x.data && k + 1 == of.gated;
          // Conditions stay outside of the loops, which are unrolled, so that the sums stay in registers.
          if (k > 0)
            for (int r = 0; r < Rows; ++r)
              for (int c = 0; c < Columns; ++c) sum[r][c] += get<V>(out.at(top + r, left + c) + lane);
          if (gate)
            for (int r = 0; r < Rows; ++r)
              for (int c = 0; c < Columns; ++c)
                sum[r][c] = get<V>(of.x.at(top + r, left + c) + lane) <= A(0) ? V{} : sum[r][c];
          for (int r = 0; r < Rows; ++r)
            for (int c = 0; c < Columns; ++c) put(out.at(top + r, left + c) + lane, sum[r][c]);
        }
      }
    }
  }
}

template <class V, int Stride, class A>
FASTNAS_INLINE inline void sum_in_best_tiles(const Pixels<A>& out, const Maps<A>& in, int64_t first, int64_t rows,
                                             int64_t columns, const Sum<A>& of) {
  const auto tiles = [&](auto tile_rows, auto tile_columns) FASTNAS_INLINE {
    sum_tiles<V, tile_rows, tile_columns, Stride>(out, in, first, rows, columns, of);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, 8> eight;
  constexpr std::integral_constant<int, 16> sixteen;
  if constexpr (kRegisters == 32) {
    if (columns >= 16) return tiles(one, sixteen);
    if (columns >= 8 && rows >= 2) return tiles(two, eight);
    if (columns >= 4 && rows >= 4) return tiles(four, four);
  } else {
    if (columns >= 8) return tiles(one, eight);
    if (columns >= 4 && rows >= 2) return tiles(two, four);
  }
  if (columns >= 2 && rows >= 2) return tiles(two, two);
  tiles(one, one);
}

// out = the sum at rows x columns pixels, the first row of which is number `first` of the result. A step there is one
// of `stride` pixels, 1 or 2, in the maps.
template <class A>
void sum_taps(const Pixels<A>& out, const Maps<A>& in, int64_t stride, int64_t first, int64_t rows, int64_t columns,
              const Sum<A>& of) {
  vectorised([&]() FASTNAS_INLINE {
    using V = Vec<A>;
    if (stride == 1) return sum_in_best_tiles<V, 1>(out, in, first, rows, columns, of);
    sum_in_best_tiles<V, 2>(out, in, first, rows, columns, of);
  });
}

}  // namespace fastnas::bank
