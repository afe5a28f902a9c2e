# SPDX-License-Identifier: Apache-2.0
"""channel_rms_norm with a convolution's bias and its SiLU: a read and a write; bound by memory. bf16, maps of Qwen's
autoencoder with channels last."""

import pytest
import torch
from _turns import IMPLS, measure, relative_error

DTYPE = torch.bfloat16
CASES = ((96, 1024), (192, 512), (384, 256))  # (channels, side)


def _name(case):
    return f"{case[0]} x {case[1]}²"


def _eager(x, weight, x_bias):
    """What diffusers computes behind a convolution of cuDNN."""
    x = x + x_bias[:, None, None]
    y = torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=1).to(x.dtype)
    return torch.nn.functional.silu(y * x.shape[1] ** 0.5 * weight[:, None, None])


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", IMPLS)
def test_channel_rms_norm(timed, benchmark, case, impl):
    channels, side = case
    weight, x_bias = (torch.randn(channels, device="cuda", dtype=DTYPE) for _ in range(2))

    def make():
        x = torch.randn(1, channels, side, side, device="cuda", dtype=DTYPE)
        return (x.contiguous(memory_format=torch.channels_last),)

    def check(tensors, fn):
        [x] = tensors
        return relative_error([fn(x)], [_eager(x.double(), weight.double(), x_bias.double())])

    compiled = torch.compile(_eager, dynamic=False)
    fns = {
        "specedit": lambda x: torch.ops.specedit.channel_rms_norm(x, weight, silu=True, x_bias=x_bias),
        "eager": lambda x: _eager(x, weight, x_bias),
        "torch.compile": lambda x: compiled(x, weight, x_bias),
    }
    moved = 2 * channels * side**2 * DTYPE.itemsize
    measure(timed, benchmark, impl, make, fns, moved, check, op="channel_rms_norm", shape=_name(case), dtype=DTYPE)
