// ReLU, depthwise and pointwise convolution of many branches; schema and meaning: fastnas/ops/stages/conv_stage.py.
// Threads share out the images. An image goes through all its branches in scratch memory that fits the second-level
// cache: only x is read and z written, and backward g, z, x read and dx written.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/stages/chunks.h"
#include "ops/stages/conv_stage_loops.h"
#include "ops/stages/conv_stage_plan.h"
#include "ops/stages/dots.h"
#include "ops/stages/statistics.h"

namespace fastnas {
namespace {

// What relu takes: x, or (x - mean) * norm.
template <class T>
struct Input {
  const T* x;
  int64_t pixel;         // elements from one pixel to the next
  const T *mean, *norm;  // repeated, or null
};

// relu of pixels `x_step` apart.
template <class T>
FASTNAS_INLINE inline void activate_row(T* out, const Frame<T>& f, const Input<T>& in, const T* x, int64_t x_step,
                                        int64_t pixels) {
  const auto each = [&](const auto& body) FASTNAS_INLINE {
    if (f.flat && x_step == f.channels) return for_each_dense_value<T>(pixels, f.channels, body);
    for_each_value<T>(pixels, f.channels, body);
  };
  if (in.mean) {
    each([&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
      auto mean = v, norm = v;
      read(x + p * x_step + c, v);
      read(in.mean + c, mean);
      read(in.norm + c, norm);
      v = (v - mean) * norm;
      write(out + p * f.pitch + c, v > 0 ? v : decltype(v){});
    });
  } else {
    each([&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
      read(x + p * x_step + c, v);
      write(out + p * f.pitch + c, v > 0 ? v : decltype(v){});
    });
  }
}

// relu of an image, inside its border of zeros.
template <class T>
FASTNAS_INLINE inline void activate(T* padded, const Frame<T>& f, const Input<T>& in) {
  for (int64_t y = 0; y < f.height; ++y) {
    T* row = padded + (y + f.border) * f.padded_row();
    const T* x = in.x + y * f.width * in.pixel;
    for (int64_t first = 0; first < std::min(f.stride, f.width); ++first)
      activate_row(row + f.column(f.border + first), f, in, x + first * in.pixel, f.stride * in.pixel,
                   ceil_div(f.width - first, f.stride));
  }
}

// The depthwise convolution of an image: rows of the output's size, without border.
template <class T>
FASTNAS_INLINE inline void depthwise(T* out, const T* padded, const Frame<T>& f, const Part<T>& part) {
  dispatch_taps(part.taps, part.dilation, [&](auto taps, auto dilation) FASTNAS_INLINE {
    for (int64_t y = 0; y < f.out_height; ++y)
      convolve_row<T, taps, dilation, false>(out + y * f.row(f.out_width), padded + y * f.padded_row_step(),
                                             part.offsets.data(), part.kernel.data(), f.positions(f.out_width),
                                             f.vectors, f.step);
  });
}

// Where the pixels of a buffer follow each other without gaps an image is one long row.
template <class T>
struct Run {
  int64_t rows, pixels;
  explicit Run(const Frame<T>& f)
      : rows(f.flat ? f.out_height : 1), pixels(f.flat ? f.out_width : f.out_height * f.out_width) {}
};

template <class T>
FASTNAS_INLINE inline void copy_pixels(T* out, int64_t out_pitch, const T* in, int64_t in_pitch, int64_t pixels,
                                       int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * out_pitch + c] = in[p * in_pitch + c];
}

// The pointwise convolution of an image into z, whose pixels are out_channels apart.
template <class T>
FASTNAS_INLINE inline void pointwise_image(T* z, int64_t out_channels, T* scratch, const T* in, const Frame<T>& f,
                                           const Part<T>& part) {
  const int64_t in_row = f.row(f.out_width);
  if (part.flat) {
    const int64_t positions = f.positions(f.out_width), row = f.out_width * f.channels;
    const bool whole = row % kLanes<T> == 0 && out_channels == f.channels;
    dispatch_flat<T>(f.channels, [&](auto channels) FASTNAS_INLINE {
      for (int64_t y = 0; y < f.out_height; ++y) {
        T* target = z + y * f.out_width * out_channels;
        T* out = whole ? target : scratch;
        pointwise_flat<T, channels>(out, in + y * in_row, part.forward.data(), positions);
        if (!whole) copy_pixels(target, out_channels, out, f.channels, f.out_width, f.channels);
      }
    });
    return;
  }
  const Run<T> run(f);
  const bool whole = part.outputs % kLanes<T> == 0;
  for (int64_t r = 0; r < run.rows; ++r) {
    T* target = z + r * run.pixels * out_channels;
    T* out = whole ? target : scratch;
    const int64_t pitch = whole ? out_channels : part.out_pitch;
    pointwise(out, pitch, in + r * in_row, f.pitch, part.forward.data(), part.out_pitch, f.channels,
              part.out_pitch / kLanes<T>, run.pixels);
    if (!whole) copy_pixels(target, out_channels, out, pitch, run.pixels, part.outputs);
  }
}

std::tuple<Tensor, Tensor> conv_stage_fwd(std::vector<Tensor> xs, std::optional<Tensor> norms,
                                          std::vector<int64_t> parts, std::vector<Tensor> depthwise_weights,
                                          std::vector<Tensor> pointwise_weights, int64_t stride, bool statistics) {
  constexpr const char* op = "conv_stage_fwd";
  STD_TORCH_CHECK(!xs.empty(), op, ": there is no input");
  const Map map = map_of(op, xs[0]);
  const int64_t sources = static_cast<int64_t>(xs.size()), batch = map.batch;
  check_same_dtype(op, xs, xs[0].scalar_type());
  std::vector<Map> maps;
  for (const auto& x : xs) maps.push_back(map_like(op, x, map));
  Tensor z, stats;
  dispatch_full_width(xs[0].scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    const Plan<T> plan(op, map, parts, depthwise_weights, pointwise_weights, stride, sources, false);
    const Frame<T>& f = plan.frame;
    const int64_t pixels = f.out_height * f.out_width, channels = plan.out_channels;
    z = torch::stable::new_empty(xs[0], {plan.outputs, batch, f.out_height, f.out_width, channels});
    stats = torch::stable::new_empty(
        xs[0], statistics ? std::vector<int64_t>{plan.outputs, 2, channels} : std::vector<int64_t>{0});
    std::vector<T> norm;
    if (norms) norm = repeated(data<T>(torch::stable::contiguous(*norms)), 2 * sources, f.channels);
    const int64_t norm_width = repeated_width<T>(f.channels);
    Statistics<T> measured(statistics ? plan.outputs : 0, batch, pixels, channels);
    T* out = data<T>(z);
    const int64_t pairs = sources * batch;
    for_each_chunk(pairs, chunk_count(pairs), [&](int64_t, int64_t begin, int64_t end) {
      Scratch<T> padded(f.padded_size()), deep(f.out_height * f.row(f.out_width));
      Scratch<T> result(pixels * rounded_up(channels, kLanes<T>));
      ChannelSums<T> sums(pixels, channels);
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t source = pair / batch, image = pair % batch;
          const T* mean = norms ? norm.data() + source * 2 * norm_width : nullptr;
          activate(padded.data(), f,
                   Input<T>{data<T>(xs[source]) + image * maps[source].image(), maps[source].pixel, mean,
                            norms ? mean + norm_width : nullptr});
          for (size_t p = 0; p < plan.parts.size(); ++p) {
            const Part<T>& part = plan.parts[p];
            if (part.source != source) continue;
            depthwise(deep.data(), padded.data(), f, part);
            T* target = out + (part.output * batch + image) * pixels * channels;
            pointwise_image(target + part.first, channels, result.data(), deep.data(), f, part);
            const bool last = p + 1 == plan.parts.size() || plan.parts[p + 1].output != part.output;
            if (statistics && last) measured.measure(part.output, image, target, sums);
          }
        }
      });
    });
    if (statistics) measured.write(data<T>(stats));
  });
  return {z, stats};
}

