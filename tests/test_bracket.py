# SPDX-License-Identifier: Apache-2.0
"""kv_refresh="bracket": keys and values between two whole passes, eager, fused and packed."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from model_proofs import run_of
from tiny_models import call_options, edit_left_half, left_half, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import (
    SpecEditConfig,
    SpecEditFluxKontextPipeline,
    SpecEditQwenImageEditPipeline,
)
from specedit_kernels.engine.kv_cache import KVCache
from specedit_kernels.models.flux_kontext import FluxKontextModel, FusedFluxModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flux():
    pipe = SpecEditFluxKontextPipeline(**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def qwen():
    pipe = SpecEditQwenImageEditPipeline(**tiny_qwen().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, **config):
    return edit_left_half(pipe, **dict(stages=(1, 5, 0), finish="locked", runner="eager") | config)


@pytest.mark.parametrize("model", ["flux", "qwen"])
@pytest.mark.parametrize("every", ["bracket", 3])
def test_a_step_after_a_callback_that_changes_the_text_computes_it(request, model, every):
    """Text that is locked, what is kept beside it, and Qwen's branches as one: none is of the former text."""
    pipe, options = request.getfixturevalue(model), dict(kv_refresh=every, lock_text=True, stages=(1, 6, 0))

    def run(runner, at=None, in_place=False):
        def back(pipe, i, timestep, tensors):
            if i != at:
                return {}
            if in_place:
                tensors["prompt_embeds"].mul_(0.5)
            return {"prompt_embeds": tensors["prompt_embeds"] * (1 if in_place else 0.5)}

        call = dict(callback_on_step_end=back, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        config = SpecEditConfig(finish="locked", runner=runner, **options)
        return edit_left_half(pipe, dict(specedit=config) | call)

    whole = ["mixed", "bracket"] if every == "bracket" else ["mixed"]
    eager, fused, never = run("eager", 3), run("fused", 3), run("fused")
    stages = [(s.stage, s.lock_text) for s in eager.stats.steps]
    assert [stage for stage, _ in stages[-2 - len(whole) :]] == [*whole, "active", "active"]
    assert [locked for _, locked in stages[-2 - len(whole) :]] == [False] * len(whole) + [True, True]
    size = eager.images.abs().max()
    assert (eager.images - fused.images).abs().max() < 2e-4 * size < (never.images - fused.images).abs().max()
    assert (run("fused", 3, in_place=True).images - fused.images).abs().max() < 2e-4 * size
    # after the last step but one there is nothing between
    assert [s.stage for s in run("eager", 5).stats.steps][-1] == "mixed"


@pytest.mark.slow
def test_it_is_nearer_to_whole_steps_than_stale_keys(flux):
    whole, stale, between = (edit(flux, kv_refresh=k).images for k in (1, 5, "bracket"))
    assert (between - whole).abs().mean() < 0.7 * (stale - whole).abs().mean()


@pytest.mark.slow
def test_two_whole_passes_and_active_steps(flux):
    stats = edit(flux, kv_refresh="bracket").stats
    assert [s.stage for s in stats.steps] == ["coarse", "mixed", "bracket", "active", "active", "active", "active"]
    assert stats.nfe == 6 and stats.steps[2].sigma == stats.steps[-1].sigma
    # with two steps there is nothing between
    stats = edit(flux, stages=(1, 2, 0), kv_refresh="bracket").stats
    assert [s.stage for s in stats.steps] == ["coarse", "mixed", "mixed"]


@pytest.mark.slow
@pytest.mark.parametrize("lock_text", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_fused_steps_do_what_eager_ones_do(request, model, kv_cache_dtype, lock_text):
    pipe = request.getfixturevalue(model)
    options = dict(kv_refresh="bracket", kv_cache_dtype=kv_cache_dtype, lock_text=lock_text)
    eager, fused = (edit(pipe, runner=r, **options) for r in ("eager", "fused"))
    assert eager.stats.kv_cache_bytes > 0 and fused.stats.runner == "fused"
    error, size = (eager.images - fused.images).abs().max(), eager.images.abs().max()
    assert error < (2e-4 if kv_cache_dtype == "auto" else 3e-2) * size


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_bracketed_text_lies_between_the_two_passes(flux, monkeypatch, runner):
    """Of active steps with lock_text: the text's keys and values are the blend, those of edited tokens are renewed."""
    seen = []
    kind = FluxKontextModel if runner == "eager" else FusedFluxModel
    own, velocity = kind.blend, kind.velocity

    def pairs(layout):
        cache = layout.attention.cache
        return [[x.clone() for x in pair] for pair in (cache if isinstance(cache, list) else cache.pairs)]

    def blend(model, layout, near, far, weight):
        own(model, layout, near, far, weight)
        seen.append([weight.item(), layout, pairs(near), pairs(far)])

    def step(model, text, tokens, conditioning, layout):
        found = velocity(model, text, tokens, conditioning, layout)
        if seen and len(seen[-1]) == 4:
            seen[-1].append(pairs(seen[-1][1]))
            assert layout.attention.sequence.text == 0 and layout.attention.start == text.embeds.shape[1]
        return found

    monkeypatch.setattr(kind, "blend", blend)
    monkeypatch.setattr(kind, "velocity", step)
    out = edit(flux, stages=(1, 5, 0), kv_refresh="bracket", lock_text=True, runner=runner)
    active = [s for s in out.stats.steps if s.stage == "active"]
    assert len(active) == len(seen) == 4 and all(s.lock_text for s in active)
    run = run_of(flux, **call_options(image=tiny_image(), mask_image=left_half(), specedit=SpecEditConfig()))
    text = run.positive.embeds.shape[1]
    for weight, _, near, far, after in seen:
        assert 0 < weight <= 1
        for a, b, c in zip(near, far, after):
            for x, y, z in zip(a, b, c):
                between = torch.lerp(x, y, weight)
                torch.testing.assert_close(z[:, :text], between[:, :text], atol=1e-6, rtol=1e-6)
                # the first slots are edited tokens
                assert not torch.allclose(z[:, text : text + 4], between[:, text : text + 4], atol=1e-5)
    moved = [(y - x)[:, :text].abs().max() for x, y in zip(seen[0][2][-1], seen[0][3][-1])]
    assert min(moved) > 1e-4  # the text does move


@pytest.mark.slow
def test_a_batch_is_its_singles(flux):
    given = dict(output_type="latent", specedit=SpecEditConfig(stages=(1, 4, 0), finish="locked", runner="eager"))
    images, masks = [tiny_image(seed=1), tiny_image(seed=2)], [left_half(), left_half().rotate(90)]
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    text = dict(prompt=["make the cat blue", "add a hat"])
    both = flux(**call_options(image=images, mask_image=masks, generator=seeds, **text, **given)).images
    for i in (0, 1):
        seed = [torch.Generator().manual_seed(i + 1)]
        one = dict(image=images[i], mask_image=masks[i], prompt=text["prompt"][i], generator=seed)
        torch.testing.assert_close(flux(**call_options(**one, **given)).images[0], both[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_lies_between_two(packed):
    torch.manual_seed(0)
    near, far, between = (KVCache(packed) for _ in range(3))
    ends = [[torch.randn(1, 6, 2, 16) for _ in range(2)] for _ in range(2)]
    for cache, (k, v) in zip((near, far), ends):
        cache.pairs = [None, cache.pack(k, v)]
    between.blend_(near, far, torch.tensor(0.25))
    assert between.pairs[0] is None
    for x, a, b in zip(between.unpack(between.pairs[1], torch.float32), *ends):
        torch.testing.assert_close(x, a + 0.25 * (b - a), atol=0.3 if packed else 1e-6, rtol=0.1 if packed else 1e-6)


def test_qualities_set_what_is_not_given():
    tiers = {
        "fast": ((3, 2, 1), "half", 3, "bracket"),
        "balanced": ((4, 3, 2), "coarse", 2, 2),
        "best": ((7, 3, 2), "coarse", 4, 2),
    }
    for quality, (counts, draft, kept, renewed) in tiers.items():
        config = SpecEditConfig(quality=quality)
        further = dict(mixed_from=7 / 9, solver="ab2", finish="locked", lock_text=True)
        further |= dict(draft=draft, coarse_refresh=kept, kv_refresh=renewed)
        own = SpecEditConfig(quality=quality, stages=counts, **further)
        assert config.resolved() == own.resolved()
        assert config.step_counts() == counts and config.preset is None
    assert SpecEditConfig() == SpecEditConfig(quality="balanced")
    paper = dict(quality="paper", preset=9, finish="full", kv_refresh=1, solver="euler", lock_text=False)
    assert SpecEditConfig(quality="paper").resolved() == SpecEditConfig(**paper).resolved()
    # a preset and stages are the scheduler's own even steps, under every quality
    for given in (dict(preset=9), dict(stages=(0, 0, 9))):
        config = SpecEditConfig(**given).resolved()
        assert (config.solver, config.mixed_from, config.lock_text) == ("euler", None, False)
        assert (config.finish, config.kv_refresh, config.coarse_refresh) == ("locked", "bracket", 1)
    assert SpecEditConfig(preset=9, solver="ab2", mixed_from=0.5).mixed_from == 0.5
    assert replace(SpecEditConfig(), preset=9).step_counts() == (2, 4, 3)
    config = SpecEditConfig(quality="best", preset=11, kv_refresh=2).resolved()
    assert (config.preset, config.finish, config.kv_refresh) == (11, "locked", 2)
    config = SpecEditConfig(finish="full", unselected="coarse").resolved()
    assert (config.kv_refresh, config.lock_text) == (1, False)
    for given in (True, False):
        for quality in ("fast", "balanced", "paper"):
            assert SpecEditConfig(quality=quality, lock_text=given).lock_text is given
        assert SpecEditConfig(preset=9, lock_text=given).lock_text is given
    for wrong in ("all", 1):
        with pytest.raises(TypeError, match="lock_text: expected True or False"):
            SpecEditConfig(lock_text=wrong)
    for wrong in (dict(quality="good"), dict(kv_refresh="brackets"), dict(kv_refresh=0)):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            SpecEditConfig(**wrong)
    with pytest.raises(ValueError, match="kv_refresh: expected 1 with finish='full' and unselected='coarse'"):
        SpecEditConfig(finish="full", unselected="coarse", kv_refresh="bracket")
