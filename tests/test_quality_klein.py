# SPDX-License-Identifier: Apache-2.0
"""The tiny FLUX.2-klein's parts, training, export and calls, without any trained weight."""

import json

import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")

import quality_editors as shared
from quality_editors import PHRASES, seeded

# isort: split
import calibrate
import distil
import families
import models
import sampler
import table_runs as runs
import text
import train_vae
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

from specedit_kernels import SpecEditConfig, SpecEditFlux2KleinPipeline
from specedit_kernels.engine.registry import codec_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(families.Klein):
    """The family with a transformer of two blocks and few channels in the autoencoder."""

    parts = families.Klein.parts | {
        "transformer": (
            "transformer",
            lambda: Flux2Transformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=64,
                num_attention_heads=1,
                joint_attention_dim=3 * models.KLEIN_WIDTH,
                axes_dims_rope=(8, 24, 24, 8),
                guidance_embeds=False,
            ),
        )
    }

    @staticmethod
    def make_vae():
        return AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16
        )


folder, pipe = shared.fixtures(families.Klein, Flux2KleinPipeline, (128, 16, 4, 4))


@pytest.fixture(scope="module")
def batched(pipe):
    return shared.quiet(runs.BatchedKleinPipeline(**pipe.components, is_distilled=True))


@pytest.fixture(scope="module")
def edits():
    return shared.two_edits()


@pytest.mark.slow
def test_loads_in_fp32_with_its_scale(pipe):
    assert {x.dtype for x in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {torch.float32}
    assert pipe.config.is_distilled and isinstance(pipe.vae, AutoencoderKLFlux2)
    assert torch.allclose(pipe.vae.bn.running_mean, torch.ones(64), atol=0.6)
    assert torch.allclose(pipe.vae.bn.running_var.sqrt(), torch.full((64,), 2.0), atol=0.6)


@pytest.mark.slow
def test_training_sees_the_texts_of_the_pipeline(pipe):
    """The look-up's ids are the tokenizer's, and the states behind them the pipeline's own, at every length."""
    encoder = text.KleinPhraseEncoder()
    ids = torch.tensor([encoder(phrase)[0] for phrase in PHRASES])
    for phrase, row in zip(PHRASES, ids.tolist()):
        turn = [{"role": "user", "content": phrase}]
        whole = pipe.tokenizer(
            pipe.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        ).input_ids
        assert row == whole + [encoder.pad] * (text.KLEIN_LENGTH - len(whole))
        assert pipe.tokenizer.unk_token_id not in whole
    assert encoder("make it snow", stop=True)[0] == encoder("make it snow", capital=True, stop=True)[0]
    for length in (16, text.KLEIN_LENGTH, 40):
        with torch.no_grad():
            states, _ = families.Klein.text({"text": pipe.text_encoder}, ids, length)
            expected, _ = pipe.encode_prompt(PHRASES, max_sequence_length=length)
        assert torch.allclose(states, expected, atol=1e-5)


def test_every_phrase_fits():
    encoder = text.KleinPhraseEncoder()
    assert len(encoder(shared.longest_phrase(), stop=True)[0]) == text.KLEIN_LENGTH


def test_the_shift_is_the_pipelines_where_there_are_steps(pipe):
    ours = SpecEditFlux2KleinPipeline(**pipe.components, is_distilled=True)
    assert sampler.shift_mu(pipe.scheduler, 1024, families.Klein, 4) == ours._shift(1024, 4)
    assert sampler.shift_mu(pipe.scheduler, 1024, families.Klein) < ours._shift(1024, 50)


def test_anothers_weights_with_a_scale_of_its_own(tmp_path):
    """The same pictures from the same encoder and decoder; other shapes are refused."""
    kontext = models.make_vae().eval()
    kontext.save_pretrained(tmp_path / "vae")
    vae = families.Klein.make_vae().eval()
    train_vae.take_weights(vae, tmp_path / "vae")
    x = torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1
    with torch.no_grad():
        families.Klein.set_scale(vae, families.Klein.posterior(vae, x).mode())
        expected = kontext.decode(kontext.encode(x).latent_dist.mode()).sample
        assert torch.allclose(codec_of(vae).decode(codec_of(vae).encode(x)), expected, atol=1e-4)
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "other")
    with pytest.raises((ValueError, RuntimeError)):
        train_vae.take_weights(vae, tmp_path / "other")


