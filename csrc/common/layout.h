#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fastnas {

using torch::stable::Tensor;

// Same-shaped tensors seen as `rows` runs of `run` elements that lie side by side in memory in each of them.
struct Rows {
  int64_t rows = 0;
  int64_t run = 0;
  std::vector<Tensor> tensors;       // the inputs, or dense copies of those that have no such view
  std::vector<int64_t> row_strides;  // elements from one run to the next, by tensor
};

// Dimensions of more than one element, outermost first in the memory of `dense`.
inline std::vector<int64_t> memory_order(const Tensor& dense) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dense.dim(); ++d)
    if (dense.size(d) > 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return dense.stride(a) > dense.stride(b); });
  return order;
}

// Whether t, walked in the order of `dense`, is rows of order[split:] laid out as in `dense`, at one stride.
inline bool has_rows(const Tensor& t, const Tensor& dense, const std::vector<int64_t>& order, size_t split,
                     int64_t* row_stride) {
  for (size_t i = split; i < order.size(); ++i)
    if (t.stride(order[i]) != dense.stride(order[i])) return false;
  for (size_t i = 0; i + 1 < split; ++i)
    if (t.stride(order[i]) != t.stride(order[i + 1]) * t.size(order[i + 1])) return false;
  *row_stride = split == 0 ? 0 : t.stride(order[split - 1]);
  return true;
}

inline Tensor dense_copy(const Tensor& t, const Tensor& dense) {
  Tensor copy = torch::stable::empty_like(dense);
  torch::stable::copy_(copy, t);
  return copy;
}

// Views of `inputs` as common rows, in the memory order of `dense` (which has no gaps). `min_split`
// dimensions of that order always stay outside the runs. Tensors without such a view are copied.
inline Rows common_rows(const std::vector<Tensor>& inputs, const Tensor& dense, size_t min_split = 0) {
  constexpr int64_t kShortestRun = 64;  // shorter runs cost more than a copy
  const auto order = memory_order(dense);
  min_split = std::min(min_split, order.size());
  const auto run_of = [&](size_t split) {
    int64_t run = 1;
    for (size_t i = split; i < order.size(); ++i) run *= dense.size(order[i]);
    return run;
  };

  Rows out;
  out.tensors = inputs;
  size_t split = min_split;
  int64_t ignored = 0;
  for (auto& t : out.tensors) {
    size_t own = min_split;
    while (own < order.size() && !has_rows(t, dense, order, own, &ignored)) ++own;
    if (own > min_split && (run_of(own) < kShortestRun || own == order.size())) {
      t = dense_copy(t, dense);
    } else {
      split = std::max(split, own);
    }
  }
  out.run = run_of(split);
  out.rows = dense.numel() == 0 ? 0 : dense.numel() / out.run;
  out.row_strides.resize(out.tensors.size());
  for (size_t k = 0; k < out.tensors.size(); ++k) {
    if (has_rows(out.tensors[k], dense, order, split, &out.row_strides[k])) continue;
    out.tensors[k] = dense_copy(out.tensors[k], dense);
    has_rows(out.tensors[k], dense, order, split, &out.row_strides[k]);
  }
  return out;
}

}  // namespace fastnas
