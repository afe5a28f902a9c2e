# SPDX-License-Identifier: Apache-2.0
"""RMS norm over the channels of each pixel in Triton, with a convolution's bias before it and a SiLU behind: one read
and one write, bound by memory."""

import torch
import triton
import triton.language as tl

_TILE_BYTES = 8192  # 128 threads with four 16-byte vectors each


@triton.jit
def _channel_rms_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, x_bias_ptr, y_ptr, stride_c, stride_s, size, root, eps,
    CHANNELS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    known = c < CHANNELS
    mask = (s < size)[:, None] & known[None, :]
    at = b * CHANNELS * size + s[:, None] * stride_s + c.to(tl.int64)[None, :] * stride_c
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=known, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]
    length = tl.sqrt(tl.sum(x * x, axis=1))
    # a comparison in which NaN stays: a maximum takes the number
    length = tl.where(length < eps, eps, length)
    y = x * (root / length)[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def tile(channels, element_size):
    """(ROWS, BLOCK, warps): pixels of a program, channels of a pixel up to a power of two."""
    block = triton.next_power_of_2(channels)
    return max(1, _TILE_BYTES // element_size // block), block, min(16, max(4, block // 1024))


def channel_rms_norm(x, weight, bias, eps, silu, x_bias):
    """x [B, C, ...], contiguous or with channels last; weight [C]; bias, x_bias [C] or None. Returns x's shape, dtype
    and memory format."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    stride_c, stride_s = (size, 1) if x.is_contiguous() else (1, channels)
    rows, block, num_warps = tile(channels, x.element_size())
    with torch.cuda.device_of(x):
        _channel_rms_norm_kernel[(batch * triton.cdiv(size, rows),)](
            x, weight, bias, x_bias, y, stride_c, stride_s, size, channels**0.5, eps,
            CHANNELS=channels, SILU=silu, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return y
