# SPDX-License-Identifier: Apache-2.0
"""solver="ab2" and mixed_from: the order of a run, where it restarts, and the sigmas of its steps."""

import itertools
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import PIL.Image
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import call_options, edit_left_half, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, SpecEditQwenImageEditPipeline
from specedit_kernels.engine import stages
from specedit_kernels.engine.config import PRESETS
from specedit_kernels.sampling.solver import Solver

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


def edit(pipe, call=None, **config):
    return edit_left_half(pipe, call, **dict(finish="locked", kv_refresh=1, runner="eager") | config)


def test_a_solver_has_the_order_that_it_says():
    def error(name, n):
        sigmas = [(1 - i / n) ** 1.5 for i in range(n + 1)]  # uneven
        at = torch.tensor(sigmas, dtype=torch.float64).float()
        x, solver = torch.ones(3), Solver(name)
        for i in range(n):
            x = solver.step(x, torch.cos(3 * at[i]) * x, at[i], at[i + 1])
        return abs(x[0].item() - math.exp(-math.sin(3) / 3))

    for name, order in (("euler", 1), ("ab2", 2)):
        ratios = [error(name, n) / error(name, 2 * n) for n in (16, 32)]
        assert all(0.85 * 2**order < r < 1.2 * 2**order for r in ratios), (name, ratios)


# stages in fours; the mixed steps begin at one sigma whatever the counts are
PATHS = {
    "dense": dict(stages=(0, 0, 4), finish="full"),
    "mixed": dict(stages=(0, 4, 0)),
    "stale keys": dict(stages=(0, 4, 0), kv_refresh=3),
    "bracket": dict(stages=(0, 4, 0), kv_refresh="bracket"),
    "coarse": dict(stages=(4, 4, 0), mixed_from=0.6, kv_refresh="bracket"),
    "full finish": dict(stages=(4, 4, 4), mixed_from=0.6, finish="full", kv_refresh="bracket"),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_a_run_has_the_order_of_its_solver(flux, monkeypatch, path):
    """In place of the model: a velocity whose trajectory is known well, by very many steps."""

    def velocity(run, tokens, conditioning, layouts, first=None, guided=True):
        return torch.cos(2 * conditioning / 1000) * torch.tanh(tokens[:, :first])

    monkeypatch.setattr(stages.Run, "velocity", velocity)
    monkeypatch.setattr(stages.Run, "timestep_conditioning", lambda run, timesteps, guided=True: list(timesteps))

    def latents(solver, times):
        counts = tuple(times * n for n in PATHS[path]["stages"])
        return edit(flux, **PATHS[path] | dict(stages=counts, solver=solver)).images

    exact = latents("ab2", 128)
    for solver, order in (("euler", 1), ("ab2", 2)):
        errors = [(latents(solver, times) - exact).abs().mean().item() for times in (4, 8, 16)]
        for more, less in itertools.pairwise(errors):
            assert 0.75 * 2**order < more / less < 1.5 * 2**order, (solver, errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, dict(kv_refresh="bracket"), dict(kv_refresh="bracket", lock_text=True)], ids=str
)
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_fused_steps_do_what_eager_ones_do(request, model, options):
    pipe = request.getfixturevalue(model)
    options = dict(stages=(2, 4, 0), solver="ab2", mixed_from=7 / 9) | options
    eager, fused = (edit(pipe, runner=r, **options).images for r in ("eager", "fused"))
    assert (eager - fused).abs().max() < 2e-4 * eager.abs().max()
    other = edit(pipe, **options | dict(solver="euler")).images
    assert (eager - other).abs().max() > 1e-3 * eager.abs().max()


@pytest.mark.slow
def test_it_is_nearer_to_many_steps(flux):
    exact, one, two = (
        edit(flux, stages=(0, n, 0), solver=solver).images for n, solver in ((64, "ab2"), (8, "euler"), (8, "ab2"))
    )
    assert (two - exact).abs().mean() < 0.5 * (one - exact).abs().mean()


@pytest.mark.slow
def test_euler_has_the_bits_of_the_plain_pipeline(flux):
    given = dict(image=tiny_image(), num_inference_steps=5, output_type="latent")
    plain = flux(specedit=False, **call_options(generator=torch.Generator().manual_seed(1), **given))
    call = dict(mask_image=PIL.Image.new("L", (128, 128), 255))
    for config in (dict(stages=(0, 0, 5)), dict(stages=(0, 5, 0)), dict(stages=(0, 0, 5), finish="full")):
        assert torch.equal(edit(flux, call, **config).images, plain.images), config
        assert not torch.equal(edit(flux, call, solver="ab2", **config).images, plain.images), config


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_the_qualities_are_steps_that_can_be_given_one_by_one(flux, quality):
    counts, call = SpecEditConfig(quality=quality).step_counts(), dict(generator=None)

    def run(**config):
        call["generator"] = torch.Generator().manual_seed(1)
        return edit(flux, call, **dict(finish=None, kv_refresh=None) | config)

    out = run(quality=quality)
    one_by_one = dict(stages=counts, mixed_from=7 / 9, solver="ab2", finish="locked", lock_text=True)
    fast = quality == "fast"
    one_by_one |= dict(draft="half" if fast else "coarse", kv_refresh="bracket" if fast else 2)
    one_by_one |= dict(coarse_refresh={"fast": 3, "balanced": 2, "best": 4}[quality])
    assert torch.equal(out.images, run(**one_by_one).images)
    # the mask that is given saves the draft of "fast"
    coarse = 0 if quality == "fast" else counts[0]
    assert out.stats.nfe == sum(counts) and [step.stage for step in out.stats.steps].count("coarse") == coarse
    assert all(step.lock_text for step in out.stats.steps if step.stage == "active")
    assert not torch.equal(out.images, run(**one_by_one | dict(solver="euler")).images)


