# SPDX-License-Identifier: Apache-2.0
"""Results at the source's own size: its bits outside the feathered edit region, the edit inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..images.align import Drift, align, estimate_drift
from ..images.composite import composite, edit_weight
from ..images.files import Photo
from ..images.resample import as_pillow


def photos_of(image: Any) -> tuple[list[Any], list[Photo]]:
    """(the pictures of a call, one by one as they were given; each as a Photo, not turned).

    TypeError for what is no PIL picture, array or Photo; an array [B, H, W, C] is B pictures.
    """
    given: list[Any] = []
    for picture in image if isinstance(image, list) else [image]:
        batch = isinstance(picture, np.ndarray) and picture.ndim == 4
        given += list(picture) if batch else [picture]
    photos = []
    for i, picture in enumerate(given):
        if not isinstance(picture, (Photo, PIL.Image.Image, np.ndarray)):
            raise TypeError(
                "image: expected PIL pictures or arrays with output_size='source', got "
                f"{type(picture).__name__}{f' at {i}' if isinstance(image, list) else ''}"
            )
        try:
            photos.append(picture if isinstance(picture, Photo) else Photo.of(picture, upright=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"image: {str(error).removeprefix('picture: ')}") from None
    return given, photos


def pixels_of(
    pictures: Sequence[PIL.Image.Image | Photo], device: torch.device, size: tuple[int, int] | None = None
) -> Tensor:
    """RGB pictures as pixels in [-1, 1], fp32 [n, 3, H, W], RGBA ones of the wanted size as [n, 4, H, W]: to the last
    bit those of VaeImageProcessor.

    size: (width, height) that they are brought to by Lanczos; None: they have one size, which stays.
    They go to the device as bytes and become numbers there: the host would take longer than the device for a step.
    """
    arrays = [picture.levels if isinstance(picture, Photo) else np.asarray(picture) for picture in pictures]
    levels = torch.stack([as_pillow(array, size or array.shape[1::-1], device) for array in arrays])
    # a tensor: a division by a number multiplies by its reciprocal
    return 2.0 * (levels.permute(0, 3, 1, 2).float() / torch.full((), 255.0, dtype=torch.float32, device=device)) - 1.0


def put_back(
    photo: Photo, source: np.ndarray, decoded: np.ndarray, region: np.ndarray, feather: int, drifts: bool,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, Drift | None]:  # fmt: skip
    """(the photo's array with the edit in its region, the drift that was found where one was looked for).

    source, decoded: floats in [0, 1], [h, w, 3], sRGB, at the working size. region: bool [rows, columns]. drifts:
    whether the model may have moved or recoloured what it was not to edit: then the run is brought back onto the source
    first, by the pixels outside the region; pixels that it does not show stay the source's. device: where the
    drift is estimated and the edit put in; on the CPU where its memory does not suffice.
    """
    try:
        return _put_back(photo, source, decoded, region, feather, drifts, device)
    except torch.cuda.OutOfMemoryError:  # the edit is made: it is not to be lost by its last step
        return _put_back(photo, source, decoded, region, feather, drifts, "cpu")


def _put_back(
    photo: Photo, source: np.ndarray, decoded: np.ndarray, region: np.ndarray, feather: int, drifts: bool,
    device: torch.device | str,
) -> tuple[np.ndarray, Drift | None]:  # fmt: skip
    drift = None
    if drifts and not region.all():
        height, width = decoded.shape[:2]
        weight = edit_weight(region, (width, height), feather)
        drift = estimate_drift(source, decoded, (weight > 0).numpy(), device)
        if drift.moved or drift.recoloured:
            decoded, seen = align(decoded, drift, (width, height))
            if not seen.all():
                region = (edit_weight(region, (width, height), 0) > 0).numpy() & seen
    return composite(photo.array, photo.unit(decoded), region, feather, device=device), drift


def compositing_device(device: torch.device) -> torch.device:
    """Where results of a run on a device are put together: there, where it is a GPU that has float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def as_given(given: Any, photo: Photo, array: np.ndarray, output_type: str) -> Any:
    """A result's array as what its source was given as: a Photo, a PIL picture, an array; an array for "np"."""
    if output_type == "np":
        return array
    if isinstance(given, Photo):
        return photo.with_array(array)
    if isinstance(given, np.ndarray):
        return array
    picture = photo.with_array(array).pil()
    # what Pillow writes into a file again
    kept = {k: v for k, v in given.info.items() if k not in ("transparency", "icc_profile")}
    picture.info.update(kept)
    return picture
