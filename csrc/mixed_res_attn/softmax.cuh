// SPDX-License-Identifier: Apache-2.0
// The consumer's online softmax.
//
// The scores of a K tile become weights relative to the running row maxima (FlashAttention's algorithm 1, in base 2). A
// row maximum may be too low: it is raised only where the sum of a thread's weights shows that it is far too low. So
// scores need not be compared with it, and the accumulators are seldom rescaled (softmax_without_max).
//
// Other cases take softmax_with_max, which takes the maximum of a chunk of keys before its exponents: a row that has no
// maximum yet; a row whose maximum is far (kNear); and a K tile whose biases are far above those before, for its
// weights could be infinite. If scores themselves make weights that large (69 above the row maximum), the products of
// the K tile are computed again.
//
// So softmax_without_max has a near row maximum always. Then a far bias is no fault: below the maximum its weight is 0
// however it is rounded, above it is infinite and the K tile is computed again. Beside a far maximum, one multiply-add
// from product to exponent would keep what rounding took off the maximum: exponentiate_far takes the difference first.
//
// The last P V product still reads reg_p and writes acc_o during the softmax: both are left alone until it has ended.
#pragma once

#include "mixed_res_attn/consumer.cuh"

namespace specedit::attn {

// The bias flags of a K tile whose stage is full.
template <typename T, int D, bool GATHER>
__device__ inline int Consumer<T, D, GATHER>::bias_flags_of(uint32_t kv_idx) const {
  const int stage = stage_of(kv_idx);
  if constexpr (!GATHER) return s.bias_flags[stage][0];
  const int4 flags = *reinterpret_cast<const int4*>(s.bias_flags[stage]);
  const float4 x = *reinterpret_cast<const float4*>(s.bias_constant[stage]);
  const int all = flags.x | flags.y | flags.z | flags.w;
  if (all & kBiasOutOfRange) return kBiasOutOfRange;
  return all == 0 && x.x == x.y && x.x == x.z && x.x == x.w ? 0 : kBiasInColumns;
}

// The row of K of slot `key`, negative for none.
template <typename T, int D, bool GATHER>
__device__ inline int64_t Consumer<T, D, GATHER>::k_row_of(const WorkTile& work, int key) const {
  if (key >= s.seqlen_k[work.batch]) return -1;
  if constexpr (!GATHER) return s.row_offset_k(work.batch) + key;
  const int row = p.kv_index[work.batch * p.kv_index_batch_stride + key];
  return row < p.rows_k ? row : -1;
}

// Adds the biases of a K tile, read from global memory: biases that the columns cannot hold, and those of products that
// were computed again. scaled: acc_s becomes scores, which any bias fits; else it stays in the unit of the products,
// where a far bias may become infinite.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::add_biases(const WorkTile& work, int n_block, bool scaled) {
  const float scale = scaled ? p.softmax_scale : 1.0f;
  const float bias_scale = scaled ? 1.0f : p.inv_softmax_scale;
  const float* bias = p.bias;
  if (bias != nullptr && p.cu_seqlens_k == nullptr) bias += work.batch * p.bias_batch_stride;
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = k_row_of(work, n_block * N + i * 2 + threadIdx.x % 4 * 2 + j);
      const float x = row < 0 ? -INFINITY : bias == nullptr ? 0.0f : bias[row] * bias_scale;
      acc_s[i + j] = fmaf(acc_s[i + j], scale, x);
      acc_s[i + 2 + j] = fmaf(acc_s[i + 2 + j], scale, x);
    }
  }
}

// The products of a K tile again, without biases, one row of K after the other.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::recompute_scores(const WorkTile& work, int n_block) {
  const int lane = threadIdx.x % 32;
  const T* q[2];  // null: no query, which counts as zeros
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int slot = work.m_block * kBlockM + first_row() + 8 * r;
    int64_t row = -1;
    if (slot < s.seqlen_q[work.batch]) {
      row = p.q_index == nullptr ? s.row_offset_q(work.batch) + slot
                                 : p.q_index[work.batch * p.q_index_batch_stride + slot];
    }
    q[r] = static_cast<const T*>(p.q) + (p.cu_seqlens_q == nullptr ? work.batch * p.q_strides.batch : 0) +
        row * p.q_strides.row + work.head * p.q_strides.head;
    if (row < 0 || row >= p.rows_q) q[r] = nullptr;
  }
  const T* k = static_cast<const T*>(p.k) + (p.cu_seqlens_k == nullptr ? work.batch * p.k_strides.batch : 0) +
      work.head / p.qhead_per_khead * p.k_strides.head;
  float scores[N / 2];
