# SPDX-License-Identifier: Apache-2.0
"""Makes `data/` from its sources (see data/LICENSES.md): the sprite atlas from the Noto Color Emoji font and the
512-pixel photographs from folders of originals. Run once; the results are kept in the tree.

    python bench/quality/prepare_data.py --font NotoColorEmoji.ttf --photos DIR [DIR ...]
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DATA = Path(__file__).parent / "data"
CELL = 128  # the side of an atlas cell, pixels
FONT_SIZE = 109  # the only bitmap size in the font
COLUMNS = 10

# Sixty objects that differ in outline or colour; the order is part of the data (pairings are held out by index).
OBJECTS = {
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "cherry": 0x1F352,
    "strawberry": 0x1F353,
    "grapes": 0x1F347,
    "pineapple": 0x1F34D,
    "watermelon": 0x1F349,
    "carrot": 0x1F955,
    "broccoli": 0x1F966,
    "mushroom": 0x1F344,
    "burger": 0x1F354,
    "pizza": 0x1F355,
    "donut": 0x1F369,
    "cupcake": 0x1F9C1,
    "lollipop": 0x1F36D,
    "pretzel": 0x1F968,
    "cheese": 0x1F9C0,
    "egg": 0x1F373,
    "car": 0x1F697,
    "bus": 0x1F68C,
    "tractor": 0x1F69C,
    "train": 0x1F682,
    "rocket": 0x1F680,
    "airplane": 0x2708,
    "helicopter": 0x1F681,
    "sailboat": 0x26F5,
    "balloon": 0x1F388,
    "umbrella": 0x2614,
    "house": 0x1F3E0,
    "castle": 0x1F3F0,
    "tent": 0x26FA,
    "tree": 0x1F332,
    "palm": 0x1F334,
    "cactus": 0x1F335,
    "sunflower": 0x1F33B,
    "tulip": 0x1F337,
    "rose": 0x1F339,
    "cat": 0x1F431,
    "panda": 0x1F43C,
    "fox": 0x1F98A,
    "frog": 0x1F438,
    "pig": 0x1F437,
    "lion": 0x1F981,
    "rabbit": 0x1F430,
    "owl": 0x1F989,
    "penguin": 0x1F427,
    "turtle": 0x1F422,
    "fish": 0x1F420,
    "octopus": 0x1F419,
    "crab": 0x1F980,
    "butterfly": 0x1F98B,
    "ladybug": 0x1F41E,
    "snail": 0x1F40C,
    "guitar": 0x1F3B8,
    "drum": 0x1F941,
    "clock": 0x23F0,
    "camera": 0x1F4F7,
    "gift": 0x1F381,
    "star": 0x2B50,
    "football": 0x26BD,
}


def sprite(font, codepoint):
    """RGBA, CELL x CELL: the glyph scaled to fit the cell with a margin of two pixels."""
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    # U+FE0F asks for the colour form of characters that also have a text form.
    text = chr(codepoint) + ("\ufe0f" if codepoint < 0x10000 else "")
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for U+{codepoint:X}")
    glyph = canvas.crop(box)
    scale = (CELL - 4) / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    cell.paste(glyph, ((CELL - glyph.width) // 2, (CELL - glyph.height) // 2))
    return cell


def make_sprites(font_path):
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    rows = -(-len(OBJECTS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for i, codepoint in enumerate(OBJECTS.values()):
        atlas.paste(sprite(font, codepoint), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    atlas.save(DATA / "sprites.png", optimize=True)
    (DATA / "sprites.json").write_text(
        json.dumps({"cell": CELL, "columns": COLUMNS, "names": list(OBJECTS)}, indent=1) + "\n"
    )


def make_photos(folders, spec):
    """`spec`: [(file name, [(left, top, side) fractions of the shorter side, ...], target name, held out)]"""
    listing = {"train": [], "held_out": []}
    (DATA / "photos").mkdir(parents=True, exist_ok=True)
    for name, boxes, stem, held in spec:
        path = next((p for folder in folders for p in sorted(Path(folder).rglob(name))), None)
        if path is None:
            raise FileNotFoundError(f"{name} is in none of {folders}")
        image = Image.open(path).convert("RGB")
        short = min(image.size)
        for k, (left, top, side) in enumerate(boxes):
            left, top, side = round(left * short), round(top * short), round(side * short)
            crop = image.crop((left, top, left + side, top + side)).resize((512, 512), Image.Resampling.LANCZOS)
            out = f"{stem}{k}.jpg"
            buffer = io.BytesIO()
            crop.save(buffer, "JPEG", quality=86, optimize=True)
            (DATA / "photos" / out).write_bytes(buffer.getvalue())
            listing["held_out" if held else "train"].append(out)
    (DATA / "photos.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", required=True)
    parser.add_argument("--photos", nargs="+", required=True)
    args = parser.parse_args()
    make_sprites(args.font)
    make_photos(args.photos, json.loads((DATA / "photos_spec.json").read_text()))
