#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/stages/chunks.h"
#include "ops/stages/columns.h"
#include "ops/stages/scratch.h"

namespace fastnas {

// Sums of g and of g (z - mean) by channel, for several pairs of maps (g, z); made image by image, put together in the
// images' order.
template <class T>
class Dots {
 public:
  Dots(int64_t pairs, int64_t batch, int64_t channels)
      : pairs_(pairs), batch_(batch), channels_(channels), images_(pairs * batch * 2 * channels, false) {}

  // An image of a pair; `g_pixel`, `z_pixel`: elements from one pixel to the next; `sums` is the thread's own.
  FASTNAS_INLINE inline void measure(int64_t pair, int64_t image, const T* g, int64_t g_pixel, const T* z,
                                     int64_t z_pixel, const T* mean, ChannelSums<T>& sums) {
    double* out = images_.data() + (pair * batch_ + image) * 2 * channels_;
    const int64_t g_step = sums.step(g_pixel), z_step = sums.step(z_pixel);
    sums.set_centre(mean);
    sums.sum(out, out + channels_, [&](int64_t row, int64_t column, auto& a, auto& b) FASTNAS_INLINE {
      std::remove_reference_t<decltype(a)> d, v, m;
      read(g + row * g_step + column, d);
      read(z + row * z_step + column, v);
      read(sums.centre() + column, m);
      a += d;
      b += d * (v - m);
    });
  }

  // [pairs, 2, channels]
  void write(T* out) const {
    const int64_t count = 2 * channels_;
    for_each_row_of(pairs_, batch_ * count, [&](int64_t begin, int64_t end) FASTNAS_INLINE {
      Scratch<double> memory(count, false);
      double* sum = memory.data();
      for (int64_t p = begin; p < end; ++p) {
        std::fill_n(sum, count, 0.0);
        for (int64_t b = 0; b < batch_; ++b) {
          const double* image = images_.data() + (p * batch_ + b) * count;
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) sum[c] += image[c];
        }
        for (int64_t c = 0; c < count; ++c) out[p * count + c] = static_cast<T>(sum[c]);
      }
    });
  }

 private:
  int64_t pairs_, batch_, channels_;
  Scratch<double> images_;
};

}  // namespace fastnas
