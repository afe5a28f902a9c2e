// SPDX-License-Identifier: Apache-2.0
// Gathers K, V and biases by kv_index into dense tensors before the attention, where many work tiles would each gather
// the same rows.
#pragma once

#include <cmath>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

// A warp copies a row of K and one of V, 128 words of 16 bytes of each at a time. Rows that do not exist become zeros
// with bias -inf. Slots from kv_lens on are not written: the attention does not read them.
__global__ void __launch_bounds__(kGatherThreads) gather_kv_kernel(const __grid_constant__ GatherParams p) {
  constexpr int kLoadsAtOnce = 4;
  sm90::launch_dependent_grids();
  const int lane = threadIdx.x % 32;
  const int slot = blockIdx.x * (kGatherThreads / 32) + threadIdx.x / 32;
  const int batch = slot / p.slots;
  const int key = slot - batch * p.slots;
  if (batch >= p.batch || (p.lens != nullptr && key >= p.lens[batch])) return;
  const int row = p.index[batch * p.index_batch_stride + key];
  const bool exists = row >= 0 && row < p.rows;
  if (lane == 0) {
    p.bias_out[slot] = !exists ? -INFINITY : p.bias == nullptr ? 0.0f : p.bias[batch * p.bias_batch_stride + row];
  }
  const uint4* const k = p.k + batch * p.k_strides.batch + row * p.k_strides.row;
  const uint4* const v = p.v + batch * p.v_strides.batch + row * p.v_strides.row;
  uint4* const k_out = p.k_out + static_cast<int64_t>(slot) * p.words;
  uint4* const v_out = p.v_out + static_cast<int64_t>(slot) * p.words;
  for (int start = lane; start < p.words; start += 32 * kLoadsAtOnce) {
    uint4 x[kLoadsAtOnce], y[kLoadsAtOnce];
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      const int word = start + i * 32;
      const int head = word >> p.head_shift;
      const int word_of_head = word - (head << p.head_shift);
      x[i] = y[i] = make_uint4(0, 0, 0, 0);
      if (exists && word < p.words) {
        x[i] = sm90::load_streaming(k + head * p.k_strides.head + word_of_head);
        y[i] = sm90::load_streaming(v + head * p.v_strides.head + word_of_head);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      const int word = start + i * 32;
      if (word < p.words) {
        k_out[word] = x[i];
        v_out[word] = y[i];
      }
    }
  }
}

}  // namespace specedit::attn
