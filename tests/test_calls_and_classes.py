# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's users see around an edit: classes in and out, saving, arguments, what callbacks see."""

import inspect
import logging
import shutil

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DiffusionPipeline, FluxKontextPipeline
from tiny_models import call_options, paper, qwen_text, tiny_image, tiny_pipeline, tiny_qwen

import specedit_kernels
from specedit_kernels import (
    FlashEditConfig,
    FlashEditFluxKontextPipeline,
    SpecEditFluxKontextPipeline,
    SpecEditQwenImageEditPipeline,
    disable_specedit,
    enable_specedit,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plain():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(plain):
    made = SpecEditFluxKontextPipeline(**plain.components)
    made.set_progress_bar_config(disable=True)
    yield made
    disable_specedit(made)


def options(**more):
    return dict(call_options(image=tiny_image(), generator=seeded(), specedit=paper(stages=(1, 1, 1)))) | more


# classes


class Mine(FluxKontextPipeline):
    """A user's subclass, with a method and a call of its own."""

    def shout(self):
        return "mine"

    def __call__(self, *args, **kwargs):
        self.called = True
        return super().__call__(*args, **kwargs)


def test_a_subclass_of_a_stock_pipeline_is_served_and_comes_back(plain):
    mine = Mine(**plain.components)
    mine.set_progress_bar_config(disable=True)
    enable_specedit(mine, paper(stages=(1, 1, 1)))
    assert isinstance(mine, SpecEditFluxKontextPipeline) and mine.shout() == "mine"
    assert mine(**options(specedit=None)).stats.nfe == 3 and not hasattr(mine, "called")
    mine(**options(specedit=False, num_inference_steps=1))
    assert mine.called
    disable_specedit(mine)
    assert type(mine) is Mine


def test_disabling_undoes_a_flash_pipeline_too(plain):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe(**options(specedit=FlashEditConfig(ssca=False)))
    disable_specedit(pipe)
    assert type(pipe) is FluxKontextPipeline
    names = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert names == {"FluxAttnProcessor"} and not [name for name in vars(pipe) if "specedit" in name]


def test_a_handle_outlives_its_pipelines_specedit(plain):
    pipe = FluxKontextPipeline(**plain.components)
    handle = enable_specedit(pipe)
    assert handle.stats() is None
    handle.disable()
    assert handle.stats() is None and type(pipe) is FluxKontextPipeline


@pytest.mark.slow
def test_what_is_saved_loads_without_this_package(plain, tmp_path):
    pipe = FluxKontextPipeline(**plain.components)
    enable_specedit(pipe)
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is FluxKontextPipeline
    assert type(SpecEditFluxKontextPipeline.from_pretrained(tmp_path)) is SpecEditFluxKontextPipeline


def test_from_pipe_keeps_each_weights_dtype():
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    made = SpecEditFluxKontextPipeline.from_pipe(pipe)
    assert type(made) is SpecEditFluxKontextPipeline and made.transformer is pipe.transformer
    assert made.transformer.dtype == torch.bfloat16 and made.vae.dtype == torch.float32
    asked = SpecEditFluxKontextPipeline.from_pipe(pipe, torch_dtype=torch.float64)
    assert asked.vae.dtype == torch.float64


def test_the_call_shows_its_arguments():
    found = inspect.signature(SpecEditFluxKontextPipeline.__call__).parameters
    stock = inspect.signature(FluxKontextPipeline.__call__).parameters
    assert list(stock) == list(found)[: len(stock)]
    assert {"specedit", "mask_image"} <= found.keys() and found["num_inference_steps"].default is None
    assert "max_area" in inspect.signature(SpecEditQwenImageEditPipeline.__call__).parameters
    assert "source_prompt" in inspect.signature(FlashEditFluxKontextPipeline.__call__).parameters


def test_names_of_pipelines_come_from_what_is_registered():
    assert specedit_kernels.supported_models()["qwen_image_edit"] == (
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    with pytest.raises(AttributeError, match="SpecEditNothingPipeline"):
        specedit_kernels.SpecEditNothingPipeline  # noqa: B018


# arguments


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ((tiny_image(),), TypeError, "image: expected a PIL image, an array or a tensor or a list of them, got tuple"),
        ("photo.png", TypeError, "image: .* got str"),
        ([], ValueError, "image: expected at least one picture, got an empty list"),
        ([[tiny_image()]], TypeError, "image: .* in the list, got list at 0"),
        (np.zeros(8, np.float32), ValueError, "image: expected at least two dimensions"),
        (torch.zeros(1, 3, 0, 8), ValueError, "image: expected at least one pixel"),
    ],
    ids=["tuple", "path", "empty list", "nested", "one dimension", "no pixels"],
)
def test_wrong_images_are_named(pipe, image, error, message):
    with pytest.raises(error, match=message):
        pipe(**options(image=image))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_floating_point_dtype(pipe, dtype):
    levels = torch.from_numpy(np.asarray(tiny_image(), np.float32) / 255).permute(2, 0, 1)[None].to(dtype)
    small = dict(height=96, width=96, max_area=96 * 96)
    found, want = (pipe(**options(image=x, output_type="pt", **small)).images for x in (levels, levels.float()))
    assert torch.equal(found, want)


@pytest.mark.slow
def test_one_negative_prompt_serves_all_prompts(pipe):
    for runner in ("eager", "fused"):
        config = paper(stages=(1, 1, 1), threshold=-1.0, runner=runner)
        made = {}
        for negative in ("red", ["red", "red"]):
            text = dict(prompt=["make the cat blue", "add a hat"], negative_prompt=negative, true_cfg_scale=3.0)
            text |= dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds"))
            made[str(negative)] = pipe(**options(specedit=config, output_type="pt", **text)).images
        one, two = made.values()
        assert one.shape[0] == 2 and torch.equal(one, two)


