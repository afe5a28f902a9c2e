# SPDX-License-Identifier: Apache-2.0
"""coarse_refresh: coarse steps over kept keys and values, by every runner."""

import itertools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from model_proofs import run_of
from test_runner import stubbed  # noqa: F401
from tiny_models import call_options, edit_left_half, left_half, qwen_text, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, SpecEditQwenImageEditPipeline
from specedit_kernels.engine import pipeline, stages
from specedit_kernels.engine.attention import wrap_processors

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model):
    kind, plain = {
        "flux": (SpecEditFluxKontextPipeline, tiny_pipeline), "qwen": (SpecEditQwenImageEditPipeline, tiny_qwen)
    }[model]  # fmt: skip
    pipe = kind(**plain().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux():
    return made("flux")


def edit(pipe, call=None, **config):
    return edit_left_half(pipe, call, **dict(stages=(3, 2, 0), finish="locked", kv_refresh=1, runner="eager") | config)


def coarse(out):
    return [step for step in out.stats.steps if step.stage == "coarse"]


def apart(a, b):
    return (a - b).abs().max() / b.abs().max()


@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize(("model", "n"), [("flux", 1), ("qwen", 1), ("flux", 4), ("qwen", 4), ("qwen", 3)])
def test_it_is_whole_steps_where_kept_keys_and_values_do_not_change(monkeypatch, model, runner, n):
    """In a model of one block with one timestep for all steps, those of condition and text depend on no step."""
    pipe = made(model)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    if model == "flux":
        pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()

    def error():
        options = dict(runner=runner, stages=(4, 2, 0), mixed_from=0.3)
        return apart(*(edit(pipe, coarse_refresh=k, coarse_text_refresh=n if k > 1 else 1, **options).images
                       for k in (1, 4)))  # fmt: skip

    assert error() > 1e-4
    own = stages.Run.timestep_conditioning
    monkeypatch.setattr(
        stages.Run, "timestep_conditioning", lambda run, at, guided=True: own(run, torch.full_like(at, 600), guided)
    )
    assert error() < 2e-6


def test_one_coarse_step_keeps_its_bits(flux):
    before, after = (edit(flux, stages=(1, 2, 0), runner="fused", coarse_refresh=k).images for k in (1, 5))
    assert torch.equal(after, before)
    assert not torch.equal(edit(flux, coarse_refresh=3).images, edit(flux).images)


# texts of two lengths: one batch of both has padding
TWO_LENGTHS = dict(qwen_text(7, padded=2, negative=True, seed=4))
OPTIONS = {
    "plain": {}, "fp8 cache": dict(kv_cache_dtype="fp8"), "draft without guidance": dict(draft_guidance=False),
    "half draft": dict(draft="half", threshold=-1.0, max_active=1.0),
    # steps: all, the target, all but the text, text and target, all but the text
    "text kept": dict(stages=(5, 2, 0), coarse_refresh=2, coarse_text_refresh=3),
    "text kept, fp8 cache": dict(stages=(5, 2, 0), coarse_refresh=5, coarse_text_refresh=2, kv_cache_dtype="fp8"),
    "text kept alone": dict(stages=(5, 2, 0), coarse_refresh=1, coarse_text_refresh=3),
}  # fmt: skip
CASES = [("flux", "plain"), *(("qwen", name) for name in OPTIONS)]


def case(pipe, model, name, runner):
    options = dict(coarse_refresh=2, lock_text=True, kv_refresh="bracket", stages=(3, 4, 0)) | OPTIONS[name]
    call = dict(generator=torch.Generator().manual_seed(1), **({} if model == "flux" else TWO_LENGTHS))
    if name == "half draft":
        call["mask_image"] = None
    return edit(pipe, call, runner=runner, **options)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_fused_steps_and_graphs_do_what_eager_ones_do(model, name, stubbed, monkeypatch, poison):  # noqa: F811
    """A graph is stood for by the function that was captured first, for all later calls of its tag and shapes."""
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    pipe = made(model)
    eager, fused, graph, again = (case(pipe, model, name, runner) for runner in ("eager", "fused", "graph", "graph"))
    assert eager.stats.kv_cache_bytes > 0 and (fused.stats.runner, graph.stats.runner) == ("fused", "graph")
    assert apart(fused.images, eager.images) < (3e-2 if "fp8" in name else 2e-5)
    assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)
    assert graph.stats.captures > 4 and again.stats.captures == 0
    assert eager.stats.steps == fused.stats.steps == again.stats.steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_in_bf16(model, name, device):
    """On a CUDA device by graphs too. A CPU has the plain case alone."""
    if device == "cpu" and (model, name) != ("qwen", "plain"):
        pytest.skip("by the test above")
    pipe = made(model).to(device, torch.bfloat16)
    eager, fused = (case(pipe, model, name, runner) for runner in ("eager", "fused"))
    assert (fused.images - eager.images).norm() < 0.02 * eager.images.norm()
    if device == "cuda":
        graph, again = (case(pipe, model, name, "graph") for _ in range(2))
        assert (graph.stats.runner, graph.stats.captures > 4, again.stats.captures) == ("graph", True, 0)
        assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)


