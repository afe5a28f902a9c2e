# SPDX-License-Identifier: Apache-2.0
"""Latent images, packed tokens and the blocks between the fine and the coarse grid.

A packed token holds C channels of a 2x2 patch of latent pixels (FLUX packing, channel-major); models whose tokens are
single latent pixels have a patch of 1. Fine grid: (rows, columns) of tokens; its latent image has `patch` times as many
pixels a side. The coarse grid has half as many tokens a side: a
coarse token is the packing of the 2x2-averaged latent image, so it covers a 2x2 block of fine tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

PATCH = 2  # latent pixels a side in one packed token
BLOCK = 2  # fine tokens a side in one coarse token


def coarse_grid(grid: Grid) -> Grid:
    """The coarse grid of a fine one. Raises ValueError where a side of `grid` is odd."""
    rows, columns = grid
    if rows % BLOCK or columns % BLOCK or rows < BLOCK or columns < BLOCK:
        raise ValueError(f"grid: expected even, positive rows and columns, got {grid}")
    return rows // BLOCK, columns // BLOCK


def draft_grid(grid: Grid) -> Grid:
    """The grid of a draft at 4x lower resolution a side: ceil(side / 4), so that no part of the picture is lost."""
    return -(-grid[0] // 4), -(-grid[1] // 4)


def pack(latent: Tensor, patch: int = PATCH) -> Tensor:
    """Latent image [B, C, patch*rows, patch*columns] -> tokens [B, rows*columns, patch^2*C], raster order."""
    b, c, height, width = latent.shape
    x = latent.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // patch) * (width // patch), c * patch * patch)


def unpack(tokens: Tensor, grid: Grid, patch: int = PATCH) -> Tensor:
    """Tokens [B, rows*columns, patch^2*C] -> latent image [B, C, patch*rows, patch*columns]; the inverse of `pack`."""
    b, n, channels = tokens.shape
    rows, columns = grid
    if n != rows * columns:
        raise ValueError(f"tokens: expected {rows * columns} tokens for grid {grid}, got {n}")
    c = channels // (patch * patch)
    x = tokens.reshape(b, rows, columns, c, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * patch, columns * patch)


def pool(latent: Tensor) -> Tensor:
    """Mean over 2x2 latent pixels: [B, C, H, W] -> [B, C, H/2, W/2]."""
    return F.avg_pool2d(latent, 2)


def to_blocks(mask: Tensor, grid: Grid) -> Tensor:
    """Token mask bool [B, rows*columns] on the fine grid -> bool [B, blocks]: a block with any token set is set."""
    rows, columns = coarse_grid(grid)
    return mask.reshape(-1, rows, BLOCK, columns, BLOCK).any(dim=4).any(dim=2).reshape(-1, rows * columns)


def from_blocks(blocks: Tensor, grid: Grid) -> Tensor:
    """Block values [B, blocks] -> the same values on the fine grid [B, rows*columns]."""
    rows, columns = coarse_grid(grid)
    x = blocks.reshape(-1, rows, 1, columns, 1).expand(-1, -1, BLOCK, -1, BLOCK)
    return x.reshape(-1, rows * columns * BLOCK * BLOCK).contiguous()  # one block alone would be a view


def token_positions(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Row and column of each fine token: fp32 [rows*columns, 2], raster order."""
    rows, columns = grid
    r = torch.arange(rows, dtype=torch.float32, device=device)
    c = torch.arange(columns, dtype=torch.float32, device=device)
    return torch.stack([r[:, None].expand(rows, columns), c[None, :].expand(rows, columns)], dim=-1).reshape(-1, 2)


def block_positions(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Centre of each 2x2 block in fine units, 2p + 0.5: fp32 [blocks, 2]. `grid` is the fine grid; at an odd side's end
    there is a block of half the tokens."""
    rows, columns = (-(-side // BLOCK) for side in grid)
    return token_positions((rows, columns), device) * BLOCK + (BLOCK - 1) / 2
