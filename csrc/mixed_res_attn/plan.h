// SPDX-License-Identifier: Apache-2.0
// Tile sizes, and the plan of a call: which CTA computes which work tiles, and how the tiles of the last partial wave
// are split along their keys. Plain C++ without CUDA headers: the host, the kernels and the Python module `_planner`
// use it.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <numeric>

#ifdef __CUDACC__
#define SPECEDIT_HOST_DEVICE __host__ __device__
#else
#define SPECEDIT_HOST_DEVICE
#endif

namespace specedit::attn {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;     // queries of a consumer warpgroup
constexpr int kBlockNFp8 = 192;        // e4m3 numbers: keys of a K tile
constexpr int kMaxBatch = 512;         // batch entries whose lengths fit in shared memory
constexpr int kMaxHostPlanCtas = 192;  // CTAs for which the host makes a plan

SPECEDIT_HOST_DEVICE inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The tiles of a kernel. A CTA has one producer warpgroup and `consumers` consumer warpgroups, one for each
// kWarpgroupRows queries of a work tile.
struct TileShape {
  int consumers;
  int block_n;  // keys of a K tile

  SPECEDIT_HOST_DEVICE constexpr int block_m() const { return consumers * kWarpgroupRows; }  // queries of a work tile
};

// D = 64 has smaller accumulators: there is room for a third consumer warpgroup.
constexpr TileShape kTileOfDim64{3, 128};
constexpr TileShape kTileOfDim128{2, 176};
constexpr TileShape kTileOfFp8{2, kBlockNFp8};

// gather: whether the kernel itself gathers rows of K and V by kv_index. The registers which that takes leave none for a
// third consumer warpgroup.
constexpr TileShape tile_of(int64_t dim, bool gather) { return dim == 64 && !gather ? kTileOfDim64 : kTileOfDim128; }

// The kernel is persistent: one CTA an SM. Work tiles go to the CTAs in waves, one tile for each CTA in a wave, so that
// CTAs that share a head read the same keys at the same time. The last partial wave has fewer tiles than there are
// CTAs. Its tiles are split along their keys. The first split of a tile is computed by one CTA, its owner. The
// remainders of all these tiles, one after another, are cut into ranges of equal cost, one for each CTA that owns no
// tile (stream-K in CUTLASS). A range may begin and end inside a remainder. The combine kernel merges the splits of a
// tile.
//
// The plan depends on lengths alone: equal calls give equal bits.
//
// Costs are in quarters of the time that one K tile takes.

constexpr int kFullBlockCost = 4;      // of a K tile if all consumer warpgroups have queries; 1 less for each without
constexpr int kSplitOverheadCost = 6;  // prologue and epilogue of a tile or a split
constexpr int kMinSplitBlocks = 2;     // K tiles
constexpr int kMaxSplitCtas = 512;     // with more CTAs no tile is split

// Cost of the combine kernel: 4 to 6 us. A K tile of kTileOfDim64 takes about 1.5 us, one of kTileOfDim128 2.
SPECEDIT_HOST_DEVICE inline int combine_cost(TileShape tile) { return tile.consumers == 3 ? 16 : 12; }

// K tile `n_block` of the remainder of work tile `tile`.
struct StreamKPosition {
  int tile, n_block;
};

// How the host's plan splits a tile of the last partial wave: the number of its splits (0: it is not split), and the
// stream-K CTA that computes split 2; the next CTAs compute splits 3 and on.
struct TileSplits {
  int16_t num_splits, streamk_cta;
};

// A plan made on the host, where no length is on the device. It is a kernel argument.
struct HostPlan {
  bool planned;            // false: the kernel makes the plan
  int full_wave_tiles;     // tiles that are not split
  int partial_wave_tiles;  // tiles of the last partial wave, 0 where they are not split
  int cost_limit;          // of a first split
  uint8_t cta_rank[kMaxHostPlanCtas];  // rank < partial_wave_tiles: owner of that tile; else stream-K
  StreamKPosition range_begin[kMaxHostPlanCtas + 1];
  TileSplits splits[kMaxHostPlanCtas];
};

// Whether `rows` queries of a work tile leave `count` consumer warpgroups or more without one.
SPECEDIT_HOST_DEVICE inline bool leaves_without_rows(TileShape tile, int rows, int count) {
  return tile.consumers > count && rows <= (tile.consumers - count) * kWarpgroupRows;
}

// Cost of a K tile against a work tile of `rows` queries, which leave one of two or three consumer warpgroups without.
SPECEDIT_HOST_DEVICE inline int smaller_n_block_cost(TileShape tile, int rows) {
  return leaves_without_rows(tile, rows, 2) ? kFullBlockCost - 2 : kFullBlockCost - 1;
}

// The same of any number of queries.
SPECEDIT_HOST_DEVICE inline int n_block_cost(TileShape tile, int rows) {
  return leaves_without_rows(tile, rows, 1) ? smaller_n_block_cost(tile, rows) : kFullBlockCost;
}

// K tiles in the first split of a tile that has `n_blocks`, if the split may cost `cost_limit`.
SPECEDIT_HOST_DEVICE inline int first_split_blocks(int n_blocks, int block_cost, int cost_limit) {
  const int first = (cost_limit - kSplitOverheadCost) / block_cost;
  return n_blocks - first < kMinSplitBlocks ? n_blocks : first;
}

SPECEDIT_HOST_DEVICE inline int remainder_cost(int n_blocks, int block_cost, int cost_limit) {
  const int blocks = n_blocks - first_split_blocks(n_blocks, block_cost, cost_limit);
  return blocks == 0 ? 0 : blocks * block_cost + kSplitOverheadCost;
}

// The remainders of the tiles of one batch entry.
struct Remainders {
  int m_blocks;              // tiles of a head
  bool last_is_smaller;      // the last tile of a head has queries for some of the consumer warpgroups only
  int smaller_block_cost;    // of a K tile against such a tile
  int full_cost, last_cost;  // of the remainder of a tile, and of a head's last tile