#pragma unroll 1
  for (int i = 0; i < N / 4; ++i) {
    const int key = n_block * N + i / 2 * 8 + lane % 4 * 2 + i % 2;
    const int64_t row = k_row_of(work, key);
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int chunk = 0; row >= 0 && chunk < D / 8; ++chunk) {
      T a[8], b[8];
      *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(k + row * p.k_strides.row + chunk * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (q[r] == nullptr) continue;
        *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(q[r] + chunk * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[r] = fmaf(static_cast<float>(a[j]), static_cast<float>(b[j]), sums[r]);
      }
    }
    scores[i / 2 * 4 + i % 2] = sums[0];
    scores[i / 2 * 4 + 2 + i % 2] = sums[1];
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc_s[i] = scores[i];
}

// For `exponentiate`: the row maxima are near. bias: the constant of the K tile.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::set_exponent_offset(float bias) {
#pragma unroll
  for (int r = 0; r < 2; ++r) exponent_offset[r] = (bias - row_max[r]) * kLog2E;
}

// Raises the maximum of row r to `high` if that is larger. Returns the factor for all weights before.
template <typename T, int D, bool GATHER>
__device__ inline float Consumer<T, D, GATHER>::raise_row_max(int r, float high) {
  const float raised = fmaxf(row_max[r], high);
  const float factor =
      raised == -INFINITY ? 1.0f : sm90::exp2_approx((row_max[r] - raised) * kLog2E);
  row_max[r] = raised;
  o_scale[r] *= factor;
  row_sum[r] *= factor;
  return factor;
}

// Products of chunk c to weights; `even` and `odd` receive their sums.
template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::exponentiate(float (&even)[2], float (&odd)[2]) {
  exponents<c>();
  sums<c>(even, odd);
}

template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::exponents() {
#pragma unroll
  for (int i = chunk_begin(c); i < chunk_begin(c + 1); ++i) {
    const float x = fmaf(acc_s[i], p.softmax_scale_log2, exponent_offset[i / 2 % 2]);
#ifdef W_NOEXP
    acc_s[i] = x;
#else
    acc_s[i] = sm90::exp2_approx(x);
#endif
  }
}

template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::sums(float (&even)[2], float (&odd)[2]) {
#pragma unroll
  for (int i = chunk_begin(c); i < chunk_begin(c + 1); i += 2) {
    const int r = i / 2 % 2;
#ifdef W_PAIRSUM
    even[r] += acc_s[i] + acc_s[i + 1];
#else
    even[r] += acc_s[i];
    odd[r] += acc_s[i + 1];
#endif
  }
}

// The same for a far bias or row maximum. A difference of two fp32 numbers that are close is exact. So no weight is
// above 2^8, as row_max is at most kRescaleThreshold below a score.
template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::exponentiate_far(float scale, float bias) {
#pragma unroll
  for (int i = chunk_begin(c); i < chunk_begin(c + 1); ++i) {
    const int r = i / 2 % 2;
    // No key yet: the difference of two -inf would be NaN.
    const float max = row_max[r] == -INFINITY ? 0.0f : row_max[r];
    acc_s[i] = sm90::exp2_approx((fmaf(acc_s[i], scale, bias) - max) * kLog2E);
    row_sum[r] += acc_s[i];
  }
}

// scale: from acc_s to scores without `bias`. far: whether that is not softmax_scale, or the bias is far.
template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::chunk_with_max(float scale, float bias, bool far) {
  float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = chunk_begin(c); i < chunk_begin(c + 1); ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], acc_s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) high[r] = fmaf(high[r], scale, bias);
  // A difference, for a far maximum plus the threshold is rounded.
  const bool above = high[0] - row_max[0] > kRescaleThreshold || high[1] - row_max[1] > kRescaleThreshold;
  if (__any_sync(0xffffffffu, above)) {
    needs_rescale = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = raise_row_max(r, quad_max(high[r]));
#pragma unroll
      for (int i = 2 * r; i < chunk_begin(c); i += 4) {
        acc_s[i] *= factor;
        acc_s[i + 1] *= factor;
      }
    }
    set_exponent_offset(bias);
  }
  if (__builtin_expect(__any_sync(0xffffffffu, far || is_far()), 0)) exponentiate_far<c>(scale, bias);
  else exponentiate<c>(row_sum, row_sum);
  if constexpr (c + 1 < kSoftmaxChunks) chunk_with_max<c + 1>(scale, bias, far);
}

