#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd.h"
#include "ops/depthwise_bank_taps.h"
#include "ops/depthwise_bank_transpose.h"

// Moves kLanes planes between a tensor and a buffer in lanes. A "band" is Rows pieces of Granule adjacent channels,
// whose pixels are adjacent too: in NCHW 16 planes (Granule 1), in channels last 4 images of 4 channels, 2 of 8 or one
// of 16. Blocks of Rows x Rows pieces are transposed in registers, so that both sides move whole cache lines.

namespace fastnas::bank {

// Planes [first, first + lanes) of the batch * channels planes of a tensor.
struct Group {
  int64_t first, lanes;
};

// A [B, C, H, W] tensor of which the channels of a pixel or the pixels of a row are adjacent; steps in elements.
template <class T>
struct Map {
  T* data;
  int64_t batch, channel, row, column;
  int64_t channels, height, width;
  bool by_pixel;

  explicit Map(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())),
        batch(t.stride(0)),
        channel(t.stride(1)),
        row(t.stride(2)),
        column(t.stride(3)),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        by_pixel(channels > 1 && channel == 1) {}

  FASTNAS_INLINE T* plane(int64_t index) const { return data + index / channels * batch + index % channels * channel; }
  // Rows [top, top + count), as far as there are any.
  Map rows(int64_t top, int64_t count) const {
    Map part = *this;
    part.data += top * row;
    part.height = std::min(count, height - top);
    return part;
  }
  // Whether the lanes of a group are adjacent channels of one image, stored as they are summed.
  bool in_lanes() const { return std::is_same_v<T, acc_t<T>> && by_pixel && channels % kLanes<acc_t<T>> == 0; }
};

// Calls band(rows, granule, lane), the first two as constants, for all lanes of a group.
template <class T, class Band>
FASTNAS_INLINE inline void for_bands(const Map<T>& map, Group group, const Band& band) {
  constexpr bool kFloat = kLanes<acc_t<std::remove_const_t<T>>> == 16, kWide = kFloat && kVectorBytes == 64;
  const auto constant = []<int N>() { return std::integral_constant<int, N>{}; };
  const auto one = constant.template operator()<1>();
  const auto two = constant.template operator()<2>();
  const auto four = constant.template operator()<4>();
  const auto eight = constant.template operator()<8>();
  const auto sixteen = constant.template operator()<16>();
  if (!map.by_pixel) {
    int64_t lane = 0;
    if constexpr (kWide)
      for (; lane + 16 <= group.lanes; lane += 16) band(sixteen, one, lane);
    if constexpr (kFloat)
      for (; lane + 4 <= group.lanes; lane += 4) band(four, one, lane);
    for (; lane < group.lanes; ++lane) band(one, one, lane);
    return;
  }
  if constexpr (kWide)
    if (group.lanes == 16 && map.column == map.channels) {
      if (map.channels == 4) return band(four, four, 0);
      if (map.channels == 8) return band(two, eight, 0);
    }
  for (int64_t lane = 0; lane < group.lanes;) {
    const int64_t left = std::min(map.channels - (group.first + lane) % map.channels, group.lanes - lane);
    if (left >= 16) {
      band(one, sixteen, lane);
      lane += 16;
    } else if (left >= 8) {
      band(one, eight, lane);
      lane += 8;
    } else if (left >= 4) {
      band(one, four, lane);
      lane += 4;
    } else {
      band(one, one, lane);
      ++lane;
    }
  }
}

// Addresses of consecutive pixels of a map in lanes whose rows are `pitch` apart.
template <class A>
class PixelWalk {
 public:
  FASTNAS_INLINE PixelWalk(A* first, int64_t width, int64_t pitch)
      : at_(first), left_(width), width_(width), gap_(pitch - width * kLanes<A>) {}
  FASTNAS_INLINE A* next() {
    A* here = at_;
    at_ += kLanes<A>;
    if (--left_ == 0) {
      left_ = width_;
      at_ += gap_;
    }
    return here;
  }

 private:
  A* at_;
  int64_t left_, width_, gap_;
};

// from[:N] in the dtype of the sums: itself, or converted into scratch.
template <int N, class T>
FASTNAS_INLINE inline const acc_t<T>* wide(const T* from, acc_t<T>* scratch) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return from;
  } else {
#pragma omp simd
    for (int i = 0; i < N; ++i) scratch[i] = load(from[i]);
    return scratch;
  }
}

// The processor's own prefetching sees the planes of a band as too many streams: asks for what is packed next.
template <class T>
FASTNAS_INLINE inline void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// `pixels` pixels of a band, adjacent from piece[k] on.
template <int Rows, int Granule, bool Relu, class T>
FASTNAS_INLINE inline void pack_run(PixelWalk<acc_t<T>> to, const T* const (&piece)[Rows], int64_t column,
                                    int64_t pixels, int64_t ahead) {
  using A = acc_t<T>;
  int64_t p = 0;
  for (; p + Rows <= pixels; p += Rows) {
    A* out[Rows];
    const A* in[Rows];
    A scratch[Rows][Rows * Granule];
    for (int k = 0; k < Rows; ++k) {
      out[k] = to.next();
      in[k] = wide<Rows * Granule>(piece[k] + p * Granule, scratch[k]);
      fetch(piece[k] + p * Granule + ahead);
    }
    transpose<Rows, Granule, Relu>(out, in);
  }
  for (; p < pixels; ++p) {
    A* out = to.next();
    for (int k = 0; k < Rows; ++k) {
#pragma omp simd
      for (int i = 0; i < Granule; ++i) out[k * Granule + i] = activate<Relu>(A(load(piece[k][p * column + i])));
    }
  }
}

