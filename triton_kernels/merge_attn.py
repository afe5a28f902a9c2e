# SPDX-License-Identifier: Apache-2.0
"""Join the attention over two disjoint key sets, in Triton: one pass over both outputs, bound by memory."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_q", "num_rows"])
def _merge_kernel(
    a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, out_ptr, lse_ptr,
    stride_ab, stride_an, stride_ah, stride_alb, stride_alh, stride_aln,
    stride_bb, stride_bn, stride_bh, stride_blb, stride_blh, stride_bln,
    heads, num_q, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Rows in the order of memory, (batch, query, head), so that both reads and the write are streams.
    # Row numbers fit 32 bits (2^31 rows of 32 B would not fit a GPU), offsets do not.
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    exists = r < num_rows
    h = (r % heads).to(tl.int64)
    n = (r // heads % num_q).to(tl.int64)
    b = (r // heads // num_q).to(tl.int64)
    r = r.to(tl.int64)
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    a_lse = tl.load(a_lse_ptr + b * stride_alb + h * stride_alh + n * stride_aln, mask=exists, other=0.0)
    b_lse = tl.load(b_lse_ptr + b * stride_blb + h * stride_blh + n * stride_bln, mask=exists, other=0.0)
    a = tl.load(a_ptr + (b * stride_ab + n * stride_an + h * stride_ah)[:, None] + d[None, :], mask=mask, other=0.0)
    b_ = tl.load(b_ptr + (b * stride_bb + n * stride_bn + h * stride_bh)[:, None] + d[None, :], mask=mask, other=0.0)

    no_a = a_lse == float("-inf")
    no_b = b_lse == float("-inf")
    top = tl.maximum(a_lse, b_lse, propagate_nan=tl.PropagateNan.ALL)
    pivot = tl.where(no_a & no_b, 0.0, top)
    a_weight = tl.exp(a_lse - pivot)
    b_weight = tl.exp(b_lse - pivot)
    total = tl.where(no_a & no_b, 1.0, a_weight + b_weight)
    unknown = (a_lse != a_lse) | (b_lse != b_lse)
    joined = (a.to(tl.float32) * a_weight[:, None] + b_.to(tl.float32) * b_weight[:, None]) / total[:, None]
    # A half without keys leaves the other as it is, bit for bit; two such halves give 0 and -inf.
    out = joined.to(out_ptr.dtype.element_ty)
    out = tl.where(no_a[:, None], b_, out)
    out = tl.where(no_b[:, None], a, out)
    out = tl.where((no_a & no_b)[:, None], 0.0, out)
    out = tl.where(unknown[:, None], float("nan"), out)
    lse = tl.where(no_a, b_lse, tl.where(no_b, a_lse, top + tl.log(total)))
    lse = tl.where(unknown, float("nan"), lse)
    tl.store(out_ptr + r[:, None] * HEAD_DIM + d[None, :], out, mask=mask)
    tl.store(lse_ptr + (b * heads + h) * num_q + n, lse, mask=exists)


def merge_attn(out_a, lse_a, out_b, lse_b):
    """Launch the merge. Shapes as in the op: out [B, Nq, H, D] or [T, H, D], lse fp32 [B, H, Nq] or [H, T]."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if lse.numel() == 0:
        return out, lse
    if out_a.ndim == 3:
        out_a, lse_a, out_b, lse_b = out_a[None], lse_a[None], out_b[None], lse_b[None]
    batch, num_q, heads, head_dim = out_a.shape
    block_d = max(1, triton.next_power_of_2(head_dim))
    # 4096 elements a program: four 16 B loads of either half in flight for each of 128 threads, in 16-bit types.
    block_r = max(1, 4096 // block_d)
    num_rows = batch * num_q * heads
    with torch.cuda.device_of(out_a):
        _merge_kernel[(triton.cdiv(num_rows, block_r),)](
            out_a, lse_a, out_b, lse_b, out, lse,
            out_a.stride(0), out_a.stride(1), out_a.stride(2), *lse_a.stride(),
            out_b.stride(0), out_b.stride(1), out_b.stride(2), *lse_b.stride(),
            heads, num_q, num_rows,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip
    return out, lse
