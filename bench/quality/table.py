# SPDX-License-Identifier: Apache-2.0
"""The quality table: plain steps, SpecEdit's presets, controls and ablations on the held-out edits.

    python bench/quality/table.py                         # all rows: OUT/table.md, table.json, records.jsonl
    python bench/quality/table.py --rows 'plain-*' 9-coarse-full --limit 40
    python bench/quality/table.py --list                  # the rows' names

A row is written as soon as it is done, and a row that OUT/records.jsonl holds for the same editor and edits is not run
again (--redo runs it). records.jsonl has the figures of every edit: a header line, then a line a row.

    python bench/quality/table.py --rows '18-*' --onto bench/results/latest/h100-80gb-hbm3/quality_table.json

--onto: rows of a former table.json on the same editor and edits that this run does not have stand in its table too,
marked with the commit and date that they are of, if today's settings of the row are the same.
"""

import argparse
import fnmatch
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from scenes import EVALUATION_COUNTS, KINDS, TASKS
from table_measures import CHANGED_FLOOR, CHANGED_SHARE, changed_tokens, largest, mean, median
from table_runs import (
    Row,
    Runner,
    add_arguments,
    add_thresholds,
    cell,
    edit_columns,
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
    with_own_thresholds,
    with_thresholds,
    write_json,
    write_text,
)

from specedit_kernels import SpecEditConfig

PLAIN_STEPS = (50, 28, 10, 9, 8, 4, 2)
REFERENCE = "plain-50"
MAIN = "9-coarse-full"
TEXT_LENGTHS = (512, 16)  # the default of diffusers; a short one, for prompts of at most 8 tokens
DRAFT_NAMES = ("coarse", "quarter", "full_step")


# what rows vary: every step whole, the transformer's own forward
PAPER = SpecEditConfig(quality="paper", runner="eager")


def all_rows():
    """Every row in the table's order."""
    rows = [Row("source", still="source"), Row("vae(target)", still="vae(target)")]
    rows += [Row(f"plain-{n}", steps=n) for n in PLAIN_STEPS]
    for preset in (30, 18, 11, 9):
        for draft in DRAFT_NAMES:
            for finish in ("full", "locked"):
                config = replace(PAPER, preset=preset, draft=draft, finish=finish)
                rows.append(Row(f"{preset}-{draft}-{finish}", config=config))
    for preset in (8, 4):  # of step-distilled weights
        kinds = {"full": {}, "locked": dict(finish="locked"), "locked-cached": dict(finish="locked", kv_refresh=9)}
        rows += [Row(f"{preset}-coarse-{k}", config=replace(PAPER, preset=preset, **v)) for k, v in kinds.items()]
    # what a step over cached keys, locked text and an unguided draft cost
    for preset in (18, 9):
        for finish in ("full", "locked"):
            cached = replace(PAPER, preset=preset, finish=finish, kv_refresh=9)
            locked = replace(cached, lock_text=True)
            rows += [
                Row(f"{preset}-coarse-{finish}-{label}", config=config)
                for label, config in (
                    ("cached", cached),
                    ("cached-text", locked),
                    ("text", replace(locked, kv_refresh=1)),
                    ("unguided-draft", replace(cached, kv_refresh=1, draft_guidance=False)),
                    ("cached-text-unguided-draft", replace(locked, draft_guidance=False)),
                )
            ]
    for quality in ("fast", "balanced", "best"):
        rows.append(Row(quality, config=SpecEditConfig(quality=quality)))
        rows.append(Row(f"{quality}-fp8", config=SpecEditConfig(quality=quality, precision="fp8")))
    # how few steps bracketed keys and values bear
    for stages in ((1, 4, 0), (1, 6, 0), (2, 4, 0), (2, 5, 0), (2, 10, 0), (2, 16, 0), (3, 15, 0)):
        config = SpecEditConfig(stages=stages, finish="locked", kv_refresh="bracket")
        rows.append(Row(f"bracket-{stages[0]}+{stages[1]}", config=config))
    for finish in ("full", "locked"):
        base, name = replace(PAPER, finish=finish), f"9-coarse-{finish}"
        rows += [Row(f"{name}-{rule}", config=replace(base, selection=rule)) for rule in ("random", "uniform")]
        rows.append(Row(f"9-oracle-{finish}", config=base, oracle=True))
        variants = {
            "pixels": dict(preserve="pixels"),
            "no-bias": dict(key_bias=False),
            "fine-condition": dict(coarse_condition=False),
            "literal": dict(reference="literal"),
            "latent": dict(metric="latent"),
            "projected": dict(metric="projected"),
            "absolute": dict(relative=0.0),
            "no-dilation": dict(dilation=0),
            "stride-3": dict(uniform_stride=3),
        }
        if finish == "full":  # the locked finish knows no other
            variants["unselected-coarse"] = dict(unselected="coarse")
        variants |= {
            "bracket": dict(kv_refresh="bracket"),
            "kv3": dict(kv_refresh=3),
            "kv9": dict(kv_refresh=9),
            "graph": dict(runner="graph"),
            "graph-kv3": dict(runner="graph", kv_refresh=3),
            "graph-kv9": dict(runner="graph", kv_refresh=9),
        }
        rows += [Row(f"{name}-{label}", config=replace(base, **change)) for label, change in variants.items()]
        rows += [Row(f"{name}-text{n}", config=base, text_length=n) for n in TEXT_LENGTHS]
    rows += [Row(f"plain-9-text{n}", steps=9, text_length=n) for n in TEXT_LENGTHS]
    return rows


