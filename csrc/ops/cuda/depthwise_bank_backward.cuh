#pragma once

#include <cstdint>
#include <limits>

#include "common/reduce.cuh"
#include "ops/cuda/depthwise_bank_forward.cuh"

namespace fastnas::bank {

// What dx is made of; all gradients lie alike.
template <class T>
struct Gradients {
  const acc_t<T>* weights[kMaxBranches];
  const T* gs[kMaxBranches];
  int sizes[kMaxBranches], dilations[kMaxBranches];
  int count;
  const T *max, *average;  // null for those that were not asked for
  const int8_t* places;    // which of its nine pixels each maximum is
  bool relu;
  bool add;  // to what an earlier launch has left in `sums`
  bool last;
};

// Which of its nine pixels each 3x3 window takes as maximum: the first of equals, the last NaN, as max_pool2d. A thread
// an output, in the order of the memory of `places`. Reads x once (nine times from the cache), writes a byte an output.
template <class T>
__global__ void depthwise_bank_places_kernel(const T* x, Strides x_strides, Sizes x_sizes, int8_t* places,
                                             Strides strides, Sizes sizes, int stride, bool last) {
  using A = acc_t<T>;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(sizes.images) * sizes.channels * sizes.rows * sizes.columns) return;
  const int inner = last ? sizes.channels : sizes.columns, middle = last ? sizes.columns : sizes.rows;
  const int a = static_cast<int>(i % inner), b = static_cast<int>(i / inner % middle);
  i /= static_cast<int64_t>(inner) * middle;
  const int c = last ? a : static_cast<int>(i % sizes.channels), column = last ? b : a;
  const int row = last ? static_cast<int>(i % sizes.rows) : b;
  const int image = static_cast<int>(i / (last ? sizes.rows : sizes.channels));
  const int y0 = row * stride - 1, x0 = column * stride - 1;
  const T* from = x + image * x_strides.image + c * x_strides.channel;
  A most = -std::numeric_limits<A>::infinity();
  int place = (y0 < 0 ? 3 : 0) + (x0 < 0 ? 1 : 0);  // for windows of nothing but -inf
  for (int t = 0; t < 9; ++t) {
    const int y = y0 + t / 3, at = x0 + t % 3;
    if (y < 0 || y >= x_sizes.rows || at < 0 || at >= x_sizes.columns) continue;
    const A v = load(from[y * x_strides.row + at * x_strides.column]);
    if (v > most || v != v) {
      most = v;
      place = t;
    }
  }
  places[image * strides.image + c * strides.channel + row * strides.row + column * strides.column] =
      static_cast<int8_t>(place);
}

// The pools' part of dx at pixel (y, x): from each window that holds it. Offsets are those of the tile's plane of g.
template <int kStride, class T>
__device__ acc_t<T> pooled(const Gradients<T>& in, int64_t plane, const Strides& strides, const Sizes& g_sizes,
                           const Sizes& x_sizes, int y, int x) {
  using A = acc_t<T>;
  A sum = 0;
  for (int t = 0; t < 9; ++t) {
    const int cy = y + 1 - t / 3, cx = x + 1 - t % 3;  // the centre of the window in which this pixel is tap t
    if (cy < 0 || cx < 0 || cy % kStride != 0 || cx % kStride != 0) continue;
    const int row = cy / kStride, column = cx / kStride;
    if (row >= g_sizes.rows || column >= g_sizes.columns) continue;
    const int64_t at = plane + row * strides.row + column * strides.column;
    if (in.max && in.places[at] == t) sum += load(in.max[at]);
    if (in.average)
      sum += load(in.average[at]) / static_cast<A>(window_side(cy, x_sizes.rows) * window_side(cx, x_sizes.columns));
  }
  return sum;
}

