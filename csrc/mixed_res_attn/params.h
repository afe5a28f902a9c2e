// SPDX-License-Identifier: Apache-2.0
// What the host and the kernels of the attention on sm_90a share: tile sizes, arguments, the plan's arithmetic.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace specedit::attn {

constexpr int kGroup = 128;        // threads of a warp group
constexpr int kThreads = 384;
constexpr int kRows = 64;          // queries of a computing warp group
constexpr int kBlockM = 128;       // queries of a tile
constexpr int kBlockN = 176;       // keys of a tile
constexpr int kSoftmaxChunks = 4;  // chunks of keys that a tile's softmax goes in
constexpr int kMaxBatch = 512;     // batch entries whose lengths fit in shared memory
constexpr int kMaxParts = 16;
constexpr float kSlack = 8;        // how far exponents may exceed the running maximum's
constexpr int kPartCost = 6;       // start and end of a part, and the join of all, in quarters of a K tile's time
constexpr int kJoinCost = 12;

struct Strides {
  int64_t batch, row, head;
};

// A tile that was cut: where its rows go.
struct CutTile {
  int b, head, tile, rows;
};

struct Params {
  CUtensorMap q_map, k_map, v_map;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides, out_strides;
  const float* bias;
  const int *q_index, *kv_index, *out_index, *q_lens, *kv_lens, *cu_q, *cu_k;
  int64_t bias_batch, q_index_batch, kv_index_batch, out_index_batch, lse_batch, lse_head;
  void* out;
  float* lse;
  // Parts of cut tiles: fp32 [slots, kBlockM, D], then base-2 lse [slots, kBlockM]; the cut tiles; {tiles, parts}.
  float *part_out, *part_lse;
  CutTile* cut_tiles;
  int* cut_count;
  float score_unit;   // scale * log2(e): from a raw score to an exponent
  float bias_unit;    // 1 / scale: from a bias to a raw score
  float slack;        // kSlack as a raw score
  int batch, heads, group, num_q, num_k, rows_q, rows_k, rows_out, slots;
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Cost of cutting each of `rest` tiles of `blocks` K tiles into `parts`, on `workers` blocks; in quarters of a K tile.
__host__ __device__ inline int cut_cost(int rest, int blocks, int parts, int workers) {
  const int rounds = ceil_div(rest * parts, workers);
  return rounds * (4 * ceil_div(blocks, parts) + kPartCost) + (parts > 1 ? kJoinCost : 0);
}

__host__ __device__ inline bool may_cut(int rest, int blocks, int parts, int slots) {
  return parts == 1 || (2 * parts <= blocks && rest * parts <= slots);
}

// How many parts: the cheapest, the fewest of equals.
__host__ inline int best_parts(int rest, int blocks, int workers, int slots) {
  int best = 1;
  if (rest == 0) return best;
  for (int parts = 2; parts <= kMaxParts; ++parts) {
    if (!may_cut(rest, blocks, parts, slots)) continue;
    if (cut_cost(rest, blocks, parts, workers) < cut_cost(rest, blocks, best, workers)) best = parts;
  }
  return best;
}

// Runs the attention on `blocks` blocks, then the kernel that joins cut tiles if there can be any: at most `cut_tiles`.
template <typename T, int D, bool GATHER>
void launch(const Params& p, int blocks, int cut_tiles, cudaStream_t stream);

}  // namespace specedit::attn
