// Max and average pooling (3x3) of a map and their gradient. Schema and meaning: fastnas/ops/stages/pool_stage.py.

#include "ops/stages/pool_stage.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/chunks.h"
#include "ops/stages/frame.h"
#include "ops/stages/scratch.h"
#include "ops/stages/statistics.h"

namespace fastnas {
namespace {

constexpr int kTaps = 9;

// An image of one call with a border of one pixel, and where a window's taps are.
template <class T>
struct Windows {
  Frame<T> frame;
  int64_t offsets[kTaps];  // row by row
  std::vector<T> shares;   // 1 / pixels of the window that are in the image: [3 kinds of row][row of the output]

  Windows(const Map& x, int64_t stride) : frame(x, stride) {
    frame.border = 1;
    for (int64_t t = 0; t < kTaps; ++t) offsets[t] = t / 3 * frame.padded_row() + frame.column(t % 3);
    const int64_t length = frame.row(frame.out_width);
    shares.assign(3 * length, T(0));
    for (int64_t kind = 1; kind <= 3; ++kind)
      for (int64_t x_out = 0; x_out < frame.out_width; ++x_out)
        for (int64_t c = 0; c < frame.pitch; ++c)
          shares[(kind - 1) * length + x_out * frame.pitch + c] =
              T(1) / static_cast<T>(kind * inside(x_out * stride, frame.width));
  }

  // How many of the three rows or columns around `centre` exist.
  static int64_t inside(int64_t centre, int64_t size) {
    return std::min(size - 1, centre + 1) - std::max<int64_t>(0, centre - 1) + 1;
  }
  const T* shares_of_row(int64_t y) const {
    return shares.data() + (inside(y * frame.stride, frame.height) - 1) * frame.row(frame.out_width);
  }
};

// Copies an image inside its border, which keeps what it has.
template <class T>
FASTNAS_INLINE inline void load_image(T* padded, const Frame<T>& f, const T* x, int64_t pixel) {
  for (int64_t y = 0; y < f.height; ++y)
    for (int64_t first = 0; first < std::min(f.stride, f.width); ++first) {
      T* out = padded + (y + f.border) * f.padded_row() + f.column(f.border + first);
      const T* in = x + (y * f.width + first) * pixel;
      const int64_t step = f.stride * pixel, pixels = ceil_div(f.width - first, f.stride);
      const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
        read(in + p * step + c, v);
        write(out + p * f.pitch + c, v + T(0));  // -0 becomes 0, so that equal numbers have equal bits
      };
      if (f.flat && step == f.channels)
        for_each_dense_value<T>(pixels, f.channels, body);
      else
        for_each_value<T>(pixels, f.channels, body);
    }
}

// Both pools of an image, row by row: windows along a row of the image first, then across the last three of those.
template <class T>
class Pools {
 public:
  explicit Pools(const Windows<T>& w)
      : w_(w), length_(w.frame.row(w.frame.out_width)), highest_(3 * length_, false), sum_(3 * length_, false) {}

  void begin() { known_ = 0; }

  // Row y of the output, rows in ascending order. `low` has a border of minus infinity, `zero` one of zeros.
  FASTNAS_INLINE inline void row(T* highest, T* average, const T* low, const T* zero, int64_t y) {
    const int64_t top = y * w_.frame.stride;
    for (int64_t r = std::max(known_, top); r < top + 3; ++r)
      along(highest_.data() + r % 3 * length_, sum_.data() + r % 3 * length_, low, zero, r * w_.frame.padded_row());
    known_ = top + 3;
    const T* shares = w_.shares_of_row(y);
    for (int64_t at = 0; at < length_; at += kLanes<T>) {
      const Vec<T> a = get(highest_.data() + at), b = get(highest_.data() + length_ + at),
                   c = get(highest_.data() + 2 * length_ + at), ab = a > b ? a : b;
      put(highest + at, ab > c ? ab : c);
      const Vec<T> sum = get(sum_.data() + at) + get(sum_.data() + length_ + at) + get(sum_.data() + 2 * length_ + at);
      put(average + at, sum * get(shares + at));
    }
  }

 private:
  FASTNAS_INLINE inline void along(T* highest, T* sum, const T* low, const T* zero, int64_t start) {
    const int64_t second = w_.offsets[1], third = w_.offsets[2];  // the first one is 0
    for (int64_t at = 0; at < length_; at += kLanes<T>) {
      const T *l = low + start + at, *z = zero + start + at;
      const Vec<T> a = get(l), b = get(l + second), c = get(l + third), ab = a > b ? a : b;
      put(highest + at, ab > c ? ab : c);
      put(sum + at, get(z) + get(z + second) + get(z + third));
    }
  }

