#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ops/depthwise_bank_plan.h"
#include "ops/depthwise_bank_pool.h"

namespace fastnas::bank {

template <class T>
class Forward {
  using A = acc_t<T>;

 public:
  Forward(const Bank& bank, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& ys)
      : bank_(bank),
        s_(bank.s),
        x_(x),
        ys_(ys.begin(), ys.end()),
        groups_(s_),
        padded_(s_.height, s_.width, bank.halo),
        weights_(weights, s_.channels, groups_.phases, order(bank)) {
    int64_t weight = 0;
    for (const Kernel& kernel : bank.kernels) {
      taps_.push_back(forward_taps(kernel, weight));
      weight += kernel.taps() * kLanes<A>;
    }
    average_ = forward_taps(kAverage, weight);
  }

  void run() const {
    const int64_t inputs = padded_.elements * (bank_.raw_input() ? 2 : 1);
    torch::stable::parallel_for(0, groups_.count, groups_a_thread(s_, tap_count(bank_.kernels)),
                                [&](int64_t begin, int64_t end) {
                                  with_workspace<A>(inputs + strip_rows(s_) * s_.out_width * kLanes<A>, [&](A* memory) {
                                    for (int64_t i = begin; i < end; ++i) group(i, memory, memory + inputs);
                                  });
                                });
  }

 private:
  // Kernel by kernel, then the ones of the average.
  static std::vector<int64_t> order(const Bank& bank) {
    const int64_t count = tap_count(bank.kernels);
    std::vector<int64_t> taps(count + (bank.avg_pool ? kAverage.taps() : 0), count);
    std::iota(taps.begin(), taps.begin() + count, 0);
    return taps;
  }

  void group(int64_t index, A* memory, A* strip) const {
    const Group group = groups_[index];
    A* x = memory + padded_.at(0, 0);
    pack(x, padded_.pitch, x_, group, bank_.relu);
    A* raw = bank_.raw_input() ? x + padded_.elements : x;
    if (bank_.raw_input()) pack(raw, padded_.pitch, x_, group, false);
    const A* weights = weights_.phase(index % groups_.phases);
    const int64_t step = strip_rows(s_);
    for (int64_t top = 0; top < s_.out_height; top += step) {
      const int64_t rows = std::min(step, s_.out_height - top);
      auto y = ys_.begin();
      for (const Taps& taps : taps_) convolve(*y++, x, taps, weights, strip, group, top, rows);
      if (bank_.max_pool) pool(*y++, raw, strip, group, top, rows);
      if (bank_.avg_pool) convolve(*y++, raw, average_, weights, strip, group, top, rows);
    }
  }

  // Where rows of y are computed: in y itself, or in the strip from which `finish` writes them.
  Pixels<A> target(const Map<T>& y, A* strip, Group group, int64_t top) const {
    if constexpr (std::is_same_v<T, A>)
      if (y.in_lanes()) return {y.plane(group.first) + top * y.row, y.row, y.column};
    return {strip, s_.out_width * kLanes<A>, kLanes<A>};
  }

  void finish(const Map<T>& y, const A* strip, Group group, int64_t top, int64_t rows) const {
    if (!y.in_lanes()) unpack(y, strip, group, top, rows);
  }

  void convolve(const Map<T>& y, const A* x, const Taps& taps, const A* weights, A* strip, Group group, int64_t top,
                int64_t rows) const {
    const Pixels<A> out = target(y, strip, group, top);
    sum_taps(out, padded_.maps(x), s_.stride, top, rows, s_.out_width, {{&taps, 1}, 1, weights, {}});
    if (&taps == &average_) divide_by_places(out, top, rows, s_);
    finish(y, strip, group, top, rows);
  }

  void pool(const Map<T>& y, const A* x, A* strip, Group group, int64_t top, int64_t rows) const {
    const Pixels<A> out = target(y, strip, group, top);
    for (int64_t r = 0; r < rows; ++r)
      max_row(out.data + r * out.row, out.column, x, WindowRow<A>(top + r, s_, padded_.pitch), s_.out_width);
    finish(y, strip, group, top, rows);
  }

  const Bank& bank_;
  const Sizes& s_;
  Map<const T> x_;
  std::vector<Map<T>> ys_;
  Groups<A> groups_;
  Padded<A> padded_;
  LaneWeights<A> weights_;
  std::vector<Taps> taps_;
  Taps average_;
};

}  // namespace fastnas::bank
