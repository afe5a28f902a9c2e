# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (FluxPipeline) as FlashEdit's base: a model that does not see its source. Random weights."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import FluxPipeline
from model_proofs import lora, mask, run_of, seeded
from tiny_models import tiny_image, tiny_pipeline

from specedit_kernels import (
    FlashEditConfig,
    FlashEditFluxKontextPipeline,
    FlashEditFluxPipeline,
    SpecEditFluxPipeline,
    disable_specedit,
    enable_specedit,
)
from specedit_kernels.engine import stages
from specedit_kernels.flash_edit.cosi.low_rank import add_low_rank, low_rank_state, merged_copy, save_low_rank
from specedit_kernels.flash_edit.pipeline import GENERATOR, INVERTER
from specedit_kernels.sampling import grid as grids

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = dict(prompt="make the cat blue", source_prompt="a red cat")


@pytest.fixture(scope="module")
def plain():
    pipe = FluxPipeline(**tiny_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def weights(plain, tmp_path_factory):
    """A COSI folder with random changes."""
    folder = tmp_path_factory.mktemp("cosi")
    save_low_rank({}, folder / "none.safetensors")
    torch.manual_seed(5)
    for name in (GENERATOR, INVERTER):
        module = merged_copy(plain.transformer, folder / "none.safetensors")
        for parameter in add_low_rank(module, 4):
            parameter.data.normal_(std=0.1)
        save_low_rank(low_rank_state(module), folder / name)
    return folder


@pytest.fixture
def pipe(plain, weights):
    pipe = FlashEditFluxPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    yield pipe
    pipe.unload_cosi()
    disable_specedit(pipe)


def edit(pipe, columns=None, seed=1, call=None, **options):
    given = dict(image=tiny_image(), max_sequence_length=16, output_type="latent", generator=seeded(seed)) | PROMPTS
    chosen = None if columns is None else mask(columns)
    return pipe(mask_image=chosen, specedit=FlashEditConfig(**options), **given | (call or {}))


def stages_of(out):
    return [(step.stage, step.tokens[0]) for step in out.stats.steps]


# what is refused


def test_specedit_itself_says_that_it_does_not_serve_it(plain):
    with pytest.raises(TypeError, match="^pipe: SpecEdit needs a model that sees its source, got FluxPipeline, which "):
        enable_specedit(plain)
    assert type(plain) is FluxPipeline
    ours = SpecEditFluxPipeline(**plain.components)
    with pytest.raises(TypeError, match="which FlashEditFluxPipeline serves$"):
        ours(prompt="a cat", image=tiny_image())


@pytest.mark.proves("true guidance", refused="FlashEdit's second branch is the source's", model="FLUX.1")
def test_guidance_is_refused(pipe):
    with pytest.raises(ValueError, match="true_cfg_scale: expected none with FlashEdit"):
        edit(pipe, 4, call=dict(true_cfg_scale=3.0))


@pytest.mark.proves("several references", refused="it sees none", model="FLUX.1")
def test_a_second_picture_is_no_reference(pipe):
    with pytest.raises(ValueError, match="as many pictures as prompts"):
        edit(pipe, 4, call=dict(image=[tiny_image(), tiny_image(seed=1)]))
    with pytest.raises(ValueError, match="ip_adapter_image: IP-Adapter is not supported"):
        edit(pipe, 4, call=dict(ip_adapter_image=tiny_image()))


@pytest.mark.proves("several GPUs", refused="FlashEdit's sequence is not shared", model="FLUX.1")
def test_a_shared_sequence_is_refused(pipe, monkeypatch):
    shared = SimpleNamespace(context_parallel_config=object())
    monkeypatch.setattr(pipe.transformer, "_parallel_config", shared, raising=False)
    with pytest.raises(ValueError, match="transformer: expected no context parallelism"):
        edit(pipe, 4)


# what is there


@pytest.mark.proves("eager", model="FLUX.1")
def test_without_a_picture_or_with_all_selected_it_is_the_stock_pipeline(pipe, plain):
    call = dict(prompt=PROMPTS["prompt"], height=128, width=128, max_sequence_length=16, output_type="latent")
    pipe.unload_cosi()
    one = plain(num_inference_steps=1, generator=seeded(), **call).images
    assert torch.equal(pipe(num_inference_steps=1, generator=seeded(), **call).images, one)
    assert torch.equal(pipe(num_inference_steps=1, generator=seeded(), specedit=False, **call).images, one)
    whole = edit(pipe, 8).images
    assert torch.allclose(whole, one, atol=1e-4)  # in attention of our own
    # the source does not matter where nothing of it enters
    assert torch.equal(edit(pipe, 8, call=dict(image=tiny_image(seed=3))).images, whole)


@pytest.mark.slow
def test_the_source_enters_by_its_noise_and_its_keys_and_values(pipe):
    """Outside the region the latents are the source's; inside, all three of another source's are felt."""
    out = edit(pipe, 4)
    assert stages_of(out) == [("invert", 64), ("source", 64), ("edit", 32)]
    assert out.stats.inverted and out.stats.steps[-1].keys[0] == 64
    run = run_of(pipe, image=tiny_image(), specedit=FlashEditConfig(), **PROMPTS)
    assert run.references == () and run.pictures.others == () and run.plain_tokens == 64
    source, inside = grids.pack(run.source), out.mask.flatten(1)
    assert torch.equal(out.images[~inside], source[~inside]) and inside.float().mean() == 0.5
    other = edit(pipe, 4, call=dict(image=tiny_image(seed=3))).images[inside]
    assert not torch.allclose(other, out.images[inside], atol=1e-2)
    for options in (dict(cosi=False), dict(bg_shield=False), dict(region_noise="white")):
        assert not torch.allclose(edit(pipe, 4, **options).images[inside], out.images[inside], atol=1e-3), options


def test_noise_of_the_region_follows_the_model(pipe, plain):
    assert torch.equal(edit(pipe, 4).images, edit(pipe, 4, region_noise="inverted").images)
    editor = FlashEditFluxKontextPipeline(**plain.components)
    assert FlashEditConfig().noise_of_region(editor.SEES_SOURCE) == "white"
    assert FlashEditConfig(region_noise="white").noise_of_region(False) == "white"


@pytest.mark.slow
def test_the_region_is_where_the_two_captions_differ(pipe):
    out = edit(pipe, mask_ratio=1.5, dilation=0)
    assert stages_of(out)[:4] == [("invert", 16), ("draft", 16), ("draft", 16), ("invert", 64)]
    assert out.scores.mean() == pytest.approx(1) and 0 < out.mask.float().mean() < 1
    same = edit(pipe, call=dict(source_prompt=PROMPTS["prompt"]))
    assert same.stats.fallback == "source" and not same.scores.any()


def test_inversion_and_editing_in_steps(pipe):
    """Both from the model's own velocities of the target alone, by hand."""
    out = edit(pipe, method="inversion", steps=2)
    run = run_of(pipe, image=tiny_image(), specedit=FlashEditConfig(), max_sequence_length=16, **PROMPTS)
    tokens, sigmas = grids.pack(run.source), pipe._plain_sigmas(2, 64, None)
    layout = run.model.dense_layout(run.positive, run.pictures, [run.grid])
    with torch.no_grad():
        for text, path in ((run.source_text, sigmas[::-1]), (run.positive, sigmas)):
            for at, to in itertools.pairwise(path):
                velocity = run.model.velocity(text, tokens, torch.tensor(1000 * at), layout)
                tokens = tokens + (to - at) * velocity
    assert torch.allclose(out.images, tokens, atol=1e-5)


@pytest.mark.slow
@pytest.mark.proves("fused", "FlashEdit", model="FLUX.1")
def test_fused_edits_are_the_eager_ones(pipe):
    for options in (dict(), dict(bg_shield=False)):
        eager, fused = (edit(pipe, 4, runner=runner, **options) for runner in ("eager", "fused"))
        assert (eager.stats.runner, fused.stats.runner) == ("eager", "fused")
        assert torch.allclose(fused.images, eager.images, atol=1e-4) and eager.images.std() > 0.01


@pytest.mark.slow
@pytest.mark.proves("fp8", model="FLUX.1")
def test_both_networks_and_both_drafts_compute_in_fp8(pipe):
    for columns in (4, None):
        exact, rounded = (edit(pipe, columns, runner="fused", precision=p) for p in ("auto", "fp8"))
        assert rounded.stats.precision == "fp8" and rounded.stats.inverted and rounded.stats.fp8_bytes > 0
        assert torch.isfinite(rounded.images).all() and not torch.equal(rounded.images, exact.images)
    exact, rounded = (edit(pipe, 4, runner="fused", precision=p).images for p in ("auto", "fp8"))
    assert 0 < (rounded - exact).norm() < 0.2 * exact.norm()
    same = edit(pipe, runner="fused", precision="fp8", call=dict(source_prompt=PROMPTS["prompt"]))
    assert same.stats.fallback == "source" and not same.scores.any()


@pytest.mark.slow
@pytest.mark.proves("batch", model="FLUX.1")
def test_prompts_and_pictures_of_a_batch_are_their_singles(pipe):
    images, sources = [tiny_image(), tiny_image(seed=1)], ["a red cat", "the dog"]
    call = dict(image=images, prompt=["make the cat blue", "a dog"], source_prompt=sources)
    both = edit(pipe, 4, call=call | dict(generator=[seeded(5), seeded(6)]))
    for i in range(2):
        alone = edit(pipe, 4, seed=5 + i, call={name: value[i] for name, value in call.items()})
        assert torch.allclose(both.images[i], alone.images[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.proves("LoRA", model="FLUX.1")
def test_an_adapter_by_the_pipelines_own_loader_changes_the_edit(pipe):
    pytest.importorskip("peft")
    before = edit(pipe, 4).images
    pipe.load_lora_weights(lora(pipe.transformer, ("to_q",), scale=1.0), adapter_name="test")
    try:
        eager, fused = (edit(pipe, 4, runner=runner).images for runner in ("eager", "fused"))
        assert not torch.allclose(eager, before, atol=1e-3) and torch.allclose(eager, fused, atol=1e-3)
    finally:
        pipe.unload_lora_weights()
    assert torch.allclose(edit(pipe, 4).images, before, atol=1e-6)


def test_disabled_the_very_objects_come_back(plain, weights):
    before = dict(plain.transformer.attn_processors)
    pipe = FlashEditFluxPipeline.from_pipe(plain)
    pipe.load_cosi(weights)
    edit(pipe, 4)
    disable_specedit(pipe)
    assert type(pipe) is FluxPipeline and not any(m._forward_hooks for m in plain.transformer.modules())
    assert all(plain.transformer.attn_processors[name] is one for name, one in before.items())


@pytest.mark.slow
def test_sizes(pipe):
    wide = tiny_image(170, 100)
    expected = {(): (160, 96), (("max_area", 64 * 64),): (64, 32), (("height", 64), ("width", 100)): (64, 96)}
    for given, size in expected.items():
        assert pipe.working_size(wide, prompt="a cat", **dict(given)) == size
    out = edit(pipe, call=dict(image=wide, region="0,0,40%,40%", output_size="source", output_type="np"))
    found, source = out.images[0], np.array(wide)
    assert found.shape == source.shape and np.array_equal(found[-40:], source[-40:])


@pytest.mark.slow
def test_a_missing_caption_is_said_once(pipe, caplog):
    for _ in range(2):
        edit(pipe, 4, call=dict(source_prompt=""))
    assert caplog.text.count("source_prompt: no caption of the source is given") == 1


def test_no_reference_has_the_targets_grid():
    pictures = stages.Pictures((4, 4), ())
    assert not pictures.aligned and pictures.others == ()
