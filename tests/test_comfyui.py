# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's nodes on a recorded interface of the host: the same numbers as our pipeline's, nothing left behind."""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path

import comfyui_standin as host
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import tiny_pipeline

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline
from specedit_kernels.engine.model import Pictures, Text
from specedit_kernels.sampling.grid import pack, unpack
from specedit_kernels.sampling.layout import build_layout

REPOSITORY = Path(__file__).resolve().parents[1]
SIGMAS = [1.0, 0.9, 0.8, 0.65, 0.5, 0.25, 0.0]
COUNTS = (2, 2, 2)
SIZE, GRID, TEXT = (96, 64), (6, 4), 5
FURTHER_NOISE = 0x5EED
PAPER = dict(quality="paper")


@pytest.fixture
def comfy(monkeypatch):
    """(what was called of the host, hosts.comfyui's modules)."""
    state = host.install(monkeypatch)
    names = ("model", "codec", "sampler", "nodes")
    for name in names:
        setattr(state, name, importlib.import_module(f"specedit_kernels.hosts.comfyui.{name}"))
    yield state
    for name in [n for n in sys.modules if n.startswith("specedit_kernels.hosts.comfyui")]:
        del sys.modules[name]


class Pipeline(SpecEditFluxKontextPipeline):
    def _plain_sigmas(self, steps, tokens, given):
        return list(SIGMAS)


@functools.cache
def models():
    """The host's VAE and transformer, and the pipeline with weights of its own that are the same."""
    theirs, ours = tiny_pipeline(), tiny_pipeline()
    pipe = Pipeline(**ours.components)
    pipe.set_progress_bar_config(disable=True)
    return host.VAE(theirs.vae), host.Flux(theirs.transformer), theirs.vae.config, pipe


