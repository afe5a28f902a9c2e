// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/mixed_res_attn on the CPU against the definition in double.
#include "mixed_res_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "emulator.h"

#define __CUDA_ARCH_FEAT_SM90_ALL 1

#include <cfloat>
#include <cstdio>
#include <map>

#include "mixed_res_attn/gather_kv.cuh"
#include "mixed_res_attn/kernel.cuh"

using namespace specedit::attn;
using specedit::sm90::element;

namespace {

using Ints = std::vector<int>;
constexpr int kSlowness = 200;
constexpr float kUntouched = 123.0f;

// kOfSlots: as kSorted, with the slots of kv_index in order too. kJumps: from -200 to 0 in the middle, 150 at the end;
// kStairs: growing; kLate: -inf in the first half; kMasks: kRandom, but -1e9 for every third key. Of the size of
// Case::far: kAlike; kMixed: it, a half and a third in turn; kRising: from tile to tile; kOneNear: all but one key;
// kFirst: the first half.
enum class Bias {
  kNone, kAlternating, kSorted, kRandom, kJumps, kStairs, kLate, kOfSlots, kMasks, kAlike, kMixed, kRising, kOneNear,
  kFirst
};

struct Case {
  bool half;    // fp16, else bf16
  int dim;
  int batch, rows_q, rows_k, heads, heads_k, num_ctas;
  Bias bias = Bias::kNone;
  Ints q_lens = {}, kv_lens = {}, cu_q = {}, cu_k = {};
  int q_slots = 0, k_slots = 0;  // > 0: by index, so many slots
  bool scatter = false;
  bool split = false;  // whether tiles are to be split
  bool gather_first = false;  // rows by kv_index by gather_kv_kernel
  float later = 1;   // factor of the second half of the rows of k: scores far above those before
  float far = 0;     // biases of this size
  float score = 0;   // != 0: without biases the score of each query and key
};

std::map<std::string, Case> all_cases() {
  std::map<std::string, Case> cases = {
    {"one_tile", {false, 128, 1, 100, 900, 1, 1, 1, Bias::kAlternating}},
    {"two_of_three_d64", {false, 64, 1, 300, 500, 1, 1, 1, Bias::kAlternating}},
    {"q_index_d64", {true, 64, 1, 400, 300, 2, 1, 1, Bias::kRandom, {}, {}, {}, {}, 370}},
    {"few_rows_d64", {false, 64, 1, 44, 1500, 1, 1, 1, Bias::kAlternating}},
    {"waves", {false, 128, 1, 300, 700, 2, 1, 4, Bias::kRandom}},
    {"parts", {false, 128, 1, 150, 3000, 1, 1, 4, Bias::kRandom, {}, {}, {}, {}, 0, 0, false, true}},
    {"lengths", {true, 128, 2, 200, 500, 2, 2, 3, Bias::kSorted, {130, 5}, {499, 17}}},
    {"lengths_0", {false, 128, 2, 200, 500, 1, 1, 2, Bias::kNone, {0, 200}, {499, 0}}},
    {"packed",
     {false, 64, 4, 260, 700, 2, 1, 3, Bias::kRandom, {}, {}, {0, 130, 130, 133, 250}, {0, 300, 300, 301, 690}}},
    {"jumps", {false, 128, 1, 130, 1100, 1, 1, 1, Bias::kJumps}},
    {"stairs", {true, 128, 1, 70, 1000, 1, 1, 1, Bias::kStairs}},
    {"stairs_of_one_tile", {true, 128, 1, 70, 170, 1, 1, 1, Bias::kStairs}},
    {"late", {false, 128, 1, 200, 1300, 1, 1, 1, Bias::kLate}},
    {"far_scores", {false, 128, 1, 130, 1100, 1, 1, 1, Bias::kAlternating, {}, {}, {}, {}, 0, 0, false, false, false, 60}},
    {"far_scores_kv_index", {true, 64, 1, 70, 800, 2, 1, 1, Bias::kNone, {}, {}, {}, {}, 0, 700, false, false, false, 60}},
    {"far_scores_q_index",
     {false, 64, 2, 90, 800, 2, 1, 1, Bias::kRandom, {60, 70}, {}, {}, {}, 70, 0, false, false, false, 60}},
    {"masks", {true, 128, 1, 70, 1000, 1, 1, 1, Bias::kMasks}},
    {"masks_bf16", {false, 64, 1, 200, 700, 2, 1, 2, Bias::kMasks}},
    {"masks_kv_index", {true, 64, 1, 70, 900, 2, 1, 1, Bias::kMasks, {}, {}, {}, {}, 0, 700}},
    {"shares", {false, 64, 1, 400, 2100, 3, 1, 7, Bias::kSorted, {}, {}, {}, {}, 0, 0, false, true}},
    {"shares_of_lengths",
     {false, 64, 3, 400, 2500, 1, 1, 8, Bias::kAlternating, {330, 0, 64}, {2500, 900, 1300}, {}, {}, 0, 0, false, true}},
    {"parts_of_lengths",
     {true, 128, 2, 300, 2100, 3, 1, 7, Bias::kSorted, {290, 0}, {1900, 5}, {}, {}, 0, 0, false, true}},
    {"many_sharers", {false, 64, 1, 60, 3500, 1, 1, 7, Bias::kSorted, {}, {}, {}, {}, 0, 0, false, true}},
    {"scatter", {false, 128, 1, 150, 400, 2, 2, 2, Bias::kAlternating, {140}, {}, {}, {}, 170, 0, true}},
    {"kv_index", {false, 128, 1, 150, 700, 2, 1, 3, Bias::kRandom, {}, {}, {}, {}, 0, 600}},
    {"kv_index_parts", {false, 128, 1, 150, 2000, 1, 1, 4, Bias::kRandom, {}, {}, {}, {}, 0, 3000, false, true}},
    {"kv_index_d64", {false, 64, 2, 70, 300, 4, 2, 3, Bias::kAlternating, {}, {}, {}, {}, 0, 177}},
    {"kv_index_no_bias", {true, 128, 1, 200, 1100, 1, 1, 2, Bias::kNone, {}, {}, {}, {}, 0, 1057}},
    {"kv_index_sorted", {false, 128, 1, 140, 900, 1, 1, 1, Bias::kOfSlots, {}, {}, {}, {}, 0, 880}},
    {"gathered", {false, 128, 1, 150, 700, 2, 1, 3, Bias::kRandom, {}, {}, {}, {}, 0, 600, false, false, true}},
    {"gathered_parts",
     {true, 64, 1, 150, 2000, 2, 2, 5, Bias::kNone, {}, {}, {}, {}, 0, 3000, false, true, true}},
    {"gathered_lengths",
     {true, 64, 3, 150, 700, 4, 2, 3, Bias::kSorted, {120, 60, 0}, {800, 333, 0}, {}, {}, 130, 900, true, false, true}},
    {"q_index", {false, 128, 2, 700, 500, 2, 1, 4, Bias::kAlternating, {}, {}, {}, {}, 200, 0}},
    {"q_index_parts", {false, 64, 1, 900, 2500, 3, 1, 5, Bias::kSorted, {}, {}, {}, {}, 300, 0, false, true}},
    {"q_index_lengths", {true, 128, 3, 300, 400, 2, 2, 3, Bias::kRandom, {190, 1, 65}, {399, 0, 177}, {}, {}, 190, 0}},
    {"all_indices", {true, 64, 2, 150, 700, 2, 1, 3, Bias::kSorted, {120, 60}, {800, 333}, {}, {}, 130, 900, true}},
  };
  const std::pair<const char*, Bias> orders[] = {
      {"alike", Bias::kAlike}, {"mixed", Bias::kMixed}, {"rising", Bias::kRising}, {"one_near", Bias::kOneNear},
      {"first", Bias::kFirst}};
  const std::pair<const char*, float> sizes[] = {
      {"-1e2", -1e2f}, {"-1e4", -1e4f}, {"-1e9", -1e9f}, {"-3e38", -3e38f}, {"lowest", -FLT_MAX}, {"1e9", 1e9f},
      {"3e38", 3e38f}};
  const std::pair<const char*, float> scores[] = {
      {"1e4", 1e4f}, {"-1e4", -1e4f}, {"3e8", 3e8f}, {"-3e8", -3e8f}, {"1e30", 1e30f}, {"-1e30", -1e30f}};
  for (bool half : {false, true}) {
    for (int dim : {64, 128}) {
      for (const std::string of_keys : {"dense", "splits", "kv_index"}) {
        const bool split = of_keys[0] == 's';
        Case c{half, dim, 1, 9, split ? 1800 : 400, 1, 1, split ? 3 : 1};
        c.split = split;
        c.k_slots = of_keys[0] == 'k' ? 400 : 0;
        const std::string end = std::string(half ? "_fp16_" : "_bf16_") + std::to_string(dim) + "_" + of_keys;
        for (const auto& [order, bias] : orders) {
          for (const auto& [size, far] : sizes) {
            // By index and split, some sizes.
            if (of_keys[0] != 'd' && far != -1e4f && far != -1e9f && far != -3e38f) continue;
            c.bias = bias;
            c.far = far;
            cases[std::string("far_") + order + "_" + size + end] = c;
          }
        }
        c.bias = Bias::kNone;
        for (const auto& [size, score] : scores) {
          if (half && std::abs(score) > 1e9f) continue;  // no such score of fp16 rows
          c.score = score;
          cases[std::string("scores_") + size + end] = c;
        }
      }
    }
  }
  return cases;
}

const std::map<std::string, Case> kCases = all_cases();

template <typename T>
T make(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(x);
  else return __float2half(x);
}

template <typename T>
float read(const T& x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return element<T>(bits);
}

// Whether the attention itself gathers K and V.
bool gathers(const Case& c) { return c.k_slots > 0 && !c.gather_first; }

const int* data_or_null(const Ints& x) { return x.empty() ? nullptr : x.data(); }

template <typename T, int D>
struct Problem {
  const Case& c;
  bool packed;
  int entries, q_slots, k_slots, rows_out;
  std::vector<T> q, k, v, out;
  std::vector<float> bias, lse, out_partial;
  std::vector<float2> max_sum_partial;
  Ints q_index, kv_index, out_index;
  std::vector<T> k_gathered, v_gathered;
  std::vector<float> bias_gathered;
  std::vector<SplitTile> split_tiles;
  TileShape tile;
  Params p{};
  GatherParams gather{};

