#pragma once

#include <algorithm>
#include <vector>

#include "common/dtype.h"

namespace fastnas {

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// The Python function has checked the arguments with better messages; this protects memory.
inline void check_alike(const char* op, const std::vector<Tensor>& xs, const Tensor& like) {
  for (const auto& x : xs)
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && same_sizes(x, like), op,
                    ": tensors differ in dtype or shape");
}

}  // namespace fastnas
