// SPDX-License-Identifier: Apache-2.0
// Attention with a per-key bias on sm_90a: one block an SM, one warp group that loads, two that compute.
//
// The online softmax is FlashAttention's (Dao et al., arXiv 2205.14135, algorithm 1) in base 2; the division of labour
// is FlashAttention-3's (Shah et al., arXiv 2407.08608): warp groups of their own for loads, the products of one tile
// under the softmax of another, within a warp group and between two of them that take turns.
//
// What is different here:
// - A key's bias enters the scores divided by the scale, so that one multiply-add turns a score into an exponent. A
//   warp of the loading group fetches the bias of a tile and tells whether it is one number; then it costs a scalar.
//   If not, it joins the products: three more columns of K, whose sum it is, beside ones in Q. That is one step more for
//   each eight of the scores' (D = 128), and no instruction of the softmax. Keys past the end have bias -inf: there is
//   no other masking.
// - The running maximum is raised only where the sum of a tile's weights shows that it has fallen far behind: scores are
//   not compared, and the accumulators seldom rescaled. Weights then reach kLargeSum, which neither bf16 nor fp16 minds.
// - Tiles are dealt to persistent blocks in rounds; those of the last, incomplete round are cut along their keys so that
//   all blocks end together, and a second kernel joins the parts. The cut depends on lengths alone: equal calls, equal
//   bits.
#pragma once

#include <cmath>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

// What is known of the biases of a tile.
constexpr int kColumns = 1;   // they are not one number, and the scores hold them
constexpr int kBeyond = 2;    // they are not one number, and one is too large for the columns
constexpr int kFarAbove = 4;  // one is so far above those of the tiles before that weights may not be finite

template <typename T, int D, bool GATHER>
struct Shape {
  static constexpr int kBlockN = attn::kBlockN;
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kLoaderRegisters = GATHER ? 56 : 40;
  // The registers of a block divided by 128 are 504: three warp groups started with 168.
  static constexpr int kComputeRegisters = (504 - kLoaderRegisters) / 16 * 8;
  // Arrivals on a barrier that says that a tile is there; K's biases arrive beside it.
  static constexpr int kArrivals = GATHER ? kGroup : 1;
  static constexpr int kBiasWarps = GATHER ? kGroup / 32 : 1;
  // Rows by kv_index: eight lanes copy 128 bytes of a row each, so that the warp group copies 16 rows a step.
  static constexpr int kSteps = kBlockN / 16;
};

template <typename T, int D, bool GATHER>
struct Shared {
  using S = Shape<T, D, GATHER>;
  T q[2][kRows * D];
  T k[S::kStages][S::kBlockN * D];
  T v[S::kStages][S::kBlockN * D];
  // The columns that hold biases, 8 of a key; the 8 beside them, which are empty; and what stands there in Q, in 8 rows
  // that serve for all.
  T columns[S::kStages][S::kBlockN * 8];
  T no_columns[S::kBlockN * 8];
  T ones[2][8 * 8];
  // The bias of a tile if it is one number, and what is known of it. By kv_index each warp of the loading group has its
  // own keys of a tile.
  __align__(16) float bias_constant[S::kStages][S::kBiasWarps];
  __align__(16) int bias_kind[S::kStages][S::kBiasWarps];
  // Rows by kv_index of two tiles, as each warp and each group of eight lanes needs them.
  __align__(16) int rows[GATHER ? 2 : 1][GATHER ? 4 : 1][4][GATHER ? (S::kSteps + 3) / 4 * 4 : 1];
  // Which rows of q exist, of this item and the one before: the rows of an item are stored when the queries of the next
  // may be there. Written where queries come by index.
  uint32_t q_exists[2][2][kRows / 32];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages], tail;
  // The plan: lengths, first rows (packed layout) and first tile of each batch entry; the tiles done in rounds, those of
  // the last round; what the front of a tile may cost, and from where to where the backs are this block's.
  int q_len[kMaxBatch], k_len[kMaxBatch], tile_start[kMaxBatch];
  int q_row[GATHER ? 1 : kMaxBatch], k_row[GATHER ? 1 : kMaxBatch];  // with kv_index nothing is packed
  int tiles, whole, rounds, role, rest, level, stretch;
  Place first, last;

  __device__ int first_q(int b) const { return GATHER ? 0 : q_row[b]; }
  __device__ int first_k(int b) const { return GATHER ? 0 : k_row[b]; }
};

__device__ inline int clamp(int x, int low, int high) { return min(max(x, low), high); }

// The length of batch entry b and its first row; `slots` is the capacity.
__device__ inline int length_of(const int* lens, const int* cu, int b, int slots, int rows, int& first) {
  first = 0;
  int length = slots;
  if (cu != nullptr) {
    first = clamp(cu[b], 0, rows);
    length = min(clamp(cu[b + 1], first, rows) - first, slots);
  }
  return lens == nullptr ? length : clamp(lens[b], 0, length);
}

// The batch entry of a tile.
template <typename SharedT>
__device__ inline int entry_of(const Params& p, const SharedT& s, int id) {
  int low = 0;
  int high = p.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (s.tile_start[middle] <= id) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Where tile `id` lies.
struct Tile {
  int b, head, tile;

  template <typename SharedT>
  __device__ static Tile of(const Params& p, const SharedT& s, int id) {
    if (p.planned) return of_planned(p, id);
    const int b = entry_of(p, s, id);
    const int of_head = ceil_div(s.q_len[b], kBlockM);
    const int head = (id - s.tile_start[b]) / of_head;
    return {b, head, id - s.tile_start[b] - head * of_head};
  }

  // Where batch entries are alike: as more heads.
  __device__ static Tile of_planned(const Params& p, int id) {
    const int of_head = ceil_div(p.num_q, kBlockM);
    const int head = id / of_head;
    const int b = p.batch > 1 ? head / p.heads : 0;
    return {b, head - b * p.heads, id - head * of_head};
  }
};

// Calls visit(b, backs, cost) for each batch entry with tiles from `whole` on, in order; cost: that of its backs.
template <typename SharedT, typename Visit>
__device__ inline void visit_backs(const Params& p, const SharedT& s, int whole, int tiles, int level, Visit visit) {
  for (int b = entry_of(p, s, whole); b < p.batch && s.tile_start[b] < tiles; ++b) {
    const int end = b + 1 < p.batch ? s.tile_start[b + 1] : tiles;
    if (end == s.tile_start[b]) continue;
    const Backs backs = Backs::of(s.q_len[b], s.k_len[b], level);
    visit(b, backs, backs.before(end - s.tile_start[b]) - backs.before(max(whole - s.tile_start[b], 0)));
  }
}

// Where the backs before cost `cost`.
template <typename SharedT>
__device__ inline Place place_of(const Params& p, const SharedT& s, int whole, int tiles, int level, int cost) {
  Place at{tiles, 0};
  int start = 0;
  visit_backs(p, s, whole, tiles, level, [&](int b, const Backs& backs, int sum) {
    if (cost >= start && cost < start + sum) {
      at = backs.at(cost - start + backs.before(max(whole - s.tile_start[b], 0)));
      at.tile += s.tile_start[b];
    }
    start += sum;
  });
  return at;
}

// Whole tiles that this block does.
__device__ inline int rounds_of(int whole) {
  return ceil_div(max(whole - static_cast<int>(blockIdx.x), 0), static_cast<int>(gridDim.x));
}

// What the host could not plan, for lengths are on the device.
template <typename SharedT>
__device__ void plan_on_device(const Params& p, SharedT& s) {
  const int lane = threadIdx.x;
  int tiles = 0;
  int blocks = 0;
  for (int start = 0; start < p.batch; start += 32) {
    const int b = start + lane;
    const int count = b < p.batch ? ceil_div(s.q_len[b], kBlockM) * p.heads : 0;
    if (count > 0) blocks = max(blocks, ceil_div(s.k_len[b], kBlockN));
    int sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += below;
    }
    if (b < p.batch) s.tile_start[b] = tiles + sum - count;
    tiles += __shfl_sync(0xffffffffu, sum, 31);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) blocks = max(blocks, __shfl_xor_sync(0xffffffffu, blocks, step));
  __syncwarp();
  const int workers = gridDim.x;
  const int worker = blockIdx.x;
  const int rest = tiles % workers;
  const int whole = tiles - rest;
  const int sharers = workers - rest;
  const int most = 4 * blocks + kPieceCost;
  // Mostly the last round is of one batch entry: its tiles, and how many of them are a head's last, are counted once.
  const int entry = rest > 0 ? entry_of(p, s, whole) : 0;
  const bool alone = rest > 0 && (entry + 1 == p.batch || s.tile_start[entry + 1] == tiles);
  const int of_head = max(ceil_div(s.q_len[entry], kBlockM), 1);
  const int lasts = alone ? (tiles - s.tile_start[entry]) / of_head - (whole - s.tile_start[entry]) / of_head : 0;
  const auto sum_at = [&](int level) {
    int sum = 0;
    if (alone) {
      const Backs backs = Backs::of(s.q_len[entry], s.k_len[entry], level);
      sum = (rest - lasts) * backs.full + lasts * backs.last;
    } else {
      visit_backs(p, s, whole, tiles, level, [&](int, const Backs&, int cost) { sum += cost; });
    }
    return sum;
  };
  // The lowest level at which no sharer takes longer than a front; 32 levels are tried at once.
  int level = most;
  if (p.part_out != nullptr && can_cut(tiles, workers, blocks)) {
    int low = kPieceCost + 4 * kLeastPart - 1;  // too low
    while (most - low > 1 && level - low > 1) {
      const int step = ceil_div(level - low, 32);
      const int mine = min(low + (lane + 1) * step, level);
      const bool enough = suffices(mine, sum_at(mine), sharers, blocks);
      const unsigned all = __ballot_sync(0xffffffffu, enough || mine == level);
      const int found = __ffs(all) - 1;
      level = min(low + (found + 1) * step, level);
      low += found * step;
    }
  }
  const bool cut = level + kJoinCost < most;
  const int stretch = cut ? stretch_of(sum_at(level), sharers, blocks) - kPieceCost : 1;
  Place at{tiles, 0};
  if (cut && worker >= rest && lane < 2) at = place_of(p, s, whole, tiles, level, (worker - rest + lane) * stretch);
  if (lane == 0) {
    s.tiles = tiles;
    s.whole = cut ? whole : tiles;
    s.rounds = rounds_of(s.whole);
    s.role = worker;
    s.rest = cut ? rest : 0;
    s.level = level;
    s.stretch = stretch;
    s.first = at;
  }
  if (lane == 1) s.last = at;
}

