# SPDX-License-Identifier: Apache-2.0
"""How gather and scatter see a token: a few contiguous runs, cut into vectors of up to 16 bytes."""

import math

import torch
import triton

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A program moves about this much: 128 threads with four 16-byte vectors each.
_TILE_BYTES = 8192


def as_words(x):
    """``x`` with its elements reinterpreted as integers of their size (16-byte complex ones as two)."""
    if x.dtype == torch.complex128:
        x = torch.view_as_real(x)
    return x.view(_WORDS[x.element_size()])


def runs(a, b):
    """The trailing dimensions [2:] of ``a`` and ``b`` (equal sizes), merged where both allow.

    Returns a list of (size, stride of a, stride of b), outermost first; the last one is contiguous in both.
    """
    merged = []
    for size, stride_a, stride_b in reversed(list(zip(a.shape[2:], a.stride()[2:], b.stride()[2:]))):
        if size == 1:
            continue
        if not merged:
            if stride_a != 1 or stride_b != 1:
                merged.append((1, 1, 1))
                merged.append((size, stride_a, stride_b))
            else:
                merged.append((size, 1, 1))
        elif stride_a == merged[-1][0] * merged[-1][1] and stride_b == merged[-1][0] * merged[-1][2]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1], merged[-1][2])
        else:
            merged.append((size, stride_a, stride_b))
    return merged[::-1] or [(1, 1, 1)]


def vector_words(a, b, run_list):
    """Words per vector: the widest of at most 16 bytes that both tensors' addresses and strides allow."""
    size = a.element_size()
    outer = [stride for _, *strides in run_list[:-1] for stride in strides]
    steps = [run_list[-1][0], *outer, *a.stride()[:2], *b.stride()[:2]]
    return math.gcd(16, a.data_ptr(), b.data_ptr(), *(size * step for step in steps)) // size


def tile(slots, run_words, element_size):
    """(slots, words) of one program's tile."""
    words = min(triton.next_power_of_2(run_words), _TILE_BYTES // 4 // element_size)
    return min(triton.next_power_of_2(slots), max(1, _TILE_BYTES // element_size // words)), words
