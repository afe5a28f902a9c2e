# SPDX-License-Identifier: Apache-2.0
"""LongCat-Image-Edit on a tiny model of the published structure with random weights."""

import functools

import model_proofs as proofs
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    LongCatImageEditPipeline,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock
from model_proofs import seeded
from tiny_models import WIDTH as TEXT
from tiny_models import paper, small_longcat, tiny_image, tiny_longcat

from specedit_kernels import enable_specedit
from specedit_kernels.models.longcat import LongCatText


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    small_longcat(monkeypatch)


@functools.cache
def pair():
    plain = tiny_longcat()
    return plain, proofs.enabled(plain)


def options(guided=True, **changes):
    guidance = 3.0 if guided else 1.0
    return dict(image=tiny_image(), prompt="make it blue", guidance_scale=guidance, output_type="latent", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(guided):
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided), num_images_per_prompt=2)
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided) | dict(negative_prompt="red", prompt=["a cat"]))


@pytest.mark.slow
def test_the_plain_pixels_and_bfloat16():
    plain, ours = pair()
    call = options() | dict(output_type="np", image=tiny_image(96, 192))
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
    assert got.shape == expected.shape == (1, 96, 192, 3) and (got == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_nothing_selected_returns_the_source(guided):
    proofs.nothing_is_the_source(pair()[1], **options(guided))
    proofs.the_rest_is_the_sources(pair()[1], **options(guided))


@pytest.mark.slow
def test_batches_are_their_singles():
    together = options(num_images_per_prompt=2)
    proofs.batches_are_their_singles(pair()[1], together, [options()] * 2, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_forward_is_the_eager_one(guided):
    proofs.fused_is_eager(pair()[1], **options(guided))


def test_a_mixed_sequence_of_fine_tokens_is_the_whole_pictures():
    embeds = torch.randn(1, 12, TEXT, generator=seeded(3))
    ids = stock.prepare_pos_ids(num_token=12)
    proofs.mixed_is_dense(pair()[1], LongCatText(embeds, ids, 15), (8, 8))


@pytest.mark.slow
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
