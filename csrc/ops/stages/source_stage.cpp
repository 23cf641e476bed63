// All that leaves one state of a cell, forward and backward: the stages one after another and the coefficients between
// them, without a tensor for each. Schema and meaning: fastnas/ops/stages/source_stage.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/conv_stage.h"
#include "ops/stages/flat_weights.h"
#include "ops/stages/node_sum.h"
#include "ops/stages/pool_stage.h"

namespace fastnas {
namespace {

enum Stage : int64_t { kState, kPool, kFirst, kSecond };

struct Term {
  int64_t edge, candidate, node, stage, index;
  int64_t row;  // of its normalisation
};

// What the packed layout says, in its order.
struct Layout {
  int64_t stride, first_outputs, second_outputs, nodes;
  std::vector<int64_t> first_parts, second_parts, second_from;
  std::vector<int64_t> first_shapes, second_shapes;  // of each part: side of its depthwise kernel or 0, and outputs
  std::vector<Term> terms;
  int64_t pools = 0;

  Layout(const char* op, const std::vector<int64_t>& packed) {
    auto at = packed.begin();
    const auto next = [&]() {
      STD_TORCH_CHECK(at != packed.end(), op, ": the layout ends too early");
      return *at++;
    };
    stride = next(), first_outputs = next(), second_outputs = next(), nodes = next();
    const auto next_count = [&] {
      const int64_t count = next();
      STD_TORCH_CHECK(count >= 0 && count <= packed.end() - at, op, ": the layout ends too early");
      return count;
    };
    for (auto [parts, shapes] : {std::pair{&first_parts, &first_shapes}, std::pair{&second_parts, &second_shapes}}) {
      const int64_t count = next_count();
      shapes->reserve(2 * count), parts->reserve(Plan<float>::kFields * count);
      for (int64_t part = 0; part < count; ++part) {
        for (int64_t size = 0; size < 2; ++size) shapes->push_back(next());
        for (int64_t field = 0; field < Plan<float>::kFields; ++field) parts->push_back(next());
      }
    }
    for (int64_t count = next_count(); count > 0; --count) second_from.push_back(next());
    int64_t count = next_count();
    for (terms.reserve(count); count > 0; --count) {
      Term term{next(), next(), next(), next(), next(), 0};
      pools += term.stage == kPool;
      terms.push_back(term);
    }
    STD_TORCH_CHECK(at == packed.end(), op, ": the layout goes on behind its end");
    int64_t pool = 0;
    for (auto& term : terms) {
      const int64_t limit[] = {1, 2, first_outputs, second_outputs};
      STD_TORCH_CHECK(term.stage >= kState && term.stage <= kSecond && term.index >= 0 &&
                          term.index < limit[term.stage] && term.node >= 0 && term.node < nodes,
                      op, ": a term names what is not there");
      if (term.stage == kPool) term.row = 1 + pool++;
      if (term.stage == kFirst) term.row = 1 + pools + term.index;
      if (term.stage == kSecond) term.row = second_row(term.index);
    }
    for (int64_t from : second_from)
      STD_TORCH_CHECK(from >= 0 && from < first_outputs, op, ": the second stage reads what is not there");
  }

  // Rows of norms: no normalisation, one of each pool of each edge, outputs of the first stage, outputs of the second.
  int64_t first_row(int64_t output) const { return 1 + pools + output; }
  int64_t second_row(int64_t output) const { return 1 + pools + first_outputs + output; }
  int64_t rows() const { return second_row(second_outputs); }
};

struct Gradients {
  Tensor dx, d_terms, dw;  // without elements where they are not wanted
};

// The stages of a state on its map x.
template <class T>
class Source {
 public:
  Source(const char* op, const Tensor& x, const Tensor& weights, const std::vector<int64_t>& packed,
         const Tensor& mixture, bool backward)
      : layout_(op, packed), x_(x), view_{data<T>(x), map_of(op, x)} {
    check_same_dtype(op, {weights, mixture}, x.scalar_type());
    const Map& map = view_.map;
    out_ = {map.batch, ceil_div(map.height, layout_.stride), ceil_div(map.width, layout_.stride), map.channels,
            map.channels};
    STD_TORCH_CHECK(mixture.dim() == 2 && mixture.stride(1) == 1, op, ": the weights of a mixture are a dense table");
    for (const Term& term : layout_.terms) {
      STD_TORCH_CHECK(
          term.edge >= 0 && term.edge < mixture.size(0) && term.candidate >= 0 && term.candidate < mixture.size(1), op,
          ": a term has no weight");
      scales_.push_back(data<T>(mixture)[term.edge * mixture.stride(0) + term.candidate]);
    }
    FlatWeights<T> flat(op, weights, map.channels);
    const auto first_weights = flat.take(layout_.first_shapes), second_weights = flat.take(layout_.second_shapes);
    flat.finish();
    const auto plan = [&](const Map& input, const auto& parts, const auto& given, int64_t stride, int64_t sources) {
      Plan<T> made(op, input, parts, given, stride, sources, backward);
      STD_TORCH_CHECK(made.out_channels == map.channels, op, ": a stage changes the number of channels");
      return made;
    };
    if (layout_.first_outputs) {
      first_plan_.emplace(plan(map, layout_.first_parts, first_weights, layout_.stride, 1));
      STD_TORCH_CHECK(first_plan_->outputs == layout_.first_outputs, op, ": the first stage has other outputs");
    }
    if (layout_.second_outputs) {
      second_plan_.emplace(plan(out_, layout_.second_parts, second_weights, 1, second_sources()));
      STD_TORCH_CHECK(second_plan_->outputs == layout_.second_outputs, op, ": the second stage has other outputs");
    }
  }

