// y = sum_k w[k] * x_k and its gradients on a GPU. Schema: fastnas/ops/mixed_sum.py; kernels: mixed_sum.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "common/ordered_sum.cuh"
#include "common/widened.h"
#include "ops/cuda/mixed_sum.cuh"

namespace fastnas {
namespace {

// Maps that a kernel walks together.
struct Maps : Rows {
  explicit Maps(const std::vector<Tensor>& tensors, const Tensor& dense) : Rows(common_rows(tensors, dense)) {}

  template <class T>
  T* start(size_t i) const {
    return static_cast<T*>(tensors[i].data_ptr());
  }

  // Tensors [first, first + count) as kernel parameters.
  template <class T>
  Paths<T> paths(size_t first, int64_t count) const {
    Paths<T> out{};
    out.count = static_cast<int>(count);
    for (int64_t k = 0; k < count; ++k) {
      out.start[k] = start<T>(first + k);
      out.stride[k] = row_strides[first + k];
    }
    return out;
  }

  // Whether every run is whole accesses of v elements, aligned, in every tensor.
  bool in_packs(int64_t v, int64_t bytes) const {
    if (run % v != 0) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (reinterpret_cast<uintptr_t>(tensors[i].data_ptr()) % (v * bytes) != 0) return false;
      if (rows > 1 && row_strides[i] % v != 0) return false;
    }
    return true;
  }

  // Calls body(V) with the elements of an access as a constant.
  template <class T, class Body>
  void with_vectors(const Body& body) const {
    if (in_packs(kVector<T>, sizeof(T))) return body(std::integral_constant<int, kVector<T>>{});
    return body(std::integral_constant<int, 1>{});
  }

  int64_t blocks(int v) const { return (rows * (run / v) + kThreads - 1) / kThreads; }
};

// Calls body(first, count) for parts of the list that one launch takes.
template <class Body>
void for_launches(int64_t paths, const Body& body) {
  for (int64_t first = 0; first < paths; first += kMaxPaths) body(first, std::min<int64_t>(kMaxPaths, paths - first));
}

Tensor mixed_sum_fwd(std::vector<Tensor> xs, Tensor w) {
  STD_TORCH_CHECK(!xs.empty() && w.numel() == static_cast<int64_t>(xs.size()),
                  "mixed_sum_fwd: one weight a tensor is needed");
  check_alike("mixed_sum_fwd", xs, xs[0]);
  Tensor y = torch::stable::empty_like(xs[0]);
  if (y.numel() == 0) return y;
  const int64_t paths = static_cast<int64_t>(xs.size());
  xs.push_back(y);
  const Maps maps(xs, y);
  dispatch_floating(y.scalar_type(), "mixed_sum_fwd", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Tensor weights = widened<A>(w);
    const A* wp = static_cast<const A*>(weights.data_ptr());
    std::optional<Tensor> sums;
    if (paths > kMaxPaths) sums = torch::stable::new_empty(y, {y.numel()}, weights.scalar_type());
    maps.with_vectors<T>([&](auto v) {
      for_launches(paths, [&](int64_t first, int64_t count) {
        launch(y, &mixed_sum_fwd_kernel<T, v>, maps.blocks(v), kThreads, maps.paths<const T>(first, count), wp + first,
               maps.start<T>(paths), maps.row_strides[paths], sums ? static_cast<A*>(sums->data_ptr()) : nullptr,
               first == 0, first + count == paths, maps.rows, maps.run);
      });
    });
  });
  return y;
}

std::tuple<std::vector<Tensor>, Tensor> mixed_sum_bwd(Tensor g, std::vector<Tensor> xs, Tensor w) {
  STD_TORCH_CHECK(!xs.empty() && w.numel() == static_cast<int64_t>(xs.size()),
                  "mixed_sum_bwd: one weight a tensor is needed");
  check_alike("mixed_sum_bwd", xs, g);
  const int64_t paths = static_cast<int64_t>(xs.size());
  std::vector<Tensor> dxs;
  for (int64_t k = 0; k < paths; ++k) dxs.push_back(torch::stable::empty_like(xs[0]));
  if (g.numel() == 0) return {dxs, torch::stable::new_zeros(w, w.sizes())};
  std::vector<Tensor> all{g};  // g, xs, dxs
  all.insert(all.end(), xs.begin(), xs.end());
  all.insert(all.end(), dxs.begin(), dxs.end());
  const Maps maps(all, dxs[0]);
  Tensor dw = torch::stable::new_empty(w, w.sizes());
  dispatch_floating(g.scalar_type(), "mixed_sum_bwd", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Tensor weights = widened<A>(w);
    maps.with_vectors<T>([&](auto v) {
      const int64_t blocks = maps.blocks(v);
      const Tensor parts = torch::stable::new_empty(g, {paths, blocks}, ScalarType::Double);
      for_launches(paths, [&](int64_t first, int64_t count) {
        launch(g, &mixed_sum_bwd_kernel<T, v>, blocks, kThreads, maps.paths<const T>(1 + first, count),
               maps.paths<T>(1 + paths + first, count), maps.start<T>(0), maps.row_strides[0],
               static_cast<const A*>(weights.data_ptr()) + first,
               static_cast<double*>(parts.data_ptr()) + first * blocks, maps.rows, maps.run);
      });
      ordered_sum(parts, dw);
    });
  });
  return {dxs, dw};
}

std::vector<Tensor> mixed_sum_bwd_xs(Tensor g, Tensor w) {
  const int64_t paths = w.numel();
  std::vector<Tensor> dxs;
  for (int64_t k = 0; k < paths; ++k) dxs.push_back(torch::stable::empty_like(g));
  if (g.numel() == 0 || paths == 0) return dxs;
  std::vector<Tensor> all{g};  // g, dxs
  all.insert(all.end(), dxs.begin(), dxs.end());
  const Maps maps(all, dxs[0]);
  dispatch_floating(g.scalar_type(), "mixed_sum_bwd_xs", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Tensor weights = widened<A>(w);
    maps.with_vectors<T>([&](auto v) {
      for_launches(paths, [&](int64_t first, int64_t count) {
        launch(g, &mixed_sum_bwd_xs_kernel<T, v>, maps.blocks(v), kThreads, maps.paths<T>(1 + first, count),
               maps.start<T>(0), maps.row_strides[0], static_cast<const A*>(weights.data_ptr()) + first, maps.rows,
               maps.run);
      });
    });
  });
  return dxs;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CUDA, m) {
  m.impl("mixed_sum_fwd", TORCH_BOX(&fastnas::mixed_sum_fwd));
  m.impl("mixed_sum_bwd", TORCH_BOX(&fastnas::mixed_sum_bwd));
  m.impl("mixed_sum_bwd_xs", TORCH_BOX(&fastnas::mixed_sum_bwd_xs));
}
