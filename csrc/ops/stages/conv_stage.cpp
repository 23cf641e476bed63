// ReLU, depthwise and pointwise convolution of many branches; schema and meaning: fastnas/ops/stages/conv_stage.py.

#include "ops/stages/conv_stage.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastnas {
namespace {

// The weights of the parts, made dense in place.
template <class T>
std::vector<PartWeights<T>> paired(const char* op, int64_t channels, std::vector<Tensor>& depthwise,
                                   std::vector<Tensor>& pointwise) {
  STD_TORCH_CHECK(depthwise.size() == pointwise.size(), op, ": every part needs two weights");
  std::vector<PartWeights<T>> weights;
  for (size_t p = 0; p < pointwise.size(); ++p) {
    Tensor &kernel = depthwise[p], &matrix = pointwise[p];
    const int64_t side = kernel.numel() ? kernel.size(-1) : 1;
    STD_TORCH_CHECK(
        matrix.numel() == matrix.size(0) * channels && (!kernel.numel() || kernel.numel() == side * side * channels),
        op, ": weights do not fit the channels of the maps");
    kernel = torch::stable::contiguous(kernel), matrix = torch::stable::contiguous(matrix);
    weights.push_back({kernel.numel() ? data<T>(kernel) : nullptr, side, data<T>(matrix), matrix.size(0)});
  }
  return weights;
}

std::tuple<Tensor, Tensor> conv_stage_fwd(std::vector<Tensor> xs, std::optional<Tensor> norms,
                                          std::vector<int64_t> parts, std::vector<Tensor> depthwise_weights,
                                          std::vector<Tensor> pointwise_weights, int64_t stride, bool statistics) {
  constexpr const char* op = "conv_stage_fwd";
  STD_TORCH_CHECK(!xs.empty(), op, ": there is no input");
  const Map map = map_of(op, xs[0]);
  const int64_t sources = static_cast<int64_t>(xs.size());
  check_same_dtype(op, xs, xs[0].scalar_type());
  Tensor z, stats;
  dispatch_full_width(xs[0].scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Plan<T> plan(op, map, parts, paired<T>(op, map.channels, depthwise_weights, pointwise_weights), stride,
                       sources, false);
    const Frame<T>& f = plan.frame;
    z = new_map(xs[0], {plan.outputs, map.batch, f.out_height, f.out_width, plan.out_channels});
    stats = torch::stable::new_empty(
        xs[0], statistics ? std::vector<int64_t>{plan.outputs, 2, plan.out_channels} : std::vector<int64_t>{0});
    if (norms) norms = torch::stable::contiguous(*norms);
    convolve(plan, views_like<T>(op, xs, map), norms ? data<T>(*norms) : nullptr, data<T>(z),
             statistics ? data<T>(stats) : nullptr);
  });
  return {z, stats};
}

std::tuple<Tensor, Tensor, Tensor> conv_stage_bwd(std::vector<Tensor> gs, std::vector<Tensor> zs, Tensor coef,
                                                  std::vector<Tensor> xs, std::optional<Tensor> norms,
                                                  std::vector<int64_t> parts, std::vector<Tensor> depthwise_weights,
                                                  std::vector<Tensor> pointwise_weights, int64_t stride,
                                                  std::optional<Tensor> base, bool need_dx, bool need_dw) {
  constexpr const char* op = "conv_stage_bwd";
  STD_TORCH_CHECK(!xs.empty(), op, ": there is no input");
  const ScalarType dtype = xs[0].scalar_type();
  const Map map = map_of(op, xs[0]);
  const int64_t sources = static_cast<int64_t>(xs.size());
  for (const auto& tensors : {xs, gs, zs, {coef}}) check_same_dtype(op, tensors, dtype);
  STD_TORCH_CHECK(!base || sources == 1, op, ": a base goes with one source only");
  Tensor dx, dots, dw;
  dispatch_full_width(dtype, op, [&](auto tag) {
    using T = decltype(tag);
    const Plan<T> plan(op, map, parts, paired<T>(op, map.channels, depthwise_weights, pointwise_weights), stride,
                       sources, true);
    const Frame<T>& f = plan.frame;
    STD_TORCH_CHECK(static_cast<int64_t>(gs.size()) == plan.outputs && gs.size() == zs.size() &&
                        coef.numel() == plan.outputs * 4 * plan.out_channels,
                    op, ": every output needs its g, its z and its coefficients");
    const Map out_map{map.batch, f.out_height, f.out_width, plan.out_channels, plan.out_channels};
    const auto views = views_like<T>(op, xs, map);
    for (const auto& view : views)
      STD_TORCH_CHECK(!norms || view.map.pixel == map.channels, op, ": inputs with norms must be dense");
    const auto sized = [&](bool wanted, std::vector<int64_t> size) {
      return torch::stable::new_empty(xs[0], wanted ? size : std::vector<int64_t>{0});
    };
    dx = need_dx ? new_map(xs[0], {sources, map.batch, f.height, f.width, f.channels}) : sized(false, {});
    dots = sized(need_dx && norms.has_value(), {sources, 2, f.channels});
    dw = sized(need_dw, {plan.weights});
    coef = torch::stable::contiguous(coef);
    if (norms) norms = torch::stable::contiguous(*norms);
    std::optional<View<T>> under;
    if (base) under = View<T>{data<T>(*base), map_like(op, *base, map)};
    convolve_backward(plan, views_like<T>(op, gs, out_map), views_like<T>(op, zs, out_map),
                      static_cast<const T*>(coef.data_ptr()), views, norms ? data<T>(*norms) : nullptr, under,
                      need_dx ? data<T>(dx) : nullptr, need_dx && norms ? data<T>(dots) : nullptr,
                      need_dw ? data<T>(dw) : nullptr);
  });
  return {dx, dots, dw};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("conv_stage_fwd", TORCH_BOX(&fastnas::conv_stage_fwd));
  m.impl("conv_stage_bwd", TORCH_BOX(&fastnas::conv_stage_bwd));
}
