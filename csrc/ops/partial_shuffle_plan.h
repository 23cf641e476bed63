#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/blocks.h"
#include "common/check.h"
#include "common/layout.h"

// What forward and backward of partial_shuffle share: places of the channels, sizes, and how work is dealt out.

namespace fastnas::shuffle {

// Where the channels are in the result: mixed channel j at mixed[j], bypassed channel c at bypass[c], or
// nowhere (-1) when the mixture takes its place. Shuffled with `groups` groups, or 0 for the second.
struct Places {
  std::vector<int64_t> mixed, bypass;
  int64_t groups = 0;
};

inline Places find_places(const std::optional<Tensor>& channels, int64_t mixed, int64_t total) {
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
inline std::vector<Tensor> in_pieces(std::vector<Tensor> tensors, bool last) {
  for (auto& t : tensors) {
    const int64_t inner = last ? 1 : 3, outer = last ? 3 : 2;
    if ((t.size(inner) == 1 || t.stride(inner) == 1) && (t.size(outer) == 1 || t.stride(outer) == t.size(inner)))
      continue;
    t = torch::stable::contiguous(t, map_format(last));
  }
  return tensors;
}

inline Tensor in_pixels(const Tensor& t, bool last) {
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
inline int64_t pieces_a_run(const std::vector<Tensor>& mixed, int64_t dim, int64_t piece) {
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

}  // namespace fastnas::shuffle
