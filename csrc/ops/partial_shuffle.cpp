// partial_shuffle: some channels are mixed, the others bypass (max-pooled on stride 2), and every channel
// goes straight to its place in the result. Schema: fastnas/ops/partial_shuffle.py. Forward reads each input
// and writes the result once; backward reads the gradient (and what the weights and the pool need) and writes
// each gradient once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "common/max_pool.h"
#include "common/results.h"

namespace fastnas {
namespace {

// Where the channels are in the result: mixed channel j at mixed[j], bypassed channel c at bypass[c], or
// nowhere (-1) when the mixture takes its place. Shuffled with `groups` groups, or 0 for the second.
struct Places {
  std::vector<int64_t> mixed, bypass;
  int64_t groups = 0;
};

Places find_places(const std::optional<Tensor>& channels, int64_t mixed, int64_t total) {
  Places out;
  if (!channels) {
    STD_TORCH_CHECK(mixed > 0 && total >= mixed && total % mixed == 0, "partial_shuffle: ", total,
                    " channels in groups of ", mixed);
    const int64_t groups = out.groups = total / mixed;
    for (int64_t j = 0; j < mixed; ++j) out.mixed.push_back(j * groups);
    for (int64_t c = mixed; c < total; ++c) out.bypass.push_back(c % mixed * groups + c / mixed);
    return out;
  }
  const Tensor dense = torch::stable::contiguous(*channels);
  STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Long && dense.numel() == mixed,
                  "partial_shuffle: channels must hold one int64 for each of the ", mixed, " mixed channels");
  const auto* at = static_cast<const int64_t*>(dense.data_ptr());
  for (int64_t c = 0; c < total; ++c) out.bypass.push_back(c);
  for (int64_t j = 0; j < mixed; ++j) {
    STD_TORCH_CHECK(at[j] >= 0 && at[j] < total && (j == 0 || at[j - 1] < at[j]),
                    "partial_shuffle: channels must be sorted, distinct and inside [0, ", total, "), got ", at[j],
                    " at position ", j);
    out.mixed.push_back(at[j]);
    out.bypass[at[j]] = -1;
  }
  return out;
}

// Tensors whose planes (or in channels last, rows of pixels) lie in one piece, copied where that is not so.
std::vector<Tensor> in_pieces(std::vector<Tensor> tensors, bool last) {
  for (auto& t : tensors) {
    const int64_t inner = last ? 1 : 3, outer = last ? 3 : 2;
    if ((t.size(inner) == 1 || t.stride(inner) == 1) && (t.size(outer) == 1 || t.stride(outer) == t.size(inner)))
      continue;
    t = torch::stable::contiguous(t, map_format(last));
  }
  return tensors;
}

Tensor in_pixels(const Tensor& t, bool last) {
  return !last || t.stride(1) == 1 ? t : torch::stable::contiguous(t, map_format(true));
}

// A [B, C, H, W] tensor as a pointer and strides in elements.
template <class T>
struct Map {
  T* data;
  int64_t b, c, h, w;

  explicit Map(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), b(t.stride(0)), c(t.stride(1)), h(t.stride(2)), w(t.stride(3)) {}
  FASTNAS_INLINE T* at(int64_t ib, int64_t ic, int64_t ih = 0, int64_t iw = 0) const {
    return data + ib * b + ic * c + ih * h + iw * w;
  }
};

template <class T>
std::vector<Map<T>> maps(const std::vector<Tensor>& tensors) {
  std::vector<Map<T>> out;
  for (const auto& t : tensors) out.emplace_back(t);
  return out;
}

// How many pieces, adjacent in dimension `dim` of all tensors, are worked on together: kBlock elements or one piece.
int64_t pieces_a_run(const std::vector<Tensor>& mixed, int64_t dim, int64_t piece) {
  for (const auto& t : mixed)
    if (t.size(dim) > 1 && t.stride(dim) != piece) return 1;
  return std::max<int64_t>(1, kBlock / std::max<int64_t>(1, piece));
}

struct Sizes {
  int64_t batch, mixed, bypass;         // images, mixed channels, bypassed channels
  int64_t height, width;                // of the result
  int64_t bypass_height, bypass_width;  // larger than the result's when the bypass is pooled
  bool pool, channels_last;
  int64_t run = 1;     // pieces
  bool large = false;  // what is written goes past the caches

