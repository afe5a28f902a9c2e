# SPDX-License-Identifier: Apache-2.0
import torch

from specedit_kernels.reference.mixed_res_attn import SCORES_AT_ONCE


def sparse_cross_attn(q, k, v, region, text_mask, scale):
    """softmax(q k^T scale) v over the text tokens that each query's region sees; fp32, float64 for float64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, queries, heads, dim = q.shape
    tokens, regions = k.shape[1], text_mask.shape[1]
    # Tokens that no region sees may hold anything, NaN too: they are never read.
    read = text_mask.any(1)[:, :, None, None]
    k = k.to(dtype).masked_fill(~read, 0).permute(0, 2, 3, 1)  # [B, H, D, St]
    v = v.to(dtype).masked_fill(~read, 0).permute(0, 2, 1, 3)  # [B, H, St, D]
    out = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=dtype, device=q.device)
    known = (region >= 0) & (region < regions)
    # One row more, which sees nothing, for the queries without a region.
    seen = torch.cat([text_mask, torch.zeros_like(text_mask[:, :1])] if regions else
                     [text_mask.new_zeros((batch, 1, tokens))], 1)
    row = torch.where(known, region, regions).long()
    chunk = max(1, SCORES_AT_ONCE // max(1, batch * heads * tokens))
    for start in range(0, queries, chunk):
        part = slice(start, start + chunk)
        sees = seen.gather(1, row[:, part, None].expand(-1, -1, tokens))  # [B, n, St]
        score = (q[:, part].to(dtype).masked_fill(~known[:, part, None, None], 0).transpose(1, 2) @ k).mul_(scale)
        score.masked_fill_(~sees[:, None], float("-inf"))
        total = score.logsumexp(-1)
        weight = score.sub_(total.masked_fill(total == float("-inf"), 0).unsqueeze(-1)).exp_()
        out[:, part] = (weight @ v).transpose(1, 2).to(q.dtype)
        lse[:, :, part] = total
    return out, lse
