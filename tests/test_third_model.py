# SPDX-License-Identifier: Apache-2.0
"""A model that the package does not know, wholly in this file: the engine runs all its stages with it.

Unlike the shipped ones it has tokens of 8 pixels and 48 channels, blocks of one kind under another name, a forward that
hands no arguments on to its attention processors, positions that begin far from the origin, a schedule shift and a
guidance of its own, a codec of its own, and a call with few of the usual arguments.
"""

import importlib
import textwrap
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import AttentionMixin
from model_proofs import cached_step_is_whole, mixed_step_is_dense, run_of
from tiny_models import paper, tiny_image

from specedit_kernels import (
    FlashEditConfig,
    SpecEditConfig,
    disable_specedit,
    enable_specedit,
    supported_models,
)
from specedit_kernels.engine import registry
from specedit_kernels.engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from specedit_kernels.engine.model import EditModel, Text, in_order, key_bias_in_order
from specedit_kernels.engine.pipeline import SpecEditMixin, preprocess
from specedit_kernels.engine.sequence import StepLayout, mixed_step_layout, whole_step_layout
from specedit_kernels.flash_edit import flash_pipelines
from specedit_kernels.sampling.grid import pack, token_positions, unpack
from specedit_kernels.sampling.layout import table_positions

pytestmark = pytest.mark.usefixtures("one_thread")

# the model, as its authors would publish it

CHANNELS, HEADS, DIM, DEPTH = 12, 2, 16, 3


class ToyProcessor:
    def __call__(self, attn, x, cos, sin):
        q, k, v = (y.unflatten(-1, (HEADS, DIM)) for y in attn.qkv(x).chunk(3, dim=-1))
        q, k = (turned(attn.norm(y), cos, sin) for y in (q, k))
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return attn.out(out.transpose(1, 2).flatten(2))


def turned(x, cos, sin):
    pairs = x.unflatten(-1, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos[:, None] + across * sin[:, None]


class ToyAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.norm = torch.nn.RMSNorm(DIM, eps=1e-6)
        self.out = torch.nn.Linear(HEADS * DIM, HEADS * DIM)
        self.processor = ToyProcessor()

    def get_processor(self):
        return self.processor

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, x, cos, sin):
        return self.processor(self, x, cos, sin)


class ToyLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.mixer = torch.nn.LayerNorm(HEADS * DIM), ToyAttention()
        self.behind, self.wide = torch.nn.LayerNorm(HEADS * DIM), torch.nn.Linear(HEADS * DIM, 64)
        self.narrow = torch.nn.Linear(64, HEADS * DIM)

    def forward(self, x, time, cos, sin):
        x = x + self.mixer(self.before(x) + time, cos, sin)
        return x + self.narrow(F.silu(self.wide(self.behind(x) * (1 + time))))


class ToyTransformer(ModelMixin, ConfigMixin, AttentionMixin):
    @register_to_config
    def __init__(self, depth: int = DEPTH):
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(4 * CHANNELS, HEADS * DIM), torch.nn.Linear(HEADS * DIM, 4 * CHANNELS)
        self.time = torch.nn.Linear(8, HEADS * DIM)
        self.layers = torch.nn.ModuleList(ToyLayer() for _ in range(depth))

    def rotary(self, ids):
        """[n, 3] -> cos, sin [n, DIM], of neighbouring pairs of channels: 2, 3 and 3 pairs an axis."""
        parts = [ids[:, i, None].float() / 30 ** torch.linspace(0, 1, n) for i, n in enumerate((2, 3, 3))]
        angles = torch.cat(parts, dim=1)
        return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)

    def forward(self, spots, words, sigma, ids):
        x = torch.cat([words, self.enter(spots)], dim=1)
        time = self.time((sigma[:, None] * torch.arange(1, 9)).sin())[:, None]
        cos, sin = self.rotary(ids)
        for layer in self.layers:
            x = layer(x, time, cos, sin)
        return self.leave(x[:, words.shape[1] :])


class ToyAutoencoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, side: int = 4):
        super().__init__()
        self.down = torch.nn.Conv2d(3, CHANNELS, side, stride=side)
        self.up = torch.nn.ConvTranspose2d(CHANNELS, 3, side, stride=side)


class ToyWords(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, letters: int = 128):
        super().__init__()
        self.table = torch.nn.Embedding(letters, HEADS * DIM)

    def forward(self, lines):
        longest = max(map(len, lines)) + 1  # an empty line has a token too
        return self.table(torch.tensor([[ord(c) % 128 for c in line.ljust(longest)] for line in lines]))


def where_words_stand(length):
    return torch.arange(length, dtype=torch.float32)[:, None].expand(length, 3)


def toy_shift(tokens, steps):
    return 0.3 + tokens / 100 + steps / 50


class ToyEditPipeline(DiffusionPipeline):
    def __init__(self, transformer, vae, words, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, words=words, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)

    def check_inputs(self, prompt, image):
        if not isinstance(prompt, (str, list)):
            raise ValueError("prompt: expected text")

    @torch.no_grad()
    def __call__(self, image, prompt=None, negative_prompt=None, num_inference_steps=5, strength_of_text=2.0,
                 generator=None, output_type="pil", return_dict=True):  # fmt: skip
        lines = [prompt] if isinstance(prompt, str) else prompt
        pixels = self.image_processor.preprocess(image)
        source = pack(self.vae.down(pixels)).repeat_interleave(len(lines) // len(pixels), dim=0)
        grid = tuple(side // 8 for side in pixels.shape[-2:])
        generators = generator if isinstance(generator, list) else [generator]
        each = len(lines) // len(generators)
        drawn = [torch.randn(each, CHANNELS, 2 * grid[0], 2 * grid[1], generator=g) for g in generators]
        tokens = pack(torch.cat(drawn))
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, mu=toy_shift(tokens.shape[1], num_inference_steps))
        spots = torch.cat([token_positions(grid)] * 2)
        numbers = torch.tensor([40.0, 47.0]).repeat_interleave(tokens.shape[1])[:, None]
        branches = [lines]
        if strength_of_text > 1:  # with or without a negative prompt
            against = "nothing" if negative_prompt is None else negative_prompt
            branches.append([against] * len(lines) if isinstance(against, str) else against)
        for t in self.scheduler.timesteps:
            found = []
            for branch in branches:
                words = self.words(branch)
                ids = torch.cat([where_words_stand(words.shape[1]), torch.cat([numbers, 9 + spots], dim=1)])
                sigma = t.expand(len(lines)) / 1000
                both = torch.cat([tokens, source], dim=1)
                found.append(self.transformer(both, words, sigma, ids)[:, : tokens.shape[1]])
            velocity = found[0] if len(found) == 1 else found[0] + (strength_of_text - 1) * (found[0] - found[1])
            tokens = self.scheduler.step(velocity, t, tokens, return_dict=False)[0]
        if output_type == "latent":
            return (tokens,)
        return (self.image_processor.postprocess(self.vae.up(unpack(tokens, grid)), output_type=output_type),)


# the model's file, as docs/add_a_model.md asks for it


class ToyCodec:
    token, patch = 8, 2

    def __init__(self, vae):
        self.vae = vae

    def encode(self, pixels):
        return self.vae.down(pixels)

    def decode(self, latents):
        return self.vae.up(latents)

    def features(self, latents):
        return [latents, self.vae.up(latents)]


class SpecEditToyProcessor(SpecEditAttnProcessor):
    def __call__(self, attn, x, cos, sin):
        if self.layout is None:
            return self.inner(attn, x, cos, sin)
        q, k, v = (y.unflatten(-1, (HEADS, DIM)) for y in attn.qkv(x).chunk(3, dim=-1))
        return attn.out(joint_attention(self, None, (attn.norm(q), attn.norm(k), v), self.layout))


@dataclass(frozen=True)
class ToyLayout:
    ids: torch.Tensor
    attention: StepLayout | None = None


def toy_positions(table):
    """The engine's positions (picture, row, column) as the model has them."""
    return torch.stack([40 + 7 * table[:, 0], 9 + table[:, 1], 9 + table[:, 2]], dim=1)


class ToyModel(EditModel):
    heads = (HEADS, DIM)

    def embedder(self):
        return self.transformer.enter

    def dense_layout(self, text, pictures, grids):
        places = [F.pad(token_positions(grid), (1, 0), value=float(i)) for i, grid in enumerate(grids)]
        return ToyLayout(torch.cat([where_words_stand(text.embeds.shape[1]), toy_positions(torch.cat(places))]))

    def watched_layout(self, text, pictures, grids, watch):
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        tables = tuple(x[None] for x in self.transformer.rotary(layout.ids))
        return replace(layout, attention=whole_step_layout(length, tables, batch, watch=watch))

    def mixed_layout(self, text, pictures, layout, key_bias, cached):
        batch, length = text.embeds.shape[:2]
        table = table_positions(pictures.target, None, pictures.others, pictures.coarse_others)
        ahead, behind = (self.transformer.rotary(x) for x in (where_words_stand(length), toy_positions(table)))
        cos, sin = (torch.cat([a.expand(batch, -1, -1), in_order(b, layout)], dim=1) for a, b in zip(ahead, behind))
        bias = F.pad(key_bias_in_order(pictures, layout), (length, 0)) if key_bias else None
        attention = mixed_step_layout(length, (cos, sin), layout, bias, self.new_cache() if cached else None)
        return ToyLayout(torch.zeros(length + layout.capacity, 3), attention)

    def active_layout(self, text, layout, first, lock_text=False):
        made = super().active_layout(text, layout, first, lock_text)
        return replace(made, ids=layout.ids[: made.attention.sequence.cos.shape[1]])

    def velocity(self, text, tokens, conditioning, layout):
        start = layout.attention.start if layout.attention else 0
        with with_layout(self.transformer, layout.attention, whole=True):
            return self.transformer(tokens, text.embeds[:, start:], conditioning.expand(len(tokens)) / 1000, layout.ids)

    def guide(self, positive, negative, scale):
        return positive + (scale - 1) * (positive - negative)


class SpecEditToyEditPipeline(SpecEditMixin, ToyEditPipeline):
    """ToyEditPipeline with SpecEdit."""

    RUNNERS = ("eager",)
    TEXT = ("prompt",)
    TRUE_CFG = "strength_of_text"
    NEGATIVE = "nothing"

    def _size(self, call):
        first = call.image[0] if isinstance(call.image, list) else call.image
        return first.height // 16 * 16, first.width // 16 * 16

    def _encode_text(self, call, device, prompt):
        return Text(self.words([prompt] if isinstance(prompt, str) else prompt))

    def _pictures(self, call, device):
        pixels = preprocess(self.image_processor, call.image, call.height, call.width, device)
        return pixels, [pixels]

    def _model(self, runner, guidance, attention_kwargs):
        return ToyModel(self.transformer, self.vae, guidance, attention_kwargs)

    def _shift(self, tokens, steps):
        return toy_shift(tokens, steps)


TOY = registry.Model(
    name="toy",
    pipelines={ToyEditPipeline: SpecEditToyEditPipeline},
    processors={ToyProcessor: SpecEditToyProcessor},
    codecs={ToyAutoencoder: ToyCodec},
    command=lambda settings, scale: {} if scale is None else {"strength_of_text": scale},
)


@pytest.fixture(scope="module")
def toy():
    registry.register(TOY)
    yield TOY
    registry.unregister("toy")


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    parts = ToyTransformer().eval(), ToyAutoencoder().eval(), ToyWords().eval()
    pipe = ToyEditPipeline(*parts, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(toy, plain):
    enable_specedit(plain)
    yield plain
    disable_specedit(plain)


def options(config: Any = None, **more):
    generator = torch.Generator().manual_seed(1)
    given = dict(image=tiny_image(64, 96), prompt="make it blue", generator=generator, output_type="latent")
    return given | {"specedit": config} | more


def half():
    array = np.zeros((64, 96), np.uint8)
    array[:, :32] = 255
    return PIL.Image.fromarray(array)


GUIDED = [pytest.param(1.0, id="one branch"), pytest.param(3.0, id="guided")]


def test_it_is_known_while_it_is_registered(toy, plain):
    assert supported_models()["toy"] == ("ToyEditPipeline",)
    processors = list(plain.transformer.attn_processors.values())
    handle = enable_specedit(plain)
    assert type(plain) is SpecEditToyEditPipeline
    assert all(type(p) is SpecEditToyProcessor for p in plain.transformer.attn_processors.values())
    handle.disable()
    assert type(plain) is ToyEditPipeline
    assert [a is b for a, b in zip(plain.transformer.attn_processors.values(), processors)] == [True] * DEPTH


def test_a_model_is_forgotten(toy, plain):
    registry.unregister("toy")
    try:
        assert "toy" not in supported_models()
        with pytest.raises(TypeError, match="pipe: SpecEdit supports .*got ToyEditPipeline"):
            enable_specedit(plain)
    finally:
        registry.register(toy)


@pytest.mark.parametrize("strength", GUIDED)
def test_everything_selected_without_coarse_stage_is_the_plain_pipeline(pipe, strength):
    config = paper(stages=(0, 2, 3), draft="quarter", draft_steps=1, threshold=-1.0)
    found = pipe(**options(config, strength_of_text=strength))
    assert found.stats.fallback == "dense" and found.stats.nfe == 5
    stock = options(False, strength_of_text=strength, return_dict=False)
    assert torch.equal(found.images, pipe(**stock)[0])


@pytest.mark.parametrize("draft", ["coarse", "quarter", "full_step"])
def test_nothing_selected_is_the_source(pipe, draft):
    given = options(paper(draft=draft, draft_steps=2, threshold=4.0), output_type="pil")
    found = pipe(**given)
    assert found.stats.fallback == "source" and np.array_equal(found.images[0], given["image"])


DRAFTS = {
    "coarse": dict(draft="coarse"),
    "quarter": dict(draft="quarter", draft_steps=2),
    "full_step": dict(draft="full_step"),
    "mask": {},
}
ENDS = {
    "full": dict(stages=(1, 3, 2), finish="full", kv_refresh=1),
    "full, cached": dict(stages=(1, 3, 2), finish="full", kv_refresh=3),
    "expanded": dict(stages=(1, 3, 2), finish="full", unselected="coarse"),
    "locked": dict(stages=(1, 4, 0), finish="locked", kv_refresh=1),
    "locked, cached": dict(stages=(1, 4, 0), finish="locked", kv_refresh=3),
    "locked text": dict(stages=(1, 4, 0), finish="locked", kv_refresh=3, lock_text=True),
    "bracket": dict(stages=(1, 4, 0), finish="locked", kv_refresh="bracket"),
    "fp8": dict(stages=(1, 4, 0), finish="locked", kv_refresh=3, kv_cache_dtype="fp8"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_all_stages(pipe, draft, end):
    strength = 1.0 if draft == "quarter" else 3.0
    config = SpecEditConfig(runner="eager", **DRAFTS[draft] | ENDS[end]).resolved()
    given = options(config, strength_of_text=strength)
    if draft == "mask":
        given["mask_image"] = half()
    else:
        # a threshold that these scores have on both sides
        first = pipe(**given | {"specedit": replace(config, threshold=4.0)}).scores
        given["specedit"] = replace(config, threshold=first.quantile(0.9).item(), relative=0.0, dilation=0)
    found = pipe(**given)
    assert found.stats.fallback is None and 0 < found.stats.active[0] < 1
    names = [step.stage for step in found.stats.steps]
    assert ("active" in names) == (config.kv_refresh != 1) == (found.stats.kv_cache_bytes > 0)
    assert ("bracket" in names) == (config.kv_refresh == "bracket")
    assert ("full" in names) == (config.finish == "full")
    assert found.images.isfinite().all()
    inside, source = found.mask.flatten(1), pack(pipe.vae.down(pipe.image_processor.preprocess(given["image"])))
    assert not torch.isclose(found.images[inside], source[inside]).any(dim=-1).all()
    if config.finish == "locked":
        assert torch.equal(found.images[~inside], source[~inside])


@pytest.mark.parametrize("runner", ["fused", "graph", "compile"])
def test_without_a_fused_forward_edits_run_eagerly_and_say_so(pipe, runner, caplog):
    config = paper(stages=(0, 2, 0), finish="locked", kv_refresh=2, runner=runner, precision="fp8")
    vars(pipe).pop("_specedit_said", None)
    out = pipe(**options(config, mask_image=half()))
    assert out.stats.runner == "eager" and f"{type(pipe).__name__} has no other" in out.stats.runner_reason
    assert f"runner={runner!r}: steps run eagerly" in caplog.text
    assert out.stats.precision == "auto" and "precision='fp8': layers compute as they are" in caplog.text


@pytest.mark.parametrize("strength", GUIDED)
def test_a_mixed_step_of_all_blocks_is_a_dense_step(pipe, strength):
    mixed_step_is_dense(run_of(pipe, **options(paper(), strength_of_text=strength, mask_image=half())))


@pytest.mark.parametrize("lock_text", [False, True])
def test_a_step_over_cached_keys_is_the_whole_step_while_nothing_moves(pipe, lock_text):
    config = paper(stages=(0, 3, 1), kv_refresh=3, lock_text=lock_text)
    cached_step_is_whole(run_of(pipe, **options(config, mask_image=half())))


def test_a_batch_is_its_singles(pipe):
    config = paper(stages=(1, 2, 2))
    pictures, prompts = [tiny_image(64, 96, seed=i) for i in range(2)], ["make it blue", "make it pink"]
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipe(**options(config, image=pictures, prompt=prompts, generator=seeds, mask_image=half())).images
    for i in range(2):
        seed = torch.Generator().manual_seed(i)
        one = pipe(**options(config, image=pictures[i], prompt=prompts[i], generator=seed, mask_image=half())).images
        assert torch.allclose(both[i], one[0], atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, dict(bg_shield=False), dict(ssca=False), dict(bg_shield=False, layer=2)], ids=str
)
def test_flash_edit_runs_on_it(toy, plain, changes):
    pipe = flash_pipelines()[SpecEditToyEditPipeline](**plain.components)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(**options(FlashEditConfig(cosi=False, **changes), mask_image=half()))
    assert [step.stage for step in found.stats.steps][-1] == "edit" and found.images.isfinite().all()
    assert (found.stats.key_tokens is None) == ("bg_shield" not in changes)
    disable_specedit(pipe)


def test_flash_edit_names_the_models_own_guidance(toy, plain):
    pipe = flash_pipelines()[SpecEditToyEditPipeline](**plain.components)
    with pytest.raises(ValueError, match="strength_of_text: expected none with FlashEdit"):
        pipe(**options(FlashEditConfig(), strength_of_text=3.0))


def test_models_of_other_packages_are_found_by_their_entry_point(tmp_path, monkeypatch):
    (tmp_path / "somebodys_model.py").write_text(
        textwrap.dedent("""\
            from specedit_kernels.engine.registry import Model, register

            class SomebodysPipeline:
                pass

            register(Model("somebodys", {SomebodysPipeline: SomebodysPipeline}, {}, {}, command=lambda *_: {}))
            """)
    )
    about = tmp_path / "somebodys-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nsomebodys = somebodys_model\n")
    supported_models()  # what is there without it
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry._load.cache_clear()
    try:
        assert supported_models()["somebodys"] == ("SomebodysPipeline",)
    finally:
        registry.unregister("somebodys")
