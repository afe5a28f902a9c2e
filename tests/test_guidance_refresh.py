# SPDX-License-Identifier: Apache-2.0
"""guidance_refresh: steps that take the difference of the two guidance branches from an earlier one, all runners."""

import itertools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import QwenImageTransformer2DModel
from model_proofs import guided_by_hand, run_of
from test_coarse_refresh import made
from test_runner import stubbed  # noqa: F401
from tiny_models import QWEN_TEXT, edit_left_half, left_half, qwen_text, tiny_image

from specedit_kernels import SpecEditConfig
from specedit_kernels.engine import fp8, pipeline
from specedit_kernels.sampling.grid import pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDED = {"flux": dict(negative_prompt="red", true_cfg_scale=3.0), "qwen": dict(true_cfg_scale=3.0)}
BASE = dict(stages=(4, 5, 0), finish="locked", kv_refresh=3, lock_text=True, guidance_refresh=2)
FOUND = dict(threshold=-1.0, max_active=1.0)
# (options, what each step does: b computes both branches and keeps their difference, f both and keeps nothing (the
# bracket's second pass), c the conditional one over the kept difference, u is without guidance)
CASES = {
    "plain": ({}, "bcbc" "bcbbc"),
    "once a stage": (dict(guidance_refresh=9), "bccc" "bccbc"),
    "text in each step": (dict(lock_text=False), "bcbc" "bcbbc"),
    "whole steps": (dict(kv_refresh=1, lock_text=False), "bcbc" "bcbcb"),
    "whole steps without text": (dict(kv_refresh=1), "bcbc" "bcbcb"),
    "bracket": (dict(kv_refresh="bracket", solver="ab2"), "bcbc" "bfcbcb"),
    "coarse steps over kept keys": (dict(coarse_refresh=3, guidance_refresh=4), "bccb" "bccbc"),
    # text: in the third step alone beside the first
    "coarse steps over kept text": (dict(coarse_refresh=4, coarse_text_refresh=2, guidance_refresh=9), "bcbc" "bccbc"),
    "draft without guidance": (dict(draft_guidance=False), "uuuu" "bcbbc"),
    "draft with guidance in its last step": (dict(draft_guidance="last"), "uuub" "bcbbc"),
    "the same over kept keys": (dict(draft_guidance="last", coarse_refresh=4), "uuub" "bcbbc"),
    "half draft": (dict(draft="half", kv_refresh=5, **FOUND), "bcbc" "bcbcbbcbc"),
    "quarter draft": (dict(draft="quarter", draft_steps=3, **FOUND), "bcb" "bcbc" "bcbbc"),
    "fp8 cache": (dict(kv_cache_dtype="fp8"), "bcbc" "bcbbc"),
    "full steps": (dict(stages=(1, 2, 4), finish="full", guidance_refresh=3), "b" "bc" "bccb"),
}  # fmt: skip
PASSES = dict(b=2, f=2, c=1, u=1)
# texts of two lengths: one batch of both has padding
TWO_LENGTHS = dict(qwen_text(7, padded=2, negative=True, seed=4))


def edit(pipe, call=None, **config):
    name = "qwen" if "Qwen" in type(pipe).__name__ else "flux"
    call = dict(GUIDED[name], generator=torch.Generator().manual_seed(1)) | (call or {})
    if config.get("draft") in ("half", "quarter"):
        call["mask_mode"] = "limit"
    return edit_left_half(pipe, call, **BASE | dict(runner="eager") | config)


def passes(out):
    return [step.passes for step in out.stats.steps]


def apart(a, b):
    return (a - b).abs().max() / b.abs().max()


@pytest.fixture(scope="module", params=["flux", "qwen"])
def pipe(request):
    return made(request.param)


@pytest.mark.parametrize("name", CASES)
def test_steps_take_the_kept_difference(pipe, name):
    options, what = CASES[name]
    out, both = edit(pipe, **options), edit(pipe, **options | dict(guidance_refresh=1))
    with guided_by_hand(pipe._model(None, None, {}), what.replace("u", "")):
        expected = edit(pipe, **options | dict(guidance_refresh=1))
    assert passes(out) == [PASSES[x] for x in what]
    assert apart(out.images, expected.images) < 2e-5
    assert apart(out.images, both.images) > 1e-4
    assert out.stats.flops < both.stats.flops


