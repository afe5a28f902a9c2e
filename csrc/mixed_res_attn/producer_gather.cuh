// SPDX-License-Identifier: Apache-2.0
// Producers of rows by index, with cp.async: Q by q_index, K and V by kv_index.
#pragma once

#include <cmath>

#include "mixed_res_attn/producer_bias.cuh"
#include "mixed_res_attn/tile_scheduler.cuh"

namespace specedit::attn {

// 32 * WORDS rows of Q that a warp copies. Lane i has the indices of rows i, i + 32 and so on. Rows that do not exist
// become zeros.
template <typename T, int D, int WORDS>
struct QueryRows {
  static constexpr int kPanels = D * sizeof(T) / 128;  // of 128 bytes of a row
  static constexpr int kPanelColumns = 128 / sizeof(T);
  int rows[WORDS];
  uint32_t valid[WORDS];

  template <typename Storage>
  __device__ void look_up(const Params& p, const Storage& s, const WorkTile& work, int first) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int slot = work.m_block * Storage::Traits::kBlockM + first + i * 32 + static_cast<int>(threadIdx.x) % 32;
      rows[i] = slot < s.seqlen_q[work.batch]
          ? p.q_index == nullptr ? slot : p.q_index[work.batch * p.q_index_batch_stride + slot]
          : -1;
      const bool exists = rows[i] >= 0 && rows[i] < p.rows_q;
      valid[i] = __ballot_sync(0xffffffffu, exists);
      if (!exists) rows[i] = 0;
    }
  }

  __device__ static const T* base(const Params& p, const WorkTile& work) {
    return static_cast<const T*>(p.q) + work.batch * p.q_strides.batch + work.head * p.q_strides.head;
  }

  __device__ void prefetch(const Params& p, const WorkTile& work) const {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if ((valid[i] >> threadIdx.x % 32 & 1) == 0) continue;
      const T* row = base(p, work) + rows[i] * p.q_strides.row;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) sm90::prefetch_l2(row + panel * kPanelColumns);
    }
  }

  // To rows [first, first + 32 * WORDS) of a tile of kWarpgroupRows rows. Eight lanes copy 128 bytes of a row, so the
  // warp copies four rows in a step. From one step to the next, the swizzle flips bit 2 of the chunk.
  __device__ void copy(const Params& p, const WorkTile& work, T* tile, int first) const {
    const int lane = threadIdx.x % 32;
    const T* source = base(p, work) + lane % 8 * (kPanelColumns / 8);
    const uint32_t even =
        sm90::cast_smem_ptr_to_uint(tile) + first * 128 + swizzle128_offset(lane / 8, lane % 8, kWarpgroupRows);
    const uint32_t odd = even ^ 64;
#pragma unroll
    for (int i = 0; i < 8 * WORDS; ++i) {
      const int row = __shfl_sync(0xffffffffu, rows[i / 8], i % 8 * 4 + lane / 8);
      const uint32_t exists = valid[i / 8] >> lane / 8 & 1u << i % 8 * 4;
      const T* from = source + row * p.q_strides.row;
      const uint32_t to = (i % 2 == 0 ? even : odd) + i * 4 * 128;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        sm90::cp_async_zfill(to + panel * kWarpgroupRows * 128, from + panel * kPanelColumns, exists);
      }
    }
  }
};

// The producer warp of the queries of consumer warpgroup wg by q_index, where a CTA has two consumer warpgroups.
template <typename T, int D>
__device__ void produce_queries(const Params& p, SharedStorage<T, D, false>& s, int wg) {
  constexpr int kWords = kWarpgroupRows / 32;
  const int lane = threadIdx.x % 32;
  uint32_t phase = 0;
  WorkTile work;
  for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
    // Looked up, and prefetched into L2, while the queries before are still in use.
    QueryRows<T, D, kWords> queries;
    queries.look_up(p, s, work, wg * kWarpgroupRows);
    if (work_idx > 0) queries.prefetch(p, work);
    sm90::mbarrier_wait(&s.q_empty[wg], phase ^ 1);
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) s.q_valid[phase][wg][i] = queries.valid[i];
      sm90::mbarrier_arrive(&s.q_full[wg]);
    }
    __syncwarp();
    queries.copy(p, work, s.q[wg], 0);
    sm90::cp_async_mbarrier_arrive_noinc(&s.q_full[wg]);
    phase ^= 1;
  }
}

