# SPDX-License-Identifier: Apache-2.0
"""FlashEdit on the held-out local edits: whole, without each of its parts, and beside the multi-step baselines.

    python bench/quality/flash_table.py --cosi runs/cosi                 # OUT/flash_table.md and .json
    python bench/quality/flash_table.py --cosi runs/cosi --limit 12 --rows flash 'flash, *'
    python bench/quality/flash_table.py --model runs/base/editor --cosi runs/base/cosi --size 256

The last is of a base that does not see its source: edits from the source's caption to the target's.

Columns: right, by the judge; PSNR and SSIM outside the edit against the source, and PSNR there against the source as
the autoencoder gives it back, whose own error would hide what the edit does; PSNR and SSIM inside against the true
target, of edits with one right answer; sharpness, as in table.py; recall of the true region and share of the tokens of
the mask; of the source branch, how far it is from giving the source back: the cycle that COSI trains; and time.
"""

import argparse
import fnmatch
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from contact_sheet import pil_pictures, varied
from families import TextFlux, family_of
from judge import judge_edits
from runtime import replace_file
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

from specedit_kernels import (
    FlashEditConfig,
    FlashEditFluxKontextPipeline,
    FlashEditFluxPipeline,
    SpecEditConfig,
)
from specedit_kernels.flash_edit import GENERATOR, LowRankChange
from specedit_kernels.images.sheet import encode_within

FLASH = FlashEditConfig()
GUIDANCE = 2.5  # of a base's multi-step answers, as in train_cosi.py
SHEET_LIMIT = 1_200_000  # bytes


@dataclass(frozen=True)
class Row:
    """config: a FlashEdit or SpecEdit run; steps: plain steps in its place, with true guidance over 1, away from the
    empty text; oracle: with the true mask, grown by a token. generator: "cosi", the COSI folder's; "distilled", the one
    there before distribution matching; "editor", the model's own first step."""

    config: FlashEditConfig | SpecEditConfig | None = None
    steps: int = 0
    oracle: bool = False
    guidance: float = 1.0
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
        "flash, merged": Row(replace(FLASH, merged=True)),
        "flash, true mask, merged": Row(replace(FLASH, merged=True), oracle=True),
        "flash, pixels kept": Row(replace(FLASH, preserve="pixels")),
        "specedit-9": Row(SpecEditConfig(quality="paper", runner="eager")),
    }


def base_rows():
    """The same of a base that does not see its source. With the true mask, where no part answers for the region; then
    with the region that FlashEdit finds."""
    parts = {
        "": FLASH,
        ", no cosi": replace(FLASH, cosi=False),
        ", no bg_shield": replace(FLASH, bg_shield=False),
        ", no ssca": replace(FLASH, ssca=False),
        ", no bg_shield, no ssca": replace(FLASH, bg_shield=False, ssca=False),
        ", no bg_shield, no cosi": replace(FLASH, bg_shield=False, cosi=False),
        ", none of the three": replace(FLASH, cosi=False, bg_shield=False, ssca=False),
        ", white noise in the region": replace(FLASH, region_noise="white"),
    }
    inversion = FlashEditConfig(method="inversion")
    return {
        **{f"flash, true mask{name}": Row(config, oracle=True) for name, config in parts.items()},
        "inversion-50+50": Row(inversion),
        f"inversion-50+50, guidance {GUIDANCE:g}": Row(replace(inversion, guidance=GUIDANCE)),
        f"caption alone, 50 steps, guidance {GUIDANCE:g}": Row(steps=50, guidance=GUIDANCE),
        **{f"flash{name}": Row(config) for name, config in parts.items()},
        "flash, true mask, before matching": Row(FLASH, oracle=True, generator="distilled"),
        "flash, true mask, the base's own step": Row(FLASH, oracle=True, generator="editor"),
        "inversion-8+8": Row(replace(inversion, steps=8)),
        **{f"flash, mask_ratio {ratio:g}": Row(replace(FLASH, mask_ratio=ratio)) for ratio in (1.0, 2.0, 2.5)},
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


def options_of(runner, part):
    """The options of a FlashEdit call."""
    options = runner.options(part)
    if runner.family is TextFlux:
        options["source_prompt"] = [before for before, _ in part.edits.captions()]
    return options


@torch.no_grad()
def run(row, part, runner, pipes):
    """(pictures [n, 3, H, W] in [0, 1], mask bool [n, rows, columns] or None, source_error [n] or None)."""
    options = options_of(runner, part)
    if isinstance(row.config, FlashEditConfig):
        mask = grow(part.tokens, 1).float() if row.oracle else None
        out = pipes[row.generator](specedit=row.config, mask_image=mask, **options)
        return out.images.float(), out.mask if row.config.method == "flash" else None, out.stats.source_error
    if row.config is None:
        guided = Runner(runner.pipe, runner.text_length, row.guidance)
        return guided.plain(row.steps, part).float(), None, None
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
        "ssim_in": ssim(images, target, part.mask).masked_fill(~unique, torch.nan),
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
    "ssim_in": ("in SSIM", 3),
    "sharpness": ("sharp", 3),
    "recall": ("recall", 3),
    "share": ("tokens %", 1),
    "cycle": ("cycle", 2),
    "seconds": ("ms", 1),
}


