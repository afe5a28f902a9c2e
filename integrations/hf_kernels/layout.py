# SPDX-License-Identifier: Apache-2.0
"""Lay the ops out as a repository of Hugging Face's `kernels`: `python integrations/hf_kernels/layout.py OUT [--cuda]`.

OUT/build/torch-universal                        the ops with their Triton and reference implementations: any torch
OUT/build/torch-stable-abi210-cu<v>-<machine>    with --cuda: and the CUDA extension for sm_90a, on torch's stable ABI
OUT/build.toml, OUT/csrc, OUT/torch-ext          the sources, as kernel-builder takes them

    kernels.get_local_kernel(Path(OUT)).mixed_res_attn(...)

A layout has an op namespace of its own, `_specedit_<digest of its sources>`: it and an installed specedit-kernels, or
another version of it, serve side by side in one process. It has the ops alone, no pipelines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAME = "specedit-kernels"
VERSION = 1  # of the kernel's interface, as get_kernel(..., version=1) asks for it
PACKAGE = NAME.replace("-", "_")
# What the ops are made of; all else of the package serves pipelines.
FOLDERS = {"ops": "specedit_kernels/ops", "reference": "specedit_kernels/reference", "triton_kernels": "triton_kernels"}
FILES = ("_attention_plan.py", "_extension.py", "_gguf.py", "_panels.py", "_words.py", "py.typed")
EXTENSION = "_C.abi3.so"

OPS = '''# SPDX-License-Identifier: Apache-2.0
"""The op namespace of this build: its own, so that it collides with no other copy."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(name):
    """The qualified name of an op, as torch.library takes it."""
    return f"{namespace}::{{name}}"
'''
INIT = '''# SPDX-License-Identifier: Apache-2.0
"""The ops of specedit-kernels, under an op namespace of this build."""

from . import ops as _functions
from ._ops import add_op_namespace_prefix, ops
from .ops import *  # noqa: F403

__version__ = "{version}"
__all__ = [*_functions.__all__, "add_op_namespace_prefix", "ops"]
'''


def sources() -> dict[str, bytes]:
    """{path in the package: content} of the Python files, all but the two that name the namespace."""
    found = {name: (ROOT / "specedit_kernels" / name).read_bytes() for name in FILES}
    for folder, where in FOLDERS.items():
        for path in sorted((ROOT / where).glob("*.py")):
            found[f"{folder}/{path.name}"] = path.read_bytes()
    return found


def extension_sources() -> dict[str, bytes]:
    """{path under csrc: content} of what the CUDA extension is built from."""
    paths = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
    found = {path.relative_to(ROOT / "csrc").as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if name.partition("/")[0] not in ("planner", "aten")}


def namespace_of(*parts: dict[str, bytes]) -> str:
    """The namespace of a build: sources that differ have another."""
    digest = hashlib.sha256()
    for part in parts:
        for name, content in sorted(part.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"_specedit_{digest.hexdigest()[:8]}"


def write(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def package_version() -> str:
    text = (ROOT / "specedit_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+?)"', text).group(1)


def write_package(folder: Path, python: dict[str, bytes], namespace: str) -> None:
    write(folder, python)
    (folder / "_ops.py").write_text(OPS.format(namespace=namespace), encoding="utf-8")
    (folder / "__init__.py").write_text(INIT.format(version=package_version()), encoding="utf-8")


def write_variant(folder: Path, python: dict[str, bytes], namespace: str, backend: dict) -> None:
    """A build variant: the package, what kernels knows of it, and an import under the package's name."""
    write_package(folder, python, namespace)
    about = {
        "name": NAME, "id": f"{namespace}_{backend['type']}", "version": VERSION, "license": "Apache-2.0",
        "python-depends": [], "backend": backend,
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)


def build_extension(namespace: str) -> tuple[bytes, str]:
    """(the extension for a namespace, the CUDA version of its compiler as "128"). Built by setup.py in a copy."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copytree(ROOT / "triton_kernels", copy / "triton_kernels")
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        package = copy / "specedit_kernels"
        package.mkdir()
        shutil.copy(ROOT / "specedit_kernels" / "__init__.py", package)
        (package / "_ops.py").write_text(OPS.format(namespace=namespace), encoding="utf-8")
        environment = {**os.environ, "SPECEDIT_BUILD_CUDA": "1", "SPECEDIT_BUILD_PLANNER": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
        subprocess.run(command, cwd=copy, env=environment, check=True)
        content = (copy / "built" / "specedit_kernels" / EXTENSION).read_bytes()
    return content, "".join(re.search(rb"nvcc (\d+)\.(\d+), torch ", content)[i].decode() for i in (1, 2))


def variant_of(cuda: str) -> str:
    """The name of the variant of a CUDA version, by the oldest torch whose stable ABI setup.py builds for."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    major, minor = re.search(r'TORCH_TARGET_VERSION = "0x(..)(..)', text).groups()
    system = f"{platform.machine()}-{platform.system().lower()}"
    return f"torch-stable-abi{int(major, 16)}{int(minor, 16)}-cu{cuda}-{system}"


def layout(out: Path, cuda: bool = False) -> str:
    """Write the layout; returns its op namespace. ValueError where `out` is there and is no layout of before."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "build.toml").is_file())):
        raise ValueError(f"{out}: expected a new or empty folder, or one with a layout of before")
    python, csrc = sources(), extension_sources()
    namespace = namespace_of(python, csrc)
    extension = build_extension(namespace) if cuda else None  # before anything is removed
    for name in ("build", "csrc", "torch-ext"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_variant(out / "build" / "torch-universal", python, namespace, {"type": "cpu"})
    if extension:
        folder = out / "build" / variant_of(extension[1])
        write_variant(folder, python, namespace, {"type": "cuda", "archs": ["9.0a"]})
        (folder / EXTENSION).write_bytes(extension[0])
    write(out / "csrc", csrc)
    write_package(out / "torch-ext" / PACKAGE, python, namespace)
    # kernel-builder writes an _ops.py of its own
    (out / "torch-ext" / PACKAGE / "_ops.py").unlink()
    listed = "\n".join(f'  "csrc/{name}",' for name in csrc)
    text = (HERE / "build.toml").read_text(encoding="utf-8").replace("@SOURCES@", listed)
    (out / "build.toml").write_text(text, encoding="utf-8")
    return namespace


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay the ops out for Hugging Face's kernels.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA extension too (nvcc, ninja, torch)")
    arguments = parser.parse_args()
    try:
        namespace = layout(arguments.out, arguments.cuda)
    except ValueError as error:
        parser.error(str(error))
    variants = sorted(path.name for path in (arguments.out / "build").iterdir())
    print(f"{arguments.out}: torch.ops.{namespace}, {', '.join(variants)}")


if __name__ == "__main__":
    main()