  const Windows<T>& w_;
  int64_t length_, known_ = 0;
  Scratch<T> highest_, sum_;  // of three rows of the image, taking turns
};

// Scratch memory of a thread: an image with both borders.
template <class T>
struct Bordered {
  Scratch<T> low, zero;

  explicit Bordered(const Frame<T>& f) : low(f.padded_size()), zero(f.padded_size()) {
    std::fill_n(low.data(), f.padded_size(), -std::numeric_limits<T>::infinity());
  }
  FASTNAS_INLINE inline void load(const Frame<T>& f, const T* x, int64_t pixel) {
    load_image(low.data(), f, x, pixel);
    load_image(zero.data(), f, x, pixel);
  }
};

// A gradient of the output, with what goes through the maximum, the average and the identity.
template <class T>
struct Weighted {
  const T* g;
  int64_t pixel;
  const T* scales;  // [3][width], repeated
};

// What reaches the pools and the identity of a row: totals[p] = centre (pool - mean) + offset + sum of scaled
// gradients.
template <class T>
FASTNAS_INLINE inline void combine_row(T* const* totals, const T* const* pools, const T* affine, int64_t width,
                                       const std::vector<Weighted<T>>& gs, const Frame<T>& f, bool dense) {
  T *const highest = totals[0], *const average = totals[1], *const through = totals[2];
  const T *const highest_pool = pools[0], *const average_pool = pools[1];
  const Weighted<T>* const terms = gs.data();
  const int64_t count = static_cast<int64_t>(gs.size()), pitch = f.pitch;
  const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
    const auto centred = [&](const T* pool, const T* own) FASTNAS_INLINE {
      auto value = v, centre = v, offset = v, mean = v;
      read(pool + p * pitch + c, value);
      read(own + c, centre);
      read(own + width + c, offset);
      read(own + 2 * width + c, mean);
      return centre * (value - mean) + offset;
    };
    auto a = centred(highest_pool, affine), b = centred(average_pool, affine + 3 * width), d = v, s = v;
    d = d - d;
    for (int64_t n = 0; n < count; ++n) {
      const T* scales = terms[n].scales;
      read(terms[n].g + p * terms[n].pixel + c, v);
      read(scales + c, s);
      a += s * v;
      read(scales + width + c, s);
      b += s * v;
      read(scales + 2 * width + c, s);
      d += s * v;
    }
    write(highest + p * pitch + c, a);
    write(average + p * pitch + c, b);
    write(through + p * pitch + c, d);
  };
  if (f.flat && dense)
    for_each_dense_value<T>(f.out_width, f.channels, body);
  else
    for_each_value<T>(f.out_width, f.channels, body);
}

// The same as below where a pixel is whole vectors: what the windows of a row that overlap have sent to a pixel stays
// in registers until the last of them, so that each pixel is read and written once for each of its three rows.
template <class T>
FASTNAS_INLINE inline void scatter_whole_pixels(T* dx, const T* low, const T* highest, const T* to_highest,
                                                const T* to_average, const T* shares, const Frame<T>& f) {
  const int64_t row = f.padded_row(), step = f.step;
  for (int64_t v = 0; v < f.vectors * kLanes<T>; v += kLanes<T>) {
    Vec<T> value[3][3], sum[3][3]{};
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 2; ++c) value[r][c] = get(low + v + r * row + c * step);
    for (int64_t j = 0; j < f.out_width; ++j) {
      const int64_t at = v + j * step;
      const Vec<T> top = get(highest + at), share = get(to_average + at) * get(shares + at);
      Vec<T> left = get(to_highest + at);  // becomes zero once it has found its pixel
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        value[r][2] = get(low + at + r * row + 2 * step);
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
          sum[r][c] += share + if_same(value[r][c], top, left, Vec<T>{});
          left = if_same(value[r][c], top, Vec<T>{}, left);
        }
        T* target = dx + at + r * row;
        put(target, get(target) + sum[r][0]);
        sum[r][0] = sum[r][1], sum[r][1] = sum[r][2], sum[r][2] = Vec<T>{};
        value[r][0] = value[r][1], value[r][1] = value[r][2];
      }
    }
    for (int r = 0; r < 3; ++r)
      for (int c = 0; c < 2; ++c) {
        T* target = dx + v + (f.out_width + c) * step + r * row;
        put(target, get(target) + sum[r][c]);
      }
  }
}

