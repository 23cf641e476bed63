#include "ops/stages/chunks.h"
#include "ops/stages/conv_stage.h"
#include "ops/stages/conv_stage_image.h"
#include "ops/stages/dots.h"
#include "ops/stages/scratch.h"

namespace fastnas {
namespace {

// The gradient that reaches an output: scale * g + centre * (z - mean) + offset, per channel.
template <class T>
struct Upstream {
  const T *g, *z;
  int64_t g_pixel, z_pixel;
  const T *scale, *centre, *offset, *mean;  // repeated

  Upstream(const View<T>& gs, const View<T>& zs, const T* coef, int64_t width)
      : g(gs.data),
        z(zs.data),
        g_pixel(gs.map.pixel),
        z_pixel(zs.map.pixel),
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
    const Frame<T>& f = plan_.frame;
    const int64_t count = static_cast<int64_t>(plan_.parts.size()), own = size_ / std::max<int64_t>(1, count);
    for_each_row_of(count, own * static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) FASTNAS_INLINE {
      for (int64_t p = begin; p < end; ++p) {
        const Part<T>& part = plan_.parts[p];
        std::fill(out + part.kernel_start, out + part.pointwise_start + part.outputs * f.channels, T(0));
        for (const auto& chunk : chunks) {
          if (part.depthwise) add_kernel(out + part.kernel_start, chunk.data() + kernels_[p], part.taps);
          // Flat rows hold the gradient of several pixels beside each other.
          const T* pointwise = chunk.data() + pointwise_[p];
          const int64_t row = part.flat ? kLanes<T> : part.in_pitch, used = part.flat ? kLanes<T> : f.channels;
          for (int64_t o = 0; o < part.outputs; ++o) {
            T* to = out + part.pointwise_start + o * f.channels;
            for (int64_t pixel = 0; pixel < used; pixel += f.channels) {
              const T* from = pointwise + o * row + pixel;
#pragma omp simd
              for (int64_t i = 0; i < f.channels; ++i) to[i] += from[i];
            }
          }
        }
      }
    });
  }

 private:
  // out [channels][taps] += kernel [vectors][taps][lanes]
  FASTNAS_INLINE inline void add_kernel(T* out, const T* kernel, int64_t taps) const {
    const Frame<T>& f = plan_.frame;
    for (int64_t column = 0; column < (f.flat ? kLanes<T> : f.channels); ++column) {
      T* own = out + (f.flat ? column % f.channels : column) * taps;
      const T* packed = kernel + column / kLanes<T> * taps * kLanes<T> + column % kLanes<T>;
      for (int64_t t = 0; t < taps; ++t) own[t] += packed[t * kLanes<T>];
    }
  }

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
        dz(plan.frame.out_height * plan.frame.out_width * rounded_up(plan.out_channels, kLanes<T>), false),
        deep(plan.frame.out_height * plan.frame.row(plan.frame.out_width), false),
        deep_grad(plan.frame.padded_size(), plan.frame.stride == 1),
        dx(plan.frame.padded_size(), false) {}
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
  const T* deep = pointwise_input(bench.deep.data(), bench.padded.data(), f, part);
  const int64_t row = f.row(f.out_width);
  if (part.flat) {
    dispatch_flat<T>(f.channels, [&](auto channels) FASTNAS_INLINE {
      outer_flat<T, channels>(gradient, bench.flat_dz.data(), deep, f.out_height * f.positions(f.out_width));
    });
    return;
  }
  const Run<T> run(f);
  for (int64_t r = 0; r < run.rows; ++r)
    outer(gradient, part.in_pitch, bench.dz.data() + r * run.pixels * part.out_pitch, part.out_pitch, deep + r * row,
          f.pitch, part.outputs, part.in_pitch / kLanes<T>, run.pixels);
}

