# SPDX-License-Identifier: Apache-2.0
"""`specedit bench`: the pictures that it takes, what it runs and measures, what is on the disk, how it goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import TINY, tiny_image, tiny_pipeline

import specedit_kernels
from specedit_kernels import SpecEditConfig, enable_specedit
from specedit_kernels.cli import bench, bench_report, main
from specedit_kernels.cli.bench import Bench, Budget, Cells, Row, rows_of_table
from specedit_kernels.cli.pictures import SHIPPED, Edit, edits_of
from specedit_kernels.cli.text import UserError
from specedit_kernels.images import measures

ASSETS = Path(specedit_kernels.__file__).parent / "assets"
clone = pytest.mark.skipif(not (ASSETS / "tiny_kontext").is_dir(), reason="the tiny editors are in a clone alone")

pytestmark = pytest.mark.usefixtures("one_thread")


def save(path, seed=0, size=(128, 128)):
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny_image(*size, seed=seed).save(path)
    return path


# pictures


def test_the_shipped_pictures_are_all_listed_free_and_light():
    edits, others = edits_of(SHIPPED)
    files = {path.name for path in SHIPPED.iterdir()}
    assert others == 0 and len(edits) == len({edit.name for edit in edits}) == 7
    assert {edit.image.name for edit in edits} == files - {"edits.jsonl", "LICENSES.md"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 300_000
    licenses = (SHIPPED / "LICENSES.md").read_text()
    for edit in edits:
        assert PIL.Image.open(edit.image).size == (512, 512)
        assert f"`{edit.image.name}`" in licenses or (edit.name.startswith("scene_") and "`scene_*.jpg`" in licenses)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_list_beside_the_pictures(tmp_path, kind):
    a, b = save(tmp_path / "a.png"), save(tmp_path / "in" / "b.png")
    save(tmp_path / "mask.png")
    rows = [{"image": "a.png", "instruction": "add a hat", "mask": "mask.png"},
            {"image": "in/b.png", "instruction": "remove it", "mask": ""}]  # fmt: skip
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text("image,instruction,mask\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    expected = [Edit("a", a, "add a hat", tmp_path / "mask.png"), Edit("b", b, "remove it")]
    assert edits_of(tmp_path) == (expected, 0)


def test_texts_beside_the_pictures(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "without.png")
    (tmp_path / "a.txt").write_text("add a hat\n")
    assert edits_of(tmp_path) == ([Edit("a", tmp_path / "a.png", "add a hat")], 0)


def test_rows_of_gedit_by_key(tmp_path):
    """A list for all, with pictures by task and language: the fields of GEdit-Bench without its pictures."""
    rows = []
    for task in ("color_alter", "subject-add"):
        for language, words in (("en", "make it blue"), ("cn", "变蓝")):
            save(tmp_path / "fullset" / task / language / "k1.png")
            rows.append({"key": "k1", "task_type": task, "instruction_language": language, "instruction": words,
                         "Intersection_exist": True})  # fmt: skip
    (tmp_path / "gedit.json").write_text(json.dumps(rows))
    edits, others = edits_of(tmp_path)
    assert others == 2 and [edit.name for edit in edits] == ["k1", "k1-2"]
    places = [edit.image.relative_to(tmp_path).parts[1:3] for edit in edits]
    assert places == [("color_alter", "en"), ("subject-add", "en")]
    edits, others = edits_of(tmp_path, "cn")
    assert others == 2 and {edit.image.parts[-2] for edit in edits} == {"cn"} and edits[0].instruction == "变蓝"
    with pytest.raises(UserError, match="no instruction in 'de'; 4 in other languages"):
        edits_of(tmp_path, "de")


def test_a_folder_for_each_task(tmp_path):
    for task in ("a", "b"):
        save(tmp_path / task / "img" / "k.png")
        (tmp_path / task / "metadata.jsonl").write_text(json.dumps({"key": "k", "instruction": f"edit {task}"}) + "\n")
    edits, _ = edits_of(tmp_path)
    assert [(e.name, e.image.parts[-3], e.instruction) for e in edits] == [("k", "a", "edit a"), ("k-2", "b", "edit b")]


def test_an_object_of_instructions(tmp_path):
    save(tmp_path / "x.png"), save(tmp_path / "y.webp")
    content = {"x.png": "add a hat", "y": {"prompt": {"edit_instruction": "add"}}}
    (tmp_path / "list.json").write_text(json.dumps(content))
    edits, _ = edits_of(tmp_path)
    assert [(e.image.name, e.instruction) for e in edits] == [
        ("x.png", "add a hat"), ("y.webp", '{"edit_instruction": "add"}')
    ]  # fmt: skip


@pytest.mark.parametrize("files, expected", [
    ({}, "expected a list"),
    ({"data.arrow": ""}, "write the pictures of a data set's own files"),
    ({"l.jsonl": '{"image": "no.png", "instruction": "x"}'}, "line 1: no picture"),
    ({"l.jsonl": '{"key": "k", "instruction": "x"}'}, "none named 'k'"),
    ({"l.jsonl": '{"image": "a.png", "instruction": " "}'}, "line 1: expected an instruction"),
    ({"l.jsonl": "{"}, "line 1: expected a JSON object"),
    ({"l.json": "{"}, "l.json: cannot be read"),
    ({"l.json": "3"}, "expected a list of rows or an object, got a int"),
    ({"l.json": "[3]"}, "row 1: expected an object"),
    ({"l.csv": "image,instruction\na.png\n"}, "other fields than the first"),
    ({"l.jsonl": '{"image": "a.png", "instruction": "x", "mask": "no.png"}'}, "mask: expected a file's path"),
], ids=lambda x: str(x)[:40])  # fmt: skip
def test_what_is_no_folder_of_edits(tmp_path, files, expected):
    save(tmp_path / "a.png")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected):
        edits_of(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        edits_of(tmp_path / "nowhere")


# rows


def test_rows_are_the_qualities_and_the_stock_pipeline_at_their_steps():
    rows = rows_of_table(28, [4], True)
    assert rows[0] == Row("stock, 28 steps", 28)
    ours = {row.name: row.steps for row in rows if row.config}
    assert ours == {"fast": 6, "balanced": 9, "best": 12, "preset 4": 4}
    assert all(row.config.preserve == "pixels" for row in rows if row.config)
    stock = [row.steps for row in rows if not row.config and not row.compiled]
    assert sorted(stock) == [4, 6, 9, 12, 28] and [row.steps for row in rows if row.compiled] == [28, 6, 9, 12, 4]
    assert all(row.compiled for row in rows[-5:])  # they change the transformer
    assert [row.steps for row in rows_of_table(28, [], False, guided=True) if row.config] == [8, 9, 10]
    assert not [row for row in rows_of_table(9, [], False) if row.compiled]
    assert [row.name for row in rows_of_table(11, [], False)].count("stock, 11 steps") == 1


# runs of one model


class Clock:
    """A budget that ends after so many cells."""

    def __init__(self, cells):
        self.cells = cells

    def left(self):
        self.cells -= 1
        return float(self.cells >= 0)


@pytest.fixture
def edits(tmp_path):
    return [Edit(name, save(tmp_path / f"{name}.png", i), "make the cat blue", half(tmp_path / "half.png"))
            for i, name in enumerate("ab")]  # fmt: skip


def half(path):
    array = np.zeros((128, 128), np.uint8)
    array[:, :64] = 255
    PIL.Image.fromarray(array).save(path)
    return path


SETTINGS = {"max_area": 128 * 128, "_auto_resize": False, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe():
    found = tiny_pipeline()
    enable_specedit(found)
    return found


STOCK, OURS = Row("stock, 2 steps", 2), Row("balanced", 4, SpecEditConfig(preset=4, preserve="pixels"))


def test_a_stock_cell_is_the_stock_call(pipe, edits):
    work = Bench(pipe, SETTINGS, seed=5)
    source = work.source(edits[0])
    assert source.size == (128, 128)
    image, facts = work.run(STOCK, edits[0], source)
    expected = tiny_pipeline()(
        image=source, prompt="make the cat blue", height=128, width=128, num_inference_steps=2,
        generator=torch.Generator().manual_seed(5), **SETTINGS,
    ).images[0]  # fmt: skip
    assert (np.asarray(image) == np.asarray(expected)).all()
    stages = facts["stages"]
    assert list(stages) == ["encode", "denoise", "decode"] and all(x > 0 for x in stages.values())
    assert 0.5 * facts["seconds"] < sum(stages.values()) <= facts["seconds"]
    assert facts["peak_bytes"] > 2**20 and "mask" not in facts
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


@pytest.mark.slow
def test_a_cell_of_ours_keeps_the_rest(pipe, edits):
    work = Bench(pipe, SETTINGS, seed=5)
    source = work.source(edits[0])
    image, facts = work.run(OURS, edits[0], source)
    assert facts["mask"] == ["11110000"] * 8 and facts["edited"] == 0.5 and facts["runner"] == "eager"
    found, own = (np.asarray(x) for x in (image, source))
    assert (found[:, 80:] == own[:, 80:]).all() and (found[:, :64] != own[:, :64]).any()
    # nothing of it is left where the stock pipeline runs next
    work.run(STOCK, edits[0], source)
    assert not [x for x in pipe.transformer.attn_processors.values() if "SpecEdit" in type(x).__name__]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_registered_model_runs_both(name, tmp_path, edits, monkeypatch):
    """The calls' arguments fit each stock pipeline and ours; the same noise, size and pixels go into both."""
    pipe, call = TINY[name](monkeypatch)
    enable_specedit(pipe)
    given = {k: v for k, v in call().items() if k not in ("image", "prompt", "output_type", "height", "width")}
    work = Bench(pipe, given, seed=0)
    if "prompt_embeds" in given:
        work.text = lambda edit: {}
    cells = Cells(tmp_path / "out", {})
    source = work.source(edits[0])
    for row in (STOCK, OURS):
        image, facts = work.run(row, edits[0], source)
        assert image.size == source.size == (128, 128)
        cells.write(row, edits[0], image, facts | {"notes": []})
    with torch.no_grad():
        figures = bench_report.figures_of(work, cells, [STOCK, OURS], edits[0], source)
    ours = figures["balanced"]
    assert ours["outside"] == (0, 0) and ours["edited"] == 0.5 and 0 < ours["flops"]
    assert ours["psnr"] > 0 and -1 <= ours["ssim"] < 1 and 0 < ours["features"] <= 4


