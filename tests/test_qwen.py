# SPDX-License-Identifier: Apache-2.0
"""SpecEditQwenImageEditPipeline and its Plus on tiny models with random weights: exactness, positions, references."""

import functools
import logging
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import QwenImageEditPipeline, QwenImagePipeline
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from tiny_models import (
    TinyVisionProcessor,
    paper,
    qwen_text,
    small_qwen,
    tiny_image,
    tiny_qwen,
    tiny_vision_encoder,
)

from specedit_kernels import (
    LIGHTNING_SCHEDULE,
    disable_specedit,
    enable_specedit,
)
from specedit_kernels.engine import registry, stages
from specedit_kernels.engine.attention import SpecEditAttnProcessor
from specedit_kernels.engine.config import THRESHOLDS
from specedit_kernels.models import qwen_image_edit as qwen_model
from specedit_kernels.models.qwen_image_edit import QwenCodec
from specedit_kernels.sampling import grid as grids

AREA = 128 * 128
EVERYTHING = dict(stages=(0, 2, 2), draft="quarter", draft_steps=1, threshold=-1.0)


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    """Both stock pipelines work on a megapixel whatever they are given; here on 128 x 128 pixels, one thread."""
    small_qwen(monkeypatch)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def half_mask(columns=4, rows=8):
    array = np.zeros((128, 128), np.uint8)
    array[: 16 * rows, : 16 * columns] = 255
    return PIL.Image.fromarray(array)


def enabled(plain):
    pipe = registry.pipelines()[type(plain)](**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count, other=(96, 160)):
    """The first is square, the second is not."""
    return [tiny_image(), tiny_image(*other, seed=1)][:count]


def options(guided=False, padded=3, batch=1, **changes):
    """Embeddings of a call; latents come out."""
    text = qwen_text(padded=padded, batch=batch)
    if guided:
        text.update(qwen_text(7, batch=batch, negative=True, seed=4), true_cfg_scale=3.0)
    return {**text, "output_type": "latent", **changes}


# (Plus, zero_cond_t), and with what the model sees; "elsewhere": the edited picture is not on the output's grid
MODELS = [(plus, zero) for plus in (False, True) for zero in (False, True)]
SEEN = [(*model, seen) for model in MODELS for seen in ("one", "two", "elsewhere") if model[0] or seen != "two"]


@functools.cache
def pair(plus, zero):
    """(the stock pipeline, SpecEdit on the same components)."""
    plain = tiny_qwen(plus, zero)
    return plain, enabled(plain)


def image_of(plus, seen):
    image = {"one": pictures(1), "two": pictures(2), "elsewhere": [tiny_image(96, 160)]}[seen]
    return image if plus else image[0]


@pytest.fixture(params=MODELS, ids=lambda p: f"{'plus' if p[0] else 'edit'}-zero{int(p[1])}")
def pipe(request):
    return pair(*request.param)[1]


@pytest.fixture(scope="module")
def edit():
    return enabled(tiny_qwen())


@pytest.fixture(scope="module")
def plus():
    return enabled(tiny_qwen(plus=True, zero_cond_t=True))


# proofs


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("plus", "zero", "seen"), SEEN)
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(plus, zero, seen, guided):
    plain, pipe = pair(plus, zero)
    call = options(guided, image=image_of(plus, seen), height=128, width=128, num_images_per_prompt=2)
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    out = pipe(generator=seeded(), specedit=paper(**EVERYTHING), **call)
    assert out.stats.fallback == "dense" and out.mask.all()
    assert torch.equal(out.images, expected)
    first = pipe(generator=seeded(), specedit=paper(**{**EVERYTHING, "draft": "full_step"}), **call)
    assert torch.equal(first.images, expected)
    unlike = plain(num_inference_steps=4, generator=seeded(2), **call).images
    assert not torch.equal(unlike, expected)


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_everything_selected_has_the_plain_pixels(output_type):
    plain = tiny_qwen(plus=True)
    # two pictures of different ratios and no size: that of the last, where the first is not on the output's grid
    call = options(image=pictures(2), output_type=output_type)
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    got = enabled(plain)(generator=seeded(), specedit=paper(**EVERYTHING), **call).images
    got, expected = (np.asarray(x[0].numpy() if output_type == "pt" else x[0]) for x in (got, expected))
    assert got.shape == expected.shape == ((3, 96, 160) if output_type == "pt" else (96, 160, 3))
    assert (got == expected).all()


