# SPDX-License-Identifier: Apache-2.0
"""SpecEditFluxKontextPipeline on a tiny model with random weights: exactness, bookkeeping, options, errors."""

import inspect
import logging
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler, FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from tiny_models import call_options, paper, tiny_image, tiny_pipeline

from specedit_kernels import (
    SpecEditFluxKontextPipeline,
    disable_specedit,
    enable_specedit,
)
from specedit_kernels.engine import pipeline, stages
from specedit_kernels.engine._diffusers import each_module
from specedit_kernels.engine.attention import SpecEditAttnProcessor, joint_attention, wrap_processors
from specedit_kernels.engine.kv_cache import KVCache
from specedit_kernels.engine.sequence import MixedSequence, StepLayout
from specedit_kernels.images.files import Photo
from specedit_kernels.sampling import grid as grids

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (8, 8)
EVERYTHING = dict(stages=(0, 3, 3), draft="quarter", draft_steps=2, threshold=-1.0)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def half_mask(columns=4, size=128, rows=8):
    """White over the first `columns` of 8 and `rows` of 8 tokens a side."""
    array = np.zeros((size, size), np.uint8)
    array[: size // 8 * rows, : size // 8 * columns] = 255
    return PIL.Image.fromarray(array)


@pytest.fixture(scope="module")
def plain():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def pipe(plain):
    pipe = SpecEditFluxKontextPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# proofs


@pytest.mark.parametrize("output_type", ["latent", "pil", "np", "pt"])
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(plain, pipe, output_type):
    options = call_options(image=tiny_image(), output_type=output_type)
    expected = plain(height=128, width=128, num_inference_steps=6, generator=seeded(), **options).images
    out = pipe(generator=seeded(), specedit=paper(**EVERYTHING), **options)
    assert out.stats.fallback == "dense" and out.mask.all()
    if output_type == "pil":
        expected, got = np.array(expected[0]), np.array(out.images[0])
    else:
        expected, got = torch.as_tensor(expected), torch.as_tensor(out.images)
    assert (expected == got).all()


@pytest.mark.slow
def test_everything_selected_is_the_plain_pipeline_in_bfloat16_and_with_guidance():
    plain = tiny_pipeline(seed=2).to(torch.bfloat16)
    pipe = SpecEditFluxKontextPipeline(**plain.components)  # from_pipe would make it float32
    options = call_options(image=tiny_image(), negative_prompt="red", true_cfg_scale=3.0, num_images_per_prompt=2)
    expected = plain(height=128, width=128, num_inference_steps=6, generator=seeded(), **options).images
    assert torch.equal(pipe(generator=seeded(), specedit=paper(**EVERYTHING), **options).images, expected)


def test_a_full_resolution_draft_step_is_a_step_of_the_plain_pipeline(plain, pipe):
    options = call_options(image=tiny_image())
    expected = plain(height=128, width=128, num_inference_steps=6, generator=seeded(), **options).images
    config = paper(stages=(0, 3, 3), draft="full_step", threshold=-1.0)
    assert torch.equal(pipe(generator=seeded(), specedit=config, **options).images, expected)


def test_specedit_false_is_the_plain_pipeline(plain, pipe):
    options = call_options(image=tiny_image(), num_inference_steps=2, height=128, width=128)
    expected = plain(generator=seeded(), **options).images
    assert torch.equal(pipe(generator=seeded(), specedit=False, **options).images, expected)


@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_nothing_selected_returns_the_source(pipe, draft, caplog):
    image = tiny_image()
    config = paper(draft=draft, draft_steps=2, threshold=4.0)
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        out = pipe(image=image, generator=seeded(), specedit=config, **call_options(output_type="pil"))
    assert (np.array(out.images[0]) == np.array(image)).all()
    assert out.stats.fallback == "source" and not out.mask.any() and "nothing changes" in caplog.text
    latent = pipe(image=image, generator=seeded(), specedit=config, **call_options()).images
    pixels = pipe.image_processor.preprocess(image)
    assert torch.equal(latent, grids.pack(pipe._encode_vae_image(pixels, None)))


def test_disable_restores_class_processors_and_bits():
    pipe = tiny_pipeline(seed=3)
    options = call_options(image=tiny_image(), num_inference_steps=2, height=128, width=128)
    expected = pipe(generator=seeded(), **options).images
    before = dict(pipe.transformer.attn_processors)
    handle = enable_specedit(pipe, paper(**EVERYTHING))
    assert isinstance(pipe, SpecEditFluxKontextPipeline) and handle.stats() is None
    assert all(isinstance(p, SpecEditAttnProcessor) for p in pipe.transformer.attn_processors.values())
    assert torch.equal(pipe(generator=seeded(), specedit=False, **options).images, expected)
    del options["num_inference_steps"]
    pipe(generator=seeded(), **options)
    assert handle.stats().nfe == 6
    disable_specedit(pipe)
    assert type(pipe) is FluxKontextPipeline
    after = pipe.transformer.attn_processors
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    assert torch.equal(pipe(generator=seeded(), num_inference_steps=2, **options).images, expected)
    disable_specedit(pipe)  # a second time changes nothing
    assert type(pipe) is FluxKontextPipeline


def make_run(pipe, config, mask, batch=1, image_seed=0, generator=None):
    """A Run as the pipeline makes it, caught on its way into `_run`."""
    caught = {}

    class Caught(Exception):
        pass

    def catch(run, counts, sigmas, user_mask):
        caught.update(run=run, counts=counts, sigmas=sigmas, mask=user_mask)
        raise Caught

    pipe._run = catch
    try:
        options = call_options(image=tiny_image(seed=image_seed), mask_image=mask, specedit=config)
        options["prompt"] = [options["prompt"]] * batch
        with pytest.raises(Caught):
            pipe(generator=generator or [seeded(i) for i in range(batch)], **options)
    finally:
        del pipe._run
    return caught["run"], caught["counts"], caught["sigmas"], caught["mask"]


@torch.no_grad()
def test_a_mixed_step_with_all_blocks_active_is_a_dense_step(pipe):
    run, _, _, _ = make_run(pipe, paper(stages=(0, 2, 1)), half_mask())
    everything = torch.ones(1, 64, dtype=torch.bool)
    selection = stages.select(run, everything.float(), 0.5, 0)
    fine = torch.randn(run.source.shape, generator=seeded())
    state = stages.expand(run, fine, torch.randn(1, 16, 8, 8), 0.7, selection)
    at = torch.tensor(700.0)
    mixed = run.velocity(state.tokens, at, state.layouts)
    layouts = [run.model.dense_layout(run.positive, run.pictures, [GRID, GRID])]
    dense = run.velocity(torch.cat([grids.pack(fine), grids.pack(run.source)], dim=1), at, layouts)
    row = state.layout.index.long()
    row = torch.where(row < 80, row, row - 16)  # the table has 16 coarse rows between target and condition
    in_order = dense.gather(1, row[..., None].expand_as(dense))
    assert torch.allclose(mixed, in_order, atol=1e-5)
    assert mixed.std() > 1e-3


# (finish, unselected) of each way to end a run
ENDS = [("full", "source"), ("full", "coarse"), ("locked", "source")]


@pytest.mark.parametrize(("finish", "unselected"), ENDS)
@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_of_two_is_two_runs_of_one(pipe, finish, unselected, guided):
    images = [tiny_image(seed=0), tiny_image(seed=1)]
    masks = [half_mask(2), half_mask(6, rows=6)]
    prompts = ["make the cat blue", "add a hat"]
    common = dict(finish=finish, unselected=unselected)
    config = paper(stages=(2, 2, 2), preserve="pixels", uniform_stride=3, **common)
    extra = dict(negative_prompt="red", true_cfg_scale=2.0) if guided else {}
    options = call_options(output_type="pt", specedit=config, **extra)
    del options["prompt"]
    if guided:
        extra["negative_prompt"] = ["red", "red"]
    both = pipe(
        image=images,
        prompt=prompts,
        mask_image=masks,
        generator=[seeded(5), seeded(6)],
        **{**options, **extra},
    )
    assert both.stats.active[0] != both.stats.active[1]
    for i in range(2):
        one = pipe(image=images[i], prompt=prompts[i], mask_image=masks[i], generator=seeded(5 + i), **options)
        assert torch.allclose(both.images[i], one.images[0], atol=1e-5)
        assert torch.equal(both.mask[i], one.mask[0])
        assert both.stats.steps[3].tokens[i] == one.stats.steps[3].tokens[0]


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_a_batch_of_two_drafts_is_two_drafts_of_one(pipe, draft):
    images, prompts = [tiny_image(seed=0), tiny_image(seed=1)], ["make the cat blue", "add a hat"]
    common = dict(stages=(2, 2, 2), draft=draft, draft_steps=2, max_active=1.0, dilation=0)

    def both(config):
        options = call_options(image=images, prompt=prompts, specedit=config)
        return pipe(generator=[seeded(5), seeded(6)], **options)

    # a threshold between the scores, so that some blocks of each sample are selected
    threshold = float(both(paper(**common)).scores.quantile(0.93))
    config = paper(**common, threshold=threshold)
    out = both(config)
    assert 0 < out.mask.float().mean() < 1
    for i in range(2):
        options = call_options(image=images[i], prompt=prompts[i], specedit=config)
        one = pipe(generator=seeded(5 + i), **options)
        assert torch.allclose(out.scores[i], one.scores[0], atol=1e-5)
        assert torch.allclose(out.images[i], one.images[0], atol=1e-4)


def test_one_sample_may_change_while_its_neighbour_does_not(pipe):
    images = [tiny_image(seed=0), tiny_image(seed=1)]
    masks = [half_mask(0), half_mask(3)]
    options = call_options(output_type="pil", prompt=["add a hat", "add a hat"])
    out = pipe(image=images, mask_image=masks, generator=[seeded(0), seeded(1)], **options)
    assert (np.array(out.images[0]) == np.array(images[0])).all()
    assert not (np.array(out.images[1]) == np.array(images[1])).all()
    assert out.stats.fallbacks == ["source", None] and out.stats.fallback == "mixed"


@torch.no_grad()
@pytest.mark.parametrize("metric", ["decoder", "latent", "projected"])
def test_matched_verify_is_zero_where_the_draft_is_the_source(pipe, metric):
    run, _, _, _ = make_run(pipe, paper(metric=metric), half_mask())
    small = stages.source_at(run, (4, 4))
    scores = stages.verify(run, stages.Draft(small.clone(), small))
    assert scores.shape == (1, 64) and scores.max() < 1e-5
    literal, _, _, _ = make_run(pipe, paper(metric=metric, reference="literal"), half_mask())
    assert stages.verify(literal, stages.Draft(small, small)).max() > 1e-3


@torch.no_grad()
def test_verify_finds_the_place_of_a_change(pipe):
    # the group norms of a decoder with random weights spread a change over the picture: "latent" has none
    run, _, _, _ = make_run(pipe, paper(metric="latent"), half_mask())
    small = stages.source_at(run, (4, 4))
    proposal = small.clone()
    proposal[..., 2:4, 6:8] += 3 * torch.randn(1, 16, 2, 2, generator=seeded())
    scores = stages.verify(run, stages.Draft(proposal, small)).reshape(8, 8)
    assert scores[2:4, 6:8].min() > 0.3 and scores[5:].max() < 1e-5 and scores[:, :5].max() < 1e-5


@torch.no_grad()
def test_of_two_proposals_the_larger_score_counts(pipe):
    run, _, _, _ = make_run(pipe, paper(metric="latent"), half_mask())
    small = stages.source_at(run, (4, 4))
    first, last = small.clone(), small.clone()
    first[..., :2, :2] += 3 * torch.randn(1, 16, 2, 2, generator=seeded(1))
    last[..., 2:4, 6:8] += 3 * torch.randn(1, 16, 2, 2, generator=seeded(2))
    one, other = (stages.verify(run, stages.Draft(x, small)) for x in (first, last))
    both = stages.verify(run, stages.Draft(last, small, first))
    assert torch.equal(both, torch.maximum(one, other))
    assert both.reshape(8, 8)[:2, :2].min() > 0.3 and both.reshape(8, 8)[2:4, 6:8].min() > 0.3


def test_a_coarse_draft_proposes_its_first_and_its_last_step(pipe, monkeypatch):
    seen = []
    verify = stages.verify
    monkeypatch.setattr(stages, "verify", lambda run, draft: seen.append(draft) or verify(run, draft))
    for coarse in (1, 3):
        config = paper(stages=(coarse, 1, 1))
        pipe(image=tiny_image(), generator=seeded(), specedit=config, **call_options())
    assert seen[0].first is None
    assert torch.equal(seen[1].first, seen[0].proposal) and not torch.equal(seen[1].first, seen[1].proposal)


def test_thresholds_follow_the_picture(pipe):
    scores = torch.tensor([[0.0, 0.1, 2.0], [0.3, 0.5, float("nan")], [0.0, 0.0, 0.01], [0.0, 0.0, 0.0]])
    found = stages.threshold_scale(scores, 0.5)[:, 0]
    assert torch.allclose(found, torch.tensor([1.0, 0.5, 0.05**0.5, 0.05**0.5]))
    assert (stages.threshold_scale(scores, 0.0) == 1).all()

    run, _, _, _ = make_run(pipe, paper(), half_mask())
    weak = torch.full((1, 64), 0.001)
    weak[0, 0] = 0.09
    now = {"scores": weak}

    def edited(config):
        run.config = config
        original, stages.verify = stages.verify, lambda *_: now["scores"]
        try:
            return pipe._verify_select(run, stages.Draft(run.source, run.source), "coarse")[1].edited.sum().item()
        finally:
            stages.verify = original

    assert edited(paper(threshold=0.1, dilation=0)) == 0  # a given threshold stands
    assert edited(paper(threshold=0.1, relative=0.5, dilation=0)) == 4  # the block of the one token
    assert edited(paper(dilation=0)) == 4
    now["scores"] = weak / 10  # too weak for anything to have changed
    assert edited(paper(dilation=0)) == 0


# an ideal model: one clean picture, known velocity. Every state of the trajectory is then exact.


@pytest.mark.parametrize(("finish", "unselected"), ENDS)
@pytest.mark.parametrize("kind", ["mask", "coarse", "quarter", "full_step", "no_coarse_condition", "no_coarse_stage"])
def test_an_ideal_model_gives_its_picture(pipe, monkeypatch, finish, unselected, kind):
    target = torch.randn(1, 16, 16, 16, generator=seeded(7)).clamp(-2, 2)
    layouts = []
    real_expand = stages.expand

    def expand(*arguments):
        state = real_expand(*arguments)
        layouts.append(state.layout)
        return state

    def velocity(run, tokens, conditioning, found, first=None, guided=True):
        sigma = conditioning[0] / 1000
        clean = [target, grids.pool(target), grids.pool(grids.pool(target))]
        if found[0].attention is None:
            clean = next(grids.pack(c) for c in clean if 2 * grids.pack(c).shape[1] == tokens.shape[1])
            clean = torch.cat([clean, tokens[:, clean.shape[1] :]], dim=1)
        else:
            table = torch.cat([grids.pack(clean[0]), grids.pack(clean[1]), torch.zeros(1, 80, 64)], dim=1)
            clean = table[:, layouts[-1].index[0].clamp(min=0).long()]
        return ((tokens - clean) / sigma)[:, :first]

    monkeypatch.setattr(stages, "expand", expand)
    monkeypatch.setattr(stages.Run, "velocity", velocity)
    draft = kind if kind in ("quarter", "full_step") else "coarse"
    config = paper(
        stages=(0, 3, 3) if kind == "no_coarse_stage" else (3, 3, 3),
        draft=draft,
        finish=finish,
        unselected=unselected,
        max_active=1.0,
        uniform_stride=3,
        coarse_condition=kind != "no_coarse_condition",
    )
    if kind in ("coarse", "quarter", "full_step"):
        # a threshold that splits the scores, whatever they are
        wide = pipe(image=tiny_image(), generator=seeded(), specedit=config, **call_options())
        config = paper(**{**config.__dict__, "threshold": float(wide.scores.quantile(0.9)), "dilation": 0})
        mask = None
    else:
        mask = half_mask(4)
    out = pipe(image=tiny_image(), mask_image=mask, generator=seeded(), specedit=config, **call_options())
    assert layouts and 0 < out.mask.float().mean() < 1
    result = grids.unpack(out.images, GRID)
    inside = out.mask.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None].expand_as(result)
    assert torch.allclose(result[inside], target[inside], atol=1e-4)
    outside = (
        target if finish == "full" else pipe._encode_vae_image(pipe.image_processor.preprocess(tiny_image()), None)
    )
    assert torch.allclose(result[~inside], outside[~inside], atol=1e-4)
    if finish == "locked":
        assert torch.equal(result[~inside], outside[~inside])


