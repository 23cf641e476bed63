#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/stream.h"

namespace fastnas {

// Elements of a block: its sums stay in the level 1 cache while the paths stream by.
constexpr int64_t kBlock = 4096;

// acc[i] (+)= sum of the N paths from x on, so that each pass over acc serves N streams.
template <int N, class T, class A>
FASTNAS_INLINE inline void add_paths(A* acc, const T* const* x, const A* w, int64_t n, bool first) {
  const T* p[N];
  A v[N];
  for (int j = 0; j < N; ++j) {
    p[j] = x[j];
    v[j] = w[j];
  }
  if (first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A sum = v[0] * load(p[0][i]);
      for (int j = 1; j < N; ++j) sum += v[j] * load(p[j][i]);
      acc[i] = sum;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A sum = acc[i];
      for (int j = 0; j < N; ++j) sum += v[j] * load(p[j][i]);
      acc[i] = sum;
    }
  }
}

// y[i] = sum_k w[k] * x[k][i] for i < n <= kBlock, accumulated in acc_t<T>; zero when there are no paths.
template <class T>
FASTNAS_INLINE inline void weighted_sum(T* y, const T* const* x, const acc_t<T>* w, int64_t paths, int64_t n) {
  using A = acc_t<T>;
  A scratch[kBlock];
  A* acc;
  if constexpr (std::is_same_v<T, A>) {
    acc = y;
  } else {
    acc = scratch;
  }
  if (paths == 0) {
    for (int64_t i = 0; i < n; ++i) acc[i] = A(0);
  }
  int64_t k = 0;
  for (; k + 4 <= paths; k += 4) add_paths<4>(acc, x + k, w + k, n, k == 0);
  switch (paths - k) {
    case 3:
      add_paths<3>(acc, x + k, w + k, n, k == 0);
      break;
    case 2:
      add_paths<2>(acc, x + k, w + k, n, k == 0);
      break;
    case 1:
      add_paths<1>(acc, x + k, w + k, n, k == 0);
      break;
    default:
      break;
  }
  if constexpr (!std::is_same_v<T, A>) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(y + i, scratch[i]);
  }
}

// g[:n] in the dtype of the sums: itself, or converted once for all paths into scratch[:kBlock].
template <class T>
FASTNAS_INLINE inline const acc_t<T>* widened(const T* g, int64_t n, acc_t<T>* scratch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return g;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = load(g[i]);
    return scratch;
  }
}

// dx[i] = w * g[i]; G is T, or acc_t<T> where g has been widened.
template <class T, class G>
FASTNAS_INLINE inline void scale(T* dx, const G* g, acc_t<T> w, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(dx + i, w * load(g[i]));
}

// dx[i] = w * g[i] for N rows of kDotLanes elements; sum[lane] += sum over rows of g * x.
constexpr int64_t kDotLanes = 16;
template <int N, class A>
FASTNAS_INLINE inline void scale_and_add_dots(double* sum, A* dx, const A* g, const A* x, A w) {
#pragma omp simd
  for (int64_t i = 0; i < kDotLanes; ++i) {
    A s = 0;
    for (int r = 0; r < N; ++r) {
      const A gr = g[r * kDotLanes + i];
      dx[r * kDotLanes + i] = w * gr;
      s += gr * x[r * kDotLanes + i];
    }
    sum[i] += static_cast<double>(s);
  }
}

// dx[i] = w * g[i]; returns sum_i g[i] * x[i]. Sums of eight products run in A, what they add up to in double: nearly
// as exact as double, while converting each product would take longer than the memory does.
template <class A>
FASTNAS_INLINE inline double scale_and_dot(A* dx, const A* g, const A* x, A w, int64_t n) {
  constexpr int kRows = 8;
  double sum[kDotLanes] = {};
  int64_t i = 0;
  for (; i + kRows * kDotLanes <= n; i += kRows * kDotLanes) scale_and_add_dots<kRows>(sum, dx + i, g + i, x + i, w);
  for (; i + kDotLanes <= n; i += kDotLanes) scale_and_add_dots<1>(sum, dx + i, g + i, x + i, w);
  double dot = 0;
  for (; i < n; ++i) {
    dx[i] = w * g[i];
    dot += static_cast<double>(g[i]) * static_cast<double>(x[i]);
  }
  for (double s : sum) dot += s;
  return dot;
}

// scale past the caches.
template <class A>
FASTNAS_INLINE inline void stream_scaled(A* dx, const A* g, A w, int64_t n) {
  stream_each(dx, n, [&](int64_t i, auto v) FASTNAS_INLINE {
    read(g + i, v);
    return w * v;
  });
}

// scale_and_dot with dx, aligned to a line, past the caches.
template <class A>
FASTNAS_INLINE inline double stream_scaled_and_dot(A* dx, const A* g, const A* x, A w, int64_t n) {
  constexpr int kRows = 8;
  double sum[kLanes<A>] = {};
  int64_t i = 0;
  for (; i + kRows * kLanes<A> <= n; i += kRows * kLanes<A>) {
    Vec<A> s{};
#pragma GCC unroll 8
    for (int64_t r = i; r < i + kRows * kLanes<A>; r += kLanes<A>) {
      const Vec<A> gr = get(g + r);
      stream(dx + r, w * gr);
      s += gr * get(x + r);
    }
    A by_lane[kLanes<A>];
    put(by_lane, s);
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) sum[lane] += static_cast<double>(by_lane[lane]);
  }
  double dot = scale_and_dot(dx + i, g + i, x + i, w, n - i);
  for (double s : sum) dot += s;
  return dot;
}

// Asks for n values ahead of their turn. Inlined, because GCC drops calls of functions that only prefetch.
template <class T>
FASTNAS_INLINE inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// scale_and_dot for half-width maps and a gradient that has been widened: conversions are vectorised in loops of their
// own. Reading and writing take turns, so the processor does not run ahead by itself.
template <class T>
  requires(!std::is_same_v<T, acc_t<T>>)
FASTNAS_INLINE inline double scale_and_dot(T* dx, const float* g, const T* x, float w, int64_t n) {
  constexpr int64_t kPiece = 1024;
  float wide[kPiece], scaled[kPiece];
  double dot = 0;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t m = start + kPiece < n ? kPiece : n - start;
    const int64_t ahead = start + 2 * kPiece < n ? kPiece : n - start - m;
    prefetch(x + start + m, ahead);
    prefetch(dx + start + m, ahead);
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) wide[i] = load(x[start + i]);
    dot += scale_and_dot<float>(scaled, g + start, wide, w, m);
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) store(dx + start + i, scaled[i]);
  }
  return dot;
}

// dx = w * g, returns the sum of g * x; `large`: past the caches where that can be.
template <class T>
FASTNAS_INLINE inline double unmix(T* dx, const acc_t<T>* g, const T* x, acc_t<T> w, int64_t n, bool large) {
  if constexpr (kStreams<T>) {
    if (large && is_line(dx)) return stream_scaled_and_dot(dx, g, x, w, n);
  }
  return scale_and_dot(dx, g, x, w, n);
}

// The same without the sum.
template <class T>
FASTNAS_INLINE inline void unmix(T* dx, const acc_t<T>* g, acc_t<T> w, int64_t n, bool large) {
  if constexpr (kStreams<T>) {
    if (large) return stream_scaled(dx, g, w, n);
  }
  scale(dx, g, w, n);
}

}  // namespace fastnas
