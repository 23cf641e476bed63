#pragma once

#include <utility>

#include "ops/depthwise_bank_taps.h"

// Blocks of floats turned in registers: what moves maps into lanes and back.

namespace fastnas::bank {

// max(0, v); NaN passes, as in torch.relu.
template <bool Relu, class A>
FASTNAS_INLINE inline A activate(A v) {
  return Relu && v <= A(0) ? A(0) : v;
}

template <int Width>
struct RowOf {
  typedef float type __attribute__((vector_size(4 * Width)));
};
template <int Width>
using Row = typename RowOf<Width>::type;

// Two rows exchange the off-diagonal of each 2 x 2 block of pieces of `Piece` values.
template <int Piece, int Width, int... I>
FASTNAS_INLINE inline void exchange(Row<Width>& a, Row<Width>& b, std::integer_sequence<int, I...>) {
  const Row<Width> upper = __builtin_shufflevector(a, b, (I & Piece ? Width + I - Piece : I)...);
  b = __builtin_shufflevector(a, b, (I & Piece ? Width + I : I + Piece)...);
  a = upper;
}

template <int Piece, int Rows, int Granule>
FASTNAS_INLINE inline void exchange_all(Row<Rows * Granule> (&v)[Rows]) {
  constexpr int kWidth = Rows * Granule, kApart = Piece / Granule;
  for (int i = 0; i < Rows; ++i)
    if (!(i & kApart)) exchange<Piece, kWidth>(v[i], v[i + kApart], std::make_integer_sequence<int, kWidth>{});
  if constexpr (Piece > Granule) exchange_all<Piece / 2, Rows, Granule>(v);
}

// Granule k of to[j] = granule j of from[k], activated: a Rows x Rows matrix of Granule floats, transposed.
template <int Rows, int Granule, bool Relu>
FASTNAS_INLINE inline void transpose(float* const (&to)[Rows], const float* const (&from)[Rows]) {
  using V = Row<Rows * Granule>;
  V v[Rows];
  for (int k = 0; k < Rows; ++k) {
    v[k] = get<V>(from[k]);
    if (Relu) v[k] = v[k] <= 0.0f ? V{} : v[k];
  }
  exchange_all<Rows * Granule / 2, Rows, Granule>(v);
  for (int k = 0; k < Rows; ++k) put<V>(to[k], v[k]);
}

}  // namespace fastnas::bank
