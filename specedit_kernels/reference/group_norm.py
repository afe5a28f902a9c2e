# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def group_norm(x, num_groups, weight, bias, eps, silu):
    """Group norm, and SiLU where asked for, in fp32 (float64 stays float64), rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_channel = (-1, *[1] * (x.dim() - 2))
    groups = x.to(dtype).unflatten(1, (num_groups, -1)).flatten(2)
    y = groups - groups.mean(2, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(2, keepdim=True) + eps)
    y = y.view(x.shape) * weight.to(dtype).view(of_channel) + bias.to(dtype).view(of_channel)
    return torch.empty_like(x).copy_(torch.nn.functional.silu(y) if silu else y)