  // A piece is a plane, or in channels last the mixed channels of a row of pixels. Work is dealt out in runs of pieces;
  // planes are those of mixed channels, then those of the bypass.
  int64_t plane() const { return height * width; }
  int64_t piece() const { return width * (channels_last ? mixed : height); }
  int64_t mixed_runs() const { return ((channels_last ? height : mixed) + run - 1) / run; }
  int64_t runs() const { return mixed_runs() + (channels_last ? 0 : (bypass + run - 1) / run); }

  void set_runs(const std::vector<Tensor>& maps) { run = pieces_a_run(maps, channels_last ? 2 : 1, piece()); }
};

// Calls body(groups), usual numbers as constants, for which its loops are vectorised.
template <class Body>
FASTNAS_INLINE inline void with_groups(int64_t groups, const Body& body) {
  switch (groups) {
    case 2:
      return body(std::integral_constant<int64_t, 2>{});
    case 4:
      return body(std::integral_constant<int64_t, 4>{});
    case 8:
      return body(std::integral_constant<int64_t, 8>{});
    default:
      return body(groups);
  }
}

// The channels of a shuffled pixel: `first` holds those of group 0, `rest` those of the other groups.
template <class T, class Groups>
FASTNAS_INLINE inline void shuffle_pixel(T* out, const T* first, const T* rest, int64_t channels, Groups groups) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    out[c * groups] = first[c];
    for (int64_t k = 1; k < groups; ++k) out[c * groups + k] = rest[(k - 1) * channels + c];
  });
}

template <class T, class Groups>
FASTNAS_INLINE inline void unshuffle_pixel(T* first, T* rest, const T* in, int64_t channels, Groups groups) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE {
    first[c] = in[c * groups];
    for (int64_t k = 1; k < groups; ++k) rest[(k - 1) * channels + c] = in[c * groups + k];
  });
}

template <class T>
FASTNAS_INLINE inline void copy_pixel(T* out, const T* in, int64_t channels) {
  in_lanes(channels, [&](int64_t c) FASTNAS_INLINE { out[c] = in[c]; });
}

template <Isa isa, class T>
FASTNAS_INLINE inline void copy_out(T* out, const T* in, int64_t n, bool large) {
  if constexpr (kStreams<T>) {
    if (large) return stream_copy<isa>(out, in, n);
  }
  std::memcpy(out, in, n * sizeof(T));
}

// The four pixels that pixel (h, i) of the result pools; `outside` for those beyond the edge.
template <class T>
struct Window {
  T* pixel[4];

  FASTNAS_INLINE Window(const Map<T>& x, const Sizes& s, int64_t b, int64_t h, int64_t i, T* outside) {
    const bool right = 2 * i + 1 < s.bypass_width, below = 2 * h + 1 < s.bypass_height;
    T* first = x.at(b, 0, 2 * h, 2 * i);
    pixel[0] = first;
    pixel[1] = right ? first + x.w : outside;
    pixel[2] = below ? first + x.h : outside;
    pixel[3] = right && below ? first + x.h + x.w : outside;
  }
};

template <class T>
struct Forward {
  Sizes s;
  Places to;
  std::vector<acc_t<T>> w;
  std::vector<Map<T>> mixed;
  Map<T> bypass, y;

