// SPDX-License-Identifier: Apache-2.0
// The producer warp of dense K and V, and of Q without q_index: tma_load by one thread.
#pragma once

#include "mixed_res_attn/tile_scheduler.cuh"

namespace specedit::attn {

template <typename T, int D>
struct TmaProducer {
  using Storage = SharedStorage<T, D, false>;
  using Traits = typename Storage::Traits;

  const Params& p;
  Storage& s;
  uint32_t last_block_phase = 0;

  // Panels of V, one after another; K in two halves of its rows (see key_of_row). Both by one thread.
  template <bool VALUES>
  __device__ static void load_e4m3(
      const CUtensorMap* map, T* target, uint64_t* loaded, int row, int head, int batch) {
    constexpr int kBlockN = Traits::kBlockN;
    if constexpr (VALUES) {
      sm90::tma_load(target, map, loaded, 0, 0, row / kValuePanel, head, batch);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sm90::tma_load(target + half * (kBlockN / 2) * D, map, loaded, 0, 2 * half, row / 4, head, batch);
      }
    }
  }

  // Zeros in the place of keys from `valid` on: the work of a warp.
  template <bool VALUES>
  __device__ static void clear_e4m3(T* target, int valid) {
    constexpr int kBlockN = Traits::kBlockN;
    const int lane = threadIdx.x % 32;
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(target);
    if constexpr (VALUES) {
      for (int i = lane; i < D * kBlockN / 16; i += 32) {
        const int row = i % D;
        const int chunk = i / D;
        const int left = valid - chunk * 16;  // keys that stay
        if (left >= 16) continue;
        uint32_t* const words = reinterpret_cast<uint32_t*>(bytes + swizzle64_offset(row, chunk, D));
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int stay = clamp(left - word * 4, 0, 4);
          if (stay < 4) words[word] = stay == 0 ? 0 : words[word] & (1u << stay * 8) - 1;
        }
      }
    } else {
      for (int i = lane; i < kBlockN * 8; i += 32) {
        if (key_of_row<kBlockN>(i / 8) >= valid) reinterpret_cast<uint4*>(bytes)[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Loads rows [row, row + kBlockN) of K or V. Rows from `valid` on become zero: a weight of 0 times NaN is NaN.
  template <bool VALUES>
  __device__ void load(
      const CUtensorMap* map, T* target, uint64_t* full, uint64_t* empty, uint32_t phase, int row, int head, int batch,
      int valid) {
    const int lane = threadIdx.x % 32;
    sm90::mbarrier_wait(empty, phase ^ 1);
    __syncwarp();
    // Behind the last row of the tensor TMA writes zeros itself; the last panel of V may have what is no row.
    const int rows = kIsFp8<T> && VALUES ? ceil_div(p.rows_k, kValuePanel) * kValuePanel : p.rows_k;
    const bool other_rows = valid < Traits::kBlockN && row + valid < rows;
    uint64_t* loaded = other_rows ? &s.last_block_loaded : full;
    if (lane == 0) {
      sm90::mbarrier_arrive_and_expect_tx(loaded, Traits::kBlockN * D * sizeof(T));
      if constexpr (kIsFp8<T>) load_e4m3<VALUES>(map, target, loaded, row, head, batch);
      else sm90::tma_load(target, map, loaded, 0, row, 0, head, batch);
    }
    if (other_rows) {
      sm90::mbarrier_wait(loaded, last_block_phase);
      last_block_phase ^= 1;
      if constexpr (kIsFp8<T>) {
        clear_e4m3<VALUES>(target, valid);
      } else {
        uint4* const words = reinterpret_cast<uint4*>(target);
        for (int i = valid * 8 + lane; i < Traits::kBlockN * 8; i += 32) {
#pragma unroll
          for (int panel = 0; panel < D / 64; ++panel) words[panel * Traits::kBlockN * 8 + i] = make_uint4(0, 0, 0, 0);
        }
      }
      sm90::fence_view_async_shared();
      __syncwarp();
      if (lane == 0) sm90::mbarrier_arrive(full);
    }
    __syncwarp();
  }

  __device__ void run() {
    const int lane = threadIdx.x % 32;
    PipelineState<Traits::kStages> k_pipe, v_pipe;
    uint32_t q_phase = 0;
    WorkTile work;
    for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
      const int kv_head = work.head / p.qhead_per_khead;
      const int kv_batch = p.cu_seqlens_k == nullptr ? work.batch : 0;
      const int k_row = s.row_offset_k(work.batch);
      const int seqlen_k = s.seqlen_k[work.batch];
      const auto load_q = [&] {
        if (p.q_index != nullptr) return;
        const int q_batch = p.cu_seqlens_q == nullptr ? work.batch : 0;
        for (int wg = 0; wg < 2; ++wg) {
          sm90::mbarrier_wait(&s.q_empty[wg], q_phase ^ 1);
          __syncwarp();
          if (lane == 0) {
            sm90::mbarrier_arrive_and_expect_tx(&s.q_full[wg], kWarpgroupRows * D * sizeof(T));
            sm90::tma_load(
                s.q[wg], &p.tma_q, &s.q_full[wg], 0,
                s.row_offset_q(work.batch) + work.m_block * Traits::kBlockM + wg * kWarpgroupRows, 0, work.head, q_batch);
          }
          __syncwarp();
        }
      };
      const auto load_v = [&](int n_block) {
        const int start = n_block * Traits::kBlockN;
        load<true>(
            &p.tma_v, s.v[v_pipe.stage], &s.v_full[v_pipe.stage], &s.v_empty[v_pipe.stage], v_pipe.phase,
            k_row + start, kv_head, kv_batch, seqlen_k - start);
        v_pipe.advance();
      };
      if (work.n_block_begin == work.n_block_end) load_q();
      for (int n_block = work.n_block_begin; n_block < work.n_block_end; ++n_block) {
        const int start = n_block * Traits::kBlockN;
        load<false>(
            &p.tma_k, s.k[k_pipe.stage], &s.k_full[k_pipe.stage], &s.k_empty[k_pipe.stage], k_pipe.phase,
            k_row + start, kv_head, kv_batch, seqlen_k - start);
        k_pipe.advance();
        if (n_block == work.n_block_begin) load_q();
        else load_v(n_block - 1);
      }
      if (work.n_block_begin < work.n_block_end) load_v(work.n_block_end - 1);
      q_phase ^= 1;
    }
  }

  // The same for three consumer warpgroups, which leave few registers: each load is once in the code, and what follows
  // from the work tile is computed for each (sm90::opaque).
  template <bool VALUES>
  __device__ void load_n_block(const WorkTile& work, int n_block, uint32_t kv_idx) {
    const int batch = sm90::opaque(work.batch);
    const int stage = kv_idx % Traits::kStages;
    const int start = n_block * Traits::kBlockN;
    load<VALUES>(
        VALUES ? &p.tma_v : &p.tma_k, VALUES ? s.v[stage] : s.k[stage], VALUES ? &s.v_full[stage] : &s.k_full[stage],
        VALUES ? &s.v_empty[stage] : &s.k_empty[stage], kv_idx / Traits::kStages % 2, s.row_offset_k(batch) + start,
        static_cast<int>(sm90::opaque(work.head)) / p.qhead_per_khead, p.cu_seqlens_k == nullptr ? batch : 0,
        s.seqlen_k[batch] - start);
  }

  __device__ void load_queries(const WorkTile& work, uint32_t phase) {
    if (p.q_index != nullptr) return;
    const int batch = sm90::opaque(work.batch);
#pragma unroll 1
    for (int wg = 0; wg < Traits::kConsumers; ++wg) {
      sm90::mbarrier_wait(&s.q_empty[wg], phase ^ 1);
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        sm90::mbarrier_arrive_and_expect_tx(&s.q_full[wg], kWarpgroupRows * D * sizeof(T));
        sm90::tma_load(
            s.q[wg], &p.tma_q, &s.q_full[wg], 0,
            s.row_offset_q(batch) + work.m_block * Traits::kBlockM + wg * kWarpgroupRows, 0, work.head,
            p.cu_seqlens_q == nullptr ? batch : 0);
      }
      __syncwarp();
    }
  }

  __device__ void run_with_few_registers() {
    uint32_t kv_idx = 0;  // number of the next K tile in the order of loads
    WorkTile work;
    for (int work_idx = 0; work.get(p, s, work_idx); ++work_idx) {
      const int n_blocks = work.n_block_end - work.n_block_begin;
#pragma unroll 1
      for (int i = 0; i <= n_blocks; ++i) {
        if (i < n_blocks) load_n_block<false>(work, work.n_block_begin + i, kv_idx + i);
        if (i == 0) load_queries(work, work_idx % 2);
        else load_n_block<true>(work, work.n_block_begin + i - 1, kv_idx + i - 1);
      }
      kv_idx += n_blocks;
    }
  }
};

}  // namespace specedit::attn
