# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGUF in 16 or 32 bits: one pass, bound by memory."""

import torch
import triton
import triton.language as tl

from .._gguf import BLOCKS

# Values that share a scale are a row of a tile. A thread has eight of them, 16 bytes to write, and two rows or so.
VALUES = 2048
# LLVM has products of fp16 numbers that are rounded to fp16 in fp16, and would make one multiply-add of two roundings.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
IN_SIXTEENS = ("Q2_K", "Q3_K", "Q6_K")


@triton.jit
def _half(x):
    """A product or sum of fp16 numbers, as fp16 has it, in fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _bits(at, shift, COUNT: tl.constexpr, mask):
    """COUNT bits of the bytes at these places, from bit `shift` on."""
    return (tl.load(at, mask=mask, other=0).to(tl.int32) >> shift) & ((1 << COUNT) - 1)


@triton.jit
def _six_bits(first, s, there):
    """(scale, minimum) of group s of eight, fp32: codes of six bits in the twelve bytes from `first` on."""
    early, at = s < 4, first + s % 4
    a = tl.load(at, mask=there, other=0).to(tl.int32)
    b = tl.load(at + 4, mask=there, other=0).to(tl.int32)
    c = tl.load(at + 8, mask=there, other=0).to(tl.int32)
    scale = tl.where(early, a & 63, (c & 15) | (a >> 6 << 4))
    low = tl.where(early, b & 63, (c >> 4) | (b >> 6 << 4))
    return scale.to(tl.float32), low.to(tl.float32)


@triton.jit
def _dequantize_gguf_kernel(
    x_ptr, half_ptr, y_ptr, groups, KIND: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """GROUPS rows of WIDTH values, PARTS of which are a block of SIZE bytes. half_ptr: x_ptr, as fp16."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    block, s = (group // PARTS).to(tl.int64), group % PARTS
    half = half_ptr + block * (SIZE // 2)
    first = x_ptr + block * SIZE
    mask, row, part, at = there[:, None], first[:, None], s[:, None], tl.arange(0, WIDTH)[None, :]
    if KIND == "Q8_0":
        q = tl.load(row + 2 + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        scale = tl.load(half, mask=there, other=0).to(tl.float32)
    elif PARTS == 1:
        q = _bits(row + (SIZE - 16) + at % 16, 4 * (at // 16), 4, mask)
        if KIND == "Q5_0" or KIND == "Q5_1":
            q |= _bits(row + (SIZE - 20) + at // 8, at % 8, 1, mask) << 4
        scale = tl.load(half, mask=there, other=0).to(tl.float32)
        if KIND == "Q4_0":
            q -= 8
        elif KIND == "Q5_0":
            q -= 16
        else:
            added = tl.load(half + 1, mask=there, other=0).to(tl.float32)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        q = _bits(row + (SIZE - 128) + part // 2 * 32 + at, 4 * (part % 2), 4, mask)
        if KIND == "Q5_K":
            q |= _bits(row + 16 + at, part, 1, mask) << 4
        scale, low = _six_bits(first + 4, s, there)
        scale = _half(tl.load(half, mask=there, other=0).to(tl.float32) * scale)
        low = _half(tl.load(half + 1, mask=there, other=0).to(tl.float32) * low)
    elif KIND == "Q6_K":
        q = _bits(row + part // 8 * 64 + part % 4 * 16 + at, part % 8 // 4 * 4, 4, mask)
        q |= _bits(row + 128 + part // 8 * 32 + part % 2 * 16 + at, part % 8 // 2 * 2, 2, mask) << 4
        q -= 32
        code = tl.load(first + 192 + s, mask=there, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        scale = _half(tl.load(half + 104, mask=there, other=0).to(tl.float32) * code)
    else:
        q = _bits(row + (SIZE - 68 if KIND == "Q2_K" else 32) + part // 8 * 32 + part % 2 * 16 + at,
                  part % 8 // 2 * 2, 2, mask)  # fmt: skip
        if KIND == "Q2_K":
            code = tl.load(first + s, mask=there, other=0).to(tl.int32)
            scale = _half(tl.load(half + 40, mask=there, other=0).to(tl.float32) * (code & 15).to(tl.float32))
            low = _half(tl.load(half + 41, mask=there, other=0).to(tl.float32) * (code >> 4).to(tl.float32))
        else:
            q -= 4 - (_bits(row + part % 2 * 16 + at, part // 2, 1, mask) << 2)
            code = _bits(first + 96 + s % 8, 4 * (s // 8), 4, there)
            code |= _bits(first + 104 + s % 4, 2 * (s // 4), 2, there) << 4
            scale = _half(tl.load(half + 54, mask=there, other=0).to(tl.float32) * (code - 32).to(tl.float32))
    y = _half(scale[:, None] * q.to(tl.float32))
    if KIND == "Q4_1" or KIND == "Q5_1":
        y = _half(y + added[:, None])
    elif KIND == "Q2_K" or KIND == "Q4_K" or KIND == "Q5_K":
        y = _half(y - low[:, None])
    y_at = y_ptr + group.to(tl.int64)[:, None] * WIDTH + at
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


def tile(kind):
    """The kernel's constants for blocks of a type."""
    values, size = BLOCKS[kind]
    width = 16 if kind in IN_SIXTEENS else 32
    return dict(KIND=kind, SIZE=size, PARTS=values // width, GROUPS=VALUES // width, WIDTH=width)


def dequantize_gguf(blocks, kind, dtype):
    """blocks: uint8, contiguous, whole blocks in the last dimension."""
    values, size = BLOCKS[kind]
    y = torch.empty((*blocks.shape[:-1], blocks.shape[-1] // size * values), dtype=dtype, device=blocks.device)
    if y.numel() == 0:
        return y
    x = blocks.flatten()
    if x.data_ptr() % 2:  # fp16 numbers are at even addresses
        x = x.clone()
    constants = tile(kind)
    groups = y.numel() // constants["WIDTH"]
    with torch.cuda.device_of(x):
        _dequantize_gguf_kernel[(triton.cdiv(groups, constants["GROUPS"]),)](
            x, x.view(torch.float16), y, groups, **constants, **OPTIONS
        )
    return y
