# SPDX-License-Identifier: Apache-2.0
"""The rows of bench/kernels/fp8.py run: on a CPU, small, with no times."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

FOLDER = Path(__file__).parents[1] / "bench" / "kernels"


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def loaded():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("bench_fp8", FOLDER / "fp8.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def bench(loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    monkeypatch.setattr(loaded, "interleaved_us", lambda fns: {name: (fn(), 1.0)[1] for name, fn in fns.items()})
    monkeypatch.setattr(loaded, "ROWS", (4,))
    monkeypatch.setattr(loaded, "PROMPT", 20)
    with OnCpu(), torch.inference_mode():
        yield loaded


@pytest.mark.parametrize("kind", ["plain", "norm", "gelu", "gelu beside"])
def test_quantisation(bench, kind):
    rows = bench.quantise(kind, 4)["rows"]
    assert rows.keys() >= {"copy of as many bytes", "quantize_fp8", "torch.compile"}
    for name, row in rows.items():
        assert "failed" not in row and row["us"] == 1.0, (name, row)
    assert rows["quantize_fp8"]["error"] < 0.03


@pytest.mark.parametrize("rows", [9, 40])
def test_writes_of_kept_keys_and_values(bench, rows):
    found = bench.keep(rows, heads=2, dim=2, layers=2)["rows"]
    assert found.keys() >= {"bf16", "bf16, of an edit", "e4m3, 32 tokens a program"}
    assert "e4m3, of an edit, 32 tokens a program" in found
    for name, row in found.items():
        assert "failed" not in row and row["us"] == 1.0, (name, row)
        assert "bf16" in name or row["error"] < 0.05
