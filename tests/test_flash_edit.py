# SPDX-License-Identifier: Apache-2.0
"""FlashEdit on tiny models with random weights: what its parts leave as it is, what they change, options, errors."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import call_options, qwen_text, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import (
    FlashEditConfig,
    FlashEditFluxKontextPipeline,
    FlashEditQwenImageEditPlusPipeline,
    SpecEditConfig,
    SpecEditQwenImageEditPlusPipeline,
)
from specedit_kernels.cli import main
from specedit_kernels.engine._diffusers import dtype_of
from specedit_kernels.engine.attention import joint_attention
from specedit_kernels.engine.kv_cache import KVCache
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.engine.sequence import MixedSequence, StepLayout
from specedit_kernels.flash_edit import stages as flash_stages
from specedit_kernels.flash_edit.cosi.low_rank import add_low_rank, low_rank_state, merged_copy, save_low_rank
from specedit_kernels.flash_edit.pipeline import COSI, GENERATOR, INVERTER
from specedit_kernels.models.flux_kontext import FluxText, FusedFluxModel
from specedit_kernels.sampling import grid as grids

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = (8, 8)


def white(columns=8, rows=8):
    """A mask, white over the first `columns` of 8 and `rows` of 8 tokens a side."""
    array = np.zeros((128, 128), np.uint8)
    array[: 16 * rows, : 16 * columns] = 255
    return PIL.Image.fromarray(array)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plain():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pipe(plain):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def one_step(plain):
    options = call_options(image=tiny_image(), height=128, width=128)
    return plain(num_inference_steps=1, generator=seeded(), **options)[0]


@pytest.fixture(scope="module")
def weights(plain, tmp_path_factory):
    """A COSI folder with random changes."""
    folder = tmp_path_factory.mktemp("cosi")
    torch.manual_seed(5)
    for name in (GENERATOR, INVERTER):
        module = merged_copy(plain.transformer, save({}, folder / "none.safetensors"))
        for parameter in add_low_rank(module, 4):
            parameter.data.normal_(std=0.1)
        save(low_rank_state(module), folder / name)
    return folder


def save(state, path):
    save_low_rank(state, path)
    return path


def run(pipe, mask=None, seed=1, call=None, **options):
    call = call_options(image=tiny_image()) | (call or {})
    return pipe(mask_image=mask, generator=seeded(seed), specedit=FlashEditConfig(**options), **call)


def latents(out):
    return grids.unpack(out.images, ALL)


# attention


BLOCK = SimpleNamespace(kept=None, watch=None)  # stands for a block's processor


def sequence(seed=0, text=5, image=12, heads=2, dim=16, batch=2):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, text + image, heads, dim, generator=generator) for _ in range(3))
    angle = torch.rand(batch, text + image, dim // 2, generator=generator)
    return (q, k, v), MixedSequence(text, angle.cos(), angle.sin())


def attention(qkv, sequence):
    return joint_attention(BLOCK, None, qkv, StepLayout(sequence))


def test_text_that_all_regions_see_is_dense_attention():
    qkv, dense = sequence()
    bias = torch.cat([torch.zeros(2, 5), torch.randn(2, 12, generator=seeded())], dim=1)
    used = torch.tensor([17, 14]).int()
    dense = replace(dense, key_bias=bias, queries=used, keys=used)
    region = torch.arange(12).remainder(2).int().expand(2, 12)
    sparse = replace(dense, region=region, text_mask=torch.ones(2, 2, 5, dtype=torch.bool))
    got, expected = (attention(qkv, x) for x in (sparse, dense))
    for i, length in enumerate((17, 14)):
        torch.testing.assert_close(got[i, :length], expected[i, :length], atol=2e-6, rtol=1e-5)


def test_a_region_does_not_see_the_text_that_is_taken_from_it():
    (q, k, v), dense = sequence()
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    mask[:, 0, 3] = False
    region = (torch.arange(12) >= 8).int().expand(2, 12)
    sparse = replace(dense, region=region, text_mask=mask)
    before = attention((q, k, v), sparse)
    v = v.clone()
    v[:, 3] += 1
    changed = (attention((q, k, v), sparse) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.tolist() == [True] * 5 + [False] * 8 + [True] * 4


@pytest.mark.parametrize("lengths", [(5, 3), (3, 5)])
def test_shielded_slots_keep_the_keys_and_values_of_the_source(lengths):
    """Two texts of different lengths; of 12 image slots the edit has the first 6, of which sample 1 owns 4."""
    (source, edit), longest = lengths, max(lengths)
    (q, k, v), whole = sequence(text=longest)
    block, cache = SimpleNamespace(kept=None, watch=None), KVCache(rows=longest + 12)

    def layout_of(text):
        at = longest - text
        used = torch.full((2,), text + 12, dtype=torch.int32)
        rows = torch.arange(at, longest + 12, dtype=torch.int32).expand(2, -1)
        changes = dict(text=text, cos=whole.cos[:, at:], sin=whole.sin[:, at:], queries=used, keys=used, rows=rows)
        return StepLayout(replace(whole, span=(at, longest + 12), **changes), torch.tensor([6, 4]).int() + text, cache)

    of_source, of_edit = (tuple(x[:, longest - n :] + i for x in (q, k, v)) for i, n in enumerate(lengths))
    joint_attention(block, None, of_source, layout_of(source))
    got = joint_attention(block, None, tuple(x[:, : edit + 6] for x in of_edit), layout_of(edit).active(edit, 6))
    for i, count in enumerate((6, 4)):
        # without a cache: the edit's text and own slots before the source's others
        parts = (torch.cat([a[i, : edit + count], b[i, source + count :]])[None] for a, b in zip(of_edit, of_source))
        at = longest - edit
        alone = replace(whole, text=edit, cos=whole.cos[i : i + 1, at:], sin=whole.sin[i : i + 1, at:])
        expected = attention(tuple(parts), alone)[0, : edit + count]
        torch.testing.assert_close(got[i, : edit + count], expected, atol=2e-6, rtol=1e-5)


def test_the_watched_mass_is_the_softmax_weight(pipe):
    seen = {}
    draft = flash_stages.draft

    def spy(*args, **options):
        found = draft(*args, **options)
        seen["mass"] = found.mass
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_stages, "draft", spy)
        run(pipe, white(4), bg_shield=False)
    mass = seen["mass"]
    assert mass.shape == (1, 16, 16) and (mass > 0).all() and (mass.sum(dim=2) < 1).all()


def test_key_tokens_stand_out_in_the_region():
    mass = torch.full((1, 6, 4), 0.1)
    edited = torch.tensor([[True, True, False, False, False, False]])
    mass[0, :2, 1] = 0.4  # looked at by the region
    mass[0, :, 2] = 0.4  # by all
    mass[0, 2:, 3] = 0.4  # by the background
    assert flash_stages.key_tokens(mass, edited, 1.5).tolist() == [[False, True, False, False]]


# the parts


def test_everything_foreground_is_the_plain_step(pipe, one_step):
    for options in ({}, dict(max_active=1.0), dict(ssca=False), dict(bg_shield=False)):
        out = run(pipe, white(), **options)
        torch.testing.assert_close(out.images, one_step, atol=3e-6, rtol=1e-5)


def test_a_shield_over_nothing_is_the_plain_step(pipe, one_step, monkeypatch):
    """The cached pass itself, not the short cut that leaves it out where all is edited."""
    edit = flash_stages.one_step_edit
    monkeypatch.setattr(flash_stages, "one_step_edit", lambda *a: edit(*a[:-1], True))
    out = run(pipe, white(), call=dict(negative_prompt_embeds=None))
    assert [s.stage for s in out.stats.steps] == ["source", "edit"]
    torch.testing.assert_close(out.images, one_step, atol=3e-6, rtol=1e-5)


def test_all_switches_off_is_the_plain_step(pipe, one_step):
    out = run(pipe, white(4), cosi=False, bg_shield=False, ssca=False)
    torch.testing.assert_close(out.images, one_step, atol=3e-6, rtol=1e-5)


def test_the_shield_keeps_the_source_and_computes_the_region_alone(pipe, one_step):
    out = run(pipe, white(4))
    whole = run(pipe, white(4), bg_shield=False)
    source = pipe(image=tiny_image(), prompt="", specedit=FlashEditConfig(max_active=1.0), mask_image=white(4),
                  generator=seeded(9), **{k: v for k, v in call_options().items() if k != "prompt"})  # fmt: skip
    outside = torch.zeros(64, dtype=torch.bool).view(8, 8)
    outside[:, 4:] = True
    outside = outside.flatten()
    assert torch.equal(out.images[:, outside], source.images[:, outside])  # another text and noise, the same source
    assert not torch.equal(whole.images[:, outside], out.images[:, outside])
    assert (out.images[:, ~outside] - one_step[:, ~outside]).abs().max() < (source.images - one_step).abs().max()
    # 32 of 64 target tokens, and the condition tokens at their places
    assert {s.stage: s.tokens for s in out.stats.steps} == {"source": (128,), "edit": (64,)}
    assert out.stats.source_error.shape == (1,) and out.stats.source_error > 0
    assert whole.stats.source_error is None


def test_ssca_changes_the_picture_where_the_text_does_not_reach(pipe, one_step):
    out = run(pipe, white(4), bg_shield=False, token_ratio=0.0)
    assert out.stats.key_tokens.any() and not out.stats.key_tokens.all()
    assert not torch.allclose(out.images, one_step, atol=1e-4)
    # no token stands out by so much
    out = run(pipe, white(4), bg_shield=False, token_ratio=1e6)
    assert not out.stats.key_tokens.any()
    torch.testing.assert_close(out.images, one_step, atol=3e-6, rtol=1e-5)


def test_under_a_mask_and_the_shield_ssca_is_nothing_and_no_draft_runs(pipe):
    out = run(pipe, white(4), token_ratio=0.0)
    assert out.stats.key_tokens is None
    # the same region by a draft that adds none: its tokens, which are all that the edit computes, see all text
    drafted = run(pipe, white(4), token_ratio=0.0, mask_ratio=1e6, call=dict(mask_mode="add"))
    assert [s.stage for s in drafted.stats.steps] == ["draft", "source", "edit"]
    assert torch.equal(drafted.mask, out.mask) and drafted.stats.key_tokens.any()
    torch.testing.assert_close(out.images, drafted.images, atol=3e-6, rtol=1e-5)
    assert torch.equal(run(pipe, white(4), ssca=False).images, out.images)


def test_a_batch_is_its_samples(pipe):
    masks = torch.zeros(2, 128, 128)
    masks[0, :32, :32] = 1
    masks[1, :, :64] = 1
    noise = torch.randn(2, 64, 64, generator=seeded())
    pictures = [tiny_image(), tiny_image(seed=3)]
    prompts = ["make the cat blue", "remove the dog"]
    both = run(pipe, masks, call=dict(image=pictures, prompt=prompts, latents=noise))
    assert both.stats.steps[-1].tokens == (8, 64)
    for i in range(2):
        call = dict(image=pictures[i], prompt=prompts[i], latents=noise[i : i + 1])
        alone = run(pipe, masks[i : i + 1], call=call)
        torch.testing.assert_close(both.images[i : i + 1], alone.images, atol=1e-5, rtol=1e-4)


def test_the_mask_is_found_where_the_draft_departs(pipe):
    out = run(pipe, mask_ratio=1.15, dilation=0)
    assert 0 < out.mask.sum() < 64 and out.stats.threshold == 1.15
    scores = out.scores.unflatten(1, (4, 2)).unflatten(3, (4, 2))
    blocks = (scores > 1.15).any(dim=4).any(dim=2)
    assert torch.equal(out.mask, blocks.repeat_interleave(2, 1).repeat_interleave(2, 2))
    torch.testing.assert_close(out.scores.mean(), torch.tensor(1.0))
    nothing = run(pipe, mask_ratio=100.0)
    assert nothing.stats.fallback == "source" and not nothing.mask.any()


def test_preserve_keeps_the_pixels_of_the_source(pipe):
    out = run(pipe, white(4), preserve="pixels", call=dict(output_type="pil"))
    array, source = np.array(out.images[0]), np.array(tiny_image())
    assert (array[:, 64 + 8 :] == source[:, 64 + 8 :]).all() and not (array[:, :64] == source[:, :64]).all()


@pytest.mark.slow
def test_the_inversion_baseline_runs_there_and_back(pipe):
    out = run(pipe, method="inversion", steps=4)
    assert [s.stage for s in out.stats.steps] == ["invert"] * 4 + ["edit"] * 4 and out.mask.all()
    # with one text for both branches the way back is the way there, but for the steps' error
    error = []
    source = grids.pack(pipe._encode_vae_image(pipe.image_processor.preprocess(tiny_image()), None))
    for steps in (4, 32):
        back = run(pipe, method="inversion", steps=steps, call=dict(source_prompt="make the cat blue"))
        error.append((back.images - source).square().mean())
    assert error[1] < error[0] / 4


def test_the_guided_baseline_edits_with_both_branches(pipe):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        one, two = (run(pipe, method="inversion", steps=2, guidance=g) for g in (1.0, 2.0))
        same = run(pipe, method="inversion", steps=2, guidance=2.0, call=dict(source_prompt="make the cat blue"))
        alone = run(pipe, method="inversion", steps=2, call=dict(source_prompt="make the cat blue"))
    finally:
        hook.remove()
    assert len(calls) == 4 + 6 + 6 + 4
    assert not torch.allclose(one.images, two.images, atol=1e-3)
    # no guidance where both branches have one text
    torch.testing.assert_close(same.images, alone.images, atol=3e-6, rtol=1e-5)


# weights of one-step networks


def test_cosi_weights_change_generator_and_noise(plain, weights):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    without = run(pipe, white(4))
    pipe.load_cosi(weights)
    full, white_noise = run(pipe, white(4)), run(pipe, white(4), cosi=False)
    assert full.stats.inverted and not white_noise.stats.inverted and not without.stats.inverted
    assert "invert" in [s.stage for s in full.stats.steps]
    assert not torch.equal(full.images, white_noise.images) and not torch.equal(white_noise.images, without.images)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_model_folder_brings_its_weights_and_they_go_where_the_pipeline_goes(plain, weights, tmp_path):
    plain.save_pretrained(tmp_path)
    assert FlashEditFluxKontextPipeline.from_pretrained(tmp_path)._generator is None
    (tmp_path / COSI).mkdir()
    for name in (GENERATOR, INVERTER):
        (tmp_path / COSI / name).write_bytes((weights / name).read_bytes())
    pipe = FlashEditFluxKontextPipeline.from_pretrained(tmp_path)
    assert pipe.to(torch.float64) is pipe
    layer, like = pipe.transformer.x_embedder, pipe.transformer.x_embedder.weight
    assert like.dtype == torch.float64
    for change in (pipe._generator, pipe._inverter):
        assert {x.dtype for x in change.of(layer, like)} == {torch.float64}
    # and they are saved with it, under the stock class's name
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    again = FlashEditFluxKontextPipeline.from_pretrained(tmp_path / "again")
    layers = again._generator.layers
    assert all(torch.equal(x, y) for n, pair in pipe._generator.layers.items() for x, y in zip(pair, layers[n]))


def test_the_edit_region_has_white_noise_unless_told_otherwise(plain, weights, monkeypatch):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    region_first, used = flash_stages.region_first, []

    def spy(run, noise, *rest):
        used.append((run.noise.float(), noise))
        return region_first(run, noise, *rest)

    monkeypatch.setattr(flash_stages, "region_first", spy)
    outs = [run(pipe, white(4), region_noise=r) for r in ("white", "inverted")]
    (fresh, blend), (_, inverted) = used
    assert torch.equal(blend[..., :8], fresh[..., :8]) and torch.equal(blend[..., 8:], inverted[..., 8:])
    assert (inverted != fresh).float().mean() > 0.9 and all(out.stats.inverted for out in outs)
    # nothing is left to invert where all is edited
    whole = [run(pipe, white(), cosi=cosi) for cosi in (True, False)]
    assert torch.equal(whole[0].images, whole[1].images) and not whole[0].stats.inverted
    assert run(pipe, white(), region_noise="inverted").stats.inverted


def test_without_weights_the_noise_is_white_and_it_says_so(plain, caplog):
    pipe = FlashEditFluxKontextPipeline(**plain.components)  # which says it once
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        with_cosi = run(pipe, white(4))
        assert "the noise is white" in caplog.text
        caplog.clear()
        assert torch.equal(run(pipe, white(4), cosi=False).images, with_cosi.images)
        assert "white" not in caplog.text


def test_weights_of_another_model_are_refused(plain, weights, tmp_path):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    with pytest.raises(FileNotFoundError, match="generator.safetensors"):
        pipe.load_cosi(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="expected a layer"):
        merged_copy(other, weights / GENERATOR)
    with pytest.raises(ValueError, match="rank"):
        add_low_rank(other, 0)


# Qwen


def test_qwen_runs_whole_and_everything_foreground_is_the_plain_step():
    pipe = FlashEditQwenImageEditPlusPipeline(**tiny_qwen(plus=True, zero_cond_t=True).components)
    pipe.set_progress_bar_config(disable=True)
    text = qwen_text(12) | {f"negative_{k}": v for k, v in qwen_text(9, seed=4).items()}
    call = dict(image=tiny_image(), max_area=128 * 128, output_type="latent", height=128, width=128, **text)

    def edit(mask, **options):
        return pipe(specedit=FlashEditConfig(**options), mask_image=mask, generator=seeded(), **call)

    dense = SpecEditQwenImageEditPlusPipeline(**pipe.components)
    dense.set_progress_bar_config(disable=True)
    config = SpecEditConfig(stages=(0, 0, 1))
    whole = dense(specedit=config, mask_image=white(), true_cfg_scale=1.0, generator=seeded(), **call).images
    torch.testing.assert_close(edit(white()).images, whole, atol=3e-6, rtol=1e-5)
    call |= dict(mask_mode="add")
    part = edit(white(4), mask_ratio=1e6)
    assert [s.stage for s in part.stats.steps] == ["draft", "source", "edit"]
    assert part.images.isfinite().all() and not torch.equal(part.images, whole)
    off = edit(white(4), bg_shield=False, ssca=False)
    torch.testing.assert_close(off.images, whole, atol=3e-6, rtol=1e-5)


# options and errors


@pytest.mark.parametrize("options, error, text", [
    (dict(method="slow"), ValueError, "method"), (dict(steps=0), ValueError, "steps"),
    (dict(guidance=0.5), ValueError, "guidance"),
    (dict(cosi=1), TypeError, "cosi"), (dict(region_noise="source"), ValueError, "region_noise"),
    (dict(bg_shield=None), TypeError, "bg_shield"), (dict(merged="yes"), TypeError, "merged"),
    (dict(mask_ratio="1"), TypeError, "mask_ratio"), (dict(layer=-1), ValueError, "layer"),
    (dict(token_ratio=-1.0), ValueError, "token_ratio"), (dict(max_active=1.5), ValueError, "max_active"),
    (dict(preserve="all"), ValueError, "preserve"),
    (dict(method="inversion", preserve="pixels"), ValueError, "preserve"),
])  # fmt: skip
def test_wrong_options_are_named(options, error, text):
    with pytest.raises(error, match=text):
        FlashEditConfig(**options)


def test_wrong_calls_are_named(pipe):
    options = call_options(image=tiny_image(), generator=seeded())
    with pytest.raises(TypeError, match="FlashEditConfig"):
        pipe(specedit=SpecEditConfig(), **options)
    with pytest.raises(ValueError, match="negative_prompt"):
        pipe(negative_prompt="red", **options)
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(num_inference_steps=9, **options)
    with pytest.raises(ValueError, match="layer: expected an index of one of 2 blocks, got 2"):
        pipe(specedit=FlashEditConfig(layer=2), **options)
    with pytest.raises(ValueError, match="source_prompt"):
        pipe(source_prompt=["", ""], **options)
    for wrong in (None, 3, [None]):
        with pytest.raises(TypeError, match="^source_prompt: expected a str or a list of them, got "):
            pipe(source_prompt=wrong, **options)


def test_plain_and_callback_still_work(pipe, plain):
    options = call_options(image=tiny_image())
    expected = plain(height=128, width=128, num_inference_steps=2, generator=seeded(), **options)[0]
    got = pipe(specedit=False, height=128, width=128, num_inference_steps=2, generator=seeded(), **options)[0]
    assert torch.equal(got, expected)
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((index, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = run(pipe, white(4), call=dict(callback_on_step_end=callback))
    assert seen == [(0, 1000.0, (1, 64, 64))] and (out.images == 0).all()


# the command


@pytest.mark.slow
def test_the_command_edits_in_one_step(plain, weights, tmp_path, capsys):
    model, source, out = tmp_path / "model", tmp_path / "source.png", tmp_path / "edited.png"
    plain.save_pretrained(model)
    (model / "specedit.json").write_text('{"resolution": 128, "max_sequence_length": 16}')
    tiny_image().save(source)
    white(4).save(tmp_path / "white.png")
    options = ["--model", model, "--device", "cpu", "--mask", tmp_path / "white.png", "--method", "flash", "-o", out]

    def command(*more):
        code = main(["edit", str(source), "make the cat blue", *map(str, (*options, *more))])
        return code, *capsys.readouterr()

    code, text, _ = command()
    assert code == 0 and out.exists()
    for words in ("1 x source 128", "1 x edit 64", "no one-step weights"):
        assert words in text
    assert "key text tokens" not in text  # the mask is all that is computed, and sees them all
    code, _, error = command("--steps", 4)
    assert code == 2 and "num_inference_steps" in error
    (model / "cosi").mkdir()
    for name in (GENERATOR, INVERTER):
        (model / "cosi" / name).write_bytes((weights / name).read_bytes())
    code, text, _ = command()
    assert code == 0 and "noise       of the source, white in the edit region" in text and "1 x invert 64" in text
    code, text, _ = command("--mask-mode", "add")
    assert code == 0 and "key text tokens" in text
    command()
    pixels = PIL.Image.open(out).convert("RGB").tobytes()
    code, text, _ = command("--source-prompt", "a red cat")
    assert code == 0 and PIL.Image.open(out).convert("RGB").tobytes() != pixels  # the source branch reads it
    code, _, error = command("--source-prompt", "a red cat", "--method", "specedit")
    assert code == 2 and "--source-prompt: expected with --method flash" in error


# steps of few launches


FOUND = dict(mask_ratio=1.0)  # the draft looks for the region within the mask


@pytest.mark.parametrize("options", [
    {}, FOUND, FOUND | dict(ssca=False), dict(bg_shield=False), dict(ssca=False, bg_shield=False),
    FOUND | dict(token_ratio=0.0),
])  # fmt: skip
def test_fused_steps_are_the_eager_ones(pipe, options):
    text = torch.randn(1, 5, 32, generator=seeded()), torch.randn(1, 16, generator=seeded())
    call = dict(negative_prompt_embeds=text[0], negative_pooled_prompt_embeds=text[1])
    if "mask_ratio" in options:
        call["mask_mode"] = "limit"
    eager, fused = (run(pipe, white(4), runner=r, call=call, **options) for r in ("eager", "fused"))
    assert fused.stats.runner == "fused" and eager.stats.runner == "eager"
    torch.testing.assert_close(fused.images, eager.images, atol=2e-5, rtol=1e-4)
    ssca = options.get("ssca", True) and (call.get("mask_mode") or not options.get("bg_shield", True))
    assert (fused.stats.key_tokens is not None) == bool(ssca)
    if ssca:
        assert torch.equal(fused.stats.key_tokens, eager.stats.key_tokens)


def test_fused_batches_and_weights(plain, weights):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    masks = torch.zeros(2, 128, 128)
    masks[0, :32, :32] = 1
    masks[1, :, :64] = 1
    call = dict(image=[tiny_image(), tiny_image(seed=3)], prompt=["make the cat blue", "remove the dog"])
    eager, fused = (run(pipe, masks, runner=r, call=call) for r in ("eager", "fused"))
    assert fused.stats.inverted
    torch.testing.assert_close(fused.images, eager.images, atol=2e-5, rtol=1e-4)


def test_both_networks_in_merged_weights(plain, weights, caplog):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    added, merged, again = (run(pipe, white(4), runner="fused", merged=m) for m in (False, True, True))
    torch.testing.assert_close(merged.images, added.images, atol=2e-5, rtol=1e-4)
    assert torch.equal(again.images, merged.images)
    named = [x for x in plain.transformer.named_modules() if "transformer_blocks." in x[0] and "norm" not in x[0]]
    layers = [module for _, module in named if isinstance(module, torch.nn.Linear)]
    assert added.stats.merged_bytes == 0
    assert merged.stats.merged_bytes == 2 * 4 * sum(m.weight.numel() + m.bias.numel() for m in layers)
    assert not pipe._specedit_runner.linears.bytes
    eager = run(pipe, white(4), runner="eager", merged=True)
    assert eager.stats.merged_bytes == 0 and "merged: the changes are added" in caplog.text
    pipe.load_cosi(weights)
    assert pipe._specedit_runner is None or not pipe._specedit_runner.merged.bytes


def test_weights_in_fp8_without_the_networks_go_when_these_come(plain, weights):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    options = dict(runner="fused", precision="fp8")
    alone = run(pipe, white(4), **options).stats.fp8_bytes
    pipe.load_cosi(weights)
    assert alone and not pipe._specedit_runner.linears.bytes
    assert run(pipe, white(4), **options).stats.fp8_bytes == 2 * alone
    pipe.unload_cosi()
    assert not pipe._specedit_runner.linears.bytes and run(pipe, white(4), **options).stats.fp8_bytes == alone


def test_the_conditioning_of_two_texts_is_that_of_each(plain):
    model = FusedFluxModel(plain.transformer, plain.vae, torch.tensor([2.5, 3.5]), {}, StepRunner("fused"))
    generator = seeded()
    texts = [FluxText(torch.randn(2, n, 32, generator=generator), torch.randn(2, 16, generator=generator),
                      torch.zeros(n, 3)) for n in (5, 3)]  # fmt: skip
    at = torch.tensor([700.0])
    found = model.conditionings(texts, at)
    for text, both in zip(texts, found):
        [alone] = model.timestep_conditioning(text, at)
        assert both.shape == alone.shape
        torch.testing.assert_close(both, alone)


def test_embeddings_that_are_given_are_the_text(plain):
    parts = plain.components | dict(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    pipe = FlashEditFluxKontextPipeline(**parts)
    pipe._joint_attention_kwargs = {}
    call = SimpleNamespace(num_images_per_prompt=1, max_sequence_length=16)
    fields = dict(
        prompt=None, prompt_2=None, prompt_embeds=torch.randn(2, 5, 32), pooled_prompt_embeds=torch.randn(2, 16)
    )
    found = pipe._encode_text(call, torch.device("cpu"), **fields)
    expected = pipe.encode_prompt(**fields, device=torch.device("cpu"))
    for a, b in zip((found.embeds, found.pooled, found.text_ids), expected):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_the_dtype_of_a_model_is_its_own():
    model = tiny_pipeline().transformer.to(torch.bfloat16)
    assert dtype_of(model) == model.dtype == torch.bfloat16
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert dtype_of(model) == model.dtype == torch.float32


def test_both_networks_compute_in_fp8(plain, weights):
    pipe = FlashEditFluxKontextPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    exact, rounded = (run(pipe, white(4), runner="fused", precision=p) for p in ("auto", "fp8"))
    assert rounded.stats.precision == "fp8" and rounded.stats.inverted and rounded.stats.fp8_bytes > 0
    assert 0 < (rounded.images - exact.images).norm() < 0.2 * exact.images.norm()


@pytest.mark.gpu  # CUDA graphs need a GPU
def test_graphs_replay_the_fused_steps(weights):
    pipe = FlashEditFluxKontextPipeline(**tiny_pipeline().to("cuda").components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    for columns in (4, 2, 4):  # a size that was there is there again
        for options in ({}, dict(bg_shield=False), dict(merged=True)):
            fused, graph = (run(pipe, white(columns), runner=r, **options) for r in ("fused", "graph"))
            assert graph.stats.runner == "graph"
            torch.testing.assert_close(graph.images, fused.images, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu  # there is nothing to wait for on a CPU
@pytest.mark.parametrize("merged", [False, True])
def test_a_masked_run_waits_for_nothing(weights, monkeypatch, merged):
    pipe = FlashEditFluxKontextPipeline(**tiny_pipeline().to("cuda").components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_cosi(weights)
    expected = run(pipe, white(4), runner="graph", merged=merged)  # captures wait
    inner = pipe._run

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return inner(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(pipe, "_run", strict)
    out = run(pipe, white(4), runner="graph", merged=merged)
    assert out.stats.captures == 0 and torch.equal(out.images, expected.images)


def test_a_picture_of_one_block(pipe):
    out = pipe(image=tiny_image(), generator=seeded(), **call_options() | dict(height=32, width=32, max_area=32 * 32))
    assert out.scores.shape == (1, 2, 2)
