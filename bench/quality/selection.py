# SPDX-License-Identifier: Apache-2.0
"""How a draft's scores should be made into a mask: rules compared on the calibration edits, never on the table's.

python bench/quality/selection.py --part scores       # OUT/scores.pt: each edit's score maps and what it changed
python bench/quality/selection.py --part rules        # OUT/selection.{md,json}, from OUT/scores.pt; no model
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from calibrate import Measured, Probe, operating_point
from runtime import replace_file
from scenes import KINDS
from table_measures import effective_scores
from table_runs import (
    CALIBRATION_SEED,
    Row,
    Runner,
    add_arguments,
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

from specedit_kernels import SpecEditConfig, ops, threshold_scale, verify

COUNTS = {"local": 140, "small": 60, "ambiguous": 80, "global": 20}


class LayerProbe(Probe):
    """Scores a coarse draft by each feature map apart, and goes no further."""

    def _verify_select(self, run, draft, stage):
        codec, size = run.model.codec, run.source.shape[-2:]

        def bring_up(latents):
            return F.interpolate(latents.float(), size=size, mode="bilinear").to(latents.dtype)

        def layers(a, b):
            return [ops.token_discrepancy(x, y, run.grid) for x, y in zip(codec.features(a), codec.features(b))]

        small = bring_up(draft.source)
        found = layers(bring_up(draft.proposal), small)
        self.maps = {f"decoder{i}": x for i, x in enumerate(found)}
        # the source against itself at the draft's resolution: the detail that a draft lacks
        self.maps |= {f"detail{i}": x for i, x in enumerate(layers(run.source, small))}
        for metric in ("latent", "projected"):
            run.config = replace(run.config, metric=metric)
            self.maps[metric] = verify(run, draft)
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
        right = measure(part, result, judge).get("right", torch.ones(len(part)))  # without a judge: all
        for label, split in probes.items():
            try:
                pipe(specedit=SpecEditConfig(quality="paper", runner="eager", stages=split), **runner.options(part))
            except Measured:
                wanted = {k: v for k, v in pipe.maps.items() if label == "2 of 9" or k.startswith("decoder")}
                found |= {f"{label} {name}": x for name, x in wanted.items()}
        for name, x in {**found, "right": right, "tokens": part.tokens}.items():
            parts.setdefault(name, []).append((x.half() if x.is_floating_point() else x).cpu())
        done = int(rows[-1]) + 1
        known, seeds = edits.edits[:done], edits.seeds[:done]
        scores = {name: torch.cat(x) for name, x in parts.items()} | {
            "kind": known.kind,
            "task": known.task,
            "unique": known.unique(),
            "seed": seeds,
            "setting": setting(args, runner.device),
        }
        replace_file(args.out / "scores.pt", lambda path: torch.save(scores, path))
        say(f"{done} of {len(edits)} edits")


def smoothed(scores):
    """Binomial 3 x 3 mean; at the border of what is there."""
    weights = scores.new_tensor([1.0, 2.0, 1.0])
    kernel = (weights[:, None] * weights)[None, None]
    total = F.conv2d(torch.ones_like(scores[:, None]), kernel, padding=1)
    return (F.conv2d(scores[:, None], kernel, padding=1) / total)[:, 0]


def largest(scores):
    return scores.flatten(1).amax(1).clamp(min=1e-6).view(-1, 1, 1)


def floored(scores, share, low, high):
    """Scores over min(high, max(low, share of the picture's largest)) come out over `high`, and the others not."""
    return scores * (high / (largest(scores) * share).clamp(low, high))


def joined(scores, high, ratio):
    """Hysteresis: scores over `ratio` of a threshold count where neighbours lead on to one over it."""
    seeds = scores
    for _ in range(max(scores.shape[-2:])):
        seeds = torch.minimum(F.max_pool2d(seeds[:, None], 3, 1, 1)[:, 0], scores / ratio).maximum(seeds)
    return seeds


IN_USE = "in use: larger of both steps over (the largest, at least 0.1, / 2) ^ 0.5, at least 0.03"


def rules(maps, threshold):
    """{name: scores [n, rows, columns]}; a token of any is edited where its score is over one threshold.

    threshold: the one in use. Without another word: scores of 2 of 9 steps' last estimate, the decoder's features."""

    def decoder(probe, layers=range(3)):
        return sum(maps[f"{probe} decoder{i}"] for i in layers) / len(layers)

    now, before, detail = decoder("2 of 9"), decoder("1 of 9"), sum(maps[f"2 of 9 detail{i}"] for i in range(3)) / 3
    larger = torch.maximum(now, before)

    def followed(scores, power, least=None):
        return scores / threshold_scale(scores.flatten(1), power, least)[..., None]

    found = {
        IN_USE: followed(larger, 0.5, threshold),
        "without a least threshold": followed(larger, 0.5),
        "2 of 9": now,
        "1 of 9": before,
        "mean of both steps": (now + before) / 2,
        "larger of both steps": larger,
        "geometric mean of both": (now * before).sqrt(),
        "4 of 18": decoder("4 of 18"),
    }
    found |= {
        f"{name} over (the largest, at least 0.1, / 2) ^ {p:g}": followed(x, p)
        for p in (0.25, 0.5, 0.75, 1)
        for name, x in (("2 of 9", now), ("mean of both steps", (now + before) / 2), ("larger of both", larger))
        if p != 0.5 or x is not larger
    }
    found["larger of 1 of 9 and 4 of 18, over (...) ^ 0.5"] = followed(torch.maximum(before, decoder("4 of 18")), 0.5)
    found |= {f"decoder layer {i}": decoder("2 of 9", (i,)) for i in range(3)}
    found |= {
        "latent": maps["2 of 9 latent"],
        "projected": maps["2 of 9 projected"],
        "3 x 3 mean": smoothed(now),
        "with 3 x 3 mean, geometric": (now * smoothed(now)).sqrt(),
    }
    found |= {f"hysteresis, {r:g} of the threshold": joined(now, threshold, r) for r in (0.25, 0.5)}
    found |= {f"over the source's missing detail + {e:g}": now / (detail + e) for e in (0.05, 0.2, 1)}
    found |= {
        f"over the median + {e:g}": now / (now.flatten(1).median(1).values.view(-1, 1, 1) + e) for e in (0.005, 0.02)
    }
    found |= {
        f"threshold at most {s:g} of the largest, at least {low:g}": floored(now, s, low, threshold)
        for s in (0.1, 0.2, 0.4)
        for low in (0.005, 0.015)
    }
    return found


def compare_rules(scores, recall=0.98):
    """Each rule at two thresholds: where calibration edits have the wanted recall, and where they cost as many tokens
    as by the rule in use."""
    maps = {k: v.float() for k, v in scores.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    reference, kind = scores["reference"], scores["kind"]
    changed = reference.flatten(1).any(1)
    sets = {k: changed & (kind == i) for i, k in enumerate(KINDS)}
    sets["calibration"] = changed & (kind < 2) & (scores["right"] > 0)  # what thresholds are set on
    threshold = SpecEditConfig().resolved_threshold()
    grid = [5e-4 * 1e4 ** (i / 400) for i in range(401)]
    out, budget = [], None
    for name, found in rules(maps, threshold).items():
        effective = effective_scores(found, 1)

        def figures(t):
            result = {}
            for key, chosen in sets.items():
                if not chosen.any():
                    continue
                point = operating_point(effective[chosen], reference[chosen], t)
                none = ~(effective[chosen] > t).flatten(1).any(1)
                result[key] = {**point, "none": none.float().mean().item()}
            return result

        points = [(t, operating_point(effective[sets["calibration"]], reference[sets["calibration"]], t)) for t in grid]
        if budget is None:
            out.append({"rule": name, "at": "the threshold in use", "threshold": threshold, **figures(threshold)})
            budget = out[0]["calibration"]["share"]
        wanted = [t for t, p in points if p["recall"] >= recall]
        same = min(points, key=lambda point: abs(point[1]["share"] - budget))[0]
        for label, t in ((f"recall {recall}", wanted[-1] if wanted else None), ("as many tokens", same)):
            if t is not None:
                out.append({"rule": name, "at": label, "threshold": t, **figures(t)})
    return out


def rules_markdown(place, results):
    """The report of compare_rules."""
    text = [
        "# From scores to a mask",
        "",
        "Rules on calibration edits, dilation 1, whole blocks; the coarse draft's score maps. recall / tokens % /"
        " edits of which nothing is selected %. Calibration: local and small edits that the plain run gets right;"
        " the kinds: all edits that change anything. Each rule at the threshold where calibration edits have recall"
        " .98, and where they cost as many tokens as by the rule in use.",
        "",
        setting_text(place) + ".",
        "",
    ]
    for label in dict.fromkeys(r["at"] for r in results):
        lines = []
        for r in results:
            if r["at"] == label:
                lines.append(
                    [
                        r["rule"],
                        f"{r['threshold']:.3g}",
                        *(
                            "–"
                            if k not in r
                            else " / ".join(
                                (cell(r[k]["recall"], 3), cell(100 * r[k]["share"], 1), cell(100 * r[k]["none"], 1))
                            )
                            for k in ("calibration", *KINDS)
                        ),
                    ]
                )
        text += [f"## At {label}", "", markdown_table(["rule", "threshold", "calibration", *KINDS], lines), ""]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/selection")
    parser.add_argument("--part", choices=("scores", "rules"), default="scores")
    parser.add_argument("--reference-steps", type=int, default=50, help="of the plain run")
    args = parser.parse_args()
    if args.part == "rules":
        scores = torch.load(args.out / "scores.pt", map_location="cpu")
        results = compare_rules(scores)
        write_json(args.out / "selection.json", jsonable({"setting": scores["setting"], "results": results}))
        write_text(args.out / "selection.md", rules_markdown(scores["setting"], results))
        print((args.out / "selection.md").read_text())
        return 0
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
