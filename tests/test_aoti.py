# SPDX-License-Identifier: Apache-2.0
"""examples/aoti: a block compiled ahead of time and run by a C++ program; the ops that it links."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specedit_kernels import _extension

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "aoti"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example is in a clone alone"),
    pytest.mark.skipif(sys.platform != "linux" or not all(map(shutil.which, ("cmake", "g++"))),
                       reason="needs Linux, cmake and g++"),
]  # fmt: skip


def run(*command):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # of the tests' own process
    environment.pop("SPECEDIT_BACKEND", None)
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    options = [f"-DTORCH={Path(torch.__file__).parent}"]
    # as some compilers do of themselves: a libstdc++ inside the library, beside the one of torch
    static = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip()
    if Path(static).is_absolute():
        options.append("-DCMAKE_SHARED_LINKER_FLAGS=-static-libstdc++")
    for command in (("cmake", "-S", EXAMPLE, "-B", folder, *options), ("cmake", "--build", folder)):
        code, text = run(*command)
        assert code == 0, text
    return folder


def test_ops_without_python_equal_the_reference(built):
    code, text = run(sys.executable, ROOT / "tests" / "aten_ops.py", built / "libspecedit_ops.so")
    assert code == 0, text
    assert "attention 96, rotation 36 cases" in text


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_program_without_python_runs_the_block(built, tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    code, text = run(sys.executable, EXAMPLE / "export.py", tmp_path, "--device", device)
    assert code == 0, text
    extension = ()
    if device == "cuda" and _extension.PATH.exists() and torch.cuda.get_device_capability() == (9, 0):
        extension = ("--extension", _extension.PATH)
    code, text = run(built / "run", tmp_path, "--device", device, *extension)
    assert code == 0 and "equal within" in text, text
    assert text.count("tokens: result differs by") == 4  # lengths other than the exported ones among them
    _, linked = run("ldd", built / "run")
    assert (
        "libspecedit_ops" in linked
        and "libtorch_cpu" in linked
        and "python" not in linked.lower().replace(str(Path(torch.__file__).parent).lower(), "")
    )
    # a result that differs is printed
    cases = torch.load(tmp_path / "cases.pt")
    cases[0][7] += 1
    torch.save(cases, tmp_path / "cases.pt")
    code, text = run(built / "run", tmp_path, "--device", device, *extension)
    assert code == 1 and "NOT equal" in text
    (tmp_path / "cases.pt").unlink()
    code, text = run(built / "run", tmp_path, "--device", device)
    assert code == 2 and text.strip() == f"run: {tmp_path}/cases.pt: cannot be read"
