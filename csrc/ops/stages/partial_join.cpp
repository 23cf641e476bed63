// A node of PC-DARTS: its mixed channels joined with those that bypassed the candidates, shuffled. Schema and meaning:
// fastnas/ops/stages/partial_join.py.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/channel_shuffle.h"
#include "ops/stages/chunks.h"
#include "ops/stages/frame.h"
#include "ops/stages/partial_join_loops.h"
#include "ops/stages/scratch.h"

namespace fastnas {
namespace {

template <class T>
std::vector<const T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const T*> found;
  for (const auto& t : tensors) found.push_back(data<T>(t));
  return found;
}

struct Sources {
  std::vector<Map> maps;
  std::vector<size_t> plain, pooled;  // which inputs have stride 1 and 2

  Sources(const char* op, const std::vector<Tensor>& xs, const std::vector<int64_t>& strides, const Map& out) {
    STD_TORCH_CHECK(xs.size() == strides.size(), op, ": every input needs a stride");
    for (size_t n = 0; n < xs.size(); ++n) {
      maps.push_back(map_of(op, xs[n]));
      const Map& m = maps.back();
      STD_TORCH_CHECK((strides[n] == 1 || strides[n] == 2) && m.batch == out.batch && m.channels == out.channels &&
                          ceil_div(m.height, strides[n]) == out.height && ceil_div(m.width, strides[n]) == out.width,
                      op, ": inputs and output differ in size");
      (strides[n] == 1 ? plain : pooled).push_back(n);
    }
  }
  // Row y of image b of input n, at stride 1.
  template <class T>
  FASTNAS_INLINE const T* row(const std::vector<const T*>& inputs, size_t n, int64_t b, int64_t y) const {
    return inputs[n] + (b * maps[n].height + y) * maps[n].width * maps[n].pixel;
  }
};

void partial_join(Tensor out, Tensor mixed, std::vector<Tensor> xs, std::vector<int64_t> strides, Tensor betas,
                  int64_t k) {
  constexpr const char* op = "partial_join";
  const Map map = map_of(op, out), mixed_map = map_of(op, mixed);
  STD_TORCH_CHECK(k > 1 && mixed_map.channels * k == map.channels && mixed_map.batch == map.batch &&
                      mixed_map.pixels() == map.pixels() && betas.numel() == static_cast<int64_t>(xs.size()),
                  op, ": sizes do not fit");
  for (const auto& tensors : {xs, {mixed, betas}}) check_same_dtype(op, tensors, out.scalar_type());
  const Sources sources(op, xs, strides, map);
  const int64_t selected = mixed_map.channels, channels = map.channels;
  dispatch_full_width(out.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Tensor weights = torch::stable::contiguous(betas);
    const T* beta = data<T>(weights);
    T* y_data = data<T>(out);
    const T* mixed_data = data<T>(mixed);
    const auto inputs = pointers<T>(xs);
    const ChannelShuffle<T> shuffle(channels, k, false);
    torch::stable::parallel_for(0, map.batch * map.height, 4, [&](int64_t begin, int64_t end) {
      Scratch<T> sums(map.width * channels, false);
      T* sum = sums.data();
      vectorised([&]() FASTNAS_INLINE {
        std::vector<WeightedRow<T>> rows;
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / map.height, y = r % map.height;
          rows.clear();
          for (size_t n : sources.plain) rows.push_back({sources.row(inputs, n, b, y), sources.maps[n].pixel, beta[n]});
          sum_rows(sum, rows, map.width, channels);
          for (size_t n : sources.pooled)
            for_each_window(sources.maps[n], inputs[n] + b * sources.maps[n].image(), y,
                            [&](int64_t x, int64_t c, auto highest, auto s) FASTNAS_INLINE {
                              read(sum + x * channels + c, s);
                              write(sum + x * channels + c, s + highest * beta[n]);
                            });
          const T* mix = mixed_data + r * map.width * mixed_map.pixel;
          copy_channels(sum, channels, mix, mixed_map.pixel, selected, map.width);
          shuffle.run(y_data + r * map.width * map.pixel, map.pixel, sum, channels, map.width);
        }
      });
    });
  });
}

std::tuple<Tensor, Tensor> partial_join_bwd(Tensor g, std::vector<Tensor> xs, std::vector<int64_t> strides, int64_t k) {
  constexpr const char* op = "partial_join_bwd";
  const Map map = map_of(op, g);
  STD_TORCH_CHECK(k > 1 && map.channels % k == 0, op, ": k must divide the channels");
  check_same_dtype(op, xs, g.scalar_type());
  const Sources sources(op, xs, strides, map);
  const int64_t selected = map.channels / k, channels = map.channels, count = static_cast<int64_t>(xs.size());
  const Tensor mixed = new_map(g, {map.batch, map.height, map.width, selected});
  const Tensor dots = torch::stable::new_empty(g, {count});
  dispatch_full_width(g.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    T* mix = static_cast<T*>(mixed.data_ptr());
    const T* g_data = data<T>(g);
    const auto inputs = pointers<T>(xs);
    const ChannelShuffle<T> unshuffle(channels, k, true);
    std::vector<double> images(map.batch * count);
    for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
      Scratch<T> row_memory(map.width * channels, false);
      T* row = row_memory.data();
      vectorised([&]() FASTNAS_INLINE {
        std::vector<WeightedRow<T>> rows;
        for (int64_t b = begin; b < end; ++b) {
          std::vector<LaneSums<T>> sums(count);  // of the plain sources, then of the pooled ones
          for (int64_t y = 0; y < map.height; ++y) {
            const int64_t r = b * map.height + y;
            unshuffle.run(row, channels, g_data + r * map.width * map.pixel, map.pixel, map.width);
            copy_channels(mix + r * map.width * selected, selected, row, channels, selected, map.width);
            clear_channels(row, channels, selected, map.width);
            rows.clear();
            for (size_t n : sources.plain) rows.push_back({sources.row(inputs, n, b, y), sources.maps[n].pixel, T(1)});
            dot_rows(sums.data(), row, rows, map.width, channels);
            LaneSums<T>* sum = sums.data() + rows.size();
            for (size_t n : sources.pooled) {
              Vec<T> total{};
              for_each_window(sources.maps[n], inputs[n] + b * sources.maps[n].image(), y,
                              [&](int64_t x, int64_t c, auto highest, auto d) FASTNAS_INLINE {
                                read(row + x * channels + c, d);
                                if constexpr (sizeof(d) == sizeof(T))
                                  sum->lanes[0] += highest * d;
                                else
                                  total += highest * d;
                              });
              sum++->add(total);
            }
          }
          const LaneSums<T>* sum = sums.data();
          for (size_t n : sources.plain) images[b * count + n] = sum++->sum();
          for (size_t n : sources.pooled) images[b * count + n] = sum++->sum();
        }
      });
    });
    T* out = static_cast<T*>(dots.data_ptr());
    for (int64_t n = 0; n < count; ++n) {
      double sum = 0;
      for (int64_t b = 0; b < map.batch; ++b) sum += images[b * count + n];
      out[n] = static_cast<T>(sum);
    }
  });
  return {mixed, dots};
}

