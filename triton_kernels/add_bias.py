# SPDX-License-Identifier: Apache-2.0
"""A bias of each channel added to a map, and a residual, in Triton: each element read and written once, in the order of
memory. PyTorch's sum with a bias of channels that lie last is not vectorised."""

import torch
import triton
import triton.language as tl

_TILE_BYTES = 8192  # 128 threads with four 16-byte vectors each


@triton.jit
def _add_bias_kernel(
    x_ptr, bias_ptr, residual_ptr, residual_bias_ptr, size, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < size - start
    # pixels: neighbours in memory of one channel, 1 with channels last
    first = (start // pixels % CHANNELS).to(tl.int32)
    c = (first + ((start % pixels).to(tl.int32) + offset) // pixels) % CHANNELS
    total = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        more = tl.load(residual_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
        if residual_bias_ptr is not None:
            more += tl.load(residual_bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
        total += more
    else:
        total += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + start + offset, total.to(x_ptr.dtype.element_ty), mask=mask)


def add_bias_(x, bias, residual, residual_bias):
    """x [B, C, ...] and residual (or None) both contiguous, or both with channels last; bias, residual_bias (or None)
    [C]. Writes into x."""
    if x.numel() == 0:
        return
    pixels = x[0, 0].numel() if x.is_contiguous() else 1
    block = min(_TILE_BYTES // x.element_size(), triton.next_power_of_2(x.numel()))
    with torch.cuda.device_of(x):
        _add_bias_kernel[(triton.cdiv(x.numel(), block),)](
            x, bias, residual, residual_bias, x.numel(), pixels, CHANNELS=x.shape[1], BLOCK=block, num_warps=4
        )
