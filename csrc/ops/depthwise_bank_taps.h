#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"

// The arithmetic of depthwise_bank. Maps lie "in lanes": pixel by pixel, and at each pixel one value of each of
// kLanes planes (images times channels). A tap of any kernel is then one multiply-add of whole aligned vectors, at
// any width, dilation and stride, and no vector is partly idle on small maps.

namespace fastnas::bank {

// Values at one pixel: one cache line, and one vector of AVX-512.
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

// Vectors have the width of the processor and hold all or some of the lanes.
template <class A, int Bytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(Bytes)));
};

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

// Runs body(std::integral_constant<int, bytes of a vector>), compiled for this processor.
template <class Body>
inline void vectorised_by_width(const Body& body) {
  const auto run = [&](auto bytes) { return [&body, bytes]() FASTNAS_INLINE { body(bytes); }; };
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::kAvx512) return run_avx512(run(std::integral_constant<int, 64>{}));
  if (isa() == Isa::kAvx2) return run_avx2(run(std::integral_constant<int, 32>{}));
#endif
  run(std::integral_constant<int, 16>{})();
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

// What a sum takes from one map, counted from the pixel at hand: `rows` x `size` values, the first `first` elements
// away, rows `row` elements apart and columns `dilation` pixels. Their weights lie in the same order from `weight` on.
struct Taps {
  int64_t first, row, rows, size, dilation, weight;
};

// Adds one map's taps to a tile of sums. An input is loaded once for the taps of a row that meet in it.
template <int Size, int Dilation, int Stride, class V, int Rows, int Columns, class A>
FASTNAS_INLINE inline void add_taps(V (&sum)[Rows][Columns], const A* in, int64_t in_row, const Taps& taps,
                                    const A* weights) {
  for (int64_t i = 0; i < taps.rows; ++i) {
    V w[Size];
#pragma GCC unroll 5
    for (int j = 0; j < Size; ++j) w[j] = get<V>(weights + (i * Size + j) * kLanes<A>);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const A* p = one_pointer(in + i * taps.row + r * in_row);
#pragma GCC unroll 64
      for (int place = 0; place < (Columns - 1) * Stride + (Size - 1) * Dilation + 1; ++place) {
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
FASTNAS_INLINE inline void add_any_taps(V (&sum)[Rows][Columns], const A* in, int64_t in_row, const Taps& taps,
                                        const A* weights) {
  for (int64_t i = 0; i < taps.rows; ++i)
    for (int64_t j = 0; j < taps.size; ++j, weights += kLanes<A>) {
      const V w = get<V>(weights);
      for (int r = 0; r < Rows; ++r) {
        const A* p = one_pointer(in + i * taps.row + j * taps.dilation * kLanes<A> + r * in_row);
        for (int c = 0; c < Columns; ++c) sum[r][c] += get<V>(p + c * Stride * kLanes<A>) * w;
      }
    }
}

// The kernels of NAS: 3x3 and 5x5, plain and dilated. At stride 2 gradients go back through 1, 2 or 3 taps a row.
template <int Stride, class V, int Rows, int Columns, class A>
FASTNAS_INLINE inline void add_map(V (&sum)[Rows][Columns], const A* in, int64_t in_row, const Taps& taps,
                                   const A* weights) {
  if constexpr (Rows * Columns >= 8) {
    const int64_t kind = taps.dilation <= 2 ? 10 * taps.size + taps.dilation : 0;
    if (kind == 31) return add_taps<3, 1, Stride>(sum, in, in_row, taps, weights);
    if (kind == 51) return add_taps<5, 1, Stride>(sum, in, in_row, taps, weights);
    if (kind == 32) return add_taps<3, 2, Stride>(sum, in, in_row, taps, weights);
    if (kind == 52) return add_taps<5, 2, Stride>(sum, in, in_row, taps, weights);
    if (kind == 21) return add_taps<2, 1, Stride>(sum, in, in_row, taps, weights);
  }
  add_any_taps<Stride>(sum, in, in_row, taps, weights);
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
FASTNAS_INLINE inline void sum_tiles(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns,
                                     const Sum<A>& of) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A);
  for (int64_t j = 0; j < columns; j += Columns) {
    const int64_t left = std::min(j, columns - Columns);
    for (int64_t i = 0; i < rows; i += Rows) {
      const int64_t top = std::min(i, rows - Rows);
      for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
        const A *from = in.at(top, left) + lane, *weights = of.weights + lane;
        for (int r = 0; of.maps.empty() && r < Rows; ++r)
          for (int c = 0; c < Columns; ++c) put(out.at(top + r, left + c) + lane, V{});
        // Each map has a sum of its own: rounding errors of one long chain would pile up.
        for (size_t k = 0; k < of.maps.size(); ++k) {
          const Taps& taps = of.maps[k];
          V sum[Rows][Columns];
          for (int r = 0; r < Rows; ++r)
            for (int c = 0; c < Columns; ++c) sum[r][c] = V{};
          add_map<Stride>(sum, from + taps.first, in.row, taps, weights + taps.weight);
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
FASTNAS_INLINE inline void sum_in_best_tiles(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns,
                                             const Sum<A>& of) {
  if constexpr (sizeof(V) == 64) {  // 32 registers
    if (columns >= 16) return sum_tiles<V, 1, 16, Stride>(out, in, rows, columns, of);
    if (columns >= 8 && rows >= 2) return sum_tiles<V, 2, 8, Stride>(out, in, rows, columns, of);
    if (columns >= 4 && rows >= 4) return sum_tiles<V, 4, 4, Stride>(out, in, rows, columns, of);
  } else {
    if (columns >= 8) return sum_tiles<V, 1, 8, Stride>(out, in, rows, columns, of);
    if (columns >= 4 && rows >= 2) return sum_tiles<V, 2, 4, Stride>(out, in, rows, columns, of);
  }
  if (columns >= 2 && rows >= 2) return sum_tiles<V, 2, 2, Stride>(out, in, rows, columns, of);
  sum_tiles<V, 1, 1, Stride>(out, in, rows, columns, of);
}

// out = the sum at rows x columns pixels. `in` advances by one or two pixels a column.
template <class A>
void sum_taps(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns, const Sum<A>& of) {
  vectorised_by_width([&](auto bytes) FASTNAS_INLINE {
    using V = typename VectorOf<A, decltype(bytes)::value>::type;
    if (in.column == kLanes<A>) return sum_in_best_tiles<V, 1>(out, in, rows, columns, of);
    sum_in_best_tiles<V, 2>(out, in, rows, columns, of);
  });
}

}  // namespace fastnas::bank
