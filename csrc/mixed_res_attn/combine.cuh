// SPDX-License-Identifier: Apache-2.0
// The combine kernel: merges the splits of the tiles of the last partial wave, one warp for each row.
#pragma once

#include "mixed_res_attn/epilogue.cuh"

namespace specedit::attn {

template <typename T, int D, int BLOCK_M>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ Params p) {
  constexpr int kColumnsOfLane = D / 32;
  struct __align__(4 * kColumnsOfLane) Values {
    float x[kColumnsOfLane];
  };
  sm90::launch_dependent_grids();
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.y * kCombineRows + threadIdx.x / 32;
  SplitTile tile;
  if (p.plan.planned) tile = split_tile_of_host_plan<BLOCK_M>(p, blockIdx.x);
  sm90::wait_on_dependent_grids();
  if (!p.plan.planned) tile = p.split_tiles[blockIdx.x];
  const int num_splits = tile.num_splits;
  if (num_splits == 0 || row >= tile.rows) return;
  const auto place = [&](int split) {
    const int slot = split < 2 ? split * tile.partial_wave_tiles + blockIdx.x
                               : 2 * tile.partial_wave_tiles + tile.streamk_cta + split - 2;
    return static_cast<int64_t>(slot) * BLOCK_M + row;
  };
  const auto read = [&](int split) {
    return *reinterpret_cast<const Values*>(p.out_partial + place(split) * D + lane * kColumnsOfLane);
  };
  // Results are loaded before it is known whether their weight is 0, those of the first splits all at once.
  constexpr int kLoadsAtOnce = 4;
  Values values[kLoadsAtOnce];
#pragma unroll
  for (int split = 0; split < kLoadsAtOnce; ++split) {
    if (split < num_splits) values[split] = read(split);
  }
  // Lane i: row maximum and sum of split i. A split without keys for this row has sum 0.
  const float2 mine = lane < num_splits ? p.max_sum_partial[place(lane)] : make_float2(-INFINITY, 0.0f);
  int offset;
  length_of(p.q_lens, p.cu_seqlens_q, tile.batch, p.max_seqlen_q, p.rows_q, offset);
  const int slot = tile.m_block * BLOCK_M + row;
  const int64_t out_row = out_row_of(p, tile.batch, offset, slot);
  float max = mine.y == 0.0f ? -INFINITY : mine.x;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
  // If no split has a key, all weights are 0. NaN is kept.
  const float weight = mine.y == 0.0f ? 0.0f : mine.y * exp2f((mine.x - max) * (kIsFp8<T> ? 1.0f : kLog2E));
  float weight_sum = 0.0f;
  float sum[kColumnsOfLane] = {};
  // A split without keys for this row has weight 0: what is in its memory is not used.
  const auto add = [&](int split, const Values& split_values) {
    const float w = __shfl_sync(0xffffffffu, weight, split);
    weight_sum += w;
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) sum[i] = w == 0.0f ? sum[i] : fmaf(w, split_values.x[i], sum[i]);
  };
#pragma unroll
  for (int split = 0; split < kLoadsAtOnce; ++split) {
    if (split < num_splits) add(split, values[split]);
  }
  for (int split = kLoadsAtOnce; split < num_splits; ++split) add(split, read(split));
  if (lane == 0) {
    *lse_ptr(p, tile.batch, tile.head, offset + slot) = lse_of<T>(max, weight_sum);
  }
  if (out_row < 0) return;
  const float inverse = weight_sum == 0.0f ? 0.0f : 1.0f / weight_sum;
  uint32_t word[kColumnsOfLane / 2];
#pragma unroll
  for (int i = 0; i < kColumnsOfLane / 2; ++i) {
    word[i] = sm90::pack<OutputOf<T>>(sum[2 * i] * inverse, sum[2 * i + 1] * inverse);
  }
  OutputOf<T>* target = static_cast<OutputOf<T>*>(p.out) +
      (p.cu_seqlens_q == nullptr ? tile.batch * p.out_strides.batch : 0) +
      out_row * p.out_strides.row + tile.head * p.out_strides.head + lane * kColumnsOfLane;
  if constexpr (kColumnsOfLane == 4) *reinterpret_cast<uint2*>(target) = make_uint2(word[0], word[1]);
  else *reinterpret_cast<uint32_t*>(target) = word[0];
}

}  // namespace specedit::attn
