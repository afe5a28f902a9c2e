# SPDX-License-Identifier: Apache-2.0
"""The command's pictures on the disk: places tried before the work, results that outlive a failed write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..images.files import ImageFileError, Photo, check_target, shown, written_format
from .text import UserError


def check_output(path: str | os.PathLike, inputs: Sequence[str | os.PathLike]) -> Path:
    """A path, none of the inputs, that a picture can be written to; asked before the work, not after."""
    path = Path(path)
    written_format(path)
    target = check_target(path)
    for given in inputs:
        if target.exists() and os.path.exists(given) and target.samefile(given):
            raise UserError(f"{shown(path)}: is an input, and would be written over; name another output")
    return path


def keep(photos: Mapping[Path, Photo]) -> dict[Path, tuple[str, ...]]:
    """Write pictures at their places: what had to be converted for each, a line each.

    One that cannot be written goes into a new temporary folder, in its own format or as PNG; the UserError says where,
    after all others are written.
    """
    notes, failed = {}, []
    for path, photo in photos.items():
        try:
            notes[path] = photo.save(path)
        except ImageFileError as error:
            failed.append(f"{error}{_elsewhere(photo, path)}")
    if failed:
        raise UserError("; ".join(failed))
    return notes


def _elsewhere(photo: Photo, path: Path) -> str:
    for suffix in (path.suffix, ".png"):
        try:
            saved = Path(tempfile.mkdtemp(prefix="specedit-")) / f"{path.stem[:40]}{suffix}"
            photo.save(saved)
        except (ImageFileError, OSError):
            continue
        return f", it is kept as {shown(saved)}"
    return ""
