#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/stream.h"
#include "common/weighted_sum.h"
#include "common/widened.h"
#include "ops/partial_shuffle_pixel.h"

// partial_shuffle backward: `planes` in NCHW, `pixels` in channels last.

namespace fastnas::shuffle {

template <class T>
struct Backward {
  Sizes s;
  Places from;
  std::vector<acc_t<T>> w;
  Map<T> g;
  std::vector<Map<T>> mixed;  // empty when the weights need no gradient
  std::vector<Map<T>> dmixed;
  Map<T> bypass, dbypass;
  bool bypass_grad;
  double* dots;  // [batch, mixed runs, paths]

  FASTNAS_INLINE void unmix_run(double* dot, const T* gp, int64_t b, int64_t c, int64_t h, int64_t total) const {
    acc_t<T> scratch[kBlock];
    for (int64_t start = 0; start < total; start += kBlock) {
      const int64_t n = std::min(kBlock, total - start);
      const acc_t<T>* wide = widened(gp + start, n, scratch);
      for (size_t k = 0; k < dmixed.size(); ++k) {
        T* dx = dmixed[k].at(b, c, h) + start;
        if (mixed.empty()) {
          unmix(dx, wide, w[k], n, s.large);
        } else {
          dot[k] += unmix(dx, wide, mixed[k].at(b, c, h) + start, w[k], n, s.large);
        }
      }
    }
  }

  FASTNAS_INLINE void planes(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), run = unit % s.runs() - s.mixed_runs();
      if (run < 0) {
        const int64_t j = run + s.mixed_runs();
        mixed_run(dots + (b * s.mixed_runs() + j) * dmixed.size(), b, j * s.run);
      } else if (bypass_grad) {
        for (int64_t c = run * s.run; c < std::min((run + 1) * s.run, s.bypass); ++c) bypass_plane(b, c);
      }
    }
  }

  FASTNAS_INLINE void mixed_run(double* dot, int64_t b, int64_t c) const {
    const int64_t count = std::min(s.run, s.mixed - c), plane = s.plane();
    if (count == 1) return unmix_run(dot, g.at(b, from.mixed[c]), b, c, 0, plane);
    T gathered[kBlock];
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(gathered + j * plane, g.at(b, from.mixed[c + j]), plane * sizeof(T));
    unmix_run(dot, gathered, b, c, 0, count * plane);
  }

  FASTNAS_INLINE void bypass_plane(int64_t b, int64_t c) const {
    const int64_t plane = s.bypass_height * s.bypass_width;
    T* dx = dbypass.at(b, c);
    if (from.bypass[c] < 0) {
      std::fill_n(dx, plane, T{});
    } else if (s.pool) {
      for (int64_t h = 0; h < s.height; ++h)
        unpool_rows(dx + 2 * h * s.bypass_width, g.at(b, from.bypass[c]) + h * s.width, b, c, 2 * h);
    } else {
      copy_out(dx, g.at(b, from.bypass[c]), plane, s.large);
    }
  }

  FASTNAS_INLINE void unpool_rows(T* dx, const T* gp, int64_t b, int64_t c, int64_t h) const {
    const int64_t width = s.bypass_width;
    const T* top = bypass.at(b, c, h);
    if (h + 1 >= s.bypass_height) {
      unpool_row<false>(dx, dx, top, top, bypass.w, gp, width);
    } else if (bypass.w == 1) {  // a known step is vectorised
      unpool_row<true>(dx, dx + width, top, top + bypass.h, 1, gp, width);
    } else {
      unpool_row<true>(dx, dx + width, top, top + bypass.h, bypass.w, gp, width);
    }
  }

  FASTNAS_INLINE void pixels(int64_t begin, int64_t end) const {
    const bool straight = !s.pool && bypass_grad, by_row = straight && s.large;
    std::vector<T> g_mixed(s.run * s.piece()), g_pooled(s.bypass), outside(s.bypass), ignored(s.bypass);
    std::vector<T> row(by_row ? s.width * s.bypass : 0);
    for (T& v : outside) store(&v, kOutside<acc_t<T>>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), top = unit % s.runs() * s.run, bottom = std::min(top + s.run, s.height);
      T* m = g_mixed.data();
      for (int64_t h = top; h < bottom; ++h) {
        T* to = by_row ? row.data() : straight ? dbypass.at(b, 0, h) : g_pooled.data();
        for (int64_t i = 0; i < s.width; ++i, m += s.mixed) {
          gather_pixel(m, straight ? to + i * s.bypass : to, g.at(b, 0, h, i));
          if (s.pool && bypass_grad)
            unpool_pixel(Window<T>(dbypass, s, b, h, i, ignored.data()).pixel,
                         Window<T>(bypass, s, b, h, i, outside.data()).pixel, to, s.bypass);
        }
        if (by_row) copy_out(dbypass.at(b, 0, h), to, s.width * s.bypass, true);
      }
      unmix_run(dots + unit * dmixed.size(), g_mixed.data(), b, 0, top, (bottom - top) * s.piece());
    }
  }

  FASTNAS_INLINE void gather_pixel(T* mixture, T* straight, const T* gp) const {
    if (from.groups) {
      with_groups(from.groups,
                  [&](auto groups) FASTNAS_INLINE { unshuffle_pixel(mixture, straight, gp, s.mixed, groups); });
    } else {
      copy_pixel(straight, gp, s.bypass);
      for (int64_t j = 0; j < s.mixed; ++j) {
        mixture[j] = gp[from.mixed[j]];
        straight[from.mixed[j]] = T{};
      }
    }
  }
};

}  // namespace fastnas::shuffle
