// SPDX-License-Identifier: Apache-2.0
// The launch of the attention on sm_90a. It is apart from the kernels, so that the CPU emulation can include these.
#pragma once

#include "common.h"
#include "mixed_res_attn/kernel.cuh"

namespace specedit::attn {

template <typename T, int D, bool GATHER>
void launch(const Params& p, int num_ctas, cudaStream_t stream) {
  using Traits = KernelTraits<T, D, GATHER>;
  constexpr int kSmemBytes = sizeof(SharedStorage<T, D, GATHER>);
  static_assert(kSmemBytes <= 232448);
  check_cuda(
      cudaFuncSetAttribute(
          mixed_res_attn_kernel<T, D, GATHER>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
      "mixed_res_attn");
  // Programmatic dependent launch: both kernels may start while the grid before still runs, and wait for it themselves.
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_ctas);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = kSmemBytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, mixed_res_attn_kernel<T, D, GATHER>, p), "mixed_res_attn");
  if (p.out_partial != nullptr) {
    config.gridDim = dim3(p.max_split_tiles, Traits::kBlockM / kCombineRows);
    config.blockDim = dim3(kCombineThreads);
    config.dynamicSmemBytes = 0;
    check_cuda(cudaLaunchKernelEx(&config, combine_kernel<T, D, Traits::kBlockM>, p), "mixed_res_attn");
  }
}

}  // namespace specedit::attn
