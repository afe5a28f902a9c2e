# SPDX-License-Identifier: Apache-2.0
"""The tiny Qwen-Image-Edit's parts, training, export and calls, without any trained weight."""

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")

import quality_editors as shared
from quality_editors import PHRASES, seeded

# isort: split
import calibrate
import families
import models
import sampler
import table
import table_runs as runs
import text
import train_editor
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel

from specedit_kernels import SpecEditConfig, SpecEditQwenImageEditPipeline
from specedit_kernels.engine.registry import codec_of
from specedit_kernels.models.qwen_image_edit import THRESHOLDS as QWEN_THRESHOLDS

pytestmark = pytest.mark.usefixtures("one_thread")


class Small(families.Qwen):
    """The family with a transformer of one block and few channels in the autoencoder."""

    parts = families.Qwen.parts | {
        "transformer": (
            "transformer",
            lambda: QwenImageTransformer2DModel(
                in_channels=64,
                out_channels=16,
                num_layers=1,
                attention_head_dim=64,
                num_attention_heads=1,
                joint_attention_dim=models.TEXT_WIDTH,
                axes_dims_rope=(8, 28, 28),
            ),
        )
    }

    @staticmethod
    def make_vae():
        return models.as_pictures(AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1))


folder, pipe = shared.fixtures(families.Qwen, QwenImageEditPipeline, (4, 16, 8, 8))


@pytest.fixture(scope="module")
def batched(pipe):
    return shared.quiet(runs.BatchedQwenPipeline(**pipe.components))


@pytest.mark.slow
def test_loads_in_fp32_with_its_scale(pipe):
    assert {x.dtype for x in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {torch.float32}
    assert pipe.transformer.config.zero_cond_t is False and pipe.scheduler.config.shift_terminal == 0.02
    assert np.allclose(pipe.vae.config.latents_mean, 1, atol=0.5)
    assert np.allclose(pipe.vae.config.latents_std, 2, atol=0.5)


@pytest.mark.slow
def test_training_sees_the_texts_of_the_pipeline(pipe):
    """The look-up's ids are the tokenizer's, and the states behind them the pipeline's own."""
    encoder, (template, dropped) = text.QwenPhraseEncoder(), text.qwen_template()
    ids = torch.tensor([encoder(phrase)[0] for phrase in PHRASES])
    for phrase, row in zip(PHRASES, ids.tolist()):
        whole = pipe.tokenizer(template.format(phrase)).input_ids
        assert encoder.prefix == whole[:dropped]
        assert row == whole[dropped:] + [encoder.pad] * (text.QWEN_LENGTH + dropped - len(whole))
        assert pipe.tokenizer.unk_token_id not in whole
    assert encoder("Make it snow".lower(), stop=True)[0] == encoder("make it snow", capital=True, stop=True)[0]
    picture = PIL.Image.new("RGB", (64, 64))
    with torch.no_grad():
        states, mask = families.Qwen.text({"text": pipe.text_encoder}, ids, text.QWEN_LENGTH)
        expected, valid = pipe.encode_prompt([*PHRASES[:2], " "], image=[picture] * 3)
    n = valid.shape[1]
    assert torch.equal(mask[:, :n], valid.bool()) and not mask[:, n:].any()
    assert torch.allclose(states[:, :n][valid.bool()], expected[valid.bool()], atol=1e-5)


def test_every_phrase_fits():
    encoder = text.QwenPhraseEncoder()
    assert len(encoder(shared.longest_phrase(), stop=True)[0]) == text.QWEN_LENGTH


def test_lone_frames_in_two_dimensions_are_the_models_own():
    vae = models.make_qwen_vae().eval()
    x = torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x[:, :, None]).latent_dist.mode()
        y = vae.decode(z).sample[:, :, 0]
        models.as_pictures(vae)
        posterior = families.Qwen.posterior(vae, x)
        assert torch.allclose(posterior.mode(), z[:, :, 0], atol=1e-5)
        assert torch.allclose(codec_of(vae).encode(x), z[:, :, 0], atol=1e-5)
        assert torch.allclose(families.Qwen.decode(vae, z[:, :, 0]).clamp(-1, 1), y, atol=1e-5)
    assert posterior.logvar.mean() < -3  # little noise at the start


