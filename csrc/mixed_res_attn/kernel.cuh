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
//   Keys past the end have bias -inf: there is no other masking.
// - The running maximum is raised only where it has fallen more than kSlack behind, so that the accumulators are
//   seldom rescaled. Weights then reach 2^kSlack, which neither bf16 nor fp16 minds.
// - Tiles are dealt to persistent blocks in whole rounds; those of the last, incomplete round are cut along their keys
//   into equal parts, whose results a second kernel joins. The cut depends on lengths alone: equal calls, equal bits.
#pragma once

#include <cmath>

#include "mixed_res_attn/params.h"
#include "mixed_res_attn/sm90.cuh"

namespace specedit::attn {

template <typename T, int D, bool GATHER>
struct Shape {
  static constexpr int kBlockN = attn::kBlockN;
  static constexpr int kStages = D == 64 ? 4 : 2;
  static constexpr int kBiasSlots = 2 * kStages;  // so that biases are there before the scores
  static constexpr int kLoaderRegisters = GATHER ? 56 : 24;
  // The registers of a block divided by 128 are 504: three warp groups started with 168.
  static constexpr int kComputeRegisters = (504 - kLoaderRegisters) / 16 * 8;
  // A thread's biases of a tile lie together; the padding keeps its four kinds of threads on different banks.
  static constexpr int kBiasStride = kBlockN / 4 + (kBlockN % 128 == 0 ? 4 : 0);
  static constexpr int kArrivals = GATHER ? kGroup : 1;  // on a barrier that says a tile is there
};

template <typename T, int D, bool GATHER>
struct Shared {
  using S = Shape<T, D, GATHER>;
  T q[2][kRows * D];
  T k[S::kStages][S::kBlockN * D];
  T v[S::kStages][S::kBlockN * D];
  float bias[S::kBiasSlots][4 * S::kBiasStride];
  float bias_constant[S::kBiasSlots];
  int bias_varies[S::kBiasSlots];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  uint64_t bias_full[S::kBiasSlots], bias_empty[S::kBiasSlots], tail;
  // The plan: lengths, first rows (packed layout) and first tile of each batch entry; how the last round is cut.
  int q_len[kMaxBatch], k_len[kMaxBatch], q_row[kMaxBatch], k_row[kMaxBatch], tile_start[kMaxBatch + 1];
  int whole, rest, parts;
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

template <typename T, int D, bool GATHER>
__device__ void make_plan(const Params& p, Shared<T, D, GATHER>& s) {
  using S = Shape<T, D, GATHER>;
  for (int b = threadIdx.x; b < p.batch; b += kThreads) {
    s.q_len[b] = length_of(p.q_lens, p.cu_q, b, p.num_q, p.rows_q, s.q_row[b]);
    s.k_len[b] = length_of(p.kv_lens, p.cu_k, b, p.num_k, p.rows_k, s.k_row[b]);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int total = 0;
    int blocks = 0;
    for (int start = 0; start < p.batch; start += 32) {
      const int b = start + lane;
      int tiles = b < p.batch ? ceil_div(s.q_len[b], kBlockM) * p.heads : 0;
      if (tiles > 0) blocks = max(blocks, ceil_div(s.k_len[b], S::kBlockN));
      int sum = tiles;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
      }
      if (b < p.batch) s.tile_start[b] = total + sum - tiles;
      total += __shfl_sync(0xffffffffu, sum, 31);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) blocks = max(blocks, __shfl_xor_sync(0xffffffffu, blocks, step));
    const int workers = gridDim.x;
    const int rest = total % workers;
    const int parts = lane % kMaxParts + 1;
    int choice = cut_cost(rest, blocks, parts, workers) * 32 + parts;
    if (!may_cut(rest, blocks, parts, p.slots)) choice = 0x7fffffff;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) choice = min(choice, __shfl_xor_sync(0xffffffffu, choice, step));
    if (lane == 0) {
      s.tile_start[p.batch] = total;
      s.whole = total - rest;
      s.rest = rest;
      s.parts = rest == 0 ? 1 : choice % 32;
    }
  }
  __syncthreads();
}

// One item of a block's work: a tile of queries of one head, and the K tiles [begin, end) that it meets.
struct Work {
  int b, head, tile, begin, end;
  int part;  // slot of the result, or -1: the result is final

