# SPDX-License-Identifier: Apache-2.0
import torch

from . import _maps
from ._precision import as_written


@as_written
def group_norm_statistics(x, num_groups, x_bias=None):
    """Mean and variance of each group of x + x_bias, [2, B, num_groups] in fp32 (float64 stays float64)."""
    groups = _maps.biased(x, x_bias).unflatten(1, (num_groups, -1)).flatten(2)
    mean = groups.mean(2)
    return torch.stack([mean, (groups - mean[..., None]).square().mean(2)])


@as_written
def group_norm(x, num_groups, weight, bias, eps, silu, statistics=None, x_bias=None):
    """Group norm of x + x_bias, and SiLU where asked for, in fp32 (float64 stays float64), rounded once. statistics: of
    `group_norm_statistics`, None for its own."""
    biased = _maps.biased(x, x_bias)
    mean, variance = (group_norm_statistics(x, num_groups, x_bias) if statistics is None else statistics)[..., None]
    y = (biased.unflatten(1, (num_groups, -1)).flatten(2) - mean) * torch.rsqrt(variance + eps)
    y = y.view(x.shape) * _maps.of_channel(weight, biased) + _maps.of_channel(bias, biased)
    return torch.empty_like(x).copy_(torch.nn.functional.silu(y) if silu else y)
