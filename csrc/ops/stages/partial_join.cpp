// A node of PC-DARTS: its mixed channels joined with those that bypassed the candidates, shuffled. Schema and meaning:
// fastnas/ops/stages/partial_join.py.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/chunks.h"
#include "ops/stages/frame.h"
#include "ops/stages/scratch.h"

namespace fastnas {
namespace {

// out[c], c in [0, channels): the 2x2 window of a pixel at stride 2, or the pixel itself. body(c, highest, its place).
template <class T, class Body>
FASTNAS_INLINE inline void for_each_bypassed(const Map& m, const T* image, int64_t y, int64_t x, int64_t stride,
                                             int64_t selected, const Body& body) {
  const int64_t row = m.width * m.pixel;
  const T* p = image + stride * (y * row + x * m.pixel);
  const bool right = stride == 2 && 2 * x + 1 < m.width, down = stride == 2 && 2 * y + 1 < m.height;
  for (int64_t c = selected; c < m.channels; ++c) {
    T best = p[c];
    int64_t place = c;
    const auto offer = [&](int64_t at) FASTNAS_INLINE {
      if (p[at] > best) {
        best = p[at];
        place = at;
      }
    };
    if (right) offer(c + m.pixel);
    if (down) offer(c + row);
    if (right && down) offer(c + row + m.pixel);
    body(c, best, place);
  }
}

// body(pixel, channel before the shuffle, channel after it)
template <class Body>
FASTNAS_INLINE inline void permute(int64_t width, int64_t channels, int64_t k, const Body& body) {
  const auto run = [&](auto groups) FASTNAS_INLINE {
    const int64_t selected = channels / groups;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t i = 0; i < selected; ++i)
        for (int64_t g = 0; g < groups; ++g) body(x, g * selected + i, i * groups + g);
  };
  if (k == 4) return run(std::integral_constant<int, 4>{});
  if (k == 2) return run(std::integral_constant<int, 2>{});
  run(k);
}

// A row back in the order before the shuffle.
template <class T>
FASTNAS_INLINE inline void unshuffle(T* out, const T* in, int64_t in_pixel, int64_t width, int64_t channels,
                                     int64_t k) {
  permute(width, channels, k, [&](int64_t x, int64_t before, int64_t after) FASTNAS_INLINE {
    out[x * channels + before] = in[x * in_pixel + after];
  });
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
    torch::stable::parallel_for(0, map.batch * map.height, 4, [&](int64_t begin, int64_t end) {
      Scratch<T> sums(map.width * channels);
      T* sum = sums.data();
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / map.height, y = r % map.height;
          std::fill_n(sum, map.width * channels, T(0));
          for (size_t n = 0; n < xs.size(); ++n) {
            const Map& m = sources.maps[n];
            const T* image = data<T>(xs[n]) + b * m.image();
            if (strides[n] == 1) {
              const T* row = image + y * m.width * m.pixel;
              for_each_value<T>(map.width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
                auto s = v;
                read(row + p * m.pixel + c, v);
                read(sum + p * channels + c, s);
                write(sum + p * channels + c, s + v * beta[n]);
              });
            } else {
              for (int64_t x = 0; x < map.width; ++x)
                for_each_bypassed(m, image, y, x, 2, selected, [&](int64_t c, T best, int64_t) FASTNAS_INLINE {
                  sum[x * channels + c] += best * beta[n];
                });
            }
          }
          const T* mix = data<T>(mixed) + r * map.width * mixed_map.pixel;
          for (int64_t x = 0; x < map.width; ++x)
            for (int64_t i = 0; i < selected; ++i) sum[x * channels + i] = mix[x * mixed_map.pixel + i];
          T* o = y_data + r * map.width * map.pixel;
          permute(map.width, channels, k, [&](int64_t x, int64_t before, int64_t after) FASTNAS_INLINE {
            o[x * map.pixel + after] = sum[x * channels + before];
          });
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
  const Tensor mixed = torch::stable::new_empty(g, {map.batch, map.height, map.width, selected});
  const Tensor dots = torch::stable::new_empty(g, {count});
  dispatch_full_width(g.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    T* mix = static_cast<T*>(mixed.data_ptr());
    std::vector<double> images(map.batch * count);
    for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
      Scratch<T> row_memory(map.width * channels);
      T* row = row_memory.data();
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t b = begin; b < end; ++b)
          for (int64_t y = 0; y < map.height; ++y) {
            const int64_t r = b * map.height + y;
            unshuffle(row, data<T>(g) + r * map.width * map.pixel, map.pixel, map.width, channels, k);
            for (int64_t x = 0; x < map.width; ++x)
              for (int64_t i = 0; i < selected; ++i) {
                mix[(r * map.width + x) * selected + i] = row[x * channels + i];
                row[x * channels + i] = 0;
              }
            for (int64_t n = 0; n < count; ++n) {
              const Map& m = sources.maps[n];
              const T* image = data<T>(xs[n]) + b * m.image();
              Vec<T> total{};
              T rest = 0;
              if (strides[n] == 1) {
                const T* in = image + y * m.width * m.pixel;
                for_each_value<T>(map.width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
                  auto d = v;
                  read(in + p * m.pixel + c, v);
                  read(row + p * channels + c, d);
                  if constexpr (sizeof(v) == sizeof(T))
                    rest += v * d;
                  else
                    total += v * d;
                });
              } else {
                for (int64_t x = 0; x < map.width; ++x)
                  for_each_bypassed(m, image, y, x, 2, selected, [&](int64_t c, T best, int64_t) FASTNAS_INLINE {
                    rest += best * row[x * channels + c];
                  });
              }
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
  const Tensor out = torch::stable::new_empty(x, {map.batch, map.height, map.width, channels});
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Tensor weights = torch::stable::contiguous(betas);
    const T* beta = data<T>(weights);
    T* dx = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, map.batch * out_map.height, 4, [&](int64_t begin, int64_t end) {
      Scratch<T> shuffled(out_map.width * channels), rows(out_map.width * channels);
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / out_map.height, y = r % out_map.height;
          T* sum = shuffled.data();
          std::fill_n(sum, out_map.width * channels, T(0));
          for (size_t n = 0; n < gs.size(); ++n) {
            const T* g = data<T>(gs[n]) + r * out_map.width * maps[n].pixel;
            for_each_value<T>(out_map.width, channels, [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
              auto s = v;
              read(g + p * maps[n].pixel + c, v);
              read(sum + p * channels + c, s);
              write(sum + p * channels + c, s + v * beta[n]);
            });
          }
          const T* row = rows.data();
          unshuffle(rows.data(), sum, channels, out_map.width, channels, k);
          // The rows of x that this one of the output comes from.
          const T* image = data<T>(x) + b * map.image();
          for (int64_t in_y = y * stride; in_y < std::min(map.height, (y + 1) * stride); ++in_y)
            for (int64_t in_x = 0; in_x < map.width; ++in_x) {
              const int64_t pixel = (b * map.height + in_y) * map.width + in_x;
              const T* more = base ? data<T>(*base) + pixel * base_map.pixel : nullptr;
              const T* mix = data<T>(mixed) + pixel * mixed_map.pixel;
              T* o = dx + pixel * channels;
              for (int64_t c = 0; c < selected; ++c) o[c] = mix[c];
              for (int64_t c = selected; c < channels; ++c) o[c] = stride == 1 ? row[in_x * channels + c] : T(0);
              if (more)
                for (int64_t c = 0; c < channels; ++c) o[c] += more[c];
            }
          if (stride == 1) continue;
          T* target = dx + ((b * map.height + 2 * y) * map.width) * channels;
          for (int64_t out_x = 0; out_x < out_map.width; ++out_x)
            for_each_bypassed(map, image, y, out_x, 2, selected, [&](int64_t c, T, int64_t place) FASTNAS_INLINE {
              const int64_t far = place - c, down = far >= map.width * map.pixel;
              const int64_t right = (far - down * map.width * map.pixel) / map.pixel;
              target[(down * map.width + 2 * out_x + right) * channels + c] += row[out_x * channels + c];
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
