// SPDX-License-Identifier: Apache-2.0
// What the host and the kernels of the attention on sm_90a share: tile sizes, arguments, the plan's arithmetic.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <numeric>

namespace specedit::attn {

constexpr int kGroup = 128;         // threads of a warp group
constexpr int kThreads = 384;
constexpr int kRows = 64;           // queries of a computing warp group
constexpr int kBlockM = 128;        // queries of a tile
constexpr int kBlockN = 176;        // keys of a tile
constexpr int kGatherThreads = 256;
constexpr int kGatherFirst = 20;    // tiles of queries that meet a row of K, from which on kv_index's are gathered before
constexpr int kMaxBatch = 512;      // batch entries whose lengths fit in shared memory
constexpr int kMaxPlaces = 192;     // blocks for which the host makes a plan
constexpr float kSlack = 8;         // by how much a score may exceed the running maximum, as an exponent
constexpr float kLargeSum = 4096;   // of a thread's weights of a row and tile
constexpr float kHopelessSum = 1e30f;  // its inverse is still a normal number
constexpr int kChunks = 4;          // of a tile's softmax
constexpr int kWaitChunk = 3;       // the chunk before which it waits for the last weights' products

struct Strides {
  int64_t batch, row, head;
};

// A tile of the last round: where its rows go, and where its parts are. Part 0 is its front, part 1 the begin of its
// back; the others are those with which sharers `sharer` and following go on. rest: tiles of the last round. No parts: it
// was not cut.
struct CutTile {
  int b, head, tile, rows, parts, sharer, rest;
};

// K tile `block` of the back of tile `tile`.
struct Place {
  int tile, block;
};

// What a plan of the host says of a cut tile.
struct Cut {
  int16_t parts, sharer;
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
  // Parts of the tiles of the last round: fp32 [slots, kBlockM, D], then base-2 lse [slots, kBlockM].
  // Slots: the fronts, the begins of backs, one for each sharer. Null where nothing is to be cut. cut_tiles: most_cut of
  // them, where the host made no plan.
  float *part_out, *part_lse;
  CutTile* cut_tiles;
  float score_unit;   // scale * log2(e): from a raw score to an exponent
  float bias_unit;    // 1 / scale: from a bias to a raw score
  float slack;        // kSlack as a raw score
  int batch, heads, group, num_q, num_k, rows_q, rows_k, rows_out, most_cut;
  // The plan, if the host could make it: tiles done in rounds, those of the last round and how each of them is cut, what a
  // front may cost, where each sharer of the backs begins. roles: the first `rest` do fronts, the others share.
  bool planned;
  int whole, rest, level;
  uint8_t roles[kMaxPlaces];
  Place places[kMaxPlaces + 1];
  Cut cuts[kMaxPlaces];
};

// What gathers rows by kv_index before the attention. Strides and words are of 16 bytes; the targets are contiguous.
struct RowsParams {
  const uint4 *k, *v;
  Strides k_strides, v_strides;
  const float* bias;
  const int *index, *lens;
  int64_t bias_batch, index_batch;
  uint4 *k_out, *v_out;
  float* bias_out;
  int batch, slots, rows, words, head_shift;  // 2^head_shift words of a head, `words` of all
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- The plan -------------------------------------------------------------------------------------------------------
//
// `workers` blocks do the tiles in rounds, a tile each, so that blocks that share a head read the same keys at the same
// time. Of the last, incomplete round a worker each does the front of a tile; the workers without one share the backs of
// all its tiles, in stretches that may begin and end within a back. A second kernel joins the parts of a tile. Costs
// are in quarters of the time that a K tile takes.

constexpr int kPieceCost = 6;  // start and end of a tile or a part of it
constexpr int kJoinCost = 12;
constexpr int kHalfCost = 3;   // of a K tile if one warp group alone has queries
constexpr int kLeastPart = 2;  // K tiles
constexpr int kMaxWorkers = 512;

// Cost of a K tile, for all queries of a tile or for one warp group's alone.
__host__ __device__ inline int block_cost(bool half) { return half ? kHalfCost : 4; }

// K tiles of the front of a tile of `blocks` K tiles, `each` of which costs so much, if the front may cost `level`.
__host__ __device__ inline int front_of(int blocks, int each, int level) {
  const int front = (level - kPieceCost) / each;
  return blocks - front < kLeastPart ? blocks : front;
}

__host__ __device__ inline int back_cost(int blocks, int each, int level) {
  const int back = blocks - front_of(blocks, each, level);
  return back == 0 ? 0 : back * each + kPieceCost;
}

// Tiles of the heads of one batch entry, as the backs of the last round see them.
struct Backs {
  int tiles;       // of a head
  bool half;       // the last of them fills one warp group at most
  int full, last;  // cost of the back of a tile, of the last one

  __host__ __device__ static Backs of(int q_len, int k_len, int level) {
    Backs x;
    const int blocks = ceil_div(k_len, kBlockN);
    x.tiles = ceil_div(q_len, kBlockM);
    x.half = q_len % kBlockM != 0 && q_len % kBlockM <= kRows;
    x.full = back_cost(blocks, block_cost(false), level);
    x.last = x.half ? back_cost(blocks, block_cost(true), level) : x.full;
    return x;
  }

  // Whether tile number `tile` of a head is half one.
  __host__ __device__ bool is_half(int tile) const { return half && tile == tiles - 1; }

  // Of tiles [0, count), counted over heads.
  __host__ __device__ int before(int count) const {
    const int lasts = count / tiles;
    return (count - lasts) * full + lasts * last;
  }

