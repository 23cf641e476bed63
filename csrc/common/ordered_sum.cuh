#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/reduce.cuh"

namespace fastnas {

// out[k] = sum_p parts[k, p]: the second stage of sums over blocks, always added in the same order.
// Grid: one block a row of `parts` [K, count]. Reads the parts once. Bound by its launch.
template <class T>
__global__ void ordered_sum_kernel(const double* parts, T* out, int64_t count) {
  double sum = 0;
  for (int64_t p = threadIdx.x; p < count; p += blockDim.x) sum += parts[blockIdx.x * count + p];
  sum = reduce_block(sum, Add{});
  if (threadIdx.x == 0) store(out + blockIdx.x, static_cast<acc_t<T>>(sum));
}

// Row sums of `parts` [K, count] into out, which has K elements of any floating dtype.
inline void ordered_sum(const Tensor& parts, const Tensor& out) {
  dispatch_floating(out.scalar_type(), "ordered_sum", [&](auto tag) {
    using T = decltype(tag);
    launch(parts, &ordered_sum_kernel<T>, parts.size(0), 256, static_cast<const double*>(parts.data_ptr()),
           static_cast<T*>(out.data_ptr()), parts.size(1));
  });
}

}  // namespace fastnas