def markdown(header, records):
    place = header["setting"]
    lines = [[name, *(cell(record.get(c), d) for c, (_, d) in COLUMNS.items())] for name, record in records.items()]
    return "\n".join(
        [
            "# FlashEdit on edits with known answers",
            "",
            f"{header['edits']} held-out local edits, {place['size']} px, {place['text_length']} text tokens, model"
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
            " source branch's latents against the source's, in thousandths; ms: of an edit in its batch, codec too.",
            "",
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/flash")
    parser.add_argument("--cosi", default=str(SHIPPED / "cosi"), help="folder for load_cosi, or 'none'")
    parser.add_argument("--sheet", type=int, default=0, metavar="N", help="draw a few edits of the first N rows")
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    args = parser.parse_args(argv)
    device, say = prepare(args), stopwatch()
    judge = load_judge(args.judge, device)
    runner = Runner(load_pipeline(args.model, device, getattr(torch, args.dtype)), args.text_length)
    kind, table = (Flash, all_rows()) if family_of(runner.pipe).sees_source else (FlashEditFluxPipeline, base_rows())
    pipes = {name: kind(**runner.pipe.components) for name in ("editor", "cosi", "distilled")}
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
    shown, sheet = torch.tensor(varied(edits)), {}
    source, target = edits[shown].pictures()
    sheet |= {"source": source, "target": target}
    for name, row in table.items():
        if not any(fnmatch.fnmatchcase(name, glob) for glob in args.rows):
            continue
        if row.generator == "distilled" and not before.is_file():
            continue  # a run's own; it is not shipped
        begun, columns, took, pictures = time.perf_counter(), {}, 0.0, []
        for rows in torch.arange(len(edits)).split(args.batch):
            at = time.perf_counter()
            made = run(row, edits[rows], runner, pipes)
            pictures.append(made[0].cpu())
            took += time.perf_counter() - at
            for key, values in measure(edits[rows], *made, judge, runner).items():
                columns.setdefault(key, []).append(values)
        records[name] = {
            key: (median if key == "sharpness" else mean)(torch.cat(values)) for key, values in columns.items()
        }
        records[name]["seconds"] = 1000 * took / len(edits)
        sheet[name] = torch.cat(pictures)[shown]
        say(
            f"{name}: {time.perf_counter() - begun:.1f} s; "
            + ", ".join(f"{k} {cell(v, 3)}" for k, v in records[name].items())
        )
        write_json(args.out / "flash_table.json", jsonable({**header, "rows": records}))
        write_text(args.out / "flash_table.md", markdown(header, records))
    if args.sheet:
        columns = {name: pil_pictures(images) for name, images in list(sheet.items())[: 2 + args.sheet]}
        content = encode_within(columns, edits[shown].edits.phrases(), SHEET_LIMIT)
        replace_file(args.out / "flash_sheet.png", lambda path: path.write_bytes(content))
    print((args.out / "flash_table.md").read_text())


if __name__ == "__main__":
    main()
