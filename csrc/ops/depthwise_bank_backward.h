#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ops/depthwise_bank_correlate.h"
#include "ops/depthwise_bank_plan.h"
#include "ops/depthwise_bank_pool.h"

namespace fastnas::bank {

// Per group: the gradients of all outputs and x come into padded buffers; then, strip by strip, the weight gradients
// and the input gradient of all branches.
template <class T>
class Backward {
  using A = acc_t<T>;

 public:
  // Without dx the input gradient is skipped.
  Backward(const Bank& bank, const std::vector<Tensor>& gs, const Tensor& x, const std::vector<Tensor>& weights,
           const Tensor* dx, bool weight_grad)
      : bank_(bank),
        s_(bank.s),
        x_(x),
        gs_(gs.begin(), gs.end()),
        groups_(s_),
        x_padded_(s_.height, s_.width, bank.halo),
        g_padded_(s_.out_height, s_.out_width, (bank.halo + s_.stride - 1) / s_.stride),
        dx_dense_(s_.height, s_.width, 0),
        corners_(bank.s.stride == 1 ? 1 : 4),
        weights_(weights, s_.channels, groups_.phases, find_taps()) {
    if (dx) dx_.emplace_back(*dx);
    if (weight_grad)
      for (const Kernel& kernel : bank.kernels) {
        correlated_.push_back(forward_taps(kernel, 0));
        sums_ += sums(correlated_.size() - 1);
      }
  }

