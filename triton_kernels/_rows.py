# SPDX-License-Identifier: Apache-2.0
"""Rows named by an index, and the copy that gather and scatter share, between such rows and slots in order.

A token is a few contiguous runs, cut into vectors of up to 16 bytes.
"""

import math

import torch
import triton
import triton.language as tl

from .._words import as_words

# A program moves about this much: 128 threads with four 16-byte vectors each.
_TILE_BYTES = 8192


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


@triton.jit
def row_of_slot(index_ptr, stride, slot, exists, rows):
    """The row that each slot of one sample names (int64), and whether there is one. No index: the slot itself."""
    if index_ptr is None:
        row = slot
    else:
        row = tl.load(index_ptr + slot.to(tl.int64) * stride, mask=exists, other=-1)
    return row.to(tl.int64), exists & (row >= 0) & (row < rows)


@triton.jit
def _copy_rows_kernel(
    by_row,
    by_slot,
    index,
    rows,
    slots,
    index_sb,
    index_sn,
    row_sb,
    row_sn,
    slot_sb,
    slot_sn,
    middle_size,
    outer_rs,
    outer_ss,
    middle_rs,
    middle_ss,
    run_vectors,
    WORDS: tl.constexpr,  # words per vector: sizes and strides of both tensors are given in vectors
    SLOTS: tl.constexpr,
    RUN: tl.constexpr,
    SCATTER: tl.constexpr,  # from the slots to the rows; else from the rows to the slots
):
    slot_blocks = tl.cdiv(slots, SLOTS)
    b = (tl.program_id(0) // slot_blocks).to(tl.int64)
    slot = (tl.program_id(0) % slot_blocks) * SLOTS + tl.arange(0, SLOTS)
    row, filled = row_of_slot(index + b * index_sb, index_sn, slot, slot < slots, rows)

    run_blocks = tl.cdiv(run_vectors * WORDS, RUN)
    run = tl.program_id(1) // run_blocks
    word = (tl.program_id(1) % run_blocks) * RUN + tl.arange(0, RUN)
    in_run = word < run_vectors * WORDS
    outer = (run // middle_size).to(tl.int64)
    middle = (run % middle_size).to(tl.int64)
    mask = filled[:, None] & in_run[None, :]

    row_at = (b * row_sb + row * row_sn + outer * outer_rs + middle * middle_rs) * WORDS
    slot_at = (b * slot_sb + slot.to(tl.int64) * slot_sn + outer * outer_ss + middle * middle_ss) * WORDS
    row_at = by_row + row_at[:, None] + word[None, :]
    slot_at = by_slot + slot_at[:, None] + word[None, :]
    if SCATTER:
        tl.store(row_at, tl.load(slot_at, mask=mask, other=0), mask=mask)
    else:
        # An empty slot is written too: with zeros.
        tl.store(slot_at, tl.load(row_at, mask=mask, other=0), mask=(slot < slots)[:, None] & in_run[None, :])


def copy_rows(by_row, by_slot, index, scatter):
    """by_row: [B, N, ...], by_slot: [B, M, ...] of one dtype and any strides, neither empty; index: int32 [B, >= M]."""
    _copy(as_words(by_row), as_words(by_slot), index, scatter)


def _copy(by_row, by_slot, index, scatter):
    run_list = runs(by_row, by_slot)
    if len(run_list) > 3:
        for i in range(by_row.shape[2]):
            _copy(by_row.select(2, i), by_slot.select(2, i), index, scatter)
        return
    words = vector_words(by_row, by_slot, run_list)
    *outer, (run, _, _) = [(1, 0, 0)] * (3 - len(run_list)) + run_list
    (outer_size, outer_rs, outer_ss), (middle_size, middle_rs, middle_ss) = outer
    batch, slots = by_slot.shape[:2]
    slot_block, run_block = tile(slots, run, by_slot.element_size())
    launch = (batch * triton.cdiv(slots, slot_block), outer_size * middle_size * triton.cdiv(run, run_block))
    with torch.cuda.device_of(by_slot):
        _copy_rows_kernel[launch](
            by_row,
            by_slot,
            index,
            by_row.shape[1],
            slots,
            *index.stride(),
            *(stride // words for stride in (*by_row.stride()[:2], *by_slot.stride()[:2])),
            middle_size,
            *(stride // words for stride in (outer_rs, outer_ss, middle_rs, middle_ss, run)),
            WORDS=words,
            SLOTS=slot_block,
            RUN=run_block,
            SCATTER=scatter,
            num_warps=4,
        )
