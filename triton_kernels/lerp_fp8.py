# SPDX-License-Identifier: Apache-2.0
"""Interpolation between e4m3 numbers: one pass over all three, bound by memory."""

import torch
import triton
import triton.language as tl

from ._fp8 import has_e4m3, to_e4m3

_TILE = 4096  # numbers of a program


@triton.jit(do_not_specialize=["heads", "rows"])
def _lerp_fp8_kernel(
    out_ptr, out_scale_ptr, a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, weight_ptr,
    stride_ob, stride_oh, stride_om, stride_ab, stride_ah, stride_am, stride_bb, stride_bh, stride_bm,
    stride_osb, stride_osh, stride_asb, stride_ash, stride_bsb, stride_bsh,
    heads, rows, size_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(size_n, BLOCK_N)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    mask = (m < rows)[:, None] & (n < size_n)[None, :]
    x = tl.load(a_ptr + b * stride_ab + h * stride_ah + (m * stride_am)[:, None] + n[None, :], mask=mask, other=0.0)
    y = tl.load(b_ptr + b * stride_bb + h * stride_bh + (m * stride_bm)[:, None] + n[None, :], mask=mask, other=0.0)
    x_scale = tl.load(a_scale_ptr + b * stride_asb + h * stride_ash)
    y_scale = tl.load(b_scale_ptr + b * stride_bsb + h * stride_bsh)
    weight = tl.load(weight_ptr)
    top = tl.maximum(x_scale, y_scale)
    z = x.to(tl.float32) * (x_scale / top * (1 - weight)) + y.to(tl.float32) * (y_scale / top * weight)
    z = to_e4m3(z, HARDWARE)
    tl.store(out_ptr + b * stride_ob + h * stride_oh + (m * stride_om)[:, None] + n[None, :], z, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(out_scale_ptr + b * stride_osb + h * stride_osh, top)


def tile(rows, columns):
    """(BLOCK_M, BLOCK_N) for [rows, columns] of a head."""
    block_n = min(triton.next_power_of_2(columns), 256)
    return min(triton.next_power_of_2(rows), _TILE // block_n), block_n


def lerp_fp8_(out, out_scale, a, a_scale, b, b_scale, weight):
    """e4m3 [B, S, H, ...], what follows H contiguous; scales fp32 [B, 1, H], weight fp32 []."""
    if out.numel() == 0:
        return
    out, a, b = (x.flatten(3).transpose(1, 2) for x in (out, a, b))
    batch, heads, rows, columns = out.shape
    block_m, block_n = tile(rows, columns)
    with torch.cuda.device_of(out):
        _lerp_fp8_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n), batch * heads)](
            out.view(torch.uint8), out_scale, a, a_scale, b, b_scale, weight,
            *(stride for x in (out, a, b) for stride in x.stride()[:3]),
            *(stride for x in (out_scale, a_scale, b_scale) for stride in x.stride()[::2]),
            heads, rows, columns,
            BLOCK_M=block_m, BLOCK_N=block_n, HARDWARE=has_e4m3(out.device), num_warps=4,
        )  # fmt: skip