class Edit:
    """One edit, by the pipeline and by the host's sampler."""

    def __init__(self, comfy):
        self.comfy = comfy
        torch.manual_seed(3)
        self.image = torch.rand(1, *SIZE, 3)
        self.embeds, self.pooled = torch.randn(1, TEXT, 32), torch.randn(1, 16)
        self.noise = torch.randn(1, 16, SIZE[0] // 8, SIZE[1] // 8)
        self.vae, flux, config, self.pipe = models()
        flux.calls.clear()
        self.base = host.BaseModel(flux, config.scaling_factor, config.shift_factor)
        with torch.no_grad():
            self.reference = self.base.process_latent_in(self.vae.encode(self.image))

    def guider(self, **further):
        return host.Guider(self.base, self.conds(self.embeds, self.pooled, **further))

    def conds(self, embeds, pooled, **further):
        return dict(
            c_crossattn=host.Condition(embeds), y=host.Condition(pooled),
            guidance=host.Condition(torch.tensor([3.5])), ref_latents=host.Condition([self.reference]), **further,
        )  # fmt: skip

    def sampler(self, mask=None, preserve=False, **options):
        config = SpecEditConfig(stages=COUNTS, **(PAPER | options))
        return self.comfy.sampler.SpecEditSampler(config, self.vae, self.image, mask, preserve)

    def found(self, callback=None, seed=7, **options):
        guider = self.guider()
        return guider.sample(self.sampler(**options), self.noise, torch.tensor(SIGMAS), seed, callback)

    def expected(self, mask=None, seed=7, call=None, **options):
        output = self.pipe(
            image=self.image.movedim(-1, 1), prompt_embeds=self.embeds, pooled_prompt_embeds=self.pooled,
            height=SIZE[0], width=SIZE[1], max_area=math.prod(SIZE), guidance_scale=3.5, latents=pack(self.noise),
            generator=torch.Generator().manual_seed(seed + FURTHER_NOISE), mask_image=mask,
            specedit=SpecEditConfig(**(dict(stages=COUNTS, runner="eager") | PAPER | options)), output_type="latent",
            **(call or {}),
        )  # fmt: skip
        return unpack(output.images, GRID), output


def half_mask():
    mask = torch.zeros(1, *SIZE)
    mask[:, :32, :32] = 1
    return mask


FOUND = dict(dilation=0, max_active=1.0, relative=0.0)  # with a threshold that finds some of the blocks
CASES = {
    "draft": FOUND,
    "draft, first step at full resolution": dict(FOUND, draft="full_step"),
    "draft, latent metric": dict(FOUND, metric="latent"),
    "mask": dict(mask=half_mask()),
    "mask, locked": dict(mask=half_mask(), finish="locked"),
    "cached keys and values": dict(mask=half_mask(), finish="locked", kv_refresh=2),
    "bracketed keys and values": dict(mask=half_mask(), finish="locked", kv_refresh="bracket"),
    "half draft": dict(FOUND, draft="half"),
    "coarse steps over kept keys and values": dict(FOUND, coarse_refresh=3),
    "no key bias": dict(mask=half_mask(), key_bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_pipeline(comfy, name):
    edit, case = Edit(comfy), CASES[name]
    if "mask" not in case:
        scores = edit.expected(**case, threshold=4.0)[1].scores
        case = dict(case, threshold=float(scores.quantile(0.9)))
    expected, output = edit.expected(**case)
    assert 0 < output.mask.float().mean() < 1, "the case shall have mixed steps"
    torch.testing.assert_close(edit.found(**case), expected, rtol=0, atol=2e-4)
    mixed = [override for _, override in edit.base.diffusion_model.calls]
    assert any(mixed) and not all(mixed)


# of six steps: with guidance, without it
_EVERY_SECOND = ["coarse", "mixed", "active", "mixed", "active", "mixed"]
_EVERY_THIRD = ["coarse", "mixed", "active", "active", "mixed", "active"]
GUIDED_STEPS = {
    "fast": (_EVERY_THIRD, ["mixed", *["active"] * 5]),
    "best": (_EVERY_SECOND, _EVERY_SECOND),
    "balanced": (_EVERY_SECOND, _EVERY_SECOND),
}


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "apart"])
@pytest.mark.parametrize("quality", GUIDED_STEPS)
def test_a_guider_with_guidance_has_its_values(comfy, quality, together):
    """As the pipeline's true guidance, whose draft is guided too, and whose text is computed in each step."""
    edit, mask = Edit(comfy), half_mask()
    embeds, pooled = torch.randn_like(edit.embeds), torch.randn_like(edit.pooled)
    sampler = comfy.sampler.SpecEditSampler(SpecEditConfig(quality=quality), edit.vae, edit.image, mask)
    found = []
    for negative, cfg in ((edit.conds(embeds, pooled), 4.0), (edit.conds(embeds, pooled), 1.0), (None, 4.0)):
        guider = host.Guider(edit.base, edit.conds(edit.embeds, edit.pooled), None, negative, cfg, together)
        latents = guider.sample(sampler, edit.noise, torch.tensor(SIGMAS), 7)
        found.append((latents, [step.stage for step in sampler.result[1].steps]))
        assert sampler.result[1].config == SpecEditConfig(quality=quality, lock_text=False).resolved(len(found) == 1)
    with_guidance, without = GUIDED_STEPS[quality]
    assert found[0][1] == with_guidance and [stage for stage in found[1][1] if stage != "bracket"] == without
    assert found[1][1] == found[2][1] and torch.equal(found[1][0], found[2][0])
    call = dict(true_cfg_scale=4.0, negative_prompt_embeds=embeds, negative_pooled_prompt_embeds=pooled)
    call["sigmas"] = SIGMAS[:-1]
    options = dict(quality=quality, stages=None, lock_text=False, draft_guidance=True)
    expected, output = edit.expected(mask, call=call, **options)
    assert [step.stage for step in output.stats.steps] == with_guidance
    torch.testing.assert_close(found[0][0], expected, rtol=0, atol=1e-3)


def test_guidance_of_other_guiders(comfy):
    """One with two scales of its own has the former one's scale at its default."""
    guider = Edit(comfy).guider()
    guider.cfg1 = 3.0
    assert not comfy.sampler._guides(guider), "no negative conditioning"
    guider.conds["negative"] = guider.conds["positive"]
    assert comfy.sampler._guides(guider)
    guider.cfg1 = guider.cfg2 = 1.0
    assert not comfy.sampler._guides(guider)
    guider.cfg2 = 0.0
    assert comfy.sampler._guides(guider)


def test_tolerance_sees_the_key_bias(comfy):
    edit = Edit(comfy)
    apart = (edit.found(mask=half_mask()) - edit.found(mask=half_mask(), key_bias=False)).abs().max()
    assert apart > 2e-3


def test_nothing_stays(comfy):
    edit = Edit(comfy)
    guider = edit.guider()
    weights = {name: x.clone() for name, x in edit.base.diffusion_model.state_dict().items()}
    first = guider.sample(edit.sampler(), edit.noise, torch.tensor(SIGMAS))
    other = Edit(comfy)
    other.reference, other.image = other.reference.flip(-1), other.image.flip(2)
    guider.sample(other.sampler(), edit.noise, torch.tensor(SIGMAS))
    assert guider.model_options == {"transformer_options": {}}
    assert torch.equal(guider.sample(edit.sampler(), edit.noise, torch.tensor(SIGMAS)), first)
    after = edit.base.diffusion_model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in weights.items())


