# SPDX-License-Identifier: Apache-2.0
"""Gated residual add on scattered rows, in Triton: two reads and a write of each token, bound by memory."""

import torch
import triton
import triton.language as tl

from ._modulation import by_row, modulation_of_row, optional_strides, tile
from ._rows import row_of_slot


@triton.jit(do_not_specialize=["rows", "slots", "vectors"])
def _gated_residual_add_kernel(
    residual_ptr, x_ptr, gate_ptr, modulation_ptr, index_ptr,
    stride_rb, stride_rn, stride_xb, stride_xn, stride_gb, stride_gm, stride_mb, stride_mn, stride_ib, stride_in,
    rows, slots, vectors,
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
    x_row = x_ptr + (b * stride_xb + slot.to(tl.int64) * stride_xn)[:, None]
    residual_row = residual_ptr + (b * stride_rb + row * stride_rn)[:, None]
    gate_row = gate_ptr + (b * stride_gb + modulation * stride_gm)[:, None]
    c = tl.arange(0, BLOCK)[None, :]

    # All loads come before the first store, so that they are in flight together; the tokens before their gate, whose
    # row may still be on its way.
    xs = ()
    residuals = ()
    gates = ()
    for i in tl.static_range(CHUNKS):
        mask = filled[:, None] & (i * BLOCK + c < CHANNELS)
        xs = xs + (tl.load(x_row + i * BLOCK + c, mask=mask, other=0.0),)
        residuals = residuals + (tl.load(residual_row + i * BLOCK + c, mask=mask, other=0.0),)
    for i in tl.static_range(CHUNKS):
        mask = modulated[:, None] & (i * BLOCK + c < CHANNELS)
        gates = gates + (tl.load(gate_row + i * BLOCK + c, mask=mask, other=0.0),)
    for i in tl.static_range(CHUNKS):
        total = residuals[i].to(tl.float32) + gates[i].to(tl.float32) * xs[i].to(tl.float32)
        mask = filled[:, None] & (i * BLOCK + c < CHANNELS)
        tl.store(residual_row + i * BLOCK + c, total.to(residual_ptr.dtype.element_ty), mask=mask)


def gated_residual_add_(residual, x, gate, modulation_index, index):
    """residual [B, N, C], x [B, n, C], gate [B, C] or [B, M, C], index int32 [B, n] or None. Writes into residual."""
    if residual.numel() == 0 or x.numel() == 0:
        return
    batch, slots, channels = x.shape
    slot_block, block, chunks, num_warps = tile(slots, channels, x.element_size())
    gate_strides, vectors = by_row(gate)
    with torch.cuda.device_of(x):
        _gated_residual_add_kernel[(batch * triton.cdiv(slots, slot_block),)](
            residual, x, gate, modulation_index, index,
            *residual.stride()[:2], *x.stride()[:2], *gate_strides, *optional_strides(modulation_index),
            *optional_strides(index),
            residual.shape[1], slots, vectors,
            CHANNELS=channels, BLOCK=block, CHUNKS=chunks, SLOTS=slot_block, num_warps=num_warps,
        )  # fmt: skip