@pytest.mark.slow
def test_steps_that_the_stock_call_cannot_take_are_its_own(monkeypatch, edits):
    """Qwen's call works at a megapixel alone: rows of a smaller folder are the stock pipeline's bits all the same."""
    pipe, call = TINY["QwenImageEditPipeline"](monkeypatch)
    enable_specedit(pipe)
    given = {k: v for k, v in call().items() if k not in ("image", "height", "width")}
    plain, ours = Bench(pipe, given, 0), Bench(pipe, given | {"max_area": 128 * 128}, 0)
    for work in (plain, ours):
        work.text = lambda edit: {}
    assert ours.by_ours and not plain.by_ours
    source = plain.source(edits[0])
    first, second = (np.asarray(work.run(STOCK, edits[0], source)[0]) for work in (plain, ours))
    assert (first == second).all() and first.std() > 1


def test_figures_by_hand(tmp_path, pipe, edits):
    """Of pictures made for it: what differs where is known."""
    work, cells, edit = Bench(pipe, SETTINGS, 0), Cells(tmp_path / "out", {}), edits[0]
    source = work.source(edit)
    own = np.asarray(source)
    stock, found = own.copy(), own.copy()
    stock[:, :32], found[:, :32] = 0, 5  # two columns of tokens
    found[0, 127] = 255 - own[0, 127] // 2  # a pixel outside
    facts = {"seconds": 2.0, "stages": {"encode": 0.5, "mixed": 1.0, "verify": 0.25, "decode": 0.25}, "notes": [],
             "peak_bytes": 7, "size": [128, 128], "date": "2026-11-29"}  # fmt: skip
    cells.write(STOCK, edit, PIL.Image.fromarray(stock), facts | {"seconds": 8.0})
    more = {"mask": ["11000000"] * 8, "edited": 0.25, "flops": 30, "plain_step_flops": 30, "runner": "eager"}
    cells.write(OURS, edit, PIL.Image.fromarray(found), facts | more)
    rows = [STOCK, OURS]
    each = {edit.name: bench_report.figures_of(work, cells, rows, edit, source)}
    ours = each[edit.name]["balanced"]
    assert ours["psnr"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-4) and ours["flops"] == 0.5
    assert ours["stages"] == {"encode": 0.5, "denoise": 1.25, "decode": 0.25}
    mean, largest = ours["outside"]
    assert largest == np.abs(found[0, 127].astype(int) - own[0, 127]).max() and 0 < mean < 0.1
    with torch.no_grad():
        again = work.decode(work.encode(bench_report.to_tensor(source)))
    changed = measures.changed_tokens(again, bench_report.to_tensor(PIL.Image.fromarray(stock)), 16)
    assert ours["covers"] == (changed[:, :2].sum() / changed.sum()).item()
    lines = bench_report.summary_of([*rows, Row("best", 9)], each)
    assert [line["row"] for line in lines] == ["stock, 2 steps", "balanced"]
    assert lines[1]["times_as_fast"] == 4.0 and lines[0]["psnr"] is None and lines[1]["peak_bytes"] == 7


