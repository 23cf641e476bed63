#pragma once

// Takes the place of csrc/common/launch.cuh where kernels are compiled for the host: CUDA's words, and a launch that
// runs a block's threads as fibers. A thread runs until a barrier or a shuffle, then the next one does; blocks
// alternate between first to last and last to first, so that what relies on an order shows. It says nothing about speed
// or what two threads do at the same time.

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { fibers::barrier(0, blockDim.x); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  static char slots[1024][sizeof(V)];
  const unsigned thread = threadIdx.x, warp = thread / 32, size = blockDim.x - warp * 32;
  std::memcpy(slots[thread], &value, sizeof(V));
  fibers::barrier(1 + warp, size < 32 ? size : 32);
  std::memcpy(&value, slots[thread ^ mask], sizeof(V));
  fibers::barrier(1 + warp, size < 32 ? size : 32);
  return value;
}

namespace fastnas {

using torch::stable::Tensor;

template <class... Parameters>
void launch(const Tensor&, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const std::type_identity_t<Parameters>&... arguments) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    fibers::run(threads, block % 2 == 1, [&](unsigned thread) { threadIdx.x = thread; }, [&] { kernel(arguments...); });
  }
}

}  // namespace fastnas
