# SPDX-License-Identifier: Apache-2.0
"""The sequence of a mixed-resolution step: which rows, where they stand, how much each key weighs.

All rows a step may use form one table per sample:

    [ target fine N | target coarse N/4 | condition fine N | condition coarse N/4 | others ]

A sample's sequence takes the fine rows of its active blocks and the coarse rows of the others, for the target and then
for the condition, then all rows of further pictures (their own grids, one resolution), and is padded at its end to the
longest of the batch. Everything here is computed on the device from the block order and counts that `select_tokens`
gives; only the capacity (one number) has to be known on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .grid import BLOCK, Grid, block_positions, coarse_grid, token_positions

CHILDREN = BLOCK * BLOCK


def picture_rows(grid: Grid, coarse: bool) -> int:
    """Rows of a further picture: its fine tokens, or its blocks."""
    return math.prod(coarse_grid(grid) if coarse else grid)


def table_rows(grid: Grid, others: int = 0) -> int:
    """Rows of the table for a fine grid: twice N + N/4, and those of further pictures."""
    blocks = math.prod(coarse_grid(grid))
    return 2 * (blocks * CHILDREN + blocks) + others


def sequence_length(
    active_blocks: int, grid: Grid, coarse_condition: bool = True, condition: bool = True, others: int = 0
) -> tuple[int, int]:
    """(target, all) tokens of a sample with that many active blocks; the arguments are those of `build_layout`."""
    blocks = math.prod(coarse_grid(grid))
    target = blocks + (CHILDREN - 1) * active_blocks
    behind = (target if coarse_condition else blocks * CHILDREN) if condition else 0
    return target, target + behind + others


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of the table in the order of the sequence, for a batch.

    index: int32 [B, capacity], the table row of each slot, -1 from `lengths` on.
    lengths: int32 [B], slots in use. target_lengths: int32 [B], how many of them (the first ones) are target tokens.
    fine_lengths: int32 [B], how many of the target tokens (the first ones) are fine.
    targets: bool [B, capacity], which slots hold target tokens, where these are not the first ones.
    """

    index: Tensor
    lengths: Tensor
    target_lengths: Tensor
    fine_lengths: Tensor
    grid: Grid
    targets: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.index.shape[1]

    def repeat(self, times: int) -> SequenceLayout:
        """The layout of the batch so many times over."""
        stacked = {f.name: getattr(self, f.name) for f in fields(self)}
        stacked = {n: torch.cat([x] * times) if isinstance(x, Tensor) else x for n, x in stacked.items()}
        return SequenceLayout(**stacked)

    def target_slots(self) -> Tensor:
        """bool [B, capacity]: slots that hold target tokens."""
        if self.targets is not None:
            return self.targets
        return torch.arange(self.capacity, device=self.index.device) < self.target_lengths[:, None]

    def fine_target_slots(self) -> Tensor:
        """bool [B, capacity]: slots that hold fine target tokens."""
        return torch.arange(self.capacity, device=self.index.device) < self.fine_lengths[:, None]


