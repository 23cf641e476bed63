// depthwise_bank on a GPU: depthwise convolutions and 3x3 pools that share one input, from tiles in shared memory.
// Schema: fastnas/ops/depthwise_bank.py; kernels: depthwise_bank_*.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/ordered_sum.cuh"
#include "common/results.h"
#include "common/widened.h"
#include "ops/cuda/depthwise_bank_backward.cuh"

namespace fastnas {
namespace {

using bank::Cut;
using bank::kMaxBranches;
using bank::kRun;
using bank::Sizes;
using bank::Strides;

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Sizes sizes_of(const Tensor& t) {
  return {static_cast<int>(t.size(0)), static_cast<int>(t.size(1)), static_cast<int>(t.size(2)),
          static_cast<int>(t.size(3))};
}

Tensor fresh(const Tensor& like, int64_t rows, int64_t columns, std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t sizes[] = {like.size(0), like.size(1), rows, columns};
  return torch::stable::empty({sizes, 4}, dtype ? *dtype : like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, map_format(is_channels_last(like)));
}

// The kernels' sizes and dilations, checked as far as memory needs it.
struct Branches {
  std::vector<int> sizes, dilations;
  int64_t stride;
  bool relu, max_pool, avg_pool;

  Branches(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& ds, int64_t s, bool r,
           bool max, bool avg)
      : stride(s), relu(r), max_pool(max), avg_pool(avg) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                    "depthwise_bank: x must be [B, C, H, W]");
    STD_TORCH_CHECK(weights.size() == ds.size() && (s == 1 || s == 2),
                    "depthwise_bank: one dilation a weight and stride 1 or 2 are needed");
    for (size_t i = 0; i < ds.size(); ++i) {
      const Tensor& w = weights[i];
      STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == x.size(1) && w.size(1) == 1 && w.size(2) == w.size(3) &&
                          w.size(2) % 2 == 1 && ds[i] > 0,
                      "depthwise_bank: weights must be [C, 1, k, k] with odd k");
      sizes.push_back(static_cast<int>(w.size(2)));
      dilations.push_back(static_cast<int>(ds[i]));
    }
  }

  size_t outputs() const { return sizes.size() + max_pool + avg_pool; }
  int reach(size_t b) const { return sizes[b] / 2 * dilations[b]; }

  // Pixels beyond a tile that branches [first, first + count) see, and the pools.
  int border(size_t first, size_t count) const {
    int most = max_pool || avg_pool ? 1 : 0;
    for (size_t b = first; b < first + count; ++b) most = std::max(most, reach(b));
    return most;
  }

  int largest(size_t first, size_t count) const {
    int most = 1;
    for (size_t b = first; b < first + count; ++b) most = std::max(most, sizes[b]);
    return most;
  }

  // Calls body(first, count, last) for parts of the branches that one launch takes; once where there are none.
  template <class Body>
  void for_launches(const Body& body) const {
    size_t first = 0;
    do {
      const size_t count = std::min<size_t>(kMaxBranches, sizes.size() - first);
      body(first, count, first + count == sizes.size());
      first += count;
    } while (first < sizes.size());
  }
};

// How a map of these sizes is cut so that `side(n)`, the pixels in shared memory along n pixels of a tile, fit, and the
// taps of the largest kernel too.
template <class A, class Side>
Cut cut_of(const Sizes& map, bool last, int largest, const Side& side) {
  const int runs = (map.rows + kRun - 1) / kRun;
  Cut cut{1, kRun, std::min(map.columns, last ? 8 : 32), last};
  if (last) {
    cut.channels = std::min(map.channels, 16);
    cut.rows = kRun * std::clamp(bank::kThreads / (cut.channels * cut.columns), 1, runs);
  } else {
    cut.rows = kRun * std::min({8, runs, bank::kThreads / cut.columns});
    cut.channels = std::clamp(bank::kThreads / (cut.columns * cut.rows / kRun), 1, map.channels);
  }
  const auto fits = [&] {
    return int64_t{cut.channels} * side(cut.rows) * side(cut.columns) <= bank::kTile<A> &&
           int64_t{cut.channels} * largest * largest <= bank::kTaps<A>;
  };
  while (!fits() && cut.channels > 1) cut.channels = (cut.channels + 1) / 2;
  while (!fits() && cut.rows > kRun) cut.rows = (cut.rows / kRun + 1) / 2 * kRun;
  while (!fits() && cut.columns > 1) cut.columns = (cut.columns + 1) / 2;
  STD_TORCH_CHECK(fits(), "depthwise_bank: the kernel is too large for shared memory, choose another backend");
  return cut;
}

