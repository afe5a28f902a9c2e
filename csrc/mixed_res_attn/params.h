// SPDX-License-Identifier: Apache-2.0
// Arguments of the attention's kernels on sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "mixed_res_attn/e4m3.h"
#include "mixed_res_attn/plan.h"

namespace specedit::attn {

constexpr int kGatherThreads = 256;
// A row of K that is used by at least so many work tiles is gathered once, before the attention.
constexpr int kPregatherMinTiles = 20;
constexpr int kCombineThreads = 256;
constexpr int kCombineRows = kCombineThreads / 32;  // of a CTA, one for each warp

// e4m3 numbers: V lies in panels of so many keys, a channel's side by side; in shared memory with the 64-byte swizzle.
constexpr int kValuePanel = 64;

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2E = 1.4426950408889634f;

// A score counts as it is after the scale and with its bias, so that a bias of any size is one that fp32 holds.
// By how much a score may exceed the running row maximum before the accumulators are rescaled: weights up to 2^8.
constexpr float kRescaleThreshold = 8 * kLn2;
// Row maxima and biases up to this size are near: rounding takes no more than 2^-10 off an exponent that one
// multiply-add makes of a product. Off a bias of 1e9 it may take 64, and 2^64 is infinite in fp16.
constexpr float kNear = 4096;
// The largest bias that columns of K add (see producer_bias.cuh). It lets in fp16's lowest number, a usual mask; beside
// it the tensor core's rounding is still less than a tenth.
constexpr float kColumnBiasMax = 65536;
// What those columns hold in fp16, in the unit of the products.
constexpr double kColumnMaxFp16 = 6e7;

struct Strides {
  int64_t batch, row, head;
};

// A tile of the last partial wave, for the combine kernel. Split 0 is its first split, split 1 the begin of its
// remainder; stream-K CTA number `streamk_cta` and the following compute the others. partial_wave_tiles: tiles of that
// wave. num_splits 0: the tile is not split.
struct SplitTile {
  int batch, head, m_block, rows, num_splits, streamk_cta, partial_wave_tiles;
};

struct Params {
  CUtensorMap tma_q, tma_k, tma_v;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides, out_strides;
  const float* bias;
  const int *q_index, *kv_index, *out_index, *q_lens, *kv_lens, *cu_seqlens_q, *cu_seqlens_k;
  int64_t bias_batch_stride, q_index_batch_stride, kv_index_batch_stride, out_index_batch_stride;
  int64_t lse_batch_stride, lse_head_stride;
  void* out;
  float* lse;
  // Results of splits: fp32 [slots, rows, D], and row maximum and sum of weights [slots, rows], with the rows of a
  // whole tile. Slots: first splits, begins of remainders, one for each stream-K CTA. Null where nothing can be split.
  float* out_partial;
  float2* max_sum_partial;
  SplitTile* split_tiles;       // max_split_tiles of them, written by the kernel where the host made no plan
  float softmax_scale;          // from a product to a score
  float softmax_scale_log2;     // scale * log2(e): from a product to an exponent
  float inv_softmax_scale;      // 1 / scale: from a bias to what is added to a product
  float column_bias_max;        // the largest bias that columns of K add
  int batch, heads, qhead_per_khead;
  int max_seqlen_q, max_seqlen_k;  // slots of a batch entry
  int rows_q, rows_k, rows_out;    // rows in memory
  int max_split_tiles;
  HostPlan plan;
  // Of e4m3 numbers alone: their scales. The row stride of a scale a head is 0.
  const float *q_scale, *k_scale, *v_scale;
  Strides q_scale_strides, k_scale_strides, v_scale_strides;

  void set_scale(double scale, bool half) {
    softmax_scale = static_cast<float>(scale);
    softmax_scale_log2 = static_cast<float>(scale * 1.4426950408889634);
    inv_softmax_scale = static_cast<float>(1.0 / scale);
    column_bias_max = kColumnBiasMax;
    if (half) column_bias_max = static_cast<float>(std::min(double{kColumnBiasMax}, kColumnMaxFp16 * scale));
  }
};

// Arguments of the kernel that gathers rows by kv_index before the attention. Strides and words are of 16 bytes; the
// outputs are contiguous.
struct GatherParams {
  const uint4 *k, *v;
  Strides k_strides, v_strides;
  const float* bias;
  const int *index, *lens;
  int64_t bias_batch_stride, index_batch_stride;
  uint4 *k_out, *v_out;
  float* bias_out;
  int batch, slots, rows;
  int words, head_shift;  // `words` of a row; 2^head_shift of a head
};

// Launches the attention on `num_ctas` CTAs, then the combine kernel if tiles may be split.
template <typename T, int D, bool GATHER>
void launch(const Params& p, int num_ctas, cudaStream_t stream);

}  // namespace specedit::attn