@pytest.mark.parametrize("size", [None, (128, 96), (64, 192)])
def test_the_sizes_of_the_plain_pipeline(size):
    plain = tiny_qwen(zero_cond_t=True)
    call = options(image=tiny_image(120, 200))
    if size is not None:
        call.update(height=size[0], width=size[1])
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    out = enabled(plain)(generator=seeded(), specedit=paper(**EVERYTHING), **call)
    assert torch.equal(out.images, expected)
    assert out.mask.shape[1:] == ((6, 10) if size is None else (size[0] // 16, size[1] // 16))
    assert out.stats.plain_tokens == math.prod(out.mask.shape[1:]) + 60


@pytest.mark.slow
def test_everything_selected_is_the_plain_pipeline_in_bfloat16():
    plain = tiny_qwen(plus=True, zero_cond_t=True).to(torch.bfloat16)
    call = options(True, image=pictures(2), height=128, width=128)
    call = {k: v.bfloat16() if k.endswith("embeds") else v for k, v in call.items()}
    expected = plain(num_inference_steps=4, generator=seeded(), **call).images
    pipe = enabled(plain)
    got = pipe(generator=seeded(), specedit=paper(**EVERYTHING), **call).images
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
    for finish in ("full", "locked"):
        config = paper(stages=(1, 2, 1), finish=finish)
        out = pipe(generator=seeded(), mask_image=half_mask(3), specedit=config, **call).images
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        assert not torch.equal(out, expected)


@pytest.mark.slow
def test_a_batch_of_prompts_is_the_plain_pipelines():
    plain = tiny_qwen(zero_cond_t=True)
    images = [tiny_image(), tiny_image(seed=1)]
    call = options(True, batch=2, image=images)
    expected = plain(num_inference_steps=4, generator=[seeded(1), seeded(2)], **call).images
    pipe = enabled(plain)
    config = paper(**EVERYTHING)
    assert torch.equal(pipe(generator=[seeded(1), seeded(2)], specedit=config, **call).images, expected)


@pytest.mark.slow
def test_the_text_encoder_sees_what_it_sees_in_the_plain_pipeline():
    for several, image in ((False, tiny_image()), (False, [tiny_image(100, 100)]), (True, pictures(2))):
        plain = tiny_qwen(several, text_encoder=tiny_vision_encoder(), processor=TinyVisionProcessor())
        call = dict(prompt="make it blue", negative_prompt=" ", image=image, height=128, width=128)
        expected = plain(num_inference_steps=4, generator=seeded(), output_type="latent", **call).images
        pipe = enabled(plain)
        config = paper(**EVERYTHING)
        out = pipe(generator=seeded(), output_type="latent", specedit=config, **call)
        assert torch.equal(out.images, expected)
        call["prompt"] = "make it red"
        other = pipe(generator=seeded(), output_type="latent", specedit=config, **call).images
        assert not torch.equal(other, expected)


@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_nothing_selected_returns_the_source(pipe, draft, caplog):
    image = tiny_image()
    config = paper(draft=draft, draft_steps=2, threshold=4.0)
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        out = pipe(image=image, generator=seeded(), specedit=config, **options(True, output_type="pil"))
    assert (np.array(out.images[0]) == np.array(image)).all()
    assert out.stats.fallback == "source" and not out.mask.any() and "nothing changes" in caplog.text
    latent = pipe(image=image, generator=seeded(), specedit=config, **options()).images
    pixels = pipe.image_processor.preprocess(image)[:, :, None]
    assert torch.equal(latent, grids.pack(pipe._encode_vae_image(pixels, None)[:, :, 0]))


@pytest.mark.slow
def test_disable_restores_class_processors_hooks_and_bits():
    for several, zero in MODELS:
        pipe = tiny_qwen(several, zero)
        stock = type(pipe)
        call = options(True, image=tiny_image(), num_inference_steps=2)
        expected = pipe(generator=seeded(), **call).images
        before = dict(pipe.transformer.attn_processors)
        handle = enable_specedit(pipe, paper(stages=(1, 2, 1)))
        assert type(pipe) is registry.pipelines()[stock] and handle.stats() is None
        assert all(isinstance(p, SpecEditAttnProcessor) for p in pipe.transformer.attn_processors.values())
        hooks = [len(b._forward_pre_hooks) for b in pipe.transformer.transformer_blocks]
        assert hooks == [int(zero)] * 2
        assert torch.equal(pipe(generator=seeded(), specedit=False, **call).images, expected)
        del call["num_inference_steps"]
        pipe(generator=seeded(), mask_image=half_mask(3), **call)
        assert handle.stats().nfe == 4
        assert [len(b._forward_pre_hooks) for b in pipe.transformer.transformer_blocks] == hooks
        disable_specedit(pipe)
        assert type(pipe) is stock
        after = pipe.transformer.attn_processors
        assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
        assert not any(b._forward_pre_hooks for b in pipe.transformer.transformer_blocks)
        assert torch.equal(pipe(generator=seeded(), num_inference_steps=2, **call).images, expected)


def make_run(pipe, config, mask=None, **changes):
    """A Run as the pipeline makes it, caught on its way into `_run`."""
    caught = []

    class Caught(Exception):
        pass

    def catch(run, counts, sigmas, user_mask):
        caught.append(run)
        raise Caught

    pipe._run = catch
    try:
        with pytest.raises(Caught):
            pipe(generator=seeded(), mask_image=mask or half_mask(), specedit=config, **options(**changes))
    finally:
        del pipe._run
    return caught[0]


def mixed_state(run, count, sigma=0.7):
    """The mixed sequence with the first `count` of 16 blocks active."""
    blocks = (torch.arange(16) < count)[None].expand(run.batch, 16)
    selection = stages.select(run, grids.from_blocks(blocks, run.grid).float(), 0.5, 0)
    fine = torch.randn(run.source.shape, generator=seeded())
    return fine, stages.expand(run, fine, torch.randn(run.batch, 16, 8, 8), sigma, selection)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("plus", "zero", "seen"), SEEN)
def test_a_mixed_step_with_all_blocks_active_is_a_dense_step(plus, zero, seen, guided):
    shape = dict(image=image_of(plus, seen), height=128, width=128)
    run = make_run(pair(plus, zero)[1], paper(stages=(0, 2, 1)), guided=guided, **shape)
    fine, state = mixed_state(run, 16)
    latents = [r.latents for r in run.references]
    grids_of = [(x.shape[-2] // 2, x.shape[-1] // 2) for x in (fine, *latents)]
    layouts = [run.model.dense_layout(text, run.pictures, grids_of) for text in run.branches]
    at = torch.tensor(700.0)
    mixed = run.velocity(state.tokens, at, state.layouts)
    dense = run.velocity(torch.cat([grids.pack(x) for x in (fine, *latents)], dim=1), at, layouts)
    # rows of the table -> rows of the dense sequence: it has no coarse rows, and no condition half where not aligned
    row = state.layout.index.long()
    gap = 32 if seen == "elsewhere" else 0
    row = torch.where(row >= 160, row - 32 - (64 if gap else 0), torch.where(row >= 80, row - 16, row))
    assert state.layout.capacity == dense.shape[1]
    in_order = dense.gather(1, row[..., None].expand_as(dense))
    targets = slice(0, 64)  # guidance makes 0 / 0 of clean tokens at most; the target is what is used
    assert torch.allclose(mixed[:, targets], in_order[:, targets], atol=1e-5)
    assert mixed[:, targets].std() > 1e-3
    if not guided:
        assert torch.allclose(mixed, in_order, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("plus", "zero", "seen"), SEEN)
def test_a_step_over_cached_keys_is_the_whole_step_while_nothing_moves(plus, zero, seen, guided):
    shape = dict(image=image_of(plus, seen), height=128, width=128)
    for lock_text in (False, True):
        config = paper(stages=(0, 3, 1), kv_refresh=3, lock_text=lock_text)
        run = make_run(pair(plus, zero)[1], config, guided=guided, **shape)
        _, state = mixed_state(run, 5)
        at = torch.tensor(700.0)
        whole = run.velocity(state.tokens, at, state.layouts)
        active = run.velocity(state.tokens[:, : state.first], at, state.active_layouts)
        assert state.first == 20 and active.shape[1] == 20
        assert torch.allclose(active, whole[:, :20], atol=1e-5)
        assert len(state.locked_layouts) == lock_text * len(run.branches)
        if lock_text:
            target = slice(None) if not guided else slice(0, 31)  # guidance makes 0 / 0 of clean tokens at most
            again = run.velocity(state.tokens, at, state.locked_layouts)
            assert torch.allclose(again[:, target], whole[:, target], atol=1e-5)


@torch.no_grad()
def test_locked_text_keeps_its_keys_while_the_image_moves(plus):
    """Text that is not computed cannot follow a change of the image's tokens or of the timestep."""
    config = paper(stages=(0, 3, 1), kv_refresh=3, lock_text=True)
    run = make_run(plus, config, image=pictures(2), height=128, width=128)
    _, state = mixed_state(run, 5)
    run.velocity(state.tokens, torch.tensor(700.0), state.layouts)
    length = run.positive.embeds.shape[1]
    cache = state.layouts[0].attention.cache
    kept = [x[:, :length].clone() for x in cache.pairs[-1]]
    moved, at = state.tokens + 1, torch.tensor(300.0)
    run.velocity(moved, at, state.locked_layouts)
    run.velocity(moved[:, : state.first], at, state.active_layouts)
    assert all(torch.equal(a, b[:, :length]) for a, b in zip(kept, cache.pairs[-1]))
    run.velocity(moved, at, state.layouts)
    assert not torch.allclose(kept[0], cache.pairs[-1][0][:, :length], atol=1e-3)


@torch.no_grad()
def test_timestep_positions_and_mask_of_a_mixed_sequence_matter(plus):
    """What the dense comparison above would not see if the model did not react to it."""
    run = make_run(plus, paper(stages=(0, 2, 1)), image=pictures(2), height=128, width=128)
    _, state = mixed_state(run, 6)
    at = torch.tensor(700.0)
    base = run.velocity(state.tokens, at, state.layouts)
    layout = state.layouts[0]
    sequence = layout.attention.sequence

    def change(**fields):
        changed = replace(layout, attention=replace(layout.attention, sequence=replace(sequence, **fields)))
        return (run.velocity(state.tokens, at, [changed]) - base).abs().max()

    assert change(modulate=torch.zeros_like(sequence.modulate)) > 1e-4
    assert change(cos=sequence.cos.flip(1), sin=sequence.sin.flip(1)) > 1e-4
    bias = sequence.key_bias
    assert bias[0, :12].isinf().tolist() == [False] * 9 + [True] * 3  # three padded text tokens
    assert change(key_bias=bias.nan_to_num(neginf=0.0)) > 1e-4
    assert change() == 0


# positions


def tables(pipe, run, count=6):
    _, state = mixed_state(run, count)
    sequence = state.layouts[0].attention.sequence
    return state, torch.complex(sequence.cos[0], sequence.sin[0])


@torch.no_grad()
def test_positions_of_a_mixed_sequence_are_those_of_the_full_layout(plus):
    run = make_run(plus, paper(coarse_references=True), image=pictures(2), height=128, width=128)
    state, got = tables(plus, run)
    shapes = [[(1, 8, 8), (1, 8, 8), (1, 6, 10)]]
    image, text = plus.transformer.pos_embed(shapes, max_txt_seq_len=12, device=torch.device("cpu"))
    assert torch.allclose(got[:12], text, atol=1e-6)
    # a block's four tokens have mean angle where the block stands: the product of their numbers is its fourth power
    index = state.layout.index[0].long()
    for slot, row in enumerate(index.tolist()):
        picture, row = (0, row) if row < 80 else (1, row - 80) if row < 160 else (2, row - 160)
        columns, first = [(8, 0), (8, 64), (10, 128)][picture]
        if picture < 2 and row < 64:
            assert torch.allclose(got[12 + slot], image[first + row], atol=1e-6)
            continue
        block = row if picture == 2 else row - 64
        y, x = 2 * (block // (columns // 2)), 2 * (block % (columns // 2))
        four = [first + (y + i) * columns + x + j for i in (0, 1) for j in (0, 1)]
        assert torch.allclose(got[12 + slot] ** 4, image[four].prod(dim=0), atol=1e-5)
    middle = state.layouts[0].attention.sequence.modulate[0]
    targets = int(state.layout.target_lengths)
    assert targets == 6 * 4 + 10 and (middle[:targets] == 0).all() and (middle[targets:] == 1).all()


@torch.no_grad()
def test_odd_sides_are_centred_as_the_model_does_it():
    positions = torch.cat([torch.zeros(15, 1), grids.token_positions((3, 5))], dim=1)
    got = torch.complex(*qwen_model.rotary_table(qwen_model.centred(positions, [(3, 5)]), (4, 6, 6), 10000))[:, ::2]
    expected, _ = tiny_qwen().transformer.pos_embed([[(1, 3, 5)]], max_txt_seq_len=1, device=torch.device("cpu"))
    assert torch.allclose(got, expected, atol=1e-6)


@torch.no_grad()
def test_the_text_stands_behind_the_pictures_of_its_stage(plus, monkeypatch):
    """As in a plain run on pictures of that size."""
    seen = {}
    inner = QwenDoubleStreamAttnProcessor2_0
    real = inner.__call__
    image = pictures(2)

    def spy(self, attn, hidden, text, mask, attention_mask, rotary):
        seen[hidden.shape[1]] = rotary
        return real(self, attn, hidden, text, mask, attention_mask, rotary)

    monkeypatch.setattr(inner, "__call__", spy)
    config = paper(stages=(1, 2, 1), draft="quarter", draft_steps=1, threshold=-1.0)
    plus(image=image, height=128, width=128, generator=seeded(), specedit=config, **options())
    # draft: 4 + 4 + 2 x 3 tokens; coarse: 16 + 16 + 3 x 5; fine: 64 + 64 + 60
    assert sorted(seen) == [14, 47, 188]
    grids = {14: [(2, 2), (2, 2), (2, 3)], 47: [(4, 4), (4, 4), (3, 5)], 188: [(8, 8), (8, 8), (6, 10)]}
    for tokens, sides in grids.items():
        shapes = [[(1, *side) for side in sides]]
        expected = plus.transformer.pos_embed(shapes, max_txt_seq_len=12, device=torch.device("cpu"))
        assert all(torch.equal(a, b) for a, b in zip(seen[tokens], expected))


# stages


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["full", "locked"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_a_batch_of_two_is_two_runs_of_one(finish, guided, zero):
    pipe = enabled(tiny_qwen(zero_cond_t=zero))
    images, masks = [tiny_image(), tiny_image(seed=1)], [half_mask(2), half_mask(6, rows=6)]
    config = paper(stages=(2, 2, 2), finish=finish, preserve="pixels", uniform_stride=3)
    call = options(guided, batch=2, output_type="pt", specedit=config)
    both = pipe(image=images, mask_image=masks, generator=[seeded(5), seeded(6)], **call)
    assert both.stats.active[0] != both.stats.active[1]
    for i in range(2):
        one = {k: v[i : i + 1] if k.endswith(("embeds", "mask")) else v for k, v in call.items()}
        if i == 0:
            one["prompt_embeds_mask"] = None
        alone = pipe(image=images[i], mask_image=masks[i], generator=seeded(5 + i), **one)
        assert torch.allclose(both.images[i], alone.images[0], atol=1e-5)
        assert torch.equal(both.mask[i], alone.mask[0])
        assert both.stats.steps[3].tokens[i] == alone.stats.steps[3].tokens[0]


@pytest.mark.slow
def test_images_of_a_prompt_stand_together(edit):
    images, masks = [tiny_image(), tiny_image(seed=1)], [half_mask(2), half_mask(6)]
    call = options(True, batch=2, specedit=paper(stages=(1, 2, 1)))
    four = edit(
        image=images, mask_image=masks, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **call
    )
    for i in range(4):
        row = i // 2
        one = {k: v[row : row + 1] if k.endswith(("embeds", "mask")) else v for k, v in call.items()}
        alone = edit(image=images[row], mask_image=masks[row], generator=seeded(i), **one)
        assert torch.allclose(four.images[i], alone.images[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("metric", ["decoder", "latent", "projected"])
def test_matched_verify_is_zero_where_the_draft_is_the_source(edit, metric):
    run = make_run(edit, paper(metric=metric), image=tiny_image())
    small = stages.source_at(run, (4, 4))
    assert stages.verify(run, stages.Draft(small.clone(), small)).max() < 1e-5
    literal = make_run(edit, paper(metric=metric, reference="literal"), image=tiny_image())
    assert stages.verify(literal, stages.Draft(small, small)).max() > 1e-3
    changed = small.clone()
    changed[..., 2:4, 6:8] += 3 * torch.randn(1, 16, 2, 2, generator=seeded())
    scores = stages.verify(run, stages.Draft(changed, small)).reshape(8, 8)
    if metric == "decoder":  # its attention sees the whole picture
        assert scores[2:4, 6:8].mean() > 4 * scores[5:].mean()
    else:
        assert scores[2:4, 6:8].min() > 0.3 and scores[5:].max() < 1e-5


@torch.no_grad()
def test_the_codec_is_the_pipelines_own(edit):
    codec = QwenCodec(edit.vae)
    pixels = edit.image_processor.preprocess(tiny_image())
    latents = codec.encode(pixels)
    assert codec.token == 16 and torch.equal(latents, edit._encode_vae_image(pixels[:, :, None], None)[:, :, 0])
    maps = []
    decoder = edit.vae.decoder
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: maps.append(output[:, :, 0]))
        for layer in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0])
    ]
    try:
        codec.decode(latents)
    finally:
        for hook in hooks:
            hook.remove()
    for got, expected in zip(codec.features(latents), maps, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("finish", "unselected"), [("full", "source"), ("full", "coarse"), ("locked", "source")])
@pytest.mark.parametrize("kind", ["mask", "coarse", "quarter", "full_step"])
def test_an_ideal_model_gives_its_picture(plus, monkeypatch, finish, unselected, kind):
    target = torch.randn(1, 16, 16, 16, generator=seeded(7)).clamp(-2, 2)
    image, layouts = pictures(2), []
    real_expand = stages.expand

    def expand(*arguments):
        state = real_expand(*arguments)
        layouts.append(state.layout)
        return state

    def velocity(run, tokens, conditioning, found, first=None, guided=True):
        clean = {188: target, 47: grids.pool(target), 14: grids.pool(grids.pool(target))}.get(tokens.shape[1])
        if found[0].attention is None:
            clean = grids.pack(clean)
            clean = torch.cat([clean, tokens[:, clean.shape[1] :]], dim=1)
        else:
            table = torch.cat([grids.pack(target), grids.pack(grids.pool(target)), torch.zeros(1, 140, 64)], dim=1)
            clean = table[:, layouts[-1].index[0].clamp(min=0).long()]
        return ((tokens - clean) / (conditioning[0] / 1000))[:, :first]

    monkeypatch.setattr(stages, "expand", expand)
    monkeypatch.setattr(stages.Run, "velocity", velocity)
    config = dict(
        stages=(3, 3, 3),
        draft=kind if kind != "mask" else "coarse",
        finish=finish,
        unselected=unselected,
        max_active=1.0,
        draft_steps=2,
    )
    call = options(image=image, height=128, width=128)
    if kind != "mask":
        wide = plus(generator=seeded(), specedit=paper(**config), **call)
        config.update(threshold=float(wide.scores.quantile(0.9)), dilation=0)
    mask = half_mask(4) if kind == "mask" else None
    out = plus(generator=seeded(), mask_image=mask, specedit=paper(**config), **call)
    assert layouts and 0 < out.mask.float().mean() < 1
    result = grids.unpack(out.images, (8, 8))
    inside = out.mask.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None].expand_as(result)
    assert torch.allclose(result[inside], target[inside], atol=1e-4)
    source = plus._encode_vae_image(plus.image_processor.preprocess(image[0])[:, :, None], None)[:, :, 0]
    outside = target if finish == "full" else source
    assert torch.allclose(result[~inside], outside[~inside], atol=1e-4)


def test_guidance_keeps_the_length_of_each_tokens_velocity():
    positive, negative = torch.randn(2, 2, 5, 8, generator=seeded())
    model = qwen_model.QwenImageEditModel.__new__(qwen_model.QwenImageEditModel)
    guided = model.guide(positive, negative, 4.0)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1))
    straight = negative + 4.0 * (positive - negative)
    assert torch.allclose(torch.nn.functional.cosine_similarity(guided, straight, dim=-1), torch.ones(2, 5))