// The gradient that reaches an output: scale * g + centre * (z - mean) + offset, per channel.
template <class T>
struct Upstream {
  const T *g, *z;
  int64_t g_pixel, z_pixel;
  const T *scale, *centre, *offset, *mean;  // repeated

  Upstream(const Tensor& gs, const Map& gm, const Tensor& zs, const Map& zm, const T* coef, int64_t width)
      : g(data<T>(gs)),
        z(data<T>(zs)),
        g_pixel(gm.pixel),
        z_pixel(zm.pixel),
        scale(coef),
        centre(coef + width),
        offset(coef + 2 * width),
        mean(coef + 3 * width) {}
};

// Gradients of all weights that one chunk of images makes, packed as the loops make them.
template <class T>
class WeightGradients {
 public:
  explicit WeightGradients(const Plan<T>& plan) : plan_(plan) {
    for (const auto& part : plan.parts) {
      kernels_.push_back(size_);
      size_ += plan.frame.vectors * part.taps * kLanes<T>;
      pointwise_.push_back(size_);
      size_ += part.flat ? plan.frame.channels * kLanes<T> : part.outputs * part.in_pitch;
    }
  }
  int64_t size() const { return size_; }
  int64_t kernel(size_t part) const { return kernels_[part]; }
  int64_t pointwise(size_t part) const { return pointwise_[part]; }

