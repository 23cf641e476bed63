#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/depthwise_bank_plan.h"
#include "ops/depthwise_bank_pool.h"

namespace fastnas::bank {

template <class A>
void add_pixels(Pixels<A> to, Pixels<const A> from, int64_t rows, int64_t columns) {
  vectorised([&]() FASTNAS_INLINE {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        A* out = to.data + r * to.row + c * to.column;
        const A* in = from.data + r * from.row + c * from.column;
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) out[lane] += in[lane];
      }
  });
}

// dx becomes zero where the ReLU was closed; NaN passes, as in torch.relu's gradient.
template <class A>
void mask_pixels(Pixels<A> dx, Pixels<const A> x, int64_t rows, int64_t columns) {
  vectorised([&]() FASTNAS_INLINE {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        A* out = dx.data + r * dx.row + c * dx.column;
        const A* in = x.data + r * x.row + c * x.column;
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) out[lane] = in[lane] <= A(0) ? A(0) : out[lane];
      }
  });
}

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
        weights_(weights, s_.channels, groups_.phases) {
    if (dx) dx_.emplace_back(*dx);
    if (weight_grad)
      for (const Kernel& kernel : bank.kernels) {
        auto offsets = input_offsets<A>(kernel, x_padded_.pitch);
        offsets.resize((offsets.size() + kTapSet - 1) / kTapSet * kTapSet, 0);  // sums that nobody reads
        sums_ += offsets.size() * kLanes<A>;
        offsets_.push_back(offsets);
      }
    if (dx) find_taps();
  }

  // Returns the sums of the weight gradients: [phase][tap, filled up to whole sets kernel by kernel][lane].
  std::vector<double> run() const {
    // Groups of one phase make a unit of work. Units do not depend on the threads, so neither do their sums.
    constexpr int64_t kUnits = 128;
    const int64_t in_phase = (groups_.count + groups_.phases - 1) / groups_.phases;
    const int64_t parts = std::min(in_phase, std::max<int64_t>(1, kUnits / groups_.phases));
    const int64_t units = parts * groups_.phases;
    const int64_t in_unit = std::max<int64_t>(1, in_phase / std::max<int64_t>(1, parts));
    const int64_t grain = std::max<int64_t>(1, groups_a_thread(s_, 2 * weights_.taps()) / in_unit);
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
  int64_t sums(size_t kernel) const { return offsets_[kernel].size() * kLanes<A>; }
  int64_t phases() const { return groups_.phases; }

 private:
  void find_taps() {
    const int64_t stride = s_.stride;
    for (int64_t row = 0; row < stride; ++row)
      for (int64_t column = 0; column < stride; ++column) {
        Corner corner{row, column, {}, {}};
        std::vector<Tap>& taps = bank_.relu ? corner.masked : corner.plain;
        int64_t weight = 0, buffer = 0;
        for (const Kernel& kernel : bank_.kernels) {
          append_backward_taps<A>(taps, kernel, buffer, g_padded_.pitch, weight, kLanes<A>, stride, row, column);
          weight += kernel.taps() * kLanes<A>;
          buffer += g_padded_.elements;
        }
        if (bank_.max_pool) buffer += g_padded_.elements;
        if (bank_.avg_pool)
          append_backward_taps<A>(corner.plain, kAverage, buffer, g_padded_.pitch, weights_.one(), 0, stride, row,
                                  column);
        corners_.push_back(std::move(corner));
      }
  }

  int64_t memory_size() const {
    return static_cast<int64_t>(gs_.size()) * g_padded_.elements + 2 * x_padded_.elements + 2 * dx_dense_.elements;
  }

  void group(Group group, const A* weights, A* memory, A* sums) const {
    A* g = memory + g_padded_.at(0, 0);
    for (size_t i = 0; i < gs_.size(); ++i) pack(g + i * g_padded_.elements, g_padded_.pitch, gs_[i], group, false);
    memory += gs_.size() * g_padded_.elements;
    A* x = memory + x_padded_.at(0, 0);
    if (sums_ || bank_.relu || bank_.max_pool) pack(x, x_padded_.pitch, x_, group, bank_.relu);
    if (sums_) add_weight_gradients(sums, x, g);
    if (dx_.empty()) return;
    A* dx = memory + 2 * x_padded_.elements;
    if (bank_.avg_pool)
      divide_by_places(Pixels<A>{g + (gs_.size() - 1) * g_padded_.elements, g_padded_.pitch, kLanes<A>}, 0,
                       s_.out_height, s_);
    for (const Corner& corner : corners_) add_taps(corner, dx, x, g, weights, dx + dx_dense_.elements);
    if (bank_.max_pool) {
      A* raw = bank_.raw_input() ? x + x_padded_.elements : x;
      if (bank_.raw_input()) pack(raw, x_padded_.pitch, x_, group, false);
      add_max_gradients(dx, raw, g + bank_.kernels.size() * g_padded_.elements, dx + dx_dense_.elements);
    }
    unpack(dx_[0], dx, group, 0, s_.height);
  }

  void add_weight_gradients(A* sums, const A* x, const A* g) const {
    const int64_t step = strip_rows(s_), stride = s_.stride;
    for (int64_t top = 0; top < s_.out_height; top += step) {
      const Pixels<const A> in{x + top * stride * x_padded_.pitch, stride * x_padded_.pitch, stride * kLanes<A>};
      A* to = sums;
      for (size_t k = 0; k < offsets_.size(); ++k) {
        const Pixels<const A> grad{g + k * g_padded_.elements + top * g_padded_.pitch, g_padded_.pitch, kLanes<A>};
        correlate(to, offsets_[k], in, grad, std::min(step, s_.out_height - top), s_.out_width);
        to += offsets_[k].size() * kLanes<A>;
      }
    }
  }

  // One of every stride x stride input pixels, and the taps that lead there: of convolutions after the ReLU, and of the
  // rest.
  struct Corner {
    int64_t row, column;
    std::vector<Tap> masked, plain;
  };

  void add_taps(const Corner& corner, A* dx, const A* x, const A* g, const A* weights, A* scratch) const {
    const int64_t stride = s_.stride, pitch = dx_dense_.pitch, step = strip_rows(s_);
    const int64_t height = (s_.height - corner.row + stride - 1) / stride;
    const int64_t width = (s_.width - corner.column + stride - 1) / stride;
    if (width == 0) return;
    const bool mask = bank_.relu && !bank_.kernels.empty();
    for (int64_t top = 0; top < height; top += step) {
      const int64_t rows = std::min(step, height - top), row = stride * top + corner.row;
      const Pixels<A> out{dx + row * pitch + corner.column * kLanes<A>, stride * pitch, stride * kLanes<A>};
      const Pixels<const A> in{g + top * g_padded_.pitch, g_padded_.pitch, kLanes<A>};
      sum_taps(out, in, rows, width, mask ? corner.masked : corner.plain, weights);
      if (!mask) continue;
      mask_pixels(out,
                  {x + row * x_padded_.pitch + corner.column * kLanes<A>, stride * x_padded_.pitch, stride * kLanes<A>},
                  rows, width);
      if (corner.plain.empty()) continue;
      sum_taps({scratch, width * kLanes<A>, kLanes<A>}, in, rows, width, corner.plain, weights);
      add_pixels(out, {scratch, width * kLanes<A>, kLanes<A>}, rows, width);
    }
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
  LaneWeights<A> weights_;
  std::vector<std::vector<int64_t>> offsets_;  // by kernel, filled up to whole sets
  int64_t sums_ = 0;                           // elements of all kernels' sums
  std::vector<Corner> corners_;
};

}  // namespace fastnas::bank