template <typename T, int D, bool GATHER>
__device__ void make_plan(const Params& p, Shared<T, D, GATHER>& s) {
  for (int b = threadIdx.x; b < p.batch; b += kThreads) {
    s.q_len[b] = length_of(p.q_lens, p.cu_q, b, p.num_q, p.rows_q, s.q_row[GATHER ? 0 : b]);
    s.k_len[b] = length_of(p.kv_lens, p.cu_k, b, p.num_k, p.rows_k, s.k_row[GATHER ? 0 : b]);
  }
  if (p.planned && threadIdx.x == 0) {
    s.role = p.rest > 0 ? p.roles[blockIdx.x] : 0;
    const int sharer = s.role - p.rest;
    const bool shares = p.rest > 0 && sharer >= 0;
    s.whole = p.whole;
    s.rounds = rounds_of(p.whole);
    s.rest = p.rest;
    s.level = p.level;
    s.first = shares ? p.places[sharer] : Place{0, 0};
    s.last = shares ? p.places[sharer + 1] : Place{0, 0};
  }
  __syncthreads();
  if (!p.planned) {
    if (threadIdx.x < 32) plan_on_device(p, s);
    __syncthreads();
  }
}

// Notes the tile of which this block does the front, for the kernel that joins parts, where the host could not. A warp's
// work.
template <typename SharedT>
__device__ void note_cut_tile(const Params& p, const SharedT& s) {
  const int worker = blockIdx.x;
  const int lane = threadIdx.x % 32;
  if (p.planned || worker >= p.most_cut) return;
  CutTile cut{};
  if (worker < s.rest) {
    const int id = s.whole + worker;
    int begin = 0;  // of the sharers that may begin in its back, 32 at most
    int before = 0;
    visit_backs(p, s, s.whole, s.tiles, s.level, [&](int b, const Backs& backs, int sum) {
      const int skipped = backs.before(max(s.whole - s.tile_start[b], 0));
      if (s.tile_start[b] <= id) begin = (before + backs.before(id - s.tile_start[b]) - skipped) / s.stretch;
      before += sum;
    });
    const Place at = place_of(p, s, s.whole, s.tiles, s.level, (begin + lane) * s.stretch);
    const unsigned found = __ballot_sync(0xffffffffu, at.tile == id && at.block > 0);
    const Tile tile = Tile::of(p, s, id);
    const int rows = min(s.q_len[tile.b] - tile.tile * kBlockM, kBlockM);
    cut = {tile.b, tile.head, tile.tile, rows, 2 + __popc(found), begin + __ffs(found) - 1, s.rest};
    const int blocks = ceil_div(s.k_len[tile.b], kBlockN);
    if (front_of(blocks, block_cost(rows <= kRows), s.level) == blocks) cut.parts = 0;
  }
  if (lane == 0) p.cut_tiles[worker] = cut;
}

// The same of tile number `number` of the last round, from a plan of the host.
__device__ inline CutTile cut_tile_of(const Params& p, int number) {
  const Tile tile = Tile::of_planned(p, p.whole + number);
  const int rows = min(p.num_q - tile.tile * kBlockM, kBlockM);
  return {tile.b, tile.head, tile.tile, rows, p.cuts[number].parts, p.cuts[number].sharer, p.rest};
}

// One item of a block's work: a tile of queries of one head, and the K tiles [begin, end) that it meets.
struct Work {
  int b, head, tile, rows, begin, end;
  int part;  // slot of the result, or -1: the result is final

  // Whether computing warp group g has rows.
  __device__ bool has_rows(int g) const { return rows > g * kRows; }

  // The block's item number `item`.
  template <typename SharedT>
  __device__ bool get(const Params& p, const SharedT& s, int item) {
    int id = item * gridDim.x + blockIdx.x;
    const bool back = item >= s.rounds && s.role >= s.rest;
    if (back) {
      id = s.first.tile + item - s.rounds;
      if (id >= s.last.tile + (s.last.block > 0)) return false;
    } else if (item >= s.rounds) {
      if (item > s.rounds) return false;
      id = s.whole + s.role;
    }
    const Tile at = Tile::of(p, s, id);
    b = at.b;
    head = at.head;
    tile = at.tile;
    rows = min(s.q_len[b] - tile * kBlockM, kBlockM);
    begin = 0;
    end = ceil_div(s.k_len[b], SharedT::S::kBlockN);
    part = -1;
    const int front = id < s.whole ? end : front_of(end, block_cost(rows <= kRows), s.level);
    if (back) {
      // A tile without a back is an item without rows and keys.
      if (front == end) rows = 0;
      begin = front;
      part = s.rest + id - s.whole;
      if (id == s.last.tile) end = front + s.last.block;
      if (id == s.first.tile && s.first.block > 0) {
        begin = front + s.first.block;
        part = s.rest + s.role;
      }
    } else if (front < end) {
      end = front;
      part = id - s.whole;
    }
    return true;
  }
};

// ---- Barriers -------------------------------------------------------------------------------------------------------
//
// A buffer has two barriers: `full`, on which those that fill it arrive, and `empty`, on which the warps that read it
// arrive. A wait knows a phase by its parity alone, so whoever waits on a barrier must also be one without whom the
// barrier's next phase cannot end: else it may sleep through two phases and wait for ever. Hence the loader of a buffer
// alone waits for its `empty`. Biases share K's barriers: without them, too, no tile of K is full.

// ---- Loading --------------------------------------------------------------------------------------------------------

// Position of a tile in a ring of buffers; the parity is that of its fill.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Byte offset of 16-byte column `chunk` of row `row` in a tile of `rows` rows, as the 128-byte swizzle stores it.
__device__ inline uint32_t swizzled(int row, int chunk, int rows) {
  return (chunk / 8) * rows * 128 + row * 128 + ((chunk ^ row) % 8) * 16;
}

