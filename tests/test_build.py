# SPDX-License-Identifier: Apache-2.0
"""The build: what an installation contains, with and without the optional extensions; what a second build does."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import specedit_kernels
from specedit_kernels import _ops

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("specedit_kernels", "triton_kernels", "csrc", "tests", "bench", "docs", "examples", "integrations")
_PURE = {"SPECEDIT_BUILD_CUDA": "0", "SPECEDIT_BUILD_PLANNER": "0"}


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


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources without build products, so that building leaves the checkout alone."""
    copy = tmp_path_factory.mktemp("source")
    _copy_sources(copy)
    return copy


def _copy_sources(copy):
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run from an installed package, without the sources")
    copy.mkdir(exist_ok=True)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    # A development checkout links specedit_kernels/triton_kernels to the folder that setup.py maps there.
    ignore = shutil.ignore_patterns("*.so", "__pycache__", *_links(ROOT / "specedit_kernels"))
    for name in _FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore, copy_function=_copy)


def _copy(path, target):
    """Checkpoints are 70 MB: of them only the name matters."""
    if path.endswith(".safetensors"):
        Path(target).touch()
    else:
        shutil.copy2(path, target)


def _links(folder):
    return [path.name for path in folder.iterdir() if path.is_symlink()]


@pytest.fixture(scope="module")
def warnings():
    """What the builds of this module have printed, to look for setuptools' warnings."""
    return []


