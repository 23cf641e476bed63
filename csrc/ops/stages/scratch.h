#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common/vector.h"

namespace fastnas {

// What a thread used as scratch memory and will need again at the next call: to give such blocks back to the allocator
// every time costs more than it looks, because it then tidies all its small ones.
class ScratchBlocks {
 public:
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    size_t size = 0;
  };

  static Block take(size_t size) {
    auto& blocks = free_blocks();
    const auto fits = [&](const Block& block) { return block.size >= size && block.size <= 2 * size; };
    const auto found = std::find_if(blocks.begin(), blocks.end(), fits);
    if (found == blocks.end()) return {std::unique_ptr<std::byte[]>(new std::byte[size]), size};
    Block block = std::move(*found);
    blocks.erase(found);
    return block;
  }

  static void give_back(Block block) {
    auto& blocks = free_blocks();
    if (blocks.size() == kMost) blocks.erase(blocks.begin());
    blocks.push_back(std::move(block));
  }

 private:
  static constexpr size_t kMost = 24;  // blocks a thread
  static std::vector<Block>& free_blocks() {
    thread_local std::vector<Block> blocks;
    return blocks;
  }
};

// Scratch memory that starts at a cache line and has room behind its end for whole vectors; zeroed where what the loops
// leave out is read.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count, bool zeroed = true) {
    const int64_t size = count + kSlack * kLanes<T>;
    block_ = ScratchBlocks::take(size * sizeof(T) + kLine);
    const auto address = reinterpret_cast<uintptr_t>(block_.memory.get());
    data_ = reinterpret_cast<T*>(address + (kLine - address % kLine) % kLine);
    if (zeroed) std::fill_n(data_, size, T(0));
  }
  Scratch(Scratch&&) = default;
  ~Scratch() {
    if (block_.memory) ScratchBlocks::give_back(std::move(block_));
  }
  T* data() const { return data_; }

 private:
  static constexpr int64_t kSlack = 16;  // vectors
  static constexpr uintptr_t kLine = 64;
  ScratchBlocks::Block block_;
  T* data_;
};

}  // namespace fastnas
