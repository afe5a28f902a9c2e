# SPDX-License-Identifier: Apache-2.0
"""Adaptive layer norm of gathered rows, in Triton: each token read once and written once, bound by memory."""

import torch
import triton
import triton.language as tl

from ._modulation import by_row, modulation_of_row, optional_strides, tile
from ._rows import row_of_slot


@triton.jit(do_not_specialize=["rows", "slots", "vectors"])
def _adaln_modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, modulation_ptr, index_ptr, y_ptr,
    stride_xb, stride_xn, stride_scb, stride_scm, stride_shb, stride_shm, stride_mb, stride_mn, stride_ib, stride_in,
    rows, slots, vectors, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slots, SLOTS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    slot = (tl.program_id(0) % blocks) * SLOTS + tl.arange(0, SLOTS)
    if index_ptr is not None:
        index_ptr += b * stride_ib
    if modulation_ptr is not None:
        modulation_ptr += b * stride_mb
    row, filled = row_of_slot(index_ptr, stride_in, slot, slot < slots, rows)
    modulation, modulated = modulation_of_row(modulation_ptr, stride_mn, row, filled, vectors)
    x_row = x_ptr + (b * stride_xb + row * stride_xn)[:, None]
    scale_row = scale_ptr + (b * stride_scb + modulation * stride_scm)[:, None]
    shift_row = shift_ptr + (b * stride_shb + modulation * stride_shm)[:, None]
    y_row = y_ptr + ((b * slots + slot) * CHANNELS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]

    # All is asked for before the mean needs the first of it; the token before its modulation, whose row may still be
    # on its way.
    xs = ()
    scales = ()
    shifts = ()
    for i in tl.static_range(CHUNKS):
        mask = filled[:, None] & (i * BLOCK + c < CHANNELS)
        xs = xs + (tl.load(x_row + i * BLOCK + c, mask=mask, other=0.0),)
    for i in tl.static_range(CHUNKS):
        mask = modulated[:, None] & (i * BLOCK + c < CHANNELS)
        scales = scales + (tl.load(scale_row + i * BLOCK + c, mask=mask, other=0.0),)
        shifts = shifts + (tl.load(shift_row + i * BLOCK + c, mask=mask, other=0.0),)

    total = tl.zeros([SLOTS, BLOCK], dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        total += xs[i].to(tl.float32)
    mean = (tl.sum(total, axis=1) / CHANNELS)[:, None]
    # The squares of differences, not a difference of squares: the mean may be far larger than the deviation.
    total = tl.zeros([SLOTS, BLOCK], dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        centred = tl.where(i * BLOCK + c < CHANNELS, xs[i].to(tl.float32) - mean, 0.0)
        total += centred * centred
    scaled = tl.rsqrt(tl.sum(total, axis=1) / CHANNELS + eps)[:, None]

    for i in tl.static_range(CHUNKS):
        y = (xs[i].to(tl.float32) - mean) * scaled
        y = y * (1.0 + scales[i].to(tl.float32)) + shifts[i].to(tl.float32)
        # An empty slot is written too: with zeros.
        y = tl.where(filled[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_row + i * BLOCK + c, y, mask=(slot < slots)[:, None] & (i * BLOCK + c < CHANNELS))


def adaln_modulate(x, scale, shift, modulation_index, index, eps):
    """x [B, N, C], scale and shift [B, C] or [B, M, C], index int32 [B, n]. Returns [B, n or N, C], contiguous."""
    batch, rows, channels = x.shape
    slots = rows if index is None else index.shape[1]
    y = torch.empty((batch, slots, channels), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.zero_()
    slot_block, block, chunks, num_warps = tile(slots, channels, x.element_size())
    scale_strides, vectors = by_row(scale)
    with torch.cuda.device_of(x):
        _adaln_modulate_kernel[(batch * triton.cdiv(slots, slot_block),)](
            x, scale, shift, modulation_index, index, y,
            x.stride(0), x.stride(1), *scale_strides, *by_row(shift)[0], *optional_strides(modulation_index),
            *optional_strides(index),
            rows, slots, vectors, eps,
            CHANNELS=channels, BLOCK=block, CHUNKS=chunks, SLOTS=slot_block, num_warps=num_warps,
        )  # fmt: skip
    return y