@torch.no_grad()
@pytest.mark.parametrize("unselected", ["source", "coarse"])
def test_what_was_not_selected_when_the_full_steps_begin(pipe, monkeypatch, unselected):
    """Two samples with different masks: with "source" the rest is the noised source to the bit, fine and coarse."""
    begun, ended = {}, {}
    real_steps, real_finish = stages.dense_steps, stages.finish_full

    def dense_steps(run, state, sigmas, condition, stage, **options):
        if stage == "full":
            begun.update(state=state, sigma=sigmas[0])
        return real_steps(run, state, sigmas, condition, stage, **options)

    def finish_full(run, state, sigma, sigmas, selection):
        ended.update(run=run, state=state, sigma=sigma, active=selection.active)
        return real_finish(run, state, sigma, sigmas, selection)

    monkeypatch.setattr(stages, "dense_steps", dense_steps)
    monkeypatch.setattr(stages, "finish_full", finish_full)
    pipe(
        mask_image=[half_mask(2), half_mask(6, rows=4)],
        generator=[seeded(1), seeded(2)],
        specedit=paper(stages=(2, 3, 2), unselected=unselected),
        **call_options(image=[tiny_image(seed=0), tiny_image(seed=1)], prompt=["make the cat blue", "add a hat"]),
    )
    run, sigma, at = ended["run"], begun["sigma"], ended["sigma"]
    assert 0 < at < sigma < 1
    inside = stages.on_pixels(ended["active"], GRID, 2).expand_as(run.source)
    same = begun["state"] == (1 - sigma) * run.source + sigma * run.noise
    assert not same[inside].any()
    assert same[~inside].all() if unselected == "source" else not same[~inside].all()
    # the coarse tokens that were in the sequence kept to the source's path in the mixed steps
    _, coarse = stages._scatter_back(run, ended["state"])
    path = (1 - at) * grids.pool(run.source) + at * 2 * grids.pool(run.noise)
    close = torch.isclose(coarse, path, atol=1e-5)[~inside[..., ::2, ::2]]
    assert close.all() if unselected == "source" else not close.all()