// dx = [x > 0] sum_b sum_t w_b[t] g_b[the output that tap t of the pixel feeds] + the pools' parts.
// Grid: tiles of x. Reads a tile of each g with its border into shared memory once, and x once, writes dx once. `sums`
// carries what earlier launches made where there are more branches than one takes. Bound by multiply-adds.
template <class T, int kStride>
__global__ void __launch_bounds__(kThreads)
    depthwise_bank_dx_kernel(Gradients<T> in, Strides g_strides, Sizes g_sizes, const T* x, Strides x_strides, T* dx,
                             acc_t<T>* sums, Strides dx_strides, Sizes x_sizes, Cut cut, int border) {
  using A = acc_t<T>;
  __shared__ A memory[kTile<A>];
  __shared__ A taps[kTaps<A>];
  const Spot spot(x_sizes, cut, blockIdx.x);
  // A pixel q is fed by outputs p with kStride p = q - d t: the first of the tile's, rounded down.
  const int row0 = (spot.row0 - border - (kStride - 1) * ((spot.row0 - border) & 1)) / kStride;
  const int column0 = (spot.column0 - border - (kStride - 1) * ((spot.column0 - border) & 1)) / kStride;
  const int row = spot.row0 + spot.row, column = spot.column0 + spot.column;
  A total[kRun] = {};
  for (int b = 0; b < in.count; ++b) {
    __syncthreads();
    const Part<A> part(memory, in.gs[b], g_strides, g_sizes, spot, cut, row0, column0,
                       (cut.rows - 1 + 2 * border) / kStride + kStride,
                       (cut.columns - 1 + 2 * border) / kStride + kStride);
    load_taps(taps, in.weights[b], in.sizes[b], x_sizes, spot, cut);
    __syncthreads();
    if (!spot.inside) continue;
    const int size = in.sizes[b], dilation = in.dilations[b], reach = size / 2 * dilation;
    const A* w = taps + spot.channel;
    A part_sums[kRun] = {};  // a sum of its own: long chains of additions lose precision
    if constexpr (kStride == 1) {
      const A* at = part.at(spot.channel, row - reach - row0, column - reach - column0);
      convolve<1>(part_sums, part, at, w, cut.channels, false, true, size, dilation);
    } else {
      for (int t = 0; t < size * size; ++t) {
        const int x_at = column + reach - t % size * dilation;
        if (x_at & 1) continue;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          const int y_at = row + r + reach - t / size * dilation;
          if (!(y_at & 1))
            part_sums[r] += w[t * cut.channels] * *part.at(spot.channel, y_at / 2 - row0, x_at / 2 - column0);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRun; ++r) total[r] += part_sums[r];
  }
  if (!spot.inside) return;
  const int c = spot.channel0 + spot.channel;
  const int64_t plane = spot.image * g_strides.image + c * g_strides.channel;
  for (int r = 0; r < kRun && row + r < x_sizes.rows; ++r) {
    const int64_t at = spot.image * dx_strides.image + c * dx_strides.channel + (row + r) * dx_strides.row +
                       column * dx_strides.column;
    A sum = total[r] + (in.add ? sums[at] : A(0));
    if (!in.last) {
      sums[at] = sum;
      continue;
    }
    const A v = load(x[spot.image * x_strides.image + c * x_strides.channel + (row + r) * x_strides.row +
                       column * x_strides.column]);
    if (in.relu && v <= A(0)) sum = 0;
    if (in.max || in.average) sum += pooled<kStride>(in, plane, g_strides, g_sizes, x_sizes, row + r, column);
    store(dx + at, sum);
  }
}

// Taps whose sums a thread holds at a time; those of a block fit into the tile's memory afterwards.
template <class A>
constexpr int kGroup = sizeof(A) == 8 ? 9 : 25;
static_assert(kGroup<float> * kThreads <= kTile<float> && kGroup<double> * kThreads <= kTile<double>);
constexpr int kTilesAChunk = 8;  // tiles of one channel group that a block adds up

// parts[c, t, chunk] = sum over the chunk's tiles of g[c, q] relu(x)[c, the pixel of tap t for output q], taps from
// `first` on. Grid: groups of channels times chunks of tiles. Reads g and x once for each group of taps, writes one
// number a channel, tap and chunk. A thread's chain is at most kTilesAChunk kRun products, the rest is added in double.
template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_bank_dw_kernel(const T* g, Strides g_strides, Sizes g_sizes, const T* x, Strides x_strides, Sizes x_sizes,
                             double* parts, int size, int dilation, int stride, bool relu, int first, int64_t chunks,
                             Cut cut) {
  using A = acc_t<T>;
  constexpr int kMost = kGroup<A>;
  __shared__ A memory[kTile<A>];
  const int deep = tiles(g_sizes.channels, cut.channels);
  const int plane = tiles(g_sizes.rows, cut.rows) * tiles(g_sizes.columns, cut.columns);
  const int group = static_cast<int>(blockIdx.x % deep), reach = size / 2 * dilation;
  const int64_t chunk = blockIdx.x / deep, all = static_cast<int64_t>(g_sizes.images) * plane;
  A sums[kMost] = {};
  for (int64_t n = chunk * kTilesAChunk; n < (chunk + 1) * kTilesAChunk && n < all; ++n) {
    const Spot spot(g_sizes, cut, (n / plane * deep + group) * plane + n % plane);
    __syncthreads();
    const Part<A> part(memory, x, x_strides, x_sizes, spot, cut, spot.row0 * stride - reach,
                       spot.column0 * stride - reach, (cut.rows - 1) * stride + 1 + 2 * reach,
                       (cut.columns - 1) * stride + 1 + 2 * reach);
    __syncthreads();
    if (!spot.inside) continue;
    const int row = spot.row0 + spot.row;
    const T* from = g + spot.image * g_strides.image + (spot.channel0 + spot.channel) * g_strides.channel +
                    (spot.column0 + spot.column) * g_strides.column;
    A gs[kRun];
#pragma unroll
    for (int r = 0; r < kRun; ++r) gs[r] = row + r < g_sizes.rows ? load(from[(row + r) * g_strides.row]) : A(0);
    const A* at = part.at(spot.channel, spot.row * stride, spot.column * stride);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const int t = first + j;
      if (t >= size * size) continue;
      const A* v = at + t / size * dilation * part.row + t % size * dilation * part.column;
#pragma unroll
      for (int r = 0; r < kRun; ++r)
        if (row + r < g_sizes.rows) sums[j] += gs[r] * rectified(v[r * stride * part.row], relu);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kMost; ++j) memory[j * kThreads + threadIdx.x] = sums[j];
  __syncthreads();
  // A warp adds up the threads of one channel for one tap after the other.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, each = cut.columns * cut.rows / kRun;
  for (int pair = warp; pair < kMost * cut.channels; pair += kThreads / kWarp) {
    const int j = pair / cut.channels, c = pair % cut.channels, t = first + j;
    double sum = 0;
    for (int i = lane; i < each; i += kWarp)
      sum += memory[j * kThreads + (cut.last ? i * cut.channels + c : c * each + i)];
    sum = reduce_lanes(sum, kWarp, Add{});
    if (lane == 0 && t < size * size && group * cut.channels + c < g_sizes.channels)
      parts[((group * cut.channels + c) * int64_t{size} * size + t) * chunks + chunk] = sum;
  }
}

}  // namespace fastnas::bank