int64_t blocks(const Sizes& map, const Cut& cut) {
  return int64_t{map.images} * bank::tiles(map.channels, cut.channels) * bank::tiles(map.rows, cut.rows) *
         bank::tiles(map.columns, cut.columns);
}

// Calls body(stride) with the stride as a constant.
template <class Body>
void with_stride(int64_t stride, const Body& body) {
  if (stride == 1) return body(std::integral_constant<int, 1>{});
  return body(std::integral_constant<int, 2>{});
}

template <class A>
std::vector<Tensor> all_widened(const std::vector<Tensor>& weights) {
  std::vector<Tensor> out;
  for (const Tensor& w : weights) out.push_back(widened<A>(w));
  return out;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

std::vector<Tensor> depthwise_bank_fwd(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> dilations,
                                       int64_t stride, bool relu, bool max_pool, bool avg_pool) {
  const Branches branches(x, weights, dilations, stride, relu, max_pool, avg_pool);
  std::vector<Tensor> ys;
  for (size_t i = 0; i < branches.outputs(); ++i)
    ys.push_back(fresh(x, (x.size(2) + stride - 1) / stride, (x.size(3) + stride - 1) / stride));
  if (x.numel() == 0 || ys.empty()) return ys;
  const bool last_layout = is_channels_last(ys[0]);
  dispatch_floating(x.scalar_type(), "depthwise_bank_fwd", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::vector<Tensor> wide = all_widened<A>(weights);
    branches.for_launches([&](size_t first, size_t count, bool last) {
      bank::Outputs<T> out{};
      out.count = static_cast<int>(count);
      out.relu = relu;
      for (size_t i = 0; i < count; ++i) {
        out.weights[i] = data<const A>(wide[first + i]);
        out.ys[i] = data<T>(ys[first + i]);
        out.sizes[i] = branches.sizes[first + i];
        out.dilations[i] = branches.dilations[first + i];
      }
      if (last && max_pool) out.max = data<T>(ys[weights.size()]);
      if (last && avg_pool) out.average = data<T>(ys[weights.size() + max_pool]);
      const int border = branches.border(first, count);
      const Cut cut = cut_of<A>(sizes_of(ys[0]), last_layout, branches.largest(first, count),
                                [&](int n) { return (n - 1) * stride + 1 + 2 * border; });
      with_stride(stride, [&](auto s) {
        launch(x, &bank::depthwise_bank_fwd_kernel<T, s>, blocks(sizes_of(ys[0]), cut), bank::kThreads,
               data<const T>(x), strides_of(x), sizes_of(x), out, strides_of(ys[0]), sizes_of(ys[0]), cut, border);
      });
    });
  });
  return ys;
}

