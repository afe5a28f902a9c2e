# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ attention kernel on the CPU: its own source, compiled by a C++ compiler over tests/emulation.

The threads of a block are fibers that a seeded scheduler runs in random order, with one warp slower than the others:
a wait that does not wait, a stage that is released too early and a wrong index show as a deadlock or an error.
"""

import subprocess
import sys
from pathlib import Path

import planner
import pytest
from combinations import first_of_each, in_turn, rotating

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
pytestmark = pytest.mark.slow
# None, the producer of K and V, that of the biases, one of a consumer.
SLOW_WARPS = (-1, 0, 1, 4)
CASES = (
    "one_tile", "few_rows_d64", "waves", "parts", "lengths", "lengths_0", "packed", "jumps", "stairs",
    "stairs_of_one_tile", "late",
    "far_scores", "far_scores_kv_index", "far_scores_q_index", "masks", "masks_bf16", "masks_kv_index", "shares",
    "shares_of_lengths", "parts_of_lengths", "many_sharers", "scatter", "kv_index", "kv_index_parts", "kv_index_d64",
    "kv_index_no_bias", "kv_index_sorted", "gathered", "gathered_parts", "gathered_lengths", "q_index",
    "q_index_parts", "q_index_lengths", "all_indices", "two_of_three_d64", "q_index_d64",
)  # fmt: skip
FP8_CASES = (
    "all_indices", "far", "far_by_row", "growing", "kv_index", "kv_index_by_row", "late", "later", "later_random",
    "lengths", "lengths_by_row", "masks", "masks_by_row", "odd_panels", "odd_rows", "one_tile", "one_tile_by_row",
    "q_index", "q_index_by_row", "random", "random_by_row", "scores", "scores_negative", "sorted", "sorted_by_row",
    "splits", "splits_by_row", "splits_far", "splits_of_lengths",
)  # fmt: skip
ORDERS = ("alike", "mixed", "rising", "one_near", "first")
KINDS = [(dtype, dim) for dtype in ("bf16", "fp16") for dim in (64, 128)]
SIZES = {"dense": ("-1e2", "-1e4", "-1e9", "-3e38", "lowest", "1e9", "3e38"), "splits": ("-1e4", "-1e9", "-3e38")}
SIZES["kv_index"] = SIZES["splits"]
FAR = [(order, size, keys) for order in ORDERS for keys in SIZES for size in SIZES[keys]]
SCORES = [(size, keys) for size in ("1e4", "-1e4", "3e8", "-3e8", "1e30", "-1e30") for keys in SIZES]


def far_case(order, size, keys, dtype, dim):
    return f"far_{order}_{size}_{dtype}_{dim}_{keys}"


def scores_case(size, keys, dtype, dim):
    return f"scores_{size}_{dtype}_{dim}_{keys}"


@pytest.fixture(scope="module")
def kernels():
    return planner.load()


def test_every_case_is_listed(kernels):
    names = [*CASES]
    names += [far_case(*case, *kind) for case in FAR for kind in KINDS]
    names += [
        scores_case(*case, *kind) for case in SCORES for kind in KINDS if kind[0] == "bf16" or "30" not in case[0]
    ]
    assert kernels.case_names() == sorted(names)
    assert kernels.fp8_case_names() == sorted(FP8_CASES)


def test_an_unknown_case_is_refused(kernels):
    with pytest.raises(ValueError, match=r"name: expected one of case_names\(\), got 'none'"):
        kernels.run_case("none", 0, -1)
    with pytest.raises(ValueError, match=r"name: expected one of fp8_case_names\(\), got 'none'"):
        kernels.run_fp8_case("none", 0, -1)


@pytest.mark.parametrize("case, slow_warp", rotating(CASES, SLOW_WARPS, first=1))
def test_the_kernel_on_the_cpu(kernels, case, slow_warp):
    done = kernels.run_case(case, SLOW_WARPS.index(slow_warp), slow_warp)
    assert done.right, done.text


@pytest.mark.parametrize("slow_warp", (2, 8, 12))
@pytest.mark.parametrize("case", ("two_of_three_d64", "q_index_d64"))
def test_three_consumer_warpgroups(kernels, case, slow_warp):
    """D = 64 without kv_index. A producer of q_index, the second or the third consumer warpgroup is slow."""
    done = kernels.run_case(case, slow_warp, slow_warp)
    assert done.right, done.text


@pytest.mark.parametrize("case, slow_warp", in_turn(FP8_CASES, SLOW_WARPS))
def test_the_kernel_of_e4m3_numbers(kernels, case, slow_warp):
    """Within the budget of tests/test_mixed_res_attn_fp8.py, of the rounded numbers in float64."""
    done = kernels.run_fp8_case(case, SLOW_WARPS.index(slow_warp), slow_warp)
    assert done.right, done.text


@pytest.mark.parametrize("order, size, keys", FAR)
@pytest.mark.parametrize("dtype, dim", KINDS)
def test_biases_of_any_size(kernels, order, size, keys, dtype, dim):
    """Against the softmax, in float64, of the scores as fp32 holds them."""
    done = kernels.run_case(far_case(order, size, keys, dtype, dim), 0, -1)
    assert done.right, done.text


@pytest.mark.parametrize("size, keys", SCORES)
@pytest.mark.parametrize("dtype, dim", KINDS)
def test_scores_of_any_size(kernels, size, keys, dtype, dim):
    if dtype == "fp16" and "30" in size:
        pytest.skip("no such score of fp16 rows")
    done = kernels.run_case(scores_case(size, keys, dtype, dim), 0, -1)
    assert done.right, done.text


# (name, file, before, after, case, slow warp)
BROKEN = [
    # Biases are overwritten before they were used.
    (
        "biases_too_early",
        "producer_bias",
        "sm90::mbarrier_wait(&s.k_empty[pipe.stage], pipe.phase ^ 1);\n      __syncwarp();",
        "",
        "waves",
        4,
    ),
    # The bias of the neighbouring key.
    (
        "bias_of_another_key",
        "producer_bias",
        "columns[i * 32 + lane] = bias_columns_of",
        "columns[(i * 32 + lane) ^ 1] = bias_columns_of",
        "one_tile",
        -1,
    ),
    # What the first of a bias's columns leaves is lost.
    ("a_column_too_few", "producer_bias", "sm90::pack<T>(first, left)", "sm90::pack<T>(first, 0.0f)", "stairs", -1),
    # Biases that no column can hold.
    (
        "bias_out_of_range",
        "softmax",
        "if (__builtin_expect(out_of_range, 0)) add_biases",
        "if (false) add_biases",
        "masks",
        -1,
    ),
    # A bias counts twice in scores that are computed again.
    (
        "bias_twice",
        "softmax",
        "add_biases(work, n_block, true);",
        "add_biases(work, n_block, true), add_biases(work, n_block, true);",
        "far_scores",
        -1,
    ),
    # Biases of -3e38 are removed keys in the unit of the products.
    (
        "bias_overflows",
        "softmax",
        "add_biases(work, n_block, FIRST || with_max);",
        "add_biases(work, n_block, false);",
        "far_mixed_-3e38_bf16_64_dense",
        -1,
    ),
    # A far row takes the way of near ones.
    (
        "far_as_near",
        "softmax",
        "__any_sync(0xffffffffu, is_far()) || bias_flags & kBiasJump",
        "__any_sync(0xffffffffu, row_max[0] == -INFINITY) || bias_flags & kBiasJump",
        "far_alike_-1e9_fp16_64_dense",
        -1,
    ),
    # The unit before the difference: what rounding took off the maximum is left.
    (
        "unit_first",
        "softmax",
        "(fmaf(acc_s[i], scale, bias) - max) * kLog2E",
        "fmaf(acc_s[i], scale * kLog2E, (bias - max) * kLog2E)",
        "far_alike_-1e9_fp16_64_dense",
        -1,
    ),
    # The sum of a split's weights is lost beside its maximum.
    (
        "lse_of_a_split",
        "combine",
        "mine.y * exp2f((mine.x - max) * (kIsFp8<T> ? 1.0f : kLog2E))",
        "exp2f((lse_of<T>(mine.x, mine.y) - max) * kLog2E)",
        "far_alike_-1e9_fp16_64_splits",
        -1,
    ),
    # Weights made before the maximum rose are not rescaled.
    ("old_weights", "softmax", "\n      acc_s[i] *= factor;\n", "\n", "stairs", -1),
    # The maximum of a K tile is that of its first keys.
    (
        "max_of_first_keys",
        "softmax",
        "fmaf(fmaxf(even[r], odd[r]), scale, bias)",
        "fmaf(fmaxf(acc_s[2 * r], acc_s[2 * r + 1]), scale, bias)",
        "stairs_of_one_tile",
        -1,
    ),
    # The output so far is not rescaled.
    ("old_output", "softmax", "if (!FIRST && raise) rescale_o();", "", "jumps", -1),
    # Scores that are to be computed again are not.
    (
        "old_scores",
        "softmax",
        "sums[r] = fmaf(static_cast<float>(a[j]), static_cast<float>(b[j]), sums[r]);",
        "sums[r] = 0.0f;",
        "far_scores",
        -1,
    ),
    # The warpgroup that has no rows releases a stage without having waited for it.
    (
        "released_without_a_wait",
        "consumer",
        "sm90::mbarrier_wait(&s.v_full[stage_of(kv_idx)], phase_of(kv_idx));",
        "",
        "few_rows_d64",
        4,
    ),
    # What follows the last key is not zeroed.
    (
        "nan_past_the_end",
        "producer_tma",
        "int i = valid * 8 + lane;",
        "int i = Traits::kBlockN * 8 + lane;",
        "lengths",
        -1,
    ),
    # Rows by kv_index overwrite those that V still needs.
    ("rows_too_early", "producer_gather", "buffer ^= 1;\n        store_rows();", "store_rows();", "kv_index", -1),
    # An empty slot is taken for a query.
    ("empty_as_query", "epilogue", "if (p.q_index == nullptr) return 3;", "return 3;", "q_index", -1),
    # A turn of the ping-pong goes to a consumer warpgroup that has no rows.
    (
        "turn_without_rows",
        "consumer",
        "wg + 1 < Traits::kConsumers && work.has_rows(wg + 1) ? wg + 1 : 0",
        "wg + 1 < Traits::kConsumers ? wg + 1 : 0",
        "two_of_three_d64",
        -1,
    ),
    # Queries by q_index of a third consumer warpgroup are copied before those in use were read.
    (
        "queries_too_early",
        "producer_gather",
        "sm90::mbarrier_wait(&s.q_empty[wg], phase ^ 1);\n  __syncwarp();\n  if (threadIdx",
        "if (wg < 2) sm90::mbarrier_wait(&s.q_empty[wg], phase ^ 1);\n  __syncwarp();\n  if (threadIdx",
        "q_index_d64",
        12,
    ),
    # One split too few is combined.
    ("a_split_too_few", "tile_scheduler", "2 + __popc(found)", "1 + __popc(found)", "parts_of_lengths", -1),
]


@pytest.mark.parametrize(
    "file, before, after, case, slow_warp",
    [pytest.param(*rest, id=name) for name, *rest in first_of_each(BROKEN, lambda broken: broken[1])],
)
def test_a_broken_kernel_fails(kernels, tmp_path, file, before, after, case, slow_warp):
    """The emulation can tell: the same test on a kernel with one line wrong."""
    source = (CSRC / "mixed_res_attn" / f"{file}.cuh").read_text()
    assert source.count(before) == 1
    (tmp_path / "mixed_res_attn").mkdir()
    (tmp_path / "mixed_res_attn" / f"{file}.cuh").write_text(source.replace(before, after))
    library = _compile(tmp_path / "broken.so", tmp_path, kernels.kernel_of(case))
    assert not all(_is_right(library, case, seed, slow_warp) for seed in range(3))


def test_an_unchanged_kernel_passes(kernels, tmp_path):
    """What fails above is the changed line, not how it is compiled."""
    library = _compile(tmp_path / "same.so", tmp_path, kernels.kernel_of("few_rows_d64"))
    assert _is_right(library, "few_rows_d64", 0, 4)


def _is_right(library, case, seed, slow_warp):
    """Runs a case in a process of its own: a wrong index may end it."""
    code = """
import ctypes, sys
done = ctypes.CDLL(sys.argv[1]).specedit_run_case(sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4]))
sys.exit({1: 0, 0: 1}.get(done, 9))
"""
    command = [sys.executable, "-c", code, str(library), case, str(seed), str(slow_warp)]
    status = subprocess.run(command, timeout=120, check=False).returncode
    assert status != 9, "the case could not be run"
    return status == 0


def _compile(target, changed, kernel):
    """One instance of the kernel, with the headers in the folder `changed` before those of csrc."""
    folders = [f"-I{folder}" for folder in (changed, HERE / "emulation", HERE / "emulation" / "cuda", CSRC)]
    names = ("SPECEDIT_ONLY_T", "SPECEDIT_ONLY_D", "SPECEDIT_ONLY_GATHER")
    only = [f"-D{name}={value}" for name, value in zip(names, kernel, strict=True)]
    # To compile takes longer than to run: -O1 is the fastest in all.
    command = [planner.cxx(), "-O1", "-std=c++17", "-U_FORTIFY_SOURCE", "-w", "-fPIC", "-shared", *only, *folders]
    source = HERE / "emulation" / "mixed_res_attn.cpp"
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target
