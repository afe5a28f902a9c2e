# SPDX-License-Identifier: Apache-2.0
"""`--box`: a rectangle of the picture in pixels or per cent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .text import UserError


@dataclass(frozen=True)
class Box:
    """Left, top, right, bottom; each in pixels, or in per cent of the picture's width or height."""

    sides: tuple[tuple[float, bool], ...]

    @staticmethod
    def parse(text: str) -> Box:
        """Of "10,20,300,400" or "5%,0,50%,100%". ValueError for another form."""
        parts = [part.strip() for part in text.split(",")]
        sides = tuple((float(part.removesuffix("%")), part.endswith("%")) for part in parts)
        if len(sides) != 4 or not all(math.isfinite(value) and value >= 0 for value, _ in sides):
            raise ValueError
        return Box(sides)

    def __str__(self) -> str:
        return ",".join(f"{value:g}{'%' * share}" for value, share in self.sides)

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Whole pixels that it touches, cut at the picture of that (width, height). UserError where there are none."""
        at = [value * side / 100 if share else value for (value, share), side in zip(self.sides, (*size, *size))]
        left, top = math.floor(at[0]), math.floor(at[1])
        right, bottom = min(math.ceil(at[2]), size[0]), min(math.ceil(at[3]), size[1])
        if left >= right or top >= bottom:
            raise UserError(f"--box {self}: selects nothing of {size[0]} x {size[1]} pixels")
        return left, top, right, bottom
