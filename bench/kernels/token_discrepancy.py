# SPDX-License-Identifier: Apache-2.0
"""token_discrepancy: two inputs read once; bound by memory. A copy of as many bytes is timed beside it."""

import pytest
import torch
from _turns import copies_in_turn, in_turn

# Transformer token features, projected tokens, and the decoder maps of a 1024 x 1024 picture.
TOKENS = ((4, 4096, 3072), (4, 4096, 64), (1, 1024, 3072))
MAPS = ((1, 512, 128, 128), (1, 512, 256, 256))
CASES = [(shape, torch.contiguous_format) for shape in TOKENS] + [
    (shape, layout) for shape in MAPS for layout in (torch.contiguous_format, torch.channels_last)
]
IMPLS = ("specedit", "specedit triton", "eager", "torch.compile", "copy")
GRID = {4096: (64, 64), 1024: (32, 32)}


def _name(case):
    shape, layout = case
    return "x".join(map(str, shape)) + (" channels_last" if layout == torch.channels_last else "")


def _eager(draft, source, grid):
    """The op in plain PyTorch, in fp32 (float64 for the oracle)."""
    channel = 1 if draft.dim() == 4 else 2
    if draft.dtype != torch.float64:
        draft, source = draft.float(), source.float()
    score = 2 - 2 * torch.nn.functional.cosine_similarity(draft, source, dim=channel, eps=1e-6)
    if draft.dim() == 3:
        return score
    cell = draft.shape[2] // grid[0], draft.shape[3] // grid[1]
    return torch.nn.functional.avg_pool2d(score[:, None], cell).flatten(1)


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_token_discrepancy(timed, benchmark, monkeypatch, case, impl):
    shape, layout = case
    dtype = torch.bfloat16
    grid = GRID[shape[1]] if len(shape) == 3 else (64, 64)
    one = 2 * torch.Size(shape).numel() * dtype.itemsize
    moved = one + shape[0] * grid[0] * grid[1] * 4
    about = dict(op="token_discrepancy", impl=impl, shape=_name(case), dtype=dtype, moved_bytes=moved)
    if impl == "copy":
        info = timed(copies_in_turn(moved), error=None, error_ok=None, **about)
        benchmark.extra_info["rotating_fraction_of_copy"] = round(info["gbps"] / info["copy_ceiling_gbps"], 3)
        return

    def pair():
        source = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        return (source + 0.3 * torch.randn_like(source)), source

    if impl == "specedit triton":
        monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    run = {"eager": _eager, "torch.compile": torch.compile(_eager)}.get(impl, torch.ops.specedit.token_discrepancy)
    first = pair()
    score = run(*first, grid)
    exact = _eager(*(x.double() for x in first), grid)
    error = (score.double() - exact).abs().max().item()
    # fp32 sums over at most 3072 channels, and a difference of terms near 1.
    ok = error < 5e-6
    turn = in_turn(pair, one)
    info = timed(lambda: run(*next(turn), grid), error=error, error_ok=ok, **about)
    benchmark.extra_info["rotating_fraction_of_copy"] = round(info["gbps"] / info["copy_ceiling_gbps"], 3)
    if impl.startswith("specedit"):
        assert ok, f"error {error:.3e}"