# options


@pytest.mark.slow
def test_tokens_of_further_pictures(plus):
    for coarse, others in ((False, 60), (True, 15)):
        config = paper(stages=(1, 2, 1), coarse_references=coarse)
        call = options(image=pictures(2), mask_image=half_mask(4), height=128, width=128)
        out = plus(generator=seeded(), specedit=config, **call)
        # coarse: 16 + 16 + 15 tokens; mixed: 32 + 8 of the target, as many of the condition; full: 64 + 64 + 60
        assert [s.tokens for s in out.stats.steps] == [(47,)] + [(80 + others,)] * 2 + [(188,)]
    # where the edited picture is not on the output's grid all of it is seen, at one resolution
    call = options(image=pictures(1)[0], mask_image=half_mask(4), height=128, width=96)
    out = plus(generator=seeded(), specedit=paper(stages=(1, 2, 1)), **call)
    # 24 target tokens of the 6 edited blocks of 12 (a mask on 8 columns set on 6), and 6; 64 of the picture
    active = round(out.stats.active[0] * 12)
    assert [s.tokens for s in out.stats.steps] == [(12 + 16,)] + [(12 + 3 * active + 64,)] * 2 + [(48 + 64,)]


@pytest.mark.slow
def test_pixels_outside_the_feathered_region_are_the_sources(pipe):
    image = tiny_image()
    for finish in ("full", "locked"):
        config = paper(stages=(2, 2, 2), finish=finish, preserve="pixels", feather=8)
        call = options(True, image=image, mask_image=half_mask(2), output_type="pil")
        got = np.array(pipe(generator=seeded(), specedit=config, **call).images[0])
        assert (got[:, 32 + 8 :] == np.array(image)[:, 32 + 8 :]).all()
        assert not (got[:, :32] == np.array(image)[:, :32]).all()