def test_equal_pictures_are_no_number():
    assert bench_report.finite({"a": [float("inf"), 1.5], "b": ("x", None)}) == {"a": ["equal", 1.5], "b": ["x", None]}


def run_of(tmp_path, pipe, edits, budget, rows=(STOCK, OURS)):
    cells = Cells(tmp_path / "out", {"model": "m"})
    work = bench.Run(Bench(pipe, SETTINGS, 0), cells, rows, edits, budget)
    work()
    return work, [(row.name, e.name) for row in rows for e in edits if cells.read(row, e)]


@pytest.mark.slow
def test_a_budget_that_ends_and_a_run_that_goes_on(tmp_path, pipe, edits, monkeypatch):
    """One picture by all rows first; what is finished is not done again; what it is of must be the same."""
    _, done = run_of(tmp_path, pipe, edits, Clock(1))
    assert done == [(STOCK.name, "a")]
    _, done = run_of(tmp_path, pipe, edits, Clock(1))
    assert done == [(STOCK.name, "a"), ("balanced", "a")]
    asked, real = [], Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, row, edit, source: asked.append(edit.name) or real(self, row, edit, source))  # noqa: E501  # fmt: skip
    _, done = run_of(tmp_path, pipe, edits, Budget(100))
    assert len(done) == 4 and asked == ["b", "b"]
    run_of(tmp_path, pipe, [Edit("a", edits[0].image, "add a hat", edits[0].mask)], Budget(100))
    assert asked == ["b", "b", "a", "a"]
    path, picture = Cells(tmp_path / "out", {"model": "m"}).paths(STOCK, edits[1])
    picture.unlink()
    assert path.exists() and len(run_of(tmp_path, pipe, edits, Clock(0))[1]) == 1  # a's are of another instruction
    assert not list((tmp_path / "out").rglob(".specedit-*"))


