// SPDX-License-Identifier: Apache-2.0
// The kernels of e4m3 numbers on the CPU against the definition in double of the rounded numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "emulator.h"
#include "mixed_res_attn.h"

#define __CUDA_ARCH_FEAT_SM90_ALL 1

#include <cstdio>
#include <map>

#include "mixed_res_attn/kernel.cuh"
#include "mixed_res_attn/pack_kv_fp8.cuh"

using namespace specedit::attn;
using specedit::E4m3;
using specedit::E4m3ByRow;
using specedit::sm90::decode_e4m3;
using specedit::sm90::encode_e4m3;

namespace {

using Ints = std::vector<int>;
using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;
constexpr int D = 128;
constexpr int kSlowness = 200;

// kSorted: log 1, then log 4; kRandom: some -inf; kMasks: -1e9 for every third key; kFar: 1e9 for all; kLate: -inf in
// the first half.
enum class Bias { kNone, kSorted, kRandom, kMasks, kFar, kLate };

struct Case {
  bool by_row;
  int batch, rows_q, rows_k, heads, heads_k, num_ctas;
  Bias bias = Bias::kNone;
  Ints q_lens = {}, kv_lens = {};
  int q_slots = 0, k_slots = 0;  // > 0: by index, so many slots
  bool pack = false;             // through pack_kv_kernel, which has v as k
  bool panels = false;           // which has v in panels
  float later = 1;               // factor of the second half of the rows of k
  float score = 0;               // != 0: of each query and key, about
  bool growing = false;          // the scale of v from 1e-6 to 1e3
  bool split = false;            // whether tiles are to be split
};

const std::map<std::string, Case> kCases = {
    {"one_tile", {false, 1, 100, 160, 1, 1, 1}},
    {"one_tile_by_row", {true, 1, 100, 160, 1, 1, 1}},
    {"sorted", {false, 1, 150, 900, 2, 1, 2, Bias::kSorted}},
    {"sorted_by_row", {true, 1, 150, 900, 2, 1, 2, Bias::kSorted}},
    {"random", {false, 2, 70, 800, 2, 2, 3, Bias::kRandom}},
    {"random_by_row", {true, 2, 70, 800, 2, 2, 3, Bias::kRandom}},
    {"splits", {false, 1, 150, 3200, 1, 1, 4, Bias::kRandom, {}, {}, 0, 0, false, false, 1, 0, false, true}},
    {"splits_by_row", {true, 1, 150, 3200, 1, 1, 4, Bias::kRandom, {}, {}, 0, 0, false, false, 1, 0, true, true}},
    {"splits_of_lengths",
     {false, 3, 300, 2512, 1, 1, 8, Bias::kSorted, {290, 0, 64}, {2501, 900, 1303}, 0, 0, false, false, 1, 0, false,
      true}},
    {"splits_far", {false, 1, 60, 3200, 1, 1, 3, Bias::kFar, {}, {}, 0, 0, false, false, 1, 0, false, true}},
    {"lengths", {false, 2, 200, 512, 2, 2, 3, Bias::kSorted, {130, 5}, {499, 17}}},
    {"lengths_by_row", {true, 2, 200, 512, 2, 1, 3, Bias::kNone, {130, 0}, {0, 250}}},
    {"late", {false, 1, 64, 900, 1, 1, 1, Bias::kLate, {}, {}, 0, 0, true}},
    {"masks", {false, 1, 70, 700, 1, 1, 1, Bias::kMasks, {}, {}, 0, 0, true}},
    {"masks_by_row", {true, 1, 70, 704, 1, 1, 1, Bias::kMasks}},
    {"far", {false, 1, 70, 704, 1, 1, 1, Bias::kFar}},
    {"far_by_row", {true, 1, 70, 704, 1, 1, 1, Bias::kFar}},
    {"later", {false, 1, 130, 1104, 1, 1, 1, Bias::kNone, {}, {}, 0, 0, false, false, 60}},
    {"later_random", {true, 1, 130, 1104, 1, 1, 1, Bias::kRandom, {}, {}, 0, 0, false, false, 60}},
    {"scores", {false, 1, 40, 704, 1, 1, 1, Bias::kNone, {}, {}, 0, 0, false, false, 1, 1e5f}},
    {"scores_negative", {false, 1, 40, 704, 1, 1, 1, Bias::kSorted, {}, {}, 0, 0, false, false, 1, -3e8f}},
    {"growing", {true, 1, 70, 1104, 1, 1, 1, Bias::kNone, {}, {}, 0, 0, false, false, 1, 0, true}},
    {"odd_rows", {false, 1, 33, 701, 2, 2, 1, Bias::kRandom, {}, {}, 0, 0, true}},
    {"odd_panels", {true, 2, 33, 301, 2, 2, 1, Bias::kSorted, {}, {299, 77}, 0, 0, true, true}},
    {"kv_index", {false, 2, 140, 300, 2, 1, 2, Bias::kRandom, {}, {500, 333}, 0, 510, true}},
    {"kv_index_by_row", {true, 1, 140, 300, 2, 1, 2, Bias::kNone, {}, {}, 0, 201, true, true}},
    {"q_index", {false, 2, 300, 512, 2, 1, 2, Bias::kSorted, {}, {}, 130, 0}},
    {"q_index_by_row", {true, 2, 300, 512, 2, 1, 3, Bias::kNone, {190, 3}, {512, 0}, 190, 0}},
    {"all_indices", {true, 2, 150, 300, 2, 1, 3, Bias::kSorted, {120, 60}, {400, 333}, 130, 450, true}},
};

float read(__nv_bfloat16 x) { return static_cast<float>(x); }

template <typename T>
struct Problem {
  const Case& c;
  Params p{};
  PackParams r{};
  int q_slots, k_slots, pack_blocks = 0;
  Bytes q, k, v, v_panels, k_packed, v_packed;  // v_panels: [B, panels, Hk, D, kValuePanel], NaN beyond the last key
  Floats q_scale, k_scale, v_scale, bias, lse, k_scale_packed, v_scale_packed, bias_packed;
  Ints q_index, kv_index;
  std::vector<__nv_bfloat16> out;
  Floats out_partial;
  std::vector<float2> max_sum_partial;
  std::vector<SplitTile> split_tiles;

