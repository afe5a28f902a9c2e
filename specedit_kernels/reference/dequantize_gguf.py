# SPDX-License-Identifier: Apache-2.0
import torch

from .._gguf import BLOCKS
from ._precision import as_written


def _of_32(b, half, kind):
    """Types of 32 values: (codes, scale, what is added to their product, or None)."""
    at = torch.arange(32, device=b.device)
    first = BLOCKS[kind][1] - 16  # of 16 bytes, the low halves of which come first
    q = (b[:, first + at % 16] >> 4 * (at // 16)) & 15
    if kind.startswith("Q5"):
        q |= ((b[:, first - 4 + at // 8] >> at % 8) & 1) << 4
    if kind.endswith("_1"):
        return q, half(0), half(2)
    return q - (16 if kind == "Q5_0" else 8), half(0), None


def _in_six_bits(b, at):
    """(scales, minimums) of eight groups of 32: codes of six bits in twelve bytes from `at` on."""
    low, mid, high = b[:, at : at + 4], b[:, at + 4 : at + 8], b[:, at + 8 : at + 12]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    return scale, torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], dim=1)


def _of_256(b, half, kind):
    """Types of 256 values: (codes, scales, what is added), the last two in groups."""
    at = torch.arange(256, device=b.device)
    part, within = at // 128, at % 128
    if kind == "Q6_K":
        low = (b[:, 64 * part + at % 64] >> 4 * (within // 64)) & 15
        high = (b[:, 128 + 32 * part + at % 32] >> 2 * (within // 32)) & 3
        codes = b[:, 192:208]
        return (low | high << 4) - 32, half(208) * (codes - (codes >> 7 << 8)).half(), None
    if kind in ("Q4_K", "Q5_K"):
        first = 16 if kind == "Q4_K" else 48
        q = (b[:, first + 32 * (at // 64) + at % 32] >> 4 * (at // 32 % 2)) & 15
        if kind == "Q5_K":
            q |= ((b[:, 16 + at % 32] >> at // 32) & 1) << 4
        scale, low = _in_six_bits(b, 4)
        return q, half(0) * scale.half(), -(half(2) * low.half())
    first = 32 if kind == "Q3_K" else 16
    q = (b[:, first + 32 * part + at % 32] >> 2 * (within // 32)) & 3
    if kind == "Q2_K":
        codes = b[:, :16]
        return q, half(80) * (codes & 15).half(), -(half(82) * (codes >> 4).half())
    q -= 4 - (((b[:, at % 32] >> at // 32) & 1) << 2)
    group = torch.arange(16, device=b.device)
    codes = (b[:, 96 + group % 8] >> 4 * (group // 8)) & 15
    codes |= ((b[:, 104 + group % 4] >> 2 * (group // 4)) & 3) << 4
    return q, half(108) * (codes - 32).half(), None


@as_written
def dequantize_gguf(blocks, kind, dtype):
    """blocks: uint8 [..., whole blocks]. Each product and sum in fp16, then in dtype."""
    values, size = BLOCKS[kind]
    flat = blocks.reshape(-1, size)

    def half(at):
        return flat[:, at : at + 2].clone().view(torch.float16)  # at an even address

    if kind == "Q8_0":
        q, scale, added = flat[:, 2:].view(torch.int8), half(0), None
    else:
        q, scale, added = (_of_32 if values == 32 else _of_256)(flat.to(torch.int32), half, kind)
    q = q.to(torch.float16).unflatten(1, (scale.shape[1], -1))
    y = scale[:, :, None] * q
    if added is not None:
        y = y + added[:, :, None]
    return y.to(dtype).reshape(*blocks.shape[:-1], blocks.shape[-1] // size * values)