# column -> (title, from figure, how edits are put together, decimals, factor)
COLUMNS = {
    "tflop": ("TFLOP", "flops", mean, 2, 1e-12),
    "psnr_in": ("in dB", "psnr_in", mean, 2, 1),
    "psnr_out": ("out dB", "psnr_out", mean, 2, 1),
    "sharpness": ("sharp", "sharpness", median, 3, 1),
    "drift": ("drift dB", "drift", mean, 2, 1),
    "drift_max": ("drift max", "drift_max", median, 0, 1),
    "kept_max": ("kept max", "kept_max", largest, 0, 1),
    "active": ("tokens %", "active", mean, 1, 100),
    "recall": ("recall", "recall", mean, 3, 1),
    "precision": ("prec.", "precision", mean, 3, 1),
    "auc": ("AUC", "auc", mean, 3, 1),
    "missed": ("missed %", "missed", mean, 1, 100),
    "recall_true": ("recall true", "recall_true", mean, 3, 1),
    "recall_own": ("recall own", "recall_own", mean, 3, 1),
    "missed_own": ("missed own %", "missed_own", mean, 1, 100),
    "dense": ("dense %", "dense", mean, 1, 100),
    "returned_source": ("none %", "returned_source", mean, 1, 100),
}

LEGEND = """
* **NFE**: steps of the main trajectory, + those of a separate draft. **TFLOP**: useful transformer FLOPs an edit, draft
  included, VAE and text encoders not; **FLOPs /**: {reference} over that. It is a ratio of counts, not of times.
* **right**: share of edits that the judge (`judge.py`) finds done.
* **in, out dB**: PSNR to the true target inside and outside the exact mask, of edits with one right answer (remove,
  recolour, tints). Where pose or place is open the true target is one of many, and PSNR to it would reward blur.
* **sharp**: gradient energy of the output where it changed against the target's where that changed, median of the edits
  with an object (not remove, not global).
* **drift dB, max**: against the source, further than a token from where the edit may reach (for an open place: from the
  box of the largest change): PSNR, and the median edit's largest difference in 8-bit levels. **kept max**: the largest
  difference of any edit outside the run's own feathered region; `pixels` rows preserve it.
* **tokens %**: share of the fine tokens in mixed steps, region and coverage, whole 2x2 blocks. True share of this set:
  {shares}.
* **recall, prec., AUC, missed**: of the selected region (dilated, whole blocks) and of the raw scores, in tokens. Held
  against the true mask where an edit has one right answer. For replace and add the new object's pose or place is the
  noise's choice and the true mask is one sample of many: there it is what the editor's own {reference} output of the
  same noise changed (a channel by more than {floor} on {share:.0%} of a token's pixels, against the source through the
  VAE; on the true targets through the VAE this rule finds {rule_recall} of the true tokens at {rule_precision}
  precision). missed: recall under one half. **recall true, own**, **missed own**: the same against the true mask, and
  against the own output where that changed anything, whatever the edit. An `oracle` row gets the reference mask,
  grown by a token, as the user's mask. In an `unselected-coarse` row tokens that were not selected follow the model.
* **kv3, kv9**: `kv_refresh`; preset 9 has 4 mixed steps with the full finish, 7 with the locked one. **graph**: the
  fused steps as CUDA graphs, in place of the model's own forward. **text512, text16**: prompts padded to so many
  tokens in place of {text_length}.
* **dense, none %**: runs that fell back to all tokens, or found nothing to change and gave the source back.
"""