  const Layout& layout() const { return layout_; }
  const Map& out_map() const { return out_; }
  int64_t channels() const { return out_.channels; }

  // mean and 1 / standard deviation of each row, from given or from measured mean and variance [rows - 1, 2, C].
  Tensor measure(const std::optional<Tensor>& given, T eps, Tensor& stats) {
    const int64_t channels = out_.channels, row = 2 * channels;
    Tensor norms = torch::stable::new_empty(x_, {layout_.rows(), 2, channels});
    T* norm = data<T>(norms);
    std::fill(norm, norm + channels, T(0));
    std::fill(norm + channels, norm + row, T(1));
    if (given) {
      deviations(data<T>(*given), norm + row, layout_.rows() - 1, eps);
      run(norm, nullptr, eps);
      return norms;
    }
    stats = torch::stable::new_empty(x_, {layout_.rows() - 1, 2, channels});
    run(norm, data<T>(stats), eps);
    return norms;
  }

  // Takes the outputs of the stages, or computes them again, the norms being known.
  void restore(const Tensor& first, const Tensor& second) { first_ = first, second_ = second; }
  void restore(T* norms) { run_convolutions(norms, nullptr, T(0)); }

  const Tensor& first() const { return first_; }
  const Tensor& second() const { return second_; }

  void run_pools(T* stats) {
    if (!layout_.pools) return;
    pool_ = maps(2);
    pool(view_, layout_.stride, data<T>(pool_), stats);
  }
  void forget_pools() { pool_ = Tensor(); }

  // The map of each term.
  std::vector<View<T>> term_maps() const {
    std::vector<View<T>> found;
    found.reserve(layout_.terms.size());
    for (const Term& term : layout_.terms)
      found.push_back(term.stage == kState   ? view_
                      : term.stage == kPool  ? one(pool_, term.index)
                      : term.stage == kFirst ? one(first_, term.index)
                                             : one(second_, term.index));
    return found;
  }

  void add_to_nodes(std::vector<Tensor>& nodes, const std::vector<int64_t>& begun, const T* norm) const {
    const std::vector<View<T>> terms = term_maps();
    const int64_t channels = out_.channels;
    for (int64_t node = 0; node < layout_.nodes; ++node) {
      std::vector<View<T>> own;
      std::vector<T> coef;
      own.reserve(terms.size()), coef.reserve(terms.size() * 2 * channels);
      for (size_t k = 0; k < terms.size(); ++k) {
        if (layout_.terms[k].node != node) continue;
        own.push_back(terms[k]);
        const T *mean = norm + layout_.terms[k].row * 2 * channels, *deviation = mean + channels;
        for (int64_t c = 0; c < channels; ++c) coef.push_back(scales_[k] * deviation[c]);
        coef.insert(coef.end(), mean, mean + channels);
      }
      const Map map = map_like("source_stage_fwd", nodes[node], out_);
      sum_terms(data<T>(nodes[node]), map, own, coef.data(), begun[node] != 0);
    }
  }

