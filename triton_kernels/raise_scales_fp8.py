# SPDX-License-Identifier: Apache-2.0
"""The largest numbers of heads, joined over programs: v read once, bound by memory.

Numbers that are not negative are in the order of their bits, with NaN above infinity, so that the maxima are of
integers: their order does not matter, and NaN passes on.
"""

import math

import torch
import triton
import triton.language as tl

LARGEST = 448.0
_TILE = 8192  # numbers of a program


@triton.jit
def _bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _raise(scale_ptr, bits, factor, mask):
    """Scales at least those of these bits, times a factor."""
    scale = bits.to(tl.float32, bitcast=True) * factor
    tl.atomic_max(scale_ptr.to(tl.pointer_type(tl.int32)), scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask=mask)


@triton.jit
def _raise_of_weight(scale_ptr, weight_ptr, heads, dim, factor, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    d, h = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    if weight_ptr is None:
        bits = tl.full([], 0x3F800000, tl.int32)
    else:
        bits = tl.max(_bits(tl.load(weight_ptr + d, mask=d < dim, other=0.0)), 0)
    _raise(scale_ptr + h, tl.broadcast_to(bits, [BLOCK_H]), factor, h < heads)


@triton.jit(do_not_specialize=["rows", "q_heads", "heads"])
def _raise_scales_fp8_kernel(
    q_scale_ptr, k_scale_ptr, v_scale_ptr, v_ptr, q_weight_ptr, k_weight_ptr,
    stride_qb, stride_kb, stride_sb, stride_vb, stride_vn, stride_vh,
    rows, q_heads, heads, dim, of_norm, of_v,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    v = v_ptr + b * stride_vb + h.to(tl.int64) * stride_vh + (n.to(tl.int64) * stride_vn)[:, None] + d[None, :]
    bits = _bits(tl.load(v, mask=(n < rows)[:, None] & (d < dim)[None, :], other=0.0))
    top = tl.max(tl.max(bits, 1), 0)
    one = tl.arange(0, 1)
    _raise(v_scale_ptr + b * stride_sb + h + one, tl.broadcast_to(top, [1]), of_v, one == 0)
    if (tl.program_id(0) == 0) & (h == 0):
        _raise_of_weight(q_scale_ptr + b * stride_qb, q_weight_ptr, q_heads, dim, of_norm, BLOCK_H, BLOCK_D)
        _raise_of_weight(k_scale_ptr + b * stride_kb, k_weight_ptr, heads, dim, of_norm, BLOCK_H, BLOCK_D)


def tile(rows, dim):
    """(BLOCK_N, BLOCK_D) of a head's rows."""
    block_d = triton.next_power_of_2(dim)
    return min(triton.next_power_of_2(max(rows, 1)), max(1, _TILE // block_d)), block_d


def raise_scales_fp8_(q_scale, k_scale, v_scale, v, q_weight, k_weight, headroom):
    """Scales fp32 [B, 1, H], v [B, N, Hk, D], last dimensions contiguous; weights [D] or None."""
    batch, rows, heads, dim = v.shape
    if batch == 0:
        return
    block_n, block_d = tile(rows, dim)
    with torch.cuda.device_of(v):
        _raise_scales_fp8_kernel[(max(1, triton.cdiv(rows, block_n)), batch * heads)](
            q_scale, k_scale, v_scale, v, q_weight, k_weight, q_scale.stride(0), k_scale.stride(0), v_scale.stride(0),
            *v.stride()[:3], rows, q_scale.shape[2], heads, dim, math.sqrt(dim) / LARGEST, headroom / LARGEST,
            BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_H=triton.next_power_of_2(max(q_scale.shape[2], heads)),
            num_warps=4,
        )  # fmt: skip
