# SPDX-License-Identifier: Apache-2.0
"""Build of specedit-kernels: pure Python, plus an optional CUDA extension.

SPECEDIT_BUILD_CUDA   unset: build the extension where nvcc and a CUDA torch of the same major version are found
                      1: build it or fail (a CPU-only torch will do: only its headers and libtorch.so are used)
                      0: never build it
SPECEDIT_CUDA_ARCHS   the -gencode targets, by default "90a" (a list such as "90a;80+PTX")
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the extension may call.
TORCH_TARGET_VERSION = "0x020a000000000000"


def find_nvcc():
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = Path(os.environ[variable]) / "bin" / "nvcc"
            return str(candidate) if candidate.exists() else None
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if os.path.exists(default) else None)


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def why_not_cuda():
    """None where the extension is to be built, else the reason why it is not."""
    choice = os.environ.get("SPECEDIT_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"SPECEDIT_BUILD_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return "SPECEDIT_BUILD_CUDA=0"
    nvcc = find_nvcc()
    try:
        import torch
    except ImportError:
        torch = None
    if choice == "1":
        if nvcc is None or torch is None:
            raise SystemExit(
                "SPECEDIT_BUILD_CUDA=1 needs nvcc (on PATH or under CUDA_HOME) and an importable torch "
                f"(pip install --no-build-isolation); found nvcc={nvcc}, torch={torch and torch.__version__}"
            )
        return None
    if torch is None:
        return "torch is not importable at build time (pip install --no-build-isolation shows it the installed one)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    if nvcc is None:
        return "nvcc is neither on PATH nor under CUDA_HOME"
    if nvcc_version(nvcc).split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {nvcc_version(nvcc)} and torch's CUDA {torch.version.cuda} differ in major version"
    return None


def gencode_flags(archs):
    """'90a;80+PTX' -> -gencode flags: machine code for each, and PTX where asked for."""
    flags = []
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"\d+[af]?", number):
            raise SystemExit(f"SPECEDIT_CUDA_ARCHS must look like '90a;80+PTX', got {archs!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildCuda(build_ext):
    """Compiles each source with nvcc and links against libtorch alone.

    torch's own BuildExtension asks torch for CUDA's version and architectures, so it cannot run beside a CPU-only
    torch; and it would link c10_cuda and torch_cuda, which the stable ABI does not need.
    """

    def build_extension(self, ext):
        try:
            self._build(ext)
        except subprocess.CalledProcessError as error:
            if os.environ.get("SPECEDIT_BUILD_CUDA") == "1":
                raise SystemExit(f"the CUDA extension did not build: {error}") from error
            self.warn(f"the CUDA extension did not build and is left out: {error}")

    def _build(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths

        nvcc = find_nvcc()
        archs = os.environ.get("SPECEDIT_CUDA_ARCHS", "90a")
        compile_flags = [
            "-O3",
            "-std=c++17",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            "-DPy_LIMITED_API=0x030a0000",
            f'-DSPECEDIT_BUILD_INFO="nvcc {nvcc_version(nvcc)}, torch {torch.__version__} headers, sm {archs}"',
            *gencode_flags(archs),
            *[f"-isystem={path}" for path in include_paths()],
            f"-I{ROOT / 'csrc'}",
        ]
        objects_dir = Path(self.build_temp) / "csrc"
        headers = list((ROOT / "csrc").rglob("*.h")) + list((ROOT / "csrc").rglob("*.cuh")) + [ROOT / "setup.py"]

        def compile_one(source):
            target = objects_dir / (source.replace("/", "_") + ".o")
            newest = max(path.stat().st_mtime for path in [ROOT / source, *headers])
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                run([nvcc, *compile_flags, "-c", str(ROOT / source), "-o", str(target)])
            return str(target)

        objects_dir.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # libtorch.so draws in libtorch_cuda.so where torch has it, and nothing where it has not.
        torch_lib = Path(torch.__file__).parent / "lib"
        libraries = ["-Xlinker=--no-as-needed", f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
        run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(output), *libraries])


def run(command):
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


reason = why_not_cuda()
if reason is not None:
    print(f"specedit-kernels: building without the CUDA extension: {reason}")
sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cpp"))
extensions = [] if reason is not None else [Extension("specedit_kernels._C", sources, py_limited_api=True)]
readme = ROOT / "README.md"

setup(
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    # Under the package's own name: another distribution owns the top-level name triton_kernels.
    packages=[*find_packages(include=["specedit_kernels", "specedit_kernels.*"]), "specedit_kernels.triton_kernels"],
    package_dir={"specedit_kernels.triton_kernels": "triton_kernels"},
    package_data={"specedit_kernels": ["assets/**/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    zip_safe=False,
)
