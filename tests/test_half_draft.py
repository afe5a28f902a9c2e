# SPDX-License-Identifier: Apache-2.0
"""draft="half": coarse steps that are a draft alone, and a main trajectory that begins at noise."""

import itertools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import edit_left_half, left_half, tiny_pipeline, tiny_qwen

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, SpecEditQwenImageEditPipeline

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = dict(stages=(2, 3, 0), mixed_from=0.7, solver="ab2", finish="locked", kv_refresh="bracket", runner="eager")


@pytest.fixture(scope="module", params=["flux", "qwen"])
def pipe(request):
    kind, plain = {
        "flux": (SpecEditFluxKontextPipeline, tiny_pipeline),
        "qwen": (SpecEditQwenImageEditPipeline, tiny_qwen),
    }[request.param]
    made = kind(**plain().components)
    made.set_progress_bar_config(disable=True)
    return made


def edit(pipe, draft="half", call=None, **config):
    return edit_left_half(pipe, dict(mask_image=None) | (call or {}), **STEPS | dict(draft=draft) | config)


@pytest.mark.parametrize("finish", ["locked", "full"])
def test_a_mask_saves_the_draft(pipe, finish):
    steps = dict(stages=(2, 2, 1), finish=finish)
    found = edit(pipe, call=dict(mask_image=left_half()), **steps)
    sigmas = SpecEditConfig(**STEPS | steps).sigmas((2, 2, 1))
    without = dict(stages=(0, 4, 1), finish=finish, mixed_from=None)
    alone = edit(pipe, "coarse", dict(mask_image=left_half(), sigmas=sigmas), **without)
    assert torch.equal(found.images, alone.images)
    assert (found.stats.nfe, found.stats.draft_nfe) == (5, 0)
    assert {step.stage for step in found.stats.steps} <= {"mixed", "bracket", "active", "full"}


def test_the_draft_is_the_coarse_steps(pipe):
    seen = []

    def on_step_end(pipe, index, timestep, tensors):
        seen.append((index, float(timestep), pipe.num_timesteps))
        return {}

    found = edit(pipe, threshold=-1.0, max_active=1.0, call=dict(callback_on_step_end=on_step_end))
    coarse = edit(pipe, "coarse", threshold=-1.0, max_active=1.0)
    assert torch.equal(found.scores, coarse.scores)
    assert (found.stats.nfe, found.stats.draft_nfe, coarse.stats.nfe) == (3, 2, 5)  # all tokens: on from the draft

    ordered = found.scores.flatten().sort().values
    some = float(ordered[-3])
    seen.clear()
    found = edit(pipe, threshold=some, relative=0.0, dilation=0, call=dict(callback_on_step_end=on_step_end))
    coarse = edit(pipe, "coarse", threshold=some, relative=0.0, dilation=0)
    assert 0 < found.stats.active[0] < 1 and torch.equal(found.mask, coarse.mask)
    assert (found.stats.nfe, found.stats.draft_nfe, coarse.stats.nfe) == (5, 2, 5)
    assert [index for index, _, _ in seen] == list(range(5)) and {count for _, _, count in seen} == {5}
    assert seen[0][1] == pytest.approx(1000) and all(a[1] > b[1] for a, b in itertools.pairwise(seen))
    assert [s.stage for s in found.stats.steps] == ["draft"] * 2 + ["mixed", "bracket"] + ["active"] * 4
    # the region is drawn from noise on, so it is another one than from the coarse steps
    assert not torch.equal(found.images, coarse.images)


def test_where_all_is_computed_the_coarse_steps_are_the_first(pipe):
    for call, config in ((None, dict(threshold=-1.0)), (dict(mask_image=torch.ones(1, 1, 128, 128)), {})):
        half, coarse = (edit(pipe, draft, call, **config) for draft in ("half", "coarse"))
        assert half.stats.fallback == coarse.stats.fallback == "dense"
        assert torch.equal(half.images, coarse.images)