Tensor partial_join_dx(Tensor x, std::vector<Tensor> gs, Tensor betas, int64_t stride, int64_t k, Tensor mixed,
                       std::optional<Tensor> base) {
  constexpr const char* op = "partial_join_dx";
  const Map map = map_of(op, x), mixed_map = map_of(op, mixed);
  STD_TORCH_CHECK((stride == 1 || stride == 2) && k > 1 && mixed_map.channels * k == map.channels &&
                      mixed_map.batch == map.batch && mixed_map.height == map.height && mixed_map.width == map.width &&
                      !gs.empty() && betas.numel() == static_cast<int64_t>(gs.size()),
                  op, ": sizes do not fit");
  for (const auto& tensors : {gs, {mixed, betas}}) check_same_dtype(op, tensors, x.scalar_type());
  const int64_t channels = map.channels, selected = mixed_map.channels;
  const Map out_map{map.batch, ceil_div(map.height, stride), ceil_div(map.width, stride), channels, channels};
  const Map base_map = base ? map_like(op, *base, map) : map;
  std::vector<Map> maps;
  for (const auto& g : gs) maps.push_back(map_like(op, g, out_map));
  const Tensor out = new_map(x, {map.batch, map.height, map.width, channels});
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Tensor weights = torch::stable::contiguous(betas);
    const T* beta = data<T>(weights);
    T* dx = static_cast<T*>(out.data_ptr());
    const T *x_data = data<T>(x), *mixed_data = data<T>(mixed), *base_data = base ? data<T>(*base) : nullptr;
    const auto gradients = pointers<T>(gs);
    const ChannelShuffle<T> unshuffle(channels, k, true);
    torch::stable::parallel_for(0, map.batch * out_map.height, 4, [&](int64_t begin, int64_t end) {
      Scratch<T> shuffled(out_map.width * channels, false), rows(out_map.width * channels, false);
      Scratch<T> own_memory(stride == 2 ? map.width * channels : 0);  // zero but for the selected channels
      vectorised([&]() FASTNAS_INLINE {
        std::vector<WeightedRow<T>> weighted;
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / out_map.height, y = r % out_map.height;
          T *sum = shuffled.data(), *row = rows.data();
          weighted.clear();
          for (size_t n = 0; n < gradients.size(); ++n)
            weighted.push_back({gradients[n] + r * out_map.width * maps[n].pixel, maps[n].pixel, beta[n]});
          sum_rows(sum, weighted, out_map.width, channels);
          unshuffle.run(row, channels, sum, channels, out_map.width);
          if (stride == 2) clear_channels(row, channels, selected, out_map.width);
          // The rows of x that this one of the output comes from: the selected channels, and at stride 1 the others.
          for (int64_t in_y = y * stride; in_y < std::min(map.height, (y + 1) * stride); ++in_y) {
            const int64_t first = (b * map.height + in_y) * map.width;
            T* own = stride == 1 ? row : own_memory.data();
            copy_channels(own, channels, mixed_data + first * mixed_map.pixel, mixed_map.pixel, selected, map.width);
            for_each_value<T>(map.width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
              auto more = v;
              read(own + p * channels + c, v);
              if (base_data) {
                read(base_data + (first + p) * base_map.pixel + c, more);
                v += more;
              }
              write(dx + (first + p) * channels + c, v);
            });
          }
          if (stride == 1) continue;
          T* target = dx + (b * map.height + 2 * y) * map.width * channels;
          for_each_window(
              map, x_data + b * map.image(), y, [&](int64_t p, int64_t c, auto v, auto which) FASTNAS_INLINE {
                auto before = v;
                read(row + p * channels + c, v);
                for (int number = 0; number < 4; ++number) {
                  if ((number % 2 && 2 * p + 1 >= map.width) || (number / 2 && 2 * y + 1 >= map.height)) continue;
                  T* pixel = target + (number / 2 * map.width + 2 * p + number % 2) * channels + c;
                  read(pixel, before);
                  write(pixel, before + if_same(which, decltype(v){} + static_cast<T>(number), v, decltype(v){}));
                }
              });
        }
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("partial_join", TORCH_BOX(&fastnas::partial_join));
  m.impl("partial_join_bwd", TORCH_BOX(&fastnas::partial_join_bwd));
  m.impl("partial_join_dx", TORCH_BOX(&fastnas::partial_join_dx));
}
