#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/dtype.h"
#include "common/layout.h"

// How norm_mixed_sum walks over memory. Every tensor is seen as [outer, channels, inner], the dimensions around the
// channels in memory order: NCHW is [N, C, HW], channels last is [NHW, C, 1].

namespace fastnas::norm {

// `rows` x `lanes` values of a tile; a lane belongs to one channel in all rows.
struct Block {
  int64_t tile, row, column, rows, lanes;
};

// Channels are dealt out in tiles, which share nothing but the weights. With long inner runs a tile is a channel and
// its blocks are pieces of its runs; with short ones a tile is up to kTileLanes neighbours in a row of channels x
// inner values (or in several such rows taken as one), so that vectors are full on the smallest maps. Where blocks
// and segments (the blocks that are summed together) begin depends on the shape only.
struct Plan {
  static constexpr int64_t kTileLanes = 128;
  static constexpr int64_t kBlockSize = 2048;     // elements: a few blocks fit into the level 1 cache
  static constexpr int64_t kSegmentSize = 32768;  // elements: enough of them for many threads
  static constexpr int64_t kShortestRow = 64;     // shorter rows with gaps cost more than a copy

  int64_t outer = 1, channels = 1, inner = 1;
  bool planes = false;  // a tile is a channel
  int64_t rows = 0, row_lanes = 0, rest_lanes = 0, tile_lanes = 0;
  int64_t tiles = 0, pieces = 0, segments = 0, pieces_a_run = 1, block_rows = 1, pieces_a_segment = 1;
  std::vector<Tensor> tensors;  // the inputs, or dense copies of those that have no such view
  std::vector<int64_t> outer_strides, channel_strides, row_strides, tile_strides;

  Plan(std::vector<Tensor> inputs, const Tensor& dense) : tensors(std::move(inputs)) {
    channels = dense.size(1);
    if (dense.numel() == 0) {
      outer = 0;
      return;
    }
    view_all(dense);
    planes ? cut_planes() : cut_lanes();
    segments = (pieces + pieces_a_segment - 1) / pieces_a_segment;
  }

  int64_t values_a_channel() const { return outer * inner; }

  int64_t lanes(int64_t tile) const {
    return planes ? tile_lanes : std::min(tile_lanes, row_lanes - tile * tile_lanes);
  }
  int64_t first_channel(int64_t tile) const { return planes ? tile : tile * tile_lanes / inner; }
  int64_t channels_of(int64_t tile) const { return planes ? 1 : std::min(channels, lanes(tile) / inner); }
  // Neighbouring lanes of one channel.
  int64_t lanes_a_channel() const { return planes ? tile_lanes : inner; }

  int64_t offset(size_t tensor, const Block& b) const {
    return b.row * row_strides[tensor] + b.tile * tile_strides[tensor] + b.column;
  }
  // From one row of a block to the next.
  int64_t stride(size_t tensor) const { return planes ? tile_lanes : row_strides[tensor]; }

  // Calls body(Block) for the blocks of a segment, in order.
  template <class Body>
  void for_each_block(int64_t tile, int64_t segment, const Body& body) const {
    const int64_t end = std::min(pieces, (segment + 1) * pieces_a_segment);
    for (int64_t piece = segment * pieces_a_segment; piece < end; ++piece) body(block(tile, piece));
  }

  // Calls body(block, next) for blocks of at most lanes(tile) lanes: a run becomes rows of tile_lanes, and a shorter
  // row. The next block has no rows when there is none.
  template <class Body>
  void for_each_narrow_block(int64_t tile, int64_t segment, const Body& body) const {
    Block last{};
    const auto add = [&](const Block& b) {
      if (last.rows) body(last, b);
      last = b;
    };
    for_each_block(tile, segment, [&](const Block& b) {
      if (!planes) return add(b);
      const int64_t full = b.lanes / tile_lanes, rest = b.lanes % tile_lanes;
      if (full) add({tile, b.row, b.column, full, tile_lanes});
      if (rest) add({tile, b.row, b.column + full * tile_lanes, 1, rest});
    });
    if (last.rows) body(last, Block{});
  }

