# SPDX-License-Identifier: Apache-2.0
"""Parity that every registered model gets for a line in tiny_models.TINY."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from model_proofs import (
    EVERYTHING,
    cached_step_is_whole,
    kept_coarse_step_is_whole,
    lora,
    mask,
    mixed_step_is_dense,
    run_of,
    seeded,
)
from tiny_models import TINY, paper

from specedit_kernels import disable_specedit, enable_specedit, supported_models
from specedit_kernels.engine import registry, stages
from specedit_kernels.engine.model import EditModel
from specedit_kernels.engine.pipeline import SpecEditMixin

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for names in supported_models().values() for name in names]
# Models whose sequences are not [text, target, pictures] of one joint attention: held to model_proofs by files of
# their own.
APART = {
    "BriaFiboEditPipeline": "test_models_fibo.py",
    "FluxPipeline": "test_models_flux.py",
    "QwenImage21Pipeline": "test_models_qwen_image_21.py",
}


def test_each_registered_pipeline_has_a_tiny_one():
    assert set(NAMES) <= TINY.keys() | APART.keys(), "give a tiny instance of each pipeline class in tiny_models.TINY"
    assert all("model_proofs" in (Path(__file__).parent / name).read_text() for name in APART.values())


@pytest.fixture(scope="module", params=[name for name in NAMES if name in TINY])
def tiny(request):
    """(a stock pipeline with random weights, a function that gives the arguments of a call: guided=False, **more)."""
    with pytest.MonkeyPatch.context() as patch:
        pipe, call = TINY[request.param](patch)
        assert type(pipe).__name__ == request.param
        yield pipe, call


@pytest.fixture
def edit(tiny):
    """A function that calls the pipeline with SpecEdit; its `pipe` and `call` are those of `tiny`."""
    pipe, call = tiny

    def run(config, guided=False, **more):
        return pipe(**arguments(call, guided, specedit=config, **more))

    enable_specedit(pipe)
    run.pipe, run.call = pipe, call
    yield run
    disable_specedit(pipe)


def arguments(call, guided=False, **more):
    return dict(output_type="latent", generator=seeded()) | call(guided=guided) | more


def is_guided(edit):
    """Whether the pipeline has true guidance, which gives a run a second branch."""
    return run_of(edit.pipe, **arguments(edit.call, True, specedit=paper(), mask_image=mask())).negative is not None


# edits


def test_enabled_and_disabled_the_very_objects_come_back(tiny):
    pipe, _ = tiny
    kind, before = type(pipe), dict(pipe.transformer.attn_processors)
    handle = enable_specedit(pipe)
    assert type(pipe) is not kind and isinstance(pipe, kind)
    handle.disable()
    assert type(pipe) is kind
    after = pipe.transformer.attn_processors
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.proves("eager")
@pytest.mark.parametrize("guided", [False, True], ids=["one branch", "guided"])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(edit, guided):
    found = edit(paper(**EVERYTHING), guided)
    assert found.stats.fallback == "dense" and found.mask.all()
    expected = edit(False, guided, num_inference_steps=4).images
    assert torch.equal(found.images, expected) and expected.std() > 0.01


@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_nothing_selected_is_the_source(edit, draft):
    config = paper(draft=draft, draft_steps=2, threshold=4.0)
    found = edit(config, output_type="pt")
    run = run_of(edit.pipe, **arguments(edit.call, specedit=config))
    # 8-bit levels in both
    source = ((run.pixels / 2 + 0.5) * 255).round() / 255
    assert found.stats.fallback == "source" and torch.allclose(found.images, source, atol=1e-6)
    assert torch.equal(edit(config).images, edit.pipe._latents(run.model, run.source))


STEPS = {
    "full": dict(stages=(1, 3, 2), finish="full", kv_refresh=1),
    "full, cached": dict(stages=(1, 3, 2), finish="full", kv_refresh=3),
    "expanded": dict(stages=(1, 3, 2), finish="full", unselected="coarse"),
    "locked": dict(stages=(1, 4, 0), finish="locked", kv_refresh=1),
    "locked text": dict(stages=(1, 4, 0), finish="locked", kv_refresh=3, lock_text=True),
    "bracket": dict(stages=(1, 4, 0), finish="locked", kv_refresh="bracket"),
    "fp8": dict(stages=(1, 4, 0), finish="locked", kv_refresh=3, kv_cache_dtype="fp8"),
    "dense": dict(stages=(0, 0, 2)),
    "all that is kept": dict(stages=(3, 4, 0), finish="locked", kv_refresh="bracket", lock_text=True,
                                 coarse_refresh=2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("full, cached", marks=pytest.mark.proves("batch")),
        "expanded",
        "locked text",
        "fp8",
        "all that is kept",
    ],
)
def test_images_of_one_prompt_are_their_singles(edit, name, guided=True):
    config = paper(**STEPS[name])
    both = edit(config, guided, num_images_per_prompt=2, generator=[seeded(5), seeded(6)], mask_image=mask()).images
    for i in range(2):
        one = edit(config, guided, generator=seeded(5 + i), mask_image=mask()).images
        assert torch.allclose(both[i], one[0], atol=1e-5) and one.std() > 0.01
    assert not torch.allclose(both[0], both[1], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param("bracket", marks=pytest.mark.proves("fused")), "full", "locked", "locked text", "fp8", "dense",
     "all that is kept"],
)  # fmt: skip
def test_fused_edits_are_the_eager_ones(edit, name, guided=True):
    if "fused" not in edit.pipe.RUNNERS:
        pytest.skip("the model has no fused forward")
    eager, fused = (
        edit(paper(**STEPS[name], runner=runner), guided, mask_image=mask()) for runner in ("eager", "fused")
    )
    assert fused.stats.runner == "fused" and eager.stats.runner == "eager"
    assert torch.allclose(fused.images, eager.images, atol=1e-4) and eager.images.std() > 0.01
    assert [step.flops for step in fused.stats.steps] == [step.flops for step in eager.stats.steps]


def test_locked_latents_outside_the_edit_are_the_sources(edit):
    config = paper(**STEPS["bracket"])
    found, run = edit(config, mask_image=mask()), run_of(edit.pipe, **arguments(edit.call, specedit=config))
    outside = ~found.mask.flatten(1)
    expected = edit.pipe._latents(run.model, run.source)
    if expected.dim() == 4:  # a picture, not packed tokens
        times = expected.shape[-1] // run.grid[1]
        outside = stages.on_pixels(outside, run.grid, times).expand_as(expected)
    assert outside.any() and torch.equal(found.images[outside], expected[outside])


# steps


@pytest.mark.parametrize("guided", [False, True], ids=["one branch", "guided"])
def test_a_mixed_step_of_all_blocks_is_a_dense_step(edit, guided):
    call = arguments(edit.call, guided, specedit=paper(), mask_image=mask())
    mixed_step_is_dense(run_of(edit.pipe, **call))


@pytest.mark.parametrize("lock_text", [False, True], ids=["", "locked text"])
@pytest.mark.parametrize("guided", [False, True], ids=["one branch", "guided"])
def test_a_step_over_cached_keys_is_the_whole_step_while_nothing_moves(edit, guided, lock_text):
    config = paper(stages=(0, 3, 1), kv_refresh=3, lock_text=lock_text)
    call = arguments(edit.call, guided, specedit=config, mask_image=mask())
    cached_step_is_whole(run_of(edit.pipe, **call))


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_a_coarse_step_over_kept_keys_is_the_whole_step_while_nothing_moves(edit, runner, guided=True):
    if runner not in edit.pipe.RUNNERS:
        pytest.skip(f"the model has no runner {runner!r}")
    call = arguments(edit.call, guided, specedit=paper(runner=runner), mask_image=mask())
    kept_coarse_step_is_whole(run_of(edit.pipe, **call))


def test_guidance_reaches_the_mixed_steps(edit):
    if not is_guided(edit):
        pytest.skip("the model has no true guidance")
    config = paper(**STEPS["locked"])
    one, two = (edit(config, guided, mask_image=mask()) for guided in (False, True))
    assert not torch.allclose(one.images, two.images, atol=1e-3)
    assert two.stats.flops > one.stats.flops


# adapters


@pytest.mark.slow
@pytest.mark.proves("LoRA")
@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_an_adapter_by_the_pipelines_own_loader_changes_the_edit(edit, runner):
    pytest.importorskip("peft")
    pipe = edit.pipe
    if runner not in pipe.RUNNERS:
        pytest.skip(f"the model has no runner {runner!r}")
    config = paper(**STEPS["locked text"], runner=runner)

    def run():
        return edit(config, mask_image=mask()).images

    before = run()
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(lora(pipe.transformer, ("to_q", "to_qkv"), scale=1.0), adapter_name="test")
    else:
        pipe.transformer.load_lora_adapter(
            lora(pipe.transformer, ("to_q", "to_qkv"), scale=1.0), adapter_name="test", prefix="transformer"
        )
    try:
        changed = run()
        assert changed.isfinite().all() and not torch.allclose(changed, before, atol=1e-3)
        other = edit(paper(**STEPS["locked text"], runner="eager"), mask_image=mask()).images
        assert torch.allclose(changed, other, atol=1e-3)
    finally:
        pipe.transformer.unload_lora()
    assert torch.allclose(run(), before, atol=1e-6)


# the page and the template


def test_the_page_and_the_template_name_every_hook():
    root = Path(__file__).parent.parent
    page = (root / "docs" / "add_a_model.md").read_text()
    template = (root / "specedit_kernels" / "models" / "TEMPLATE.py").read_text()
    compile(template, "TEMPLATE.py", "exec")
    hooks = [name for name, x in vars(SpecEditMixin).items() if "raise NotImplementedError" in source_of(x)]
    assert {"_size", "_encode_text", "_pictures", "_model"} <= set(hooks)
    asked = EditModel.__abstractmethods__ | set(hooks)
    assert [name for name in sorted(asked) if f"`{name}(" not in page] == []
    assert [name for name in sorted(asked) if f"def {name}(" not in template] == []
    named = {field.name for field in dataclasses.fields(registry.Model)} - {"name"}
    named |= {name for name in SpecEditMixin.__annotations__ if name.isupper()} | {"PIXELS", "TEXT_TO_IMAGE"}
    named -= {"STEPS_OF_PLAIN", "CONFIG"}  # found out; of FlashEdit
    assert [name for name in sorted(named) if name not in page] == []


def source_of(x):
    return inspect.getsource(x) if inspect.isfunction(x) else ""
