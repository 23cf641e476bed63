#pragma once

#include <cstdint>
#include <vector>

#include "ops/stages/conv_stage_plan.h"

namespace fastnas {

// Weights that lie end to end in one row, part by part, depthwise [C, side, side] before pointwise [outputs, C].
template <class T>
class FlatWeights {
 public:
  FlatWeights(const char* op, const Tensor& weights, int64_t channels)
      : op_(op), row_(data<T>(weights)), size_(weights.numel()), channels_(channels) {
    STD_TORCH_CHECK(weights.dim() == 1 && weights.stride(0) == 1, op, ": the weights are one dense row");
  }

  // Those of the next parts. shapes: of each the side of its depthwise kernel, 0 where it has none, and its outputs.
  std::vector<PartWeights<T>> take(const std::vector<int64_t>& shapes) {
    std::vector<PartWeights<T>> found;
    found.reserve(shapes.size() / 2);
    for (size_t p = 0; p + 1 < shapes.size(); p += 2) {
      const int64_t side = shapes[p], outputs = shapes[p + 1], matrix = at_ + side * side * channels_;
      STD_TORCH_CHECK(side >= 0 && outputs > 0 && matrix + outputs * channels_ <= size_, op_, ": weights are missing");
      found.push_back({side ? row_ + at_ : nullptr, side, row_ + matrix, outputs});
      at_ = matrix + outputs * channels_;
    }
    return found;
  }

  void finish() const { STD_TORCH_CHECK(at_ == size_, op_, ": there are more weights than parts"); }

 private:
  const char* op_;
  const T* row_;
  int64_t size_, channels_, at_ = 0;
};

}  // namespace fastnas
