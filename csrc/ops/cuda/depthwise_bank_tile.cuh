#pragma once

// Tiles of a map in shared memory, and who computes what of them. A block takes `channels` planes of one image and, of
// each, rows by columns; a thread takes kRun neighbouring rows of one column, so that what it reads of a column serves
// several sums, and lanes lie side by side in memory: columns in NCHW, channels in channels last.

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.cuh"

namespace fastnas::bank {

constexpr int kThreads = 256;
constexpr int kRun = 4;          // rows of a thread
constexpr int kMaxBranches = 8;  // of one launch: more take several

template <class A>
constexpr int kTile = 32768 / sizeof(A);  // with the taps 40 KB of shared memory: five blocks on a multiprocessor
template <class A>
constexpr int kTaps = 8192 / sizeof(A);

// Elements from one image, channel, row and column to the next.
struct Strides {
  int64_t image, channel, row, column;
};

struct Sizes {
  int images, channels, rows, columns;
};

// How a map is cut; `rows` is a multiple of kRun.
struct Cut {
  int channels, rows, columns;
  bool last;  // channels last: lanes run over channels first
};

FASTNAS_INLINE inline int tiles(int size, int tile) { return (size + tile - 1) / tile; }

// The block's tile of a map, and the thread's place in it.
struct Spot {
  int image, channel0, row0, column0;  // of the tile
  int channel, row, column;            // in the tile
  bool inside;                         // of the tile and, but for its rows, of the map

  __device__ Spot(const Sizes& map, const Cut& cut, int64_t tile) {
    const int across = tiles(map.columns, cut.columns), down = tiles(map.rows, cut.rows);
    const int deep = tiles(map.channels, cut.channels);
    column0 = static_cast<int>(tile % across) * cut.columns;
    row0 = static_cast<int>(tile / across % down) * cut.rows;
    channel0 = static_cast<int>(tile / across / down % deep) * cut.channels;
    image = static_cast<int>(tile / across / down / deep);
    const int runs = cut.rows / kRun;
    int t = threadIdx.x;
    if (cut.last) {
      channel = t % cut.channels;
      column = t / cut.channels % cut.columns;
      t = t / cut.channels / cut.columns;
      row = t % runs * kRun;
      inside = t < runs;
    } else {
      column = t % cut.columns;
      row = t / cut.columns % runs * kRun;
      channel = t / cut.columns / runs;
      inside = channel < cut.channels;
    }
    inside = inside && channel0 + channel < map.channels && column0 + column < map.columns;
  }
};

// A part of a map in shared memory, zero outside the map: element (channel, row, column) is at `channel` c + `row` y +
// `column` x.
template <class A>
struct Part {
  A* values;
  int channel, row, column;

  // The rows by columns from (row0, column0) of the map at `from`, of the tile's channels. All threads take part.
  template <class T>
  __device__ Part(A* memory, const T* from, const Strides& strides, const Sizes& map, const Spot& spot, const Cut& cut,
                  int row0, int column0, int rows, int columns)
      : values(memory) {
    channel = cut.last ? 1 : rows * columns;
    row = cut.last ? columns * cut.channels : columns;
    column = cut.last ? cut.channels : 1;
    const T* image = from + spot.image * strides.image;
    for (int i = threadIdx.x; i < cut.channels * rows * columns; i += kThreads) {
      const int c = cut.last ? i % cut.channels : i / (rows * columns);
      const int pixel = cut.last ? i / cut.channels : i % (rows * columns);
      const int y = row0 + pixel / columns, x = column0 + pixel % columns;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns && spot.channel0 + c < map.channels;
      values[i] =
          inside ? load(image[(spot.channel0 + c) * strides.channel + y * strides.row + x * strides.column]) : A(0);
    }
  }

  __device__ const A* at(int c, int y, int x) const { return values + c * channel + y * row + x * column; }
};

// The weights [channels, 1, size, size] of the tile's channels in shared memory: tap t of channel c is at [t channels +
// c]. All threads take part; they have to be done with the taps before.
template <class A>
__device__ void load_taps(A* taps, const A* weights, int size, const Sizes& map, const Spot& spot, const Cut& cut) {
  for (int i = threadIdx.x; i < cut.channels * size * size; i += kThreads) {
    const int c = i % cut.channels, t = i / cut.channels;
    taps[i] = spot.channel0 + c < map.channels ? weights[(spot.channel0 + c) * int64_t{size} * size + t] : A(0);
  }
}

}  // namespace fastnas::bank
