#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

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

inline int64_t chunk_count(int64_t pieces) {
  return std::max<int64_t>(1, std::min<int64_t>(pieces, torch::stable::get_num_threads()));
}

}  // namespace fastnas
