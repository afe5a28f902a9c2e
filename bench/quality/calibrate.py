# SPDX-License-Identifier: Apache-2.0
"""Thresholds and step splits, measured on held-out edits that the quality table does not use.

    python bench/quality/calibrate.py                     # both parts: OUT/thresholds.{md,json}, OUT/stages.{md,json}
    python bench/quality/calibrate.py --part stages --limit 100    # with the thresholds in OUT/thresholds.json

thresholds: for every draft, metric and reference the scores' AUC, what share of the tokens a recall costs, and recall,
precision, share and whole misses over thresholds and dilations. stages: presets' steps split in other ways.
"""

import argparse
import fnmatch
import json
import math
from dataclasses import replace

import torch
from families import family_of
from scenes import KINDS
from table_measures import area_under_curve, effective_scores, mean, median, recall_precision
from table_runs import (
    CALIBRATION_SEED,
    Row,
    Runner,
    add_arguments,
    add_lora,
    cell,
    jsonable,
    load_judge,
    load_pipeline,
    make_set,
    markdown_table,
    measure,
    prepare,
    set_reference,
    setting,
    setting_text,
    stopwatch,
    write_json,
    write_text,
)

from specedit_kernels import METRICS, PRESETS, REFERENCES, SpecEditConfig, threshold_scale, verify

# Ambiguous edits set no threshold: a draft and the plain run of the same noise choose places of their own.
COUNTS = {"local": 140, "small": 60}
STAGE_COUNTS = {"local": 60, "small": 20, "ambiguous": 20}
DILATIONS = (0, 1, 2)
THRESHOLDS = [0.003 * 1000 ** (i / 95) for i in range(96)]  # .003 to 3
SHOWN = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
RECALLS = (0.95, 0.98, 0.99)
WANTED_RECALL, WANTED_MISSES, WANTED_SHARE = 0.98, 0.005, 0.20

# name -> how the draft is made, the first of each kind being the one whose threshold is recommended
PROBES = {
    "coarse": {
        "coarse, 3 of 9 steps": dict(stages=(3, 3, 3)),
        "coarse, 1 of 9": dict(stages=(1, 5, 3)),
        "coarse, 2 of 9": dict(stages=(2, 4, 3)),
        "coarse, 4 of 9": dict(stages=(4, 2, 3)),
        "coarse, 5 of 18": dict(stages=(5, 8, 5)),
        "coarse, 8 of 30": dict(stages=(8, 14, 8)),
    },
    "quarter": {"quarter, 8 steps": dict(draft_steps=8), "quarter, 4 steps": dict(draft_steps=4)},
    "full_step": {"full step": dict(preset=9)},  # from pure noise: the same for every preset
}

# of weights that are distilled to few steps
FEW_STEP_PROBES = {
    "coarse": {
        "coarse, 1 of 4": dict(stages=(1, 2, 1)),
        "coarse, 2 of 4": dict(stages=(2, 1, 1)),
        "coarse, 3 of 8 steps": dict(stages=(3, 3, 2)),
        "coarse, 2 of 8": dict(stages=(2, 4, 2)),
    }
}

# preset -> (coarse, mixed, full) steps for the full finish; coarse steps for the locked one
FULL_SPLITS = {
    9: [
        (1, 6, 2),
        (2, 3, 4),
        (2, 4, 3),
        (2, 5, 2),
        (2, 6, 1),
        (3, 3, 3),
        (3, 4, 2),
        (3, 5, 1),
        (4, 2, 3),
        (4, 3, 2),
        (4, 4, 1),
        (5, 2, 2),
    ],
    11: [(2, 6, 3), (3, 5, 3), (3, 6, 2), (4, 4, 3), (4, 5, 2), (5, 4, 2)],
    18: [(3, 10, 5), (4, 9, 5), (5, 8, 5), (5, 10, 3), (6, 9, 3), (7, 6, 5)],
    30: [(5, 17, 8), (8, 14, 8), (8, 18, 4), (10, 15, 5), (12, 10, 8)],
}
LOCKED_SPLITS = {9: [1, 2, 3, 4, 5], 11: [2, 3, 4, 5], 18: [3, 5, 7], 30: [5, 8, 12]}