def test_a_rotation_in_real_numbers_is_the_models_own():
    torch.manual_seed(0)
    model = Small.parts["transformer"][1]()
    tokens, text_states = torch.randn(2, 8, 64), torch.randn(2, 5, models.TEXT_WIDTH)
    call = (model, tokens[:, :4], tokens[:, 4:], torch.rand(2), (2, 2), (text_states, torch.ones(2, 5).bool()), None)
    with torch.no_grad():
        expected = families.Qwen.velocity(*call)
        models.in_real_numbers(model)
        assert not any(x.is_complex() for x in model.pos_embed([[(1, 2, 2)] * 2], max_txt_seq_len=5))
        assert torch.allclose(families.Qwen.velocity(*call), expected, atol=1e-5)
        other = Small.parts["transformer"][1]()  # of the same process, as it was
        other.load_state_dict(model.state_dict())
        assert torch.equal(families.Qwen.velocity(other, *call[1:]), expected)


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=families.FAMILIES)
def test_latents_are_normalised(family):
    vae = family.make_vae().eval()
    x = torch.rand(4, 3, 64, 64, generator=seeded()) * 2 - 1
    with torch.no_grad():
        z = family.posterior(vae, x).mode()
        family.set_scale(vae, z)
        z = codec_of(vae).encode(x)
    deviation = z.std(dim=(0, 2, 3))
    assert z.mean().abs() < 0.02 and abs(z.std() - 1) < 0.02 and deviation.max() < 1.05 * deviation.min()


@pytest.mark.slow
def test_a_repeated_batch_is_learnt(monkeypatch):
    monkeypatch.setattr(Small, "empty_share", 0.0)
    trained = shared.learnt(Small, text.QwenPhraseEncoder(), text.QWEN_LENGTH, 40)
    assert any("embed_tokens" in name for name in trained) and not any("visual" in name for name in trained)


def test_without_words_the_source_comes_back(monkeypatch):
    """Then what the target and the words were does not matter."""
    monkeypatch.setattr(Small, "empty_share", 1.0)
    torch.manual_seed(0)
    editor, sigma, noise = train_editor.Editor(Small), torch.tensor([0.5, 0.8]), torch.randn(2, 16, 8, 8)
    source, target, weight, ids = shared.batch(text.QwenPhraseEncoder())
    with torch.no_grad():
        loss, apart = editor.loss((source, target, weight, ids), text.QWEN_LENGTH, sigma, noise, None)
        same, _ = editor.loss((source, source, weight, ids.flip(0)), text.QWEN_LENGTH, sigma, noise, None)
    assert loss == same and apart[0] == 0


@pytest.mark.slow
def test_the_training_script_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pipe = shared.trained("qwen", Small, SpecEditQwenImageEditPipeline, (1.0,), "--seconds", ("0.01", "0.02"), tmp_path,
                          monkeypatch, capsys)  # fmt: skip
    assert pipe.transformer.config.num_layers == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_own_sampler_is_the_pipeline(pipe, batched, steps):
    """In plain steps, where a call of SpecEdit with everything selected is the stock pipeline at any size."""
    runner, edits = runs.Runner(batched, text.QWEN_LENGTH), shared.two_edits()
    expected = runner.run(runs.Row("plain", steps=steps), edits)
    z = sampler.encode_images(pipe.vae, edits.pictures()[0])
    states, mask = sampler.encode_text(pipe, edits.edits.phrases(), None, "cpu")
    z = sampler.euler(pipe, z, states, mask, steps, sampler.noise_like(edits.seeds, 16, 8, 8))
    assert torch.allclose(sampler.decode_latents(pipe.vae, z), expected.images, atol=1e-4)
    assert expected.nfe == steps and expected.flops == [steps * runner.step_flops(32)] * 2


