# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the device, the backends that can run on it, poisoned memory.

Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import subprocess
from pathlib import Path

# Threads of this process and of those that it starts. Test processes share the cores: two of them with two threads each
# wait for one another, which takes more than twice the time.
THREADS = max(1, min(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import support_matrix

from specedit_kernels import _extension

torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _the_package_logs():
    """Each test finds the package's logger as it is on import, whatever a command in this process made of it."""
    logger = logging.getLogger("specedit_kernels")
    logger.setLevel(logging.NOTSET)
    logger.propagate, logger.disabled = True, False
    logging.disable(logging.NOTSET)
    yield


@pytest.fixture(autouse=True)
def _fp32_products():
    """Each test multiplies fp32 in fp32: a script of bench/quality that an earlier one ran in this process asks for
    TF32."""
    torch.set_float32_matmul_precision("highest")
    yield


def _backends():
    found = ["reference"]
    try:
        import triton  # noqa: F401

        found.append("triton")
    except ImportError:
        pass
    if torch.cuda.is_available() and _extension.load()[0] and torch.cuda.get_device_capability() == (9, 0):
        found.append("cuda")
    return found


BACKENDS = _backends()
WITH_CSRC = ("token_discrepancy", "select_tokens", "mixed_res_attn", "mixed_res_attn_fp8")


def pytest_generate_tests(metafunc):
    """A test that takes ``backend`` runs once for each backend that its file's op has on this machine."""
    if "backend" in metafunc.fixturenames:
        stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
        names = [name for name in BACKENDS if name != "cuda" or stem in WITH_CSRC]
        metafunc.parametrize("backend", names, indirect=True)


def pytest_addoption(parser):
    parser.addoption("--matrix", metavar="FILE", help="write what the tests marked `proves` say: a JSON, for the page")


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is no CUDA device. What a test proves goes with its report."""
    for item in items:
        marks = [(mark.args, mark.kwargs) for mark in item.iter_markers("proves")]
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        item.user_properties += [("proves", proof) for proof in support_matrix.proofs_of(marks, values)]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Matrix:
    """Gathers the reports of tests that prove a feature of a model, in the process that has all of them."""

    def __init__(self, config):
        self.config, self.outcomes = config, []

    def pytest_runtest_logreport(self, report):
        # of a setup that failed or skipped there is no call
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            test = report.nodeid.partition("[")[0].rpartition("tests/")[2]
            said = [proof for name, proof in report.user_properties if name == "proves"]
            self.outcomes += [{**proof, "outcome": report.outcome, "test": test} for proof in said]

    def pytest_sessionfinish(self):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        root = Path(__file__).resolve().parents[1]
        asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        content = {
            "device": device, "commit": commit or "unknown", "date": datetime.date.today().isoformat(),
            "command": f"python -m pytest tests -m {self.config.option.markexpr!r}",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
            "models": support_matrix.collected(self.outcomes),
        }  # fmt: skip
        Path(self.config.getoption("matrix")).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pytest_configure(config):
    if config.getoption("matrix") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(config))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def backend(request, monkeypatch):
    """Forces one backend for the ops that the test calls."""
    monkeypatch.setenv("SPECEDIT_BACKEND", request.param)
    return request.param


@pytest.fixture
def one_thread():
    """Tiny models are faster on one thread than on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_interpreted_bf16(request):
    """Skips what the interpreter cannot do: matrix products of bfloat16."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    interpreted = params.get("backend") == "triton" and not torch.cuda.is_available()
    if interpreted and params.get("dtype") is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16; float16 covers the 16-bit path there")


@pytest.fixture
def poison():
    """Uninitialised memory reads as NaN (largest integer): an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def random():
    """A generator function of seeded normal tensors, made on the CPU so that every device sees the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32, device="cpu"):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return normal


@pytest.fixture
def integers():
    """A generator function of seeded integers."""
    generator = torch.Generator().manual_seed(1)

    def uniform(low, high, shape, device="cpu", dtype=torch.int32):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(device)

    return uniform
