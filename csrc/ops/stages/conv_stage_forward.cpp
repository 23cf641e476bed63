#include "ops/stages/chunks.h"
#include "ops/stages/conv_stage.h"
#include "ops/stages/conv_stage_image.h"
#include "ops/stages/copy_channels.h"
#include "ops/stages/scratch.h"
#include "ops/stages/statistics.h"

namespace fastnas {
namespace {

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
        pointwise_flat<T, channels>(out, in + y * in_row, part.pointwise, positions);
        if (!whole) copy_channels(target, out_channels, out, f.channels, f.channels, f.out_width);
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
    pointwise(out, pitch, in + r * in_row, f.pitch, part.pointwise, part.out_pitch, f.channels,
              part.out_pitch / kLanes<T>, run.pixels);
    if (!whole) copy_channels(target, out_channels, out, pitch, part.outputs, run.pixels);
  }
}

}  // namespace

template <class T>
void convolve(const Plan<T>& plan, const std::vector<View<T>>& xs, const T* norms, T* z, T* stats) {
  const Frame<T>& f = plan.frame;
  const int64_t sources = static_cast<int64_t>(xs.size()), batch = xs[0].map.batch, channels = plan.out_channels;
  const int64_t pixels = f.out_height * f.out_width, norm_width = repeated_width<T>(f.channels);
  std::vector<T> norm;
  if (norms) norm = repeated(norms, 2 * sources, f.channels);
  Statistics<T> measured(stats ? plan.outputs : 0, batch, pixels, channels);
  const int64_t pairs = sources * batch;
  for_each_chunk(pairs, chunk_count(pairs), [&](int64_t, int64_t begin, int64_t end) {
    Scratch<T> padded(f.padded_size()), deep(f.out_height * f.row(f.out_width), false);
    Scratch<T> result(pixels * rounded_up(channels, kLanes<T>), false);
    ChannelSums<T> sums(pixels, channels);
    vectorised([&]() FASTNAS_INLINE {
      for_each_pair(sources, begin, end, [&](int64_t source, int64_t image) FASTNAS_INLINE {
        const T* mean = norms ? norm.data() + source * 2 * norm_width : nullptr;
        activate(padded.data(), f,
                 Input<T>{xs[source].image(image), xs[source].map.pixel, mean, norms ? mean + norm_width : nullptr});
        for (size_t p = 0; p < plan.parts.size(); ++p) {
          const Part<T>& part = plan.parts[p];
          if (part.source != source) continue;
          const T* in = pointwise_input(deep.data(), padded.data(), f, part);
          T* target = z + (part.output * batch + image) * pixels * channels;
          pointwise_image(target + part.first, channels, result.data(), in, f, part);
          const bool last = p + 1 == plan.parts.size() || plan.parts[p + 1].output != part.output;
          if (stats && last) measured.measure(part.output, image, target, sums);
        }
      });
    });
  });
  if (stats) measured.write(stats);
}

template void convolve(const Plan<float>&, const std::vector<View<float>>&, const float*, float*, float*);
template void convolve(const Plan<double>&, const std::vector<View<double>>&, const double*, double*, double*);

}  // namespace fastnas