  Problem(const Case& c, std::mt19937& random) : c(c), packed(!c.cu_q.empty()), entries(packed ? 1 : c.batch) {
    q_slots = c.q_slots ? c.q_slots : c.rows_q;
    k_slots = c.k_slots ? c.k_slots : c.rows_k;
    tile = tile_of(D, gathers(c));
    rows_out = c.scatter ? q_slots + 20 : q_slots;
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<T>& x, int rows, int heads) {
      x.resize(static_cast<size_t>(entries) * rows * heads * D);
      for (T& value : x) value = make<T>(normal(random));
    };
    fill(q, c.rows_q, c.heads);
    fill(k, c.rows_k, c.heads_k);
    fill(v, c.rows_k, c.heads_k);
    for (size_t i = k.size() / 2; i < k.size(); ++i) k[i] = make<T>(read(k[i]) * c.later);
    // The means of parts of the keys differ.
    for (size_t i = 0; (c.far != 0 || c.score != 0) && i < v.size(); ++i) {
      v[i] = make<T>(read(v[i]) + 2.0f * (i / (static_cast<size_t>(c.heads_k) * D) % c.rows_k) / c.rows_k);
    }
    const float root = std::sqrt(std::abs(c.score) * std::sqrt(static_cast<float>(D)));
    for (size_t i = 0; c.score != 0 && i < q.size(); ++i) q[i] = make<T>(i % D ? 0 : std::copysign(root, c.score));
    for (size_t i = 0; c.score != 0 && i < k.size(); ++i) k[i] = make<T>(i % D ? 0 : root);
    // Rows past a length must not be used, not even as 0 * NaN.
    for (int b = 0; c.k_slots == 0 && !packed && b < static_cast<int>(c.kv_lens.size()); ++b) {
      const size_t row = static_cast<size_t>(c.heads_k) * D;
      const size_t begin = (static_cast<size_t>(b) * c.rows_k + c.kv_lens[b]) * row;
      const size_t end = (b + size_t{1}) * c.rows_k * row;
      std::fill(k.begin() + begin, k.begin() + end, make<T>(NAN));
      std::fill(v.begin() + begin, v.begin() + end, make<T>(NAN));
    }
    for (int i = 0; i < entries * c.rows_k; ++i) {
      const int key = i % c.rows_k;
      const bool later = key * 2 > c.rows_k;
      const float any = i % 7 ? normal(random) : -INFINITY;
      float x = (c.bias == Bias::kSorted ? later : i % 2) ? std::log(4.0f) : 0.0f;
      if (c.bias == Bias::kRandom) x = any;
      if (c.bias == Bias::kMasks) x = i % 3 ? any : -1e9f;
      if (c.bias == Bias::kJumps) x = key + 3 > c.rows_k ? 150.0f : later ? 0.0f : -200.0f;
      if (c.bias == Bias::kStairs) x = 0.1f * key;
      if (c.bias == Bias::kOfSlots) x = later ? std::log(4.0f) : 0.0f;
      if (c.bias == Bias::kLate) x = later ? any : -INFINITY;
      if (c.bias == Bias::kAlike) x = c.far;
      if (c.bias == Bias::kMixed) x = c.far / (1 + key % 3);
      if (c.bias == Bias::kRising) x = c.far * (0.5f + 0.5f * (c.far > 0 ? key : c.rows_k - key) / c.rows_k);
      if (c.bias == Bias::kOneNear) x = key == c.rows_k / 2 ? 1.0f : c.far;
      if (c.bias == Bias::kFirst) x = later ? 0.0f : c.far;
      bias.push_back(x);
    }
    // Some are -1 (empty) or one past the last: an index out of range counts as empty.
    const auto index = [&](Ints& x, int slots, int rows) {
      for (int i = 0; i < c.batch * slots; ++i) {
        const int row = static_cast<int>(random() % rows);
        const int kind = static_cast<int>(random() % 12);
        x.push_back(kind == 0 ? -1 : kind == 1 ? rows : row);
      }
    };
    if (c.q_slots) index(q_index, q_slots, c.rows_q);
    if (c.k_slots) index(kv_index, k_slots, c.rows_k);
    if (c.bias == Bias::kOfSlots) std::sort(kv_index.begin(), kv_index.end());
    for (int b = 0; c.scatter && b < c.batch; ++b) {
      Ints order(rows_out);
      for (int i = 0; i < rows_out; ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      for (int i = 0; i < q_slots; ++i) out_index.push_back(i % 5 ? order[i] : -1);
    }
    out.assign(static_cast<size_t>(entries) * rows_out * c.heads * D, make<T>(kUntouched));
    lse.assign(static_cast<size_t>(entries) * c.heads * q_slots, kUntouched);

    const auto strides = [](int rows, int heads) { return Strides{int64_t{rows} * heads * D, int64_t{heads} * D, D}; };
    const auto map = [&](CUtensorMap& target, const std::vector<T>& x, int rows, int heads, int box) {
      const specedit::sm90::TensorMap m{
          x.data(),
          {64, rows, D / 64, heads, entries},
          {2, int64_t{heads} * D * 2, 128, D * 2, int64_t{rows} * heads * D * 2},
          {64, static_cast<uint16_t>(box), D / 64, 1, 1},
          2,
          128};
      std::memcpy(&target, &m, sizeof(m));
    };
    map(p.tma_q, q, c.rows_q, c.heads, kWarpgroupRows);
    map(p.tma_k, k, c.rows_k, c.heads_k, tile.block_n);
    map(p.tma_v, v, c.rows_k, c.heads_k, tile.block_n);
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.q_strides = strides(c.rows_q, c.heads);
    p.k_strides = p.v_strides = strides(c.rows_k, c.heads_k);
    p.out_strides = strides(rows_out, c.heads);
    p.bias = c.bias == Bias::kNone ? nullptr : bias.data();
    p.q_index = data_or_null(q_index);
    p.kv_index = data_or_null(kv_index);
    p.out_index = data_or_null(out_index);
    p.q_lens = data_or_null(c.q_lens);
    p.kv_lens = data_or_null(c.kv_lens);
    p.cu_seqlens_q = data_or_null(c.cu_q);
    p.cu_seqlens_k = data_or_null(c.cu_k);
    p.bias_batch_stride = c.rows_k;
    p.q_index_batch_stride = p.out_index_batch_stride = q_slots;
    p.kv_index_batch_stride = k_slots;
    p.lse_batch_stride = packed ? 0 : int64_t{c.heads} * q_slots;
    p.lse_head_stride = q_slots;
    p.out = out.data();
    p.lse = lse.data();
    out_partial.assign(static_cast<size_t>(2 * c.num_ctas) * tile.block_m() * D, NAN);
    max_sum_partial.assign(static_cast<size_t>(2 * c.num_ctas) * tile.block_m(), {NAN, NAN});
    split_tiles.resize(c.num_ctas);
    p.out_partial = out_partial.data();
    p.max_sum_partial = max_sum_partial.data();
    p.split_tiles = split_tiles.data();
    p.max_split_tiles = c.num_ctas - 1;
    if (p.max_split_tiles == 0) p.out_partial = nullptr;
    p.set_scale(1 / std::sqrt(static_cast<double>(D)), c.half);
    p.batch = c.batch;
    p.heads = c.heads;
    p.qhead_per_khead = c.heads / c.heads_k;
    p.max_seqlen_q = q_slots;
    p.max_seqlen_k = k_slots;
    p.rows_q = c.rows_q;
    p.rows_k = c.rows_k;
    p.rows_out = rows_out;
    if (c.gather_first) {
      k_gathered.assign(static_cast<size_t>(c.batch) * k_slots * c.heads_k * D, make<T>(NAN));
      v_gathered = k_gathered;
      bias_gathered.assign(static_cast<size_t>(c.batch) * k_slots, NAN);
      gather.k = reinterpret_cast<const uint4*>(p.k);
      gather.v = reinterpret_cast<const uint4*>(p.v);
      gather.k_strides = gather.v_strides = {p.k_strides.batch / 8, p.k_strides.row / 8, p.k_strides.head / 8};
      gather.bias = p.bias;
      gather.index = p.kv_index;
      gather.lens = p.kv_lens;
      gather.bias_batch_stride = p.bias_batch_stride;
      gather.index_batch_stride = p.kv_index_batch_stride;
      gather.k_out = reinterpret_cast<uint4*>(k_gathered.data());
      gather.v_out = reinterpret_cast<uint4*>(v_gathered.data());
      gather.bias_out = bias_gathered.data();
      gather.batch = c.batch;
      gather.slots = k_slots;
      gather.rows = c.rows_k;
      gather.words = c.heads_k * D / 8;
      gather.head_shift = D == 64 ? 3 : 4;
      p.k = k_gathered.data();
      p.v = v_gathered.data();
      p.k_strides = p.v_strides = strides(k_slots, c.heads_k);
      p.bias = bias_gathered.data();
      p.bias_batch_stride = k_slots;
      p.rows_k = k_slots;
      p.kv_index = nullptr;
      map(p.tma_k, k_gathered, k_slots, c.heads_k, tile.block_n);
      map(p.tma_v, v_gathered, k_slots, c.heads_k, tile.block_n);
    }
    if (!packed && c.q_lens.empty() && c.kv_lens.empty()) {
      plan_on_host(p.plan, q_slots, k_slots, c.batch * c.heads * ceil_div(q_slots, tile.block_m()), c.num_ctas, tile);
      p.max_split_tiles = p.plan.partial_wave_tiles;
    }
  }