  template <typename SharedT>
  __device__ bool get(const Params& p, const SharedT& s, int item) {
    int id = item;
    int index = 0;
    part = -1;
    if (item >= s.whole) {
      if (item >= s.whole + s.rest * s.parts) return false;
      if (s.parts > 1) {
        // Part by part, so that the tiles of one head read the same keys at the same time.
        part = item - s.whole;
        index = part / s.rest;
        id = s.whole + part - index * s.rest;
      }
    }
    int low = 0;
    int high = p.batch - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (s.tile_start[middle] <= id) low = middle;
      else high = middle - 1;
    }
    b = low;
    const int tiles = ceil_div(s.q_len[b], kBlockM);
    const int local = id - s.tile_start[b];
    head = local / tiles;
    tile = local - head * tiles;
    const int blocks = ceil_div(s.k_len[b], SharedT::S::kBlockN);
    begin = part < 0 ? 0 : index * blocks / s.parts;
    end = part < 0 ? blocks : (index + 1) * blocks / s.parts;
    return true;
  }
};

// ---- Barriers -------------------------------------------------------------------------------------------------------
//
// A buffer has two barriers: `full`, on which those that fill it arrive, and `empty`, on which the warps that read it
// arrive. A wait knows a phase by its parity alone, so whoever waits on a barrier must also be one without whom the
// barrier's next phase cannot end: else it may sleep through two phases and wait for ever. Hence the loader of a buffer
// alone waits for its `empty`, and biases have buffers, and barriers, of their own.

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
      const int rows = S::kBlockN - valid;
      for (int i = lane; i < rows * D / 8; i += 32) {
        const int panel = i / (rows * 8);
        const int rest = i - panel * rows * 8;
        uint4* at = reinterpret_cast<uint4*>(target) + panel * S::kBlockN * 8 + valid * 8 + rest;
        *at = make_uint4(0, 0, 0, 0);
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
    for (int item = blockIdx.x; w.get(p, s, item); item += gridDim.x) {
      const int kv_head = w.head / p.group;
      const int copy_b = p.cu_k == nullptr ? w.b : 0;
      const int k_row = s.k_row[w.b];
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
                s.q[g], &p.q_map, &s.q_full[g], 0, s.q_row[w.b] + w.tile * kBlockM + g * kRows, 0, w.head, q_b);
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

// Where a thread that computes finds the bias of key `column` of a tile.
template <typename S>
__device__ inline int bias_place(int column) {
  return column % 8 / 2 * S::kBiasStride + column / 8 * 2 + column % 2;
}

// The biases of dense keys: a warp runs ahead of the products by as many tiles as there are slots.
template <typename T, int D>
__device__ void load_biases(const Params& p, Shared<T, D, false>& s) {
  using S = Shape<T, D, false>;
  constexpr int kEach = (S::kBlockN + 31) / 32;
  const int lane = threadIdx.x % 32;
  Ring<S::kBiasSlots> slot;
  Work w;
  for (int item = blockIdx.x; w.get(p, s, item); item += gridDim.x) {
    const float* bias = nullptr;
    if (p.bias != nullptr) bias = p.bias + (p.cu_k == nullptr ? w.b * p.bias_batch : 0) + s.k_row[w.b];
    const int k_len = s.k_len[w.b];
    for (int block = w.begin; block < w.end; ++block) {
      float value[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int key = block * S::kBlockN + i * 32 + lane;
        value[i] = key >= k_len ? -INFINITY : bias == nullptr ? 0.0f : bias[key] * p.bias_unit;
      }
      bool same = true;
      const float first = __shfl_sync(0xffffffffu, value[0], 0);
#pragma unroll
      for (int i = 0; i < kEach; ++i) same = same && (value[i] == first || i * 32 + lane >= S::kBlockN);
      same = __all_sync(0xffffffffu, same);
      sm90::barrier_wait(&s.bias_empty[slot.stage], slot.parity ^ 1);
      __syncwarp();
      if (!same) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int column = i * 32 + lane;
          if (column < S::kBlockN) s.bias[slot.stage][bias_place<S>(column)] = value[i];
        }
      }
      if (lane == 0) {
        s.bias_varies[slot.stage] = !same;
        s.bias_constant[slot.stage] = same ? first : 0.0f;
      }
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(&s.bias_full[slot.stage]);
      slot.next();
    }
  }
}

