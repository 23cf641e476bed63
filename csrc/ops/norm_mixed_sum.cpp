// y = sum_k w[k] * (y_k - mean_k) / sqrt(var_k + eps), over the channels' batch or running statistics, plus
// un-normalised terms, and its gradients. Schema: fastnas/ops/norm_mixed_sum.py. The normalised tensors never exist:
// one pass over the inputs makes the sums of each channel, a second one writes the results.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "common/results.h"
#include "ops/norm_mixed_sum_loops.h"
#include "ops/norm_mixed_sum_plan.h"
#include "ops/norm_mixed_sum_walk.h"

namespace fastnas {
namespace {

using norm::Block;
using norm::Gradient;
using norm::kLanes;
using norm::Lanes;
using norm::Maps;
using norm::PerLane;
using norm::Plan;
using norm::Same;
using norm::Term;
using norm::two_passes;

std::vector<Tensor> joined(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  std::vector<Tensor> all = a;
  all.insert(all.end(), b.begin(), b.end());
  return all;
}

// By channel and path, [paths, channels].
std::vector<double> inverse_deviations(const std::vector<double>& var, double eps) {
  std::vector<double> out;
  for (double v : var) out.push_back(1 / std::sqrt(v + eps));
  return out;
}

template <class A, class Statistics>
void store_statistics(const Tensor& out, const Statistics& values) {
  A* p = static_cast<A*>(out.data_ptr());
  for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<A>(values[i]);
}

// y = bias[c] + sum_k scales[k, c] * (x_k - centres[k, c]), complete for a tile's channels once finish(tile) returns.
// Centring costs a subtraction and saves the digits that a large mean takes from a plain sum of products; the bias
// makes up for the rounding of the centres.
template <class T>
struct Output {
  using A = acc_t<T>;
  const Maps<T>& maps;
  int64_t paths;
  std::vector<A> scales, centres, bias;

  Output(const Maps<T>& m, int64_t path_count)
      : maps(m),
        paths(path_count),
        scales(path_count * m.plan.channels),
        centres(path_count * m.plan.channels),
        bias(m.plan.channels) {}

  // From what the tile's channels are normalised with; plain paths follow the normalised ones.
  void finish(int64_t tile, const std::vector<double>& w, const std::vector<double>& mean,
              const std::vector<double>& inverse) {
    const Plan& plan = maps.plan;
    const int64_t norms = mean.size() / plan.channels, first = plan.first_channel(tile);
    for (int64_t c = first; c < first + plan.channels_of(tile); ++c) {
      double rest = 0;
      for (int64_t k = 0; k < paths; ++k) {
        const int64_t i = k * plan.channels + c;
        scales[i] = static_cast<A>(k < norms ? w[k] * inverse[i] : w[k]);
        if (k >= norms) continue;
        centres[i] = static_cast<A>(mean[i]);
        rest += w[k] * inverse[i] * (static_cast<double>(centres[i]) - mean[i]);
      }
      bias[c] = static_cast<A>(rest);
    }
  }

