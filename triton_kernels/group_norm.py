# SPDX-License-Identifier: Apache-2.0
"""Group norm in Triton: statistics of each channel by chunks, then of each group, then the norm. Bound by memory.

Tiles are channels x pixels in either layout. With channels last a group is a few bytes of each pixel, so that a tile
has channels of many groups: hence statistics of channels, which a small launch of its own makes those of groups.
"""

import torch
import triton
import triton.language as tl

_TILE_BYTES = 8192  # 128 threads with four 16-byte vectors each
# Programs that take the statistics: several for each multiprocessor, yet few partial results.
_PROGRAMS = 2048


@triton.jit
def _merge(count, mean, squares, more, more_mean, more_squares):
    """(count, mean, sum of squared deviations) of two sets together: Chan's update, in which nothing large cancels."""
    share = more / (count + more)
    delta = more_mean - mean
    return count + more, mean + delta * share, squares + more_squares + delta * delta * count * share


@triton.jit(do_not_specialize=["blocks", "chunks", "tiles"])
def _statistics_kernel(
    x_ptr, mean_ptr, squares_ptr, stride_c, stride_s, size, blocks, chunks, tiles,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = pid % tl.cdiv(CHANNELS, ROWS) * ROWS + tl.arange(0, ROWS)
    chunk = pid // tl.cdiv(CHANNELS, ROWS) % chunks
    b = (pid // tl.cdiv(CHANNELS, ROWS) // chunks).to(tl.int64)
    x_row = x_ptr + b * CHANNELS * size + c.to(tl.int64)[:, None] * stride_c

    # Each element of a tile has sums of its own (Welford's update), which meet once, after the last tile: a reduction
    # across threads in every tile would be waited for longer than the loads.
    first = (chunk * tiles).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    means = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for i in range(tl.minimum(tiles, blocks - chunk * tiles)):
        s = first + i * BLOCK + lane
        exists = (s < size)[None, :]
        x = tl.load(x_row + s[None, :] * stride_s, mask=(c < CHANNELS)[:, None] & exists, other=0.0).to(tl.float32)
        share = 1.0 / (i + 1)
        delta = tl.where(exists, x - means, 0.0)
        means += delta * share
        squares += delta * (delta * (1.0 - share))

    end = tl.minimum(size - first, tiles * BLOCK)
    counts = ((end - lane + BLOCK - 1) // BLOCK).to(tl.float32)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(means * counts[None, :], axis=1) / count
    delta = means - mean[:, None]
    total = tl.sum(squares + delta * delta * counts[None, :], axis=1)
    at = (b * CHANNELS + c) * chunks + chunk
    tl.store(mean_ptr + at, mean, mask=c < CHANNELS)
    tl.store(squares_ptr + at, total, mask=c < CHANNELS)


@triton.jit(do_not_specialize=["chunks", "span"])
def _combine_kernel(
    mean_ptr, squares_ptr, x_bias_ptr, group_mean_ptr, group_variance_ptr, size, chunks, span,
    CHANNELS: tl.constexpr, GROUP_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    parts = GROUP_CHANNELS * chunks
    count = tl.zeros([1], dtype=tl.float32)
    mean = tl.zeros([1], dtype=tl.float32)
    squares = tl.zeros([1], dtype=tl.float32)
    for i in range(0, parts, BLOCK):
        part = i + tl.arange(0, BLOCK)
        filled = part < parts
        pixels = tl.minimum(size - (part % chunks).to(tl.int64) * span, span)
        pixels = tl.where(filled, pixels, 0).to(tl.float32)
        part_mean = tl.load(mean_ptr + group * parts + part, mask=filled, other=0.0)
        part_squares = tl.load(squares_ptr + group * parts + part, mask=filled, other=0.0)
        if x_bias_ptr is not None:
            c = group % (CHANNELS // GROUP_CHANNELS) * GROUP_CHANNELS + part // chunks
            part_mean += tl.load(x_bias_ptr + c, mask=filled, other=0.0).to(tl.float32)
        more = tl.sum(pixels, axis=0)
        more_mean = tl.sum(pixels * part_mean, axis=0) / more
        delta = part_mean - more_mean
        more_squares = tl.sum(part_squares + pixels * delta * delta, axis=0)
        count, mean, squares = _merge(count, mean, squares, more, more_mean, more_squares)
    here = group + tl.arange(0, 1)
    tl.store(group_mean_ptr + here, mean)
    tl.store(group_variance_ptr + here, squares / count)


@triton.jit(do_not_specialize=["blocks"])
def _normalise_kernel(
    x_ptr, weight_ptr, bias_ptr, x_bias_ptr, group_mean_ptr, group_variance_ptr, y_ptr,
    stride_c, stride_s, size, blocks, eps,
    CHANNELS: tl.constexpr, GROUP_CHANNELS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = pid % tl.cdiv(CHANNELS, ROWS) * ROWS + tl.arange(0, ROWS)
    block = pid // tl.cdiv(CHANNELS, ROWS) % blocks
    b = (pid // tl.cdiv(CHANNELS, ROWS) // blocks).to(tl.int64)
    s = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = c < CHANNELS
    mask = known[:, None] & (s < size)[None, :]
    at = b * CHANNELS * size + c.to(tl.int64)[:, None] * stride_c + s[None, :] * stride_s
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    group = b * (CHANNELS // GROUP_CHANNELS) + c // GROUP_CHANNELS
    mean = tl.load(group_mean_ptr + group, mask=known, other=0.0)
    if x_bias_ptr is not None:
        mean -= tl.load(x_bias_ptr + c, mask=known, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.load(group_variance_ptr + group, mask=known, other=1.0) + eps)
    weight = tl.load(weight_ptr + c, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * (scale * weight)[:, None] + bias[:, None]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def tile(channels, size, channels_last, element_size):
    """(ROWS, BLOCK): the channels and pixels of a tile. Lanes run along what is contiguous."""
    elements = _TILE_BYTES // element_size
    if channels_last:
        # whole cache lines of a pixel, of few channels: a chunk is then many pixels, and partial results are few
        rows = min(triton.next_power_of_2(channels), 128 // element_size)
        return rows, min(triton.next_power_of_2(size), elements // rows)
    block = min(triton.next_power_of_2(size), elements)
    return min(triton.next_power_of_2(channels), elements // block), block


def _shape(x):
    """(pixels, (stride of channels, of pixels), ROWS, BLOCK, blocks, tiles of channels in all samples)."""
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    channels_last = not x.is_contiguous()
    rows, block = tile(channels, size, channels_last, x.element_size())
    strides = (1, channels) if channels_last else (size, 1)
    return size, strides, rows, block, triton.cdiv(size, block), batch * triton.cdiv(channels, rows)


def group_norm_statistics(x, num_groups, x_bias):
    """x [B, C, ...], contiguous or with channels last; x_bias [C] or None. Returns fp32 [2, B, num_groups]: means and
    variances."""
    batch, channels = x.shape[:2]
    by_group = torch.empty((2, batch, num_groups), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return by_group.fill_(float("nan"))
    size, strides, rows, block, blocks, columns = _shape(x)
    tiles = triton.cdiv(columns * blocks, _PROGRAMS)
    chunks = triton.cdiv(blocks, tiles)
    by_channel = torch.empty((2, batch, channels, chunks), dtype=torch.float32, device=x.device)
    of_group = channels // num_groups
    with torch.cuda.device_of(x):
        _statistics_kernel[(columns * chunks,)](
            x, *by_channel, *strides, size, blocks, chunks, tiles,
            CHANNELS=channels, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
        _combine_kernel[(batch * num_groups,)](
            *by_channel, x_bias, *by_group, size, chunks, tiles * block, CHANNELS=channels, GROUP_CHANNELS=of_group,
            BLOCK=min(triton.next_power_of_2(of_group * chunks), 4096), num_warps=4,
        )  # fmt: skip
    return by_group


def group_norm(x, num_groups, weight, bias, eps, silu, statistics, x_bias):
    """x [B, C, ...], contiguous or with channels last; weight, bias [C]; statistics: of `group_norm_statistics`, None
    for x's own; x_bias [C] or None. Returns x's shape, dtype and memory format."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    by_group = group_norm_statistics(x, num_groups, x_bias) if statistics is None else statistics
    size, strides, rows, block, blocks, columns = _shape(x)
    channels = x.shape[1]
    with torch.cuda.device_of(x):
        _normalise_kernel[(columns * blocks,)](
            x, weight, bias, x_bias, *by_group, y, *strides, size, blocks, eps, CHANNELS=channels,
            GROUP_CHANNELS=channels // num_groups, SILU=silu, ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y
