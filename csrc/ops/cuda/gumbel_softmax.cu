// Samples of concrete distributions and their gradient on a GPU, with the noise of the CPU. Schema:
// fastnas/ops/gumbel_softmax.py; kernels: gumbel_softmax.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/check.h"
#include "ops/cuda/gumbel_softmax.cuh"

namespace fastnas {
namespace {

template <class T>
Samples<T> samples_of(const Tensor& x, int64_t seed, double tau, const std::optional<Tensor>& seed_tensor,
                      const std::optional<Tensor>& tau_tensor) {
  STD_TORCH_CHECK(!seed_tensor || (seed_tensor->numel() == 1 && seed_tensor->scalar_type() == ScalarType::Long),
                  "gumbel_softmax: seed must be one int64");
  STD_TORCH_CHECK(!tau_tensor || tau_tensor->numel() == 1, "gumbel_softmax: tau must be one number");
  const int64_t choices = x.size(x.dim() - 1);
  return {static_cast<const T*>(x.data_ptr()),
          x.numel() / choices,
          choices,
          static_cast<uint64_t>(seed),
          seed_tensor ? static_cast<const int64_t*>(seed_tensor->data_ptr()) : nullptr,
          {tau_tensor ? tau_tensor->data_ptr() : nullptr, tau_tensor ? tau_tensor->scalar_type() : ScalarType::Double,
           tau}};
}

// Calls body(kLong, lanes, blocks, threads): how many threads share a row, and how they are launched.
template <class Body>
void with_teams(int64_t rows, int64_t choices, const Body& body) {
  if (choices > kWarp) {
    constexpr int kThreads = 256;
    return body(std::true_type{}, kThreads, rows, kThreads);
  }
  constexpr int kThreads = 128;
  int lanes = 1;
  while (lanes < choices) lanes *= 2;
  return body(std::false_type{}, lanes, (rows * lanes + kThreads - 1) / kThreads, kThreads);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor gumbel_softmax_fwd(Tensor logits, int64_t seed, double tau, std::optional<Tensor> seed_tensor,
                          std::optional<Tensor> tau_tensor, bool hard) {
  STD_TORCH_CHECK(logits.dim() > 0, "gumbel_softmax: logits must have at least one dimension");
  const Tensor x = dense(logits);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), "gumbel_softmax", [&](auto tag) {
    using T = decltype(tag);
    const auto samples = samples_of<T>(x, seed, tau, seed_tensor, tau_tensor);
    with_teams(samples.rows, samples.choices, [&](auto is_long, int lanes, int64_t blocks, int threads) {
      launch(x, &gumbel_softmax_fwd_kernel<T, is_long>, blocks, threads, samples, static_cast<T*>(y.data_ptr()), hard,
             lanes);
    });
  });
  return y;
}

// A sample that was kept is not read: drawing it again costs nothing here.
Tensor gumbel_softmax_bwd(Tensor g, Tensor logits, int64_t seed, double tau, std::optional<Tensor> seed_tensor,
                          std::optional<Tensor> tau_tensor, std::optional<Tensor>) {
  STD_TORCH_CHECK(logits.dim() > 0, "gumbel_softmax: logits must have at least one dimension");
  STD_TORCH_CHECK(g.scalar_type() == logits.scalar_type() && same_sizes(g, logits),
                  "gumbel_softmax: the gradient must have the shape and dtype of logits");
  const Tensor x = dense(logits), gy = dense(g);
  Tensor dx = torch::stable::empty_like(x);
  if (x.numel() == 0) return dx;
  dispatch_floating(x.scalar_type(), "gumbel_softmax", [&](auto tag) {
    using T = decltype(tag);
    const auto samples = samples_of<T>(x, seed, tau, seed_tensor, tau_tensor);
    with_teams(samples.rows, samples.choices, [&](auto is_long, int lanes, int64_t blocks, int threads) {
      launch(x, &gumbel_softmax_bwd_kernel<T, is_long>, blocks, threads, samples, static_cast<const T*>(gy.data_ptr()),
             static_cast<T*>(dx.data_ptr()), lanes);
    });
  });
  return dx;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CUDA, m) {
  m.impl("gumbel_softmax_fwd", TORCH_BOX(&fastnas::gumbel_softmax_fwd));
  m.impl("gumbel_softmax_bwd", TORCH_BOX(&fastnas::gumbel_softmax_bwd));
}