// A row of a band of one piece.
template <int Granule, bool Relu, class T>
FASTNAS_INLINE inline void pack_row(acc_t<T>* to, const T* from, int64_t column, int64_t pixels, int64_t ahead) {
  using A = acc_t<T>;
  for (int64_t p = 0; p < pixels; ++p, to += kLanes<A>, from += column) {
    fetch(from + ahead);
#pragma omp simd
    for (int i = 0; i < Granule; ++i) to[i] = activate<Relu>(A(load(from[i])));
  }
}

template <int Rows, int Granule, bool Relu, class T>
FASTNAS_INLINE inline void pack_band(acc_t<T>* to, int64_t pitch, const Map<const T>& map, int64_t index) {
  const int64_t ahead = map.height * map.row;
  if constexpr (Rows == 1) {
    const T* from = map.plane(index);
    for (int64_t h = 0; h < map.height; ++h)
      pack_row<Granule, Relu>(to + h * pitch, from + h * map.row, map.column, map.width, ahead);
  } else {
    const bool gapless = map.row == map.width * map.column;
    const int64_t runs = gapless ? 1 : map.height, pixels = gapless ? map.height * map.width : map.width;
    for (int64_t run = 0; run < runs; ++run) {
      const T* piece[Rows];
      for (int k = 0; k < Rows; ++k) piece[k] = map.plane(index + k * Granule) + run * map.row;
      pack_run<Rows, Granule, Relu>(PixelWalk<acc_t<T>>(to + run * pitch, map.width, pitch), piece, map.column, pixels,
                                    ahead);
    }
  }
}

// Fills `to`, whose rows are `pitch` elements apart, with the planes of a group; lanes without a plane become zero.
template <class T>
void pack(acc_t<T>* to, int64_t pitch, const Map<const T>& map, Group group, bool relu) {
  using A = acc_t<T>;
  if (group.lanes < kLanes<A>)
    for (int64_t h = 0; h < map.height; ++h) std::fill_n(to + h * pitch, map.width * kLanes<A>, A(0));
  vectorised([&]() FASTNAS_INLINE {
    for_bands(map, group, [&](auto rows, auto granule, int64_t lane) FASTNAS_INLINE {
      if (relu) {
        pack_band<rows, granule, true>(to + lane, pitch, map, group.first + lane);
      } else {
        pack_band<rows, granule, false>(to + lane, pitch, map, group.first + lane);
      }
    });
  });
}

// `pixels` pixels of a band from `first` on of a dense map; `from` has no gaps and begins with the first of them.
template <int Rows, int Granule, class T>
FASTNAS_INLINE inline void unpack_band(const Map<T>& map, const acc_t<T>* from, int64_t index, int64_t first,
                                       int64_t pixels) {
  using A = acc_t<T>;
  T* piece[Rows];
  for (int k = 0; k < Rows; ++k) piece[k] = map.plane(index + k * Granule) + first * map.column;
  int64_t p = 0;
  if constexpr (Rows > 1)
    for (; p + Rows <= pixels; p += Rows) {
      const A* in[Rows];
      A* out[Rows];
      A scratch[Rows][Rows * Granule];
      for (int k = 0; k < Rows; ++k) {
        in[k] = from + (p + k) * kLanes<A>;
        if constexpr (std::is_same_v<T, A>) {
          out[k] = piece[k] + p * Granule;
        } else {
          out[k] = scratch[k];
        }
      }
      transpose<Rows, Granule, false>(out, in);
      if constexpr (!std::is_same_v<T, A>)
        for (int k = 0; k < Rows; ++k) {
#pragma omp simd
          for (int i = 0; i < Rows * Granule; ++i) store(piece[k] + p * Granule + i, scratch[k][i]);
        }
    }
  for (; p < pixels; ++p)
    for (int k = 0; k < Rows; ++k) {
#pragma omp simd
      for (int i = 0; i < Granule; ++i) store(piece[k] + p * map.column + i, from[p * kLanes<A> + k * Granule + i]);
    }
}

// Writes rows [top, top + rows) of the planes of a group of a dense map; `from` has no gaps and begins with row `top`.
template <class T>
void unpack(const Map<T>& map, const acc_t<T>* from, Group group, int64_t top, int64_t rows_written) {
  const int64_t first = top * map.width, pixels = rows_written * map.width;
  vectorised([&]() FASTNAS_INLINE {
    for_bands(map, group, [&](auto rows, auto granule, int64_t lane) FASTNAS_INLINE {
      unpack_band<rows, granule>(map, from + lane, group.first + lane, first, pixels);
    });
  });
}

}  // namespace fastnas::bank
