// SPDX-License-Identifier: Apache-2.0
// Threshold, dilation, uniform tokens and the stable permutation in one launch: one CTA for each batch entry.
#include "select_tokens/select_tokens.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace specedit {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;
// Two flags of a token in shared memory, within the 48 KB that need no attribute.
constexpr int64_t kMaxSharedTokens = 22 * 1024;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Exclusive prefix sum of `value` over the CTA's threads; `sum_of_all` receives the sum.
__device__ int exclusive_prefix_sum(int value, int* sum_of_all) {
  __shared__ int warp_sums[kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int sum = lane < static_cast<int>(blockDim.x) / kWarp ? warp_sums[lane] : 0;
    for (int step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  *sum_of_all = warp_sums[kWarp - 1];
  return inclusive - value + (warp > 0 ? warp_sums[warp - 1] : 0);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) select_tokens_kernel(
    const T* __restrict__ score,
    int64_t score_stride,
    uint8_t* mask,
    int32_t* index,
    int32_t* __restrict__ count,
    int grid_h,
    int grid_w,
    float threshold,
    int dilation,
    int uniform_stride,
    bool flags_in_smem) {
  extern __shared__ uint8_t shared[];
  const int tokens = grid_h * grid_w;
  score += blockIdx.x * score_stride;
  mask += static_cast<int64_t>(blockIdx.x) * tokens;
  index += static_cast<int64_t>(blockIdx.x) * tokens;
  // Flags of a large grid are in the outputs: the final ones in `mask`, those dilated along rows in `index`, which is
  // written after their last use.
  uint8_t* flags = flags_in_smem ? shared : mask;
  uint8_t* dilated_rows = flags_in_smem ? shared + tokens : reinterpret_cast<uint8_t*>(index);

  const auto is_uniform = [&](int row, int column) {
    return uniform_stride > 0 && row % uniform_stride == 0 && column % uniform_stride == 0;
  };
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const float value = to_float(score[i]);
    const bool above = value > threshold || value != value;
    flags[i] = above || (dilation == 0 && is_uniform(i / grid_w, i % grid_w));
  }
  __syncthreads();
  if (dilation > 0) {
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
      const int row_start = i - i % grid_w;
      const int last = min(i + dilation, row_start + grid_w - 1);
      uint8_t any = 0;
      for (int j = max(i - dilation, row_start); j <= last; ++j) any |= flags[j];
      dilated_rows[i] = any;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
      const int row = i / grid_w;
      const int column = i % grid_w;
      const int last = min(row + dilation, grid_h - 1);
      uint8_t any = is_uniform(row, column);
      for (int y = max(row - dilation, 0); y <= last; ++y) any |= dilated_rows[y * grid_w + column];
      flags[i] = any;
    }
    __syncthreads();
  }
  if (flags_in_smem) {
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) mask[i] = flags[i];
  }

  // Each thread gives the ranks of a run of consecutive tokens.
  const int run = (tokens + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * run, tokens);
  const int end = min(begin + run, tokens);
  int selected = 0;
  for (int i = begin; i < end; ++i) selected += flags[i];
  int num_selected;
  int rank = exclusive_prefix_sum(selected, &num_selected);
  for (int i = begin; i < end; ++i) {
    const bool is_selected = flags[i];
    index[is_selected ? rank : num_selected + i - rank] = i;
    rank += is_selected;
  }
  if (threadIdx.x == 0) count[blockIdx.x] = num_selected;
}

template <typename T>
void launch(
    const Tensor& score, Tensor& mask, Tensor& index, Tensor& count, int grid_h, int grid_w, float threshold,
    int dilation, int uniform_stride) {
  const int64_t tokens = score.size(1);
  const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, (tokens + kWarp - 1) / kWarp * kWarp));
  const bool flags_in_smem = tokens <= kMaxSharedTokens;
  select_tokens_kernel<T><<<score.size(0), threads, flags_in_smem ? 2 * tokens : 0, current_stream(score)>>>(
      static_cast<const T*>(score.data_ptr()),
      score.stride(0),
      static_cast<uint8_t*>(mask.data_ptr()),
      static_cast<int32_t*>(index.data_ptr()),
      static_cast<int32_t*>(count.data_ptr()),
      grid_h,
      grid_w,
      threshold,
      dilation,
      uniform_stride,
      flags_in_smem);
  check_cuda(cudaGetLastError(), "select_tokens");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_tokens(
    const Tensor& score, int64_t grid_h, int64_t grid_w, double threshold, int64_t dilation, int64_t uniform_stride) {
  const torch::stable::accelerator::DeviceGuard guard(score.get_device_index());
  const int64_t batch = score.size(0);
  const int64_t tokens = score.size(1);
  Tensor mask = empty_on(score, {batch, tokens}, ScalarType::Bool);
  Tensor index = empty_on(score, {batch, tokens}, ScalarType::Int);
  Tensor count = empty_on(score, {batch}, ScalarType::Int);
  if (batch > 0) {
    // Larger values have the same effect as the longer side of the grid.
    const int64_t longest = std::max(grid_h, grid_w);
    const int radius = static_cast<int>(std::min(dilation, longest));
    const int stride = static_cast<int>(std::min(uniform_stride, longest));
    const auto run = [&](auto launcher) {
      launcher(score, mask, index, count, grid_h, grid_w, static_cast<float>(threshold), radius, stride);
    };
    switch (score.scalar_type()) {
      case ScalarType::Float: run(launch<float>); break;
      case ScalarType::Half: run(launch<__half>); break;
      case ScalarType::BFloat16: run(launch<__nv_bfloat16>); break;
      default: throw std::invalid_argument("select_tokens: score: expected bf16, fp16 or fp32");
    }
  }
  return {mask, index, count};
}

}  // namespace specedit
