# SPDX-License-Identifier: Apache-2.0
"""Trials of issue 18 on calibration edits, never on the table's: solvers, coarse steps, regions that grow.

python bench/quality/roads.py --text-length 64 --batch 90 --part 1 --out OUT     # OUT/roads.{md,json}, maps.pt

The stages are replaced by ones with the switches of `Trial`; nothing of the package changes. maps.pt has the score maps
of each coarse step, of the first whole pass and of the far one, for every edit, with what the plain run changed.
"""

import argparse
import fnmatch
import time
import traceback
from dataclasses import dataclass, fields, replace

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
from specedit_kernels.sampling import noise as algebra
from specedit_kernels.sampling.grid import coarse_grid, pack, pool, to_blocks, unpack

SEED = EVALUATION_SEED + 1002  # calibrate.py has 1000 and 1001
COUNTS = {"local": 170, "small": 60, "ambiguous": 120}


@dataclass(frozen=True)
class Trial:
    """What a row changes.

    coarse, mixed: the solver of those steps, "euler", "ab2" (the velocity extrapolated to the middle of the step from
    the one before) or "dpm2" (the same for the clean estimate, over the log of signal to noise). far: the first mixed
    step has the bracket's far velocity for a second one. sigmas: the schedule before its shift. gain: of the noise that
    the expansion adds. grow_at: threshold of a region that grows from the first whole pass; None: it does not. whole:
    the mask is everything. dilate: the oracle mask's, less than 0: no oracle. collect: keep score maps.
    """

    name: str
    config: SpecEditConfig | None = None
    steps: int = 0
    coarse: str = "euler"
    mixed: str = "euler"
    far: bool = False
    sigmas: tuple[float, ...] | None = None
    gain: float = 1.0
    grow_at: float | None = None
    every: bool = False
    whole: bool = False
    dilate: int = -1
    collect: str = ""
    single: int | None = None


class State:
    """The trial that runs, and the maps that it leaves."""

    trial = Trial("none")
    maps: dict[str, torch.Tensor] = {}


def solved(kind, x, v, former, s, s_next):
    """x at s_next. former: (level, velocity, clean estimate) of the step before, or None. s, s_next: floats."""
    h = s_next - s
    x32, v = x.float(), v.float()
    if former is None or kind == "euler":
        return (x32 + h * v).to(x.dtype)
    s0, v0, d0 = former
    if kind == "ab2":
        return (x32 + h * (v + (h / 2) * (v - v0) / (s - s0))).to(x.dtype)
    d = x32 - s * v
    if s_next <= 0 or s0 >= 1:  # a log of nothing
        return (x32 + h * v).to(x.dtype)
    lam = [float(torch.log(torch.tensor((1 - a) / a))) for a in (s0, s, s_next)]
    r = (lam[1] - lam[0]) / (lam[2] - lam[1])
    d = d + (d - d0) / (2 * r)
    ratio = s_next / s
    # x_next = ratio x + ((1 - s_next) - ratio (1 - s)) d
    return (ratio * x32 + ((1 - s_next) - ratio * (1 - s)) * d).to(x.dtype)


def dense_steps(run, state, levels, condition, stage, main=True, guided=True):
    trial = State.trial
    kind = trial.coarse if stage == "coarse" else trial.mixed
    patch, condition = run.patch, [] if run.model.keeps_references else condition
    grids = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in (state, *condition)]
    tokens, behind = pack(state, patch), [pack(x, patch) for x in condition]
    texts = run.texts if guided else (run.positive,)
    layouts = [run.model.dense_layout(text, run.pictures, grids) for text in texts]
    at = torch.tensor(levels, dtype=torch.float32).to(run.device)
    conditionings = run.timestep_conditioning(at[:-1] * 1000)
    count, total = tokens.shape[1], grids[0][0] * grids[0][1] * len(grids)
    first = estimate = tokens
    former = None
    estimates = []
    for i in range(len(levels) - 1):
        if main:
            run.on_start(at[i] * 1000)
        v = run.velocity(torch.cat([tokens, *behind], dim=1), conditionings[i], layouts, count, guided)
        estimate = (tokens.float() - levels[i] * v.float()).to(tokens.dtype)
        estimates.append(unpack(estimate, grids[0], patch))
        first = estimate if i == 0 else first
        moved = solved(kind, tokens, v, former, levels[i], levels[i + 1])
        former = (levels[i], v.float(), estimate.float())
        tokens = moved
        run.record(stage, levels[i], [total] * run.batch, passes=2 if guided else 1)
        if main:
            tokens = run.on_step(run.step, at[i] * 1000, tokens)
            run.step += 1
        else:
            run.on_draft_step()
    if stage == "coarse":
        run.estimates = estimates
    state, first, estimate = (unpack(x, grids[0], patch) for x in (tokens, first, estimate))
    return state, (first, estimate)


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