def test_the_locked_finish_knows_one_way_for_what_was_not_selected(pipe):
    options = call_options(image=tiny_image(), mask_image=half_mask(3))
    a, b = (
        pipe(
            generator=seeded(),
            specedit=paper(stages=(2, 2, 2), finish="locked", unselected=unselected),
            **options,
        ).images
        for unselected in ("source", "coarse")
    )
    assert torch.equal(a, b)


# options


@pytest.mark.slow
def test_pixels_outside_the_feathered_region_are_the_sources(pipe):
    image = tiny_image()
    for finish in ("full", "locked"):
        for output_type in ("pil", "np", "pt"):
            config = paper(stages=(2, 2, 2), finish=finish, preserve="pixels", feather=8)
            options = call_options(output_type=output_type)
            out = pipe(image=image, mask_image=half_mask(2), generator=seeded(), specedit=config, **options)
            got = out.images[0]
            got = got.permute(1, 2, 0).numpy() if output_type == "pt" else np.array(got)
            source = np.array(image) if output_type == "pil" else np.float32(np.array(image)) / 255
            assert (got[:, 32 + 8 :] == source[:, 32 + 8 :]).all()
            assert not (got[:, :32] == source[:, :32]).all()


def test_edit_alpha_is_one_inside_and_zero_past_the_seam():
    edited = torch.zeros(1, 64, dtype=torch.bool)
    edited[0, 9] = True  # row 1, column 1: pixels 16 to 31
    for feather in (0, 1, 2, 8, 9):
        alpha = stages.edit_alpha(edited, GRID, 16, feather)[0, 0]
        assert alpha.shape == (128, 128) and (alpha[16:32, 16:32] == 1).all()
        assert (alpha[:, 32 + feather :] == 0).all() and (alpha[32 + feather :] == 0).all()
        row = alpha[24, 31 : 33 + feather]
        assert (row.diff() <= 0).all() and row[-1] == 0
    assert 0 < alpha[24, 33] < 1