def summarise(record, kinds):
    """{kind: {column: value}} of one record, from the edits of each kind; NFE and seconds are the record's own."""
    figures = {
        k: torch.tensor([float("nan") if x is None else x for x in v], dtype=torch.float64)
        for k, v in record["figures"].items()
    }
    out = {}
    for kind in (*KINDS, "all"):
        chosen = torch.tensor([kind in (k, "all") for k in kinds])
        if not chosen.any():
            continue
        values = {"n": int(chosen.sum())}
        if "right" in figures:
            values["right"] = mean(figures["right"][chosen])
        for column, (_, figure, combine, _, factor) in COLUMNS.items():
            if figure in figures:
                values[column] = combine(figures[figure][chosen]) * factor
        values["psnr_in_one_of_many"] = mean(figures["psnr_in_one_of_many"][chosen])
        out[kind] = values
    return out


def marked(record):
    """A row's name, with the number of the run that it is of where that is a former one."""
    return record["row"] + (f" [{record['run']}]" if record.get("run") else "")


def kind_table(kind, records, names, reference=REFERENCE):
    """The table of one kind; local edits lead, with `right` of every kind."""
    shown = [c for c in COLUMNS if kind != "global" or c in ("tflop", "psnr_in", "active", "dense", "returned_source")]
    if kind == "ambiguous":
        shown = [c for c in shown if c not in ("psnr_in", "psnr_out", "recall_true", "recall_own", "missed_own")]
    rights = KINDS if kind == "local" else (kind,)
    base = records.get(reference, {}).get("summary", {}).get(kind, {}).get("tflop")
    head = [
        "row",
        "NFE",
        *("right " + k if kind == "local" else "right" for k in rights),
        "FLOPs /",
        *(COLUMNS[c][0] for c in shown),
    ]
    lines = []
    for name in names:
        record = records.get(name)
        if record is None:
            continue
        if "error" in record:
            failed = "failed: " + record["error"].replace("|", "/")[:100]
            lines.append([marked(record), failed, *[""] * (len(head) - 2)])
            continue
        values = record["summary"].get(kind)
        if values is None:
            continue
        nfe = str(record["nfe"]) + (f" + {record['draft_nfe']}" if record["draft_nfe"] else "")
        flops = values["tflop"]
        lines.append(
            [
                marked(record),
                nfe if record["nfe"] else "–",
                *(cell(record["summary"].get(k, {}).get("right", float("nan")), 3) for k in rights),
                f"{base / flops:.2f}" if base and flops else "–",
                *(cell(values.get(c), COLUMNS[c][3]) for c in shown),
            ]
        )
    return markdown_table(head, lines)


