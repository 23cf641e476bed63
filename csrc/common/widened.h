#pragma once

#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "common/dtype.h"

namespace fastnas {

// A few weights, dense, in the dtype A of the sums; they are that already in every usual call.
template <class A>
Tensor widened(const Tensor& w) {
  constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor wide = w.scalar_type() == kDtype ? w : torch::stable::to(w, kDtype);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

}  // namespace fastnas
