# SPDX-License-Identifier: Apache-2.0
"""draft_guidance="last": a draft whose last step alone computes both guidance branches."""

import itertools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from combinations import pairwise
from test_coarse_refresh import TWO_LENGTHS, apart, made
from test_runner import stubbed  # noqa: F401
from tiny_models import call_options, edit_left_half, qwen_text

from specedit_kernels.engine import pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDED = {"flux": dict(negative_prompt="red", true_cfg_scale=3.0), "qwen": dict(true_cfg_scale=3.0)}
# the negative text is the positive one
NO_EFFECT = {"flux": dict(negative_prompt=call_options()["prompt"]), "qwen": qwen_text(negative=True)}
FOUND = dict(threshold=-1.0, max_active=1.0)
# (options, what each step computes: u one branch, b both)
CASES = {
    "plain": ({}, "uuub" "bbbbb"),
    "kept keys": (dict(coarse_refresh=4), "uuub" "bbbbb"),
    "kept keys and text": (dict(coarse_refresh=4, coarse_text_refresh=2), "uuub" "bbbbb"),
    "two coarse steps": (dict(stages=(2, 3, 0)), "ub" "bbb"),
    "half draft": (dict(draft="half", **FOUND), "uuub" "bbbbbbbbb"),
    "quarter draft": (dict(draft="quarter", draft_steps=3, **FOUND), "uub" "uuub" "bbbbb"),
    "two-step solver": (dict(solver="ab2", kv_refresh="bracket"), "uuub" "bbbbbb"),
}  # fmt: skip


def edit(pipe, call=None, **config):
    call = dict(GUIDED[name_of(pipe)], generator=torch.Generator().manual_seed(1)) | (call or {})
    if config.get("draft") in ("half", "quarter"):
        call["mask_mode"] = "limit"
    base = dict(stages=(4, 5, 0), finish="locked", kv_refresh=3, lock_text=True, runner="eager", draft_guidance="last")
    return edit_left_half(pipe, call, **base | config)


def name_of(pipe):
    return "qwen" if "Qwen" in type(pipe).__name__ else "flux"


def passes(out):
    return "".join(" ub"[step.passes] for step in out.stats.steps)


def latents_of(pipe, call=None, **config):
    """Those after each step of the main trajectory."""
    found = []

    def keep(pipe, i, timestep, tensors):
        found.append(tensors["latents"].clone())
        return {}

    edit(pipe, dict(call or {}, callback_on_step_end=keep), **config)
    return found


@pytest.fixture(scope="module", params=["flux", "qwen"])
def pipe(request):
    return made(request.param)


@pytest.mark.parametrize(
    ("pipe", "name", "runner"), pairwise(["flux", "qwen"], list(CASES), ["eager", "fused"]), indirect=["pipe"]
)
def test_the_last_step_of_a_draft_has_guidance(pipe, name, runner):
    options, what = CASES[name]
    guided, last, without = (edit(pipe, runner=runner, draft_guidance=x, **options) for x in (True, "last", False))
    assert last.stats.runner == runner and passes(last) == what
    assert passes(guided) == "b" * len(what) and passes(without) == what.replace("ub", "uu")
    # all is selected, whatever a half draft proposes
    found = [out.scores if name == "half draft" else out.images for out in (guided, last, without)]
    assert all(apart(a, b) > 1e-4 for a, b in itertools.combinations(found, 2))
    assert without.stats.flops < last.stats.flops < guided.stats.flops
    if runner == "fused":
        assert apart(last.images, edit(pipe, **options).images) < 5e-5


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_one_coarse_step_has_guidance(pipe, runner):
    options = dict(runner=runner, stages=(1, 3, 0))
    guided, last, without = (edit(pipe, draft_guidance=x, **options) for x in (True, "last", False))
    assert passes(last) == passes(guided) == "bbbb" and passes(without) == "ubbb"
    assert torch.equal(last.images, guided.images) and apart(last.images, without.images) > 1e-4