  // gs: of each node. Memory for a result is taken when its turn has come.
  Gradients backward(const std::vector<View<T>>& gs, const std::optional<View<T>>& base, const T* norm, bool training,
                     bool need_dx, bool need_dw) {
    const int64_t channels = out_.channels, count = static_cast<int64_t>(layout_.terms.size());
    run_pools(nullptr);
    std::vector<View<T>> term_gs;
    term_gs.reserve(layout_.terms.size());
    for (const Term& term : layout_.terms) term_gs.push_back(gs[term.node]);
    std::vector<T> means(count * channels), dots(count * 2 * channels), coef(count * 4 * channels);
    for (int64_t k = 0; k < count; ++k)
      std::copy_n(norm + layout_.terms[k].row * 2 * channels, channels, means.data() + k * channels);
    dot_terms(term_gs, term_maps(), means.data(), channels, dots.data());
    forget_pools();
    Gradients found{sized(0), sized(count), sized(0)};
    T* d_terms = data<T>(found.d_terms);
    for (int64_t k = 0; k < count; ++k) {
      const T* own = norm + layout_.terms[k].row * 2 * channels;
      through_norm(coef.data() + k * 4 * channels, own, scales_[k], dots.data() + k * 2 * channels, training);
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c)
        sum += static_cast<double>(own[channels + c]) * dots[(2 * k + 1) * channels + c];
      d_terms[k] = static_cast<T>(sum);
    }
    std::optional<View<T>> under = base;
    if (need_dx && goes_straight()) {
      found.dx = like_x();
      straight_backward(data<T>(found.dx), gs, coef.data(), base);
      under = View<T>{data<T>(found.dx), dense(view_.map)};
    }
    if (layout_.first_outputs && (need_dx || need_dw))
      convolutions_backward(found, term_gs, coef.data(), norm, under, training, need_dx, need_dw);
    return found;
  }

 private:
  int64_t second_sources() const { return static_cast<int64_t>(layout_.second_from.size()); }
  Tensor maps(int64_t count) const { return new_map(x_, {count, out_.batch, out_.height, out_.width, out_.channels}); }
  Tensor sized(int64_t count) const { return torch::stable::new_empty(x_, {count}); }
  Tensor like_x() const {
    return new_map(x_, {view_.map.batch, view_.map.height, view_.map.width, view_.map.channels});
  }
  View<T> one(const Tensor& stage, int64_t index) const {
    return {data<T>(stage) + index * out_.batch * out_.image(), out_};
  }
  static Map dense(Map map) {
    map.pixel = map.channels;
    return map;
  }
  std::vector<View<T>> second_inputs() const {
    std::vector<View<T>> inputs;
    for (const int64_t from : layout_.second_from) inputs.push_back(one(first_, from));
    return inputs;
  }

  // Mean and variance of rows -> mean and 1 / standard deviation.
  void deviations(const T* stats, T* norm, int64_t rows, T eps) const {
    const int64_t channels = out_.channels;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < channels; ++c) {
        norm[r * 2 * channels + c] = stats[r * 2 * channels + c];
        norm[(2 * r + 1) * channels + c] = T(1) / std::sqrt(stats[(2 * r + 1) * channels + c] + eps);
      }
  }

  // All stages. stats: of rows 1 ..., measured along with their norms; or null where norms are known.
  void run(T* norm, T* stats, T eps) {
    const int64_t row = 2 * out_.channels;
    std::vector<T> both(stats ? 2 * row : 0);
    run_pools(stats ? both.data() : nullptr);
    if (stats) {
      for (const Term& term : layout_.terms)
        if (term.stage == kPool) std::copy_n(both.data() + term.index * row, row, stats + (term.row - 1) * row);
      deviations(stats, norm + row, layout_.pools, eps);
    }
    run_convolutions(norm, stats, eps);
  }

  void run_convolutions(T* norm, T* stats, T eps) {
    const int64_t row = 2 * out_.channels, first_row = layout_.first_row(0), second_row = layout_.second_row(0);
    const auto measured = [&](int64_t from) { return stats ? stats + (from - 1) * row : nullptr; };
    if (layout_.first_outputs) {
      first_ = maps(layout_.first_outputs);
      convolve(*first_plan_, {view_}, static_cast<const T*>(nullptr), data<T>(first_), measured(first_row));
      if (stats) deviations(measured(first_row), norm + first_row * row, layout_.first_outputs, eps);
    }
    if (layout_.second_outputs) {
      second_ = maps(layout_.second_outputs);
      const std::vector<T> before = second_norms(norm);
      convolve(*second_plan_, second_inputs(), before.data(), data<T>(second_), measured(second_row));
      if (stats) deviations(measured(second_row), norm + second_row * row, layout_.second_outputs, eps);
    }
  }

