# SPDX-License-Identifier: Apache-2.0
"""group_norm with its SiLU: two reads and a write; bound by memory. bf16, 32 groups, maps of FLUX's autoencoder."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

GROUPS, DTYPE = 32, torch.bfloat16
# (channels, side, channels last)
CASES = ((128, 1024, False), (128, 1024, True), (256, 512, False), (512, 256, False), (512, 128, False))


def _name(case):
    channels, side, last = case
    return f"{channels} x {side}²" + (", channels last" if last else "")


def _eager(x, weight, bias):
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias, 1e-6))


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_group_norm(timed, benchmark, case, impl):
    channels, side, last = case
    weight, bias = (torch.randn(channels, device="cuda", dtype=DTYPE) for _ in range(2))
    layout = torch.channels_last if last else torch.contiguous_format

    def make():
        x = torch.randn(1, channels, side, side, device="cuda", dtype=DTYPE)
        return (x.contiguous(memory_format=layout),)

    def check(tensors, fn):
        [x] = tensors
        return relative_error([fn(x)], [_eager(x.double(), weight.double(), bias.double())])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda x: torch.ops.specedit.group_norm(x, GROUPS, weight, bias, silu=True),
        "eager": lambda x: _eager(x, weight, bias),
        "torch.compile": lambda x: compiled(x, weight, bias),
    }
    moved = 3 * channels * side**2 * DTYPE.itemsize
    measure(timed, benchmark, impl, make, fns, moved, check, op="group_norm", shape=_name(case), dtype=DTYPE)
