# SPDX-License-Identifier: Apache-2.0
"""Whether a loaded pipeline is what its folder should give: the libraries draw what is missing at random, and go on."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

WEIGHTS = "diffusion_pytorch_model"
# names of an autoencoder's attention in old checkpoints, which diffusers renames as it loads
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LARGEST_HEADER = 2**27  # bytes
# how a line ends that tells of what is left out without harm
HARMLESS = "which the model has not"


def check_folder(kind: type[DiffusionPipeline], folder: str | Path, given: Collection[str] = ()) -> list[str]:
    """Components of a pipeline class that a folder has not, a line each; asked before they are loaded."""
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    found = []
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        needed = parameter.default is parameter.empty and name not in ("self", *kind._optional_components)
        absent = not (folder / name).is_dir() if name in named else needed
        if absent and name not in given:
            found.append(f"has no {name}")
    return found


def check_pipeline(pipe: DiffusionPipeline, folder: str | Path, given: Collection[str] = ()) -> list[str]:
    """What is wrong with a pipeline that was loaded from a folder on this disk, a line each.

    A component or tokenizer whose files are absent, tensors of diffusers models that the files lack or have too many,
    weights and numbers of configs that are not finite. given: names of components that came from the caller, not from
    the folder. What transformers finds in its own files, `load_notes` collects while it loads.
    """
    folder = Path(folder)
    found = []
    for name, component in pipe.components.items():
        if name in given:
            continue
        if component is None:
            if name not in pipe._optional_components:
                found.append(f"has no {name}")
            continue
        if isinstance(component, torch.nn.Module):
            found += check_module(component, folder / name)
        else:
            # a processor has a tokenizer of its own, in the same folder
            found += _check_tokenizer(getattr(component, "tokenizer", component), folder / name)
        config = getattr(component, "config", None)
        for key, value in dict(config).items() if isinstance(config, Mapping) else ():
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{name}: {key} is {value}")
    return found


def check_module(module: torch.nn.Module, folder: Path) -> list[str]:
    """The same of one model and its folder."""
    found = _check_keys(module, folder) if isinstance(module, ModelMixin) else []
    broken = not_finite(module)
    return found + ([f"{folder.name}: not finite: {_some(broken)}"] if broken else [])


def _check_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """transformers makes an empty tokenizer where there is no file."""
    names = dict(getattr(tokenizer, "vocab_files_names", {}))
    if not names:
        return []
    whole = names.pop("tokenizer_file", None)
    if (whole and (folder / whole).is_file()) or (names and all((folder / name).is_file() for name in names.values())):
        return []
    return [f"{folder.name}: has no {whole or ' and '.join(names.values())}"]


def _check_keys(model: ModelMixin, folder: Path) -> list[str]:
    """Tensors of a model against those in its files' headers: an index may name what no file has."""
    if getattr(model, "hf_quantizer", None) is not None:  # keys of its own
        return []
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
    plain = [p for p in files if re.fullmatch(rf"{WEIGHTS}(-\d+-of-\d+)?\.safetensors", p.name)]
    if not files:
        return []
    held: set[str] = set()
    for path in plain or files:
        held |= _keys(path)
    wanted = set(model.state_dict())
    for key in held - wanted:
        old, _, last = key.rpartition(".")
        stem, _, part = old.rpartition(".")
        renamed = f"{stem}.{RENAMED[part]}.{last}" if part in RENAMED else key
        if renamed in wanted:
            held = held - {key} | {renamed}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    strange = sorted(k for k in held - wanted if not any(re.search(pattern, k) for pattern in ignored))
    absent = sorted(wanted - held)
    found = [f"{folder.name}: lacks the tensor {_some(absent)}"] if absent else []
    return found + ([f"{folder.name}: has the tensor {_some(strange)}, {HARMLESS}"] if strange else [])


def _keys(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file: 8 bytes of length, then a JSON object."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER:
            raise ValueError(f"{path.name}: expected a header of at most {LARGEST_HEADER} bytes, got {length}")
        return set(json.loads(file.read(length))) - {"__metadata__"}


def not_finite(module: torch.nn.Module) -> list[str]:
    """Names of the parameters with a NaN or an infinite number. One sum each, and one wait a device."""
    sums: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in module.named_parameters():
        # a sum of 8-bit floats is not defined; those on no device are another's to load
        if type(weight.data) is torch.Tensor and weight.is_floating_point() and weight.itemsize > 1:
            if weight.device.type != "meta":
                kind = torch.float32 if weight.dtype == torch.float16 else None  # whose sums pass its range
                sums.setdefault(weight.device, []).append((name, weight.detach().sum(dtype=kind).float()))
    found = []
    for pairs in sums.values():
        finite = torch.stack([total for _, total in pairs]).isfinite().tolist()
        found += [name for (name, _), good in zip(pairs, finite, strict=True) if not good]
    return found


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@contextlib.contextmanager
def load_notes() -> Iterator[list[str]]:
    """While it is open: what transformers says of tensors that its files lack or have too many, a line each.

    transformers tells it in a log record alone, a table of names and what is the matter with them.
    """
    root = logging.getLogger("transformers")
    level, handlers = root.level, root.handlers[:]
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(_report_lines(record.getMessage()))

    def as_before(record: logging.LogRecord) -> bool:
        return record.levelno >= level

    collector = Collector()
    root.addHandler(collector)
    for handler in handlers:
        handler.addFilter(as_before)
    root.setLevel(min(level, logging.WARNING))
    try:
        yield found
    finally:
        root.setLevel(level)
        for handler in handlers:
            handler.removeFilter(as_before)
        root.removeHandler(collector)


def _report_lines(text: str) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    head = re.search(r"LOAD REPORT from: (.*)", text)
    if head is None:
        return []
    part = Path(head[1].strip()).name
    rows = re.findall(r"^(\S.*?)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH)\b", text, re.MULTILINE)
    absent = [name for name, what in rows if what == "MISSING"]
    strange = [name for name, what in rows if what == "UNEXPECTED"]
    found = [f"{part}: lacks the tensor {_some(absent)}"] if absent else []
    return found + ([f"{part}: has the tensor {_some(strange)}, {HARMLESS}"] if strange else [])
