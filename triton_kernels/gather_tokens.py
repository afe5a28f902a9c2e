# SPDX-License-Identifier: Apache-2.0
"""Row gather: y[b, i] = x[b, index[b, i]], zeros where the index is empty."""

import torch
import triton
import triton.language as tl

from . import _rows


@triton.jit
def _gather_tokens_kernel(
    x,
    index,
    y,
    rows,
    slots,
    index_sb,
    index_sn,
    x_sb,
    x_sn,
    y_sb,
    y_sn,
    middle_size,
    outer_xs,
    outer_ys,
    middle_xs,
    middle_ys,
    run_vectors,
    WORDS: tl.constexpr,  # words per vector: sizes and strides of x and y are given in vectors
    SLOTS: tl.constexpr,
    RUN: tl.constexpr,
):
    slot_blocks = tl.cdiv(slots, SLOTS)
    b = (tl.program_id(0) // slot_blocks).to(tl.int64)
    slot = (tl.program_id(0) % slot_blocks) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(index + b * index_sb + slot.to(tl.int64) * index_sn, mask=slot < slots, other=-1)
    filled = (row >= 0) & (row < rows)

    run_blocks = tl.cdiv(run_vectors * WORDS, RUN)
    run = tl.program_id(1) // run_blocks
    word = (tl.program_id(1) % run_blocks) * RUN + tl.arange(0, RUN)
    in_run = word < run_vectors * WORDS
    outer = (run // middle_size).to(tl.int64)
    middle = (run % middle_size).to(tl.int64)

    from_row = (b * x_sb + row.to(tl.int64) * x_sn + outer * outer_xs + middle * middle_xs) * WORDS
    to_row = (b * y_sb + slot.to(tl.int64) * y_sn + outer * outer_ys + middle * middle_ys) * WORDS
    value = tl.load(x + from_row[:, None] + word[None, :], mask=filled[:, None] & in_run[None, :], other=0)
    tl.store(y + to_row[:, None] + word[None, :], value, mask=(slot < slots)[:, None] & in_run[None, :])


def _gather(x, index, y):
    runs = _rows.runs(x, y)
    if len(runs) > 3:
        for i in range(x.shape[2]):
            _gather(x.select(2, i), index, y.select(2, i))
        return
    words = _rows.vector_words(x, y, runs)
    *outer, (run, _, _) = [(1, 0, 0)] * (3 - len(runs)) + runs
    (outer_size, outer_xs, outer_ys), (middle_size, middle_xs, middle_ys) = outer
    slots_block, run_block = _rows.tile(y.shape[1], run, x.element_size())
    launch = (y.shape[0] * triton.cdiv(y.shape[1], slots_block), outer_size * middle_size * triton.cdiv(run, run_block))
    with torch.cuda.device_of(x):
        _gather_tokens_kernel[launch](
            x,
            index,
            y,
            x.shape[1],
            y.shape[1],
            *index.stride(),
            *(stride // words for stride in (*x.stride()[:2], *y.stride()[:2])),
            middle_size,
            *(stride // words for stride in (outer_xs, outer_ys, middle_xs, middle_ys, run)),
            WORDS=words,
            SLOTS=slots_block,
            RUN=run_block,
            num_warps=4,
        )


def gather_tokens(x, index, length):
    """x: [B, N, ...] of any dtype and strides, index: int32 [B, >= length]. Returns [B, length, ...], contiguous."""
    y = torch.empty((x.shape[0], length, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.zero_()
    _gather(_rows.as_words(x), index, _rows.as_words(y))
    return y