  // The sum over `chunks` packed gradients, as the flat gradient of the op.
  void write(T* out, const std::vector<Scratch<T>>& chunks) const {
    std::fill(out, out + plan_.weights, T(0));
    const Frame<T>& f = plan_.frame;
    for (const auto& chunk : chunks)
      for (size_t p = 0; p < plan_.parts.size(); ++p) {
        const Part<T>& part = plan_.parts[p];
        const T* kernel = chunk.data() + kernels_[p];
        if (part.depthwise)
          for (int64_t v = 0; v < f.vectors; ++v)
            for (int64_t t = 0; t < part.taps; ++t)
              for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
                const int64_t c = f.flat ? lane % f.channels : v * kLanes<T> + lane;
                if (c < f.channels)
                  out[part.kernel_start + c * part.taps + t] += kernel[(v * part.taps + t) * kLanes<T> + lane];
              }
        const T* pointwise = chunk.data() + pointwise_[p];
        const int64_t row = part.flat ? kLanes<T> : part.in_pitch, used = part.flat ? kLanes<T> : f.channels;
        for (int64_t o = 0; o < part.outputs; ++o)
          for (int64_t i = 0; i < used; ++i)
            out[part.pointwise_start + o * f.channels + i % f.channels] += pointwise[o * row + i];
      }
  }

 private:
  const Plan<T>& plan_;
  std::vector<int64_t> kernels_, pointwise_;
  int64_t size_ = 0;
};

// Scratch memory of a thread for backward images.
template <class T>
struct Bench {
  Scratch<T> padded;     // relu(x) inside its border
  Scratch<T> flat_dz;    // gradient of z, in flat rows
  Scratch<T> dz;         // the same, pixel by pixel
  Scratch<T> deep;       // depthwise output
  Scratch<T> deep_grad;  // its gradient, at stride 1 inside a border
  Scratch<T> dx;         // gradient of relu(x), at stride 2 inside a border

  explicit Bench(const Plan<T>& plan)
      : padded(plan.frame.padded_size()),
        flat_dz(plan.frame.flat ? plan.frame.out_height * plan.frame.row(plan.frame.out_width) : 0),
        dz(plan.frame.out_height * plan.frame.out_width * rounded_up(plan.out_channels, kLanes<T>)),
        deep(plan.frame.out_height * plan.frame.row(plan.frame.out_width)),
        deep_grad(plan.frame.padded_size()),
        dx(plan.frame.padded_size()) {}
};