// Dense K and V: one thread drives the copy engine.
template <typename T, int D>
struct TileLoader {
  using SharedT = Shared<T, D, false>;
  using S = typename SharedT::S;

  const Params& p;
  SharedT& s;
  uint32_t tail_parity = 0;

  // Loads rows [row, row + kBlockN) of a K or V tile; rows from `valid` on become zero, for 0 * NaN is NaN.
  __device__ void load(
      const CUtensorMap* map, T* target, uint64_t* full, uint64_t* empty, uint32_t parity, int row, int head, int b,
      int valid) {
    const int lane = threadIdx.x % 32;
    sm90::barrier_wait(empty, parity ^ 1);
    __syncwarp();
    const bool foreign = valid < S::kBlockN && row + valid < p.rows_k;  // else the copy engine writes the zeros
    uint64_t* done = foreign ? &s.tail : full;
    if (lane == 0) {
      sm90::barrier_expect(done, S::kBlockN * D * sizeof(T));
      sm90::copy_box(target, map, done, 0, row, 0, head, b);
    }
    if (foreign) {
      sm90::barrier_wait(done, tail_parity);
      tail_parity ^= 1;
      uint4* const words = reinterpret_cast<uint4*>(target);
      for (int i = valid * 8 + lane; i < S::kBlockN * 8; i += 32) {
#pragma unroll
        for (int panel = 0; panel < D / 64; ++panel) words[panel * S::kBlockN * 8 + i] = make_uint4(0, 0, 0, 0);
      }
      sm90::proxy_fence();
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(full);
    }
    __syncwarp();
  }

  __device__ void run() {
    const int lane = threadIdx.x % 32;
    Ring<S::kStages> k_ring, v_ring;
    uint32_t q_parity = 0;
    Work w;
    for (int item = 0; w.get(p, s, item); ++item) {
      const int kv_head = w.head / p.group;
      const int copy_b = p.cu_k == nullptr ? w.b : 0;
      const int k_row = s.first_k(w.b);
      const int k_len = s.k_len[w.b];
      const auto load_q = [&] {
        if (p.q_index != nullptr) return;
        const int q_b = p.cu_q == nullptr ? w.b : 0;
        for (int g = 0; g < 2; ++g) {
          sm90::barrier_wait(&s.q_empty[g], q_parity ^ 1);
          __syncwarp();
          if (lane == 0) {
            sm90::barrier_expect(&s.q_full[g], kRows * D * sizeof(T));
            sm90::copy_box(
                s.q[g], &p.q_map, &s.q_full[g], 0, s.first_q(w.b) + w.tile * kBlockM + g * kRows, 0, w.head, q_b);
          }
          __syncwarp();
        }
      };
      const auto load_v = [&](int block) {
        const int start = block * S::kBlockN;
        load(&p.v_map, s.v[v_ring.stage], &s.v_full[v_ring.stage], &s.v_empty[v_ring.stage], v_ring.parity,
             k_row + start, kv_head, copy_b, k_len - start);
        v_ring.next();
      };
      if (w.begin == w.end) load_q();
      for (int block = w.begin; block < w.end; ++block) {
        const int start = block * S::kBlockN;
        load(&p.k_map, s.k[k_ring.stage], &s.k_full[k_ring.stage], &s.k_empty[k_ring.stage], k_ring.parity,
             k_row + start, kv_head, copy_b, k_len - start);
        k_ring.next();
        if (block == w.begin) load_q();
        else load_v(block - 1);
      }
      if (w.begin < w.end) load_v(w.end - 1);
      q_parity ^= 1;
    }
  }
};

// The columns' unit beside ones in Q: fp16 alone is too narrow for biases, of which some are masks.
template <typename T>
constexpr float kColumnUnit = std::is_same_v<T, __half> ? 1024.0f : 1.0f;
// What the columns can hold.
template <typename T>
constexpr float kColumnMost = std::is_same_v<T, __half> ? 6e7f : 1e38f;

template <typename T>
__device__ inline bool fits_columns(float bias) {
  return bias == -INFINITY || fabsf(bias) <= kColumnMost<T>;
}

// The 8 columns of a key: three numbers that add up to its bias, the first in kColumnUnit. What is left is less than a
// rounding of the score.
template <typename T>
__device__ inline uint4 columns_of(float bias) {
  const float first = bias * (1.0f / kColumnUnit<T>);
  float left = bias - static_cast<float>(static_cast<T>(first)) * kColumnUnit<T>;
  if (bias == -INFINITY) left = 0.0f;
  const float second = static_cast<float>(static_cast<T>(left));
  return make_uint4(sm90::pack<T>(first, left), sm90::pack<T>(left - second, 0.0f), 0, 0);
}

// Ones in Q, and columns that stay empty. The work of all threads.
template <typename T, typename SharedT>
__device__ void fill_constants(SharedT& s) {
  uint4* const empty = reinterpret_cast<uint4*>(s.no_columns);
  uint4* const ones = reinterpret_cast<uint4*>(s.ones);
  for (int i = threadIdx.x; i < SharedT::S::kBlockN; i += kThreads) empty[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x < 16) {
    const uint4 row = make_uint4(sm90::pack<T>(kColumnUnit<T>, 1.0f), sm90::pack<T>(1.0f, 0.0f), 0, 0);
    ones[threadIdx.x] = threadIdx.x < 8 ? row : make_uint4(0, 0, 0, 0);
  }
  sm90::proxy_fence();
}

// The biases of dense keys: a warp's work.
template <typename T, int D>
__device__ void load_biases(const Params& p, Shared<T, D, false>& s) {
  using S = Shape<T, D, false>;
  constexpr int kEach = (S::kBlockN + 31) / 32;
  const int lane = threadIdx.x % 32;
  Ring<S::kStages> ring;
  Work w;
  for (int item = 0; w.get(p, s, item); ++item) {
    const float* bias = nullptr;
    if (p.bias != nullptr) bias = p.bias + (p.cu_k == nullptr ? w.b * p.bias_batch : 0) + s.first_k(w.b);
    const int k_len = s.k_len[w.b];
    float before = -INFINITY;  // the largest bias of the tiles before
    float next[kEach];         // of the tile after
    const auto look_up = [&](int block) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int key = block * S::kBlockN + i * 32 + lane;
        next[i] = key >= k_len ? -INFINITY : bias == nullptr ? 0.0f : bias[key];
      }
    };
    look_up(w.begin);
    for (int block = w.begin; block < w.end; ++block) {
      float value[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) value[i] = next[i] * p.bias_unit;
      look_up(block + 1);
      bool same = true;
      bool fits = true;
      const float first = __shfl_sync(0xffffffffu, value[0], 0);
      float high = value[0];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        same = same && (value[i] == first || i * 32 + lane >= S::kBlockN);
        fits = fits && fits_columns<T>(value[i]);
        high = fmaxf(high, value[i]);
      }
      same = __all_sync(0xffffffffu, same);
      fits = __all_sync(0xffffffffu, fits);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
      sm90::barrier_wait(&s.k_empty[ring.stage], ring.parity ^ 1);
      __syncwarp();
      if (!same && fits) {
        uint4* const columns = reinterpret_cast<uint4*>(s.columns[ring.stage]);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (i * 32 + lane < S::kBlockN) columns[i * 32 + lane] = columns_of<T>(value[i]);
        }
        sm90::proxy_fence();
      }
      if (lane == 0) {
        s.bias_kind[ring.stage][0] =
            (same ? 0 : fits ? kColumns : kBeyond) | (high > before + 8 * p.slack ? kFarAbove : 0);
        s.bias_constant[ring.stage][0] = same ? first : 0.0f;
      }
      before = fmaxf(before, high);
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(&s.k_full[ring.stage]);
      ring.next();
    }
  }
}

// 32 * WORDS rows of q that a warp copies: lane i of it knows the rows number i, i + 32 and so on. Rows outside read as
// zeros.
template <typename T, int D, int WORDS>
struct Queries {
  int rows[WORDS];
  uint32_t exist[WORDS];

