// partial_shuffle: some channels are mixed, the others bypass (max-pooled on stride 2), and every channel
// goes straight to its place in the result. Schema: fastnas/ops/partial_shuffle.py. Forward reads each input
// and writes the result once; backward reads the gradient (and what the weights and the pool need) and writes
// each gradient once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/results.h"
#include "ops/partial_shuffle_backward.h"
#include "ops/partial_shuffle_forward.h"

namespace fastnas {
namespace {

using namespace shuffle;

// Runs a job on torch's threads, compiled for this processor; `streams` is how many tensors a piece touches.
template <class Job>
void run(const Job& job, int64_t streams) {
  constexpr int64_t kElementsAThread = 1 << 16;  // less is not worth waking a thread for
  const Sizes& s = job.s;
  const int64_t grain = std::max<int64_t>(1, kElementsAThread / std::max<int64_t>(1, s.run * s.piece() * streams));
  torch::stable::parallel_for(0, s.batch * s.runs(), grain, [&](int64_t begin, int64_t end) {
    vectorised([&]() FASTNAS_INLINE { s.channels_last ? job.pixels(begin, end) : job.planes(begin, end); });
    end_of_stream();
  });
}

template <class A>
std::vector<A> weights_or_one(const std::optional<Tensor>& weights, size_t paths) {
  std::vector<A> w = weights ? host_values<A>(*weights) : std::vector<A>{A(1)};
  STD_TORCH_CHECK(w.size() == paths, "partial_shuffle: one weight a tensor is needed");
  return w;
}

int64_t halved(int64_t n, int64_t stride) { return stride == 1 ? n : (n + 1) / 2; }

Tensor partial_shuffle_fwd(std::vector<Tensor> mixed, std::optional<Tensor> weights, Tensor bypass,
                           std::optional<Tensor> channels, int64_t stride) {
  STD_TORCH_CHECK(!mixed.empty() && mixed[0].dim() == 4 && bypass.dim() == 4 && (stride == 1 || stride == 2) &&
                      bypass.size(0) == mixed[0].size(0) && bypass.scalar_type() == mixed[0].scalar_type() &&
                      halved(bypass.size(2), stride) == mixed[0].size(2) &&
                      halved(bypass.size(3), stride) == mixed[0].size(3),
                  "partial_shuffle: mixed and bypass do not fit together");
  check_alike("partial_shuffle", mixed, mixed[0]);
  const bool last = is_channels_last(bypass);
  const int64_t m = mixed[0].size(1), total = bypass.size(1) + (channels ? 0 : m);
  mixed = in_pieces(mixed, last);
  Sizes s{.batch = bypass.size(0),
          .mixed = m,
          .bypass = bypass.size(1),
          .height = mixed[0].size(2),
          .width = mixed[0].size(3),
          .bypass_height = bypass.size(2),
          .bypass_width = bypass.size(3),
          .pool = stride == 2,
          .channels_last = last};
  s.set_runs(mixed);
  const Places to = find_places(channels, m, total);
  Tensor y = result_map(bypass, s.batch, total, s.height, s.width, last);
  s.large = past_caches(y.numel() * y.element_size());
  dispatch_floating(y.scalar_type(), "partial_shuffle_fwd", [&](auto tag) {
    using T = decltype(tag);
    const Forward<T> job{s,        to, weights_or_one<acc_t<T>>(weights, mixed.size()), maps<T>(mixed), Map<T>(bypass),
                         Map<T>(y)};
    run(job, mixed.size() + 1);
  });
  return y;
}

// `mixed` is empty when the weights are frozen; `bypass` is there when its gradient depends on it.
std::tuple<std::vector<Tensor>, std::vector<double>, Tensor> gradients(const Tensor& grad, std::vector<Tensor> mixed,
                                                                       const std::optional<Tensor>& weights,
                                                                       const std::optional<Tensor>& bypass,
                                                                       const std::optional<Tensor>& channels, int64_t m,
                                                                       bool bypass_grad) {
  STD_TORCH_CHECK(grad.dim() == 4, "partial_shuffle: the gradient must have 4 dimensions");
  const bool last = is_channels_last(grad), pool = bypass.has_value();
  const int64_t total = grad.size(1), rest = channels ? total : total - m;
  mixed = in_pieces(mixed, last);
  Sizes s{.batch = grad.size(0),
          .mixed = m,
          .bypass = rest,
          .height = grad.size(2),
          .width = grad.size(3),
          .bypass_height = pool ? bypass->size(2) : grad.size(2),
          .bypass_width = pool ? bypass->size(3) : grad.size(3),
          .pool = pool,
          .channels_last = last};
  s.set_runs(mixed);
  STD_TORCH_CHECK(!pool || (bypass->dim() == 4 && bypass->size(0) == s.batch && bypass->size(1) == rest &&
                            halved(s.bypass_height, 2) == s.height && halved(s.bypass_width, 2) == s.width &&
                            bypass->scalar_type() == grad.scalar_type()),
                  "partial_shuffle: bypass does not fit the gradient");
  const Places from = find_places(channels, m, total);
  const size_t paths = weights ? weights->numel() : 1;
  std::vector<Tensor> dmixed;
  for (size_t k = 0; k < paths; ++k) dmixed.push_back(result_map(grad, s.batch, m, s.height, s.width, last));
  if (!mixed.empty()) {
    STD_TORCH_CHECK(mixed.size() == paths, "partial_shuffle: one weight a tensor is needed");
    check_alike("partial_shuffle", mixed, dmixed[0]);
  }
  const int64_t none[] = {0};
  const Tensor dbypass = bypass_grad ? result_map(grad, s.batch, rest, s.bypass_height, s.bypass_width, last)
                                     : torch::stable::new_empty(grad, {none, 1});
  s.large = past_caches((paths * s.batch * m * s.plane() + dbypass.numel()) * grad.element_size());
  // Channels last gathers g pixel by pixel; planes of g are read as they are.
  const Tensor g = last ? grad : in_pieces({grad}, false)[0];
  const Tensor x = in_pixels(pool ? *bypass : g, last);
  std::vector<double> total_dots(paths, 0.0);
  dispatch_floating(g.scalar_type(), "partial_shuffle_bwd", [&](auto tag) {
    using T = decltype(tag);
    const auto w = weights_or_one<acc_t<T>>(weights, paths);
    const Map<T> dx(bypass_grad ? dbypass : g);
    std::vector<double> dots(mixed.empty() ? 0 : s.batch * s.mixed_runs() * paths);
    const Backward<T> job{s,         from, w,           Map<T>(g),  maps<T>(mixed), maps<T>(dmixed),
                          Map<T>(x), dx,   bypass_grad, dots.data()};
    run(job, 2 * paths + 1);
    // Pieces are added in their order: the sums do not depend on the number of threads.
    for (size_t i = 0; i < dots.size(); ++i) total_dots[i % paths] += dots[i];
  });
  return {dmixed, total_dots, dbypass};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> partial_shuffle_bwd(Tensor g, std::vector<Tensor> mixed, Tensor weights,
                                                                    std::optional<Tensor> bypass,
                                                                    std::optional<Tensor> channels, bool bypass_grad) {
  STD_TORCH_CHECK(!mixed.empty() && mixed[0].dim() == 4, "partial_shuffle: mixed tensors are needed");
  auto [dmixed, dots, dbypass] = gradients(g, mixed, weights, bypass, channels, mixed[0].size(1), bypass_grad);
  Tensor dweights = torch::stable::new_empty(weights, weights.sizes());
  dispatch_floating(dweights.scalar_type(), "partial_shuffle_bwd", [&, &sums = dots](auto tag) {
    using W = decltype(tag);
    W* out = static_cast<W*>(dweights.data_ptr());
    for (size_t k = 0; k < sums.size(); ++k) store(out + k, static_cast<acc_t<W>>(sums[k]));
  });
  return {dmixed, dweights, dbypass};
}

std::tuple<std::vector<Tensor>, Tensor> partial_shuffle_bwd_frozen(Tensor g, std::optional<Tensor> weights,
                                                                   std::optional<Tensor> bypass,
                                                                   std::optional<Tensor> channels,
                                                                   int64_t mixed_channels, bool bypass_grad) {
  auto [dmixed, dots, dbypass] = gradients(g, {}, weights, bypass, channels, mixed_channels, bypass_grad);
  return {dmixed, dbypass};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("partial_shuffle_fwd", TORCH_BOX(&fastnas::partial_shuffle_fwd));
  m.impl("partial_shuffle_bwd", TORCH_BOX(&fastnas::partial_shuffle_bwd));
  m.impl("partial_shuffle_bwd_frozen", TORCH_BOX(&fastnas::partial_shuffle_bwd_frozen));
}