// The gradient of z of one branch, in the bench.
template <class T>
FASTNAS_INLINE inline void fill_upstream(Bench<T>& bench, const Frame<T>& f, const Part<T>& part,
                                         const Upstream<T>& u) {
  const auto rows = [&](T* out, int64_t pitch, int64_t from) FASTNAS_INLINE {
    return [&u, &part, out, pitch, from](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
      auto g = v, z = v, scale = v, centre = v, offset = v, mean = v;
      const int64_t channel = part.first + c;
      read(u.g + (from + p) * u.g_pixel + channel, g);
      read(u.z + (from + p) * u.z_pixel + channel, z);
      read(u.scale + channel, scale);
      read(u.centre + channel, centre);
      read(u.offset + channel, offset);
      read(u.mean + channel, mean);
      write(out + p * pitch + c, scale * g + (centre * (z - mean) + offset));
    };
  };
  if (!part.flat)
    return for_each_value<T>(f.out_height * f.out_width, part.outputs, rows(bench.dz.data(), part.out_pitch, 0));
  const bool dense = u.g_pixel == f.channels && u.z_pixel == f.channels;
  for (int64_t y = 0; y < f.out_height; ++y) {
    const auto body = rows(bench.flat_dz.data() + y * f.row(f.out_width), f.channels, y * f.out_width);
    if (dense)
      for_each_dense_value<T>(f.out_width, f.channels, body);
    else
      for_each_value<T>(f.out_width, f.channels, body);
  }
}

// Gradient of the pointwise weights, from the depthwise output computed again.
template <class T>
FASTNAS_INLINE inline void pointwise_weights(T* gradient, Bench<T>& bench, const Frame<T>& f, const Part<T>& part) {
  depthwise(bench.deep.data(), bench.padded.data(), f, part);
  const int64_t row = f.row(f.out_width);
  if (part.flat) {
    dispatch_flat<T>(f.channels, [&](auto channels) FASTNAS_INLINE {
      outer_flat<T, channels>(gradient, bench.flat_dz.data(), bench.deep.data(),
                              f.out_height * f.positions(f.out_width));
    });
    return;
  }
  const Run<T> run(f);
  for (int64_t r = 0; r < run.rows; ++r)
    outer(gradient, part.in_pitch, bench.dz.data() + r * run.pixels * part.out_pitch, part.out_pitch,
          bench.deep.data() + r * row, f.pitch, part.outputs, part.in_pitch / kLanes<T>, run.pixels);
}

// Gradient of the depthwise output: rows `row` apart from `out` on.
template <class T>
FASTNAS_INLINE inline void deep_gradient(T* out, int64_t row, Bench<T>& bench, const Frame<T>& f, const Part<T>& part) {
  for (int64_t y = 0; y < f.out_height; ++y) {
    if (part.flat) {
      dispatch_flat<T>(f.channels, [&](auto channels) FASTNAS_INLINE {
        pointwise_flat<T, channels>(out + y * row, bench.flat_dz.data() + y * f.row(f.out_width), part.backward.data(),
                                    f.positions(f.out_width));
      });
    } else {
      // Where pixels are closer than a vector each one's zeros are overwritten by the next one.
      pointwise(out + y * row, f.pitch, bench.dz.data() + y * f.out_width * part.out_pitch, part.out_pitch,
                part.backward.data(), part.in_pitch, part.outputs, part.in_pitch / kLanes<T>, f.out_width);
    }
  }
}