  // Norms of what the second stage reads, [inputs, 2, C].
  std::vector<T> second_norms(const T* norm) const {
    const int64_t row = 2 * out_.channels;
    std::vector<T> found;
    for (const int64_t from : layout_.second_from) {
      const T* own = norm + layout_.first_row(from) * row;
      found.insert(found.end(), own, own + row);
    }
    return found;
  }

  // Coefficients [4, C] that turn the gradient of w BN(z) into that of z; running statistics do not depend on z.
  void through_norm(T* coef, const T* norm, T weight, const T* dots, bool training) const {
    const int64_t channels = out_.channels;
    const T count = static_cast<T>(out_.batch * out_.pixels());
    for (int64_t c = 0; c < channels; ++c) {
      const T deviation = norm[channels + c], scale = weight * deviation;
      coef[c] = scale;
      coef[channels + c] = training ? -scale * deviation * deviation * dots[channels + c] / count : T(0);
      coef[2 * channels + c] = training ? -scale * dots[c] / count : T(0);
      coef[3 * channels + c] = norm[c];
    }
  }

  // Whether something comes through pools or identities.
  bool goes_straight() const {
    return std::any_of(layout_.terms.begin(), layout_.terms.end(),
                       [](const Term& term) { return term.stage == kPool || term.stage == kState; });
  }

  // dx = what comes through pools and identities, on top of base.
  void straight_backward(T* dx, const std::vector<View<T>>& gs, const T* coef,
                         const std::optional<View<T>>& base) const {
    const int64_t channels = out_.channels, count = static_cast<int64_t>(layout_.terms.size());
    std::vector<T> scales(gs.size() * 3 * channels), shared(6 * channels);
    for (int64_t k = 0; k < count; ++k) {
      const Term& term = layout_.terms[k];
      if (term.stage != kPool && term.stage != kState) continue;
      const T* own = coef + k * 4 * channels;
      const int64_t column = term.stage == kState ? 2 : term.index;
      T* scale = scales.data() + (term.node * 3 + column) * channels;
      for (int64_t c = 0; c < channels; ++c) scale[c] += own[c];
      if (term.stage == kState) continue;
      // Several edges share a pool: what they send to its statistics adds up; its mean is the same for all.
      T* sum = shared.data() + term.index * 3 * channels;
      for (int64_t c = 0; c < 2 * channels; ++c) sum[c] += own[channels + c];
      std::copy_n(own + 3 * channels, channels, sum + 2 * channels);
    }
    if (layout_.pools) {
      pool_backward(view_, gs, scales.data(), shared.data(), layout_.stride, base, dx);
    } else {
      std::vector<View<T>> terms;
      std::vector<T> factors;
      if (base) {
        terms.push_back(*base);
        factors.insert(factors.end(), channels, T(1));
        factors.insert(factors.end(), channels, T(0));
      }
      for (size_t node = 0; node < gs.size(); ++node) {
        const T* scale = scales.data() + (node * 3 + 2) * channels;
        terms.push_back(gs[node]);
        factors.insert(factors.end(), scale, scale + channels);
        factors.insert(factors.end(), channels, T(0));
      }
      sum_terms(dx, dense(view_.map), terms, factors.data(), false);
    }
  }

  void convolutions_backward(Gradients& found, const std::vector<View<T>>& term_gs, const T* coef, const T* norm,
                             const std::optional<View<T>>& base, bool training, bool need_dx, bool need_dw) {
    const int64_t channels = out_.channels, width = 4 * channels;
    std::vector<View<T>> first_gs(layout_.first_outputs, view_), second_gs(layout_.second_outputs, view_);
    std::vector<T> first_coef(layout_.first_outputs * width), second_coef(layout_.second_outputs * width);
    for (size_t k = 0; k < layout_.terms.size(); ++k) {
      const Term& term = layout_.terms[k];
      if (term.stage != kFirst && term.stage != kSecond) continue;
      (term.stage == kFirst ? first_gs : second_gs)[term.index] = term_gs[k];
      std::copy_n(coef + k * width, width,
                  (term.stage == kFirst ? first_coef : second_coef).data() + term.index * width);
    }
    T *first_dw = nullptr, *second_dw = nullptr;
    if (need_dw) {
      found.dw = sized(first_plan_->weights + (second_plan_ ? second_plan_->weights : 0));
      first_dw = data<T>(found.dw), second_dw = first_dw + first_plan_->weights;
    }
    Tensor between;
    if (layout_.second_outputs) {
      const int64_t inputs = second_sources();
      between = maps(inputs);
      const std::vector<T> before = second_norms(norm);
      std::vector<T> dots(inputs * 2 * channels);
      convolve_backward<T>(*second_plan_, second_gs, all(second_, layout_.second_outputs), second_coef.data(),
                           second_inputs(), before.data(), std::nullopt, data<T>(between), dots.data(), second_dw);
      for (int64_t i = 0; i < inputs; ++i) {
        const int64_t from = layout_.second_from[i];
        first_gs[from] = one(between, i);
        through_norm(first_coef.data() + from * width, before.data() + i * 2 * channels, T(1),
                     dots.data() + i * 2 * channels, training);
      }
      second_ = Tensor();
    }
    if (need_dx && !found.dx.numel()) found.dx = like_x();
    convolve_backward<T>(*first_plan_, first_gs, all(first_, layout_.first_outputs), first_coef.data(), {view_},
                         nullptr, base, need_dx ? data<T>(found.dx) : nullptr, nullptr, first_dw);
  }

