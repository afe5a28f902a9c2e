# SPDX-License-Identifier: Apache-2.0
"""coarse_refresh, lock_condition, and lock_text with kv_refresh="bracket": what is computed once, by every runner."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from model_proofs import run_of
from tiny_models import call_options, edit_left_half, left_half, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, SpecEditQwenImageEditPipeline
from specedit_kernels.engine import stages
from specedit_kernels.models.flux_kontext import FluxKontextModel, FusedFluxModel

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model, plain):
    kind = SpecEditFluxKontextPipeline if model == "flux" else SpecEditQwenImageEditPipeline
    pipe = kind(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux():
    return made("flux", tiny_pipeline())


@pytest.fixture(scope="module")
def qwen():
    return made("qwen", tiny_qwen())


def edit(pipe, call=None, **config):
    return edit_left_half(pipe, call, **dict(stages=(3, 2, 0), finish="locked", kv_refresh=1, runner="eager") | config)


def coarse(out):
    return [step for step in out.stats.steps if step.stage == "coarse"]


# what keeps keys and values of text and condition, and what does the same without
KEPT = {
    "coarse": (dict(stages=(4, 2, 0), coarse_refresh=4), dict(coarse_refresh=1)),
    "coarse, text": (
        dict(stages=(4, 2, 0), coarse_refresh=4, lock_text="all"), dict(coarse_refresh=1, lock_text=False),
    ),
    "condition": (dict(stages=(1, 5, 0), kv_refresh="bracket", lock_condition=True), dict(lock_condition=False)),
    "condition, text": (
        dict(stages=(1, 5, 0), kv_refresh="bracket", lock_condition=True, lock_text=True),
        dict(lock_condition=False, lock_text=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_it_is_whole_steps_where_kept_keys_and_values_do_not_change(monkeypatch, model, runner, kind):
    """In a model of one block with one timestep for all steps, those of text and condition depend on no step."""
    pipe = made(model, tiny_pipeline() if model == "flux" else tiny_qwen())
    blocks = pipe.transformer.transformer_blocks
    pipe.transformer.transformer_blocks = blocks[:1]
    if model == "flux":
        pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    options, without = KEPT[kind]
    options = dict(runner=runner, mixed_from=0.3, solver="ab2") | options
    own = stages.Run.timestep_conditioning

    def apart():
        whole, kept = (edit(pipe, **options | changes).images for changes in (without, {}))
        return (whole - kept).abs().max() / whole.abs().max()

    assert apart() > 1e-4
    monkeypatch.setattr(
        stages.Run, "timestep_conditioning", lambda run, at, guided=True: own(run, torch.full_like(at, 600), guided)
    )
    assert apart() < 2e-6


@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_one_coarse_step_and_whole_ones_keep_their_bits(request, model):
    pipe = request.getfixturevalue(model)
    for runner in ("eager", "fused"):
        for counts, every in (((1, 2, 0), 5), ((3, 2, 0), 1)):
            before = edit(pipe, stages=counts, runner=runner)
            after = edit(pipe, stages=counts, runner=runner, coarse_refresh=every)
            assert torch.equal(after.images, before.images)
    assert not torch.equal(edit(pipe, coarse_refresh=3).images, edit(pipe).images)


@pytest.mark.parametrize("lock_text", [False, "all"])
@pytest.mark.parametrize("options", [{}, dict(kv_cache_dtype="fp8"), dict(draft_guidance=False)], ids=str)
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_fused_steps_do_what_eager_ones_do(request, model, options, lock_text):
    pipe = request.getfixturevalue(model)
    options = dict(coarse_refresh=2, lock_text=lock_text, stages=(4, 2, 0)) | options
    eager, fused = (edit(pipe, runner=r, **options) for r in ("eager", "fused"))
    assert eager.stats.kv_cache_bytes > 0 and fused.stats.runner == "fused"
    error, size = (eager.images - fused.images).abs().max(), eager.images.abs().max()
    assert error < (3e-2 if "kv_cache_dtype" in options else 2e-5) * size
    assert eager.stats.steps == fused.stats.steps


@pytest.mark.gpu
@pytest.mark.parametrize("lock_text", [False, "all"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_graph_steps_do_what_fused_ones_do(model, lock_text):
    pipe = made(model, tiny_pipeline() if model == "flux" else tiny_qwen()).to("cuda")
    options = dict(coarse_refresh=3, lock_text=lock_text, lock_condition=True, kv_refresh="bracket", stages=(3, 4, 0))

    def run(**more):
        return edit(pipe, dict(generator=torch.Generator().manual_seed(1)), **options | more)

    eager, fused, graph, again, last = (run(runner=r) for r in ("eager", "fused", "graph", "graph", "graph"))
    assert (eager.images - fused.images).abs().max() < 1e-3 * eager.images.abs().max()
    assert (graph.images - fused.images).abs().max() < 1e-3 * fused.images.abs().max()
    assert torch.equal(again.images, graph.images) and torch.equal(last.images, graph.images)
    assert graph.stats.runner == "graph" and graph.stats.captures > 0 and last.stats.captures == 0


def test_rows_are_counted(flux):
    out, mixed, locked = (edit(flux, stages=(5, 2, 0), coarse_refresh=3, lock_text=x) for x in (False, True, "all"))
    assert coarse(out) == coarse(mixed) and [s.lock_text for s in mixed.stats.steps[-2:]] == [False, True]
    for found, lock in ((out, False), (locked, True)):
        steps = coarse(found)
        assert found.stats.nfe == 7 and [s.tokens for s in steps] == [(32,), (16,), (16,), (32,), (16,)]
        assert all(s.keys == (32,) for s in steps)
        assert [s.lock_text for s in steps] == [False, lock, lock, False, lock]
    run = run_of(flux, **call_options(image=tiny_image(), mask_image=left_half(), specedit=SpecEditConfig()))
    text = run.positive
    assert coarse(out)[0].flops == run.model.flops(text, 32)
    assert coarse(out)[1].flops == run.model.flops(text, 16, 32)
    assert coarse(locked)[1].flops == run.model.flops(text, 16, 32, lock_text=True) < coarse(out)[1].flops


@pytest.mark.parametrize("change", ["latents", "prompt_embeds"])
def test_a_step_after_a_callback_that_changes_the_run_is_whole(flux, change):
    def call(at):
        def back(pipe, i, timestep, tensors):
            return {change: tensors[change] * 1.01} if i == at else {}

        return dict(callback_on_step_end=back, callback_on_step_end_tensor_inputs=[change])

    options = dict(stages=(5, 2, 0), coarse_refresh=9, lock_text="all")
    assert [s.tokens[0] for s in coarse(edit(flux, call(1), **options))] == [32, 16, 32, 16, 16]
    assert [s.tokens[0] for s in coarse(edit(flux, call(9), **options))] == [32, 16, 16, 16, 16]


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_a_batch_is_its_singles(flux, runner):
    config = SpecEditConfig(stages=(3, 2, 0), finish="locked", runner=runner, coarse_refresh=3, lock_text="all")
    given = dict(output_type="latent", specedit=config)
    images, masks = [tiny_image(seed=1), tiny_image(seed=2)], [left_half(), left_half().rotate(90)]
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    text = ["make the cat blue", "add a hat"]
    both = flux(**call_options(image=images, mask_image=masks, generator=seeds, prompt=text, **given)).images
    for i in (0, 1):
        seed = [torch.Generator().manual_seed(i + 1)]
        one = dict(image=images[i], mask_image=masks[i], prompt=text[i], generator=seed)
        torch.testing.assert_close(flux(**call_options(**one, **given)).images[0], both[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(96, 160), (224, 96)])
def test_coarse_grids_of_odd_sides(flux, size):
    call = dict(image=tiny_image(*size), height=size[0], width=size[1], max_area=size[0] * size[1])
    options = dict(stages=(3, 2, 0), coarse_refresh=3, lock_text="all")
    call["mask_image"] = left_half().resize(size[::-1])
    found = []
    for runner in ("eager", "fused"):
        call["generator"] = torch.Generator().manual_seed(1)
        found.append(edit(flux, call, runner=runner, **options))
    rows, columns = (side // 32 for side in size)
    assert (rows % 2 or columns % 2) and [s.tokens[0] for s in coarse(found[0])] == [
        2 * rows * columns, rows * columns, rows * columns
    ]  # fmt: skip
    torch.testing.assert_close(found[0].images, found[1].images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_with_every_draft(flux, draft):
    given = dict(stages=(3, 2, 0), draft=draft, draft_steps=3, threshold=-1.0, max_active=1.0, finish="locked")
    call = dict(mask_image=None)
    out = edit(flux, call, coarse_refresh=3, **given)
    tokens = {name: [s.tokens[0] for s in out.stats.steps if s.stage == name] for name in ("draft", "coarse")}
    # a separate draft's steps are whole
    assert tokens["draft"] == ([8] * 3 if draft == "quarter" else [])
    assert tokens["coarse"] == ([] if draft == "full_step" else [32, 16, 16])
    if draft == "coarse":
        assert not torch.equal(out.scores, edit(flux, dict(mask_image=None), **given).scores)


@pytest.mark.parametrize("kv_refresh", [9, "bracket"])
def test_the_mixed_steps_take_over_its_memory(kv_refresh):
    options = dict(stages=(3, 4, 0), kv_refresh=kv_refresh, runner="fused")
    before, after = made("flux", tiny_pipeline()), made("flux", tiny_pipeline())
    whole, kept = edit(before, **options), edit(after, coarse_refresh=3, **options)
    runners = before._specedit_runner, after._specedit_runner
    assert runners[0]._buffers.keys() == runners[1]._buffers.keys()
    assert whole.stats.kv_cache_bytes == kept.stats.kv_cache_bytes == runners[1].buffer_bytes
    # and without mixed steps that keep any, there are those of the coarse ones
    out = edit(made("flux", tiny_pipeline()), stages=(3, 2, 0), kv_refresh=1, coarse_refresh=3, runner="fused")
    assert 0 < out.stats.kv_cache_bytes <= whole.stats.kv_cache_bytes


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_bracketed_text_lies_between_the_two_passes(flux, monkeypatch, runner):
    """Of active steps with lock_text: the text's keys and values are the blend, those of edited tokens are renewed."""
    seen = []
    kind = FluxKontextModel if runner == "eager" else FusedFluxModel
    own, velocity = kind.blend, kind.velocity

    def pairs(layout):
        cache = layout.attention.cache
        return [[x.clone() for x in pair] for pair in (cache if isinstance(cache, list) else cache.pairs)]

    def blend(model, layout, near, far, weight):
        own(model, layout, near, far, weight)
        seen.append([weight.item(), layout, pairs(near), pairs(far)])

    def step(model, text, tokens, conditioning, layout):
        found = velocity(model, text, tokens, conditioning, layout)
        if seen and len(seen[-1]) == 4:
            seen[-1].append(pairs(seen[-1][1]))
            assert layout.attention.sequence.text == 0 and layout.attention.start == text.embeds.shape[1]
        return found

    monkeypatch.setattr(kind, "blend", blend)
    monkeypatch.setattr(kind, "velocity", step)
    out = edit(flux, stages=(1, 5, 0), kv_refresh="bracket", lock_text=True, runner=runner)
    active = [s for s in out.stats.steps if s.stage == "active"]
    assert len(active) == len(seen) == 4 and all(s.lock_text for s in active)
    run = run_of(flux, **call_options(image=tiny_image(), mask_image=left_half(), specedit=SpecEditConfig()))
    text = run.positive.embeds.shape[1]
    for weight, _, near, far, after in seen:
        assert 0 < weight <= 1
        for a, b, c in zip(near, far, after):
            for x, y, z in zip(a, b, c):
                between = torch.lerp(x, y, weight)
                torch.testing.assert_close(z[:, :text], between[:, :text], atol=1e-6, rtol=1e-6)
                # the first slots are edited tokens
                assert not torch.allclose(z[:, text : text + 4], between[:, text : text + 4], atol=1e-5)
    moved = [(y - x)[:, :text].abs().max() for x, y in zip(seen[0][2][-1], seen[0][3][-1])]
    assert min(moved) > 1e-4  # the text does move


