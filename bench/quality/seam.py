# SPDX-License-Identifier: Apache-2.0
"""The seam of an edit that is put into its source at twice the working size, against an exact target: OUT/seam.md.

    python bench/quality/seam.py --out out/seam --limit 4

The target is a photograph with a disc of another in it; the edited picture is the target at half the size after the
tiny autoencoder, with and without a cast. PSNR in the seam (weights between 0 and 1), in the 16 pixels inside of it,
and in the region.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drift import PHOTOS, Scorer, disc, read, table
from PIL import Image
from runtime import replace_file

from specedit_kernels.images.composite import composite

FEATHER = 8
CAST = 1.03, -0.01  # gain and offset, of 1


def linear(x):
    return np.where(x <= 0.04045, x / 12.92, ((np.maximum(x, 0) + 0.055) / 1.055) ** 2.4)


def coded(x):
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


def ways(source, edited, region):
    """Pictures by name, and the weight at each pixel, [H, W, 1]."""
    zeros = np.zeros_like(source)
    weight = composite(zeros, np.ones_like(edited), region, FEATHER, match=False)[..., :1]
    up = composite(zeros, edited, np.ones((1, 1), bool), 0, match=False)
    in_linear = coded(weight * linear(up) + (1 - weight) * linear(source))
    plain, matched = (composite(source, edited, region, FEATHER, match=match) for match in (False, True))
    return {"gamma": plain, "linear": in_linear, "gamma, matched": matched}, weight


def psnr(a, b, where):
    return float(-10 * np.log10(np.square(a - b)[where].mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/seam"))
    parser.add_argument("--limit", type=int, default=8, help="about so many photographs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scorer, paths = Scorer(), sorted(PHOTOS.glob("*.jpg"))
    found = {}
    for i in range(0, len(paths), max(len(paths) // args.limit, 1)):
        source, other = (read(paths[j % len(paths)]) / np.float32(255) for j in (i, i + 11))
        height, width = source.shape[:2]
        inside = disc(height, width, 0.1)
        target = np.where(inside[..., None], other, source)
        small = np.asarray(
            Image.fromarray((target * 255).round().astype(np.uint8)).resize((width // 2, height // 2), Image.LANCZOS)
        ) / np.float32(255)
        edited = scorer.through(small)
        tokens = F.max_pool2d(torch.from_numpy(inside).float()[None], 32)
        region = (F.max_pool2d(tokens, 3, 1, 1)[0] > 0).numpy()
        for cast, (gain, offset) in {"none": (1, 0), "x 1.03 - .01": CAST}.items():
            pictures, weight = ways(source, (edited * gain + offset).clip(0, 1).astype(np.float32), region)
            weight = weight[..., 0]
            deep = F.avg_pool2d(F.pad(torch.from_numpy(weight == 1).float()[None], (16,) * 4, value=1.0), 33, 1)[0]
            places = (weight > 0) & (weight < 1), (weight == 1) & (deep.numpy() < 1), weight > 0
            for name, picture in pictures.items():
                found.setdefault((cast, name), []).append([psnr(picture, target, p) for p in places])
        print(paths[i].stem, flush=True)
    lines = [
        [f"{name}, cast {cast}", *(f"{v:.2f}" for v in np.mean(values, axis=0))]
        for (cast, name), values in found.items()
    ]
    count = len(next(iter(found.values())))
    text = table([f"PSNR, mean of {count} photographs", "seam", "inside of it", "region"], lines)
    replace_file(args.out / "seam.md", lambda path: Path(path).write_text(text + "\n"))
    print(text)


if __name__ == "__main__":
    main()