def test_preserve_without_an_edge_blends_the_picture(pipe):
    config = dict(stages=(2, 2, 2))
    options = call_options(image=tiny_image(), mask_image=half_mask(2), output_type="pil")
    bare = pipe(generator=seeded(), specedit=paper(**config), **options).images[0]
    kept = pipe(generator=seeded(), specedit=paper(**config, preserve="pixels"), **options).images[0]
    assert (np.array(bare)[:, :32] == np.array(kept)[:, :32]).all()


def test_stats_count_steps_tokens_and_flops(pipe):
    config = paper(stages=(3, 5, 3), draft="quarter", max_active=1.0)
    out = pipe(image=tiny_image(), mask_image=half_mask(4), generator=seeded(), specedit=config, **call_options())
    stats = out.stats
    assert stats.nfe == 11 and stats.draft_nfe == 0  # the mask replaces the draft
    assert [s.stage for s in stats.steps] == ["coarse"] * 3 + ["mixed"] * 5 + ["full"] * 3
    # 8 of 16 blocks: 32 fine + 8 coarse target tokens, the condition as many
    assert [s.tokens for s in stats.steps] == [(32,)] * 3 + [(80,)] * 5 + [(128,)] * 3
    dim, blocks, text = 32, 2, 16
    cost = lambda n: blocks * (24 * dim**2 * (text + n) + 4 * dim * (text + n) ** 2)  # noqa: E731
    assert stats.flops == 3 * cost(32) + 5 * cost(80) + 3 * cost(128)
    assert stats.plain_flops == 11 * cost(128)
    assert stats.active == [0.5] and stats.edited == [0.5] and stats.fallback is None
    assert stats.backend == "reference"
    assert set(stats.seconds) == {"encode", "select", "coarse", "expand", "mixed", "finish"}
    assert all(s >= 0 for s in stats.seconds.values())
    assert [t for _, t in stats.tokens_per_step()] == [32] * 3 + [80] * 5 + [128] * 3


@torch.no_grad()
@pytest.mark.parametrize("end", [dict(finish="locked"), dict(finish="full")], ids=str)
@pytest.mark.parametrize("masks", [[half_mask(2)], [half_mask(2), half_mask(6, rows=6)]], ids=["one", "two lengths"])
def test_a_step_over_cached_keys_is_the_whole_step_while_nothing_moves(pipe, masks, end):
    for lock_text in (False, True):
        config = paper(stages=(0, 3, 1), kv_refresh=2, lock_text=lock_text, **end)
        run, _, _, mask = make_run(pipe, config, masks, batch=len(masks))
        selection = stages.select(run, mask.float(), 0.5, 0)
        fine = torch.randn(run.source.shape, generator=seeded())
        state = stages.expand(run, fine, torch.randn(len(masks), 16, 8, 8), 0.7, selection)
        assert state.first == 4 * max(selection.counts) < state.tokens.shape[1]
        at = torch.tensor(700.0)
        whole = run.velocity(state.tokens, at, state.layouts)
        active = run.velocity(state.tokens[:, : state.first], at, state.active_layouts)
        used = torch.arange(state.first)[None] < torch.tensor(state.fine)[:, None]  # each sample's own
        assert torch.allclose(active[used], whole[:, : state.first][used], atol=1e-5)
        if lock_text:
            again = run.velocity(state.tokens, at, state.locked_layouts)
            used = torch.arange(state.tokens.shape[1])[None] < torch.tensor(state.lengths)[:, None]
            assert torch.allclose(again[used], whole[used], atol=1e-5)


@torch.no_grad()
def test_a_draft_without_guidance_is_the_unguided_one_and_counts_half(pipe):
    def run(guided, **options):
        config = paper(stages=(2, 1, 1), threshold=-1.0, max_active=1.0, **options)
        extra = dict(negative_prompt="red", true_cfg_scale=2.0) if guided else {}
        return pipe(image=tiny_image(), generator=seeded(), specedit=config, **call_options(**extra))

    plain, shared, guided = run(False), run(True, draft_guidance=False), run(True)
    assert torch.equal(shared.scores, plain.scores) and not torch.equal(shared.scores, guided.scores)
    assert not torch.equal(shared.images, plain.images)  # the later steps are guided
    flops = [[step.flops for step in out.stats.steps] for out in (plain, shared, guided)]
    assert flops[1] == flops[0][:2] + flops[2][2:] and flops[2] == [2 * f for f in flops[0]]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[12, 12], [12, 7]])