  // The paths are tensors 0, 1, ... of the plan, y is the one after them.
  void apply(int64_t tile, int64_t segment) const {
    const Plan& plan = maps.plan;
    const int64_t channels = plan.channels;
    std::vector<norm::Rows<const T>> x(paths);
    const auto run = [&](const auto& terms, const auto& offset) {
      plan.for_each_block(tile, segment, [&](const Block& b) {
        for (int64_t k = 0; k < paths; ++k) x[k] = maps.read(k, b);
        const auto y = maps.write(paths, b);
        vectorised([&]() FASTNAS_INLINE {
          norm::sum_of_terms<Plan::kBlockSize>(y, x.data(), terms.data(), offset, paths, b.rows, b.lanes);
        });
      });
    };
    if (plan.planes) {
      std::vector<Term<Same<A>>> terms;
      for (int64_t k = 0; k < paths; ++k)
        terms.push_back({{scales[k * channels + tile]}, {centres[k * channels + tile]}});
      return run(terms, Same<A>{bias[tile]});
    }
    const Lanes lanes(plan, tile);
    std::vector<A> tables((2 * paths + 1) * kLanes);
    std::vector<Term<PerLane<A>>> terms;
    for (int64_t k = 0; k < paths; ++k) {
      A* to = &tables[2 * k * kLanes];
      lanes.spread(&scales[k * channels], to);
      lanes.spread(&centres[k * channels], to + kLanes);
      terms.push_back({{to}, {to + kLanes}});
    }
    A* offset = &tables[2 * paths * kLanes];
    lanes.spread(bias.data(), offset);
    run(terms, PerLane<A>{offset});
  }
};

std::tuple<Tensor, Tensor, Tensor> norm_mixed_sum_fwd(std::vector<Tensor> ys, std::vector<Tensor> plain, Tensor w,
                                                      double eps) {
  const std::vector<Tensor> xs = joined(ys, plain);
  STD_TORCH_CHECK(!ys.empty() && ys[0].dim() >= 2 && w.numel() == static_cast<int64_t>(xs.size()),
                  "norm_mixed_sum_fwd: one weight a tensor is needed");
  check_alike("norm_mixed_sum_fwd", xs, ys[0]);
  const Tensor y = result_like(ys[0]);
  const Plan plan(joined(xs, {y}), y);
  const int64_t norms = ys.size(), paths = xs.size(), channels = plan.channels, count = plan.values_a_channel();
  const bool wide = y.scalar_type() == ScalarType::Double;
  const auto statistic = [&] {
    return torch::stable::new_empty(y, {norms, channels}, wide ? ScalarType::Double : ScalarType::Float);
  };
  const Tensor mean = statistic(), var = statistic();
  const auto weights = host_values<double>(w);
  dispatch_floating(y.scalar_type(), "norm_mixed_sum_fwd", [&](auto tag) {
    using T = decltype(tag);
    const Maps<T> maps(plan);
    Output<T> output(maps, paths);
    const int64_t all = norms * channels;
    // Sums run over y - shift, so that a mean far from zero costs no digits.
    std::vector<double> shifts(all), means(all), vars(all), inverses(all), partial(plan.segments * 2 * all);
    for (int64_t i = 0; i < all; ++i) shifts[i] = plan.typical(i / channels, maps.base[i / channels], i % channels);
    const auto sum = [&](int64_t tile, int64_t segment) {
      const Lanes lanes(plan, tile);
      for (int64_t k = 0; k < norms; ++k) {
        double first[kLanes] = {}, second[kLanes] = {};
        acc_t<T> shift[kLanes];
        lanes.spread(&shifts[k * channels], shift);
        plan.for_each_narrow_block(tile, segment, [&](const Block& b, const Block& next) {
          const auto rows = maps.read(k, b), ahead = maps.read(k, next);
          vectorised([&]() FASTNAS_INLINE {
            norm::prefetch(ahead, next.rows, next.lanes);
            norm::moments(first, second, rows, shift, b.rows, b.lanes);
          });
        });
        double* to = &partial[(segment * norms + k) * 2 * channels];
        lanes.gather(first, to);
        lanes.gather(second, to + channels);
      }
    };
    const auto finish = [&](int64_t tile) {
      const int64_t begin = plan.first_channel(tile), end = begin + plan.channels_of(tile);
      for (int64_t k = 0; k < norms; ++k) {
        for (int64_t c = begin; c < end; ++c) {
          double first = 0, second = 0;
          for (int64_t s = 0; s < plan.segments; ++s) {
            const double* from = &partial[(s * norms + k) * 2 * channels + c];
            first += from[0];
            second += from[channels];
          }
          const int64_t i = k * channels + c;
          const double delta = first / count, v = second / count - delta * delta;
          means[i] = shifts[i] + delta;
          vars[i] = v < 0 ? 0 : v;
          inverses[i] = 1 / std::sqrt(vars[i] + eps);
        }
      }
      output.finish(tile, weights, means, inverses);
    };
    two_passes(plan, paths + norms + 1, sum, finish,
               [&](int64_t tile, int64_t segment) { output.apply(tile, segment); });
    store_statistics<acc_t<T>>(mean, means);
    store_statistics<acc_t<T>>(var, vars);
  });
  return {y, mean, var};
}

Tensor norm_mixed_sum_eval(std::vector<Tensor> ys, std::vector<Tensor> plain, Tensor w, Tensor mean, Tensor var,
                           double eps) {
  const std::vector<Tensor> xs = joined(ys, plain);
  STD_TORCH_CHECK(!ys.empty() && ys[0].dim() >= 2 && w.numel() == static_cast<int64_t>(xs.size()),
                  "norm_mixed_sum_eval: one weight a tensor is needed");
  check_alike("norm_mixed_sum_eval", xs, ys[0]);
  const Tensor y = result_like(ys[0]);
  const Plan plan(joined(xs, {y}), y);
  const auto means = host_values<double>(mean), inverses = inverse_deviations(host_values<double>(var), eps);
  STD_TORCH_CHECK(static_cast<int64_t>(means.size()) == plan.channels * static_cast<int64_t>(ys.size()) &&
                      means.size() == inverses.size(),
                  "norm_mixed_sum_eval: statistics must be [tensors, channels]");
  const auto weights = host_values<double>(w);
  dispatch_floating(y.scalar_type(), "norm_mixed_sum_eval", [&](auto tag) {
    using T = decltype(tag);
    const Maps<T> maps(plan);
    Output<T> output(maps, xs.size());
    two_passes(
        plan, xs.size() + 1, [](int64_t, int64_t) {},
        [&](int64_t tile) { output.finish(tile, weights, means, inverses); },
        [&](int64_t tile, int64_t segment) { output.apply(tile, segment); });
  });
  return y;
}

// What a backward is asked for: the gradients of the maps, of the weights, or both.
struct Backward {
  const char* op;
  bool maps, weights, training;
  double eps;
};

using Gradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor>;

// Coefficients of the gradients, by channel.
template <class A>
struct Table {
  std::vector<A> p, q, mean, r;
  explicit Table(int64_t size) : p(size), q(size), mean(size), r(size) {}
};

Gradients backward(const Backward& ask, const Tensor& g, const std::vector<Tensor>& ys,
                   const std::vector<Tensor>& plain, const Tensor& w, const Tensor& mean, const Tensor& var) {
  const Tensor like = torch::stable::empty_like(ys.empty() ? g : ys[0]);
  STD_TORCH_CHECK(g.dim() >= 2 && mean.dim() == 2 && mean.size(1) == g.size(1) && same_sizes(mean, var), ask.op,
                  ": statistics must be [tensors, channels]");
  const int64_t norms = mean.size(0), paths = w.numel(), channels = g.size(1);
  const bool summing = ask.weights || ask.training;
  const std::vector<Tensor> read = joined(ys, plain);
  STD_TORCH_CHECK(norms <= paths && static_cast<int64_t>(ys.size()) == (summing ? norms : 0) &&
                      static_cast<int64_t>(plain.size()) == (ask.weights ? paths - norms : 0),
                  ask.op, ": one weight a tensor is needed");
  check_alike(ask.op, read, g);

  std::vector<Tensor> tensors = joined({g}, read), outputs;  // g, what is read, what is written
  for (int64_t k = 0; ask.maps && k < paths; ++k) outputs.push_back(result_like(like));
  const int64_t dots = read.size(), written = tensors.size();
  const bool large = past_caches(static_cast<int64_t>(outputs.size()) * g.numel() * g.element_size());
  const Plan plan(joined(tensors, outputs), like);
  const Tensor dw = torch::stable::new_empty(
      w, ask.weights ? std::vector<int64_t>(w.sizes().begin(), w.sizes().end()) : std::vector<int64_t>{0});
  const auto weights = host_values<double>(w), means = host_values<double>(mean),
             inverses = inverse_deviations(host_values<double>(var), ask.eps);
  std::vector<double> weight_grads(paths * channels);  // by channel

  dispatch_floating(g.scalar_type(), ask.op, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Maps<T> maps(plan);
    std::vector<double> partial(plan.segments * (1 + dots) * channels);  // of g, then of g (y_k - mean_k)
    Table<A> table(paths * channels);

    const auto sum = [&](int64_t tile, int64_t segment) {
      if (!summing) return;
      const Lanes lanes(plan, tile);
      std::vector<double> totals((1 + dots) * kLanes);
      std::vector<A> centres(dots * kLanes);
      for (int64_t k = 0; k < norms; ++k) lanes.spread(&means[k * channels], &centres[k * kLanes]);
      plan.for_each_narrow_block(tile, segment, [&](const Block& b, const Block& next) {
        const auto gs = maps.read(0, b), ahead = maps.read(0, next);
        vectorised([&]() FASTNAS_INLINE {
          norm::prefetch(ahead, next.rows, next.lanes);
          norm::totals(totals.data(), gs, b.rows, b.lanes);
        });
      });
      // One tensor at a time: long reads of one stream, while g comes from the level 2 cache.
      for (int64_t k = 0; k < dots; ++k) {
        double* to = &totals[(1 + k) * kLanes];
        const A* centre = &centres[k * kLanes];
        plan.for_each_narrow_block(tile, segment, [&](const Block& b, const Block& next) {
          const auto gs = maps.read(0, b), x = maps.read(1 + k, b), ahead = maps.read(1 + k, next);
          vectorised([&]() FASTNAS_INLINE {
            norm::prefetch(ahead, next.rows, next.lanes);
            norm::centred_dots(to, gs, x, centre, b.rows, b.lanes);
          });
        });
      }
      for (int64_t j = 0; j <= dots; ++j)
        lanes.gather(&totals[j * kLanes], &partial[(segment * (1 + dots) + j) * channels]);
    };

    const auto finish = [&](int64_t tile) {
      const int64_t begin = plan.first_channel(tile), end = begin + plan.channels_of(tile);
      const double count = static_cast<double>(plan.values_a_channel());
      std::vector<double> total(1 + dots);
      for (int64_t c = begin; c < end; ++c) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t s = 0; summing && s < plan.segments; ++s)
          for (int64_t j = 0; j <= dots; ++j) total[j] += partial[(s * (1 + dots) + j) * channels + c];
        for (int64_t k = 0; k < paths; ++k) {
          const int64_t i = k * channels + c;
          const double inverse = k < norms ? inverses[i] : 1, dot = k < dots ? total[1 + k] : 0;
          const double p = weights[k] * inverse;
          weight_grads[i] = inverse * dot;
          table.p[i] = static_cast<A>(p);
          if (k >= norms || !ask.training) continue;
          table.q[i] = static_cast<A>(-p * inverse * inverse * dot / count);
          table.mean[i] = static_cast<A>(means[i]);
          table.r[i] = static_cast<A>(-p * total[0] / count);
        }
      }
    };

