// SPDX-License-Identifier: Apache-2.0
// K, V and biases by kv_index, gathered into dense tensors before the attention: where many tiles of queries would each
// gather the same rows.
#pragma once

#include <cmath>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

// A warp copies a row of k and one of v, 128 words of 16 bytes of each at a time. Rows that do not exist become zeros
// with bias -inf; slots from kv_lens on are left as they are, for the attention does not read them.
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const __grid_constant__ RowsParams p) {
  constexpr int kAtOnce = 4;
  sm90::let_grid_after_start();
  const int lane = threadIdx.x % 32;
  const int slot = blockIdx.x * (kGatherThreads / 32) + threadIdx.x / 32;
  const int b = slot / p.slots;
  const int key = slot - b * p.slots;
  if (b >= p.batch || (p.lens != nullptr && key >= p.lens[b])) return;
  const int row = p.index[b * p.index_batch + key];
  const bool exists = row >= 0 && row < p.rows;
  if (lane == 0) {
    p.bias_out[slot] = !exists ? -INFINITY : p.bias == nullptr ? 0.0f : p.bias[b * p.bias_batch + row];
  }
  const uint4* const k = p.k + b * p.k_strides.batch + row * p.k_strides.row;
  const uint4* const v = p.v + b * p.v_strides.batch + row * p.v_strides.row;
  uint4* const k_out = p.k_out + static_cast<int64_t>(slot) * p.words;
  uint4* const v_out = p.v_out + static_cast<int64_t>(slot) * p.words;
  for (int start = lane; start < p.words; start += 32 * kAtOnce) {
    uint4 x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = start + i * 32;
      const int head = word >> p.head_shift;
      const int rest = word - (head << p.head_shift);
      x[i] = y[i] = make_uint4(0, 0, 0, 0);
      if (exists && word < p.words) {
        x[i] = sm90::load_once(k + head * p.k_strides.head + rest);
        y[i] = sm90::load_once(v + head * p.v_strides.head + rest);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = start + i * 32;
      if (word < p.words) {
        k_out[word] = x[i];
        v_out[word] = y[i];
      }
    }
  }
}

}  // namespace specedit::attn
