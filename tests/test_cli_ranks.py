# SPDX-License-Identifier: Apache-2.0
"""A folder of pictures on several processes: shares, one summary, going on, and a rank that dies."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
from ranks import CPU_ONLY
from tiny_models import tiny_image, tiny_pipeline

from specedit_kernels.cli import batch, edit, main, ranks

pytestmark = CPU_ONLY

DIED = "specedit: rank 1 of 2 has died; what was finished is kept, the same command goes on from there\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    (folder / "specedit.json").write_text(json.dumps({"resolution": 128, "max_sequence_length": 16}))
    return folder


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(4):
        tiny_image(128, 128, seed=i).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def _rank(rank, port, folder, arguments, before):
    sys.stdout, sys.stderr = (open(folder / f"{name} {rank}", "w") for name in ("out", "err"))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    import torch

    torch.set_num_threads(1)
    ranks.BEAT, ranks.PATIENCE = 0.1, 3.0
    before(rank)
    os._exit(main([str(a) for a in arguments]))


class Run:
    """Two processes of the command, as a launcher starts them."""

    def __init__(self, folder, *arguments, before=lambda rank: None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = folder
        context = multiprocessing.get_context("fork")
        arguments = ("edit", *arguments, "--device", "cpu", "--steps", 4, "--box", "10,10,70,70")
        self.processes = [
            context.Process(target=_rank, args=(rank, port, folder, arguments, before)) for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def end(self, waits=2):
        """([exit codes], [stdout], [stderr]) when the first so many have ended, a minute at most."""
        for process in self.processes[:waits]:
            process.join(60)
        for process in self.processes:
            process.kill()
            process.join()
        said = [[(self.folder / f"{name} {rank}").read_text() for rank in range(2)] for name in ("out", "err")]
        errors = ["".join(x for x in text.splitlines(True) if x.startswith("specedit:")) for text in said[1]]
        return [process.exitcode for process in self.processes], said[0], errors


@pytest.mark.slow
def test_each_picture_once_and_one_summary(tmp_path, one_thread, model, many):
    out = tmp_path / "out"
    arguments = (many, "add a hat", "-o", out, "--model", model)
    # neither takes all before the other has begun
    run = Run(tmp_path, *arguments, before=lambda rank: _slowly(0.3))
    codes, said, errors = run.end()
    assert codes == [2, 0] and said[1] == "" and "".join(errors).count("bad.png: not a picture") == 1
    assert "edited      4 of 5 pictures" in said[0] and "by 2 processes" in said[0] and "failed      1" in said[0]
    assert sorted(p.name for p in out.glob("*.json")) == [f"{i}.png.json" for i in range(4)]
    who = {(out / f"{i}.png.who").read_text() for i in range(4)}
    assert who == {"0", "1"}

    tiny_image(128, 128, seed=9).save(many / "bad.png")
    codes, said, errors = Run(tmp_path, *arguments).end()
    assert codes == [0, 0] and errors == ["", ""]
    assert "edited      1 of 5 pictures" in said[0] and "skipped     4" in said[0]
    # the same picture as of one process
    alone = tmp_path / "alone"
    assert main([str(a) for a in ("edit", *arguments[:2], "-o", alone, *arguments[4:], "--device", "cpu", "--steps", 4,
                                  "--box", "10,10,70,70")]) == 0  # fmt: skip
    for i in range(4):
        assert (alone / f"{i}.png").read_bytes() == (out / f"{i}.png").read_bytes()


def _slowly(seconds, ends=None):
    """Edits take so long, and are signed; rank 1 ends at its second one by a signal."""
    edited, one, count = edit.Editor.edit, batch._one, []

    def slow(self, *args):
        count.append(1)
        if ends is not None and os.environ["RANK"] == "1" and len(count) == 2:
            os.kill(os.getpid(), ends)
        time.sleep(seconds)
        return edited(self, *args)

    def signed(editor, job, out, options):
        one(editor, job, out, options)
        (out / f"{job.output}.who").write_text(os.environ["RANK"])

    edit.Editor.edit, batch._one = slow, signed


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_is_named(tmp_path, model, many, end):
    (many / "bad.png").unlink()
    out = tmp_path / "out"
    arguments = (many, "add a hat", "-o", out, "--model", model)
    run = Run(tmp_path, *arguments, before=lambda rank: _slowly(0.3, end))
    codes, said, errors = run.end(waits=1)
    assert codes[0] == 1 and said == ["", ""]
    assert errors[0] == DIED
    left = 4 - len(list(out.glob("*.json")))
    assert left >= 1
    assert f"edited      {left} of 4 pictures" in Run(tmp_path, *arguments).end()[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False])
def test_a_launcher_that_ends_all_is_told_who_died(tmp_path, model, many, dies):
    out = tmp_path / "out"
    run = Run(tmp_path, many, "add a hat", "-o", out, "--model", model, before=lambda rank: _slowly(20))
    until = time.monotonic() + 40
    while not out.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    run.processes[1].kill() if dies else run.processes[1].terminate()
    run.processes[0].terminate()
    codes, said, errors = run.end()
    assert codes[0] == 1 and said == ["", ""]
    assert errors == [DIED if dies else "", ""]


def test_mistakes_are_said_once(tmp_path, many, monkeypatch, capsys):
    codes, said, errors = Run(tmp_path, many, "add a hat", "-o", tmp_path / "out", "--model", tmp_path / "none").end()
    assert codes == [2, 2] and said == ["", ""]
    assert "".join(errors).count("\n") == 1 and "none: no such model folder" in "".join(errors)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["edit", str(many / "0.png"), "add a hat"]) == 2
    assert "specedit: WORLD_SIZE: expected one process for one picture" in capsys.readouterr().err
    # no launcher has said where the processes meet
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["edit", str(many), "add a hat", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