def test_other_wrappers_stay_in_use(comfy):
    edit, seen = Edit(comfy), []

    def wrapper(executor, *args, **kwargs):
        seen.append(args[0].shape)
        return executor(*args, **kwargs)

    guider = edit.guider()
    host.add_wrapper_with_key("diffusion_model", "another", wrapper, guider.model_options, is_model_options=True)
    guider.sample(edit.sampler(mask=half_mask()), edit.noise, torch.tensor(SIGMAS))
    assert len(seen) == len(SIGMAS) - 1


def test_interrupted(comfy):
    edit = Edit(comfy)
    first = edit.found()

    def interrupt(index, *rest):
        comfy.interrupted = index == 2

    with pytest.raises(host.Interrupted):
        edit.found(callback=interrupt)
    comfy.interrupted = False
    assert torch.equal(edit.found(), first)


def test_progress_and_preview(comfy):
    edit, seen_by_callback = Edit(comfy), []
    out = edit.found(callback=lambda *args: seen_by_callback.append(args), mask=half_mask())
    assert [index for index, *_ in seen_by_callback] == list(range(len(SIGMAS) - 1))
    assert all(x.shape == edit.noise.shape and total == len(SIGMAS) - 1 for _, x, _, total in seen_by_callback)
    torch.testing.assert_close(seen_by_callback[-1][1], out, rtol=0, atol=1e-5)
    mixed = seen_by_callback[3][1]  # the source's latents nowhere, the edit's where the mask is
    assert (mixed[..., :4, :4] - seen_by_callback[1][1][..., :4, :4]).abs().max() > 1e-3
    assert torch.equal(mixed[..., 4:, :], seen_by_callback[1][1][..., 4:, :])


def test_transformer_is_loaded_again_after_the_vae(comfy):
    edit = Edit(comfy)
    guider = edit.guider()
    guider.sample(edit.sampler(threshold=0.02), edit.noise, torch.tensor(SIGMAS))
    # the VAE reads the decoder's features; the transformer's next step comes after them
    assert comfy.loaded == [[guider.model_patcher], ["the VAE"], ["the VAE"], ["the VAE"], [guider.model_patcher]]


def test_preserve(comfy):
    edit = Edit(comfy)
    kept, free = edit.found(mask=half_mask(), preserve=True), edit.found(mask=half_mask())
    assert torch.equal(kept[..., :4, :4], free[..., :4, :4])
    assert torch.equal(kept[..., 4:, :], edit.reference[..., 4:, :]) and not torch.equal(kept, free)


