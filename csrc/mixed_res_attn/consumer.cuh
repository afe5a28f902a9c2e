// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 queries of a work tile against its K tiles. This file has its state and the mainloop;
// softmax.cuh and epilogue.cuh have the rest of its member functions.
#pragma once

#include <cmath>

#include "mixed_res_attn/tile_scheduler.cuh"

namespace specedit::attn {

constexpr int kSoftmaxChunks = 4;  // the softmax of a K tile is computed in so many chunks of keys
constexpr int kPvWaitChunk = 3;    // the chunk before which it waits for the last P V product
// A thread's sum of the weights of a row and K tile above which the row maximum is raised. bf16 and fp16 hold weights
// of this size without loss.
constexpr float kRescaleSum = 4096;
// Such a sum above which the scores are computed again. Its inverse is still a normal number.
constexpr float kRecomputeThreshold = 1e30f;

template <typename T, int D, bool GATHER>
struct Consumer {
  using Storage = SharedStorage<T, D, GATHER>;
  using Traits = typename Storage::Traits;
  static constexpr int N = Traits::kBlockN;
  static constexpr int kBlockM = Traits::kBlockM;

  const Params& p;
  Storage& s;
  const int wg;  // 0 to kConsumers - 1

  // Accumulators of wgmma (PTX ISA, "register fragments and shared memory matrix layouts"). For every i, elements 4 i
  // and 4 i + 1 are columns 8 i + 2 (lane % 4) and the next of row lane / 4; elements 4 i + 2 and 4 i + 3 are the same
  // columns of row lane / 4 + 8. So a thread has two rows, r = 0 and 1, and four threads share a row.
  float acc_o[D / 2];
  float acc_s[N / 2];
  uint32_t reg_p[N * sizeof(T) / 8];  // weights, as the product's operand in registers
  float row_max[2];  // running, of scores: after the scale and with biases
  float row_sum[2];  // running, this thread's columns only
  float exponent_offset[2];  // added to the exponents of this K tile
  float o_scale[2];  // what acc_o is to be multiplied with
  bool needs_rescale;
  // Of e4m3 numbers. Then row_max is in base 2, and lower by kWeightShift.
  struct Scales {
    float unit[2];      // from a product to an exponent
    float value_scale;  // what the result is to be multiplied with; by row, the largest scale of v so far
  };
  // Nothing where it is not used: the compiler orders the code of other kernels by it.
  struct NoScales {};
  std::conditional_t<kIsFp8<T>, Scales, NoScales> scales;

  // ---- Mainloop ----
  template <bool BIAS_COLUMNS>
  __device__ void mma_qk(int stage);
  __device__ void mma_pv(int stage);
  __device__ void issue_qk(uint32_t kv_idx, int bias_flags);
  __device__ void issue_pv(uint32_t kv_idx);
  __device__ void wait_pv(uint32_t kv_idx);
  __device__ void wait_q(uint32_t& q_phase);
  __device__ int issue_first_qk(uint32_t kv_idx);
  __device__ void clear();
  template <typename Meanwhile>
  __device__ void attend(const WorkTile& work, uint32_t& kv_idx, int bias_flags, Meanwhile meanwhile);
  __device__ void skip(const WorkTile& work, uint32_t& kv_idx);
  __device__ void warp_scheduler_sync();
  __device__ void warp_scheduler_arrive(const WorkTile& work);
  __device__ void run();

  // ---- Softmax ----
  __host__ __device__ static constexpr int chunk_begin(int c) { return c * (N / 16) / kSoftmaxChunks * 8; }
  __device__ int bias_flags_of(uint32_t kv_idx) const;
  __device__ int64_t k_row_of(const WorkTile& work, int key) const;
  __device__ void add_biases(const WorkTile& work, int n_block, bool scaled);
  __device__ void recompute_scores(const WorkTile& work, int n_block);
  __device__ void set_exponent_offset(float bias);
  __device__ float raise_row_max(int r, float high);
  template <int c>
  __device__ void exponentiate(float (&even)[2], float (&odd)[2]);
  template <int c>
  __device__ void exponentiate_from(float (&even)[2], float (&odd)[2]);
  __device__ void exponentiate_far(float scale, float bias);
  template <bool FIRST>
  __device__ void softmax_with_max(float bias, bool scaled);
  template <int c>
  __device__ void chunk_without_max(uint32_t kv_idx, float (&even)[2], float (&odd)[2]);
  __device__ bool softmax_without_max(uint32_t kv_idx, float bias);
  __device__ void rescale_large_weights(float (&sum)[2]);
  template <bool FIRST>
  __device__ void softmax(const WorkTile& work, int n_block, uint32_t kv_idx, int bias_flags);
  __device__ void rescale_o();
  template <int BEGIN, int END>
  __device__ void pack_p();

