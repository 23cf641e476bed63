#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/stages/conv_stage_loops.h"
#include "ops/stages/conv_stage_plan.h"

// What conv_stage does with an image both forward and backward: relu into a buffer with a border, and the depthwise
// convolution of it.

namespace fastnas {

// What relu takes: x, or (x - mean) * norm.
template <class T>
struct Input {
  const T* x;
  int64_t pixel;         // elements from one pixel to the next
  const T *mean, *norm;  // repeated, or null
};

// relu of pixels `x_step` apart.
template <class T>
FASTNAS_INLINE inline void activate_row(T* out, const Frame<T>& f, const Input<T>& in, const T* x, int64_t x_step,
                                        int64_t pixels) {
  const auto each = [&](const auto& body) FASTNAS_INLINE {
    if (f.flat && x_step == f.channels) return for_each_dense_value<T>(pixels, f.channels, body);
    for_each_value<T>(pixels, f.channels, body);
  };
  if (in.mean) {
    each([&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
      auto mean = v, norm = v;
      read(x + p * x_step + c, v);
      read(in.mean + c, mean);
      read(in.norm + c, norm);
      v = (v - mean) * norm;
      write(out + p * f.pitch + c, v > 0 ? v : decltype(v){});
    });
  } else {
    each([&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
      read(x + p * x_step + c, v);
      write(out + p * f.pitch + c, v > 0 ? v : decltype(v){});
    });
  }
}

// relu of an image, inside its border of zeros.
template <class T>
FASTNAS_INLINE inline void activate(T* padded, const Frame<T>& f, const Input<T>& in) {
  for (int64_t y = 0; y < f.height; ++y) {
    T* row = padded + (y + f.border) * f.padded_row();
    const T* x = in.x + y * f.width * in.pixel;
    for (int64_t first = 0; first < std::min(f.stride, f.width); ++first)
      activate_row(row + f.column(f.border + first), f, in, x + first * in.pixel, f.stride * in.pixel,
                   ceil_div(f.width - first, f.stride));
  }
}

// The depthwise convolution of a flat image at stride 1: squares where there is room for them, and what is left of the
// rows.
template <class T, int Taps>
FASTNAS_INLINE inline void convolve_flat(bool add, T* out, const T* in, int64_t in_row,
                                         const typename Part<T>::Offsets& offsets, const T* kernel, const Frame<T>& f,
                                         const Part<T>& part) {
  constexpr int64_t side = side_of(Taps);
  const int64_t positions = f.positions(f.width), row = f.row(f.width), apart = part.spacing;
  const int64_t columns = positions / kAcross * kAcross;
  for (int64_t y = 0; y < f.height; ++y) {
    // Row number r of `count` that are as far apart as the kernel's.
    const int64_t r = y / apart, count = ceil_div(f.height - y % apart, apart), left = count - r;
    T* to = out + y * row;
    const T* from = in + y * in_row;
    const bool squares = r < count / kSquare * kSquare;
    if (squares && r % kSquare == 0)
      for (int64_t j = 0; j < columns * f.step; j += kAcross * f.step)
        square_tile<T, side>(add, to + j, apart * row, from + j, apart * in_row, offsets.data(), kernel,
                             std::max<int64_t>(0, side / 2 - r), left + side / 2);
    const int64_t done = squares ? columns : 0;
    if (done == positions) continue;
    const auto rest = [&](auto adds) FASTNAS_INLINE {
      depthwise_row<T, Taps, adds>(to + done * f.step, from + done * f.step, offsets.data(), kernel,
                                   part.rows_at(y, f.height), positions - done, f.vectors, f.step);
    };
    add ? rest(std::true_type{}) : rest(std::false_type{});
  }
}

// out (+)= the depthwise convolution of an image whose rows are `in_row` apart, by the fastest of the ways: rows of the
// output's size, without border.
template <class T, int Taps, int Dilation>
FASTNAS_INLINE inline void convolve_image(bool add, T* out, const T* in, int64_t in_row,
                                          const typename Part<T>::Offsets& offsets, const T* kernel, const Frame<T>& f,
                                          const Part<T>& part) {
  if constexpr (Taps > 1 && Dilation == 0)
    if (f.flat && f.stride == 1) return convolve_flat<T, Taps>(add, out, in, in_row, offsets, kernel, f, part);
  const auto rows = [&](auto adds) FASTNAS_INLINE {
    for (int64_t y = 0; y < f.out_height; ++y)
      convolve_row<T, Taps, Dilation, adds>(out + y * f.row(f.out_width), in + y * in_row, offsets.data(), kernel,
                                            part.rows_at(y * f.stride, f.height), f.positions(f.out_width), f.vectors,
                                            f.step);
  };
  add ? rows(std::true_type{}) : rows(std::false_type{});
}

template <class T>
FASTNAS_INLINE inline void depthwise(T* out, const T* padded, const Frame<T>& f, const Part<T>& part) {
  dispatch_taps(part.taps, part.dilation, [&](auto taps, auto dilation) FASTNAS_INLINE {
    convolve_image<T, taps, dilation>(false, out, padded, f.padded_row_step(), part.offsets, part.kernel, f, part);
  });
}

// Whether a part takes the pixels of the activated image as they are and where they are.
template <class T>
inline bool is_direct(const Frame<T>& f, const Part<T>& part) {
  return !part.depthwise && f.stride == 1 && f.border == 0;
}

// What the pointwise convolution reads: rows of the output's size, without border.
template <class T>
FASTNAS_INLINE inline const T* pointwise_input(T* deep, const T* padded, const Frame<T>& f, const Part<T>& part) {
  if (is_direct(f, part)) return padded;
  depthwise(deep, padded, f, part);
  return deep;
}

// Where the pixels of a buffer follow each other without gaps an image is one long row.
template <class T>
struct Run {
  int64_t rows, pixels;
  explicit Run(const Frame<T>& f)
      : rows(f.flat ? f.out_height : 1), pixels(f.flat ? f.out_width : f.out_height * f.out_width) {}
};

}  // namespace fastnas
