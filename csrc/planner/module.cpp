// SPDX-License-Identifier: Apache-2.0
// The Python module specedit_kernels._planner: the plan of an attention call, and the kernels' test cases on the CPU. It
// needs pybind11 and a C++ compiler, no CUDA. The plan is made by the kernel's own tile scheduler in the emulation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "mixed_res_attn.h"
#include "mixed_res_attn/tile_scheduler.cuh"

namespace {

using namespace specedit::attn;
namespace py = pybind11;

using Lengths = std::optional<std::vector<int>>;

// One work tile: `rows` queries from m_block * tile_q on, keys of the K tiles [n_block_begin, n_block_end). split: its
// number among the splits of its tile, -1 where the tile is not split. cost: in quarters of the time of a K tile.
struct PlannedTile {
  int cta, wave, batch, head, m_block, rows, n_block_begin, n_block_end, split, cost;
};

struct Plan {
  int num_sms, num_tiles, full_waves, last_wave_tiles, split_tiles;
  std::vector<PlannedTile> work;
};

void check(bool right, const std::string& expected, long long got) {
  if (!right) throw py::value_error(expected + ", got " + std::to_string(got));
}

void check_lengths(const Lengths& lengths, int batch, int most, const std::string& name) {
  if (!lengths) return;
  check(static_cast<int>(lengths->size()) == batch, name + ": expected a length for each of " + std::to_string(batch) +
        " batch entries", static_cast<long long>(lengths->size()));
  for (int length : *lengths) {
    check(length >= 0 && length <= most, name + ": expected 0 to " + std::to_string(most), length);
  }
}

// The number of a split: 0 is a tile's first split, 1 the begin of its remainder, the others come from stream-K CTAs.
int split_number(int slot, const std::vector<SplitTile>& split_tiles, int tile, int num_split_tiles) {
  if (slot < 0) return -1;
  if (slot < 2 * num_split_tiles) return slot / num_split_tiles;
  return 2 + slot - 2 * num_split_tiles - split_tiles[tile].streamk_cta;
}

template <int D>
Plan plan_of(Params& p, int num_tiles, int num_sms) {
  using Storage = SharedStorage<__nv_bfloat16, D, false>;
  Storage& s = *static_cast<Storage*>(specedit::sm90::dynamic_smem());
  std::vector<SplitTile> split_tiles(num_sms);
  p.split_tiles = split_tiles.data();
  emulated_grid = {static_cast<uint32_t>(num_sms), 1, 1};
  Plan plan{num_sms, num_tiles, num_tiles / num_sms, num_tiles % num_sms, 0, {}};
  struct Found {
    int id, slot, work;
  };
  std::vector<Found> splits;
  for (int cta = 0; cta < num_sms; ++cta) {
    emulated_block = {static_cast<uint32_t>(cta), 0, 0};
    specedit::sm90::reset_block();
    emulator::run_block(
        Storage::Traits::kThreads,
        [&] {
          make_plan<__nv_bfloat16, D, false>(p, s);
          if (threadIdx.x < 32) write_split_tile(p, s);
        },
        -1, 1);
    plan.split_tiles = s.partial_wave_tiles;
    WorkTile work;
    for (int i = 0; work.get(p, s, i); ++i) {
      if (work.rows <= 0) continue;  // a tile of a range that has no remainder
      const int wave = std::min(i, s.full_waves);
      const int block_cost = n_block_cost(Storage::Traits::tile(), work.rows);
      const int cost = (work.n_block_end - work.n_block_begin) * block_cost + kSplitOverheadCost;
      plan.work.push_back(
          {cta, wave, work.batch, work.head, work.m_block, work.rows, work.n_block_begin, work.n_block_end, -1, cost});
      if (work.split_slot < 0) continue;
      const int id = s.cta_rank < s.partial_wave_tiles ? s.cta_rank
                                                       : s.range_begin.tile + i - s.full_waves - s.full_wave_tiles;
      splits.push_back({id, work.split_slot, static_cast<int>(plan.work.size()) - 1});
    }
  }
  for (int i = 0; p.plan.planned && i < plan.split_tiles; ++i) {
    split_tiles[i] = split_tile_of_host_plan<Storage::Traits::kBlockM>(p, i);
  }
  for (const Found& x : splits) {
    plan.work[x.work].split = split_number(x.slot, split_tiles, x.id, plan.split_tiles);
  }
  return plan;
}

Plan plan(
    int seqlen_q, int seqlen_k, int heads, int head_dim, int num_sms, int batch, const Lengths& q_lens,
    const Lengths& kv_lens) {
  constexpr int kMostRows = 1 << 24;
  check(seqlen_q >= 1 && seqlen_q <= kMostRows, "seqlen_q: expected 1 to " + std::to_string(kMostRows), seqlen_q);
  check(seqlen_k >= 1 && seqlen_k <= kMostRows, "seqlen_k: expected 1 to " + std::to_string(kMostRows), seqlen_k);
  check(heads >= 1 && heads <= 1024, "heads: expected 1 to 1024", heads);
  check(head_dim == 64 || head_dim == 128, "head_dim: expected 64 or 128", head_dim);
  check(num_sms >= 1 && num_sms <= 1024, "num_sms: expected 1 to 1024", num_sms);
  check(batch >= 1 && batch <= kMaxBatch, "batch: expected 1 to " + std::to_string(kMaxBatch), batch);
  check_lengths(q_lens, batch, seqlen_q, "q_lens");
  check_lengths(kv_lens, batch, seqlen_k, "kv_lens");
  int64_t num_tiles = 0;
  const TileShape tile = tile_of(head_dim, false);
  for (int b = 0; b < batch; ++b) {
    num_tiles += int64_t{heads} * ceil_div(q_lens ? (*q_lens)[b] : seqlen_q, tile.block_m());
  }
  check(num_tiles <= 1 << 24, "seqlen_q, heads and batch: expected at most 2**24 work tiles", num_tiles);
  Params p{};
  p.batch = batch;
  p.heads = heads;
  p.qhead_per_khead = 1;
  p.max_seqlen_q = p.rows_q = seqlen_q;
  p.max_seqlen_k = p.rows_k = seqlen_k;
  p.q_lens = q_lens ? q_lens->data() : nullptr;
  p.kv_lens = kv_lens ? kv_lens->data() : nullptr;
  float memory = 0;
  p.out_partial = &memory;  // not null: tiles may be split
  if (q_lens || kv_lens) {
    p.max_split_tiles = num_sms - 1;
  } else {
    plan_on_host(p.plan, seqlen_q, seqlen_k, static_cast<int>(num_tiles), num_sms, tile);
    p.max_split_tiles = p.plan.partial_wave_tiles;
  }
  return head_dim == 64 ? plan_of<64>(p, static_cast<int>(num_tiles), num_sms)
                        : plan_of<128>(p, static_cast<int>(num_tiles), num_sms);
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "The work tiles of a call of mixed_res_attn on sm_90, and its kernels on the CPU for tests.";
  py::class_<PlannedTile>(m, "WorkTile")
      .def_readonly("cta", &PlannedTile::cta)
      .def_readonly("wave", &PlannedTile::wave)
      .def_readonly("batch", &PlannedTile::batch)
      .def_readonly("head", &PlannedTile::head)
      .def_readonly("m_block", &PlannedTile::m_block)
      .def_readonly("rows", &PlannedTile::rows)
      .def_readonly("n_block_begin", &PlannedTile::n_block_begin)
      .def_readonly("n_block_end", &PlannedTile::n_block_end)
      .def_readonly("split", &PlannedTile::split)
      .def_readonly("cost", &PlannedTile::cost);
  py::class_<Plan>(m, "Plan")
      .def_readonly("num_sms", &Plan::num_sms)
      .def_readonly("num_tiles", &Plan::num_tiles)
      .def_readonly("full_waves", &Plan::full_waves)
      .def_readonly("last_wave_tiles", &Plan::last_wave_tiles)
      .def_readonly("split_tiles", &Plan::split_tiles)
      .def_readonly("work", &Plan::work);
  m.def(
      "plan", &plan, py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("heads"), py::arg("head_dim"),
      py::arg("num_sms"), py::kw_only(), py::arg("batch") = 1, py::arg("q_lens") = py::none(),
      py::arg("kv_lens") = py::none(),
      "The plan of a call with `num_sms` SMs and without kv_index. q_lens, kv_lens: lengths by batch entry, where they are on the device.");
  m.def(
      "tile",
      [](int head_dim) {
        const TileShape tile = tile_of(head_dim, false);
        return std::make_pair(tile.block_m(), tile.block_n);
      },
      py::arg("head_dim"), "Queries of a work tile and keys of a K tile, of calls without kv_index.");
  py::class_<emulation::Outcome>(m, "Outcome")
      .def_readonly("right", &emulation::Outcome::right)
      .def_readonly("text", &emulation::Outcome::text);
  m.def("case_names", &emulation::case_names);
  m.def("kernel_of", &emulation::kernel_of, py::arg("name"));
  m.def("run_case", &emulation::run_case, py::arg("name"), py::arg("seed"), py::arg("slow_warp"));
  m.def("fp8_case_names", &emulation::fp8_case_names);
  m.def("run_fp8_case", &emulation::run_fp8_case, py::arg("name"), py::arg("seed"), py::arg("slow_warp"));
}