def test_cached_keys_are_the_old_ones_but_for_those_brought_anew(lengths):
    def tokens(slots):
        return tuple(torch.randn(2, slots, 2, 16) * 3 for _ in range(3))

    torch.manual_seed(0)
    angle = torch.randn(2, 12, 8)
    lengths, fresh = (torch.tensor(x, dtype=torch.int32) for x in (lengths, [8, 6]))
    sequence = MixedSequence(3, angle.cos(), angle.sin(), torch.randn(2, 12), lengths, lengths)
    layout = StepLayout(sequence, fresh, KVCache())
    text, image = tokens(3), tokens(9)
    block = SimpleNamespace(kept=None, watch=None)
    joint_attention(block, text, image, layout)
    text, moved = tokens(3), tokens(5)
    got = joint_attention(block, text, moved, layout.active(3, 5))
    # the same over each sample's own fresh slots and the old others, written out
    own = (torch.arange(5) < fresh[:, None] - 3)[..., None, None]
    old = (torch.cat([torch.where(own, a, b[:, :5]), b[:, 5:]], dim=1) for a, b in zip(moved, image))
    expected = joint_attention(block, text, tuple(old), replace(layout, cache=None))[:, :8]
    for i, count in enumerate((8, 6)):
        assert torch.allclose(got[i, :count], expected[i, :count], atol=1e-5)
    # and the next such call finds them renewed
    again = joint_attention(block, text, moved, layout.active(3, 5))
    assert torch.equal(again, got)


def test_pixels_are_those_of_the_image_processor(device):
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pictures = [PIL.Image.fromarray(every), tiny_image(seed=1).resize((16, 16))]
    processor = VaeImageProcessor(vae_scale_factor=16)
    expected = processor.preprocess(pictures, 16, 16)
    assert torch.equal(pipeline.pixels_of(pictures, device).cpu(), expected)
    for given in (pictures, pictures[0], pictures[0].convert("L"), np.asarray(pictures[0]) / 255):
        got = pipeline.preprocess(processor, given, 16, 32, device).cpu()
        assert torch.equal(got, processor.preprocess(given, 16, 32))
    for given in (PIL.Image.fromarray(every), Photo(every), [Photo(every), Photo(every[:, ::-1])]):
        expected = processor.preprocess(pipeline.seen(given), 16, 32)
        for _ in range(2):  # the second time of a size it is not Pillow that resizes
            assert torch.equal(pipeline.preprocess(processor, given, 16, 32, device).cpu(), expected)
    alpha = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 4), np.uint8))
    for size in ((16, 32), (24, 16)):
        got = pipeline.preprocess(VaeImageProcessor(vae_scale_factor=8), [alpha], *size, device)
        assert torch.equal(got.cpu(), VaeImageProcessor(vae_scale_factor=8).preprocess([alpha], *size))


def test_a_schedule_is_that_of_the_scheduler_of_now(pipe):
    call = (4, 64, None)
    first = pipe._plain_sigmas(*call)
    pipe._plain_sigmas(*call)[0] = 7.0  # a caller's own
    assert pipe._plain_sigmas(*call) == first != pipe._plain_sigmas(4, 256, None)
    assert pipe._plain_sigmas(4, 64, [1.0, 0.5, 0.25, 0.1]) != first
    own = pipe.scheduler
    try:
        pipe.scheduler = type(own).from_config(own.config, base_shift=0.9)
        other = pipe._plain_sigmas(*call)
        assert other != first
        pipe.scheduler.register_to_config(base_shift=0.1)
        assert pipe._plain_sigmas(*call) not in (first, other)
    finally:
        pipe.scheduler = own
    for tokens in range(100, 200):
        pipe._plain_sigmas(2, tokens, None)
    assert pipe._plain_sigmas(*call) == first and len(pipe._specedit_sigmas) <= pipeline.SCHEDULES


def test_modules_that_a_callback_puts_in_are_found_in_the_same_call(pipe):
    """Adapters may be loaded between steps: what is remembered of the modules ends there."""
    walked, extra, found = each_module(pipe.transformer), torch.nn.Identity(), []

    def callback(pipe, index, timestep, tensors):
        pipe.transformer.extra = extra
        return {}

    record = stages.Run.record

    def recorded(run, *args, **options):
        found.append(each_module(pipe.transformer))
        record(run, *args, **options)

    try:
        with mock.patch.object(stages.Run, "record", recorded):
            pipe(image=tiny_image(), mask_image=half_mask(2), generator=seeded(), callback_on_step_end=callback,
                 specedit=paper(stages=(0, 2, 1)), **call_options())  # fmt: skip
    finally:
        del pipe.transformer.extra
    assert found[0] == walked and all(extra in later for later in found[1:]) and len(found) == 3


