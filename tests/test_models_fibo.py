# SPDX-License-Identifier: Apache-2.0
"""FIBO-Edit on a tiny model of the published structure with random weights."""

import functools
import itertools
import json

import model_proofs as proofs
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (
    AutoencoderKLWan,
    BriaFiboEditPipeline,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from model_proofs import seeded
from tiny_models import paper, tiny_image, tiny_tokenizer
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from specedit_kernels import enable_specedit
from specedit_kernels.engine.model import Pictures
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.models.fibo import FiboText, WanCodec

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16  # of the text encoder


def tiny_fibo(seed=0):
    """A double and two single blocks of head dim 16, a residual Wan autoencoder of 16x, a text encoder of two layers
    (three hidden states: as many as blocks)."""
    torch.manual_seed(seed)
    transformer = BriaFiboTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, axes_dims_rope=[4, 6, 6], text_encoder_dim=WIDTH,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=16, num_res_blocks=1, dim_mult=[1, 2, 2, 2], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
    )  # fmt: skip
    encoder = SmolLM3ForCausalLM(
        SmolLM3Config(vocab_size=128001, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
                      num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    pipe = BriaFiboEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=tiny_tokenizer(64), transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def pair():
    plain = tiny_fibo()
    return plain, proofs.enabled(plain)


def prompt(words="make the cat blue"):
    return json.dumps({"edit_instruction": words})


def options(guided=True, pictures=1, **changes):
    image = [tiny_image(), tiny_image(96, 160, seed=1)][:pictures]
    return dict(image=image, prompt=prompt(), guidance_scale=3.0 if guided else 1.0, output_type="latent",
                height=128, width=128, **changes)  # fmt: skip


@pytest.mark.slow
@pytest.mark.proves("eager", "several references", "true guidance", model="FIBO-Edit")
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(guided, pictures):
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided, pictures))


@pytest.mark.slow
def test_negative_prompts_and_pixels():
    plain, ours = pair()
    call = options(pictures=2) | dict(negative_prompt="a red hat", output_type="np")
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
    assert got.shape == expected.shape == (1, 128, 128, 3) and (got == expected).all()


@pytest.mark.slow
def test_sizes_and_a_seed():
    plain, ours = pair()
    call = options(False) | dict(image=tiny_image(128, 192), height=None, width=None, _auto_resize=False, seed=3)
    expected = plain(num_inference_steps=4, **call).images
    out = ours(specedit=paper(**proofs.EVERYTHING), **call)
    assert torch.equal(out.images, expected) and out.mask.shape[1:] == (8, 12)


@functools.cache
def moved_pair():
    """`pair` with norms and layers away from what they start with, which would hide which belongs to which."""
    plain = tiny_fibo()
    random = seeded(4)
    with torch.no_grad():
        for weight in plain.transformer.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    return plain, proofs.enabled(plain)


@pytest.mark.slow
@pytest.mark.proves("fused", model="FIBO-Edit")
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_forward_is_the_eager_one(guided, pictures):
    """Prompts of two lengths: one is padded."""
    plain, ours = moved_pair()
    call = options(guided, pictures) | ({"negative_prompt": "a red hat"} if guided else {})
    proofs.fused_is_eager(ours, atol=2e-5, **call)
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING, runner="fused"), **call).images
    assert torch.allclose(got, expected, atol=2e-5) and not torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kv_refresh", [9, "bracket"])
def test_kept_keys_in_fp8_in_fused_steps(kv_refresh):
    _, ours = moved_pair()
    found = {}
    for runner, dtype in itertools.product(("eager", "fused"), ("auto", "fp8")):
        config = paper(stages=(1, 4, 0), finish="locked", kv_refresh=kv_refresh, kv_cache_dtype=dtype, runner=runner)
        out = ours(generator=seeded(), mask_image=proofs.mask(3), specedit=config, **options())
        found[runner, dtype] = out.images
    rounding = (found["eager", "fp8"] - found["eager", "auto"]).norm()
    assert (found["fused", "fp8"] - found["eager", "fp8"]).norm() < 0.2 * rounding and rounding > 0


@torch.no_grad()
def test_the_text_of_all_blocks_is_projected_once():
    _, ours = pair()
    counts, forward = [], torch.nn.Linear.forward

    def counted(layer, x):
        counts.append(layer)
        return forward(layer, x)

    embeds = torch.randn(1, 12, 2 * WIDTH, generator=seeded(3))
    text = FiboText(
        embeds, [torch.randn(1, 12, WIDTH, generator=seeded(i)) for i in range(3)], None, torch.zeros(12, 3)
    )
    model = ours._model(StepRunner("fused"), None, {})
    layout = model.dense_layout(text, Pictures((8, 8), ((8, 8),)), ((8, 8), (8, 8)))
    conditionings = model.timestep_conditioning(text, torch.tensor([600.0, 300.0]))
    projections = {layer.linear for layer in ours.transformer.caption_projection}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", counted)
        for conditioning in conditionings:
            model.velocity(text, torch.randn(1, 128, 16), conditioning, layout)
    assert sum(layer in projections for layer in counts) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
