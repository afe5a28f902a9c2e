# SPDX-License-Identifier: Apache-2.0
"""bench/models on a tiny model: every kind of row runs, and what is written says what was run."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "bench" / "models"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_bench", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("flux_kontext")


@pytest.fixture(scope="module")
def qwen_bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield load("qwen_image_edit")


TINY = ("--tiny", "--device", "cpu", "--text-length", "16", "--repeat", "1")


def test_rows_of_every_kind(bench, tmp_path):
    rows = ("plain-28", "plain-4", "*-28", "inpaint*", "specedit*")
    assert bench.main([*TINY, "--out", str(tmp_path), "--areas", "0.1", "--rows", *rows]) == 0
    report = json.loads((tmp_path / "flux_kontext.json").read_text())
    assert "random weights" in report["model"] and report["versions"]["torch"]
    rows = report["rows"]
    assert set(rows) == {"plain-28", "plain-4", "first block cache-28", "taylorseer-28", "inpaint-28, 10 %",
                         "specedit-9-full, 10%", "specedit-9-full, 10% scattered", "specedit-9-locked, 10%",
                         "specedit-9-locked, 10% scattered", "specedit-9-locked-cached, 10%",
                         "specedit-9-locked-cached, 10% scattered"}  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows.values())
    edit = rows["specedit-9-locked, 10%"]
    assert edit["nfe"] == 9 and edit["fallback"] is None and edit["stages"]["mixed"] > 0
    assert 0.1 <= edit["active"] < rows["specedit-9-locked, 10% scattered"]["active"]
    assert rows["specedit-9-locked-cached, 10%"]["flops"] < edit["flops"]
    table = (tmp_path / "flux_kontext.md").read_text()
    assert "against plain-28" in table and " 1.00 x" in table


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_rows_of_qwen(qwen_bench, tmp_path, scale):
    options = ("--side", "64", "--out", str(tmp_path), "--areas", "0.1", "--true-cfg-scale", str(scale))
    assert qwen_bench.main([*TINY, *options, "--rows", "plain-4", "specedit-9-locked*"]) == 0
    report = json.loads((tmp_path / "qwen_image_edit.json").read_text())
    assert f"true_cfg_scale {scale:g}" in report["model"]
    rows = report["rows"]
    assert set(rows) == {"plain-4", "specedit-9-locked, 10%", "specedit-9-locked-cached, 10%"}
    assert rows["specedit-9-locked-cached, 10%"]["flops"] < rows["specedit-9-locked, 10%"]["flops"]


@pytest.mark.parametrize("options, words", [(["--side", "100"], "--side: expected a multiple of 64, got 100"),
                                            (["--rows", "nothing"], "--rows: none of")])
def test_bad_options(bench, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        bench.main([*TINY, "--out", str(tmp_path), *options])
    assert words in capsys.readouterr().err


def test_regions(bench):
    for share in (0.05, 0.1, 0.4, 1.0):
        for scattered in (False, True):
            mask = np.asarray(bench.region(512, share, scattered)) > 0
            assert mask.mean() == pytest.approx(share, rel=0.15)
            tokens = mask.reshape(32, 16, 32, 16)
            assert (tokens.all((1, 3)) == tokens.any((1, 3))).all()
