# SPDX-License-Identifier: Apache-2.0
"""Loads the optional CUDA extension, once. It holds kernels only: the ops' schemas are defined in Python."""

import ctypes
import functools
import os
from pathlib import Path

import torch

from . import _ops

# The limited C API and torch's stable ABI make one file serve every Python from 3.10 and torch from 2.10.
PATH = Path(__file__).with_name("_C.abi3.so")
_OLDEST = "mixed_res_attn"  # among those that it has kernels of, in every build
# What csrc's ops take and write: kContract of csrc/registration.cpp, which tests hold equal to this. Raise both when a
# kernel of the same name takes other arguments, or the same in another layout.
# 2: mixed_res_attn_fp8_csrc takes v in panels of 64 keys. 1, or no number: before that.
CONTRACT = 2


def _registered(stem=_OLDEST):
    op = _ops.add_op_namespace_prefix(f"{stem}_csrc")
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")


def _contract(path):
    """The contract of the extension at `path`, loaded."""
    try:
        return ctypes.CDLL(str(path)).specedit_contract()
    except AttributeError:
        return 1


@functools.cache
def load():
    """Return (loaded, reason): whether the extension's kernels are registered, and if not, why. Never raises."""
    if not PATH.exists():
        return False, f"the CUDA extension is not built (no {PATH.name} beside {PATH.parent.name}/__init__.py)"
    try:
        # Another copy of the package may have loaded its own: kernels are registered once a namespace.
        if not _registered():
            torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        # torch names the file; the loader's own message, if torch wrapped it, is the cause.
        return False, f"the CUDA extension does not load: {str(error.__cause__ or error).strip().splitlines()[0]}"
    if not _registered():
        op = _ops.add_op_namespace_prefix(_OLDEST)
        return False, f"the CUDA extension was built for another op namespace than that of {op}"
    if os.path.realpath(PATH) in torch.ops.loaded_libraries and _contract(PATH) != CONTRACT:
        found = f"op contract {_contract(PATH)}, this package needs {CONTRACT}"
        return False, f"the CUDA extension is another version's build ({found}): build it again ({PATH})"
    return True, ""


@functools.cache
def has_kernel(stem):
    """Whether the extension, loaded, has the kernel of ops/<stem>.py: a build from before that kernel has not."""
    return _registered(stem)


def build_info():
    """What the extension was built with (compiler, torch headers, architectures), or None where it is not loaded, or
    where the kernels are another copy's."""
    if not load()[0] or not PATH.exists():
        return None
    # The text is inside the binary, so it cannot describe another build.
    function = ctypes.CDLL(str(PATH)).specedit_build_info
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def architectures():
    """The architectures that the extension was built for, as setup.py got them, such as "90a"; "" without one."""
    return (build_info() or "").rpartition(", sm ")[2]