class Measured(Exception):
    """Ends a run once its scores are known."""


class Probe:
    """Before a SpecEdit pipeline: scores a draft by every metric and reference, over what the threshold is scaled by
    for the picture, and goes no further."""

    @classmethod
    def of(cls, pipe):
        """A probe of a pipeline's kind, with its components."""
        probe = type(cls.__name__, (cls, type(pipe)), {})(**pipe.components, **family_of(pipe).arguments)
        probe.set_progress_bar_config(disable=True)
        return probe

    def _verify_select(self, run, draft, stage):
        base = run.config
        self.scores = {}
        for metric in METRICS:
            for reference in REFERENCES:
                run.config = replace(base, metric=metric, reference=reference)
                scores = verify(run, draft)
                scale = threshold_scale(scores, base.resolved_relative())
                self.scores[metric, reference] = (scores / scale).reshape(-1, *run.grid)
        raise Measured


def probe(pipe, runner, edits, config, batch):
    """{(metric, reference): scores fp32 [n, rows, columns]} of a set's edits."""
    found = {}
    for rows in torch.arange(len(edits)).split(batch):
        part = edits[rows]
        try:
            pipe(specedit=config, **runner.options(part))
        except Measured:
            for key, scores in pipe.scores.items():
                found.setdefault(key, []).append(scores)
    return {key: torch.cat(parts) for key, parts in found.items()}


def operating_point(effective, reference, threshold):
    """Mean recall and precision, share of the tokens, share of the edits under half recall."""
    selected = effective > threshold
    recall, precision = recall_precision(selected, reference)
    known = recall.isfinite()
    return {
        "threshold": threshold,
        "recall": mean(recall),
        "precision": mean(precision),
        "share": selected.flatten(1).float().mean().item(),
        "missed": mean((recall < 0.5)[known].float()),
    }


def curve(scores, reference):
    """{dilation: operating points by rising threshold}."""
    out = {}
    for dilation in DILATIONS:
        effective = effective_scores(scores, dilation)
        out[dilation] = [operating_point(effective, reference, t) for t in THRESHOLDS]
    return out


def cheapest(points, recall):
    """The last point, at the highest threshold, with that recall; None if there is none."""
    good = [p for p in points if p["recall"] >= recall]
    return good[-1] if good else None


def recommend(points):
    """The highest threshold with the wanted recall and misses within the share of tokens; else the highest with the
    recall alone; else the lowest one that keeps the share; None if none does."""
    affordable = [p for p in points if p["share"] <= WANTED_SHARE]
    recalled = [p for p in affordable if p["recall"] >= WANTED_RECALL]
    found = [p for p in recalled if p["missed"] <= WANTED_MISSES]
    best = found[-1:] or recalled[-1:] or affordable[:1]
    return {**best[0], "wanted": bool(found)} if best else None


