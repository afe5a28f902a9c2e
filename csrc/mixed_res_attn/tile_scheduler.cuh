// SPDX-License-Identifier: Apache-2.0
// The tile scheduler: the plan in shared memory, and the work tiles of a CTA. plan.h says how tiles are split.
#pragma once

#include "mixed_res_attn/shared_storage.cuh"

namespace specedit::attn {

__device__ inline int clamp(int x, int low, int high) { return min(max(x, low), high); }

// The length of a batch entry and its first row; `slots` is the most it can be.
__device__ inline int length_of(const int* lens, const int* cu_seqlens, int batch, int slots, int rows, int& offset) {
  offset = 0;
  int length = slots;
  if (cu_seqlens != nullptr) {
    offset = clamp(cu_seqlens[batch], 0, rows);
    length = min(clamp(cu_seqlens[batch + 1], offset, rows) - offset, slots);
  }
  return lens == nullptr ? length : clamp(lens[batch], 0, length);
}

// The batch entry of a tile.
template <typename Storage>
__device__ inline int batch_of(const Params& p, const Storage& s, int tile) {
  int low = 0;
  int high = p.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (s.first_tile[middle] <= tile) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Batch entry, head and query block of a tile.
struct TileCoord {
  int batch, head, m_block;

  template <typename Storage>
  __device__ static TileCoord of(const Params& p, const Storage& s, int tile) {
    if (p.plan.planned) return of_host_plan<Storage::Traits::kBlockM>(p, tile);
    const int batch = batch_of(p, s, tile);
    const int m_blocks = ceil_div(s.seqlen_q[batch], Storage::Traits::kBlockM);
    const int head = (tile - s.first_tile[batch]) / m_blocks;
    return {batch, head, tile - s.first_tile[batch] - head * m_blocks};
  }

  // Where all batch entries have the same lengths they count as more heads.
  template <int BLOCK_M>
  __device__ static TileCoord of_host_plan(const Params& p, int tile) {
    const int m_blocks = ceil_div(p.max_seqlen_q, BLOCK_M);
    const int head = tile / m_blocks;
    const int batch = p.batch > 1 ? head / p.heads : 0;
    return {batch, head - batch * p.heads, tile - head * m_blocks};
  }
};

// Calls visit(batch, remainders, cost) for each batch entry that has tiles from `full_wave_tiles` on, in order. cost:
// of the remainders of these tiles.
template <typename Storage, typename Visit>
__device__ inline void visit_remainders(
    const Params& p, const Storage& s, int full_wave_tiles, int num_tiles, int cost_limit, Visit visit) {
  for (int b = batch_of(p, s, full_wave_tiles); b < p.batch && s.first_tile[b] < num_tiles; ++b) {
    const int end = b + 1 < p.batch ? s.first_tile[b + 1] : num_tiles;
    if (end == s.first_tile[b]) continue;
    const Remainders remainders =
        Remainders::of(s.seqlen_q[b], s.seqlen_k[b], cost_limit, Storage::Traits::tile());
    visit(
        b, remainders,
        remainders.cost_before(end - s.first_tile[b]) -
            remainders.cost_before(max(full_wave_tiles - s.first_tile[b], 0)));
  }
}

// The position before which the remainders cost `cost`.
template <typename Storage>
__device__ inline StreamKPosition position_at(
    const Params& p, const Storage& s, int full_wave_tiles, int num_tiles, int cost_limit, int cost) {
  StreamKPosition at{num_tiles, 0};
  int start = 0;
  visit_remainders(
      p, s, full_wave_tiles, num_tiles, cost_limit, [&](int b, const Remainders& remainders, int batch_cost) {
        if (cost >= start && cost < start + batch_cost) {
          at = remainders.position_at(
              cost - start + remainders.cost_before(max(full_wave_tiles - s.first_tile[b], 0)));
          at.tile += s.first_tile[b];
        }
        start += batch_cost;
      });
  return at;
}

// Waves in which this CTA has a tile that is not split.
__device__ inline int full_waves_of(int full_wave_tiles) {
  return ceil_div(max(full_wave_tiles - static_cast<int>(blockIdx.x), 0), static_cast<int>(gridDim.x));
}

// The plan where lengths are on the device, made by one warp.
template <typename Storage>
__device__ void plan_on_device(const Params& p, Storage& s) {
  const int lane = threadIdx.x;
  int num_tiles = 0;
  int n_blocks = 0;  // of the longest sequence of keys
  for (int start = 0; start < p.batch; start += 32) {
    const int b = start + lane;
    const int count = b < p.batch ? ceil_div(s.seqlen_q[b], Storage::Traits::kBlockM) * p.heads : 0;
    if (count > 0) n_blocks = max(n_blocks, ceil_div(s.seqlen_k[b], Storage::Traits::kBlockN));
    int sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    if (b < p.batch) s.first_tile[b] = num_tiles + sum - count;
    num_tiles += __shfl_sync(0xffffffffu, sum, 31);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) n_blocks = max(n_blocks, __shfl_xor_sync(0xffffffffu, n_blocks, step));
  __syncwarp();
  const int num_ctas = gridDim.x;
  const int cta = blockIdx.x;
  const int partial_wave_tiles = num_tiles % num_ctas;
  const int full_wave_tiles = num_tiles - partial_wave_tiles;
  const int num_ranges = num_ctas - partial_wave_tiles;
  const int tile_cost = kFullBlockCost * n_blocks + kSplitOverheadCost;
  // Mostly the last partial wave is of one batch entry: then its tiles are counted once, not for each limit.
  const int batch = partial_wave_tiles > 0 ? batch_of(p, s, full_wave_tiles) : 0;
  const bool one_batch =
      partial_wave_tiles > 0 && (batch + 1 == p.batch || s.first_tile[batch + 1] == num_tiles);
  const int m_blocks = max(ceil_div(s.seqlen_q[batch], Storage::Traits::kBlockM), 1);
  const int last_tiles = one_batch
      ? (num_tiles - s.first_tile[batch]) / m_blocks - (full_wave_tiles - s.first_tile[batch]) / m_blocks
      : 0;
  const auto cost_at = [&](int cost_limit) {
    int sum = 0;
    if (one_batch) {
      const Remainders remainders =
          Remainders::of(s.seqlen_q[batch], s.seqlen_k[batch], cost_limit, Storage::Traits::tile());
      sum = (partial_wave_tiles - last_tiles) * remainders.full_cost + last_tiles * remainders.last_cost;
    } else {
      visit_remainders(
          p, s, full_wave_tiles, num_tiles, cost_limit, [&](int, const Remainders&, int cost) { sum += cost; });
    }
    return sum;
  };
  // The lowest limit at which no range takes longer than a first split. Each lane tries one.
  int cost_limit = tile_cost;
  if (p.out_partial != nullptr && can_split(num_tiles, num_ctas, n_blocks)) {
    int low = kSplitOverheadCost + kFullBlockCost * kMinSplitBlocks - 1;  // known to be too low
    while (tile_cost - low > 1 && cost_limit - low > 1) {
      const int step = ceil_div(cost_limit - low, 32);
      const int mine = min(low + (lane + 1) * step, cost_limit);
      const bool enough = limit_suffices(mine, cost_at(mine), num_ranges, n_blocks);
      const unsigned all = __ballot_sync(0xffffffffu, enough || mine == cost_limit);
      const int found = __ffs(all) - 1;
      cost_limit = min(low + (found + 1) * step, cost_limit);
      low += found * step;
    }
  }
  const bool split = cost_limit + combine_cost(Storage::Traits::tile()) < tile_cost;
  const int range_step =
      split ? range_cost(cost_at(cost_limit), num_ranges, n_blocks) - kSplitOverheadCost : 1;
  StreamKPosition at{num_tiles, 0};
  if (split && cta >= partial_wave_tiles && lane < 2) {
    at = position_at(
        p, s, full_wave_tiles, num_tiles, cost_limit, (cta - partial_wave_tiles + lane) * range_step);
  }
  if (lane == 0) {
    s.num_tiles = num_tiles;
    s.full_wave_tiles = split ? full_wave_tiles : num_tiles;
    s.full_waves = full_waves_of(s.full_wave_tiles);
    s.cta_rank = cta;
    s.partial_wave_tiles = split ? partial_wave_tiles : 0;
    s.cost_limit = cost_limit;
    s.range_step = range_step;
    s.range_begin = at;
  }
  if (lane == 1) s.range_end = at;
}

// Writes the plan to shared memory: the work of all threads.
template <typename T, int D, bool GATHER>
__device__ void make_plan(const Params& p, SharedStorage<T, D, GATHER>& s) {
  for (int b = threadIdx.x; b < p.batch; b += KernelTraits<T, D, GATHER>::kThreads) {
    s.seqlen_q[b] = length_of(p.q_lens, p.cu_seqlens_q, b, p.max_seqlen_q, p.rows_q, s.offset_q[GATHER ? 0 : b]);
    s.seqlen_k[b] = length_of(p.kv_lens, p.cu_seqlens_k, b, p.max_seqlen_k, p.rows_k, s.offset_k[GATHER ? 0 : b]);
  }
  if (p.plan.planned && threadIdx.x == 0) {
    s.cta_rank = p.plan.partial_wave_tiles > 0 ? p.plan.cta_rank[blockIdx.x] : 0;
    const int streamk_cta = s.cta_rank - p.plan.partial_wave_tiles;
    const bool has_range = p.plan.partial_wave_tiles > 0 && streamk_cta >= 0;
    s.full_wave_tiles = p.plan.full_wave_tiles;
    s.full_waves = full_waves_of(p.plan.full_wave_tiles);
    s.partial_wave_tiles = p.plan.partial_wave_tiles;
    s.cost_limit = p.plan.cost_limit;
    s.range_begin = has_range ? p.plan.range_begin[streamk_cta] : StreamKPosition{0, 0};
    s.range_end = has_range ? p.plan.range_begin[streamk_cta + 1] : StreamKPosition{0, 0};
  }
  __syncthreads();
  if (!p.plan.planned) {
    if (threadIdx.x < 32) plan_on_device(p, s);
    __syncthreads();
  }
}

// Tells the combine kernel of the tile whose first split this CTA computes, where the host made no plan. One warp's
// work.
template <typename Storage>
__device__ void write_split_tile(const Params& p, const Storage& s) {
  using Traits = typename Storage::Traits;
  const int cta = blockIdx.x;
  const int lane = threadIdx.x % 32;
  if (p.plan.planned || cta >= p.max_split_tiles) return;
  SplitTile split{};
  if (cta < s.partial_wave_tiles) {
    const int id = s.full_wave_tiles + cta;
    int begin = 0;  // the first of at most 32 ranges that may begin inside this tile's remainder
    int before = 0;
    visit_remainders(
        p, s, s.full_wave_tiles, s.num_tiles, s.cost_limit, [&](int b, const Remainders& remainders, int cost) {
          const int skipped = remainders.cost_before(max(s.full_wave_tiles - s.first_tile[b], 0));
          if (s.first_tile[b] <= id) {
            begin = (before + remainders.cost_before(id - s.first_tile[b]) - skipped) / s.range_step;
          }
          before += cost;
        });
    const StreamKPosition at =
        position_at(p, s, s.full_wave_tiles, s.num_tiles, s.cost_limit, (begin + lane) * s.range_step);
    const unsigned found = __ballot_sync(0xffffffffu, at.tile == id && at.n_block > 0);
    const TileCoord tile = TileCoord::of(p, s, id);
    const int rows = min(s.seqlen_q[tile.batch] - tile.m_block * Traits::kBlockM, Traits::kBlockM);
    split = {tile.batch,          tile.head, tile.m_block, rows, 2 + __popc(found), begin + __ffs(found) - 1,
             s.partial_wave_tiles};
    const int n_blocks = ceil_div(s.seqlen_k[tile.batch], Traits::kBlockN);
    if (first_split_blocks(n_blocks, n_block_cost(Traits::tile(), rows), s.cost_limit) == n_blocks) {
      split.num_splits = 0;
    }
  }
  if (lane == 0) p.split_tiles[cta] = split;
}

// The same from the host's plan, for tile number `number` of the last partial wave.
template <int BLOCK_M>
__device__ SplitTile split_tile_of_host_plan(const Params& p, int number) {
  const TileCoord tile = TileCoord::of_host_plan<BLOCK_M>(p, p.plan.full_wave_tiles + number);
  const int rows = min(p.max_seqlen_q - tile.m_block * BLOCK_M, BLOCK_M);
  const TileSplits& splits = p.plan.splits[number];
  return {tile.batch, tile.head, tile.m_block, rows, splits.num_splits, splits.streamk_cta, p.plan.partial_wave_tiles};
}

// What a CTA computes at once: `rows` queries of one head, against K tiles [n_block_begin, n_block_end).
struct WorkTile {
  int batch, head, m_block, rows, n_block_begin, n_block_end;
  int split_slot;  // where the result of a split goes in out_partial; -1: the result is final

  // Whether consumer warpgroup wg has queries.
  __device__ bool has_rows(int wg) const { return rows > wg * kWarpgroupRows; }

  // Work tile number `work_idx` of this CTA; false past the last.
  template <typename Storage>
  __device__ bool get(const Params& p, const Storage& s, int work_idx) {
    using Traits = typename Storage::Traits;
    int id = work_idx * gridDim.x + blockIdx.x;
    const bool remainder = work_idx >= s.full_waves && s.cta_rank >= s.partial_wave_tiles;
    if (remainder) {
      id = s.range_begin.tile + work_idx - s.full_waves;
      if (id >= s.range_end.tile + (s.range_end.n_block > 0)) return false;
    } else if (work_idx >= s.full_waves) {
      if (work_idx > s.full_waves) return false;
      id = s.full_wave_tiles + s.cta_rank;
    }
    const TileCoord at = TileCoord::of(p, s, id);
    batch = at.batch;
    head = at.head;
    m_block = at.m_block;
    rows = min(s.seqlen_q[batch] - m_block * Traits::kBlockM, Traits::kBlockM);
    n_block_begin = 0;
    n_block_end = ceil_div(s.seqlen_k[batch], Traits::kBlockN);
    split_slot = -1;
    const int first_split = id < s.full_wave_tiles
        ? n_block_end
        : first_split_blocks(n_block_end, n_block_cost(Traits::tile(), rows), s.cost_limit);
    if (remainder) {
      // A tile without a remainder gives a work tile without queries and keys.
      if (first_split == n_block_end) rows = 0;
      n_block_begin = first_split;
      split_slot = s.partial_wave_tiles + id - s.full_wave_tiles;
      if (id == s.range_end.tile) n_block_end = first_split + s.range_end.n_block;
      if (id == s.range_begin.tile && s.range_begin.n_block > 0) {
        n_block_begin = first_split + s.range_begin.n_block;
        split_slot = s.partial_wave_tiles + s.cta_rank;
      }
    } else if (first_split < n_block_end) {
      n_block_end = first_split;
      split_slot = id - s.full_wave_tiles;
    }
    return true;
  }
};

}  // namespace specedit::attn
