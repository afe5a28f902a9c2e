# SPDX-License-Identifier: Apache-2.0
"""Token selection in one launch: threshold, dilation, uniform tokens, and the stable permutation."""

import torch
import triton
import triton.language as tl


@triton.jit
def _select_tokens_kernel(
    score,
    mask,
    index,
    count,
    score_sb,
    score_sn,
    grid_h,
    grid_w,
    threshold,
    dilation,
    uniform_stride,
    DILATE: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program selects for one batch element, in phases that pass their results through the outputs.
    b = tl.program_id(0).to(tl.int64)
    tokens = grid_h * grid_w
    score += b * score_sb
    mask += b * tokens
    index += b * tokens
    lane = tl.arange(0, BLOCK)
    limit = tl.full([BLOCK], threshold, tl.float32)

    if DILATE:
        # Along the row first; `index` holds the row-wise result until the permutation replaces it.
        for start in range(0, tokens, BLOCK):
            token = start + lane
            column = token % grid_w
            grown = tl.zeros([BLOCK], dtype=tl.int32)
            for dx in range(-dilation, dilation + 1):
                inside = (token < tokens) & (column + dx >= 0) & (column + dx < grid_w)
                value = tl.load(score + (token + dx).to(tl.int64) * score_sn, mask=inside, other=0.0).to(tl.float32)
                grown = grown | (inside & ((value > limit) | (value != value))).to(tl.int32)
            tl.store(index + token, grown, mask=token < tokens)
        tl.debug_barrier()

    selected_total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + lane
        valid = token < tokens
        row = token // grid_w
        if DILATE:
            selected = tl.zeros([BLOCK], dtype=tl.int32)
            for dy in range(-dilation, dilation + 1):
                inside = valid & (row + dy >= 0) & (row + dy < grid_h)
                selected = selected | tl.load(index + token + dy * grid_w, mask=inside, other=0)
        else:
            value = tl.load(score + token.to(tl.int64) * score_sn, mask=valid, other=0.0).to(tl.float32)
            selected = (valid & ((value > limit) | (value != value))).to(tl.int32)
        if UNIFORM:
            on_lattice = (row % uniform_stride == 0) & ((token % grid_w) % uniform_stride == 0)
            selected = selected | (valid & on_lattice).to(tl.int32)
        tl.store(mask + token, selected.to(tl.int1), mask=valid)
        selected_total += selected
    selected_count = tl.sum(selected_total, axis=0)
    tl.store(count + b, selected_count)
    tl.debug_barrier()

    # A selected token goes after the selected ones before it, another after all selected and the others before it.
    before = tl.zeros([], dtype=tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + lane
        valid = token < tokens
        selected = tl.load(mask + token, mask=valid, other=0).to(tl.int32)
        ahead = before + tl.cumsum(selected, axis=0) - selected
        place = tl.where(selected != 0, ahead, selected_count + token - ahead)
        tl.store(index + place, token, mask=valid)
        before += tl.sum(selected, axis=0)


def select_tokens(score, grid_h, grid_w, threshold, dilation, uniform_stride):
    """score: [B, N], compared in fp32. Returns (mask bool [B, N], index int32 [B, N], count int32 [B])."""
    batch, tokens = score.shape
    mask = torch.empty((batch, tokens), dtype=torch.bool, device=score.device)
    index = torch.empty((batch, tokens), dtype=torch.int32, device=score.device)
    if score.numel() == 0:
        return mask, index, torch.zeros((batch,), dtype=torch.int32, device=score.device)
    count = torch.empty((batch,), dtype=torch.int32, device=score.device)
    block = min(triton.next_power_of_2(tokens), 4096)
    with torch.cuda.device_of(score):
        _select_tokens_kernel[(batch,)](
            score,
            mask,
            index,
            count,
            score.stride(0),
            score.stride(1),
            grid_h,
            grid_w,
            float(threshold),
            dilation,
            uniform_stride,
            DILATE=dilation > 0,
            UNIFORM=uniform_stride > 0,
            BLOCK=block,
            num_warps=max(1, min(32, block // 128)),
        )
    return mask, index, count