def two_digits(value):
    """Rounded down to two significant digits, so that the recall holds."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.floor(value / step + 1e-9) * step, 6)


def point_text(point):
    if point is None:
        return "–"
    return " / ".join(
        (
            cell(point["recall"], 3),
            cell(point["precision"], 2),
            cell(100 * point["share"], 1),
            cell(100 * point["missed"], 1),
        )
    )


def calibrate_thresholds(args, runner, judge, say):
    """Writes thresholds.json and thresholds.md: every draft's, and (by_share) those of the coarse draft's decoder
    features by the share of a run's steps that it takes."""
    edits = make_set(runner.device, args.size, args.limit, COUNTS, CALIBRATION_SEED)
    say(f"{len(edits)} calibration edits are drawn")
    right = hold_against_plain(args, runner, judge, edits)
    # An edit that the editor cannot do has no mask to be found.
    keep = right & edits.reference.flatten(1).any(1).cpu()
    say(
        (f"{args.reference_steps} plain steps: right {right.float().mean():.3f}; " if args.reference_steps else "")
        + f"{int(keep.sum())} edits are used"
    )
    if not keep.any():
        raise SystemExit("the plain run gets no edit right: nothing to calibrate on")
    edits = edits[keep.nonzero()[:, 0]]
    reference, kinds = edits.reference, edits.edits.kind
    runner.adapt(args.lora is not None)
    pipe = Probe.of(runner.pipe)
    results, table, by_share = [], {}, []
    header = {
        "setting": setting(args, runner.device),
        "edits": len(edits),
        "reference_steps": args.reference_steps,
        "true_share": edits.tokens.float().mean().item(),
        "reference_share": reference.float().mean().item(),
    }
    for draft, probes in (FEW_STEP_PROBES if args.few_steps or args.lora else PROBES).items():
        for place, (label, change) in enumerate(probes.items()):
            if not any(fnmatch.fnmatchcase(label, glob) for glob in args.probes):
                continue
            config = SpecEditConfig(quality="paper", runner="eager", draft=draft, **change)
            found = probe(pipe, runner, edits, config, args.batch)
            for (metric, form), scores in found.items():
                auc = area_under_curve(scores, reference)
                points = curve(scores, reference)
                best = {d: recommend(points[d]) for d in DILATIONS}
                results.append(
                    {
                        "draft": label,
                        "metric": metric,
                        "reference": form,
                        "auc": mean(auc),
                        "auc_by_kind": {k: mean(auc[kinds == i]) for i, k in enumerate(KINDS) if (kinds == i).any()},
                        "at_recall": {d: {r: cheapest(points[d], r) for r in RECALLS} for d in DILATIONS},
                        "recommended": best,
                        "points": {
                            d: [operating_point(effective_scores(scores, d), reference, t) for t in SHOWN]
                            for d in DILATIONS
                        },
                    }
                )
                if best[1] is None:
                    continue
                threshold = two_digits(best[1]["threshold"])
                if place == 0:
                    table[metric, form, draft] = threshold
                if draft == "coarse" and (metric, form) == ("decoder", "matched"):
                    share = change["stages"][0] / sum(change["stages"])
                    by_share.append({"share": share, "draft": label, "threshold": threshold})
            say(
                f"{label}: AUC "
                + ", ".join(f"{r['metric']}/{r['reference']} {r['auc']:.4f}" for r in results if r["draft"] == label)
            )
            write_json(
                args.out / "thresholds.json",
                jsonable(
                    {
                        **header,
                        "results": results,
                        "by_share": by_share,
                        "recommended": [
                            {"metric": m, "reference": f, "draft": d, "threshold": t} for (m, f, d), t in table.items()
                        ],
                    }
                ),
            )
            write_text(args.out / "thresholds.md", thresholds_markdown(header, results, table))


def thresholds_markdown(header, results, table):
    """The report of calibrate_thresholds."""
    head = ["draft, metric, reference", "AUC", *(f"{k}" for k in COUNTS)]
    head += [f"tokens % at recall {r} (threshold), dilation 1" for r in RECALLS]
    lines = []
    for r in results:
        found = [r["at_recall"][1][x] for x in RECALLS]
        lines.append(
            [
                f"{r['draft']}, {r['metric']}, {r['reference']}",
                f"{r['auc']:.4f}",
                *(cell(r["auc_by_kind"].get(k), 4) for k in COUNTS),
                *("–" if p is None else f"{100 * p['share']:.1f} ({p['threshold']:.3g})" for p in found),
            ]
        )
    chosen, reference = "", ""
    if header["reference_steps"]:
        chosen = " that the editor's plain run gets right"
        reference = " where there is one right answer, else what the plain run of the same noise changed"
    text = [
        "# Thresholds",
        "",
        f"{header['edits']} calibration edits{chosen}; true share of tokens"
        f" {header['true_share']:.1%}, of the reference masks {header['reference_share']:.1%}. Reference mask: the"
        f" true one{reference}."
        " Tokens are dilated and rounded up to 2x2 blocks, as a run selects them; recall is the mean over edits.",
        "",
        setting_text(header["setting"]) + ".",
        "",
        markdown_table(head, lines),
        "",
        f"## Recommended: recall >= {WANTED_RECALL}, whole misses <= {WANTED_MISSES:.1%}, tokens <= {WANTED_SHARE:.0%}",
        "",
        "threshold: recall / precision / tokens % / missed %; * = recall or misses fall short of that within"
        " these tokens, and this is the best",
        "",
    ]
    lines = []
    for r in results:
        cells = []
        for d in DILATIONS:
            p = r["recommended"][d]
            cells.append("–" if p is None else f"{p['threshold']:.3g}{'' if p['wanted'] else ' *'}: {point_text(p)}")
        lines.append([f"{r['draft']}, {r['metric']}, {r['reference']}", *cells])
    text += [
        markdown_table(["draft, metric, reference", *(f"dilation {d}" for d in DILATIONS)], lines),
        "",
        "```python",
        "# dilation 1",
        *(f'("{m}", "{f}", "{d}"): {t},' for (m, f, d), t in table.items()),
        "```",
        "",
    ]
    for r in results:
        if (r["metric"], r["reference"]) not in (("decoder", "matched"), ("decoder", "literal")):
            continue
        text += [
            f"## {r['draft']}, {r['metric']}, {r['reference']}: recall / precision / tokens % / missed %",
            "",
            markdown_table(
                ["threshold", *(f"dilation {d}" for d in DILATIONS)],
                [[f"{t:g}", *(point_text(r["points"][d][i]) for d in DILATIONS)] for i, t in enumerate(SHOWN)],
            ),
            "",
        ]
    return "\n".join(text)


