# SPDX-License-Identifier: Apache-2.0
"""`specedit edit` with a folder or a list: many pictures, one load, a result file each; what is finished is skipped.

Started by torchrun, each process has its GPU and takes pictures until none is left.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..images.files import WRITTEN, ImageFileError, Photo, reason, shown, write_file
from . import edit, models, ranks
from .output import check_output, keep
from .text import UserError, one_line, say

LISTS = (".csv", ".jsonl")
PICTURES = (*WRITTEN, ".gif", ".ppm", ".avif")
FIELDS = ("image", "instruction", "output", "seed", "mask")


@dataclass(frozen=True)
class Job:
    """One picture: where it is, what to change, the name of its results without the folder."""

    image: Path
    instruction: str
    output: str
    seed: int
    mask: Path | None


def is_many(path: str) -> bool:
    """Whether a path names a folder or a list of pictures."""
    try:
        return Path(path).suffix.lower() in LISTS or os.path.isdir(path)
    except ValueError:  # a NUL in the name
        return False


def run(arguments: argparse.Namespace) -> int:
    """All pictures in order. Returns 0 where every one is edited or was before, else 2; of several processes the first
    one does, the others 0."""
    if not ranks.several():
        return _run(arguments, None)
    share = ranks.Share.of_environment()
    try:
        with share:
            return _run(arguments, share)
    except UserError:
        return 2  # which is said
    except Exception:
        if arguments.traceback:
            raise
        return 1


def _run(arguments: argparse.Namespace, share: ranks.Share | None) -> int:
    if arguments.preview:
        raise UserError("--preview: expected one picture, got many")
    if arguments.mask_output is not None:
        raise UserError("--mask-output: expected none with many pictures; the masks are written beside the results")
    if arguments.output is None:
        raise UserError("--output: expected a folder for the results of many pictures")
    source, out = Path(arguments.image), Path(arguments.output)
    taken = out.exists() and (not out.is_dir() or (source.is_dir() and out.samefile(source)))
    if taken or out.suffix.lower() in WRITTEN:
        raise UserError(f"{shown(out)}: expected a folder for the results, not that of the pictures or a file")
    jobs = _listed(source, arguments) if source.suffix.lower() in LISTS else _of_folder(source, arguments)
    if not jobs:
        raise UserError(f"{shown(source)}: has no pictures")
    out.mkdir(exist_ok=True)
    options = _options(arguments)
    wanted = [number for number, job in enumerate(jobs) if not _finished(job, out, options)]
    if share is not None:  # another rank may have finished one meanwhile
        wanted = share.agree(wanted)
    failed: list[str] = []
    if wanted:
        editor = edit.Editor(arguments)
        for place in _bar(len(wanted)) if share is None else share.take(len(wanted)):
            try:
                _one(editor, jobs[wanted[place]], out, options)
            except (UserError, ImageFileError) as error:
                failed.append(one_line(str(error)))
                say(f"specedit: {failed[-1]}", sys.stderr)
    number, by = len(failed), ""
    if share is not None:
        outcomes = share.gather({"failed": number})
        if outcomes is None:
            return 0
        number, by = sum(outcome["failed"] for outcome in outcomes), f", by {share.size} processes"
    say(
        f"edited      {len(wanted) - number} of {len(jobs)} pictures into {shown(out)}{by}\n"
        f"skipped     {len(jobs) - len(wanted)}, finished before\n"
        f"failed      {number}"
    )
    return 2 if number else 0


def _bar(count: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(count), unit="picture", disable=not sys.stderr.isatty())


def _one(editor: edit.Editor, job: Job, out: Path, options: dict[str, Any]) -> None:
    edit.check_instruction(job.instruction)
    path = check_output(out / job.output, [job.image])
    mask_path = check_output(path.with_name(f"{path.name}.mask.png"), [job.image])
    photo = Photo.open(job.image)
    edit.check_boxes(photo, editor.arguments.box)
    mask = None if job.mask is None else Photo.open(job.mask).array
    edited = editor.edit(photo, job.instruction, job.seed, mask)
    notes = keep({path: edited.photo, mask_path: edited.overlay})[path]
    stats = edited.stats
    result = {
        **_asked(job, options),
        "edited_share": stats.edited[0],
        "threshold": edited.threshold,
        "fallback": stats.fallback,
        "drift": edit.drift_of(stats),
        "native": next((str(found) for found in stats.native if found is not None), None),
        "steps": stats.nfe,
        "flops": stats.flops,
        "plain_flops": stats.plain_flops,
        "seconds": stats.seconds,
        "notes": [*edited.notes, *notes],
    }
    # last: that it is there says that the picture is finished
    text = json.dumps(result, indent=1).encode()
    write_file(_result_path(job, out), lambda file: file.write(text))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command's options that change a result."""
    names = ("method", "quality", "preset", "steps", "draft", "finish", "preserve", "output_size", "threshold",
             "mask_mode", "runner", "detail", "true_cfg_scale", "reference", "source_prompt")  # fmt: skip
    found = {name: getattr(arguments, name) for name in names}
    found["box"] = [str(box) for box in arguments.box]
    return found | {"model": str(models.model_folder(arguments.model))}


