# SPDX-License-Identifier: Apache-2.0
"""FLUX.2-klein and -dev on tiny models of the published structure with random weights."""

import functools
import importlib
import json
from pathlib import Path

import model_proofs as proofs
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    Flux2KleinPipeline,
)
from model_proofs import seeded
from tiny_models import WIDTH as TEXT
from tiny_models import paper, tiny_flux2, tiny_image

from specedit_kernels import SpecEditConfig, disable_specedit, enable_specedit
from specedit_kernels.engine.pipeline import goes_as_bytes, preprocess
from specedit_kernels.engine.source_size import pixels_of
from specedit_kernels.models.flux2 import Flux2Codec, Flux2Text
from specedit_kernels.sampling.grid import pack

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("klein", "klein-base", "dev")


@functools.cache
def pair(kind):
    plain = tiny_flux2(kind)
    return plain, proofs.enabled(plain, **({} if kind == "dev" else {"is_distilled": kind == "klein"}))


def text(batch=1, length=12, seed=3):
    return torch.randn(batch, length, TEXT, generator=seeded(seed))


def options(kind, pictures=1, batch=1, **changes):
    image = [tiny_image(), tiny_image(96, 160, seed=1)][:pictures]
    found = dict(image=image, prompt_embeds=text(batch), output_type="latent", **changes)
    if kind == "klein-base":
        found["negative_prompt_embeds"] = text(batch, 9, seed=4)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(kind, pictures):
    proofs.everything_is_the_plain_pipeline(*pair(kind), **options(kind, pictures), num_images_per_prompt=2)