def targets(records, reference=REFERENCE):
    """What the project asked of preset 9, with what was measured: (claim, measured, met) each."""
    out = []
    plain = records.get(reference, {}).get("summary", {}).get("local")
    four = records.get("plain-4", {}).get("summary", {})
    for finish in ("full", "locked"):
        name = f"9-coarse-{finish}"
        row = records.get(name, {}).get("summary", {})
        if not row.get("local") or plain is None:
            continue
        local = row["local"]
        if "right" in local:
            loss = 100 * (plain["right"] - local["right"])
            out.append(
                (
                    f"{name}: at most 2 points of `right` under {reference}, local",
                    f"{100 * local['right']:.1f} % against {100 * plain['right']:.1f} %",
                    round(loss, 6) <= 2,
                )
            )
        loss = plain["psnr_in"] - local["psnr_in"]
        out.append(
            (
                f"{name}: at most .5 dB under {reference} inside, local",
                f"{local['psnr_in']:.2f} against {plain['psnr_in']:.2f} dB",
                loss <= 0.5,
            )
        )
        for kind in ("local", "ambiguous"):
            if kind in four and kind in row:
                ours, theirs = row[kind]["sharpness"], four[kind]["sharpness"]
                out.append((f"{name}: sharper than plain-4, {kind}", f"{ours:.3f} against {theirs:.3f}", ours > theirs))
        out.append(
            (
                f"{name}: mask recall >= .98 at <= 20 % of the tokens, local",
                f"{local['recall']:.3f} at {local['active']:.1f} %",
                local["recall"] >= 0.98 and local["active"] <= 20,
            )
        )
        out.append((f"{name}: whole misses <= .5 %, local", f"{local['missed']:.2f} %", local["missed"] <= 0.5))
        pixels = records.get(f"{name}-pixels", {}).get("summary", {}).get("all")
        if pixels and pixels["kept_max"] == pixels["kept_max"]:
            out.append(
                (
                    f"{name}-pixels: no pixel outside the region differs from the source, all edits",
                    f"largest difference {pixels['kept_max']:.0f}",
                    pixels["kept_max"] == 0,
                )
            )
    return out


def pairs(records, against=REFERENCE):
    """Edits that a row gets right and the reference does not, and the other way: {row: (won, lost)}."""
    base = records.get(against, {}).get("figures", {}).get("right")
    out = {}
    for name, record in records.items():
        own = record.get("figures", {}).get("right")
        if "pairs" in record:  # of a former run, against the reference of that one
            out[name] = tuple(record["pairs"])
        elif own is not None and base is not None and name != against:
            out[name] = (sum(a > b for a, b in zip(own, base)), sum(a < b for a, b in zip(own, base)))
    return out


def markdown(header, records, names):
    """The whole report."""
    against = header.get("reference", REFERENCE)
    kinds = header["edits"]["kind"]
    text = [
        "# Quality of edits with known answers",
        "",
        f"{len(kinds)} held-out edits ({', '.join(f'{kinds.count(k)} {k}' for k in KINDS)}),"
        f" {setting_text(header['setting'])}.",
        "",
    ]
    for number, place in enumerate(header["former"], 1):
        if any(record.get("run") == number for record in records.values()):
            text += [f"[{number}]: rows of an earlier run: {setting_text(place)}.", ""]
    for kind in KINDS:
        if kind in kinds:
            table = kind_table(kind, records, names, against)
            text += [f"## {kind.capitalize()} edits ({kinds.count(kind)})", "", table, ""]
    goals = targets(records, against)
    if goals:
        text += [
            "## Targets",
            "",
            markdown_table(["target", "measured", "met"], [[c, m, "yes" if met else "**no**"] for c, m, met in goals]),
            "",
        ]
    flips = pairs(records, against)
    if flips:
        text += [
            f"Edits that only the row / only {against} got right: "
            + ", ".join(f"{n} {w}/{b}" for n, (w, b) in flips.items() if n in names)
            + ".",
            "",
        ]
    failed = [n for n in names if "error" in records.get(n, {})]
    if failed:
        text += ["Failed rows: " + ", ".join(failed) + ".", ""]
    if against == "none":
        text += [
            "No plain run was asked for: recall, precision, AUC and misses are held against the true masks, also"
            " where those are one of many answers.",
            "",
        ]
    rule = header["rule"]
    text += [
        "## Legend",
        LEGEND.format(
            reference=against,
            text_length=header["setting"]["text_length"],
            shares=", ".join(f"{k} {v:.1%}" for k, v in header["true_shares"].items()),
            floor=rule["floor"],
            share=rule["share"],
            rule_recall=f"{rule['recall']:.1%}",
            rule_precision=f"{rule['precision']:.1%}",
        ).strip(),
        "",
    ]
    return "\n".join(text)