  // ---- Softmax of e4m3 numbers ----
  __device__ Scales look_up_scales(const WorkTile& work) const;
  __device__ bool is_far_fp8() const;
  __device__ void add_key_biases(int stage);
  template <bool SCORES>
  __device__ void raise_row_max_fp8(float constant);
  template <bool FIRST, int c>
  __device__ void weights_of_chunk(
      int stage, uint32_t kv_idx, const float (&factor)[2], float (&even)[2], float (&odd)[2]);
  template <int BEGIN, int END>
  __device__ void pack_p_fp8();
  template <bool FIRST>
  __device__ void softmax_fp8(const WorkTile& work, int n_block, uint32_t kv_idx, int bias_flags);

  // ---- Epilogue ----
  __device__ int valid_rows(uint32_t q_phase) const;
  __device__ void look_up_out_rows(const WorkTile& work, int (&out_rows)[2]) const;
  __device__ void finalize(const WorkTile& work, int valid, float (&x)[D / 2], float (&lse)[2]) const;
  __device__ void store_partial(const WorkTile& work, const float (&x)[D / 2]);
  __device__ void store_rows(
      const WorkTile& work, const float (&x)[D / 2], const float (&lse)[2], const int (&out_rows)[2]);
  __device__ void store(
      const WorkTile& work, const float (&x)[D / 2], const float (&lse)[2], const int (&out_rows)[2]);

  template <bool FIRST>
  __device__ void softmax_of_tile(const WorkTile& work, int n_block, uint32_t kv_idx, int bias_flags) {
    if constexpr (kIsFp8<T>) softmax_fp8<FIRST>(work, n_block, kv_idx, bias_flags);
    else softmax<FIRST>(work, n_block, kv_idx, bias_flags);
  }

  // The first of this thread's two rows of a work tile; the other is 8 further.
  __device__ int first_row() const {
    // Three consumer warpgroups leave no registers for what follows from it: it is computed where it is used.
    const uint32_t thread = Traits::kConsumers > 2 ? sm90::opaque(threadIdx.x) : threadIdx.x;
    return wg * kWarpgroupRows + thread % kWarpgroupThreads / 32 * 16 + thread % 32 / 4;
  }

  // Whether one of this thread's rows has a far maximum, or none yet.
  __device__ bool is_far() const { return !(fabsf(row_max[0]) <= kNear && fabsf(row_max[1]) <= kNear); }

  // Over the four threads that share a row.
  __device__ static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }

  __device__ static float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // kv_idx: number of a K tile in the order in which this warpgroup consumes them.
  __device__ static int stage_of(uint32_t kv_idx) { return kv_idx % Traits::kStages; }
  __device__ static uint32_t phase_of(uint32_t kv_idx) { return kv_idx / Traits::kStages % 2; }

  // Waits until a stage is full. cp.async writes through the generic proxy, wgmma reads through the async proxy: hence
  // the fence.
  __device__ static void consumer_wait(uint64_t* full, uint32_t phase) {
    sm90::mbarrier_wait(full, phase);
    if constexpr (GATHER) sm90::fence_view_async_shared();
  }

  // One arrival a warp, after all its lanes have waited for this stage. A lane that waited later could see the mbarrier
  // two phases on, where the parity is the same again.
  __device__ static void consumer_release(uint64_t* empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) sm90::mbarrier_arrive(empty);
  }
};

