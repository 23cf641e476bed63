#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "ops/stages/conv_stage_loops.h"
#include "ops/stages/frame.h"
#include "ops/stages/scratch.h"

// The branches of conv_stage: where the taps of their kernels are, and their weights as the loops read them.

namespace fastnas {

// A branch, or half a FactorizedReduce: depthwise kernel of `taps` (1: just a pixel), then pointwise.
template <class T>
struct Part {
  int64_t source, output, first, taps, outputs;
  bool depthwise, flat;
  int64_t dilation;  // in positions; 0 where taps are not whole positions apart
  int64_t spacing;   // rows from one tap to the next
  using Offsets = std::array<int64_t, 25>;
  Offsets offsets;   // of each tap in the input with its border, from where its output pixel is
  Offsets mirrored;  // the same for the input's gradient, in the output's gradient with a border, of the kernel turned
                     // by half a turn
  // Packed in the memory of the plan.
  T* kernel;     // [vectors][taps][lanes]
  T* turned;     // the kernel turned by half a turn; null forward
  T* pointwise;  // forward: flat [channels][lanes], else [channels][out_pitch]; backward: flat [channels][lanes], else
                 // [outputs][pitch in whole vectors]
  int64_t out_pitch;                      // of a pixel of the output in a buffer
  int64_t in_pitch;                       // whole vectors of input channels
  int64_t kernel_start, pointwise_start;  // in the flat gradient

  // The rows of the kernel that meet a map of `height` rows when its middle lies on row y of it.
  KernelRows rows_at(int64_t y, int64_t height) const {
    const int64_t half = side_of(taps) / 2, above = std::min(half, y / spacing);
    return {static_cast<int>(half - above), static_cast<int>(half + std::min(half, (height - 1 - y) / spacing) + 1)};
  }
};

// The weights of a part, dense: depthwise [C, side, side], null where it just takes pixels, and pointwise [outputs, C].
template <class T>
struct PartWeights {
  const T* depthwise;
  int64_t side;
  const T* pointwise;
  int64_t outputs;
};

template <class T>
class Plan {
 public:
  static constexpr int64_t kFields = 5;

  Frame<T> frame;
  std::vector<Part<T>> parts;
  int64_t outputs = 0, out_channels = 0, weights = 0;

