# SPDX-License-Identifier: Apache-2.0
"""qk_norm_rope_scatter_: q, k, v read once and written once; bound by memory. bf16, 24 heads of 128."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

HEADS, DIM, DTYPE = 24, 128, torch.bfloat16
# (fresh rows, rows of the K/V buffer, whether q, k, v are views of one projection)
CASES = ((922, 8704, False), (922, 8704, True), (8704, 8704, False), (8704, 8704, True))


def _name(case):
    return f"{case[0]} into {case[1]}" + (" of one projection" if case[2] else "")


def _norm_rope(x, weight, cos, sin):
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return (x.to(cos.dtype) * cos + turned.to(cos.dtype) * sin).to(x.dtype)


def _eager(q_out, k_out, v_out, q, k, v, cos, sin, weight, index):
    """What diffusers' processors compute (tables of D columns, rotation in fp32), and the write to the rows."""
    cos, sin = (x.repeat_interleave(2, dim=-1)[:, :, None] for x in (cos, sin))
    q_out.copy_(_norm_rope(q, weight, cos, sin))
    k_out.index_copy_(1, index, _norm_rope(k, weight, cos, sin))
    v_out.index_copy_(1, index, v)


def _specedit(q_out, k_out, v_out, q, k, v, cos, sin, weight, index):
    torch.ops.specedit.qk_norm_rope_scatter_(
        q_out, k_out, v_out, q, k, v, cos, sin, q_weight=weight, k_weight=weight, kv_out_index=index
    )


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_qk_norm_rope_scatter(timed, benchmark, case, impl):
    fresh, rows, fused = case
    places = torch.randperm(rows, device="cuda")[:fresh].sort().values
    index = places.int()[None]
    angle = torch.randn(1, fresh, DIM // 2, device="cuda") * 3
    weight = torch.rand(DIM, device="cuda", dtype=DTYPE) + 0.5

    def make():
        joint = torch.randn(1, fresh, 3 * HEADS, DIM, device="cuda", dtype=DTYPE)
        qkv = joint.chunk(3, dim=2) if fused else [x.contiguous() for x in joint.chunk(3, dim=2)]
        outs = (torch.zeros(1, n, HEADS, DIM, device="cuda", dtype=DTYPE) for n in (fresh, rows, rows))
        return *outs, *qkv, angle.cos(), angle.sin(), weight

    def check(tensors, fn):
        exact = [x.double() for x in tensors]
        _eager(*exact, places)
        fn(*tensors)
        assert torch.equal(tensors[2].double(), exact[2])
        return relative_error(tensors[:2], exact[:2])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda *tensors: _specedit(*tensors, index),
        "eager": lambda *tensors: _eager(*tensors, places),
        "torch.compile": lambda *tensors: compiled(*tensors, places),
    }
    moved = 6 * fresh * HEADS * DIM * DTYPE.itemsize + fresh * (DIM * 4 + 4)
    measure(timed, benchmark, impl, make, fns, moved, check, op="qk_norm_rope_scatter_", shape=_name(case), dtype=DTYPE)