  template <bool GATHER>
  void run(int slow_warp) {
    using Traits = KernelTraits<T, D, GATHER>;
    for (int block = 0; c.gather_first && block < ceil_div(c.batch * k_slots, kGatherThreads / 32); ++block) {
      emulated_block = {static_cast<uint32_t>(block), 0, 0};
      emulator::run_block(kGatherThreads, [&] { gather_kv_kernel(gather); }, -1, 1);
    }
    emulated_grid = {static_cast<uint32_t>(c.num_ctas), 1, 1};
    for (int block = 0; block < c.num_ctas; ++block) {
      emulated_block = {static_cast<uint32_t>(block), 0, 0};
      specedit::sm90::reset_block();
      emulator::run_block(Traits::kThreads, [&] { mixed_res_attn_kernel<T, D, GATHER>(p); }, slow_warp, kSlowness);
    }
    for (int tile = 0; tile < p.max_split_tiles; ++tile) {
      for (int rows = 0; rows < Traits::kBlockM / kCombineRows; ++rows) {
        emulated_block = {static_cast<uint32_t>(tile), static_cast<uint32_t>(rows), 0};
        emulator::run_block(kCombineThreads, [&] { combine_kernel<T, D, Traits::kBlockM>(p); }, -1, 1);
      }
    }
  }

