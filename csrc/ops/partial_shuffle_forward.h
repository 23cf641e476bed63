#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/stream.h"
#include "common/weighted_sum.h"
#include "ops/partial_shuffle_pixel.h"

// partial_shuffle forward: `planes` in NCHW, `pixels` in channels last.

namespace fastnas::shuffle {

template <class T>
struct Forward {
  Sizes s;
  Places to;
  std::vector<acc_t<T>> w;
  std::vector<Map<T>> mixed;
  Map<T> bypass, y;

  FASTNAS_INLINE void mix(T* out, const T** x, int64_t b, int64_t c, int64_t h, int64_t n) const {
    const int64_t paths = static_cast<int64_t>(mixed.size());
    for (int64_t start = 0; start < n; start += kBlock) {
      for (int64_t k = 0; k < paths; ++k) x[k] = mixed[k].at(b, c, h) + start;
      weighted_sum(out + start, x, w.data(), paths, std::min(kBlock, n - start));
    }
  }

  FASTNAS_INLINE void planes(int64_t begin, int64_t end) const {
    std::vector<const T*> x(mixed.size());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), run = unit % s.runs() - s.mixed_runs();
      if (run < 0) {
        mixed_run(x.data(), b, (run + s.mixed_runs()) * s.run);
      } else {
        for (int64_t c = run * s.run; c < std::min((run + 1) * s.run, s.bypass); ++c)
          if (to.bypass[c] >= 0) bypass_plane(b, c);
      }
    }
  }

  FASTNAS_INLINE void mixed_run(const T** x, int64_t b, int64_t c) const {
    const int64_t count = std::min(s.run, s.mixed - c), plane = s.plane();
    if (count == 1) return mix(y.at(b, to.mixed[c]), x, b, c, 0, plane);
    T mixture[kBlock];
    mix(mixture, x, b, c, 0, count * plane);
    for (int64_t j = 0; j < count; ++j) copy_out(y.at(b, to.mixed[c + j]), mixture + j * plane, plane, s.large);
  }

  FASTNAS_INLINE void bypass_plane(int64_t b, int64_t c) const {
    T* out = y.at(b, to.bypass[c]);
    if (!s.pool && bypass.w == 1 && bypass.h == s.width) {
      copy_out(out, bypass.at(b, c), s.plane(), s.large);
    } else {
      for (int64_t h = 0; h < s.height; ++h) bypass_row(out + h * s.width, b, c, h);
    }
  }

  FASTNAS_INLINE void bypass_row(T* out, int64_t b, int64_t c, int64_t h) const {
    if (s.pool) {
      const T* top = bypass.at(b, c, 2 * h);
      const T* bottom = 2 * h + 1 < s.bypass_height ? top + bypass.h : top;
      if (bypass.w == 1) {  // a known step is vectorised
        pool_row(out, top, bottom, 1, s.bypass_width);
      } else {
        pool_row(out, top, bottom, bypass.w, s.bypass_width);
      }
    } else if (bypass.w == 1) {
      std::memcpy(out, bypass.at(b, c, h), s.width * sizeof(T));
    } else {
      for (int64_t i = 0; i < s.width; ++i) out[i] = *bypass.at(b, c, h, i);
    }
  }

  FASTNAS_INLINE void pixels(int64_t begin, int64_t end) const {
    const int64_t channels = y.w;
    std::vector<const T*> x(mixed.size());
    std::vector<T> mixture(s.run * s.piece()), pooled(s.bypass), outside(s.bypass);
    std::vector<T> row(s.large ? s.width * channels : 0);
    for (T& v : outside) store(&v, kOutside<acc_t<T>>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), top = unit % s.runs() * s.run, bottom = std::min(top + s.run, s.height);
      mix(mixture.data(), x.data(), b, 0, top, (bottom - top) * s.piece());
      const T* m = mixture.data();
      for (int64_t h = top; h < bottom; ++h) {
        T* out = s.large ? row.data() : y.at(b, 0, h);
        for (int64_t i = 0; i < s.width; ++i, m += s.mixed) {
          const T* in = bypass.at(b, 0, h, i);
          if (s.pool) {
            pool_pixel(pooled.data(), Window<T>(bypass, s, b, h, i, outside.data()).pixel, s.bypass);
            in = pooled.data();
          }
          spread_pixel(out + i * channels, m, in);
        }
        if (s.large) copy_out(y.at(b, 0, h), out, s.width * channels, true);
      }
    }
  }

  FASTNAS_INLINE void spread_pixel(T* out, const T* mixture, const T* in) const {
    if (to.groups) {
      with_groups(to.groups, [&](auto groups) FASTNAS_INLINE { shuffle_pixel(out, mixture, in, s.mixed, groups); });
    } else {
      copy_pixel(out, in, s.bypass);
      for (int64_t j = 0; j < s.mixed; ++j) out[to.mixed[j]] = mixture[j];
    }
  }
};

}  // namespace fastnas::shuffle
