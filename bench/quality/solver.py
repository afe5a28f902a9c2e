# SPDX-License-Identifier: Apache-2.0
"""Few and many steps by solver, on calibration edits of any seed, never on the table's.

    python bench/quality/solver.py --text-length 64 --batch 90 --rows plain-9 2+3 4+5 '2+7 euler' --out OUT
    python bench/quality/solver.py --merge OUT/solver.json OTHER/solver.json --out OUT     # one file of several runs

A row: plain-N, a quality ("fast"), preset-N ("preset-N cached": one whole pass; "preset-N paper": the paper's) or C+M:
C coarse and M locked mixed steps with bracketed keys and values, solver="ab2", the mixed ones from 7/9 of the schedule;
"C+M euler", "C+M from S" and "C+M even" (all steps even) change that. After these, in this order, "half": draft="half";
"ck": coarse steps but the first over its keys and values, "ckK": but every K-th (coarse_refresh); "lt": lock_text;
"ug": draft_guidance=False, "ul": "last"; "ct K": coarse_text_refresh; "kv N": kv_refresh;
"grow N": dilation. "ROW at T": with that threshold. "lora ROW": with --lora's weights, which the others are without. 50
plain steps come first: others are held against them, edit by edit.
Writes OUT/solver.{md,json} after each row.
"""