  Problem(const Case& given, std::mt19937& random) : c(given) {
    q_slots = c.q_slots ? c.q_slots : c.rows_q;
    k_slots = c.k_slots ? c.k_slots : c.rows_k;
    std::normal_distribution<float> normal;
    // Rows of e4m3 numbers with a scale each, or a scale a head. Rows that no length lets in hold NaN.
    const auto fill = [&](Bytes& x, Floats& scale, int rows, int heads, bool by_row, const Ints& lens, bool indexed,
                          auto row_factor) {
      x.resize(static_cast<size_t>(c.batch) * rows * heads * D);
      scale.assign(static_cast<size_t>(c.batch) * (by_row ? rows : 1) * heads, 0.0f);
      for (int b = 0; b < c.batch; ++b) {
        for (int h = 0; h < heads; ++h) {
          for (int i = 0; i < rows; ++i) {
            const float factor = row_factor(i);
            const float unit = by_row ? factor / 100 : 0.01f;
            if (by_row || i == 0) scale[(static_cast<size_t>(b) * (by_row ? rows : 1) + (by_row ? i : 0)) * heads + h] = unit;
            for (int d = 0; d < D; ++d) {
              const float value = c.score != 0 ? factor : normal(random) * factor;
              x[((static_cast<size_t>(b) * rows + i) * heads + h) * D + d] = encode_e4m3(value / unit);
            }
            if (!indexed && !lens.empty() && i >= lens[b]) {
              for (int d = 0; d < D; ++d) x[((static_cast<size_t>(b) * rows + i) * heads + h) * D + d] = 0x7f;
              if (by_row) scale[(static_cast<size_t>(b) * rows + i) * heads + h] = NAN;
            }
          }
        }
      }
    };
    const auto any_factor = [&](int) { return c.by_row ? std::exp(0.5f * normal(random)) : 1.0f; };
    const float large = std::sqrt(std::fabs(c.score) / std::sqrt(128.0f));
    fill(q, q_scale, c.rows_q, c.heads, true, c.q_lens, c.q_slots > 0,
         [&](int) { return c.score != 0 ? large : std::exp(0.5f * normal(random)); });
    fill(k, k_scale, c.rows_k, c.heads_k, c.by_row, c.kv_lens, c.k_slots > 0, [&](int i) {
      if (c.score != 0) return std::copysign(1.0f + i % 3 * 0.125f, c.score);
      return (i >= c.rows_k / 2 ? c.later : 1.0f) * (c.by_row ? 1.0f : c.later > 1 ? 0.05f : 1.0f);
    });
    if (c.score != 0) {
      for (float& x : k_scale) x *= large;
    }
    const float score = c.score;
    const_cast<Case&>(c).score = 0;
    fill(v, v_scale, c.rows_k, c.heads_k, c.by_row, c.kv_lens, c.k_slots > 0, [&](int i) {
      return c.growing ? std::pow(10.0f, -6 + 9.0f * i / c.rows_k) : any_factor(i);
    });
    const_cast<Case&>(c).score = score;
    for (int i = 0; i < c.batch * c.rows_k; ++i) {
      const int key = i % c.rows_k;
      const bool later = key >= c.rows_k / 2;
      float x = 0;
      if (c.bias == Bias::kSorted) x = later ? std::log(4.0f) : 0;
      if (c.bias == Bias::kRandom) x = key % 7 == 3 ? -INFINITY : normal(random) * 3;
      if (c.bias == Bias::kMasks) x = key % 3 == 0 ? -1e9f : normal(random);
      if (c.bias == Bias::kFar) x = 1e9f;
      if (c.bias == Bias::kLate) x = later ? normal(random) : -INFINITY;
      bias.push_back(x);
    }
    const auto index = [&](Ints& x, int slots, int rows) {
      for (int i = 0; i < c.batch * slots; ++i) {
        const int kind = static_cast<int>(random() % 12);
        x.push_back(kind == 0 ? -1 : kind == 1 ? rows : static_cast<int>(random() % rows));
      }
    };
    if (c.q_slots) index(q_index, q_slots, c.rows_q);
    if (c.k_slots) index(kv_index, k_slots, c.rows_k);
    out.assign(static_cast<size_t>(c.batch) * q_slots * c.heads * D, __nv_bfloat16(NAN));
    lse.assign(static_cast<size_t>(c.batch) * c.heads * q_slots, NAN);

    const auto map = [&](CUtensorMap& target, const specedit::sm90::TensorMap& m) { std::memcpy(&target, &m, sizeof(m)); };
    map(p.tma_q, {q.data(), {D, c.rows_q, 1, c.heads, c.batch},
                  {1, int64_t{c.heads} * D, D, D, int64_t{c.rows_q} * c.heads * D}, {D, kWarpgroupRows, 1, 1, 1}, 1, 128});
    int panels = ceil_div(c.rows_k, kValuePanel);
    v_panels.assign(static_cast<size_t>(c.batch) * panels * kValuePanel * c.heads_k * D, 0x7f);
    for (int b = 0; b < c.batch; ++b) {
      for (int i = 0; i < c.rows_k; ++i) {
        for (int h = 0; h < c.heads_k; ++h) {
          for (int d = 0; d < D; ++d) {
            const size_t panel = (static_cast<size_t>(b) * panels + i / kValuePanel) * c.heads_k + h;
            v_panels[(panel * D + d) * kValuePanel + i % kValuePanel] =
                v[((static_cast<size_t>(b) * c.rows_k + i) * c.heads_k + h) * D + d];
          }
        }
      }
    }
    p.q = q.data();
    p.q_strides = {int64_t{c.rows_q} * c.heads * D, int64_t{c.heads} * D, D};
    p.out_strides = {int64_t{q_slots} * c.heads * D, int64_t{c.heads} * D, D};
    p.q_scale = q_scale.data();
    p.k_scale = k_scale.data();
    p.v_scale = v_scale.data();
    p.q_scale_strides = {int64_t{c.rows_q} * c.heads, c.heads, 1};
    p.k_scale_strides = p.v_scale_strides = c.by_row ? Strides{int64_t{c.rows_k} * c.heads_k, c.heads_k, 1}
                                                     : Strides{c.heads_k, 0, 1};
    p.bias = c.bias == Bias::kNone ? nullptr : bias.data();
    p.bias_batch_stride = c.rows_k;
    p.q_index = q_index.empty() ? nullptr : q_index.data();
    p.q_lens = c.q_lens.empty() ? nullptr : c.q_lens.data();
    p.kv_lens = c.kv_lens.empty() ? nullptr : c.kv_lens.data();
    p.q_index_batch_stride = q_slots;
    p.rows_k = c.rows_k;
    const uint8_t* keys = k.data();
    const uint8_t* values = v_panels.data();
    const int64_t panel = int64_t{kValuePanel} * D;
    if (c.pack) {
      pack_blocks = ceil_div(k_slots, kPackKeys);
      const int padded = pack_blocks * kPackKeys;
      k_packed.assign(static_cast<size_t>(c.batch) * padded * c.heads_k * D, 0x7f);
      v_packed = k_packed;
      bias_packed.assign(static_cast<size_t>(c.batch) * k_slots, NAN);
      k_scale_packed.assign(static_cast<size_t>(c.batch) * k_slots * c.heads_k, NAN);
      v_scale_packed = k_scale_packed;
      r.k = k.data();
      r.v = c.panels ? v_panels.data() : v.data();
      r.k_strides = {int64_t{c.rows_k} * c.heads_k * D, int64_t{c.heads_k} * D, D};
      r.v_strides = c.panels ? Strides{panels * c.heads_k * panel, c.heads_k * panel, panel} : r.k_strides;
      r.v_column_stride = c.panels ? kValuePanel : 1;
      r.bias = p.bias;
      r.k_scale = p.k_scale;
      r.v_scale = p.v_scale;
      r.k_scale_strides = p.k_scale_strides;
      r.v_scale_strides = p.v_scale_strides;
      r.index = kv_index.empty() ? nullptr : kv_index.data();
      r.lens = p.kv_lens;
      r.bias_batch_stride = p.bias_batch_stride;
      r.index_batch_stride = k_slots;
      r.k_out = k_packed.data();
      r.v_out = v_packed.data();
      if (p.bias != nullptr || r.index != nullptr) r.bias_out = bias_packed.data();
      if (c.by_row) {
        r.k_scale_out = k_scale_packed.data();
        r.v_scale_out = v_scale_packed.data();
        p.k_scale = r.k_scale_out;
        p.v_scale = r.v_scale_out;
        p.k_scale_strides = p.v_scale_strides = {int64_t{k_slots} * c.heads_k, 1, k_slots};
      }
      r.slots = k_slots;
      r.rows = c.rows_k;
      p.bias = r.bias_out;
      p.bias_batch_stride = k_slots;
      p.rows_k = padded;
      panels = pack_blocks;
      keys = k_packed.data();
      values = v_packed.data();
    }
    const int64_t row = int64_t{c.heads_k} * D;
    map(p.tma_k, {keys, {D, 4, p.rows_k / 4, c.heads_k, c.batch}, {1, row, 4 * row, D, p.rows_k * row},
                  {D, 2, kBlockNFp8 / 4, 1, 1}, 1, 128});
    map(p.tma_v, {values, {kValuePanel, D, panels, c.heads_k, c.batch},
                  {1, kValuePanel, c.heads_k * panel, panel, panels * c.heads_k * panel},
                  {kValuePanel, D, kBlockNFp8 / kValuePanel, 1, 1}, 1, 64});
    p.lse_batch_stride = int64_t{c.heads} * q_slots;
    p.lse_head_stride = q_slots;
    p.out = out.data();
    p.lse = lse.data();
    out_partial.assign(static_cast<size_t>(2 * c.num_ctas) * kTileOfFp8.block_m() * D, NAN);
    max_sum_partial.assign(static_cast<size_t>(2 * c.num_ctas) * kTileOfFp8.block_m(), {NAN, NAN});
    split_tiles.resize(c.num_ctas);
    p.out_partial = out_partial.data();
    p.max_sum_partial = max_sum_partial.data();
    p.split_tiles = split_tiles.data();
    p.max_split_tiles = c.num_ctas - 1;
    if (p.max_split_tiles == 0) p.out_partial = nullptr;
    p.set_scale(1 / std::sqrt(static_cast<double>(D)), false);
    p.batch = c.batch;
    p.heads = c.heads;
    p.qhead_per_khead = c.heads / c.heads_k;
    p.max_seqlen_q = q_slots;
    p.max_seqlen_k = k_slots;
    p.rows_q = c.rows_q;
    p.rows_out = q_slots;
    if (c.q_lens.empty() && c.kv_lens.empty()) {
      plan_on_host(
          p.plan, q_slots, k_slots, c.batch * c.heads * ceil_div(q_slots, kTileOfFp8.block_m()), c.num_ctas,
          kTileOfFp8);
      p.max_split_tiles = p.plan.partial_wave_tiles;
    }
  }