  std::vector<View<T>> all(const Tensor& stage, int64_t count) const {
    std::vector<View<T>> found;
    for (int64_t n = 0; n < count; ++n) found.push_back(one(stage, n));
    return found;
  }

  Layout layout_;
  const Tensor& x_;
  View<T> view_;
  Map out_;
  std::vector<T> scales_;  // of the terms
  std::optional<Plan<T>> first_plan_, second_plan_;
  Tensor pool_, first_, second_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> source_stage_fwd(Tensor x, Tensor weights, std::vector<int64_t> layout,
                                                            Tensor mixture, std::optional<Tensor> given,
                                                            std::vector<Tensor> nodes, std::vector<int64_t> begun,
                                                            double eps, bool keep) {
  constexpr const char* op = "source_stage_fwd";
  Tensor norms, stats = torch::stable::new_empty(x, {0}), first = stats, second = stats;
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    Source<T> source(op, x, weights, layout, mixture, false);
    const int64_t count = source.layout().nodes;
    STD_TORCH_CHECK(static_cast<int64_t>(nodes.size()) == count && begun.size() == nodes.size(), op,
                    ": there are other nodes than the layout says");
    check_same_dtype(op, nodes, x.scalar_type());
    if (given) {
      check_same_dtype(op, {*given}, x.scalar_type());
      STD_TORCH_CHECK(given->numel() == (source.layout().rows() - 1) * 2 * source.channels(), op,
                      ": statistics do not fit the layout");
      given = torch::stable::contiguous(*given);
    }
    norms = source.measure(given, static_cast<T>(eps), stats);
    source.add_to_nodes(nodes, begun, data<T>(norms));
    if (keep && source.layout().first_outputs) first = source.first();
    if (keep && source.layout().second_outputs) second = source.second();
  });
  return {norms, stats, first, second};
}

std::tuple<Tensor, Tensor, Tensor> source_stage_bwd(Tensor x, Tensor weights, std::vector<int64_t> layout,
                                                    Tensor mixture, Tensor norms, Tensor first, Tensor second,
                                                    std::vector<Tensor> gs, std::optional<Tensor> base, bool training,
                                                    bool need_dx, bool need_dw) {
  constexpr const char* op = "source_stage_bwd";
  Gradients found;
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    for (const auto& tensors : {gs, {norms, first, second}}) check_same_dtype(op, tensors, x.scalar_type());
    Source<T> source(op, x, weights, layout, mixture, true);
    const Layout& known = source.layout();
    STD_TORCH_CHECK(static_cast<int64_t>(gs.size()) == known.nodes && !known.terms.empty() &&
                        norms.numel() == known.rows() * 2 * source.channels(),
                    op, ": gradients or norms do not fit the layout");
    norms = torch::stable::contiguous(norms);
    std::optional<View<T>> under;
    if (base) under = View<T>{data<T>(*base), map_like(op, *base, map_of(op, x))};
    if (known.first_outputs && !first.numel()) {
      Source<T> again(op, x, weights, layout, mixture, false);
      again.restore(data<T>(norms));
      source.restore(again.first(), again.second());
    } else {
      source.restore(first, second);
    }
    found = source.backward(views_like<T>(op, gs, source.out_map()), under, data<T>(norms), training, need_dx, need_dw);
  });
  return {found.dx, found.d_terms, found.dw};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("source_stage_fwd", TORCH_BOX(&fastnas::source_stage_fwd));
  m.impl("source_stage_bwd", TORCH_BOX(&fastnas::source_stage_bwd));
}
