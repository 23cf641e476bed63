#pragma once

// One depthwise convolution of a tile: kRun sums of a thread.

#include "ops/cuda/depthwise_bank_tile.cuh"

namespace fastnas::bank {

// NaN stays.
template <class A>
__device__ A rectified(A v, bool relu) {
  return relu && v <= A(0) ? A(0) : v;
}

// sums[r] = sum_ij w[i, j] v[r kStride + i kDilation, j kDilation] from `at` on. A column is read once for all rows of
// taps: kSize (kRun + (kSize - 1) kDilation) reads for kRun kSize^2 multiply-adds at stride 1. `flipped` turns the
// kernel by 180 degrees.
template <int kSize, int kDilation, int kStride, class A>
__device__ void convolve(A* sums, const Part<A>& part, const A* at, const A* taps, int channels, bool relu,
                         bool flipped) {
  constexpr int kReach = kStride * (kRun - 1) + (kSize - 1) * kDilation + 1;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    A column[kReach];
#pragma unroll
    for (int y = 0; y < kReach; ++y) column[y] = rectified(at[y * part.row + j * kDilation * part.column], relu);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int t = i * kSize + j;
      const A w = taps[(flipped ? kSize * kSize - 1 - t : t) * channels];
#pragma unroll
      for (int r = 0; r < kRun; ++r) sums[r] += w * column[r * kStride + i * kDilation];
    }
  }
}

// The same for any kernel.
template <int kStride, class A>
__device__ void convolve_any(A* sums, const Part<A>& part, const A* at, const A* taps, int channels, bool relu,
                             bool flipped, int size, int dilation) {
  for (int t = 0; t < size * size; ++t) {
    const A w = taps[(flipped ? size * size - 1 - t : t) * channels];
    const A* from = at + t / size * dilation * part.row + t % size * dilation * part.column;
#pragma unroll
    for (int r = 0; r < kRun; ++r) sums[r] += w * rectified(from[r * kStride * part.row], relu);
  }
}

template <int kStride, class A>
__device__ void convolve(A* sums, const Part<A>& part, const A* at, const A* taps, int channels, bool relu,
                         bool flipped, int size, int dilation) {
  const auto call = [&](auto kernel) { kernel(sums, part, at, taps, channels, relu, flipped); };
  if (size == 3 && dilation == 1) return call(convolve<3, 1, kStride, A>);
  if (size == 5 && dilation == 1) return call(convolve<5, 1, kStride, A>);
  if (size == 3 && dilation == 2) return call(convolve<3, 2, kStride, A>);
  if (size == 5 && dilation == 2) return call(convolve<5, 2, kStride, A>);
  convolve_any<kStride>(sums, part, at, taps, channels, relu, flipped, size, dilation);
}

}  // namespace fastnas::bank