def test_noise_mask_of_the_latent(comfy):
    edit = Edit(comfy)
    mask = torch.zeros(1, 16, SIZE[0] // 8, SIZE[1] // 8)
    mask[..., :4, :4] = 1
    found = edit.guider().sample(edit.sampler(), edit.noise, torch.tensor(SIGMAS), 7, denoise_mask=mask)
    assert torch.equal(found, edit.found(mask=half_mask()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sigmas=[0.8, 0.4, 0.2, 0.0]), "sigmas: expected to begin at 1"),
        (dict(sigmas=[1.0, 0.5, 0.2]), "sigmas: expected them to fall to 0"),
        (dict(noise=torch.zeros(1, 16, 12, 6)), "latent_image: expected sides in multiples of 32 pixels, got 48 x 96"),
        (dict(cond=("control", object())), "positive: ControlNet"),
        (dict(cond=("area", (1, 1, 0, 0))), "positive: areas"),
        (dict(gone="ref_latents"), "positive: expected a reference latent"),
        (dict(method="uxo"), "reference_latents_method: expected one of"),
        (dict(attention_mask=torch.ones(1, 2, 2)), "conditioning: attention masks"),
        (dict(c_concat=torch.ones(1, 16, 12, 8)), "positive: a model with further input channels"),
    ],
)
def test_refusals(comfy, change, message):
    edit = Edit(comfy)
    further = {name: host.Condition(change[name]) for name in ("attention_mask", "c_concat") if name in change}
    if "method" in change:
        further["ref_latents_method"] = host.Condition(change["method"])
    guider = edit.guider(**further)
    cond = guider.conds["positive"][0]
    if "cond" in change:
        cond.update([change["cond"]])
    cond["model_conds"].pop(change.get("gone"), None)
    with pytest.raises(ValueError, match=message):
        sampler = edit.sampler(mask=half_mask())
        guider.sample(sampler, change.get("noise", edit.noise), torch.tensor(change.get("sigmas", SIGMAS)))


def test_foreign_model(comfy):
    edit = Edit(comfy)
    guider = edit.guider()
    guider.inner_model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model: .* got Linear"):
        guider.sample(edit.sampler(), edit.noise, torch.tensor(SIGMAS))


def test_reference_places(comfy):
    # what the host's forward gives for these, in tokens
    grids = [(6, 4), (4, 6), (5, 3)]
    assert comfy.model.reference_places(grids, "index") == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert comfy.model.reference_places(grids, "offset") == [(1, 0, 0), (1, 6, 0), (1, 0, 6)]


def layout_of(pictures, blocks, batch=1):
    order = torch.arange(6).repeat(batch, 1)
    count = torch.tensor(blocks)
    others = sum(math.prod(grid) for _, grid in pictures.others)
    return build_layout(order, count, pictures.target, 2 * (6 + 3 * max(blocks)) + others, others=others)


@pytest.mark.parametrize("kind, corner, text", [("HostFlux", (0.0, 0.0), 0), ("HostQwen", (-3.0, -2.0), 3)])
def test_ids(comfy, kind, corner, text):
    pictures = Pictures((6, 4), ((6, 4), (2, 4)))
    model = getattr(comfy.model, kind)(None, None, None, "offset")
    made = model.mixed_layout(None, pictures, layout_of(pictures, [1]), True, False)
    ids = made.ids[0]
    row, column = corner
    assert ids[0].tolist() == [0, row, column] and ids[3].tolist() == [0, row + 1, column + 1]
    assert ids[4].tolist() == [0, row + 0.5, column + 2.5]  # a coarse token at its block's centre
    assert ids[9].tolist() == [1, row, column]  # the condition has the target's position
    beside = (0.0, 4.0) if kind == "HostFlux" else (-1.0, 2.0)
    below = (6.0, 0.0) if kind == "HostFlux" else (5.0, -2.0)
    assert ids[18].tolist() == [1, *(beside if 2 + 6 > 4 + 4 else below)]
    assert (made.text_from or 0) == text