def hold_against_plain(args, runner, judge, edits):
    """Sets the edits' reference masks from a plain run; gives [n] bool, which edits that run gets right. Of no steps:
    the true masks, and all edits."""
    edits.reference = edits.tokens.clone()
    if not args.reference_steps:
        return torch.ones(len(edits), dtype=torch.bool)
    row, right = Row("plain", steps=args.reference_steps), []
    for rows in torch.arange(len(edits)).split(args.batch):
        part = edits[rows]
        result = runner.run(row, part)
        reference, _ = set_reference(part, runner, result.images)
        edits.reference[rows.to(reference.device)] = reference
        found = measure(part, result, judge)
        right.append(found["right"] > 0 if judge is not None else torch.ones(len(part), dtype=torch.bool))
    return torch.cat(right)


def split_rows(threshold_at, presets):
    """The rows of the search for some presets, with the plain ones to compare with.

    threshold_at: share of a run's steps that are coarse -> threshold."""
    rows = [(0, Row(f"plain-{n}", steps=n)) for n in (28, 9, 4)]
    base = SpecEditConfig(quality="paper", runner="eager", draft="coarse")
    for preset in presets:
        for split in FULL_SPLITS[preset]:
            name = f"{preset} full {split[0]}+{split[1]}+{split[2]}" + (" (now)" if split == PRESETS[preset] else "")
            config = replace(
                base,
                preset=preset,
                stages=split,
                threshold=threshold_at(split[0] / preset),
                relative=base.resolved_relative(),
            )
            rows.append((preset, Row(name, config=config)))
    for preset in presets:
        for coarse in LOCKED_SPLITS[preset]:
            name = f"{preset} locked {coarse}+{preset - coarse}" + (" (now)" if coarse == PRESETS[preset][0] else "")
            config = replace(
                base,
                preset=preset,
                finish="locked",
                stages=(coarse, preset - coarse, 0),
                threshold=threshold_at(coarse / preset),
                relative=base.resolved_relative(),
            )
            rows.append((preset, Row(name, config=config)))
    return rows


def nearest_threshold(by_share, share):
    """The threshold measured at the nearest share."""
    return min(by_share, key=lambda point: abs(point["share"] - share))["threshold"]