def expand(run, fine, coarse, level, selection):
    run.begin = (fine, coarse, level, selection)
    return OWN_EXPAND(run, fine, coarse, level, selection)


def departure(run, state, velocity, level):
    """Scores [B, N] of how far the clean estimate of all target tokens departs from the source, on the coarse grid."""
    clean = (state.tokens.float() - level * velocity.float()).to(state.table.dtype)
    table = state.table.clone()
    stages.ops.scatter_tokens_(table, clean.contiguous(), state.layout.index)
    n = run.grid[0] * run.grid[1]
    fine = unpack(table[:, :n], run.grid, run.patch)
    coarse = unpack(table[:, n : n + n // 4], coarse_grid(run.grid), run.patch)
    active = run.begin[3].active
    mask = to_blocks(active, run.grid).reshape(-1, 1, *coarse_grid(run.grid))
    mask = mask.repeat_interleave(run.patch, -1).repeat_interleave(run.patch, -2)
    est = torch.where(mask, pool(fine), coarse)
    return OWN_VERIFY(run, stages.Draft(est, pool(run.source))), active


def grown(run, state, velocity, level):
    """The state of the region with what the first whole pass departs in; None where it is no more."""
    scores, active = departure(run, state, velocity, level)
    relative = run.config.resolved_relative()
    scaled = scores / stages.threshold_scale(scores, relative, State.trial.grow_at)
    more = (scaled > State.trial.grow_at).reshape(-1, *run.grid)
    more = grow(more, run.config.dilation).flatten(1) | active
    if not (more & ~active).any():
        return None
    fine, coarse, level, old = run.begin
    selection = stages.select(run, more.float(), 0.5, 0)
    for f in fields(old):
        object.__setattr__(old, f.name, getattr(selection, f.name))
    if all(old.dense):
        return None
    return OWN_EXPAND(run, fine, coarse, level, old)


def ahead_of(run, state, levels, at, conditioning):
    """Keys and values of the whole sequence at the level of step `single`."""
    n = run.grid[0] * run.grid[1]
    table = torch.zeros_like(state.table)
    fine = run.estimates[-1].repeat_interleave(2, -1).repeat_interleave(2, -2)
    table[:, :n] = pack(fine, run.patch)
    estimate = stages.ops.gather_tokens(table, state.layout.index, state.layout.capacity)
    v = (state.tokens.float() - estimate.float()) / levels[0]
    v = torch.where(state.free, v, state.drift.float())
    level = levels[State.trial.single]
    ahead = (state.tokens.float() + (level - levels[0]) * v).to(state.tokens.dtype)
    run.velocity(ahead, conditioning, state.layouts)
    run.record("mixed", level, state.lengths)


def mixed_steps(run, state, levels):
    trial = State.trial
    every = run.config.kv_refresh
    steps = len(levels) - 1
    bracket = every == "bracket" and steps > 2
    if every == "bracket":
        every = steps if bracket else 1
    at = torch.tensor(levels, dtype=torch.float32).to(run.device)
    conditionings = run.timestep_conditioning(at[:-1] * 1000)
    former = None
    if trial.single is not None:
        ahead_of(run, state, levels, at, conditionings[trial.single])
    for i in range(steps):
        run.on_start(at[i] * 1000)
        s, s_next = levels[i], levels[i + 1]
        if i % every == 0 and trial.single is None:
            v = run.velocity(state.tokens, conditionings[i], state.layouts)
            run.record("mixed", s, state.lengths)
            if i == 0 and trial.collect:
                keep(run, trial.collect + " A", departure(run, state, v, s)[0])
                keep(run, trial.collect + " active", run.begin[3].active.float())
            if i == 0 and trial.grow_at is not None:
                other = grown(run, state, v, s)
                if other is not None:
                    for f in fields(state):
                        setattr(state, f.name, getattr(other, f.name))
                    v = run.velocity(state.tokens, conditionings[i], state.layouts)
                    run.record("mixed", s, state.lengths)
            v = torch.where(state.free, v, state.drift)
            v_eff = v
            if bracket:
                ahead = stages.euler(state.tokens, v, at[-2] - at[0])
                far = run.velocity(ahead, conditionings[-1], [f for f, _ in state.brackets])
                run.record("bracket", levels[-2], state.lengths)
                if trial.collect:
                    tokens, state.tokens = state.tokens, ahead
                    keep(run, trial.collect + " B", departure(run, state, far, levels[-2])[0])
                    state.tokens = tokens
                if trial.far:
                    far = torch.where(state.free, far, state.drift)
                    v_eff = v.float() + (s_next - s) / 2 * (far.float() - v.float()) / (levels[-2] - s)
        else:
            if bracket:
                weight = (at[0] - at[i]) / (at[0] - at[-2])
                for near, (f, between) in zip(state.layouts, state.brackets):
                    run.model.blend(between, near, f, weight)
            n = state.first
            v = run.velocity(state.tokens[:, :n], conditionings[i], state.active_layouts)
            v = torch.where(state.free[:, :n], v, state.drift[:, :n])
            v = v_eff = torch.cat([v, state.drift[:, n:]], dim=1)
            run.record("active", s, state.fine, keys=state.lengths)
        x = state.tokens
        estimate = x.float() - s * v.float()
        state.tokens = solved(trial.mixed if v_eff is v else "euler", x, v_eff, former, s, s_next)
        former = (s, v.float(), estimate)
        state.tokens = run.on_step(run.step, at[i] * 1000, state.tokens)
        run.step += 1


def expand_state(coarse, level, noise):
    return OWN_STATE(coarse, level, noise * State.trial.gain)


OWN_VERIFY, OWN_EXPAND, OWN_STATE = stages.verify, stages.expand, algebra.expand_state


def install():
    stages.verify, stages.expand, stages.dense_steps, stages.mixed_steps = verify, expand, dense_steps, mixed_steps
    algebra.expand_state = expand_state


class TrialRunner(Runner):
    """Runs trials; a mask is the oracle's or everything."""

    def options(self, part):
        options = super().options(part)
        trial = State.trial
        if trial.sigmas is not None:
            options["sigmas"] = list(trial.sigmas)
        if trial.whole:
            options["mask_image"] = torch.ones(part.source.shape[-2:])
        elif trial.dilate >= 0:
            options["mask_image"] = (
                grow(part.reference, trial.dilate).float() if trial.dilate else part.reference.float()
            )
        return options

    def _run(self, row, part):
        if row.config is None:
            return super()._run(row, part)
        options = self.options(part)
        out = self.pipe(specedit=row.config, **options)
        from table_runs import Result

        stats = out.stats
        flops = [
            sum(self.step_flops(x.tokens[i], x.keys[i], x.passes, x.lock_text) for x in stats.steps)
            for i in range(len(part))
        ]
        return Result(
            out.images.float(), flops, stats.nfe, stats.draft_nfe, out.mask, out.scores, stats.active, stats.fallbacks,
            row.config.feather, stats.runner,
        )  # fmt: skip


def schedule(coarse, mixed, begin=7 / 9):
    """Before the shift: `coarse` even steps from 1 to `begin`, then `mixed` ones to 0."""
    ahead = [1 - (1 - begin) * i / coarse for i in range(coarse)]
    return tuple(ahead + [begin * (1 - i / mixed) for i in range(mixed)])


def split(coarse, mixed, begin=7 / 9, **change):
    """(config, sigmas) of so many coarse and locked steps."""
    options = dict(stages=(coarse, mixed, 0), finish="locked", kv_refresh="bracket", runner=RUNNER) | change
    return dict(config=SpecEditConfig(**options), sigmas=schedule(coarse, mixed, begin))


RUNNER = "auto"


def trials(part):
    """The reference, and the trials of one part."""
    out = [Trial("plain-50", steps=50), Trial("plain-9", steps=9)]

    def add(name, **values):
        out.append(Trial(name, **values))

    both = dict(coarse="ab2", mixed="ab2", far=True)
    fine = dict(mixed="ab2", far=True)
    if part == 1:
        dense = SpecEditConfig(quality="paper", runner=RUNNER, stages=(0, 0, 9))
        for solver in ("ab2", "dpm2"):
            add(f"plain-9 {solver}", config=dense, whole=True, mixed=solver)
        # what the whole of a preset loses, part by part
        add("2+7", **split(2, 7), collect="2+7")
        whole = SpecEditConfig(quality="paper", runner=RUNNER, stages=(2, 0, 7))
        add("2 coarse, then the whole picture fine", config=whole)
        add("oracle 2+7", **split(2, 7), dilate=1)
        add("oracle 2+7 kv1", **split(2, 7, kv_refresh=1), dilate=1)
        add("oracle 0+9 kv1", **split(0, 9, 1.0, kv_refresh=1), dilate=1)
        add("oracle 0+9 kv1 fine condition", **split(0, 9, 1.0, kv_refresh=1, coarse_condition=False), dilate=1)
        add("oracle 2+7 dilation 2", **split(2, 7), dilate=2)
        # solvers
        add("2+7 ab2", **split(2, 7), **fine)
        add("2+7 ab2, no far", **split(2, 7), mixed="ab2")
        add("2+7 dpm2", **split(2, 7), mixed="dpm2", far=True)
        add("2+7 ab2 both", **split(2, 7), **both)
        # coarse steps
        add("4+7", **split(4, 7), collect="4+7")
        add("4+7 ab2", **split(4, 7), **fine)
        add("4+7 ab2 both", **split(4, 7), **both)
        add("3+7 ab2 both", **split(3, 7), **both)
        add("4+14", **split(4, 14), collect="4+14")
        add("4+14 ab2 both", **split(4, 14), **both)
        add("6+7 ab2", **split(6, 7), **fine, collect="6+7")
        add("4+10 ab2 both", **split(4, 10), **both)
        # coarse estimates below the level where the mixed steps begin
        add("8+1", **split(8, 1, 1 / 9, kv_refresh=1), collect="8+1")
        return out
    # few steps
    for coarse, mixed in ((2, 5), (2, 4), (2, 3), (1, 5), (3, 4)):
        add(f"{coarse}+{mixed} ab2 both", **split(coarse, mixed), **both)
    # one whole pass in place of two
    for i in (0, 3, 4, 5, 6):
        add(f"4+7 ab2, one pass at {i}", **split(4, 7, kv_refresh=99), mixed="ab2", single=i)
    for i in (2, 3):
        add(f"2+5 ab2 both, one pass at {i}", **split(2, 5, kv_refresh=99), coarse="ab2", mixed="ab2", single=i)
    # where the fine steps begin
    add("2+8 ab2 both from 8/9", **split(2, 8, 8 / 9), **both)
    add("3+8 ab2 both from .85", **split(3, 8, 0.85), **both)
    add("4+7 ab2 both from .7", **split(4, 7, 0.7), **both)
    # noise of the expansion
    for gain in (1.03, 1.06):
        add(f"4+7 ab2 both, gain {gain}", **split(4, 7), **both, gain=gain)
    # the largest of all estimates
    add("4+7 ab2 both, every", **split(4, 7), **both, every=True)
    add("2+7 threshold .05", **split(2, 7, threshold=0.05, relative=0.5))
    # regions that grow from the first whole pass
    for t in (0.03, 0.06, 0.12, 0.25):
        add(f"2+7 ab2 both, grown over {t:g}", **split(2, 7), **both, grow_at=t)
    add("4+7 ab2 both, grown over .1", **split(4, 7), **both, grow_at=0.1)
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


def report(place, results):
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
            setting_text(place) + f"; edits of seed {SEED}.",
            "",
            markdown_table(head, lines),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/roads")
    parser.add_argument("--part", type=int, choices=(1, 2), default=1)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument(
        "--counts", type=int, nargs=3, default=[*COUNTS.values()], metavar="N", help="edits of each kind"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--reference-steps", type=int, default=50)
    args = parser.parse_args()
    began = time.perf_counter()
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    runner = TrialRunner(load_pipeline(args.model, device, getattr(torch, args.dtype)), args.text_length)
    install()
    edits = make_set(device, args.size, args.limit, dict(zip(COUNTS, args.counts)), args.seed)
    say(f"{len(edits)} edits of seed {args.seed}")
    edits.reference, own = edits.tokens.clone(), torch.zeros_like(edits.tokens)
    place, results, maps, base = setting(args, device), [], {}, None
    kinds = edits.edits.kind
    chosen = trials(args.part)
    reference = replace(chosen[0], steps=args.reference_steps)
    order = [reference] + [t for t in chosen[1:] if any(fnmatch.fnmatchcase(t.name, g) for g in args.rows)]
    for trial in order:
        if time.perf_counter() - began > args.seconds:
            say(f"{trial.name}: no time left")
            continue
        started, columns = time.perf_counter(), {}
        State.trial, State.maps = trial, {}
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
        write_text(args.out / "roads.md", report(place, results))
        if trial.collect or trial is reference:
            torch.save(maps, args.out / "maps.pt")
    torch.save(maps, args.out / "maps.pt")
    print((args.out / "roads.md").read_text(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