  template <typename SharedT>
  __device__ void look_up(const Params& p, const SharedT& s, const Work& w, int first) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int slot = w.tile * kBlockM + first + i * 32 + static_cast<int>(threadIdx.x) % 32;
      rows[i] = slot < s.q_len[w.b] ? p.q_index == nullptr ? slot : p.q_index[w.b * p.q_index_batch + slot] : -1;
      const bool exists = rows[i] >= 0 && rows[i] < p.rows_q;
      exist[i] = __ballot_sync(0xffffffffu, exists);
      if (!exists) rows[i] = 0;
    }
  }

  __device__ static const T* base(const Params& p, const Work& w) {
    return static_cast<const T*>(p.q) + w.b * p.q_strides.batch + w.head * p.q_strides.head;
  }

  __device__ void prefetch(const Params& p, const Work& w) const {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if ((exist[i] >> threadIdx.x % 32 & 1) == 0) continue;
      const T* row = base(p, w) + rows[i] * p.q_strides.row;
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) sm90::prefetch(row + panel * 64);
    }
  }

  // To rows `first` and following of a tile of kRows rows. Eight lanes copy a panel's 128 bytes of a row; from one step,
  // of four rows, to the next the swizzle turns bit 2 of the column.
  __device__ void copy(const Params& p, const Work& w, T* tile, int first) const {
    const int lane = threadIdx.x % 32;
    const T* source = base(p, w) + lane % 8 * 8;
    const uint32_t even = sm90::shared_address(tile) + first * 128 + swizzled(lane / 8, lane % 8, kRows);
    const uint32_t odd = even ^ 64;
#pragma unroll
    for (int i = 0; i < 8 * WORDS; ++i) {
      const int row = __shfl_sync(0xffffffffu, rows[i / 8], i % 8 * 4 + lane / 8);
      const uint32_t exists = exist[i / 8] >> lane / 8 & 1u << i % 8 * 4;
      const T* from = source + row * p.q_strides.row;
      const uint32_t to = (i % 2 == 0 ? even : odd) + i * 4 * 128;
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        sm90::copy_16(to + panel * kRows * 128, from + panel * 64, exists);
      }
    }
  }
};

// The queries of one computing warp group by q_index: a warp's work.
template <typename T, int D>
__device__ void gather_queries(const Params& p, Shared<T, D, false>& s, int g) {
  constexpr int kWords = kRows / 32;
  const int lane = threadIdx.x % 32;
  uint32_t parity = 0;
  Work w;
  for (int item = 0; w.get(p, s, item); ++item) {
    // Looked up, and fetched as far as L2, while the rows before are still in use.
    Queries<T, D, kWords> queries;
    queries.look_up(p, s, w, g * kRows);
    if (item > 0) queries.prefetch(p, w);
    sm90::barrier_wait(&s.q_empty[g], parity ^ 1);
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) s.q_exists[parity][g][i] = queries.exist[i];
      sm90::barrier_arrive(&s.q_full[g]);
    }
    __syncwarp();
    queries.copy(p, w, s.q[g], 0);
    sm90::copies_arrive(&s.q_full[g]);
    parity ^= 1;
  }
}

// K and V rows by kv_index: the whole warp group copies them, 16 bytes a thread and instruction. What each instruction
// needs besides is kept small: they take issue slots from the softmax.
template <typename T, int D>
struct RowLoader {
  using SharedT = Shared<T, D, true>;
  using S = typename SharedT::S;
  static constexpr int kSteps = S::kSteps;
  static constexpr int kRowsOfWarp = kSteps * 4;
  static_assert(S::kBlockN % 16 == 0 && kRowsOfWarp > 32 && kRowsOfWarp <= 64);

  const Params& p;
  SharedT& s;

  // Lane i of a warp looks up its rows number i and i + 32 of a tile. Where in the tile row `number` of a warp lies:
  __device__ static int place_of(int number) {
    return number / 4 * 16 + static_cast<int>(threadIdx.x) % kGroup / 32 * 4 + number % 4;
  }

  // Bit 4 i % 32 of exist[i / 8]: whether this lane's row of step i exists; the others read as zeros.
  __device__ void copy_tile(const T* base, uint32_t stride, T* target, int buffer, const uint32_t (&exist)[2]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroup / 32;
    const int* rows = s.rows[buffer][warp][lane / 8];
    const char* source = reinterpret_cast<const char*>(base + lane % 8 * 8);
    const uint32_t to = sm90::shared_address(target) + swizzled(place_of(lane / 8), lane % 8, S::kBlockN);
#pragma unroll
    for (int i = 0; i < kSteps; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(rows + i);
#pragma unroll
      for (int j = i; j < i + 4 && j < kSteps; ++j) {
        const int row = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        const char* from = source + static_cast<uint64_t>(static_cast<uint32_t>(row)) * stride;
        const uint32_t exists = exist[j / 8] & 1u << j % 8 * 4;
#pragma unroll
        for (int panel = 0; panel < D / 64; ++panel) {
          sm90::copy_16(to + j * 16 * 128 + panel * S::kBlockN * 128, from + panel * 128, exists);
        }
      }
    }
  }

  __device__ void run() {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroup / 32;
    const uint32_t k_stride = static_cast<uint32_t>(p.k_strides.row * sizeof(T));
    const uint32_t v_stride = static_cast<uint32_t>(p.v_strides.row * sizeof(T));
    Ring<S::kStages> k_ring, v_ring;
    uint32_t q_parity = 0;
    int buffer = 0;  // of the rows of the next tile of K; the last one's are in the other
    Work w;
    for (int item = 0; w.get(p, s, item); ++item) {
      const int kv_head = w.head / p.group;
      const T* k = static_cast<const T*>(p.k) + w.b * p.k_strides.batch + kv_head * p.k_strides.head;
      const T* v = static_cast<const T*>(p.v) + w.b * p.v_strides.batch + kv_head * p.v_strides.head;
      int key = w.begin * S::kBlockN + place_of(lane);  // of the tile looked up next
      const int* at = p.kv_index + w.b * p.kv_index_batch + key;
      const float* bias = p.bias == nullptr ? nullptr : p.bias + w.b * p.bias_batch;
      const int k_len = s.k_len[w.b];
      int rows[2];        // of the tile looked up last, -1 for none
      float values[2];    // their biases
      uint32_t exist[2];  // of the tile of K to copy next
      uint32_t before[2];
      const auto look_up = [&] {
        constexpr int kNext = 32 / 4 * 16;
        rows[0] = key < k_len ? at[0] : -1;
        rows[1] = lane + 32 < kRowsOfWarp && key + kNext < k_len ? at[kNext] : -1;
        key += S::kBlockN;
        at += S::kBlockN;
      };
      const auto look_up_bias = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (rows[i] >= p.rows_k) rows[i] = -1;
          values[i] = rows[i] < 0 ? -INFINITY : bias == nullptr ? 0.0f : bias[rows[i]];
        }
      };
      const auto keep_rows = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = i * 32 + lane;
          if (number < kRowsOfWarp) s.rows[buffer][warp][number % 4][number / 4] = max(rows[i], 0);
          exist[i] = __ballot_sync(0xffffffffu, rows[i] >= 0) >> lane / 8;
        }
        __syncwarp();
      };
      const auto load_q = [&] {
        // A warp copies half of a computing warp group's queries.
        const int g = warp / 2;
        const int half = warp % 2;
        Queries<T, D, 1> queries;
        queries.look_up(p, s, w, warp * 32);
        sm90::barrier_wait(&s.q_empty[g], q_parity ^ 1);
        __syncwarp();
        if (lane == 0) {
          s.q_exists[q_parity][g][half] = queries.exist[0];
          sm90::barrier_arrive(&s.q_full[g]);
        }
        queries.copy(p, w, s.q[g], half * 32);
        sm90::copies_arrive(&s.q_full[g]);
      };
      // Of the tile of K whose buffer is free.
      const auto load_bias = [&] {
        uint4* const columns = reinterpret_cast<uint4*>(s.columns[k_ring.stage]);
        const float first = __shfl_sync(0xffffffffu, values[0], 0);
        bool same = true;
        bool fits = true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = i * 32 + lane;
          if (number >= kRowsOfWarp) continue;
          const float value = values[i] * p.bias_unit;
          same = same && values[i] == first;
          fits = fits && fits_columns<T>(value);
          // Other warps' keys may differ from this one's, so they are written even if they are alike.
          columns[place_of(number)] = bias == nullptr ? make_uint4(sm90::pack<T>(value, 0.0f), 0, 0, 0)
                                                      : columns_of<T>(value);
        }
        sm90::proxy_fence();
        same = __all_sync(0xffffffffu, same);
        fits = __all_sync(0xffffffffu, fits);
        if (lane == 0) {
          s.bias_kind[k_ring.stage][warp] = !fits ? kBeyond : same ? 0 : kColumns;
          s.bias_constant[k_ring.stage][warp] = first * p.bias_unit;
          sm90::barrier_arrive(&s.k_full[k_ring.stage]);
        }
      };
      const auto load_v = [&] {
        sm90::barrier_wait(&s.v_empty[v_ring.stage], v_ring.parity ^ 1);
        __syncwarp();
        copy_tile(v, v_stride, s.v[v_ring.stage], buffer ^ 1, before);
        sm90::copies_arrive(&s.v_full[v_ring.stage]);
        v_ring.next();
      };
      if (w.begin == w.end) {
        load_q();
      } else {
        look_up();
        look_up_bias();
        keep_rows();
      }
      for (int block = w.begin; block < w.end; ++block) {
        // Rows of the next tile are looked up under the copies of this one, its biases under those of the last.
        look_up();
        sm90::barrier_wait(&s.k_empty[k_ring.stage], k_ring.parity ^ 1);
        __syncwarp();
        copy_tile(k, k_stride, s.k[k_ring.stage], buffer, exist);
        sm90::copies_arrive(&s.k_full[k_ring.stage]);
        load_bias();
        k_ring.next();
        look_up_bias();
        if (block == w.begin) load_q();
        else load_v();
        __syncwarp();
        before[0] = exist[0];
        before[1] = exist[1];
        buffer ^= 1;
        keep_rows();
      }
      if (w.begin < w.end) load_v();
      q_parity ^= 1;
    }
  }
};

