# SPDX-License-Identifier: Apache-2.0
"""The measures of bench/quality's table on small cases made by hand, its rows on a pipeline of random weights."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "quality"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import calibrate
import contact_sheet
import selection
import table
import table_measures as measures
import table_runs as runs
from tiny_models import tiny_pipeline

from specedit_kernels import SpecEditConfig, ops
from specedit_kernels.engine import stages
from specedit_kernels.sampling.grid import from_blocks, to_blocks


def tokens(*cells, side=4):
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    for row, column in cells:
        mask[0, row, column] = True
    return mask


def test_psnr_counts_the_mask_alone():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[..., :2, :] = 0.1
    top = torch.zeros(1, 4, 4, dtype=torch.bool)
    top[:, :2] = True
    assert measures.masked_psnr(a, b, top).item() == pytest.approx(20.0, abs=1e-4)
    assert measures.masked_psnr(a, b, torch.ones_like(top)).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert measures.masked_psnr(a, b, ~top).item() == pytest.approx(100.0)
    assert measures.masked_psnr(a, b, torch.zeros_like(top)).isnan().all()


def test_sharpness_is_the_gradient_energy():
    step = torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 0.5  # one edge of .5 in each of the 4 rows
    everywhere = torch.ones(1, 4, 4, dtype=torch.bool)
    assert measures.sharpness(step, everywhere).item() == pytest.approx(4 * 0.25 / 16, rel=1e-5)
    assert measures.sharpness(step * 0.5, everywhere).item() == pytest.approx(4 * 0.0625 / 16, rel=1e-5)
    left = everywhere.clone()
    left[..., 1:] = False
    assert measures.sharpness(step, left).item() == 0


def test_recall_and_precision():
    selected, reference = tokens((0, 0), (0, 1), (3, 3)), tokens((0, 0), (0, 1), (1, 0), (1, 1))
    recall, precision = measures.recall_precision(selected, reference)
    assert (recall.item(), precision.item()) == (0.5, pytest.approx(2 / 3))
    assert measures.recall_precision(tokens((0, 0)), tokens())[0].isnan().all()
    assert measures.recall_precision(tokens(), tokens((0, 0)))[1].isnan().all()


@pytest.mark.parametrize(
    "scores, expected",
    [
        ((0.9, 0.8, 0.2, 0.1), 1.0),
        ((0.1, 0.2, 0.8, 0.9), 0.0),
        ((0.5, 0.5, 0.5, 0.5), 0.5),
        ((0.9, 0.2, 0.2, 0.1), 0.875),
    ],
)
def test_area_under_curve(scores, expected):
    reference = torch.tensor([[[True, True], [False, False]]])
    assert measures.area_under_curve(torch.tensor(scores).view(1, 2, 2), reference).item() == pytest.approx(expected)


def test_area_under_curve_against_all_pairs():
    g = torch.Generator().manual_seed(0)
    scores = (torch.rand(3, 8, 8, generator=g) * 20).round() / 20  # with ties
    reference = torch.rand(3, 8, 8, generator=g) < 0.3
    for s, r, found in zip(scores, reference, measures.area_under_curve(scores, reference)):
        inside, outside = s[r][:, None], s[~r][None]
        expected = ((inside > outside).double() + 0.5 * (inside == outside).double()).mean()
        assert found.item() == pytest.approx(expected.item())


def test_area_under_curve_without_two_sides():
    scores = torch.rand(1, 2, 2)
    assert measures.area_under_curve(scores, torch.ones(1, 2, 2, dtype=torch.bool)).isnan().all()
    assert measures.area_under_curve(scores, torch.zeros(1, 2, 2, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize("dilation", [0, 1, 2])
def test_effective_scores_select_what_a_run_selects(dilation):
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 8, 12, generator=g)
    scores[1, 3, 4] = math.nan
    for threshold in (0.5, 0.9, 0.98):
        mask, _, _ = ops.select_tokens(scores.flatten(1), (8, 12), threshold, dilation, 0)
        expected = from_blocks(to_blocks(mask, (8, 12)), (8, 12)).view(2, 8, 12)
        assert torch.equal(measures.effective_scores(scores, dilation) > threshold, expected)
    assert expected.any() and not expected.all()


def test_changed_tokens_wants_enough_pixels():
    before = torch.full((1, 3, 32, 32), 0.5)
    after = before.clone()
    after[:, 1, :4, :4] += measures.CHANGED_FLOOR + 0.01  # 16 of 256 pixels, one channel
    after[:, :, 16:18, 16:18] += 0.4  # 4 of 256: too few
    after[:, :, :16, 16:] += measures.CHANGED_FLOOR - 0.01  # all of them, too little
    assert measures.changed_tokens(before, after).tolist() == [[[True, False], [False, False]]]


def test_largest_difference_in_levels():
    a, b = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    b[0, 0, 0, 0], b[0, 0, 1, 1] = 3 / 255, 200 / 255
    where = torch.tensor([[[True, True], [True, False]], [[False, False], [False, False]]])
    found = measures.largest_difference(a, b, where)
    assert found[0] == 3 and found[1].isnan()


def test_means_leave_out_what_is_not_known():
    values = [1.0, math.nan, 4.0, math.inf]
    assert (measures.mean(values), measures.median(values), measures.largest(values)) == (2.5, 2.5, 4.0)
    assert all(math.isnan(f([math.nan])) for f in (measures.mean, measures.median, measures.largest))


@pytest.fixture(scope="module")
def edits():
    found = runs.make_set(torch.device("cpu"), 128, counts={"local": 2, "ambiguous": 1, "global": 1}, seed=5)
    found.reference = found.tokens.clone()
    return found


@pytest.fixture(scope="module")
def runner():
    pipe = runs.BatchedPipeline(**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return runs.Runner(pipe, text_length=16)


@pytest.mark.slow
def test_set_is_sorted_and_keeps_seeds(edits):
    share = edits.tokens.flatten(1).sum(1)
    assert (share.diff() >= 0).all()
    assert sorted(edits.seeds.tolist()) == [0, 1, 2, 3]
    assert (edits.reach | ~edits.tokens).all()  # whatever changed could be reached
    same = runs.make_set(torch.device("cpu"), 128, 2, {"local": 2, "ambiguous": 1, "global": 1}, seed=5)
    at = edits.seeds.tolist().index(same.seeds[0].item())
    assert torch.equal(same.source[0], edits.source[at])


@pytest.mark.slow
def test_calibration_edits_are_others(edits):
    other = runs.make_set(torch.device("cpu"), 128, counts={"local": 2, "ambiguous": 1, "global": 1}, seed=1005)
    assert not any(torch.equal(a, b) for a in edits.source for b in other.source)


def middle_threshold(runner, edits, config):
    """A threshold that selects some blocks of every edit but not all."""
    flat = measures.effective_scores(runner.run(runs.Row("", config=config), edits).scores, config.dilation).flatten(1)
    low, high = flat.amin(1).max().item(), flat.amax(1).min().item()
    assert low < high
    return (low + high) / 2


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["full", "locked"])
def test_controls_have_equal_counts(runner, edits, finish):
    edits = edits[torch.arange(3)]
    rows = {row.name: row for row in table.all_rows()}
    base = rows[f"9-coarse-{finish}"].config
    threshold = middle_threshold(runner, edits, base)
    results = {}
    for name in (f"9-coarse-{finish}", f"9-coarse-{finish}-random", f"9-coarse-{finish}-uniform"):
        config = replace(rows[name].config, threshold=threshold, max_active=1.0)
        results[config.selection] = runner.run(runs.Row(name, config=config), edits)
    counts = {rule: result.mask.flatten(1).sum(1).tolist() for rule, result in results.items()}
    assert counts["random"] == counts["score"] == counts["uniform"]
    assert all(0 < c < edits.tokens[0].numel() for c in counts["score"])
    assert results["random"].flops == results["score"].flops
    assert not torch.equal(results["random"].mask, results["score"].mask)
    assert not torch.equal(results["uniform"].mask, results["score"].mask)


@pytest.mark.slow
def test_noise_is_the_edit_s_own(runner, edits):
    row = runs.Row("plain", steps=1)
    together = runner.run(row, edits).images
    alone = runner.run(row, edits[torch.tensor([2])]).images
    assert torch.allclose(together[2], alone[0], atol=1e-4)


@pytest.mark.slow
def test_figures_of_the_target_and_the_source(runner, edits):
    source, target = edits.pictures()
    n = len(edits)
    perfect = runs.measure(edits, runs.Result(target, [0] * n), None)
    unique = edits.edits.unique()
    assert (perfect["psnr_in"][unique] == 100).all() and perfect["psnr_in"][~unique].isnan().all()
    sharp = perfect["sharpness"]
    assert torch.allclose(sharp[sharp.isfinite()], torch.ones((), dtype=torch.float64), atol=0.2)
    none = torch.zeros_like(edits.tokens)
    options = dict(mask=none, active=[0.0] * n)
    kept = runs.measure(edits, runs.Result(source, [0] * n, fallbacks=["source"] * n, **options), None)
    local = edits.edits.kind < 3
    assert (kept["kept_max"] == 0).all() and (kept["drift_max"][local] == 0).all()
    assert (kept["recall"] == 0).all() and (kept["missed"] == 1).all() and (kept["returned_source"] == 1).all()
    spoilt = source.clone()
    spoilt[:, :, 0, 0] = (spoilt[:, :, 0, 0] - 0.5).abs() + 10 / 255
    found = runs.measure(edits, runs.Result(spoilt, [0] * n, fallbacks=[None] * n, **options), None)
    assert (found["kept_max"] > 0).all()


@pytest.mark.slow
def test_preserved_pixels_are_the_source_s(runner, edits):
    edits = edits[torch.arange(3)]
    row = {row.name: row for row in table.all_rows()}["9-coarse-full-pixels"]
    threshold = middle_threshold(runner, edits, row.config)
    for preserve in ("pixels", None):
        config = replace(row.config, threshold=threshold, preserve=preserve, max_active=1.0)
        found = runs.measure(edits, runner.run(runs.Row("", config=config), edits), None)["kept_max"]
        assert (found == 0).all() if preserve else (found > 0).any()


@pytest.mark.slow
def test_table_end_to_end(runner, edits, tmp_path, monkeypatch, capsys):
    """A failing row is reported, the others go on, records can be read back, and done rows are kept."""
    rows = [
        runs.Row(table.REFERENCE, steps=1),
        runs.Row("plain-4", steps=2),
        runs.Row("bad", steps=-1),
        runs.Row("9-coarse-full", config=replace(table.PAPER, threshold=4.0)),
    ]
    calls = []
    run = runs.Runner.run
    monkeypatch.setattr(runs.Runner, "run", lambda self, row, part: calls.append(row.name) or run(self, row, part))
    monkeypatch.setattr(table, "all_rows", lambda: rows)
    monkeypatch.setattr(table, "load_pipeline", lambda *_: runner.pipe)
    monkeypatch.setattr(table, "make_set", lambda *_: edits)
    monkeypatch.setattr(table, "Runner", lambda *_: runner)
    options = "table.py --model random --judge none --device cpu --size 128 --out".split()
    monkeypatch.setattr(sys, "argv", [*options, str(tmp_path)])
    assert table.main() == 1
    report = (tmp_path / "table.md").read_text()
    assert "| bad" in report and "failed: " in report and "## Local edits (2)" in report
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["counts"]["local"] == 2 and "error" in saved["rows"]["bad"]
    assert saved["rows"]["9-coarse-full"]["summary"]["local"]["returned_source"] == 100
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    by_row = {line["row"]: line for line in lines[1:]}
    assert len(lines[0]["edits"]["seed"]) == len(by_row["plain-4"]["figures"]["drift"]) == len(edits)

    calls.clear()
    table.main()
    assert "plain-4" not in calls and "9-coarse-full" not in calls and "bad" in calls
    assert "kept from a former run" in capsys.readouterr().out
    rows[-1] = runs.Row("9-coarse-full", config=replace(table.PAPER, threshold=3.9))  # other settings: run again
    calls.clear()
    table.main()
    assert "9-coarse-full" in calls and "plain-4" not in calls


@pytest.mark.slow
def test_rows_of_a_former_table(runner, edits, tmp_path, monkeypatch):
    """--onto keeps a former table's other rows, marked with their run; not those of other settings or edits."""
    rows = [
        runs.Row(table.REFERENCE, steps=1),
        runs.Row("plain-4", steps=2),
        runs.Row("plain-2", steps=2),
        runs.Row("9-coarse-full", config=replace(table.PAPER, threshold=4.0)),
    ]
    monkeypatch.setattr(table, "all_rows", lambda: rows)
    monkeypatch.setattr(table, "load_pipeline", lambda *_: runner.pipe)
    monkeypatch.setattr(table, "make_set", lambda *_: edits)
    monkeypatch.setattr(table, "Runner", lambda *_: runner)
    options = "table.py --model random --judge none --device cpu --size 128".split()

    def run(out, *names, onto=None):
        monkeypatch.setenv("SPECEDIT_COMMIT", f"commit-{out}")
        more = [] if onto is None else ["--onto", str(tmp_path / onto / "table.json")]
        monkeypatch.setattr(sys, "argv", [*options, "--out", str(tmp_path / out), "--rows", *names, *more])
        assert table.main() == 0
        return json.loads((tmp_path / out / "table.json").read_text())

    first = run("a", "plain-4", "9-coarse-full")
    former = json.loads((tmp_path / "a" / "table.json").read_text())
    del former["rows"]["9-coarse-full"]["config"]["kv_refresh"]  # from before there was this option
    (tmp_path / "a" / "table.json").write_text(json.dumps(former))
    second = run("b", "plain-2", onto="a")
    assert list(second["rows"]) == [table.REFERENCE, "plain-4", "plain-2", "9-coarse-full"]
    assert {n: r.get("run") for n, r in second["rows"].items()} == {
        table.REFERENCE: None,
        "plain-4": 1,
        "plain-2": None,
        "9-coarse-full": 1,
    }
    assert second["rows"]["plain-4"]["summary"] == first["rows"]["plain-4"]["summary"]
    report = (tmp_path / "b" / "table.md").read_text()
    assert "plain-4 [1]" in report and "[1]: rows of an earlier run" in report and "commit-a" in report
    third = run("c", "plain-4", onto="b")
    assert {n: r.get("run") for n, r in third["rows"].items()} == {
        table.REFERENCE: None,
        "plain-4": None,
        "plain-2": 1,
        "9-coarse-full": 2,
    }
    assert [x["commit"] for x in third["former"]] == ["commit-b", "commit-a"]

    rows[-1] = runs.Row("9-coarse-full", config=replace(table.PAPER, threshold=3.9))
    assert "9-coarse-full" not in run("d", "plain-4", onto="b")["rows"]
    former["counts"]["local"] += 1
    (tmp_path / "a" / "table.json").write_text(json.dumps(former))
    with pytest.raises(SystemExit):
        run("e", "plain-4", onto="a")


