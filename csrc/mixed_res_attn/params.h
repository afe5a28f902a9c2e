// SPDX-License-Identifier: Apache-2.0
// Arguments of the attention's kernels on sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "mixed_res_attn/plan.h"

namespace specedit::attn {

constexpr int kGatherThreads = 256;
// A row of K that is used by at least so many work tiles is gathered once, before the attention.
constexpr int kPregatherMinTiles = 20;
constexpr int kCombineThreads = 256;
constexpr int kCombineRows = kCombineThreads / 32;  // of a CTA, one for each warp

// By how much a score may exceed the running row maximum before the accumulators are rescaled, as a base-2 exponent.
constexpr float kRescaleThreshold = 8;

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
  // Results of splits: fp32 [slots, kBlockM, D], and base-2 lse [slots, kBlockM]. Slots: first splits, begins of
  // remainders, one for each stream-K CTA. Null where nothing can be split.
  float *out_partial, *lse_partial;
  SplitTile* split_tiles;       // max_split_tiles of them, written by the kernel where the host made no plan
  float softmax_scale_log2;     // scale * log2(e): from a raw score to an exponent
  float inv_softmax_scale;      // 1 / scale: from a bias to a raw score
  float rescale_threshold;      // kRescaleThreshold as a raw score
  int batch, heads, qhead_per_khead;
  int max_seqlen_q, max_seqlen_k;  // slots of a batch entry
  int rows_q, rows_k, rows_out;    // rows in memory
  int max_split_tiles;
  HostPlan plan;
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
