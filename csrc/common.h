// SPDX-License-Identifier: Apache-2.0
// What every launcher needs from torch: the current stream, errors, allocation. Stable ABI only.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

// Defined in libtorch_cuda. Weak, so that the extension also loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace specedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("specedit: expected a torch build with CUDA, got a CPU-only one");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype, std::nullopt, like.device());
}

}  // namespace specedit
