# SPDX-License-Identifier: Apache-2.0
"""`specedit bench`: the qualities beside the stock pipeline, on a model's own weights.

A row is a way to edit, a cell one picture edited so. Finished cells are on disk, so that a run that was ended goes on;
figures are taken from the cells. Rows of torch.compile come last: they change the transformer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..images.files import Photo, check_target, reason, shown, write_file
from . import bench_report, models
from .edit import run_notes
from .pictures import SHIPPED, Edit, edits_of
from .text import UserError, one_line, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.output import StageClock

TIERS = ("fast", "balanced", "best")
WARM_UP_STEPS = 2
COMPILE_SECONDS = 120.0  # kept of the budget for what torch.compile takes
SHEET_PICTURES = 12
MARGIN = 1.15  # on what a cell is expected to take
FOLDS = 4  # times that a working size is looked for


def _write(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_file(path, write)


@dataclass(frozen=True)
class Row:
    """One way to edit. config: a SpecEditConfig, None for the stock pipeline."""

    name: str
    steps: int
    config: Any = None
    compiled: bool = False


def rows_of_table(stock_steps: int, presets: Sequence[int], compiled: bool, guided: bool = False) -> list[Row]:
    """What is run, in the order of its weight: where time is short the last ones are left out. guided: with true
    guidance, under which qualities can have other steps."""
    from ..engine.config import SpecEditConfig

    tiers = [Row(name, 0, SpecEditConfig(quality=name, preserve="pixels")) for name in TIERS]
    tiers += [Row(f"preset {n}", 0, SpecEditConfig(preset=n, preserve="pixels")) for n in presets]
    used = [row.config.resolved(guided) for row in tiers]
    tiers = [Row(row.name, sum(config.step_counts()), row.config) for row, config in zip(tiers, used)]
    counts = dict.fromkeys([stock_steps, *(row.steps for row in tiers)])
    stock = [Row(_stock(n), n) for n in counts]
    last = [Row(f"{_stock(n)}, compiled", n, compiled=True) for n in counts if compiled]
    return [stock[0], *tiers, *stock[1:], *last]


def _stock(steps: int) -> str:
    return f"stock, {steps} step{'s' * (steps != 1)}"


class Budget:
    """Minutes of the whole command."""

    def __init__(self, minutes: float):
        self.seconds, self.start = 60 * minutes, time.monotonic()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


class Cells:
    """Finished cells on the disk: OUT/cells/ROW/PICTURE.json, written last, and .png."""

    def __init__(self, folder: Path, place: Mapping[str, Any]):
        self.folder, self.place = folder, dict(place)

    def paths(self, row: Row, edit: Edit) -> tuple[Path, Path]:
        slug = "".join(c if c.isalnum() else "-" for c in row.name).replace("--", "-")
        at = self.folder / "cells" / slug
        return at / f"{edit.name}.json", at / f"{edit.name}.png"

    def asked(self, row: Row, edit: Edit) -> dict[str, Any]:
        """What a cell is of; one of anything else is none."""
        digest = hashlib.sha256(edit.image.read_bytes())
        digest.update(edit.mask.read_bytes() if edit.mask else b"")
        config = None if row.config is None else asdict(row.config.resolved())
        asked = {"row": asdict(row) | {"config": config}, "picture": digest.hexdigest()[:16],
                 "instruction": edit.instruction, "place": self.place}  # fmt: skip
        return json.loads(json.dumps(asked))

    def read(self, row: Row, edit: Edit) -> dict[str, Any] | None:
        path, picture = self.paths(row, edit)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if picture.is_file() and found["asked"] == self.asked(row, edit) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, row: Row, edit: Edit, image: Any, facts: Mapping[str, Any]) -> None:
        path, picture = self.paths(row, edit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(picture, lambda file: image.save(file, format="PNG"))
        text = json.dumps({"asked": self.asked(row, edit), **facts}, indent=1).encode()
        _write(path, text)

    def picture(self, row: Row, edit: Edit) -> Any:
        return Photo.open(self.paths(row, edit)[1]).pil().convert("RGB")


class Bench:
    """A loaded model, and how each row edits with it."""

    def __init__(self, pipe: Any, settings: Mapping[str, Any], seed: int):
        from ..engine.pipeline import stock_class
        from ..engine.registry import codec_of

        self.pipe, self.settings, self.seed = pipe, dict(settings), seed
        self.codec, self.device = codec_of(pipe.vae), pipe.device
        self.stock_takes = inspect.signature(stock_class(type(pipe)).__call__).parameters
        self.ours_takes = inspect.signature(type(pipe).__call__).parameters
        # a folder of another size than the stock call has: its steps are taken by ours, with everything selected
        self.by_ours = "max_area" in self.settings and "max_area" not in self.stock_takes
        self.warm: set[tuple[Row, tuple[int, int]]] = set()
        self.last: Row | None = None
        self.compiled = False

    def text(self, edit: Edit) -> dict[str, Any]:
        """The arguments of a call that are its text."""
        return {"prompt": edit.instruction}

    def source(self, edit: Edit) -> Any:
        """The picture at a working size that a second look finds again, PIL RGB: all rows get the very pixels."""
        import PIL.Image

        whole = Photo.open(edit.image).rgb
        picture, size = whole, None
        for _ in range(FOLDS):
            height, width = self.pipe.working_size(picture, **self.text(edit), **self.settings)
            if (width, height) == size:
                break
            size = (width, height)
            picture = whole.resize(size, PIL.Image.Resampling.LANCZOS)
        return picture

    def run(self, row: Row, edit: Edit, source: Any) -> tuple[Any, dict[str, Any]]:
        """(the edited picture, figures) of a cell; what comes before a first run is not in its time."""
        mask = None if edit.mask is None else Photo.open(edit.mask).array
        self._prepare(row)
        key = (row, source.size)
        if key not in self.warm and (self.device.type == "cuda" or row.compiled):
            self._call(row, edit, source, mask, WARM_UP_STEPS)
        self.warm.add(key)
        found, stages, total, peak = self._timed(row, edit, source, mask)
        if row.config is not None and found.stats.captures:  # the region's size class had no graphs yet
            found, stages, total, peak = self._timed(row, edit, source, mask)
        facts: dict[str, Any] = {"seconds": total, "stages": stages, "peak_bytes": peak, "size": list(source.size)}
        if row.config is not None:
            stats, mask = found.stats, found.mask[0].cpu()
            names = ("flops", "plain_step_flops", "fallback", "runner", "runner_reason", "backend")
            facts |= {name: getattr(stats, name) for name in names}
            facts |= {"edited": stats.edited[0], "mask": ["".join("01"[x] for x in line) for line in mask.tolist()]}
        return found.images[0], facts | {"date": datetime.date.today().isoformat()}

    def _prepare(self, row: Row) -> None:
        import torch

        from ..engine.attention import unwrap_processors

        if row != self.last:
            # a row has its own graphs alone, and while the stock pipeline runs nothing of ours is kept or wrapped
            self.pipe._free_runner()
            self.warm = {key for key in self.warm if key[0].config is None}
            if row.config is None:
                unwrap_processors(self.pipe.transformer)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.last = row
        if row.compiled and not self.compiled:
            transformer = self.pipe.transformer
            if getattr(transformer, "_repeated_blocks", None):
                transformer.compile_repeated_blocks(fullgraph=True)
            else:
                transformer.compile()
            self.compiled = True

    def _timed(self, row: Row, edit: Edit, source: Any, mask: Any) -> tuple[Any, dict[str, float], float, int | None]:
        import torch

        with _peak_memory(self.device) as peak:
            start = time.perf_counter()
            found, stages = self._call(row, edit, source, mask)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            total = time.perf_counter() - start
        return found, stages, total, peak[0]

    def _call(
        self, row: Row, edit: Edit, source: Any, mask: Any, warm_up: int | None = None
    ) -> tuple[Any, dict[str, float]]:
        """(what the pipeline gives, seconds of each stage). warm_up: steps of a stock row in place of its own."""
        import PIL.Image
        import torch

        from ..engine.config import SpecEditConfig

        width, height = source.size
        call = dict(image=source, **self.text(edit), generator=torch.Generator().manual_seed(self.seed))
        options = {**self.settings, "height": height, "width": width, "max_area": height * width, "_auto_resize": False}
        steps = row.steps if warm_up is None else warm_up
        if row.config is None and not self.by_ours:
            call |= {name: value for name, value in options.items() if name in self.stock_takes}
            with _stages_of(self.pipe) as clock:
                found = self.pipe(specedit=False, num_inference_steps=steps, **call)
                clock.mark("decode")
            return found, clock.seconds()
        config = row.config
        if config is None:
            config = SpecEditConfig(quality="paper", stages=(0, 0, steps), runner="eager", preserve=None)
            mask = PIL.Image.new("L", source.size, 255)
        call |= {name: value for name, value in options.items() if name in self.ours_takes}
        found = self.pipe(specedit=config, mask_image=mask, **call)
        return found, found.stats.seconds

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents [1, C, h, w] of a picture [3, H, W] in [0, 1]."""
        return self.codec.encode((pixels[None] * 2 - 1).to(self.device, self.pipe.vae.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [3, H, W] in [0, 1] of clean latents."""
        return (self.codec.decode(latents)[0, :3].float().cpu() / 2 + 0.5).clamp(0, 1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two latents, each token's distance by the autoencoder's features: fp32 [rows, columns] in [0, 4]."""
        from ..engine.stages import discrepancy

        grid = (a.shape[-2] // self.codec.patch, a.shape[-1] // self.codec.patch)
        return discrepancy(self.codec, None, "decoder", a, b, grid)[0].float().cpu().reshape(grid)


@contextlib.contextmanager
def _stages_of(pipe: Any) -> Iterator[StageClock]:
    """A clock of a stock call: what is before the transformer's first call, and its calls with what is between."""
    from ..engine.output import StageClock

    clock = StageClock(pipe.device)
    begun: list[bool] = []

    def before(*_: Any) -> None:
        if not begun:
            clock.mark("encode")
            begun.append(True)

    hooks = [
        pipe.transformer.register_forward_pre_hook(before),
        pipe.transformer.register_forward_hook(lambda *_: clock.mark("denoise")),
    ]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _peak_memory(device: Any) -> Iterator[list[int | None]]:
    """A list with the largest memory meanwhile: of a CUDA device what its allocator held, on a CPU the process's own;
    None where it is not told."""
    import torch

    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_reserved(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield peak
        return
    yield peak
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    peak[0] = None if found is None else 1024 * int(found[1])


# the run


class Run:
    """The table's cells, as far as the budget takes them. failed: {row's name: why}."""

    def __init__(self, bench: Bench, cells: Cells, rows: Sequence[Row], edits: Sequence[Edit], budget: Budget):
        self.bench, self.cells, self.rows, self.edits, self.budget = bench, cells, rows, edits, budget
        self.failed: dict[str, str] = {}
        self.expected: dict[str, float] = {}  # seconds of a row's cell
        self.sources: dict[str, Any] = {}

    def source(self, edit: Edit) -> Any:
        if edit.name not in self.sources:
            self.sources[edit.name] = self.bench.source(edit)
        return self.sources[edit.name]

    def __call__(self) -> None:
        eager = [row for row in self.rows if not row.compiled]
        compiled = [row for row in self.rows if row.compiled]
        for row in eager:  # one picture by all of them first: the whole table, if with few pictures
            self.cell(row, self.edits[0])
        chosen = self.edits[: 1 + self._more(eager, compiled)]
        for row in (*eager, *compiled):
            for edit in chosen:
                self.cell(row, edit)

    def _more(self, eager: Sequence[Row], compiled: Sequence[Row]) -> int:
        """How many more pictures than the first fit into what is left, so that all rows have the same ones."""
        later = sum(self._seconds(row) for row in compiled)
        left = self.budget.left() - (COMPILE_SECONDS + later if compiled else 0.0)
        count = 0
        for edit in self.edits[1:]:
            missing = [row for row in eager if self.cells.read(row, edit) is None]
            left -= later + sum(self._seconds(row) for row in missing)
            if left < 0:
                break
            count += 1
        return count

    def _expect(self, row: Row, facts: Mapping[str, Any]) -> None:
        # where nothing was to be edited the next one may take all of its steps
        if facts.get("fallback") != "source":
            self.expected[row.name] = facts["seconds"]

    def _seconds(self, row: Row) -> float:
        """How long a row's next cell may take."""
        plain = next((x for x in self.rows if x.config is None and x.steps == row.steps and not x.compiled), row)
        return MARGIN * self.expected.get(row.name, self.expected.get(plain.name, 0.0))

    def cell(self, row: Row, edit: Edit) -> None:
        """Edit one picture, if that is to be done and there is time."""
        known = self.cells.read(row, edit)
        if known is not None:
            self._expect(row, known)
            return
        if row.name in self.failed or self.budget.left() <= self._seconds(row):
            return
        try:
            with run_notes() as notes:
                image, facts = self.bench.run(row, edit, self.source(edit))
        except Exception as error:
            # one row that cannot be is no end of the others
            self.failed[row.name] = one_line(f"{type(error).__name__}: {reason(error)}")
            say(f"specedit: {row.name}: {self.failed[row.name]}", sys.stderr)
            self.bench.pipe._free_runner()
            return
        self.cells.write(row, edit, image, facts | {"notes": notes})
        self._expect(row, facts)
        say(f"specedit: {row.name}: {edit.name}: {facts['seconds']:.2f} s", sys.stderr)


def _place(folder: Path, name: str, device: Any, dtype: Any, seed: int) -> dict[str, Any]:
    """What a figure is of: model, device, versions, seed."""
    import torch

    from .. import __version__

    weights = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        weights.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    versions = {"specedit-kernels": __version__ + _commit(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        what = f"cuda, {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        what = f"cpu, {platform.machine()}, {threads} thread{'s' * (threads != 1)}"
    return {
        "model": folder.resolve().name, "class": name, "weights": weights.hexdigest()[:16], "device": what,
        "dtype": str(dtype).removeprefix("torch."), "seed": seed, "versions": versions,
    }  # fmt: skip


def _commit() -> str:
    """Of a clone, as a version's suffix; "" elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+{found}"


def _command(arguments: argparse.Namespace, folder: Path) -> str:
    """The command for others to read: folders by their names, without where they lie."""
    said = ["specedit", "bench", "--model", folder.resolve().name]
    if arguments.pictures is not None:
        said += ["--pictures", Path(arguments.pictures).resolve().name, "--language", arguments.language]
    for name in ("minutes", "steps", "true_cfg_scale", "seed"):
        value = getattr(arguments, name)
        said += [] if value is None else [f"--{name.replace('_', '-')}", str(value).removesuffix(".0")]
    for preset in arguments.preset:
        said += ["--preset", str(preset)]
    return shlex.join([*said, *([] if arguments.compile else ["--no-compile"])])


def run(arguments: argparse.Namespace) -> int:
    """`specedit bench`. Returns the exit code: 2 where a row failed."""
    budget = Budget(arguments.minutes)
    if not arguments.minutes >= 0:
        raise UserError(f"--minutes: expected a number of 0 or more, got {arguments.minutes:g}")
    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {arguments.steps}")
    folder = models.model_folder(arguments.model)
    name = models.model_class(folder)
    edits, others = edits_of(SHIPPED if arguments.pictures is None else Path(arguments.pictures), arguments.language)
    if arguments.pictures is not None:
        # lists are sorted by task: a few of their pictures are to be of all kinds, and everywhere the same
        edits.sort(key=lambda edit: hashlib.sha256(f"{edit.name} {edit.instruction}".encode()).digest())
    out = Path(arguments.output or f"bench-{folder.resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    for file in ("bench.json", "bench.md", "contact_sheet.png"):
        check_target(out / file)
    settings = models.model_settings(folder, name, arguments.true_cfg_scale)
    device, dtype = models.device_of(arguments.device)
    import specedit_kernels

    pipe = models.load_pipeline(getattr(specedit_kernels, f"SpecEdit{name}"), folder, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    guided = settings.get(pipe.TRUE_CFG, 1.0) > 1
    rows = rows_of_table(arguments.steps or pipe.STEPS_OF_PLAIN, arguments.preset, arguments.compile, guided)
    place = _place(folder, name, device, dtype, arguments.seed) | {"settings": settings}
    cells = Cells(out, place)
    work = Run(Bench(pipe, settings, arguments.seed), cells, rows, edits, budget)
    work()
    notes = [f"{others} instructions in other languages are left out"] if others else []
    report = bench_report.report_of(work, place, _command(arguments, folder), arguments.minutes, notes)
    if not report["rows"]:
        why = work.failed.get(rows[0].name, f"nothing was finished in {arguments.minutes:g} minutes")
        raise UserError(f"{rows[0].name}: {why}")
    text = bench_report.markdown(report)
    content = json.dumps(bench_report.finite(report), indent=1).encode()
    done = [edit for edit in edits if edit.name in report["pictures"]][:SHEET_PICTURES]
    png = bench_report.sheet_of(cells, rows, done, {edit.name: work.source(edit) for edit in done})
    _write(out / "bench.json", content)
    _write(out / "bench.md", text.encode())
    _write(out / "contact_sheet.png", png)
    say(f"{text}\n{shown(out)}: bench.md, bench.json, contact_sheet.png")
    return 2 if work.failed else 0