  SPECEDIT_HOST_DEVICE static Remainders of(int seqlen_q, int seqlen_k, int cost_limit, TileShape tile) {
    Remainders x;
    const int n_blocks = ceil_div(seqlen_k, tile.block_n);
    x.m_blocks = ceil_div(seqlen_q, tile.block_m());
    const int last_rows = seqlen_q % tile.block_m();  // 0: that tile is full
    x.last_is_smaller = leaves_without_rows(tile, last_rows, 1) && last_rows != 0;
    x.smaller_block_cost = smaller_n_block_cost(tile, last_rows);
    x.full_cost = remainder_cost(n_blocks, kFullBlockCost, cost_limit);
    x.last_cost = x.last_is_smaller ? remainder_cost(n_blocks, x.smaller_block_cost, cost_limit) : x.full_cost;
    return x;
  }

  SPECEDIT_HOST_DEVICE bool is_smaller(int m_block) const { return last_is_smaller && m_block == m_blocks - 1; }

  // Cost of the remainders of tiles [0, num_tiles), counted over heads.
  SPECEDIT_HOST_DEVICE int cost_before(int num_tiles) const {
    const int last_tiles = num_tiles / m_blocks;
    return (num_tiles - last_tiles) * full_cost + last_tiles * last_cost;
  }

