# SPDX-License-Identifier: Apache-2.0
"""The sequence of a mixed-resolution step: which rows, where they stand, how much each key weighs.

All rows a step may use form one table per sample:

    [ target fine N | target coarse N/4 | condition fine N | condition coarse N/4 ]

A sample's sequence takes the fine rows of its active blocks and the coarse rows of the others, for the target and then
for the condition, and is padded at its end to the longest of the batch. Everything here is computed on the device from
the block order and counts that `select_tokens` gives; only the capacity (one number) has to be known on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import BLOCK, Grid, block_positions, coarse_grid, token_positions

CHILDREN = BLOCK * BLOCK


def table_rows(grid: Grid) -> int:
    """Rows of the table for a fine grid: twice N + N/4."""
    blocks = math.prod(coarse_grid(grid))
    return 2 * (blocks * CHILDREN + blocks)


def sequence_length(active_blocks: int, grid: Grid, coarse_condition: bool = True) -> tuple[int, int]:
    """(target, target + condition) tokens of a sample with that many active blocks."""
    blocks = math.prod(coarse_grid(grid))
    target = blocks + (CHILDREN - 1) * active_blocks
    return target, target + (target if coarse_condition else blocks * CHILDREN)


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of the table in the order of the sequence, for a batch.

    index: int32 [B, capacity], the table row of each slot, -1 from `lengths` on.
    lengths: int32 [B], slots in use. target_lengths: int32 [B], how many of them (the first ones) are target tokens.
    fine_lengths: int32 [B], how many of the target tokens (the first ones) are fine.
    """

    index: Tensor
    lengths: Tensor
    target_lengths: Tensor
    fine_lengths: Tensor
    grid: Grid

    @property
    def capacity(self) -> int:
        return self.index.shape[1]

    def target_slots(self) -> Tensor:
        """bool [B, capacity]: slots that hold target tokens."""
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
    order: Tensor, count: Tensor, grid: Grid, capacity: int, coarse_condition: bool = True
) -> SequenceLayout:
    """Lay out a batch of mixed-resolution sequences. No host synchronisation.

    order: int [B, blocks], the blocks, active ones first (`index` of select_tokens on the coarse grid).
    count: int [B], active blocks. grid: the fine grid. capacity: slots, at least the batch's longest `sequence_length`.
    coarse_condition: False keeps all N condition tokens fine.
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
        condition, condition_row = target, _half(behind, order, count, grid)
    else:
        condition, condition_row = torch.full_like(target, blocks * CHILDREN), behind
    index = torch.where(slot < target, _half(slot, order, count, grid), half_rows + condition_row)
    index = torch.where(slot < target + condition, index, torch.full_like(index, -1))
    return SequenceLayout(
        index=index.int(),
        lengths=(target + condition)[:, 0].int(),
        target_lengths=target[:, 0].int(),
        fine_lengths=(CHILDREN * count)[:, 0].int(),
        grid=grid,
    )


def table_positions(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Position ids of the table's rows, fp32 [rows, 3]: (0 target | 1 condition, row, column) in fine units.

    A coarse row stands at its block's centre.
    """
    place = torch.cat([token_positions(grid, device), block_positions(grid, device)])
    half = torch.cat([torch.zeros_like(place[:, :1]), place], dim=1)
    other = half.clone()
    other[:, 0] = 1
    return torch.cat([half, other])


def table_key_bias(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Natural log of each table row's multiplicity, fp32 [rows]: 0 for a fine row, log 4 for a coarse one."""
    blocks = math.prod(coarse_grid(grid))
    half = torch.zeros(blocks * (CHILDREN + 1), device=device)
    half[blocks * CHILDREN :] = math.log(CHILDREN)
    return half.repeat(2)