// ---- Results --------------------------------------------------------------------------------------------------------

// The row of `out` that slot `slot` of batch entry b writes, -1 for none.
__device__ inline int target_row(const Params& p, int b, int first, int slot) {
  if (p.out_index == nullptr) return first + slot;
  const int row = p.out_index[b * p.out_index_batch + slot];
  return row < p.rows_out ? row : -1;
}

__device__ inline float* lse_at(const Params& p, int b, int head, int row) {
  return p.lse + (p.cu_q == nullptr ? b * p.lse_batch : 0) + head * p.lse_head + row;
}

// Empty slots: 0 and -inf. A warp writes a slot of all heads; `worker` of `workers` warps takes its share of them.
template <typename T, int D, typename SharedT>
__device__ void clear_empty_slots(const Params& p, const SharedT& s, int worker, int workers) {
  constexpr int kChunks = D / 8;
  const int lane = threadIdx.x % 32;
  const bool packed = p.cu_q != nullptr;
  if (!packed && p.q_lens == nullptr) return;
  T* const out = static_cast<T*>(p.out);
  // Packed rows past the last sequence belong to no batch entry: they follow as one more.
  for (int b = 0; b < p.batch + packed; ++b) {
    int first = 0;
    int begin = 0;
    int end = p.num_q;
    if (packed) {
      first = b < p.batch ? s.q_row[b] : clamp(p.cu_q[p.batch], 0, p.rows_q);
      end = (b < p.batch ? clamp(p.cu_q[b + 1], first, p.rows_q) : p.rows_q) - first;
    }
    if (b < p.batch) begin = s.q_len[b];
    for (int slot = begin + worker; slot < end; slot += workers) {
      const int64_t row = target_row(p, b, first, slot);
      if (row >= 0) {
        T* at = out + (packed ? 0 : b * p.out_strides.batch) + row * p.out_strides.row;
        for (int i = lane; i < p.heads * kChunks; i += 32) {
          *reinterpret_cast<uint4*>(at + i / kChunks * p.out_strides.head + i % kChunks * 8) = make_uint4(0, 0, 0, 0);
        }
      }
      for (int head = lane; head < p.heads; head += 32) *lse_at(p, b, head, first + slot) = -INFINITY;
    }
  }
}

// ---- Computing ------------------------------------------------------------------------------------------------------

template <typename T, int D, bool GATHER>
struct Computer {
  using SharedT = Shared<T, D, GATHER>;
  using S = typename SharedT::S;
  static constexpr int N = S::kBlockN;

  const Params& p;
  SharedT& s;
  const int g;  // which of the two warp groups

  // A thread holds columns 8 i + 2 (lane % 4) and the next of row lane / 4, and of that row + 8, for every i: elements
  // 4 i to 4 i + 3 of an accumulator (PTX ISA, "register fragments and shared memory matrix layouts" of wgmma).
  float o[D / 2];
  float score[N / 2];
  uint32_t weight[N / 4];
  float top[2];  // running maximum of the rows, as a raw score
  float total[2];
  float offset[2];  // what this tile's exponents add to scaled scores
  float scaling[2];
  bool rescale;