@pytest.mark.slow
def test_a_repeated_batch_is_learnt():
    trained = shared.learnt(Small, text.KleinPhraseEncoder(), text.KLEIN_LENGTH, 30)
    assert any("embed_tokens" in name for name in trained) and any("layers.26." in name for name in trained)


@pytest.mark.slow
def test_the_training_script_goes_on_piece_by_piece(tmp_path, monkeypatch, capsys):
    shares, option = (1.0, 0.0, 0.0, 0.0, 0.0), "--seconds 600 --piece"
    pipe = shared.trained("klein", Small, SpecEditFlux2KleinPipeline, shares, option, ("0.01", "0.02"), tmp_path,
                          monkeypatch, capsys)  # fmt: skip
    assert pipe.transformer.config.num_single_layers == 1


@pytest.mark.slow
def test_all_weights_are_distilled_into_a_folder(folder, tmp_path):
    options = f"--model {folder} --out {tmp_path} --steps 4 --rank 0 --rate 3e-4 --train-steps 8 --sizes 64 --workers 0"
    distil.main([*options.split(), *"--capacity 16 --tokens 150 --text-length 32 --teacher-steps 8".split()])
    found = json.loads((tmp_path / "4_steps.json").read_text())["distances"]["64"]
    assert found["with"] < found["without"]
    student, teacher = (Flux2KleinPipeline.from_pretrained(path) for path in (tmp_path / "4_steps", folder))
    changed = [
        not torch.equal(a, b) for a, b in zip(student.transformer.parameters(), teacher.transformer.parameters())
    ]
    assert sum(changed) > len(changed) // 2
    same = zip(student.text_encoder.parameters(), teacher.text_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.slow
def test_own_sampler_and_plain_rows_are_the_pipeline(pipe, batched, edits, steps=4):
    """The stock pipeline shows each prompt all pictures, so it runs edit by edit."""
    runner = runs.Runner(batched, 32)
    found = runner.run(runs.Row("plain", steps=steps), edits)
    assert found.nfe == steps and found.flops == [steps * runner.step_flops(32)] * 2
    for i, phrase in enumerate(edits.edits.phrases()):
        picture = PIL.Image.fromarray(edits.source[i].permute(1, 2, 0).numpy())
        expected = pipe(image=picture, prompt=phrase, num_inference_steps=steps, max_sequence_length=32,
                        generator=seeded(int(edits.seeds[i])), output_type="pt").images  # fmt: skip
        assert torch.allclose(found.images[i], expected[0], atol=1e-4)
    z = sampler.encode_images(pipe.vae, edits.pictures()[0])
    states, pooled = sampler.encode_text(pipe, edits.edits.phrases(), 32, "cpu")
    noise = torch.nn.functional.pixel_shuffle(sampler.noise_like(edits.seeds, 64, 4, 4), 2)
    z = sampler.euler(pipe, z, states, pooled, steps, noise)
    assert torch.allclose(sampler.decode_latents(pipe.vae, z), found.images, atol=1e-4)


@pytest.mark.slow
def test_rows_of_the_table(batched, edits):
    """A SpecEdit row's FLOPs are the run's own, and the probe of a calibration scores what a run does."""
    runner = runs.Runner(batched, 32)
    config = SpecEditConfig(quality="paper", preset=4, threshold=-1.0, runner="eager")
    result = runner.run(runs.Row("", config=config), edits)
    assert result.images.shape == (2, 3, 64, 64) and result.nfe == 4 and result.mask.all()
    assert sum(result.flops) == batched._specedit_stats.flops
    scores = calibrate.probe(calibrate.Probe.of(batched), runner, edits, config, 2)
    assert torch.allclose(scores["decoder", "matched"], result.scores, atol=1e-4)
    with pytest.raises(ValueError, match="no guidance"):
        runs.Runner(batched, 32, 2.0).run(runs.Row("", config=config), edits)


@pytest.mark.slow
def test_an_edit_from_the_folder(folder):
    config = SpecEditConfig(preset=4, preserve="pixels", feather=0)
    pipe = SpecEditFlux2KleinPipeline.from_pretrained(folder)
    shared.a_corner_is_edited(pipe, 4, max_sequence_length=32, specedit=config)
