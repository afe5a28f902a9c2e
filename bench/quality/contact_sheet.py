# SPDX-License-Identifier: Apache-2.0
"""A picture of held-out edits: source, target, 50 plain steps, SpecEdit's default preset, and its mask.

python bench/quality/contact_sheet.py --out out/sheet         # OUT/contact_sheet.png
python bench/quality/contact_sheet.py --edits 3 70 140 199    # by their number in the evaluation set
"""

import argparse
import os

import torch
from PIL import Image
from scenes import KINDS, TASKS
from table_measures import to_pixels
from table_runs import (
    Row,
    Runner,
    add_arguments,
    add_thresholds,
    load_judge,
    load_pipeline,
    make_set,
    measure,
    prepare,
    stopwatch,
    with_thresholds,
)

from specedit_kernels import SpecEditConfig
from specedit_kernels.images.sheet import encode_within

LIMIT = 1_500_000  # bytes
# (task, small, which of them): two of a kind look different
WANTED = [
    ("replace", False, 3),
    ("remove", False, 5),
    ("recolor", False, 7),
    ("add", False, 2),
    ("replace", True, 2),
    ("add_open", None, 4),
    ("night", None, 1),
    ("snow", None, 3),
]


def varied(edits):
    """Positions of the wanted edits in a set, as far as it has them."""
    out = []
    for task, small, which in WANTED:
        fits = edits.edits.task == TASKS.index(task)
        if small is not None:
            fits &= (edits.edits.kind == KINDS.index("small")) == small
        found = fits.nonzero()[:, 0]
        found = found[edits.seeds[found].argsort()]
        if len(found):
            out.append(int(found[min(which, len(found) - 1)]))
    return out


def overlay(source, mask):
    """The source, darker outside the mask and red within: [n, 3, H, W] and bool [n, rows, columns] -> [n, 3, H, W]."""
    inside = to_pixels(mask)[:, None]
    red = source.new_tensor([1.0, 0.15, 0.15]).view(1, 3, 1, 1)
    return torch.where(inside, 0.55 * source + 0.45 * red, 0.45 * source)


def pil_pictures(images):
    """[n, 3, H, W] in [0, 1] -> PIL pictures."""
    levels = (images.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(array) for array in levels]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/sheet")
    parser.add_argument("--edits", type=int, nargs="+", help="numbers in the evaluation set; default: a varied choice")
    parser.add_argument("--steps", type=int, default=50, help="of the plain run")
    add_thresholds(parser)
    args = parser.parse_args()
    device, say = prepare(args), stopwatch()
    pipe = load_pipeline(args.model, device, getattr(torch, args.dtype))
    runner = Runner(pipe, args.text_length, args.true_cfg_scale)
    judge = load_judge(args.judge, device)
    edits = make_set(device, args.size, args.limit)
    if args.edits:
        missing = set(args.edits) - set(edits.seeds.tolist())
        if missing:
            parser.error(f"--edits: expected numbers of the evaluation set, got {sorted(missing)}")
        chosen = [edits.seeds.tolist().index(i) for i in args.edits]
    else:
        chosen = varied(edits)
    part = edits[torch.tensor(chosen)]
    config = SpecEditConfig()
    rows = {
        f"{args.steps} plain steps": Row("plain", steps=args.steps),
        f"SpecEdit, preset {config.preset}": with_thresholds([Row("specedit", config=config)], args.thresholds or [])[
            0
        ],
    }
    results = {
        title: [runner.run(row, part[piece]) for piece in torch.arange(len(part)).split(args.batch)]
        for title, row in rows.items()
    }
    images = {title: torch.cat([r.images for r in parts]) for title, parts in results.items()}
    source, target = part.pictures()
    masks = torch.cat([r.mask for r in results[f"SpecEdit, preset {config.preset}"]])
    columns = {"source": source, "target": target, **images, "its mask": overlay(source, masks)}
    captions = [
        f"{phrase}  ({KINDS[kind]}, {share:.0%} of the tokens selected)"
        for phrase, kind, share in zip(
            part.edits.phrases(), part.edits.kind.tolist(), masks.float().mean((1, 2)).tolist()
        )
    ]
    path = args.out / "contact_sheet.png"
    temporary = path.with_suffix(".part")
    temporary.write_bytes(encode_within({title: pil_pictures(x) for title, x in columns.items()}, captions, LIMIT))
    os.replace(temporary, path)
    if judge is not None:
        for title, parts in results.items():
            right = [
                bool(x)
                for piece, r in zip(torch.arange(len(part)).split(args.batch), parts)
                for x in measure(part[piece], r, judge)["right"]
            ]
            say(f"{title}: right {dict(zip(part.seeds.tolist(), right))}")
    say(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
