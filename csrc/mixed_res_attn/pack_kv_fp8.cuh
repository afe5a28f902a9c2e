// SPDX-License-Identifier: Apache-2.0
// Brings e4m3 keys and values to the layout that the attention loads: V transposed, its rows by kv_index gathered.
#pragma once

#include <cmath>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

constexpr int kPackThreads = 128;
constexpr int kPackKeys = 64;  // of a CTA
constexpr int kPackDim = 128;
constexpr int kPackSmemBytes = kPackKeys * kPackDim;

// Strides of k and v are in bytes. k_out: [B, padded, Hk, D]; v_out: [B, Hk, D, padded], `padded` a multiple of 16 and
// at least `slots`. Null: bias_out without indices where there is no bias; scales that come by head.
struct PackParams {
  const uint8_t *k, *v;
  Strides k_strides, v_strides;
  int64_t v_column_stride;
  const float *bias, *k_scale, *v_scale;
  Strides k_scale_strides, v_scale_strides;
  const int *index, *lens;
  int64_t bias_batch_stride, index_batch_stride;
  uint8_t *k_out, *v_out;
  float *bias_out, *k_scale_out, *v_scale_out;
  int slots, padded, rows;
};

// Bytes of four words, as a matrix of 4 x 4, transposed.
__device__ inline void transpose_bytes(uint32_t (&x)[4]) {
  const uint32_t low01 = __byte_perm(x[0], x[1], 0x5140);
  const uint32_t low23 = __byte_perm(x[2], x[3], 0x5140);
  const uint32_t high01 = __byte_perm(x[0], x[1], 0x7362);
  const uint32_t high23 = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(low01, low23, 0x5410);
  x[1] = __byte_perm(low01, low23, 0x7632);
  x[2] = __byte_perm(high01, high23, 0x5410);
  x[3] = __byte_perm(high01, high23, 0x7632);
}

// A CTA: kPackKeys slots of head blockIdx.y. Rows that do not exist become zeros, with bias -inf and scales 0. Slots
// from kv_lens on are not all written: the attention does not use them. COLUMNS: whether v's rows may be anywhere and
// not on the 16-byte grid, as those of a transposed v are.
template <bool COLUMNS>
__global__ void __launch_bounds__(kPackThreads) pack_kv_kernel(const __grid_constant__ PackParams p) {
  sm90::launch_dependent_grids();
  // Row k: a key's values. Its 16-byte chunks are permuted so that threads which read columns of different keys
  // read different banks.
  uint32_t* const tile = static_cast<uint32_t*>(sm90::dynamic_smem());
  const int thread = threadIdx.x;
  const int head = blockIdx.y;
  const int batch = blockIdx.z;
  const int start = blockIdx.x * kPackKeys;
  const int heads = gridDim.y;
  if (p.lens != nullptr && start >= p.lens[batch]) return;
  const auto row_of = [&](int key) {
    if (start + key >= p.slots) return -1;
    if (p.index == nullptr) return start + key;
    const int row = p.index[batch * p.index_batch_stride + start + key];
    return row < p.rows ? row : -1;
  };
  if (thread < kPackKeys && start + thread < p.slots) {
    const int row = row_of(thread);
    const int slot = start + thread;
    if (head == 0 && p.bias_out != nullptr) {
      p.bias_out[static_cast<int64_t>(batch) * p.slots + slot] =
          row < 0 ? -INFINITY : p.bias == nullptr ? 0.0f : p.bias[batch * p.bias_batch_stride + row];
    }
    const int64_t place = (static_cast<int64_t>(batch) * heads + head) * p.slots + slot;
    const auto scale = [&](const float* of, const Strides& strides) {
      return row < 0 ? 0.0f : of[batch * strides.batch + row * strides.row + head * strides.head];
    };
    if (p.k_scale_out != nullptr) p.k_scale_out[place] = scale(p.k_scale, p.k_scale_strides);
    if (p.v_scale_out != nullptr) p.v_scale_out[place] = scale(p.v_scale, p.v_scale_strides);
  }
  const uint8_t* const k = p.k + batch * p.k_strides.batch + head * p.k_strides.head;
  const uint8_t* const v = p.v + batch * p.v_strides.batch + head * p.v_strides.head;
  constexpr int kChunks = kPackDim / 16;
#pragma unroll
  for (int i = 0; i < kPackKeys * kChunks / kPackThreads; ++i) {
    const int key = i * (kPackThreads / kChunks) + thread / kChunks;
    const int chunk = thread % kChunks;
    const int64_t row = row_of(key);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (row >= 0) x = sm90::load_streaming(reinterpret_cast<const uint4*>(k + row * p.k_strides.row) + chunk);
    if (start + key < p.padded) {
      const int64_t place = ((static_cast<int64_t>(batch) * p.padded + start + key) * heads + head) * kChunks + chunk;
      reinterpret_cast<uint4*>(p.k_out)[place] = x;
    }
    if constexpr (!COLUMNS) {
      uint4 y = make_uint4(0, 0, 0, 0);
      if (row >= 0) y = sm90::load_streaming(reinterpret_cast<const uint4*>(v + row * p.v_strides.row) + chunk);
      *reinterpret_cast<uint4*>(tile + key * 32 + (chunk * 4 ^ key / 16 * 8)) = y;
    }
  }
  if constexpr (COLUMNS) {
    const int key = thread % kPackKeys;
    const int64_t row = row_of(key);
    for (int d = thread / kPackKeys; d < kPackDim; d += kPackThreads / kPackKeys) {
      const uint8_t x = row < 0 ? 0 : v[row * p.v_strides.row + d * p.v_column_stride];
      reinterpret_cast<uint8_t*>(tile)[(key * 32 + (d / 4 ^ key / 16 * 8)) * 4 + d % 4] = x;
    }
  }
  __syncthreads();
  // Four columns of 16 keys.
  const int group = thread % 32 / 8;
  const int columns = thread / 32 * 8 + thread % 8;
  const int first = start + group * 16;
  uint32_t words[4][4];  // of four keys, of a column
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = tile[(group * 16 + i * 4 + j) * 32 + (columns ^ group * 8)];
    transpose_bytes(four);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[i][j] = four[j];
  }
  if (first >= p.padded) return;
  uint8_t* const out = p.v_out + ((static_cast<int64_t>(batch) * heads + head) * kPackDim + columns * 4) * p.padded + first;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(j) * p.padded) =
        make_uint4(words[0][j], words[1][j], words[2][j], words[3][j]);
  }
}

}  // namespace specedit::attn
