# SPDX-License-Identifier: Apache-2.0
"""Row scatter in place: dst[b, index[b, i]] = src[b, i], nothing where the index is empty."""

import torch
import triton
import triton.language as tl

from . import _rows


@triton.jit
def _scatter_tokens_kernel(
    dst,
    src,
    index,
    rows,
    slots,
    index_sb,
    index_sn,
    dst_sb,
    dst_sn,
    src_sb,
    src_sn,
    middle_size,
    outer_ds,
    outer_ss,
    middle_ds,
    middle_ss,
    run_vectors,
    WORDS: tl.constexpr,  # words per vector: sizes and strides of dst and src are given in vectors
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
    outer = (run // middle_size).to(tl.int64)
    middle = (run % middle_size).to(tl.int64)
    mask = filled[:, None] & (word < run_vectors * WORDS)[None, :]

    from_row = (b * src_sb + slot.to(tl.int64) * src_sn + outer * outer_ss + middle * middle_ss) * WORDS
    to_row = (b * dst_sb + row.to(tl.int64) * dst_sn + outer * outer_ds + middle * middle_ds) * WORDS
    value = tl.load(src + from_row[:, None] + word[None, :], mask=mask, other=0)
    tl.store(dst + to_row[:, None] + word[None, :], value, mask=mask)


def scatter_tokens_(dst, src, index):
    """dst: [B, N, ...], src: [B, M, ...] of one dtype and any strides, index: int32 [B, M]. Writes into dst."""
    if src.numel() == 0 or dst.numel() == 0:
        return
    _scatter(_rows.as_words(dst), _rows.as_words(src), index)


def _scatter(dst, src, index):
    runs = _rows.runs(dst, src)
    if len(runs) > 3:
        for i in range(src.shape[2]):
            _scatter(dst.select(2, i), src.select(2, i), index)
        return
    words = _rows.vector_words(dst, src, runs)
    *outer, (run, _, _) = [(1, 0, 0)] * (3 - len(runs)) + runs
    (outer_size, outer_ds, outer_ss), (middle_size, middle_ds, middle_ss) = outer
    slots, run_block = _rows.tile(src.shape[1], run, src.element_size())
    launch = (src.shape[0] * triton.cdiv(src.shape[1], slots), outer_size * middle_size * triton.cdiv(run, run_block))
    with torch.cuda.device_of(dst):
        _scatter_tokens_kernel[launch](
            dst,
            src,
            index,
            dst.shape[1],
            src.shape[1],
            *index.stride(),
            *(stride // words for stride in (*dst.stride()[:2], *src.stride()[:2])),
            middle_size,
            *(stride // words for stride in (outer_ds, outer_ss, middle_ds, middle_ss, run)),
            WORDS=words,
            SLOTS=slots,
            RUN=run_block,
            num_warps=4,
        )