def test_rows_are_counted(flux):
    out = edit(flux, stages=(5, 2, 0), coarse_refresh=3)
    assert out.stats.nfe == 7 and [s.tokens for s in coarse(out)] == [(32,), (16,), (16,), (32,), (16,)]
    assert all(s.keys == (32,) for s in coarse(out))
    run = run_of(flux, **call_options(image=tiny_image(), mask_image=left_half(), specedit=SpecEditConfig()))
    assert coarse(out)[0].flops == run.model.flops(run.positive, 32)
    assert coarse(out)[1].flops == run.model.flops(run.positive, 16, 32) < coarse(out)[0].flops


def test_a_text_that_is_kept(flux):
    def steps(call=None, **given):
        out = edit(flux, call, stages=(5, 2, 0), **given)
        return "".join("bTta"[2 * (s.tokens[0] == 32) + (not s.lock_text)] for s in coarse(out))

    # a: all; t: all but the text; T: text and target; b: the target alone
    assert steps(coarse_refresh=5, coarse_text_refresh=5) == "abbbb"
    assert steps(coarse_refresh=5, coarse_text_refresh=2) == "abTbT"
    assert steps(coarse_refresh=2, coarse_text_refresh=3) == "abtTt"
    assert steps(coarse_text_refresh=2) == "atata"
    assert steps(dict(callback_on_step_end=lambda pipe, i, t, x: {"prompt_embeds": x["prompt_embeds"] * 1.01} if i == 1
                      else {}, callback_on_step_end_tensor_inputs=["prompt_embeds"]),
                 coarse_refresh=9, coarse_text_refresh=9) == "ababb"  # fmt: skip
    found = [edit(flux, stages=(5, 2, 0), coarse_refresh=5, coarse_text_refresh=k) for k in (1, 2, 5)]
    assert all(apart(a.images, b.images) > 1e-4 for a, b in itertools.combinations(found, 2))
    assert found[0].stats.flops > found[1].stats.flops > found[2].stats.flops


@torch.no_grad()
@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_packed_keys_of_a_text_are_renewed_with_it(runner):
    pipe, config = made("qwen"), SpecEditConfig(runner=runner, kv_cache_dtype="fp8")
    call = dict(qwen_text(), image=tiny_image(), mask_image=left_half(), max_area=128 * 128, specedit=config)
    run = run_of(pipe, **call)
    wrap_processors(pipe.transformer)
    given = run, run.texts, [(4, 4), (4, 4)], 1
    whole, alone, capacity, first, _, bare = stages._kept_layouts(*given, keeps_text=True)
    tokens, at = torch.randn(1, capacity, 64), torch.tensor(600.0)

    def found(*layouts):
        return [run.velocity(tokens[:, : capacity if x is whole else first], at, x) for x in layouts][-1]

    kept = found(whole, bare)
    assert torch.equal(found(bare), kept)
    run.positive.embeds = 2 * run.positive.embeds + 1
    assert torch.equal(found(bare), kept) and not torch.equal(found(alone, bare), kept)