// Copies 32 queries of a work tile, half of a consumer warpgroup's: number `number` of these halves.
template <typename T, int D, bool GATHER>
__device__ void copy_half_of_queries(
    const Params& p, SharedStorage<T, D, GATHER>& s, const WorkTile& work, int number, uint32_t phase) {
  const int wg = number / 2;
  const int half = number % 2;
  QueryRows<T, D, 1> queries;
  queries.look_up(p, s, work, number * 32);
  sm90::mbarrier_wait(&s.q_empty[wg], phase ^ 1);
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    s.q_valid[phase][wg][half] = queries.valid[0];
    sm90::mbarrier_arrive(&s.q_full[wg]);
  }
  queries.copy(p, work, s.q[wg], half * 32);
  sm90::cp_async_mbarrier_arrive_noinc(&s.q_full[wg]);
}

// The two producer warps of queries by q_index where a CTA has three consumer warpgroups. A warp copies half of the
// queries of each, one after the other: that takes fewer registers.
template <typename T, int D>
__device__ void produce_halves_of_queries(const Params& p, SharedStorage<T, D, false>& s, int half) {
  constexpr int kConsumers = KernelTraits<T, D, false>::kConsumers;
  WorkTile work;
  for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
    // First they are looked up and prefetched into L2, while the queries before are still in use.
#pragma unroll 1
    for (int i = work_idx > 0 ? 0 : kConsumers; i < 2 * kConsumers; ++i) {
      WorkTile at;
      at.batch = sm90::opaque(work.batch);
      at.head = sm90::opaque(work.head);
      at.m_block = work.m_block;
      if (i < kConsumers) {
        QueryRows<T, D, 1> queries;
        queries.look_up(p, s, at, (i * 2 + half) * 32);
        queries.prefetch(p, at);
      } else {
        copy_half_of_queries(p, s, at, (i - kConsumers) * 2 + half, work_idx % 2);
      }
    }
  }
}

// The producer warpgroup of K and V rows by kv_index, of their biases, and of Q. It copies 16 bytes with each thread
// and instruction. The instructions around a copy are kept few: they take issue slots from the softmax.
template <typename T, int D>
struct GatherProducer {
  using Storage = SharedStorage<T, D, true>;
  using Traits = typename Storage::Traits;
  static constexpr int kCopySteps = Traits::kCopySteps;
  static constexpr int kRowsOfWarp = kCopySteps * 4;
  static_assert(Traits::kBlockN % 16 == 0 && kRowsOfWarp > 32 && kRowsOfWarp <= 64);

  const Params& p;
  Storage& s;

  // Lane i of a warp looks up rows i and i + 32 of the warp's rows of a K tile. Returns which row of the tile that is.
  __device__ static int tile_row_of(int number) {
    return number / 4 * 16 + static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32 * 4 + number % 4;
  }

  // Bit 4 i % 32 of valid[i / 8]: whether this lane's row of step i exists. The other rows become zeros.
  __device__ void copy_tile(const T* base, uint32_t stride, T* target, int buffer, const uint32_t (&valid)[2]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kWarpgroupThreads / 32;
    const int* rows = s.kv_rows[buffer][warp][lane / 8];
    const char* source = reinterpret_cast<const char*>(base + lane % 8 * 8);
    const uint32_t to =
        sm90::cast_smem_ptr_to_uint(target) + swizzle128_offset(tile_row_of(lane / 8), lane % 8, Traits::kBlockN);
#pragma unroll
    for (int i = 0; i < kCopySteps; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(rows + i);
#pragma unroll
      for (int j = i; j < i + 4 && j < kCopySteps; ++j) {
        const int row = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        const char* from = source + static_cast<uint64_t>(static_cast<uint32_t>(row)) * stride;
        const uint32_t exists = valid[j / 8] & 1u << j % 8 * 4;
#pragma unroll
        for (int panel = 0; panel < D / 64; ++panel) {
          sm90::cp_async_zfill(to + j * 16 * 128 + panel * Traits::kBlockN * 128, from + panel * 128, exists);
        }
      }
    }
  }

