# SPDX-License-Identifier: Apache-2.0
"""The doctor tells what the dispatch would do."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from specedit_kernels import _extension, ops
from specedit_kernels.cli import doctor
from specedit_kernels.cli.text import UserError
from specedit_kernels.ops import _backends


@pytest.fixture(autouse=True)
def _no_backend_forced(monkeypatch):
    monkeypatch.delenv("SPECEDIT_BACKEND", raising=False)


def test_every_op_has_the_backend_that_dispatch_chooses(device):
    facts = doctor.collect()
    assert set(facts["ops"]) == set(ops.names())
    for op, served in facts["ops"].items():
        assert served == ops.backend_of(op, device)


@pytest.mark.parametrize("forced", ["", "reference", "cuda", "quantize_fp8=triton,merge_attn=reference"])
def test_one_screen(monkeypatch, device, forced):
    """Every op once, under its backend and the reason."""
    monkeypatch.setenv("SPECEDIT_BACKEND", forced)
    facts, lines = doctor.collect(), doctor.report().splitlines()
    assert len(lines) <= 40
    for name in ("python", "torch", "triton", "diffusers", "device", "CUDA extension"):
        assert any(line.startswith(name) for line in lines), name
    assert any(torch.__version__ in line for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("backend "))
    found, heading = {}, None
    for line in lines[start + 1 : lines.index("", start)]:
        if not line.startswith(" "):
            heading = line.split(maxsplit=1)
            continue
        for op in line.strip().rstrip(",").split(", "):
            assert op not in found
            found[op] = heading
    assert set(found) == set(ops.names())
    for op, (backend, reason) in facts["ops"].items():
        assert found[op][0] == backend
        assert found[op][1] == (reason.replace(f"serve {op}:", "serve these:") or "the fastest there is")


def test_forced_backend_is_named(monkeypatch):
    monkeypatch.setenv("SPECEDIT_BACKEND", "reference")
    facts = doctor.collect()
    assert all(backend == "reference" and "SPECEDIT_BACKEND" in reason for backend, reason in facts["ops"].values())
    assert "SPECEDIT_BACKEND" in doctor.report()


@pytest.mark.parametrize("forced", ["cuda", "fastest"])
def test_forced_backend_that_cannot_serve_says_why(monkeypatch, forced):
    monkeypatch.setenv("SPECEDIT_BACKEND", forced)
    backend, reason = doctor.collect()["ops"]["gather_tokens"]
    assert backend == "none"
    assert forced in reason


def test_says_why_the_extension_is_not_loaded(monkeypatch, tmp_path):
    absent = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(_extension, "PATH", absent)
    _extension.load.cache_clear()
    try:
        assert "not built" in doctor.collect()["extension"]
        absent.write_bytes(b"no library")
        monkeypatch.setattr(_extension, "_registered", lambda: False)  # by an earlier test
        _extension.load.cache_clear()
        assert "does not load" in doctor.collect()["extension"]
        assert _extension.build_info() is None
    finally:
        monkeypatch.undo()
        _extension.load.cache_clear()


def test_an_extension_of_another_contract_is_refused(monkeypatch, tmp_path):
    """Its kernels have the names of this version's, and would read the same arguments another way."""
    source = (Path(__file__).parents[1] / "csrc" / "registration.cpp").read_text(encoding="utf-8")
    assert f"constexpr int kContract = {_extension.CONTRACT};" in source
    assert _extension._contract(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so") == 1  # no number in it
    path = tmp_path / "_C.abi3.so"
    path.touch()
    monkeypatch.setattr(_extension, "PATH", path)
    monkeypatch.setattr(_extension, "_registered", lambda: True)
    loaded = torch.ops.loaded_libraries | {os.path.realpath(path)}
    monkeypatch.setattr(torch.ops, "loaded_libraries", loaded)
    monkeypatch.setattr(_backends, "_capability", lambda index: (9, 0))
    try:
        for contract in (1, _extension.CONTRACT + 1, _extension.CONTRACT):
            monkeypatch.setattr(_extension, "_contract", lambda path: contract)
            _extension.load.cache_clear()
            found, reason = _extension.load()
            assert found == (contract == _extension.CONTRACT)
            if not found:
                assert f"op contract {contract}, this package needs {_extension.CONTRACT}): build it again" in reason
                assert "\n" not in reason and str(path) in reason
                assert _backends.choose("mixed_res_attn", torch.device("cuda", 0)) == ("triton", reason)
    finally:
        monkeypatch.undo()
        _extension.load.cache_clear()


@pytest.mark.slow
def test_runs_where_triton_and_diffusers_cannot_be_imported():
    code = (
        "import sys\n"
        "for name in ('triton', 'diffusers', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from specedit_kernels.cli import doctor\n"
        "print(doctor.report())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "token_discrepancy" in done.stdout


def test_the_models_and_their_pipelines():
    pytest.importorskip("diffusers")
    from specedit_kernels import supported_models

    assert doctor.collect()["models"] == {name: ", ".join(kinds) for name, kinds in supported_models().items()}
    assert "FluxKontextPipeline" in doctor.report()


def test_the_plan_of_a_call(monkeypatch):
    """From the planner where there is one; else a line that says so."""
    with pytest.raises(UserError, match="--plan: "):
        doctor.plan("no numbers")
    planner = types.SimpleNamespace(describe=lambda text: f"plan of {text}")
    monkeypatch.setitem(sys.modules, "specedit_kernels._attention_plan", planner)
    assert doctor.plan("922x8704") == "plan of 922x8704"


def test_the_runner_of_a_model_and_why_no_faster_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from tiny_models import tiny_pipeline

    from specedit_kernels.cli import main

    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--model", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == "runner  eager (no faster one: graphs need a CUDA device)\n"
    with pytest.raises(UserError, match="no such model folder"):
        doctor.runner(tmp_path / "nothing")
