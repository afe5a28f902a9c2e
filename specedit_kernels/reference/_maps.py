# SPDX-License-Identifier: Apache-2.0
import torch


def of_channel(vector, x):
    """A vector [C] in the dtype of x [B, C, ...], of its dimensions."""
    return vector.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def biased(x, x_bias):
    """x + x_bias in fp32 (float64 stays float64); x_bias [C], None: nothing."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x_bias is None else x + of_channel(x_bias, x)