  template <bool COLUMNS>
  __device__ void multiply_qk(int stage) {
    sm90::products_fence();
    if constexpr (COLUMNS) {
      // Groups of 8 keys follow each other; all groups of 8 queries are the same one.
      const uint32_t ones = sm90::tile_descriptor(s.ones, sizeof(s.ones[0]));
      const uint32_t biases = sm90::tile_descriptor(s.columns[stage], (S::kStages - stage) * sizeof(s.no_columns));
      sm90::Products<T, N>::shared_shared(
          score, sm90::plain_descriptor(ones, 0), sm90::plain_descriptor(biases, 8 * 16), 0);
    }
    const uint32_t a = sm90::opaque(sm90::tile_descriptor(s.q[g], 0));
    const uint32_t b = sm90::tile_descriptor(s.k[stage], 0);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      // 16 columns are 32 bytes; a panel has 64 columns. Descriptors count 16-byte units.
      const uint32_t a_step = i / 4 * (kRows * 128 / 16) + i % 4 * 2;
      const uint32_t b_step = i / 4 * (N * 128 / 16) + i % 4 * 2;
      sm90::Products<T, N>::shared_shared(
          score, sm90::swizzled_descriptor(a + a_step), sm90::swizzled_descriptor(b + b_step), COLUMNS || i > 0);
    }
    sm90::products_commit();
  }

  __device__ void multiply_pv(int stage) {
    sm90::products_fence();
    const uint32_t b = sm90::tile_descriptor(s.v[stage], N * 128);
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      sm90::Products<T, D>::registers_shared(o, weight + 4 * i, sm90::swizzled_descriptor(b + i * (16 * 128 / 16)));
    }
    sm90::products_commit();
  }

  // The first of this thread's two rows of a tile of queries; the other is 8 further.
  __device__ int first_row() const { return g * kRows + threadIdx.x % kGroup / 32 * 16 + threadIdx.x % 32 / 4; }

  __device__ static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }

  __device__ static float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // ---- Softmax ----
  //
  // A tile's scores become weights against the rows' running maxima `top`, which hold as long as no key exceeds them by
  // too much. That the sums of the weights tell: they need not be compared one by one. Where a sum is large (`settle`)
  // the top moves up, and what there is is rescaled. What the products of the last tile still use (weights, o) is left
  // alone until they have ended.
  //
  // A row that has met no key yet has no top to go by; a tile whose biases are far above those before may take weights
  // beyond the largest number. Such tiles go the careful way, in chunks of keys, each after its largest scores. If a
  // score does it, by 88 nat above all before, the tile's scores are computed anew.

  __host__ __device__ static constexpr int chunk_at(int c) { return c * (N / 16) / kChunks * 8; }  // its first element

  // Adds the biases of K tile `block` to the scores, read from memory: what the columns cannot do, and what scores that
  // are computed anew lack.
  __device__ void add_biases(const Work& w, int block) {
    const float* bias = p.bias;
    if (bias != nullptr && p.cu_k == nullptr) bias += w.b * p.bias_batch;
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = row_of(w, block * N + i * 2 + threadIdx.x % 4 * 2 + j);
        const float x = row < 0 ? -INFINITY : bias == nullptr ? 0.0f : bias[row] * p.bias_unit;
        score[i + j] += x;
        score[i + 2 + j] += x;
      }
    }
  }

  // The row of K of slot `key`, negative for none.
  __device__ int64_t row_of(const Work& w, int key) const {
    if (key >= s.k_len[w.b]) return -1;
    if constexpr (!GATHER) return s.first_k(w.b) + key;
    const int row = p.kv_index[w.b * p.kv_index_batch + key];
    return row < p.rows_k ? row : -1;
  }

  __device__ void set_offset(float constant) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // No key yet: all scores are -inf, and so must be the exponents.
      offset[r] = top[r] == -INFINITY ? -INFINITY : (constant - top[r]) * p.score_unit;
    }
  }

  // Moves the top of row r up by what `high`, its largest score so far, exceeds it. Returns the factor for all weights
  // before.
  __device__ float raise(int r, float high) {
    const float raised = fmaxf(top[r], high);
    const float factor = raised == -INFINITY ? 1.0f : sm90::exp2_approx((top[r] - raised) * p.score_unit);
    top[r] = raised;
    scaling[r] *= factor;
    total[r] *= factor;
    return factor;
  }

  template <int c>
  __device__ void weigh(float (&even)[2], float (&odd)[2]) {
#pragma unroll
    for (int i = chunk_at(c); i < chunk_at(c + 1); i += 2) {
      const int r = i / 2 % 2;
      score[i] = sm90::exp2_approx(fmaf(score[i], p.score_unit, offset[r]));
      score[i + 1] = sm90::exp2_approx(fmaf(score[i + 1], p.score_unit, offset[r]));
      even[r] += score[i];
      odd[r] += score[i + 1];
    }
  }

  template <int c>
  __device__ void careful_chunk(float constant) {
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = chunk_at(c); i < chunk_at(c + 1); ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], score[i]);
    const bool above = high[0] + constant > top[0] + p.slack || high[1] + constant > top[1] + p.slack;
    if (__any_sync(0xffffffffu, above)) {
      rescale = true;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = raise(r, quad_max(high[r]) + constant);
#pragma unroll
        for (int i = 2 * r; i < chunk_at(c); i += 4) {
          score[i] *= factor;
          score[i + 1] *= factor;
        }
      }
      set_offset(constant);
    }
    weigh<c>(total, total);
    if constexpr (c + 1 < kChunks) careful_chunk<c + 1>(constant);
  }

  // For a first tile, or when the products of the last one have ended.
  __device__ void careful_softmax(float constant) {
    rescale = false;
    scaling[0] = scaling[1] = 1.0f;
    set_offset(constant);
    careful_chunk<0>(constant);
    pack_weights<0, N / 2>();
    if (rescale) rescale_output();
  }

  template <int c>
  __device__ void quick_chunk(uint32_t count, float (&even)[2], float (&odd)[2]) {
    if constexpr (c == kWaitChunk) {
      // Never true. Else ptxas moves the wait up, before exponentials that it should follow, or those that should follow
      // it before.
      if (even[0] + even[1] + odd[0] + odd[1] < 0.0f) {
        sm90::pause();
        offset[0] = offset[1] = -INFINITY;
      }
      end_pv(count - 1);
    }
    weigh<c>(even, odd);
    if constexpr (c >= kWaitChunk && c > 0) pack_weights<c == kWaitChunk ? 0 : chunk_at(c - 1), chunk_at(c)>();
    if constexpr (c + 1 < kChunks) quick_chunk<c + 1>(count, even, odd);
    else pack_weights<chunk_at(c), N / 2>();
  }

  // False: weights may be infinite, or too large to be rescaled, and nothing but them has changed.
  __device__ bool quick_softmax(uint32_t count, float constant) {
    set_offset(constant);
    float even[2] = {0.0f, 0.0f};
    float odd[2] = {0.0f, 0.0f};
    quick_chunk<0>(count, even, odd);
    even[0] += odd[0];
    even[1] += odd[1];
    if (__builtin_expect(__any_sync(0xffffffffu, even[0] > kLargeSum || even[1] > kLargeSum), 0)) {
      if (__any_sync(0xffffffffu, even[0] > kHopelessSum || even[1] > kHopelessSum)) return false;
      settle(even);
    }
    total[0] += even[0];
    total[1] += even[1];
    return true;
  }

  // Some weights of this tile are large: their unit is made the largest.
  __device__ void settle(float (&sum)[2]) {
    scaling[0] = scaling[1] = 1.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = 1.0f;
#pragma unroll
      for (int i = 2 * r; i < N / 2; i += 4) high = fmaxf(fmaxf(high, score[i]), score[i + 1]);
      const float factor = raise(r, top[r] + log2f(quad_max(high)) * (p.slack / kSlack));
      sum[r] *= factor;
#pragma unroll
      for (int i = 2 * r; i < N / 2; i += 4) {
        score[i] *= factor;
        score[i + 1] *= factor;
      }
    }
    pack_weights<0, N / 2>();
    rescale_output();
  }

  // The scores of K tile `block` anew, a row of K after the other.
  __device__ void score_again(const Work& w, int block) {
    const int lane = threadIdx.x % 32;
    const T* q[2];  // null: no query, which is as one of zeros
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int slot = w.tile * kBlockM + first_row() + 8 * r;
      int64_t row = -1;
      if (slot < s.q_len[w.b]) {
        row = p.q_index == nullptr ? s.first_q(w.b) + slot : p.q_index[w.b * p.q_index_batch + slot];
      }
      q[r] = static_cast<const T*>(p.q) + (p.cu_q == nullptr ? w.b * p.q_strides.batch : 0) + row * p.q_strides.row +
          w.head * p.q_strides.head;
      if (row < 0 || row >= p.rows_q) q[r] = nullptr;
    }
    const T* k = static_cast<const T*>(p.k) + (p.cu_k == nullptr ? w.b * p.k_strides.batch : 0) +
        w.head / p.group * p.k_strides.head;
    float again[N / 2];