// Gradient of the depthwise output: rows `row` apart from `out` on.
template <class T>
FASTNAS_INLINE inline void deep_gradient(T* out, int64_t row, Bench<T>& bench, const Frame<T>& f, const Part<T>& part) {
  for (int64_t y = 0; y < f.out_height; ++y) {
    if (part.flat) {
      dispatch_flat<T>(f.channels, [&](auto channels) FASTNAS_INLINE {
        pointwise_flat<T, channels>(out + y * row, bench.flat_dz.data() + y * f.row(f.out_width), part.pointwise,
                                    f.positions(f.out_width));
      });
    } else {
      // Where pixels are closer than a vector each one's zeros are overwritten by the next one.
      pointwise(out + y * row, f.pitch, bench.dz.data() + y * f.out_width * part.out_pitch, part.out_pitch,
                part.pointwise, part.in_pitch, part.outputs, part.in_pitch / kLanes<T>, f.out_width);
    }
  }
}

// One branch of one image: adds to the weights' gradients and to bench.dx.
template <class T>
FASTNAS_INLINE inline void branch_backward(T* kernel, T* pointwise, Bench<T>& bench, const Frame<T>& f,
                                           const Part<T>& part, bool first, bool need_dx, bool need_dw) {
  if (need_dw) pointwise_weights(pointwise, bench, f, part);
  if (!need_dx && !(need_dw && part.depthwise)) return;
  if (first && is_direct(f, part)) return deep_gradient(bench.dx.data(), f.row(f.out_width), bench, f, part);
  const int64_t row = f.stride == 1 ? f.padded_row() : f.row(f.out_width);
  T* grad = bench.deep_grad.data() + (f.stride == 1 ? f.interior() : 0);
  deep_gradient(grad, row, bench, f, part);
  const int64_t positions = f.positions(f.out_width);
  dispatch_taps(part.taps, part.dilation, [&](auto taps, auto dilation) FASTNAS_INLINE {
    if (need_dw && part.depthwise) {
      const T* input = bench.padded.data();
      const int64_t step = f.padded_row_step();
      if constexpr (dilation > 0)
        window_gradient<T, side_of(taps), dilation>(
            kernel, grad, row, input, step, part.offsets.data(),
            [&](int64_t y) FASTNAS_INLINE { return part.rows_at(y, f.height); }, f.out_height, positions, f.vectors,
            f.step);
      else if (f.flat && f.stride == 1 && taps > 1)
        square_gradient<T, side_of(taps)>(kernel, grad, row, input, step, part.offsets.data(), f.out_height,
                                          part.spacing, positions);
      else
        kernel_gradient<T, taps>(kernel, grad, row, input, step, part.offsets.data(), f.out_height, positions,
                                 f.vectors, f.step);
    }
    if (!need_dx) return;
    if (f.stride == 1)
      return convolve_image<T, taps, dilation>(!first, bench.dx.data(), bench.deep_grad.data(), row, part.mirrored,
                                               part.turned, f, part);
    for (int64_t y = 0; y < f.out_height; ++y)
      scatter_row<T, taps>(bench.dx.data() + y * f.padded_row_step(), grad + y * row, part.offsets.data(), part.kernel,
                           part.rows_at(2 * y, f.height), positions, f.vectors, f.step);
  });
}

// dx = gradient of relu where relu let through, plus base.
template <class T>
FASTNAS_INLINE inline void finish(T* dx, const Bench<T>& bench, const Frame<T>& f, const Input<T>& in, const T* base,
                                  int64_t base_pixel) {
  for (int64_t y = 0; y < f.height; ++y)
    for (int64_t first = 0; first < std::min(f.stride, f.width); ++first) {
      const int64_t pixels = ceil_div(f.width - first, f.stride), from = y * f.width + first;
      const int64_t start = (y + f.border) * f.padded_row() + f.column(f.border + first);
      const T* grad = bench.dx.data() + (f.stride == 1 ? y * f.row(f.width) : start);
      const auto body = [&](int64_t p, int64_t c, auto v) FASTNAS_INLINE {
        auto a = v, mean = v;
        read(grad + p * f.pitch + c, v);
        read(in.x + (from + p * f.stride) * in.pixel + c, a);
        mean = decltype(v){};
        if (in.mean) read(in.mean + c, mean);
        v = a > mean ? v : decltype(v){};
        if (base) {
          read(base + (from + p * f.stride) * base_pixel + c, a);
          v += a;
        }
        write(dx + (from + p * f.stride) * f.channels + c, v);
      };
      if (f.flat && f.stride == 1 && in.pixel == f.channels && (!base || base_pixel == f.channels))
        for_each_dense_value<T>(pixels, f.channels, body);
      else
        for_each_value<T>(pixels, f.channels, body);
    }
}

}  // namespace

