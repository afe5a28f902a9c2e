# SPDX-License-Identifier: Apache-2.0
"""fp8 numbers in 16 bits: one pass, bound by memory."""

import torch
import triton
import triton.language as tl

# A thread reads 8 bytes and writes 16 at a time: Triton gives a load and a store one layout where that holds for both.
# Eight such reads are under way at once.
VECTOR, CHUNKS, WARPS = 8, 8, 4
TILE = VECTOR * 32 * WARPS


@triton.jit
def _cast_fp8_kernel(x_ptr, y_ptr, size, TILE: tl.constexpr, CHUNKS: tl.constexpr, E5M2: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (TILE * CHUNKS)
    x_ptr += first
    y_ptr += first
    at = tl.arange(0, TILE)
    left = size - first
    codes = ()
    for i in tl.static_range(CHUNKS):
        codes = codes + (tl.load(x_ptr + i * TILE + at, mask=i * TILE + at < left, other=0),)
    for i in tl.static_range(CHUNKS):
        if E5M2:
            # the upper half of an fp16 number
            y = (codes[i].to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            # The sign, and exponent and mantissa where fp32 has them. A power of two then corrects the exponent's bias,
            # of subnormal numbers too, and the code of NaN would be 480.
            bits = ((codes[i].to(tl.int32) << 24) >> 4) & -0x78100000
            y = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            y = tl.where(tl.abs(y) > 448.0, float("nan"), y)
        out = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + i * TILE + at, out, mask=i * TILE + at < left)


def cast_fp8(x, dtype):
    """x contiguous, dtype bf16 or fp16."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        _cast_fp8_kernel[(triton.cdiv(x.numel(), TILE * CHUNKS),)](
            x.view(torch.uint8), y, x.numel(),
            TILE=TILE, CHUNKS=CHUNKS, E5M2=x.dtype == torch.float8_e5m2, num_warps=WARPS,
        )  # fmt: skip
    return y