  // Where the backs of tiles [0, ...) cost `cost`; not so near to an end of a back that the part is too small.
  __host__ __device__ Place at(int cost) const {
    const int head = cost / before(tiles);
    int left = cost - head * before(tiles);
    const int tile = left / full < tiles - 1 ? left / full : tiles - 1;
    left -= tile * full;
    const bool is_last = is_half(tile);
    const int each = block_cost(is_last);
    const int blocks = ((is_last ? last : full) - kPieceCost) / each;
    const int block = (left - kPieceCost) / each;
    const Place place{head * tiles + tile, block < kLeastPart ? 0 : block};
    return block > blocks - kLeastPart && block >= kLeastPart ? Place{place.tile + 1, 0} : place;
  }
};

// Whether tiles of `blocks` K tiles at most can be cut: costs of all together fit in 32 bits.
__host__ __device__ inline bool can_cut(int tiles, int workers, int blocks) {
  return tiles % workers > 0 && workers <= kMaxWorkers && int64_t{tiles} * (4 * blocks + kPieceCost) <= INT_MAX;
}

// A sharer's stretch if the backs cost `sum` together: as long as it takes, and no back is cut into more than 16.
__host__ __device__ inline int least_stretch(int blocks) {
  return blocks / 4 > 4 * kLeastPart ? blocks / 4 : 4 * kLeastPart;
}

__host__ __device__ inline int stretch_of(int sum, int sharers, int blocks) {
  const int least = least_stretch(blocks);
  const int stretch = ceil_div(sum, sharers);
  return (stretch > least ? stretch : least) + kPieceCost;
}

// level >= stretch_of(...), without its division, if some sharers have `spare` time together.
__host__ __device__ inline bool suffices(int level, int sum, int sharers, int blocks, int spare = 0) {
  const int stretch = level - kPieceCost;
  return stretch >= least_stretch(blocks) && static_cast<int64_t>(stretch) * sharers >= sum - spare;
}

// The plan where all batch entries are alike, which then are as more heads: made by the host. Workers that have had half
// tiles in the rounds have time to spare: they share, and for longer.
__host__ inline void plan_on_host(Params& p, int tiles, int workers) {
  constexpr int kMostRounds = 8;  // beyond, half tiles come to all alike
  p.planned = true;
  p.rest = tiles % workers;
  p.whole = tiles - p.rest;
  const int blocks = ceil_div(p.num_k, kBlockN);
  const int sharers = workers - p.rest;
  const int most = 4 * blocks + kPieceCost;
  const int of_head = ceil_div(p.num_q, kBlockM);
  const bool cuts = can_cut(tiles, workers, blocks) && workers <= kMaxPlaces;
  std::array<int, kMaxPlaces> spare{};  // of a worker, then of a role
  if (cuts) {
    std::array<int, kMaxPlaces> order;
    std::iota(order.begin(), order.end(), 0);
    if (Backs::of(p.num_q, p.num_k, 0).half && p.whole <= kMostRounds * workers) {
      for (int id = of_head - 1; id < p.whole; id += of_head) spare[id % workers] += (4 - kHalfCost) * blocks;
      std::stable_sort(order.begin(), order.begin() + workers, [&](int a, int b) { return spare[a] < spare[b]; });
      std::sort(spare.begin(), spare.begin() + workers);
    }
    for (int role = 0; role < workers; ++role) p.roles[order[role]] = static_cast<uint8_t>(role);
  }
  const int spare_of_all = std::accumulate(spare.begin() + p.rest, spare.end(), 0);
  const auto sum_at = [&](int level) {
    const Backs backs = Backs::of(p.num_q, p.num_k, level);
    return backs.before(tiles) - backs.before(p.whole);
  };
  int level = most;
  if (cuts) {
    int low = kPieceCost + 4 * kLeastPart - 1;
    while (level - low > 1) {
      const int middle = low + (level - low) / 2;
      if (suffices(middle, sum_at(middle), sharers, blocks, spare_of_all)) level = middle;
      else low = middle;
    }
  }
  if (level + kJoinCost >= most) {
    p.whole = tiles;
    p.rest = p.most_cut = 0;
    return;
  }
  p.most_cut = p.rest;
  p.level = level;
  const Backs backs = Backs::of(p.num_q, p.num_k, level);
  const int stretch = stretch_of(std::max(sum_at(level) - spare_of_all, 0), sharers, blocks) - kPieceCost;
  for (int i = 0, cost = backs.before(p.whole); i <= sharers; ++i) {
    p.places[i] = cost < backs.before(tiles) ? backs.at(cost) : Place{tiles, 0};
    if (i < sharers) cost += stretch + spare[p.rest + i];
  }
  for (int i = 0; i < p.rest; ++i) {
    const int back = backs.is_half((p.whole + i) % of_head) ? backs.last : backs.full;
    p.cuts[i] = {static_cast<int16_t>(back == 0 ? 0 : 2), 0};
  }
  for (int i = sharers - 1; i >= 0; --i) {
    if (p.places[i].block == 0) continue;
    Cut& cut = p.cuts[p.places[i].tile - p.whole];
    cut = {static_cast<int16_t>(cut.parts + 1), static_cast<int16_t>(i)};
  }
}

// Runs the attention on `blocks` blocks, then the kernel that joins cut tiles if there can be any.
template <typename T, int D, bool GATHER>
void launch(const Params& p, int blocks, cudaStream_t stream);

}  // namespace specedit::attn
