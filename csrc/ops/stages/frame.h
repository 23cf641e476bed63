#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/vector.h"
#include "ops/stages/map.h"

// How a stage lays out an image. A buffer holds pixel after pixel, at each pixel its channels. Channels that divide a
// vector are packed without gaps, several pixels to a vector ("flat"); others are filled up to whole vectors. Either
// way a row is `positions` steps of whole vectors, and a tap of a window is a shift of the whole row.

namespace fastnas {

inline int64_t rounded_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// Values by channel are repeated to fill a vector where rows are flat.
template <class T>
int64_t repeated_width(int64_t channels) {
  return channels < kLanes<T> && kLanes<T> % channels == 0 ? kLanes<T> : channels;
}

// [rows][channels] -> [rows][repeated_width]
template <class T>
std::vector<T> repeated(const T* values, int64_t rows, int64_t channels) {
  const int64_t width = repeated_width<T>(channels);
  std::vector<T> out(rows * width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) out[r * width + c] = values[r * channels + c % channels];
  return out;
}

// The images of one call: input [height, width, channels], output [out_height, out_width].
template <class T>
struct Frame {
  int64_t height, width, channels, stride;
  int64_t border = 0;  // of zeros around the input, enough for every kernel
  int64_t out_height, out_width;
  bool flat;
  int64_t pitch;    // elements a pixel
  int64_t vectors;  // a pixel; 1 if flat
  int64_t step;     // elements from one position of a row to the next

  Frame(const Map& x, int64_t s) : height(x.height), width(x.width), channels(x.channels), stride(s) {
    out_height = ceil_div(height, stride);
    out_width = ceil_div(width, stride);
    flat = channels < kLanes<T> && kLanes<T> % channels == 0;
    pitch = flat ? channels : rounded_up(channels, kLanes<T>);
    vectors = flat ? 1 : pitch / kLanes<T>;
    step = flat ? kLanes<T> : pitch;
  }

  // Positions of a row of so many pixels, and its length in a buffer without a border.
  int64_t positions(int64_t pixels) const { return flat ? ceil_div(pixels * channels, kLanes<T>) : pixels; }
  int64_t row(int64_t pixels) const { return positions(pixels) * step; }

  // The input with its border. At stride 2 the even columns of a row come first, then the odd ones, so that what a tap
  // reads for the next output is always the next pixel.
  // Wide enough that the last, partly empty vector of a flat row ends before the next row begins.
  int64_t padded_width() const {
    return rounded_up(std::max(width + 2 * border, border + ceil_div(row(width), pitch)), stride);
  }
  int64_t padded_row() const { return padded_width() * pitch; }
  int64_t padded_size() const { return (height + 2 * border + stride) * padded_row(); }
  int64_t column(int64_t x) const {  // x counted from the left end of the border
    return stride == 1 ? x * pitch : (x % 2 * (padded_width() / 2) + x / 2) * pitch;
  }
  int64_t padded_row_step() const { return stride * padded_row(); }

  // The same for a map of the output's size with a border, which only exists at stride 1.
  int64_t interior() const { return border * padded_row() + column(border); }
};

}  // namespace fastnas
