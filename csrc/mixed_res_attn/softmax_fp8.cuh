// SPDX-License-Identifier: Apache-2.0
// The consumer's online softmax of e4m3 numbers.
//
// A weight is rounded to e4m3 for the P V product, so the row maximum must be near: the largest weight so far is 2^8
// (kWeightShift) to 2^8.8, below e4m3's 448, and weights down to 2^-14 of it are normal numbers. So each K tile has its
// maximum taken, but the accumulators are rescaled only where it exceeds the one before by kWeightSlack. Sums are of
// weights before they are rounded.
//
// Exponents are acc_s * unit + bias - row_max. One multiply-add makes them where the biases of the tile are one number.
// Where they differ (key_table), where scales of k come by row, and where the row maximum is far, the scores are made
// first, and the difference is taken then: so no exponent is above kWeightShift + kWeightSlack.
#pragma once

#include <climits>

#include "mixed_res_attn/consumer.cuh"

namespace specedit::attn {

constexpr float kWeightShift = 8;
constexpr float kWeightSlack = 0.8f;
constexpr int kPvWaitChunkFp8 = 2;  // the chunk before which it waits for the last P V product

// The scales of this thread's rows and of the head. By row, those of k and v come with each K tile.
template <typename T, int D, bool GATHER>
__device__ inline typename Consumer<T, D, GATHER>::Scales Consumer<T, D, GATHER>::look_up_scales(
    const WorkTile& work) const {
  Scales found{};
  float of_keys = p.softmax_scale_log2;
  if constexpr (!kByRow<T>) {
    const int kv_head = work.head / p.qhead_per_khead;
    of_keys *= p.k_scale[work.batch * p.k_scale_strides.batch + kv_head * p.k_scale_strides.head];
    found.value_scale = p.v_scale[work.batch * p.v_scale_strides.batch + kv_head * p.v_scale_strides.head];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int slot = work.m_block * kBlockM + first_row() + 8 * r;
    int64_t row = -1;
    if (slot < s.seqlen_q[work.batch]) {
      row = p.q_index == nullptr ? slot : p.q_index[work.batch * p.q_index_batch_stride + slot];
    }
    if (row < 0 || row >= p.rows_q) continue;
    found.unit[r] = of_keys *
        p.q_scale[work.batch * p.q_scale_strides.batch + row * p.q_scale_strides.row +
                  work.head * p.q_scale_strides.head];
  }
  return found;
}

template <typename T, int D, bool GATHER>
__device__ inline bool Consumer<T, D, GATHER>::is_far_fp8() const {
  return (fabsf(row_max[0]) > kNear && row_max[0] != -INFINITY) ||
      (fabsf(row_max[1]) > kNear && row_max[1] != -INFINITY);
}

// Products to scores in base 2. Of every 16 keys 16 i this thread has 16 i + 4 (lane % 4) and the next three: two in the
// first half of acc_s, two in the second (see key_of_row).
template <typename T, int D, bool GATHER>
__device__ inline void Consumer<T, D, GATHER>::add_key_biases(int stage) {
  const float* const bias = s.key_table(stage, kKeyBias) + threadIdx.x % 4 * 4;
  const float* const scale = bias + kKeyScale * N;
#pragma unroll
  for (int i = 0; i < N / 16; ++i) {
    const float4 b = *reinterpret_cast<const float4*>(bias + 16 * i);
    float4 k = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if constexpr (kByRow<T>) k = *reinterpret_cast<const float4*>(scale + 16 * i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const low = acc_s + 4 * i + 2 * r;
      float* const high = low + N / 4;
      if constexpr (kByRow<T>) {
        low[0] *= k.x;
        low[1] *= k.y;
        high[0] *= k.z;
        high[1] *= k.w;
      }
      low[0] = fmaf(low[0], scales.unit[r], b.x);
      low[1] = fmaf(low[1], scales.unit[r], b.y);
      high[0] = fmaf(high[0], scales.unit[r], b.z);
      high[1] = fmaf(high[1], scales.unit[r], b.w);
    }
  }
}

// Raises the row maxima where a score is above them by more than the slack. SCORES: acc_s are scores, else products,
// which with `constant` become scores.
template <typename T, int D, bool GATHER>
template <bool SCORES>
__device__ inline void Consumer<T, D, GATHER>::raise_row_max_fp8(float constant) {
  float high[2] = {-INFINITY, -INFINITY};
  bool done = false;
  if constexpr (!SCORES) {
    // Numbers that are not negative are in the order of their bits, and integers have a maximum of three.
    int bits[2] = {INT_MIN, INT_MIN};
#pragma unroll
    for (int i = 0; i < N / 2; i += 2) {
      bits[i / 2 % 2] = sm90::max3(bits[i / 2 % 2], __float_as_int(acc_s[i]), __float_as_int(acc_s[i + 1]));
    }
    high[0] = __int_as_float(bits[0]);
    high[1] = __int_as_float(bits[1]);
    done = !__any_sync(0xffffffffu, bits[0] < 0 || bits[1] < 0);
  }
  if (!done) {
    high[0] = high[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], acc_s[i]);
  }
  if constexpr (!SCORES) {
#pragma unroll
    for (int r = 0; r < 2; ++r) high[r] = fmaf(high[r], scales.unit[r], constant);
  }
  // A difference: far maxima plus the slack are rounded.
  constexpr float kMost = kWeightShift + kWeightSlack;
  if (!__any_sync(0xffffffffu, high[0] - row_max[0] > kMost || high[1] - row_max[1] > kMost)) return;
  needs_rescale = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Rounded up, so that beside a far maximum no weight is above 2^kWeightShift.
    const float raised = fmaxf(row_max[r], sm90::add_rounded_up(quad_max(high[r]), -kWeightShift));
    const float factor = raised == -INFINITY ? 1.0f : sm90::exp2_approx(row_max[r] - raised);
    row_max[r] = raised;
    o_scale[r] *= factor;
    row_sum[r] *= factor;
  }
}

