# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-2.1's edits on a tiny model of the published structure with random weights."""

import functools
import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import model_proofs as proofs
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from model_proofs import seeded
from tiny_models import paper, tiny_image

from specedit_kernels import enable_specedit
from specedit_kernels.engine.attention import wrap_processors
from specedit_kernels.engine.model import Pictures
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.engine.stages import Reference
from specedit_kernels.models import qwen_image_21 as fused
from specedit_kernels.models.qwen_image_21 import Qwen21Codec, Qwen21Text
from specedit_kernels.sampling.layout import build_layout

TEXT = 24


class TinyProcessor:
    """What the pipeline's __init__ asks of a Qwen3VLProcessor."""

    class tokenizer:
        @staticmethod
        def encode(text):
            return [60]

    def apply_chat_template(self, *args, **kwargs):
        return [[1, 2]]


def without_encoder(patch):
    """In place of the vision encoder: a text that depends on the prompt, words about each picture's vision tokens, one
    for 32 x 32 pixels, and padding after the shorter prompt of a batch."""

    def encode(self, prompt=None, image=None, device=None):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        slots = [False] * 3
        for picture in image or []:
            slots += [True] * (picture.width // 32 * (picture.height // 32)) + [False] * 2
        lengths = [len(slots) + len(words) // 2 for words in prompt]
        embeds = torch.zeros(len(prompt), max(lengths), TEXT)
        mask = torch.zeros(len(prompt), max(lengths), dtype=torch.long)
        for i, (words, length) in enumerate(zip(prompt, lengths)):
            embeds[i, :length] = torch.randn(length, TEXT, generator=seeded(sum(map(ord, words))))
            mask[i, :length] = 1
        pad = torch.tensor(slots + [False] * (max(lengths) - len(slots)))
        return embeds.to(device, self.transformer.dtype), mask.to(device), pad.expand(len(prompt), -1).to(device)

    patch.setattr(QwenImage21Pipeline, "_get_qwen_prompt_embeds", encode)


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    without_encoder(monkeypatch)


def tiny_qwen21(seed=0):
    """Two blocks of head dim 16, a residual autoencoder of 16x with four channels."""
    torch.manual_seed(seed)
    transformer = QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=TEXT, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    statistics = torch.rand(2, 16, generator=seeded(8)).add(0.5).tolist()
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1,
        latents_mean=statistics[0], latents_std=statistics[1],
    )  # fmt: skip
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=vae.eval(), text_encoder=None, processor=TinyProcessor(), transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def pair():
    plain = tiny_qwen21()
    return plain, proofs.enabled(plain)


@functools.cache
def moved_pair():
    """`pair` with norms and layers away from what they start with, which would hide which belongs to which."""
    plain = tiny_qwen21()
    random = seeded(4)
    with torch.no_grad():
        for weight in plain.transformer.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    return plain, proofs.enabled(plain)


def stock_forward(model, text, target):
    """The velocity of the stock forward for a whole target at timestep 600."""
    wider = torch.cat([text.slots, text.slots.new_ones(1, target.shape[1] // 4)], dim=1)
    return model.transformer(
        hidden_states=torch.cat([model.seen, target], dim=1), timestep=torch.tensor([0.6]),
        encoder_hidden_states=text.embeds, encoder_hidden_states_mask=text.mask,
        img_shapes=[[(1, *grid) for grid in (*model.grids, model.grid)]], img_mask=wider, return_dict=False,
    )[0][:, -target.shape[1] :]  # fmt: skip


def mixed_of(ours, runner):
    """(a model, a text about one reference, the layout of all of an 8 x 8 target whose keys are kept)."""
    slots = torch.tensor([False] * 3 + [True] * 16 + [False] * 5)[None]
    text = Qwen21Text(torch.randn(1, slots.shape[1], TEXT, generator=seeded(3)), None, slots)
    model = ours._model(runner and StepRunner(runner), None, {})
    source = torch.randn(1, 16, 8, 8, generator=seeded(0))
    model.begin(Namespace(grid=(8, 8), patch=1, references=[Reference(None, source, 1)]))
    order = torch.randperm(16, generator=seeded(6))[None].int()
    layout = build_layout(order, torch.tensor([16]), (8, 8), 64, condition=False)
    return model, text, model.mixed_layout(text, Pictures((8, 8), ((8, 8),)), layout, key_bias=True, cached=True)


def options(guided=False, pictures=1, **changes):
    image = [tiny_image().convert("RGBA"), tiny_image(96, 192, seed=1).convert("RGBA")][:pictures]
    found = dict(image=image, prompt="make the cat blue", output_resolution=128, height=128, width=128,
                 output_type="latent", **changes)  # fmt: skip
    return found | dict(negative_prompt="red", true_cfg_scale=3.0) if guided else found


@pytest.mark.slow
@pytest.mark.proves("eager", "several references", "true guidance", model="Qwen-Image-2.1")
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(guided, pictures):
    proofs.everything_is_the_plain_pipeline(*pair(), **options(guided, pictures))


def test_the_plain_pixels_and_a_padded_batch():
    plain, ours = pair()
    prompts = ["make the cat blue", "a red hat"]
    call = options(pictures=2) | dict(output_type="np", prompt=prompts, height=None, width=None)
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
    assert got.shape == expected.shape and got.shape[-1] == 4 and (got == expected).all()


@pytest.mark.slow
@pytest.mark.proves("fused", model="Qwen-Image-2.1")
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fused_forward_is_the_eager_one(guided, pictures):
    plain, ours = moved_pair()
    proofs.fused_is_eager(ours, atol=1e-5, **options(guided, pictures))
    expected = plain(num_inference_steps=4, generator=seeded(), **options(guided, pictures)).images
    everything = paper(**proofs.EVERYTHING, runner="fused")
    got = ours(generator=seeded(), specedit=everything, **options(guided, pictures)).images
    assert torch.allclose(got, expected, atol=1e-5) and not torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kv_refresh", [9, "bracket"])
def test_kept_keys_in_fp8_leave_those_of_text_and_references_as_they_are(kv_refresh):
    _, ours = moved_pair()
    found = {}
    for runner, dtype in itertools.product(("eager", "fused"), ("auto", "fp8")):
        config = paper(stages=(1, 4, 0), finish="locked", kv_refresh=kv_refresh, kv_cache_dtype=dtype, runner=runner)
        out = ours(generator=seeded(), mask_image=proofs.mask(3), specedit=config, **options(pictures=2))
        found[runner, dtype] = out.images
    # fp8 of the target's alone, for both: what is rounded may round to the neighbour
    rounding = (found["eager", "fp8"] - found["eager", "auto"]).norm()
    assert (found["fused", "fp8"] - found["eager", "fp8"]).norm() < 0.2 * rounding and rounding > 0


@pytest.mark.slow
def test_padded_texts_in_fused_steps():
    _, ours = moved_pair()
    call = options(pictures=2) | dict(prompt=["make the cat blue", "a red hat"], height=None, width=None)
    config = dict(stages=(1, 2, 1), finish="locked", kv_refresh=9)
    eager, got = (ours(generator=seeded(), mask_image=proofs.mask(3), specedit=paper(runner=r, **config), **call).images
                  for r in ("eager", "fused"))  # fmt: skip
    assert torch.allclose(got, eager, atol=1e-5)


@torch.no_grad()
def test_half_precision_sums_end_at_the_ends_of_their_range():
    transformer = tiny_qwen21().transformer.half()
    x = torch.randn(1, 4, 16, generator=seeded(1)).half()
    mod = fused.modulation(transformer, torch.tensor([700.0]), x)
    sequence = fused.MixedSequence(0, torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    largest = []

    def block(layer, x, *rest):
        largest.append(x.abs().max().item())
        x.fill_(torch.inf)

    got = fused.fused_forward(transformer, x, mod, sequence, [None, None], block)
    assert largest[1] == 65504 and got.dtype == torch.float16 and got.isfinite().all()


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How many operations are dispatched within it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_fused_step_dispatches_fewer_operations():
    _, ours = pair()
    wrap_processors(ours.transformer)
    counts = {}
    for runner in (None, "fused"):
        model, text, layout = mixed_of(ours, runner)
        [conditioning] = model.timestep_conditioning(text, torch.tensor([600.0]))
        tokens = torch.randn(1, 64, 16, generator=seeded(5))
        model.velocity(text, tokens, conditioning, layout)
        active = model.active_layout(text, layout, 32)
        with Counted() as counted:
            model.velocity(text, tokens[:, :32], conditioning, active)
        counts[runner] = counted.count
    assert counts["fused"] < 0.6 * counts[None], counts


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_block_traces_whole_and_writes_to_kept_keys():
    transformer = moved_pair()[0].transformer
    block = torch.compile(fused.fused_block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 32, generator=seeded(1))
    mod = fused.modulation(transformer, torch.tensor([700.0]), x).expand(2, -1)
    angle, rows = torch.randn(1, 6, 8, generator=seeded(2)), torch.arange(5, 11, dtype=torch.int32).repeat(2, 1)
    keys = torch.full([2], 11, dtype=torch.int32)
    whole = fused.MixedSequence(0, angle.cos(), angle.sin(), rows=rows)
    for sequence in (whole, replace(whole, key_bias=torch.randn(2, 11), queries=keys - 5, keys=keys)):
        kept = tuple(torch.randn(2, 11, 2, 16, generator=seeded(i)) for i in range(2))
        results = []
        for function in (fused.fused_block, block):
            own, places = x.clone(), tuple(y.clone() for y in kept)
            function(transformer.transformer_blocks[0], own, sequence, places, mod)
            results.append((own, *places))
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(*results))
        assert not torch.allclose(results[0][0], x)
        assert torch.equal(results[0][1][:, :5], kept[0][:, :5]) and not torch.equal(results[0][1], kept[0])
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
def test_replayed_steps_are_the_steps_to_the_last_bit(guided):
    plain = tiny_qwen21()
    plain.to("cuda", torch.bfloat16)
    proofs.graphs_replay_fused_steps(proofs.enabled(plain), **options(guided))


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_nothing_selected_returns_the_source(guided):
    proofs.nothing_is_the_source(pair()[1], **options(guided, 2))
    proofs.the_rest_is_the_sources(pair()[1], **options(guided, 2))


@pytest.mark.slow
@pytest.mark.proves("batch", model="Qwen-Image-2.1")
@pytest.mark.parametrize("guided", [False, True])
def test_batches_are_their_singles(guided):
    # of one length: the stock pipeline places the target after the padding of a shorter text, and so does this
    words = ["make the cat blue", "remove a red hat"]
    together = options(guided, 2) | dict(prompt=words)
    if guided:
        together["negative_prompt"] = ["red"] * 2
    singles = [options(guided, 2) | dict(prompt=[w]) | ({"negative_prompt": ["red"]} if guided else {}) for w in words]
    proofs.batches_are_their_singles(pair()[1], together, singles, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.parametrize("padded", [0, 2])
@torch.no_grad()
def test_a_mixed_sequence_of_fine_tokens_is_the_whole_picture(padded):
    """And the references' keys and values are the same from whichever call they come."""
    _, ours = pair()
    grid, others = (8, 8), ((8, 8), (6, 12))
    slots = torch.tensor([False] * 3 + [True] * 16 + [False] * 2 + [True] * 18 + [False] * 5)[None]
    mask = torch.ones(1, slots.shape[1], dtype=torch.long)
    mask[:, slots.shape[1] - padded :] = 0
    text = Qwen21Text(torch.randn(1, slots.shape[1], TEXT, generator=seeded(3)), mask if padded else None, slots)
    latents = [torch.randn(1, 16, *g, generator=seeded(i)) for i, g in enumerate(others)]
    wrap_processors(ours.transformer)
    target = torch.randn(1, 64, 16, generator=seeded(5))
    order = torch.randperm(16, generator=seeded(6))[None].int()
    layout = build_layout(order, torch.tensor([16]), grid, 64, condition=False)
    found = []
    for runner, whole_first in itertools.product((None, "fused"), (True, False)):
        model = ours._model(runner and StepRunner(runner), None, {})
        model.begin(Namespace(grid=grid, patch=1, references=[Reference(None, x, 1) for x in latents]))
        [conditioning] = model.timestep_conditioning(text, torch.tensor([600.0]))
        pictures = Pictures(grid, others)
        whole = lambda: model.velocity(text, target, conditioning, model.dense_layout(text, pictures, (grid,)))  # noqa: E731
        expected = whole() if whole_first else None
        assert runner is None or torch.allclose(stock_forward(model, text, target), whole(), atol=1e-5)
        for cached in (False, True):
            made = model.mixed_layout(text, pictures, layout, key_bias=True, cached=cached)
            found.append(model.velocity(text, target[:, layout.index[0].long()], conditioning, made))
        expected = whole() if expected is None else expected
        for got in found:
            assert torch.allclose(got, expected[:, layout.index[0].long()], atol=1e-4)


@torch.no_grad()
def test_a_coarse_target_is_the_stock_forward_on_that_size():
    """A target at half its side before the references as they are; also of a size that the stock forward refuses."""
    _, ours = pair()
    wrap_processors(ours.transformer)
    grid, other = (8, 8), (6, 12)
    slots = torch.tensor([False] * 3 + [True] * 18 + [False] * 5)[None]
    text = Qwen21Text(torch.randn(1, slots.shape[1], TEXT, generator=seeded(3)), None, slots)
    model = ours._model(None, None, {})
    model.begin(Namespace(grid=grid, patch=1, references=[Reference(None, torch.randn(1, 16, *other), 1)]))
    for small in ((4, 4), (2, 6), (3, 5)):
        tokens = torch.randn(1, small[0] * small[1], 16, generator=seeded(5))
        [conditioning] = model.timestep_conditioning(text, torch.tensor([600.0]))
        got = model.velocity(text, tokens, conditioning, model.dense_layout(text, Pictures(grid, (other,)), (small,)))
        if small == (3, 5):
            assert got.shape == tokens.shape and got.isfinite().all()
        else:
            expected = model._whole(text, tokens, conditioning.expand(1) / 1000, small)
            assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.proves("LoRA", model="Qwen-Image-2.1")
def test_lora_of_the_pipelines_own_loader():
    pytest.importorskip("peft")
    plain = tiny_qwen21()
    ours = proofs.enabled(plain)
    state = proofs.lora(plain.transformer, ("attn.to_q", "img_mlp.proj"))
    proofs.lora_is_applied(
        plain, ours, lambda pipe: pipe.load_lora_weights(dict(state)), lambda pipe: pipe.unload_lora_weights(),
        **options(),
    )  # fmt: skip


def test_only_the_targets_tokens_are_computed():
    _, ours = pair()
    given = dict(mask_image=proofs.mask(4, 2), specedit=paper(stages=(1, 2, 1)))
    counts = [ours(generator=seeded(), **given, **options(pictures=n)).stats for n in (1, 2)]
    for stats in counts:
        assert stats.plain_tokens == 64 and [s.tokens[0] for s in stats.steps] == [16, 22, 22, 64]
    assert counts[1].flops > counts[0].flops  # more keys


def test_enable_and_disable():
    pipe = tiny_qwen21()
    before = dict(pipe.transformer.attn_processors)
    expected = pipe(num_inference_steps=2, generator=seeded(), **options()).images
    handle = enable_specedit(pipe, paper(stages=(1, 2, 1), runner="auto"))
    out = pipe(generator=seeded(), mask_image=proofs.mask(), **options())
    assert out.stats.nfe == 4 and out.stats.runner == "eager"
    handle.disable()
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(pipe(num_inference_steps=2, generator=seeded(), **options()).images, expected)


@torch.no_grad()
def test_the_codec_is_the_plain_pipelines():
    plain, _ = pair()
    codec = Qwen21Codec(plain.vae)
    pixels = plain.image_processor.preprocess(tiny_image(64, 96).convert("RGBA"))
    latents = codec.encode(pixels)
    assert torch.equal(latents, plain._encode_vae_image(pixels[:, :, None], None)[:, :, 0])
    assert [x.shape[-2:] for x in codec.features(latents)] == [(4, 6), (4, 6), (8, 12)]
    assert codec.decode(latents).shape == (1, 4, 64, 96)


@pytest.mark.slow
def test_the_bench_on_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench" / "models"))
    bench = importlib.import_module("qwen_image_21")
    options = ("--tiny", "--device", "cpu", "--repeat", "1", "--no-compiled", "--out", str(tmp_path))
    assert bench.main((*options, "--rows", "plain-40", "specedit-40-full *", "specedit-40-locked-cached *")) == 0
    report = json.loads((tmp_path / "qwen_image_21.json").read_text())
    full, cached = (report["rows"][f"specedit-40-{kind} eager, 10%"] for kind in ("full", "locked-cached"))
    assert full["nfe"] == cached["nfe"] == 40 and cached["flops"] < full["flops"] and full["fallback"] is None
    assert "specedit-40-full eager, 10%: times as fast as plain-40" in report["bars"]
    with pytest.raises(SystemExit):
        bench.main([*options, "--side", "100"])
