# SPDX-License-Identifier: Apache-2.0
"""8-bit numbers, by a scale a row, in 16 or 32 bits: one pass, bound by memory."""

import torch
import triton
import triton.language as tl

# A thread reads 8 bytes and writes 16 at a time: Triton gives a load and a store one layout where that holds for both.
# Up to eight such reads are under way at once.
VECTOR, CHUNKS, WARPS = 8, 8, 4
TILE = VECTOR * 32 * WARPS
KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}


@triton.jit(do_not_specialize=["parts"])
def _dequantize_kernel(
    x_ptr, scale_ptr, y_ptr, size_c, parts, TILE: tl.constexpr, CHUNKS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """A part of a row. Without a scale, or with one for all, there is one row."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * (TILE * CHUNKS)
    x_ptr += row * size_c + first
    y_ptr += row * size_c + first
    at = tl.arange(0, TILE)
    left = size_c - first
    codes = ()
    for i in tl.static_range(CHUNKS):
        codes = codes + (tl.load(x_ptr + i * TILE + at, mask=i * TILE + at < left, other=0),)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row).to(tl.float32)
    for i in tl.static_range(CHUNKS):
        if KIND == "int8":
            y = codes[i].to(tl.int8, bitcast=True).to(tl.float32)
        elif KIND == "e5m2":
            # the upper half of an fp16 number
            y = (codes[i].to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            # The sign, and exponent and mantissa where fp32 has them. A power of two then corrects the exponent's bias,
            # of subnormal numbers too, and the code of NaN would be 480.
            bits = ((codes[i].to(tl.int32) << 24) >> 4) & -0x78100000
            y = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            y = tl.where(tl.abs(y) > 448.0, float("nan"), y)
        if scale_ptr is not None:
            y = y * scale
        tl.store(y_ptr + i * TILE + at, y.to(y_ptr.dtype.element_ty), mask=i * TILE + at < left)


def tile(columns):
    """(parts of a row, CHUNKS of each)."""
    parts = triton.cdiv(columns, TILE * CHUNKS)
    return parts, triton.cdiv(columns, TILE * parts)


def dequantize(x, dtype, scale):
    """x contiguous; scale None, of one number, or of one a row, contiguous."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = 1 if scale is None else scale.numel()
    columns = x.numel() // rows
    parts, chunks = tile(columns)
    with torch.cuda.device_of(x):
        _dequantize_kernel[(rows * parts,)](
            x.view(torch.uint8), scale, y, columns, parts,
            TILE=TILE, CHUNKS=chunks, KIND=KINDS[x.dtype], num_warps=WARPS,
        )  # fmt: skip
    return y