@pytest.mark.slow
def test_table_without_a_plain_run_to_hold_against(runner, edits, tmp_path, monkeypatch):
    """--reference-steps 0: nothing runs but what was asked for, and masks are held against the true ones."""
    rows = [runs.Row(table.REFERENCE, steps=1), runs.Row("9-coarse-full", config=SpecEditConfig(max_active=1.0))]
    drawn = []
    monkeypatch.setattr(table, "all_rows", lambda: rows)
    monkeypatch.setattr(table, "load_pipeline", lambda *_: runner.pipe)
    monkeypatch.setattr(table, "make_set", lambda *given: drawn.append(given[3]) or edits)
    monkeypatch.setattr(table, "Runner", lambda *_: runner)
    options = f"table.py --model random --judge none --device cpu --size 128 --out {tmp_path} --reference-steps 0"
    monkeypatch.setattr(sys, "argv", [*options.split(), "--rows", "9-coarse-full", "--kinds", "local", "global"])
    assert table.main() == 0
    assert drawn == [{"local": 200, "global": 40}]
    saved = json.loads((tmp_path / "table.json").read_text())
    assert list(saved["rows"]) == ["9-coarse-full"] and saved["reference"] == "none" and not saved["targets"]
    summary = saved["rows"]["9-coarse-full"]["summary"]["all"]
    assert summary["recall"] == summary["recall_true"] is not None and "recall_own" not in summary
    assert "held against the true masks" in (tmp_path / "table.md").read_text()
    against_50 = options.removesuffix(" --reference-steps 0").split()
    monkeypatch.setattr(sys, "argv", [*against_50, "--rows", "9-coarse-full", "--onto", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit):
        table.main()


@pytest.mark.slow
def test_flops_of_steps_over_cached_keys(runner, edits):
    edits = edits[torch.arange(2)]
    base = SpecEditConfig(finish="locked", max_active=1.0)
    base = replace(base, threshold=middle_threshold(runner, edits, base))
    whole, cached = (runner.run(runs.Row("", config=replace(base, kv_refresh=k)), edits) for k in (1, 9))
    assert all(0 < c < w for c, w in zip(cached.flops, whole.flops))
    out = runner.pipe(specedit=replace(base, kv_refresh=9), **runner.options(edits))
    assert sum(cached.flops) == out.stats.flops


def test_rows_are_what_was_promised():
    names = [row.name for row in table.all_rows()]
    assert len(set(names)) == len(names)
    assert {f"plain-{n}" for n in (50, 28, 10, 9, 4, 2)} <= set(names)
    assert {
        f"{p}-{d}-{f}" for p in (30, 18, 11, 9) for d in ("coarse", "quarter", "full_step") for f in ("full", "locked")
    } <= set(names)


def test_operating_points_and_recommendation():
    scores = torch.full((1, 4, 4), 0.01)
    scores[0, :2, :2] = torch.tensor([[0.9, 0.5], [0.5, 0.2]])
    reference = scores[0:1] > 0.1
    point = calibrate.operating_point(scores, reference, 0.3)
    assert (point["recall"], point["precision"], point["missed"]) == (0.75, 1.0, 0.0)
    assert point["share"] == pytest.approx(3 / 16)
    points = [
        {"threshold": t, "recall": r, "missed": m, "share": s}
        for t, r, m, s in ((0.1, 1.0, 0.0, 0.3), (0.2, 0.99, 0.0, 0.18), (0.3, 0.97, 0.0, 0.15))
    ]
    assert calibrate.cheapest(points, 0.98)["threshold"] == 0.2
    best = calibrate.recommend(points)
    assert best["threshold"] == 0.2 and best["wanted"]
    missing = [{**p, "missed": 0.01} for p in points]
    best = calibrate.recommend(missing)
    assert best["threshold"] == 0.2 and not best["wanted"]
    costly = [{**p, "share": p["share"] + 0.04} for p in points]
    best = calibrate.recommend(costly)
    assert best["threshold"] == 0.3 and not best["wanted"]
    assert calibrate.two_digits(0.0789) == 0.078 and calibrate.two_digits(0.15) == 0.15


@pytest.mark.slow
def test_probe_scores_every_metric_and_reference(runner, edits):
    pipe = calibrate.Probe.of(runner.pipe)
    config = SpecEditConfig(preset=9)
    found = calibrate.probe(pipe, runner, edits, config, batch=3)
    assert len(found) == 6 and all(s.shape == edits.tokens.shape for s in found.values())
    run = runner.run(runs.Row("", config=config), edits)
    scale = stages.threshold_scale(run.scores.flatten(1), config.resolved_relative())
    assert torch.allclose(found["decoder", "matched"], run.scores / scale[..., None], atol=1e-4)


@pytest.mark.slow
def test_selection_study(runner, edits, tmp_path):
    """Score maps go to disk; the rules are compared from there; what is done in a run is one of them."""
    args = argparse.Namespace(
        out=tmp_path,
        batch=3,
        reference_steps=2,
        model="random",
        dtype="float32",
        size=128,
        text_length=16,
        true_cfg_scale=1.0,
    )
    selection.collect(args, runner, None, edits, lambda text: None)
    scores = torch.load(tmp_path / "scores.pt")
    assert len(scores["kind"]) == len(edits) and scores["2 of 9 decoder0"].shape == edits.tokens.shape
    maps = {k: v.float() for k, v in scores.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    found = selection.rules(maps, 0.1)
    config = SpecEditConfig(stages=(2, 4, 3))
    run = runner.run(runs.Row("", config=config), edits)
    scale = stages.threshold_scale(run.scores.flatten(1), 0.5)
    assert torch.allclose(found[selection.IN_USE], run.scores / scale[..., None], rtol=0.02, atol=1e-3)
    scores["kind"] = torch.zeros_like(scores["kind"])
    scores["reference"][:, :2, :2] = True
    results = selection.compare_rules(scores)
    assert {"local", "calibration"} <= results[0].keys() and results[0]["rule"] == selection.IN_USE
    assert selection.IN_USE in selection.rules_markdown(scores["setting"], results)


def test_rules_on_scores_by_hand():
    s = torch.full((1, 4, 4), 0.02)
    s[0, 0, 0], s[0, 0, 1], s[0, 3, 3] = 0.8, 0.3, 0.3
    assert torch.allclose(selection.smoothed(torch.ones(1, 4, 4)), torch.ones(1, 4, 4))
    over = selection.joined(s, 0.5, 0.5) > 0.5  # 0.3 is over half of it: beside the seed it counts, alone it does not
    assert over[0, 0, :2].all() and over.sum() == 2
    weak = s / 20
    assert not (selection.floored(weak, 0.5, 0.05, 0.1) > 0.1).any()
    assert (selection.floored(weak, 0.5, 0.01, 0.1) > 0.1).sum() == 1


def test_contact_sheet_has_the_pictures():
    random = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    first, second = contact_sheet.pil_pictures(random)
    assert first.size == second.size == (48, 64)
    levels = (random[1].permute(1, 2, 0) * 255).round().byte().numpy()
    assert (np.asarray(second) == levels).all()
