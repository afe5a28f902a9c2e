# SPDX-License-Identifier: Apache-2.0
"""Attention to the text tokens that a region sees, in Triton.

A first kernel lists the tokens that each region sees. In the second a program takes a tile of queries of one head and,
region by region, runs the online softmax of FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1) in base 2 over
the listed tokens alone. A tile whose queries have no region writes its zeros and ends.
"""

import torch
import triton
import triton.language as tl

# (BLOCK_M, BLOCK_N, num_warps) by padded head dimension and whether inputs have 16 bits: chosen by what fits.
CONFIGS = {
    (64, True): (64, 32, 4), (128, True): (64, 32, 4), (256, True): (64, 32, 8),
    (64, False): (32, 32, 4), (128, False): (32, 32, 8), (256, False): (16, 16, 8),
}  # fmt: skip
BLOCK_T = 512  # text tokens that are listed at once


@triton.jit(do_not_specialize=["num_k", "regions"])
def _pack_kernel(
    mask_ptr, token_ptr, count_ptr, stride_mb, stride_mr, stride_mn, num_k, regions, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Of one region of one sample: the tokens that it sees, in order, and how many they are."""
    pid = tl.program_id(0)
    row_ptr = mask_ptr + (pid // regions).to(tl.int64) * stride_mb + (pid % regions) * stride_mr
    token_ptr += pid.to(tl.int64) * num_k
    count = 0
    for start in range(0, num_k, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        seen = tl.load(row_ptr + t * stride_mn, mask=t < num_k, other=0).to(tl.int32)
        tl.store(token_ptr + count + tl.cumsum(seen, 0) - seen, t, mask=seen != 0)
        count += tl.sum(seen, 0)
    tl.store(count_ptr + pid, count)


@triton.jit(do_not_specialize=["num_q", "num_k", "regions", "heads"])
def _sparse_cross_attn_kernel(
    q_ptr, k_ptr, v_ptr, region_ptr, token_ptr, count_ptr, out_ptr, lse_ptr, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_rb, stride_rn,
    num_q, num_k, regions, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    # Heads of the same queries side by side, as they lie in the output: most programs only write.
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    tiles = tl.cdiv(num_q, BLOCK_M)
    b = (tile // tiles).to(tl.int64)
    slot = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = slot < num_q
    rows = slot.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < HEAD_DIM)[None, :]
    region = tl.load(region_ptr + b * stride_rb + rows * stride_rn, mask=exists, other=-1)
    live = (region >= 0) & (region < regions)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        q_at = q_ptr + b * stride_qb + h * stride_qh + rows[:, None] * stride_qn + d[None, :]
        q = tl.load(q_at, mask=live[:, None] & in_head, other=0.0)
        unit = scale * LOG2_E
        for r in range(0, regions):
            mine = live & (region == r)
            if tl.max(mine.to(tl.int32), 0) > 0:
                row = b * regions + r
                count = tl.load(count_ptr + row)
                for start in range(0, count, BLOCK_N):
                    wanted = start + tl.arange(0, BLOCK_N)
                    valid = wanted < count
                    token = tl.load(token_ptr + row * num_k + wanted, mask=valid, other=0)
                    at = token.to(tl.int64)[:, None]
                    loaded = valid[:, None] & in_head
                    k_at = k_ptr + b * stride_kb + h * stride_kh + at * stride_kn + d[None, :]
                    v_at = v_ptr + b * stride_vb + h * stride_vh + at * stride_vn + d[None, :]
                    k = tl.load(k_at, mask=loaded, other=0.0)
                    v = tl.load(v_at, mask=loaded, other=0.0)
                    qk = tl.dot(q, tl.trans(k), input_precision="ieee") * unit
                    qk = tl.where(mine[:, None] & valid[None, :], qk, float("-inf"))
                    new_top = tl.maximum(top, tl.max(qk, 1))
                    # A row that has met no key yet has top -inf, and -inf - -inf is NaN: keep the pivot finite.
                    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
                    p = tl.exp2(qk - pivot[:, None])
                    alpha = tl.exp2(top - pivot)
                    total = total * alpha + tl.sum(p, 1)
                    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
                    top = new_top

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = tl.where(empty[:, None], 0.0, acc / total[:, None])
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) / LOG2_E)
    out_at = out_ptr + ((b * num_q + rows) * heads + h)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & in_head)
    tl.store(lse_ptr + (b * heads + h) * num_q + rows, lse, mask=exists)


def sparse_cross_attn(q, k, v, region, text_mask, scale):
    """q [B, Sq, H, D], k and v [B, St, H, D], region int32 [B, Sq], text_mask bool [B, R, St]. Returns (out, lse)."""
    batch, num_q, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    num_k, regions = k.shape[1], text_mask.shape[1]
    if num_k == 0 or regions == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, num_warps = CONFIGS[max(64, block_d), q.element_size() == 2]
    token = torch.empty((batch, regions, num_k), dtype=torch.int32, device=q.device)
    count = torch.empty((batch, regions), dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        _pack_kernel[(batch * regions,)](
            text_mask.view(torch.uint8), token, count, *text_mask.stride(), num_k, regions, BLOCK_T=BLOCK_T,
            num_warps=4,
        )  # fmt: skip
        _sparse_cross_attn_kernel[(batch * triton.cdiv(num_q, block_m) * heads,)](
            q, k, v, region, token, count, out, lse, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *region.stride(),
            num_q, num_k, regions, heads,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=2,
        )  # fmt: skip
    return out, lse
