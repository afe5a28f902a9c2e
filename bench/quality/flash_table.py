# SPDX-License-Identifier: Apache-2.0
"""FlashEdit on the held-out local edits: whole, without each of its parts, and beside the multi-step baselines.

    python bench/quality/flash_table.py --cosi runs/cosi                 # OUT/flash_table.md and .json
    python bench/quality/flash_table.py --cosi runs/cosi --limit 12 --rows flash 'flash, *'

Columns: right, by the judge; PSNR and SSIM outside the edit against the source, and PSNR there against the source as
the autoencoder gives it back, whose own error would hide what the edit does; PSNR inside against the true target, of
edits with one right answer; sharpness, as in table.py; recall of the true region and share of the tokens of the mask;
and, of the source branch, how far it is from giving the source back: the cycle that COSI trains.
"""

import argparse
import fnmatch
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from judge import judge_edits
from scenes import EVALUATION_COUNTS
from table_measures import grow, masked_psnr, mean, median, recall_precision, to_pixels
from table_runs import (
    SHIPPED,
    Batched,
    Runner,
    add_arguments,
    cell,
    jsonable,
    load_judge,
    load_pipeline,
    make_set,
    markdown_table,
    prepare,
    relative_sharpness,
    setting,
    stopwatch,
    write_json,
    write_text,
)

from specedit_kernels import FlashEditConfig, FlashEditFluxKontextPipeline, SpecEditConfig
from specedit_kernels.flash_edit import GENERATOR, LowRankChange

FLASH = FlashEditConfig()


@dataclass(frozen=True)
class Row:
    """config: a FlashEdit or SpecEdit run; steps: plain steps in its place; oracle: with the true mask, grown by a
    token. generator: "cosi", the COSI folder's; "distilled", the one there before distribution matching; "editor", the
    editor's own first step."""

    config: FlashEditConfig | SpecEditConfig | None = None
    steps: int = 0
    oracle: bool = False
    generator: str = "cosi"


def all_rows():
    """In the order of what they are worth, should the time run out."""
    return {
        "flash": Row(FLASH),
        "flash, no cosi": Row(replace(FLASH, cosi=False)),
        "flash, inverted noise in the region too": Row(replace(FLASH, region_noise="inverted")),
        "flash, no bg_shield": Row(replace(FLASH, bg_shield=False)),
        "flash, no ssca": Row(replace(FLASH, ssca=False)),
        "flash, no ssca, no bg_shield": Row(replace(FLASH, bg_shield=False, ssca=False)),
        "flash, none of the three": Row(replace(FLASH, cosi=False, bg_shield=False, ssca=False)),
        "flash, before matching": Row(FLASH, generator="distilled"),
        "flash, before matching, no cosi": Row(replace(FLASH, cosi=False), generator="distilled"),
        "inversion-50+50": Row(FlashEditConfig(method="inversion")),
        "plain-50": Row(steps=50),
        "plain-1": Row(steps=1),
        "flash, editor's own step": Row(FLASH, generator="editor"),
        "flash, true mask": Row(FLASH, oracle=True),
        "flash, pixels kept": Row(replace(FLASH, preserve="pixels")),
        "specedit-9": Row(SpecEditConfig(quality="paper", runner="eager")),
    }


def ssim(a, b, mask):
    """[n]: mean structural similarity of the lumas over mask [n, H, W], Gaussian window 11, sigma 1.5 (Wang, 2004)."""
    weights = a.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    place = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    window = (-place.square() / (2 * 1.5**2)).exp()
    window = (window / window.sum()).view(1, 1, 1, 11)

    def blur(x):
        x = F.conv2d(F.pad(x, (5,) * 4, mode="reflect"), window)
        return F.conv2d(x, window.transpose(2, 3))

    x, y = ((i * weights).sum(1, keepdim=True) for i in (a, b))
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    found = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    return (found[:, 0] * mask).sum((1, 2)) / mask.sum((1, 2))


class Flash(Batched, FlashEditFluxKontextPipeline):
    pass


@torch.no_grad()
def run(row, part, runner, pipes):
    """(pictures [n, 3, H, W] in [0, 1], mask bool [n, rows, columns] or None, source_error [n] or None)."""
    options = runner.options(part)
    if isinstance(row.config, FlashEditConfig):
        mask = grow(part.tokens, 1).float() if row.oracle else None
        out = pipes[row.generator](specedit=row.config, mask_image=mask, **options)
        return out.images.float(), out.mask if row.config.method == "flash" else None, out.stats.source_error
    if row.config is None:
        return runner.plain(row.steps, part).float(), None, None
    out = runner.pipe(specedit=row.config, **options)
    return out.images.float(), out.mask, None