@pytest.mark.slow
def test_a_row_that_fails_is_no_end(tmp_path, pipe, edits, monkeypatch, capsys):
    odd = Row("fast", 4, SpecEditConfig(preset=4, preserve="pixels", threshold=0.5))
    real = Bench.run

    def failing(self, row, edit, source):
        if row is odd:
            raise RuntimeError("no kernel\nfor this")
        return real(self, row, edit, source)

    monkeypatch.setattr(Bench, "run", failing)
    work, done = run_of(tmp_path, pipe, edits, Budget(100), (STOCK, odd, OURS))
    assert work.failed == {"fast": "RuntimeError: no kernel"} and len(done) == 4
    assert capsys.readouterr().err.count("fast: RuntimeError") == 1
    report = bench_report.report_of(work, place_of(), "specedit bench", 100, [])
    assert report["left_out"] == [] and "fast: failed: RuntimeError: no kernel" in report["notes"]
    assert "| fast" not in bench_report.markdown(report) and "* fast: failed" in bench_report.markdown(report)


def place_of():
    return dict(model="m", device="cpu, x", dtype="float32", seed=0, versions={"torch": "2"}) | {"class": "C"}


def test_as_many_pictures_as_all_rows_have_time_for(tmp_path, pipe, edits):
    """No row gets a second picture where not all of them can."""
    work = bench.Run(Bench(pipe, SETTINGS, 0), Cells(tmp_path / "o", {}), [STOCK, OURS], edits, Budget(1))
    work.expected = {STOCK.name: 20.0, OURS.name: 25.0}
    assert work._more([STOCK, OURS], []) == 1
    work.expected[OURS.name] = 35.0
    assert work._more([STOCK, OURS], []) == 0
    work.expected[OURS.name] = 1.0
    last = Row("stock, 2 steps, compiled", 2, compiled=True)
    work.budget = Budget((bench.COMPILE_SECONDS + 80) / 60)
    assert work._more([STOCK, OURS], [last]) == 1
    work.budget = Budget((bench.COMPILE_SECONDS + 60) / 60)
    assert work._more([STOCK, OURS], [last]) == 0


# the command


