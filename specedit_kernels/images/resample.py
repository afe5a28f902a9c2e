# SPDX-License-Identifier: Apache-2.0
"""Separable resampling of pictures between pixel grids that differ by a scale and a shift of each axis.

Coordinates are those of areas: pixel i covers i to i + 1, its centre is i + 0.5.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Outputs of one matrix product. Its matrix is a band, so wider strips multiply by more zeros; a GPU wants few products.
STRIP, DEVICE_STRIP = 64, 1024
BITS = 22  # behind the point of Pillow's weights of pictures of 8 bits


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _weights(
    start: int, stop: int, scale: float, shift: float, size: int, strip: int, device: torch.device
) -> list[tuple[int, int, Tensor]]:
    """Of outputs start to stop, a strip after another: (first input, input after the last, weights fp32 [strip,
    inputs]), on a device."""
    at = np.clip((np.arange(start, stop) + 0.5) * scale + shift, 0.0, size)
    stretch = max(scale, 1.0)
    low = np.maximum(np.floor(at - 3 * stretch).astype(np.int64), 0)
    high = np.minimum(np.ceil(at + 3 * stretch).astype(np.int64), size)
    # of each output the inputs that it sees, and no more
    inputs = low[:, None] + np.arange((high - low).max())
    weights = np.where(inputs < high[:, None], _lanczos((inputs + 0.5 - at[:, None]) / stretch), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    found = []
    for i in range(0, stop - start, strip):
        part = slice(i, i + strip)
        first, last = int(low[part].min()), int(high[part].max())
        band = np.zeros((len(at[part]), last - first), np.float32)
        seen = inputs[part] < high[part, None]
        band[np.nonzero(seen)[0], inputs[part][seen] - first] = weights[part][seen]
        found.append((first, last, torch.from_numpy(band).to(device)))
    return found


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
    strip = STRIP if planes.device.type == "cpu" else DEVICE_STRIP
    across = _weights(left, right, scale[0], shift[0], columns, strip, planes.device)
    first, last = min(s[0] for s in across), max(s[1] for s in across)
    out = planes.new_empty(planes.shape[0], bottom - top, right - left)
    r = 0
    for low, high, down in _weights(top, bottom, scale[1], shift[1], rows, strip, planes.device):
        lines = torch.matmul(down, planes[:, low:high, first:last])
        c = 0
        for a, b, weights in across:
            out[:, r : r + len(down), c : c + len(weights)] = lines[..., a - first : b - first] @ weights.T
            c += len(weights)
        r += len(down)
    return out


@functools.lru_cache(maxsize=16)
def _whole_weights(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """(first input of each output, weights as whole numbers, int32 [inputs, outputs]) as Pillow has them."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    at = (np.arange(wanted) + 0.5) * scale
    low = np.maximum((at - 3 * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((at + 3 * stretch + 0.5).astype(np.int64), size)
    inputs = low + np.arange((high - low).max())[:, None]
    weights = np.where(inputs < high, _lanczos((inputs - at + 0.5) * (1 / stretch)), 0.0)
    weights = weights / weights.sum(axis=0) * (1 << BITS)
    return low, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def resized_levels(levels: Tensor, size: tuple[int, int], axes: Sequence[int] = (1, 0)) -> Tensor:
    """uint8 [h, w, C] at (width, height), to the last bit as Pillow's LANCZOS gives it; on the device of `levels`.

    In whole numbers as Pillow computes, so no order of sums changes a bit. axes: which is resized first.
    """
    for axis in axes:
        have, wanted = levels.shape[axis], size[1 - axis]
        if have == wanted:
            continue
        first, weights = (torch.from_numpy(x).to(levels.device) for x in _whole_weights(have, wanted))
        shape = [1, 1, 1]
        shape[axis] = wanted
        total = torch.full((), 1 << (BITS - 1), dtype=torch.int32, device=levels.device)
        for k, weight in enumerate(weights):
            # past the last input the weight is 0
            seen = levels.index_select(axis, (first + k).clamp_(max=have - 1))
            total = total + seen.int().mul_(weight.view(shape))
        levels = (total >> BITS).clamp_(0, 255).to(torch.uint8)
    return levels


# Which axis Pillow resizes first depends on its version and on (width, height) before and after: its result tells.
_AXES: dict[tuple, tuple[int, int]] = {}


def as_pillow(levels: np.ndarray, size: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 [h, w, 3] at (width, height) on a device, to the last bit as Pillow's LANCZOS gives it.

    On a GPU computed there, from the second picture of a size on; else by Pillow, which needs less of a CPU.
    """
    import PIL.Image

    sizes = (levels.shape[1::-1], tuple(size))
    if sizes[0] == sizes[1]:
        return _copied(levels, device)
    try:
        if device.type != "cpu" and sizes in _AXES:
            return resized_levels(_copied(levels, device), size, _AXES[sizes])
        picture = PIL.Image.fromarray(levels).resize(size, PIL.Image.Resampling.LANCZOS)
        found = _copied(np.asarray(picture), device)
        if device.type != "cpu":
            given = _copied(levels, device)
            same = [axes for axes in ((1, 0), (0, 1)) if torch.equal(resized_levels(given, size, axes), found)]
            if len(same) == 1:  # a picture of one colour says nothing
                _AXES[sizes] = same[0]
        return found
    except torch.cuda.OutOfMemoryError:  # of a picture that is large for what is left beside the model
        return as_pillow(levels, size, torch.device("cpu")).to(device)


def _copied(levels: np.ndarray, device: torch.device) -> Tensor:
    # Pillow's arrays cannot be written to, of which torch warns
    levels = np.ascontiguousarray(levels)
    return torch.from_numpy(levels if levels.flags.writeable else levels.copy()).to(device)
