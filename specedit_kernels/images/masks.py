# SPDX-License-Identifier: Apache-2.0
"""A user's mask, in whatever form it comes, as tokens to edit: one rule for pictures, arrays, tensors and lists."""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("specedit_kernels")

LAYOUTS = "[H, W], [H, W, 1 to 4], [B, H, W], [B, 1, H, W] or [B, H, W, 1 to 4]"
GREY = (0.299, 0.587, 0.114)  # as Pillow makes L of RGB
SLACK = 1e-3  # a resampled float mask may pass 0 and 1 by so much


def token_mask(mask: Any, grid: tuple[int, int], name: str = "mask_image") -> Tensor:
    """A mask -> bool [n, rows * columns] on the CPU: tokens with a selected pixel are True.

    mask: a PIL picture of any mode, a numpy array, a torch tensor, nested lists of numbers, or a list or tuple of such
    masks (of one size or several), n in all. Arrays are [H, W], [H, W, C], [B, H, W], [B, 1, H, W] or [B, H, W, C] with
    C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha). Any size: it is laid over the whole picture.
    grid: (rows, columns) of tokens.

    A last dimension of 1 to 4 is taken for channels.

    A pixel is selected where its value is over one half of its type's range: of 255 for uint8, 65535 for uint16, 1 for
    floats and bool; other integers may be 0 and 1 alone. Colours count by their brightness; what is transparent is not
    selected.

    TypeError or ValueError, with `name`, for another kind, layout or range.
    """
    rows, columns = grid
    found = []
    for selected in _selections(mask, name):
        # the pixels that a token touches, as adaptive pooling has them, whose floats take many times as long
        for axis, count in ((1, rows), (2, columns)):
            side = selected.shape[axis]
            parts = (np.arange(i * side // count, -(-(i + 1) * side // count)) for i in range(count))
            selected = np.stack([selected.take(part, axis).any(axis) for part in parts], axis)
        found.append(torch.from_numpy(selected.reshape(-1, rows * columns)))
    return torch.cat(found)


def _selections(mask: Any, name: str) -> list[np.ndarray]:
    """Selected pixels, bool [n, H, W], of each array that a mask has."""
    if isinstance(mask, (list, tuple)):
        if not mask:
            raise ValueError(f"{name}: expected a mask or more, got an empty {type(mask).__name__}")
        if not _of_numbers(mask):
            return [selected for part in mask for selected in _selections(part, name)]
        try:
            mask = np.array(mask)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{name}: expected rows of one length, got a ragged list") from None
    return [_selected(_array(mask, name), name)]


def _of_numbers(mask: Any) -> bool:
    """Whether nested lists have numbers at their ends, and no pictures, arrays or tensors."""
    while isinstance(mask, (list, tuple)) and mask:
        mask = mask[0]
    return isinstance(mask, (numbers.Number, np.generic))


def _array(mask: Any, name: str) -> np.ndarray:
    """A picture, tensor or array as an array whose kind of numbers says its range."""
    import PIL.Image

    if isinstance(mask, PIL.Image.Image):
        return _picture(mask, name)
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        if mask.layout != torch.strided or mask.is_quantized:
            raise TypeError(f"{name}: expected a plain tensor, got {mask.layout}, {mask.dtype}")
        return (mask.float() if mask.is_floating_point() else mask.resolve_neg()).numpy()
    if isinstance(mask, (np.ndarray, np.generic)):
        return np.asarray(mask)
    raise TypeError(f"{name}: expected a PIL picture, an array, a tensor or a list of these, got {type(mask).__name__}")


def _picture(image: Any, name: str) -> np.ndarray:
    """A PIL picture's values at their own depth: grey [H, W], or with an alpha channel, or colours."""
    mode = image.mode
    if mode in ("P", "PA", "RGBa") or (mode in ("1", "L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    elif mode in ("RGBX", "CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif mode == "I":
        # how Pillow holds 16 bits a pixel in some files
        values = np.asarray(image)
        low, high = (values.min(), values.max()) if values.size else (0, 0)
        if low < 0 or high > 65535:
            raise ValueError(f"{name}: expected 0 to 65535 in a picture of mode I, got {low} to {high}")
        return values.astype(np.uint16)
    elif mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I;16"):
        raise ValueError(f"{name}: expected a picture of grey values or colours, got mode {mode}")
    values = np.asarray(image)
    return values.astype(np.uint16) if mode.startswith("I;16") else values


def _selected(values: np.ndarray, name: str) -> np.ndarray:
    """bool [n, H, W] of an array in one of the layouts."""
    shape = values.shape
    if values.ndim == 4 and shape[1] == 1:
        values = values[:, 0]
    elif values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and shape[-1] in (1, 2, 3, 4):
        values = values[None]
    elif values.ndim != 3 and not (values.ndim == 4 and shape[-1] in (1, 2, 3, 4)):
        raise ValueError(f"{name}: expected {LAYOUTS}, got {list(shape)}")
    if 0 in shape:
        raise ValueError(f"{name}: expected a pixel or more, got {list(shape)}")
    if values.ndim == 3 and values.dtype == np.uint8:
        _warn_of_ones(values, name)
        return np.ascontiguousarray(values > 127)
    values = _scaled(values, name)
    if values.ndim == 4:
        channels = values.shape[-1]
        alpha = values[..., -1] if channels in (2, 4) else None
        values = values[..., 0] if channels < 3 else values[..., :3] @ np.array(GREY, values.dtype)
        values = values if alpha is None else values * alpha
    return np.ascontiguousarray(values > 0.5)


def _warn_of_ones(values: np.ndarray, name: str) -> int:
    """The largest value of the type of unsigned ones, after a warning where theirs is 1."""
    top = int(np.iinfo(values.dtype).max)
    if values.max() == 1:
        logger.warning("%s: its largest value is 1 of %d, so it selects nothing; 0 and 1 go as bool", name, top)
    return top


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Values in [0, 1], fp32 or fp64."""
    kind = values.dtype.newbyteorder("=")
    if kind.kind == "b":
        return values.astype(np.float32)
    if kind in (np.uint8, np.uint16):
        top = _warn_of_ones(values, name)
        return values.astype(np.float64 if values.ndim == 4 else np.float32) / top
    low, high = (values.min(), values.max()) if kind.kind in "iuf" else (0, 0)
    if kind.kind in "iu":
        if low < 0 or high > 1:
            raise ValueError(f"{name}: expected 0 and 1 in {kind}, or uint8 or uint16; got {low} to {high}")
        return values.astype(np.float32)
    if kind.kind == "f":
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
        if low < -SLACK or high > 1 + SLACK:
            raise ValueError(f"{name}: expected floats in [0, 1], got {low:.4g} to {high:.4g}")
        return values.astype(np.float64 if values.ndim == 4 else np.float32)
    raise TypeError(f"{name}: expected bool, integers or floats, got {kind}")
