// SPDX-License-Identifier: Apache-2.0
// The consumer's epilogue, and the output of slots that have no query.
#pragma once

#include "mixed_res_attn/consumer.cuh"

namespace specedit::attn {

// The row of `out` that slot `slot` of a batch entry writes, negative for none. offset: the entry's first row.
__device__ inline int out_row_of(const Params& p, int batch, int offset, int slot) {
  if (p.out_index == nullptr) return offset + slot;
  const int row = p.out_index[batch * p.out_index_batch_stride + slot];
  return row < p.rows_out ? row : -1;
}

__device__ inline float* lse_ptr(const Params& p, int batch, int head, int row) {
  return p.lse + (p.cu_seqlens_q == nullptr ? batch * p.lse_batch_stride : 0) + head * p.lse_head_stride + row;
}

// Empty slots: out 0, lse -inf. A warp writes all heads of a slot; this is warp number `warp` of `num_warps`.
template <typename T, int D, typename Storage>
__device__ void store_empty_slots(const Params& p, const Storage& s, int warp, int num_warps) {
  constexpr int kChunks = D / 8;
  const int lane = threadIdx.x % 32;
  const bool packed = p.cu_seqlens_q != nullptr;
  if (!packed && p.q_lens == nullptr) return;
  T* const out = static_cast<T*>(p.out);
  // Packed rows past the last sequence belong to no batch entry: they are handled as one more.
  for (int b = 0; b < p.batch + packed; ++b) {
    int offset = 0;
    int begin = 0;
    int end = p.max_seqlen_q;
    if (packed) {
      offset = b < p.batch ? s.offset_q[b] : clamp(p.cu_seqlens_q[p.batch], 0, p.rows_q);
      end = (b < p.batch ? clamp(p.cu_seqlens_q[b + 1], offset, p.rows_q) : p.rows_q) - offset;
    }
    if (b < p.batch) begin = s.seqlen_q[b];
    for (int slot = begin + warp; slot < end; slot += num_warps) {
      const int64_t row = out_row_of(p, b, offset, slot);
      if (row >= 0) {
        T* at = out + (packed ? 0 : b * p.out_strides.batch) + row * p.out_strides.row;
        for (int i = lane; i < p.heads * kChunks; i += 32) {
          *reinterpret_cast<uint4*>(at + i / kChunks * p.out_strides.head + i % kChunks * 8) = make_uint4(0, 0, 0, 0);
        }
      }
      for (int head = lane; head < p.heads; head += 32) *lse_ptr(p, b, head, offset + slot) = -INFINITY;
    }
  }
}

// Bit r: whether this thread's row r has a query. q_phase: that of the work tile's queries.
template <typename T, int D, bool GATHER>
__device__ inline int Consumer<T, D, GATHER>::valid_rows(uint32_t q_phase) const {
  if (p.q_index == nullptr) return 3;
  const int row = first_row() % kWarpgroupRows;
  const uint32_t valid = s.q_valid[q_phase][wg][row / 32] >> row % 32;
  return (valid & 1) | (valid >> 7 & 2);
}

// Where this thread's two rows go in `out`, negative for nowhere.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::look_up_out_rows(const WorkTile& work, int (&out_rows)[2]) const {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row() + 8 * r;
    out_rows[r] = row < work.rows
        ? out_row_of(p, work.batch, s.row_offset_q(work.batch), work.m_block * kBlockM + row)
        : -1;
  }
}

// lse, -inf without keys. Of e4m3 numbers the maximum is in base 2.
template <typename T>
__device__ inline float lse_of(float max, float sum) {
  if constexpr (kIsFp8<T>) return sum == 0.0f ? -INFINITY : (log2f(sum) + max) * kLn2;
  return sum == 0.0f ? -INFINITY : fmaf(log2f(sum), kLn2, max);
}

// The result of this thread's two rows, and their lse. Bit r of `valid`: whether row r has a query. Of a split, maximum
// and sum of the weights are stored instead, for the combine kernel: from their lse, rounding could take the sum off a
// large maximum, and with it what the split weighs.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::finalize(
    const WorkTile& work, int valid, float (&x)[D / 2], float (&lse)[2]) const {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(row_sum[r]);
    inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float valid_sum = (valid >> r & 1) == 0 ? 0.0f : sum;
    if constexpr (kIsFp8<T>) inverse[r] *= scales.value_scale;
    lse[r] = lse_of<T>(row_max[r], valid_sum);
    const int row = first_row() + 8 * r;
    if (work.split_slot >= 0 && row < work.rows && threadIdx.x % 4 == 0) {
      p.max_sum_partial[static_cast<int64_t>(work.split_slot) * kBlockM + row] = make_float2(row_max[r], valid_sum);
    }
  }
#pragma unroll
  for (int i = 0; i < D / 2; ++i) x[i] = acc_o[i] * inverse[i / 2 % 2];
  sm90::warpgroup_fence_operand(x);
}

// The result of a split as fp32, for the combine kernel.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::store_partial(const WorkTile& work, const float (&x)[D / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row() + 8 * r;
    if (row >= work.rows) continue;
    const int64_t place = static_cast<int64_t>(work.split_slot) * kBlockM + row;
    float* target = p.out_partial + place * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      *reinterpret_cast<float2*>(target + 8 * i) = make_float2(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]);
    }
  }
}

// The four threads of a row exchange words, so that each stores 16 bytes: thread c has columns [8 (4 i + c), + 8), for
// every i.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::store_rows(
    const WorkTile& work, const float (&x)[D / 2], const float (&lse)[2], const int (&out_rows)[2]) {
  const int lane = threadIdx.x % 32;
  const int c = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row() + 8 * r;
    const int64_t out_row = out_rows[r];
    if (row < work.rows && c == 0) {
      *lse_ptr(p, work.batch, work.head, s.row_offset_q(work.batch) + work.m_block * kBlockM + row) = lse[r];
    }
    OutputOf<T>* const target = static_cast<OutputOf<T>*>(p.out) +
        (p.cu_seqlens_q == nullptr ? work.batch * p.out_strides.batch : 0) +
        out_row * p.out_strides.row + work.head * p.out_strides.head;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int element = 16 * i + 4 * j + 2 * r;
        word[j] = sm90::pack<OutputOf<T>>(x[element], x[element + 1]);
      }
      const bool upper = c & 2;
      const uint32_t a = __shfl_xor_sync(0xffffffffu, upper ? word[0] : word[2], 2);
      const uint32_t b = __shfl_xor_sync(0xffffffffu, upper ? word[1] : word[3], 2);
      const uint32_t w0 = upper ? a : word[0];
      const uint32_t w1 = upper ? b : word[1];
      const uint32_t w2 = upper ? word[2] : a;
      const uint32_t w3 = upper ? word[3] : b;
      const bool odd = c & 1;
      const uint32_t e = __shfl_xor_sync(0xffffffffu, odd ? w0 : w1, 1);
      const uint32_t f = __shfl_xor_sync(0xffffffffu, odd ? w2 : w3, 1);
      uint4 all = odd ? make_uint4(e, w1, f, w3) : make_uint4(w0, e, w2, f);
      if (p.q_index != nullptr && lse[r] == -INFINITY) all = make_uint4(0, 0, 0, 0);
      if (out_row >= 0) *reinterpret_cast<uint4*>(target + (4 * i + c) * 8) = all;
    }
  }
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::store(
    const WorkTile& work, const float (&x)[D / 2], const float (&lse)[2], const int (&out_rows)[2]) {
  if (work.split_slot >= 0) store_partial(work, x);
  else store_rows(work, x, lse, out_rows);
}

}  // namespace specedit::attn
