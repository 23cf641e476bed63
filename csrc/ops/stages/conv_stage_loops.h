#pragma once

#include <algorithm>
#include <cstdint>

#include "common/vector.h"

// The inner loops of conv_stage, on rows of positions (see conv_stage_plan.h). All of them are bound by the two
// multiply-adds a cycle of a core; tiles of sums stay in registers so that the loads keep up.

namespace fastnas {

constexpr int side_of(int taps) { return taps == 25 ? 5 : taps == 9 ? 3 : 1; }

// The rows of a kernel that meet the image: those that only meet its border of zeros are left out.
struct KernelRows {
  int begin, end;
};

// out[j] (+)= sum_t kernel[t] * in[j + offsets[t]] for `positions` positions, `vectors` vectors each.
template <class T, int Taps, int Tile, bool Add>
FASTNAS_INLINE inline void depthwise_tile(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                          int64_t step) {
  Vec<T> sum[Tile];
#pragma GCC unroll 16
  for (int j = 0; j < Tile; ++j) sum[j] = Add ? get(out + j * step) : Vec<T>{};
  for (int t = rows.begin * side_of(Taps); t < rows.end * side_of(Taps); ++t) {
    const Vec<T> w = get(kernel + t * kLanes<T>);
    const T* p = in + offsets[t];
#pragma GCC unroll 16
    for (int j = 0; j < Tile; ++j) sum[j] += get(p + j * step) * w;
  }
#pragma GCC unroll 16
  for (int j = 0; j < Tile; ++j) put(out + j * step, sum[j]);
}

template <class T, int Taps, bool Add>
FASTNAS_INLINE inline void depthwise_row(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                         int64_t positions, int64_t vectors, int64_t step) {
  for (int64_t v = 0; v < vectors; ++v) {
    T* o = out + v * kLanes<T>;
    const T* i = in + v * kLanes<T>;
    const T* k = kernel + v * Taps * kLanes<T>;
    int64_t j = 0;
    for (; j + 8 <= positions; j += 8)
      depthwise_tile<T, Taps, 8, Add>(o + j * step, i + j * step, offsets, k, rows, step);
    for (; j + 4 <= positions; j += 4)
      depthwise_tile<T, Taps, 4, Add>(o + j * step, i + j * step, offsets, k, rows, step);
    for (; j < positions; ++j) depthwise_tile<T, Taps, 1, Add>(o + j * step, i + j * step, offsets, k, rows, step);
  }
}

// The same at stride 1 where the taps of a kernel's row are Dilation positions apart: an input is loaded once for all
// of them, so that loads are fewer than multiply-adds. Offsets are those of a whole kernel, in ascending order. Left,
// Right: the tile begins or ends the row, and what it would read beyond is zero.
template <class T, int Side, int Dilation, int Tile, bool Add, bool Left, bool Right>
FASTNAS_INLINE inline void window_tile(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                       int64_t step) {
  constexpr int reach = (Side - 1) * Dilation;
  constexpr int begin = Left ? reach / 2 : 0, end = Tile + (Right ? reach / 2 : reach);
  Vec<T> sum[Tile];
#pragma GCC unroll 16
  for (int j = 0; j < Tile; ++j) sum[j] = Add ? get(out + j * step) : Vec<T>{};
#pragma GCC unroll 1
  for (int y = rows.begin; y < rows.end; ++y) {
    const T* p = in + offsets[y * Side];
    Vec<T> w[Side];
#pragma GCC unroll 5
    for (int x = 0; x < Side; ++x) w[x] = get(kernel + (y * Side + x) * kLanes<T>);
#pragma GCC unroll 16
    for (int i = begin; i < end; ++i) {
      const Vec<T> value = get(p + i * step);
#pragma GCC unroll 5
      for (int x = 0; x < Side; ++x)
        if (i - x * Dilation >= 0 && i - x * Dilation < Tile) sum[i - x * Dilation] += value * w[x];
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < Tile; ++j) put(out + j * step, sum[j]);
}

template <class T, int Side, int Dilation, bool Add>
FASTNAS_INLINE inline void window_row(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                      int64_t positions, int64_t vectors, int64_t step) {
  constexpr int taps = Side * Side;
  for (int64_t v = 0; v < vectors; ++v) {
    T* o = out + v * kLanes<T>;
    const T* i = in + v * kLanes<T>;
    const T* k = kernel + v * taps * kLanes<T>;
    int64_t j = 0;
    const auto tile = [&](auto size, auto left, auto right) FASTNAS_INLINE {
      window_tile<T, Side, Dilation, size, Add, left, right>(o + j * step, i + j * step, offsets, k, rows, step);
      j += size;
    };
    constexpr std::integral_constant<int, 8> eight;
    constexpr std::integral_constant<int, 4> four;
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (positions == 8) tile(eight, yes, yes);
    if (j == 0 && positions > 8) tile(eight, yes, no);
    while (j + 8 < positions) tile(eight, no, no);
    if (j + 8 == positions) tile(eight, no, yes);
    while (j + 4 <= positions) tile(four, no, no);
    for (; j < positions; ++j) depthwise_tile<T, taps, 1, Add>(o + j * step, i + j * step, offsets, k, rows, step);
  }
}

// kSquare rows of kAcross positions of a flat image: there taps are not whole positions apart, but what one of them
// reads serves the kernel's other rows for the output's next rows. Rows are `out_row` and `in_row` elements apart, and
// of those of the input that the tile needs only [begin, end) are not border. Offsets: of the taps of the kernel's
// first row.
constexpr int64_t kSquare = 4, kAcross = kRegisters / 8;

template <class T, int Side>
FASTNAS_INLINE inline void square_tile(bool add, T* out, int64_t out_row, const T* in, int64_t in_row,
                                       const int64_t* offsets, const T* kernel, int64_t begin, int64_t end) {
  Vec<T> sum[kSquare][kAcross];
#pragma GCC unroll 4
  for (int r = 0; r < kSquare; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) sum[r][j] = add ? get(out + r * out_row + j * kLanes<T>) : Vec<T>{};
  }
#pragma GCC unroll 1
  for (int x = 0; x < Side; ++x) {
    Vec<T> w[Side];
#pragma GCC unroll 5
    for (int y = 0; y < Side; ++y) w[y] = get(kernel + (y * Side + x) * kLanes<T>);
    const T* p = in + offsets[x];
#pragma GCC unroll 8
    for (int i = 0; i < kSquare + Side - 1; ++i) {
      if (i < begin || i >= end) continue;
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) {
        const Vec<T> value = get(p + i * in_row + j * kLanes<T>);
#pragma GCC unroll 4
        for (int r = 0; r < kSquare; ++r)
          if (i - r >= 0 && i - r < Side) sum[r][j] += value * w[i - r];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kSquare; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) put(out + r * out_row + j * kLanes<T>, sum[r][j]);
  }
}

// out[j + offsets[t]] += kernel[t] * in[j]: the gradient of a strided row's input.
template <class T, int Taps>
FASTNAS_INLINE inline void scatter_row(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                       int64_t positions, int64_t vectors, int64_t step) {
  for (int64_t v = 0; v < vectors; ++v)
    for (int t = rows.begin * side_of(Taps); t < rows.end * side_of(Taps); ++t) {
      const Vec<T> w = get(kernel + (v * Taps + t) * kLanes<T>);
      T* o = out + offsets[t] + v * kLanes<T>;
      const T* i = in + v * kLanes<T>;
      for (int64_t j = 0; j < positions; ++j) put(o + j * step, get(o + j * step) + get(i + j * step) * w);
    }
}

// Gradients of weights add up an image first, then the images: one long chain of additions would lose digits.
template <class T>
FASTNAS_INLINE inline void add_to(T* gradient, Vec<T> sum) {
  put(gradient, get(gradient) + sum);
}

// sum[t] += g[j] * in[j + offsets[t]] for Together neighbouring positions, so that an offset is loaded once for them.
template <class T, int Taps, int Together>
FASTNAS_INLINE inline void kernel_gradient_step(Vec<T>* sum, const T* g, const T* in, const int64_t* offsets,
                                                int64_t step) {
  Vec<T> gs[Together];
#pragma GCC unroll 16
  for (int j = 0; j < Together; ++j) gs[j] = get(g + j * step);
#pragma GCC unroll 25
  for (int t = 0; t < Taps; ++t) {
    const T* p = in + offsets[t];
#pragma GCC unroll 16
    for (int j = 0; j < Together; ++j) sum[t] += get(p + j * step) * gs[j];
  }
}

// gradient[v][t] += sum over rows and positions of g[j] * in[j + offsets[t]]: of a depthwise kernel.
template <class T, int Taps>
FASTNAS_INLINE inline void kernel_gradient(T* gradient, const T* g, int64_t g_row, const T* in, int64_t in_row,
                                           const int64_t* offsets, int64_t rows, int64_t positions, int64_t vectors,
                                           int64_t step) {
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<T> sum[Taps];
#pragma GCC unroll 25
    for (int t = 0; t < Taps; ++t) sum[t] = Vec<T>{};
    for (int64_t y = 0; y < rows; ++y) {
      const T* gs = g + y * g_row + v * kLanes<T>;
      const T* i = in + y * in_row + v * kLanes<T>;
      int64_t j = 0;
      for (; j + 4 <= positions; j += 4)
        kernel_gradient_step<T, Taps, 4>(sum, gs + j * step, i + j * step, offsets, step);
      for (; j < positions; ++j) kernel_gradient_step<T, Taps, 1>(sum, gs + j * step, i + j * step, offsets, step);
    }
#pragma GCC unroll 25
    for (int t = 0; t < Taps; ++t) add_to(gradient + (v * Taps + t) * kLanes<T>, sum[t]);
  }
}

