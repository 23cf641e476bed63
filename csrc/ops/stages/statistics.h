#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/stages/chunks.h"
#include "ops/stages/columns.h"
#include "ops/stages/map.h"
#include "ops/stages/scratch.h"

namespace fastnas {

// Mean and biased variance over a batch, from those of its images. Each image is measured around the mean of its
// first eighth while it is still in the cache: that is at most sqrt(7) deviations off the mean of all, whatever the
// image, so squares around it cancel by a factor of 8 at most. The images are put together in their order, whichever
// thread measured them.
template <class T>
class Statistics {
 public:
  Statistics(int64_t outputs, int64_t batch, int64_t pixels, int64_t channels)
      : outputs_(outputs),
        batch_(batch),
        pixels_(pixels),
        channels_(channels),
        images_(outputs * batch * channels * 2, false) {}

  // A dense image [pixels, channels]; `sums` is the thread's own.
  FASTNAS_INLINE inline void measure(int64_t output, int64_t image, const T* z, ChannelSums<T>& sums) {
    double* mean = images_.data() + (output * batch_ + image) * 2 * channels_;
    double* squares = mean + channels_;
    const int64_t step = sums.step(channels_), head = sums.eighth();
    if (head > 0) {
      sums.sum_rows(
          mean, squares,
          [&](int64_t row, int64_t column, auto& a, auto&) FASTNAS_INLINE {
            std::remove_reference_t<decltype(a)> v;
            read(z + row * step + column, v);
            a += v;
          },
          head);
      for (int64_t c = 0; c < channels_; ++c) mean[c] /= sums.pixels_of(head);
    } else {
      for (int64_t c = 0; c < channels_; ++c) mean[c] = z[c];
    }
    sums.set_centre(mean);
    sums.sum(mean, squares, [&](int64_t row, int64_t column, auto& a, auto& b) FASTNAS_INLINE {
      std::remove_reference_t<decltype(a)> v, m;
      read(z + row * step + column, v);
      read(sums.centre() + column, m);
      v -= m;
      a += v;
      b += v * v;
    });
    for (int64_t c = 0; c < channels_; ++c) {
      const double off = mean[c] / pixels_;
      squares[c] = std::max(0.0, squares[c] - mean[c] * off);
      mean[c] = off + sums.centre()[c];
    }
  }

  // [outputs, 2, channels]
  void write(T* out) const {
    for_each_row_of(outputs_, batch_ * channels_, [&](int64_t begin, int64_t end) FASTNAS_INLINE {
      Scratch<double> sums(2 * channels_, false);
      double *mean = sums.data(), *squares = mean + channels_;
      for (int64_t o = begin; o < end; ++o) {
        std::fill_n(mean, 2 * channels_, 0.0);
        for (int64_t b = 0; b < batch_; ++b) {
          const double* image = images_.data() + (o * batch_ + b) * 2 * channels_;
          const double share = 1.0 / (b + 1), spread = share * pixels_ * b;
#pragma omp simd
          for (int64_t c = 0; c < channels_; ++c) {
            const double step = image[c] - mean[c];
            mean[c] += step * share;
            squares[c] += image[channels_ + c] + step * step * spread;
          }
        }
        for (int64_t c = 0; c < channels_; ++c) {
          out[o * 2 * channels_ + c] = static_cast<T>(mean[c]);
          out[(o * 2 + 1) * channels_ + c] = static_cast<T>(squares[c] / (static_cast<double>(batch_) * pixels_));
        }
      }
    });
  }

 private:
  int64_t outputs_, batch_, pixels_, channels_;
  Scratch<double> images_;
};

}  // namespace fastnas
