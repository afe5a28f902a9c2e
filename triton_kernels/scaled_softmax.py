# SPDX-License-Identifier: Apache-2.0
"""Softmax of rows in Triton, its scale and the weights' dtype in the same launch: one read, one write."""

import torch
import triton
import triton.language as tl

_ELEMENTS = 16384  # of a row that a program keeps in registers: 32 of each of 512 threads
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled_softmax_kernel(x_ptr, y_ptr, size, scale, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    x_ptr += tl.program_id(0).to(tl.int64) * size
    y_ptr += tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + at, mask=at < size, other=float("-inf")).to(tl.float32)
        x = tl.where(at < size, x * scale, float("-inf"))
        x = tl.exp2((x - tl.max(x, axis=0)) * _LOG2E)
        tl.store(y_ptr + at, (x * (1.0 / tl.sum(x, axis=0))).to(y_ptr.dtype.element_ty), mask=at < size)
    else:
        # the row's later reads find it in the second-level cache
        largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        for i in range(0, size, BLOCK):
            x = tl.load(x_ptr + i + at, mask=i + at < size, other=0.0).to(tl.float32) * scale
            largest = tl.maximum(largest, tl.where(i + at < size, x, float("-inf")))
        row_max = tl.max(largest, axis=0)
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for i in range(0, size, BLOCK):
            x = tl.load(x_ptr + i + at, mask=i + at < size, other=0.0).to(tl.float32) * scale
            sums += tl.where(i + at < size, tl.exp2((x - row_max) * _LOG2E), 0.0)
        share = 1.0 / tl.sum(sums, axis=0)
        for i in range(0, size, BLOCK):
            x = tl.load(x_ptr + i + at, mask=i + at < size, other=0.0).to(tl.float32) * scale
            y = tl.exp2((x - row_max) * _LOG2E) * share
            tl.store(y_ptr + i + at, y.to(y_ptr.dtype.element_ty), mask=i + at < size)


def scaled_softmax(x, scale, dtype):
    """x [..., N], contiguous. Returns softmax(x * scale) over the last dimension, in dtype."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    size = x.shape[-1]
    block = min(triton.next_power_of_2(size), _ELEMENTS)
    with torch.cuda.device_of(x):
        _scaled_softmax_kernel[(x.numel() // size,)](
            x, y, size, scale, BLOCK=block, WHOLE=size <= block, num_warps=max(1, min(16, block // 1024))
        )
    return y
