# SPDX-License-Identifier: Apache-2.0
"""Drift that is known: how far `specedit_kernels.images.align` is from it, and how much a mask grows by it.

    python bench/quality/drift.py --out out/drift                 # OUT/drift.{md,json}, on the photographs in data/
    python bench/quality/drift.py --pairs FOLDER                  # also NAME_source.*, NAME_edited.* of that folder
    python bench/quality/drift.py --masks                         # also what the tiny autoencoder's scores mark
    python bench/quality/drift.py --no-ops --pairs FOLDER         # OUT/no_ops.md: largest scores where nothing changed

An edited photograph is one with a disc of another in it. Its drift is made by Pillow's bicubic transform, so not by
what undoes it. Errors are in pixels of the source, the largest over its corners. A pair's own drift, as found, is part
of what is expected of it.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runtime import replace_file

from specedit_kernels import codec_of, ops
from specedit_kernels.cli.mask import pair_threshold
from specedit_kernels.images.align import Drift, align, estimate_drift

PHOTOS = Path(__file__).parent / "data" / "photos"
TINY = Path(__file__).parents[2] / "specedit_kernels" / "assets" / "tiny_kontext"
SCORED_AREA = 1024**2
THRESHOLD = 0.14  # of `specedit mask`, at most
# name -> (shift x, y in pixels, zoom, brightness, JPEG quality)
CASES = {
    "none": (0, 0, 1, 1, None),
    "jpeg 75": (0, 0, 1, 1, 75),
    "1, 0": (1, 0, 1, 1, None),
    ".5, .5": (0.5, 0.5, 1, 1, None),
    "2.3, -1.7": (2.3, -1.7, 1, 1, None),
    "-4, 4": (-4, 4, 1, 1, None),
    "8, 8": (8, 8, 1, 1, None),
    "-7.6, 5.4": (-7.6, 5.4, 1, 1, None),
    "zoom + .5 %": (0, 0, 1.005, 1, None),
    "zoom + 2 %": (0, 0, 1.02, 1, None),
    "zoom - 2 %": (0, 0, 0.98, 1, None),
    "brightness + 2 %": (0, 0, 1, 1.02, None),
    "brightness - 2 %": (0, 0, 1, 0.98, None),
    "3.4, -2.6, + 1 %, bright, jpeg 75": (3.4, -2.6, 1.01, 1.02, 75),
    "-8, 6.5, - 2 %, dark, jpeg 75": (-8, 6.5, 0.98, 0.98, 75),
    "8, -8, + 2 %, bright, jpeg 75": (8, -8, 1.02, 1.02, 75),
}


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def jpeg(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def drifted(picture, case):
    """A picture [h, w, 3] uint8 after a drift about its middle; the border's pixels go on outside."""
    dx, dy, zoom, bright, quality = case
    height, width = picture.shape[:2]
    out = picture
    if (dx, dy, zoom) != (0, 0, 1):
        pad = 64
        padded = Image.fromarray(np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
        # Pillow asks for the way back, from the output to the input
        x = width / 2 + pad - (width / 2 + dx) / zoom
        y = height / 2 + pad - (height / 2 + dy) / zoom
        moved = padded.transform((width, height), Image.AFFINE, (1 / zoom, 0, x, 0, 1 / zoom, y), Image.BICUBIC)
        out = np.asarray(moved)
    if bright != 1:
        out = (out.astype(np.float32) * bright).round().clip(0, 255).astype(np.uint8)
    return out if quality is None else jpeg(out, quality)


def corners(drift):
    """The source's corners in the edited picture, [2, 2]: (x, y) of the first, and of the last."""
    scale, shift = drift.placement()
    return np.array([shift, [a * s + b for a, s, b in zip(scale, drift.source_size, shift)]])


def error(found, own, case):
    """Pixels of the source between a drift that was found and the one expected: the pair's own, then the case's."""
    dx, dy, zoom = case[:3]
    size = np.array(own.edited_size, float)
    expected = (corners(own) - size / 2) * zoom + size / 2 + [dx, dy]
    off = np.abs(corners(found) - expected).max(axis=0) * np.array(own.source_size) / size
    return float(math.hypot(*off))


def disc(height, width, share):
    """bool [h, w], an ellipse of that share of the picture, off its middle."""
    y, x = np.mgrid[:height, :width]
    radius = math.sqrt(share / math.pi)
    return ((x / width - 0.45) ** 2 + (y / height - 0.55) ** 2) < radius**2


class Scorer:
    """What `specedit mask` asks: scores of a pair, and the share of tokens over its threshold."""

    def __init__(self):
        from diffusers import AutoencoderKL

        self.codec = codec_of(AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32))

    def size(self, picture):
        height, width = picture.shape[:2]
        scale = min(1.0, (SCORED_AREA / (height * width)) ** 0.5)
        return tuple(max(int(side * scale) // self.codec.token, 1) * self.codec.token for side in (width, height))

    def features(self, picture):
        """Decoder features of floats in [0, 1], [h, w, 3]; brought to 8 bits and to whole tokens."""
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        pixels = np.asarray(image.resize(self.size(picture), Image.LANCZOS), np.float32) / 127.5 - 1
        with torch.no_grad():
            return self.codec.features(self.codec.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]))

    def through(self, picture):
        """A picture [h, w, 3] after the autoencoder, at the size that is scored."""
        image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(self.size(picture), Image.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            back = self.codec.decode(self.codec.encode(pixels))[0].permute(1, 2, 0).numpy() / 2 + 0.5
        return back.clip(0, 1)

    def scores(self, source, edited):
        """(as `discrepancy` has them for "decoder", fp32 [1, N]; the token grid) of features."""
        # the first map is as fine as the latents
        grid = tuple(side // 2 for side in source[0].shape[-2:])
        return torch.stack([ops.token_discrepancy(a, b, grid) for a, b in zip(edited, source)]).mean(dim=0), grid

    def share(self, source, edited):
        scores, grid = self.scores(source, edited)
        threshold = pair_threshold(scores, THRESHOLD)
        return float(ops.select_tokens(scores, grid, threshold, 1, 0)[0].float().mean())


def brought(source, edited, drift):
    """The edited picture on its source's grid, with the source where nothing was seen."""
    aligned, seen = align(edited, drift, drift.source_size)
    return np.where(seen[..., None], aligned, source / np.float32(255))


def pairs_of(folder, names=None, shrink=1):
    """(name, source, edited) of NAME_source.* and NAME_edited.*, `shrink` times smaller a side."""
    for source in sorted(Path(folder).glob("*_source.*")):
        name = source.stem.removesuffix("_source")
        if names and name not in names:
            continue
        [edited] = Path(folder).glob(f"{name}_edited.*")
        yield name, *(np.asarray(Image.fromarray(read(path)).reduce(shrink)) for path in (source, edited))


def photo_pairs(limit):
    paths = sorted(PHOTOS.glob("*.jpg"))
    pictures = [read(p) for p in paths]
    for i in range(0, len(paths), max(len(paths) // limit, 1) if limit else 1):
        source, other = pictures[i], pictures[(i + 11) % len(paths)]
        inside = disc(*source.shape[:2], 0.08)[..., None]
        yield paths[i].stem, source, np.where(inside, other, source)


def unlike(limit):
    """(kind, name, source, edited) where there is nothing to align: other scenes, other backgrounds."""
    paths = sorted(PHOTOS.glob("*.jpg"))
    pictures = [read(p) for p in paths]
    for i in range(0, len(paths), max(len(paths) // limit, 1) if limit else 1):
        source, other = pictures[i], pictures[(i + 7) % len(paths)]
        yield "another scene", paths[i].stem, source, other
        subject = disc(*source.shape[:2], 0.2)[..., None]
        yield "another background", paths[i].stem, source, np.where(subject, source, other)


def measure(kind, name, source, edited, cases, scorer, say):
    """One row a case."""
    own = estimate_drift(source, edited)
    size = (source.shape[1], source.shape[0])
    plain, rows = Drift(size, own.edited_size), []
    if scorer is not None:
        clean = scorer.features(source / np.float32(255))
        share = scorer.share(clean, scorer.features(brought(source, edited, plain)))
    for case, values in cases.items():
        picture = drifted(edited, values)
        begin = time.perf_counter()
        found = estimate_drift(source, picture)
        row = {
            "kind": kind,
            "name": name,
            "case": case,
            "seconds": time.perf_counter() - begin,
            "found": found.found,
            "inliers": found.inliers,
            "error": error(found, own, values) if found.found else None,
            "gain": found.gain,
            "identity": found.found and not found.moved and not found.recoloured,
        }
        if scorer is not None:
            row["undrifted"] = share
            row["aligned"] = scorer.share(clean, scorer.features(brought(source, picture, found)))
        rows.append(row)
    say(f"{kind} {name}: {own}; " + " ".join("-" if r["error"] is None else f"{r['error']:.2f}" for r in rows))
    return rows


def table(head, lines):
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(line) + " |" for line in lines),
        ]
    )


def summary(rows):
    masks = "aligned" in rows[0]
    head = ["drift", "pictures", "found", "error: median", ".9", "largest", "over .25 px"]
    head += ["mask undrifted", "aligned", "grown over 20 %"] if masks else []
    text = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        lines = []
        for case in dict.fromkeys(r["case"] for r in rows):
            part = [r for r in rows if r["case"] == case and r["kind"] == kind]
            errors = np.array([r["error"] for r in part if r["error"] is not None])
            line = [case, str(len(part)), str(len(errors))]
            if len(errors):
                values = np.median(errors), np.quantile(errors, 0.9), errors.max()
                line += [*(f"{v:.3f}" for v in values), str(int((errors > 0.25).sum()))]
            else:
                line += ["-"] * 4
            if masks:
                line += [f"{100 * np.mean([r[k] for r in part]):.1f} %" for k in ("undrifted", "aligned")]
                line.append(str(sum(r["aligned"] > 1.2 * r["undrifted"] for r in part)))
            lines.append(line)
        text.append(f"{kind}\n\n{table(head, lines)}")
    return "\n\n".join(text)


def no_ops(args, scorer, say):
    """Largest scores, decoder and latents, of pictures that were only saved again or resized."""
    paths = sorted(PHOTOS.glob("*.jpg"))
    pictures = [(p.stem, read(p)) for p in paths[:: max(len(paths) // args.limit, 1) if args.limit else 1]]
    if args.pairs:
        pictures += [(name, source) for name, source, _ in pairs_of(args.pairs, args.names, args.shrink)]
    changes = {f"jpeg {q}": lambda p, q=q: jpeg(p, q) for q in (95, 85, 75, 50)}
    changes["half size and back"] = lambda p: np.asarray(
        Image.fromarray(p)
        .resize((p.shape[1] // 2, p.shape[0] // 2), Image.LANCZOS)
        .resize((p.shape[1], p.shape[0]), Image.LANCZOS)
    )
    changes["autoencoder"] = None
    found = {name: [] for name in changes}
    for name, picture in pictures:
        clean = scorer.features(picture / np.float32(255))
        for change, make in changes.items():
            if make is None:
                other = scorer.features(scorer.through(picture / np.float32(255)))
            else:
                other = scorer.features(make(picture) / np.float32(255))
            scores, _ = scorer.scores(clean, other)
            found[change].append([float(x) for x in (scores.max(), scores.quantile(0.99), scores.median())])
        say(f"no-op {name}")
    lines = []
    for change, values in found.items():
        values = np.array(values)
        lines.append(
            [
                change,
                str(len(values)),
                *(
                    f"{v:.4f}"
                    for v in (
                        np.median(values[:, 0]),
                        np.quantile(values[:, 0], 0.9),
                        values[:, 0].max(),
                        values[:, 1].max(),
                        np.median(values[:, 2]),
                    )
                ),
            ]
        )
    return table(
        ["no-op", "pictures", "largest score: median", ".9", "most", ".99 quantile of tokens: most", "median token"],
        lines,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/drift"))
    parser.add_argument("--pairs", type=Path, help="folder of NAME_source.* and NAME_edited.*")
    parser.add_argument("--names", nargs="*", help="of the pairs, these")
    parser.add_argument("--shrink", type=int, default=1, help="make the pairs smaller, so many times a side")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="these alone", metavar="CASE")
    parser.add_argument("--limit", type=int, help="about so many photographs")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--no-ops", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def say(text):
        print(text, flush=True)

    def write(name, text):
        replace_file(args.out / name, lambda path: Path(path).write_text(text))

    scorer = Scorer() if args.masks or args.no_ops else None
    if args.no_ops:
        text = no_ops(args, scorer, say)
        write("no_ops.md", text + "\n")
        return say(text)
    rows, cases = [], {name: CASES[name] for name in args.cases or CASES}
    sets = [("photographs", photo_pairs(args.limit))]
    if args.pairs:
        sets.insert(0, ("pairs", pairs_of(args.pairs, args.names, args.shrink)))
    for kind, pictures in sets:
        for name, source, edited in pictures:
            rows += measure(kind, name, source, edited, cases, scorer, say)
            write("drift.json", json.dumps(rows, indent=1) + "\n")
    others = [(kind, name, estimate_drift(a, b)) for kind, name, a, b in unlike(args.limit)]
    lines = [
        [
            kind,
            str(len(part)),
            str(sum(d.found for d in part)),
            str(sum(d.moved for d in part)),
            f"{max(d.inliers for d in part):.2f}",
        ]
        for kind in dict.fromkeys(o[0] for o in others)
        for part in [[d for k, _, d in others if k == kind]]
    ]
    text = summary(rows) + "\n\n" + table(["nothing to align", "pictures", "found", "moved", "largest share"], lines)
    write("drift.md", text + "\n")
    say(text)


if __name__ == "__main__":
    main()
