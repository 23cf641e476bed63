#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

// tests/kernels/cuda_host/common/launch.cuh takes the place of this file where kernels run on the host.

namespace fastnas {

using torch::stable::Tensor;

// Starts `kernel` on the device of `on`, on the stream that is current there.
template <class... Parameters>
void launch(const Tensor& on, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const std::type_identity_t<Parameters>&... arguments) {
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace fastnas