__device__ inline bool query_row(const Params& p, int b, int slot, int q_len, int& row) {
  row = slot < q_len ? p.q_index[b * p.q_index_batch + slot] : -1;
  return row >= 0 && row < p.rows_q;
}

// The queries of one computing warp group by q_index: a warp copies their rows.
template <typename T, int D>
__device__ void gather_queries(const Params& p, Shared<T, D, false>& s, int g) {
  constexpr int kChunks = D / 8;
  const int lane = threadIdx.x % 32;
  const uint32_t target = sm90::shared_address(s.q[g]);
  uint32_t parity = 0;
  Work w;
  for (int item = blockIdx.x; w.get(p, s, item); item += gridDim.x) {
    const T* base = static_cast<const T*>(p.q) + w.b * p.q_strides.batch + w.head * p.q_strides.head;
    const int first = w.tile * kBlockM + g * kRows;
    sm90::barrier_wait(&s.q_empty[g], parity ^ 1);
    parity ^= 1;
#pragma unroll 4
    for (int i = lane; i < kRows * kChunks; i += 32) {
      int row;
      const bool valid = query_row(p, w.b, first + i / kChunks, s.q_len[w.b], row);
      const T* source = valid ? base + row * p.q_strides.row + i % kChunks * 8 : base;
      sm90::copy_16(target + swizzled(i / kChunks, i % kChunks, kRows), source, valid);
    }
    sm90::copies_commit();
    sm90::copies_wait<0>();
    sm90::proxy_fence();
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(&s.q_full[g]);
  }
}

// K and V rows by kv_index: the whole warp group copies them, 16 bytes a thread and instruction.
template <typename T, int D>
struct RowLoader {
  using SharedT = Shared<T, D, true>;
  using S = typename SharedT::S;
  static constexpr int kChunks = D / 8;
  static constexpr int kRowsAtOnce = kGroup / kChunks;
  static constexpr int kSteps = S::kBlockN / kRowsAtOnce;
  static_assert(S::kBlockN % kRowsAtOnce == 0);

  const Params& p;
  SharedT& s;
  uint64_t* pending = nullptr;  // told when the copies before the last commit have arrived

  __device__ void tell() {
    sm90::proxy_fence();
    sm90::barrier_arrive(pending);
  }

  // Waits until a buffer is free; copies that others wait for are not held up by it.
  __device__ void acquire(uint64_t* empty, uint32_t parity) {
    if (sm90::barrier_try(empty, parity ^ 1)) return;
    if (pending != nullptr) {
      sm90::copies_wait<0>();
      tell();
      pending = nullptr;
    }
    sm90::barrier_wait(empty, parity ^ 1);
  }

  __device__ void commit(uint64_t* full) {
    sm90::copies_commit();
    if (pending != nullptr) {
      sm90::copies_wait<1>();
      tell();
    }
    pending = full;
  }