def test_a_loop_over_the_transformer_alone():
    """Qwen's full steps, by diffusers' transformer, a schedule and nothing of the engine."""
    pipe = made("qwen")
    call = dict(qwen_text() | qwen_text(negative=True, seed=4), true_cfg_scale=3.0, max_area=128 * 128)
    call |= dict(image=tiny_image(), generator=torch.Generator().manual_seed(1), output_type="latent")
    config = SpecEditConfig(quality="paper", stages=(0, 0, 5), guidance_refresh=3, runner="eager")
    call |= dict(specedit=config, mask_image=torch.ones(128, 128).numpy())
    got = pipe(**call).images
    run = run_of(pipe, **call | dict(generator=torch.Generator().manual_seed(1)))
    sigmas, x, behind = pipe._plain_sigmas(5, 64, None), pack(run.noise, 2), pack(run.source, 2)
    shapes = [[(1, 8, 8), (1, 8, 8)]]

    def velocity(text, sigma):
        return pipe.transformer(
            hidden_states=torch.cat([x, behind], dim=1), timestep=torch.tensor([sigma]), img_shapes=shapes,
            encoder_hidden_states=text.embeds, encoder_hidden_states_mask=text.mask, return_dict=False,
        )[0][:, :64]  # fmt: skip

    with torch.no_grad():
        for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            conditional = velocity(run.positive, sigma)
            if i in (0, 3):
                difference = conditional - velocity(run.negative, sigma)
            unconditional = conditional - difference
            guided = unconditional + 3.0 * (conditional - unconditional)
            guided = guided * conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            x = x + (following - sigma) * guided
    assert apart(unpack(x, (8, 8), 2), unpack(got, (8, 8), 2)) < 1e-4


def test_the_unconditional_branch_is_called_so_often(monkeypatch):
    pipe, calls = made("qwen"), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append(len(given["encoder_hidden_states"][0])), with_kwargs=True
    )
    # 12 tokens of the prompt, 7 of the other one; locked steps bring none
    edit(pipe, TWO_LENGTHS, lock_text=False)
    assert calls == [12, 7, 12, 12, 7, 12] + [12, 7, 12, 12, 7, 12, 7, 12]


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_one_and_no_guidance_keep_their_bits(pipe, runner, monkeypatch):
    plain = edit(pipe, runner=runner, guidance_refresh=1)
    assert passes(plain) == [2] * 9
    alone = [edit(pipe, dict(true_cfg_scale=1.0), runner=runner, guidance_refresh=k) for k in (1, 3)]
    assert torch.equal(alone[0].images, alone[1].images) and alone[0].stats.steps == alone[1].stats.steps
    monkeypatch.setattr("specedit_kernels.engine.guidance.StageVelocity.__call__", lambda self, step, tokens, layouts,
                        first=None, renew=False: self.run.velocity(tokens, self.conditionings[step], layouts, first,
                                                                   self.guided))  # fmt: skip
    assert torch.equal(edit(pipe, runner=runner, guidance_refresh=1).images, plain.images)


RUN = ["plain", "text in each step", "bracket", "coarse steps over kept keys", "coarse steps over kept text",
       "draft without guidance", "half draft", "fp8 cache", "whole steps without text"]  # fmt: skip


@pytest.mark.parametrize(("model", "name"), [("flux", "plain"), ("flux", "bracket"), *(("qwen", name) for name in RUN)])
def test_fused_steps_and_graphs_do_what_eager_ones_do(model, name, stubbed, monkeypatch, poison):  # noqa: F811
    """A graph is stood for by the function that was captured first, for all later calls of its tag and shapes."""
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    pipe, call = made(model), TWO_LENGTHS if model == "qwen" else {}

    def case(runner, **more):
        return edit(pipe, dict(call), runner=runner, **CASES[name][0] | more)

    eager, fused, graph, again = (case(runner) for runner in ("eager", "fused", "graph", "graph"))
    assert passes(fused) == passes(eager) == [PASSES[x] for x in CASES[name][1]]
    assert apart(fused.images, eager.images) < (3e-2 if name == "fp8 cache" else 5e-5)
    assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)
    assert graph.stats.captures > 4 and again.stats.captures == 0
    # steps of both branches in between take no harm
    case("graph", guidance_refresh=1)
    assert torch.equal(case("graph").images, fused.images)