def test_other_numbers_of_negative_prompts_are_named(pipe):
    text = dict(prompt=["make the cat blue"] * 2, negative_prompt=["red"] * 3, true_cfg_scale=3.0)
    text |= dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds"))
    with pytest.raises(ValueError, match="negative_prompt: expected 1 or 2, as many as prompts, got 3"):
        pipe(**options(**text))


@pytest.mark.slow
def test_one_negative_of_qwen_serves_all_prompts():
    plain = tiny_qwen()
    pipe = SpecEditQwenImageEditPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    text = qwen_text(batch=2) | qwen_text(batch=2, negative=True)
    one = {k: v[:1] if k.startswith("negative") else v for k, v in text.items()}
    two = {k: v[:1].repeat(2, *[1] * (v.dim() - 1)) if k.startswith("negative") else v for k, v in text.items()}
    same = dict(image=tiny_image(), true_cfg_scale=2.0, max_area=96 * 96, output_type="pt")
    config = paper(stages=(1, 1, 1), threshold=-1.0)
    found = [pipe(**same, **t, generator=seeded(), specedit=config).images for t in (one, two)]
    assert found[0].shape[0] == 2 and torch.equal(*found)


@pytest.mark.slow
def test_a_number_of_steps_wins_over_the_preset_and_is_said_once(pipe, caplog):
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        for _ in range(2):
            out = pipe(**options(specedit=paper(preset=4), num_inference_steps=5))
    assert out.stats.nfe == 5
    assert caplog.text.count("num_inference_steps: the config's 4 steps are scaled to 5") == 1


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [([], "at least one"), ([0.5, 0.9], "strictly decreasing"), ([1.5, 0.5], r"in \(0, 1\]"), ([1.0], "sigmas: 1 of")],
)
def test_wrong_sigmas_are_called_so(pipe, sigmas, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options(sigmas=sigmas))
    flash = FlashEditFluxKontextPipeline(**pipe.components)
    with pytest.raises(ValueError, match="sigmas: 2 of them were given"):
        flash(**options(specedit=FlashEditConfig(), sigmas=[1.0, 0.5]))


def test_flash_without_encoders_needs_the_source_texts_embeddings(plain):
    parts = dict(plain.components) | dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    flash = FlashEditFluxKontextPipeline(**parts)
    text = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    with pytest.raises(ValueError, match="source_prompt: expected the source text's embeddings"):
        flash(image=tiny_image(), specedit=FlashEditConfig(), **text)
    half = {"negative_pooled_prompt_embeds": text["pooled_prompt_embeds"]}
    with pytest.raises(ValueError, match="negative_prompt_embeds: expected the source text's"):
        flash(image=tiny_image(), specedit=FlashEditConfig(), **text, **half)


# what a callback sees


@pytest.mark.parametrize("finish", ["full", "locked"])
def test_a_callback_sees_the_runs_own_schedule(pipe, finish):
    seen = []

    def look(pipeline, index, timestep, tensors):
        scheduler = pipeline.scheduler
        seen.append((index, float(timestep), float(scheduler.timesteps[index]), float(pipeline.current_timestep)))
        assert scheduler.step_index == index + 1 and len(scheduler.sigmas) == len(scheduler.timesteps) + 1
        return {}

    mask = PIL.Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    config = paper(stages=(1, 2, 1), finish=finish)
    pipe(**options(specedit=config, mask_image=mask, callback_on_step_end=look))
    assert [index for index, *_ in seen] == [0, 1, 2, 3]
    assert all(at == pytest.approx(there) == pytest.approx(now) for _, at, there, now in seen)


def test_the_current_timestep_is_that_of_the_step_at_work(pipe, monkeypatch):
    seen, forward = [], pipe.transformer.forward

    def watched(*args, **kwargs):
        seen.append((float(kwargs["timestep"][0]) * 1000, float(pipe.current_timestep)))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", watched)
    pipe(**options(specedit=paper(stages=(1, 1, 1), threshold=-1.0)))
    assert len(seen) == 3 and all(at == pytest.approx(now) for at, now in seen)


# loading


@pytest.mark.slow
def test_a_folder_that_lacks_something_is_not_loaded(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    assert SpecEditFluxKontextPipeline.from_pretrained(tmp_path).transformer is not None
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = safetensors.torch.load_file(path)
    name = "transformer_blocks.0.attn.to_q.weight"
    for change, message in (
        (lambda held: held.pop(name), "transformer: lacks the tensor transformer_blocks.0.attn.to_q.weight"),
        (lambda held: held.update({name: whole[name] * float("nan")}), "transformer: not finite"),
    ):
        held = dict(whole)
        change(held)
        safetensors.torch.save_file(held, path)
        with pytest.raises(ValueError, match=message):
            SpecEditFluxKontextPipeline.from_pretrained(tmp_path)
    # one that the caller brings is not looked for there
    SpecEditFluxKontextPipeline.from_pretrained(tmp_path, transformer=plain.transformer)
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="has no tokenizer_2"):
        SpecEditFluxKontextPipeline.from_pretrained(tmp_path, transformer=plain.transformer)


@pytest.mark.slow
def test_a_tensor_too_many_is_left_out_and_said(plain, tmp_path, caplog):
    plain.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {"extra": torch.zeros(1)}, path)
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        SpecEditFluxKontextPipeline.from_pretrained(tmp_path)
    assert "transformer: has the tensor extra, which the model has not" in caplog.text