def test_qwen_ids_are_replaced_in_its_forward(comfy):
    transformer = host.QwenImageTransformer2DModel()
    pictures = Pictures((6, 4), ((6, 4),))
    given = []

    def predict(x, sigma):
        executor = host.Executor(transformer._forward, transformer, [model.wrapper])
        given.append(x.shape)
        out = executor.execute(torch.cat([x, x]), sigma, torch.zeros(2, 3, 8), None, None, ["a reference"],
                               {"uuids": ["a", "b"]})  # fmt: skip
        return out[:1]

    model = comfy.model.HostQwen(transformer, None, predict)
    layout = model.mixed_layout(None, pictures, layout_of(pictures, [1]), True, False)
    tokens = torch.randn(1, layout.slots, 64)
    velocity = model.velocity(Text(torch.zeros(1, 3, 8)), tokens, torch.tensor(500.0), layout)
    torch.testing.assert_close(velocity, (tokens - 2 * tokens) / 0.5)
    assert given == [(1, 16, 1, 2 * layout.slots, 2)]
    [(ids, references, override)] = transformer.seen
    assert torch.equal(ids[:, 3:], layout.ids.repeat(2, 1, 1)) and references is None
    assert ids[1, :3].tolist() == [[3] * 3, [4] * 3, [5] * 3]
    assert override.branches == ["a", "b"] and override.references
    assert not transformer.pe_embedder._forward_pre_hooks


def attention_inputs(branches, batch, text, slots):
    torch.manual_seed(4)
    return [torch.randn(branches * batch, 2, text + slots, 16) for _ in range(3)]


def test_attention_of_two_branches(comfy):
    """Key bias, empty slots and a branch without references, against a plain softmax; both layouts of the host."""
    pictures, text = Pictures((6, 4), ((6, 4),)), 3
    order = layout_of(pictures, [1, 2], batch=2)
    model = comfy.model.HostFlux(None, None, None)
    layout = model.mixed_layout(None, pictures, order, True, False)
    q, k, v = attention_inputs(2, 2, text, layout.slots)
    for seen in (True, False):
        bias = torch.nn.functional.pad(layout.key_bias, (text, 0))
        slot = torch.arange(layout.slots)
        gone = slot >= order.lengths[:, None]
        if not seen:
            gone = gone | ~order.target_slots()
        bias = bias.masked_fill(torch.nn.functional.pad(gone, (text, 0)), float("-inf")).repeat(2, 1)
        scores = q @ k.transpose(-1, -2) / 4 + bias[:, None, None]
        plain = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        used = torch.nn.functional.pad(slot < order.lengths[:, None], (text, 0), value=True).repeat(2, 1)
        call = lambda: comfy.model.MixedAttention(layout, ["a", "b"], seen)  # noqa: E731
        out = call()(None, q, k, v, 2, skip_reshape=True)
        torch.testing.assert_close(out[used], plain[used], rtol=0, atol=1e-5)
        flat = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        torch.testing.assert_close(call()(None, *flat, 2), out)
        again = call()(None, q, k, v, 2, skip_reshape=True, skip_output_reshape=True)
        torch.testing.assert_close(again.transpose(1, 2).flatten(2), out)


