#pragma once

#include <type_traits>

// Run-time choice of the instruction set. A kernel's inner loop is written once, as a lambda marked
// FASTNAS_INLINE, and vectorised(body) runs the copy of it that was compiled for this processor.
// Everything called inside has to be inlined to be compiled for that instruction set: mark it FASTNAS_INLINE
// too. Under nvcc what is marked serves the GPU as well.
#ifdef __CUDACC__
#define FASTNAS_INLINE __attribute__((always_inline)) __host__ __device__
#else
#define FASTNAS_INLINE __attribute__((always_inline))
#endif

namespace fastnas {

enum class Isa { kBaseline, kAvx2, kAvx512 };

template <Isa chosen>
using IsaConstant = std::integral_constant<Isa, chosen>;

// A body that takes an argument is told as a constant for what it is compiled.
template <Isa chosen, class Body>
FASTNAS_INLINE inline void run_for(const Body& body) {
  if constexpr (std::is_invocable_v<const Body&, IsaConstant<chosen>>) {
    body(IsaConstant<chosen>{});
  } else {
    body();
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

inline Isa isa() {
  static const Isa found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
    return Isa::kBaseline;
  }();
  return found;
}

template <class Body>
__attribute__((noinline, target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))) void
run_avx512(const Body& body) {
  run_for<Isa::kAvx512>(body);
}

template <class Body>
__attribute__((noinline, target("avx2,fma"))) void run_avx2(const Body& body) {
  run_for<Isa::kAvx2>(body);
}

template <class Body>
inline void vectorised(const Body& body) {
  switch (isa()) {
    case Isa::kAvx512:
      return run_avx512(body);
    case Isa::kAvx2:
      return run_avx2(body);
    default:
      return run_for<Isa::kBaseline>(body);
  }
}

#else

template <class Body>
inline void vectorised(const Body& body) {
  run_for<Isa::kBaseline>(body);
}

#endif

}  // namespace fastnas
