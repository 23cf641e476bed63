// y[b] = sum_k mask[g(b), k] * x_k[b] over the paths that ghost batch g(b) = b * G / B keeps, and its
// gradient. Schema: fastnas/ops/path_dropout.py. A dropped path is not read forward and becomes plain zeros
// backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "common/results.h"

namespace fastnas {
namespace {

// The mask [G, K] as numbers, and which of its rows serves which sample.
template <class A>
struct Mask {
  int64_t groups, paths, batch;
  std::vector<A> scale;

  Mask(const Tensor& mask, int64_t batch_size) : groups(mask.size(0)), paths(mask.size(1)), batch(batch_size) {
    if (mask.scalar_type() == ScalarType::Bool) {
      const Tensor dense = torch::stable::contiguous(mask);
      const bool* p = static_cast<const bool*>(dense.data_ptr());
      scale.assign(p, p + dense.numel());
    } else {
      scale = host_values<A>(mask);
    }
  }

  const A* of_row(int64_t row, int64_t rows) const {
    const int64_t sample = row / (rows / batch);
    return scale.data() + sample * groups / batch * paths;
  }
};

bool batch_outermost(const Tensor& dense) {
  const auto order = memory_order(dense);
  return order.empty() || dense.size(0) == 1 || order[0] == 0;
}

// Rows that never cross from one sample into the next.
Rows sample_rows(const std::vector<Tensor>& tensors, const Tensor& dense) {
  return common_rows(tensors, dense, dense.size(0) > 1 ? 1 : 0);
}

// A result in the layout of empty_like(like), which the schema's fake kernel promises, and what is written sample by
// sample: the result itself, or a contiguous tensor where its layout has another dimension outside the batch.
struct Output {
  Tensor result, written;

  explicit Output(const Tensor& like)
      : result(result_like(like)),
        written(batch_outermost(result) ? result : torch::stable::new_empty(like, like.sizes())) {}
  Tensor finish() { return batch_outermost(result) ? result : torch::stable::copy_(result, written); }
};

template <class T>
FASTNAS_INLINE inline void clear(T* out, int64_t n, bool large) {
  if constexpr (kStreams<T>) {
    if (large) return stream_each(out, n, [](int64_t, auto zero) FASTNAS_INLINE { return zero; });
  }
  std::memset(out, 0, n * sizeof(T));
}

Tensor path_dropout_fwd(std::vector<Tensor> xs, Tensor mask) {
  STD_TORCH_CHECK(!xs.empty() && xs[0].dim() > 0 && mask.dim() == 2 && mask.size(0) > 0 &&
                      mask.size(1) == static_cast<int64_t>(xs.size()),
                  "path_dropout_fwd: mask must be [groups, paths]");
  check_alike("path_dropout_fwd", xs, xs[0]);
  Output out(xs[0]);
  const Tensor y = out.written;
  const int64_t paths = static_cast<int64_t>(xs.size());
  xs.push_back(y);
  const Rows rows = sample_rows(xs, y);
  dispatch_floating(y.scalar_type(), "path_dropout_fwd", [&](auto tag) {
    using T = decltype(tag);
    const Mask<acc_t<T>> keep(mask, y.size(0));
    const Cursor<T> cursor(rows);
    for_each_block(rows, paths + 1, [&] {
      return [&, x = std::vector<const T*>(paths), weights = std::vector<acc_t<T>>(paths)](const Block& block) mutable {
        const acc_t<T>* scale = keep.of_row(block.row, rows.rows);
        int64_t kept = 0;
        for (int64_t k = 0; k < paths; ++k) {
          if (scale[k] == 0) continue;
          x[kept] = cursor.at(k, block);
          weights[kept++] = scale[k];
        }
        vectorised(
            [&]() FASTNAS_INLINE { weighted_sum(cursor.at(paths, block), x.data(), weights.data(), kept, block.n); });
      };
    });
  });
  return out.finish();
}

std::vector<Tensor> path_dropout_bwd(Tensor g, Tensor mask) {
  STD_TORCH_CHECK(g.dim() > 0 && mask.dim() == 2 && mask.size(0) > 0, "path_dropout_bwd: mask must be [groups, paths]");
  const int64_t paths = mask.size(1);
  const bool large = past_caches(paths * g.numel() * g.element_size());
  std::vector<Output> outs;
  std::vector<Tensor> all{g};  // g, then what is written
  for (int64_t k = 0; k < paths; ++k) all.push_back(outs.emplace_back(g).written);
  const Rows rows = sample_rows(all, paths ? all[1] : Output(g).written);
  dispatch_floating(g.scalar_type(), "path_dropout_bwd", [&](auto tag) {
    using T = decltype(tag);
    const Mask<acc_t<T>> keep(mask, g.size(0));
    const Cursor<T> cursor(rows);
    for_each_block(rows, paths + 1, [&] {
      return [&](const Block& block) {
        const acc_t<T>* weight = keep.of_row(block.row, rows.rows);
        vectorised([&]() FASTNAS_INLINE {
          acc_t<T> scratch[kBlock];
          const acc_t<T>* gs = widened<T>(cursor.at(0, block), block.n, scratch);
          for (int64_t k = 0; k < paths; ++k) {
            if (weight[k] == 0) {
              clear(cursor.at(1 + k, block), block.n, large);
            } else {
              unmix(cursor.at(1 + k, block), gs, weight[k], block.n, large);
            }
          }
        });
      };
    });
  });
  std::vector<Tensor> dxs;
  for (auto& out : outs) dxs.push_back(out.finish());
  return dxs;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("path_dropout_fwd", TORCH_BOX(&fastnas::path_dropout_fwd));
  m.impl("path_dropout_bwd", TORCH_BOX(&fastnas::path_dropout_bwd));
}