// The same at stride 1 where the taps of a kernel's row are Dilation positions apart. rows_of(y): the KernelRows of
// row y.
template <class T, int Side, int Dilation, class RowsOf>
FASTNAS_INLINE inline void window_gradient(T* gradient, const T* g, int64_t g_row, const T* in, int64_t in_row,
                                           const int64_t* offsets, const RowsOf& rows_of, int64_t rows,
                                           int64_t positions, int64_t vectors, int64_t step) {
  constexpr int taps = Side * Side, together = 4;
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<T> sum[taps];
#pragma GCC unroll 25
    for (int t = 0; t < taps; ++t) sum[t] = Vec<T>{};
    for (int64_t y = 0; y < rows; ++y) {
      const T* gs = g + y * g_row + v * kLanes<T>;
      const T* input = in + y * in_row + v * kLanes<T>;
      const KernelRows met = rows_of(y);
      int64_t j = 0;
      for (; j + together <= positions; j += together) {
        Vec<T> gj[together];
#pragma GCC unroll 4
        for (int n = 0; n < together; ++n) gj[n] = get(gs + (j + n) * step);
#pragma GCC unroll 5
        for (int ky = 0; ky < Side; ++ky) {
          if (ky < met.begin || ky >= met.end) continue;
          const T* p = input + offsets[ky * Side] + j * step;
#pragma GCC unroll 16
          for (int i = 0; i < together + (Side - 1) * Dilation; ++i) {
            const Vec<T> value = get(p + i * step);
#pragma GCC unroll 5
            for (int kx = 0; kx < Side; ++kx)
              if (i - kx * Dilation >= 0 && i - kx * Dilation < together)
                sum[ky * Side + kx] += value * gj[i - kx * Dilation];
          }
        }
      }
      for (; j < positions; ++j) kernel_gradient_step<T, taps, 1>(sum, gs + j * step, input + j * step, offsets, step);
    }
#pragma GCC unroll 25
    for (int t = 0; t < taps; ++t) add_to(gradient + (v * taps + t) * kLanes<T>, sum[t]);
  }
}

