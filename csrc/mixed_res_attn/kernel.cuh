// SPDX-License-Identifier: Apache-2.0
// Attention with a per-key bias on sm_90a: persistent, warp-specialized. A CTA has one producer warpgroup, which loads,
// and two consumer warpgroups (D = 64: three), which compute.
//
// The online softmax is FlashAttention's (Dao et al., arXiv 2205.14135, algorithm 1); warp specialization, ping-pong of
// the consumer warpgroups, and the overlap of a warpgroup's softmax with its own P V product are FlashAttention-3's
// (Shah et al., arXiv 2407.08608).
//
// The parts, and what is different here:
//   plan.h              which CTA computes which tiles; tiles of the last partial wave are split along their keys
//   tile_scheduler.cuh  the work tiles of a CTA
//   shared_storage.cuh  shared memory, barriers, pipelines
//   producer_tma.cuh    dense Q, K, V
//   producer_gather.cuh Q by q_index; K and V by kv_index
//   producer_bias.cuh   biases enter through the matrix product: one step more for each eight of Q K^T (D = 128)
//   consumer.cuh        the mainloop
//   softmax.cuh         the row maximum is raised only where sums of weights show that it must be
//   softmax_fp8.cuh, producer_key_tables.cuh  the same of e4m3 numbers
//   epilogue.cuh        the stores
//   combine.cuh         the second kernel, which merges splits
#pragma once

#include "mixed_res_attn/combine.cuh"
#include "mixed_res_attn/consumer.cuh"
#include "mixed_res_attn/epilogue.cuh"
#include "mixed_res_attn/producer_bias.cuh"
#include "mixed_res_attn/producer_gather.cuh"
#include "mixed_res_attn/producer_key_tables.cuh"
#include "mixed_res_attn/producer_tma.cuh"
#include "mixed_res_attn/softmax.cuh"
#include "mixed_res_attn/softmax_fp8.cuh"

namespace specedit::attn {

template <typename T, int D, bool GATHER>
__global__ void __launch_bounds__(KernelTraits<T, D, GATHER>::kThreads, 1) mixed_res_attn_kernel(
    const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Storage = SharedStorage<T, D, GATHER>;
  using Traits = typename Storage::Traits;
  Storage& s = *static_cast<Storage*>(sm90::dynamic_smem());
  if (sm90::cast_smem_ptr_to_uint(&s) % 1024 != 0) __trap();
  if (threadIdx.x == 0) {
    // Each warp that reads a stage arrives on its `empty`.
    for (int wg = 0; wg < Traits::kConsumers; ++wg) {
      // By index: an arrival of each lane that copies, and one of each warp for its bits of q_valid.
      const uint32_t by_index = GATHER || Traits::kConsumers > 2 ? 2 * 33 : 33;
      sm90::mbarrier_init(&s.q_full[wg], GATHER || p.q_index != nullptr ? by_index : 1);
      sm90::mbarrier_init(&s.q_empty[wg], 4);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      sm90::mbarrier_init(&s.k_full[i], Traits::kLoadArrivals + Traits::kBiasWarps);
      sm90::mbarrier_init(&s.v_full[i], Traits::kLoadArrivals);
      sm90::mbarrier_init(&s.k_empty[i], 4 * Traits::kConsumers);
      sm90::mbarrier_init(&s.v_empty[i], 4 * Traits::kConsumers);
    }
    sm90::mbarrier_init(&s.last_block_loaded, 1);
    sm90::fence_barrier_init();
    if constexpr (!GATHER) {
      if (p.rows_q > 0 && p.q_index == nullptr) sm90::prefetch_tma_descriptor(&p.tma_q);
      if (p.rows_k > 0) sm90::prefetch_tma_descriptor(&p.tma_k);
      if (p.rows_k > 0) sm90::prefetch_tma_descriptor(&p.tma_v);
    }
  }
  if constexpr (!kIsFp8<T>) init_bias_constants<T>(s);
  // Up to here nothing was read or written that an earlier grid may still use. A host plan is a kernel argument, so it
  // may be read before the wait, too.
  if (!p.plan.planned) sm90::wait_on_dependent_grids();
  make_plan<T, D, GATHER>(p, s);
  if (p.plan.planned) sm90::wait_on_dependent_grids();
  sm90::launch_dependent_grids();
  if (threadIdx.x < kWarpgroupThreads) {
    sm90::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if constexpr (GATHER) {
      GatherProducer<T, D>{p, s}.run();
      if (warp == 3) write_split_tile(p, s);
      store_empty_slots<T, D>(p, s, blockIdx.x * 4 + warp, gridDim.x * 4);
    } else if (warp == 0) {
      if constexpr (Traits::kConsumers > 2) TmaProducer<T, D>{p, s}.run_with_few_registers();
      else TmaProducer<T, D>{p, s}.run();
    } else if (warp == 1) {
      if constexpr (kIsFp8<T>) produce_key_tables<T, D>(p, s);
      else produce_biases<T, D>(p, s);
    } else {
      if (p.q_index != nullptr) {
        if constexpr (Traits::kConsumers > 2) produce_halves_of_queries<T, D>(p, s, warp - 2);
        else produce_queries<T, D>(p, s, warp - 2);
      }
      if (warp == 3) write_split_tile(p, s);
      store_empty_slots<OutputOf<T>, D>(p, s, blockIdx.x * 2 + warp - 2, gridDim.x * 2);
    }
  } else {
    sm90::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int wg = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
    Consumer<T, D, GATHER>{p, s, wg}.run();
  }
#else
  __trap();
#endif
}

}  // namespace specedit::attn