def test_stats_count_both_branches(edit):
    call = options(True, image=tiny_image(), mask_image=half_mask(4))
    stats = edit(generator=seeded(), specedit=paper(stages=(3, 5, 3)), **call).stats
    assert [s.tokens for s in stats.steps] == [(32,)] * 3 + [(80,)] * 5 + [(128,)] * 3
    cost = lambda n: sum(2 * (24 * 32**2 * (t + n) + 4 * 32 * (t + n) ** 2) for t in (12, 7))  # noqa: E731
    assert stats.flops == 3 * cost(32) + 5 * cost(80) + 3 * cost(128)
    assert stats.plain_flops == 11 * cost(128) and stats.backend == "reference"


@pytest.mark.parametrize(
    ("guided", "changes", "threshold"),
    [(False, {}, 0.03), (True, {}, 0.4), (True, dict(draft_guidance=False), 0.03), (True, dict(threshold=1.5), 1.5),
     (True, dict(draft_guidance="last"), 0.05), (False, dict(draft_guidance="last"), 0.03),
     (True, dict(draft_guidance="last", stages=(1, 1, 0)), 0.4),  # its only step has guidance
     (True, dict(draft="full_step"), THRESHOLDS["decoder", "matched", "full_step"])],
)  # fmt: skip
def test_thresholds_of_its_own_drafts(edit, guided, changes, threshold):
    config = paper(**dict(stages=(2, 1, 0), finish="locked") | changes)
    call = options(guided, image=tiny_image())
    assert edit(generator=seeded(), specedit=config, **call).stats.threshold == threshold


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "counts"), [(8, (3, 3, 2)), (4, (1, 2, 1))])
def test_presets_and_schedule_of_distilled_weights(preset, counts):
    plain = tiny_qwen()
    plain.scheduler = type(plain.scheduler).from_config(plain.scheduler.config, **LIGHTNING_SCHEDULE)
    pipe = enabled(plain)
    assert pipe.scheduler.config.shift_terminal is None
    # a shift of 3 at every size, down to 3 / (n + 2) before the last step
    steps = np.linspace(1.0, 1 / preset, preset)
    for tokens in (64, 4096):
        sigmas = pipe._plain_sigmas(preset, tokens, None)
        assert np.allclose(sigmas, [*(3 * steps / (1 + 2 * steps)), 0.0], atol=1e-6)
    call = options(image=tiny_image(), mask_image=half_mask(3), true_cfg_scale=1.0)
    out = pipe(generator=seeded(), specedit=paper(preset=preset), **call)
    stages_of = [s.stage for s in out.stats.steps]
    assert out.stats.nfe == preset and tuple(map(stages_of.count, ("coarse", "mixed", "full"))) == counts
    everything = paper(**{**EVERYTHING, "stages": (0, *counts[1:])})
    call = options(image=tiny_image(), true_cfg_scale=1.0)
    expected = plain(num_inference_steps=sum(counts[1:]), generator=seeded(), **call).images
    assert torch.equal(pipe(generator=seeded(), specedit=everything, **call).images, expected)


