// SPDX-License-Identifier: Apache-2.0
// What the softmax of e4m3 numbers takes of each key: its bias, and the scales of its rows of k and v where they come by
// row. A product of e4m3 numbers has no room for a bias: columns as those of producer_bias.cuh would hold 4 bits each.
#pragma once

#include <cfloat>
#include <cmath>

#include "mixed_res_attn/tile_scheduler.cuh"

namespace specedit::attn {

// A bias in the unit of exponents. A finite one stays finite: -inf stands for no key.
__device__ inline float exponent_of_bias(float bias) {
  const float x = bias * kLog2E;
  return fabsf(x) == INFINITY && fabsf(bias) != INFINITY ? copysignf(FLT_MAX, x) : x;
}

// The producer warp of these tables. Keys past the last have bias -inf: there is no other masking.
template <typename T, int D>
__device__ void produce_key_tables(const Params& p, SharedStorage<T, D, false>& s) {
  using Traits = KernelTraits<T, D, false>;
  constexpr int kKeysOfLane = Traits::kBlockN / 32;
  static_assert(Traits::kBlockN % 32 == 0);
  const int lane = threadIdx.x % 32;
  PipelineState<Traits::kStages> pipe;
  WorkTile work;
  for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
    const int kv_head = work.head / p.qhead_per_khead;
    const int seqlen_k = s.seqlen_k[work.batch];
    const float* bias = p.bias == nullptr ? nullptr : p.bias + work.batch * p.bias_batch_stride;
    const float* k_scale = p.k_scale + work.batch * p.k_scale_strides.batch + kv_head * p.k_scale_strides.head;
    const float* v_scale = p.v_scale + work.batch * p.v_scale_strides.batch + kv_head * p.v_scale_strides.head;
    float largest = FLT_MIN;  // scale of v so far; it divides
    float biases[kKeysOfLane];
    float k_scales[kByRow<T> ? kKeysOfLane : 1];
    float v_scales[kByRow<T> ? kKeysOfLane : 1];
    const auto look_up = [&](int n_block) {
#pragma unroll
      for (int i = 0; i < kKeysOfLane; ++i) {
        const int key = n_block * Traits::kBlockN + i * 32 + lane;
        const bool exists = key < seqlen_k;
        biases[i] = !exists ? -INFINITY : bias == nullptr ? 0.0f : bias[key];
        if constexpr (kByRow<T>) {
          k_scales[i] = exists ? k_scale[key * p.k_scale_strides.row] : 0.0f;
          v_scales[i] = exists ? v_scale[key * p.v_scale_strides.row] : 0.0f;
        }
      }
    };
    if (work.n_block_begin < work.n_block_end) look_up(work.n_block_begin);
    for (int n_block = work.n_block_begin; n_block < work.n_block_end; ++n_block) {
      const float first = exponent_of_bias(__shfl_sync(0xffffffffu, biases[0], 0));
      // Beside a far bias the consumer takes the difference of scores, not one multiply-add (see kNear).
      bool same = first == -INFINITY || fabsf(first) <= kNear;
#pragma unroll
      for (int i = 0; i < kKeysOfLane; ++i) {
        biases[i] = exponent_of_bias(biases[i]);
        same = same && biases[i] == first;
        if constexpr (kByRow<T>) largest = fmaxf(largest, v_scales[i]);
      }
      same = __all_sync(0xffffffffu, same);
      if constexpr (kByRow<T>) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        }
      }
      sm90::mbarrier_wait(&s.k_empty[pipe.stage], pipe.phase ^ 1);
      __syncwarp();
      // Written even if all are one number: rows with far scores read them.
#pragma unroll
      for (int i = 0; i < kKeysOfLane; ++i) {
        s.key_table(pipe.stage, kKeyBias)[i * 32 + lane] = biases[i];
        if constexpr (kByRow<T>) {
          s.key_table(pipe.stage, kKeyScale)[i * 32 + lane] = k_scales[i];
          s.key_table(pipe.stage, kValueScale)[i * 32 + lane] = v_scales[i] * (1.0f / largest);
        }
      }
      if (lane == 0) {
        s.bias_flags[pipe.stage][0] = same ? 0 : kBiasInTable;
        s.bias_constant[pipe.stage][0] = first;
        if constexpr (kByRow<T>) s.bias_constant[pipe.stage][1] = largest;
      }
      __syncwarp();
      if (lane == 0) sm90::mbarrier_arrive(&s.k_full[pipe.stage]);
      pipe.advance();
      if (n_block + 1 < work.n_block_end) look_up(n_block + 1);
    }
  }
}

}  // namespace specedit::attn
