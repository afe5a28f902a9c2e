// SPDX-License-Identifier: Apache-2.0
// The launch of the attention on sm_90a. The kernels stand apart, so that a test can run them without a GPU.
#pragma once

#include "common.h"
#include "mixed_res_attn/kernel.cuh"

namespace specedit::attn {

template <typename T, int D, bool GATHER>
void launch(const Params& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<T, D, GATHER>);
  static_assert(kBytes <= 232448);
  check_cuda(
      cudaFuncSetAttribute(attention_kernel<T, D, GATHER>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "mixed_res_attn");
  // Both kernels may start while the one before still runs: they wait for its end by themselves.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, attention_kernel<T, D, GATHER>, p), "mixed_res_attn");
  if (p.part_out != nullptr) {
    config.gridDim = dim3(p.most_cut, kBlockM / 8);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = 0;
    check_cuda(cudaLaunchKernelEx(&config, join_kernel<T, D>, p), "mixed_res_attn");
  }
}

}  // namespace specedit::attn
