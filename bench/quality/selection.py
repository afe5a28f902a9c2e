# SPDX-License-Identifier: Apache-2.0
"""How a draft's scores should be made into a mask: rules compared on the calibration edits, never on the table's.

    python bench/quality/selection.py --part scores       # OUT/scores.pt: each edit's score maps and what it changed
    python bench/quality/selection.py --part rules        # OUT/selection.{md,json}, from OUT/scores.pt; no model
"""

import argparse
from dataclasses import replace

import torch

from calibrate import Measured, Probe
from runtime import replace_file
from specedit_kernels import SpecEditConfig, ops
from specedit_kernels.pipelines import stages
from table_runs import (
    CALIBRATION_SEED,
    Row,
    Runner,
    add_arguments,
    load_judge,
    load_pipeline,
    make_set,
    measure,
    prepare,
    set_reference,
    setting,
    stopwatch,
)

COUNTS = {"local": 140, "small": 60, "ambiguous": 80, "global": 20}


class LayerProbe(Probe):
    """Scores a coarse draft by each feature map apart, and goes no further."""

    def _verify_select(self, run, draft, stage):
        codec, size = run.model.codec, run.source.shape[-2:]

        def bring_up(latents):
            return torch.nn.functional.interpolate(latents.float(), size=size, mode="bilinear").to(latents.dtype)

        def layers(a, b):
            return [ops.token_discrepancy(x, y, run.grid) for x, y in zip(codec.features(a), codec.features(b))]

        small = bring_up(draft.source)
        found = layers(bring_up(draft.proposal), small)
        self.maps = {f"decoder{i}": x for i, x in enumerate(found)}
        # the source against itself at the draft's resolution: the detail that a draft lacks
        self.maps |= {f"detail{i}": x for i, x in enumerate(layers(run.source, small))}
        for metric in ("latent", "projected"):
            run.config = replace(run.config, metric=metric)
            self.maps[metric] = stages.verify(run, draft)
        self.maps = {name: x.reshape(-1, *run.grid) for name, x in self.maps.items()}
        raise Measured


def collect(args, runner, judge, edits, say):
    """Writes OUT/scores.pt after each batch: score maps [n, rows, columns] by probe, masks, kind, task, right."""
    edits.reference = edits.tokens.clone()
    pipe = LayerProbe.of(runner.pipe)
    parts = {}
    probes = {"1 of 9": (1, 5, 3), "2 of 9": (2, 4, 3), "4 of 18": (4, 8, 6)}
    for rows in torch.arange(len(edits)).split(args.batch):
        part, found = edits[rows], {}
        result = runner.run(Row("plain", steps=args.reference_steps), part)
        found["reference"], found["own"] = set_reference(part, runner, result.images)
        right = measure(part, result, judge)["right"]
        for label, split in probes.items():
            try:
                pipe(specedit=SpecEditConfig(stages=split), **runner.options(part))
            except Measured:
                wanted = {k: v for k, v in pipe.maps.items() if label == "2 of 9" or k.startswith("decoder")}
                found |= {f"{label} {name}": x for name, x in wanted.items()}
        for name, x in {**found, "right": right, "tokens": part.tokens}.items():
            parts.setdefault(name, []).append((x.half() if x.is_floating_point() else x).cpu())
        done = int(rows[-1]) + 1
        known, seeds = edits.edits[:done], edits.seeds[:done]
        scores = {name: torch.cat(x) for name, x in parts.items()} | {
            "kind": known.kind, "task": known.task, "unique": known.unique(), "seed": seeds,
            "setting": setting(args, runner.device)}
        replace_file(args.out / "scores.pt", lambda path: torch.save(scores, path))
        say(f"{done} of {len(edits)} edits")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/selection")
    parser.add_argument("--part", choices=("scores", "rules"), default="scores")
    parser.add_argument("--reference-steps", type=int, default=50, help="of the plain run")
    args = parser.parse_args()
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    pipe = load_pipeline(args.model, device, getattr(torch, args.dtype))
    runner = Runner(pipe, args.text_length, args.true_cfg_scale)
    edits = make_set(device, args.size, args.limit, COUNTS, CALIBRATION_SEED)
    say(f"{len(edits)} calibration edits are drawn")
    collect(args, runner, judge, edits, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
