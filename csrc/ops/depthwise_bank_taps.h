#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

// One term of a sum: weights[weight + lane] * in[input + lane], `input` counted from the pixel at hand.
struct Tap {
  int64_t input, weight;
};

// A rectangle of pixels in lanes; steps in elements.
template <class A>
struct Pixels {
  A* data;
  int64_t row, column;
};

// A tile of Rows x Columns sums in registers. Each tap loads its weights once for the tile and takes its inputs as
// memory operands: 9 loads for 8 multiply-adds, while a core does two of each in a cycle.
template <class V, int Rows, int Columns, int Stride, class A>
FASTNAS_INLINE inline void sum_tile(A* out, int64_t out_row, int64_t out_column, const A* in, int64_t in_row,
                                    const std::vector<Tap>& taps, const A* weights) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A);
  for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
    V sum[Rows][Columns];
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) sum[r][c] = V{};
    for (const Tap& tap : taps) {
      const V w = get<V>(weights + tap.weight + lane);
      const A* p = in + tap.input + lane;
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Columns; ++c) sum[r][c] += get<V>(p + r * in_row + c * Stride * kLanes<A>) * w;
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) put(out + r * out_row + c * out_column + lane, sum[r][c]);
  }
}

// Tiles over rows x columns pixels; the last ones move back over their neighbours instead of shrinking.
template <class V, int Rows, int Columns, int Stride, class A>
FASTNAS_INLINE inline void sum_tiles(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns,
                                     const std::vector<Tap>& taps, const A* weights) {
  for (int64_t i = 0; i < rows; i += Rows) {
    const int64_t r = std::min(i, rows - Rows);
    for (int64_t j = 0; j < columns; j += Columns) {
      const int64_t c = std::min(j, columns - Columns);
      sum_tile<V, Rows, Columns, Stride>(out.data + r * out.row + c * out.column, out.row, out.column,
                                         in.data + r * in.row + c * in.column, in.row, taps, weights);
    }
  }
}

template <class V, int Stride, class A>
FASTNAS_INLINE inline void sum_in_best_tiles(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns,
                                             const std::vector<Tap>& taps, const A* weights) {
  if constexpr (sizeof(V) == 64) {  // 32 registers
    if (columns >= 16) return sum_tiles<V, 1, 16, Stride>(out, in, rows, columns, taps, weights);
    if (columns >= 8 && rows >= 2) return sum_tiles<V, 2, 8, Stride>(out, in, rows, columns, taps, weights);
    if (columns >= 4 && rows >= 4) return sum_tiles<V, 4, 4, Stride>(out, in, rows, columns, taps, weights);
  }
  if (columns >= 8) return sum_tiles<V, 1, 8, Stride>(out, in, rows, columns, taps, weights);
  if (columns >= 4 && rows >= 2) return sum_tiles<V, 2, 4, Stride>(out, in, rows, columns, taps, weights);
  if (columns >= 2 && rows >= 2) return sum_tiles<V, 2, 2, Stride>(out, in, rows, columns, taps, weights);
  sum_tiles<V, 1, 1, Stride>(out, in, rows, columns, taps, weights);
}

// out = sum over taps of weight * input, for rows x columns pixels. `in` advances by one or two pixels a column.
template <class A>
void sum_taps(Pixels<A> out, Pixels<const A> in, int64_t rows, int64_t columns, const std::vector<Tap>& taps,
              const A* weights) {
  vectorised_by_width([&](auto bytes) FASTNAS_INLINE {
    using V = typename VectorOf<A, decltype(bytes)::value>::type;
    if (in.column == kLanes<A>) return sum_in_best_tiles<V, 1>(out, in, rows, columns, taps, weights);
    sum_in_best_tiles<V, 2>(out, in, rows, columns, taps, weights);
  });
}

// Weight gradients are summed in registers for this many taps at a time: enough independent sums to hide the latency of
// the multiply-add, few enough for 16 registers. A 3x3 kernel is one such set, a 5x5 kernel three. A chain of additions
// stays near this many pixels long, so that rounding errors do not pile up as in one long sum.
constexpr int64_t kTapSet = 9;
constexpr int64_t kChain = 64;

template <class V, int Stride, class A>
FASTNAS_INLINE inline void correlate_set(A* sums, const int64_t* offsets, Pixels<const A> x, Pixels<const A> g,
                                         int64_t rows, int64_t columns) {
  constexpr int64_t kVector = sizeof(V) / sizeof(A);
  for (int64_t lane = 0; lane < kLanes<A>; lane += kVector) {
    V sum[kTapSet];
    const A* p[kTapSet];
    for (int k = 0; k < kTapSet; ++k) {
      sum[k] = V{};
      p[k] = x.data + offsets[k] + lane;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const A* gp = g.data + r * g.row + lane;
      for (int64_t c = 0; c < columns; ++c) {
        const V gv = get<V>(gp + c * kLanes<A>);
        for (int k = 0; k < kTapSet; ++k) sum[k] += get<V>(p[k] + r * x.row + c * Stride * kLanes<A>) * gv;
      }
    }
    for (int k = 0; k < kTapSet; ++k) {
      A* to = sums + k * kLanes<A> + lane;
      put<V>(to, get<V>(to) + sum[k]);
    }
  }
}

// sums[k] += sum over pixels of x[offsets[k]] * g, lane by lane; the number of offsets is a multiple of kTapSet.
template <class A>
void correlate(A* sums, const std::vector<int64_t>& offsets, Pixels<const A> x, Pixels<const A> g, int64_t rows,
               int64_t columns) {
  vectorised_by_width([&](auto bytes) FASTNAS_INLINE {
    using V = typename VectorOf<A, decltype(bytes)::value>::type;
    const int64_t step = std::max<int64_t>(1, kChain / columns);
    for (size_t k = 0; k < offsets.size(); k += kTapSet)
      for (int64_t top = 0; top < rows; top += step) {
        const Pixels<const A> xs{x.data + top * x.row, x.row, x.column}, gs{g.data + top * g.row, g.row, g.column};
        const int64_t n = std::min(step, rows - top);
        A* set = sums + k * kLanes<A>;
        if (x.column == kLanes<A>) {
          correlate_set<V, 1>(set, offsets.data() + k, xs, gs, n, columns);
        } else {
          correlate_set<V, 2>(set, offsets.data() + k, xs, gs, n, columns);
        }
      }
  });
}

}  // namespace fastnas::bank