def test_replayed_steps_are_the_steps_to_the_last_bit(guided):
    plain = tiny_fibo()
    plain.to("cuda", torch.bfloat16)
    proofs.graphs_replay_fused_steps(proofs.enabled(plain), **options(guided))


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_nothing_selected_returns_the_source(guided):
    proofs.nothing_is_the_source(pair()[1], **options(guided, 2))
    proofs.the_rest_is_the_sources(pair()[1], **options(guided, 2))


@pytest.mark.slow
@pytest.mark.proves("batch", model="FIBO-Edit")
@pytest.mark.parametrize("guided", [False, True])
def test_batches_are_their_singles(guided):
    words = ["make the cat blue", "remove a red hat"]
    together = options(guided, 2) | dict(prompt=[prompt(w) for w in words])
    if guided:
        together["negative_prompt"] = ["the dog"] * 2
    singles = [together | dict(prompt=[prompt(w)]) for w in words]
    singles = [s | dict(negative_prompt=["the dog"]) if guided else s for s in singles]
    proofs.batches_are_their_singles(pair()[1], together, singles, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("others", [(), ((6, 10),)])
def test_a_mixed_sequence_of_fine_tokens_is_the_whole_pictures(others, padded):
    embeds = torch.randn(1, 12, 2 * WIDTH, generator=seeded(3))
    layers = [torch.randn(1, 12, WIDTH, generator=seeded(i)) for i in range(3)]
    mask = torch.arange(12)[None] < 12 - padded if padded else None
    proofs.mixed_is_dense(pair()[1], FiboText(embeds, layers, mask, torch.zeros(12, 3)), (8, 8), others)


def test_a_coarse_step_over_kept_keys_is_the_whole_step_while_nothing_moves():
    run = proofs.run_of(pair()[1], **options(True, 2), specedit=paper(), mask_image=proofs.mask())
    proofs.kept_coarse_step_is_whole(run)


@pytest.mark.slow
@pytest.mark.proves("LoRA", model="FIBO-Edit")
def test_lora_of_the_pipelines_own_loader():
    pytest.importorskip("peft")
    plain = tiny_fibo()
    ours = proofs.enabled(plain)
    state = proofs.lora(plain.transformer, ("attn.to_q", "proj_mlp"))
    proofs.lora_is_applied(
        plain, ours, lambda pipe: pipe.load_lora_weights(dict(state)), lambda pipe: pipe.unload_lora_weights(),
        **options(),
    )  # fmt: skip


@pytest.mark.slow
def test_enable_disable_and_what_is_refused():
    pipe = tiny_fibo()
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    before = [block.attn.processor for block in blocks]
    handle = enable_specedit(pipe, paper(stages=(1, 2, 1), runner="auto"))
    out = pipe(generator=seeded(), mask_image=proofs.mask(), **options())
    assert out.stats.nfe == 4 and out.stats.runner == "eager"
    for name, value in (("mask", tiny_image().convert("L")), ("timesteps", [1000, 500]), ("do_patching", True)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            pipe(**options() | {name: value})
    handle.disable()
    assert type(pipe) is BriaFiboEditPipeline
    assert all(block.attn.processor is processor for block, processor in zip(blocks, before))


@torch.no_grad()
def test_the_codec_is_the_plain_pipelines():
    plain, _ = pair()
    codec, picture = WanCodec(plain.vae), tiny_image(64, 96)
    pixels = plain.image_processor.preprocess(picture)
    packed, _ = plain.prepare_reference_latents(picture, 16, torch.float32, torch.device("cpu"))
    latents = codec.encode(pixels)
    assert torch.equal(latents.flatten(2).transpose(1, 2), packed)
    assert [x.shape[-2:] for x in codec.features(latents)] == [(4, 6), (4, 6), (8, 12)]
    assert codec.decode(latents).shape == (1, 3, 64, 96)


def test_a_result_of_the_sources_size():
    _, ours = pair()
    image = tiny_image(100, 150)
    call = options(pictures=2) | dict(image=[image, tiny_image(96, 160, seed=1)], height=None, width=None)
    mask = np.zeros((100, 150), np.uint8)
    mask[:40, :40] = 255
    config = paper(stages=(1, 2, 1), finish="locked")
    call |= dict(output_type="pil", output_size="source", mask_image=mask, specedit=config)
    got, source = np.asarray(ours(generator=seeded(), **call).images[0]), np.asarray(image)
    assert got.shape == source.shape and (got[80:, 100:] == source[80:, 100:]).all() and (got != source).any()
