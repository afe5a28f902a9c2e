# SPDX-License-Identifier: Apache-2.0
"""Attention to the text tokens that a region sees, in Triton.

A first kernel lists each region's queries and the tokens that it sees. In the second, some programs write the zeros of
queries without a region, and do not wait for the first kernel; the others take tiles of listed queries of one head and
run the online softmax of FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1) in base 2 over the listed tokens
alone. So the products are as many as the regions' queries need, however these are scattered. The list of a tile's
tokens is loaded one tile ahead, so that loads of keys and values do not wait for it.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ._softmax import softmax_step

# (BLOCK_M, BLOCK_N, FEW, num_warps, num_stages) by padded head dimension and whether inputs have 16 bits. FEW: up to so
# many tokens are one tile of their own, smaller than BLOCK_N; 0: no such tile. "large": sm_90 and sm_100, with 227 KB
# of shared memory a program; measured on an H200. Others: what fits.
CONFIGS = {
    "large": {(64, True): (64, 64, 32, 4, 3), (128, True): (128, 64, 32, 8, 3)},
    "small": {
        (64, True): (64, 32, 0, 4, 2), (128, True): (64, 32, 0, 4, 2), (256, True): (64, 32, 0, 8, 1),
        (64, False): (32, 32, 0, 4, 1), (128, False): (32, 32, 0, 8, 1), (256, False): (16, 16, 0, 8, 1),
    },
}  # fmt: skip
BLOCK_L = 4096  # queries or tokens that are listed at once, at most
ROWS = 32  # queries whose zeros a program writes
ATTENDERS = 2  # programs that attend, by multiprocessor


@triton.jit
def _list(value_ptr, stride, wanted, entry_ptr, num, BLOCK_L: tl.constexpr):
    """Write the places, in order, at which the values are `wanted`; returns how many they are."""
    count = 0
    for start in range(0, num, BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        found = ((tl.load(value_ptr + at * stride, mask=at < num, other=-1).to(tl.int32) == wanted) & (at < num)).to(
            tl.int32
        )
        tl.store(entry_ptr + count + tl.cumsum(found, 0) - found, at, mask=found != 0)
        count += tl.sum(found, 0)
    return count


@triton.jit(do_not_specialize=["num_q", "num_k", "regions"])
def _list_kernel(
    region_ptr, mask_ptr, query_ptr, token_ptr, count_ptr, stride_rb, stride_rn, stride_mb, stride_mr, stride_mn,
    num_q, num_k, regions, BLOCK_L: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Of one region of one sample: the queries in it and the tokens that it sees, and how many they are."""
    if EARLY:
        cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    b, r = (pid // 2 // regions).to(tl.int64), pid // 2 % regions
    row = (pid // 2).to(tl.int64)
    if pid % 2 == 0:
        found = _list(region_ptr + b * stride_rb, stride_rn, r, query_ptr + row * num_q, num_q, BLOCK_L)
    else:
        found = _list(mask_ptr + b * stride_mb + r * stride_mr, stride_mn, 1, token_ptr + row * num_k, num_k, BLOCK_L)
    tl.store(count_ptr + pid, found)


@triton.jit
def _tile(
    q, k_ptr, v_ptr, stride_kn, stride_vn, at, valid, unit, acc, total, top,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the tokens at `at`; returns (acc, total, top)."""
    d = tl.arange(0, BLOCK_D)
    loaded = valid[:, None] & (d < HEAD_DIM)[None, :]
    at = at.to(tl.int64)[:, None]
    k = tl.load(k_ptr + at * stride_kn + d[None, :], mask=loaded, other=0.0)
    v = tl.load(v_ptr + at * stride_vn + d[None, :], mask=loaded, other=0.0)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, kept, total, top = softmax_step(qk, valid, unit, total, top)
    return tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee"), total, top


@triton.jit
def _tiles(
    q, k_ptr, v_ptr, stride_kn, stride_vn, listed_ptr, at_next, tokens, unit, acc, total, top,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`_tile` over all listed tokens. at_next: where the first BLOCK_N of them are."""
    n = tl.arange(0, BLOCK_N)
    for start in range(0, tokens, BLOCK_N):
        at, place = at_next, start + BLOCK_N + n
        at_next = tl.load(listed_ptr + place, mask=place < tokens, other=0)
        acc, total, top = _tile(
            q, k_ptr, v_ptr, stride_kn, stride_vn, at, start + n < tokens, unit, acc, total, top, HEAD_DIM, BLOCK_D
        )
    return acc, total, top


@triton.jit(do_not_specialize=["num_q", "num_k", "regions", "samples", "fillers", "attenders"])
def _sparse_cross_attn_kernel(
    q_ptr, k_ptr, v_ptr, region_ptr, query_ptr, token_ptr, count_ptr, out_ptr, lse_ptr, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_rb, stride_rn,
    num_q, num_k, regions, heads, samples, fillers, attenders,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEW: tl.constexpr,
    ROWS: tl.constexpr, EARLY: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < HEAD_DIM)[None, :]
    if pid < fillers:
        groups = tl.cdiv(num_q, ROWS)
        b = (pid // groups).to(tl.int64)
        slot = (pid % groups) * ROWS + tl.arange(0, ROWS)
        region = tl.load(region_ptr + b * stride_rb + slot.to(tl.int64) * stride_rn, mask=slot < num_q, other=0)
        dead = (slot < num_q) & ((region < 0) | (region >= regions))
        out_at = out_ptr + (b * num_q + slot)[:, None] * heads * HEAD_DIM + d[None, :]
        lse_at = lse_ptr + b * heads * num_q + slot
        for h in range(0, heads):
            nothing = tl.zeros([ROWS, BLOCK_D], out_ptr.dtype.element_ty)
            tl.store(out_at + h * HEAD_DIM, nothing, mask=dead[:, None] & in_head)
            tl.store(lse_at + h * num_q, tl.full([ROWS], float("-inf"), tl.float32), mask=dead)
        if EARLY:
            cuda.gdc_wait()
    else:
        if EARLY:
            cuda.gdc_wait()
        unit = scale * LOG2_E
        first = pid - fillers
        for row32 in range(0, samples * regions):
            row = tl.full([], row32, tl.int64)
            queries, tokens = tl.load(count_ptr + 2 * row), tl.load(count_ptr + 2 * row + 1)
            # Asked for beside their count, not behind it: entries beyond the count are not used.
            n = tl.arange(0, FEW if FEW else BLOCK_N)
            listed_ptr = token_ptr + row * num_k
            first_at = tl.load(listed_ptr + n, mask=n < num_k, other=0)
            b = row // regions
            items = tl.cdiv(queries, BLOCK_M) * heads
            for item in range(first, items, attenders):
                h = tl.full([], item % heads, tl.int64)
                place = item // heads * BLOCK_M + tl.arange(0, BLOCK_M)
                used = place < queries
                slot = tl.load(query_ptr + row * num_q + place, mask=used, other=0).to(tl.int64)
                q_at = q_ptr + b * stride_qb + h * stride_qh + slot[:, None] * stride_qn + d[None, :]
                q = tl.load(q_at, mask=used[:, None] & in_head, other=0.0)
                if NEGATE:
                    # The largest score is taken before the scale, which must then be >= 0. A sign flip of q is exact.
                    q = -q
                acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                total = tl.zeros([BLOCK_M], dtype=tl.float32)
                top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
                k_of, v_of = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
                if FEW:
                    if tokens <= FEW:
                        acc, total, top = _tile(
                            q, k_of, v_of, stride_kn, stride_vn, first_at, n < tokens, unit, acc, total, top,
                            HEAD_DIM, BLOCK_D,
                        )  # fmt: skip
                    else:
                        wide = tl.arange(0, BLOCK_N)
                        wide_at = tl.load(listed_ptr + wide, mask=wide < tokens, other=0)
                        acc, total, top = _tiles(
                            q, k_of, v_of, stride_kn, stride_vn, listed_ptr, wide_at, tokens, unit, acc, total, top,
                            HEAD_DIM, BLOCK_D, BLOCK_N,
                        )  # fmt: skip
                else:
                    acc, total, top = _tiles(
                        q, k_of, v_of, stride_kn, stride_vn, listed_ptr, first_at, tokens, unit, acc, total, top,
                        HEAD_DIM, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                empty = total == 0.0
                total = tl.where(empty, 1.0, total)
                out = acc * (1.0 / total)[:, None]
                lse = tl.where(empty, float("-inf"), top * scale + tl.log(total))
                out_at = out_ptr + ((b * num_q + slot) * heads + h)[:, None] * HEAD_DIM + d[None, :]
                tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=used[:, None] & in_head)
                tl.store(lse_ptr + (b * heads + h) * num_q + slot, lse, mask=used)
            first = (first - items) % attenders
            first = tl.where(first < 0, first + attenders, first)


@cache
def _device(index):
    """(multiprocessors, whether a kernel can start before the one that it follows has ended, its configurations)."""
    small = CONFIGS["small"]
    if not torch.cuda.is_available():  # the interpreter
        return 2, False, small
    properties = torch.cuda.get_device_properties(index)
    configs = small | CONFIGS["large"] if properties.major in (9, 10) else small
    return properties.multi_processor_count, properties.major >= 9, configs


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
    processors, early, configs = _device(q.device.index)
    block_m, block_n, few, num_warps, num_stages = configs[max(64, block_d), q.element_size() == 2]
    rows = batch * regions
    block_l = min(BLOCK_L, max(1024, triton.next_power_of_2(max(num_q, num_k))))
    lists = torch.empty(rows * (num_q + num_k + 2), dtype=torch.int32, device=q.device)
    count, query, token = lists[: 2 * rows], lists[2 * rows : (2 + num_q) * rows], lists[(2 + num_q) * rows :]
    fillers = batch * triton.cdiv(num_q, ROWS)
    # all queries of one region at most, and a last tile in part for each other
    tiles = batch * (triton.cdiv(num_q, block_m) + regions - 1)
    attenders = min(tiles * heads, ATTENDERS * processors)
    early_launch = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(q):
        _list_kernel[(2 * rows,)](
            region, text_mask.view(torch.uint8), query, token, count, *region.stride(), *text_mask.stride(),
            num_q, num_k, regions, BLOCK_L=block_l, EARLY=early, num_warps=8,
        )  # fmt: skip
        _sparse_cross_attn_kernel[(fillers + attenders,)](
            q, k, v, region, query, token, count, out, lse, abs(scale),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *region.stride(),
            num_q, num_k, regions, heads, batch, fillers, attenders,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, FEW=few, ROWS=ROWS,
            EARLY=early, NEGATE=scale < 0, num_warps=num_warps, num_stages=num_stages, **early_launch,
        )  # fmt: skip
    return out, lse