// For the first K tile, or when the last P V product has ended. scaled: acc_s are scores.
template <typename T, int D, bool GATHER>
template <bool FIRST>
__device__ inline void Consumer<T, D, GATHER>::softmax_with_max(float bias, bool scaled) {
#if W_FIRST
  const float scale = scaled ? 1.0f : p.softmax_scale;
  o_scale[0] = o_scale[1] = 1.0f;
  float high[2] = {acc_s[0], acc_s[2]};
  float high_odd[2] = {acc_s[1], acc_s[3]};
#pragma unroll
  for (int i = 4; i < N / 2; i += 2) {
    const int r = i / 2 % 2;
    high[r] = fmaxf(high[r], acc_s[i]);
    high_odd[r] = fmaxf(high_odd[r], acc_s[i + 1]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) high[r] = fmaf(fmaxf(high[r], high_odd[r]), scale, bias);
  // A difference, for a far maximum plus the threshold is rounded.
  const bool above = high[0] - row_max[0] > kRescaleThreshold || high[1] - row_max[1] > kRescaleThreshold;
  const bool raise = __any_sync(0xffffffffu, above);
  if (raise) {
#pragma unroll
    for (int r = 0; r < 2; ++r) raise_row_max(r, quad_max(high[r]));
  }
  set_exponent_offset(bias);
  if (__builtin_expect(__any_sync(0xffffffffu, scaled || fabsf(bias) > kNear || is_far()), 0)) {
    far_chunks<0>(scale, bias);
  } else {
    float odd[2] = {0.0f, 0.0f};
    near_chunks<0>(row_sum, odd);
    row_sum[0] += odd[0];
    row_sum[1] += odd[1];
  }
  pack_p<0, N / 2>();
  if (!FIRST && raise) rescale_o();
#else
  needs_rescale = false;
  o_scale[0] = o_scale[1] = 1.0f;
  set_exponent_offset(bias);
  chunk_with_max<0>(scaled ? 1.0f : p.softmax_scale, bias, scaled || fabsf(bias) > kNear);
  pack_p<0, N / 2>();
  if (needs_rescale) rescale_o();
#endif
}

template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::near_chunks(float (&even)[2], float (&odd)[2]) {
  exponentiate<c>(even, odd);
  if constexpr (c + 1 < kSoftmaxChunks) near_chunks<c + 1>(even, odd);
}

template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::far_chunks(float scale, float bias) {
  exponentiate_far<c>(scale, bias);
  if constexpr (c + 1 < kSoftmaxChunks) far_chunks<c + 1>(scale, bias);
}

template <typename T, int D, bool GATHER>
template <int c>
__device__ inline void Consumer<T, D, GATHER>::chunk_without_max(
    uint32_t kv_idx, float (&even)[2], float (&odd)[2]) {
  if constexpr (c == kPvWaitChunk) {
    // Never true. Without it ptxas moves the wait: exponentials that should precede it follow it, or the reverse.
    if (c > 0 && even[0] + even[1] + odd[0] + odd[1] < 0.0f) {
      sm90::nanosleep();
      exponent_offset[0] = exponent_offset[1] = -INFINITY;
    }
    wait_pv(kv_idx - 1);
  }
  exponentiate<c>(even, odd);
  if constexpr (c >= kPvWaitChunk && c > 0) pack_p<c == kPvWaitChunk ? 0 : chunk_begin(c - 1), chunk_begin(c)>();
  if constexpr (c + 1 < kSoftmaxChunks) chunk_without_max<c + 1>(kv_idx, even, odd);
  else pack_p<chunk_begin(c), N / 2>();
}

// Returns false where weights are infinite, or too large to be rescaled. Then only acc_s and reg_p have changed.
template <typename T, int D, bool GATHER>
__device__ inline bool Consumer<T, D, GATHER>::softmax_without_max(uint32_t kv_idx, float bias) {
  set_exponent_offset(bias);
  float even[2] = {0.0f, 0.0f};
  float odd[2] = {0.0f, 0.0f};
  chunk_without_max<0>(kv_idx, even, odd);
  even[0] += odd[0];
  even[1] += odd[1];
  if (__builtin_expect(__any_sync(0xffffffffu, even[0] > kRescaleSum || even[1] > kRescaleSum), 0)) {
    if (__any_sync(0xffffffffu, even[0] > kRecomputeThreshold || even[1] > kRecomputeThreshold)) return false;
    rescale_large_weights(even);
  }
  row_sum[0] += even[0];
  row_sum[1] += even[1];
  return true;
}

// Some weights of this K tile are large: the row maxima are raised until the largest weight is 1.
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::rescale_large_weights(float (&sum)[2]) {
  o_scale[0] = o_scale[1] = 1.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = 1.0f;
#pragma unroll
    for (int i = 2 * r; i < N / 2; i += 4) high = fmaxf(fmaxf(high, acc_s[i]), acc_s[i + 1]);
    const float factor = raise_row_max(r, row_max[r] + log2f(quad_max(high)) * kLn2);
    sum[r] *= factor;
#pragma unroll
    for (int i = 2 * r; i < N / 2; i += 4) {
      acc_s[i] *= factor;
      acc_s[i + 1] *= factor;
    }
  }
  pack_p<0, N / 2>();
  rescale_o();
}