def small(tmp_path, name):
    """A shipped editor's folder that asks for pictures of 128 x 128."""
    folder = tmp_path / name
    folder.mkdir()
    for path in (ASSETS / name).iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((ASSETS / name / "specedit.json").read_text()) | {"resolution": 128}
    (folder / "specedit.json").unlink()
    (folder / "specedit.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
@clone
@pytest.mark.parametrize("name", ["tiny_kontext", "tiny_qwen_image_edit"])
def test_the_command_on_a_tiny_editor(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(bench, "TIERS", ("fast", "balanced"))  # the third takes as long as both
    monkeypatch.setattr(bench, "_commit", lambda: "")  # cells of another commit are others
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for stem in ("example.png", "example.txt"):
        shutil.copy(ASSETS / stem, pictures)
    command = ["bench", "--model", str(small(tmp_path, name)), "--pictures", str(pictures), "-o", str(out),
               "--device", "cpu", "--no-compile", "--steps", "3", "--minutes", "30"]  # fmt: skip
    assert main(command) == 0
    text = capsys.readouterr().out
    report = json.loads((out / "bench.json").read_text())
    assert (out / "bench.md").read_text() in text and str(tmp_path) not in (out / "bench.md").read_text()
    rows = {row["row"]: row for row in report["rows"]}
    names = ["stock, 3 steps", "fast", "balanced", "stock, 6 steps", "stock, 9 steps"]
    assert list(rows) == names and all(row["pictures"] == 1 for row in rows.values())
    assert report["place"]["class"] == {"tiny_kontext": "FluxKontextPipeline"}.get(name, "QwenImageEditPipeline")
    for tier in ("fast", "balanced"):
        row = rows[tier]
        assert 0 < row["edited"] <= 1 and row["psnr"] > 15 and 0.3 < row["ssim"] <= 1 and 0 <= row["features"] < 1
        if row["edited"] < 0.8:
            assert row["outside_largest"] == 0
        assert row["stages"]["encode"] > 0 and row["stages"]["decode"] > 0 and row["covers"] > 0.3
    assert rows["stock, 3 steps"]["outside_mean"] > 0 or rows["balanced"]["edited"] > 0.8
    sheet = PIL.Image.open(out / "contact_sheet.png")
    assert sheet.width > 6 * 192 and report["left_out"] == []
    assert "stock call works at its own size" in text or name == "tiny_kontext"
    # the report alone, of what is finished; another seed has nothing finished
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")}
    assert main([*command[:-1], "0"]) == 0 and len(before) == 5
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")}
    assert json.loads((out / "bench.json").read_text())["rows"] == report["rows"]
    capsys.readouterr()
    assert main([*command[:-1], "0", "--seed", "1"]) == 2
    assert "nothing was finished in 0 minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_rows_are_compiled(edits, monkeypatch):
    import torch._dynamo.utils as dynamo

    own = tiny_pipeline()
    kind = type(own.transformer)
    real = kind.compile_repeated_blocks
    # what the graphs become takes a minute of a C++ compiler, and is torch's own
    monkeypatch.setattr(kind, "compile_repeated_blocks", lambda self, **how: real(self, backend="aot_eager", **how))
    enable_specedit(own)
    work = Bench(own, SETTINGS, 0)
    source = work.source(edits[0])
    eager, _ = work.run(STOCK, edits[0], source)
    torch._dynamo.reset()
    dynamo.counters.clear()
    row = Row("stock, 2 steps, compiled", 2, compiled=True)
    timed, at = Bench._timed, []

    def counted(self, *arguments):
        at.append(dynamo.counters["stats"]["unique_graphs"])
        return timed(self, *arguments)

    monkeypatch.setattr(Bench, "_timed", counted)
    image, _ = work.run(row, edits[0], source)
    # a double block and a single one, before the clock begins
    assert at[0] >= 2 and dynamo.counters["stats"]["unique_graphs"] == at[0]
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(eager))
    assert difference.max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("options, expected", [
    (["--minutes", "-1"], "--minutes: expected a number of 0 or more, got -1"),
    (["--steps", "0"], "--steps: expected at least 1, got 0"),
    (["--model", "no/where"], "no such model folder"),
    (["--pictures", "no/where"], "no such folder of pictures"),
    (["--preset", "5"], "--preset"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    model = [] if "--model" in options else ["--model", "model"]
    capsys.readouterr()  # of saving
    assert main(["bench", *model, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specedit: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "bench-model").exists()
