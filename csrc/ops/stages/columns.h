#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/vector.h"

namespace fastnas {

// Sums by channel over images of `pixels`, in T over 64 rows at a time (times four) and in double over these. Where
// pixels have no gaps ("dense") and channels divide a vector, several pixels make a row of one vector; else a row is a
// pixel.
template <class T>
class ChannelSums {
 public:
  ChannelSums(int64_t pixels, int64_t channels, bool dense = true)
      : channels_(channels),
        width_(dense && channels < kLanes<T> && kLanes<T> % channels == 0 ? kLanes<T> : channels),
        rows_(pixels * channels / width_),
        rest_(pixels * channels % width_),
        first_(width_),
        second_(width_),
        centre_(width_) {}

  // Elements from one row to the next of a map whose pixels are `pixel` elements apart.
  int64_t step(int64_t pixel) const { return width_ == channels_ ? pixel : width_; }

  // What to subtract, by channel, for terms to read by column.
  template <class A>
  FASTNAS_INLINE inline void set_centre(const A* centre) {
    for (int64_t c = 0; c < width_; ++c) centre_[c] = static_cast<T>(centre[c % channels_]);
  }
  const T* centre() const { return centre_.data(); }

  // An eighth of the image, as rows, and how many pixels these are.
  int64_t eighth() const { return rows_ / 8; }
  int64_t pixels_of(int64_t rows) const { return rows * (width_ / channels_); }

  // first[c], second[c] = sums of a and b, to which term(row, column, a, b) adds what is there: vectors or numbers.
  template <class Term>
  FASTNAS_INLINE inline void sum(double* first, double* second, const Term& term) {
    sum_rows(first, second, term, rows_, rest_);
  }
  // The same over the first rows only.
  template <class Term>
  FASTNAS_INLINE inline void sum_rows(double* first, double* second, const Term& term, int64_t rows, int64_t rest = 0) {
    std::fill(first_.begin(), first_.end(), 0.0);
    std::fill(second_.begin(), second_.end(), 0.0);
    for (int64_t start = 0; start < rows; start += kRowsInFull) {
      const int64_t end = std::min(rows, start + kRowsInFull);
      int64_t c = 0;
      for (; c + kLanes<T> <= width_; c += kLanes<T>) {
        Vec<T> a[kTogether]{}, b[kTogether]{};
        int64_t r = start;
        for (; r + kTogether <= end; r += kTogether) {
#pragma GCC unroll 4
          for (int i = 0; i < kTogether; ++i) term(r + i, c, a[i], b[i]);
        }
        for (; r < end; ++r) term(r, c, a[0], b[0]);
        for (int i = 1; i < kTogether; ++i) {
          a[0] += a[i];
          b[0] += b[i];
        }
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          first_[c + lane] += a[0][lane];
          second_[c + lane] += b[0][lane];
        }
      }
      for (; c < width_; ++c) {
        T a = 0, b = 0;
        for (int64_t r = start; r < end; ++r) term(r, c, a, b);
        first_[c] += a;
        second_[c] += b;
      }
    }
    for (int64_t c = 0; c < rest; ++c) {
      T a = 0, b = 0;
      term(rows, c, a, b);
      first_[c] += a;
      second_[c] += b;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      first[c] = second[c] = 0;
      for (int64_t column = c; column < width_; column += channels_) {
        first[c] += first_[column];
        second[c] += second_[column];
      }
    }
  }

 private:
  static constexpr int kTogether = 4;  // independent sums, 64 rows each
  static constexpr int64_t kRowsInFull = 64 * kTogether;
  int64_t channels_, width_, rows_, rest_;
  std::vector<double> first_, second_;
  std::vector<T> centre_;
};

}  // namespace fastnas