def test_which_pictures_go_to_the_device_as_bytes():
    class Other(VaeImageProcessor):
        def resize(self, *args, **kwargs):
            return super().resize(*args, **kwargs)

    plain, picture = VaeImageProcessor(), tiny_image()
    alpha, grey = picture.convert("RGBA"), picture.convert("L")
    array = np.asarray(picture)
    for given in ([picture], [alpha], [picture, Photo(array)]):
        assert pipeline.goes_as_bytes(plain, given)
    for given in ([grey], [picture, alpha], [array], [torch.zeros(3, 8, 8)]):
        assert not pipeline.goes_as_bytes(plain, given)
    # what is brought to RGB once it was resized is not what it is as RGBA
    assert not pipeline.goes_as_bytes(VaeImageProcessor(do_convert_rgb=True), [alpha])
    for processor in (Other(), VaeImageProcessor(resample="bilinear"), VaeImageProcessor(do_normalize=False)):
        assert not pipeline.goes_as_bytes(processor, [picture])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_those_of_the_image_processor(device, dtype):
    pixels = (1.2 * torch.rand(2, 4, 8, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1.2).to(device, dtype)
    for processor in (VaeImageProcessor(), VaeImageProcessor(do_normalize=False)):
        shown = pixels if processor.config.do_normalize else pixels.abs().clamp(max=1)
        for channels in (1, 3, 4):
            expected = processor.postprocess(shown[:, :channels], output_type="pil")
            got = pipeline.postprocess(processor, shown[:, :channels], "pil")
            assert [x.mode for x in got] == [x.mode for x in expected]
            assert all(np.array_equal(a, b) for a, b in zip(got, expected))
        assert np.array_equal(pipeline.postprocess(processor, shown, "np"), processor.postprocess(shown, "np"))


def test_steps_over_cached_keys_stay_near_the_whole_ones_and_cost_less(pipe):
    def edit(**options):
        config = paper(stages=(1, 6, 0), finish="locked", **options)
        return pipe(image=tiny_image(), mask_image=half_mask(2), generator=seeded(), specedit=config,
                    **call_options())  # fmt: skip

    whole, cached, often = edit(), edit(kv_refresh=6), edit(kv_refresh=2)
    assert torch.equal(edit(kv_refresh=1).images, whole.images)
    names = [step.stage for step in cached.stats.steps]
    assert names == ["coarse", "mixed"] + ["active"] * 5
    assert [step.stage for step in often.stats.steps] == ["coarse"] + ["mixed", "active"] * 3
    # 4 of 16 blocks: 16 fine and 12 coarse target tokens, the condition as many
    assert [step.tokens for step in cached.stats.steps] == [(32,), (56,)] + [(16,)] * 5
    dim, blocks, text = 32, 2, 16
    assert cached.stats.steps[-1].flops == blocks * (24 * dim**2 * (text + 16) + 4 * dim * (text + 16) * (text + 56))
    assert cached.stats.flops < often.stats.flops < whole.stats.flops
    region = whole.mask[0].flatten()

    def off(out):
        return (out.images - whole.images)[0, region].norm() / whole.images[0, region].norm()

    assert 0 < off(often) < 0.1 and 0 < off(cached) < 0.1
    assert torch.equal(cached.images[0, ~region], whole.images[0, ~region])
    packed = edit(kv_refresh=6, kv_cache_dtype="fp8")
    change = (packed.images - cached.images)[0, region].norm() / whole.images[0, region].norm()
    assert 0 < change < 0.01
    # of a head of 16 numbers: 16 bytes and a scale of 4 in place of 64
    assert packed.stats.kv_cache_bytes * 64 == cached.stats.kv_cache_bytes * 20 > 0


@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_over_cached_keys_is_two_runs_of_one(pipe, guided):
    images, masks = [tiny_image(seed=0), tiny_image(seed=1)], [half_mask(2), half_mask(6, rows=6)]
    config = paper(stages=(1, 4, 1), kv_refresh=2, uniform_stride=3)
    extra = dict(negative_prompt="red", true_cfg_scale=2.0) if guided else {}
    options = call_options(specedit=config, **extra)
    prompt = options.pop("prompt")
    if guided:
        extra["negative_prompt"] = ["red", "red"]
    both = pipe(image=images, prompt=[prompt] * 2, mask_image=masks, generator=[seeded(5), seeded(6)],
                **{**options, **extra})  # fmt: skip
    for i in range(2):
        one = pipe(image=images[i], prompt=prompt, mask_image=masks[i], generator=seeded(5 + i), **options)
        region = both.mask[i].flatten()
        off = (both.images[i] - one.images[0])[region].norm() / one.images[0][region].norm()
        assert off < 1e-5


def test_a_separate_draft_is_counted_apart(pipe):
    config = paper(stages=(1, 2, 1), draft="quarter", draft_steps=3, threshold=-1.0)
    stats = pipe(image=tiny_image(), generator=seeded(), specedit=config, **call_options()).stats
    assert stats.nfe == 4 and stats.draft_nfe == 3
    assert [s.tokens for s in stats.steps if s.stage == "draft"] == [(8,)] * 3


@pytest.mark.parametrize(("height", "width"), [(96, 160), (160, 96), (224, 96)])
def test_grids_that_are_no_multiple_of_the_draft(pipe, height, width):
    config = paper(stages=(1, 1, 1), draft="quarter", draft_steps=1)
    options = call_options(max_area=height * width, output_type="pil")
    out = pipe(image=tiny_image(height, width), generator=seeded(), specedit=config, **options)
    assert out.images[0].size == (width, height) and out.scores.shape == (1, height // 16, width // 16)


@pytest.mark.parametrize(
    ("size", "given", "options", "expected"),
    [
        ((128, 128), {}, {}, (128, 128)),
        ((120, 200), {}, dict(max_area=120 * 200), (96, 192)),
        ((200, 200), {}, {}, (128, 128)),
        ((128, 128), dict(height=64, width=256), {}, (64, 256)),
        ((100, 100), {}, dict(max_area=1024**2, _auto_resize=True), (1024, 1024)),
        ((688, 1504), {}, dict(max_area=1024**2, _auto_resize=True), (672, 1504)),
        # a side under a token: the ratio stays, as far as one block leaves it
        ((2, 900), {}, dict(max_area=512 * 512), (32, 8192)),
        ((900, 15), {}, dict(max_area=512 * 512), (3936, 64)),
    ],
)
def test_output_size(pipe, size, given, options, expected):
    rules = dict(max_area=128 * 128, _auto_resize=False, **given)
    rules.update(options)
    auto = rules.pop("_auto_resize")
    given = inspect.signature(pipe.__call__).bind(image=tiny_image(*size), _auto_resize=auto, **rules)
    given.apply_defaults()
    assert pipe._size(pipeline.Call(**given.arguments)) == expected


def test_images_per_prompt_generators_and_latents(pipe):
    config = paper(stages=(1, 2, 1))
    options = call_options(image=tiny_image(), mask_image=half_mask(3), specedit=config)
    two = pipe(num_images_per_prompt=2, generator=[seeded(1), seeded(2)], **options).images
    one = pipe(generator=seeded(2), **options).images
    assert two.shape == (2, 64, 64) and torch.allclose(two[1], one[0], atol=1e-5)
    assert not torch.allclose(two[0], two[1], atol=1e-2)
    noise = grids.pack(torch.randn(1, 16, 16, 16, generator=seeded(9)))
    a = pipe(latents=noise, generator=seeded(1), **options).images
    b = pipe(latents=noise.clone(), generator=seeded(1), **options).images
    assert torch.equal(a, b)


def test_pictures_as_arrays_and_tensors(pipe):
    image = tiny_image()
    array = np.float32(np.array(image)) / 255
    config = paper(stages=(1, 2, 1))
    options = call_options(mask_image=half_mask(3), specedit=config)
    expected = pipe(image=image, generator=seeded(), **options).images
    for other in (array[None], torch.from_numpy(array).permute(2, 0, 1)[None]):
        assert torch.allclose(pipe(image=other, generator=seeded(), **options).images, expected, atol=1e-4)


def test_masks_as_arrays_and_tensors(pipe):
    array = np.float32(np.array(half_mask(3))) / 255
    options = call_options(image=tiny_image(), specedit=paper(stages=(1, 1, 1)))
    expected = pipe(mask_image=half_mask(3), generator=seeded(), **options).mask
    # columns 0 to 2 are white: rounded up to blocks, 0 to 3
    assert torch.equal(expected[0], (torch.arange(8) < 4).expand(8, 8))
    for other in (
        array,
        array[None],
        torch.from_numpy(array)[None, None],
        half_mask(3, size=512),
        half_mask(3, size=32),
    ):
        assert torch.equal(pipe(mask_image=other, generator=seeded(), **options).mask, expected)


def test_callback_sees_every_step_and_may_change_it(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else tensors

    config = paper(stages=(1, 2, 1), max_active=1.0)
    options = call_options(image=tiny_image(), mask_image=half_mask(4), specedit=config)
    out = pipe(generator=seeded(), callback_on_step_end=callback, **options)
    assert [s for s, _, _ in seen] == [0, 1, 2, 3]
    assert [n[1] for _, _, n in seen] == [16, 80, 80, 64]
    assert (out.images == 0).all() and pipe.num_timesteps == 4


def test_interrupt_stops_the_steps(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append(step)
        pipeline._interrupt = True
        return {}

    options = call_options(image=tiny_image(), mask_image=half_mask(4))
    out = pipe(generator=seeded(), callback_on_step_end=callback, specedit=paper(), **options)
    assert seen == [0] and out.stats.nfe == 1


@pytest.mark.parametrize("change", [dict(key_bias=False), dict(coarse_condition=False), dict(uniform_stride=2)])
def test_ablations_change_the_result(pipe, change):
    options = call_options(image=tiny_image(), mask_image=half_mask(2), generator=None)
    base = pipe(**{**options, "generator": seeded()}, specedit=paper(stages=(1, 3, 1))).images
    other = pipe(**{**options, "generator": seeded()}, specedit=paper(stages=(1, 3, 1), **change)).images
    assert not torch.allclose(base, other, atol=1e-4)


@pytest.mark.parametrize("rule", ["random", "uniform"])
def test_controls_select_as_many_blocks_elsewhere(pipe, rule):
    options = call_options(image=tiny_image(), mask_image=half_mask(2))
    config = dict(stages=(1, 2, 1))
    scored = pipe(generator=seeded(), specedit=paper(**config), **options)
    control = pipe(generator=seeded(), specedit=paper(**config, selection=rule), **options)
    assert control.mask.sum() == scored.mask.sum() and not torch.equal(control.mask, scored.mask)
    if rule == "uniform":
        halves = control.mask.reshape(2, 4, 2, 4).sum(dim=(1, 3))
        assert halves.min() > 0


def test_nan_scores_are_recomputed(pipe):
    run, _, _, _ = make_run(pipe, paper(dilation=0, max_active=1.0), half_mask())
    scores = torch.zeros(1, 64)
    scores[0, 0] = float("nan")
    selection = stages.select(run, scores, 0.1, 0)
    assert selection.changed == (True,) and selection.counts == (1,)
    assert selection.edited[0].nonzero().flatten().tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize("rule", ["score", "random"])
def test_a_given_mask_is_selected_as_its_scores_are(pipe, rule):
    mask = torch.rand(1, 64, generator=seeded()) > 0.9
    found = []
    for select in (lambda run: stages.select(run, mask.float(), 0.5, 0), lambda run: stages.select_given(run, mask)):
        run, _, _, _ = make_run(pipe, paper(selection=rule), half_mask())
        run.generator = seeded()
        found.append(select(run))
    for name in ("edited", "active", "order", "count"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].counts == found[1].counts and found[0].changed == found[1].changed


def test_min_active_and_max_active(pipe):
    scores = torch.zeros(1, 64)
    scores[0, :3] = 1.0
    run, _, _, _ = make_run(pipe, paper(min_active=4), half_mask())
    assert stages.select(run, scores, 0.5, 0).changed == (False,)
    run, _, _, _ = make_run(pipe, paper(min_active=3, max_active=0.1), half_mask())
    selection = stages.select(run, scores, 0.5, 0)
    assert selection.changed == (True,) and selection.dense == (True,) and run.stats.fallbacks == ["dense"]


def test_attention_settings_pass_through_the_wrapper(plain):
    pipe = tiny_pipeline(seed=4)
    wrap_processors(pipe.transformer)
    processors = pipe.transformer.attn_processors.values()
    pipe.transformer.set_attention_backend("native")
    assert all(p.inner._attention_backend == p._attention_backend is not None for p in processors)
    pipe.transformer.reset_attention_backend()
    assert all(p.inner._attention_backend is None and p._parallel_config is None for p in processors)


@torch.no_grad()
def test_fused_projections_give_the_same_mixed_step():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline(seed=5))
    options = call_options(image=tiny_image(), mask_image=half_mask(3), specedit=paper(stages=(1, 2, 1)))
    expected = pipe(generator=seeded(), **options).images
    for module in pipe.transformer.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    assert torch.allclose(pipe(generator=seeded(), **options).images, expected, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_without_a_graph_break():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline(seed=11))
    options = call_options(image=tiny_image(), mask_image=half_mask(3), specedit=paper(stages=(1, 2, 1)))
    expected = pipe(generator=seeded(), **options).images
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(pipe(generator=seeded(), **options).images, expected, atol=1e-5)


def test_bfloat16_runs_and_stays_finite():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline(seed=6)).to(torch.bfloat16)
    for finish in ("full", "locked"):
        config = paper(stages=(1, 2, 1), finish=finish)
        out = pipe(image=tiny_image(), mask_image=half_mask(3), generator=seeded(), specedit=config, **call_options())
        assert out.images.dtype == torch.bfloat16 and out.images.isfinite().all()


@pytest.mark.slow
def test_from_pretrained_and_return_tuple(tmp_path):
    plain = tiny_pipeline(seed=8)
    plain.save_pretrained(tmp_path)
    pipe = SpecEditFluxKontextPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    options = call_options(image=tiny_image(), mask_image=half_mask(3), specedit=paper(stages=(1, 2, 1)))
    expected = SpecEditFluxKontextPipeline.from_pipe(plain)(generator=seeded(), **options).images
    (images,) = pipe(generator=seeded(), return_dict=False, **options)
    assert torch.allclose(images, expected, atol=1e-5)


@pytest.mark.gpu  # needs a GPU
def test_no_host_synchronisation_between_steps():
    pipe = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline(seed=9)).to("cuda")
    config = paper(stages=(2, 4, 2))
    options = call_options(image=tiny_image(), mask_image=half_mask(3), specedit=config)
    pipe(generator=seeded(), **options)  # kernels are compiled on first use, which synchronises

    def callback(pipeline, step, timestep, tensors):
        # steps 2 to 5 are mixed: whatever waits for the device between their ends raises
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 5 else "default")
        return {}

    try:
        pipe(generator=seeded(), callback_on_step_end=callback, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(preset=10), ValueError, r"preset: expected one of \[30, 18, 11, 9, 8, 6, 4\], got 10"),
        (dict(draft="third"), ValueError, "draft: expected one of"),
        (dict(finish="none"), ValueError, "finish: expected one of"),
        (dict(unselected="fine"), ValueError, r"unselected: expected one of \['source', 'coarse'\], got 'fine'"),
        (dict(preserve="latents"), ValueError, "preserve: expected one of"),
        (dict(metric="clip"), ValueError, "metric: expected one of"),
        (dict(reference="other"), ValueError, "reference: expected one of"),
        (dict(selection="best"), ValueError, "selection: expected one of"),
        (dict(draft_steps=0), ValueError, "draft_steps: expected an integer >= 1, got 0"),
        (dict(dilation=-1), ValueError, "dilation: expected an integer >= 0"),
        (dict(dilation=1.5), TypeError, "dilation: expected an integer, got float"),
        (dict(feather=True), TypeError, "feather: expected an integer, got bool"),
        (dict(threshold="x"), TypeError, "threshold: expected a number, got str"),
        (dict(relative=1.5), ValueError, "relative: expected a number in"),
        (dict(threshold=float("nan")), ValueError, "threshold: expected a number in"),
        (dict(max_active=1.5), ValueError, r"max_active: expected a number in \[0.0, 1.0\]"),
        (dict(key_bias=1), TypeError, "key_bias: expected True or False"),
        (dict(stages=(1, 2)), ValueError, "stages: expected"),
        (dict(stages=(0, 0, 0)), ValueError, "stages: expected at least one step"),
        (dict(stages=(1, -1, 2)), ValueError, "stages: expected an integer >= 0"),
        (dict(stages=(1, 2, 0)), ValueError, "stages: finish='full' needs full steps"),
        (dict(kv_cache_dtype="bf16"), ValueError, r"kv_cache_dtype: expected one of \['auto', 'fp8'\], got 'bf16'"),
        (dict(kv_refresh=0), ValueError, "kv_refresh: expected an integer >= 1, got 0"),
        (dict(kv_refresh=2, unselected="coarse"), ValueError, "kv_refresh: expected 1 with finish='full' and"),
    ],
)
def test_config_names_the_wrong_field(change, error, message):
    with pytest.raises(error, match=message):
        paper(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(specedit="fast"), TypeError, "specedit: expected SpecEditConfig"),
        (dict(specedit=paper(stages=(0, 2, 2))), ValueError, "draft: 'coarse' needs at least one coarse step"),
        (dict(specedit=paper(preserve="pixels")), ValueError, "output_type: expected pixels"),
        (dict(output_type="jpeg"), ValueError, "output_type: expected"),
        (dict(num_inference_steps=2), ValueError, "steps: expected at least 3"),
        (dict(ip_adapter_image=1), ValueError, "ip_adapter_image: IP-Adapter is not supported"),
        (dict(latents=torch.zeros(1, 3, 64)), ValueError, r"latents: expected \(1, 64, 64\)"),
        (dict(generator=[seeded(), seeded()]), ValueError, "generator: expected 1 generators"),
        (dict(image=[tiny_image(), tiny_image()]), ValueError, "image: expected 1 or as many"),
        (dict(mask_image=np.zeros((2, 3, 4, 4))), ValueError, "mask_image: expected"),
        (dict(mask_image=[half_mask(), half_mask()]), ValueError, "mask_image: expected 1 or as many"),
        (dict(specedit=False, mask_image=half_mask()), ValueError, "mask_image: expected None"),
        (dict(prompt=None), ValueError, "Provide either `prompt` or `prompt_embeds`"),
    ],
)
def test_call_names_the_wrong_argument(pipe, change, error, message):
    options = call_options(image=tiny_image())
    options.update(change)
    with pytest.raises(error, match=message):
        pipe(**options)