#pragma unroll 1
    for (int i = 0; i < N / 4; ++i) {
      const int key = block * N + i / 2 * 8 + lane % 4 * 2 + i % 2;
      const int64_t key_row = row_of(w, key);
      float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int chunk = 0; key_row >= 0 && chunk < D / 8; ++chunk) {
        T a[8], b[8];
        *reinterpret_cast<uint4*>(b) = *reinterpret_cast<const uint4*>(k + key_row * p.k_strides.row + chunk * 8);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (q[r] == nullptr) continue;
          *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(q[r] + chunk * 8);
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[r] = fmaf(static_cast<float>(a[j]), static_cast<float>(b[j]), sums[r]);
        }
      }
      again[i / 2 * 4 + i % 2] = sums[0];
      again[i / 2 * 4 + 2 + i % 2] = sums[1];
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) score[i] = again[i];
  }

  // What is known of the biases of a tile that is there.
  __device__ int kind_of(uint32_t count) const {
    const int stage = stage_of(count);
    if constexpr (!GATHER) return s.bias_kind[stage][0];
    const int4 kinds = *reinterpret_cast<const int4*>(s.bias_kind[stage]);
    const float4 x = *reinterpret_cast<const float4*>(s.bias_constant[stage]);
    const int all = kinds.x | kinds.y | kinds.z | kinds.w;
    if (all & kBeyond) return kBeyond;
    return all == 0 && x.x == x.y && x.x == x.z && x.x == x.w ? 0 : kColumns;
  }

  template <bool FIRST>
  __device__ void softmax(const Work& w, int block, uint32_t count, int kind) {
    const float constant = kind & (kColumns | kBeyond) ? 0.0f : s.bias_constant[stage_of(count)][0];
    const bool no_key = __any_sync(0xffffffffu, top[0] == -INFINITY || top[1] == -INFINITY);
    if (FIRST) sm90::products_wait<0>();
    else sm90::products_wait<1>();
    sm90::pin(score);
    release(&s.k_empty[stage_of(count)]);
    if (block + 1 == w.end) release(&s.q_empty[g]);
    if constexpr (FIRST) {
      if (__builtin_expect(kind & kBeyond, 0)) add_biases(w, block);
      careful_softmax(constant);
    } else {
      bool done = false;
      if (__builtin_expect(no_key || (kind & (kBeyond | kFarAbove)), 0)) {
        end_pv(count - 1);
        if (kind & kBeyond) add_biases(w, block);
      } else {
        done = quick_softmax(count, constant);
        if (__builtin_expect(!done, 0)) {
          score_again(w, block);
          if (kind & kColumns) add_biases(w, block);
        }
      }
      if (__builtin_expect(!done, 0)) careful_softmax(constant);
    }
  }

  __device__ void rescale_output() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      o[4 * i + 0] *= scaling[0];
      o[4 * i + 1] *= scaling[0];
      o[4 * i + 2] *= scaling[1];
      o[4 * i + 3] *= scaling[1];
    }
  }

  // The accumulator's layout is that of an operand in registers: blocks 2 i and 2 i + 1 are its 16 columns i.
  template <int BEGIN, int END>
  __device__ void pack_weights() {
#pragma unroll
    for (int i = BEGIN / 2; i < END / 2; ++i) weight[i] = sm90::pack<T>(score[2 * i], score[2 * i + 1]);
  }

  // One arrival a warp, when all its lanes are past the wait for this buffer: a lane that lagged could find the barrier
  // a whole turn further, where the parity is the old one again.
  __device__ static void release(uint64_t* bar) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) sm90::barrier_arrive(bar);
  }

  // `count`: K tiles that this warp group has met so far. All rings are places of this number.
  __device__ static int stage_of(uint32_t count) { return count % S::kStages; }
  __device__ static uint32_t parity_of(uint32_t count) { return count / S::kStages % 2; }

  // A buffer is filled. Row copies go another way than the one on which products read: what they wrote is made visible.
  __device__ static void wait_full(uint64_t* bar, uint32_t parity) {
    sm90::barrier_wait(bar, parity);
    if constexpr (GATHER) sm90::proxy_fence();
  }

  __device__ void issue_qk(uint32_t count, int kind) {
    sm90::pin(score);
    // Each a batch of its own: with one that is joined by an optional step, the compiler has the others wait for it.
    if (__any_sync(0xffffffffu, kind & kColumns)) multiply_qk<true>(stage_of(count));
    else multiply_qk<false>(stage_of(count));
  }

  __device__ void issue_pv(uint32_t count) {
    wait_full(&s.v_full[stage_of(count)], parity_of(count));
    sm90::pin(o);
    multiply_pv(stage_of(count));
  }

  __device__ void end_pv(uint32_t count) {
    sm90::products_wait<0>();
    sm90::pin(o);
    release(&s.v_empty[stage_of(count)]);
  }

  // Waits for an item's queries.
  __device__ void begin(const Work& w, uint32_t& q_parity) {
    wait_full(&s.q_full[g], q_parity);
    // Rows that came one by one went another way than products read.
    if (!GATHER && p.q_index != nullptr) sm90::proxy_fence();
    q_parity ^= 1;
  }

  // The products of an item's first scores; returns what is known of the biases.
  __device__ int first_scores(uint32_t count) {
    wait_full(&s.k_full[stage_of(count)], parity_of(count));
    const int kind = kind_of(count);
    issue_qk(count, kind);
    return kind;
  }

  // No result yet.
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = -INFINITY;
      total[r] = 0.0f;
    }
  }

  // An item that has begun; `meanwhile` runs under the products of its last weights.
  template <typename Meanwhile>
  __device__ void attend(const Work& w, uint32_t& count, int kind, Meanwhile meanwhile) {
    softmax<true>(w, w.begin, count, kind);
    for (int block = w.begin + 1; block < w.end; ++block) {
      // The products of this tile's scores and of the last tile's weights, then the softmax under the latter.
      wait_full(&s.k_full[stage_of(count + 1)], parity_of(count + 1));
      kind = kind_of(count + 1);
      if (w.has_rows(1)) sm90::named_sync(1 + g, 2 * kGroup);
      issue_qk(count + 1, kind);
      issue_pv(count);
      if (w.has_rows(1)) sm90::named_arrive(2 - g, 2 * kGroup);
      ++count;
      softmax<false>(w, block, count, kind);
    }
    issue_pv(count);
    meanwhile();
    end_pv(count);
    ++count;
  }

  // An item without rows for this warp group: it gives back what it does not read, and takes no turns; nor does the
  // other. It waits for each buffer before it gives it back, so that it never arrives twice in one phase.
  __device__ void sit_out(const Work& w, uint32_t& count) {
    release(&s.q_empty[g]);
    for (int block = w.begin; block < w.end; ++block) {
      sm90::barrier_wait(&s.k_full[stage_of(count)], parity_of(count));
      release(&s.k_empty[stage_of(count)]);
      sm90::barrier_wait(&s.v_full[stage_of(count)], parity_of(count));
      release(&s.v_empty[stage_of(count)]);
      ++count;
    }
  }

  // Rows as fp32, for the kernel that joins parts.
  __device__ void store_part(const Work& w, const float (&x)[D / 2], const float (&lse)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = first_row() + 8 * r;
      if (at >= w.rows) continue;
      const int64_t place = static_cast<int64_t>(w.part) * kBlockM + at;
      if (lane % 4 == 0) p.part_lse[place] = lse[r];
      float* target = p.part_out + place * D + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<float2*>(target + 8 * i) = make_float2(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]);
      }
    }
  }

  // The four threads of a row trade words, so that each writes 16 bytes: thread c has blocks 4 i + c, for every i.
  __device__ void store_rows(
      const Work& w, const float (&x)[D / 2], const float (&lse)[2], const int (&targets)[2]) {
    const int lane = threadIdx.x % 32;
    const int c = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = first_row() + 8 * r;
      const int64_t target = targets[r];
      if (at < w.rows && c == 0) {
        *lse_at(p, w.b, w.head, s.first_q(w.b) + w.tile * kBlockM + at) = lse[r] * 0.6931471805599453f;
      }
      T* const place = static_cast<T*>(p.out) + (p.cu_q == nullptr ? w.b * p.out_strides.batch : 0) +
          target * p.out_strides.row + w.head * p.out_strides.head;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int element = 16 * i + 4 * j + 2 * r;
          word[j] = sm90::pack<T>(x[element], x[element + 1]);
        }
        const bool upper = c & 2;
        const uint32_t a = __shfl_xor_sync(0xffffffffu, upper ? word[0] : word[2], 2);
        const uint32_t b = __shfl_xor_sync(0xffffffffu, upper ? word[1] : word[3], 2);
        const uint32_t w0 = upper ? a : word[0];
        const uint32_t w1 = upper ? b : word[1];
        const uint32_t w2 = upper ? word[2] : a;
        const uint32_t w3 = upper ? word[3] : b;
        const bool odd = c & 1;
        const uint32_t e = __shfl_xor_sync(0xffffffffu, odd ? w0 : w1, 1);
        const uint32_t f = __shfl_xor_sync(0xffffffffu, odd ? w2 : w3, 1);
        uint4 all = odd ? make_uint4(e, w1, f, w3) : make_uint4(w0, e, w2, f);
        if (p.q_index != nullptr && lse[r] == -INFINITY) all = make_uint4(0, 0, 0, 0);
        if (target >= 0) *reinterpret_cast<uint4*>(place + (4 * i + c) * 8) = all;
      }
    }
  }

  // The two rows of this thread: the result and its lse in base 2. Bit r of `exist`: whether row r has a query.
  __device__ void result(int exist, float (&x)[D / 2], float (&lse)[2]) const {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(total[r]);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      lse[r] = sum == 0.0f || (exist >> r & 1) == 0 ? -INFINITY : fmaf(top[r], p.score_unit, log2f(sum));
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) x[i] = o[i] * inverse[i / 2 % 2];
    sm90::pin(x);
  }

  // Where this thread's two rows go in `out`, -1 for nowhere.
  __device__ void look_up_targets(const Work& w, int (&targets)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = first_row() + 8 * r;
      targets[r] = at < w.rows ? target_row(p, w.b, s.first_q(w.b), w.tile * kBlockM + at) : -1;
    }
  }

  __device__ void store(const Work& w, const float (&x)[D / 2], const float (&lse)[2], const int (&targets)[2]) {
    if (w.part >= 0) store_part(w, x, lse);
    else store_rows(w, x, lse, targets);
  }

  // Which of this thread's two rows have queries, in an item whose queries had this parity.
  __device__ int existing(uint32_t q_parity) const {
    if (p.q_index == nullptr) return 3;
    const int row = first_row() % kRows;
    const uint32_t exist = s.q_exists[q_parity][g][row / 32] >> row % 32;
    return (exist & 1) | (exist >> 7 & 2);
  }

  __device__ void run() {
    if (g == 1) sm90::named_arrive(1, 2 * kGroup);
    uint32_t count = 0;
    uint32_t q_parity = 0;
    Work w, last;
    float x[D / 2];  // the result of `last`
    float lse[2];
    int targets[2];
    bool rows = false;  // whether it is to be stored yet
    bool more = w.get(p, s, 0);
    for (int item = 1;; ++item) {
      if (more) begin(w, q_parity);
      if (__any_sync(0xffffffffu, more && w.has_rows(g) && w.begin < w.end)) {
        // The products of an item's first scores pass while the rows of the item before are stored.
        const int kind = first_scores(count);
        if (rows) store(last, x, lse, targets);
        last = w;
        rows = true;
        clear();
        const int exist = existing(q_parity ^ 1);
        attend(last, count, kind, [&] {
          look_up_targets(last, targets);
          more = w.get(p, s, item);
        });
        result(exist, x, lse);
      } else {
        if (rows) store(last, x, lse, targets);
        if (!more) break;
        last = w;
        rows = w.has_rows(g);
        if (rows) release(&s.q_empty[g]);
        else sit_out(w, count);
        clear();
        result(0, x, lse);
        look_up_targets(last, targets);
        more = w.get(p, s, item);
      }
    }
  }
};