  // One query against the definition: the largest error of its output, or infinity where its lse is wrong.
  double error_of(int b, int first_q, int slot, int q_len, int first_k, int k_len) const {
    const int entry = packed ? 0 : b;
    const int row = q_index.empty() ? first_q + slot : q_index[b * q_slots + slot];
    const bool valid = slot < q_len && row >= 0 && row < c.rows_q;
    const int target = out_index.empty() ? first_q + slot : out_index[b * q_slots + slot];
    double worst = 0;
    for (int h = 0; h < c.heads; ++h) {
      const auto at = [&](int rows, int r, int heads, int head) {
        return ((static_cast<size_t>(entry) * rows + r) * heads + head) * D;
      };
      const int head_k = h / p.qhead_per_khead;
      std::vector<double> weight(k_len, -INFINITY);
      Ints rows(k_len);
      for (int j = 0; j < k_len; ++j) {
        rows[j] = kv_index.empty() ? first_k + j : kv_index[b * k_slots + j];
        if (!valid || rows[j] < 0 || rows[j] >= c.rows_k) continue;
        double score = 0;
        for (int d = 0; d < D; ++d) {
          score += read(q[at(c.rows_q, row, c.heads, h) + d]) * read(k[at(c.rows_k, rows[j], c.heads_k, head_k) + d]);
        }
        // As fp32 holds it: beside a bias of 1e9 in steps of 64.
        weight[j] = static_cast<float>(
            score / std::sqrt(D) + (c.bias != Bias::kNone ? bias[entry * c.rows_k + rows[j]] : 0.0f));
      }
      double row_max = -INFINITY;
      for (double x : weight) row_max = std::max(row_max, x);
      double row_sum = 0;
      for (double& x : weight) row_sum += x = row_max == -INFINITY ? 0 : std::exp(x - row_max);
      const float got = lse[(packed ? 0 : static_cast<size_t>(b) * c.heads * q_slots) + h * q_slots + first_q + slot];
      const double lse_error = std::abs(got - row_max - std::log(row_sum));
      if (row_sum == 0 ? got != -INFINITY : !(lse_error < 1e-4 + 2e-7 * std::abs(row_max))) return INFINITY;
      for (int d = 0; target >= 0 && d < D; ++d) {
        double want = 0;
        for (int j = 0; row_sum > 0 && j < k_len; ++j) {
          if (weight[j] > 0) want += weight[j] * read(v[at(c.rows_k, rows[j], c.heads_k, head_k) + d]) / row_sum;
        }
        const double error = std::abs(want - read(out[at(rows_out, target, c.heads, h) + d]));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
      }
    }
    return worst;
  }

