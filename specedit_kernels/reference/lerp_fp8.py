# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def lerp_fp8_(out, out_scale, a, a_scale, b, b_scale, weight):
    """out = lerp(a * a_scale, b * b_scale, weight) / out_scale, out_scale = max(a_scale, b_scale)."""
    top = torch.maximum(a_scale, b_scale)
    near, far, over = (
        x.reshape(*x.shape, *[1] * (out.dim() - 3)) for x in (a_scale * (1 - weight), b_scale * weight, top)
    )
    y = (a.float() * near + b.float() * far) / over
    largest = torch.finfo(out.dtype).max
    out.copy_(y.clamp(-largest, largest))
    out_scale.copy_(top)
