# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def channel_rms_norm(x, weight, bias, eps, silu, x_bias):
    """(x + x_bias) / max(its length, eps) * sqrt(C) * weight + bias over channels, and SiLU where asked for, in fp32
    (float64 stays float64), rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def of_channel(vector):
        return vector.to(dtype).view(-1, *[1] * (x.dim() - 2))

    biased = x.to(dtype) if x_bias is None else x.to(dtype) + of_channel(x_bias)
    length = torch.linalg.vector_norm(biased, dim=1, keepdim=True).clamp_min(eps)
    y = biased * (x.shape[1] ** 0.5 / length) * of_channel(weight)
    y = y if bias is None else y + of_channel(bias)
    return torch.empty_like(x).copy_(torch.nn.functional.silu(y) if silu else y)