// S = Q K^T, where BIAS_COLUMNS with the biases added.
template <typename T, int D, bool GATHER>
template <bool BIAS_COLUMNS>
__device__ inline void Consumer<T, D, GATHER>::mma_qk(int stage) {
  using Product = std::conditional_t<kIsFp8<T>, sm90::WgmmaE4m3<N>, sm90::Wgmma<T, N>>;
  sm90::warpgroup_arrive();
  if constexpr (BIAS_COLUMNS) {
    // Groups of 8 keys follow each other. All groups of 8 queries are the same rows of ones.
    const uint32_t ones = sm90::smem_descriptor_low(s.ones, sizeof(s.ones[0]));
    const uint32_t biases =
        sm90::smem_descriptor_low(s.bias_columns[stage], (Traits::kStages - stage) * sizeof(s.zero_columns));
    sm90::Wgmma<T, N>::ss(
        acc_s, sm90::no_swizzle_descriptor(ones, 0), sm90::no_swizzle_descriptor(biases, 8 * 16), 0);
  }
  const uint32_t a = sm90::opaque(sm90::smem_descriptor_low(s.q[wg], 0));
  const uint32_t b = sm90::smem_descriptor_low(s.k[stage], 0);
#pragma unroll
  for (int i = 0; i < D * static_cast<int>(sizeof(T)) / 32; ++i) {
    // A step has 32 bytes of a row, a panel 128. Descriptors count 16-byte units.
    const uint32_t a_step = i / 4 * (kWarpgroupRows * 128 / 16) + i % 4 * 2;
    const uint32_t b_step = i / 4 * (N * 128 / 16) + i % 4 * 2;
    Product::ss(
        acc_s, sm90::swizzle128_descriptor(a + a_step), sm90::swizzle128_descriptor(b + b_step),
        BIAS_COLUMNS || i > 0);
  }
  sm90::warpgroup_commit_batch();
}