@pytest.mark.slow
def test_rows_of_the_table(batched):
    """A plain row, a guided SpecEdit row and a calibration of one pipeline."""
    runner, edits = runs.Runner(batched, text.QWEN_LENGTH, 3.0), shared.two_edits()
    config = SpecEditConfig(stages=(1, 1, 1), threshold=-1.0)
    result = runner.run(runs.Row("", config=config), edits)
    assert result.images.shape == (2, 3, 64, 64) and result.nfe == 3 and result.mask.all()
    unguided = runs.Runner(batched, text.QWEN_LENGTH).run(runs.Row("", config=config), edits)
    assert result.flops == [2 * f for f in unguided.flops] and not torch.allclose(result.images, unguided.images)
    scores = calibrate.probe(calibrate.Probe.of(batched), runner, edits, config, 2)
    assert torch.allclose(scores["decoder", "matched"], result.scores, atol=1e-4)


@pytest.mark.slow
def test_a_rows_flops_are_the_runs_own(pipe, batched):
    edits = shared.two_edits(192, "small")
    length = sampler.encode_text(pipe, edits.edits.phrases(), None, "cpu")[0].shape[1]
    negative = sampler.encode_text(pipe, [" "] * 2, None, "cpu")[0].shape[1]
    config = SpecEditConfig(stages=(1, 3, 0), finish="locked", kv_refresh=2, lock_text=True, draft_guidance=False)
    result = runs.Runner(batched, length, 3.0).run(runs.Row("", config=config, oracle=True), edits)
    kinds = [(step.stage, step.passes, step.lock_text) for step in batched._specedit_stats.steps]
    assert kinds == [("coarse", 1, False), ("mixed", 2, False), ("active", 2, True), ("mixed", 2, True)]
    # the table takes the negative's text for as long as the positive's
    assert negative < length and 1 < sum(result.flops) / batched._specedit_stats.flops < 1.3
    whole = runs.Runner(batched, length).run(runs.Row("", config=config, oracle=True), edits)
    assert sum(whole.flops) == batched._specedit_stats.flops


def test_thresholds_of_another_editor():
    rows = runs.with_thresholds(
        table.all_rows(), [{"metric": "decoder", "reference": "matched", "draft": "coarse", "threshold": 0.5}]
    )
    by_name = {row.name: row.config for row in rows}
    assert by_name["9-coarse-full"].threshold == by_name["30-coarse-locked"].threshold == 0.5
    assert by_name["9-quarter-full"].threshold is None and by_name["plain-50"] is None


def test_rows_have_the_thresholds_of_their_draft(batched):
    def threshold(scale, **config):
        rows = [runs.Row("", config=SpecEditConfig(finish="locked", **config))]
        return runs.with_own_thresholds(rows, batched, scale)[0].config.threshold

    unguided, guided, last = (QWEN_THRESHOLDS["decoder", "matched", "coarse"][g] for g in (False, True, "last"))
    options = dict(draft_guidance="last", stages=(4, 5, 0))
    assert threshold(4.0, **options | dict(draft_guidance=False)) == threshold(1.0, **options) == unguided
    assert threshold(4.0, **options) == last and threshold(4.0, quality="best") == guided
    assert unguided < last < guided
    assert threshold(4.0, **options | dict(stages=(1, 5, 0))) == guided  # its only step has guidance


@pytest.mark.slow
def test_an_edit_from_the_folder(folder):
    config = SpecEditConfig(stages=(1, 1, 1), preserve="pixels", feather=0)
    guidance = dict(negative_prompt=" ", true_cfg_scale=2.0)
    pipe = SpecEditQwenImageEditPipeline.from_pretrained(folder)
    shared.a_corner_is_edited(pipe, 3, max_area=64 * 96, specedit=config, **guidance)
