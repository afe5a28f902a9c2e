# SPDX-License-Identifier: Apache-2.0
"""Rectangles of a picture in pixels or per cent: `region=` in Python, `--box` of the command."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXPECTED = "(x0, y0, x1, y1) in pixels, or in per cent as in '10%,0,50%,100%'"


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom; each in pixels, or in per cent of the picture's width or height."""

    sides: tuple[tuple[float, bool], ...]

    @staticmethod
    def parse(text: str) -> Box:
        """Of "10,20,300,400" or "5%,0,50%,100%". ValueError for another form."""
        return Box.of(tuple(text.split(",")))

    @staticmethod
    def of(sides: Sequence[Any]) -> Box:
        """Of four numbers, or texts of numbers that may end in %. ValueError for another form."""
        found = []
        for side in sides:
            text = side.strip() if isinstance(side, str) else side
            share = isinstance(text, str) and text.endswith("%")
            found.append((float(text.removesuffix("%") if share else text), share))
        if len(found) != 4 or not all(math.isfinite(value) and value >= 0 for value, _ in found):
            raise ValueError(f"a box: expected {EXPECTED}, got {tuple(sides)}")
        return Box(tuple(found))

    def __str__(self) -> str:
        return ",".join(f"{value:g}{'%' * share}" for value, share in self.sides)

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Whole pixels that it touches, cut at the picture of that (width, height). ValueError where there are none."""
        at = [value * side / 100 if share else value for (value, share), side in zip(self.sides, (*size, *size))]
        left, top = math.floor(at[0]), math.floor(at[1])
        right, bottom = min(math.ceil(at[2]), size[0]), min(math.ceil(at[3]), size[1])
        if left >= right or top >= bottom:
            raise ValueError(f"box {self}: selects nothing of {size[0]} x {size[1]} pixels")
        return left, top, right, bottom


def boxes_of(region: Any, name: str = "region") -> list[Box]:
    """One box or several: each a Box, a text, or four numbers. TypeError or ValueError, with `name`, for another."""
    try:
        if isinstance(region, Box):
            return [region]
        if isinstance(region, str):
            return [Box.parse(region)]
        sides = list(region)
        if sides and all(_is_side(side) for side in sides):
            return [Box.of(sides)]
        found = [box for part in sides for box in boxes_of(part, name)]
    except TypeError:
        raise TypeError(f"{name}: expected {EXPECTED}, or a list of such boxes, got {region!r}") from None
    except ValueError:
        raise ValueError(f"{name}: expected {EXPECTED}, or a list of such boxes, got {region!r}") from None
    if not found:
        raise ValueError(f"{name}: expected a box or more, got none")
    return found


def _is_side(side: Any) -> bool:
    return isinstance(side, numbers.Real) or (isinstance(side, str) and "," not in side)


def box_tokens(boxes: Sequence[Box], size: tuple[int, int], grid: tuple[int, int], name: str = "region") -> Tensor:
    """Tokens that boxes touch in a picture of (width, height) that is laid over the grid: bool [rows * columns]."""
    rows, columns = grid
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for box in boxes:
        try:
            left, top, right, bottom = box.pixels(size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        down = slice(top * rows // size[1], -(-bottom * rows // size[1]))
        found[down, left * columns // size[0] : -(-right * columns // size[0])] = True
    return found.flatten()
