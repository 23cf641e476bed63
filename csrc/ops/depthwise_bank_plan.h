#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "ops/depthwise_bank_pack.h"
#include "ops/depthwise_bank_taps.h"

// What all groups of a call share: sizes of the buffers in lanes, places of the taps, weights in lanes.

namespace fastnas::bank {

// A depthwise convolution with "same" padding: size x size weights, `dilation` pixels apart.
struct Kernel {
  int64_t size, dilation;
  int64_t taps() const { return size * size; }
  int64_t padding() const { return size / 2 * dilation; }
};

// A height x width map in lanes with `halo` zero pixels around it, in elements of A.
template <class A>
struct Padded {
  int64_t height, width, halo, pitch, elements;

  Padded(int64_t height, int64_t width, int64_t halo)
      : height(height),
        width(width),
        halo(halo),
        pitch((width + 2 * halo) * kLanes<A>),
        elements((height + 2 * halo) * pitch) {}
  int64_t at(int64_t row, int64_t column) const { return (row + halo) * pitch + (column + halo) * kLanes<A>; }
  // Maps of this size of which the first pixel lies at `first`.
  Maps<A> maps(const A* first) const { return {first, pitch, height, width}; }
};

struct Sizes {
  int64_t batch, channels, height, width, stride;
  int64_t out_height, out_width;

  Sizes(const Tensor& x, int64_t stride)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        stride(stride),
        out_height((height + stride - 1) / stride),
        out_width((width + stride - 1) / stride) {}
};

const Kernel kAverage{3, 1};

// What was asked for, checked.
struct Bank {
  Sizes s;
  std::vector<Kernel> kernels;
  bool relu, max_pool, avg_pool;
  int64_t halo;

  Bank(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& dilations, int64_t stride,
       bool relu, bool max_pool, bool avg_pool)
      : s(checked(x), stride), relu(relu), max_pool(max_pool), avg_pool(avg_pool), halo(avg_pool ? 1 : 0) {
    STD_TORCH_CHECK((stride == 1 || stride == 2) && dilations.size() == weights.size(),
                    "depthwise_bank: stride must be 1 or 2, with one dilation a weight");
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == s.channels && w.size(1) == 1 && w.size(2) == w.size(3) &&
                          w.size(2) % 2 == 1 && dilations[i] >= 1,
                      "depthwise_bank: weights must be [C, 1, k, k] with odd k and positive dilations");
      kernels.push_back({w.size(2), dilations[i]});
      halo = std::max(halo, kernels.back().padding());
    }
  }
  size_t outputs() const { return kernels.size() + max_pool + avg_pool; }
  // Pools see x without the ReLU, so they need a buffer of their own.
  bool raw_input() const { return relu && (max_pool || avg_pool); }

 private:
  static const Tensor& checked(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                    "depthwise_bank: x must be [B, C, H, W]");
    return x;
  }
};

// Groups of kLanes planes. Groups that are `phases` apart hold the same channels in the same lanes.
template <class A>
struct Groups {
  int64_t planes, count, phases;

  explicit Groups(const Sizes& s)
      : planes(s.batch * s.channels),
        count((planes + kLanes<A> - 1) / kLanes<A>),
        phases(s.channels / std::gcd(s.channels, kLanes<A>)) {}
  Group operator[](int64_t i) const { return {i * kLanes<A>, std::min(kLanes<A>, planes - i * kLanes<A>)}; }
};

// Groups that are worth waking a thread for, at `taps` multiply-adds a pixel of the result.
inline int64_t groups_a_thread(const Sizes& s, int64_t taps) {
  constexpr int64_t kVectors = 1 << 14;
  return std::max<int64_t>(1, kVectors / (s.out_height * s.out_width * std::max<int64_t>(1, taps)));
}

// Rows of the result that are worked on at a time: with those of the inputs they fit in the level 1 cache.
inline int64_t strip_rows(const Sizes& s) { return std::clamp<int64_t>(128 / s.out_width, 1, s.out_height); }

// Weights in lanes in the order in which they are used, phase by phase: [phase][place in `order`][lane]. `order` holds
// tap numbers, counted through all kernels; the number of taps itself stands for a weight of one.
template <class A>
class LaneWeights {
 public:
  LaneWeights(const std::vector<Tensor>& weights, int64_t channels, int64_t phases, const std::vector<int64_t>& order)
      : stride_(order.size() * kLanes<A>), values_(phases * stride_) {
    std::vector<std::vector<A>> taps;  // by channel
    for (const auto& w : weights) {
      const std::vector<A> values = host_values<A>(w);
      const int64_t count = w.size(2) * w.size(3);
      for (int64_t k = 0; k < count; ++k) {
        taps.emplace_back(channels);
        for (int64_t c = 0; c < channels; ++c) taps.back()[c] = values[c * count + k];
      }
    }
    taps.emplace_back(channels, A(1));
    A* to = values_.data();
    for (int64_t p = 0; p < phases; ++p)
      for (int64_t tap : order)
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) *to++ = taps[tap][(p * kLanes<A> + lane) % channels];
  }
  const A* phase(int64_t p) const { return values_.data() + p * stride_; }

 private:
  int64_t stride_;
  std::vector<A> values_;
};

// Multiply-adds a pixel of the result.
inline int64_t tap_count(const std::vector<Kernel>& kernels) {
  int64_t count = 0;
  for (const Kernel& kernel : kernels) count += kernel.taps();
  return count;
}

// The taps of a kernel, from the input pixel under its middle; the weights begin at `weight`.
inline Taps forward_taps(const Kernel& kernel, int64_t weight) {
  const int64_t first = -kernel.padding();
  return {first, first, kernel.dilation, kernel.dilation, kernel.size, kernel.size, 0, weight};
}

// The places of a kernel's row or column through which a gradient goes back to input pixel stride * i + place, counted
// from gradient pixel i: the first, how far they are apart, and their tap numbers.
struct BackwardLine {
  int64_t first = 0, step = 1;
  std::vector<int64_t> taps;

  BackwardLine(const Kernel& kernel, int64_t stride, int64_t place) {
    for (int64_t k = kernel.size - 1; k >= 0; --k) {
      const int64_t at = place + kernel.padding() - k * kernel.dilation;
      if (at % stride != 0) continue;
      if (taps.empty()) first = at / stride;
      if (taps.size() == 1) step = at / stride - first;
      taps.push_back(k);
    }
  }
};

// Memory of a thread for its groups, all zero. It is kept from call to call up to a size, because fresh pages cost more
// than the arithmetic on them.
template <class A, class Body>
void with_workspace(int64_t elements, const Body& body) {
  constexpr int64_t kKept = (4 << 20) / sizeof(A);
  static thread_local std::vector<A> kept;
  std::vector<A> own;
  std::vector<A>& memory = elements <= kKept ? kept : own;
  if (static_cast<int64_t>(memory.size()) < elements + kLanes<A>) memory.resize(elements + kLanes<A>);
  const auto misaligned = reinterpret_cast<uintptr_t>(memory.data()) % 64;
  A* first = memory.data() + (misaligned ? (64 - misaligned) / sizeof(A) : 0);
  std::fill_n(first, elements, A(0));
  body(first);
}

}  // namespace fastnas::bank
