// y = sum_k w[k] * x_k and its gradients, each in one pass over memory. Schema: fastnas/ops/mixed_sum.py.
// Forward reads K maps and writes 1; backward reads g and K maps and writes K, the K dot products on the way.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "common/results.h"

namespace fastnas {
namespace {

Tensor mixed_sum_fwd(std::vector<Tensor> xs, Tensor w) {
  STD_TORCH_CHECK(!xs.empty() && w.numel() == static_cast<int64_t>(xs.size()),
                  "mixed_sum_fwd: one weight a tensor is needed");
  check_alike("mixed_sum_fwd", xs, xs[0]);
  Tensor y = result_like(xs[0]);
  const int64_t paths = static_cast<int64_t>(xs.size());
  xs.push_back(y);
  const Rows rows = common_rows(xs, y);
  dispatch_floating(y.scalar_type(), "mixed_sum_fwd", [&](auto tag) {
    using T = decltype(tag);
    const auto weights = host_values<acc_t<T>>(w);
    const Cursor<T> cursor(rows);
    for_each_block(rows, paths + 1, [&] {
      return [&, x = std::vector<const T*>(paths)](const Block& block) mutable {
        for (int64_t k = 0; k < paths; ++k) x[k] = cursor.at(k, block);
        vectorised(
            [&]() FASTNAS_INLINE { weighted_sum(cursor.at(paths, block), x.data(), weights.data(), paths, block.n); });
      };
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
  for (int64_t k = 0; k < paths; ++k) dxs.push_back(result_like(xs[0]));
  const bool large = past_caches(paths * g.numel() * g.element_size());
  std::vector<Tensor> all{g};  // g, xs, dxs
  all.insert(all.end(), xs.begin(), xs.end());
  all.insert(all.end(), dxs.begin(), dxs.end());
  const Rows rows = common_rows(all, dxs[0]);
  Tensor dw = torch::stable::new_empty(w, w.sizes());
  dispatch_floating(g.scalar_type(), "mixed_sum_bwd", [&](auto tag) {
    using T = decltype(tag);
    const auto weights = host_values<acc_t<T>>(w);
    const Cursor<T> cursor(rows);
    std::vector<double> dots(block_count(rows) * paths);
    for_each_block(rows, 2 * paths + 1, [&] {
      return [&](const Block& block) {
        double* dot = dots.data() + block.index * paths;
        vectorised([&]() FASTNAS_INLINE {
          acc_t<T> scratch[kBlock];
          const acc_t<T>* gs = widened<T>(cursor.at(0, block), block.n, scratch);
          for (int64_t k = 0; k < paths; ++k)
            dot[k] = unmix(cursor.at(1 + paths + k, block), gs, cursor.at(1 + k, block), weights[k], block.n, large);
        });
      };
    });
    // Blocks are added in their order: the sum does not depend on the number of threads.
    std::vector<double> total(paths, 0.0);
    for (size_t i = 0; i < dots.size(); ++i) total[i % paths] += dots[i];
    dispatch_floating(dw.scalar_type(), "mixed_sum_bwd", [&](auto wtag) {
      using W = decltype(wtag);
      W* out = static_cast<W*>(dw.data_ptr());
      for (int64_t k = 0; k < paths; ++k) store(out + k, static_cast<acc_t<W>>(total[k]));
    });
  });
  return {dxs, dw};
}

std::vector<Tensor> mixed_sum_bwd_xs(Tensor g, Tensor w) {
  const int64_t paths = w.numel();
  std::vector<Tensor> dxs;
  for (int64_t k = 0; k < paths; ++k) dxs.push_back(result_like(g));
  const bool large = past_caches(paths * g.numel() * g.element_size());
  std::vector<Tensor> all{g};  // g, dxs
  all.insert(all.end(), dxs.begin(), dxs.end());
  const Rows rows = common_rows(all, paths ? dxs[0] : g);
  dispatch_floating(g.scalar_type(), "mixed_sum_bwd_xs", [&](auto tag) {
    using T = decltype(tag);
    const auto weights = host_values<acc_t<T>>(w);
    const Cursor<T> cursor(rows);
    for_each_block(rows, paths + 1, [&] {
      return [&](const Block& block) {
        vectorised([&]() FASTNAS_INLINE {
          acc_t<T> scratch[kBlock];
          const acc_t<T>* gs = widened<T>(cursor.at(0, block), block.n, scratch);
          for (int64_t k = 0; k < paths; ++k) unmix(cursor.at(1 + k, block), gs, weights[k], block.n, large);
        });
      };
    });
  });
  return dxs;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("mixed_sum_fwd", TORCH_BOX(&fastnas::mixed_sum_fwd));
  m.impl("mixed_sum_bwd", TORCH_BOX(&fastnas::mixed_sum_bwd));
  m.impl("mixed_sum_bwd_xs", TORCH_BOX(&fastnas::mixed_sum_bwd_xs));
}
