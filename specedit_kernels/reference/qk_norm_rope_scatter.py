# SPDX-License-Identifier: Apache-2.0
import torch

from .._panels import PANEL
from .._words import as_words
from ._precision import as_written
from .scatter_tokens import scatter_tokens_

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def _norm_rope(x, weight, cos, sin, split, eps):
    """RMSNorm and rotation of x [B, N, H, D], in fp32 (float64 stays float64)."""
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
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _rounded(y, dtype, scale):
    """y [B, N, H, D] as it is written; scale: [B, 1, H] of e4m3, or None."""
    if scale is None:
        return y.to(dtype)
    y = y.to(torch.promote_types(y.dtype, torch.float32)) / scale[..., None]
    return y.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scatter_to_panels_(out, fresh, index):
    batch, rows = fresh.shape[:2]
    if index is None:
        index = torch.arange(rows, device=fresh.device).expand(batch, rows)
    b, i = torch.nonzero(index[:, :rows] >= 0, as_tuple=True)
    row = index[b, i].long()
    as_words(out)[b, row // PANEL, :, :, row % PANEL] = as_words(fresh)[b, i]


@as_written
def qk_norm_rope_scatter_(
    q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index, eps
):
    """Norm and rotate q and k, then write q, k and v to their rows in place."""
    qk_norm_rope_scatter_fp8_(
        q_out, k_out, v_out, q, k, v, None, None, None, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index,
        eps,
    )  # fmt: skip


@as_written
def qk_norm_rope_scatter_fp8_(
    q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, q_weight, k_weight, split, q_out_index,
    kv_out_index, eps,
):  # fmt: skip
    """The same in e4m3, over scales [B, 1, heads]; v_out [B, panels, Hk, D, PANEL]."""
    rows = q.shape[1]
    for out, index, fresh, scale in (
        (q_out, q_out_index, _norm_rope(q, q_weight, cos, sin, split, eps), q_scale),
        (k_out, kv_out_index, _norm_rope(k, k_weight, cos, sin, split, eps), k_scale),
        (v_out, kv_out_index, v, v_scale),
    ):
        fresh = _rounded(fresh, q.dtype, scale)
        if out.dim() == 5:
            _scatter_to_panels_(out, fresh, index)
        elif index is None:
            out[:, :rows] = fresh
        else:
            scatter_tokens_(out, fresh, index[:, :rows])