@pytest.mark.parametrize("change", ["latents", "prompt_embeds"])
def test_a_step_after_a_callback_that_changes_the_run_is_whole(flux, change):
    def call(at):
        def back(pipe, i, timestep, tensors):
            return {change: tensors[change] * 1.01} if i == at else {}

        return dict(callback_on_step_end=back, callback_on_step_end_tensor_inputs=[change])

    options = dict(stages=(5, 2, 0), coarse_refresh=9)
    assert [s.tokens[0] for s in coarse(edit(flux, call(1), **options))] == [32, 16, 32, 16, 16]
    assert [s.tokens[0] for s in coarse(edit(flux, call(9), **options))] == [32, 16, 16, 16, 16]


def test_a_batch_is_its_singles(flux):
    config = SpecEditConfig(stages=(3, 2, 0), finish="locked", runner="fused", coarse_refresh=3)
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
    call["mask_image"] = left_half().resize(size[::-1])
    found = []
    for runner in ("eager", "fused"):
        call["generator"] = torch.Generator().manual_seed(1)
        found.append(edit(flux, call, runner=runner, coarse_refresh=3))
    rows, columns = (side // 32 for side in size)
    assert rows % 2 or columns % 2
    assert [s.tokens[0] // (rows * columns) for s in coarse(found[0])] == [2, 1, 1]
    torch.testing.assert_close(found[0].images, found[1].images, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["coarse", "half", "quarter", "full_step"])
def test_with_every_draft(flux, draft):
    given = dict(stages=(3, 2, 0), draft=draft, draft_steps=3, threshold=-1.0, max_active=1.0)
    out = edit(flux, dict(mask_image=None), coarse_refresh=3, **given)
    tokens = {name: [s.tokens[0] for s in out.stats.steps if s.stage == name] for name in ("draft", "coarse")}
    # a quarter draft's steps are whole
    assert tokens["draft"] == {"quarter": [8] * 3, "half": [32, 16, 16]}.get(draft, [])
    assert tokens["coarse"] == {"coarse": [32, 16, 16], "quarter": [32, 16, 16]}.get(draft, [])
    if draft in ("coarse", "half"):
        assert not torch.equal(out.scores, edit(flux, dict(mask_image=None), **given).scores)


def test_the_mixed_steps_take_over_its_memory():
    options = dict(stages=(3, 4, 0), kv_refresh="bracket", runner="fused")
    before, after = made("flux"), made("flux")
    whole, kept = edit(before, **options), edit(after, coarse_refresh=3, **options)
    runners = before._specedit_runner, after._specedit_runner
    assert runners[0]._buffers.keys() == runners[1]._buffers.keys()
    assert kept.stats.kv_cache_bytes == runners[1].buffer_bytes
    assert whole.stats.kv_cache_bytes <= kept.stats.kv_cache_bytes < 1.1 * whole.stats.kv_cache_bytes
    # and without mixed steps that keep any, there are those of the coarse ones
    out = edit(made("flux"), coarse_refresh=3, runner="fused")
    assert 0 < out.stats.kv_cache_bytes <= whole.stats.kv_cache_bytes


def test_values():
    given = (dict(preset=9), dict(coarse_refresh=3), dict(coarse_text_refresh=3))
    found = [SpecEditConfig(**each).resolved() for each in given]
    assert [x.coarse_refresh for x in found] == [1, 3, 2] and [x.coarse_text_refresh for x in found] == [1, 1, 3]
    with pytest.raises(ValueError, match="coarse_text_refresh: expected an integer >= 1, got 0"):
        SpecEditConfig(coarse_text_refresh=0)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="coarse_refresh: expected an integer >= 1"):
            SpecEditConfig(coarse_refresh=wrong)
    for wrong in (True, "2", 1.0):
        with pytest.raises(TypeError, match="coarse_refresh: expected an integer"):
            SpecEditConfig(coarse_refresh=wrong)