    const auto apply = [&](int64_t tile, int64_t segment) {
      if (!ask.maps) return;
      const auto run = [&](const auto* gradients) {
        for (int64_t k = 0; k < paths; ++k) {
          const auto c = gradients[k];
          const bool normalised = ask.training && k < norms;
          plan.for_each_block(tile, segment, [&](const Block& b) {
            const auto gs = maps.read(0, b);
            const auto out = maps.write(written + k, b);
            const auto y = maps.read(normalised ? 1 + k : 0, b);
            vectorised([&]() FASTNAS_INLINE {
              if (normalised)
                norm::norm_grad(out, gs, y, c, b.rows, b.lanes, large);
              else
                norm::scaled(out, gs, c.p, b.rows, b.lanes, large);
            });
          });
        }
      };
      if (plan.planes) {
        std::vector<Gradient<Same<A>>> gradients;
        for (int64_t k = 0; k < paths; ++k) {
          const int64_t i = k * channels + tile;
          gradients.push_back({{table.p[i]}, {table.q[i]}, {table.mean[i]}, {table.r[i]}});
        }
        return run(gradients.data());
      }
      const Lanes lanes(plan, tile);
      std::vector<A> by_lane(paths * 4 * kLanes);
      std::vector<Gradient<PerLane<A>>> gradients;
      for (int64_t k = 0; k < paths; ++k) {
        A* to = &by_lane[k * 4 * kLanes];
        const int64_t i = k * channels;
        lanes.spread(&table.p[i], to);
        lanes.spread(&table.q[i], to + kLanes);
        lanes.spread(&table.mean[i], to + 2 * kLanes);
        lanes.spread(&table.r[i], to + 3 * kLanes);
        gradients.push_back({{to}, {to + kLanes}, {to + 2 * kLanes}, {to + 3 * kLanes}});
      }
      run(gradients.data());
    };
    two_passes(plan, 2 * dots + 1 + static_cast<int64_t>(outputs.size()), sum, finish, apply);
  });

  if (ask.weights) {
    dispatch_floating(dw.scalar_type(), ask.op, [&](auto tag) {
      using W = decltype(tag);
      W* out = static_cast<W*>(dw.data_ptr());
      for (int64_t k = 0; k < paths; ++k) {
        double total = 0;
        for (int64_t c = 0; c < channels; ++c) total += weight_grads[k * channels + c];
        store(out + k, static_cast<acc_t<W>>(total));
      }
    });
  }
  const auto cut = outputs.begin() + (ask.maps ? norms : 0);
  return {std::vector<Tensor>(outputs.begin(), cut), std::vector<Tensor>(cut, outputs.end()), dw};
}

