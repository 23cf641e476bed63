#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/norm_mixed_sum_loops.h"
#include "ops/norm_mixed_sum_plan.h"

namespace fastnas::norm {

constexpr int64_t kLanes = Plan::kTileLanes;  // at most in a tile

// Calls sum(tile, segment) for all segments, finish(tile), then apply(tile, segment). A thread that has whole tiles
// applies while they are still in its cache. Which of the two ways is taken does not change a sum.
template <class Sum, class Finish, class Apply>
void two_passes(const Plan& plan, int64_t streams, const Sum& sum, const Finish& finish, const Apply& apply) {
  constexpr int64_t kElementsAThread = 1 << 16;  // less is not worth waking a thread for
  const int64_t tiles = plan.tiles, segments = plan.segments, threads = torch::stable::get_num_threads();
  const int64_t tile_size = std::max<int64_t>(1, plan.values_a_channel() * plan.channels / std::max<int64_t>(1, tiles));
  const auto grain = [&](int64_t size) { return std::max<int64_t>(1, kElementsAThread / (size * streams)); };
  if (tiles % threads == 0 || tiles >= 8 * threads) {
    torch::stable::parallel_for(0, tiles, grain(tile_size), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t s = 0; s < segments; ++s) sum(t, s);
        finish(t);
        for (int64_t s = segments - 1; s >= 0; --s) apply(t, s);
      }
      end_of_stream();
    });
    return;
  }
  const int64_t unit = grain(std::max<int64_t>(1, tile_size / std::max<int64_t>(1, segments)));
  torch::stable::parallel_for(0, tiles * segments, unit, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) sum(u / segments, u % segments);
  });
  for (int64_t t = 0; t < tiles; ++t) finish(t);
  torch::stable::parallel_for(0, tiles * segments, unit, [&](int64_t begin, int64_t end) {
    for (int64_t u = end - 1; u >= begin; --u) apply(u / segments, u % segments);
    end_of_stream();
  });
}

// Numbers by channel, dealt out to the lanes of a tile and gathered from them. The lanes hold its channels in order,
// over again when several rows were taken as one.
struct Lanes {
  int64_t count, first, channels, width;

  Lanes(const Plan& plan, int64_t tile)
      : count(plan.lanes(tile)),
        first(plan.first_channel(tile)),
        channels(plan.channels_of(tile)),
        width(plan.lanes_a_channel()) {}

  template <class From, class To>
  void spread(const From* by_channel, To* by_lane) const {
    const int64_t once = channels * width;
    for (int64_t c = 0; c < channels; ++c)
      std::fill_n(by_lane + c * width, width, static_cast<To>(by_channel[first + c]));
    for (int64_t i = once; i < count; ++i) by_lane[i] = by_lane[i - once];
  }

  void gather(const double* by_lane, double* by_channel) const {
    vectorised([&]() FASTNAS_INLINE {
      for (int64_t start = 0; start < count; start += channels * width) {
        for (int64_t c = 0; c < channels; ++c) {
          const double* from = by_lane + start + c * width;
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < width; ++i) sum += from[i];
          by_channel[first + c] += sum;
        }
      }
    });
  }
};

template <class T>
struct Maps {
  const Plan& plan;
  std::vector<T*> base;

  explicit Maps(const Plan& p) : plan(p) {
    for (const auto& t : p.tensors) base.push_back(static_cast<T*>(t.data_ptr()));
  }
  Rows<T> write(int64_t tensor, const Block& b) const {
    return {base[tensor] + plan.offset(tensor, b), plan.stride(tensor)};
  }
  Rows<const T> read(int64_t tensor, const Block& b) const {
    return {base[tensor] + plan.offset(tensor, b), plan.stride(tensor)};
  }
};

}  // namespace fastnas::norm
