# SPDX-License-Identifier: Apache-2.0
"""The pictures that `specedit bench` has: photographs of data/photos and scenes of the generator, all free.

python bench/quality/bench_pictures.py      # writes specedit_kernels/assets/bench
"""

import itertools
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from scenes import DATA, TASKS, Renderer, photo_files, sample

OUT = Path(__file__).parents[2] / "specedit_kernels" / "assets" / "bench"
# of those in the public domain or under CC0 (data/LICENSES.md): what any editor can do with them
PHOTOS = (
    ("chelsea0.jpg", "make the eye of the cat blue"),
    ("coffee1.jpg", "remove the spoon"),
    ("rocket0.jpg", "add a full moon to the sky at the top left"),
    ("dandelion0.jpg", "replace the large dandelion with a red rose"),
)
# what the tiny editors can do: a task each, on a held-out background under CC0
SCENES = ("recolor", "replace", "remove")
BACKGROUNDS = ("coffee", "dandelion", "gravel")
SIZE, QUALITY, LIMIT = 512, 78, 300_000


def scene(task, renderer):
    """(source picture, instruction) of the first edit drawn for a task on such a background."""
    generator = torch.Generator().manual_seed(2605 + TASKS.index(task))
    for _ in range(100):
        edit = sample(1, generator, held_out=True, tasks=torch.tensor([TASKS.index(task)]), small=False)
        name = photo_files(True)[int(edit.photo)]
        if name.startswith(BACKGROUNDS):
            source = renderer(edit, SIZE, held_out=True).source[0]
            array = (source.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            return Image.fromarray(array), edit.phrases()[0]
    raise RuntimeError(f"no edit {task!r} has a background of {BACKGROUNDS}")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rows, renderer = [], Renderer()
    for task in SCENES:
        picture, instruction = scene(task, renderer)
        name = f"scene_{task}.jpg"
        picture.save(OUT / name, quality=QUALITY, optimize=True)
        rows.append({"image": name, "instruction": instruction})
    for name, instruction in PHOTOS:
        shutil.copy(DATA / "photos" / name, OUT / name)
        rows.append({"image": name, "instruction": instruction})
    # one of each in turn: a run that ends early has both
    scenes, photos = rows[: len(SCENES)], rows[len(SCENES) :]
    rows = [row for pair in itertools.zip_longest(photos, scenes) for row in pair if row]
    (OUT / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    total = sum(path.stat().st_size for path in OUT.iterdir())
    print(f"{len(rows)} pictures, {total} bytes")
    return int(total > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
