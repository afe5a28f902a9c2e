# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn.functional as F

from .adaln_modulate import adaln_modulate

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def before_rounding(x, scale, shift, modulation_index, before, gelu, eps):
    """What `quantize_fp8` rounds: fp32, or float64 for a float64 x."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        z = adaln_modulate(z, scale, shift, modulation_index, None, eps)
    if gelu:
        z = F.gelu(z, approximate="tanh")
    return z if before is None else torch.cat([before.to(z.dtype), z], dim=-1)


def quantize_fp8(x, scale, shift, modulation_index, before, gelu, eps):
    """e4m3 values and the fp32 scale of each row, its largest magnitude / 448."""
    z = before_rounding(x, scale, shift, modulation_index, before, gelu, eps)
    row_scale = (z.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    values = (z / row_scale).clamp(-LARGEST, LARGEST)
    # inf / inf is no number
    values = torch.where(z.isinf(), z.sign() * LARGEST, values)
    return values.to(E4M3).contiguous(), row_scale.to(torch.float32).contiguous()