  // The middle one of three values of a channel, its first, last and one between: near enough to its mean to centre
  // sums with, and no outlier.
  template <class T>
  double typical(size_t tensor, const T* first, int64_t channel) const {
    const auto at = [&](int64_t o, int64_t i) -> double {
      return load(first[o * outer_strides[tensor] + channel * channel_strides[tensor] + i]);
    };
    if (outer == 0) return 0;
    const double a = at(0, 0), b = at(outer / 2, inner / 2), c = at(outer - 1, inner - 1);
    return std::max(std::min(a, b), std::min(std::max(a, b), c));
  }

 private:
  Block block(int64_t tile, int64_t piece) const {
    if (planes) {
      const int64_t column = piece % pieces_a_run * kBlockSize;
      return {tile, piece / pieces_a_run, column, 1, std::min(kBlockSize, inner - column)};
    }
    const int64_t row = piece * block_rows;
    if (row < rows) return {tile, row, 0, std::min(block_rows, rows - row), lanes(tile)};
    return {tile, rows, 0, 1, rest_lanes};
  }

  // Strides of t as [outer, channels, inner], or false if it has none. order[split] is the channel dimension, or
  // what follows it when there is one channel.
  static bool view(const Tensor& t, const Tensor& dense, const std::vector<int64_t>& order, size_t split,
                   int64_t* outer_stride, int64_t* channel_stride) {
    const bool one_channel = dense.size(1) == 1;
    for (size_t i = one_channel ? split : split + 1; i < order.size(); ++i)
      if (t.stride(order[i]) != dense.stride(order[i])) return false;
    for (size_t i = 0; i + 1 < split; ++i)
      if (t.stride(order[i]) != t.stride(order[i + 1]) * t.size(order[i + 1])) return false;
    *outer_stride = split ? t.stride(order[split - 1]) : 0;
    *channel_stride = one_channel ? 0 : t.stride(1);
    return true;
  }

  void view_all(const Tensor& dense) {
    const auto order = memory_order(dense);
    size_t split = std::find(order.begin(), order.end(), 1) - order.begin();
    if (channels == 1) split = !order.empty() && order[0] == 0;
    for (size_t i = 0; i < order.size(); ++i)
      if (order[i] != 1) (i < split ? outer : inner) *= dense.size(order[i]);
    planes = inner >= kTileLanes;
    const int64_t row = channels * inner;
    for (auto& t : tensors) {
      int64_t outer_stride = 0, channel_stride = 0;
      bool usable = view(t, dense, order, split, &outer_stride, &channel_stride);
      if (outer == 1) outer_stride = row;
      if (channels == 1) channel_stride = inner;
      if (!planes) usable = usable && channel_stride == inner && (row >= kShortestRow || outer_stride == row);
      if (!usable) {
        t = dense_copy(t, dense);
        outer_stride = row;
        channel_stride = inner;
      }
      outer_strides.push_back(outer_stride);
      channel_strides.push_back(channel_stride);
    }
  }

  void cut_planes() {
    tile_lanes = 32;
    tiles = channels;
    row_strides = outer_strides;
    tile_strides = channel_strides;
    pieces_a_run = (inner + kBlockSize - 1) / kBlockSize;
    pieces = outer * pieces_a_run;
    pieces_a_segment = std::max<int64_t>(1, kSegmentSize / std::min(inner, kBlockSize));
  }

  void cut_lanes() {
    const int64_t row = channels * inner;
    const bool gapless = std::all_of(outer_strides.begin(), outer_strides.end(), [&](int64_t s) { return s == row; });
    int64_t merged = gapless ? std::max<int64_t>(1, kTileLanes / row) : 1;
    const int64_t even = 16 / std::gcd<int64_t>(row, 16);  // rows that fill whole vectors
    if (merged > even) merged -= merged % even;
    merged = std::min(merged, outer);
    row_lanes = merged * row;
    rows = outer / merged;
    rest_lanes = outer % merged * row;
    for (int64_t s : outer_strides) row_strides.push_back(s * merged);
    tile_lanes = row_lanes <= kTileLanes ? row_lanes : kTileLanes / inner * inner;
    tiles = (row_lanes + tile_lanes - 1) / tile_lanes;
    tile_strides.assign(tensors.size(), tile_lanes);
    block_rows = std::max<int64_t>(1, kBlockSize / tile_lanes);
    pieces = (rows + block_rows - 1) / block_rows + (rest_lanes > 0);
    pieces_a_segment = std::max<int64_t>(1, kSegmentSize / (block_rows * tile_lanes));
  }
};

}  // namespace fastnas::norm