  // The position before which the remainders of tiles [0, ...) cost `cost`. It is moved to the next end of a remainder
  // where a split would get fewer than kMinSplitBlocks.
  SPECEDIT_HOST_DEVICE StreamKPosition position_at(int cost) const {
    const int head = cost / cost_before(m_blocks);
    int left = cost - head * cost_before(m_blocks);
    const int m_block = left / full_cost < m_blocks - 1 ? left / full_cost : m_blocks - 1;
    left -= m_block * full_cost;
    const bool smaller = is_smaller(m_block);
    const int block_cost = smaller ? smaller_block_cost : kFullBlockCost;
    const int n_blocks = ((smaller ? last_cost : full_cost) - kSplitOverheadCost) / block_cost;
    const int n_block = (left - kSplitOverheadCost) / block_cost;
    const StreamKPosition position{head * m_blocks + m_block, n_block < kMinSplitBlocks ? 0 : n_block};
    return n_block > n_blocks - kMinSplitBlocks && n_block >= kMinSplitBlocks ? StreamKPosition{position.tile + 1, 0}
                                                                              : position;
  }
};

// Whether tiles of at most `n_blocks` K tiles can be split: the sum of all costs must fit in 32 bits.
SPECEDIT_HOST_DEVICE inline bool can_split(int num_tiles, int num_ctas, int n_blocks) {
  return num_tiles % num_ctas > 0 && num_ctas <= kMaxSplitCtas &&
      int64_t{num_tiles} * (kFullBlockCost * n_blocks + kSplitOverheadCost) <= INT_MAX;
}

// A range costs at least this, without its overhead: no remainder is cut into more than 16 splits.
SPECEDIT_HOST_DEVICE inline int min_range_step(int n_blocks) {
  return n_blocks / 4 > kFullBlockCost * kMinSplitBlocks ? n_blocks / 4 : kFullBlockCost * kMinSplitBlocks;
}

// Cost of a range, with its overhead, if remainders of `cost` together are cut into `num_ranges`.
SPECEDIT_HOST_DEVICE inline int range_cost(int cost, int num_ranges, int n_blocks) {
  const int least = min_range_step(n_blocks);
  const int step = ceil_div(cost, num_ranges);
  return (step > least ? step : least) + kSplitOverheadCost;
}

// cost_limit >= range_cost(...), without its division; `spare`: free time of the stream-K CTAs together.
SPECEDIT_HOST_DEVICE inline bool limit_suffices(
    int cost_limit, int cost, int num_ranges, int n_blocks, int spare = 0) {
  const int step = cost_limit - kSplitOverheadCost;
  return step >= min_range_step(n_blocks) && static_cast<int64_t>(step) * num_ranges >= cost - spare;
}

// The plan where all batch entries have the same lengths: they count as more heads. CTAs that had smaller tiles in the
// full waves have time to spare: they become stream-K CTAs and get longer ranges.
inline void plan_on_host(
    HostPlan& plan, int seqlen_q, int seqlen_k, int num_tiles, int num_ctas, TileShape tile_shape) {
  constexpr int kMaxSpareWaves = 8;  // with more waves, smaller tiles are spread evenly
  plan.planned = true;
  plan.partial_wave_tiles = num_tiles % num_ctas;
  plan.full_wave_tiles = num_tiles - plan.partial_wave_tiles;
  const int n_blocks = ceil_div(seqlen_k, tile_shape.block_n);
  const int num_ranges = num_ctas - plan.partial_wave_tiles;
  const int tile_cost = kFullBlockCost * n_blocks + kSplitOverheadCost;
  const int m_blocks = ceil_div(seqlen_q, tile_shape.block_m());
  const Remainders whole = Remainders::of(seqlen_q, seqlen_k, 0, tile_shape);
  const bool split = can_split(num_tiles, num_ctas, n_blocks) && num_ctas <= kMaxHostPlanCtas;
  std::array<int, kMaxHostPlanCtas> spare{};  // by CTA, then by rank
  if (split) {
    std::array<int, kMaxHostPlanCtas> order;
    std::iota(order.begin(), order.end(), 0);
    if (whole.last_is_smaller && plan.full_wave_tiles <= kMaxSpareWaves * num_ctas) {
      for (int tile = m_blocks - 1; tile < plan.full_wave_tiles; tile += m_blocks) {
        spare[tile % num_ctas] += (kFullBlockCost - whole.smaller_block_cost) * n_blocks;
      }
      std::stable_sort(order.begin(), order.begin() + num_ctas, [&](int a, int b) { return spare[a] < spare[b]; });
      std::sort(spare.begin(), spare.begin() + num_ctas);
    }
    for (int rank = 0; rank < num_ctas; ++rank) plan.cta_rank[order[rank]] = static_cast<uint8_t>(rank);
  }
  const int all_spare = std::accumulate(spare.begin() + plan.partial_wave_tiles, spare.end(), 0);
  const auto cost_at = [&](int cost_limit) {
    const Remainders remainders = Remainders::of(seqlen_q, seqlen_k, cost_limit, tile_shape);
    return remainders.cost_before(num_tiles) - remainders.cost_before(plan.full_wave_tiles);
  };
  // The lowest limit at which no range takes longer than a first split.
  int cost_limit = tile_cost;
  if (split) {
    int low = kSplitOverheadCost + kFullBlockCost * kMinSplitBlocks - 1;
    while (cost_limit - low > 1) {
      const int middle = low + (cost_limit - low) / 2;
      if (limit_suffices(middle, cost_at(middle), num_ranges, n_blocks, all_spare)) cost_limit = middle;
      else low = middle;
    }
  }
  if (cost_limit + combine_cost(tile_shape) >= tile_cost) {
    plan.full_wave_tiles = num_tiles;
    plan.partial_wave_tiles = 0;
    return;
  }
  plan.cost_limit = cost_limit;
  const Remainders remainders = Remainders::of(seqlen_q, seqlen_k, cost_limit, tile_shape);
  const int step =
      range_cost(std::max(cost_at(cost_limit) - all_spare, 0), num_ranges, n_blocks) - kSplitOverheadCost;
  for (int i = 0, cost = remainders.cost_before(plan.full_wave_tiles); i <= num_ranges; ++i) {
    plan.range_begin[i] =
        cost < remainders.cost_before(num_tiles) ? remainders.position_at(cost) : StreamKPosition{num_tiles, 0};
    if (i < num_ranges) cost += step + spare[plan.partial_wave_tiles + i];
  }
  for (int i = 0; i < plan.partial_wave_tiles; ++i) {
    const bool smaller = remainders.is_smaller((plan.full_wave_tiles + i) % m_blocks);
    const int cost = smaller ? remainders.last_cost : remainders.full_cost;
    plan.splits[i] = {static_cast<int16_t>(cost == 0 ? 0 : 2), 0};
  }
  for (int i = num_ranges - 1; i >= 0; --i) {
    if (plan.range_begin[i].n_block == 0) continue;
    TileSplits& splits = plan.splits[plan.range_begin[i].tile - plan.full_wave_tiles];
    splits = {static_cast<int16_t>(splits.num_splits + 1), static_cast<int16_t>(i)};
  }
}

}  // namespace specedit::attn