def _half(slot: Tensor, order: Tensor, count: Tensor, grid: Grid) -> Tensor:
    """Table row (within one half) of each slot of a half: 4 fine rows for each active block, then the coarse rest."""
    rows, columns = coarse_grid(grid)
    blocks = rows * columns
    fine = slot < CHILDREN * count
    rank = torch.where(fine, slot // CHILDREN, slot - (CHILDREN - 1) * count).clamp(0, blocks - 1)
    block = order.gather(1, rank)
    child = slot % CHILDREN
    row = (block // columns) * BLOCK + child // BLOCK
    column = (block % columns) * BLOCK + child % BLOCK
    return torch.where(fine, row * (columns * BLOCK) + column, blocks * CHILDREN + block)


def build_layout(
    order: Tensor,
    count: Tensor,
    grid: Grid,
    capacity: int,
    coarse_condition: bool = True,
    condition: bool = True,
    others: int = 0,
) -> SequenceLayout:
    """Lay out a batch of mixed-resolution sequences. No host synchronisation.

    order: int [B, blocks], the blocks, active ones first (`index` of select_tokens on the coarse grid).
    count: int [B], active blocks. grid: the fine grid. capacity: slots, at least the batch's longest `sequence_length`.
    coarse_condition: False keeps all N condition tokens fine. condition: False leaves them out, where no picture is
    on the target's grid. others: rows of further pictures at the table's end.
    """
    blocks = math.prod(coarse_grid(grid))
    if order.ndim != 2 or order.shape[1] != blocks:
        raise ValueError(f"order: expected [B, {blocks}] for grid {grid}, got {tuple(order.shape)}")
    if count.shape != order.shape[:1]:
        raise ValueError(f"count: expected [{order.shape[0]}], got {tuple(count.shape)}")
    order, count = order.long(), count.long()[:, None]
    slot = torch.arange(capacity, device=order.device)[None, :].expand(order.shape[0], capacity)
    half_rows = blocks * (CHILDREN + 1)
    target = blocks + (CHILDREN - 1) * count
    behind = slot - target
    if coarse_condition:
        length, row = target, _half(behind, order, count, grid)
    else:
        length, row = torch.full_like(target, blocks * CHILDREN), behind
    if not condition:
        length = torch.zeros_like(target)
    # a further picture's rows follow one another in the table and in the sequence alike
    index = torch.where(behind < length, half_rows + row, 2 * half_rows + behind - length)
    index = torch.where(slot < target, _half(slot, order, count, grid), index)
    index = torch.where(behind < length + others, index, torch.full_like(index, -1))
    return SequenceLayout(
        index=index.int(),
        lengths=(target + length + others)[:, 0].int(),
        target_lengths=target[:, 0].int(),
        fine_lengths=(CHILDREN * count)[:, 0].int(),
        grid=grid,
    )


def whole_layout(
    batch: int, grids: Sequence[Grid], capacity: int, device: torch.device | str | None = None
) -> SequenceLayout:
    """The layout of pictures whose tokens are all fine: the target's, then each reference's, in raster order.

    grids: fine grids, of any sides, the target's first. capacity: slots, at least as many as tokens.
    """
    count, total = math.prod(grids[0]), sum(math.prod(grid) for grid in grids)
    blocks = math.prod(-(-side // BLOCK) for side in grids[0])
    aligned = 2 * count if grids[0] in grids[1:2] else count  # tokens of the target, and of a condition on its grid
    slot = torch.arange(capacity, device=device)
    index = torch.where(slot < aligned, slot + blocks, 2 * (count + blocks) + slot - aligned)
    index = torch.where(slot < count, slot, torch.where(slot < total, index, -1))
    used = torch.full((batch,), total, dtype=torch.int32, device=device)
    of_target = torch.full_like(used, count)
    return SequenceLayout(index.int().repeat(batch, 1), used, of_target, of_target, grids[0])


def table_positions(
    grid: Grid,
    device: torch.device | str | None = None,
    others: Sequence[tuple[int, Grid]] = (),
    coarse_others: bool = False,
) -> Tensor:
    """Position ids of the table's rows, fp32 [rows, 3]: (0 target | 1 condition, row, column) in fine units.

    A coarse row stands at its block's centre. others: (picture, fine grid) of each further one; its rows have the
    picture's number in place of 0 or 1. coarse_others: they are coarse.
    """
    place = torch.cat([token_positions(grid, device), block_positions(grid, device)])
    parts = [(0, place), (1, place)]
    parts += [(i, block_positions(g, device) if coarse_others else token_positions(g, device)) for i, g in others]
    return torch.cat([torch.cat([torch.full_like(p[:, :1], i), p], dim=1) for i, p in parts])


def table_key_bias(
    grid: Grid,
    device: torch.device | str | None = None,
    others: Sequence[Grid] = (),
    coarse_others: bool = False,
) -> Tensor:
    """Natural log of each table row's multiplicity, fp32 [rows]: 0 for a fine row, log 4 for a coarse one.

    others, coarse_others: fine grids of further pictures, and whether they are coarse.
    """
    blocks = math.prod(coarse_grid(grid))
    half = torch.zeros(blocks * (CHILDREN + 1), dtype=torch.float32, device=device)
    half[blocks * CHILDREN :] = math.log(CHILDREN)
    rows = sum(picture_rows(g, coarse_others) for g in others)
    return torch.cat([half, half, half.new_full((rows,), math.log(CHILDREN) if coarse_others else 0.0)])