  double error() const {
    double worst = 0;
    for (int b = 0; b < c.batch; ++b) {
      const int first_q = packed ? c.cu_q[b] : 0;
      const int first_k = packed ? c.cu_k[b] : 0;
      const int slots = packed ? c.cu_q[b + 1] - first_q : q_slots;
      const int keys = packed ? c.cu_k[b + 1] - first_k : k_slots;
      const int q_len = c.q_lens.empty() ? slots : std::min(c.q_lens[b], slots);
      const int k_len = c.kv_lens.empty() ? keys : std::min(c.kv_lens[b], keys);
      // Every row near the edges of a warp group's 64, every fifth of the others.
      for (int slot = 0; slot < slots; ++slot) {
        if (slot % 64 < 2 || slot % 64 > 61 || slot % 5 == 0 || slot + 2 > q_len) {
          worst = std::max(worst, error_of(b, first_q, slot, q_len, first_k, k_len));
        }
      }
    }
    return worst;
  }

  // Rows that no slot names keep their value; packed rows past the last sequence are empty.
  bool rest_is_right() const {
    for (int b = 0; b < entries; ++b) {
      for (int row = 0; row < rows_out; ++row) {
        float want = kUntouched;
        if (packed && row >= c.cu_q.back()) want = 0;
        else if (!c.scatter) continue;
        else if (std::count(out_index.begin() + b * q_slots, out_index.begin() + (b + 1) * q_slots, row)) continue;
        const T* at = out.data() + (static_cast<size_t>(b) * rows_out + row) * c.heads * D;
        for (int i = 0; i < c.heads * D; ++i) {
          if (read(at[i]) != want) return false;
        }
        for (int h = 0; packed && h < c.heads; ++h) {
          if (lse[h * q_slots + row] != -INFINITY) return false;
        }
      }
    }
    return true;
  }
};

template <typename T, int D, bool GATHER>
constexpr bool is_compiled() {
#ifdef SPECEDIT_ONLY_T  // a test that compiles a changed kernel needs one instance of it
  return std::is_same_v<T, SPECEDIT_ONLY_T> && D == SPECEDIT_ONLY_D && GATHER == SPECEDIT_ONLY_GATHER;
#else
  return true;
#endif
}

template <bool GATHER, typename T, int D>
void run(Problem<T, D>& problem, int slow_warp) {
  if constexpr (is_compiled<T, D, GATHER>()) problem.template run<GATHER>(slow_warp);
  else throw std::invalid_argument("this instance of the kernel is not compiled");
}

template <typename T, int D>
emulation::Outcome outcome_of_compiled(const Case& c, int seed, int slow_warp) {
  std::mt19937 random(seed);
  emulator::random_engine.seed(seed + 1);
  Problem<T, D> problem(c, random);
  if (gathers(c)) run<true>(problem, slow_warp);
  else run<false>(problem, slow_warp);
  const double error = problem.error();
  const bool rest = problem.rest_is_right();
  int num_splits = 0;
  const Params& p = problem.p;
  for (int i = 0; i < p.max_split_tiles; ++i) {
    num_splits += p.plan.planned ? p.plan.splits[i].num_splits : problem.split_tiles[i].num_splits;
  }
  char text[100];
  std::snprintf(text, sizeof(text), "error %.1e, other rows %s, %d splits", error, rest ? "right" : "wrong", num_splits);
  return {error < 0.02 && rest && (num_splits > 0) == c.split, text};
}

template <typename T, int D>
emulation::Outcome outcome_of(const Case& c, int seed, int slow_warp) {
  if constexpr (!is_compiled<T, D, false>() && !is_compiled<T, D, true>()) {
    throw std::invalid_argument("this instance of the kernel is not compiled");
  } else {
    return outcome_of_compiled<T, D>(c, seed, slow_warp);
  }
}

}  // namespace

