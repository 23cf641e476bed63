// A convolution stage of one output with its batch normalisation, forward and backward, without a tensor for each step.
// Schema and meaning: fastnas/ops/stages/norm_stage.py.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/conv_stage.h"
#include "ops/stages/flat_weights.h"
#include "ops/stages/node_sum.h"

namespace fastnas {
namespace {

template <class T>
Plan<T> plan_of(const char* op, const Tensor& x, const Tensor& weights, const std::vector<int64_t>& shapes,
                const std::vector<int64_t>& parts, int64_t stride, bool backward) {
  const Map map = map_of(op, x);
  check_same_dtype(op, {weights}, x.scalar_type());
  FlatWeights<T> flat(op, weights, map.channels);
  Plan<T> plan(op, map, parts, flat.take(shapes), stride, 1, backward);
  flat.finish();
  STD_TORCH_CHECK(plan.outputs == 1, op, ": there is one output");
  return plan;
}

std::tuple<Tensor, Tensor, Tensor> norm_stage_fwd(Tensor x, Tensor weights, std::vector<int64_t> shapes,
                                                  std::vector<int64_t> parts, int64_t stride,
                                                  std::optional<Tensor> given, double eps) {
  constexpr const char* op = "norm_stage_fwd";
  Tensor y, norms, stats;
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Plan<T> plan = plan_of<T>(op, x, weights, shapes, parts, stride, false);
    const View<T> view{data<T>(x), map_of(op, x)};
    const int64_t channels = plan.out_channels;
    const Map out{view.map.batch, plan.frame.out_height, plan.frame.out_width, channels, channels};
    y = new_map(x, {out.batch, out.height, out.width, channels});
    norms = torch::stable::new_empty(x, {1, 2, channels});
    stats = torch::stable::new_empty(x, given ? std::vector<int64_t>{0} : std::vector<int64_t>{1, 2, channels});
    if (given) {
      check_same_dtype(op, {*given}, x.scalar_type());
      STD_TORCH_CHECK(given->numel() == 2 * channels, op, ": the statistics do not fit the output");
      given = torch::stable::contiguous(*given);
    }
    convolve<T>(plan, {view}, nullptr, data<T>(y), given ? nullptr : data<T>(stats));
    const T* known = given ? data<T>(*given) : data<T>(stats);
    T* norm = data<T>(norms);
    std::vector<T> coef(2 * channels);
    for (int64_t c = 0; c < channels; ++c) {
      coef[channels + c] = norm[c] = known[c];
      coef[c] = norm[channels + c] = T(1) / std::sqrt(known[channels + c] + static_cast<T>(eps));
    }
    sum_terms<T>(data<T>(y), out, {View<T>{data<T>(y), out}}, coef.data(), false);
  });
  return {y, norms, stats};
}

// With y = r (z - mean) in the place of z: dz = r (g - sum g / n - y sum g y / n).
std::tuple<Tensor, Tensor> norm_stage_bwd(Tensor g, Tensor y, Tensor norms, Tensor x, Tensor weights,
                                          std::vector<int64_t> shapes, std::vector<int64_t> parts, int64_t stride,
                                          bool training, bool need_dx, bool need_dw) {
  constexpr const char* op = "norm_stage_bwd";
  Tensor dx = torch::stable::new_empty(x, {0}), dw = dx;
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    check_same_dtype(op, {g, y, norms}, x.scalar_type());
    const Plan<T> plan = plan_of<T>(op, x, weights, shapes, parts, stride, true);
    const View<T> view{data<T>(x), map_of(op, x)};
    const int64_t channels = plan.out_channels;
    const Map out{view.map.batch, plan.frame.out_height, plan.frame.out_width, channels, channels};
    STD_TORCH_CHECK(norms.numel() == 2 * channels, op, ": the norms do not fit the output");
    const auto gs = views_like<T>(op, {g}, out), ys = views_like<T>(op, {y}, out);
    norms = torch::stable::contiguous(norms);
    const T* deviation = data<T>(norms) + channels;
    std::vector<T> zero(channels), dots(2 * channels), coef(4 * channels);
    if (training) dot_terms<T>(gs, ys, zero.data(), channels, dots.data());
    const T count = static_cast<T>(out.batch * out.pixels());
    for (int64_t c = 0; c < channels; ++c) {
      coef[c] = deviation[c];
      coef[channels + c] = -deviation[c] * dots[channels + c] / count;
      coef[2 * channels + c] = -deviation[c] * dots[c] / count;
    }
    if (need_dx) dx = new_map(x, {view.map.batch, view.map.height, view.map.width, view.map.channels});
    if (need_dw) dw = torch::stable::new_empty(x, {plan.weights});
    convolve_backward<T>(plan, gs, ys, coef.data(), {view}, nullptr, std::nullopt, need_dx ? data<T>(dx) : nullptr,
                         nullptr, need_dw ? data<T>(dw) : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("norm_stage_fwd", TORCH_BOX(&fastnas::norm_stage_fwd));
  m.impl("norm_stage_bwd", TORCH_BOX(&fastnas::norm_stage_bwd));
}
