# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ attention kernel on the CPU: its own source, compiled by the host's compiler over tests/emulation.

The threads of a block are fibers that a seeded scheduler runs in random order, with one warp slower than the others:
a wait that can be overtaken, a buffer that is given back too early and a wrong index show as a deadlock or an error.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
# None, the loader, the biases', one that computes.
SLOW_WARPS = (-1, 0, 1, 4)
CASES = (
    "one_tile", "few_rows_d64", "rounds", "parts", "lengths", "lengths_0", "packed", "jumps", "stairs", "late",
    "far_scores", "far_scores_kv_index", "far_scores_q_index", "masks", "masks_bf16", "masks_kv_index", "shares", "shares_of_lengths", "parts_of_lengths", "many_sharers", "scatter",
    "kv_index", "kv_index_parts", "kv_index_d64", "kv_index_no_bias", "kv_index_sorted", "gathered", "gathered_parts",
    "gathered_lengths", "q_index", "q_index_parts", "q_index_lengths", "all_indices",
)  # fmt: skip


def _cuda_headers():
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(Path(nvcc).resolve().parents[1])
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def _compile(target, *include):
    command = ["g++", "-O2", "-std=c++17", "-U_FORTIFY_SOURCE", "-w"]
    folders = [f"-I{folder}" for folder in (*include, HERE / "emulation", CSRC)]
    source = str(HERE / "emulation" / "mixed_res_attn.cpp")
    done = subprocess.run(
        [*command, *folders, "-isystem", str(_cuda_headers()), source, "-o", str(target)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def _run(program, case, seed, slow_warp):
    command = [str(program), case, str(seed), str(slow_warp)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def usable():
    if not CSRC.exists():
        pytest.skip("the tests run from an installed package, without the sources")
    if shutil.which("g++") is None or _cuda_headers() is None:
        pytest.skip("needs g++ and CUDA's headers")


@pytest.fixture(scope="module")
def program(usable, tmp_path_factory):
    return _compile(tmp_path_factory.mktemp("emulation") / "mixed_res_attn")


def test_every_case_is_listed(program):
    listed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted(CASES)


@pytest.mark.parametrize("slow_warp", SLOW_WARPS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_on_the_cpu(program, case, slow_warp):
    done = _run(program, case, SLOW_WARPS.index(slow_warp), slow_warp)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "before, after, case, slow_warp",
    [
        # Biases are overwritten before they were used.
        ("sm90::barrier_wait(&s.k_empty[ring.stage], ring.parity ^ 1);\n      __syncwarp();", "", "rounds", 4),
        # The bias of the neighbouring key.
        ("columns[i * 32 + lane] = columns_of<T>(value[i]);",
         "columns[(i * 32 + lane) ^ 1] = columns_of<T>(value[i]);", "one_tile", -1),
        # What the first of a bias's columns leaves is lost.
        ("sm90::pack<T>(first, left)", "sm90::pack<T>(first, 0.0f)", "stairs", -1),
        # Biases that no column can hold.
        ("if (kind & kBeyond) add_biases(w, block);", "", "masks", -1),
        # A bias counts twice in scores that are computed anew.
        ("if (kind & kColumns) add_biases(w, block);", "add_biases(w, block);\n          add_biases(w, block);",
         "far_scores", -1),
        # Weights made before the maximum rose keep their old unit.
        ("\n        score[i] *= factor;\n", "\n", "stairs", -1),
        # The products so far keep their old unit.
        ("if (rescale) rescale_output();", "", "jumps", -1),
        # Scores that are computed anew are not.
        ("sums[r] = fmaf(static_cast<float>(a[j]), static_cast<float>(b[j]), sums[r]);",
         "sums[r] = 0.0f;", "far_scores", -1),
        # The group that has no rows gives a buffer back without having waited for it.
        ("      sm90::barrier_wait(&s.v_full[stage_of(count)], parity_of(count));\n      release(&s.v_empty",
         "      release(&s.v_empty", "few_rows_d64", 4),
        # What follows the last key is not zeroed.
        ("int i = valid * 8 + lane;", "int i = S::kBlockN * 8 + lane;", "lengths", -1),
        # Rows by kv_index overwrite those that V still needs.
        ("buffer ^= 1;\n        keep_rows();", "keep_rows();", "kv_index", -1),
        # An empty slot is taken for a query.
        ("if (p.q_index == nullptr) return 3;", "return 3;", "q_index", -1),
        # One part too few is joined.
        ("2 + __popc(found)", "1 + __popc(found)", "parts_of_lengths", -1),
    ],
    ids=["biases_too_early", "bias_of_another_key", "a_column_too_few", "bias_beyond", "bias_twice", "old_weights", "old_products", "old_scores", "given_back_unseen", "nan_past_the_end",
         "rows_too_early", "empty_as_query", "a_part_too_few"],
)  # fmt: skip
def test_a_broken_kernel_fails(usable, tmp_path, before, after, case, slow_warp):
    """The emulation can tell: the same test on a kernel with one line wrong."""
    source = (CSRC / "mixed_res_attn" / "kernel.cuh").read_text()
    assert source.count(before) == 1
    (tmp_path / "mixed_res_attn").mkdir()
    (tmp_path / "mixed_res_attn" / "kernel.cuh").write_text(source.replace(before, after))
    program = _compile(tmp_path / "broken", tmp_path)
    assert any(_run(program, case, seed, slow_warp).returncode != 0 for seed in range(3))
