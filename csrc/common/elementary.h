#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "common/simd.h"

namespace fastnas {

// Elementary functions that the compiler vectorises in float; double goes to the C library.

FASTNAS_INLINE inline double log_positive(double x) { return std::log(x); }
FASTNAS_INLINE inline double exp_nonpositive(double x) { return std::exp(x); }

// log x of a normal positive x = 2^e m with m in [sqrt(1/2), sqrt(2)). With f = m - 1 and s = f / (2 + f),
// |s| < 0.172, log m = 2 atanh s = 2 s + s R, R = 2/3 s^2 + 2/5 s^4 + ..., and 2 s = f - f^2/2 + s f^2/2
// keeps the leading f exact.
FASTNAS_INLINE inline float log_positive(float x) {
  const uint32_t shifted = std::bit_cast<uint32_t>(x) - 0x3f3504f3u;  // sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
  const float r = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9 + z * (2.0f / 11)))));
  constexpr float kLn2High = 0x1.62ep-1f;  // e * kLn2High is exact
  constexpr float kLn2Low = static_cast<float>(std::numbers::ln2 - 0x1.62ep-1);
  return e * kLn2High + (f - (half - (s * (half + r) + e * kLn2Low)));
}

// exp x for x <= 0 or NaN: 2^n times the Taylor series of the rest, |rest| <= ln(2) / 2; 0 below -87.
FASTNAS_INLINE inline float exp_nonpositive(float x) {
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const float clipped = x < -87.0f ? -87.0f : x;
  const float shifted = clipped * std::numbers::log2e_v<float> + kShift, n = shifted - kShift;
  const float r = (clipped - n * 0x1.62ep-1f) - n * static_cast<float>(std::numbers::ln2 - 0x1.62ep-1);
  const float series =
      1.0f + (r + r * r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r / 5040))))));
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;  // the bits of 2^n
  return x < -87.0f ? 0.0f : series * std::bit_cast<float>(power);
}

// Gumbel noise -log(-log u) for u = (bits / 2^9 + 1/2) 2^-23, which is never 0 or 1.
template <class A>
FASTNAS_INLINE inline A gumbel(uint32_t bits) {
  const A u = (static_cast<A>(static_cast<int32_t>(bits >> 9)) + A(0.5)) * A(0x1.0p-23);
  return -log_positive(-log_positive(u));
}

}  // namespace fastnas