def test_attention_over_cached_keys(comfy):
    """A call that brings the fine target tokens renews theirs alone, each branch its own."""
    pictures, text = Pictures((6, 4), ((6, 4),)), 3
    order = layout_of(pictures, [1, 2], batch=2)
    model = comfy.model.HostFlux(None, None, None)
    layout = model.mixed_layout(None, pictures, order, True, True)
    first = model.active_layout(None, layout, 8)
    q, k, v = attention_inputs(2, 2, text, layout.slots)
    comfy.model.MixedAttention(layout, ["a", "b"], True)(None, q, k, v, 2, skip_reshape=True)
    q2, k2, v2 = (x[:, :, : text + 8] + 1 for x in (q, k, v))
    fresh = torch.arange(text + 8) < (order.fine_lengths[:, None] + text).repeat(2, 1)
    for old, new in ((k, k2), (v, v2)):
        old[:, :, : text + 8] = torch.where(fresh[:, None, :, None], new, old[:, :, : text + 8])
    # the branches may come one by one, and in another order
    for names, rows in ((["a", "b"], slice(0, 4)), (["b"], slice(2, 4))):
        half = [x[rows] for x in (q2, k2, v2)]
        out = comfy.model.MixedAttention(first, names, True)(None, *half, 2, skip_reshape=True)
        whole = comfy.model.MixedAttention(model.mixed_layout(None, pictures, order, True, False), names, True)(
            None, torch.cat([q2[rows], q[rows, :, text + 8 :]], 2), k[rows], v[rows], 2, skip_reshape=True
        )
        used = fresh[rows]
        torch.testing.assert_close(out[used], whole[:, : text + 8][used], rtol=0, atol=1e-5)


def test_another_attention_is_the_hosts(comfy):
    pictures = Pictures((6, 4), ((6, 4),))
    layout = comfy.model.HostFlux(None, None, None).mixed_layout(None, pictures, layout_of(pictures, [1]), True,
                                                                 False)  # fmt: skip
    attention = comfy.model.MixedAttention(layout, ["a"], True)
    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 4, 16)
    assert attention(lambda *args, **kwargs: "stock", q, k, k, 2, skip_reshape=True) == "stock"


# the nodes


def nodes_of(comfy):
    extension = comfy.nodes.SpecEditExtension()
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def test_schemas_fit_what_runs(comfy):
    for name, node in nodes_of(comfy).items():
        schema, parameters = node.define_schema(), inspect.signature(node.execute).parameters
        assert [i.id for i in schema.inputs if i.optional] == [
            i.id for i in schema.inputs if parameters[i.id].default is not inspect.Parameter.empty
        ], name
        assert {i.id for i in schema.inputs} == set(parameters)


def test_workflow_fits_the_nodes(comfy):
    workflow = json.loads((REPOSITORY / "integrations/comfyui/workflow.json").read_text())
    ours = nodes_of(comfy)
    used = [node for node in workflow.values() if node["class_type"] in ours]
    assert {node["class_type"] for node in used} == {"SpecEditScale", "SpecEditSampler", "SpecEditSample",
                                                     "SpecEditComposite"}  # fmt: skip
    for node in used:
        inputs = ours[node["class_type"]].define_schema().inputs
        assert {i.id for i in inputs if not i.optional} <= set(node["inputs"]) <= {i.id for i in inputs}
        for i in inputs:
            if i.kind == "Combo" and i.id in node["inputs"]:
                assert node["inputs"][i.id] in i.options
    for node in workflow.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow


