# SPDX-License-Identifier: Apache-2.0
"""The tiny FLUX.2-klein's parts, training, export and calls, without any trained weight."""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "quality"))

import calibrate
import distil
import export
import families
import models
import sampler
import table_runs as runs
import text
import train_editor
import train_vae
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

from specedit_kernels import SpecEditConfig, SpecEditFlux2KleinPipeline
from specedit_kernels.engine.registry import codec_of

PHRASES = ["remove the cat", f"put {text.article(text.NAMES[3])} in the bottom left", ""]
pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The real sizes, exported."""
    torch.manual_seed(0)
    weights = {name: make().state_dict() for name, (_, make) in families.Klein.parts.items()}
    path = tmp_path_factory.mktemp("klein") / "editor"
    vae = families.Klein.make_vae()
    families.Klein.set_scale(vae, torch.randn(128, 16, 4, 4, generator=seeded()) * 2 + 1)
    assert export.export(families.Klein, vae, weights, path) == export.folder_size(path) < 25e6
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    """Loaded as any user would: no code of ours."""
    loaded = Flux2KleinPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def batched(pipe):
    ours = runs.BatchedKleinPipeline(**pipe.components, is_distilled=True)
    ours.set_progress_bar_config(disable=True)
    return ours


@pytest.fixture(scope="module")
def edits():
    found = runs.make_set(torch.device("cpu"), 64, counts={"local": 2}, seed=5)
    found.reference = found.tokens
    return found


def batch(n=2, side=8, seed=0):
    """source, target, weights and ids, as training has them."""
    encoder = text.KleinPhraseEncoder()
    ids = torch.tensor([encoder(phrase)[0] for phrase in PHRASES[:n]])
    source, target = torch.randn(2, n, 16, side, side, generator=seeded(seed))
    return source, target, torch.full((n, side * side // 4), 4.0), ids


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
    longest = max((text.phrase(task, v, "a", "apple", "red", "top left") for task, t in text.TEMPLATES.items()
                   for v in range(len(t))), key=lambda p: len(p.split()))  # fmt: skip
    assert len(encoder(longest.replace("apple", text.NAMES[0]), stop=True)[0]) == text.KLEIN_LENGTH


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
    torch.manual_seed(0)
    editor = train_editor.Editor(Small)
    optimizer = torch.optim.AdamW(editor.parameters(), lr=3e-3)
    fields, sigma, noise = batch(), torch.tensor([0.5, 0.8]), torch.randn(2, 16, 8, 8, generator=seeded(5))
    losses = []
    for _ in range(30):
        loss, apart = editor.loss(fields, text.KLEIN_LENGTH, sigma, noise, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert apart.shape == (2,) and losses[-1] < 0.5 * losses[0]
    trained = {name for name, p in editor.named_parameters() if optimizer.state.get(p)}
    assert any("embed_tokens" in name for name in trained) and any("layers.26." in name for name in trained)


@pytest.mark.slow
def test_the_training_script_goes_on_piece_by_piece(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_editor, "RUN_DIR", tmp_path)
    monkeypatch.setattr(train_editor, "SIZES", (64, 48, 32))
    monkeypatch.setattr(Small, "shares", dict.fromkeys((64, 48, 32), (1.0, 0.0, 0.0, 0.0, 0.0)))
    monkeypatch.setitem(train_editor.FAMILIES, "klein", Small)
    Small.make_vae().save_pretrained(tmp_path / "vae")
    options = "train_editor.py --family klein --tokens 100 --workers 0 --compile none --capacity 8 8 8 --seconds 600"
    for piece in ("0.01", "0.02"):
        monkeypatch.setattr(sys, "argv", [*options.split(), "--piece", piece])
        train_editor.main()
    assert "resumed at step 1" in capsys.readouterr().out
    pipe = SpecEditFlux2KleinPipeline.from_pretrained(tmp_path / "editor")
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
    pipe = SpecEditFlux2KleinPipeline.from_pretrained(folder)
    source = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    mask = np.zeros((64, 96), np.float32)
    mask[:32, :32] = 1
    config = SpecEditConfig(preset=4, preserve="pixels", feather=0)
    out = pipe(image=source, prompt="make the cat blue", mask_image=mask, max_sequence_length=32, generator=seeded(),
               specedit=config)  # fmt: skip
    assert out.images[0].size == (96, 64) and out.stats.nfe == 4
    assert (np.asarray(out.images[0])[:, 32:] == np.asarray(source)[:, 32:]).all()
