#pragma once

#include <optional>
#include <vector>

#include "ops/stages/conv_stage_plan.h"

// The two passes of conv_stage on plain memory; meaning: fastnas/ops/stages/conv_stage.py. `xs` are the sources,
// `norms` [sources, 2, C] or null. Threads share out the images. An image goes through all its branches in scratch
// memory that fits the second-level cache: only x is read and z written, and backward g, z, x read and dx written.

namespace fastnas {

// z [outputs, B, H', W', O]; stats [outputs, 2, O], or null where they are not wanted.
template <class T>
void convolve(const Plan<T>& plan, const std::vector<View<T>>& xs, const T* norms, T* z, T* stats);

// coef [outputs, 4, O]; dx [sources, B, H, W, C], dots [sources, 2, C] and dw [plan.weights], null where not wanted.
// `base`, of one source only, is added to dx. Inputs that are normalised have to be dense.
template <class T>
void convolve_backward(const Plan<T>& plan, const std::vector<View<T>>& gs, const std::vector<View<T>>& zs,
                       const T* coef, const std::vector<View<T>>& xs, const T* norms,
                       const std::optional<View<T>>& base, T* dx, T* dots, T* dw);

}  // namespace fastnas
