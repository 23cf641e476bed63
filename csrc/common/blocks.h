#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/layout.h"
#include "common/stream.h"
#include "common/weighted_sum.h"

namespace fastnas {

// One block of work: `n` elements from `column` on in run `row`; blocks are numbered 0, 1, ... by `index`.
struct Block {
  int64_t index, row, column, n;
};

inline int64_t blocks_per_row(const Rows& rows) { return (rows.run + kBlock - 1) / kBlock; }
inline int64_t block_count(const Rows& rows) { return rows.rows * blocks_per_row(rows); }

// Shares the blocks out among torch's threads. Each thread gets its own body, make_body(), with the scratch memory that
// it holds, and calls it as body(Block). Where blocks start does not depend on the number of threads, so neither does a
// sum made block by block. `streams` is how many tensors a block touches.
template <class MakeBody>
void for_each_block(const Rows& rows, int64_t streams, const MakeBody& make_body) {
  constexpr int64_t kElementsAThread = 1 << 16;  // less is not worth waking a thread for
  const int64_t per_row = blocks_per_row(rows), size = std::min(rows.run, kBlock);
  const int64_t grain = std::max<int64_t>(1, kElementsAThread / std::max<int64_t>(1, size * streams));
  torch::stable::parallel_for(0, block_count(rows), grain, [&](int64_t begin, int64_t end) {
    auto body = make_body();
    for (int64_t b = begin; b < end; ++b) {
      const int64_t column = (b % per_row) * kBlock;
      body(Block{b, b / per_row, column, std::min(kBlock, rows.run - column)});
    }
    end_of_stream();
  });
}

// Where a block starts in each tensor of some rows.
template <class T>
class Cursor {
 public:
  explicit Cursor(const Rows& rows) : strides_(rows.row_strides) {
    for (const auto& t : rows.tensors) base_.push_back(static_cast<T*>(t.data_ptr()));
  }
  FASTNAS_INLINE inline T* at(int64_t tensor, const Block& block) const {
    return base_[tensor] + block.row * strides_[tensor] + block.column;
  }

 private:
  std::vector<T*> base_;
  std::vector<int64_t> strides_;
};

// The values of a small tensor as A, in row-major order.
template <class A>
std::vector<A> host_values(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  std::vector<A> out(dense.numel());
  dispatch_floating(dense.scalar_type(), "weights", [&](auto tag) {
    using W = decltype(tag);
    const W* p = static_cast<const W*>(dense.data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<A>(load(p[i]));
  });
  return out;
}

}  // namespace fastnas
