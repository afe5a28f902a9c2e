# SPDX-License-Identifier: Apache-2.0
"""Interpolation between two tensors: two reads and a write, bound by memory."""

import torch
import triton
import triton.language as tl

_TILE_BYTES = 8192  # of each tensor, a program


@triton.jit(do_not_specialize=["rows", "heads"])
def _lerp_kernel(
    out_ptr, a_ptr, b_ptr, weight_ptr,
    stride_ob, stride_on, stride_oh, stride_ab, stride_an, stride_ah, stride_bb, stride_bn, stride_bh,
    rows, heads, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(size, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    n, h = (m // heads).to(tl.int64), (m % heads).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    mask = (n < rows)[:, None] & (c < size)[None, :]
    a_row = a_ptr + sample * stride_ab + (n * stride_an + h * stride_ah)[:, None]
    b_row = b_ptr + sample * stride_bb + (n * stride_bn + h * stride_bh)[:, None]
    a = tl.load(a_row + c[None, :], mask=mask, other=0.0)
    b = tl.load(b_row + c[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr)
    a, b = a.to(tl.float32), b.to(tl.float32)
    # from the nearer end, so that both ends are exact
    between = tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))
    out_row = out_ptr + sample * stride_ob + (n * stride_on + h * stride_oh)[:, None]
    tl.store(out_row + c[None, :], between.to(out_ptr.dtype.element_ty), mask=mask)


def tile(rows, size, element_size):
    """(BLOCK_M, BLOCK_N) for rows of `size` numbers."""
    numbers = _TILE_BYTES // element_size
    block_n = min(triton.next_power_of_2(size), 1024, numbers)
    return min(triton.next_power_of_2(rows), numbers // block_n), block_n


def lerp_(out, a, b, weight):
    """[B, N, C] or [B, N, H, D] each, the last dimension contiguous; weight fp32 []."""
    if out.numel() == 0:
        return
    if all(x[:1, :1].is_contiguous() for x in (out, a, b)):
        out, a, b = (x.flatten(2) for x in (out, a, b))
    if out.dim() == 3:
        out, a, b = (x[:, :, None] for x in (out, a, b))
    batch, rows, heads, size = out.shape
    block_m, block_n = tile(rows * heads, size, out.element_size())
    with torch.cuda.device_of(out):
        _lerp_kernel[(triton.cdiv(rows * heads, block_m) * triton.cdiv(size, block_n), batch)](
            out, a, b, weight, *(stride for x in (out, a, b) for stride in x.stride()[:3]), rows, heads, size,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
