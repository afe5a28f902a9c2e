// SPDX-License-Identifier: Apache-2.0
// Shared memory of the attention, its barriers and its pipelines.
#pragma once

#include <type_traits>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

// Named barriers of the CTA; 0 is __syncthreads. The consumer warpgroups issue their matrix products in turn
// (ping-pong): each waits on its own barrier, and arrives on the next one's.
enum NamedBarrier : int {
  kWarpSchedulerWG1 = 1,
  kWarpSchedulerWG2 = 2,
  kWarpSchedulerWG3 = 3,
};

// What a producer tells of the biases of a K tile. No flag: the bias is one number for the whole tile.
enum BiasFlags : int {
  kBiasInColumns = 1,   // biases differ, and the matrix product adds them (see producer_bias.cuh)
  kBiasOutOfRange = 2,  // biases differ, and one is too large for the columns: the consumer adds them
  kBiasJump = 4,        // a bias is so far above those of the tiles before that weights may not be finite
  kBiasInTable = 8,     // e4m3 numbers: the consumer adds the biases of key_table
};

// Of e4m3 numbers: what the consumer takes of each key of a K tile. The scales are there where they come by row.
enum KeyTable : int {
  kKeyBias = 0,    // bias * log2(e), -inf for no key
  kKeyScale = 1,   // of the row of k
  kValueScale = 2, // of the row of v, over the largest up to this K tile
};

// What the kernel writes.
template <typename T>
using OutputOf = std::conditional_t<kIsFp8<T>, __nv_bfloat16, T>;

template <typename T, int D, bool GATHER>
struct KernelTraits {
  static constexpr TileShape kTile = kIsFp8<T> ? kTileOfFp8 : tile_of(D, GATHER);
  static constexpr int kConsumers = kTile.consumers;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBlockM = kTile.block_m();
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kIsFp8<T> ? 3 : D == 64 ? 4 : 2;
  static constexpr int kProducerRegisters = GATHER || kByRow<T> ? 56 : kConsumers == 3 ? 32 : 40;
  // An SM has 512 registers for each of 128 threads. All warpgroups start with the same multiple of 8: three with 168.
  static constexpr int kRegisters = 512 / (1 + kConsumers) / 8 * 8 * (1 + kConsumers);
  static constexpr int kConsumerRegisters = (kRegisters - kProducerRegisters) / (8 * kConsumers) * 8;
  // Arrivals that fill a K or V stage; a K stage has those of the biases, too.
  static constexpr int kLoadArrivals = GATHER ? kWarpgroupThreads : 1;
  static constexpr int kBiasWarps = GATHER ? kWarpgroupThreads / 32 : 1;
  // Rows by kv_index: eight lanes copy 128 bytes of a row, so that the warpgroup copies 16 rows in a step.
  static constexpr int kCopySteps = kBlockN / 16;
  static constexpr int kKeyTables = kByRow<T> ? 3 : 1;

  // kTile as a value: device code has no address of it.
  SPECEDIT_HOST_DEVICE static constexpr TileShape tile() { return {kConsumers, kBlockN}; }
};

// K and V are pipelines of kStages stages. A stage has two mbarriers: the producer arrives on `full`, and the consumer
// warps that read the stage arrive on `empty`. A wait knows a phase by its parity alone. So a thread may wait on an
// mbarrier only if the next phase cannot complete without that thread: else it could miss two phases and wait for ever.
// That is why only the producer of a stage waits on `empty`. Biases use K's mbarriers: without them no K stage is full.
template <typename T, int D, bool GATHER>
struct SharedStorage {
  using Traits = KernelTraits<T, D, GATHER>;
  T q[Traits::kConsumers][kWarpgroupRows * D];
  T k[Traits::kStages][Traits::kBlockN * D];
  T v[Traits::kStages][Traits::kBlockN * D];
  // Bias columns: 8 columns of a key, 8 zero columns beside them, and the 8 rows of ones in Q that all queries share.
  // Of e4m3 numbers none of these are used: the tables of keys lie in the place of the first.
  std::conditional_t<kIsFp8<T>, float, T>
      bias_columns[Traits::kStages][Traits::kBlockN * (kIsFp8<T> ? Traits::kKeyTables : 8)];
  T zero_columns[Traits::kBlockN * 8];
  T ones[2][8 * 8];
  // The bias of a tile if it is one number, and its BiasFlags. By kv_index each producer warp has its own keys of a
  // tile. Where scales come by row, a second number: the largest scale of v up to this tile.
  __align__(16) float bias_constant[Traits::kStages][Traits::kBiasWarps + (kByRow<T> ? 1 : 0)];
  __align__(16) int bias_flags[Traits::kStages][Traits::kBiasWarps];
  // Rows by kv_index of two K tiles, for each producer warp and each group of eight lanes.
  __align__(16) int kv_rows[GATHER ? 2 : 1][GATHER ? 4 : 1][4][GATHER ? (Traits::kCopySteps + 3) / 4 * 4 : 1];
  // Bits: which rows of Q exist. Written where queries come by index. Two work tiles have a copy each: the queries of
  // the next may arrive before the rows of this one are stored.
  uint32_t q_valid[2][Traits::kConsumers][kWarpgroupRows / 32];
  uint64_t q_full[Traits::kConsumers], q_empty[Traits::kConsumers];
  uint64_t k_full[Traits::kStages], k_empty[Traits::kStages], v_full[Traits::kStages], v_empty[Traits::kStages];
  uint64_t last_block_loaded;  // a K tile that has rows of another sequence behind its last key
  // The plan. By batch entry: lengths, the first tile, the first rows (packed layout).
  int seqlen_q[kMaxBatch], seqlen_k[kMaxBatch], first_tile[kMaxBatch];
  int offset_q[GATHER ? 1 : kMaxBatch], offset_k[GATHER ? 1 : kMaxBatch];  // with kv_index nothing is packed
  // full_waves: waves in which this CTA has a tile that is not split. range_step: cost from the begin of a range to the
  // next. range_begin, range_end: this CTA's range of the remainders.
  int num_tiles, full_wave_tiles, full_waves, cta_rank, partial_wave_tiles, cost_limit, range_step;
  StreamKPosition range_begin, range_end;

  __device__ float* key_table(int stage, KeyTable table) { return bias_columns[stage] + table * Traits::kBlockN; }
  __device__ int row_offset_q(int batch) const { return GATHER ? 0 : offset_q[batch]; }
  __device__ int row_offset_k(int batch) const { return GATHER ? 0 : offset_k[batch]; }
};

// Stage and mbarrier parity of a producer's next write.
template <int STAGES>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// K rows of e4m3 numbers lie in another order in a K tile: the first half has keys 4 i and 4 i + 1, the second 4 i + 2
// and 4 i + 3. So a thread's scores are of 4 keys side by side, and its weights are the operand of P V as they are:
// there, a thread has 4 contiguous columns where an accumulator has 2.
template <int BLOCK_N>
__device__ inline int key_of_row(int row) {
  return row % (BLOCK_N / 2) / 2 * 4 + row / (BLOCK_N / 2) * 2 + row % 2;
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of `rows` rows with the 64-byte swizzle.
__device__ inline uint32_t swizzle64_offset(int row, int chunk, int rows) {
  return (chunk / 4) * rows * 64 + row * 64 + (chunk ^ row / 2) % 4 * 16;
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of `rows` rows with the 128-byte swizzle.
__device__ inline uint32_t swizzle128_offset(int row, int chunk, int rows) {
  return (chunk / 8) * rows * 128 + row * 128 + ((chunk ^ row) % 8) * 16;
}

}  // namespace specedit::attn
