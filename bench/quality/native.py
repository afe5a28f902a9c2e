# SPDX-License-Identifier: Apache-2.0
"""Detail of the edit region in pictures larger than the working size, against exact targets: OUT/native.{json,md}.

    python bench/quality/native.py --out out/native                          # one GPU, about two minutes
    python bench/quality/native.py --out out/native --limit 12 --plain 0 --workers 1   # a CPU

Held-out local edits (evaluation_set), rendered at --times the side that the editor works at. Rows:

source            the picture as it was
vae(target), up   the target through the autoencoder at the working size, brought up by Lanczos
vae(target)       the same at the picture's own size
working           the edit at the working size, put into the picture (detail="working")
native            with a second pass over the region at the picture's resolution (detail="native")
plain-N           N plain steps on the whole picture at its own size

PSNR to the target within the pixels that it changes, of the edits with one right answer (remove, recolour); sharpness:
gradient energy where an output differs from its source over that of the target, median; right: by the judge.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from evaluate import changed_mask
from judge import WEIGHTS, judge_edits
from PIL import Image
from runtime import device as own_device
from runtime import replace_file
from sampler import decode_latents, encode_images
from scenes import KINDS, Renderer, evaluation_set
from table_measures import masked_psnr, mean, median, sharpness
from table_runs import SHIPPED, load_judge, load_pipeline, setting

from specedit_kernels import SpecEditConfig


def dtype_on(dev):
    return torch.bfloat16 if dev.type == "cuda" else torch.float32


def through(pipe, picture):
    return decode_latents(pipe.vae, encode_images(pipe.vae, picture)).float().clamp(0, 1)


def resized(picture, size):
    array = (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    found = np.asarray(Image.fromarray(array).resize((size, size), Image.LANCZOS), np.float32) / 255
    return torch.from_numpy(found).permute(2, 0, 1)[None].to(picture.device)


class Measure:
    """Rows of one edit after another."""

    def __init__(self, args, dev):
        self.args, self.device = args, dev
        self.pipe = load_pipeline(args.model, dev, dtype_on(dev))
        self.judge, self.renderer = load_judge(WEIGHTS, dev), Renderer(dev)

    def call(self, picture, phrase, seed, area, **options):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        out = self.pipe(
            image=picture, prompt=phrase, max_area=area, _auto_resize=False, max_sequence_length=self.args.text_length,
            generator=torch.Generator().manual_seed(seed), **options,
        )  # fmt: skip
        return out, time.perf_counter() - begin

    def edit(self, edits, index, times):
        """{row: its figures} of one edit in a picture of `times` the working side."""
        args, working = self.args, self.args.working
        size, phrase = working * times, edits.phrases()[0]
        drawn = self.renderer(edits, size, held_out=True)
        source, target = ((x * 255).round() / 255 for x in (drawn.source, drawn.target))
        array = (source[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        own = sharpness(target, changed_mask(source, target)).clamp(min=1e-8)
        rows, unique = {}, bool(edits.unique()[0])

        def add(name, output, seconds=math.nan, **more):
            if isinstance(output, np.ndarray):
                output = torch.from_numpy(output).permute(2, 0, 1)[None].to(self.device).float() / 255
            changed = changed_mask(source, output)
            rows[name] = {
                "psnr": masked_psnr(output, target, drawn.mask).item() if unique else math.nan,
                "sharpness": (sharpness(output, changed) / own).item() if changed.any() else math.nan,
                "right": float(judge_edits(self.judge, edits, source, output)[0]),
                "seconds": seconds,
                **more,
            }

        add("source", source)
        add("vae(target), up", resized(through(self.pipe, resized(target, working)), size))
        add("vae(target)", through(self.pipe, target))
        config = SpecEditConfig(quality=args.quality, runner=args.runner)
        for detail in ("working", "native"):
            out, seconds = self.call(
                array, phrase, index, working**2, output_size="source", detail=detail, specedit=config
            )
            found = out.stats.native[0] if out.stats.native else None
            add(detail, out.images[0], seconds, windows=len(found.windows) if found else math.nan)
        if args.plain and times <= args.largest_plain:
            out, seconds = self.call(
                source.cpu(), phrase, index, size * size, specedit=False, num_inference_steps=args.plain,
                height=size, width=size, output_type="pt",
            )  # fmt: skip
            add(f"plain-{args.plain}", out.images.float().clamp(0, 1), seconds)
        return rows


def measured(args, part, parts):
    """Figures of every `parts`-th edit from `part` on; what is done is written at once. They come in mixed order, for
    time may run out."""
    dev = own_device()
    edits = evaluation_set({kind: args.limit if kind == "local" else 0 for kind in KINDS})
    order = torch.randperm(len(edits), generator=torch.Generator().manual_seed(0)).tolist()
    measure, rows = Measure(args, dev), []
    begin = time.monotonic()
    for times in args.times:
        for i in order[part::parts]:
            if time.monotonic() - begin > args.patience:
                return rows
            found = measure.edit(edits[torch.tensor([i])], i, times)
            rows += [{"times": times, "edit": i, "row": name, **figures} for name, figures in found.items()]
            text = " ".join(f"{k} {v['psnr']:.2f}/{v['sharpness']:.2f}/{v['right']:.0f}" for k, v in found.items())
            print(f"x{times} edit {i}: {text}", flush=True)
            write_rows(args.out / f"native.{part}.json", rows)
    return rows


def write_rows(path, rows):
    replace_file(path, lambda p: Path(p).write_text(json.dumps(rows)))


def markdown(head, rows):
    lines = [json.dumps(head), ""]
    for times in dict.fromkeys(r["times"] for r in rows):
        here = [r for r in rows if r["times"] == times]
        lines += [
            f"{times} x the working side, {len({r['edit'] for r in here})} edits", "",
            "| row | PSNR inside, dB | sharpness | right | seconds | windows |", "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for name in dict.fromkeys(r["row"] for r in here):
            part = [r for r in here if r["row"] == name]
            values = [
                mean([r["psnr"] for r in part]), median([r["sharpness"] for r in part]),
                mean([r["right"] for r in part]), mean([r["seconds"] for r in part]),
                mean([r.get("windows", math.nan) for r in part]),
            ]  # fmt: skip
            text = (f"{v:.{d}f}" if math.isfinite(v) else "" for v, d in zip(values, (2, 3, 3, 2, 1)))
            lines.append(f"| {name} | " + " | ".join(text) + " |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/native"))
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--working", type=int, default=512, help="side in pixels that the editor works at")
    parser.add_argument("--times", type=int, nargs="+", default=[2, 4], help="the pictures' sides, in working sides")
    parser.add_argument("--limit", type=int, default=104, help="edits, a quarter of each kind of local ones")
    parser.add_argument("--plain", type=int, default=9, help="steps of the plain run, 0 for none")
    parser.add_argument("--largest-plain", type=int, default=4, help="of --times, up to which a plain run is made")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--runner", default="auto" if not torch.cuda.is_available() else "fused")
    parser.add_argument("--text-length", type=int, default=64, help="that prompts are padded to")
    parser.add_argument("--workers", type=int, default=6 if torch.cuda.is_available() else 1, help="processes")
    parser.add_argument("--patience", type=float, default=math.inf, help="seconds after which no edit is begun")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part is not None or args.workers == 1:
        rows = measured(args, args.part or 0, args.workers)
        if args.part is not None:
            return 0
    else:
        own = [sys.executable, __file__, *sys.argv[1:]]
        running = [subprocess.Popen([*own, "--part", str(i)]) for i in range(args.workers)]
        codes = [process.wait() for process in running]
        if any(codes):
            return 1
        rows = [row for i in range(args.workers) for row in json.loads((args.out / f"native.{i}.json").read_text())]
    for i in range(args.workers):
        (args.out / f"native.{i}.json").unlink()
    dev = own_device()
    args.dtype, args.size, args.batch, args.true_cfg_scale = str(dtype_on(dev)), args.working, 1, 1.0
    head = setting(args, dev) | {"quality": args.quality, "runner": args.runner}
    replace_file(args.out / "native.json", lambda p: Path(p).write_text(json.dumps({**head, "rows": rows}, indent=1)))
    text = markdown(head, sorted(rows, key=lambda r: r["times"]))
    replace_file(args.out / "native.md", lambda p: Path(p).write_text(text + "\n"))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
