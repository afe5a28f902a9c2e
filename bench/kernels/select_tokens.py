# SPDX-License-Identifier: Apache-2.0
"""select_tokens, bound by latency: one launch. And the chain score, select, gather, with its launches counted."""

import pytest
import torch

from specedit_kernels.reference.select_tokens import select_tokens as reference

IMPLS = ("specedit", "specedit triton", "eager")
CHAIN_LAUNCHES = 4


def _eager(score, grid, threshold, dilation, stride):
    mask = ((score > threshold) | score.isnan()).view(-1, 1, *grid)
    mask = torch.nn.functional.max_pool2d(mask.float(), 2 * dilation + 1, stride=1, padding=dilation) > 0
    mask[:, :, ::stride, ::stride] = True
    mask = mask.flatten(1)
    return mask, torch.argsort(~mask, dim=1, stable=True).int(), mask.sum(1, dtype=torch.int32)


@pytest.mark.parametrize("grid", ((32, 32), (64, 64), (128, 128)), ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("impl", IMPLS)
def test_select(timed, monkeypatch, grid, impl):
    score = torch.rand(1, grid[0] * grid[1], device="cuda")
    arguments = (0.95, 1, 4)
    if impl == "specedit triton":
        monkeypatch.setenv("SPECEDIT_BACKEND", "triton")

    def op():
        return torch.ops.specedit.select_tokens(score, grid, *arguments)

    def eager():
        return _eager(score, grid, *arguments)

    fn = eager if impl == "eager" else op
    exact = reference(score.cpu(), *grid, *arguments)
    same = all(torch.equal(got.cpu(), want) for got, want in zip(fn(), exact))
    timed(fn, op="select_tokens", impl=impl, shape=f"{grid[0]}x{grid[1]}", dtype=score.dtype, error_ok=same)
    assert same


def _launches(fn):
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("impl", ("specedit", "specedit triton"))
def test_chain(timed, monkeypatch, impl):
    """From two feature tensors of 4096 tokens to the 922 that are recomputed."""
    draft, source, tokens = (torch.randn(1, 4096, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if impl == "specedit triton":
        monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    ops = torch.ops.specedit

    def chain():
        score = ops.token_discrepancy(draft, source, (64, 64))
        _, index, _ = ops.select_tokens(score, (64, 64), 1.0, 1, 0)
        return ops.gather_tokens(tokens, index, 922)

    launches = _launches(chain)
    timed(
        chain, op="score, select, gather", impl=impl, shape="4096 of C=3072 to 922", dtype=draft.dtype,
        moved_bytes=2 * draft.numel() * 2 + 2 * 922 * 3072 * 2, launches=launches,
    )  # fmt: skip
    assert 0 < launches <= CHAIN_LAUNCHES, launches