def config_of(row):
    """The settings of a SpecEdit row, as JSON has them; None for another row."""
    if row.config is None:
        return None
    values = {k: v for k, v in vars(row.config.resolved()).items() if v is not None}
    return values | {
        "threshold": row.config.resolved_threshold(),
        "relative": row.config.resolved_relative(),
        "stages": list(row.config.step_counts()),
    }


def read_records(path, header, rows):
    """{row: record} of a former run on the same editor and edits with the same settings; empty for another or none."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    try:
        former = json.loads(lines[0])
        former["setting"].setdefault("true_cfg_scale", 1.0)  # before there was a choice
        same = all(
            former["setting"][k] == header["setting"][k]
            for k in ("model", "size", "text_length", "dtype", "true_cfg_scale")
        )
        if (
            not same
            or former["edits"] != header["edits"]
            or former.get("reference", REFERENCE) != header.get("reference", REFERENCE)
        ):
            return {}
        found = [json.loads(line) for line in lines[1:]]
    except (json.JSONDecodeError, KeyError, IndexError):
        return {}
    kinds = header["edits"]["kind"]
    current = {row.name: config_of(row) for row in rows}
    kept = {}
    for record in found:
        name = record["row"]
        if "figures" in record and name in current and same_config(record["config"], current[name]):
            kept[name] = {**record, "summary": summarise(record, kinds)}
    return kept


def defaults():
    # before there was `relative`, thresholds were absolute
    return vars(PAPER.resolved()) | {"relative": 0.0}


def same_config(former, current):
    """Whether a row's settings of a former run are today's; an option that it did not know yet has its default."""
    if former is None or current is None:
        return former is current
    return jsonable({**current, **former}) == jsonable(current) and all(
        current[k] == defaults().get(k) for k in current.keys() - former.keys()
    )


def read_former(path, header, rows):
    """({row: record} of a former table.json, the settings of the runs that they are of).

    Raises ValueError where its editor or edits are others. Rows whose settings have changed since are left out.
    """
    former = json.loads(Path(path).read_text())
    place = {"true_cfg_scale": 1.0, **former["setting"]}
    for key in ("model", "size", "text_length", "dtype", "true_cfg_scale"):
        if place[key] != header["setting"][key]:
            raise ValueError(f"--onto: expected a table of {key} {header['setting'][key]}, got {place[key]}")
    wanted, got = (x.get("reference", REFERENCE) for x in (header, former))
    if got != wanted:
        raise ValueError(f"--onto: expected a table held against {wanted}, got {got}")
    edits = header["edits"]["kind"]
    if former["counts"] != {k: edits.count(k) for k in KINDS}:
        raise ValueError(f"--onto: expected a table of as many edits of each kind, got {former['counts']}")
    current = {row.name: config_of(row) for row in rows}
    kept = {
        name: record
        for name, record in former["rows"].items()
        if "summary" in record and name in current and same_config(record["config"], current[name])
    }
    runs = [place, *former.get("former", [])]
    for record in kept.values():
        record["run"] = 1 + record.get("run", 0)
        record["summary"] = {
            kind: {k: float("nan") if v is None else v for k, v in values.items()}
            for kind, values in record["summary"].items()
        }
    return kept, runs


def check_rule(edits, runner, batch):
    """How well the rule for what a run changed finds the true tokens, tried on the true targets of local edits."""
    hits = wanted = chosen = 0
    for rows in torch.arange(len(edits)).split(batch):
        part = edits[rows]
        source, target = part.pictures()
        found = changed_tokens(runner.vae(source), runner.vae(target))
        local = (part.edits.kind < KINDS.index("global")).to(found.device).view(-1, 1, 1)
        hits += int((found & part.tokens & local).sum())
        wanted += int((part.tokens & local).sum())
        chosen += int((found & local).sum())
    return {
        "floor": CHANGED_FLOOR,
        "share": CHANGED_SHARE,
        "recall": hits / max(wanted, 1),
        "precision": hits / max(chosen, 1),
    }


class Table:
    """The records of a run and the files that they are kept in."""

    def __init__(self, args, header, names, records, former):
        self.out, self.header, self.names = args.out, header, names
        self.records, self.former = records, former
        self._rewrite_records()

    def _rewrite_records(self):
        # the summaries follow from the figures
        kept = [{k: v for k, v in record.items() if k != "summary"} for record in self.records.values()]
        lines = [json.dumps(jsonable(x)) for x in (self.header, *kept)]
        write_text(self.out / "records.jsonl", "\n".join(lines) + "\n")

    def add(self, record):
        self.records[record["row"]] = record
        self._rewrite_records()
        self.write()

    def write(self):
        known = {**self.former, **self.records}
        ordered = {n: known[n] for n in self.names if n in known}
        plain = {n: {k: v for k, v in r.items() if k != "figures"} for n, r in ordered.items()}
        against = self.header.get("reference", REFERENCE)
        for name, flips in pairs(ordered, against).items():
            plain[name]["pairs"] = flips
        edits = self.header["edits"]
        write_json(
            self.out / "table.json",
            jsonable(
                {
                    **{k: v for k, v in self.header.items() if k != "edits"},
                    "counts": {k: edits["kind"].count(k) for k in KINDS},
                    "rows": plain,
                    "targets": [dict(zip(("target", "measured", "met"), t)) for t in targets(ordered, against)],
                }
            ),
        )
        write_text(self.out / "table.md", markdown(self.header, ordered, self.names))


def run_row(row, edits, runner, judge, args, own, reference=REFERENCE):
    """One record: {"row", "nfe", "draft_nfe", "config", "seconds", "figures", "summary"}.

    own: bool like edits.tokens, what the reference run changed; a run of the reference row fills it in. None: there is
    no such run."""
    started = time.perf_counter()
    columns, nfe = {}, (0, 0)
    is_reference = row.name == reference
    for rows in torch.arange(len(edits)).split(args.batch):
        part = edits[rows]
        result = runner.run(row, part)
        nfe = (result.nfe, result.draft_nfe)
        if is_reference:
            reference, changed = set_reference(part, runner, result.images)
            there = rows.to(reference.device)
            edits.reference[there], own[there] = reference, changed
            part = edits[rows]
        for name, values in measure(part, result, judge, None if own is None else own[rows.to(own.device)]).items():
            columns.setdefault(name, []).append(values)
    figures = {name: torch.cat(values) for name, values in columns.items()}
    record = {
        "row": row.name,
        "nfe": nfe[0],
        "draft_nfe": nfe[1],
        "config": config_of(row),
        "runner": result.runner,
        "figures": jsonable(figures),
    }
    record["summary"] = summarise(record, [KINDS[k] for k in edits.edits.kind.tolist()])
    record["seconds"] = round(time.perf_counter() - started, 2)  # of everything, the measures too: no latency
    return record


def task_lines(record, tasks):
    """`right` by task, for the log."""
    out = []
    for task in TASKS:
        chosen = [i for i, t in enumerate(tasks) if t == task]
        if chosen and "right" in record["figures"]:
            values = [record["figures"]["right"][i] for i in chosen]
            out.append(f"{task} {sum(values) / len(values):.2f}")
    return ", ".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "out/table")
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"], help="names or patterns of rows")
    parser.add_argument("--redo", action="store_true", help="run rows again that OUT/records.jsonl holds")
    add_thresholds(parser)
    parser.add_argument("--onto", type=Path, help="a former table.json, whose other rows are kept")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of edits")
    parser.add_argument(
        "--reference-steps",
        type=int,
        choices=(0, *PLAIN_STEPS),
        default=50,
        help="of the plain run that others are held against; 0: none, masks against the true ones",
    )
    args = parser.parse_args()
    rows = all_rows()
    if args.thresholds is not None:
        rows = with_thresholds(rows, args.thresholds)
    names = [row.name for row in rows]
    chosen = [n for n in names if any(fnmatch.fnmatchcase(n, glob) for glob in args.rows)]
    if args.list:
        print("\n".join(chosen))
        return 0
    idle = [glob for glob in args.rows if not fnmatch.filter(names, glob)]
    if idle:
        parser.error(f"--rows: no row matches {idle}; --list prints the names")
    device = prepare(args)
    say = stopwatch()
    judge = load_judge(args.judge, device)
    pipe = load_pipeline(args.model, device, getattr(torch, args.dtype))
    rows = with_own_thresholds(rows, pipe, args.true_cfg_scale)
    runner = Runner(pipe, args.text_length, args.true_cfg_scale)
    reference = f"plain-{args.reference_steps}" if args.reference_steps else "none"
    edits = make_set(device, args.size, args.limit, {k: n for k, n in EVALUATION_COUNTS.items() if k in args.kinds})
    say(f"{len(edits)} edits are drawn")
    local = {k: edits.edits.kind == i for i, k in enumerate(KINDS)}
    share = edits.tokens.flatten(1).float().mean(1).cpu()
    header = {
        "setting": setting(args, device),
        "rule": check_rule(edits, runner, args.batch),
        "true_shares": {k: share[m].mean().item() for k, m in local.items() if m.any()},
        "edits": edit_columns(edits.edits, edits.seeds),
        "former": [],
        "reference": reference,
    }
    former = {}
    if args.onto is not None:
        try:
            former, header["former"] = read_former(args.onto, header, rows)
        except (OSError, ValueError, KeyError) as error:
            parser.error(str(error))
    path = args.out / "records.jsonl"
    table = Table(args, header, names, read_records(path, header, rows), former)
    edits.reference = edits.tokens.clone()
    own = torch.zeros_like(edits.tokens) if args.reference_steps else None

    # The reference comes first, whatever was asked for: others are held against what it changed. Then, in the order of
    # the patterns, those of few steps, so that a run that is cut short has most of them.
    by_name = {row.name: row for row in rows}

    def place(name):
        row = by_name[name]
        pattern = next(i for i, glob in enumerate(args.rows) if fnmatch.fnmatchcase(name, glob))
        return pattern, sum(row.config.step_counts()) if row.config else row.steps

    order = [*([reference] if args.reference_steps else []), *sorted((n for n in chosen if n != reference), key=place)]
    for name in order:
        if name != reference and name in table.records and not args.redo:
            say(f"{name}: kept from a former run")
            continue
        try:
            record = run_row(by_name[name], edits, runner, judge, args, own, reference)
        except Exception as error:  # a row that fails is reported as failed, and the others go on
            traceback.print_exc()
            record = {"row": name, "error": f"{type(error).__name__}: {error}"}
            if device.type == "cuda":
                torch.cuda.empty_cache()
        table.add(record)
        if "error" in record:
            say(f"{name}: failed: {record['error']}")
            continue
        parts = [f"{k} {v['right']:.3f}" for k, v in record["summary"].items() if "right" in v]
        by_task = task_lines(record, header["edits"]["task"])
        say(f"{name}: {record['seconds']:.1f} s; right: {', '.join(parts)}; {by_task}")
    table.write()
    print((args.out / "table.md").read_text())
    return int(any("error" in table.records.get(n, {}) for n in order))


if __name__ == "__main__":
    raise SystemExit(main())
