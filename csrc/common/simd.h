#pragma once

// The library is compiled once for each instruction set (setup.py), and fastnas/_ext.py loads the one for the processor
// at hand. A kernel's inner loop is a lambda marked FASTNAS_INLINE, and vectorised(body) compiles it for the library's
// instruction set. Everything called inside has to be inlined to be compiled for it too: mark it FASTNAS_INLINE. Under
// nvcc what is marked serves the GPU as well.
#ifdef __CUDACC__
#define FASTNAS_INLINE __attribute__((always_inline)) __host__ __device__
#else
#define FASTNAS_INLINE __attribute__((always_inline))
#endif

#if defined(FASTNAS_AVX512)
#define FASTNAS_TARGET , target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#elif defined(FASTNAS_AVX2)
#define FASTNAS_TARGET , target("avx2,fma")
#else
#define FASTNAS_TARGET
#endif

namespace fastnas {

enum class Isa { kBaseline, kAvx2, kAvx512 };

#if defined(FASTNAS_AVX512)
constexpr Isa kIsa = Isa::kAvx512;
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(FASTNAS_AVX2)
constexpr Isa kIsa = Isa::kAvx2;
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr Isa kIsa = Isa::kBaseline;
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class Body>
__attribute__((noinline FASTNAS_TARGET)) void vectorised(const Body& body) {
  body();
}

}  // namespace fastnas