def test_a_joined_mask_needs_the_draft(pipe):
    found = edit(pipe, call=dict(mask_image=left_half(), mask_mode="add"), threshold=4.0)
    given = edit(pipe, call=dict(mask_image=left_half()))
    assert found.stats.draft_nfe == 2 and torch.equal(found.mask, given.mask)
    preview = edit(pipe, call=dict(mask_image=left_half(), mask_mode="add", preview=True), threshold=4.0)
    assert preview.stats.nfe == 0 and torch.equal(preview.mask, given.mask)


def test_fast_with_the_full_finish(pipe):
    given = dict(mixed_from=None, solver=None, draft=None, stages=None, kv_refresh=None, quality="fast", finish="full")
    call = dict(mask_image=left_half(), true_cfg_scale=1.0)  # with guidance "fast" has other steps
    found = edit(pipe, threshold=4.0, call=call | dict(mask_mode="add"), **given)
    assert (found.stats.nfe, found.stats.draft_nfe, found.stats.steps[-1].stage) == (6, 3, "full")
    # tokens that follow the model have no kept keys and values
    found = edit(pipe, call=call, unselected="coarse", **given)
    assert [(s.stage, s.lock_text) for s in found.stats.steps] == [("mixed", False)] * 5 + [("full", False)]


def test_it_needs_coarse_steps(pipe):
    with pytest.raises(ValueError, match=r"draft: 'half' needs at least one coarse step.*\(0, 3, 0\)"):
        edit(pipe, stages=(0, 3, 0))


def test_the_bar_counts_both(pipe, monkeypatch):
    totals = []
    bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(total) or bar(total=total))
    edit(pipe)
    edit(pipe, call=dict(mask_image=left_half()))
    assert totals == [7, 5]


def test_its_threshold_is_that_of_the_coarse_draft():
    half, coarse = (SpecEditConfig(draft=draft) for draft in ("half", "coarse"))
    assert half.resolved_threshold() == coarse.resolved_threshold()
    assert half.resolved_relative() == coarse.resolved_relative() == 0.5


def test_a_quality_chooses_the_draft_where_it_chooses_the_steps():
    def draft(**given):
        return SpecEditConfig(**given).resolved().draft

    assert draft(preset=9) == draft(stages=(1, 2, 3)) == draft(quality="fast", preset=9) == "coarse"
    assert draft(quality="fast") == "half" and draft(quality="fast", draft="quarter") == "quarter"
    assert {draft(quality=quality) for quality in ("balanced", "best", "paper")} == {"coarse"}


def test_fast_and_best_take_other_steps_under_guidance(pipe):
    fast = SpecEditConfig(quality="fast").resolved(guided=True)
    assert (fast.stages, fast.draft, fast.kv_refresh, fast.draft_guidance) == ((3, 3, 2), "coarse", 3, "last")
    assert (fast.solver, fast.mixed_from, fast.finish, fast.lock_text) == ("ab2", 7 / 9, "locked", True)
    best = SpecEditConfig(quality="best", threshold=0.2).resolved(guided=True)
    assert (best.stages, best.coarse_refresh, best.draft_guidance, best.threshold) == ((4, 4, 2), 4, True, 0.2)
    for given in (dict(quality="paper"), dict(quality="best", preset=9)):
        config = SpecEditConfig(**given)
        assert config.resolved(guided=True) == config.resolved()

    def stages(**call):
        config = SpecEditConfig(quality="fast", runner="eager", max_active=1.0)
        call = dict(specedit=config, mask_image=left_half()) | call
        return [step.stage for step in edit_left_half(pipe, call).stats.steps]

    guidance = dict(true_cfg_scale=4.0)
    if isinstance(pipe, SpecEditFluxKontextPipeline):  # Qwen's call has negative embeddings
        assert "coarse" not in stages(**guidance)
        guidance |= dict(negative_prompt="red")
    assert stages(**guidance).count("coarse") == 3
    assert "coarse" not in stages(**guidance | dict(true_cfg_scale=1.0))
