# SPDX-License-Identifier: Apache-2.0
"""Compares the machine code of the kernels of two builds of the CUDA extension.

    python csrc/compare_sass.py before/_C.abi3.so after/_C.abi3.so [--rename OLD=NEW ...]

Prints one line for each kernel: equal, different (with the first different instruction), or in one build only. What is
compared are the instructions and their encodings, without symbol names. Kernels pair by their demangled names, template
arguments included; ``--rename`` replaces a name in those of the first build before that. The exit status is 0 where all
kernels are in both builds and equal.

cuobjdump (and nvdisasm, which it calls) comes from PATH, from CUDA_HOME, or from triton, which ships it.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuobjdump():
    """The path of cuobjdump. Raises SystemExit where there is none."""
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(0, str(Path(os.environ["CUDA_HOME"]) / "bin" / "cuobjdump"))
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise SystemExit("compare_sass.py needs cuobjdump on PATH, under CUDA_HOME or in an installed triton")


def demangle(names):
    """Mangled C++ names -> readable ones, without namespaces and without the parameter list."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"\(anonymous namespace\)::|\b\w+::", "", line).removeprefix("void ").partition("(")[0]
        for line in done.stdout.splitlines()
    ]


def kernels_of(library):
    """{(architecture, demangled name): [instruction and encoding, ...]} of a shared library."""
    cuobjdump = find_cuobjdump()
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [cuobjdump, "--dump-sass", str(library)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(f"cuobjdump could not read {library}: {done.stderr.strip()}")
    arch, code, found = "", None, {}
    for line in done.stdout.splitlines():
        line = line.strip()
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith("Function : "):
            code = found.setdefault((arch, line.removeprefix("Function : ")), [])
        elif code is not None and line.startswith("/*"):
            code.append(re.sub(r"\s+", " ", re.sub(r"`\(_Z\w+\)", "`(symbol)", line)))
    if not found:
        raise SystemExit(f"{library} has no kernels")
    readable = demangle([name for _, name in found])
    named = {(arch, name): code for ((arch, _), code), name in zip(found.items(), readable, strict=True)}
    if len(named) != len(found):
        raise SystemExit(f"{library}: two kernels have the same name without their namespaces and parameters")
    return named


def first_difference(before, after):
    """A line that says how two different instruction lists differ."""
    for number, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return f"line {number}: {old!r} / {new!r}"
    return f"{len(before)} / {len(after)} lines"


def main():
    """Compare two builds; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW")
    arguments = parser.parse_args()
    before, after = {}, kernels_of(arguments.after)
    for (arch, name), code in kernels_of(arguments.before).items():
        for rename in arguments.rename:
            old, _, new = rename.partition("=")
            name = re.sub(rf"\b{re.escape(old)}\b", new, name)
        before[arch, name] = code
    different = 0
    for arch, name in sorted(before.keys() | after.keys()):
        old, new = before.get((arch, name)), after.get((arch, name))
        if old is None or new is None:
            verdict = f"only in {arguments.after if old is None else arguments.before}"
        elif old == new:
            # cuobjdump prints an instruction and the two halves of its encoding on two lines.
            verdict = f"equal ({len(old) // 2} instructions)"
        else:
            verdict = f"different ({first_difference(old, new)})"
        different += not verdict.startswith("equal")
        print(f"{arch}  {name}: {verdict}")
    print(f"{len(before)} and {len(after)} kernels, {different} not equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
