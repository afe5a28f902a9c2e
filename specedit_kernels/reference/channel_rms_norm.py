# SPDX-License-Identifier: Apache-2.0
import torch

from . import _maps
from ._precision import as_written


@as_written
def channel_rms_norm(x, weight, bias, eps, silu, x_bias):
    """(x + x_bias) / max(its length, eps) * sqrt(C) * weight + bias over channels, and SiLU where asked for, in fp32
    (float64 stays float64), rounded once."""
    biased = _maps.biased(x, x_bias)
    length = torch.linalg.vector_norm(biased, dim=1, keepdim=True).clamp_min(eps)
    y = biased * (x.shape[1] ** 0.5 / length) * _maps.of_channel(weight, biased)
    y = y if bias is None else y + _maps.of_channel(bias, biased)
    return torch.empty_like(x).copy_(torch.nn.functional.silu(y) if silu else y)