template <class T>
void input_gradient(const Branches& branches, const std::vector<Tensor>& gs, const Tensor& x,
                    const std::vector<Tensor>& wide, const Tensor& dx) {
  using A = acc_t<T>;
  const size_t convolutions = branches.sizes.size();
  const Sizes g_sizes = sizes_of(gs[0]), x_sizes = sizes_of(x);
  const bool last_layout = is_channels_last(dx);
  std::optional<Tensor> places, sums;
  if (branches.max_pool) {
    places = fresh(gs[0], g_sizes.rows, g_sizes.columns, ScalarType::Char);
    launch(x, &bank::depthwise_bank_places_kernel<T>, (gs[0].numel() + bank::kThreads - 1) / bank::kThreads,
           bank::kThreads, data<const T>(x), strides_of(x), x_sizes, data<int8_t>(*places), strides_of(*places),
           g_sizes, static_cast<int>(branches.stride), is_channels_last(*places));
  }
  if (convolutions > kMaxBranches)
    sums = fresh(dx, x_sizes.rows, x_sizes.columns, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  branches.for_launches([&](size_t first, size_t count, bool last) {
    bank::Gradients<T> in{};
    in.count = static_cast<int>(count);
    in.relu = branches.relu;
    in.add = first > 0;
    in.last = last;
    for (size_t i = 0; i < count; ++i) {
      in.weights[i] = data<const A>(wide[first + i]);
      in.gs[i] = data<const T>(gs[first + i]);
      in.sizes[i] = branches.sizes[first + i];
      in.dilations[i] = branches.dilations[first + i];
    }
    if (last && branches.max_pool) {
      in.max = data<const T>(gs[convolutions]);
      in.places = data<const int8_t>(*places);
    }
    if (last && branches.avg_pool) in.average = data<const T>(gs[convolutions + branches.max_pool]);
    const int border = branches.border(first, count);
    const int stride = static_cast<int>(branches.stride);
    const Cut cut = cut_of<A>(x_sizes, last_layout, branches.largest(first, count),
                              [&](int n) { return (n - 1 + 2 * border) / stride + stride; });
    with_stride(stride, [&](auto s) {
      launch(x, &bank::depthwise_bank_dx_kernel<T, s>, blocks(x_sizes, cut), bank::kThreads, in, strides_of(gs[0]),
             g_sizes, data<const T>(x), strides_of(x), data<T>(dx), sums ? data<A>(*sums) : nullptr, strides_of(dx),
             x_sizes, cut, border);
    });
  });
}

template <class T>
void weight_gradient(const Branches& branches, size_t b, const Tensor& g, const Tensor& x, const Tensor& dw) {
  using A = acc_t<T>;
  const Sizes g_sizes = sizes_of(g);
  const int size = branches.sizes[b], reach = branches.reach(b), stride = static_cast<int>(branches.stride);
  const Cut cut = cut_of<A>(g_sizes, is_channels_last(g), 1, [&](int n) { return (n - 1) * stride + 1 + 2 * reach; });
  const int64_t deep = bank::tiles(g_sizes.channels, cut.channels), all = blocks(g_sizes, cut) / deep;
  const int64_t chunks = (all + bank::kTilesAChunk - 1) / bank::kTilesAChunk;
  const Tensor parts =
      torch::stable::new_empty(g, {int64_t{g_sizes.channels} * size * size, chunks}, ScalarType::Double);
  for (int first = 0; first < size * size; first += bank::kGroup<A>)
    launch(x, &bank::depthwise_bank_dw_kernel<T>, deep * chunks, bank::kThreads, data<const T>(g), strides_of(g),
           g_sizes, data<const T>(x), strides_of(x), sizes_of(x), data<double>(parts), size, branches.dilations[b],
           stride, branches.relu, first, chunks, cut);
  ordered_sum(parts, dw);
}

// What is not asked for is empty.
std::tuple<Tensor, std::vector<Tensor>> depthwise_bank_bwd(std::vector<Tensor> gs, Tensor x,
                                                           std::vector<Tensor> weights, std::vector<int64_t> dilations,
                                                           int64_t stride, bool relu, bool max_pool, bool avg_pool,
                                                           bool x_grad, bool weight_grad) {
  const Branches branches(x, weights, dilations, stride, relu, max_pool, avg_pool);
  STD_TORCH_CHECK(gs.size() == branches.outputs(), "depthwise_bank_bwd: one gradient an output is needed");
  const int64_t rows = (x.size(2) + stride - 1) / stride, columns = (x.size(3) + stride - 1) / stride;
  for (const auto& g : gs)
    STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.dim() == 4 && g.size(0) == x.size(0) &&
                        g.size(1) == x.size(1) && g.size(2) == rows && g.size(3) == columns,
                    "depthwise_bank_bwd: a gradient differs from its output in dtype or shape");
  const int64_t none[] = {0};
  const Tensor dx = x_grad ? fresh(x, x.size(2), x.size(3)) : torch::stable::new_empty(x, {none, 1});
  std::vector<Tensor> dws;
  for (const auto& w : weights)
    dws.push_back(!weight_grad     ? torch::stable::new_empty(w, {none, 1})
                  : x.numel() == 0 ? torch::stable::new_zeros(w, w.sizes())
                                   : torch::stable::new_empty(w, w.sizes()));
  if (x.numel() == 0) return {dx, dws};
  for (auto& g : gs) g = torch::stable::contiguous(g, map_format(is_channels_last(x)));
  dispatch_floating(x.scalar_type(), "depthwise_bank_bwd", [&](auto tag) {
    using T = decltype(tag);
    if (x_grad) input_gradient<T>(branches, gs, x, all_widened<acc_t<T>>(weights), dx);
    if (!weight_grad) return;
    for (size_t b = 0; b < weights.size(); ++b) weight_gradient<T>(branches, b, gs[b], x, dws[b]);
  });
  return {dx, dws};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CUDA, m) {
  m.impl("depthwise_bank_fwd", TORCH_BOX(&fastnas::depthwise_bank_fwd));
  m.impl("depthwise_bank_bwd", TORCH_BOX(&fastnas::depthwise_bank_bwd));
}
