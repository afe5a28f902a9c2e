# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures with instructions: lists beside pictures, texts of their names, GEdit-Bench's rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.files import reason, shown
from .batch import LISTS, PICTURES, rows_of
from .models import ASSETS
from .text import UserError

SHIPPED = ASSETS / "bench"
# of a row: GEdit-Bench and Kontext-Bench have the second names, other lists the third
INSTRUCTION = ("instruction", "prompt", "edit_instruction")
IMAGE = ("image", "file_name", "input_image", "input_image_raw", "source")
KEY = ("key", "id", "name")
LANGUAGE = "instruction_language"
PLACES = ("task_type", "category", LANGUAGE)  # folders that a key's picture may lie in


@dataclass(frozen=True)
class Edit:
    """A picture and what to change in it. name: for files, one for each edit. mask: a picture's path, or None."""

    name: str
    image: Path
    instruction: str
    mask: Path | None = None


def edits_of(folder: Path, language: str = "en") -> tuple[list[Edit], int]:
    """(the edits of a folder, how many are in another language).

    A folder has lists (.jsonl, .json, .csv) of rows: the instruction under one of INSTRUCTION, the picture's path under
    one of IMAGE or its file's name under one of KEY, and where wanted a mask's path under "mask"; paths are taken from
    the list's own folder. Lists of its subfolders are read where it has none itself. Without a list each picture with
    a text file of its name is an edit. UserError where there is none, or a row cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder of pictures")
    kinds = (*LISTS, ".json")
    lists = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds and path.is_file())
    lists = lists or sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file())
    rows = [row for path in lists for row in _edits_of_list(path, language)] or list(_by_text(folder))
    found = [edit for edit in rows if edit is not None]
    others = len(rows) - len(found)
    if not found and others:
        raise UserError(f"{shown(folder)}: no instruction in {language!r}; {others} in other languages (--language)")
    if not found:
        kept = any(path.suffix in (".arrow", ".parquet") for path in folder.rglob("*"))
        more = "; write the pictures of a data set's own files (.arrow, .parquet) out first" if kept else ""
        expected = "a list (.jsonl, .json, .csv) of pictures and instructions, or NAME.txt beside pictures"
        raise UserError(f"{shown(folder)}: expected {expected}{more}")
    return _named(found), others


def _by_text(folder: Path) -> Iterator[Edit]:
    for path in sorted(folder.iterdir()):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in PICTURES and text.is_file():
            yield Edit(path.stem, path, _text(text).strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: cannot be read ({reason(error)})") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, {field: value}) of a list of any kind; of JSON: a list of rows, or {key: row or instruction}."""
    name, text = shown(path), _text(path)
    if path.suffix.lower() in LISTS:
        for number, row in rows_of(path, text):
            yield f"{name}, line {number}", row
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read ({reason(error)})") from None
    if isinstance(content, dict):
        content = [{"key": key, **(x if isinstance(x, dict) else {"instruction": x})} for key, x in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{name}: expected a list of rows or an object, got a {type(content).__name__}")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number}: expected an object, got a {type(row).__name__}")
        yield f"{name}, row {number}", row


def _edits_of_list(path: Path, language: str) -> Iterator[Edit | None]:
    """The edit of each row; None of one in another language."""
    files: dict[str, list[Path]] | None = None
    for where, row in _rows(path):
        if row.get(LANGUAGE, language) != language:
            yield None
            continue
        instruction = _first(row, INSTRUCTION)
        if isinstance(instruction, dict):  # FIBO's structured prompts
            instruction = json.dumps(instruction, ensure_ascii=False)
        if not isinstance(instruction, str) or not instruction.strip():
            raise UserError(f"{where}: expected an instruction under {' or '.join(INSTRUCTION)}")
        given, key = _first(row, IMAGE), _first(row, KEY)
        image = path.parent / given if isinstance(given, str) else None
        if image is None and isinstance(key, (str, int)):
            if files is None:
                files = _pictures_by_name(path.parent)
            # the picture itself, or a list's own path of it
            image = _nearest(files.get(Path(str(key)).stem, []), row)
        if image is None or not image.is_file():
            raise UserError(f"{where}: no picture under {' or '.join(IMAGE)}, and none named {key!r}")
        mask = row.get("mask")
        if mask and not (isinstance(mask, str) and (path.parent / mask).is_file()):
            raise UserError(f"{where}: mask: expected a file's path, got {mask!r}")
        name = str(key) if isinstance(key, (str, int)) else image.stem
        yield Edit(name, image, instruction.strip(), path.parent / mask if mask else None)


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _pictures_by_name(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            found.setdefault(path.stem, []).append(path)
    return found


def _nearest(paths: list[Path], row: dict[str, Any]) -> Path | None:
    """Of pictures of one name that in whose folders' names most of the row's fields are."""
    wanted = {row.get(name) for name in PLACES}
    return max(paths, key=lambda path: len(wanted.intersection(path.parts)), default=None)


def _named(edits: list[Edit]) -> list[Edit]:
    """Names for files, each once."""
    taken: set[str] = set()
    out = []
    for edit in edits:
        stem = re.sub(r"[^\w-]+", "-", Path(edit.name).stem)[:60].strip("-") or "picture"
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        out.append(Edit(name, edit.image, edit.instruction, edit.mask))
    return out
