#pragma once

#include <vector>

#include "ops/stages/map.h"

// The two ops of node_sum on plain memory; meaning: fastnas/ops/stages/node_sum.py.

namespace fastnas {

// coef [terms, 2, C]; `out` is of the map `map`.
template <class T>
void sum_terms(T* out, const Map& map, const std::vector<View<T>>& terms, const T* coef, bool accumulate);

// means: C numbers a term, `mean_step` apart; out [terms, 2, C].
template <class T>
void dot_terms(const std::vector<View<T>>& gs, const std::vector<View<T>>& terms, const T* means, int64_t mean_step,
               T* out);

}  // namespace fastnas