  // description: `kFields` integers a part, as in the op.
  Plan(const char* op, const Map& x, const std::vector<int64_t>& description, const std::vector<PartWeights<T>>& given,
       int64_t stride, int64_t sources, bool backward)
      : frame(x, stride) {
    STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2");
    STD_TORCH_CHECK(!given.empty() && description.size() == kFields * given.size(), op,
                    ": every part needs five integers and two weights");
    parts.reserve(given.size());
    for (size_t p = 0; p < given.size(); ++p) {
      const PartWeights<T>& own = given[p];
      const int64_t* field = description.data() + kFields * p;
      const int64_t dilation = field[3], shift = field[4];
      Part<T> part{};
      part.source = field[0], part.output = field[1], part.first = field[2];
      part.depthwise = own.depthwise != nullptr;
      const int64_t side = part.depthwise ? own.side : 1;
      part.taps = side * side;
      part.outputs = own.outputs;
      STD_TORCH_CHECK((side == 1 || side == 3 || side == 5) && dilation >= 1 && (shift == 0 || shift == 1), op,
                      ": kernels are 3x3 or 5x5, shifts 0 or 1");
      STD_TORCH_CHECK(part.source >= 0 && part.source < sources && part.output >= 0 && part.first >= 0, op,
                      ": a part names a source or an output that is not there");
      part.flat = frame.flat && part.outputs == frame.channels;
      part.out_pitch = part.flat ? frame.channels : rounded_up(part.outputs, kLanes<T>);
      part.in_pitch = rounded_up(frame.channels, kLanes<T>);
      part.kernel_start = weights;
      part.pointwise_start = weights + (part.depthwise ? part.taps : 0) * frame.channels;
      weights = part.pointwise_start + part.outputs * frame.channels;
      frame.border = std::max({frame.border, dilation * (side - 1) / 2, shift});
      outputs = std::max(outputs, part.output + 1);
      out_channels = std::max(out_channels, part.first + part.outputs);
      parts.push_back(part);
    }
    int64_t size = 0;
    for (const auto& part : parts) size += packed_kernel(part) * (backward ? 2 : 1) + packed_pointwise(part, backward);
    memory_.emplace(size, false);
    T* free = memory_->data();
    for (size_t p = 0; p < parts.size(); ++p) {
      const int64_t* field = description.data() + kFields * p;
      Part<T>& part = parts[p];
      part.dilation = frame.flat || stride == 2 ? 0 : field[3];
      part.spacing = field[3];
      place_taps(part, field[3], field[4]);
      part.kernel = free;
      part.turned = backward ? free + packed_kernel(part) : nullptr;
      part.pointwise = free + packed_kernel(part) * (backward ? 2 : 1);
      free = part.pointwise + packed_pointwise(part, backward);
    }
    constexpr int64_t kPartsAThread = 1 << 14;  // values; fewer are not worth waking a thread for
    const int64_t count = static_cast<int64_t>(parts.size());
    torch::stable::parallel_for(0, count, ceil_div(kPartsAThread * count, size), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        pack_kernel(parts[p], given[p].depthwise);
        pack_pointwise(parts[p], given[p].pointwise, backward);
      }
    });
  }

 private:
  int64_t packed_kernel(const Part<T>& part) const { return frame.vectors * part.taps * kLanes<T>; }
  int64_t packed_pointwise(const Part<T>& part, bool backward) const {
    if (part.flat) return frame.channels * kLanes<T>;
    return rounded_up(backward ? part.outputs * part.in_pitch : frame.channels * part.out_pitch, kLanes<T>);
  }

  void place_taps(Part<T>& part, int64_t dilation, int64_t shift) {
    const int64_t side = side_of(part.taps), half = dilation * (side - 1) / 2;
    for (int64_t t = 0; t < part.taps; ++t) {
      const int64_t down = t / side * dilation - half + shift, right = t % side * dilation - half + shift;
      part.offsets[t] = (frame.border + down) * frame.padded_row() + frame.column(frame.border + right);
      part.mirrored[part.taps - 1 - t] =
          (frame.border - down) * frame.padded_row() + (frame.border - right) * frame.pitch;
    }
  }

  void pack_kernel(Part<T>& part, const T* depthwise) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t size = packed_kernel(part), taps = part.taps;
    if (!part.depthwise) std::fill_n(part.kernel, size, T(1));
    const int64_t width = frame.flat ? lanes : frame.channels;  // of flat rows the channels are repeated
    for (int64_t first = 0; part.depthwise && first < rounded_up(width, lanes); first += lanes)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t column = first + lane, channel = frame.flat ? column % frame.channels : column;
          part.kernel[first * taps + t * lanes + lane] = column < width ? depthwise[channel * taps + t] : T(0);
        }
    if (!part.turned) return;
    for (int64_t vector = 0; vector < size; vector += taps * lanes)
      for (int64_t t = 0; t < taps; ++t)
        std::copy_n(part.kernel + vector + t * lanes, lanes, part.turned + vector + (taps - 1 - t) * lanes);
  }

  void pack_pointwise(Part<T>& part, const T* w, bool backward) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t channels = frame.channels;
    T* packed = part.pointwise;
    if (part.flat) {
      for (int64_t from = 0; from < channels; ++from)
        for (int64_t to = 0; to < channels; ++to)
          for (int64_t lane = to; lane < lanes; lane += channels)
            packed[from * lanes + lane] = backward ? w[from * channels + to] : w[to * channels + from];
      return;
    }
    if (backward) {
      for (int64_t o = 0; o < part.outputs; ++o) {
        T* row = packed + o * part.in_pitch;
        std::fill(std::copy_n(w + o * channels, channels, row), row + part.in_pitch, T(0));
      }
      return;
    }
    // A few columns of w at a time, so that what is read of a row is used while it is near.
    constexpr int64_t together = 16;
    if (part.outputs < part.out_pitch) std::fill_n(packed, channels * part.out_pitch, T(0));
    for (int64_t first = 0; first < channels; first += together)
      for (int64_t o = 0; o < part.outputs; ++o)
        for (int64_t c = first; c < std::min(first + together, channels); ++c)
          packed[c * part.out_pitch + o] = w[o * channels + c];
  }

  std::optional<Scratch<T>> memory_;
};

}  // namespace fastnas
