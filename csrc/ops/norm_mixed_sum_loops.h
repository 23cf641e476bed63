#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/stream.h"

// The inner loops of norm_mixed_sum, over blocks of rows x lanes. Sums of up to eight values run in acc_t<T>, what they
// add up to in double: as fast as float, and without its drift over a large batch.

namespace fastnas::norm {

// A coefficient of all lanes, or one a lane; of the lanes from `lane` on where a vector is asked for.
template <class A>
struct Same {
  A value;
  FASTNAS_INLINE A at(int64_t) const { return value; }
  FASTNAS_INLINE Vec<A> at(int64_t, Vec<A>) const { return Vec<A>{} + value; }
  FASTNAS_INLINE A at(int64_t, A) const { return value; }
};
template <class A>
struct PerLane {
  const A* values;
  FASTNAS_INLINE A at(int64_t lane) const { return values[lane]; }
  FASTNAS_INLINE Vec<A> at(int64_t lane, Vec<A>) const { return get(values + lane); }
  FASTNAS_INLINE A at(int64_t lane, A) const { return values[lane]; }
};

template <class T>
struct Rows {
  T* first;
  int64_t stride;
  FASTNAS_INLINE T* operator[](int64_t row) const { return first + row * stride; }
};

// Asks for a block ahead of its turn: blocks are too short and too far apart for the processor to guess the next one.
template <class T>
FASTNAS_INLINE inline void prefetch(Rows<const T> x, int64_t rows, int64_t lanes) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < lanes; i += kLine) __builtin_prefetch(x[r] + i);
}

// body(std::integral_constant<int, n>{}, row) for n = 8 rows at a time, then 4, then 1.
template <class Body>
FASTNAS_INLINE inline void by_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) body(std::integral_constant<int, 8>{}, r);
  for (; r + 4 <= rows; r += 4) body(std::integral_constant<int, 4>{}, r);
  for (; r < rows; ++r) body(std::integral_constant<int, 1>{}, r);
}

template <int N, class T, class A>
FASTNAS_INLINE inline void add_moments(double* sum, double* squares, const T* y, int64_t stride, const A* shift,
                                       int64_t lanes) {
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    A s = 0, q = 0;
    for (int r = 0; r < N; ++r) {
      const A d = load(y[r * stride + i]) - shift[i];
      s += d;
      q += d * d;
    }
    sum[i] += static_cast<double>(s);
    squares[i] += static_cast<double>(q);
  }
}

// sum[lane] += sum over rows of d, squares[lane] += that of d^2, d = y - shift[lane].
template <class T, class A>
FASTNAS_INLINE inline void moments(double* sum, double* squares, Rows<const T> y, const A* shift, int64_t rows,
                                   int64_t lanes) {
  by_rows(rows,
          [&](auto n, int64_t r) FASTNAS_INLINE { add_moments<n()>(sum, squares, y[r], y.stride, shift, lanes); });
}

template <int N, class T>
FASTNAS_INLINE inline void add_totals(double* sum, const T* g, int64_t stride, int64_t lanes) {
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    acc_t<T> s = 0;
    for (int r = 0; r < N; ++r) s += load(g[r * stride + i]);
    sum[i] += static_cast<double>(s);
  }
}

// sum[lane] += sum over rows of g.
template <class T>
FASTNAS_INLINE inline void totals(double* sum, Rows<const T> g, int64_t rows, int64_t lanes) {
  by_rows(rows, [&](auto n, int64_t r) FASTNAS_INLINE { add_totals<n()>(sum, g[r], g.stride, lanes); });
}

template <int N, class T, class A>
FASTNAS_INLINE inline void add_dots(double* sum, const T* g, int64_t g_stride, const T* y, int64_t y_stride,
                                    const A* mean, int64_t lanes) {
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    A s = 0;
    for (int r = 0; r < N; ++r) s += load(g[r * g_stride + i]) * (load(y[r * y_stride + i]) - mean[i]);
    sum[i] += static_cast<double>(s);
  }
}

// sum[lane] += sum over rows of g * (y - mean[lane]).
template <class T, class A>
FASTNAS_INLINE inline void centred_dots(double* sum, Rows<const T> g, Rows<const T> y, const A* mean, int64_t rows,
                                        int64_t lanes) {
  by_rows(rows,
          [&](auto n, int64_t r) FASTNAS_INLINE { add_dots<n()>(sum, g[r], g.stride, y[r], y.stride, mean, lanes); });
}

