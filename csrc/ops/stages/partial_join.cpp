// A node of PC-DARTS: its mixed channels joined with those that bypassed the candidates, shuffled. Schema and meaning:
// fastnas/ops/stages/partial_join.py.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/channel_shuffle.h"
#include "ops/stages/chunks.h"
#include "ops/stages/frame.h"
#include "ops/stages/scratch.h"

namespace fastnas {
namespace {

// The highest of the 2x2 window of each pixel of row y at stride 2, rounding up, the first one where several are equal.
// body(pixel, channel, highest, which one as a number: 0 and 1 above, 2 and 3 below).
template <class T, class Body>
FASTNAS_INLINE inline void for_each_window(const Map& m, const T* image, int64_t y, const Body& body) {
  const int64_t row = m.width * m.pixel;
  const T* above = image + 2 * y * row;
  const bool down = 2 * y + 1 < m.height;
  for_each_value<T>(ceil_div(m.width, 2), m.channels, [&](int64_t x, int64_t c, auto v) FASTNAS_INLINE {
    const T* p = above + 2 * x * m.pixel + c;
    const bool right = 2 * x + 1 < m.width;
    auto highest = v, which = v - v;
    read(p, highest);
    const auto offer = [&](int64_t at, int number) FASTNAS_INLINE {
      read(p + at, v);
      const auto before = highest;
      highest = v > highest ? v : highest;
      which = if_same(highest, before, which, decltype(v){} + static_cast<T>(number));
    };
    if (right) offer(m.pixel, 1);
    if (down) offer(row, 2);
    if (right && down) offer(row + m.pixel, 3);
    body(x, c, highest, which);
  });
}

// sum += beta * in, row by row
template <class T>
FASTNAS_INLINE inline void add_row(T* sum, const T* in, int64_t pixel, T beta, int64_t width, int64_t channels) {
  for_each_value<T>(width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
    auto s = v;
    read(in + p * pixel + c, v);
    read(sum + p * channels + c, s);
    write(sum + p * channels + c, s + v * beta);
  });
}

template <class T>
std::vector<const T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const T*> found;
  for (const auto& t : tensors) found.push_back(data<T>(t));
  return found;
}

struct Sources {
  std::vector<Map> maps;

  Sources(const char* op, const std::vector<Tensor>& xs, const std::vector<int64_t>& strides, const Map& out) {
    STD_TORCH_CHECK(xs.size() == strides.size(), op, ": every input needs a stride");
    for (size_t n = 0; n < xs.size(); ++n) {
      maps.push_back(map_of(op, xs[n]));
      const Map& m = maps.back();
      STD_TORCH_CHECK((strides[n] == 1 || strides[n] == 2) && m.batch == out.batch && m.channels == out.channels &&
                          ceil_div(m.height, strides[n]) == out.height && ceil_div(m.width, strides[n]) == out.width,
                      op, ": inputs and output differ in size");
    }
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
      Scratch<T> sums(map.width * channels);
      T* sum = sums.data();
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / map.height, y = r % map.height;
          std::fill_n(sum, map.width * channels, T(0));
          for (size_t n = 0; n < inputs.size(); ++n) {
            const Map& m = sources.maps[n];
            const T* image = inputs[n] + b * m.image();
            if (strides[n] == 1)
              add_row(sum, image + y * m.width * m.pixel, m.pixel, beta[n], map.width, channels);
            else
              for_each_window(m, image, y, [&](int64_t x, int64_t c, auto highest, auto s) FASTNAS_INLINE {
                read(sum + x * channels + c, s);
                write(sum + x * channels + c, s + highest * beta[n]);
              });
          }
          const T* mix = mixed_data + r * map.width * mixed_map.pixel;
          for (int64_t x = 0; x < map.width; ++x)
            for (int64_t i = 0; i < selected; ++i) sum[x * channels + i] = mix[x * mixed_map.pixel + i];
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
      Scratch<T> row_memory(map.width * channels);
      T* row = row_memory.data();
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t b = begin; b < end; ++b)
          for (int64_t y = 0; y < map.height; ++y) {
            const int64_t r = b * map.height + y;
            unshuffle.run(row, channels, g_data + r * map.width * map.pixel, map.pixel, map.width);
            for (int64_t x = 0; x < map.width; ++x)
              for (int64_t i = 0; i < selected; ++i) {
                mix[(r * map.width + x) * selected + i] = row[x * channels + i];
                row[x * channels + i] = 0;
              }
            for (int64_t n = 0; n < count; ++n) {
              const Map& m = sources.maps[n];
              const T* image = inputs[n] + b * m.image();
              Vec<T> total{};
              T rest = 0;
              const auto add = [&](int64_t x, int64_t c, auto v, auto d) FASTNAS_INLINE {
                read(row + x * channels + c, d);
                if constexpr (sizeof(v) == sizeof(T))
                  rest += v * d;
                else
                  total += v * d;
              };
              const T* in = image + y * m.width * m.pixel;
              if (strides[n] == 1)
                for_each_value<T>(map.width, channels, [&](int64_t x, int64_t c, auto v) FASTNAS_INLINE {
                  read(in + x * m.pixel + c, v);
                  add(x, c, v, v);
                });
              else
                for_each_window(m, image, y, add);
              for (int64_t lane = 0; lane < kLanes<T>; ++lane) rest += total[lane];
              images[b * count + n] += rest;
            }
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
      Scratch<T> shuffled(out_map.width * channels), rows(out_map.width * channels);
      Scratch<T> own_memory(stride == 2 ? map.width * channels : 0);
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / out_map.height, y = r % out_map.height;
          T* sum = shuffled.data();
          std::fill_n(sum, out_map.width * channels, T(0));
          for (size_t n = 0; n < gradients.size(); ++n)
            add_row(sum, gradients[n] + r * out_map.width * maps[n].pixel, maps[n].pixel, beta[n], out_map.width,
                    channels);
          T* row = rows.data();
          unshuffle.run(row, channels, sum, channels, out_map.width);
          for (int64_t p = 0; p < out_map.width; ++p) std::fill_n(row + p * channels, selected, T(0));
          // The rows of x that this one of the output comes from: the selected channels, and at stride 1 the others.
          for (int64_t in_y = y * stride; in_y < std::min(map.height, (y + 1) * stride); ++in_y) {
            const int64_t first = (b * map.height + in_y) * map.width;
            T* own = stride == 1 ? row : own_memory.data();
            if (stride == 2) std::fill_n(own, map.width * channels, T(0));
            const T* mix = mixed_data + first * mixed_map.pixel;
            for (int64_t p = 0; p < map.width; ++p)
              for (int64_t c = 0; c < selected; ++c) own[p * channels + c] = mix[p * mixed_map.pixel + c];
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