// sum[t] += g[j] * in[j + offsets[t]] for Rows rows of a flat image: what a tap reads serves the taps above it for the
// next rows of g. Rows are `g_row` and `in_row` elements apart, as far as the kernel's. Offsets: of the taps of the
// kernel's first row.
template <class T, int Side, int Rows>
FASTNAS_INLINE inline void square_gradient_rows(Vec<T>* sum, const T* g, int64_t g_row, const T* in, int64_t in_row,
                                                const int64_t* offsets, int64_t positions) {
  for (int64_t j = 0; j < positions; ++j) {
    Vec<T> gs[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) gs[r] = get(g + r * g_row + j * kLanes<T>);
#pragma GCC unroll 5
    for (int x = 0; x < Side; ++x) {
      const T* p = in + offsets[x] + j * kLanes<T>;
#pragma GCC unroll 8
      for (int i = 0; i < Rows + Side - 1; ++i) {
        const Vec<T> value = get(p + i * in_row);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          if (i - r >= 0 && i - r < Side) sum[(i - r) * Side + x] += value * gs[r];
      }
    }
  }
}

// kernel_gradient of a flat image at stride 1 whose taps are `apart` rows apart.
template <class T, int Side>
FASTNAS_INLINE inline void square_gradient(T* gradient, const T* g, int64_t g_row, const T* in, int64_t in_row,
                                           const int64_t* offsets, int64_t rows, int64_t apart, int64_t positions) {
  constexpr int taps = Side * Side;
  Vec<T> sum[taps];
#pragma GCC unroll 25
  for (int t = 0; t < taps; ++t) sum[t] = Vec<T>{};
  for (int64_t first = 0; first < std::min(apart, rows); ++first) {
    int64_t y = first;
    const auto some = [&](auto count) FASTNAS_INLINE {
      square_gradient_rows<T, Side, count>(sum, g + y * g_row, apart * g_row, in + y * in_row, apart * in_row, offsets,
                                           positions);
      y += count * apart;
    };
    while (y + (kSquare - 1) * apart < rows) some(std::integral_constant<int, kSquare>{});
    while (y < rows) some(std::integral_constant<int, 1>{});
  }
#pragma GCC unroll 25
  for (int t = 0; t < taps; ++t) add_to(gradient + t * kLanes<T>, sum[t]);
}

