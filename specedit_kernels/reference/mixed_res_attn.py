# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written
from .gather_tokens import gather_tokens
from .scatter_tokens import scatter_tokens_

# Scores held at once: keeps a full-size call (24 heads, 8704 x 8704) within about 256 MB of fp32.
SCORES_AT_ONCE = 1 << 26


def softmax(score):
    """(weights, their sums, lse) over the last dimension of ``score``, which is overwritten: exp(score - max).

    The sums divide what the weights are multiplied with, and are no part of an exponent: beside a large score a log of
    a sum is lost to rounding. Without a key: weights 0, sum 1, lse -inf.
    """
    if score.shape[-1] == 0:
        return score, score.new_ones((*score.shape[:-1], 1)), score.new_full(score.shape[:-1], float("-inf"))
    top = score.amax(-1, keepdim=True)
    weight = score.sub_(top.masked_fill(top == float("-inf"), 0)).exp_()
    total = weight.sum(-1, keepdim=True)
    total.masked_fill_(top == float("-inf"), 1)
    return weight, total, (top + total.log()).squeeze(-1)


def _attend(q, k, v, key_bias, key_valid, query_valid, scale):
    """Padded attention on rows already gathered: q [B, Nq, H, D]; key_bias [B, Nk] or None; *_valid bool or None."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    k, v = k.to(dtype), v.to(dtype)
    bias = None if key_bias is None else key_bias.to(dtype)
    if key_valid is not None:
        # Rows of empty slots may hold anything, NaN too.
        k, v = (x.masked_fill(~key_valid[:, :, None, None], 0) for x in (k, v))
        bias = torch.zeros_like(key_valid, dtype=dtype) if bias is None else bias
        bias = bias.masked_fill(~key_valid, float("-inf"))
    k = k.permute(0, 2, 3, 1).unsqueeze(2)  # [B, Hk, 1, D, Nk]
    v = v.permute(0, 2, 1, 3).unsqueeze(2)  # [B, Hk, 1, Nk, D]
    out = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=dtype, device=q.device)
    chunk = max(1, SCORES_AT_ONCE // max(1, batch * heads * keys))
    for start in range(0, queries, chunk):
        rows = slice(start, start + chunk)
        part = q[:, rows].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hk, G, n, D]
        score = (part @ k).mul_(scale)
        if bias is not None:
            score += bias[:, None, None, None, :]
        weight, total, part_lse = softmax(score)
        out[:, rows] = (weight @ v / total).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
        lse[:, :, rows] = part_lse.flatten(1, 2)
    if query_valid is not None:
        out.masked_fill_(~query_valid[:, :, None, None], 0)
        lse.masked_fill_(~query_valid[:, None, :], float("-inf"))
    return out, lse


def _valid(batch, slots, index, lens, device):
    """bool [B, slots] of the slots that hold a row; None where all do."""
    valid = None
    if index is not None:
        valid = index >= 0
    if lens is not None:
        within = torch.arange(slots, device=device) < lens[:, None]
        valid = within if valid is None else valid & within
    return valid


def _padded(q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens, scale):
    if q_index is not None:
        q = gather_tokens(q, q_index, q_index.shape[1])
    if kv_index is not None:
        k, v = (gather_tokens(x, kv_index, kv_index.shape[1]) for x in (k, v))
        if key_bias is not None:
            key_bias = gather_tokens(key_bias, kv_index, kv_index.shape[1])
    batch, queries = q.shape[:2]
    query_valid = _valid(batch, queries, q_index, q_lens, q.device)
    key_valid = _valid(batch, k.shape[1], kv_index, kv_lens, q.device)
    return _attend(q, k, v, key_bias, key_valid, query_valid, scale)


def _packed_slots(cu_seqlens, longest, lens):
    """int32 [B, longest]: the packed row of each slot of the padded layout, -1 past a sequence's end."""
    start, length = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    if lens is not None:
        length = torch.minimum(length, lens[:, None])
    slot = torch.arange(longest, dtype=torch.int32, device=cu_seqlens.device)
    return torch.where(slot < length, start + slot, -1)


@as_written
def mixed_res_attn(
    q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale
):
    """softmax(q k^T scale + key_bias) v over the rows that the slots name; in fp32, or float64 for float64 inputs."""
    if cu_seqlens_q is None:
        return _padded(q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens, scale)
    rows, heads, dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    q_slots = _packed_slots(cu_seqlens_q, max_seqlen_q, q_lens)
    k_slots = _packed_slots(cu_seqlens_k, max_seqlen_k, kv_lens)
    q, k, v = (x.expand(batch, *x.shape) for x in (q, k, v))
    if key_bias is not None:
        key_bias = key_bias.expand(batch, -1)
    padded, padded_lse = _padded(q, k, v, key_bias, q_slots, k_slots, None, None, scale)
    out = padded.new_zeros((1, rows, heads, dim))
    lse = padded_lse.new_full((1, rows, heads), float("-inf"))
    slots = q_slots.view(1, -1)
    scatter_tokens_(out, padded.flatten(0, 1)[None], slots)
    scatter_tokens_(lse, padded_lse.transpose(1, 2).flatten(0, 1)[None], slots)
    return out[0], lse[0].t().contiguous()


@as_written
def mixed_res_attn_scatter_(
    out,
    q,
    k,
    v,
    out_index,
    key_bias,
    q_index,
    kv_index,
    q_lens,
    kv_lens,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
):
    """`mixed_res_attn` whose row i is written to out[b, out_index[b, i]]."""
    rows, lse = _padded(q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens, scale)
    scatter_tokens_(out, rows, out_index)
    return lse
