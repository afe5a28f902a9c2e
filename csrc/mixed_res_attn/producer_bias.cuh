// SPDX-License-Identifier: Apache-2.0
// Biases of K tiles. Where all biases of a tile are one number, it is a constant of the softmax. Where they differ,
// they enter the scores through the matrix product: K has three more columns, whose sum is the bias divided by the
// softmax scale, and Q has ones there. Larger biases do not: the tensor core does not round to nearest, and beside
// them that would be more than the scores themselves. The consumer adds them.
#pragma once

#include <cmath>

#include "mixed_res_attn/tile_scheduler.cuh"

namespace specedit::attn {

// The first column counts in this unit, for fp16 alone has too small a range for biases: masks are large numbers.
template <typename T>
constexpr float kBiasColumnUnit = std::is_same_v<T, __half> ? 1024.0f : 1.0f;

__device__ inline bool fits_columns(const Params& p, float bias) {
  return bias == -INFINITY || fabsf(bias) <= p.column_bias_max;
}

// The 8 columns of a key: three numbers that add up to `bias`, in the unit of the products, the first in
// kBiasColumnUnit, then zeros. The error is less than the rounding of a score.
template <typename T>
__device__ inline uint4 bias_columns_of(float bias) {
  const float first = bias * (1.0f / kBiasColumnUnit<T>);
  float left = bias - static_cast<float>(static_cast<T>(first)) * kBiasColumnUnit<T>;
  if (bias == -INFINITY) left = 0.0f;
  const float second = static_cast<float>(static_cast<T>(left));
  return make_uint4(sm90::pack<T>(first, left), sm90::pack<T>(left - second, 0.0f), 0, 0);
}

// Writes the ones of Q and the zero columns: the work of all threads.
template <typename T, typename Storage>
__device__ void init_bias_constants(Storage& s) {
  uint4* const zero = reinterpret_cast<uint4*>(s.zero_columns);
  uint4* const ones = reinterpret_cast<uint4*>(s.ones);
  for (int i = threadIdx.x; i < Storage::Traits::kBlockN; i += Storage::Traits::kThreads) zero[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x < 16) {
    const uint4 row = make_uint4(sm90::pack<T>(kBiasColumnUnit<T>, 1.0f), sm90::pack<T>(1.0f, 0.0f), 0, 0);
    ones[threadIdx.x] = threadIdx.x < 8 ? row : make_uint4(0, 0, 0, 0);
  }
  sm90::fence_view_async_shared();
}

// The producer warp of the biases of dense keys. Keys past the last have bias -inf: there is no other masking.
template <typename T, int D>
__device__ void produce_biases(const Params& p, SharedStorage<T, D, false>& s) {
  using Traits = KernelTraits<T, D, false>;
  constexpr int kBiasesOfLane = (Traits::kBlockN + 31) / 32;
  const int lane = threadIdx.x % 32;
  PipelineState<Traits::kStages> pipe;
  WorkTile work;
  for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
    const float* bias = nullptr;
    if (p.bias != nullptr) {
      bias = p.bias + (p.cu_seqlens_k == nullptr ? work.batch * p.bias_batch_stride : 0) + s.row_offset_k(work.batch);
    }
    const int seqlen_k = s.seqlen_k[work.batch];
    float before = -INFINITY;   // the largest bias of the K tiles before
    float next[kBiasesOfLane];  // of the next K tile
    const auto look_up = [&](int n_block) {
#pragma unroll
      for (int i = 0; i < kBiasesOfLane; ++i) {
        const int key = n_block * Traits::kBlockN + i * 32 + lane;
        next[i] = key >= seqlen_k ? -INFINITY : bias == nullptr ? 0.0f : bias[key];
      }
    };
    look_up(work.n_block_begin);
    for (int n_block = work.n_block_begin; n_block < work.n_block_end; ++n_block) {
      float value[kBiasesOfLane];
#pragma unroll
      for (int i = 0; i < kBiasesOfLane; ++i) value[i] = next[i];
      look_up(n_block + 1);
      bool same = true;
      bool fits = true;
      const float first = __shfl_sync(0xffffffffu, value[0], 0);
      float high = value[0];
#pragma unroll
      for (int i = 0; i < kBiasesOfLane; ++i) {
        same = same && (value[i] == first || i * 32 + lane >= Traits::kBlockN);
        fits = fits && fits_columns(p, value[i]);
        high = fmaxf(high, value[i]);
      }
      same = __all_sync(0xffffffffu, same);
      fits = __all_sync(0xffffffffu, fits);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
      sm90::mbarrier_wait(&s.k_empty[pipe.stage], pipe.phase ^ 1);
      __syncwarp();
      if (!same && fits) {
        uint4* const columns = reinterpret_cast<uint4*>(s.bias_columns[pipe.stage]);
#pragma unroll
        for (int i = 0; i < kBiasesOfLane; ++i) {
          if (i * 32 + lane < Traits::kBlockN) {
            columns[i * 32 + lane] = bias_columns_of<T>(value[i] * p.inv_softmax_scale);
          }
        }
        sm90::fence_view_async_shared();
      }
      if (lane == 0) {
        s.bias_flags[pipe.stage][0] = (same ? 0 : fits ? kBiasInColumns : kBiasOutOfRange) |
            (high > before + 8 * kRescaleThreshold ? kBiasJump : 0);
        s.bias_constant[pipe.stage][0] = same ? first : 0.0f;
      }
      before = fmaxf(before, high);
      __syncwarp();
      if (lane == 0) sm90::mbarrier_arrive(&s.k_full[pipe.stage]);
      pipe.advance();
    }
  }
}

}  // namespace specedit::attn