// out[pixel][0 : Vectors] = sum_i in[pixel][i] * weights[i][0 : Vectors], for Pixels pixels.
template <class T, int Pixels, int Vectors>
FASTNAS_INLINE inline void pointwise_tile(T* out, int64_t out_pitch, const T* in, int64_t in_pitch, const T* weights,
                                          int64_t weight_pitch, int64_t inputs) {
  Vec<T> sum[Pixels][Vectors];
#pragma GCC unroll 16
  for (int p = 0; p < Pixels; ++p) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[p][v] = Vec<T>{};
  }
  for (int64_t i = 0; i < inputs; ++i) {
    Vec<T> w[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) w[v] = get(weights + i * weight_pitch + v * kLanes<T>);
#pragma GCC unroll 16
    for (int p = 0; p < Pixels; ++p) {
      const T x = in[p * in_pitch + i];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[p][v] += x * w[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < Pixels; ++p) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) put(out + p * out_pitch + v * kLanes<T>, sum[p][v]);
  }
}

template <class T, int Pixels, int Vectors>
FASTNAS_INLINE inline void pointwise_block(T* out, int64_t out_pitch, const T* in, int64_t in_pitch, const T* weights,
                                           int64_t weight_pitch, int64_t inputs, int64_t pixels) {
  int64_t p = 0;
  const auto tiles = [&](auto size) FASTNAS_INLINE {
    for (; p + size <= pixels; p += size)
      pointwise_tile<T, size, Vectors>(out + p * out_pitch, out_pitch, in + p * in_pitch, in_pitch, weights,
                                       weight_pitch, inputs);
  };
  tiles(std::integral_constant<int, Pixels>{});
  if constexpr (Pixels > 4) tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 1>{});
}