// ---- Kernels --------------------------------------------------------------------------------------------------------

template <typename T, int D, bool GATHER>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using SharedT = Shared<T, D, GATHER>;
  using S = typename SharedT::S;
  SharedT& s = *static_cast<SharedT*>(sm90::block_memory());
  if (sm90::shared_address(&s) % 1024 != 0) __trap();
  if (threadIdx.x == 0) {
    // A buffer is given back by each of the warps that read it.
    for (int g = 0; g < 2; ++g) {
      // Copied rows: lane by lane, and once by each warp for what it wrote besides.
      sm90::barrier_init(&s.q_full[g], GATHER ? 2 * 33 : p.q_index != nullptr ? 33 : 1);
      sm90::barrier_init(&s.q_empty[g], 4);
    }
    for (int i = 0; i < S::kStages; ++i) {
      sm90::barrier_init(&s.k_full[i], S::kArrivals + S::kBiasWarps);
      sm90::barrier_init(&s.v_full[i], S::kArrivals);
      sm90::barrier_init(&s.k_empty[i], 8);
      sm90::barrier_init(&s.v_empty[i], 8);
    }
    sm90::barrier_init(&s.tail, 1);
    sm90::barrier_init_fence();
    if constexpr (!GATHER) {
      if (p.rows_q > 0 && p.q_index == nullptr) sm90::prefetch_map(&p.q_map);
      if (p.rows_k > 0) sm90::prefetch_map(&p.k_map);
      if (p.rows_k > 0) sm90::prefetch_map(&p.v_map);
    }
  }
  fill_constants<T>(s);
  // So far nothing was read or written that a kernel before may still work on, nor is it in a plan that the host made.
  if (!p.planned) sm90::wait_for_grid_before();
  make_plan<T, D, GATHER>(p, s);
  if (p.planned) sm90::wait_for_grid_before();
  sm90::let_grid_after_start();
  if (threadIdx.x < kGroup) {
    sm90::fewer_registers<S::kLoaderRegisters>();
    const int warp = threadIdx.x / 32;
    if constexpr (GATHER) {
      RowLoader<T, D>{p, s}.run();
      if (warp == 3) note_cut_tile(p, s);
      clear_empty_slots<T, D>(p, s, blockIdx.x * 4 + warp, gridDim.x * 4);
    } else if (warp == 0) {
      TileLoader<T, D>{p, s}.run();
    } else if (warp == 1) {
      load_biases<T, D>(p, s);
    } else {
      if (p.q_index != nullptr) gather_queries<T, D>(p, s, warp - 2);
      if (warp == 3) note_cut_tile(p, s);
      clear_empty_slots<T, D>(p, s, blockIdx.x * 2 + warp - 2, gridDim.x * 2);
    }
  } else {
    sm90::more_registers<S::kComputeRegisters>();
    Computer<T, D, GATHER>{p, s, __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0)}.run();
  }
#else
  __trap();
#endif
}

// Joins the parts of cut tiles: a warp a row.
template <typename T, int D>
__global__ void __launch_bounds__(256) join_kernel(const __grid_constant__ Params p) {
  constexpr int kEach = D / 32;
  struct __align__(4 * kEach) Values {
    float x[kEach];
  };
  sm90::let_grid_after_start();
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.y * 8 + threadIdx.x / 32;
  CutTile cut;
  if (p.planned) cut = cut_tile_of(p, blockIdx.x);
  sm90::wait_for_grid_before();
  if (!p.planned) cut = p.cut_tiles[blockIdx.x];
  const int parts = cut.parts;
  if (parts == 0 || row >= cut.rows) return;
  const auto place = [&](int part) {
    const int slot = part < 2 ? part * cut.rest + blockIdx.x : 2 * cut.rest + cut.sharer + part - 2;
    return static_cast<int64_t>(slot) * kBlockM + row;
  };
  const auto read = [&](int part) {
    return *reinterpret_cast<const Values*>(p.part_out + place(part) * D + lane * kEach);
  };
  // What parts hold is asked for before it is known whether it counts, of the first ones all together.
  constexpr int kAtOnce = 4;
  Values values[kAtOnce];
#pragma unroll
  for (int part = 0; part < kAtOnce; ++part) {
    if (part < parts) values[part] = read(part);
  }
  const float mine = lane < parts ? p.part_lse[place(lane)] : -INFINITY;
  int first;
  length_of(p.q_lens, p.cu_q, cut.b, p.num_q, p.rows_q, first);
  const int slot = cut.tile * kBlockM + row;
  const int64_t target = target_row(p, cut.b, first, slot);
  float top = mine;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  // Lanes hold nothing but 0 where no part has a key. A NaN stays one.
  const float weight = mine == -INFINITY ? 0.0f : exp2f(mine - top);
  float total = 0.0f;
  float sum[kEach] = {};
  // A part without keys for this row wrote nothing that counts, or nothing.
  const auto add = [&](int part, const Values& part_values) {
    const float w = __shfl_sync(0xffffffffu, weight, part);
    total += w;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum[i] = w == 0.0f ? sum[i] : fmaf(w, part_values.x[i], sum[i]);
  };
#pragma unroll
  for (int part = 0; part < kAtOnce; ++part) {
    if (part < parts) add(part, values[part]);
  }
  for (int part = kAtOnce; part < parts; ++part) add(part, read(part));
  if (lane == 0) {
    *lse_at(p, cut.b, cut.head, first + slot) = total == 0.0f ? -INFINITY : (top + log2f(total)) * 0.6931471805599453f;
  }
  if (target < 0) return;
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  uint32_t word[kEach / 2];
#pragma unroll
  for (int i = 0; i < kEach / 2; ++i) {
    word[i] = sm90::pack<T>(sum[2 * i] * inverse, sum[2 * i + 1] * inverse);
  }
  T* at = static_cast<T*>(p.out) + (p.cu_q == nullptr ? cut.b * p.out_strides.batch : 0) +
      target * p.out_strides.row + cut.head * p.out_strides.head + lane * kEach;
  if constexpr (kEach == 4) *reinterpret_cast<uint2*>(at) = make_uint2(word[0], word[1]);
  else *reinterpret_cast<uint32_t*>(at) = word[0];
}

}  // namespace specedit::attn
