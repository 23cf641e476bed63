#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/stages/conv_stage_loops.h"
#include "ops/stages/frame.h"

// The branches of conv_stage: where the taps of their kernels are, and their weights as the loops read them.

namespace fastnas {

// A branch, or half a FactorizedReduce: depthwise kernel of `taps` (1: just a pixel), then pointwise.
template <class T>
struct Part {
  int64_t source, output, first, taps, outputs;
  bool depthwise, flat;
  int64_t dilation;               // in positions; 0 where taps are not whole positions apart
  std::vector<int64_t> offsets;   // of each tap in the input with its border, from where its output pixel is
  std::vector<int64_t> mirrored;  // the same for the input's gradient, in the output's gradient with a border, of the
                                  // kernel turned by half a turn
  std::vector<T> kernel;          // [vectors][taps][lanes]
  std::vector<T> turned;          // the kernel turned by half a turn
  std::vector<T> forward;         // pointwise: flat [channels][lanes], else [channels][out_pitch]
  std::vector<T> backward;        // flat [channels][lanes], else [outputs][pitch in whole vectors]
  int64_t out_pitch;              // of a pixel of the output in a buffer
  int64_t in_pitch;               // whole vectors of input channels
  int64_t kernel_start, pointwise_start;  // in the flat gradient

  int64_t kernel_size() const { return depthwise ? taps : 0; }  // a channel
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
      part.pointwise_start = weights + part.kernel_size() * frame.channels;
      weights = part.pointwise_start + part.outputs * frame.channels;
      frame.border = std::max({frame.border, dilation * (side - 1) / 2, shift});
      outputs = std::max(outputs, part.output + 1);
      out_channels = std::max(out_channels, part.first + part.outputs);
      parts.push_back(part);
    }
    for (size_t p = 0; p < parts.size(); ++p) {
      const int64_t* field = description.data() + kFields * p;
      parts[p].dilation = frame.flat || stride == 2 ? 0 : field[3];
      place_taps(parts[p], field[3], field[4]);
      pack_kernel(parts[p], given[p].depthwise);
      pack_pointwise(parts[p], given[p].pointwise, backward);
    }
  }

 private:
  void place_taps(Part<T>& part, int64_t dilation, int64_t shift) {
    const int64_t side = side_of(part.taps), half = dilation * (side - 1) / 2;
    for (int64_t y = 0; y < side; ++y)
      for (int64_t x = 0; x < side; ++x) {
        const int64_t down = y * dilation - half + shift, right = x * dilation - half + shift;
        part.offsets.push_back((frame.border + down) * frame.padded_row() + frame.column(frame.border + right));
        part.mirrored.push_back((frame.border - down) * frame.padded_row() + (frame.border - right) * frame.pitch);
      }
    std::reverse(part.mirrored.begin(), part.mirrored.end());
  }

  void pack_kernel(Part<T>& part, const T* depthwise) {
    constexpr int64_t lanes = kLanes<T>;
    part.kernel.assign(frame.vectors * part.taps * lanes, part.depthwise ? T(0) : T(1));
    part.turned = part.kernel;
    if (!part.depthwise) return;
    const int64_t width = frame.flat ? lanes : frame.channels;  // of flat rows the channels are repeated
    for (int64_t first = 0; first < width; first += lanes)
      for (int64_t t = 0; t < part.taps; ++t) {
        T* const packed = part.kernel.data() + first * part.taps + t * lanes;
        T* const turned = part.turned.data() + first * part.taps + (part.taps - 1 - t) * lanes;
        for (int64_t lane = 0; lane < std::min(lanes, width - first); ++lane) {
          const int64_t channel = frame.flat ? lane % frame.channels : first + lane;
          packed[lane] = turned[lane] = depthwise[channel * part.taps + t];
        }
      }
  }

  void pack_pointwise(Part<T>& part, const T* w, bool backward) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t channels = frame.channels;
    if (part.flat) {
      auto& packed = backward ? part.backward : part.forward;
      packed.resize(channels * lanes);
      for (int64_t from = 0; from < channels; ++from)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t to = lane % channels;
          packed[from * lanes + lane] = backward ? w[from * channels + to] : w[to * channels + from];
        }
    } else if (backward) {
      part.backward.assign(part.outputs * part.in_pitch, T(0));
      for (int64_t o = 0; o < part.outputs; ++o)
        std::copy(w + o * channels, w + (o + 1) * channels, part.backward.begin() + o * part.in_pitch);
    } else {
      part.forward.assign(channels * part.out_pitch, T(0));
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t o = 0; o < part.outputs; ++o) part.forward[c * part.out_pitch + o] = w[o * channels + c];
    }
  }
};

}  // namespace fastnas
