#pragma once

#include <bit>

#include "common/dtype.h"
#include "common/launch.cuh"

namespace fastnas {

// Elements of one 16-byte access, the widest that a thread can make.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// N neighbouring elements that travel as one access; their address has to be a multiple of its size.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <int N, class T>
__device__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// nvcc 13.0 makes four stores of an assignment in these kernels, so 16 bytes are stored by name.
template <int N, class T>
__device__ void store_pack(T* p, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(pack) == 16) {
    const uint4 words = std::bit_cast<uint4>(pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

}  // namespace fastnas