// Sends a row's gradients back to its windows: that of the maximum to the first pixel that has it, that of the average
// to all in equal shares. dx has the border of the image; what falls there is nobody's.
template <class T>
FASTNAS_INLINE inline void scatter_row(T* dx, const T* low, const T* highest, const T* to_highest, const T* to_average,
                                       const Windows<T>& w, int64_t y) {
  const Frame<T>& f = w.frame;
  const T* shares = w.shares_of_row(y);
  const int64_t positions = f.positions(f.out_width), start = y * f.padded_row_step();
  if (!f.flat && f.stride == 1)
    return scatter_whole_pixels(dx + start, low + start, highest, to_highest, to_average, shares, f);
  for (int64_t j = 0; j < positions; ++j)
    for (int64_t v = 0; v < f.vectors; ++v) {
      const int64_t at = j * f.step + v * kLanes<T>;
      const Vec<T> top = get(highest + at), share = get(to_average + at) * get(shares + at);
      Vec<T> left = get(to_highest + at);  // becomes zero once it has found its pixel
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) {
        T* target = dx + start + at + w.offsets[t];
        const Vec<T> value = get(low + start + at + w.offsets[t]);
        put(target, get(target) + share + if_same(value, top, left, Vec<T>{}));
        left = if_same(value, top, Vec<T>{}, left);
      }
    }
}

}  // namespace

template <class T>
void pool(const View<T>& x, int64_t stride, T* pooled, T* stats) {
  const Map& map = x.map;
  const Windows<T> windows(map, stride);
  const Frame<T>& f = windows.frame;
  const int64_t pixels = f.out_height * f.out_width, channels = f.channels;
  Statistics<T> measured(stats ? 2 : 0, map.batch, pixels, channels);
  for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
    Bordered<T> image(f);
    Scratch<T> rows[2]{Scratch<T>(f.row(f.out_width)), Scratch<T>(f.row(f.out_width))};
    Pools<T> pools(windows);
    ChannelSums<T> sums(pixels, channels);
    vectorised([&]() FASTNAS_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        image.load(f, x.image(b), map.pixel);
        pools.begin();
        for (int64_t y = 0; y < f.out_height; ++y) {
          pools.row(rows[0].data(), rows[1].data(), image.low.data(), image.zero.data(), y);
          for (int64_t which = 0; which < 2; ++which) {
            T* target = pooled + ((which * map.batch + b) * pixels + y * f.out_width) * channels;
            const T* row = rows[which].data();
            const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
              read(row + p * f.pitch + c, v);
              write(target + p * channels + c, v);
            };
            if (f.flat)
              for_each_dense_value<T>(f.out_width, channels, body);
            else
              for_each_value<T>(f.out_width, channels, body);
          }
        }
        if (stats)
          for (int64_t which = 0; which < 2; ++which)
            measured.measure(which, b, pooled + (which * map.batch + b) * pixels * channels, sums);
      }
    });
  });
  if (stats) measured.write(stats);
}