  __device__ void run() {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kWarpgroupThreads / 32;
    const uint32_t k_stride = static_cast<uint32_t>(p.k_strides.row * sizeof(T));
    const uint32_t v_stride = static_cast<uint32_t>(p.v_strides.row * sizeof(T));
    PipelineState<Traits::kStages> k_pipe, v_pipe;
    uint32_t q_phase = 0;
    int buffer = 0;  // of the rows of the next K tile; the other has those of the K tile before, for V
    WorkTile work;
    for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
      const int kv_head = work.head / p.qhead_per_khead;
      const T* k = static_cast<const T*>(p.k) + work.batch * p.k_strides.batch + kv_head * p.k_strides.head;
      const T* v = static_cast<const T*>(p.v) + work.batch * p.v_strides.batch + kv_head * p.v_strides.head;
      int key = work.n_block_begin * Traits::kBlockN + tile_row_of(lane);  // of the K tile looked up next
      const int* at = p.kv_index + work.batch * p.kv_index_batch_stride + key;
      const float* bias = p.bias == nullptr ? nullptr : p.bias + work.batch * p.bias_batch_stride;
      const int seqlen_k = s.seqlen_k[work.batch];
      int rows[2];        // of the K tile looked up last, -1 for none
      float values[2];    // their biases
      uint32_t valid[2];  // of the K tile to copy next
      uint32_t valid_before[2];
      const auto look_up = [&] {
        constexpr int kNext = 32 / 4 * 16;
        rows[0] = key < seqlen_k ? at[0] : -1;
        rows[1] = lane + 32 < kRowsOfWarp && key + kNext < seqlen_k ? at[kNext] : -1;
        key += Traits::kBlockN;
        at += Traits::kBlockN;
      };
      const auto look_up_biases = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (rows[i] >= p.rows_k) rows[i] = -1;
          values[i] = rows[i] < 0 ? -INFINITY : bias == nullptr ? 0.0f : bias[rows[i]];
        }
      };
      const auto store_rows = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = i * 32 + lane;
          if (number < kRowsOfWarp) s.kv_rows[buffer][warp][number % 4][number / 4] = max(rows[i], 0);
          valid[i] = __ballot_sync(0xffffffffu, rows[i] >= 0) >> lane / 8;
        }
        __syncwarp();
      };
      const auto load_q = [&] {
        // A warp copies half of a consumer warpgroup's queries.
        copy_half_of_queries(p, s, work, warp, q_phase);
      };
      // Of the K tile whose stage is empty.
      const auto store_biases = [&] {
        uint4* const columns = reinterpret_cast<uint4*>(s.bias_columns[k_pipe.stage]);
        const float first = __shfl_sync(0xffffffffu, values[0], 0);
        bool same = true;
        bool fits = true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = i * 32 + lane;
          if (number >= kRowsOfWarp) continue;
          same = same && values[i] == first;
          fits = fits && fits_columns(p, values[i]);
          const float value = values[i] * p.inv_softmax_scale;
          // Written even if this warp's biases are one number: those of other warps may differ from it.
          columns[tile_row_of(number)] = bias == nullptr ? make_uint4(sm90::pack<T>(value, 0.0f), 0, 0, 0)
                                                         : bias_columns_of<T>(value);
        }
        sm90::fence_view_async_shared();
        same = __all_sync(0xffffffffu, same);
        fits = __all_sync(0xffffffffu, fits);
        if (lane == 0) {
          s.bias_flags[k_pipe.stage][warp] = !fits ? kBiasOutOfRange : same ? 0 : kBiasInColumns;
          s.bias_constant[k_pipe.stage][warp] = first;
          sm90::mbarrier_arrive(&s.k_full[k_pipe.stage]);
        }
      };
      const auto load_v = [&] {
        sm90::mbarrier_wait(&s.v_empty[v_pipe.stage], v_pipe.phase ^ 1);
        __syncwarp();
        copy_tile(v, v_stride, s.v[v_pipe.stage], buffer ^ 1, valid_before);
        sm90::cp_async_mbarrier_arrive_noinc(&s.v_full[v_pipe.stage]);
        v_pipe.advance();
      };
      if (work.n_block_begin == work.n_block_end) {
        load_q();
      } else {
        look_up();
        look_up_biases();
        store_rows();
      }
      for (int n_block = work.n_block_begin; n_block < work.n_block_end; ++n_block) {
        // Rows of the next K tile are looked up during the copies of this K tile, its biases during those of V.
        look_up();
        sm90::mbarrier_wait(&s.k_empty[k_pipe.stage], k_pipe.phase ^ 1);
        __syncwarp();
        copy_tile(k, k_stride, s.k[k_pipe.stage], buffer, valid);
        sm90::cp_async_mbarrier_arrive_noinc(&s.k_full[k_pipe.stage]);
        store_biases();
        k_pipe.advance();
        look_up_biases();
        if (n_block == work.n_block_begin) load_q();
        else load_v();
        __syncwarp();
        valid_before[0] = valid[0];
        valid_before[1] = valid[1];
        buffer ^= 1;
        store_rows();
      }
      if (work.n_block_begin < work.n_block_end) load_v();
      q_phase ^= 1;
    }
  }
};

}  // namespace specedit::attn