// O += P V.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::mma_pv(int stage) {
  sm90::warpgroup_arrive();
  if constexpr (kIsFp8<T>) {
    // V^T in panels of 64 keys; a step has 32.
    const uint32_t b = sm90::smem_descriptor_low(s.v[stage], 0);
#pragma unroll
    for (int i = 0; i < N / 32; ++i) {
      sm90::WgmmaE4m3<D>::rs(
          acc_o, reg_p + 4 * i, sm90::swizzle64_descriptor(b + i / 2 * (D * kValuePanel / 16) + i % 2 * 2));
    }
  } else {
    const uint32_t b = sm90::smem_descriptor_low(s.v[stage], N * 128);
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      sm90::Wgmma<T, D>::rs(acc_o, reg_p + 4 * i, sm90::swizzle128_descriptor(b + i * (16 * 128 / 16)));
    }
  }
  sm90::warpgroup_commit_batch();
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::issue_qk(uint32_t kv_idx, int bias_flags) {
  sm90::warpgroup_fence_operand(acc_s);
  // Each branch commits a batch of its own: if both shared a commit, the compiler would make the others wait for it.
  if constexpr (kIsFp8<T>) mma_qk<false>(stage_of(kv_idx));
  else if (__any_sync(0xffffffffu, bias_flags & kBiasInColumns)) mma_qk<true>(stage_of(kv_idx));
  else mma_qk<false>(stage_of(kv_idx));
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::issue_pv(uint32_t kv_idx) {
  consumer_wait(&s.v_full[stage_of(kv_idx)], phase_of(kv_idx));
  sm90::warpgroup_fence_operand(acc_o);
  mma_pv(stage_of(kv_idx));
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::wait_pv(uint32_t kv_idx) {
  sm90::warpgroup_wait<0>();
  sm90::warpgroup_fence_operand(acc_o);
  consumer_release(&s.v_empty[stage_of(kv_idx)]);
}

// Waits for the queries of a work tile.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::wait_q(uint32_t& q_phase) {
  consumer_wait(&s.q_full[wg], q_phase);
  // Rows by q_index came by cp.async.
  if (!GATHER && p.q_index != nullptr) sm90::fence_view_async_shared();
  q_phase ^= 1;
}

// Issues the first Q K product of a work tile. Returns the bias flags of its K tile.
template <typename T, int D, bool GATHER>
__device__ inline int Consumer<T, D, GATHER>::issue_first_qk(uint32_t kv_idx) {
  consumer_wait(&s.k_full[stage_of(kv_idx)], phase_of(kv_idx));
  const int bias_flags = bias_flags_of(kv_idx);
  issue_qk(kv_idx, bias_flags);
  return bias_flags;
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::clear() {
#pragma unroll
  for (int i = 0; i < D / 2; ++i) acc_o[i] = 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_max[r] = -INFINITY;
    row_sum[r] = 0.0f;
  }
  if constexpr (kIsFp8<T>) scales.value_scale = 0.0f;
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::warp_scheduler_sync() {
  sm90::named_barrier_sync(kWarpSchedulerWG1 + wg, 2 * kWarpgroupThreads);
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::warp_scheduler_arrive(const WorkTile& work) {
  int next = 1 - wg;
  if constexpr (Traits::kConsumers > 2) next = wg + 1 < Traits::kConsumers && work.has_rows(wg + 1) ? wg + 1 : 0;
  sm90::named_barrier_arrive(kWarpSchedulerWG1 + next, 2 * kWarpgroupThreads);
}

// All K tiles of a work tile, after issue_first_qk. `meanwhile` runs during the last P V product.
template <typename T, int D, bool GATHER>
template <typename Meanwhile>
__device__ inline void Consumer<T, D, GATHER>::attend(
    const WorkTile& work, uint32_t& kv_idx, int bias_flags, Meanwhile meanwhile) {
  softmax_of_tile<true>(work, work.n_block_begin, kv_idx, bias_flags);
  for (int n_block = work.n_block_begin + 1; n_block < work.n_block_end; ++n_block) {
    // Q K of this K tile and P V of the one before are issued together; the softmax runs during P V.
    consumer_wait(&s.k_full[stage_of(kv_idx + 1)], phase_of(kv_idx + 1));
    bias_flags = bias_flags_of(kv_idx + 1);
    if (work.has_rows(1)) warp_scheduler_sync();
    issue_qk(kv_idx + 1, bias_flags);
    issue_pv(kv_idx);
    if (work.has_rows(1)) warp_scheduler_arrive(work);
    ++kv_idx;
    softmax_of_tile<false>(work, n_block, kv_idx, bias_flags);
  }
  issue_pv(kv_idx);
  meanwhile();
  wait_pv(kv_idx);
  ++kv_idx;
}

// A work tile without queries for this warpgroup. It releases the stages that it does not read, each after a wait, so
// that it never arrives twice in one phase. It takes no turn of the ping-pong: no other warpgroup waits for it.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::skip(const WorkTile& work, uint32_t& kv_idx) {
  consumer_release(&s.q_empty[wg]);
  for (int n_block = work.n_block_begin; n_block < work.n_block_end; ++n_block) {
    sm90::mbarrier_wait(&s.k_full[stage_of(kv_idx)], phase_of(kv_idx));
    consumer_release(&s.k_empty[stage_of(kv_idx)]);
    sm90::mbarrier_wait(&s.v_full[stage_of(kv_idx)], phase_of(kv_idx));
    consumer_release(&s.v_empty[stage_of(kv_idx)]);
    ++kv_idx;
  }
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::run() {
  // Warpgroup 0 issues first.
  if (wg == 1) sm90::named_barrier_arrive(kWarpSchedulerWG1, 2 * kWarpgroupThreads);
  uint32_t kv_idx = 0;
  uint32_t q_phase = 0;
  WorkTile work, last;
  float x[D / 2];  // the result of `last`
  float lse[2];
  int out_rows[2];
  bool to_store = false;  // whether that is not stored yet
  bool more = work.get(p, s, 0);
  Scales next{};  // of `work`, of e4m3 numbers
  if constexpr (kIsFp8<T>) {
    if (more) next = look_up_scales(work);
  }
  for (int work_idx = 1;; ++work_idx) {
    if (more) wait_q(q_phase);
    if (__any_sync(0xffffffffu, more && work.has_rows(wg) && work.n_block_begin < work.n_block_end)) {
      // The first Q K product of a work tile runs while the result of the one before is stored.
      const int bias_flags = issue_first_qk(kv_idx);
      if (to_store) store(last, x, lse, out_rows);
      last = work;
      to_store = true;
      clear();
      if constexpr (kIsFp8<T>) scales = next;
      // Three consumer warpgroups leave no register for it: they read it after the loop.
      const int valid = Traits::kConsumers > 2 ? 0 : valid_rows(q_phase ^ 1);
      attend(last, kv_idx, bias_flags, [&] {
        look_up_out_rows(last, out_rows);
        more = work.get(p, s, work_idx);
        if constexpr (kIsFp8<T>) {
          if (more) next = look_up_scales(work);
        }
      });
      finalize(last, Traits::kConsumers > 2 ? valid_rows(q_phase ^ 1) : valid, x, lse);
    } else {
      if (to_store) store(last, x, lse, out_rows);
      if (!more) break;
      last = work;
      to_store = work.has_rows(wg);
      if (to_store) consumer_release(&s.q_empty[wg]);
      else skip(work, kv_idx);
      clear();
      finalize(last, 0, x, lse);
      look_up_out_rows(last, out_rows);
      more = work.get(p, s, work_idx);
      if constexpr (kIsFp8<T>) {
        if (more) next = look_up_scales(work);
      }
    }
  }
}

}  // namespace specedit::attn