def test_a_run_without_guidance_keeps_its_bits(pipe):
    for options in (dict(coarse_refresh=4), dict(solver="ab2", kv_refresh="bracket")):
        last, plain = (edit(pipe, dict(true_cfg_scale=1.0), draft_guidance=x, **options) for x in ("last", True))
        assert torch.equal(last.images, plain.images) and last.stats.steps == plain.stats.steps


def test_the_branches_that_are_called():
    pipe, calls = made("qwen"), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append(len(given["encoder_hidden_states"][0])), with_kwargs=True
    )
    # 12 tokens of the prompt, 7 of the other one
    for n in (1, 4):
        calls.clear()
        edit(pipe, TWO_LENGTHS, lock_text=False, coarse_refresh=n)
        assert calls == [12, 12, 12] + [12, 7] * 6


def test_steps_before_the_last_are_those_without_guidance(pipe):
    guided, last, without = (latents_of(pipe, draft_guidance=x) for x in (True, "last", False))
    assert len(last) == 9 and all(torch.equal(a, b) for a, b in zip(last[:3], without[:3]))
    assert apart(last[3], without[3]) > 1e-4 and apart(last[0], guided[0]) > 1e-4


@pytest.mark.parametrize("runner", ["eager", "fused"])
def test_guidance_without_effect(pipe, runner):
    """Both branches have one text: the guided velocity is the conditional one, up to rounding."""
    given = dict(call=NO_EFFECT[name_of(pipe)], runner=runner)
    for options in ({}, dict(draft="quarter", draft_steps=3, **FOUND)):
        last, without = (edit(pipe, draft_guidance=x, **given, **options).images for x in ("last", False))
        assert apart(last, without) < 2e-5
    # of a two-step solver the last step is Euler's, those before are the same (a product's rounding may differ with the
    # addresses of what it reads, and both runs have buffers of their own)
    last, without = (latents_of(pipe, solver="ab2", draft_guidance=x, **given) for x in ("last", False))
    euler = latents_of(pipe, draft_guidance=False, **given)
    assert all(apart(a, b) < 1e-6 for a, b in zip(last[:3], without[:3])) and apart(last[3], without[3]) > 1e-4
    assert apart(last[0], euler[0]) < 1e-6 and apart(last[1], euler[1]) > 1e-4


@pytest.mark.parametrize("name", ["kept keys", "half draft", "two-step solver"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_graphs_do_what_fused_steps_do(model, name, stubbed, monkeypatch, poison):  # noqa: F811
    """A graph is stood for by the function that was captured first, for all later calls of its tag and shapes."""
    monkeypatch.setattr(pipeline, "inspect_weights", lambda *arguments: ("", []))
    pipe, call = made(model), TWO_LENGTHS if model == "qwen" else {}
    fused, graph, again = (edit(pipe, call, runner=x, **CASES[name][0]) for x in ("fused", "graph", "graph"))
    assert graph.stats.captures > 4 and again.stats.captures == 0 and passes(again) == CASES[name][1]
    assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)
    # a draft of both branches in between takes no harm
    edit(pipe, call, runner="graph", draft_guidance=True, **CASES[name][0])
    assert torch.equal(edit(pipe, call, runner="graph", **CASES[name][0]).images, fused.images)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kept keys", "half draft", "two-step solver"])
@pytest.mark.parametrize("model", ["flux", "qwen"])
def test_by_graphs_on_a_device(model, name):
    pipe, call = made(model).to("cuda", torch.bfloat16), TWO_LENGTHS if model == "qwen" else {}
    eager, fused, graph, again = (
        edit(pipe, call, runner=x, **CASES[name][0]) for x in ("eager", "fused", "graph", "graph")
    )
    assert (graph.stats.runner, graph.stats.captures > 4, again.stats.captures) == ("graph", True, 0)
    assert passes(again) == CASES[name][1]
    assert torch.equal(graph.images, fused.images) and torch.equal(again.images, fused.images)
    assert (fused.images - eager.images).norm() < 0.03 * eager.images.norm()
