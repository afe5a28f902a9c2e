# SPDX-License-Identifier: Apache-2.0
"""The plan of an attention call, as `specedit doctor --plan` describes it: every key of every query is covered once."""

import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import planner
import pytest

from specedit_kernels import _attention_plan

# What compiles the module.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def module():
    return planner.load()


def _blocks(lengths, tile):
    return [-(-length // tile) for length in lengths]


@slow
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, heads, num_sms, q_lens, kv_lens",
    [
        (922, 8704, 24, 132, None, None),
        (8704, 8704, 24, 132, None, None),
        (4224, 8704, 24, 132, None, None),
        (130, 3000, 1, 132, None, None),
        (128, 500, 24, 132, None, None),
        (1, 1, 1, 1, None, None),
        (300, 2000, 3, 200, None, None),  # more CTAs than the host plans for: no splits
        (922, 8704, 24, 132, [922], None),
        (700, 4000, 5, 20, [700, 0, 64], [4000, 900, 2200]),
        (700, 4000, 5, 20, None, [4000, 0, 2200]),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_k_tile_is_in_one_work_tile(module, seqlen_q, seqlen_k, heads, num_sms, q_lens, kv_lens, head_dim):
    batch = len(q_lens or kv_lens or [1])
    plan = module.plan(seqlen_q, seqlen_k, heads, head_dim, num_sms, batch=batch, q_lens=q_lens, kv_lens=kv_lens)
    tile_q, tile_k = module.tile(head_dim)
    m_blocks = _blocks(q_lens or [seqlen_q] * batch, tile_q)
    n_blocks = _blocks(kv_lens or [seqlen_k] * batch, tile_k)
    found = Counter()
    tiles = set()
    for work in plan.work:
        tiles.add((work.batch, work.head, work.m_block))
        for n_block in range(work.n_block_begin, work.n_block_end):
            found[work.batch, work.head, work.m_block, n_block] += 1
    expected = {
        (b, head, m_block, n_block)
        for b in range(batch)
        for head in range(heads)
        for m_block in range(m_blocks[b])
        for n_block in range(n_blocks[b])
    }
    assert set(found) == expected
    assert set(found.values()) <= {1}
    assert len(tiles) == plan.num_tiles == heads * sum(m_blocks)
    assert (plan.full_waves, plan.last_wave_tiles) == divmod(plan.num_tiles, num_sms)


@slow
def test_splits_are_numbered_within_their_tile(module):
    plan = module.plan(922, 8704, 24, 128, 132)
    assert plan.split_tiles == plan.last_wave_tiles == 60
    splits = {}
    for work in plan.work:
        if work.split >= 0:
            splits.setdefault((work.head, work.m_block), []).append((work.split, work.n_block_begin, work.n_block_end))
    assert len(splits) == 60
    for parts in splits.values():
        parts.sort()
        assert [number for number, _, _ in parts] == list(range(len(parts)))
        assert parts[0][1] == 0
        assert parts[-1][2] == 50
        assert all(before[2] == after[1] for before, after in pairwise(parts))


@slow
@pytest.mark.parametrize("queries, head_dim", [(1024, 128), (1152, 64)])
def test_a_length_on_the_device_plans_the_same_tiles(module, queries, head_dim):
    """The kernel's own planner, run by the emulation, splits the tiles that the host's splits."""
    host = module.plan(queries, 8704, 24, head_dim, 132)
    device = module.plan(queries, 8704, 24, head_dim, 132, q_lens=[queries], kv_lens=[8704])
    assert device.split_tiles == host.split_tiles > 0
    key = [(w.cta, w.wave, w.head, w.m_block, w.n_block_begin, w.n_block_end, w.split) for w in host.work]
    assert key == [(w.cta, w.wave, w.head, w.m_block, w.n_block_begin, w.n_block_end, w.split) for w in device.work]


@slow
@pytest.mark.parametrize("head_dim, tile", [(64, (192, 128)), (128, (128, 176))])
def test_a_tile_that_leaves_consumer_warpgroups_without_rows_costs_less(module, head_dim, tile):
    assert module.tile(head_dim) == tile
    overhead = module.plan(64, tile[1], 1, head_dim, 1).work[0].cost * 2 - module.plan(
        64, 2 * tile[1], 1, head_dim, 1).work[0].cost  # fmt: skip
    for rows in range(tile[0], 0, -64):
        for queries in (rows, rows - 63):
            (work,) = module.plan(queries, tile[1], 1, head_dim, 1).work
            assert (work.rows, work.cost - overhead) == (queries, 4 - (tile[0] - rows) // 64)


@slow
@pytest.mark.parametrize(
    "arguments, options, words",
    [
        ((0, 8, 1, 64, 1), {}, "seqlen_q: expected 1 to 16777216, got 0"),
        ((8, 8, 1, 96, 1), {}, "head_dim: expected 64 or 128, got 96"),
        ((8, 8, 1, 64, 0), {}, "num_sms: expected 1 to 1024, got 0"),
        ((8, 8, 1, 64, 1), {"batch": 513}, "batch: expected 1 to 512, got 513"),
        ((8, 8, 1, 64, 1), {"q_lens": [1, 2]}, "q_lens: expected a length for each of 1 batch entries, got 2"),
        ((8, 8, 1, 64, 1), {"kv_lens": [9]}, "kv_lens: expected 0 to 8, got 9"),
        ((1 << 24, 8, 1024, 64, 1), {}, "expected at most 2**24 work tiles"),
    ],
)
def test_numbers_out_of_range_are_refused(module, arguments, options, words):
    with pytest.raises(ValueError) as error:
        module.plan(*arguments, **options)
    assert words in str(error.value)


@slow
def test_describe(module):
    text = _attention_plan.describe("922x8704", num_sms=132)
    assert text.splitlines()[:4] == [
        "mixed_res_attn: 922 queries, 8704 keys, 24 heads of 128, 132 SMs",
        "work tiles  192: 8 of 128 queries for each of 24 heads; 50 K tiles of 176 keys in each",
        "waves       1 full, and a last partial wave of 60 tiles: 45 % full without splits",
        "splits      179, of 60 tiles: 2 to 4 splits in each; a second kernel combines them",
    ]
    assert "instead of 50 for 60 of the CTAs" in text
    assert "100 % full" in _attention_plan.describe("4224x8704", num_sms=132)
    assert "splits      none" in _attention_plan.describe("128x500x24x64", num_sms=132)
    assert _attention_plan.describe("922x8704x24x64", num_sms=132).splitlines()[1:] == [
        "work tiles  120: 5 of 192 queries for each of 24 heads; 68 K tiles of 128 keys in each",
        "waves       0 full, and a last partial wave of 120 tiles: 91 % full without splits",
        "splits      none: the combine kernel would cost more than they save",
    ]


@pytest.mark.parametrize("text", ["", "922", "922x", "axb", "1x2x3x4x5", "-1x2"])
def test_a_text_that_is_no_call_is_refused(text):
    with pytest.raises(ValueError, match="expected QUERIESxKEYS"):
        _attention_plan.describe(text)


def test_describe_says_that_the_planner_is_another_versions(monkeypatch):
    monkeypatch.setitem(sys.modules, "specedit_kernels._planner", SimpleNamespace(__file__="a.so", TILE_Q=128))
    with pytest.raises(RuntimeError, match=r"another version's build: build it again \(a\.so\)"):
        _attention_plan.describe("128x128")


def test_describe_says_that_the_planner_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "specedit_kernels._planner", None)
    with pytest.raises(RuntimeError, match=r"the planner is not built: .*pybind11") as error:
        _attention_plan.describe("922x8704")
    assert "\n" not in str(error.value)