  // Returns the sums of the weight gradients: [phase][tap of all kernels][lane].
  std::vector<double> run() const {
    // Groups of one phase make a unit of work. Units do not depend on the threads, so neither do their sums.
    constexpr int64_t kUnits = 128;
    const int64_t in_phase = (groups_.count + groups_.phases - 1) / groups_.phases;
    const int64_t parts = std::min(in_phase, std::max<int64_t>(1, kUnits / groups_.phases));
    const int64_t units = parts * groups_.phases;
    const int64_t in_unit = std::max<int64_t>(1, in_phase / std::max<int64_t>(1, parts));
    const int64_t grain = std::max<int64_t>(1, groups_a_thread(s_, 2 * tap_count(bank_.kernels)) / in_unit);
    std::vector<A> sums(units * sums_);
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      with_workspace<A>(memory_size(), [&](A* memory) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t phase = unit % groups_.phases, part = unit / groups_.phases;
          for (int64_t i = part * in_phase / parts; i < (part + 1) * in_phase / parts; ++i)
            if (const int64_t index = i * groups_.phases + phase; index < groups_.count)
              group(groups_[index], weights_.phase(phase), memory, sums.data() + unit * sums_);
        }
      });
    });
    std::vector<double> total(groups_.phases * sums_);
    for (int64_t unit = 0; unit < units; ++unit) {
      double* to = total.data() + unit % groups_.phases * sums_;
      const A* from = sums.data() + unit * sums_;
      for (int64_t i = 0; i < sums_; ++i) to[i] += static_cast<double>(from[i]);
    }
    return total;
  }

  // Elements of a phase of those sums, or of one kernel in it.
  int64_t sums() const { return sums_; }
  int64_t sums(size_t kernel) const { return bank_.kernels[kernel].taps() * kLanes<A>; }
  int64_t phases() const { return groups_.phases; }

 private:
  // One of every stride x stride input pixels, and the taps that lead there: first of convolutions after the ReLU, then
  // of the rest.
  struct Corner {
    int64_t row, column;
    std::vector<Taps> maps;
    size_t gated;
  };

  // Fills in the corners; returns the order in which they use the weights.
  std::vector<int64_t> find_taps() {
    std::vector<int64_t> order;
    const int64_t stride = s_.stride;
    for (size_t i = 0; i < corners_.size(); ++i) {
      Corner& corner = corners_[i];
      corner.row = i / stride;
      corner.column = i % stride;
      int64_t tap = 0, buffer = 0;
      // Its weights are those from number `tap` on, `apart` apart.
      const auto append = [&](const Kernel& kernel, int64_t apart) {
        const BackwardLine down(kernel, stride, corner.row), right(kernel, stride, corner.column);
        const int64_t rows = down.taps.size(), columns = right.taps.size();
        if (rows * columns > 0)
          corner.maps.push_back({down.first, right.first, down.step, right.step, rows, columns, buffer,
                                 static_cast<int64_t>(order.size()) * kLanes<A>});
        for (int64_t y : down.taps)
          for (int64_t x : right.taps) order.push_back(tap + (y * kernel.size + x) * apart);
        tap += kernel.taps() * apart;
        buffer += g_padded_.elements;
      };
      for (const Kernel& kernel : bank_.kernels) append(kernel, 1);
      corner.gated = corner.maps.size();
      if (bank_.max_pool) buffer += g_padded_.elements;
      if (bank_.avg_pool) append(kAverage, 0);
    }
    return order;
  }

  int64_t memory_size() const {
    return static_cast<int64_t>(gs_.size()) * g_padded_.elements + 2 * x_padded_.elements + 2 * dx_dense_.elements;
  }

  void group(Group group, const A* weights, A* memory, A* sums) const {
    A* g = memory + g_padded_.at(0, 0);
    memory += gs_.size() * g_padded_.elements;
    A* x = memory + x_padded_.at(0, 0);
    if (sums_ || bank_.relu || bank_.max_pool) pack(x, x_padded_.pitch, x_, group, bank_.relu);
    for (int64_t top = 0; top < s_.out_height; top += strip_rows(s_)) take_strip(sums, x, g, group, top);
    if (dx_.empty()) return;
    A* dx = memory + 2 * x_padded_.elements;
    if (bank_.avg_pool)
      divide_by_places(Pixels<A>{g + (gs_.size() - 1) * g_padded_.elements, g_padded_.pitch, kLanes<A>}, 0,
                       s_.out_height, s_);
    // dx in lanes is written in place, unless maxima are added to it.
    const bool in_place = dx_[0].in_lanes() && !bank_.max_pool;
    if constexpr (std::is_same_v<T, A>)
      if (in_place) {
        const Pixels<A> out{dx_[0].plane(group.first), dx_[0].row, dx_[0].column};
        for (const Corner& corner : corners_) add_taps(corner, out, x, g, weights);
        return;
      }
    for (const Corner& corner : corners_) add_taps(corner, {dx, dx_dense_.pitch, kLanes<A>}, x, g, weights);
    if (bank_.max_pool) {
      A* raw = bank_.raw_input() ? x + x_padded_.elements : x;
      if (bank_.raw_input()) pack(raw, x_padded_.pitch, x_, group, false);
      add_max_gradients(dx, raw, g + bank_.kernels.size() * g_padded_.elements, dx + dx_dense_.elements);
    }
    unpack(dx_[0], dx, group, 0, s_.height);
  }

  // Copies rows of all gradients into their buffers, and adds what they give to the weight gradients while they are in
  // the level 1 cache.
  void take_strip(A* sums, const A* x, A* g, Group group, int64_t top) const {
    const int64_t rows = std::min(strip_rows(s_), s_.out_height - top);
    for (size_t k = 0; k < gs_.size(); ++k) {
      A* strip = g + k * g_padded_.elements + top * g_padded_.pitch;
      pack(strip, g_padded_.pitch, gs_[k].rows(top, rows), group, false);
      if (k >= correlated_.size()) continue;
      correlate(sums, correlated_[k], x_padded_.maps(x), s_.stride, {strip, g_padded_.pitch, kLanes<A>}, top, rows,
                s_.out_width);
      sums += this->sums(k);
    }
  }

  void add_taps(const Corner& corner, Pixels<A> dx, const A* x, const A* g, const A* weights) const {
    const int64_t stride = s_.stride, pitch = x_padded_.pitch;
    const int64_t height = (s_.height - corner.row + stride - 1) / stride;
    const int64_t width = (s_.width - corner.column + stride - 1) / stride;
    if (width == 0 || height == 0) return;
    const A* open = bank_.relu ? x + corner.row * pitch + corner.column * kLanes<A> : nullptr;
    sum_taps<A>({dx.at(corner.row, corner.column), stride * dx.row, stride * dx.column}, g_padded_.maps(g), 1, 0,
                height, width, {corner.maps, corner.gated, weights, {open, stride * pitch, stride * kLanes<A>}});
  }

  void add_max_gradients(A* dx, const A* x, const A* g, A* winners) const {
    for (int64_t y = 0; y < s_.out_height; ++y)
      add_max_row_gradient(dx, g + y * g_padded_.pitch, x, winners, WindowRow<A>(y, s_, x_padded_.pitch),
                           WindowRow<A>(y, s_, dx_dense_.pitch), s_.out_width);
  }

  const Bank& bank_;
  const Sizes& s_;
  Map<const T> x_;
  std::vector<Map<const T>> gs_;
  std::vector<Map<T>> dx_;  // one, or none when it is not needed
  Groups<A> groups_;
  Padded<A> x_padded_, g_padded_, dx_dense_;
  std::vector<Corner> corners_;
  LaneWeights<A> weights_;
  std::vector<Taps> correlated_;  // by kernel
  int64_t sums_ = 0;              // elements of all kernels' sums
};

}  // namespace fastnas::bank