def test_the_locked_tokens_are_the_sources(flux):
    euler, ab2 = (edit(flux, stages=(1, 5, 0), kv_refresh="bracket", solver=s).images for s in ("euler", "ab2"))
    columns = torch.arange(64) % 8
    assert torch.equal(euler[:, columns >= 4], ab2[:, columns >= 4])


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(0, 0, 4), (0, 4, 0)])
def test_a_callback_that_changes_the_run_restarts_it(flux, counts):
    def run(solver, change):
        call = dict(
            callback_on_step_end=lambda pipe, i, t, tensors: change(tensors),
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
        finish = "full" if counts[2] else "locked"
        return edit(flux, call, stages=counts, finish=finish, solver=solver).images

    def in_place(tensors):
        tensors["latents"].mul_(1.0)

    same = {
        "latents": lambda x: {"latents": x["latents"].clone()},
        "text": lambda x: {"prompt_embeds": x["prompt_embeds"].clone()},
    }
    seen = run("ab2", lambda tensors: tensors)
    assert torch.equal(seen, edit(flux, stages=counts, finish="full" if counts[2] else "locked", solver="ab2").images)
    for change in (*same.values(), in_place):
        again = run("ab2", change)
        torch.testing.assert_close(again, run("euler", change), atol=1e-6, rtol=1e-6)
        assert not torch.equal(again, seen)


def test_a_scheduler_with_another_step_is_refused(flux):
    pipe = SpecEditFluxKontextPipeline(**flux.components)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="scheduler: expected stochastic_sampling=False, got True"):
        edit(pipe, stages=(1, 4, 0), solver="ab2")


def test_sigmas_of_mixed_from(flux):
    pipe = SpecEditFluxKontextPipeline(**flux.components)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # no shift
    config = dict(stages=(2, 3, 0), mixed_from=0.8)
    sigmas = [step.sigma for step in edit(pipe, **config).stats.steps]
    # coarse steps at pooled sigmas, s / (2 - s)
    assert sigmas == pytest.approx([1, 0.9 / 1.1, 0.8, 0.8 * 2 / 3, 0.8 / 3])
    sigmas = [step.sigma for step in edit(pipe, dict(num_inference_steps=10), **config).stats.steps]
    assert sigmas[4:] == pytest.approx([0.8 * (1 - i / 6) for i in range(6)])
    given = [1.0, 0.95, 0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1]
    steps = edit(pipe, dict(sigmas=given), **config).stats.steps
    assert [step.sigma for step in steps if step.stage == "mixed"] == pytest.approx(given[2:])
    even = [step.sigma for step in edit(pipe, stages=(1, 4, 0)).stats.steps]
    assert even == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_options():
    config = SpecEditConfig(stages=(2, 2, 1), mixed_from=7 / 9)
    assert config.step_counts() == (2, 2, 1) and config.step_counts(10) == (4, 4, 2)
    assert config.step_counts(18, sigmas_given=True) == (4, 9, 5)
    assert config.step_counts(3, sigmas_given=True) == (1, 1, 1)
    # every second mixed step is whole, the last one too
    best = SpecEditConfig(quality="best")
    for given in (False, True):
        for steps in range(4, 41):
            counts = best.step_counts(steps, given)
            assert sum(counts) == steps and (sum(counts[1:]) % 2 == 1 or counts[0] == 1), (steps, counts)
    assert SpecEditConfig(quality="fast").step_counts(12) == (6, 4, 2)
    assert SpecEditConfig(stages=(0, 5, 1), mixed_from=0.5).sigmas((0, 5, 1)) is None
    for quality in ("fast", "balanced", "best", "paper"):
        config = SpecEditConfig(quality=quality)
        for steps in range(3, 40):
            for given in (False, True):
                counts = config.step_counts(steps, given)
                assert sum(counts) == steps and min(counts) >= 1
    for preset in PRESETS:
        config = SpecEditConfig(preset=preset).resolved()
        assert config.mixed_from is None and config.solver == "euler"
    for wrong in (dict(solver="heun"), dict(mixed_from=1), dict(mixed_from=0.0), dict(mixed_from=1.5)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpecEditConfig(**wrong)
    with pytest.raises(TypeError, match="mixed_from: expected a number"):
        SpecEditConfig(mixed_from="0.7")
