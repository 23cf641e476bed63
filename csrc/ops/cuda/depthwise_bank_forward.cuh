#pragma once

#include <limits>

#include "ops/cuda/depthwise_bank_conv.cuh"

namespace fastnas::bank {

// What a launch makes of x.
template <class T>
struct Outputs {
  const acc_t<T>* weights[kMaxBranches];
  T* ys[kMaxBranches];
  int sizes[kMaxBranches], dilations[kMaxBranches];
  int count;
  T *max, *average;  // null for those that are not asked for
  bool relu;
};

// Pixels inside the map of the 3x3 window around `centre`, along one side.
__device__ inline int window_side(int centre, int size) { return 3 - (centre == 0) - (centre + 1 >= size); }

// All outputs of a tile of y. Grid: tiles of one image's planes. Reads a tile of x with its border into shared memory
// once, writes each y once. Bound by multiply-adds for the four kernels of a DARTS edge: 68 an element.
template <class T, int kStride>
__global__ void __launch_bounds__(kThreads)
    depthwise_bank_fwd_kernel(const T* x, Strides x_strides, Sizes x_sizes, Outputs<T> out, Strides y_strides,
                              Sizes y_sizes, Cut cut, int border) {
  using A = acc_t<T>;
  __shared__ A memory[kTile<A>];
  __shared__ A taps[kTaps<A>];
  const Spot spot(y_sizes, cut, blockIdx.x);
  const int row0 = spot.row0 * kStride - border, column0 = spot.column0 * kStride - border;
  const Part<A> part(memory, x, x_strides, x_sizes, spot, cut, row0, column0, (cut.rows - 1) * kStride + 1 + 2 * border,
                     (cut.columns - 1) * kStride + 1 + 2 * border);
  const int row = spot.row0 + spot.row, column = spot.column0 + spot.column;
  const int64_t place = spot.image * y_strides.image + (spot.channel0 + spot.channel) * y_strides.channel +
                        row * y_strides.row + column * y_strides.column;
  const auto write = [&](T* y, const A* sums) {
#pragma unroll
    for (int r = 0; r < kRun; ++r)
      if (row + r < y_sizes.rows) store(y + place + r * y_strides.row, sums[r]);
  };
  for (int b = 0; b < out.count; ++b) {
    __syncthreads();
    load_taps(taps, out.weights[b], out.sizes[b], x_sizes, spot, cut);
    __syncthreads();
    if (!spot.inside) continue;
    A sums[kRun] = {};
    const int reach = out.sizes[b] / 2 * out.dilations[b];
    const A* at = part.at(spot.channel, spot.row * kStride + border - reach, spot.column * kStride + border - reach);
    convolve<kStride>(sums, part, at, taps + spot.channel, cut.channels, out.relu, false, out.sizes[b],
                      out.dilations[b]);
    write(out.ys[b], sums);
  }
  if (!out.max && !out.average) return;
  __syncthreads();
  if (!spot.inside) return;
  A largest[kRun], means[kRun];
  for (int r = 0; r < kRun; ++r) {
    const int y = (row + r) * kStride, x_centre = column * kStride;
    A most = -std::numeric_limits<A>::infinity(), sum = 0;
    for (int t = 0; t < 9; ++t) {
      const int dy = t / 3 - 1, dx = t % 3 - 1;
      if (y + dy < 0 || y + dy >= x_sizes.rows || x_centre + dx < 0 || x_centre + dx >= x_sizes.columns) continue;
      const A v = *part.at(spot.channel, y + dy - row0, x_centre + dx - column0);
      if (v > most || v != v) most = v;
      sum += v;
    }
    largest[r] = most;
    means[r] = sum / static_cast<A>(window_side(y, x_sizes.rows) * window_side(x_centre, x_sizes.columns));
  }
  if (out.max) write(out.max, largest);
  if (out.average) write(out.average, means);
}

}  // namespace fastnas::bank
