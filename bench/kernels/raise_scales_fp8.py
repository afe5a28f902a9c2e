# SPDX-License-Identifier: Apache-2.0
"""raise_scales_fp8_: values read once, a scale a head written; bound by memory. bf16, 24 heads of 128."""

import math

import pytest
import torch
from _turns import IMPLS, measure, relative_error

DTYPE, HEADS, DIM = torch.bfloat16, 24, 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def _eager(q_scale, k_scale, v_scale, v, q_weight, k_weight):
    """What PyTorch does for scales on the device: the largest numbers, then the larger scales."""
    for scale, weight in ((q_scale, q_weight), (k_scale, k_weight)):
        scale.copy_(torch.maximum(scale, weight.abs().max().to(scale.dtype) * (math.sqrt(DIM) / LARGEST)))
    v_scale.copy_(torch.maximum(v_scale, v.abs().amax(dim=(1, 3))[:, None].to(v_scale.dtype) / LARGEST))


@pytest.mark.parametrize("rows", (922, 3174, 8704))
@pytest.mark.parametrize("impl", IMPLS)
def test_raise_scales_fp8(timed, benchmark, rows, impl):
    weights = torch.randn(2, DIM, device="cuda", dtype=DTYPE).unbind()

    def make():
        scales = (torch.full((1, 1, HEADS), 2.0**-126, device="cuda") for _ in range(3))
        return *scales, torch.randn(1, rows, HEADS, DIM, device="cuda", dtype=DTYPE)

    def check(tensors, fn):
        exact = [x.double() for x in tensors]
        _eager(*exact, *(w.double() for w in weights))
        fn(*tensors)
        return relative_error(tensors[:3], exact[:3])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda *tensors: torch.ops.specedit.raise_scales_fp8_(
            *tensors, q_weight=weights[0], k_weight=weights[1]
        ),
        "eager": lambda *tensors: _eager(*tensors, *weights),
        "torch.compile": lambda *tensors: compiled(*tensors, *weights),
    }
    moved = rows * HEADS * DIM * DTYPE.itemsize
    measure(timed, benchmark, impl, make, fns, moved, check, op="raise_scales_fp8_", shape=str(rows), dtype=DTYPE)
