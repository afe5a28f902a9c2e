# SPDX-License-Identifier: Apache-2.0
"""Windows of a large picture that together hold a region, each no larger than a model's working size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]  # top, bottom, left, right

LARGEST_SCALE = 4  # pixels of the working size brought up by more than this keep what is beyond
MARGIN = 16  # a window has at least 1 / MARGIN of the longest side around what it is there for
OVERLAP = 32  # neighbours share 1 / OVERLAP of the longest side, over which the later one fades in
QUANTUM = 4  # sides are whole multiples of 1 / QUANTUM of the longest one, so that few sizes occur


@dataclass(frozen=True)
class Window:
    """Pixels of the picture that one pass looks at.

    box: all of them. core: those that it changes, in the picture's pixels too. size: (height, width) that the box is
    brought to for the pass. fades: (pixels from the core's top, from its left) over which it fades in, 0 for a border
    that no other window has changed.
    """

    box: Box
    core: Box
    size: tuple[int, int]
    fades: tuple[int, int] = (0, 0)

    def tokens(self, region: np.ndarray, picture: tuple[int, int], token: int) -> np.ndarray:
        """Which tokens of the pass touch the region within the core: bool [rows, columns].

        region: bool [rows, columns] over the whole picture, whose (width, height) is `picture`. token: pixels a side.
        """
        axes = []
        for axis, side in enumerate((picture[1], picture[0])):
            start, stop = self.box[2 * axis : 2 * axis + 2]
            count, cells = self.size[axis] // token, region.shape[axis]
            edges = start + np.arange(count + 1) * ((stop - start) / count)
            low, high = (
                edges[part].clip(self.core[2 * axis], self.core[2 * axis + 1]) for part in (slice(-1), slice(1, None))
            )
            first = np.floor(low * cells / side + 1e-6).astype(int).clip(0, cells - 1)
            last = np.ceil(high * cells / side - 1e-6).astype(int).clip(1, cells)
            axes.append((first, np.where(high > low, last, first)))
        (top, bottom), (left, right) = axes
        # how many cells of the region lie above and left of each corner
        sums = np.pad(region.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        found = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
        return found > 0

    def weight(self) -> np.ndarray:
        """How much of each pixel of the box is this window's: fp32 [height, width], 1 in the core, 0 outside."""
        axes = []
        for axis in (0, 1):
            start, stop = self.box[2 * axis : 2 * axis + 2]
            low, high = self.core[2 * axis : 2 * axis + 2]
            at = np.arange(start, stop) + 0.5
            inside = (at > low) & (at < high)
            fade = self.fades[axis]
            axes.append(np.where(inside, np.minimum((at - low) / fade, 1.0) if fade else 1.0, 0.0))
        return np.minimum(axes[0][:, None], axes[1]).astype(np.float32)


def windows(
    region: np.ndarray, picture: tuple[int, int], working: tuple[int, int], block: int, seam: int = 0
) -> list[Window]:
    """The windows of a region, those above and left of others first.

    region: bool [rows, columns] over the whole picture. picture: its (width, height). working: (width, height) that
    the model runs at. block: sides of a pass are multiples of so many pixels. seam: pixels of the working size around
    the region that belong to it.

    A picture of up to LARGEST_SCALE times the working size is looked at as it is, one beyond at that scale. Parts of
    the region that lie far apart get windows of their own; a part that is larger than a window is cut.
    """
    scale = math.sqrt(picture[0] * picture[1] / (working[0] * working[1]))
    shrink = max(scale / LARGEST_SCALE, 1.0)
    longest = max(math.isqrt(working[0] * working[1]) // block, 1) * block
    reach = seam * scale / shrink
    margin = min(max(longest // MARGIN, math.ceil(reach) + block // 2), longest // 4)
    overlap = max(longest // OVERLAP, 1)
    # of the pass's pixels; cells of the region are cut between
    cell = tuple(side / shrink / cells for side, cells in zip((picture[1], picture[0]), region.shape))
    found = []
    for (top, bottom, left, right), cut in _parts(region, cell, longest - 2 * margin - overlap, 2 * margin):
        core = [top * cell[0], bottom * cell[0], left * cell[1], right * cell[1]]
        for side, way in enumerate((-1, 1, -1, 1)):
            # it fades in over what the part above, or on the left, has changed
            core[side] += way * ((overlap if way < 0 else 0.0) if cut[side] else reach)
        found.append(_window(core, (cut[0], cut[2]), picture, shrink, longest, margin, overlap, block))
    return found


def _box(sides: list[int]) -> Box:
    top, bottom, left, right = sides
    return top, bottom, left, right


def _parts(region: np.ndarray, cell: tuple[float, float], limit: float, gap: float) -> Iterator[tuple[Box, tuple]]:
    """(box in cells, whether it was cut at (top, bottom, left, right)) of parts that hold all of a region.

    limit: the longest side of a part; gap: what an empty band has to be wider than to part what lies beside it.
    """
    stack: list[tuple[Box, tuple]] = [((0, region.shape[0], 0, region.shape[1]), (False,) * 4)]
    while stack:
        (top, bottom, left, right), cut = stack.pop()
        part = region[top:bottom, left:right]
        if not part.any():
            continue
        spans = []
        for axis, start in ((0, top), (1, left)):
            filled = np.flatnonzero(part.any(axis=1 - axis))
            spans.append((start + int(filled[0]), start + int(filled[-1]) + 1, start + filled))
        box = (spans[0][0], spans[0][1], spans[1][0], spans[1][1])
        # a border that was moved inwards is no longer where the part goes on
        cut = tuple(c and a == b for c, a, b in zip(cut, box, (top, bottom, left, right)))
        at = _empty_band(spans, cell, gap)
        if at is not None:
            axis, before, after = at
            first, second = list(box), list(box)
            first[2 * axis + 1], second[2 * axis] = before, after
            ends, begins = list(cut), list(cut)
            ends[2 * axis + 1] = begins[2 * axis] = False
            stack += [(_box(second), tuple(begins)), (_box(first), tuple(ends))]
            continue
        sides = [(box[2 * axis + 1] - box[2 * axis]) * cell[axis] for axis in (0, 1)]
        axis = int(sides[1] > sides[0])
        low, high = box[2 * axis : 2 * axis + 2]
        if sides[axis] <= limit or high - low < 2:
            yield box, cut
            continue
        count = math.ceil(sides[axis] / limit)
        middle = low + max((high - low) * (count // 2) // count, 1)
        first, second = list(box), list(box)
        first[2 * axis + 1] = second[2 * axis] = middle
        ends, begins = list(cut), list(cut)
        ends[2 * axis + 1] = begins[2 * axis] = True
        stack += [(_box(second), tuple(begins)), (_box(first), tuple(ends))]


def _empty_band(spans: list, cell: tuple[float, float], gap: float) -> tuple[int, int, int] | None:
    """(axis, cell before, cell after) of the widest empty band across a part, wider than `gap`; or None."""
    best, widest = None, gap
    for axis in (0, 1):
        filled = spans[axis][2]
        steps = np.diff(filled)
        if len(steps) and (steps.max() - 1) * cell[axis] > widest:
            i = int(steps.argmax())
            widest = (steps[i] - 1) * cell[axis]
            best = axis, int(filled[i]) + 1, int(filled[i + 1])
    return best


def _window(
    core: list[float], cut: tuple[bool, bool], picture: tuple[int, int], shrink: float, longest: int, margin: int,
    overlap: int, block: int,
) -> Window:  # fmt: skip
    """The window of one part; core in the pass's pixels."""
    box, inner, size = [], [], []
    quantum = max(longest // QUANTUM // block, 1) * block
    for axis, side in enumerate((picture[1], picture[0])):
        whole = side / shrink
        low, high = max(core[2 * axis], 0.0), min(core[2 * axis + 1], whole)
        wanted = high - low + 2 * max(margin, (high - low) / 4)
        wanted = min(math.ceil(wanted / quantum) * quantum, longest)
        if wanted >= whole:
            start, stop, count = 0, side, max(round(whole / block), 1) * block
        else:
            count = wanted
            length = min(round(count * shrink), side)
            start = round((low + high) / 2 * shrink - length / 2)
            start = min(max(start, 0), side - length)
            stop = start + length
        box += [start, stop]
        inner += [max(math.floor(low * shrink), start), min(math.ceil(high * shrink), stop)]
        size.append(min(count, max(longest, block)))
    fades = [max(round(overlap * shrink), 1) if c else 0 for c in cut]
    return Window(_box(box), _box(inner), (size[0], size[1]), (fades[0], fades[1]))
