# SPDX-License-Identifier: Apache-2.0
"""merge_attn: two halves read once, one result written; bound by memory."""

import pytest
import torch


def _eager(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    a = (lse_a - lse).exp().transpose(1, 2)[..., None]
    b = (lse_b - lse).exp().transpose(1, 2)[..., None]
    return (out_a * a + out_b * b).to(out_a.dtype), lse


@pytest.mark.parametrize("num_q", (922, 8704))
@pytest.mark.parametrize("impl", ("specedit", "eager", "torch.compile"))
def test_merge(timed, num_q, impl):
    heads, head_dim, dtype = 24, 128, torch.bfloat16
    out_a, out_b = (torch.randn(1, num_q, heads, head_dim, device="cuda", dtype=dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(1, heads, num_q, device="cuda") for _ in range(2))
    run = {"specedit": torch.ops.specedit.merge_attn, "eager": _eager, "torch.compile": torch.compile(_eager)}[impl]
    exact, exact_lse = _eager(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    out, lse = run(out_a, lse_a, out_b, lse_b)
    error = ((out.double() - exact).norm() / exact.norm()).item()
    # One rounding to bf16 of a result in fp32: at most eps / 2 of each element.
    ok = error <= torch.finfo(dtype).eps / 2 and (lse.double() - exact_lse).abs().max().item() < 1e-5
    timed(
        lambda: run(out_a, lse_a, out_b, lse_b), op="merge_attn", impl=impl, shape=f"{num_q} H{heads} D{head_dim}",
        dtype=dtype, moved_bytes=3 * out_a.numel() * 2 + 3 * lse_a.numel() * 4, error=error, error_ok=ok,
    )  # fmt: skip
    if impl == "specedit":
        assert ok, f"error {error:.3e}"