@pytest.mark.slow
def test_the_plain_pixels_sizes_and_bfloat16():
    plain, ours = pair("klein")
    for size in ({}, dict(height=64, width=192)):
        call = options("klein") | dict(output_type="np", image=tiny_image(96, 160)) | size
        expected = plain(num_inference_steps=4, generator=seeded(), **call).images
        got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
        assert got.shape == expected.shape and (got == expected).all()
    # neither side a whole number of blocks: 5 x 7 tokens become 4 x 6
    odd = ours(generator=seeded(), mask_image=proofs.mask(1), specedit=paper(stages=(1, 2, 1)),
               **options("klein") | dict(image=tiny_image(90, 120)))  # fmt: skip
    assert odd.mask.shape[1:] == (4, 6) and odd.stats.plain_tokens == 48
    plain = tiny_flux2("klein").to(torch.bfloat16)
    ours = proofs.enabled(plain, is_distilled=True)
    call = options("klein", 2) | dict(prompt_embeds=text().bfloat16())
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = ours(generator=seeded(), specedit=paper(**proofs.EVERYTHING), **call).images
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_given_latents_are_the_plain_pipelines():
    plain, ours = pair("klein")
    call = options("klein") | dict(latents=torch.randn(1, 128, 8, 8, generator=seeded(9)))
    expected = plain(num_inference_steps=4, **call).images
    assert torch.equal(ours(specedit=paper(**proofs.EVERYTHING), **call).images, expected)
    with pytest.raises(ValueError, match=r"latents: expected \(1, 128, 8, 8\), got \(1, 64, 128\)"):
        ours(specedit=paper(**proofs.EVERYTHING), **call | dict(latents=torch.randn(1, 64, 128)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["klein", "klein-base"])
def test_nothing_selected_returns_the_source(kind):
    proofs.nothing_is_the_source(pair(kind)[1], **options(kind, 2))
    proofs.the_rest_is_the_sources(pair(kind)[1], **options(kind, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_their_singles(kind):
    together = options(kind, 2, batch=2)
    each = [{k: v[i : i + 1] if k.endswith("embeds") else v for k, v in together.items()} for i in range(2)]
    proofs.batches_are_their_singles(pair(kind)[1], together, each, [proofs.mask(3), proofs.mask(5, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_forward_is_the_eager_one(kind):
    proofs.fused_is_eager(pair(kind)[1], **options(kind, 2))


@pytest.mark.slow
def test_fp8():
    """In emulation: all layers of the blocks, and near what the layers give as they are."""
    _, ours = pair("klein")
    found = {}
    for precision in ("auto", "fp8"):
        config = paper(stages=(1, 2, 1), runner="fused", precision=precision, finish="locked", kv_refresh=9)
        out = ours(generator=seeded(), specedit=config, mask_image=proofs.mask(3), **options("klein", 2))
        assert (out.stats.precision, out.stats.fp8_bytes > 0) == (precision, precision == "fp8")
        found[precision] = out.images
    error = (found["auto"] - found["fp8"]).norm() / found["auto"].norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("others", [(), ((6, 10),)])
def test_a_mixed_sequence_of_fine_tokens_is_the_whole_pictures(others):
    ids = torch.zeros(12, 4)
    ids[:, 3] = torch.arange(12)
    proofs.mixed_is_dense(pair("klein")[1], Flux2Text(text(), ids), (8, 8), others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_lora_of_the_pipelines_own_loader(kind):
    pytest.importorskip("peft")
    plain = tiny_flux2(kind)
    ours = proofs.enabled(plain, **({} if kind == "dev" else {"is_distilled": True}))
    state = proofs.lora(plain.transformer, ("attn.to_q", "to_qkv_mlp_proj", "ff.linear_in"))
    proofs.lora_is_applied(
        plain, ours, lambda pipe: pipe.load_lora_weights(dict(state)), lambda pipe: pipe.unload_lora_weights(),
        **options(kind),
    )  # fmt: skip


@pytest.mark.slow
def test_four_and_eight_steps_of_the_distilled_weights():
    _, ours = pair("klein")
    for steps in (4, 8):
        config = SpecEditConfig(preset=steps, finish="locked", kv_refresh=9, runner="eager")
        out = ours(generator=seeded(), specedit=config, mask_image=proofs.mask(2, 2), **options("klein", 2))
        assert out.stats.nfe == steps and out.images.isfinite().all()
        coarse = {4: 1, 8: 3}[steps]
        expected = ["coarse"] * coarse + ["mixed"] + ["active"] * (steps - coarse - 1)
        assert [step.stage for step in out.stats.steps] == expected
        # without a mask the draft is the coarse steps' own
        assert ours(generator=seeded(), specedit=config, **options("klein", 2)).stats.nfe == steps


@pytest.mark.slow
def test_enable_and_disable():
    pipe = tiny_flux2("klein")
    before = dict(pipe.transformer.attn_processors)
    plain = pipe(num_inference_steps=2, generator=seeded(), **options("klein")).images
    handle = enable_specedit(pipe, paper(stages=(1, 2, 1)))
    assert pipe(generator=seeded(), mask_image=proofs.mask(), **options("klein")).stats.nfe == 4
    handle.disable()
    assert type(pipe) is Flux2KleinPipeline
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(pipe(num_inference_steps=2, generator=seeded(), **options("klein")).images, plain)
    disable_specedit(pipe)


@torch.no_grad()
def test_the_codec_is_the_plain_pipelines():
    plain, _ = pair("klein")
    codec, pixels = Flux2Codec(plain.vae), torch.rand(1, 3, 64, 96, generator=seeded()) * 2 - 1
    latents = codec.encode(pixels)
    assert torch.equal(pack(latents), plain._pack_latents(plain._encode_vae_image(pixels, None)))
    assert torch.allclose(codec.unscaled(latents), plain.vae.encode(pixels).latent_dist.mode(), atol=1e-5)
    assert codec.token == 16 and [x.shape[-2:] for x in codec.features(latents)] == [(8, 12), (8, 12), (16, 24)]
    assert torch.allclose(codec.fused().decode(latents), codec.decode(latents), atol=1e-4)


@pytest.mark.slow
def test_the_bench_on_a_tiny_model(monkeypatch, tmp_path):
    scripts = Path(__file__).resolve().parents[1] / "bench" / "models"
    monkeypatch.syspath_prepend(str(scripts))
    bench = importlib.import_module("flux2_klein")
    options = ("--tiny", "--device", "cpu", "--text-length", "16", "--repeat", "1", "--references", "2")
    options += ("--runners", "eager", "fused", "--no-compiled", "--out", str(tmp_path))
    assert bench.main(options) == 0
    report = json.loads((tmp_path / "flux2_klein.json").read_text())
    rows = report["rows"]
    for steps in (4, 8):
        flops = []
        for kind in bench.KINDS:
            eager, fused = (rows[f"specedit-{steps}-{kind} {runner}, 10%"] for runner in ("eager", "fused"))
            assert (eager["runner"], fused["runner"]) == ("eager", "fused") and eager["nfe"] == fused["nfe"] == steps
            assert eager["flops"] == fused["flops"] and eager["fallback"] is None
            flops.append(eager["flops"])
        assert flops[:4] == sorted(flops[:4], reverse=True)
        assert rows[f"plain-{steps}"]["seconds"] > 0 and rows[f"kept references-{steps}"]["seconds"] > 0
    assert "specedit-4-locked fused, 10%: times as fast as kept references-4" in report["bars"]
    assert "wanted 2" in (tmp_path / "flux2_klein.md").read_text()
    with pytest.raises(SystemExit):
        bench.main([*options, "--references", "0"])


def test_pictures_that_the_stock_pipeline_refuses():
    with pytest.raises(ValueError, match="Image too small"):
        pair("klein")[1](**options("klein") | dict(image=tiny_image(32, 32)))


def test_a_result_of_the_sources_size():
    """All of the first picture comes back, whatever its size; outside the edit its own pixels."""
    _, ours = pair("klein")
    image = tiny_image(100, 150)
    call = options("klein", 2) | dict(image=[image, tiny_image(96, 160, seed=1)], output_type="pil")
    mask = np.zeros((100, 150), np.uint8)
    mask[:40, :40] = 255
    config = paper(stages=(1, 2, 1), finish="locked")
    out = ours(generator=seeded(), output_size="source", mask_image=mask, specedit=config, **call).images[0]
    got, source = np.asarray(out), np.asarray(image)
    assert got.shape == source.shape and (got[80:, 100:] == source[80:, 100:]).all() and (got != source).any()


def test_a_hook_on_the_last_layer_of_a_single_block_is_not_passed_by():
    _, ours = pair("klein")
    layer, seen = ours.transformer.single_transformer_blocks[0].attn.to_out, []
    call = options("klein") | dict(mask_image=proofs.mask(3), generator=seeded())
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    try:
        out = ours(specedit=paper(stages=(1, 1, 1), runner="fused"), **call)
    finally:
        handle.remove()
    assert out.stats.runner == "fused" and seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("runner", ["graph", "compile"])
@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_captured_runs_are_the_eager_ones(kind, runner):
    plain = tiny_flux2(kind).to("cuda")
    ours = proofs.enabled(plain, **({} if kind == "dev" else {"is_distilled": True}))
    call = options(kind, 2) | dict(prompt_embeds=text().cuda(), mask_image=proofs.mask(3))
    for more in proofs.KINDS:
        config = lambda name, more=more: paper(stages=(1, 2, 1), runner=name, **more)  # noqa: E731
        expected = ours(generator=seeded(), specedit=config("eager"), **call).images
        for turn in range(2):  # captured, then replayed
            out = ours(generator=seeded(), specedit=config(runner), **call)
            assert out.stats.runner == runner, out.stats.runner_reason
            assert torch.allclose(out.images, expected, atol=1e-3), (more, turn)


@pytest.mark.parametrize("mode", ["crop", "default"])
def test_pictures_go_to_a_device_as_bytes_and_are_the_stock_pixels(device, mode):
    _, ours = pair("klein")
    processor, picture, size = ours.image_processor, tiny_image(97, 163), (96, 160)
    expected = processor.preprocess(picture, *size, resize_mode=mode)
    shown = processor.resize(picture, *size, resize_mode=mode) if mode == "crop" else picture
    assert goes_as_bytes(processor, [shown])
    for _ in range(2):  # the second time of a size it is not Pillow that resizes
        assert torch.equal(preprocess(processor, shown, *size, device).cpu(), expected)
        assert torch.equal(pixels_of([shown], device, size[::-1]).cpu(), expected)
