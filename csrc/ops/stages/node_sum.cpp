// The weighted, normalised terms of a node, summed, and the sums that their gradients need. Schema and meaning:
// fastnas/ops/stages/node_sum.py.

#include "ops/stages/node_sum.h"

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

}  // namespace

template <class T>
void sum_terms(T* out, const Map& map, const std::vector<View<T>>& terms, const T* coef, bool accumulate) {
  const int64_t count = static_cast<int64_t>(terms.size()), channels = map.channels;
  const std::vector<T> coefficients = repeated(coef, 2 * count, channels);
  const int64_t width = repeated_width<T>(channels), pixels = map.batch * map.pixels();
  bool dense = width != channels && map.pixel == channels;
  for (const auto& t : terms) dense = dense && t.map.pixel == channels;
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
            const int64_t pixel = terms[k + i].map.pixel;
            some[i] = {terms[k + i].data + first * pixel, scale, scale + width, pixel};
          }
          T* o = out + first * map.pixel;
          const bool add = accumulate || k > 0;
          if (together == 4) add_terms<T, 4>(o, map.pixel, some, n, channels, dense, add);
          if (together == 3) add_terms<T, 3>(o, map.pixel, some, n, channels, dense, add);
          if (together == 2) add_terms<T, 2>(o, map.pixel, some, n, channels, dense, add);
          if (together == 1) add_terms<T, 1>(o, map.pixel, some, n, channels, dense, add);
        }
      }
    });
  });
}

template <class T>
void dot_terms(const std::vector<View<T>>& gs, const std::vector<View<T>>& terms, const T* means, int64_t mean_step,
               T* out) {
  const Map& map = terms[0].map;
  const int64_t count = static_cast<int64_t>(terms.size()), channels = map.channels;
  Dots<T> measured(count, map.batch, channels);
  for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
    ChannelSums<T> dense(map.pixels(), channels), spaced(map.pixels(), channels, false);
    vectorised([&]() FASTNAS_INLINE {
      for (int64_t image = begin; image < end; ++image)
        for (int64_t k = 0; k < count; ++k) {
          const int64_t g_pixel = gs[k].map.pixel, pixel = terms[k].map.pixel;
          measured.measure(k, image, gs[k].image(image), g_pixel, terms[k].image(image), pixel, means + k * mean_step,
                           g_pixel != channels || pixel != channels ? spaced : dense);
        }
    });
  });
  measured.write(out);
}

template void sum_terms(float*, const Map&, const std::vector<View<float>>&, const float*, bool);
template void sum_terms(double*, const Map&, const std::vector<View<double>>&, const double*, bool);
template void dot_terms(const std::vector<View<float>>&, const std::vector<View<float>>&, const float*, int64_t,
                        float*);
template void dot_terms(const std::vector<View<double>>&, const std::vector<View<double>>&, const double*, int64_t,
                        double*);

namespace {

void node_sum(Tensor out, std::vector<Tensor> terms, Tensor coef, bool accumulate) {
  constexpr const char* op = "node_sum";
  const Map map = map_of(op, out);
  const int64_t count = static_cast<int64_t>(terms.size());
  STD_TORCH_CHECK(count > 0 && coef.numel() == count * 2 * map.channels, op, ": every term needs its coefficients");
  for (const auto& tensors : {terms, {coef}}) check_same_dtype(op, tensors, out.scalar_type());
  coef = torch::stable::contiguous(coef);
  dispatch_full_width(out.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    sum_terms<T>(data<T>(out), map, views_like<T>(op, terms, map), data<T>(coef), accumulate);
  });
}

Tensor node_dots(std::vector<Tensor> gs, std::vector<Tensor> terms, Tensor means) {
  constexpr const char* op = "node_dots";
  STD_TORCH_CHECK(!gs.empty() && gs.size() == terms.size(), op, ": every term needs its gradient");
  const Map map = map_of(op, terms[0]);
  const int64_t count = static_cast<int64_t>(terms.size()), channels = map.channels;
  STD_TORCH_CHECK(means.numel() == count * channels, op, ": every term needs its mean");
  for (const auto& tensors : {gs, terms, {means}}) check_same_dtype(op, tensors, terms[0].scalar_type());
  Tensor out = torch::stable::new_empty(means, {count, 2, channels});
  means = torch::stable::contiguous(means);
  dispatch_full_width(terms[0].scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    dot_terms<T>(views_like<T>(op, gs, map), views_like<T>(op, terms, map), data<T>(means), channels, data<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("node_sum", TORCH_BOX(&fastnas::node_sum));
  m.impl("node_dots", TORCH_BOX(&fastnas::node_dots));
}