Gradients norm_mixed_sum_bwd(Tensor g, std::vector<Tensor> ys, std::vector<Tensor> plain, Tensor w, Tensor mean,
                             Tensor var, double eps, bool training) {
  return backward({"norm_mixed_sum_bwd", true, true, training, eps}, g, ys, plain, w, mean, var);
}

// Weights need no gradient: plain maps are not read, nor are the ys in evaluation (then they are not given).
std::tuple<std::vector<Tensor>, std::vector<Tensor>> norm_mixed_sum_bwd_maps(Tensor g, std::vector<Tensor> ys, Tensor w,
                                                                             Tensor mean, Tensor var, double eps,
                                                                             bool training) {
  auto [dys, dplain, dw] = backward({"norm_mixed_sum_bwd_maps", true, false, training, eps}, g, ys, {}, w, mean, var);
  return {dys, dplain};
}

Tensor norm_mixed_sum_bwd_w(Tensor g, std::vector<Tensor> ys, std::vector<Tensor> plain, Tensor w, Tensor mean,
                            Tensor var, double eps) {
  return std::get<2>(backward({"norm_mixed_sum_bwd_w", false, true, false, eps}, g, ys, plain, w, mean, var));
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("norm_mixed_sum_fwd", TORCH_BOX(&fastnas::norm_mixed_sum_fwd));
  m.impl("norm_mixed_sum_eval", TORCH_BOX(&fastnas::norm_mixed_sum_eval));
  m.impl("norm_mixed_sum_bwd", TORCH_BOX(&fastnas::norm_mixed_sum_bwd));
  m.impl("norm_mixed_sum_bwd_maps", TORCH_BOX(&fastnas::norm_mixed_sum_bwd_maps));
  m.impl("norm_mixed_sum_bwd_w", TORCH_BOX(&fastnas::norm_mixed_sum_bwd_w));
}