// scale * (x - centre): the normalised x times its weight.
template <class Coefficient>
struct Term {
  Coefficient scale, centre;
};

// acc = (First ? bias : acc) + the sum of N terms from x on.
template <int N, bool First, class T, class A, class Coefficient>
FASTNAS_INLINE inline void add_terms(A* acc, const Rows<const T>* x, const Term<Coefficient>* terms, Coefficient bias,
                                     int64_t row, int64_t lanes) {
  const T* p[N];
  Term<Coefficient> v[N];
  for (int j = 0; j < N; ++j) {
    p[j] = x[j][row];
    v[j] = terms[j];
  }
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    A sum = First ? bias.at(i) : acc[i];
    for (int j = 0; j < N; ++j) sum += v[j].scale.at(i) * (load(p[j][i]) - v[j].centre.at(i));
    acc[i] = sum;
  }
}

template <bool First, class T, class A, class Coefficient>
FASTNAS_INLINE inline void add_up_to_four(A* acc, const Rows<const T>* x, const Term<Coefficient>* terms,
                                          Coefficient bias, int64_t paths, int64_t row, int64_t lanes) {
  switch (paths) {
    case 1:
      return add_terms<1, First>(acc, x, terms, bias, row, lanes);
    case 2:
      return add_terms<2, First>(acc, x, terms, bias, row, lanes);
    case 3:
      return add_terms<3, First>(acc, x, terms, bias, row, lanes);
    default:
      return add_terms<4, First>(acc, x, terms, bias, row, lanes);
  }
}

// y = bias + the sum of all terms, at least one of them and at most MostLanes lanes.
template <int64_t MostLanes, class T, class Coefficient>
FASTNAS_INLINE inline void sum_of_terms(Rows<T> y, const Rows<const T>* x, const Term<Coefficient>* terms,
                                        Coefficient bias, int64_t paths, int64_t rows, int64_t lanes) {
  using A = acc_t<T>;
  A scratch[std::is_same_v<T, A> ? 1 : MostLanes];
  for (int64_t r = 0; r < rows; ++r) {
    A* acc;
    if constexpr (std::is_same_v<T, A>) {
      acc = y[r];
    } else {
      acc = scratch;
    }
    add_up_to_four<true>(acc, x, terms, bias, paths, r, lanes);
    for (int64_t k = 4; k < paths; k += 4) add_up_to_four<false>(acc, x + k, terms + k, bias, paths - k, r, lanes);
    if constexpr (!std::is_same_v<T, A>) {
      T* out = y[r];
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) store(out + i, scratch[i]);
    }
  }
}

// dy = P g + Q (y - mean) + R: the gradient through the weighted normalised y.
template <class Coefficient>
struct Gradient {
  Coefficient p, q, mean, r;
};

// `large`: past the caches where that can be.
template <class T, class Coefficient>
FASTNAS_INLINE inline void norm_grad(Rows<T> dy, Rows<const T> g, Rows<const T> y, Gradient<Coefficient> c,
                                     int64_t rows, int64_t lanes, bool large) {
  for (int64_t r = 0; r < rows; ++r) {
    T* out = dy[r];
    const T *gs = g[r], *ys = y[r];
    if constexpr (kStreams<T>) {
      if (large) {
        stream_each(out, lanes, [&](int64_t i, auto gi) FASTNAS_INLINE {
          auto yi = gi;
          read(gs + i, gi);
          read(ys + i, yi);
          return c.p.at(i, gi) * gi + (c.q.at(i, gi) * (yi - c.mean.at(i, gi)) + c.r.at(i, gi));
        });
        continue;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i)
      store(out + i, c.p.at(i) * load(gs[i]) + (c.q.at(i) * (load(ys[i]) - c.mean.at(i)) + c.r.at(i)));
  }
}

// dx = P g, in the same way.
template <class T, class Coefficient>
FASTNAS_INLINE inline void scaled(Rows<T> dx, Rows<const T> g, Coefficient p, int64_t rows, int64_t lanes, bool large) {
  for (int64_t r = 0; r < rows; ++r) {
    T* out = dx[r];
    const T* gs = g[r];
    if constexpr (kStreams<T>) {
      if (large) {
        stream_each(out, lanes, [&](int64_t i, auto gi) FASTNAS_INLINE {
          read(gs + i, gi);
          return p.at(i, gi) * gi;
        });
        continue;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) store(out + i, p.at(i) * load(gs[i]));
  }
}

}  // namespace fastnas::norm