// A 1x1 convolution of consecutive pixels to `vectors` whole vectors of outputs; weights [inputs][weight_pitch].
template <class T>
FASTNAS_INLINE inline void pointwise(T* out, int64_t out_pitch, const T* in, int64_t in_pitch, const T* weights,
                                     int64_t weight_pitch, int64_t inputs, int64_t vectors, int64_t pixels) {
  int64_t v = 0;
  for (; kRegisters == 32 && v + 4 <= vectors; v += 4)
    pointwise_block<T, 4, 4>(out + v * kLanes<T>, out_pitch, in, in_pitch, weights + v * kLanes<T>, weight_pitch,
                             inputs, pixels);
  for (; v + 2 <= vectors; v += 2)
    pointwise_block<T, kRegisters / 4, 2>(out + v * kLanes<T>, out_pitch, in, in_pitch, weights + v * kLanes<T>,
                                          weight_pitch, inputs, pixels);
  for (; v < vectors; ++v)
    pointwise_block<T, 8, 1>(out + v * kLanes<T>, out_pitch, in, in_pitch, weights + v * kLanes<T>, weight_pitch,
                             inputs, pixels);
}

// gradient[o][0 : Vectors] += sum over pixels of g[pixel][o] * in[pixel][0 : Vectors], for Outputs outputs.
template <class T, int Outputs, int Vectors>
FASTNAS_INLINE inline void outer_tile(T* gradient, int64_t pitch, const T* g, int64_t g_pitch, const T* in,
                                      int64_t in_pitch, int64_t pixels) {
  Vec<T> sum[Outputs][Vectors];
#pragma GCC unroll 16
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[o][v] = Vec<T>{};
  }
  for (int64_t p = 0; p < pixels; ++p) {
    Vec<T> x[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) x[v] = get(in + p * in_pitch + v * kLanes<T>);
#pragma GCC unroll 16
    for (int o = 0; o < Outputs; ++o) {
      const T go = g[p * g_pitch + o];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[o][v] += go * x[v];
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) add_to(gradient + o * pitch + v * kLanes<T>, sum[o][v]);
  }
}

template <class T, int Outputs, int Vectors>
FASTNAS_INLINE inline void outer_block(T* gradient, int64_t pitch, const T* g, int64_t g_pitch, const T* in,
                                       int64_t in_pitch, int64_t outputs, int64_t pixels) {
  int64_t o = 0;
  for (; o + Outputs <= outputs; o += Outputs)
    outer_tile<T, Outputs, Vectors>(gradient + o * pitch, pitch, g + o, g_pitch, in, in_pitch, pixels);
  for (; o < outputs; ++o) outer_tile<T, 1, Vectors>(gradient + o * pitch, pitch, g + o, g_pitch, in, in_pitch, pixels);
}

// The gradient of a 1x1 convolution's weights, [outputs][pitch], from consecutive pixels.
template <class T>
FASTNAS_INLINE inline void outer(T* gradient, int64_t pitch, const T* g, int64_t g_pitch, const T* in, int64_t in_pitch,
                                 int64_t outputs, int64_t vectors, int64_t pixels) {
  int64_t v = 0;
  for (; kRegisters == 32 && v + 4 <= vectors; v += 4)
    outer_block<T, 4, 4>(gradient + v * kLanes<T>, pitch, g, g_pitch, in + v * kLanes<T>, in_pitch, outputs, pixels);
  for (; v + 2 <= vectors; v += 2)
    outer_block<T, kRegisters / 4, 2>(gradient + v * kLanes<T>, pitch, g, g_pitch, in + v * kLanes<T>, in_pitch,
                                      outputs, pixels);
  for (; v < vectors; ++v)
    outer_block<T, kRegisters / 2, 1>(gradient + v * kLanes<T>, pitch, g, g_pitch, in + v * kLanes<T>, in_pitch,
                                      outputs, pixels);
}

