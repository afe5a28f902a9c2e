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


ENDS = ("", " fp8", " fp8-products")
TINY = ("--tiny", "--device", "cpu", "--text-length", "16", "--repeat", "1")


def test_few_steps_are_held_against_as_many_compiled_ones(bench):
    edits = {f"{name} graph, {area}%": {"seconds": 1.0} for name in bench.FEW_STEPS for area in ("6.4", "15.9", "35.4")}
    found = bench.bars(edits | {"compiled plain-8": {"seconds": 3.0}})
    assert {what: (x["bar"], x["met"]) for what, x in found.items()} == {
        "preset 8 graph, 6.4%: times as fast as compiled plain-8": (3.5, False),
        "preset 8 graph, 15.9%: times as fast as compiled plain-8": (2.59, True),
        "preset 8 graph, 35.4%: times as fast as compiled plain-8": (1.67, True),
    }


@pytest.mark.slow
def test_rows_of_every_kind(bench, tmp_path, one_thread):
    kinds = ("full", "full-cached", "locked", "locked-kv2", "locked-kv3", "locked-cached", "locked-bracket",
             "locked-cached-fp8", "locked-cached-fp8-precision", "locked-cached-fp8-products")  # fmt: skip
    kinds = [f"specedit-9-{kind}" for kind in kinds]
    tiers = [[f"quality {quality}{end}" for quality in ("fast", "balanced", "best")] for end in ENDS]
    kinds += [*tiers[0], "preset 8", "preset 8 cached", "preset 4", "preset 4 cached", *tiers[1], *tiers[2]]
    edits = []
    for runner in ("eager", "fused"):
        edits += [f"{kind} {runner}{place}, 10%" for kind in kinds for place in ("", " scattered")]
        edits += [f"specedit-9-locked-cached {runner}, 10%, {text} text tokens" for text in (128, 256)]
    edits += ["steps 3+3 half lt drafted fp8 fused, 10%"]  # of the many kinds of steps one
    rows = ("plain-28", "plain-4", "*-28", "inpaint*", "active*", "decode*", *edits)
    options = ("--out", str(tmp_path), "--areas", "0.1", "--runners", "eager", "fused", "--rows", *rows)
    options += ("--profile", "decode")
    assert bench.main([*TINY, *options]) == 0
    report = json.loads((tmp_path / "flux_kontext.json").read_text())
    assert "random weights" in report["model"] and report["versions"]["torch"]
    rows = report["rows"]
    # in the order asked for
    assert list(rows)[:3] == ["plain-28", "plain-4", "first block cache-28"] and list(rows)[-len(edits) :] == edits
    assert set(rows) - set(edits) == {
        "plain-28", "plain-4", "first block cache-28", "taylorseer-28", "inpaint-28, 10 %", "active step fused",
        "active step fused, products in fp8",
        "decode", "decode, fused norms",
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["quality fast fused, 10%"]["nfe"] == rows[edits[-1]]["nfe"] == 6
    edit = rows["specedit-9-locked eager, 10%"]
    assert edit["nfe"] == 9 and edit["fallback"] is None and edit["stages"]["mixed"] > 0
    assert 0.1 <= edit["active"] < rows["specedit-9-locked eager scattered, 10%"]["active"]
    assert rows["specedit-9-locked-cached eager, 10%"]["flops"] < edit["flops"]
    fused = rows["specedit-9-locked-cached fused, 10%"]
    assert (fused["runner"], fused["active"], fused["nfe"]) == ("fused", edit["active"], 9)
    # 16 text and 6 of 64 image tokens, over all of them and of the condition, in 2 blocks of width 32
    step = rows["active step fused"]
    assert step["flops"] == 2 * (24 * 32**2 * 22 + 4 * 32 * 22 * 144) and step["of_roofline"] > 1
    table = (tmp_path / "flux_kontext.md").read_text()
    assert "against plain-28" in table and " 1.00 x" in table
    bar = {"value": step["of_roofline"], "bar": 1.25, "met": False}
    assert report["bars"]["active step fused: of its roofline"] == bar
    assert set(report["bars"]) == {f"active step fused{x}: of its roofline" for x in ("", ", products in fp8")}
    profile = (tmp_path / "profile decode.txt").read_text().splitlines()
    assert "convolution" in "".join(profile[2:]) and float(profile[0].split()[0]) == pytest.approx(
        1e3 * rows["decode"]["profiled_seconds"], abs=1e-3
    )
    (tmp_path / "flux_kontext.md").unlink()
    assert bench.main(["--out", str(tmp_path), "--draw"]) == 0
    assert (tmp_path / "flux_kontext.md").read_text() == table


def test_bars(bench):
    rows = {bench.EDITS[0]: {"seconds": 0.5}, "plain-50": {"seconds": 11.0}, "compiled plain-28": {"error": "none"},
            "plain-28": {"seconds": 5.0}, "active step graph": {"seconds": 0.03, "of_roofline": 1.2}}  # fmt: skip
    found = [(x["value"], x["bar"], x["met"]) for x in bench.bars(rows).values()]
    assert found == [(22.0, 20.0, True), (10.0, 11.0, False), (1.2, 1.25, True)]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_rows_of_qwen(qwen_bench, tmp_path, scale):
    options = ("--side", "64", "--out", str(tmp_path), "--areas", "0.1", "--true-cfg-scale", str(scale))
    options += ("--runners", "eager", "fused")
    end = ", locked text, unguided draft"
    kinds = [f"specedit-9-locked{x}" for x in ("", "-cached", "-cached, locked text", "-cached" + end)]
    kinds += [f"quality {quality}{x}" for quality in ("fast", "balanced", "best") for x in ("", end)]
    kinds += ["quality best fp8", "steps 4+5 ck lt kv 3, unguided draft, ct fp8"]
    chosen = [f"{kind} {runner}{x}" for kind in kinds for runner, x in (("eager", ", 10%"), ("fused", ",*"))]
    options += ("--rows", "plain-9 fused", "plain-4", *chosen)
    assert qwen_bench.main([*TINY, *options]) == 0
    report = json.loads((tmp_path / "qwen_image_edit.json").read_text())
    assert f"true_cfg_scale {scale:g}" in report["model"]
    rows = report["rows"]
    flops = []
    for kind in kinds:
        eager, fused = (rows.pop(f"{kind} {runner}, 10%") for runner in ("eager", "fused"))
        assert (eager["runner"], fused["runner"]) == ("eager", "fused") and eager["flops"] == fused["flops"]
        flops.append(eager["flops"])
        if scale > 1:
            assert rows.pop(f"{kind} fused, branches apart, 10%")["flops"] == eager["flops"]
    assert list(rows) == ["plain-9 fused", "plain-4"] and rows["plain-9 fused"]["nfe"] == 9
    assert flops[:3] == sorted(flops[:3], reverse=True) and (flops[3] < flops[2]) == (scale > 1)
    best, fp8 = (flops[kinds.index(f"quality best{x}")] for x in ("", " fp8"))
    assert fp8 == best


@pytest.mark.parametrize(
    "options, words",
    [(["--side", "100"], "--side: expected a multiple of 64, got 100"), (["--rows", "nothing"], "--rows: none of")],
)
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


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_flash_edit_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("flash_edit")
    options = ("--runners", "fused", "--source-length", "8", "--steps", "2")
    assert bench.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "flash_edit.json").read_text())
    assert {name: row["nfe"] for name, row in report["rows"].items()} == {
        **{f"flash fused, 10 %{kind}": 1 for kind in (
            "", ", drafted", ", no cosi", ", drafted, no ssca", ", no bg_shield", ", fp8", ", fp8, drafted", ", merged",
            ", merged, drafted")},
        "inversion-2+2 eager": 2, "inversion-2+2 eager, both branches": 2,
    }  # fmt: skip
    stages = {name: list(row["stages"]) for name, row in report["rows"].items()}
    assert stages["flash fused, 10 %"] == ["encode", "select", "invert", "edit", "decode"]
    assert stages["flash fused, 10 %, drafted"] == ["encode", "draft", "select", "invert", "edit", "decode"]
    assert report["rows"]["flash fused, 10 %, merged"]["merged_bytes"] > 0
    assert "against the inversion" in (tmp_path / "flash_edit.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_rows_of_conditions(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    conditions = importlib.import_module("conditions")
    rows = ("bf16 fused", "lora 16", "layerwise fp8", "model offload", "16 GiB card, bitsandbytes nf4", "batch of two",
            "callbacks", "four threads", "day")  # fmt: skip
    options = ("--edits", "4", "--rows", *rows, "--out", str(tmp_path))
    assert conditions.main([*TINY, *options]) == 0
    report = json.loads((tmp_path / "conditions.json").read_text())["rows"]
    assert tuple(report) == rows and "needs a CUDA device" in report.pop("16 GiB card, bitsandbytes nf4")["error"]
    assert report["bf16 fused"]["runner"] == "fused" and report["bf16 fused"]["applied"] == 0
    assert report["lora 16"]["applied"] > 1e-3 and report["layerwise fp8"]["applied"] > 1e-3
    assert report["model offload"]["applied"] < 1e-3 and report["four threads"]["wrong"] == []
    assert report["day"]["edits"] == 4 and report["day"]["stale"] == []
    assert all(row["right"] for row in report.values()), report
    assert report["batch of two"]["apart"] < 1e-4 and report["callbacks"]["applied"] > 1e-3
    assert "graphs need a CUDA device" in (tmp_path / "conditions.md").read_text()


@pytest.mark.slow
def test_a_condition_that_is_left_out_is_wrong(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    conditions = importlib.import_module("conditions")
    monkeypatch.setitem(conditions.CONDITIONS, "layerwise fp8", lambda pipe: None)
    options = ("--rows", "bf16 eager", "layerwise fp8", "--out", str(tmp_path))
    assert conditions.main([*TINY, *options]) == 0
    rows = json.loads((tmp_path / "conditions.json").read_text())["rows"]
    assert rows["bf16 eager"]["right"] and not rows["layerwise fp8"]["right"]
    assert "WRONG graphs need" in (tmp_path / "conditions.md").read_text()
    assert conditions.main([*TINY, *options, "--limit", "0"]) == 0  # none is begun
    rows = json.loads((tmp_path / "conditions.json").read_text())["rows"]
    assert all("not begun" in row["error"] for row in rows.values())


@pytest.fixture(scope="module")
def native_bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load("native")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_rows_of_large_pictures(native_bench, tmp_path):
    options = ("--out", str(tmp_path), "--areas", "--sizes", "2", "--patience", "0", "--side", "64")
    assert native_bench.main([*TINY, *options]) == 0
    report = json.loads((tmp_path / "native.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["edit", "256 x 192, 5 %, native", "256 x 192, 5 %, working", "128 x 96, 20 %, native"]
    large, plain = rows["256 x 192, 5 %, native"], rows["256 x 192, 5 %, working"]
    assert large["passes"] >= 1 and large["stages"]["native"] > 0 and "native" not in plain["stages"]
    assert large["flops"] > plain["flops"] and large["nfe"] == plain["nfe"] == 9
    assert (
        report["bars"]["256 x 192, 5 %, native: times the edit"]["value"] == large["seconds"] / rows["edit"]["seconds"]
    )
    assert "times the edit" in (tmp_path / "native.md").read_text()


def test_bars_of_large_pictures(native_bench):
    large, small = (4096, 3072), (2048, 1536)
    cases = ((large, 0.05, 1.4, 1.0), (large, 0.025, 1.0, 0.6), (small, 0.1, 0.9, 0.4))
    rows = {"edit": {"seconds": 0.5}}
    for size, share, seconds, spent in cases:
        rows[native_bench.named(size, share, "native")] = {
            "seconds": seconds, "stages": {"native": spent}, "picture": size, "passes": 2,
            "pixels": share * size[0] * size[1] / 1e6, "peak_bytes": 41 * 2**30,
        }  # fmt: skip
    found = [(round(x["value"], 3), x["bar"], x["met"]) for x in native_bench.bars(rows, large).values()]
    assert found == [(2.8, 3.0, True), (41.0, 40.0, False), (1.5, 1.3, False)]
