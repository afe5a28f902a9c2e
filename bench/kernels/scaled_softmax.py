# SPDX-License-Identifier: Apache-2.0
"""scaled_softmax: fp32 scores of an autoencoder's wide head to bf16 weights; one read, one write, bound by memory."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

SCALE, DTYPE = 512**-0.5, torch.bfloat16
# (queries, keys): the chunks of 32 MiB of `engine/wide_attention.py` at 1024 x 1024 and 2048 x 2048
CASES = ((512, 16384), (128, 65536))


def _name(case):
    return f"{case[0]} x {case[1]}"


def _eager(x):
    return torch.softmax(x * SCALE, dim=-1).to(DTYPE)


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_scaled_softmax(timed, benchmark, case, impl):
    def make():
        return (torch.randn(*case, device="cuda") * 20,)

    def check(tensors, fn):
        [x] = tensors
        return relative_error([fn(x)], [torch.softmax(x.double() * SCALE, dim=-1)])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {"specedit": lambda x: torch.ops.specedit.scaled_softmax(x, SCALE, DTYPE), "eager": _eager,
           "torch.compile": lambda x: compiled(x)}  # fmt: skip
    moved = case[0] * case[1] * (4 + DTYPE.itemsize)
    measure(timed, benchmark, impl, make, fns, moved, check, op="scaled_softmax", shape=_name(case), dtype=DTYPE)
