#pragma once

// Kernels of mixed_sum. A thread holds one vector of consecutive elements while the K maps pass; the K addresses are
// kernel parameters, so that nothing is copied to the device before a launch and a captured graph records them.

#include <cstdint>

#include "common/pack.cuh"
#include "common/reduce.cuh"

namespace fastnas {

constexpr int kMaxPaths = 64;  // of one launch: longer lists take several
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kMaxPaths <= kThreads, "one thread a path adds up the warps");

// Up to kMaxPaths maps of one shape, each seen as runs of elements at a stride of its own.
template <class T>
struct Paths {
  T* start[kMaxPaths];
  int64_t stride[kMaxPaths];  // elements from one run to the next
  int count;

  __device__ T* at(int k, int64_t row, int64_t column) const { return start[k] + row * stride[k] + column; }
};
static_assert(2 * sizeof(Paths<float>) + 256 <= 4096, "kernel parameters are 4 KB");

// Which V elements of which run are this thread's; a run is a multiple of V.
template <int V>
struct Place {
  int64_t row, column;
  bool inside;

  __device__ Place(int64_t rows, int64_t run) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, vectors = run / V;
    row = rows == 1 ? 0 : index / vectors;  // dense maps are one run
    column = (index - row * vectors) * V;
    inside = row < rows && column < run;
  }
};

// y = sum_k w[k] x_k. `sums`, where there are more paths than one launch takes, carries the sum so far from launch to
// launch: it is read unless `first`, and written instead of y unless `last`.
// Reads each x once, writes y once. Bound by memory: a multiply-add an element read.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mixed_sum_fwd_kernel(const __grid_constant__ Paths<const T> xs, const acc_t<T>* w, T* y, int64_t y_stride,
                         acc_t<T>* sums, bool first, bool last, int64_t rows, int64_t run) {
  using A = acc_t<T>;
  constexpr int kBatch = 8;  // loads in flight a thread
  const Place<V> at(rows, run);
  if (!at.inside) return;
  const int64_t dense = at.row * run + at.column;
  A acc[V];
#pragma unroll
  for (int i = 0; i < V; ++i) acc[i] = first ? A(-0.0) : sums[dense + i];  // -0 + x is x for every x
  for (int start = 0; start < xs.count; start += kBatch) {
    Pack<T, V> x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (start + b < xs.count) x[b] = load_pack<V>(xs.at(start + b, at.row, at.column));
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (start + b >= xs.count) continue;
      const A wk = w[start + b];
#pragma unroll
      for (int i = 0; i < V; ++i) acc[i] += wk * load(x[b].v[i]);
    }
  }
  if (!last) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[dense + i] = acc[i];
    return;
  }
  Pack<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) store(out.v + i, acc[i]);
  store_pack<V>(y + at.row * y_stride + at.column, out);
}

// dx_k = w[k] g and parts[k, block] = sum over the block of g x_k, for the ordered sum that gives dw.
// Reads g and each x once, writes each dx once, and K numbers a block. Bound by memory.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)  // without the 4 sm_90 saves registers by spilling two
    mixed_sum_bwd_kernel(const __grid_constant__ Paths<const T> xs, const __grid_constant__ Paths<T> dxs, const T* g,
                         int64_t g_stride, const acc_t<T>* w, double* parts, int64_t rows, int64_t run) {
  using A = acc_t<T>;
  constexpr int kBatch = 4;  // loads in flight a thread, and reductions that overlap
  __shared__ double sums[kWarps][kMaxPaths];
  const Place<V> at(rows, run);
  Pack<T, V> gs{};  // threads beyond the end add zeros
  if (at.inside) gs = load_pack<V>(g + at.row * g_stride + at.column);
  for (int start = 0; start < xs.count; start += kBatch) {
    Pack<T, V> x[kBatch];
    A dots[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (at.inside && start + b < xs.count) x[b] = load_pack<V>(xs.at(start + b, at.row, at.column));
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      dots[b] = 0;
      if (!at.inside || start + b >= xs.count) continue;
      const A wk = w[start + b];
      Pack<T, V> dx;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dots[b] += load(gs.v[i]) * load(x[b].v[i]);
        store(dx.v + i, wk * load(gs.v[i]));
      }
      store_pack<V>(dxs.at(start + b, at.row, at.column), dx);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const A dot = reduce_lanes(dots[b], kWarp, Add{});
      if (threadIdx.x % kWarp == 0 && start + b < xs.count) sums[threadIdx.x / kWarp][start + b] = dot;
    }
  }
  __syncthreads();
  const int k = threadIdx.x;
  if (k >= xs.count) return;
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][k];
  parts[static_cast<int64_t>(k) * gridDim.x + blockIdx.x] = sum;
}

// dx_k = w[k] g. Reads g once, writes each dx once. Bound by memory.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mixed_sum_bwd_xs_kernel(const __grid_constant__ Paths<T> dxs, const T* g, int64_t g_stride, const acc_t<T>* w,
                            int64_t rows, int64_t run) {
  const Place<V> at(rows, run);
  if (!at.inside) return;
  const Pack<T, V> gs = load_pack<V>(g + at.row * g_stride + at.column);
  for (int k = 0; k < dxs.count; ++k) {
    const acc_t<T> wk = w[k];
    Pack<T, V> dx;
#pragma unroll
    for (int i = 0; i < V; ++i) store(dx.v + i, wk * load(gs.v[i]));
    store_pack<V>(dxs.at(k, at.row, at.column), dx);
  }
}

}  // namespace fastnas