def test_integration_folder(comfy):
    path = REPOSITORY / "integrations/comfyui/__init__.py"
    spec = importlib.util.spec_from_file_location("a_custom_node", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    names = [node.define_schema().node_id for node in asyncio.run(extension.get_node_list())]
    assert names == ["SpecEditScale", "SpecEditSampler", "SpecEditSample", "SpecEditMask", "SpecEditComposite"]


def test_sample_gives_the_mask(comfy):
    edit, nodes = Edit(comfy), nodes_of(comfy)
    [sampler] = (
        nodes["SpecEditSampler"]
        .execute(edit.vae, edit.image, "paper", False, half_mask(), finish="locked", kv_refresh="2")
        .args
    )
    assert sampler.config == SpecEditConfig(quality="paper", finish="locked", kv_refresh=2)
    for quality in ("fast", "balanced"):  # a model that computes the text in each call
        [made] = nodes["SpecEditSampler"].execute(edit.vae, edit.image, quality, False).args
        assert made.config == SpecEditConfig(quality=quality)
    sigmas = torch.tensor(SIGMAS)
    latent, mask, stats = nodes["SpecEditSample"].execute(edit.noise, edit.guider(), sampler, sigmas,
                                                          {"samples": edit.noise}).args  # fmt: skip
    assert mask.shape == (1, *SIZE) and torch.equal(mask, half_mask())
    assert latent["samples"].shape == edit.noise.shape and stats.startswith("SpecEdit: edited 16.7%")
    assert sampler.result is None, "the SAMPLER of the graph keeps nothing of a run"
    with pytest.raises(TypeError, match="sampler: expected one of node SpecEdit sampler, got object"):
        nodes["SpecEditSample"].execute(edit.noise, edit.guider(), object(), sigmas, {"samples": edit.noise})


@pytest.mark.slow
@torch.no_grad()
def test_mask_from_two_images(comfy):
    node = nodes_of(comfy)["SpecEditMask"]
    vae = host.VAE(AutoencoderKL.from_pretrained(REPOSITORY / "specedit_kernels/assets/tiny_kontext", subfolder="vae"))
    picture = PIL.Image.open(REPOSITORY / "specedit_kernels/assets/example.png").convert("RGB").resize((128, 128))
    source = torch.from_numpy(np.asarray(picture) / np.float32(255))[None]
    edited = source.clone()
    edited[:, 64:, 64:] = torch.tensor([0.9, 0.1, 0.2])
    [same] = node.execute(vae, source, source, 0.0, 1).args
    assert same.shape == (1, 128, 128) and not same.any()
    [found] = node.execute(vae, source, edited, 0.0, 0).args
    print(found[0, ::16, ::16])
    assert found[:, 64:, 64:].mean() > 0.8 and not found[:, :32].any() and not found[:, :, :32].any()
    [grown] = node.execute(vae, source, edited, 0.0, 1).args
    assert grown.sum() > found.sum() and (grown >= found).all()
    # a source of another size: the mask has the source's
    smaller = torch.nn.functional.interpolate(source.movedim(-1, 1), (120, 124), mode="bilinear").movedim(1, -1)
    [found] = node.execute(vae, smaller, edited, 0.0, 0).args
    assert found.shape == (1, 120, 124) and found[:, 64:, 64:].mean() > 0.8
    with pytest.raises(ValueError, match="edited: expected as many pictures as sources or one, got 3"):
        node.execute(vae, source.repeat(2, 1, 1, 1), edited.repeat(3, 1, 1, 1), 0.0, 0)


def test_composite_keeps_the_source(comfy):
    node = nodes_of(comfy)["SpecEditComposite"]
    source, edited, mask = torch.rand(1, 200, 130, 3), torch.rand(1, *SIZE, 3), half_mask()
    [found] = node.execute(source, edited, mask, 4, True).args
    assert found.shape == source.shape
    assert torch.equal(found[:, 100:], source[:, 100:]) and not torch.equal(found[:, :50], source[:, :50])


@pytest.mark.parametrize("size, expected", [((700, 1000), (864, 1216)), ((64, 32), (1440, 736)), ((1024, 1024), None)])
def test_scale(comfy, size, expected):
    [found] = nodes_of(comfy)["SpecEditScale"].execute(torch.rand(1, *size, 3), 1.0).args
    assert found.shape[1:3] == (expected or size)


def test_stages_say_what_they_lack(comfy):
    edit = Edit(comfy)
    for config, message in (
        (SpecEditConfig(stages=(0, 4, 2), **PAPER), "counts: expected a coarse step"),
        (SpecEditConfig(stages=COUNTS, draft="quarter", **PAPER), "draft_sigmas: expected those"),
    ):
        sampler = comfy.sampler.SpecEditSampler(config, edit.vae, edit.image)
        with pytest.raises(ValueError, match=message):
            edit.guider().sample(sampler, edit.noise, torch.tensor(SIGMAS))
