# SPDX-License-Identifier: Apache-2.0
"""Rounding to e4m3 in Triton."""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def has_e4m3(device):
    """Whether the device's Triton code converts to e4m3 (compute capability 8.9); the interpreter rounds it wrongly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def to_e4m3(x, HARDWARE: tl.constexpr):
    """The codes (uint8) of the e4m3 numbers nearest to x, fp32; ties to even; beyond 448 it becomes 448, NaN stays."""
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        x = tl.where(x > 448.0, 448.0, x)
        x = tl.where(x < -448.0, -448.0, x)
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = bits & 0x7FFFFFFF
        # Twenty mantissa bits go, and the exponent's bias falls from 127 to 7. A carry goes up into the exponent.
        code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Under 2^-6 numbers are multiples of 2^-9, the last place of a sum with 2^14.
        small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(bits < 0x3C800000, small, code)
        code = tl.where(bits > 0x7F800000, 0x7F, code)
        return (code | sign).to(tl.uint8)