  void run(int slow_warp) {
    using Traits = KernelTraits<T, D, false>;
    if (c.pack) {
      for (int x = 0; x < pack_blocks; ++x) {
        for (int y = 0; y < c.heads_k; ++y) {
          for (int z = 0; z < c.batch; ++z) {
            emulated_grid = {static_cast<uint32_t>(pack_blocks), static_cast<uint32_t>(c.heads_k),
                             static_cast<uint32_t>(c.batch)};
            emulated_block = {static_cast<uint32_t>(x), static_cast<uint32_t>(y), static_cast<uint32_t>(z)};
            specedit::sm90::reset_block();
            emulator::run_block(kPackThreads, [&] { (c.panels ? pack_kv_kernel<true> : pack_kv_kernel<false>)(r); }, -1, 1);
          }
        }
      }
    }
    emulated_grid = {static_cast<uint32_t>(c.num_ctas), 1, 1};
    for (int block = 0; block < c.num_ctas; ++block) {
      emulated_block = {static_cast<uint32_t>(block), 0, 0};
      specedit::sm90::reset_block();
      emulator::run_block(Traits::kThreads, [&] { mixed_res_attn_kernel<T, D, false>(p); }, slow_warp, kSlowness);
    }
    for (int tile = 0; tile < p.max_split_tiles; ++tile) {
      for (int rows = 0; rows < Traits::kBlockM / kCombineRows; ++rows) {
        emulated_block = {static_cast<uint32_t>(tile), static_cast<uint32_t>(rows), 0};
        emulator::run_block(kCombineThreads, [&] { combine_kernel<T, D, Traits::kBlockM>(p); }, -1, 1);
      }
    }
  }