def measure(part, images, mask, source_error, judge, runner):
    source, target = part.pictures()
    around = grow(part.reach, 1)
    outside = ~to_pixels(around)
    unique = part.edits.unique().to(images.device)
    figures = {
        "psnr_out": masked_psnr(images, source, outside), "ssim_out": ssim(images, source, outside),
        "psnr_kept": masked_psnr(images, runner.vae(source), outside),
        "psnr_in": masked_psnr(images, target, part.mask).masked_fill(~unique, torch.nan),
        "sharpness": relative_sharpness(part.edits, source, target, images, around),
    }  # fmt: skip
    if judge is not None:
        figures["right"] = judge_edits(judge, part.edits, source, images).float()
    if mask is not None:
        figures["recall"] = recall_precision(mask, part.tokens)[0].masked_fill(~unique, torch.nan)
        figures["share"] = 100 * mask.flatten(1).float().mean(1)
    if source_error is not None:
        figures["cycle"] = 1000 * source_error
    return {name: values.double().cpu() for name, values in figures.items()}


COLUMNS = {
    "right": ("right", 3),
    "psnr_out": ("out dB", 2),
    "ssim_out": ("out SSIM", 4),
    "psnr_kept": ("kept dB", 2),
    "psnr_in": ("in dB", 2),
    "sharpness": ("sharp", 3),
    "recall": ("recall", 3),
    "share": ("tokens %", 1),
    "cycle": ("cycle", 2),
}


def markdown(header, records):
    place = header["setting"]
    lines = [[name, *(cell(record.get(c), d) for c, (_, d) in COLUMNS.items())] for name, record in records.items()]
    return "\n".join(
        [
            "# FlashEdit on edits with known answers",
            "",
            f"{header['edits']} held-out local edits, {place['size']} px, {place['text_length']} text tokens, editor"
            f" {place['model']}, COSI {header['cosi']}, commit {place['commit'][:10]}, {place['date']},"
            f" {place['device']}, {place['dtype']}.",
            "",
            markdown_table(["row", *(title for title, _ in COLUMNS.values())], lines),
            "",
            "right: the judge's share; out: outside the edit (and a token around it) against the source; kept: the"
            " same against the source as the autoencoder gives it back, without the autoencoder's own error; in: inside"
            " the exact mask against the true target, of edits with one right answer; sharp: gradient energy where the"
            " output changed over the target's where that did, median of the edits with an object; recall of the true"
            " region, of the edits with one right answer; tokens: share of the mask; cycle: mean squared error of the"
            " source branch's latents against the source's, in thousandths.",
            "",
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/flash")
    parser.add_argument("--cosi", default=str(SHIPPED / "cosi"), help="folder for load_cosi, or 'none'")
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    args = parser.parse_args(argv)
    device, say = prepare(args), stopwatch()
    judge = load_judge(args.judge, device)
    runner = Runner(load_pipeline(args.model, device, getattr(torch, args.dtype)), args.text_length)
    pipes = {name: Flash(**runner.pipe.components) for name in ("editor", "cosi", "distilled")}
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        if name != "editor" and args.cosi != "none":
            pipe.load_cosi(args.cosi)
    before = Path(args.cosi) / "distilled" / GENERATOR
    if before.is_file():
        pipes["distilled"]._generator = LowRankChange.load(before)
    # the first kind: its edits and their seeds are those of the whole set
    edits = make_set(device, args.size, args.limit, {"local": EVALUATION_COUNTS["local"]})
    say(f"{len(edits)} edits are drawn")
    header, records = {"setting": setting(args, device), "edits": len(edits), "cosi": args.cosi}, {}
    for name, row in all_rows().items():
        if not any(fnmatch.fnmatchcase(name, glob) for glob in args.rows):
            continue
        if row.generator == "distilled" and not before.is_file():
            continue  # a run's own; it is not shipped
        begun, columns = time.perf_counter(), {}
        for rows in torch.arange(len(edits)).split(args.batch):
            made = run(row, edits[rows], runner, pipes)
            for key, values in measure(edits[rows], *made, judge, runner).items():
                columns.setdefault(key, []).append(values)
        records[name] = {
            key: (median if key == "sharpness" else mean)(torch.cat(values)) for key, values in columns.items()
        }
        say(
            f"{name}: {time.perf_counter() - begun:.1f} s; "
            + ", ".join(f"{k} {cell(v, 3)}" for k, v in records[name].items())
        )
        write_json(args.out / "flash_table.json", jsonable({**header, "rows": records}))
        write_text(args.out / "flash_table.md", markdown(header, records))
    print((args.out / "flash_table.md").read_text())


if __name__ == "__main__":
    main()
