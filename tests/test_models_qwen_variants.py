# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-Edit-2509, -2511 and FireRed-Image-Edit 1.0, 1.1: folders with the keys of their configs, in small, with
random weights, through the classes that serve them."""

import json

import model_proofs as proofs
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from tiny_models import qwen_text, tiny_image, tiny_qwen

from specedit_kernels.engine import registry

# What differs in transformer/config.json: 2511 modulates the references by timestep 0. FireRed 1.0 was trained from
# 2509's weights and loads as QwenImageEditPlusPipeline; its files were not at hand, nor 1.1's, which is taken to have
# 2509's values too. Whichever of the two kinds a folder is, it is one of these.
VARIANTS = {
    "Qwen-Image-Edit-2509": {},
    "Qwen-Image-Edit-2511": {"zero_cond_t": True, "use_additional_t_cond": False, "use_layer3d_rope": False},
    "FireRed-Image-Edit-1.0": {},
    "FireRed-Image-Edit-1.1": {"zero_cond_t": False},
}
KEYS = {"guidance_embeds": False, "patch_size": 2, "in_channels": 64, "out_channels": 16, "pooled_projection_dim": 768}
SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    real = stock.calculate_dimensions
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: real(min(area, 128 * 128), ratio))


def pair(name, folder):
    """(stock, SpecEdit), both loaded from one folder that is written as the published one is."""
    zero = bool(VARIANTS[name].get("zero_cond_t"))
    tiny_qwen(plus=True, zero_cond_t=zero).save_pretrained(folder)
    for part, changes in (("transformer", KEYS | VARIANTS[name]), ("scheduler", SCHEDULER)):
        [path] = (folder / part).glob("*config.json")
        config = json.loads(path.read_text())
        variants = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        small = {k: v for k, v in config.items() if k not in variants}
        path.write_text(json.dumps((small if part == "transformer" else config) | changes))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "QwenImageEditPlusPipeline"
    plain = QwenImageEditPlusPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, processor=None)
    plain.set_progress_bar_config(disable=True)
    assert plain.transformer.zero_cond_t is zero
    return plain, proofs.enabled(plain)


@pytest.fixture(params=VARIANTS, scope="module")
def pipes(request, tmp_path_factory):
    return pair(request.param, tmp_path_factory.mktemp(request.param))


def options(guided=False, pictures=2, **changes):
    text = qwen_text(padded=0)
    if guided:
        text |= qwen_text(7, negative=True, seed=4) | {"true_cfg_scale": 3.0}
    image = [tiny_image(), tiny_image(96, 160, seed=1)][:pictures]
    return {**text, "image": image, "height": 128, "width": 128, "output_type": "latent", **changes}


@pytest.mark.slow
@pytest.mark.proves("eager", "several references", "true guidance")
@pytest.mark.parametrize("guided", [False, True])
def test_everything_and_nothing_selected(pipes, guided):
    proofs.everything_is_the_plain_pipeline(*pipes, **options(guided))
    proofs.nothing_is_the_source(pipes[1], **options(guided))
    proofs.the_rest_is_the_sources(pipes[1], **options(guided))


@pytest.mark.slow
@pytest.mark.proves("batch")
def test_batches_are_their_singles(pipes):
    together = options(num_images_per_prompt=2)
    proofs.batches_are_their_singles(pipes[1], together, [options()] * 2, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.slow
@pytest.mark.proves("fused")
def test_the_fused_forward_is_the_eager_one(pipes):
    proofs.fused_is_eager(pipes[1], **options(True))


@pytest.mark.slow
@pytest.mark.proves("LoRA")
def test_lora_of_the_pipelines_own_loader(pipes):
    pytest.importorskip("peft")
    plain, ours = pipes
    state = proofs.lora(plain.transformer, ("attn.to_q", "attn.to_out.0"))
    proofs.lora_is_applied(
        plain, ours, lambda pipe: pipe.load_lora_weights(dict(state)), lambda pipe: pipe.unload_lora_weights(),
        **options(),
    )  # fmt: skip


def test_the_folders_class_is_served(pipes):
    plain, ours = pipes
    assert registry.pipeline_of(type(plain)) is type(ours)
