# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written
from .mixed_res_attn import SCORES_AT_ONCE, softmax


@as_written
def sparse_cross_attn(q, k, v, region, text_mask, scale):
    """softmax(q k^T scale) v over the text tokens that each query's region sees; fp32, float64 for float64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, queries, heads, dim = q.shape
    out = q.new_zeros((batch, queries, heads, dim))
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=dtype)
    # By region, so that a query reads nothing but what it sees: 0 * NaN is not 0.
    for b in range(batch):
        for r in range(text_mask.shape[1]):
            sees = text_mask[b, r].nonzero()[:, 0]
            keys, values = k[b, sees].to(dtype).permute(1, 2, 0), v[b, sees].to(dtype).transpose(0, 1)
            chunk = max(1, SCORES_AT_ONCE // max(1, heads * sees.numel()))
            for rows in (region[b] == r).nonzero()[:, 0].split(chunk):
                weight, total, lse[b, :, rows] = softmax((q[b, rows].to(dtype).transpose(0, 1) @ keys).mul_(scale))
                out[b, rows] = (weight @ values / total).transpose(0, 1).to(q.dtype)
    return out, lse
