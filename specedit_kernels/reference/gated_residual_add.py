# SPDX-License-Identifier: Apache-2.0
import torch

from ._modulation import modulation_rows
from ._precision import as_written
from .gather_tokens import gather_tokens
from .scatter_tokens import scatter_tokens_


@as_written
def gated_residual_add_(residual, x, gate, modulation_index, index):
    """residual += gate * x on the rows that `index` names, in fp32 (float64 stays float64), rounded once."""
    if residual.numel() == 0 or x.numel() == 0:
        return
    dtype = torch.promote_types(residual.dtype, torch.float32)
    tokens, rows = None, residual
    if index is not None:
        tokens = index.clamp_min(0).long()
        rows = gather_tokens(residual, index, index.shape[1])
    total = (rows.to(dtype) + modulation_rows(gate, modulation_index, tokens, dtype) * x.to(dtype)).to(residual.dtype)
    if index is None:
        residual.copy_(total)
    else:
        scatter_tokens_(residual, total, index)
