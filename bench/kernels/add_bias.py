# SPDX-License-Identifier: Apache-2.0
"""add_bias_: a convolution's bias and its residual; two reads and a write, bound by memory. bf16, maps of FLUX's
autoencoder with channels last."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

DTYPE = torch.bfloat16
# (channels, side, with a residual)
CASES = ((128, 1024, True), (256, 1024, False), (512, 256, True))


def _name(case):
    channels, side, residual = case
    return f"{channels} x {side}²" + (", residual" if residual else "")


def _eager(x, bias, residual):
    """What PyTorch does behind a convolution of cuDNN, then the addition."""
    x += bias[:, None, None]
    if residual is not None:
        x += residual


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_add_bias(timed, benchmark, case, impl):
    channels, side, added = case
    bias = torch.randn(channels, device="cuda", dtype=DTYPE)

    def make():
        maps = (torch.randn(1, channels, side, side, device="cuda", dtype=DTYPE) for _ in range(1 + added))
        return tuple(x.contiguous(memory_format=torch.channels_last) for x in maps)

    def check(tensors, fn):
        exact, *residual = (x.double() for x in tensors)
        _eager(exact, bias.double(), *(residual or [None]))
        fn(*tensors)
        return relative_error([tensors[0]], [exact])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda x, residual=None: torch.ops.specedit.add_bias_(x, bias, residual),
        "eager": lambda x, residual=None: _eager(x, bias, residual),
        "torch.compile": lambda x, residual=None: compiled(x, bias, residual),
    }
    moved = (2 + added) * channels * side**2 * DTYPE.itemsize
    measure(timed, benchmark, impl, make, fns, moved, check, op="add_bias_", shape=_name(case), dtype=DTYPE)
