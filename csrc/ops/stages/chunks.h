#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/simd.h"
#include "ops/stages/map.h"

namespace fastnas {

// Shares the pieces of work (images) out among torch's threads: body(chunk, begin, end) for each chunk of them. The
// sums that a chunk makes depend on where it begins, so they are the same for the same number of threads.
template <class Body>
void for_each_chunk(int64_t pieces, int64_t chunks, const Body& body) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      body(chunk, pieces * chunk / chunks, pieces * (chunk + 1) / chunks);
  });
}

// A chunk of the pairs (image, source), images outermost, so that every chunk has its share of each source; but taken
// source by source, whose weights stay in the cache meanwhile: body(source, image).
template <class Body>
FASTNAS_INLINE inline void for_each_pair(int64_t sources, int64_t begin, int64_t end, const Body& body) {
  const auto first_image = [&](int64_t pair, int64_t source)
                               FASTNAS_INLINE { return std::max<int64_t>(0, pair - source + sources - 1) / sources; };
  for (int64_t source = 0; source < sources; ++source)
    for (int64_t image = first_image(begin, source); image < first_image(end, source); ++image) body(source, image);
}

// Shares out rows of `length` values, of which a few thousand are worth waking a thread for: body(begin, end), compiled
// for this processor.
template <class Body>
void for_each_row_of(int64_t rows, int64_t length, const Body& body) {
  constexpr int64_t kValuesAThread = 1 << 13;
  torch::stable::parallel_for(
      0, rows, ceil_div(kValuesAThread, std::max<int64_t>(1, length)),
      [&](int64_t begin, int64_t end) { vectorised([&]() FASTNAS_INLINE { body(begin, end); }); });
}

inline int64_t chunk_count(int64_t pieces) {
  return std::max<int64_t>(1, std::min<int64_t>(pieces, torch::stable::get_num_threads()));
}

}  // namespace fastnas