def search_stages(args, runner, judge, threshold_at, say):
    """Writes stages.json and stages.md."""
    counts = STAGE_COUNTS
    edits = make_set(runner.device, args.size, args.limit, counts, CALIBRATION_SEED + 1)
    right = hold_against_plain(args, runner, judge, edits)
    say(f"{len(edits)} edits for the stages; plain run: right {right.float().mean():.3f}")
    results = []
    header = {"setting": setting(args, runner.device), "edits": len(edits)}
    for preset, row in split_rows(threshold_at, args.presets):
        figures = {}
        try:
            for rows in torch.arange(len(edits)).split(args.batch):
                part = edits[rows]
                for name, values in measure(part, runner.run(row, part), judge).items():
                    figures.setdefault(name, []).append(values)
        except Exception as error:  # the others go on
            say(f"{row.name}: failed: {type(error).__name__}: {error}")
            results.append({"preset": preset, "row": row.name, "error": f"{type(error).__name__}: {error}"})
            continue
        figures = {name: torch.cat(values) for name, values in figures.items()}
        result = {"preset": preset, "row": row.name, "tflop": mean(figures["flops"]) / 1e12}
        if row.config is not None:
            result["threshold"] = row.config.threshold
        for name in ("right", "psnr_in", "psnr_out", "drift", "recall", "missed", "active"):
            if name in figures:
                result[name] = mean(figures[name])
        result["sharpness"] = median(figures["sharpness"])
        # Two points of `right`, half a dB inside and .04 of sharpness weigh the same.
        result["score"] = 100 * result.get("right", 0.0) + 4 * result["psnr_in"] + 50 * result["sharpness"]
        results.append(result)
        say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in result.items()))
        write_json(args.out / "stages.json", jsonable({**header, "results": results}))
        write_text(args.out / "stages.md", stages_markdown(header, results))


def stages_markdown(header, results):
    """The report of search_stages."""
    columns = {
        "threshold": 3,
        "right": 3,
        "psnr_in": 2,
        "sharpness": 3,
        "psnr_out": 2,
        "drift": 2,
        "recall": 3,
        "missed": 3,
        "active": 3,
        "tflop": 3,
        "score": 1,
    }
    text = [
        "# How a preset's steps are split",
        "",
        f"{header['edits']} calibration edits (`coarse` draft, decoder features, matched, the threshold of the"
        " share of coarse steps): coarse + mixed + full steps, and coarse + mixed for the locked finish. score ="
        " 100 right + 4 psnr_in + 50 sharpness: two points of right, half a dB and .04 of sharpness weigh alike.",
        "",
        setting_text(header["setting"]) + ".",
        "",
    ]
    for preset in sorted({r["preset"] for r in results}):
        found = [r for r in results if r["preset"] == preset]
        for kind in ("plain", " full ", " locked "):
            rows = [r for r in found if kind in r["row"]]
            if not rows:
                continue
            rows.sort(key=lambda r: -math.inf if "error" in r else r["score"], reverse=True)
            lines = [
                [
                    r["row"],
                    *(
                        [r["error"][:80]] + [""] * (len(columns) - 1)
                        if "error" in r
                        else [cell(r.get(c), n) for c, n in columns.items()]
                    ),
                ]
                for r in rows
            ]
            text += [markdown_table(["row", *columns], lines), ""]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/calibration")
    parser.add_argument("--part", choices=("thresholds", "stages", "both"), default="both")
    parser.add_argument("--probes", nargs="+", metavar="GLOB", default=["*"], help="names or patterns of drafts")
    parser.add_argument("--threshold", type=float, help="of the stages' runs; default: those in OUT/thresholds.json")
    parser.add_argument(
        "--presets",
        type=int,
        nargs="+",
        choices=tuple(FULL_SPLITS),
        default=sorted(FULL_SPLITS),
        help="whose splits to try",
    )
    parser.add_argument("--reference-steps", type=int, default=50, help="of the plain run; 0: none, the true masks")
    parser.add_argument("--few-steps", action="store_true", help="the editor itself is distilled to few steps")
    add_lora(parser)
    args = parser.parse_args()
    if args.lora is not None and args.part != "thresholds":
        parser.error("--lora: of --part thresholds alone; solver.py compares the splits of few steps")
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    pipe = load_pipeline(args.model, device, getattr(torch, args.dtype))
    runner = Runner(pipe, args.text_length, args.true_cfg_scale, args.lora)
    if args.part != "stages":
        calibrate_thresholds(args, runner, judge, say)
        print((args.out / "thresholds.md").read_text(), flush=True)
    if args.part != "thresholds":
        by_share = [{"share": 0.0, "threshold": args.threshold}]
        if args.threshold is None:
            by_share = json.loads((args.out / "thresholds.json").read_text())["by_share"]
        search_stages(args, runner, judge, lambda share: nearest_threshold(by_share, share), say)
        print((args.out / "stages.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
