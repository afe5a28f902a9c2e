# SPDX-License-Identifier: Apache-2.0
"""Rows in e4m3 with a scale each, in Triton: each row read once and written once, bound by memory.

The norm and modulation, or the GELU, in front are part of the same pass.
"""

import torch
import triton
import triton.language as tl

from ._fp8 import has_e4m3, to_e4m3
from ._modulation import by_row, modulation_of_row, optional_strides, tile


@triton.jit
def _magnitude(top, z):
    """The larger of top, int32 bits of magnitudes, and |z|: as integers NaN is above inf, and is not lost."""
    return tl.maximum(top, z.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _logistic(u, HARDWARE: tl.constexpr):
    """1 / (1 + 2^u). In as few instructions as there are: with a plain division the pass is bound by them."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 x; ex2.approx.ftz.f32 x, $1; add.f32 x, x, 0f3F800000; rcp.approx.ftz.f32 $0, x; }",
            "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp2(u))


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "vectors"])
def _quantize_fp8_kernel(
    x_ptr, before_ptr, scale_ptr, shift_ptr, modulation_ptr, y_ptr, row_scale_ptr,
    stride_xb, stride_xn, stride_xh, stride_bb, stride_bn, stride_bh,
    stride_scb, stride_scm, stride_shb, stride_shm, stride_mb, stride_mn,
    rows, tokens, heads, vectors, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BEFORE: tl.constexpr, BEFORE_BLOCK: tl.constexpr, BEFORE_CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr, GELU: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    exists = row < rows
    head = row % heads
    token = row // heads % tokens
    b = row // heads // tokens
    x_row = x_ptr + (b * stride_xb + token * stride_xn + head * stride_xh)[:, None]
    y_row = y_ptr + (row * (BEFORE + CHANNELS))[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    zs = ()
    for i in tl.static_range(CHUNKS):
        mask = exists[:, None] & (i * BLOCK + c < CHANNELS)
        zs = zs + (tl.load(x_row + i * BLOCK + c, mask=mask, other=0.0).to(tl.float32),)

    if scale_ptr is not None:
        if modulation_ptr is not None:
            modulation_ptr += b * stride_mb
        modulation, modulated = modulation_of_row(modulation_ptr, stride_mn, token, exists, vectors)
        scale_row = scale_ptr + (b * stride_scb + modulation * stride_scm)[:, None]
        shift_row = shift_ptr + (b * stride_shb + modulation * stride_shm)[:, None]
        # Asked for before the mean is known.
        scales = ()
        shifts = ()
        for i in tl.static_range(CHUNKS):
            mask = modulated[:, None] & (i * BLOCK + c < CHANNELS)
            scales = scales + (tl.load(scale_row + i * BLOCK + c, mask=mask, other=0.0).to(tl.float32),)
            shifts = shifts + (tl.load(shift_row + i * BLOCK + c, mask=mask, other=0.0).to(tl.float32),)
        total = tl.zeros([SLOTS, BLOCK], dtype=tl.float32)
        for i in tl.static_range(CHUNKS):
            total += zs[i]
        mean = (tl.sum(total, axis=1) / CHANNELS)[:, None]
        total = tl.zeros([SLOTS, BLOCK], dtype=tl.float32)
        for i in tl.static_range(CHUNKS):
            centred = tl.where(i * BLOCK + c < CHANNELS, zs[i] - mean, 0.0)
            total += centred * centred
        scaled = tl.rsqrt(tl.sum(total, axis=1) / CHANNELS + eps)[:, None]
        normed = ()
        for i in tl.static_range(CHUNKS):
            z = (zs[i] - mean) * scaled * (1.0 + scales[i]) + shifts[i]
            # Channels past the last one must not be a row's largest.
            normed = normed + (tl.where(i * BLOCK + c < CHANNELS, z, 0.0),)
        zs = normed
    if GELU:
        activated = ()
        for i in tl.static_range(CHUNKS):
            z = zs[i]
            # x (1 + tanh u) / 2 = x / (1 + exp(-2 u))
            u = z * (-2.302208198144325 - 0.10294323459973687 * z * z)
            activated = activated + (z * _logistic(u, HARDWARE),)
        zs = activated

    top = tl.zeros([SLOTS, BLOCK], dtype=tl.int32)
    for i in tl.static_range(CHUNKS):
        top = _magnitude(top, zs[i])
    top = tl.max(top, axis=1)
    if before_ptr is not None:
        before_row = before_ptr + (b * stride_bb + token * stride_bn + head * stride_bh)[:, None]
        before_c = tl.arange(0, BEFORE_BLOCK)[None, :]
        befores = ()
        before_top = tl.zeros([SLOTS, BEFORE_BLOCK], dtype=tl.int32)
        for i in tl.static_range(BEFORE_CHUNKS):
            mask = exists[:, None] & (i * BEFORE_BLOCK + before_c < BEFORE)
            before_x = tl.load(before_row + i * BEFORE_BLOCK + before_c, mask=mask, other=0.0)
            befores = befores + (before_x.to(tl.float32),)
            before_top = _magnitude(before_top, befores[i])
        top = tl.maximum(top, tl.max(before_top, axis=1))
    row_scale = top.to(tl.float32, bitcast=True) / 448.0
    row_scale = tl.where(row_scale < 1.1754943508222875e-38, 1.1754943508222875e-38, row_scale)
    tl.store(row_scale_ptr + row, row_scale, mask=exists)
    # Beside an infinity: 2^-140, which leaves it one, and makes 0 of what is finite.
    least = tl.full([SLOTS], 512, tl.int32).to(tl.float32, bitcast=True)
    factor = tl.where(row_scale == float("inf"), least, 1.0 / row_scale)[:, None]
    for i in tl.static_range(CHUNKS):
        mask = exists[:, None] & (i * BLOCK + c < CHANNELS)
        tl.store(y_row + BEFORE + i * BLOCK + c, to_e4m3(zs[i] * factor, HARDWARE), mask=mask)
    if before_ptr is not None:
        for i in tl.static_range(BEFORE_CHUNKS):
            mask = exists[:, None] & (i * BEFORE_BLOCK + before_c < BEFORE)
            tl.store(y_row + i * BEFORE_BLOCK + before_c, to_e4m3(befores[i] * factor, HARDWARE), mask=mask)


def _lead_strides(x):
    """Strides over the dimensions before the last one, seen as three."""
    return (0,) * (4 - x.dim()) + x.stride()[:-1]


def quantize_fp8(x, scale, shift, modulation_index, before, gelu, eps):
    """x [..., C] of up to 4 dimensions. Returns e4m3 [..., C0 + C] and fp32 [..., 1], contiguous."""
    channels, extra = x.shape[-1], 0 if before is None else before.shape[-1]
    lead = x.shape[:-1]
    values = torch.empty((*lead, extra + channels), dtype=torch.float8_e4m3fn, device=x.device)
    row_scale = torch.empty((*lead, 1), dtype=torch.float32, device=x.device)
    rows = row_scale.numel()
    if rows == 0:
        return values, row_scale
    # With a norm the dimensions are [B, N, C].
    if scale is None:
        _, tokens, heads = (1,) * (3 - len(lead)) + tuple(lead)
        strides, before_strides = _lead_strides(x), (0, 0, 0) if before is None else _lead_strides(before)
        scale_strides, shift_strides, vectors = (0, 0), (0, 0), 1
    else:
        tokens, heads = lead[1], 1
        strides = (*x.stride()[:2], 0)
        before_strides = (0, 0, 0) if before is None else (*before.stride()[:2], 0)
        (scale_strides, vectors), shift_strides = by_row(scale), by_row(shift)[0]
    slots, block, chunks, num_warps = tile(rows, channels, x.element_size())
    before_block = min(block, triton.next_power_of_2(max(extra, 1)))
    with torch.cuda.device_of(x):
        _quantize_fp8_kernel[(triton.cdiv(rows, slots),)](
            x, before, scale, shift, modulation_index, values.view(torch.uint8), row_scale,
            *strides, *before_strides, *scale_strides, *shift_strides, *optional_strides(modulation_index),
            rows, tokens, heads, vectors, eps,
            CHANNELS=channels, BLOCK=block, CHUNKS=chunks,
            BEFORE=extra, BEFORE_BLOCK=before_block, BEFORE_CHUNKS=triton.cdiv(extra, before_block),
            SLOTS=slots, GELU=gelu, HARDWARE=has_e4m3(x.device), num_warps=num_warps,
        )  # fmt: skip
    return values, row_scale
