#pragma once

#include <cstdint>

#include "common/simd.h"

namespace fastnas {

// Philox4x32-10 (Salmon et al., 2011): words [4 i, 4 i + 4) of the output are the block with counter first +
// i (its low and high 32 bits, then zeros) and key `seed` (low, high), for i < blocks.
FASTNAS_INLINE inline void philox_blocks(uint32_t* words, int64_t first, int64_t blocks, uint64_t seed) {
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    const uint64_t counter = static_cast<uint64_t>(first + i);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c0 = n0;
      c1 = static_cast<uint32_t>(p1);
      c2 = n2;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

}  // namespace fastnas