def test_unsupported_pipelines_schedulers_and_processors(plain):
    with pytest.raises(TypeError, match="SpecEdit supports FluxKontextPipeline, .*, got FluxImg2ImgPipeline"):
        enable_specedit(FluxImg2ImgPipeline.from_pipe(plain))
    with pytest.raises(TypeError, match="sees its source, got FluxPipeline, which FlashEditFluxPipeline serves"):
        enable_specedit(FluxPipeline.from_pipe(plain))
    with pytest.raises(TypeError, match="config: expected SpecEditConfig"):
        enable_specedit(plain, {"preset": 9})
    pipe = tiny_pipeline(seed=10)
    good = pipe.scheduler
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(TypeError, match="scheduler: SpecEdit supports FlowMatchEulerDiscreteScheduler"):
        enable_specedit(pipe)
    pipe.scheduler = type(good).from_config(good.config, stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=False"):
        enable_specedit(pipe)
    pipe.scheduler = good
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="transformer: expected no cache"):
        enable_specedit(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(ValueError, match="transformer: expected ring_degree=1"):
        enable_specedit(pipe)
    pipe.transformer._parallel_config = None

    class Foreign:
        def __call__(self, attn, hidden_states):
            return hidden_states

    pipe.transformer.set_attn_processor(Foreign())
    with pytest.raises(TypeError, match="Foreign; SpecEdit supports .*FluxAttnProcessor"):
        enable_specedit(pipe)
    assert type(pipe) is FluxKontextPipeline