def _pep517(hook, source, warnings):
    """Runs a hook of the environment's own setuptools, without the optional extensions."""
    code = f"import setuptools.build_meta as backend; backend.{hook}('dist')"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=source, capture_output=True, text=True, timeout=900,
        env={**os.environ, **_PURE, "PYTHONDONTWRITEBYTECODE": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    warnings += [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]


@pytest.fixture(scope="module")
def wheel(source, warnings):
    """A wheel without the extensions."""
    _pep517("build_wheel", source, warnings)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(source, warnings):
    _pep517("build_sdist", source, warnings)
    (path,) = (source / "dist").glob("*.tar.gz")
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


def test_wheel_carries_the_license_the_version_and_the_types_mark(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(".dist-info/" in name and name.endswith("LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert re.search(r"^License.*Apache-2\.0", text, re.MULTILINE)
    assert re.search(rf"^Version: {re.escape(specedit_kernels.__version__)}$", text, re.MULTILINE)
    assert "specedit_kernels/py.typed" in names


def test_wheel_is_light(wheel):
    """The tiny checkpoints are for a clone; the bench's pictures are in it."""
    names = zipfile.ZipFile(wheel).namelist()
    found = {name for name in names if name.startswith("specedit_kernels/assets/")}
    shipped = {path.name for path in (ROOT / "specedit_kernels" / "assets" / "bench").iterdir()}
    assert found == {f"specedit_kernels/assets/bench/{name}" for name in shipped} and len(found) == 9
    assert wheel.stat().st_size < 2**20


def test_version_has_one_source():
    """The package's own; setuptools reads it from there."""
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"^version\b.*", text, re.MULTILINE) == ['version = { attr = "specedit_kernels.__version__" }']


def test_sdist_contains_what_its_tests_need(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = [path for folder in _FOLDERS for path in (source / folder).rglob("*") if path.is_file()]
    wanted += [path for path in source.iterdir() if path.is_file()]
    wanted = {str(path.relative_to(source)) for path in wanted if path.suffix not in (".pyc", ".so")}
    assert not {name for name in wanted - names if "/." not in f"/{name}"}
    assert not [name for name in names if name.endswith((".pyc", ".so", ".o"))]


def test_setuptools_gives_no_warning(wheel, sdist, warnings):
    assert not warnings


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
        cwd=source, SPECEDIT_BUILD_CUDA="", SPECEDIT_BUILD_PLANNER="0",
    )  # fmt: skip
    assert "without the CUDA extension: torch is not importable" in out
    assert "without the planner: SPECEDIT_BUILD_PLANNER=0" in out


def test_build_without_pybind11_leaves_the_planner_out(source):
    blocked = "import importlib.util as u, sys; find = u.find_spec; sys.argv = ['setup.py', '--version']; "
    blocked += "u.find_spec = lambda name, *rest: None if name == 'pybind11' else find(name, *rest); "
    command = [sys.executable, "-c", blocked + "exec(open('setup.py').read(), {'__file__': 'setup.py'})"]
    switches = {"SPECEDIT_BUILD_CUDA": "0"}
    missing = "ninja" if _ninja() is None else "pybind11"
    out = _run(*command, cwd=source, **switches, SPECEDIT_BUILD_PLANNER="")
    assert f"without the planner: {missing} is not found" in out
    forced = {**os.environ, **switches, "SPECEDIT_BUILD_PLANNER": "1"}
    done = subprocess.run(command, cwd=source, env=forced, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SPECEDIT_BUILD_PLANNER=1 needs ninja, pybind11, a C++ compiler and Linux; missing: " in done.stderr


def test_nvcc_beside_a_cpu_only_torch_does_not_try(source):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    out = _run(sys.executable, "setup.py", "--version", cwd=source, SPECEDIT_BUILD_CUDA="")
    assert "CPU-only" in out


@pytest.mark.parametrize("switch", ["SPECEDIT_BUILD_CUDA", "SPECEDIT_BUILD_PLANNER"])
def test_unknown_build_choice_is_refused(source, switch):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=source, env={**os.environ, **_PURE, switch: "maybe"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"{switch} must be 0, 1 or unset, got 'maybe'" in done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of one build of the extension and of the sources it is made of, for all test processes of a run."""
    if _nvcc() is None or _ninja() is None:
        pytest.skip("needs nvcc and ninja")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    with _alone(folder):
        if not (folder / "done").exists():
            # what a build that failed in another process has left
            shutil.rmtree(folder / "source", ignore_errors=True)
            _copy_sources(folder / "source")
            _build(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def extension(compiled):
    """The extension, compiled into a temporary folder."""
    return compiled / "specedit_kernels" / "_C.abi3.so"


@contextlib.contextmanager
def _alone(folder):
    """No other test process is in a block of the same folder. The lock of one that ended is free."""
    import fcntl

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder):
    command = ["build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    switches = dict(SPECEDIT_BUILD_CUDA="1", SPECEDIT_BUILD_PLANNER="0")
    return _run(sys.executable, "setup.py", *command, cwd=folder / "source", **switches)


def _ninja():
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def test_second_build_does_nothing(compiled, extension):
    with _alone(compiled):
        before = extension.stat().st_mtime_ns
        out = _build(compiled)
        assert "no work to do" in out
        assert extension.stat().st_mtime_ns == before


def test_changed_header_rebuilds_its_units_alone(compiled):
    """What ninja would do, without doing it."""
    header = compiled / "source" / "csrc" / "select_tokens" / "select_tokens.h"
    with _alone(compiled):
        before = header.stat()
        try:
            os.utime(header)
            plan = _run(_ninja(), "-n", "-C", compiled / "objects" / "specedit_kernels._C", cwd=compiled)
        finally:
            os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    units = set(re.findall(r"compile \S*/csrc/(\S+)", plan))
    assert units == {"registration.cpp", "select_tokens/select_tokens.cu"}
    assert "link " in plan


def test_builds_compare_by_their_machine_code(extension, monkeypatch, capsys):
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt")
    spec = importlib.util.spec_from_file_location("compare_sass", ROOT / "csrc" / "compare_sass.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        found = script.kernels_of(extension)
    except SystemExit as error:
        if "needs cuobjdump" in str(error):
            pytest.skip("needs cuobjdump")
        raise
    # both builds of both runs are this one: it is disassembled once, which takes long
    monkeypatch.setattr(script, "kernels_of", lambda path: found)
    monkeypatch.setattr(sys, "argv", ["compare_sass.py", str(extension), str(extension)])
    assert script.main() == 0
    text = capsys.readouterr().out
    assert re.search(r"mixed_res_attn_kernel<__half, 64, true>: equal \(\d{4,} instructions\)", text)
    assert ", 0 not equal" in text
    sys.argv += ["--rename", "gather_kv_kernel=other"]
    assert script.main() == 1
    assert "other: only in " in capsys.readouterr().out


def test_extension_registers_in_the_namespace_that_setup_passes(compiled, tmp_path):
    """A copy of the package with another namespace can have an extension of its own: one macro names it."""
    folder = compiled / "objects" / "specedit_kernels._C"
    commands = _run(_ninja(), "-C", folder, "-t", "commands", cwd="/").splitlines()
    (command,) = (line for line in commands if "registration.cpp.o.d" in line)
    name = _ops.add_op_namespace_prefix("").removesuffix("::")
    assert f" -DSPECEDIT_NAMESPACE={name} " in command
    command = command.replace(f"SPECEDIT_NAMESPACE={name} ", "SPECEDIT_NAMESPACE=another_namespace ")
    command = re.sub(r"-MF \S+", f"-MF {tmp_path / 'o.d'}", re.sub(r"-o \S+$", f"-o {tmp_path / 'o'}", command))
    _run("sh", "-c", command, cwd=folder)
    assert b"\0another_namespace\0" in (tmp_path / "o").read_bytes()


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
    # some builds of nm leave the version out
    foreign = {name for name in foreign if not versioned.match(name) and name not in weak}
    foreign = {name for name in foreign if not name.startswith(("_ZNSt", "_ZNKSt", "_ZSt"))}
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
assert _extension._contract(_extension.PATH) == _extension.CONTRACT
for op in ("token_discrepancy_csrc", "select_tokens_csrc", "mixed_res_attn_csrc", "mixed_res_attn_fp8_csrc"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"specedit::{op}", "CUDA")
"""
    _run(sys.executable, "-c", code, extension, cwd=ROOT)