  // rows[i]: the row that this warp's lane i knows; see run().
  __device__ void copy_tile(const T* base, int64_t row_stride, T* target, const int (&rows)[2]) {
    constexpr int kRowsOfWarp = kRowsAtOnce / 4;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroup / 32;
    const int sub = lane / kChunks;
    const int chunk = lane % kChunks;
    const T* source = base + chunk * 8;
    const uint32_t shared = sm90::shared_address(target);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      // The warp's row number i * kRowsOfWarp + sub.
      const int number = i * kRowsOfWarp + sub;
      const int row = __shfl_sync(0xffffffffu, rows[i * kRowsOfWarp / 32], number % 32);
      const int place = i * kRowsAtOnce + warp * kRowsOfWarp + sub;
      const bool valid = row >= 0;
      sm90::copy_16(shared + swizzled(place, chunk, S::kBlockN), source + (valid ? row : 0) * row_stride, valid);
    }
  }

  __device__ void run() {
    constexpr int kRowsOfWarp = kRowsAtOnce / 4;
    static_assert(kSteps * kRowsOfWarp <= 64 && 32 % kRowsOfWarp == 0);
    const int thread = threadIdx.x % kGroup;
    const int lane = thread % 32;
    const int warp = thread / 32;
    Ring<S::kStages> k_ring, v_ring;
    Ring<S::kBiasSlots> slot;
    uint32_t q_parity = 0;
    Work w;
    for (int item = blockIdx.x; w.get(p, s, item); item += gridDim.x) {
      const int kv_head = w.head / p.group;
      const T* k = static_cast<const T*>(p.k) + w.b * p.k_strides.batch + kv_head * p.k_strides.head;
      const T* v = static_cast<const T*>(p.v) + w.b * p.v_strides.batch + kv_head * p.v_strides.head;
      const int* index = p.kv_index + w.b * p.kv_index_batch;
      const float* bias = p.bias == nullptr ? nullptr : p.bias + w.b * p.bias_batch;
      const int k_len = s.k_len[w.b];
      // The row of a key slot, -1 where there is none.
      const auto row_of = [&](int key) {
        const int row = key < k_len ? index[key] : -1;
        return row < p.rows_k ? row : -1;
      };
      // Lane i of a warp looks up the warp's rows i and i + 32 of a tile.
      const auto look_up = [&](int block, int(&rows)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = i * 32 + lane;
          const int place = number / kRowsOfWarp * kRowsAtOnce + warp * kRowsOfWarp + number % kRowsOfWarp;
          rows[i] = number < kSteps * kRowsOfWarp ? row_of(block * S::kBlockN + place) : -1;
        }
      };
      const auto load_q = [&] {
        const T* base = static_cast<const T*>(p.q) + w.b * p.q_strides.batch + w.head * p.q_strides.head;
        for (int g = 0; g < 2; ++g) {
          acquire(&s.q_empty[g], q_parity);
          const uint32_t target = sm90::shared_address(s.q[g]);
          const int first = w.tile * kBlockM + g * kRows;
#pragma unroll 4
          for (int i = thread; i < kRows * kChunks; i += kGroup) {
            int row = first + i / kChunks;
            bool valid = row < s.q_len[w.b];
            if (p.q_index != nullptr) valid = query_row(p, w.b, first + i / kChunks, s.q_len[w.b], row);
            const T* source = valid ? base + row * p.q_strides.row + i % kChunks * 8 : base;
            sm90::copy_16(target + swizzled(i / kChunks, i % kChunks, kRows), source, valid);
          }
          commit(&s.q_full[g]);
        }
      };
      // Every thread's value of column `thread`, and of `thread` + 128 where there is one.
      const auto load_bias = [&](int block) {
        constexpr int kEach = (S::kBlockN + kGroup - 1) / kGroup;
        const auto value_at = [&](int column) {
          const int row = row_of(block * S::kBlockN + column);
          return row < 0 ? -INFINITY : bias == nullptr ? 0.0f : bias[row] * p.bias_unit;
        };
        const float first = value_at(0);
        bool same = true;
        acquire(&s.bias_empty[slot.stage], slot.parity);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int column = i * kGroup + thread;
          if (column < S::kBlockN) {
            const float value = value_at(column);
            same = same && value == first;
            s.bias[slot.stage][bias_place<S>(column)] = value;
          }
        }
        same = sm90::named_sync_all(3, kGroup, same);
        if (thread == 0) {
          s.bias_varies[slot.stage] = !same;
          s.bias_constant[slot.stage] = same ? first : 0.0f;
        }
        sm90::barrier_arrive(&s.bias_full[slot.stage]);
        slot.next();
      };
      const auto load_v = [&](const int(&rows)[2]) {
        acquire(&s.v_empty[v_ring.stage], v_ring.parity);
        copy_tile(v, p.v_strides.row, s.v[v_ring.stage], rows);
        commit(&s.v_full[v_ring.stage]);
        v_ring.next();
      };
      int rows[2];
      int before[2];
      if (w.begin == w.end) load_q();
      else look_up(w.begin, rows);
      for (int block = w.begin; block < w.end; ++block) {
        acquire(&s.k_empty[k_ring.stage], k_ring.parity);
        copy_tile(k, p.k_strides.row, s.k[k_ring.stage], rows);
        commit(&s.k_full[k_ring.stage]);
        k_ring.next();
        load_bias(block);
        if (block == w.begin) load_q();
        else load_v(before);
#pragma unroll
        for (int i = 0; i < 2; ++i) before[i] = rows[i];
        if (block + 1 < w.end) look_up(block + 1, rows);
      }
      if (w.begin < w.end) load_v(before);
      q_parity ^= 1;
    }
    if (pending != nullptr) {
      sm90::copies_wait<0>();
      tell();
    }
  }
};

