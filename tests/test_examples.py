# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/, run as a user runs them: on the tiny editors of the clone, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
ASSETS = ROOT / "specedit_kernels" / "assets"
EDITOR = pytest.mark.skipif(not (ASSETS / "tiny_kontext").is_dir(), reason="the tiny editor is in a clone alone")


def run(tmp_path, name, *arguments):
    """What examples/name prints, from another folder, with the package of this clone."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # of the tests' own process
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(path):
    PIL = pytest.importorskip("PIL.Image")
    return PIL.open(path).convert("RGB")


def changed(before, after, box):
    """Largest difference in 8-bit levels (inside box, outside it)."""
    np = pytest.importorskip("numpy")
    before, after = (np.asarray(p, np.int16) for p in (before.resize(after.size), after))
    difference = np.abs(before - after).max(-1)
    inside = np.zeros(difference.shape, bool)
    left, top, right, bottom = box
    inside[top:bottom, left:right] = True
    return int(difference[inside].max()), int(difference[~inside].max())


@EDITOR
@pytest.mark.slow
def test_edit_with_mask(tmp_path):
    pytest.importorskip("diffusers")
    source = picture(ASSETS / "example.png").resize((256, 256))
    source.save(tmp_path / "source.png")
    mask = source.convert("L").point(lambda _: 0)
    mask.paste(255, (0, 144, 96, 240))
    mask.save(tmp_path / "mask.png")
    out = run(tmp_path, "edit_with_mask.py", "source.png", "mask.png", "color the turtle purple", "--size", 256)
    tokens = int(re.match(r"edited\.png: (\d+) of 256 tokens recomputed", out)[1])
    assert 36 <= tokens <= 80  # six by six tokens, whole 2 x 2 blocks, grown by one
    inside, outside = changed(source, picture(tmp_path / "edited.png"), (0, 96, 144, 256))
    assert inside > 40 and outside == 0


@EDITOR
@pytest.mark.slow
def test_batch_folder(tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(ASSETS / "example.png").rotate(90 * i).save(tmp_path / "in" / f"{i}.png")
    out = run(tmp_path, "batch_folder.py", "in", "make it night", "out", "--size", 128, "--batch", 2)
    assert len(out.splitlines()) == 3
    assert [picture(tmp_path / "out" / f"{i}.png").size for i in range(3)] == [(128, 128)] * 3


@EDITOR
@pytest.mark.slow
def test_flash_edit(tmp_path):
    pytest.importorskip("diffusers")
    out = run(tmp_path, "flash_edit.py", "--size", 128)
    assert "noise of the source, by the inversion network" in out  # the shipped one-step networks were found
    assert picture(tmp_path / "edited.png").size == (128, 128)


@pytest.mark.slow
def test_attention_in_your_module(tmp_path):
    out = run(tmp_path, "attention_in_your_module.py")
    assert float(re.search(r"from PyTorch ([\d.e+-]+);", out)[1]) < 1e-2


@pytest.mark.slow
def test_microbenchmark(tmp_path):
    out = run(tmp_path, "microbenchmark.py", "--queries", 16, "--keys", 64, "--seconds", 0.05)
    assert re.search(r"^mixed_res_attn +[\d.]+ µs", out, re.MULTILINE)
    assert re.search(r"^SDPA with the bias +[\d.]+ µs", out, re.MULTILINE)


def test_examples_are_short_and_each_is_run():
    here = Path(__file__).read_text(encoding="utf-8")
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(names) >= 5
    for name in names:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, name
        assert f'"{name}"' in here, f"{name}: no test runs it"
        assert not re.search(r"(?:from|import) specedit_kernels\.", text), f"{name}: expected public names only"
        assert not re.search(r"import _|\._[a-z]", text), f"{name}: expected public names only"
