# SPDX-License-Identifier: Apache-2.0
import torch


def dequantize(x, dtype, scale):
    """x, by its scale, in another dtype."""
    if scale is None:
        return x.to(dtype)
    scale = scale.to(torch.float32)
    return (x.to(torch.float32) * (scale.reshape(()) if scale.numel() == 1 else scale)).to(dtype)
