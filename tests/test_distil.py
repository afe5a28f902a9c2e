# SPDX-License-Identifier: Apache-2.0
"""The distillation's levels, answers and file; rows and solvers of bench/quality/solver.py."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "quality"))

import distil
import solver
from families import Flux, Klein, editor_in
from models import make_scheduler
from sampler import shift_mu
from tiny_models import tiny_pipeline

from specedit_kernels.flash_edit.cosi.low_rank import add_low_rank, low_rank_state
from specedit_kernels.sampling.schedule import stage_sigmas

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", [Flux, Klein])
@pytest.mark.parametrize("steps", [8, 4])
def test_levels_are_the_sigmas_of_the_pipelines_steps(steps, family):
    scheduler = family.make_scheduler()
    mu = shift_mu(scheduler, 1024, family, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    plain = scheduler.sigmas.tolist()
    [own] = distil.shifts_of(scheduler, 512, [512, 256], family, steps)
    _, coarse = distil.shifts_of(scheduler, 256, [512, 256], family, steps)
    at = [distil.level(own, i, steps) for i in range(steps + 1)]
    assert at == pytest.approx(plain, abs=1e-6)
    pooled = stage_sigmas(plain, steps - 1, 1, 0).coarse
    assert [distil.level(coarse, i, steps) for i in range(steps)] == pytest.approx(list(pooled), abs=1e-6)


def test_a_model_that_does_not_see_its_source_is_refused(tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="--model: expected an editor"):
        editor_in(tmp_path)
    index.write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert editor_in(tmp_path) is Klein


def field(x, sigma):
    return x * torch.cos(3 * sigma.view(-1, 1, 1, 1))


def test_an_answer_is_the_flow_s_mean_velocity_over_the_step():
    state = torch.linspace(0.5, 2, 3).view(3, 1, 1, 1)
    rows = {"state": state, "shift": torch.tensor([1.9, 1.9, 0.9]), "step": torch.tensor([0.0, 3.0, 1.0])}
    sigmas = [distil.level(rows["shift"], rows["step"] + i, 4).view(-1, 1, 1, 1) for i in (0, 1)]
    end = state * ((torch.sin(3 * sigmas[1]) - torch.sin(3 * sigmas[0])) / 3).exp()
    errors = []
    for parts in (8, 16):
        aim = distil.mean_velocity(field, state, rows["shift"], rows["step"], 4, parts)
        errors.append((state + (sigmas[1] - sigmas[0]) * aim - end).abs().max().item())
    assert errors[1] < 1e-3 and 3 < errors[0] / errors[1] < 5  # second order
    moved = distil.following(rows | {"aim": aim}, aim, 4)
    assert moved["step"].tolist() == [1.0, 2.0] and "aim" not in moved  # the second run ends
    torch.testing.assert_close(moved["state"], end[[0, 2]], rtol=0, atol=2e-3)


def test_rows_are_of_all_steps_and_go_on_from_the_student_s(monkeypatch):
    monkeypatch.setattr(distil, "Renderer", lambda device: None)
    args = SimpleNamespace(steps=4, sizes=[64], fresh=0.5)
    pipe = SimpleNamespace(scheduler=make_scheduler())
    training = SimpleNamespace(
        args=args, pipe=pipe, family=Flux, dev=torch.device("cpu"), teach=lambda rows: -rows["state"]
    )
    lessons = distil.Lessons(training, 64, 8, 64)
    assert lessons.fresh == 2

    def begin(generator):
        noise = torch.randn(2, 1, 2, 2, generator=generator)
        return {"state": noise, "shift": torch.full((2,), lessons.shifts[0]), "step": torch.zeros(2)}

    lessons.begin = begin
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        rows = lessons.batch(generator)
        assert torch.equal(rows["aim"], -rows["state"])
        lessons.next = distil.following(rows, torch.full_like(rows["aim"], 1e4), 4)  # a student that is far off
    steps = lessons.ring.fields["step"]
    assert len(steps) == 64 and all(8 <= int((steps == i).sum()) <= 24 for i in range(4))
    gone_on = lessons.ring.fields["state"].abs().amax((1, 2, 3)) > 100
    assert torch.equal(gone_on, steps > 0)


def test_the_file_gives_a_pipeline_the_student():
    pipe = tiny_pipeline()
    student = copy.deepcopy(pipe.transformer)
    torch.manual_seed(0)
    for up in add_low_rank(student, 64)[1::2]:  # wider than these layers
        up.data.normal_(std=0.05)
    layer, own = student.transformer_blocks[0].attn.to_q, pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, layer.in_features)
    before = own(x)
    pipe.load_lora_weights(distil.peft_state(low_rank_state(student), 64))
    for name, theirs in student.named_modules():
        if hasattr(theirs, "down"):
            ours, x = pipe.transformer.get_submodule(name), torch.randn(3, theirs.in_features)
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0.02)  # the file is in bf16
    assert (layer(x[:, : layer.in_features]) - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="rank"):
        distil.peft_state({"x.down": torch.zeros(64, 10**5)}, 64)


def test_rows_by_name():
    row = solver.row_of("lora preset-4 cached at .07")
    assert row.lora and row.config.step_counts() == (1, 2, 1) and row.config.resolved().solver == "euler"
    assert (row.config.threshold, row.config.relative, row.config.kv_refresh) == (0.07, 0.5, 9)
    whole = solver.row_of("6+7 from 8/9 lt kv 1 grow 0").config
    assert (whole.kv_refresh, whole.dilation, whole.mixed_from, whole.lock_text) == (1, 0, 8 / 9, True)
    assert solver.row_of("preset-8 paper").config.may_drift and not solver.row_of("plain-8").lora
    even = solver.row_of("2+6 euler even").config
    assert even.mixed_from is None and even.step_counts() == (2, 6, 0)
    guided = [solver.row_of(f"4+5 lt{ending} kv 3").config for ending in ("", " ug ct 4", " ul")]
    assert [(c.draft_guidance, c.coarse_text_refresh, c.kv_refresh) for c in guided] == [
        (True, 1, 3), (False, 4, 3), ("last", 1, 3)
    ]  # fmt: skip
    endings = ("", " lt", " half", " ck lt", " ck3", " from 8/9 half ck lt at .1")
    found = [solver.row_of(f"6+7{ending}").config for ending in endings]
    assert [(c.draft, c.lock_text, c.coarse_refresh) for c in found] == [
        ("coarse", False, 1), ("coarse", True, 1), ("half", False, 1), ("coarse", True, 6), ("coarse", False, 3),
        ("half", True, 6),
    ]  # fmt: skip
    for wrong in ("4+7 lt half", "4+7 lt ck", "4+7 ck 2", "4+7 ct 2 ug", "4+7 ct", "4+7 forecast2", "4+6 far", "plain-",
                  "lora", "preset-8 cachedat .1"):  # fmt: skip
        with pytest.raises(ValueError, match="--rows"):
            solver.row_of(wrong)
