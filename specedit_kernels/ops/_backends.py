# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: ``cuda`` (csrc) before ``triton`` before ``reference``.

A CPU tensor is served by the reference. ``SPECEDIT_BACKEND=reference|triton|cuda`` forces one; a forced backend that
cannot serve the call raises and says why. Under ``TRITON_INTERPRET=1`` a forced triton serves CPU tensors too.
"""

import functools
import importlib
import os

import torch

from specedit_kernels import _extension

BACKENDS = ("cuda", "triton", "reference")

# op -> (stem of its file in reference/ and triton_kernels/, its csrc twin or None)
_OPS = {}


def add(op, stem, csrc=None):
    """Make ``op`` known: ``stem`` names its file in the other rooms, ``csrc`` is the overload of its csrc twin."""
    _OPS[op] = (stem, csrc)


@functools.cache
def _load(op, backend):
    stem, csrc = _OPS[op]
    if backend == "cuda":
        return csrc
    room = "reference" if backend == "reference" else "triton_kernels"
    return getattr(importlib.import_module(f"specedit_kernels.{room}.{stem}"), op)


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


def _triton_refuses(device):
    reason = _triton_missing()
    if reason:
        return reason
    if device.type == "cpu":
        return None if _interpreting() else "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1)"
    major, minor = _capability(device.index)
    return None if major >= 8 else f"Triton kernels need compute capability 8.0, {device} has {major}.{minor}"


def _cuda_refuses(op, device):
    if _OPS[op][1] is None:
        return "no CUDA C++ kernel for this op"
    if device.type != "cuda":
        return "the CUDA C++ kernel needs a CUDA tensor"
    major, minor = _capability(device.index)
    if major != 9:
        return f"the extension is built for compute capability 9.0, {device} has {major}.{minor}"
    loaded, reason = _extension.load()
    return None if loaded else reason


def choose(op, device):
    """Return (backend, why not a faster one or "")."""
    forced = os.environ.get("SPECEDIT_BACKEND", "")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"SPECEDIT_BACKEND: expected one of {', '.join(BACKENDS)}, got {forced!r}")
        refused = {
            "cuda": lambda: _cuda_refuses(op, device),
            "triton": lambda: _triton_refuses(device),
            "reference": lambda: None,
        }[forced]()
        if refused:
            raise RuntimeError(f"SPECEDIT_BACKEND={forced} cannot serve {op}: {refused}")
        return forced, "forced by SPECEDIT_BACKEND"
    if device.type == "cpu":
        return "reference", "CPU tensors are served by the reference"
    cuda = _cuda_refuses(op, device)
    if not cuda:
        return "cuda", ""
    triton = _triton_refuses(device)
    if not triton:
        return "triton", cuda
    return "reference", f"{cuda}; {triton}"


def implementation(op, device):
    """The callable that serves ``op`` on ``device``."""
    return _load(op, choose(op, device)[0])


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