// FIRST: the first K tile of a work tile; then no P V product is in flight.
template <typename T, int D, bool GATHER>
template <bool FIRST>
__device__ inline void Consumer<T, D, GATHER>::softmax(
    const WorkTile& work, int n_block, uint32_t kv_idx, int bias_flags) {
  const float bias =
      bias_flags & (kBiasInColumns | kBiasOutOfRange) ? 0.0f : s.bias_constant[stage_of(kv_idx)][0];
  const bool with_max = __any_sync(0xffffffffu, is_far()) || bias_flags & kBiasJump;
  if (FIRST) sm90::warpgroup_wait<0>();
  else sm90::warpgroup_wait<1>();
  sm90::warpgroup_fence_operand(acc_s);
  consumer_release(&s.k_empty[stage_of(kv_idx)]);
  if (n_block + 1 == work.n_block_end) consumer_release(&s.q_empty[wg]);
  const bool out_of_range = bias_flags & kBiasOutOfRange;
  if (__builtin_expect(out_of_range, 0)) add_biases(work, n_block, FIRST || with_max);
  if constexpr (FIRST) {
    softmax_with_max<true>(bias, out_of_range);
  } else {
    bool done = false;
    if (__builtin_expect(with_max, 0)) {
      wait_pv(kv_idx - 1);
    } else {
      done = softmax_without_max(kv_idx, bias);
      if (__builtin_expect(!done, 0)) {
        recompute_scores(work, n_block);
        if (bias_flags & (kBiasInColumns | kBiasOutOfRange)) add_biases(work, n_block, true);
      }
    }
    if (__builtin_expect(!done, 0)) {
      softmax_with_max<false>(bias, bias_flags & (with_max ? kBiasOutOfRange : kBiasInColumns | kBiasOutOfRange));
    }
  }
}

template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::rescale_o() {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    acc_o[4 * i + 0] *= o_scale[0];
    acc_o[4 * i + 1] *= o_scale[0];
    acc_o[4 * i + 2] *= o_scale[1];
    acc_o[4 * i + 3] *= o_scale[1];
  }
}

// Weights to the operand of the P V product. An accumulator has the layout of an operand in registers: its groups of 8
// columns 2 i and 2 i + 1 are the operand's 16 columns i.
template <typename T, int D, bool GATHER>
template <int BEGIN, int END>
__device__ inline void Consumer<T, D, GATHER>::pack_p() {
#pragma unroll
  for (int i = BEGIN / 2; i < END / 2; ++i) reg_p[i] = sm90::pack<T>(acc_s[2 * i], acc_s[2 * i + 1]);
}

}  // namespace specedit::attn
