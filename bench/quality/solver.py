# SPDX-License-Identifier: Apache-2.0
"""Trials of issue 18 on calibration edits, never on the table's: solvers, coarse steps, where the fine ones begin.

python bench/quality/roads.py --text-length 64 --batch 90 --part 1 --out OUT     # OUT/roads.{md,json}, maps.pt

What no config says is a patch of the stages at run time, by the switches of `Trial`; the package stays. maps.pt
has what the plain run changed in every edit and, of the rows that collect them, the score maps of each coarse step, of
the first whole pass and of the far one. --base maps.pt takes that, and the plain run's figures, from an earlier run of
the same edits.
"""

import argparse
import fnmatch
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scenes import EVALUATION_SEED, KINDS
from table_measures import grow, mean, median
from table_runs import (
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

from specedit_kernels import SpecEditConfig
from specedit_kernels.engine import stages
from specedit_kernels.sampling.grid import coarse_grid, pack, pool, to_blocks, unpack

SEED = EVALUATION_SEED + 1002  # calibrate.py has 1000 and 1001
COUNTS = {"local": 170, "small": 60, "ambiguous": 120}


@dataclass(frozen=True)
class Trial:
    """What a row changes.

    every: the largest score of all coarse estimates counts. whole: the mask is everything. dilate: the oracle mask's,
    less than 0: no oracle. collect: keep score maps. single: the mixed step at whose sigma one whole pass is made, over
    the last coarse estimate, in place of the two of a bracket.
    """

    name: str
    config: SpecEditConfig | None = None
    steps: int = 0
    every: bool = False
    whole: bool = False
    dilate: int = -1
    collect: str = ""
    single: int | None = None


class State:
    """The trial that runs, and the maps that it leaves."""

    trial = Trial("none")
    maps: dict[str, torch.Tensor] = {}


def dense_steps(run, state, sigmas, condition, stage, **options):
    """The stage's own; keeps the clean estimate of each coarse step."""
    if stage != "coarse":
        return OWN_DENSE(run, state, sigmas, condition, stage, **options)
    made = []

    def euler(*args):
        made.append(OWN_EULER(*args))
        return made[-1]

    stages.euler = euler
    try:
        found = OWN_DENSE(run, state, sigmas, condition, stage, **options)
    finally:
        stages.euler = OWN_EULER
    grid = (state.shape[-2] // run.patch, state.shape[-1] // run.patch)
    run.estimates = [unpack(x, grid, run.patch) for x in made[::2]]  # each step makes an estimate, then the next state
    return found


def verify(run, draft):
    trial = State.trial
    estimates = getattr(run, "estimates", None)
    if estimates and (trial.collect or trial.every):
        each = [OWN_VERIFY(run, stages.Draft(x, draft.source)) for x in estimates]
        if trial.collect:
            for i, x in enumerate(each):
                keep(run, f"{trial.collect} c{i + 1}", x)
        if trial.every:
            return torch.stack(each).amax(0)
    return OWN_VERIFY(run, draft)


def keep(run, name, scores):
    State.maps.setdefault(name, []).append(scores.reshape(-1, *run.grid).half().cpu())


def expand(run, fine, coarse, sigma, selection):
    run.active = selection.active
    return OWN_EXPAND(run, fine, coarse, sigma, selection)


def departure(run, state, tokens, velocity, sigma):
    """Scores [B, N] of how far the clean estimate of all target tokens departs from the source, on the coarse grid."""
    clean = (tokens.float() - sigma * velocity.float()).to(state.table.dtype)
    table = state.table.clone()
    stages.ops.scatter_tokens_(table, clean.contiguous(), state.layout.index)
    n = run.grid[0] * run.grid[1]
    fine = unpack(table[:, :n], run.grid, run.patch)
    coarse = unpack(table[:, n : n + n // 4], coarse_grid(run.grid), run.patch)
    mask = to_blocks(run.active, run.grid).reshape(-1, 1, *coarse_grid(run.grid))
    mask = mask.repeat_interleave(run.patch, -1).repeat_interleave(run.patch, -2)
    return OWN_VERIFY(run, stages.Draft(torch.where(mask, pool(fine), coarse), pool(run.source)))


def mixed_steps(run, state, sigmas):
    trial = State.trial
    if trial.single is not None:
        return single_steps(run, state, sigmas)
    if trial.collect:
        own, left = run.velocity, [("A", sigmas[0]), ("B", sigmas[-2])]

        def velocity(tokens, *args):
            found = own(tokens, *args)
            if left:
                name, sigma = left.pop(0)
                moved = torch.where(state.free, found, state.drift)
                keep(run, f"{trial.collect} {name}", departure(run, state, tokens, moved, sigma))
            return found

        keep(run, trial.collect + " active", run.active.float())
        run.velocity = velocity
    return OWN_MIXED(run, state, sigmas)


def single_steps(run, state, sigmas):
    """Active steps alone, over keys and values of one whole pass at the sigma of step `single`."""
    at = torch.tensor(sigmas, dtype=torch.float32).to(run.device)
    conditionings = run.timestep_conditioning(at[:-1] * 1000)
    n, which = run.grid[0] * run.grid[1], State.trial.single
    table = torch.zeros_like(state.table)
    table[:, :n] = pack(run.estimates[-1].repeat_interleave(2, -1).repeat_interleave(2, -2), run.patch)
    estimate = stages.ops.gather_tokens(table, state.layout.index, state.layout.capacity)
    moves = torch.where(state.free, (state.tokens.float() - estimate.float()) / at[0], state.drift.float())
    run.velocity(stages.euler(state.tokens, moves, at[which] - at[0]), conditionings[which], state.layouts)
    run.record("bracket", sigmas[which], state.lengths)
    solve, m = stages.Solver(run.config.solver), state.first
    for i in range(len(sigmas) - 1):
        run.on_start(at[i] * 1000)
        v = run.velocity(state.tokens[:, :m], conditionings[i], state.active_layouts)
        v = torch.where(state.free[:, :m], v, state.drift[:, :m])
        v = torch.cat([v, state.drift[:, m:]], dim=1)
        run.record("active", sigmas[i], state.fine, keys=state.lengths)
        state.tokens = run.on_step(run.step, at[i] * 1000, solve.step(state.tokens, v, at[i], at[i + 1]))
        run.step += 1


OWN_VERIFY, OWN_EXPAND, OWN_EULER = stages.verify, stages.expand, stages.euler
OWN_DENSE, OWN_MIXED = stages.dense_steps, stages.mixed_steps


def patch(on):
    """Put the trials' stages in the place of the package's, or take them out."""
    ours = (verify, expand, dense_steps, mixed_steps) if on else (OWN_VERIFY, OWN_EXPAND, OWN_DENSE, OWN_MIXED)
    stages.verify, stages.expand, stages.dense_steps, stages.mixed_steps = ours


class TrialRunner(Runner):
    """Runs trials; a mask is the oracle's or everything."""

    def options(self, part):
        options = super().options(part)
        trial = State.trial
        if trial.whole:
            options["mask_image"] = torch.ones(part.source.shape[-2:])
        elif trial.dilate >= 0:
            options["mask_image"] = (
                grow(part.reference, trial.dilate).float() if trial.dilate else part.reference.float()
            )
        return options


def split(coarse, mixed, begin=7 / 9, **change):
    """The config of so many coarse and locked steps; the mixed ones begin at `begin`, before the shift."""
    options = dict(stages=(coarse, mixed, 0), mixed_from=begin, finish="locked", kv_refresh="bracket", solver="ab2")
    return dict(config=SpecEditConfig(**options | change))


def trials(part):
    """The plain run and the trials of one part."""
    out = [Trial("plain-50", steps=50)]

    def add(name, **values):
        out.append(Trial(name, **values))

    if part == 1:  # to be confirmed, on a fresh seed
        add("plain-9", steps=9)
        add("2+3", **split(2, 3))
        add("2+5", **split(2, 5))
        add("4+7", **split(4, 7))
        add("1 and 1 ahead, +5 from 8/9", **split(1, 5, 8 / 9, draft_ahead=1))
        add("2+7 euler", **split(2, 7, solver="euler"))
    elif part == 2:  # small edits, and few passes
        add("1 and 1 ahead, +5 from 8/9", **split(1, 5, 8 / 9, draft_ahead=1))
        add("2 and 1 ahead, +5 from 8/9", **split(2, 5, 8 / 9, draft_ahead=1))
        add("0 and 2 ahead, +6", **split(0, 6, None, draft_ahead=2))
        add("1 and 1 ahead, +3 from 8/9", **split(1, 3, 8 / 9, draft_ahead=1))
        add("2+3, one pass at 1", **split(2, 3, kv_refresh=99), single=1)
        add("2+4, one pass at 2", **split(2, 4, kv_refresh=99), single=2)
        add("2+6 from .85", **split(2, 6, 0.85))
        add("2+3", **split(2, 3))
    else:  # many steps, and what is verified
        add("4+7", **split(4, 7))
        add("6+7", **split(6, 7), collect="6+7")
        add("3 and 1 ahead, +8 from 8/9", **split(3, 8, 8 / 9, draft_ahead=1))
        add("4+10", **split(4, 10))
        add("4+7, every estimate", **split(4, 7), every=True)
        whole = split(4, 0)["config"]
        add("4 coarse, then the whole picture fine", config=replace(whole, finish="full", stages=(4, 0, 7)))
        add("2 and 2 ahead, +8 from 8/9", **split(2, 8, 8 / 9, draft_ahead=2))
        add("4+7 threshold .055", **split(4, 7, threshold=0.055, relative=0.5))
    return out


def summary(figures, kinds):
    found = {}
    for i, kind in enumerate(KINDS):
        chosen = kinds == i
        if not chosen.any():
            continue
        values = {
            name: mean(figures[name][chosen])
            for name in ("right", "psnr_in", "active", "recall", "missed", "recall_own", "drift", "flops")
            if name in figures
        }
        values["sharpness"] = median(figures["sharpness"][chosen])
        found[kind] = values
    return found


def report(place, results, seed):
    lines = []
    head = ["trial", "TFLOP"]
    for kind in ("local", "small", "ambiguous"):
        head += [f"{kind} right", "sharp", "ratio", "recall", "missed", "tokens %"]
    head += ["in dB", "drift dB"]
    for r in results:
        if "error" in r:
            lines.append([r["name"], r["error"][:60], *[""] * (len(head) - 2)])
            continue
        s = r["summary"]
        line = [r["name"], cell(s["local"]["flops"] / 1e12, 3)]
        for kind in ("local", "small", "ambiguous"):
            v = s.get(kind, {})
            line += [
                cell(v.get("right"), 3),
                cell(v.get("sharpness"), 3),
                cell(r["ratio"].get(kind), 3),
                cell(v.get("recall"), 3),
                cell(v.get("missed"), 3),
                cell(None if v.get("active") is None else 100 * v["active"], 1),
            ]
        lines.append([*line, cell(s["local"].get("psnr_in"), 2), cell(s["local"].get("drift"), 2)])
    return "\n".join(
        [
            "# Trials",
            "",
            "ratio: median over edits of a trial's sharpness over that of plain-50.",
            "",
            setting_text(place) + f"; edits of seed {seed}.",
            "",
            markdown_table(head, lines),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/roads")
    parser.add_argument("--part", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument(
        "--base", type=Path, metavar="MAPS", help="maps.pt of the same edits: the plain run is left out"
    )
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument(
        "--counts", type=int, nargs=3, default=[*COUNTS.values()], metavar="N", help="edits of each kind"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--reference-steps", type=int, default=50)
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="I", help="these edits of the set, smallest region first"
    )
    args = parser.parse_args()
    began = time.perf_counter()
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    runner = TrialRunner(load_pipeline(args.model, device, getattr(torch, args.dtype)), args.text_length)
    edits = make_set(device, args.size, args.limit, dict(zip(COUNTS, args.counts)), args.seed)
    edits = edits if args.only is None else edits[torch.tensor(args.only)]
    say(f"{len(edits)} edits of seed {args.seed}")
    edits.reference, own = edits.tokens.clone(), torch.zeros_like(edits.tokens)
    place, results, maps, base = setting(args, device), [], {}, None
    kinds = edits.edits.kind
    chosen = trials(args.part)
    reference = replace(chosen[0], steps=args.reference_steps)
    if args.base:
        maps = torch.load(args.base)
        if not torch.equal(maps["tokens"], edits.tokens.cpu()):
            raise SystemExit(f"--base: expected a run of seed {args.seed} and counts {args.counts}, got other edits")
        edits.reference, own = maps["reference"].to(device), maps["own"].to(device)
        base = {"sharpness": maps["plain-50 sharpness"]}
    order = ([] if args.base else [reference]) + [
        t for t in chosen[1:] if any(fnmatch.fnmatchcase(t.name, g) for g in args.rows)
    ]
    for trial in order:
        if time.perf_counter() - began > args.seconds:
            say(f"{trial.name}: no time left")
            continue
        started, columns = time.perf_counter(), {}
        State.trial, State.maps = trial, {}
        patch(trial.every or bool(trial.collect) or trial.single is not None)
        try:
            for rows in torch.arange(len(edits)).split(args.batch):
                part = edits[rows]
                result = runner.run(Row(trial.name, steps=trial.steps, config=trial.config), part)
                if trial is reference:
                    there = rows.to(device)
                    edits.reference[there], own[there] = set_reference(part, runner, result.images)
                    part = edits[rows]
                for name, values in measure(part, result, judge, own[rows.to(own.device)]).items():
                    columns.setdefault(name, []).append(values)
        except Exception as error:
            traceback.print_exc()
            results.append({"name": trial.name, "error": f"{type(error).__name__}: {error}"})
            continue
        figures = {name: torch.cat(values) for name, values in columns.items()}
        if trial is reference:
            base = figures
            maps |= {"reference": edits.reference.cpu(), "own": own.cpu(), "tokens": edits.tokens.cpu()}
            maps |= {"kind": kinds, "task": edits.edits.task, "unique": edits.edits.unique()}
            maps["plain-50 sharpness"] = figures["sharpness"]
        ratio = figures["sharpness"] / base["sharpness"]
        record = {
            "name": trial.name,
            "summary": summary(figures, kinds),
            "ratio": {k: median(ratio[kinds == i]) for i, k in enumerate(KINDS) if (kinds == i).any()},
            "figures": {k: figures[k] for k in ("right", "sharpness", "recall", "missed", "active") if k in figures},
            "seconds": round(time.perf_counter() - started, 2),
        }
        results.append(record)
        if "right" in figures:
            maps[f"{trial.name} right"] = figures["right"]
        maps |= {name: torch.cat(x) for name, x in State.maps.items() if sum(map(len, x)) == len(edits)}
        say(
            f"{trial.name}: {record['seconds']:.1f} s; "
            + "; ".join(f"{k} {v.get('right', 0):.3f} sharp {v['sharpness']:.3f}" for k, v in record["summary"].items())
        )
        write_json(args.out / "roads.json", jsonable({"setting": place, "seed": args.seed, "trials": results}))
        write_text(args.out / "roads.md", report(place, results, args.seed))
        if trial.collect or trial is reference:
            torch.save(maps, args.out / "maps.pt")
    torch.save(maps, args.out / "maps.pt")
    print((args.out / "roads.md").read_text(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
