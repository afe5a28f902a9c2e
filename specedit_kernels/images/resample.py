# SPDX-License-Identifier: Apache-2.0
"""Separable resampling of pictures between pixel grids that differ by a scale and a shift of each axis.

Coordinates are those of areas: pixel i covers i to i + 1, its centre is i + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STRIP = 64  # outputs of one matrix product: its matrix is a band, so wider strips multiply by more zeros


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _weights(start: int, stop: int, scale: float, shift: float, size: int) -> tuple[int, int, Tensor]:
    """Of outputs start to stop: (first input, input after the last, weights fp32 [stop - start, inputs])."""
    at = np.clip((np.arange(start, stop) + 0.5) * scale + shift, 0.0, size)
    stretch = max(scale, 1.0)
    low = max(int(np.floor(at.min() - 3 * stretch)), 0)
    high = min(int(np.ceil(at.max() + 3 * stretch)), size)
    weights = _lanczos((np.arange(low, high)[None] + 0.5 - at[:, None]) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    return low, high, torch.from_numpy(weights.astype(np.float32))


def resample(
    planes: Tensor,
    window: tuple[int, int, int, int],
    scale: Sequence[float],
    shift: Sequence[float] = (0.0, 0.0),
) -> Tensor:
    """Lanczos resampling (three lobes, widened where it makes smaller): fp32 [C, h, w] -> [C, rows, columns].

    window: (top, bottom, left, right), the part of the output grid that is computed. scale, shift: (x, y) each; the
    output's point p is at p * scale + shift of the input. Points outside the input take the border's values. Only
    the input under the window is read. Values may overshoot the input's range by some per cent at hard edges.
    """
    top, bottom, left, right = window
    rows, columns = planes.shape[-2:]
    (x, y), whole = shift, all(float(s).is_integer() for s in shift)
    if (
        tuple(scale) == (1, 1)
        and whole
        and 0 <= top + y
        and bottom + y <= rows
        and 0 <= left + x
        and right + x <= columns
    ):
        return planes[:, top + int(y) : bottom + int(y), left + int(x) : right + int(x)].clone()
    strips = [_weights(c, min(c + STRIP, right), scale[0], shift[0], columns) for c in range(left, right, STRIP)]
    first, last = min(s[0] for s in strips), max(s[1] for s in strips)
    out = planes.new_empty(planes.shape[0], bottom - top, right - left)
    for r in range(top, bottom, STRIP):
        low, high, weights = _weights(r, min(r + STRIP, bottom), scale[1], shift[1], rows)
        lines = torch.matmul(weights, planes[:, low:high, first:last])
        for c, (a, b, across) in zip(range(left, right, STRIP), strips):
            part = lines[..., a - first : b - first] @ across.T
            out[:, r - top : r - top + len(weights), c - left : c - left + len(across)] = part
    return out
