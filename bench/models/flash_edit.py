# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole FlashEdit edit on FLUX.1-Kontext at the published sizes, with random weights, autoencoder
included, beside the multi-step inversion that it replaces.

    python bench/models/flash_edit.py --out runs/models              # one GPU with 40 GB or more
    python bench/models/flash_edit.py --tiny --out /tmp/models       # a tiny model on any machine, to try the script

Text embeddings and the edit region (a square block of tokens) are given. Rows "drafted": the draft runs too, as it does
where no mask is given, and adds nothing to the region. Rows "merged": the one-step networks in copies of the weights
(FlashEditConfig.merged). Both networks are random low-rank changes. All rows come from one process. Writes
OUT/flash_edit.json and .md.
"""

import argparse
import fnmatch
from functools import partial
from pathlib import Path

import torch
from flux_kontext import Bench, Row, region, run_rows, setting

from specedit_kernels import FlashEditConfig, FlashEditFluxKontextPipeline
from specedit_kernels.engine.config import RUNNERS
from specedit_kernels.engine.low_rank import LowRankChange


class FlashBench(Bench):
    """The same model, pictures and clock for FlashEdit."""

    def __init__(self, args):
        super().__init__(args)
        self.flash = FlashEditFluxKontextPipeline(**self.pipe.components)
        self.flash.set_progress_bar_config(disable=True)
        # of the shipped weights' ranks, for every linear layer, as training makes them
        self.flash._generator, self.flash._inverter = (self.change(rank) for rank in (80, 20))
        wide, pooled = self.options["prompt_embeds"], self.options["pooled_prompt_embeds"]
        self.options |= {
            "negative_prompt_embeds": torch.randn_like(wide[:, : args.source_length]),
            "negative_pooled_prompt_embeds": torch.randn_like(pooled),
        }

    def change(self, rank):
        """A random low-rank change of all linear layers, small beside their weights."""
        found = {}
        for name, layer in self.flash.transformer.named_modules():
            if isinstance(layer, torch.nn.Linear):
                out, inner = layer.weight.shape
                r = min(rank, out, inner)
                found[name] = [1e-3 * torch.randn(n, m, dtype=torch.bfloat16) for n, m in ((r, inner), (out, r))]
        return LowRankChange(found)

    def edit(self, mask=None, drafted=False, **options):
        given = self.options
        if drafted:
            options, given = options | dict(mask_ratio=1e6), given | dict(mask_mode="add")
        stats = self.flash(specedit=FlashEditConfig(**options), mask_image=mask, **given).stats
        self.synchronize()
        return stats

    def rows(self):
        tenth, steps, rows = region(self.args.side, 0.1), self.args.steps, {}
        for runner in self.args.runners:
            every = {"": {}, ", drafted": dict(drafted=True), ", no cosi": dict(cosi=False),
                     ", drafted, no ssca": dict(drafted=True, ssca=False), ", no bg_shield": dict(bg_shield=False),
                     ", fp8": dict(precision="fp8"), ", fp8, drafted": dict(precision="fp8", drafted=True),
                     ", merged": dict(merged=True), ", merged, drafted": dict(merged=True, drafted=True)}  # fmt: skip
            for name, options in every.items():
                options |= dict(runner=runner)
                rows[f"flash {runner}, 10 %{name}"] = Row(lambda o=options: self.edit(tenth, **o))
            if runner == self.args.runners[0]:
                # the source's branch beside the edit's, as the inversion that FlashEdit is held against has it
                for kind, scale in (("", 1.0), (", both branches", 2.0)):
                    baseline = dict(method="inversion", runner="eager", guidance=scale)
                    rows[f"inversion-{steps}+{steps} eager{kind}"] = Row(
                        lambda b=baseline: self.edit(steps=steps, **b), lambda b=baseline: self.edit(steps=1, **b)
                    )
        return rows


def markdown(head, rows, baselines):
    versions = ", ".join(f"{k} {v}" for k, v in head["versions"].items())
    lines = [
        f"{head['model']}, {head['side']} x {head['side']}, {head['text_length']} text tokens"
        f" ({head['source_length']} of the source branch), batch 1; {head['device']}, {versions}, commit"
        f" {head['commit']}, {head['date']}. Seconds with the autoencoder; text embeddings given.",
        "",
        "| row | seconds | calls | against the inversion | with both branches | peak GiB | stages, s |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error'][:120]} | | | | | |")
            continue
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "–"
        stages = ", ".join(f"{k} {v:.3f}" for k, v in row["stages"].items())
        times = (rows.get(baseline, {}).get("seconds") for baseline in baselines)
        ratios = " | ".join(f"{base / row['seconds']:.1f} x" if base else "–" for base in times)
        lines.append(f"| {name} | {row['seconds']:.3f} | {row['calls']} | {ratios} | {peak} | {stages} |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (default 512; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--source-length", type=int, help="text tokens of the source branch (default: the same)")
    parser.add_argument("--steps", type=int, default=50, help="of the inversion and of the editing it is held against")
    parser.add_argument("--repeat", type=int, default=7, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds after which a row is not repeated")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=["graph", "eager"])
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 512)
    args.source_length = args.source_length or args.text_length
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    bench = FlashBench(args)
    head = {**setting(args), "source_length": args.source_length}
    chosen = [(n, row) for n, row in bench.rows().items() if any(fnmatch.fnmatchcase(n, glob) for glob in args.rows)]
    measures = {name: partial(bench.measure, row) for name, row in chosen}
    name = f"inversion-{args.steps}+{args.steps} eager"
    report = partial(markdown, baselines=(name, f"{name}, both branches"))
    rows = run_rows(measures, head, args.out, "flash_edit", report)
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