def _asked(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job).items()}
    return {**asked, "options": options}


def _result_path(job: Job, out: Path) -> Path:
    return out / f"{job.output}.json"


def _finished(job: Job, out: Path, options: dict[str, Any]) -> bool:
    """Whether a result of the same picture and the same options is there."""
    try:
        result = json.loads(_result_path(job, out).read_text(encoding="utf-8"))
        same = {name: result[name] for name in (*FIELDS, "options")} == _asked(job, options)
        return same and (out / job.output).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _of_folder(folder: Path, arguments: argparse.Namespace) -> list[Job]:
    edit.check_instruction(arguments.instruction)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name[0] == ".")
    return _named([Job(path, arguments.instruction, "", arguments.seed, _mask(path, arguments)) for path in found])


def _mask(image: Path, arguments: argparse.Namespace) -> Path | None:
    """--mask: one file for all, or a folder with one of the picture's name."""
    if arguments.mask is None:
        return None
    given = Path(arguments.mask)
    return given / f"{image.stem}.png" if given.is_dir() else given


def _named(jobs: list[Job]) -> list[Job]:
    """Each job with a name of its own for its results: the picture's, in a format that is written."""
    taken = {job.output for job in jobs if job.output}
    named = []
    for job in jobs:
        output = job.output
        if not output:
            stem, suffix = job.image.stem, job.image.suffix
            suffix = suffix if suffix.lower() in WRITTEN else f"{suffix}.png"
            output = next(n for n in _numbered(stem, suffix) if n not in taken)
            taken.add(output)
        named.append(Job(job.image, job.instruction, output, job.seed, job.mask))
    return named


def _numbered(stem: str, suffix: str):
    yield f"{stem}{suffix}"
    number = 2
    while True:
        yield f"{stem}-{number}{suffix}"
        number += 1


def _listed(path: Path, arguments: argparse.Namespace) -> list[Job]:
    """Jobs of a list; its paths are taken from the list's own folder."""
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({reason(error)})") from None
    jobs, taken = [], set()
    for number, row in rows_of(path, text):
        where = f"{name}, line {number}"
        odd = [key for key in row if key not in FIELDS]
        if odd:
            raise UserError(f"{where}: expected {', '.join(FIELDS)}, got {odd[0]!r}")
        row = {key: value for key, value in row.items() if value not in (None, "")}
        image, output, mask = row.get("image"), row.get("output", ""), row.get("mask")
        instruction = row.get("instruction", arguments.instruction)
        given = (("image", image), ("instruction", instruction), ("output", output), ("mask", mask or ""))
        for key, value in given:
            if not isinstance(value, str):
                raise UserError(f"{where}: {key}: expected a text, got {'none' if value is None else repr(value)}")
        if output and (Path(output).name != output or Path(output).suffix.lower() not in WRITTEN or output in taken):
            raise UserError(f"{where}: output: expected the name of a picture file, once, got {output!r}")
        taken.add(output)
        try:
            seed = int(row.get("seed", arguments.seed))
            if not -(2**63) <= seed < 2**64:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: seed: expected a whole number, got {row['seed']!r}") from None
        assert isinstance(image, str)
        place = path.parent / image
        jobs.append(Job(place, instruction, output, seed, path.parent / mask if mask else _mask(place, arguments)))
    return _named(jobs)


def rows_of(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {field: value}) of a list."""
    if path.suffix.lower() == ".csv":
        try:
            reader = csv.DictReader(text.splitlines(), strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error("a line has other fields than the first")
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{shown(path)}: cannot be read ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                raise UserError(f"{shown(path)}, line {number}: expected a JSON object")
            yield number, content
