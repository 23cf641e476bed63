#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace fastnas {

constexpr int kWarp = 32;

struct Add {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// NaN is never the larger one.
struct Larger {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

struct Smaller {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

// What `op` makes of the values of `lanes` neighbours (a power of two up to a warp), in each of them. All lanes of the
// warp have to call it.
template <class V, class Op>
__device__ V reduce_lanes(V value, int lanes, const Op& op) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The same for a block of whole warps, always in the same order.
template <class V, class Op>
__device__ V reduce_block(V value, const Op& op) {
  __shared__ V warps[1024 / kWarp];
  value = reduce_lanes(value, kWarp, op);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warps[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) value = op(value, warps[i]);
  __syncthreads();  // the next call writes to the same place
  return value;
}

}  // namespace fastnas
