# SPDX-License-Identifier: Apache-2.0
"""What the adaLN kernels share: tiles of whole tokens, and the modulation row of a token."""

import triton
import triton.language as tl


def tile(slots, channels, element_size):
    """(SLOTS, BLOCK, CHUNKS, num_warps) of a program that takes whole tokens in chunks of BLOCK channels.

    A chunk is a 16-byte vector for each thread: 3072 channels of 16 bits are three chunks of 128 threads without rest.
    Short tokens are taken several at a time.
    """
    vector = 16 // element_size
    num_warps = 4 if channels * element_size <= 16384 else 16
    whole = num_warps * 32 * vector
    block = min(triton.next_power_of_2(channels), whole)
    return min(triton.next_power_of_2(slots), whole // block), block, triton.cdiv(channels, block), num_warps


def by_row(vectors):
    """(strides over samples and over rows, rows) of modulation vectors [B, C] or [B, M, C]."""
    if vectors.ndim == 2:
        return (vectors.stride(0), 0), 1
    return vectors.stride()[:2], vectors.shape[1]


def optional_strides(index):
    return (0, 0) if index is None else index.stride()


@triton.jit
def modulation_of_row(index_ptr, stride_mn, row, filled, vectors):
    """The modulation row of each token, and whether there is one. index_ptr: None, or this sample's int32 [rows]."""
    if index_ptr is None:
        return tl.zeros_like(row), filled
    else:
        modulation = tl.load(index_ptr + row * stride_mn, mask=filled, other=-1)
        return modulation.to(tl.int64), filled & (modulation >= 0) & (modulation < vectors)