import argparse
import hashlib
import json
import re
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from scenes import EVALUATION_SEED, KINDS
from table_measures import mean, median
from table_runs import (
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

from specedit_kernels import SpecEditConfig

SEED = EVALUATION_SEED + 1002  # calibrate.py has 1000 and 1001
COUNTS = {"local": 170, "small": 60, "ambiguous": 120}
REFERENCE = "plain-50"
COLUMNS = {"right": ("right", 3), "sharpness": ("sharp", 3), "ratio": ("ratio", 3), "recall": ("recall", 3),
           "missed": ("missed", 3), "active": ("tokens", 3)}  # fmt: skip


NAME = re.compile(
    r"(?P<lora>lora )?"
    r"(?:plain-(?P<plain>\d+)|(?P<quality>fast|balanced|best)|preset-(?P<preset>\d+)"
    r"(?: (?P<paper>paper)| (?P<cached>cached))?"
    r"|(?P<coarse>\d+)\+(?P<mixed>\d+)(?: (?P<euler>euler))?"
    r"(?: from (?P<start>0?\.\d+|\d+/\d+)|(?P<even> even))?"
    r"(?: (?P<half>half))?(?: ck(?P<kept>\d*))?(?: (?P<text>lt))?(?: (?P<guided>ug|ul))?"
    r"(?: ct (?P<coarse_text>\d+))?(?: kv (?P<kv>\d+))?(?: grow (?P<grow>\d+))?)"
    r"(?: at (?P<threshold>(?:\d*\.)?\d+))?"
)


def parsed(name):
    found = NAME.fullmatch(name)
    if not found:
        raise ValueError(
            "--rows: expected [lora] plain-N, a quality, preset-N [paper | cached] or C+M [euler] [from S | even]"
            f" [half] [ck | ckK] [lt] [ug | ul] [ct K] [kv N] [grow N], and [at T], got {name!r}"
        )
    return found.groupdict()


def row_of(name):
    """The row of a name."""
    parts = parsed(name)
    lora = parts["lora"] is not None
    if parts["plain"]:
        return Row(name, steps=int(parts["plain"]), lora=lora)
    if parts["quality"]:
        config = SpecEditConfig(quality=parts["quality"])
    elif parts["preset"]:
        config = SpecEditConfig(quality="paper" if parts["paper"] else "balanced", preset=int(parts["preset"]))
        config = replace(config, kv_refresh=9) if parts["cached"] else config
    else:
        coarse, kept = int(parts["coarse"]), parts["kept"]
        above, _, under = (parts["start"] or "7/9").partition("/")
        config = SpecEditConfig(
            stages=(coarse, int(parts["mixed"]), 0),
            mixed_from=None if parts["even"] else float(above) / float(under or 1),
            solver="euler" if parts["euler"] else "ab2",
            finish="locked",
            kv_refresh=int(parts["kv"]) if parts["kv"] else "bracket",
            dilation=int(parts["grow"] or SpecEditConfig.dilation),
            draft="half" if parts["half"] else "coarse",
            lock_text=parts["text"] is not None,
            draft_guidance={None: True, "ug": False, "ul": "last"}[parts["guided"]],
            coarse_text_refresh=int(parts["coarse_text"] or 1),
            coarse_refresh=1 if kept is None else int(kept or max(coarse, 1)),
        )
    if parts["threshold"]:
        config = replace(config, threshold=float(parts["threshold"]), relative=config.resolved_relative())
    return Row(name, config=config, lora=lora)


def summary(figures, base, kinds):
    """{kind: {column: value}}; ratio: the median over edits of the sharpness over that of 50 plain steps."""
    out = {}
    for i, kind in enumerate(KINDS):
        chosen = kinds == i
        if not chosen.any():
            continue
        shown = ("right", "psnr_in", "active", "recall", "missed", "drift", "flops")
        out[kind] = {name: mean(figures[name][chosen]) for name in shown if name in figures}
        out[kind]["sharpness"] = median(figures["sharpness"][chosen])
        out[kind]["ratio"] = median((figures["sharpness"] / base["sharpness"])[chosen])
    return out


def report(runs):
    text = ["# Steps by solver", "", "ratio: the median over edits of a row's sharpness over that of 50 plain steps."]
    for run in runs:
        kinds = [k for k in COUNTS if run["counts"].get(k)]
        head = ["row", "TFLOP", *(f"{k} {title}" for k in kinds for title, _ in COLUMNS.values()), "inside dB"]
        lines = []
        for name, s in run["rows"].items():
            line = [name, cell(s[kinds[0]]["flops"] / 1e12, 3)]
            line += [cell(s[k].get(c), digits) for k in kinds for c, (_, digits) in COLUMNS.items()]
            lines.append([*line, cell(s[kinds[0]].get("psnr_in"), 2)])
        counts = ", ".join(f"{n} {k}" for k, n in run["counts"].items())
        lora = f"; LoRA {run['lora']}" if run.get("lora") else ""
        place = f"{setting_text(run['setting'])}; {counts} edits of seed {run['seed']}{lora}."
        text += ["", place, "", markdown_table(head, lines)]
    return "\n".join(text) + "\n"


def write(out, runs):
    write_json(out / "solver.json", {"runs": jsonable(runs)})
    write_text(out / "solver.md", report(runs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/solver")
    parser.add_argument("--rows", nargs="+", default=["plain-9", "2+3", "4+5", "6+7"], metavar="ROW")
    parser.add_argument("--counts", type=int, nargs=3, default=[*COUNTS.values()], metavar="N", help="of each kind")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    add_lora(parser)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="no rows: the runs of these in one file")
    args = parser.parse_args()
    if args.merge:
        write(args.out, [run for path in args.merge for run in json.loads(path.read_text())["runs"]])
        return 0
    try:
        rows = [row_of(name) for name in (REFERENCE, *args.rows)]
    except ValueError as error:
        parser.error(str(error))
    if args.lora is None and any(row.lora for row in rows):
        parser.error("--rows: a row with a LoRA needs --lora FILE")
    began = time.perf_counter()
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    pipe = load_pipeline(args.model, device, getattr(torch, args.dtype))
    runner = Runner(pipe, args.text_length, args.true_cfg_scale, args.lora)
    edits = make_set(device, args.size, args.limit, dict(zip(COUNTS, args.counts)), args.seed)
    edits.reference, own, kinds = edits.tokens.clone(), torch.zeros_like(edits.tokens), edits.edits.kind
    counts = {k: int((kinds == i).sum()) for i, k in enumerate(KINDS) if (kinds == i).any()}
    run = {"setting": setting(args, device), "seed": args.seed, "counts": counts, "rows": {}}
    if args.lora is not None:
        run["lora"] = f"{args.lora.name} {hashlib.sha256(args.lora.read_bytes()).hexdigest()[:8]}"
    say(f"{len(edits)} edits of seed {args.seed}")
    base, failed = None, False
    for row in rows:
        if time.perf_counter() - began > args.seconds:
            say(f"{row.name}: no time left")
            continue
        columns, started = {}, time.perf_counter()
        try:
            for at in torch.arange(len(edits)).split(args.batch):
                part = edits[at]
                result = runner.run(row, part)
                if row.name == REFERENCE:
                    there = at.to(device)
                    edits.reference[there], own[there] = set_reference(part, runner, result.images)
                    part = edits[at]
                for name, values in measure(part, result, judge, own[at.to(own.device)]).items():
                    columns.setdefault(name, []).append(values)
        except Exception as error:  # the others go on
            if row.name == REFERENCE:
                raise
            traceback.print_exc()
            say(f"{row.name}: failed: {type(error).__name__}: {error}")
            failed = True
            continue
        figures = {name: torch.cat(values) for name, values in columns.items()}
        base = base or figures
        run["rows"][row.name] = summary(figures, base, kinds)
        write(args.out, [run])
        parts = [f"{k} {v.get('right', 0):.3f} sharp {v['sharpness']:.3f}" for k, v in run["rows"][row.name].items()]
        say(f"{row.name}: {time.perf_counter() - started:.1f} s; " + "; ".join(parts))
    print((args.out / "solver.md").read_text(), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