// ---- Results --------------------------------------------------------------------------------------------------------

// The row of `out` that slot `slot` of batch entry b writes, -1 for none.
__device__ inline int64_t target_row(const Params& p, int b, int first, int slot) {
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
  float total[2], other[2];  // sums of the weights, of even and of odd columns
  float offset[2], limit[2];  // of this tile: what exponents add to scaled scores; the score that is too large
  float scaling[2];
  bool rescale;

  __device__ void multiply_qk(int stage) {
    const uint32_t a = sm90::opaque(sm90::tile_descriptor(s.q[g], 0));
    const uint32_t b = sm90::tile_descriptor(s.k[stage], 0);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      // 16 columns are 32 bytes; a panel has 64 columns. Descriptors count 16-byte units.
      const uint32_t a_step = i / 4 * (kRows * 128 / 16) + i % 4 * 2;
      const uint32_t b_step = i / 4 * (N * 128 / 16) + i % 4 * 2;
      sm90::Products<T, N>::shared_shared(score, a + a_step, b + b_step, i > 0);
    }
  }

  __device__ void multiply_pv(int stage) {
    const uint32_t b = sm90::tile_descriptor(s.v[stage], N * 128);
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      sm90::Products<T, D>::registers_shared(o, weight + 4 * i, b + i * (16 * 128 / 16));
    }
  }

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
  // A tile's scores become weights in chunks of keys. A row's exponents are taken against its running maximum `top`,
  // which holds as long as no key exceeds it by more than the slack: so no chunk waits for the maximum of the whole
  // tile. While the exponentials of one chunk run, the largest scores of the next are found, and only where one is too
  // large `raise` moves the top up and rescales what there is of this tile. What the products of the last tile still
  // use (weights, o) is left alone until they have ended.

  // The first element of chunk c.
  __host__ __device__ static constexpr int chunk_at(int c) { return c * (N / 16) / kSoftmaxChunks * 8; }

  // Adds the biases of a chunk where they vary, and finds its largest scores.
  template <int c, bool VARIES>
  __device__ void look_at(const float4* bias, float (&high)[2]) {
    if constexpr (VARIES) {
#pragma unroll
      for (int i = chunk_at(c); i < chunk_at(c + 1); i += 8) {
        const float4 x = bias[i / 8];
        score[i + 0] += x.x;
        score[i + 1] += x.y;
        score[i + 2] += x.x;
        score[i + 3] += x.y;
        score[i + 4] += x.z;
        score[i + 5] += x.w;
        score[i + 6] += x.z;
        score[i + 7] += x.w;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* x = score + chunk_at(c) + 2 * r;
      float even = fmaxf(x[0], x[1]);
      float odd = fmaxf(x[4], x[5]);
#pragma unroll
      for (int i = 8; i < chunk_at(c + 1) - chunk_at(c); i += 8) {
        even = fmaxf(fmaxf(even, x[i]), x[i + 1]);
        odd = fmaxf(fmaxf(odd, x[i + 4]), x[i + 5]);
      }
      high[r] = fmaxf(even, odd);
    }
  }

  __device__ void set_pivot(float constant) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // No key yet: all scores are -inf, and so must be the exponents.
      offset[r] = top[r] == -INFINITY ? -INFINITY : (constant - top[r]) * p.score_unit;
      limit[r] = top[r] + p.slack - constant;
    }
  }

  // Raises the tops to the largest scores up to chunk c. Also where a top is -inf and there is a key.
  template <int c>
  __device__ void raise(const float (&high)[2], float constant) {
    rescale = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(top[r], quad_max(high[r]) + constant);
      const float factor = raised == -INFINITY ? 1.0f : sm90::exp2_approx((top[r] - raised) * p.score_unit);
      top[r] = raised;
      scaling[r] *= factor;
      total[r] *= factor;
      other[r] *= factor;
#pragma unroll
      for (int i = 2 * r; i < chunk_at(c); i += 4) {
        score[i] *= factor;
        score[i + 1] *= factor;
      }
    }
    set_pivot(constant);
  }

  template <int c>
  __device__ void weigh() {
#pragma unroll
    for (int i = chunk_at(c); i < chunk_at(c + 1); i += 2) {
      const int r = i / 2 % 2;
      score[i] = sm90::exp2_approx(fmaf(score[i], p.score_unit, offset[r]));
      score[i + 1] = sm90::exp2_approx(fmaf(score[i + 1], p.score_unit, offset[r]));
      total[r] += score[i];
      other[r] += score[i + 1];
    }
  }

  // Chunk c and those after it. above: whether its largest scores, `high`, are too large.
  template <int c, bool FIRST, bool VARIES>
  __device__ void chunks(uint32_t count, const float4* bias, float constant, float (&high)[2], bool above) {
    if (__builtin_expect(above, 0)) raise<c>(high, constant);
    if constexpr (c + 1 < kSoftmaxChunks) {
      look_at<c + 1, VARIES>(bias, high);
      above = __any_sync(0xffffffffu, high[0] > limit[0] || high[1] > limit[1]);
      weigh<c>();
      chunks<c + 1, FIRST, VARIES>(count, bias, constant, high, above);
    } else {
      // Nothing is packed before the last time that a top may rise: `raise` knows the scores alone.
      if constexpr (!FIRST) end_pv(count - 1);
      release(&s.bias_empty[count % S::kBiasSlots]);
      weigh<c>();
      pack_weights();
      if (__builtin_expect(rescale, 0)) rescale_output();
    }
  }

  // FIRST: there are no products of a tile before. count: this tile.
  template <bool FIRST, bool VARIES>
  __device__ void softmax(uint32_t count, float constant) {
    const float4* bias =
        reinterpret_cast<const float4*>(&s.bias[count % S::kBiasSlots][threadIdx.x % 4 * S::kBiasStride]);
    set_pivot(constant);
    rescale = false;
    scaling[0] = scaling[1] = 1.0f;
    float high[2];
    look_at<0, VARIES>(bias, high);
    const bool above = __any_sync(0xffffffffu, high[0] > limit[0] || high[1] > limit[1]);
    chunks<0, FIRST, VARIES>(count, bias, constant, high, above);
  }

  template <bool FIRST>
  __device__ void softmax(uint32_t count) {
    const int slot = count % S::kBiasSlots;
    sm90::barrier_wait(&s.bias_full[slot], count / S::kBiasSlots % 2);
    const float constant = s.bias_constant[slot];
    const bool varies = s.bias_varies[slot];
    if (FIRST) sm90::products_wait<0>();
    else sm90::products_wait<1>();
    sm90::pin(score);
    release(&s.k_empty[stage_of(count)]);
    if (varies) softmax<FIRST, true>(count, constant);
    else softmax<FIRST, false>(count, constant);
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
  __device__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) weight[i] = sm90::pack<T>(score[2 * i], score[2 * i + 1]);
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

  __device__ void issue_qk(uint32_t count) {
    sm90::pin(score);
    sm90::products_fence();
    multiply_qk(stage_of(count));
    sm90::products_commit();
  }

  __device__ void issue_pv(uint32_t count) {
    sm90::barrier_wait(&s.v_full[stage_of(count)], parity_of(count));
    sm90::pin(o);
    sm90::products_fence();
    multiply_pv(stage_of(count));
    sm90::products_commit();
  }

  __device__ void end_pv(uint32_t count) {
    sm90::products_wait<0>();
    sm90::pin(o);
    release(&s.v_empty[stage_of(count)]);
  }

  __device__ void attend(const Work& w, uint32_t& count) {
    sm90::barrier_wait(&s.k_full[stage_of(count)], parity_of(count));
    issue_qk(count);
    softmax<true>(count);
    for (int left = w.end - w.begin - 1; left > 0; --left) {
      // The products of this tile's scores and of the last tile's weights, then the softmax under the latter.
      sm90::barrier_wait(&s.k_full[stage_of(count + 1)], parity_of(count + 1));
      sm90::named_sync(1 + g, 2 * kGroup);
      issue_qk(count + 1);
      issue_pv(count);
      sm90::named_arrive(2 - g, 2 * kGroup);
      ++count;
      softmax<false>(count);
    }
    release(&s.q_empty[g]);
    issue_pv(count);
    end_pv(count);
    ++count;
  }

  // Rows as fp32, for the kernel that joins parts.
  __device__ void store_part(const Work& w, int rows, int row, const float (&inverse)[2], const float (&lse)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + 8 * r;
      if (at >= rows) continue;
      const int64_t place = static_cast<int64_t>(w.part) * kBlockM + at;
      if (lane % 4 == 0) p.part_lse[place] = lse[r];
      float* target = p.part_out + place * D + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<float2*>(target + 8 * i) =
            make_float2(o[4 * i + 2 * r] * inverse[r], o[4 * i + 2 * r + 1] * inverse[r]);
      }
    }
  }

  // The four threads of a row trade words, so that each writes 16 bytes: thread c has blocks 4 i + c, for every i.
  __device__ void store_rows(const Work& w, int rows, int row, const float (&inverse)[2], const float (&lse)[2]) {
    const int lane = threadIdx.x % 32;
    const int c = lane % 4;
    const int first = s.q_row[w.b];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + 8 * r;
      const int slot = w.tile * kBlockM + at;
      const bool exists = at < rows;
      int64_t target = -1;
      bool empty = false;
      if (exists) {
        target = target_row(p, w.b, first, slot);
        int unused;
        empty = p.q_index != nullptr && !query_row(p, w.b, slot, rows + w.tile * kBlockM, unused);
        if (c == 0) *lse_at(p, w.b, w.head, first + slot) = empty ? -INFINITY : lse[r] * 0.6931471805599453f;
      }
      T* const place = static_cast<T*>(p.out) + (p.cu_q == nullptr ? w.b * p.out_strides.batch : 0) +
          target * p.out_strides.row + w.head * p.out_strides.head;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* x = o + 16 * i + 4 * j + 2 * r;
          word[j] = sm90::pack<T>(x[0] * inverse[r], x[1] * inverse[r]);
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
        if (empty) all = make_uint4(0, 0, 0, 0);
        if (target >= 0) *reinterpret_cast<uint4*>(place + (4 * i + c) * 8) = all;
      }
    }
  }

  __device__ void run() {
    if (g == 1) sm90::named_arrive(1, 2 * kGroup);
    const int lane = threadIdx.x % 32;
    const int row = g * kRows + threadIdx.x % kGroup / 32 * 16 + lane / 4;
    uint32_t count = 0;
    uint32_t q_parity = 0;
    Work w;
    for (int item = blockIdx.x; w.get(p, s, item); item += gridDim.x) {
      const int rows = min(s.q_len[w.b] - w.tile * kBlockM, kBlockM);
      sm90::barrier_wait(&s.q_full[g], q_parity);
      q_parity ^= 1;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = -INFINITY;
        total[r] = other[r] = 0.0f;
      }
      if (w.begin < w.end) attend(w, count);
      else release(&s.q_empty[g]);
      float inverse[2];
      float lse[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(total[r] + other[r]);
        inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        lse[r] = sum == 0.0f ? -INFINITY : fmaf(top[r], p.score_unit, log2f(sum));
      }
      if (w.part >= 0) store_part(w, rows, row, inverse, lse);
      else store_rows(w, rows, row, inverse, lse);
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
      sm90::barrier_init(&s.q_full[g], S::kArrivals);
      sm90::barrier_init(&s.q_empty[g], 4);
    }
    for (int i = 0; i < S::kStages; ++i) {
      sm90::barrier_init(&s.k_full[i], S::kArrivals);
      sm90::barrier_init(&s.v_full[i], S::kArrivals);
      sm90::barrier_init(&s.k_empty[i], 8);
      sm90::barrier_init(&s.v_empty[i], 8);
    }
    for (int i = 0; i < S::kBiasSlots; ++i) {
      sm90::barrier_init(&s.bias_full[i], S::kArrivals);
      sm90::barrier_init(&s.bias_empty[i], 8);
    }
    sm90::barrier_init(&s.tail, 1);
    sm90::barrier_init_fence();
    if constexpr (!GATHER) {
      if (p.rows_q > 0) sm90::prefetch_map(&p.q_map);
      if (p.rows_k > 0) sm90::prefetch_map(&p.k_map);
      if (p.rows_k > 0) sm90::prefetch_map(&p.v_map);
    }
  }
  make_plan<T, D, GATHER>(p, s);
  sm90::let_grid_after_start();
  if (threadIdx.x < kGroup) {
    sm90::fewer_registers<S::kLoaderRegisters>();
    const int warp = threadIdx.x / 32;
    if (blockIdx.x == 0 && warp == 3 && s.parts > 1) {
      // For the kernel that joins the parts.
      Work w;
      for (int i = threadIdx.x % 32; i < s.rest; i += 32) {
        w.get(p, s, s.whole + i);
        p.cut_tiles[i] = {w.b, w.head, w.tile, min(s.q_len[w.b] - w.tile * kBlockM, kBlockM)};
      }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0 && p.cut_count != nullptr) {
      p.cut_count[0] = s.rest;
      p.cut_count[1] = s.parts;
    }
    if constexpr (GATHER) {
      RowLoader<T, D>{p, s}.run();
      clear_empty_slots<T, D>(p, s, blockIdx.x * 4 + warp, gridDim.x * 4);
    } else if (warp == 0) {
      TileLoader<T, D>{p, s}.run();
    } else if (warp == 1) {
      load_biases<T, D>(p, s);
    } else {
      if (p.q_index != nullptr) gather_queries<T, D>(p, s, warp - 2);
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
  sm90::wait_for_grid_before();
  const int rest = p.cut_count[0];
  const int parts = p.cut_count[1];
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.y * 8 + threadIdx.x / 32;
  const int index = blockIdx.x;
  if (parts == 1 || index >= rest) return;
  const CutTile cut = p.cut_tiles[index];
  if (row >= cut.rows) return;
  const auto place = [&](int part) { return (static_cast<int64_t>(part) * rest + index) * kBlockM + row; };
  const float mine = lane < parts ? p.part_lse[place(lane)] : -INFINITY;
  float top = mine;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  // Lanes hold nothing but 0 where no part has a key. A NaN stays one.
  const float weight = mine == -INFINITY ? 0.0f : exp2f(mine - top);
  float total = 0.0f;
  float sum[kEach] = {};
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
    const float w = __shfl_sync(0xffffffffu, weight, part);
    const float* source = p.part_out + place(part) * D + lane * kEach;
    // A part without keys for this row wrote nothing that counts, or nothing.
    float x[kEach] = {};
    if (w != 0.0f) {
      if constexpr (kEach == 4) *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(source);
      else *reinterpret_cast<float2*>(x) = *reinterpret_cast<const float2*>(source);
    }
    total += w;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum[i] = fmaf(w, x[i], sum[i]);
  }
  int first;
  const int q_len = length_of(p.q_lens, p.cu_q, cut.b, p.num_q, p.rows_q, first);
  const int slot = cut.tile * kBlockM + row;
  int unused;
  bool empty = p.q_index != nullptr;
  if (empty) {
    unused = slot < q_len ? p.q_index[cut.b * p.q_index_batch + slot] : -1;
    empty = unused < 0 || unused >= p.rows_q;
  }
  if (lane == 0) {
    *lse_at(p, cut.b, cut.head, first + slot) =
        empty || total == 0.0f ? -INFINITY : (top + log2f(total)) * 0.6931471805599453f;
  }
  const int64_t target = target_row(p, cut.b, first, slot);
  if (target < 0) return;
  const float inverse = empty || total == 0.0f ? 0.0f : 1.0f / total;
  uint32_t word[kEach / 2];
#pragma unroll
  for (int i = 0; i < kEach / 2; ++i) {
    word[i] = empty ? 0 : sm90::pack<T>(sum[2 * i] * inverse, sum[2 * i + 1] * inverse);
  }
  T* at = static_cast<T*>(p.out) + (p.cu_q == nullptr ? cut.b * p.out_strides.batch : 0) +
      target * p.out_strides.row + cut.head * p.out_strides.head + lane * kEach;
  if constexpr (kEach == 4) *reinterpret_cast<uint2*>(at) = make_uint2(word[0], word[1]);
  else *reinterpret_cast<uint32_t*>(at) = word[0];
}

}  // namespace specedit::attn
