# SPDX-License-Identifier: Apache-2.0
"""What this installation has, and which backend serves each op here: `specedit doctor`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import textwrap

import torch

from .. import __version__, _extension, ops
from .models import device_of, load_pipeline, model_class, model_folder, quiet
from .text import UserError, say

_PACKAGES = ("triton", "diffusers", "transformers")
_COLUMNS = 100


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device():
    """(device that the ops would run on, its description)."""
    if not torch.cuda.is_available():
        reason = "torch is a CPU-only build" if torch.version.cuda is None else "torch finds no CUDA device"
        return torch.device("cpu"), f"cpu ({reason})"
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    return device, (
        f"{device}, {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _backend(op, device):
    try:
        return ops.backend_of(op, device)
    except (RuntimeError, ValueError) as error:  # SPECEDIT_BACKEND asks for what cannot be
        return "none", str(error)


def _models():
    """{model: what it serves}, or why there is none."""
    try:
        quiet()
        from ..engine import registry

        return {name: ", ".join(kinds) for name, kinds in registry.supported_models().items()}
    except ImportError as error:
        return {"none": f"the pipelines need diffusers, transformers and Pillow ({error})"}


def collect():
    """The facts as a dictionary: "versions" and "device", "extension" (text), "ops" {op: (backend, reason)}, "models"
    {model: the pipeline classes that it serves}."""
    device, description = _device()
    loaded, reason = _extension.load()
    return {
        "versions": {
            "specedit-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda or "none",
            **{package: _version(package) for package in _PACKAGES},
        },
        "device": description,
        "extension": f"loaded ({_extension.build_info()})" if loaded else reason,
        "forced": os.environ.get("SPECEDIT_BACKEND", ""),
        "ops": {op: _backend(op, device) for op in ops.names()},
        "models": _models(),
    }


def report():
    """The facts as one screen of text."""
    facts = collect()
    rows = [*facts["versions"].items(), ("device", facts["device"]), ("CUDA extension", facts["extension"])]
    if facts["forced"]:
        rows.append(("SPECEDIT_BACKEND", facts["forced"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    served: dict[tuple[str, str], list[str]] = {}
    for op, (backend, reason) in facts["ops"].items():
        why = reason.replace(f" cannot serve {op}: ", " cannot serve these: ") or "the fastest there is"
        served.setdefault((backend, why), []).append(op)
    lines += ["", f"{'backend':<9}  why, and for which ops"]
    for (backend, why), names in served.items():
        lines.append(f"{backend:<9}  {why}")
        indent = " " * 11
        lines += textwrap.wrap(", ".join(names), _COLUMNS, initial_indent=indent, subsequent_indent=indent)
    width = max(len(name) for name in facts["models"])
    lines += ["", f"{'model':<{width}}  pipelines"]
    lines += [f"{name:<{width}}  {served}" for name, served in facts["models"].items()]
    return "\n".join(lines)


def plan(text):
    """The plan of one call of the CUDA attention, as text. UserError where it is not on hand, or asked for oddly."""
    try:
        describe = importlib.import_module("specedit_kernels._attention_plan").describe
        return describe(text)
    except ImportError:
        raise UserError("--plan: this installation has no planner") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--plan: {error}") from None


def runner(text):
    """Which runner the edits of a model folder take here, and why no faster one, as text. UserError where the folder's
    pipeline cannot be loaded: it is loaded whole, since its weights decide."""
    folder = model_folder(text)
    name = model_class(folder)
    from ..engine import registry

    kind = next(ours for plain, ours in registry.pipelines().items() if plain.__name__ == name)
    name, why = load_pipeline(kind, folder, *device_of(None)).fastest_runner()
    return f"runner  {name}" + (f" (no faster one: {why})" if why else "")


def run(arguments: argparse.Namespace) -> int:
    """`specedit doctor`. Returns the exit code."""
    if arguments.plan is not None:
        say(plan(arguments.plan))
    elif arguments.model is not None:
        say(runner(arguments.model))
    else:
        say(report())
    return 0