// In a flat row a vector holds several pixels; this picks channel c of each pixel for all its lanes.
template <class T, int Channels>
FASTNAS_INLINE inline Index<T> channel_of_pixel(int c) {
  Index<T> index{};
  for (int lane = 0; lane < kLanes<T>; ++lane) index[lane] = lane / Channels * Channels + c;
  return index;
}

// The 1x1 convolution of a flat row, Channels to Channels; weights [Channels][lanes].
template <class T, int Channels>
FASTNAS_INLINE inline void pointwise_flat(T* out, const T* in, const T* weights, int64_t positions) {
  for (int64_t j = 0; j < positions; ++j) {
    const Vec<T> x = get(in + j * kLanes<T>);
    Vec<T> even{}, odd{};
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const Vec<T> term = __builtin_shuffle(x, channel_of_pixel<T, Channels>(c)) * get(weights + c * kLanes<T>);
      (c % 2 ? odd : even) += term;
    }
    put(out + j * kLanes<T>, even + odd);
  }
}

// Its gradient, [Channels][lanes]: lane l of row o is input channel l % Channels, still to be summed over the pixels.
template <class T, int Channels>
FASTNAS_INLINE inline void outer_flat(T* gradient, const T* g, const T* in, int64_t positions) {
  Vec<T> sum[Channels];
  for (int c = 0; c < Channels; ++c) sum[c] = Vec<T>{};
  for (int64_t j = 0; j < positions; ++j) {
    const Vec<T> x = get(in + j * kLanes<T>), gj = get(g + j * kLanes<T>);
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) sum[c] += __builtin_shuffle(gj, channel_of_pixel<T, Channels>(c)) * x;
  }
  for (int c = 0; c < Channels; ++c) add_to(gradient + c * kLanes<T>, sum[c]);
}

// Runs body(std::integral_constant<int, channels>) for the channels of a flat row.
template <class T, class Body>
FASTNAS_INLINE inline void dispatch_flat(int64_t channels, const Body& body) {
  if (channels == 1) return body(std::integral_constant<int, 1>{});
  if (channels == 2) return body(std::integral_constant<int, 2>{});
  if (channels == 4) return body(std::integral_constant<int, 4>{});
  if constexpr (kLanes<T> > 8) body(std::integral_constant<int, 8>{});
}

// Runs body(taps, dilation) with constants; a dilation of 0 is any other one, or a row whose taps are not whole
// positions apart.
template <class Body>
FASTNAS_INLINE inline void dispatch_taps(int64_t taps, int64_t dilation, const Body& body) {
  const auto with = [&](auto count) FASTNAS_INLINE {
    if (dilation == 1) return body(count, std::integral_constant<int, 1>{});
    if (dilation == 2) return body(count, std::integral_constant<int, 2>{});
    body(count, std::integral_constant<int, 0>{});
  };
  if (taps == 9) return with(std::integral_constant<int, 9>{});
  if (taps == 25) return with(std::integral_constant<int, 25>{});
  body(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
}

// A row of a depthwise convolution, by the faster of the two ways.
template <class T, int Taps, int Dilation, bool Add>
FASTNAS_INLINE inline void convolve_row(T* out, const T* in, const int64_t* offsets, const T* kernel, KernelRows rows,
                                        int64_t positions, int64_t vectors, int64_t step) {
  if constexpr (Dilation > 0)
    window_row<T, side_of(Taps), Dilation, Add>(out, in, offsets, kernel, rows, positions, vectors, step);
  else
    depthwise_row<T, Taps, Add>(out, in, offsets, kernel, rows, positions, vectors, step);
}

}  // namespace fastnas
