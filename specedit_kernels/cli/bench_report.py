# SPDX-License-Identifier: Apache-2.0
"""What `specedit bench` reports: figures of finished cells, the table, the contact sheet."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..images import measures, sheet
from .edit import region_overlay, share
from .pictures import Edit

if TYPE_CHECKING:
    from torch import Tensor

    from .bench import Bench, Cells, Row, Run

SHEET_BYTES = 1_500_000
GIB = 2**30


def to_tensor(picture: Any) -> Tensor:
    """PIL RGB -> fp32 [3, H, W] in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def figures_of(bench: Bench, cells: Cells, rows: Sequence[Row], edit: Edit, source: Any) -> dict[str, dict[str, Any]]:
    """{row: figures} of one picture's finished cells; {} where the stock one is not there.

    The region is what any of the qualities edited. Outside: against the source, beyond the row's own region and a
    token around it. Inside: against the stock picture, over the region of all.
    """
    import torch

    found = {row.name: (row, facts) for row in rows if (facts := cells.read(row, edit)) is not None}
    reference = rows[0].name
    if reference not in found:
        return {}
    token = bench.codec.token
    with torch.no_grad():
        own = to_tensor(source)
        of_stock = to_tensor(cells.picture(rows[0], edit))
        grid = own.shape[-2] // token, own.shape[-1] // token
        latents = bench.encode(of_stock)
        # what the stock pipeline changed, and not the autoencoder alone
        changed = measures.changed_tokens(bench.decode(bench.encode(own)), of_stock, token)
        masks = {name: _mask(facts["mask"]) for name, (_, facts) in found.items() if "mask" in facts}
        region = torch.zeros(grid, dtype=torch.bool)
        for mask in masks.values():
            region |= mask
        inside = measures.to_pixels(region, token)
        out = {}
        for name, (row, facts) in found.items():
            picture = to_tensor(cells.picture(row, edit))
            mask = masks.get(name, region)
            beyond = ~measures.to_pixels(_grown(mask), token)
            figures = {"seconds": facts["seconds"], "stages": _grouped(facts["stages"]), "peak": facts["peak_bytes"]}
            figures["outside"] = measures.level_differences(own, picture, beyond)
            if name in masks:
                plain, count = facts["plain_step_flops"] * rows[0].steps, changed.sum().item()
                figures |= {"edited": facts["edited"], "flops": facts["flops"] / plain, "runner": facts["runner"]}
                figures["covers"] = (changed & mask).sum().item() / count if count else None
            if name != reference:
                distance = bench.distance(bench.encode(picture), latents)
                figures |= {"psnr": measures.psnr(picture, of_stock, inside),
                            "ssim": measures.ssim(picture, of_stock, inside),
                            "features": distance[region].mean().item() if region.any() else None}  # fmt: skip
            out[name] = figures
    return out


def _mask(lines: Sequence[str]) -> Tensor:
    import torch

    return torch.tensor([[c == "1" for c in line] for line in lines])


def _grown(mask: Tensor) -> Tensor:
    """bool [rows, columns], grown by a token: the seam of kept pixels is narrower."""
    import torch.nn.functional as F

    return F.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0