template <class T>
void pool_backward(const View<T>& x, const std::vector<View<T>>& gs, const T* scales, const T* coef, int64_t stride,
                   const std::optional<View<T>>& base, T* dx) {
  const Map& map = x.map;
  const Windows<T> windows(map, stride);
  const Frame<T>& f = windows.frame;
  const int64_t count = static_cast<int64_t>(gs.size()), channels = map.channels;
  const int64_t base_pixel = base ? base->map.pixel : 0;
  const int64_t width = repeated_width<T>(channels), length = f.row(f.out_width);
  const std::vector<T> scale = repeated(scales, 3 * count, channels), affine = repeated(coef, 6, channels);
  for_each_chunk(map.batch, chunk_count(map.batch), [&](int64_t, int64_t begin, int64_t end) {
    Bordered<T> image(f);
    Pools<T> pools(windows);
    Scratch<T> gradient(f.padded_size()), highest(length), average(length);
    Scratch<T> totals[2]{Scratch<T>(length), Scratch<T>(length)}, through(f.out_height * length);
    std::vector<Weighted<T>> weighted(count);
    vectorised([&]() FASTNAS_INLINE {
      for (int64_t b = begin; b < end; ++b) {
        image.load(f, x.image(b), map.pixel);
        std::fill_n(gradient.data(), f.padded_size(), T(0));
        pools.begin();
        for (int64_t y = 0; y < f.out_height; ++y) {
          pools.row(highest.data(), average.data(), image.low.data(), image.zero.data(), y);
          bool dense = true;
          for (int64_t n = 0; n < count; ++n) {
            weighted[n] = {gs[n].image(b) + y * f.out_width * gs[n].map.pixel, gs[n].map.pixel,
                           scale.data() + n * 3 * width};
            dense = dense && gs[n].map.pixel == channels;
          }
          T* const targets[] = {totals[0].data(), totals[1].data(), through.data() + y * length};
          const T* const rows[] = {highest.data(), average.data()};
          combine_row<T>(targets, rows, affine.data(), width, weighted, f, dense);
          scatter_row(gradient.data(), image.low.data(), highest.data(), totals[0].data(), totals[1].data(), windows,
                      y);
        }
        T* target = dx + b * map.pixels() * channels;
        const T* add = base ? base->image(b) : nullptr;
        for (int64_t y = 0; y < f.height; ++y)
          for (int64_t first = 0; first < std::min(f.stride, f.width); ++first) {
            const int64_t from = y * f.width + first, pixels = ceil_div(f.width - first, f.stride);
            const T* d = gradient.data() + (y + 1) * f.padded_row() + f.column(1 + first);
            const T* straight = through.data() + y * length;
            const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
              auto more = v;
              read(d + p * f.pitch + c, v);
              if (stride == 1) {
                read(straight + p * f.pitch + c, more);
                v += more;
              }
              if (add) {
                read(add + (from + p * f.stride) * base_pixel + c, more);
                v += more;
              }
              write(target + (from + p * f.stride) * channels + c, v);
            };
            if (f.flat && stride == 1 && (!add || base_pixel == channels))
              for_each_dense_value<T>(pixels, channels, body);
            else
              for_each_value<T>(pixels, channels, body);
          }
      }
    });
  });
}

template void pool(const View<float>&, int64_t, float*, float*);
template void pool(const View<double>&, int64_t, double*, double*);
template void pool_backward(const View<float>&, const std::vector<View<float>>&, const float*, const float*, int64_t,
                            const std::optional<View<float>>&, float*);
template void pool_backward(const View<double>&, const std::vector<View<double>>&, const double*, const double*,
                            int64_t, const std::optional<View<double>>&, double*);

namespace {

std::tuple<Tensor, Tensor> pool_stage_fwd(Tensor x, int64_t stride, bool statistics) {
  constexpr const char* op = "pool_stage_fwd";
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2");
  const Map map = map_of(op, x);
  Tensor pooled = new_map(x, {2, map.batch, ceil_div(map.height, stride), ceil_div(map.width, stride), map.channels});
  Tensor stats =
      torch::stable::new_empty(x, statistics ? std::vector<int64_t>{2, 2, map.channels} : std::vector<int64_t>{0});
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    pool(View<T>{data<T>(x), map}, stride, data<T>(pooled), statistics ? data<T>(stats) : nullptr);
  });
  return {pooled, stats};
}

Tensor pool_stage_bwd(Tensor x, std::vector<Tensor> gs, Tensor scales, Tensor coef, int64_t stride,
                      std::optional<Tensor> base) {
  constexpr const char* op = "pool_stage_bwd";
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2");
  const Map map = map_of(op, x);
  const int64_t count = static_cast<int64_t>(gs.size()), channels = map.channels;
  STD_TORCH_CHECK(count > 0 && scales.numel() == count * 3 * channels && coef.numel() == 6 * channels, op,
                  ": every gradient needs its scales");
  for (const auto& tensors : {gs, {scales, coef}}) check_same_dtype(op, tensors, x.scalar_type());
  const Map out_map{map.batch, ceil_div(map.height, stride), ceil_div(map.width, stride), channels, channels};
  Tensor dx = new_map(x, {map.batch, map.height, map.width, channels});
  scales = torch::stable::contiguous(scales);
  coef = torch::stable::contiguous(coef);
  dispatch_full_width(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    std::optional<View<T>> under;
    if (base) under = View<T>{data<T>(*base), map_like(op, *base, map)};
    pool_backward<T>({data<T>(x), map}, views_like<T>(op, gs, out_map), data<T>(scales), data<T>(coef), stride, under,
                     data<T>(dx));
  });
  return dx;
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("pool_stage_fwd", TORCH_BOX(&fastnas::pool_stage_fwd));
  m.impl("pool_stage_bwd", TORCH_BOX(&fastnas::pool_stage_bwd));
}
