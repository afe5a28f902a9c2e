# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written
from .scatter_tokens import scatter_tokens_


def _norm_rope(x, weight, cos, sin, split, eps):
    """RMSNorm and rotation of x [B, N, H, D], in fp32 (float64 stays float64) with one rounding at the end."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        weight = weight.to(y.dtype)
        if weight.dim() == 2:
            second = torch.arange(x.shape[1], device=x.device) >= split
            weight = weight[second.long()][:, None]  # [N, 1, D]
        y = y * weight
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


@as_written
def qk_norm_rope_scatter_(
    q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index, eps
):
    """Norm and rotate q and k, then write q, k and v to their rows in place."""
    rows = q.shape[1]
    for out, index, fresh in (
        (q_out, q_out_index, _norm_rope(q, q_weight, cos, sin, split, eps)),
        (k_out, kv_out_index, _norm_rope(k, k_weight, cos, sin, split, eps)),
        (v_out, kv_out_index, v),
    ):
        if index is None:
            out[:, :rows] = fresh
        else:
            scatter_tokens_(out, fresh, index[:, :rows])
