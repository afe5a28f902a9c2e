# SPDX-License-Identifier: Apache-2.0
"""The module specedit_kernels._planner, built from the sources that are tested."""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_NAME = "specedit_kernels._planner"


def cxx():
    """The C++ compiler that setup.py takes, or None."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@functools.cache
def load():
    """Builds and imports the module; skips the test where it cannot be built. ninja does nothing if nothing changed."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run from an installed package, without the sources")
    if sys.platform != "linux" or cxx() is None:
        pytest.skip("the planner needs Linux and a C++ compiler")
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None and shutil.which(package) is None:
            pytest.skip(f"the planner needs {package}")
    folder = ROOT / "build" / "planner_of_tests"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = {**os.environ, "SPECEDIT_BUILD_CUDA": "0", "SPECEDIT_BUILD_PLANNER": "1"}
    with open(folder / "lock", "w") as lock:  # test processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "specedit_kernels").glob(f"_planner.{sys.implementation.cache_tag}-*.so")
    spec = importlib.util.spec_from_file_location(_NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module
