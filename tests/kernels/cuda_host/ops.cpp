// The CUDA sources as a library for the host, for tests: csrc/ops/cuda/*.cu as they are, launchers included, registered
// for the CPU in a namespace of their own.

#include <torch/csrc/stable/library.h>

#include "common/launch.cuh"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastnas_cuda_on_host, CPU, m, C10_UID)

#include FASTNAS_SOURCE