def test_attention_in_e4m3_over_one_branchs_part(monkeypatch):
    """As if its CUDA kernel served; a bracket, whose keys and values are blended, too."""
    monkeypatch.setattr(fp8, "attends", lambda *_: fp8.is_active())
    pipe = made("qwen")
    for name in ("plain", "bracket"):
        options = dict(CASES[name][0], runner="fused")
        plain, got = (edit(pipe, dict(TWO_LENGTHS), precision=x, **options) for x in ("auto", "fp8"))
        assert got.stats.precision == "fp8" and passes(got) == passes(plain)
        assert 0 < (got.images - plain.images).norm() < 0.15 * plain.images.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "fp8"])
@pytest.mark.parametrize(("model", "name"), [("flux", "plain"), ("flux", "bracket"), *(("qwen", name) for name in RUN)])
def test_by_graphs_on_a_device(model, name, precision):
    """Qwen in fp8 has heads of 128 channels, which attend in e4m3 on sm_90."""
    pipe = made(model)
    if model == "qwen" and precision == "fp8":
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=QWEN_TEXT
        )
        pipe.register_modules(transformer=transformer)
    pipe.to("cuda", torch.bfloat16)
    call = TWO_LENGTHS if model == "qwen" else {}
    options = dict(CASES[name][0], precision=precision)
    eager, fused, graph, again = (
        edit(pipe, dict(call), runner=runner, **options) for runner in ("eager", "fused", "graph", "graph")
    )
    assert passes(graph) == passes(eager) == [PASSES[x] for x in CASES[name][1]]
    assert (graph.stats.runner, graph.stats.captures > 4, again.stats.captures) == ("graph", True, 0)
    assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)
    if precision == "auto":
        assert (fused.images - eager.images).norm() < 0.03 * eager.images.norm()


@pytest.mark.parametrize("change", ["latents", "prompt_embeds"])
def test_a_step_after_a_callback_that_changes_the_run_computes_both(pipe, change):
    def call(*at):
        def back(pipe, i, timestep, tensors):
            return {change: tensors[change] * 1.01} if i in at else {}

        return dict(callback_on_step_end=back, callback_on_step_end_tensor_inputs=[change])

    options = dict(guidance_refresh=9, kv_refresh=9)
    assert passes(edit(pipe, call(1, 6), **options)) == [2, 1, 2, 1, 2, 1, 1, 2, 1]
    assert passes(edit(pipe, call(20), **options)) == [2, 1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_a_batch_is_its_singles(runner):
    pipe = made("qwen")
    images, masks = [tiny_image(seed=1), tiny_image(seed=2)], [left_half(), left_half().rotate(90)]
    texts = [qwen_text(seed=i) | qwen_text(9, seed=i + 5, negative=True) for i in (1, 2)]
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = edit(pipe, dict(image=images, mask_image=[*masks], generator=seeds,
                           **{k: torch.cat([text[k] for text in texts]) for k in texts[0]}), runner=runner)  # fmt: skip
    assert passes(both) == [2, 1, 2, 1, 2, 1, 2, 2, 1]
    for i in (0, 1):
        seed = [torch.Generator().manual_seed(i + 1)]
        one = edit(pipe, dict(image=images[i], mask_image=masks[i], generator=seed, **texts[i]), runner=runner)
        torch.testing.assert_close(one.images[0], both.images[i], atol=2e-4, rtol=2e-4)


def test_values():
    for given, value in ((dict(), 1), (dict(guidance_refresh=3), 3), (dict(quality="fast", guidance_refresh=3), 3)):
        assert SpecEditConfig(**given).resolved(guided=True).guidance_refresh == value
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="guidance_refresh: expected an integer >= 1"):
            SpecEditConfig(guidance_refresh=wrong)
    for wrong in (True, "2", 1.0):
        with pytest.raises(TypeError, match="guidance_refresh: expected an integer"):
            SpecEditConfig(guidance_refresh=wrong)
