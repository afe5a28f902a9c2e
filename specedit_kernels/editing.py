# SPDX-License-Identifier: Apache-2.0
"""`edit_image`: one call from a picture to its edited file."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .images.files import Photo


@dataclass(frozen=True)
class EditResult:
    """An edited picture.

    photo: its pixels with the source's profile and metadata. picture: the same as PIL, or as an array where the source
    was one or PIL has no such mode (16 bits a colour). mask: bool [rows, columns], the edit region on the token grid.
    stats: SpecEditStats. notes: what was converted, a line each.
    """

    photo: Photo
    picture: Any
    mask: np.ndarray
    stats: Any
    notes: tuple[str, ...]

    def save(self, path: str | os.PathLike) -> tuple[str, ...]:
        """Write a file in the format of its name, with profile and metadata. What had to be converted, a line each."""
        return self.photo.save(path)


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path, device: str | None) -> tuple[Any, Mapping[str, Any]]:
    """(pipeline, the call's options that its folder asks for), kept until another is asked for."""
    import specedit_kernels

    from .cli import models

    name = models.model_class(folder)
    settings = models.model_settings(folder, name)
    pipe = models.load_pipeline(getattr(specedit_kernels, f"SpecEdit{name}"), folder, *models.device_of(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe, settings


def edit_image(
    image: Any,
    instruction: str,
    *,
    model: Any = None,
    references: Sequence[Any] = (),
    mask: Any = None,
    region: Any = None,
    mask_mode: str = "replace",
    output_size: str = "source",
    detail: str = "working",
    quality: str = "balanced",
    seed: int = 0,
    device: str | None = None,
    **options: Any,
) -> EditResult:
    """Edit a picture by an instruction; outside the edit region it stays as it is, bit for bit.

    image: a path, a PIL picture of any mode (turned upright), an array (uint8, uint16 or floats in [0, 1]; [H, W], or
    [H, W, 1 to 4]) or a Photo. references: further ones, for a model that takes several. model: a folder, a shipped
    model's name, None for the shipped FLUX editor, or a SpecEdit pipeline; the last folder's is kept in memory. mask:
    a path, or what `mask_image` takes. region, mask_mode: as in the pipelines' call. output_size: "source", or
    "working" for the model's own. detail: "native" for a second pass over the region at the picture's own resolution.
    quality: of SpecEditConfig, for the rest of which give specedit=. seed: of the noise,
    drawn on the CPU. device: of a model that is loaded here. options: the pipeline's other call arguments.

    ValueError, or TypeError, one line, for input that cannot be.
    """
    import torch

    from .cli import models
    from .engine.config import SpecEditConfig
    from .engine.pipeline import SpecEditMixin

    photo = _photo(image, "image")
    if isinstance(mask, (str, os.PathLike)):
        mask = Photo.open(mask).array
    settings: Mapping[str, Any] = {}
    if model is None or isinstance(model, (str, os.PathLike)):
        pipe, settings = _loaded(models.model_folder(model, "model").resolve(), device)
    elif isinstance(model, SpecEditMixin):
        pipe = model
    else:
        kind = type(model).__name__
        raise TypeError(f"model: expected a folder, a name or a SpecEdit pipeline (enable_specedit), got {kind}")
    specedit = options.pop("specedit", None)
    if specedit is None and pipe.CONFIG is SpecEditConfig:
        specedit = SpecEditConfig(quality=quality)
    found = pipe(
        image=[photo, *(_photo(other, "references") for other in references)] if references else photo,
        prompt=instruction,
        mask_image=mask,
        region=region,
        mask_mode=mask_mode,
        output_size=output_size,
        detail=detail,
        specedit=specedit,
        generator=torch.Generator().manual_seed(seed),
        **{**settings, **options},
    )
    edited = found.images[0]
    edited = edited if isinstance(edited, Photo) else photo.with_picture(edited)
    picture = edited.array if isinstance(image, np.ndarray) else edited.pil()
    return EditResult(edited, picture, found.mask[0].cpu().numpy(), found.stats, photo.notes)


def _photo(image: Any, name: str) -> Photo:
    if isinstance(image, Photo):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Photo.open(image)
    if not isinstance(image, np.ndarray) and not hasattr(image, "convert"):
        raise TypeError(f"{name}: expected a path, a PIL picture or an array, got {type(image).__name__}")
    try:
        return Photo.of(image)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('picture: ')}") from None
