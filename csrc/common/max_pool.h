#pragma once

#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "common/simd.h"

namespace fastnas {

// Max-pooling over 2 x 2 without overlap, with max_pool2d's choice: the first of equals in row-major order,
// the last NaN. Gradients are found from the inputs again. Places outside the map count as -inf and are never
// chosen.

template <int N, class Body>
FASTNAS_INLINE inline void lanes(int64_t start, const Body& body) {
#pragma omp simd
  for (int64_t i = 0; i < N; ++i) body(start + i);
}

// body(0) ... body(n - 1) in vectors of known length: rows and pixels are short, and what a plain loop leaves
// over for its scalar end would be most of them, with branches on the data.
template <class Body>
FASTNAS_INLINE inline void in_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) lanes<16>(i, body);
  for (; i + 8 <= n; i += 8) lanes<8>(i, body);
  for (; i + 4 <= n; i += 4) lanes<4>(i, body);
  for (; i < n; ++i) lanes<1>(i, body);
}

template <class A>
FASTNAS_INLINE inline bool takes(A v, A best) {
  return v > best || v != v;
}

template <class A>
FASTNAS_INLINE inline A larger(A best, A v) {
  return takes(v, best) ? v : best;
}

template <class A>
constexpr A kOutside = -std::numeric_limits<A>::infinity();

// g where the maximum of (v0, v1, v2, v3) is, 0 in the other three places.
template <class A>
FASTNAS_INLINE inline void unpool(A v0, A v1, A v2, A v3, A g, A (&dx)[4]) {
  const bool t1 = takes(v1, v0);
  const A m1 = t1 ? v1 : v0;
  const bool t2 = takes(v2, m1);
  const A m2 = t2 ? v2 : m1;
  const bool t3 = takes(v3, m2);
  const A g2 = t3 ? A(0) : g, g1 = t2 ? A(0) : g2;
  dx[0] = t1 ? A(0) : g1;
  dx[1] = t1 ? g1 : A(0);
  dx[2] = t2 ? g2 : A(0);
  dx[3] = t3 ? g : A(0);
}

// One row of a pooled plane from two rows of `width` elements, `step` apart; bottom is top when the map ends
// there.
template <class T>
FASTNAS_INLINE inline void pool_row(T* y, const T* top, const T* bottom, int64_t step, int64_t width) {
  const int64_t pairs = width / 2;
  in_lanes(pairs, [&](int64_t i) FASTNAS_INLINE {
    const int64_t left = 2 * i * step, right = left + step;
    store(y + i, larger(larger(larger(load(top[left]), load(top[right])), load(bottom[left])), load(bottom[right])));
  });
  if (width % 2) store(y + pairs, larger(load(top[2 * pairs * step]), load(bottom[2 * pairs * step])));
}

// Its gradient, written to the dense rows dtop and, if the map has a bottom row there, dbottom.
template <bool HasBottom, class T>
FASTNAS_INLINE inline void unpool_row(T* dtop, T* dbottom, const T* top, const T* bottom, int64_t step, const T* g,
                                      int64_t width) {
  using A = acc_t<T>;
  const int64_t pairs = width / 2;
  in_lanes(pairs, [&](int64_t i) FASTNAS_INLINE {
    const int64_t left = 2 * i * step, right = left + step;
    A dx[4];
    unpool(load(top[left]), load(top[right]), HasBottom ? load(bottom[left]) : kOutside<A>,
           HasBottom ? load(bottom[right]) : kOutside<A>, load(g[i]), dx);
    store(dtop + 2 * i, dx[0]);
    store(dtop + 2 * i + 1, dx[1]);
    if (HasBottom) {
      store(dbottom + 2 * i, dx[2]);
      store(dbottom + 2 * i + 1, dx[3]);
    }
  });
  if (width % 2) {
    const int64_t last = 2 * pairs;
    A dx[4];
    unpool(load(top[last * step]), kOutside<A>, HasBottom ? load(bottom[last * step]) : kOutside<A>, kOutside<A>,
           load(g[pairs]), dx);
    store(dtop + last, dx[0]);
    if (HasBottom) store(dbottom + last, dx[2]);
  }
}

// All channels of one pooled pixel, from the four pixels x[0..3]; those outside the map point to kOutside.
template <class T>
FASTNAS_INLINE inline void pool_pixel(T* y, const T* const (&x)[4], int64_t channels) {
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    store(y + c, larger(larger(larger(load(x0[c]), load(x1[c])), load(x2[c])), load(x3[c])));
  });
}

// Its gradient, written to the four pixels dx[0..3]; those outside the map point to scratch memory.
template <class T>
FASTNAS_INLINE inline void unpool_pixel(T* const (&dx)[4], const T* const (&x)[4], const T* g, int64_t channels) {
  using A = acc_t<T>;
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  T *d0 = dx[0], *d1 = dx[1], *d2 = dx[2], *d3 = dx[3];
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    A d[4];
    unpool(load(x0[c]), load(x1[c]), load(x2[c]), load(x3[c]), load(g[c]), d);
    store(d0 + c, d[0]);
    store(d1 + c, d[1]);
    store(d2 + c, d[2]);
    store(d3 + c, d[3]);
  });
}

}  // namespace fastnas
