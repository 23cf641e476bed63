#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/simd.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastnas {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Storage of the two half-width types. Their conversions are branch-free integer arithmetic, which the
// compiler vectorises at every width; those of torch's own types are not vectorised by GCC 12. A GPU has instructions
// for them.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Sums run in float, in double for double.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

FASTNAS_INLINE inline float load(float v) { return v; }
FASTNAS_INLINE inline double load(double v) { return v; }
FASTNAS_INLINE inline float load(BFloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

// The multiplication rescales normal numbers and normalises subnormal ones.
FASTNAS_INLINE inline float load(Half v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = (uint32_t{v.bits} & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>((uint32_t{v.bits} & 0x7fffu) << 13) * 0x1.0p+112f;
  const uint32_t infinite = scaled >= 65536.0f ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
#endif
}

FASTNAS_INLINE inline void store(float* p, float v) { *p = v; }
FASTNAS_INLINE inline void store(double* p, double v) { *p = v; }

// Rounds to nearest even.
FASTNAS_INLINE inline void store(BFloat16* p, float v) {
#ifdef __CUDA_ARCH__
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
  const uint32_t w = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((w & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

// Rounds to nearest even; results below the normal range are rounded by adding 0.5 in float.
FASTNAS_INLINE inline void store(Half* p, float v) {
#ifdef __CUDA_ARCH__
  p->bits = __half_as_ushort(__float2half_rn(v));
#else
  const uint32_t w = std::bit_cast<uint32_t>(v), sign = (w >> 16) & 0x8000u, magnitude = w & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p->bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
#endif
}

// Calls body(T{}) with the element type of `dtype`; any other dtype is an error that names `op`.
template <class Body>
void dispatch_floating(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastnas
