// depthwise_bank: ReLU once, then depthwise convolutions and 3x3 pools that share one input.
// Schema: fastnas/ops/depthwise_bank.py.
//
// Planes (images times channels) are taken kLanes at a time and copied once, with the ReLU, into a zero-padded buffer
// "in lanes": pixel by pixel, the planes side by side (depthwise_bank_pack.h). There a tap of any kernel is one
// multiply-add of a whole vector (depthwise_bank_taps.h), on any width, dilation and stride, and both layouts share one
// kernel. Threads share out the groups of planes. Backward keeps all gradients of a group in the level 2 cache: the
// input gradient of all branches is one sum over all their taps, masked once (depthwise_bank_backward.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "common/results.h"
#include "ops/depthwise_bank_backward.h"
#include "ops/depthwise_bank_forward.h"

namespace fastnas {
namespace {

Tensor fresh(const Tensor& like, int64_t height, int64_t width) {
  return result_map(like, like.size(0), like.size(1), height, width, is_channels_last(like));
}

// t, or a copy in the layout of `like` when neither the channels nor the pixels of t are adjacent.
Tensor readable(const Tensor& t, const Tensor& like) {
  if ((t.size(1) > 1 && t.stride(1) == 1) || t.stride(3) == 1 || t.size(3) == 1) return t;
  return torch::stable::contiguous(t, map_format(is_channels_last(like)));
}

std::vector<Tensor> depthwise_bank_fwd(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> dilations,
                                       int64_t stride, bool relu, bool max_pool, bool avg_pool) {
  const bank::Bank bank(x, weights, dilations, stride, relu, max_pool, avg_pool);
  std::vector<Tensor> ys;
  for (size_t i = 0; i < bank.outputs(); ++i) ys.push_back(fresh(x, bank.s.out_height, bank.s.out_width));
  const Tensor in = readable(x, x);
  dispatch_floating(x.scalar_type(), "depthwise_bank_fwd",
                    [&](auto tag) { bank::Forward<decltype(tag)>(bank, in, weights, ys).run(); });
  return ys;
}

// dw[channel, 0, i, j] from the sums in lanes of its kernel, whose phases are `stride` sums apart.
template <class A>
void store_weight_gradient(Tensor& dw, const double* sums, int64_t stride, int64_t phases) {
  const int64_t channels = dw.size(0), taps = dw.size(2) * dw.size(3);
  std::vector<double> total(dw.numel());
  for (int64_t p = 0; p < phases; ++p)
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t lane = 0; lane < bank::kLanes<A>; ++lane)
        total[(p * bank::kLanes<A> + lane) % channels * taps + k] += sums[p * stride + k * bank::kLanes<A> + lane];
  dispatch_floating(dw.scalar_type(), "depthwise_bank_bwd", [&](auto tag) {
    using W = decltype(tag);
    W* out = static_cast<W*>(dw.data_ptr());
    for (size_t i = 0; i < total.size(); ++i) store(out + i, static_cast<acc_t<W>>(total[i]));
  });
}

// What is not asked for is empty.
std::tuple<Tensor, std::vector<Tensor>> depthwise_bank_bwd(std::vector<Tensor> gs, Tensor x,
                                                           std::vector<Tensor> weights, std::vector<int64_t> dilations,
                                                           int64_t stride, bool relu, bool max_pool, bool avg_pool,
                                                           bool x_grad, bool weight_grad) {
  const bank::Bank bank(x, weights, dilations, stride, relu, max_pool, avg_pool);
  STD_TORCH_CHECK(gs.size() == bank.outputs(), "depthwise_bank_bwd: one gradient an output is needed");
  for (auto& g : gs) {
    STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.dim() == 4 && g.size(0) == bank.s.batch &&
                        g.size(1) == bank.s.channels && g.size(2) == bank.s.out_height && g.size(3) == bank.s.out_width,
                    "depthwise_bank_bwd: a gradient differs from its output in dtype or shape");
    g = readable(g, x);
  }
  const Tensor in = readable(x, x);
  const int64_t none[] = {0};
  const Tensor dx = x_grad ? fresh(x, bank.s.height, bank.s.width) : torch::stable::new_empty(x, {none, 1});
  std::vector<Tensor> dws;
  for (const auto& w : weights)
    dws.push_back(weight_grad ? torch::stable::new_empty(w, w.sizes()) : torch::stable::new_empty(w, {none, 1}));
  dispatch_floating(x.scalar_type(), "depthwise_bank_bwd", [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const bank::Backward<T> job(bank, gs, in, weights, x_grad ? &dx : nullptr, weight_grad);
    const std::vector<double> sums = job.run();
    if (!weight_grad) return;
    const double* first = sums.data();
    for (size_t k = 0; k < dws.size(); ++k) {
      store_weight_gradient<A>(dws[k], first, job.sums(), job.phases());
      first += job.sums(k);
    }
  });
  return {dx, dws};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("depthwise_bank_fwd", TORCH_BOX(&fastnas::depthwise_bank_fwd));
  m.impl("depthwise_bank_bwd", TORCH_BOX(&fastnas::depthwise_bank_bwd));
}
