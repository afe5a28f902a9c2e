# SPDX-License-Identifier: Apache-2.0
"""The table of docs/support_matrix.md, made of what tests said.

A test says what it proves by `@pytest.mark.proves(feature)`: of the model whose pipeline class or name is a value of
its parameters, or of `model=`. With `refused="why"` it proves that the feature is refused. conftest.py writes the
outcomes:

    python -m pytest tests -m proves --matrix docs/support_matrix_cpu.json           # without a GPU
    python -m pytest tests -m "proves and gpu" --matrix docs/support_matrix_gpu.json # on one
    python tests/support_matrix.py                                                   # writes the table into the page
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "support_matrix.md"
SOURCES = {"cpu": DOCS / "support_matrix_cpu.json", "gpu": DOCS / "support_matrix_gpu.json"}
BEGIN, END = "<!-- made by tests/support_matrix.py -->", "<!-- to here -->"

# a row -> its diffusers pipeline, and the values of a test's parameters that mean it
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "FLUX.1-Kontext": ("FluxKontextPipeline", ("FluxKontextPipeline", "flux")),
    "Qwen-Image-Edit": ("QwenImageEditPipeline", ("QwenImageEditPipeline", "qwen")),
    "Qwen-Image-Edit-2509, -2511": (
        "QwenImageEditPlusPipeline",
        ("QwenImageEditPlusPipeline", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"),
    ),
    "FireRed-Image-Edit 1.0, 1.1": (
        "QwenImageEditPlusPipeline",
        ("FireRed-Image-Edit-1.0", "FireRed-Image-Edit-1.1"),
    ),
    "FLUX.2-klein 4B, 9B (distilled, base)": ("Flux2KleinPipeline", ("Flux2KleinPipeline", "klein", "klein-base")),
    "FLUX.2-dev": ("Flux2Pipeline", ("Flux2Pipeline", "dev")),
    "LongCat-Image-Edit": ("LongCatImageEditPipeline", ("LongCatImageEditPipeline",)),
    "FIBO-Edit": ("BriaFiboEditPipeline", ("BriaFiboEditPipeline",)),
    "FLUX.1": ("FluxPipeline", ("FluxPipeline",)),
    "Qwen-Image-2.1": ("QwenImage21Pipeline", ("QwenImage21Pipeline",)),
}
FEATURES = (
    "eager", "fused", "graph", "compile", "fp8", "LoRA", "quantised", "offload", "several references", "batch",
    "true guidance", "FlashEdit", "several GPUs",
)  # fmt: skip


def meant(value) -> str | None:
    """The row that a parameter's value means, or None."""
    return next((row for row, (_, names) in MODELS.items() if isinstance(value, str) and value in names), None)


def proofs_of(marks, values) -> list[dict]:
    """What a test proves. marks: its `proves` marks, as (args, kwargs). values: those of its parameters."""
    out = []
    for args, options in marks:
        for feature in args:
            if feature not in FEATURES:
                raise ValueError(f"proves: expected features of {FEATURES}, got {feature!r}")
            rows = [options["model"]] if "model" in options else [row for value in values if (row := meant(value))]
            if not rows or not set(rows) <= MODELS.keys():
                raise ValueError(f"proves({feature!r}): expected a parameter or model= that names a model, got {rows}")
            out += [
                {"model": row, "feature": feature, "refused": options.get("refused")} for row in dict.fromkeys(rows)
            ]
    return out


def collected(outcomes: list[dict]) -> dict:
    """{model: {feature: {"passed", "failed", "refused", "tests"}}} of one run's outcomes, skipped ones left out.

    outcomes: those of `proofs_of` with "outcome" and "test", the test's file and function.
    """
    found: dict = {}
    for each in outcomes:
        if each["outcome"] == "skipped":
            continue
        cell = found.setdefault(each["model"], {}).setdefault(
            each["feature"], {"passed": 0, "failed": 0, "refused": None, "tests": []}
        )
        cell["passed" if each["outcome"] == "passed" else "failed"] += 1
        cell["refused"] = cell["refused"] or each["refused"]
        if each["test"] not in cell["tests"]:
            cell["tests"].append(each["test"])
    order = {row: i for i, row in enumerate(MODELS)}
    return {
        row: {feature: found[row][feature] for feature in FEATURES if feature in found[row]}
        for row in sorted(found, key=order.__getitem__)
    }


def cell_text(cells: dict[str, dict | None]) -> str:
    """A cell of the table. cells: {"cpu", "gpu": the run's, or None}."""
    known = {where: cell for where, cell in cells.items() if cell is not None}
    if any(cell["failed"] for cell in known.values()):
        return "**fails**"
    refused = next((cell["refused"] for cell in known.values() if cell["refused"]), None)
    if refused:
        return f"refused: {refused}"
    return {(): "untested", ("cpu",): "tested", ("gpu",): "tested on a GPU"}.get(tuple(known), "tested, on a GPU too")


def table(runs: dict[str, dict]) -> str:
    """The part of the page that is made. runs: {"cpu", "gpu": content of the file, or none}."""
    lines = [
        f"| model | diffusers pipeline | {' | '.join(FEATURES)} |",
        "|---" * (len(FEATURES) + 2) + "|",
    ]
    for row, (pipeline, _) in MODELS.items():
        texts = []
        for feature in FEATURES:
            texts.append(cell_text({w: run["models"].get(row, {}).get(feature) for w, run in runs.items()}))
        lines.append(f"| {row} | `{pipeline}` | {' | '.join(texts)} |")
    lines += [""]
    for run in runs.values():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(f"* {run['device']}: `{run['command']}`; {versions}; commit {run['commit']}, {run['date']}.")
    return "\n".join(lines)


def runs_on_disk() -> dict[str, dict]:
    return {where: json.loads(path.read_text(encoding="utf-8")) for where, path in SOURCES.items() if path.is_file()}


def page_with(part: str, page: str) -> str:
    """The page with its made part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table(runs_on_disk()), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