// Exponentials of chunk c: acc_s becomes weights. Those of the chunks before, and at last its own, become reg_p.
template <typename T, int D, bool GATHER>
template <bool FIRST, int c>
__device__ inline void Consumer<T, D, GATHER>::weights_of_chunk(
    int stage, uint32_t kv_idx, const float (&factor)[2], float (&even)[2], float (&odd)[2]) {
  constexpr int kBegin = c * (N / 16) / kSoftmaxChunks;
  constexpr int kEnd = (c + 1) * (N / 16) / kSoftmaxChunks;
  if constexpr (c == kPvWaitChunkFp8 && !FIRST) {
    // Never true, as in chunk_without_max: it keeps the wait where it is.
    if (even[0] + even[1] + odd[0] + odd[1] < 0.0f) {
      sm90::nanosleep();
      exponent_offset[0] = exponent_offset[1] = -INFINITY;
    }
    wait_pv(kv_idx - 1);
    if (needs_rescale) rescale_o();
  }
  const float* const value_scales = s.key_table(stage, kValueScale) + threadIdx.x % 4 * 4;
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) {
    float4 v = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if constexpr (kByRow<T>) v = *reinterpret_cast<const float4*>(value_scales + 16 * i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const x = acc_s + half * (N / 4) + 4 * i + 2 * r;
        x[0] = sm90::exp2_approx(fmaf(x[0], factor[r], exponent_offset[r]));
        x[1] = sm90::exp2_approx(fmaf(x[1], factor[r], exponent_offset[r]));
        even[r] += x[0];
        odd[r] += x[1];
        if constexpr (kByRow<T>) {
          x[0] *= half == 0 ? v.x : v.z;
          x[1] *= half == 0 ? v.y : v.w;
        }
      }
    }
  }
  if constexpr (c >= kPvWaitChunkFp8 && c > 0) {
    pack_p_fp8<c == kPvWaitChunkFp8 ? 0 : (c - 1) * (N / 16) / kSoftmaxChunks, kBegin>();
  }
  if constexpr (c + 1 < kSoftmaxChunks) weights_of_chunk<FIRST, c + 1>(stage, kv_idx, factor, even, odd);
  else pack_p_fp8<kBegin, kEnd>();
}

// FIRST: the first K tile of a work tile; then no P V product is in flight.
template <typename T, int D, bool GATHER>
template <bool FIRST>
__device__ inline void Consumer<T, D, GATHER>::softmax_fp8(
    const WorkTile& work, int n_block, uint32_t kv_idx, int bias_flags) {
  const int stage = stage_of(kv_idx);
  float constant = s.bias_constant[stage][0];
  if (FIRST) sm90::warpgroup_wait<0>();
  else sm90::warpgroup_wait<1>();
  sm90::warpgroup_fence_operand(acc_s);
  if (n_block + 1 == work.n_block_end) consumer_release(&s.q_empty[wg]);
  needs_rescale = false;
  o_scale[0] = o_scale[1] = 1.0f;
  float factor[2] = {scales.unit[0], scales.unit[1]};  // from acc_s to an exponent
  bool scores = kByRow<T> || __any_sync(0xffffffffu, bias_flags & kBiasInTable);
  if (scores) {
    add_key_biases(stage);
    raise_row_max_fp8<true>(0.0f);
  } else {
    raise_row_max_fp8<false>(constant);
    scores = __any_sync(0xffffffffu, is_far_fp8());
    if (__builtin_expect(scores, 0)) add_key_biases(stage);
  }
  if (scores) {
    factor[0] = factor[1] = 1.0f;
    constant = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) exponent_offset[r] = constant - (row_max[r] == -INFINITY ? 0.0f : row_max[r]);
  if constexpr (kByRow<T>) {
    const float largest = s.bias_constant[stage][1];
    if (__any_sync(0xffffffffu, largest > scales.value_scale)) {
      needs_rescale = true;
      o_scale[0] *= scales.value_scale / largest;
      o_scale[1] *= scales.value_scale / largest;
      scales.value_scale = largest;
    }
  } else {
    consumer_release(&s.k_empty[stage]);
  }
  float even[2] = {0.0f, 0.0f};
  float odd[2] = {0.0f, 0.0f};
  weights_of_chunk<FIRST, 0>(stage, kv_idx, factor, even, odd);
  if constexpr (kByRow<T>) consumer_release(&s.k_empty[stage]);
  row_sum[0] += even[0] + odd[0];
  row_sum[1] += even[1] + odd[1];
}

// Weights of keys 16 i to 16 i + 15 for i from BEGIN to END, as the operand of the P V product.
template <typename T, int D, bool GATHER>
template <int BEGIN, int END>
__device__ inline void Consumer<T, D, GATHER>::pack_p_fp8() {
#pragma unroll
  for (int i = BEGIN; i < END; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const low = acc_s + 4 * i + 2 * r;
      const float* const high = low + N / 4;
      reg_p[2 * i + r] = sm90::pack_e4m3(low[0], low[1], high[0], high[1]);
    }
  }
}

}  // namespace specedit::attn
