# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: pictures in columns with a title, a row an edit with its caption below."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

GAP, CAPTION, TITLE = 4, 18, 20
SIDES = range(192, 63, -8)


def draw_sheet(columns: Mapping[str, Sequence[Any]], captions: Sequence[str], side: int) -> Any:
    """A PIL picture. columns: {title: PIL pictures, None for an empty place}; a row for each caption. Pictures are
    scaled to fit into `side` pixels a side, at their ratio."""
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    width, height = len(columns) * (side + GAP) - GAP, TITLE + len(captions) * (side + CAPTION)
    sheet = PIL.Image.new("RGB", (width, height), "white")
    pen, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default()

    def write(left: int, top: int, text: str) -> None:
        # the font that Pillow brings has no other letters
        pen.text((left + 2, top), text.encode("latin-1", "replace").decode("latin-1"), fill="black", font=font)

    for c, (title, pictures) in enumerate(columns.items()):
        left = c * (side + GAP)
        write(left, 4, title)
        for r, picture in enumerate(pictures):
            if picture is not None:
                scale = side / max(picture.size)
                size = [max(round(length * scale), 1) for length in picture.size]
                small = picture.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)
                sheet.paste(small, (left, TITLE + r * (side + CAPTION)))
    for r, caption in enumerate(captions):
        write(0, TITLE + r * (side + CAPTION) + side + 2, caption)
    return sheet


def encode_within(columns: Mapping[str, Sequence[Any]], captions: Sequence[str], limit: int) -> bytes:
    """PNG bytes of the largest sheet within `limit` bytes. ValueError where there is none."""
    for side in SIDES:
        stream = io.BytesIO()
        draw_sheet(columns, captions, side).save(stream, "PNG", optimize=True)
        if stream.tell() <= limit:
            return stream.getvalue()
    raise ValueError(f"columns: {len(columns)} x {len(captions)} pictures do not fit into {limit} bytes")