def _grouped(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the text and the encoder, of all that is denoising, and of the decoder."""
    out = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
    for name, seconds in stages.items():
        out[name if name in out else "decode" if name == "composite" else "denoise"] += seconds
    return out


def _mean(values: Sequence[Any]) -> float | None:
    """Of the numbers among the values; inf where all are."""
    known = [x for x in values if x is not None]
    finite = [x for x in known if math.isfinite(x)]
    return statistics.fmean(finite) if finite else known[0] if known else None


def summary_of(rows: Sequence[Row], each: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A line of the table for each row with cells. each: {picture: figures_of it}. Seconds are medians, the largest
    peak and the largest difference count, all else is a mean over pictures; ratios are of the same pictures."""
    out = []
    for row in rows:
        of_row = {name: figures[row.name] for name, figures in each.items() if row.name in figures}
        if not of_row:
            continue
        cells = list(of_row.values())
        stock = [each[name][rows[0].name]["seconds"] for name in of_row]
        outside = [x["outside"] for x in cells if x["outside"] is not None]
        seconds = [x["seconds"] for x in cells]
        line: dict[str, Any] = {"row": row.name, "steps": row.steps, "pictures": len(cells)}
        line["seconds"] = statistics.median(seconds)
        line["times_as_fast"] = statistics.fmean(stock) / statistics.fmean(seconds)
        line["stages"] = {s: statistics.median(x["stages"][s] for x in cells) for s in ("encode", "denoise", "decode")}
        line["peak_bytes"] = max((x["peak"] for x in cells if x["peak"] is not None), default=None)
        line["outside_mean"] = _mean([mean for mean, _ in outside])
        line["outside_largest"] = max((top for _, top in outside), default=None)
        for name in ("edited", "flops", "psnr", "ssim", "features", "covers"):
            line[name] = _mean([x.get(name) for x in cells])
        line["runner"] = "/".join(dict.fromkeys(x["runner"] for x in cells if "runner" in x)) or None
        out.append(line)
    return out


COLUMNS = (
    "setting", "seconds", "times as fast", "encode / denoise / decode", "peak GiB", "tokens", "FLOPs",
    "outside: mean, largest", "inside: PSNR", "SSIM", "features", "covers", "pictures",
)  # fmt: skip
LEGEND = """\
Seconds: the median over pictures, of a call with all its parts. Times as fast: than the first row. Peak: of memory
during a call, {memory}. Tokens: in the edit region. FLOPs: of the transformer, against the first row's.
Outside: difference from the source beyond the row's region, in 8-bit levels (a stock row: beyond all regions).
Inside: against the first row's picture over all that any quality edited: PSNR in dB, SSIM, and the distance of the
autoencoder's first decoder features (0 to 4). Covers: of the tokens that the first row changed visibly, those in the
region."""


def finite(value: Any) -> Any:
    """A report that any reader of JSON takes: the infinite PSNR of equal pictures is the word "equal"."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return "equal" if isinstance(value, float) and math.isinf(value) else value


def markdown(report: Mapping[str, Any]) -> str:
    """The table, with what it is of and what was left out."""
    place, lines = report["place"], report["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    text = [f"### {place['model']} ({place['class']}), {place['device']}", ""]
    text += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    text += ["| " + " | ".join(_shown(line)) + " |" for line in lines]
    memory = "what the allocator held" if place["device"].startswith("cuda") else "of the process"
    sizes = ", ".join(f"{w} x {h}" for w, h in report["sizes"])
    text += ["", LEGEND.format(memory=memory), ""]
    text += [f"{place['dtype']}, {sizes} pixels, seed {place['seed']}; {versions}; {', '.join(report['dates'])}."]
    text += [f"`{report['command']}`", *(f"* {note}" for note in report["notes"])]
    return "\n".join(text) + "\n"


def _shown(line: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else "equal" if math.isinf(value) else format(value, form)

    def part(value: float | None) -> str:
        return "–" if value is None else share(value)

    name = line["row"]
    if line["runner"]:
        name += f" ({line['steps']} step{'s' * (line['steps'] != 1)}, {line['runner']})"
    stages = " / ".join(f"{seconds:.2f}" for seconds in line["stages"].values())
    peak = None if line["peak_bytes"] is None else line["peak_bytes"] / GIB
    outside = "–"
    if line["outside_mean"] is not None:
        outside = f"{line['outside_mean']:.2f}, {line['outside_largest']:.0f}"
    return [
        name, f"{line['seconds']:.3g}", f"{line['times_as_fast']:.2f}", stages, number(peak, ".2f"),
        part(line["edited"]), part(line["flops"]),
        outside, number(line["psnr"], ".1f"), number(line["ssim"], ".3f"), number(line["features"], ".3f"),
        part(line["covers"]), str(line["pictures"]),
    ]  # fmt: skip


def sheet_of(cells: Cells, rows: Sequence[Row], edits: Sequence[Edit], sources: Mapping[str, Any]) -> bytes:
    """The contact sheet's PNG: source, each row, and the region of the last quality but the best."""
    shown_rows = [row for row in rows if not row.compiled]
    columns: dict[str, list[Any]] = {"source": [sources[edit.name] for edit in edits]}
    for row in shown_rows:
        columns[row.name] = [None if cells.read(row, e) is None else cells.picture(row, e) for e in edits]
    middle = next(row for row in rows if row.name == "balanced")
    overlays = []
    for edit in edits:
        facts = cells.read(middle, edit)
        overlays.append(None if facts is None else region_overlay(sources[edit.name], _mask(facts["mask"]).numpy()))
    columns[f"region of {middle.name}"] = overlays
    return sheet.encode_within(columns, [f"{edit.name}: {edit.instruction}" for edit in edits], SHEET_BYTES)


def report_of(run: Run, place: Mapping[str, Any], command: str, minutes: float, notes: Sequence[str]) -> dict[str, Any]:
    """Everything that is known, as the JSON has it."""
    bench, cells = run.bench, run.cells
    each = {}
    for edit in run.edits:
        figures = figures_of(bench, cells, run.rows, edit, run.source(edit)) if cells.read(run.rows[0], edit) else {}
        if figures:
            each[edit.name] = figures
    notes = list(notes)
    every = [(row, edit) for row in run.rows for edit in run.edits if row.name not in run.failed]
    left = [(row, edit) for row, edit in every if cells.read(row, edit) is None]
    if left:
        said = f"left out, by a budget of {minutes:g} minutes: {len(left)} of {len(every)} cells"
        none = [row.name for row in run.rows if row.name not in run.failed and all((row, e) in left for e in run.edits)]
        said += f"; whole rows: {', '.join(none)}" if none else ""
        notes.append(f"{said}. The same command goes on from there.")
    notes += [f"{name}: failed: {why}" for name, why in run.failed.items()]
    if bench.by_ours:
        area = round(bench.settings["max_area"] ** 0.5)
        notes.append(
            f"stock rows: the stock call works at its own size alone, this folder asks for {area} x {area} pixels; its "
            "steps are taken by this package with all tokens selected, which equals the stock pipeline to the last bit"
        )
    known = [facts for row in run.rows for edit in run.edits if (facts := cells.read(row, edit)) is not None]
    warned = Counter(note for facts in known for note in facts["notes"])
    notes += [f"{note} ({count} of {len(known)} cells)" for note, count in warned.items()]
    reasons = {facts["runner_reason"] for facts in known if facts.get("runner_reason")}
    notes += [f"no faster runner: {why}" for why in sorted(reasons)]
    return {
        "place": dict(place), "command": command, "rows": summary_of(run.rows, each),
        "pictures": {e.name: {"instruction": e.instruction, "rows": each[e.name]} for e in run.edits if e.name in each},
        "sizes": sorted({tuple(facts["size"]) for facts in known}), "dates": sorted({x["date"] for x in known}),
        "notes": notes, "left_out": [{"row": row.name, "picture": edit.name} for row, edit in left],
    }  # fmt: skip