def test_a_draft_of_one_step_has_a_sigma(edit):
    assert edit._plain_sigmas(1, 4, None) == [1.0, 0.0]
    config = paper(stages=(0, 2, 1), draft="quarter", draft_steps=1)
    scores = edit(image=tiny_image(), generator=seeded(), specedit=config, **options()).scores
    assert scores.isfinite().all()


def test_callback_and_latents(edit):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape), tuple(tensors["prompt_embeds"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else tensors

    noise = grids.pack(torch.randn(1, 16, 16, 16, generator=seeded(9)))
    call = options(image=tiny_image(), mask_image=half_mask(4), latents=noise, specedit=paper(stages=(1, 2, 1)))
    watched = dict(
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **call
    )
    out = edit(generator=seeded(), **watched)
    assert [(s, n[1]) for s, n, _ in seen] == [(0, 16), (1, 80), (2, 80), (3, 64)]
    assert (out.images == 0).all() and edit.num_timesteps == 4
    assert torch.equal(edit(generator=seeded(), **call).images, edit(generator=seeded(), **call).images)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_without_a_graph_break():
    pipe = enabled(tiny_qwen(zero_cond_t=True))
    config = paper(stages=(1, 1, 1))
    call = options(padded=0, image=tiny_image(), mask_image=half_mask(3), specedit=config)
    expected = pipe(generator=seeded(), **call).images
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(pipe(generator=seeded(), **call).images, expected, atol=1e-5)


@pytest.mark.slow
def test_from_pretrained(tmp_path):
    plain = tiny_qwen(plus=True, zero_cond_t=True)
    plain.save_pretrained(tmp_path)
    pipe = registry.pipelines()[type(plain)].from_pretrained(
        tmp_path, text_encoder=None, tokenizer=None, processor=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    call = options(image=pictures(2), mask_image=half_mask(3), specedit=paper(stages=(1, 2, 1)))
    expected = enabled(plain)(generator=seeded(), **call).images
    (images,) = pipe(generator=seeded(), return_dict=False, **call)
    assert torch.allclose(images, expected, atol=1e-5)


def test_max_area_is_that_of_source_and_output(edit, plus, monkeypatch):
    monkeypatch.undo()
    call = options(mask_image=half_mask(3), specedit=paper(stages=(1, 1, 1)), max_area=64 * 128)
    assert edit(image=tiny_image(64, 128), generator=seeded(), **call).mask.shape == (1, 4, 8)
    assert plus(image=pictures(2), generator=seeded(), **call).mask.shape == (1, 4, 8)
    assert plus.size_of(tiny_image(96, 160), 96 * 160) == (96, 160)


# errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(image=None), TypeError, "image: expected a PIL image or a list of them, got NoneType"),
        (dict(image=[]), ValueError, "image: expected at least one picture"),
        (dict(image=[tiny_image(), np.zeros((8, 8, 3))]), TypeError, "image: expected .* got ndarray at 1"),
        (dict(image=[tiny_image(), tiny_image()]), ValueError, "image: expected 1 or as many"),
        (dict(image=tiny_image().convert("L")), ValueError, "image: expected pictures with 3 channels .* got 1 "),
        (dict(specedit="fast"), TypeError, "specedit: expected SpecEditConfig"),
        (dict(true_cfg_scale="4"), TypeError, "true_cfg_scale: expected a number, got str"),
        (dict(specedit=paper(stages=(0, 2, 2))), ValueError, "draft: 'coarse' needs at least one coarse step"),
        (dict(latents=torch.zeros(1, 3, 64)), ValueError, r"latents: expected \(1, 64, 64\)"),
        (dict(generator=[seeded(), seeded()]), ValueError, "generator: expected 1 generators"),
        (dict(specedit=False, max_area=99), ValueError, "max_area: expected None where SpecEdit is off"),
        (dict(specedit=False, mask_image=half_mask()), ValueError, "mask_image: expected None where SpecEdit is off"),
        (dict(prompt="a"), ValueError, "Cannot forward both `prompt`"),
        (
            dict(qwen_text(batch=2, negative=True)),
            ValueError,
            "negative_prompt_embeds: expected 1, got 2",
        ),
    ],
)
def test_call_names_the_wrong_argument(edit, change, error, message):
    with pytest.raises(error, match=message):
        edit(**{**options(image=tiny_image()), **change})


def test_plus_takes_one_prompt(plus):
    with pytest.raises(ValueError, match="prompt: QwenImageEditPlusPipeline takes one prompt a call, got 2"):
        plus(image=tiny_image(), **options(batch=2))


def test_unsupported_pipelines_and_transformers():
    plain = tiny_qwen()
    parts = {k: v for k, v in plain.components.items() if k != "processor"}
    with pytest.raises(TypeError, match="QwenImageEditPlusPipeline, .*got QwenImagePipeline"):
        enable_specedit(QwenImagePipeline(**parts))
    plain.transformer.register_to_config(use_layer3d_rope=True)
    with pytest.raises(ValueError, match="transformer: expected use_layer3d_rope=False"):
        enable_specedit(plain)
    plain.transformer.register_to_config(use_layer3d_rope=False)

    class Foreign:
        def __call__(self, attn, hidden_states):
            return hidden_states

    plus = tiny_qwen(zero_cond_t=True)
    plus.transformer.transformer_blocks[1].attn.set_processor(Foreign())
    with pytest.raises(TypeError, match="transformer_blocks.1.attn.processor is a Foreign"):
        enable_specedit(plus)
    assert not plus.transformer.transformer_blocks[0]._forward_pre_hooks
    assert type(plain) is QwenImageEditPipeline
