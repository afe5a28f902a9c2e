# SPDX-License-Identifier: Apache-2.0
"""lerp_: keys of two passes read once, those between them written once; bound by memory. bf16, 24 heads of 128."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

DTYPE, SHAPE = torch.bfloat16, (24, 128)


@pytest.mark.parametrize("rows", (922, 3174, 8704))
@pytest.mark.parametrize("impl", IMPLS)
def test_lerp(timed, benchmark, rows, impl):
    weight = torch.tensor(0.3, device="cuda")

    def make():
        return tuple(torch.randn(1, rows, *SHAPE, device="cuda", dtype=DTYPE) for _ in range(3))

    def check(tensors, fn):
        out, a, b = tensors
        fn(*tensors)
        return relative_error(out, torch.lerp(a.double(), b.double(), weight.double()))

    def eager(out, a, b):
        torch.lerp(a, b, weight.to(DTYPE), out=out)

    compiled = torch.compile(lambda a, b: torch.lerp(a, b, weight.to(DTYPE)), dynamic=False)
    fns = {
        "specedit": lambda out, a, b: torch.ops.specedit.lerp_(out, a, b, weight),
        "eager": eager,
        "torch.compile": lambda out, a, b: out.copy_(compiled(a, b)),
    }
    moved = 3 * rows * SHAPE[0] * SHAPE[1] * DTYPE.itemsize
    measure(timed, benchmark, impl, make, fns, moved, check, op="lerp_", shape=str(rows), dtype=DTYPE)
