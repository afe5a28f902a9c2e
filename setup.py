# SPDX-License-Identifier: Apache-2.0
"""Build of specedit-kernels: pure Python, plus two optional extensions that ninja builds.

specedit_kernels._C        CUDA kernels, on the limited C API and torch's stable ABI
specedit_kernels._planner  the attention's plan, and its kernels on the CPU for tests: C++ and pybind11, no CUDA

SPECEDIT_BUILD_CUDA     unset: build _C where ninja, nvcc and a CUDA torch of the same major version are found
                        1: build it or fail (a CPU-only torch will do: only its headers and libtorch.so are used)
                        0: never build it
SPECEDIT_BUILD_PLANNER  unset: build _planner where ninja, pybind11 and a C++ compiler are found; 1, 0: as above
SPECEDIT_CUDA_ARCHS     the -gencode targets, by default "90a" (a list such as "90a;80+PTX")
MAX_JOBS                how many compilers run at once, by default one for each CPU
CXX                     the C++ compiler of _planner, by default c++ or g++
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the extension may call.
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA = "specedit_kernels._C"
PLANNER = "specedit_kernels._planner"


def choice_of(variable):
    """The value of a build switch: "", "0" or "1"."""
    choice = os.environ.get(variable, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0, 1 or unset, got {choice!r}")
    return choice


def find_ninja():
    # Beside the interpreter first: the virtual environment need not be activated.
    beside = Path(sys.executable).with_name("ninja")
    if beside.exists():
        return str(beside)
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = Path(getattr(ninja, "BIN_DIR", "")) / "ninja"
        if packaged.exists():
            return str(packaged)
    return shutil.which("ninja")


def find_nvcc():
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = Path(os.environ[variable]) / "bin" / "nvcc"
            return str(candidate) if candidate.exists() else None
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if os.path.exists(default) else None)


def find_cxx():
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    return shutil.which("c++") or shutil.which("g++")


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def why_not_cuda():
    """None where the CUDA extension is to be built, else the reason why it is not."""
    choice = choice_of("SPECEDIT_BUILD_CUDA")
    if choice == "0":
        return "SPECEDIT_BUILD_CUDA=0"
    nvcc, ninja = find_nvcc(), find_ninja()
    try:
        import torch
    except ImportError:
        torch = None
    if choice == "1":
        if None in (nvcc, ninja, torch):
            raise SystemExit(
                "SPECEDIT_BUILD_CUDA=1 needs nvcc (on PATH or under CUDA_HOME), ninja and an importable torch "
                f"(pip install --no-build-isolation); found nvcc={nvcc}, ninja={ninja}, "
                f"torch={torch and torch.__version__}"
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
    if ninja is None:
        return "ninja is not found (pip install ninja)"
    return None


def why_not_planner():
    """None where the planner is to be built, else the reason why it is not."""
    choice = choice_of("SPECEDIT_BUILD_PLANNER")
    if choice == "0":
        return "SPECEDIT_BUILD_PLANNER=0"
    found = {"ninja": find_ninja(), "pybind11": importlib.util.find_spec("pybind11"), "a C++ compiler": find_cxx()}
    missing = [name for name, what in found.items() if what is None]
    if not missing and sys.platform != "linux":
        missing = ["Linux"]
    if not missing:
        return None
    if choice == "1":
        raise SystemExit(
            f"SPECEDIT_BUILD_PLANNER=1 needs ninja, pybind11, a C++ compiler and Linux; missing: {missing}"
        )
    return f"{missing[0]} is not found"


def op_namespace():
    """The op namespace of this copy of the package, from the one place that names it."""
    spec = importlib.util.spec_from_file_location("_ops", ROOT / "specedit_kernels" / "_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add_op_namespace_prefix("").removesuffix("::")


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


def cuda_commands():
    """(compile command, link command, libraries) of the CUDA extension, as lists of arguments.

    torch's own BuildExtension asks torch for CUDA's version and architectures, so it cannot run beside a CPU-only
    torch; and it would link c10_cuda and torch_cuda, which the stable ABI does not need.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    nvcc = find_nvcc()
    archs = os.environ.get("SPECEDIT_CUDA_ARCHS", "90a")
    compiler = [
        nvcc,
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-DPy_LIMITED_API=0x030a0000",
        f"-DSPECEDIT_NAMESPACE={op_namespace()}",
        f'-DSPECEDIT_BUILD_INFO="nvcc {nvcc_version(nvcc)}, torch {torch.__version__} headers, sm {archs}"',
        *gencode_flags(archs),
        *[f"-isystem={path}" for path in include_paths()],
        f"-I{ROOT / 'csrc'}",
    ]
    # libtorch.so draws in libtorch_cuda.so where torch has it, and nothing where it has not.
    torch_lib = Path(torch.__file__).parent / "lib"
    libraries = ["-Xlinker=--no-as-needed", f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
    return compiler, [nvcc, "-shared", "-cudart=static"], libraries


def planner_commands():
    """The same of the planner. The emulation's headers stand for those of CUDA and for csrc's sm90.cuh."""
    import pybind11

    cxx = shlex.split(find_cxx())
    compiler = [
        *cxx,
        "-O2",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE",  # it forbids longjmp between the stacks of fibers
        "-Wno-psabi",
        f"-I{ROOT / 'tests' / 'emulation'}",
        f"-I{ROOT / 'tests' / 'emulation' / 'cuda'}",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        pybind11.get_include(),
        "-isystem",
        sysconfig.get_path("include"),
    ]
    return compiler, [*cxx, "-shared"], []


def ninja_command(arguments):
    """Arguments as a command of a ninja file: quoted for the shell, then for ninja."""
    return " ".join(shlex.quote(argument).replace("$", "$$") for argument in arguments)


def ninja_path(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(sources, objects_dir, output, compiler, linker, libraries):
    """The text of build.ninja: an object for each source, headers tracked by dependency files, one shared library."""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {ninja_command(compiler)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {ninja_command(linker)} $in -o $out {ninja_command(libraries)}".rstrip(),
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(ninja_path(objects_dir / (source.replace("/", "_") + ".o")))
        lines.append(f"build {objects[-1]}: compile {ninja_path(ROOT / source)}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """Builds an extension with ninja: in parallel, and only what has changed."""

    def build_extension(self, ext):
        switch, commands = {
            CUDA: ("SPECEDIT_BUILD_CUDA", cuda_commands),
            PLANNER: ("SPECEDIT_BUILD_PLANNER", planner_commands),
        }[ext.name]
        try:
            self._build(ext, *commands())
        except subprocess.CalledProcessError as error:
            if os.environ.get(switch) == "1":
                raise SystemExit(f"{ext.name} did not build: {error}") from error
            self.warn(f"{ext.name} did not build and is left out: {error}")

    def _build(self, ext, compiler, linker, libraries):
        objects_dir = Path(self.build_temp).resolve() / ext.name
        if self.force:
            shutil.rmtree(objects_dir, ignore_errors=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (objects_dir / "build.ninja").write_text(
            ninja_file(ext.sources, objects_dir, output, compiler, linker, libraries), encoding="utf-8"
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run([find_ninja(), "-C", str(objects_dir), "-j", jobs], check=True)


def extensions():
    found = []
    reason = why_not_cuda()
    if reason is None:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cpp")]
        # planner is an extension of its own; aten is for programs without Python (examples/aoti)
        sources = [path for path in sources if path.parent.name not in ("planner", "aten")]
        sources = sorted(str(path.relative_to(ROOT)) for path in sources)
        found.append(Extension(CUDA, sources, py_limited_api=True, optional=True))
    else:
        print(f"specedit-kernels: building without the CUDA extension: {reason}")
    reason = why_not_planner()
    if reason is None:
        kernels = ("tests/emulation/mixed_res_attn.cpp", "tests/emulation/mixed_res_attn_fp8.cpp")
        sources = ["csrc/planner/module.cpp", *kernels]
        found.append(Extension(PLANNER, sources, optional=True))
    else:
        print(f"specedit-kernels: building without the planner: {reason}")
    return found


ext_modules = extensions()
readme = ROOT / "README.md"

setup(
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    # Under the package's own name: another distribution owns the top-level name triton_kernels.
    packages=[*find_packages(include=["specedit_kernels", "specedit_kernels.*"]), "specedit_kernels.triton_kernels"],
    package_dir={"specedit_kernels.triton_kernels": "triton_kernels"},
    # The tiny checkpoints under specedit_kernels/assets are for a clone: they stay out of the wheel. The pictures of
    # `specedit bench` are 0.3 MB.
    include_package_data=False,
    package_data={"specedit_kernels": ["py.typed", "assets/bench/*"]},
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildWithNinja},
    # One wheel for every Python from 3.10. The planner in it is for one Python; others say where it is missing.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if any(ext.name == CUDA for ext in ext_modules) else {},
    zip_safe=False,
)
