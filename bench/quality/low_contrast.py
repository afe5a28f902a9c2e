# SPDX-License-Identifier: Apache-2.0
"""Edits of little contrast in two pictures, by features of several scales: OUT/low_contrast.md.

    python bench/quality/low_contrast.py --out out/low_contrast --pairs FOLDER      # a CPU, about two minutes

A disc of 96 px of another photograph lies on the plainest part of each of the six plainest photographs, with a share of
its own contrast, and is taken away; both pictures are JPEGs of quality 92. Recall: the share of the disc's tokens over
the threshold of `specedit mask`; no-op: what the same picture at quality 75 marks. --pairs: NAME_source.*,
NAME_edited.*, and what is marked of those.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drift import PHOTOS, THRESHOLD, Scorer, brought, jpeg, pairs_of, read, table
from runtime import replace_file

from specedit_kernels import ops
from specedit_kernels.cli.mask import pair_threshold
from specedit_kernels.images.align import estimate_drift

CONTRASTS = 0.25, 0.12
WALL, SIDE, RADIUS = 160, 150, 48
SCALES = 1, 2, 4  # of the features' means, a side


def walls(pictures, count):
    """(index, top, left) of the plainest part of the `count` plainest pictures."""
    found = []
    for i, picture in enumerate(pictures):
        grey, span = picture.mean(axis=-1), range(32, picture.shape[0] - WALL, 32)
        parts = [(grey[y : y + WALL, x : x + WALL], y, x) for y in span for x in span]
        within = [(p.std(), y, x, i) for p, y, x in parts if 40 < p.mean() < 235]
        found += [min(within)] if within else []
    return [(i, y, x) for _, y, x, i in sorted(found)[:count]]


def variants(scorer, first, second):
    """{name: scores [tokens]} of two pictures' features."""
    found, ways = {}, {f"means of {k} x {k}": k for k in SCALES}
    for name, k in ways.items():
        coarse = [
            [F.interpolate(F.avg_pool2d(x, k), size=x.shape[-2:], mode="bilinear") if k > 1 else x for x in maps]
            for maps in (first, second)
        ]
        found[name] = scorer.scores(*coarse)[0][0]
        means = [((a + b) / 2).mean(dim=(-2, -1), keepdim=True) for a, b in zip(*coarse)]
        centred = [[x - m for x, m in zip(maps, means)] for maps in coarse]
        grid = tuple(side // 2 for side in first[0].shape[-2:])
        found[f"{name}, less theirs"] = torch.stack(
            [ops.token_discrepancy(b, a, grid) for a, b in zip(*centred)]
        ).mean(dim=0)[0]  # fmt: skip
    return found


def marked(scores):
    return scores > pair_threshold(scores, THRESHOLD)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/low_contrast"))
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--names", nargs="*", default=["kontext_cat", "step1x_0000", "step1x_0004", "qwen_bear"])
    parser.add_argument("--limit", type=int, default=6, help="photographs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scorer, pictures = Scorer(), [read(p) for p in sorted(PHOTOS.glob("*.jpg"))]
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    inside, recall, no_op, pairs = y**2 + x**2 < RADIUS**2, {}, {}, {}

    def features(picture):
        return scorer.features(picture / np.float32(255))

    for i, top, left in walls(pictures, args.limit):
        plain, other = (p.astype(np.float32) for p in (pictures[i], pictures[(i + 11) % len(pictures)]))
        other = other[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
        without = features(jpeg(pictures[i], 92))
        for name, scores in variants(scorer, without, features(jpeg(pictures[i], 75))).items():
            no_op.setdefault(name, []).append(float(marked(scores).float().mean()))
        box = slice(top + 5, top + 5 + SIDE), slice(left + 5, left + 5 + SIDE)
        where = np.zeros(plain.shape[:2], np.float32)
        where[box] = inside
        for contrast in CONTRASTS:
            source = plain.copy()
            source[box][inside] += contrast * (other - other.mean(axis=(0, 1)))[inside]
            scores = variants(scorer, features(jpeg(source.round().clip(0, 255).astype(np.uint8), 92)), without)
            grid = tuple(side // 2 for side in without[0].shape[-2:])
            tokens = F.adaptive_avg_pool2d(torch.from_numpy(where)[None, None], grid).flatten() > 0.5
            for name, found in scores.items():
                recall.setdefault((name, contrast), []).append(float(marked(found)[tokens].float().mean()))
        print(f"photograph {i}", flush=True)
    for _, source, edited in pairs_of(args.pairs, args.names) if args.pairs else ():
        own = source / np.float32(255)
        scores = variants(
            scorer, scorer.features(own), scorer.features(brought(source, edited, estimate_drift(source, edited)))
        )
        for name, found in scores.items():
            pairs.setdefault(name, []).append(float(marked(found).float().mean()))
    lines = [
        [name, *(f"{np.mean(recall[name, c]):.2f}" for c in CONTRASTS), f"{100 * np.mean(no_op[name]):.2f} %",
         ", ".join(f"{100 * v:.1f}" for v in pairs.get(name, []))]
        for name in no_op
    ]  # fmt: skip
    head = ["features", *(f"recall, contrast {c}" for c in CONTRASTS), "JPEG 75 no-op marks", "pairs mark, %"]
    text = table(head, lines)
    replace_file(args.out / "low_contrast.md", lambda path: Path(path).write_text(text + "\n"))
    print(text)


if __name__ == "__main__":
    main()
