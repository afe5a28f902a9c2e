# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def group_norm_statistics(x, num_groups):
    """Mean and variance of each group, [2, B, num_groups] in fp32 (float64 stays float64)."""
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (num_groups, -1)).flatten(2)
    mean = groups.mean(2)
    return torch.stack([mean, (groups - mean[..., None]).square().mean(2)])


@as_written
def group_norm(x, num_groups, weight, bias, eps, silu, statistics=None):
    """Group norm, and SiLU where asked for, in fp32 (float64 stays float64), rounded once. statistics: of
    `group_norm_statistics`, None for x's own."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_channel = (-1, *[1] * (x.dim() - 2))
    groups = x.to(dtype).unflatten(1, (num_groups, -1)).flatten(2)
    mean, variance = (group_norm_statistics(x, num_groups) if statistics is None else statistics)[..., None]
    y = (groups - mean) * torch.rsqrt(variance + eps)
    y = y.view(x.shape) * weight.to(dtype).view(of_channel) + bias.to(dtype).view(of_channel)
    return torch.empty_like(x).copy_(torch.nn.functional.silu(y) if silu else y)