// One branch of one image: adds to the weights' gradients and to bench.dx.
template <class T>
FASTNAS_INLINE inline void branch_backward(T* kernel, T* pointwise, Bench<T>& bench, const Frame<T>& f,
                                           const Part<T>& part, bool first, bool need_dx, bool need_dw) {
  if (need_dw) pointwise_weights(pointwise, bench, f, part);
  if (!need_dx && !(need_dw && part.depthwise)) return;
  const int64_t row = f.stride == 1 ? f.padded_row() : f.row(f.out_width);
  T* grad = bench.deep_grad.data() + (f.stride == 1 ? f.interior() : 0);
  deep_gradient(grad, row, bench, f, part);
  const int64_t positions = f.positions(f.out_width);
  dispatch_taps(part.taps, part.dilation, [&](auto taps, auto dilation) FASTNAS_INLINE {
    if (need_dw && part.depthwise) {
      const T* input = bench.padded.data();
      const int64_t step = f.padded_row_step();
      if constexpr (dilation > 0)
        window_gradient<T, side_of(taps), dilation>(kernel, grad, row, input, step, part.offsets.data(), f.out_height,
                                                    positions, f.vectors, f.step);
      else
        kernel_gradient<T, taps>(kernel, grad, row, input, step, part.offsets.data(), f.out_height, positions,
                                 f.vectors, f.step);
    }
    if (!need_dx) return;
    for (int64_t y = 0; y < f.out_height; ++y) {
      if (f.stride == 2) {
        scatter_row<T, taps>(bench.dx.data() + y * f.padded_row_step(), grad + y * row, part.offsets.data(),
                             part.kernel.data(), positions, f.vectors, f.step);
        continue;
      }
      T* out = bench.dx.data() + y * f.row(f.width);
      const T* in = bench.deep_grad.data() + y * row;
      if (first)
        convolve_row<T, taps, dilation, false>(out, in, part.mirrored.data(), part.turned.data(), positions, f.vectors,
                                               f.step);
      else
        convolve_row<T, taps, dilation, true>(out, in, part.mirrored.data(), part.turned.data(), positions, f.vectors,
                                              f.step);
    }
  });
}

// dx = gradient of relu where relu let through, plus base.
template <class T>
FASTNAS_INLINE inline void finish(T* dx, const Bench<T>& bench, const Frame<T>& f, const T* base, int64_t base_pixel) {
  for (int64_t y = 0; y < f.height; ++y)
    for (int64_t first = 0; first < std::min(f.stride, f.width); ++first) {
      const int64_t pixels = ceil_div(f.width - first, f.stride), from = y * f.width + first;
      const int64_t start = (y + f.border) * f.padded_row() + f.column(f.border + first);
      const T* activated = bench.padded.data() + start;
      const T* grad = bench.dx.data() + (f.stride == 1 ? y * f.row(f.width) : start);
      const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
        auto a = v;
        read(grad + p * f.pitch + c, v);
        read(activated + p * f.pitch + c, a);
        v = a > 0 ? v : decltype(v){};
        if (base) {
          read(base + (from + p * f.stride) * base_pixel + c, a);
          v += a;
        }
        write(dx + (from + p * f.stride) * f.channels + c, v);
      };
      if (f.flat && f.stride == 1 && (!base || base_pixel == f.channels))
        for_each_dense_value<T>(pixels, f.channels, body);
      else
        for_each_value<T>(pixels, f.channels, body);
    }
}