template <class T>
void convolve_backward(const Plan<T>& plan, const std::vector<View<T>>& gs, const std::vector<View<T>>& zs,
                       const T* coef, const std::vector<View<T>>& xs, const T* norms,
                       const std::optional<View<T>>& base, T* dx, T* dots, T* dw) {
  const Frame<T>& f = plan.frame;
  const int64_t sources = static_cast<int64_t>(xs.size()), batch = xs[0].map.batch;
  const int64_t channels = plan.out_channels, pixels = f.out_height * f.out_width, in_pixels = f.height * f.width;
  const std::vector<T> coefficients = repeated(coef, 4 * plan.outputs, channels);
  const int64_t width = repeated_width<T>(channels), norm_width = repeated_width<T>(f.channels);
  std::vector<Upstream<T>> upstream;
  for (size_t o = 0; o < gs.size(); ++o)
    upstream.emplace_back(gs[o], zs[o], coefficients.data() + o * 4 * width, width);
  std::vector<T> norm;
  if (norms) norm = repeated(norms, 2 * sources, f.channels);
  const int64_t pairs = sources * batch, chunks = chunk_count(pairs);
  Dots<T> measured(dots ? sources : 0, batch, f.channels);
  const WeightGradients<T> layout(plan);
  std::vector<Scratch<T>> gradients;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) gradients.emplace_back(dw ? layout.size() : 0, false);
  for_each_chunk(pairs, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    Bench<T> bench(plan);
    ChannelSums<T> sums(in_pixels, f.channels);
    T* gradient = gradients[chunk].data();
    if (dw) std::fill_n(gradient, layout.size(), T(0));
    vectorised([&]() FASTNAS_INLINE {
      for_each_pair(sources, begin, end, [&](int64_t source, int64_t image) FASTNAS_INLINE {
        const T* mean = norms ? norm.data() + source * 2 * norm_width : nullptr;
        const T* x = xs[source].image(image);
        const Input<T> in{x, xs[source].map.pixel, mean, norms ? mean + norm_width : nullptr};
        if (dw) activate(bench.padded.data(), f, in);
        if (dx && f.stride == 2) std::fill_n(bench.dx.data(), f.padded_size(), T(0));
        bool first = true;
        for (size_t p = 0; p < plan.parts.size(); ++p) {
          const Part<T>& part = plan.parts[p];
          if (part.source != source) continue;
          Upstream<T> up = upstream[part.output];
          up.g += image * pixels * up.g_pixel;
          up.z += image * pixels * up.z_pixel;
          fill_upstream(bench, f, part, up);
          branch_backward(gradient + layout.kernel(p), gradient + layout.pointwise(p), bench, f, part, first,
                          dx != nullptr, dw != nullptr);
          first = false;
        }
        if (!dx) return;
        T* target = dx + (source * batch + image) * in_pixels * f.channels;
        finish(target, bench, f, in, base ? base->image(image) : nullptr, base ? base->map.pixel : 0);
        if (dots) measured.measure(source, image, target, f.channels, x, f.channels, mean, sums);
      });
    });
  });
  if (dw) layout.write(dw, gradients);
  if (dots) measured.write(dots);
}

template void convolve_backward(const Plan<float>&, const std::vector<View<float>>&, const std::vector<View<float>>&,
                                const float*, const std::vector<View<float>>&, const float*,
                                const std::optional<View<float>>&, float*, float*, float*);
template void convolve_backward(const Plan<double>&, const std::vector<View<double>>&, const std::vector<View<double>>&,
                                const double*, const std::vector<View<double>>&, const double*,
                                const std::optional<View<double>>&, double*, double*, double*);

}  // namespace fastnas
