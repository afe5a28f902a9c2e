# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: ``cuda`` (csrc) before ``triton`` before ``reference``.

A CPU tensor is served by the reference. ``SPECEDIT_BACKEND=reference|triton|cuda`` forces one, for all ops or, written
``op=backend,op=backend``, for some; a forced backend that cannot serve the call raises and says why. Under
``TRITON_INTERPRET=1`` a forced triton serves CPU tensors too.
"""

import functools
import importlib
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch

from .. import _extension

BACKENDS = ("cuda", "triton", "reference")


@dataclass(frozen=True)
class _Op:
    stem: str
    csrc: object
    refuses: object
    arch: str
    scope: str
    capability: tuple[int, int]


_OPS: dict[str, Any] = {}
_PACKAGE = __package__.rpartition(".")[0]
_IMPORTING = threading.RLock()


def _modules():
    """What sys.modules holds under the package's name."""
    return {name: module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{_PACKAGE}.")}


# This copy's own: the names in sys.modules may be gone, or mean another copy, when an op is first called.
_OWN = _modules()


def _import(name):
    """Import a module of this copy of the package."""
    with _IMPORTING:
        others = None if sys.modules.get(_PACKAGE) is _OWN[_PACKAGE] else _modules()
        if others is not None:
            _replace(others, _OWN)
        try:
            module = importlib.import_module(f"{_PACKAGE}.{name}")
            _OWN.update(_modules())
        finally:
            if others is not None:
                _replace(_modules(), others)
        return module


def _replace(old, new):
    for name in old:
        del sys.modules[name]
    sys.modules.update(new)


def add(op, stem, csrc=None, refuses=None, arch="", scope="", capability=(8, 0)):
    """Make ``op`` known.

    stem: names its file in reference/ and triton_kernels/, and with _csrc after it what the extension registers.
    csrc: the callable that launches its csrc kernel, or None.
    refuses: called with the arguments of one call, says why csrc does not serve it, or "". None: it serves all.
    arch: an architecture that the extension must be built for, such as "90a"; "": any.
    scope: which calls csrc serves, in words, where it does not serve all.
    capability: the compute capability that its Triton kernel needs.
    """
    _OPS[op] = _Op(stem, csrc, refuses, arch, scope, capability)


@functools.cache
def _load(op, backend):
    stem = _OPS[op].stem
    if backend == "cuda":
        return _OPS[op].csrc
    room = "reference" if backend == "reference" else "triton_kernels"
    return getattr(_import(f"{room}.{stem}"), op)


@functools.cache
def _triton_missing():
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@functools.cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


def _interpreting():
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_refuses(op, device):
    reason = _triton_missing()
    if reason:
        return reason
    if device.type == "cpu":
        return None if _interpreting() else "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1)"
    have, needed = _capability(device.index), _OPS[op].capability
    if have >= needed:
        return None
    return f"the Triton kernel needs compute capability {needed[0]}.{needed[1]}, {device} has {have[0]}.{have[1]}"


def _cuda_refuses(op, device):
    known = _OPS[op]
    if known.csrc is None:
        return "no CUDA C++ kernel for this op"
    if device.type != "cuda":
        return "the CUDA C++ kernel needs a CUDA tensor"
    major, minor = _capability(device.index)
    if major != 9:
        return f"the extension is built for compute capability 9.0, {device} has {major}.{minor}"
    loaded, reason = _extension.load()
    if not loaded:
        return reason
    if not _extension.has_kernel(known.stem):
        return "the extension is an older build, without this op's kernel; build it again"
    if known.arch and known.arch not in _extension.architectures():
        return f"the kernel needs sm_{known.arch}, the extension is built for {_extension.architectures()}"
    return ""


def _call_refused(op, call):
    refuses = _OPS[op].refuses
    return refuses(*call) if refuses and call is not None else ""


def _forced(op):
    """The backend that SPECEDIT_BACKEND forces for ``op``, or ""."""
    text = os.environ.get("SPECEDIT_BACKEND", "")
    if not text:
        return ""
    if text in BACKENDS:
        return text
    pairs = dict(entry.strip().split("=", 1) for entry in text.split(",") if "=" in entry)
    if len(pairs) < text.count(",") + 1 or not (pairs.keys() <= _OPS.keys() and set(pairs.values()) <= set(BACKENDS)):
        expected = f"one of {', '.join(BACKENDS)}, or op=backend for some ops, separated by commas"
        raise ValueError(f"SPECEDIT_BACKEND: expected {expected}, got {text!r}")
    return pairs.get(op, "")


def choose(op, device, call=None):
    """Return (backend, why not a faster one or ""). ``call``: the arguments, or None for ordinary ones."""
    forced = _forced(op)
    if forced:
        refused = {
            "cuda": lambda: _cuda_refuses(op, device) or _call_refused(op, call),
            "triton": lambda: _triton_refuses(op, device),
            "reference": lambda: None,
        }[forced]()
        if refused:
            raise RuntimeError(f"SPECEDIT_BACKEND={forced} cannot serve {op}: {refused}")
        return forced, "forced by SPECEDIT_BACKEND"
    if device.type == "cpu":
        return "reference", "CPU tensors are served by the reference"
    cuda = _cuda_refuses(op, device) or _call_refused(op, call)
    if not cuda:
        return "cuda", _OPS[op].scope if call is None else ""
    triton = _triton_refuses(op, device)
    if not triton:
        return "triton", cuda
    return "reference", f"{cuda}; {triton}"


def implementation(op, device, call=None):
    """The callable that serves ``op`` on ``device``; ``call``: its arguments, where the choice depends on them."""
    return _load(op, choose(op, device, call)[0])


def backend_of(op, device="cuda"):
    """(backend, reason) for a call of ``op`` with ordinary arguments on ``device``: what `specedit doctor` prints."""
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return choose(op, device)


def names():
    """The public ops, in the order in which they were added."""
    return tuple(_OPS)
