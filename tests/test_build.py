# SPDX-License-Identifier: Apache-2.0
"""The build: what an installation contains, with and without the CUDA extension."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _nvcc():
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources without build products, so that building leaves the checkout alone."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run from an installed package, without the sources")
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    if (ROOT / "README.md").exists():
        shutil.copy(ROOT / "README.md", copy)
    for name in ("specedit_kernels", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    """A wheel without the extension, built by the environment's own setuptools."""
    code = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    _run(sys.executable, "-c", code, cwd=source, SPECEDIT_BUILD_CUDA="0")
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_pure_wheel_is_for_every_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_leaves_the_name_triton_kernels_free(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"specedit_kernels"}
    for stem in ("token_discrepancy", "select_tokens", "gather_tokens", "scatter_tokens"):
        assert f"specedit_kernels/triton_kernels/{stem}.py" in names
        assert f"specedit_kernels/ops/{stem}.py" in names


def test_wheel_carries_the_license_and_the_assets(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(".dist-info/" in name and name.endswith("LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    assert re.search(r"^License.*Apache-2\.0", archive.read(metadata).decode(), re.MULTILINE)
    assets = ROOT / "specedit_kernels" / "assets"
    for path in assets.rglob("*") if assets.exists() else ():
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names


def test_installed_package_works_without_triton(wheel, tmp_path):
    """In a fresh process that sees the unpacked wheel and not the checkout, with triton blocked."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = None
import torch, specedit_kernels, specedit_kernels.triton_kernels
assert specedit_kernels.__file__.startswith(sys.argv[1]), specedit_kernels.__file__
assert specedit_kernels.triton_kernels.__file__.startswith(sys.argv[1])
mine = importlib.util.find_spec("triton_kernels")
assert mine is None or not mine.origin.startswith(sys.argv[1]), mine
x = torch.arange(12.0).view(1, 4, 3)
index = torch.tensor([[2, -1, 0]], dtype=torch.int32)
assert torch.ops.specedit.gather_tokens(x, index, 3)[0].tolist() == [[6, 7, 8], [0, 0, 0], [0, 1, 2]]
"""
    _run(sys.executable, "-c", code, tmp_path, cwd=tmp_path)


def test_checkout_finds_its_kernels_under_the_package():
    """An editable installation maps the folder triton_kernels/ into the package."""
    from specedit_kernels import triton_kernels

    assert triton_kernels.__name__ == "specedit_kernels.triton_kernels"


def test_isolated_build_without_torch_is_pure(source, tmp_path):
    """setup.py does not need torch: a build that cannot import it says so and goes on."""
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    out = _run(
        sys.executable, "-c", blocked + "exec(open('setup.py').read(), {'__file__': 'setup.py'})",
        cwd=source, SPECEDIT_BUILD_CUDA="",
    )  # fmt: skip
    assert "without the CUDA extension: torch is not importable" in out


def test_nvcc_beside_a_cpu_only_torch_does_not_try(source):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    out = _run(sys.executable, "setup.py", "--version", cwd=source, SPECEDIT_BUILD_CUDA="")
    assert "CPU-only" in out


def test_unknown_build_choice_is_refused(source):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=source, env={**os.environ, "SPECEDIT_BUILD_CUDA": "maybe"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "SPECEDIT_BUILD_CUDA must be 0, 1 or unset, got 'maybe'" in done.stderr


@pytest.fixture(scope="module")
def extension(source, tmp_path_factory):
    """The extension, compiled into a temporary folder."""
    if _nvcc() is None:
        pytest.skip("nvcc is not installed")
    target = tmp_path_factory.mktemp("extension")
    _run(
        sys.executable, "setup.py", "build_ext", "--build-lib", target, "--build-temp", target / "objects",
        cwd=source, SPECEDIT_BUILD_CUDA="1",
    )  # fmt: skip
    return target / "specedit_kernels" / "_C.abi3.so"


def test_extension_needs_the_stable_abi_alone(extension):
    """Every undefined symbol is torch's C shim, the C or C++ runtime's: nothing ties the file to one torch."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    undefined = re.findall(r"^\s+([Uw]) (\S+)", _run("nm", "-D", "--undefined-only", extension, cwd="/"), re.MULTILINE)
    names = {name for _, name in undefined}
    assert any(name.startswith("torch_library_impl") for name in names)
    versioned = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}
    foreign = {name for name in names if not re.match(r"(aoti_torch|torch)_\w+$", name)}
    foreign = {name for name in foreign if not versioned.match(name) and name not in weak}
    assert not foreign
    # libtorch_cuda's symbols must be weak, or the file would not load beside a CPU-only torch.
    strong = {name for kind, name in undefined if kind == "U"}
    assert not {name for name in strong if "cuda" in name} - {"aoti_torch_device_type_cuda"}


def test_extension_loads_and_registers_its_kernels(extension):
    """In a fresh process, whatever torch this is; the kernels themselves need a GPU."""
    code = """
import pathlib, sys
from specedit_kernels import _extension
_extension.PATH = pathlib.Path(sys.argv[1])
_extension.load.cache_clear()
import torch, specedit_kernels
assert _extension.load() == (True, ""), _extension.load()
assert "nvcc" in _extension.build_info()
for op in ("token_discrepancy_csrc", "select_tokens_csrc", "mixed_res_attn_csrc"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"specedit::{op}", "CUDA")
"""
    _run(sys.executable, "-c", code, extension, cwd=ROOT)
