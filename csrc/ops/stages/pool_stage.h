#pragma once

#include <optional>
#include <vector>

#include "ops/stages/map.h"

// The two passes of pool_stage on plain memory; meaning: fastnas/ops/stages/pool_stage.py.

namespace fastnas {

// pooled [2, B, H', W', C]; stats [2, 2, C], or null where they are not wanted.
template <class T>
void pool(const View<T>& x, int64_t stride, T* pooled, T* stats);

// scales [gs, 3, C], coef [2, 3, C], dx [B, H, W, C].
template <class T>
void pool_backward(const View<T>& x, const std::vector<View<T>>& gs, const T* scales, const T* coef, int64_t stride,
                   const std::optional<View<T>>& base, T* dx);

}  // namespace fastnas
