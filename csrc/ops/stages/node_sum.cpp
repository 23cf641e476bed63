// The weighted, normalised terms of a node, summed, and the sums that their gradients need. Schema and meaning:
// fastnas/ops/stages/node_sum.py.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/stages/chunks.h"
#include "ops/stages/dots.h"
#include "ops/stages/frame.h"

namespace fastnas {
namespace {

// Terms at a time, whose sum stays in a register.
constexpr int kTogether = 4;
// Pixels at a time: their sums stay in the first-level cache while further terms are added.
constexpr int64_t kBlockOfPixels = 128;

template <class T>
struct Weighted {
  const T *x, *scale, *mean;
  int64_t pixel;
};

// out (+)= the sum of Count terms.
template <class T, int Count>
FASTNAS_INLINE inline void add_terms(T* out, int64_t pixel, const Weighted<T>* terms, int64_t pixels, int64_t channels,
                                     bool dense, bool add) {
  Weighted<T> t[Count];
  for (int k = 0; k < Count; ++k) t[k] = terms[k];
  const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
    auto x = v, scale = v, mean = v;
    if (add) read(out + p * pixel + c, v);
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) {
      read(t[k].x + p * t[k].pixel + c, x);
      read(t[k].scale + c, scale);
      read(t[k].mean + c, mean);
      v += scale * (x - mean);
    }
    write(out + p * pixel + c, v);
  };
  if (dense)
    for_each_dense_value<T>(pixels, channels, body);
  else
    for_each_value<T>(pixels, channels, body);
}

void node_sum(Tensor out, std::vector<Tensor> terms, Tensor coef, bool accumulate) {
  constexpr const char* op = "node_sum";
  const Map map = map_of(op, out);
  const int64_t count = static_cast<int64_t>(terms.size()), channels = map.channels;
  STD_TORCH_CHECK(count > 0 && coef.numel() == count * 2 * channels, op, ": every term needs its coefficients");
  for (const auto& tensors : {terms, {coef}}) check_same_dtype(op, tensors, out.scalar_type());
  std::vector<Map> maps;
  for (const auto& t : terms) maps.push_back(map_like(op, t, map));
  dispatch_full_width(out.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const std::vector<T> coefficients = repeated(data<T>(torch::stable::contiguous(coef)), 2 * count, channels);
    const int64_t width = repeated_width<T>(channels), pixels = map.batch * map.pixels();
    bool dense = width != channels && map.pixel == channels;
    for (const auto& m : maps) dense = dense && m.pixel == channels;
    T* y = data<T>(out);
    const int64_t blocks = ceil_div(pixels, kBlockOfPixels);
    torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t first = b * kBlockOfPixels, n = std::min(kBlockOfPixels, pixels - first);
          for (int64_t k = 0; k < count; k += kTogether) {
            Weighted<T> some[kTogether];
            const int64_t together = std::min<int64_t>(kTogether, count - k);
            for (int64_t i = 0; i < together; ++i) {
              const T* scale = coefficients.data() + (k + i) * 2 * width;
              some[i] = {data<T>(terms[k + i]) + first * maps[k + i].pixel, scale, scale + width, maps[k + i].pixel};
            }
            T* o = y + first * map.pixel;
            const bool add = accumulate || k > 0;
            if (together == 4) add_terms<T, 4>(o, map.pixel, some, n, channels, dense, add);
            if (together == 3) add_terms<T, 3>(o, map.pixel, some, n, channels, dense, add);
            if (together == 2) add_terms<T, 2>(o, map.pixel, some, n, channels, dense, add);
            if (together == 1) add_terms<T, 1>(o, map.pixel, some, n, channels, dense, add);
          }
        }
      });
    });
  });
}

Tensor node_dots(std::vector<Tensor> gs, std::vector<Tensor> terms, Tensor means) {
  constexpr const char* op = "node_dots";
  STD_TORCH_CHECK(!gs.empty() && gs.size() == terms.size(), op, ": every term needs its gradient");
  const Map map = map_of(op, terms[0]);
  const int64_t count = static_cast<int64_t>(terms.size()), channels = map.channels;
  STD_TORCH_CHECK(means.numel() == count * channels, op, ": every term needs its mean");
  for (const auto& tensors : {gs, terms, {means}}) check_same_dtype(op, tensors, terms[0].scalar_type());
  std::vector<Map> g_maps, maps;
  for (const auto& g : gs) g_maps.push_back(map_like(op, g, map));
  for (const auto& t : terms) maps.push_back(map_like(op, t, map));
  const Tensor out = torch::stable::new_empty(means, {count, 2, channels});
  dispatch_full_width(terms[0].scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Tensor mean = torch::stable::contiguous(means);
    Dots<T> measured(count, map.batch, channels);
    for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
      ChannelSums<T> dense(map.pixels(), channels), spaced(map.pixels(), channels, false);
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t image = begin; image < end; ++image)
          for (int64_t k = 0; k < count; ++k) {
            const bool gaps = g_maps[k].pixel != channels || maps[k].pixel != channels;
            measured.measure(k, image, data<T>(gs[k]) + image * g_maps[k].image(), g_maps[k].pixel,
                             data<T>(terms[k]) + image * maps[k].image(), maps[k].pixel, data<T>(mean) + k * channels,
                             gaps ? spaced : dense);
          }
      });
    });
    measured.write(static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("node_sum", TORCH_BOX(&fastnas::node_sum));
  m.impl("node_dots", TORCH_BOX(&fastnas::node_dots));
}