  // Of sampled rows, the largest error over its budget, infinity where lse is wrong; and the errors' and results' squares.
  double error_of(int b, int slot, double& errors, double& squares) const {
    const int q_len = c.q_lens.empty() ? q_slots : std::min(c.q_lens[b], q_slots);
    const int k_len = c.kv_lens.empty() ? k_slots : std::min(c.kv_lens[b], k_slots);
    const int row = q_index.empty() ? slot : q_index[b * q_slots + slot];
    const bool valid = slot < q_len && row >= 0 && row < c.rows_q;
    double worst = 0;
    for (int h = 0; h < c.heads; ++h) {
      const int head_k = h / p.qhead_per_khead;
      const auto scale_of = [&](const Floats& scale, int i) {
        return scale[c.by_row ? (static_cast<size_t>(b) * c.rows_k + i) * c.heads_k + head_k : b * c.heads_k + head_k];
      };
      const auto at_k = [&](int i) { return ((static_cast<size_t>(b) * c.rows_k + i) * c.heads_k + head_k) * D; };
      std::vector<double> weight(k_len, -INFINITY);
      Ints rows(k_len);
      double farthest = 0;
      for (int j = 0; valid && j < k_len; ++j) {
        rows[j] = kv_index.empty() ? j : kv_index[b * k_slots + j];
        if (rows[j] < 0 || rows[j] >= c.rows_k) continue;
        double score = 0;
        for (int d = 0; d < D; ++d) {
          score += static_cast<double>(decode_e4m3(q[((static_cast<size_t>(b) * c.rows_q + row) * c.heads + h) * D + d])) *
              decode_e4m3(k[at_k(rows[j]) + d]);
        }
        score *= q_scale[(static_cast<size_t>(b) * c.rows_q + row) * c.heads + h] *
            static_cast<double>(scale_of(k_scale, rows[j])) / std::sqrt(D);
        farthest = std::max(farthest, std::fabs(score));
        const float of_key = c.bias == Bias::kNone ? 0.0f : bias[b * c.rows_k + rows[j]];
        weight[j] = score + of_key;
        // As fp32 holds it in base 2.
        if (std::fabs(weight[j]) > 1e6) weight[j] = static_cast<float>(weight[j] * kLog2E) / kLog2E;
      }
      double row_max = -INFINITY;
      for (double x : weight) row_max = std::max(row_max, x);
      double sum = 0;
      for (double& x : weight) sum += x = row_max == -INFINITY ? 0 : std::exp(x - row_max);
      const float got = lse[(static_cast<size_t>(b) * c.heads + h) * q_slots + slot];
      const double lse_error = std::fabs(got - row_max - std::log(sum));
      if (sum == 0 ? got != -INFINITY : !(lse_error < 1e-4 + 4e-7 * (std::fabs(row_max) + farthest))) return INFINITY;
      double largest = 0;
      for (int j = 0; sum > 0 && j < k_len; ++j) {
        if (weight[j] > 0) largest = std::max(largest, 448.0 * scale_of(v_scale, rows[j]));
      }
      for (int d = 0; d < D; ++d) {
        double want = 0, magnitude = 0;
        for (int j = 0; sum > 0 && j < k_len; ++j) {
          if (weight[j] == 0) continue;
          const double x = weight[j] / sum * scale_of(v_scale, rows[j]) * decode_e4m3(v[at_k(rows[j]) + d]);
          want += x;
          magnitude += std::fabs(x);
        }
        const double error = std::fabs(want - read(out[((static_cast<size_t>(b) * q_slots + slot) * c.heads + h) * D + d]));
        errors += error * error;
        squares += want * want;
        // Far scores are rounded by fp32 itself.
        const double budget = magnitude * (1.0 / 16 + 4e-7 * farthest) + k_len * std::ldexp(largest, -18) +
            std::fabs(want) / 256 + 1e-30;
        worst = std::isnan(error) ? INFINITY : std::max(worst, error / budget);
      }
    }
    return worst;
  }
};

template <typename T>
emulation::Outcome outcome_of(const Case& given, int seed, int slow_warp) {
  Case c = given;
  std::mt19937 random(seed);
  emulator::random_engine.seed(seed + 1);
  Problem<T> problem(c, random);
  problem.run(slow_warp);
  double worst = 0, errors = 0, squares = 0;
  for (int b = 0; b < c.batch; ++b) {
    for (int slot = 0; slot < problem.q_slots; ++slot) {
      if (slot % 64 < 2 || slot % 64 > 61 || slot % 7 == 0 || slot + 2 > problem.q_slots) {
        worst = std::max(worst, problem.error_of(b, slot, errors, squares));
      }
    }
  }
  int num_splits = 0;
  const Params& p = problem.p;
  for (int i = 0; i < p.max_split_tiles; ++i) {
    num_splits += p.plan.planned ? p.plan.splits[i].num_splits : problem.split_tiles[i].num_splits;
  }
  const double relative = squares > 0 ? std::sqrt(errors / squares) : 0;
  char text[100];
  std::snprintf(text, sizeof(text), "error %.2f of its budget, %.4f of the length, %d splits", worst, relative, num_splits);
  return {worst <= 1 && relative < 0.05 && (num_splits > 0) == c.split, text};
}

}  // namespace

namespace emulation {

std::vector<std::string> fp8_case_names() {
  std::vector<std::string> names;
  for (const auto& entry : kCases) names.push_back(entry.first);
  return names;
}

Outcome run_fp8_case(const std::string& name, int seed, int slow_warp) {
  const auto found = kCases.find(name);
  if (found == kCases.end()) throw std::invalid_argument("name: expected one of fp8_case_names(), got '" + name + "'");
  try {
    return (found->second.by_row ? outcome_of<E4m3ByRow> : outcome_of<E4m3>)(found->second, seed, slow_warp);
  } catch (const std::runtime_error& error) {
    return {false, error.what()};
  }
}

}  // namespace emulation