  FASTNAS_INLINE void mix(T* out, const T** x, int64_t b, int64_t c, int64_t h, int64_t n) const {
    const int64_t paths = static_cast<int64_t>(mixed.size());
    for (int64_t start = 0; start < n; start += kBlock) {
      for (int64_t k = 0; k < paths; ++k) x[k] = mixed[k].at(b, c, h) + start;
      weighted_sum(out + start, x, w.data(), paths, std::min(kBlock, n - start));
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void planes(int64_t begin, int64_t end) const {
    std::vector<const T*> x(mixed.size());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), run = unit % s.runs() - s.mixed_runs();
      if (run < 0) {
        mixed_run<isa>(x.data(), b, (run + s.mixed_runs()) * s.run);
      } else {
        for (int64_t c = run * s.run; c < std::min((run + 1) * s.run, s.bypass); ++c)
          if (to.bypass[c] >= 0) bypass_plane<isa>(b, c);
      }
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void mixed_run(const T** x, int64_t b, int64_t c) const {
    const int64_t count = std::min(s.run, s.mixed - c), plane = s.plane();
    if (count == 1) return mix(y.at(b, to.mixed[c]), x, b, c, 0, plane);
    T mixture[kBlock];
    mix(mixture, x, b, c, 0, count * plane);
    for (int64_t j = 0; j < count; ++j) copy_out<isa>(y.at(b, to.mixed[c + j]), mixture + j * plane, plane, s.large);
  }

  template <Isa isa>
  FASTNAS_INLINE void bypass_plane(int64_t b, int64_t c) const {
    T* out = y.at(b, to.bypass[c]);
    if (!s.pool && bypass.w == 1 && bypass.h == s.width) {
      copy_out<isa>(out, bypass.at(b, c), s.plane(), s.large);
    } else {
      for (int64_t h = 0; h < s.height; ++h) bypass_row(out + h * s.width, b, c, h);
    }
  }

  FASTNAS_INLINE void bypass_row(T* out, int64_t b, int64_t c, int64_t h) const {
    if (s.pool) {
      const T* top = bypass.at(b, c, 2 * h);
      const T* bottom = 2 * h + 1 < s.bypass_height ? top + bypass.h : top;
      if (bypass.w == 1) {  // a known step is vectorised
        pool_row(out, top, bottom, 1, s.bypass_width);
      } else {
        pool_row(out, top, bottom, bypass.w, s.bypass_width);
      }
    } else if (bypass.w == 1) {
      std::memcpy(out, bypass.at(b, c, h), s.width * sizeof(T));
    } else {
      for (int64_t i = 0; i < s.width; ++i) out[i] = *bypass.at(b, c, h, i);
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void pixels(int64_t begin, int64_t end) const {
    const int64_t channels = y.w;
    std::vector<const T*> x(mixed.size());
    std::vector<T> mixture(s.run * s.piece()), pooled(s.bypass), outside(s.bypass), row(s.width * channels);
    for (T& v : outside) store(&v, kOutside<acc_t<T>>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), top = unit % s.runs() * s.run, bottom = std::min(top + s.run, s.height);
      mix(mixture.data(), x.data(), b, 0, top, (bottom - top) * s.piece());
      const T* m = mixture.data();
      for (int64_t h = top; h < bottom; ++h) {
        T* out = s.large ? row.data() : y.at(b, 0, h);
        for (int64_t i = 0; i < s.width; ++i, m += s.mixed) {
          const T* in = bypass.at(b, 0, h, i);
          if (s.pool) {
            pool_pixel(pooled.data(), Window<T>(bypass, s, b, h, i, outside.data()).pixel, s.bypass);
            in = pooled.data();
          }
          spread_pixel(out + i * channels, m, in);
        }
        if (s.large) copy_out<isa>(y.at(b, 0, h), out, s.width * channels, true);
      }
    }
  }

  FASTNAS_INLINE void spread_pixel(T* out, const T* mixture, const T* in) const {
    if (to.groups) {
      with_groups(to.groups, [&](auto groups) FASTNAS_INLINE { shuffle_pixel(out, mixture, in, s.mixed, groups); });
    } else {
      copy_pixel(out, in, s.bypass);
      for (int64_t j = 0; j < s.mixed; ++j) out[to.mixed[j]] = mixture[j];
    }
  }
};

template <class T>
struct Backward {
  Sizes s;
  Places from;
  std::vector<acc_t<T>> w;
  Map<T> g;
  std::vector<Map<T>> mixed;  // empty when the weights need no gradient
  std::vector<Map<T>> dmixed;
  Map<T> bypass, dbypass;
  bool bypass_grad;
  double* dots;  // [batch, mixed runs, paths]

  template <Isa isa>
  FASTNAS_INLINE void unmix_run(double* dot, const T* gp, int64_t b, int64_t c, int64_t h, int64_t total) const {
    acc_t<T> scratch[kBlock];
    for (int64_t start = 0; start < total; start += kBlock) {
      const int64_t n = std::min(kBlock, total - start);
      const acc_t<T>* wide = widened(gp + start, n, scratch);
      for (size_t k = 0; k < dmixed.size(); ++k) {
        T* dx = dmixed[k].at(b, c, h) + start;
        if (mixed.empty()) {
          unmix<isa>(dx, wide, w[k], n, s.large);
        } else {
          dot[k] += unmix<isa>(dx, wide, mixed[k].at(b, c, h) + start, w[k], n, s.large);
        }
      }
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void planes(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), run = unit % s.runs() - s.mixed_runs();
      if (run < 0) {
        const int64_t j = run + s.mixed_runs();
        mixed_run<isa>(dots + (b * s.mixed_runs() + j) * dmixed.size(), b, j * s.run);
      } else if (bypass_grad) {
        for (int64_t c = run * s.run; c < std::min((run + 1) * s.run, s.bypass); ++c) bypass_plane<isa>(b, c);
      }
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void mixed_run(double* dot, int64_t b, int64_t c) const {
    const int64_t count = std::min(s.run, s.mixed - c), plane = s.plane();
    if (count == 1) return unmix_run<isa>(dot, g.at(b, from.mixed[c]), b, c, 0, plane);
    T gathered[kBlock];
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(gathered + j * plane, g.at(b, from.mixed[c + j]), plane * sizeof(T));
    unmix_run<isa>(dot, gathered, b, c, 0, count * plane);
  }

  template <Isa isa>
  FASTNAS_INLINE void bypass_plane(int64_t b, int64_t c) const {
    const int64_t plane = s.bypass_height * s.bypass_width;
    T* dx = dbypass.at(b, c);
    if (from.bypass[c] < 0) {
      std::fill_n(dx, plane, T{});
    } else if (s.pool) {
      for (int64_t h = 0; h < s.height; ++h)
        unpool_rows(dx + 2 * h * s.bypass_width, g.at(b, from.bypass[c]) + h * s.width, b, c, 2 * h);
    } else {
      copy_out<isa>(dx, g.at(b, from.bypass[c]), plane, s.large);
    }
  }

  FASTNAS_INLINE void unpool_rows(T* dx, const T* gp, int64_t b, int64_t c, int64_t h) const {
    const int64_t width = s.bypass_width;
    const T* top = bypass.at(b, c, h);
    if (h + 1 >= s.bypass_height) {
      unpool_row<false>(dx, dx, top, top, bypass.w, gp, width);
    } else if (bypass.w == 1) {  // a known step is vectorised
      unpool_row<true>(dx, dx + width, top, top + bypass.h, 1, gp, width);
    } else {
      unpool_row<true>(dx, dx + width, top, top + bypass.h, bypass.w, gp, width);
    }
  }

  template <Isa isa>
  FASTNAS_INLINE void pixels(int64_t begin, int64_t end) const {
    const bool straight = !s.pool && bypass_grad, by_row = straight && s.large;
    std::vector<T> g_mixed(s.run * s.piece()), g_pooled(s.bypass), outside(s.bypass), ignored(s.bypass);
    std::vector<T> row(by_row ? s.width * s.bypass : 0);
    for (T& v : outside) store(&v, kOutside<acc_t<T>>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.runs(), top = unit % s.runs() * s.run, bottom = std::min(top + s.run, s.height);
      T* m = g_mixed.data();
      for (int64_t h = top; h < bottom; ++h) {
        T* to = by_row ? row.data() : straight ? dbypass.at(b, 0, h) : g_pooled.data();
        for (int64_t i = 0; i < s.width; ++i, m += s.mixed) {
          gather_pixel(m, straight ? to + i * s.bypass : to, g.at(b, 0, h, i));
          if (s.pool && bypass_grad)
            unpool_pixel(Window<T>(dbypass, s, b, h, i, ignored.data()).pixel,
                         Window<T>(bypass, s, b, h, i, outside.data()).pixel, to, s.bypass);
        }
        if (by_row) copy_out<isa>(dbypass.at(b, 0, h), to, s.width * s.bypass, true);
      }
      unmix_run<isa>(dots + unit * dmixed.size(), g_mixed.data(), b, 0, top, (bottom - top) * s.piece());
    }
  }

  FASTNAS_INLINE void gather_pixel(T* mixture, T* straight, const T* gp) const {
    if (from.groups) {
      with_groups(from.groups,
                  [&](auto groups) FASTNAS_INLINE { unshuffle_pixel(mixture, straight, gp, s.mixed, groups); });
    } else {
      copy_pixel(straight, gp, s.bypass);
      for (int64_t j = 0; j < s.mixed; ++j) {
        mixture[j] = gp[from.mixed[j]];
        straight[from.mixed[j]] = T{};
      }
    }
  }
};

// Runs a job on torch's threads, compiled for this processor; `streams` is how many tensors a piece touches.
template <class Job>
void run(const Job& job, int64_t streams) {
  constexpr int64_t kElementsAThread = 1 << 16;  // less is not worth waking a thread for
  const Sizes& s = job.s;
  const int64_t grain = std::max<int64_t>(1, kElementsAThread / std::max<int64_t>(1, s.run * s.piece() * streams));
  torch::stable::parallel_for(0, s.batch * s.runs(), grain, [&](int64_t begin, int64_t end) {
    vectorised([&](auto isa) FASTNAS_INLINE {
      s.channels_last ? job.template pixels<isa>(begin, end) : job.template planes<isa>(begin, end);
    });
    end_of_stream();
  });
}

template <class A>
std::vector<A> weights_or_one(const std::optional<Tensor>& weights, size_t paths) {
  std::vector<A> w = weights ? host_values<A>(*weights) : std::vector<A>{A(1)};
  STD_TORCH_CHECK(w.size() == paths, "partial_shuffle: one weight a tensor is needed");
  return w;
}

int64_t halved(int64_t n, int64_t stride) { return stride == 1 ? n : (n + 1) / 2; }

Tensor partial_shuffle_fwd(std::vector<Tensor> mixed, std::optional<Tensor> weights, Tensor bypass,
                           std::optional<Tensor> channels, int64_t stride) {
  STD_TORCH_CHECK(!mixed.empty() && mixed[0].dim() == 4 && bypass.dim() == 4 && (stride == 1 || stride == 2) &&
                      bypass.size(0) == mixed[0].size(0) && bypass.scalar_type() == mixed[0].scalar_type() &&
                      halved(bypass.size(2), stride) == mixed[0].size(2) &&
                      halved(bypass.size(3), stride) == mixed[0].size(3),
                  "partial_shuffle: mixed and bypass do not fit together");
  check_alike("partial_shuffle", mixed, mixed[0]);
  const bool last = is_channels_last(bypass);
  const int64_t m = mixed[0].size(1), total = bypass.size(1) + (channels ? 0 : m);
  mixed = in_pieces(mixed, last);
  Sizes s{.batch = bypass.size(0),
          .mixed = m,
          .bypass = bypass.size(1),
          .height = mixed[0].size(2),
          .width = mixed[0].size(3),
          .bypass_height = bypass.size(2),
          .bypass_width = bypass.size(3),
          .pool = stride == 2,
          .channels_last = last};
  s.set_runs(mixed);
  const Places to = find_places(channels, m, total);
  Tensor y = result_map(bypass, s.batch, total, s.height, s.width, last);
  s.large = past_caches(y.numel() * y.element_size());
  dispatch_floating(y.scalar_type(), "partial_shuffle_fwd", [&](auto tag) {
    using T = decltype(tag);
    const Forward<T> job{s,        to, weights_or_one<acc_t<T>>(weights, mixed.size()), maps<T>(mixed), Map<T>(bypass),
                         Map<T>(y)};
    run(job, mixed.size() + 1);
  });
  return y;
}

// `mixed` is empty when the weights are frozen; `bypass` is there when its gradient depends on it.
std::tuple<std::vector<Tensor>, std::vector<double>, Tensor> gradients(const Tensor& grad, std::vector<Tensor> mixed,
                                                                       const std::optional<Tensor>& weights,
                                                                       const std::optional<Tensor>& bypass,
                                                                       const std::optional<Tensor>& channels, int64_t m,
                                                                       bool bypass_grad) {
  STD_TORCH_CHECK(grad.dim() == 4, "partial_shuffle: the gradient must have 4 dimensions");
  const bool last = is_channels_last(grad), pool = bypass.has_value();
  const int64_t total = grad.size(1), rest = channels ? total : total - m;
  mixed = in_pieces(mixed, last);
  Sizes s{.batch = grad.size(0),
          .mixed = m,
          .bypass = rest,
          .height = grad.size(2),
          .width = grad.size(3),
          .bypass_height = pool ? bypass->size(2) : grad.size(2),
          .bypass_width = pool ? bypass->size(3) : grad.size(3),
          .pool = pool,
          .channels_last = last};
  s.set_runs(mixed);
  STD_TORCH_CHECK(!pool || (bypass->dim() == 4 && bypass->size(0) == s.batch && bypass->size(1) == rest &&
                            halved(s.bypass_height, 2) == s.height && halved(s.bypass_width, 2) == s.width &&
                            bypass->scalar_type() == grad.scalar_type()),
                  "partial_shuffle: bypass does not fit the gradient");
  const Places from = find_places(channels, m, total);
  const size_t paths = weights ? weights->numel() : 1;
  std::vector<Tensor> dmixed;
  for (size_t k = 0; k < paths; ++k) dmixed.push_back(result_map(grad, s.batch, m, s.height, s.width, last));
  if (!mixed.empty()) {
    STD_TORCH_CHECK(mixed.size() == paths, "partial_shuffle: one weight a tensor is needed");
    check_alike("partial_shuffle", mixed, dmixed[0]);
  }
  const int64_t none[] = {0};
  const Tensor dbypass = bypass_grad ? result_map(grad, s.batch, rest, s.bypass_height, s.bypass_width, last)
                                     : torch::stable::new_empty(grad, {none, 1});
  s.large = past_caches((paths * s.batch * m * s.plane() + dbypass.numel()) * grad.element_size());
  // Channels last gathers g pixel by pixel; planes of g are read as they are.
  const Tensor g = last ? grad : in_pieces({grad}, false)[0];
  const Tensor x = in_pixels(pool ? *bypass : g, last);
  std::vector<double> total_dots(paths, 0.0);
  dispatch_floating(g.scalar_type(), "partial_shuffle_bwd", [&](auto tag) {
    using T = decltype(tag);
    const auto w = weights_or_one<acc_t<T>>(weights, paths);
    const Map<T> dx(bypass_grad ? dbypass : g);
    std::vector<double> dots(mixed.empty() ? 0 : s.batch * s.mixed_runs() * paths);
    const Backward<T> job{s,         from, w,           Map<T>(g),  maps<T>(mixed), maps<T>(dmixed),
                          Map<T>(x), dx,   bypass_grad, dots.data()};
    run(job, 2 * paths + 1);
    // Pieces are added in their order: the sums do not depend on the number of threads.
    for (size_t i = 0; i < dots.size(); ++i) total_dots[i % paths] += dots[i];
  });
  return {dmixed, total_dots, dbypass};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> partial_shuffle_bwd(Tensor g, std::vector<Tensor> mixed, Tensor weights,
                                                                    std::optional<Tensor> bypass,
                                                                    std::optional<Tensor> channels, bool bypass_grad) {
  STD_TORCH_CHECK(!mixed.empty() && mixed[0].dim() == 4, "partial_shuffle: mixed tensors are needed");
  auto [dmixed, dots, dbypass] = gradients(g, mixed, weights, bypass, channels, mixed[0].size(1), bypass_grad);
  Tensor dweights = torch::stable::new_empty(weights, weights.sizes());
  dispatch_floating(dweights.scalar_type(), "partial_shuffle_bwd", [&, &sums = dots](auto tag) {
    using W = decltype(tag);
    W* out = static_cast<W*>(dweights.data_ptr());
    for (size_t k = 0; k < sums.size(); ++k) store(out + k, static_cast<acc_t<W>>(sums[k]));
  });
  return {dmixed, dweights, dbypass};
}

std::tuple<std::vector<Tensor>, Tensor> partial_shuffle_bwd_frozen(Tensor g, std::optional<Tensor> weights,
                                                                   std::optional<Tensor> bypass,
                                                                   std::optional<Tensor> channels,
                                                                   int64_t mixed_channels, bool bypass_grad) {
  auto [dmixed, dots, dbypass] = gradients(g, {}, weights, bypass, channels, mixed_channels, bypass_grad);
  return {dmixed, dbypass};
}

}  // namespace
}  // namespace fastnas

STABLE_TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("partial_shuffle_fwd", TORCH_BOX(&fastnas::partial_shuffle_fwd));
  m.impl("partial_shuffle_bwd", TORCH_BOX(&fastnas::partial_shuffle_bwd));
  m.impl("partial_shuffle_bwd_frozen", TORCH_BOX(&fastnas::partial_shuffle_bwd_frozen));
}
