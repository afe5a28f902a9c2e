# SPDX-License-Identifier: Apache-2.0
import torch

from ._modulation import modulation_rows
from ._precision import as_written
from .gather_tokens import gather_tokens


@as_written
def adaln_modulate(x, scale, shift, modulation_index, index, eps):
    """LN(x) * (1 + scale) + shift of the rows that `index` names, in fp32 (float64 stays float64), rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = None
    if index is not None:
        if x.shape[1] == 0:
            return x.new_zeros((*index.shape, x.shape[2]))
        x = gather_tokens(x, index, index.shape[1])
        tokens = index.clamp_min(0).long()
    y = x.to(dtype)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * (1 + modulation_rows(scale, modulation_index, tokens, dtype))
    y = y + modulation_rows(shift, modulation_index, tokens, dtype)
    if index is not None:
        y = torch.where((index >= 0)[..., None], y, 0)
    return y.to(x.dtype).contiguous()