@pytest.mark.parametrize("lock_text", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_the_second_whole_pass_without_the_condition(request, model, kv_cache_dtype, lock_text):
    pipe = request.getfixturevalue(model)
    options = dict(stages=(1, 5, 0), kv_refresh="bracket", solver="ab2", lock_text=lock_text)
    options |= dict(kv_cache_dtype=kv_cache_dtype)
    eager, fused = (edit(pipe, runner=r, lock_condition=True, **options) for r in ("eager", "fused"))
    error, size = (eager.images - fused.images).abs().max(), eager.images.abs().max()
    assert error < (2e-5 if kv_cache_dtype == "auto" else 3e-2) * size
    assert not torch.equal(eager.images, edit(pipe, **options).images)
    [step] = [s for s in eager.stats.steps if s.stage == "bracket"]
    assert (step.tokens, step.keys, step.lock_text) == ((40,), (80,), lock_text)
    assert eager.stats.steps == fused.stats.steps
    # all others compute what they did
    rest = [s for s in edit(pipe, **options).stats.steps if s.stage != "bracket"]
    assert [s for s in eager.stats.steps if s.stage != "bracket"] == rest


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_a_batch_without_the_condition_is_its_singles(flux, runner):
    config = SpecEditConfig(stages=(1, 4, 0), finish="locked", runner=runner, lock_condition=True)
    given = dict(output_type="latent", specedit=config)
    quarter = left_half().crop((32, 0, 160, 128))
    images, masks = [tiny_image(seed=1), tiny_image(seed=2)], [left_half(), quarter]
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    text = ["make the cat blue", "add a hat"]
    both = flux(**call_options(image=images, mask_image=masks, generator=seeds, prompt=text, **given)).images
    for i in (0, 1):
        seed = [torch.Generator().manual_seed(i + 1)]
        one = dict(image=images[i], mask_image=masks[i], prompt=text[i], generator=seed)
        torch.testing.assert_close(flux(**call_options(**one, **given)).images[0], both[i], atol=1e-4, rtol=1e-4)


def test_values():
    with pytest.raises(TypeError, match="lock_condition: expected True or False"):
        SpecEditConfig(lock_condition=1)
    for wrong in ("some", 1, None):
        with pytest.raises(TypeError, match="lock_text: expected True or False"):
            SpecEditConfig(lock_text=wrong)
    assert SpecEditConfig().coarse_refresh == 1 and SpecEditConfig(coarse_refresh=3).coarse_refresh == 3
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="coarse_refresh: expected an integer >= 1"):
            SpecEditConfig(coarse_refresh=wrong)
    for wrong in (True, "2", 1.0):
        with pytest.raises(TypeError, match="coarse_refresh: expected an integer"):
            SpecEditConfig(coarse_refresh=wrong)