std::tuple<Tensor, Tensor, Tensor> conv_stage_bwd(std::vector<Tensor> gs, std::vector<Tensor> zs, Tensor coef,
                                                  std::vector<Tensor> xs, std::optional<Tensor> norms,
                                                  std::vector<int64_t> parts, std::vector<Tensor> depthwise_weights,
                                                  std::vector<Tensor> pointwise_weights, int64_t stride,
                                                  std::optional<Tensor> base, bool need_dx, bool need_dw) {
  constexpr const char* op = "conv_stage_bwd";
  STD_TORCH_CHECK(!xs.empty(), op, ": there is no input");
  const ScalarType dtype = xs[0].scalar_type();
  const Map map = map_of(op, xs[0]);
  const int64_t sources = static_cast<int64_t>(xs.size()), batch = map.batch;
  for (const auto& tensors : {xs, gs, zs, {coef}}) check_same_dtype(op, tensors, dtype);
  std::vector<Map> x_maps, g_maps, z_maps;
  for (const auto& x : xs) x_maps.push_back(map_like(op, x, map));
  STD_TORCH_CHECK(!base || sources == 1, op, ": a base goes with one source only");
  Tensor dx, dots, dw;
  dispatch_full_width(dtype, op, [&](auto tag) {
    using T = decltype(tag);
    const Plan<T> plan(op, map, parts, depthwise_weights, pointwise_weights, stride, sources, true);
    const Frame<T>& f = plan.frame;
    const int64_t channels = plan.out_channels, pixels = f.out_height * f.out_width;
    STD_TORCH_CHECK(static_cast<int64_t>(gs.size()) == plan.outputs && gs.size() == zs.size() &&
                        coef.numel() == plan.outputs * 4 * channels,
                    op, ": every output needs its g, its z and its coefficients");
    const Map out_map{batch, f.out_height, f.out_width, channels, channels};
    const std::vector<T> coefficients = repeated(data<T>(torch::stable::contiguous(coef)), 4 * plan.outputs, channels);
    const int64_t width = repeated_width<T>(channels);
    std::vector<Upstream<T>> upstream;
    for (size_t o = 0; o < gs.size(); ++o) {
      g_maps.push_back(map_like(op, gs[o], out_map));
      z_maps.push_back(map_like(op, zs[o], out_map));
      upstream.emplace_back(gs[o], g_maps[o], zs[o], z_maps[o], coefficients.data() + o * 4 * width, width);
    }
    const auto sized = [&](bool wanted, std::vector<int64_t> size) {
      return torch::stable::new_empty(xs[0], wanted ? size : std::vector<int64_t>{0});
    };
    dx = sized(need_dx, {sources, batch, f.height, f.width, f.channels});
    dots = sized(need_dx && norms.has_value(), {sources, 2, f.channels});
    dw = sized(need_dw, {plan.weights});
    std::vector<T> norm;
    if (norms) norm = repeated(data<T>(torch::stable::contiguous(*norms)), 2 * sources, f.channels);
    const int64_t norm_width = repeated_width<T>(f.channels);
    for (const auto& m : x_maps)
      STD_TORCH_CHECK(!norms || m.pixel == m.channels, op, ": inputs with norms must be dense");
    const Map base_map = base ? map_like(op, *base, map) : map;
    const int64_t in_pixels = f.height * f.width, pairs = sources * batch, chunks = chunk_count(pairs);
    Dots<T> measured(norms ? sources : 0, batch, f.channels);
    const WeightGradients<T> layout(plan);
    std::vector<Scratch<T>> gradients;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) gradients.emplace_back(need_dw ? layout.size() : 0);
    T* dx_data = data<T>(dx);
    for_each_chunk(pairs, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      Bench<T> bench(plan);
      ChannelSums<T> sums(in_pixels, f.channels);
      T* gradient = gradients[chunk].data();
      vectorised([&]() FASTNAS_INLINE {
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t source = pair / batch, image = pair % batch;
          const T* mean = norms ? norm.data() + source * 2 * norm_width : nullptr;
          const T* x = data<T>(xs[source]) + image * x_maps[source].image();
          activate(bench.padded.data(), f,
                   Input<T>{x, x_maps[source].pixel, mean, norms ? mean + norm_width : nullptr});
          if (need_dx && f.stride == 2) std::fill_n(bench.dx.data(), f.padded_size(), T(0));
          bool first = true;
          for (size_t p = 0; p < plan.parts.size(); ++p) {
            const Part<T>& part = plan.parts[p];
            if (part.source != source) continue;
            Upstream<T> up = upstream[part.output];
            up.g += image * pixels * up.g_pixel;
            up.z += image * pixels * up.z_pixel;
            fill_upstream(bench, f, part, up);
            branch_backward(gradient + layout.kernel(p), gradient + layout.pointwise(p), bench, f, part, first, need_dx,
                            need_dw);
            first = false;
          }
          if (!need_dx) continue;
          T* target = dx_data + pair * in_pixels * f.channels;
          finish(target, bench, f, base ? data<T>(*base) + image * base_map.image() : nullptr, base_map.pixel);
          if (norms) measured.measure(source, image, target, f.channels, x, f.channels, mean, sums);
        }
      });
    });
    if (need_dw) layout.write(data<T>(dw), gradients);
    if (need_dx && norms) measured.write(data<T>(dots));
  });
  return {dx, dots, dw};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("conv_stage_fwd", TORCH_BOX(&fastnas::conv_stage_fwd));
  m.impl("conv_stage_bwd", TORCH_BOX(&fastnas::conv_stage_bwd));
}