namespace emulation {

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& entry : kCases) names.push_back(entry.first);
  return names;
}

static const Case& case_of(const std::string& name) {
  const auto found = kCases.find(name);
  if (found == kCases.end()) throw std::invalid_argument("name: expected one of case_names(), got '" + name + "'");
  return found->second;
}

std::vector<std::string> kernel_of(const std::string& name) {
  const Case& c = case_of(name);
  return {c.half ? "__half" : "__nv_bfloat16", std::to_string(c.dim), gathers(c) ? "true" : "false"};
}

Outcome run_case(const std::string& name, int seed, int slow_warp) {
  const Case& c = case_of(name);
  try {
    if (c.half) return (c.dim == 64 ? outcome_of<__half, 64> : outcome_of<__half, 128>)(c, seed, slow_warp);
    return (c.dim == 64 ? outcome_of<__nv_bfloat16, 64> : outcome_of<__nv_bfloat16, 128>)(c, seed, slow_warp);
  } catch (const std::runtime_error& error) {
    return {false, error.what()};
  }
}

}  // namespace emulation

// For a test that compiles a changed kernel and loads it with ctypes: 1 where the results are right, 0 where they are
// not, -1 where the case cannot be run.
extern "C" __attribute__((visibility("default"))) int specedit_run_case(const char* name, int seed, int slow_warp) {
  try {
    return emulation::run_case(name, seed, slow_warp).right;
  } catch (const std::invalid_argument&) {
    return -1;
  }
}
