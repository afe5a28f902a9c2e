# SPDX-License-Identifier: Apache-2.0
"""LongCat-Image-Edit on a tiny model of the published structure with random weights."""

import functools

import model_proofs as proofs
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock
from model_proofs import seeded
from tiny_models import paper, tiny_image

from specedit_kernels import enable_specedit
from specedit_kernels.models.longcat import LongCatText

TEXT = 24


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """The stock pipeline works on a megapixel; here on 128 x 128 pixels. Its vision encoder is left out: what stands
    for it depends on the prompt and on the picture that it is given, and pads nothing."""
    real = stock.calculate_dimensions
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: real(min(area, 128 * 128), ratio))

    def encode(self, prompt, image):
        generator = seeded(sum(map(ord, prompt[0])))
        return torch.randn(1, 9 + len(prompt[0]), TEXT, generator=generator) + np.asarray(image).mean() / 255

    monkeypatch.setattr(LongCatImageEditPipeline, "_encode_prompt", encode)


class NoProcessor:
    image_processor = None


def tiny_longcat(seed=0):
    """A double and a single block of head dim 16, FLUX.1's autoencoder."""
    torch.manual_seed(seed)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, scaling_factor=0.36,
        shift_factor=0.12,
    )  # fmt: skip
    pipe = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae.eval(), text_encoder=None, tokenizer=None,
        text_processor=NoProcessor(), transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def pair():
    plain = tiny_longcat()
    return plain, proofs.enabled(plain)


def options(guided=True, **changes):
    guidance = 3.0 if guided else 1.0
    return dict(image=tiny_image(), prompt="make it blue", guidance_scale=guidance, output_type="latent", **changes)


@pytest.mark.parametrize("guided", [False, True])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(guided):
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided), num_images_per_prompt=2)
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided) | dict(negative_prompt="red", prompt=["a cat"]))


def test_the_plain_pixels_and_bfloat16():
    plain, ours = pair()
    call = options() | dict(output_type="np", image=tiny_image(96, 192))
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
    assert got.shape == expected.shape == (1, 96, 192, 3) and (got == expected).all()


@pytest.mark.parametrize("guided", [False, True])
def test_nothing_selected_returns_the_source(guided):
    proofs.nothing_is_the_source(pair()[1], **options(guided))


def test_batches_are_their_singles():
    together = options(num_images_per_prompt=2)
    proofs.batches_are_their_singles(pair()[1], together, [options()] * 2, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_forward_is_the_eager_one(guided):
    proofs.fused_is_eager(pair()[1], **options(guided))


def test_a_mixed_sequence_of_fine_tokens_is_the_whole_pictures():
    embeds = torch.randn(1, 12, TEXT, generator=seeded(3))
    ids = stock.prepare_pos_ids(num_token=12)
    proofs.mixed_is_dense(pair()[1], LongCatText(embeds, ids, 15), (8, 8))


def test_lora_of_the_transformers_loader():
    """The stock pipeline has no LoRA loader; its transformer has one."""
    pytest.importorskip("peft")
    plain = tiny_longcat()
    ours = proofs.enabled(plain)
    state = proofs.lora(plain.transformer, ("attn.to_q", "proj_mlp"))
    proofs.lora_is_applied(
        plain, ours, lambda pipe: pipe.transformer.load_lora_adapter(dict(state), prefix="transformer"),
        lambda pipe: pipe.transformer.unload_lora(), **options(),
    )  # fmt: skip


def test_the_layout_of_a_call_is_gone_after_it():
    plain, ours = pair()
    expected = plain(num_inference_steps=2, generator=seeded(), **options()).images
    ours(generator=seeded(), mask_image=proofs.mask(), specedit=paper(stages=(1, 2, 1)), **options())
    assert torch.equal(ours(specedit=False, num_inference_steps=2, generator=seeded(), **options()).images, expected)


def test_enable_disable_and_several_pictures():
    pipe = tiny_longcat()
    before = dict(pipe.transformer.attn_processors)
    handle = enable_specedit(pipe, paper(stages=(1, 2, 1)))
    assert pipe(generator=seeded(), mask_image=proofs.mask(), **options()).stats.nfe == 4
    with pytest.raises(ValueError, match="image: LongCatImageEditPipeline takes one picture a call, got 2"):
        pipe(**options() | dict(image=[tiny_image()] * 2))
    handle.disable()
    assert type(pipe) is LongCatImageEditPipeline
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
