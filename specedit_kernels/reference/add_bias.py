# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def add_bias_(x, bias, residual, residual_bias):
    """x += bias, and residual + residual_bias where given, in fp32 (float64 stays float64), rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_channel = (-1, *[1] * (x.dim() - 2))
    total = x.to(dtype) + bias.to(dtype).view(of_channel)
    if residual is not None:
        more = residual.to(dtype)
        total += more if residual_bias is None else more + residual_bias.to(dtype).view(of_channel)
    x.copy_(total)
