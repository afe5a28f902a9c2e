# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-2.1 (QwenImage21Pipeline with pictures): all that the engine cannot know of it.

One stream with block-causal attention: text and reference pictures never see the target, and are modulated by timestep
0, so their keys and values are the same in every step. The stock pipeline keeps them; so does this, for every stage,
and a sequence here holds the target's tokens alone. A coarse target sees the references fine. A token is one latent
pixel of a 16x autoencoder with four channels (RGBA).

Eager (`Qwen21Model`): whole pictures at full resolution run through the stock forward; all else through the
transformer's own modules, block by block. Fused (`FusedQwen21Model`): one modulation serves all blocks, and is that of
all steps of a stage at once; a block's keys and values of text and references, from the stock forward, lie in front of
the target's in one place, so that no step copies them.

Thresholds are not calibrated for it: drafts are judged by the decoder's features with those of the tiny FLUX editor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AdaLayerNormContinuous,
    QwenImage21Attention,
    QwenImage21AttnProcessor,
    QwenImage21KVCache,
    QwenImage21KVLayerCache,
    QwenImage21SwiGLUFeedForward,
    QwenImage21Transformer2DModel,
    QwenImage21TransformerBlock,
)
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as stock
from torch import Tensor

from .. import ops
from ..engine import fp8
from ..engine._diffusers import scaled_adapters, through
from ..engine.attention import SpecEditAttnProcessor, apply_rotary, kept_keys, with_layout
from ..engine.config import EditConfig, SpecEditConfig
from ..engine.fused import called, compiled, linear, linear_of_each, modulated
from ..engine.kv_cache import PrefixedKV
from ..engine.low_rank import active_serial
from ..engine.model import EditModel, Pictures, Text, in_order, key_bias_in_order
from ..engine.pipeline import Call, SpecEditMixin, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import (
    Kept,
    MixedSequence,
    StepLayout,
    Stream,
    TextWatch,
    attend,
    attention,
    mixed_step_layout,
    whole_step_layout,
)
from ..engine.stages import Run
from ..sampling.flops import transformer_flops
from ..sampling.grid import Grid, pack, token_positions
from ..sampling.layout import SequenceLayout, table_positions
from .fibo import WanCodec
from .qwen_image_edit import FusedQwenCodecModel, centred, rotary_table

SLOT = 4  # latent tokens of a reference for each of its vision tokens


def replaced(transformer: QwenImage21Transformer2DModel) -> Iterable[tuple[torch.nn.Module, type]]:
    """Every module whose forward `fused_forward` stands for, with the class that it must have. All others are called;
    linear layers too, where they are more than a weight."""
    yield transformer, QwenImage21Transformer2DModel
    for block in transformer.transformer_blocks:
        yield from ((block, QwenImage21TransformerBlock), (block.attn, QwenImage21Attention))
        yield from ((norm, torch.nn.LayerNorm) for norm in (block.img_norm1, block.img_norm2))
        yield from ((norm, RMSNorm) for norm in (block.attn.norm_q, block.attn.norm_k))
        yield from ((block.img_mlp, QwenImage21SwiGLUFeedForward), (block.img_mlp.activation_fn, torch.nn.SiLU))
    norm = transformer.norm_out
    yield from ((norm, QwenImage21AdaLayerNormContinuous), (norm.silu, torch.nn.SiLU), (norm.norm, torch.nn.LayerNorm))


def modulation(transformer: QwenImage21Transformer2DModel, timestep: Tensor, like: Tensor) -> Tensor:
    """What modulates a target's tokens, [R, 6 C], for R timesteps in [0, 1000]: the scale and gate of attention and of
    the MLP of any block, the output norm's scale, and zeros, since nothing is shifted. like: of the tokens' dtype."""
    emb = transformer.time_text_embed(timestep.to(like.dtype) / 1000, like)
    scale, gate, scale2, gate2 = transformer.modulation(emb).chunk(4, dim=-1)
    last = called(transformer.norm_out.linear, F.silu(emb))
    return torch.cat([scale, gate.tanh(), scale2, gate2.tanh(), last, torch.zeros_like(last)], dim=-1)


def fused_block(
    block: QwenImage21TransformerBlock, x: Tensor, sequence: MixedSequence, kept: Kept | None, mod: Tensor
) -> None:
    """QwenImage21TransformerBlock on a target's tokens x [B, N, C], in place.

    kept: the block's keys and values of text and references, and where the target's go. mod: rows of `modulation`.
    """
    attn, mlp = block.attn, block.img_mlp
    scale, gate, scale2, gate2, _, shift = mod.chunk(6, dim=1)
    inputs = (attn.to_q, attn.to_k, attn.to_v)
    y = modulated(x, scale, shift, block.img_norm1.eps, inputs)
    dim = attn.inner_dim // attn.heads
    parts = [part.unflatten(-1, (-1, dim)) for part in linear_of_each(inputs, y)]
    out, _ = attention([Stream(slice(None), parts, attn.norm_q, attn.norm_k)], kept, sequence)
    del parts, y  # the MLP needs their memory
    ops.gated_residual_add_(x, attn.to_out[1](linear(attn.to_out[0], out)), gate)
    first = (mlp.gate_layer, mlp.proj)
    gated, value = linear_of_each(first, modulated(x, scale2, shift, block.img_norm2.eps, first))
    ops.gated_residual_add_(x, linear(mlp.out, F.silu(gated).mul_(value)), gate2)


Block = Callable[..., None]


@functools.cache
def compiled_block() -> Block:
    return compiled(fused_block)


def fused_forward(
    transformer: QwenImage21Transformer2DModel, tokens: Tensor, modulation: Tensor, sequence: MixedSequence,
    cache: Sequence[Kept | None], block: Block = fused_block,
) -> Tensor:  # fmt: skip
    """Velocity of a target's tokens [B, S, C]: QwenImage21Transformer2DModel.forward over kept text and references.

    modulation: [B, 6 C], rows of `modulation`. cache: of each block, `fused_block`'s `kept`.
    """
    x = called(transformer.img_in, tokens)
    for layer, kept in zip(transformer.transformer_blocks, cache):
        block(layer, x, sequence, kept, modulation)
        if x.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            x.clip_(-65504, 65504)
    scale, shift = modulation.chunk(6, dim=1)[4:]
    return called(transformer.proj_out, ops.adaln_modulate(x, scale, shift, eps=transformer.norm_out.norm.eps))


class SpecEditQwen21AttnProcessor(SpecEditAttnProcessor):
    """For QwenImage21AttnProcessor; a call gives it a mixed sequence's layout."""

    def __call__(
        self,
        attn: QwenImage21Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache: QwenImage21KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        layout = self.layout
        if layout is None:
            return self.inner(attn, hidden_states, attention_mask, rotary_emb, layer_cache, kv_cache_mode,
                              cache_write_slice, segments, key_valid)  # fmt: skip
        dim = attn.inner_dim // attn.heads
        layers = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (layer(hidden_states).unflatten(-1, (-1, dim)) for layer in layers)
        sequence = layout.sequence
        q, k = (apply_rotary(x, sequence.cos, sequence.sin, v.dtype) for x in (attn.norm_q(q), attn.norm_k(k)))
        k, v = kept_keys(self, k, v, layout)
        assert layer_cache is not None
        before = layer_cache.get()  # text and references: of all steps
        k, v = (torch.cat(pair, dim=1) for pair in zip(before, (k, v)))
        return attn.to_out[1](attn.to_out[0](attend(q, k, v, sequence)))


class Qwen21Codec(WanCodec):
    """AutoencoderKLQwenImage21: pixels have four channels."""

    def unscaled(self, latents: Tensor) -> Tensor:
        x = latents[:, :, None].to(self.vae.dtype)
        return x * self._channels("latents_std", x) + self._channels("latents_mean", x)


@dataclass
class Qwen21Text(Text):
    """embeds [B, T, E], with a place for each vision token. mask [B, T], 0: padding, or None where every token counts.
    slots: bool [1, T], the places of vision tokens, of all samples."""

    mask: Tensor | None
    slots: Tensor

    @functools.cached_property
    def vision(self) -> int:
        """How many of its places are vision tokens'. Read once: it waits for the device."""
        return int(self.slots.sum())


@dataclass(frozen=True)
class Qwen21Layout:
    """grid: of a whole target; attention: the mixed sequence's, None for whole pictures. text: the branch's, where a
    fused step has its keys and values."""

    grid: Grid | None
    attention: StepLayout | None
    text: Qwen21Text | None = None


class Qwen21Model(EditModel):
    """QwenImage21Transformer2DModel with AutoencoderKLQwenImage21."""

    keeps_references = True

    def begin(self, run: Run) -> None:
        """Take a run's references. Called before its first stage."""
        self.grid = run.grid
        self.grids = tuple(reference.grid for reference in run.references)
        self.seen = torch.cat([pack(reference.latents, run.patch) for reference in run.references], dim=1)
        self._prefixes: dict[int, tuple[Qwen21Text, QwenImage21KVCache]] = {}

    def embedder(self) -> torch.nn.Module:
        return self.transformer.img_in

    def _whole(self, text: Qwen21Text, tokens: Tensor, timestep: Tensor, grid: Grid) -> Tensor:
        """The stock forward on references and a target of that grid, the keys and values of text and references kept
        from the first call on."""
        _, cache = self._prefixes.get(id(text), (None, None))
        mode = "extract" if cache is None else "cached"
        if cache is None:
            # the text is kept too, so that no other one gets its id
            _, cache = self._prefixes[id(text)] = text, QwenImage21KVCache(len(self.transformer.transformer_blocks))
        slots = text.slots.new_ones(1, tokens.shape[1] // SLOT)
        return self.transformer(
            hidden_states=torch.cat([self.seen.to(tokens.dtype), tokens], dim=1),
            timestep=timestep,
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=text.mask,
            img_shapes=[[(1, *g) for g in (*self.grids, grid)]] * tokens.shape[0],
            img_mask=torch.cat([text.slots, slots], dim=1),
            attention_kwargs=dict(self.attention_kwargs),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0][:, -tokens.shape[1] :]

    def _cache(self, text: Qwen21Text, like: Tensor) -> QwenImage21KVCache:
        """Keys and values of text and references. They see no target, so any one serves to compute them.

        like: of the tokens' dtype.
        """
        if id(text) not in self._prefixes:
            batch, channels = len(text.embeds), self.seen.shape[2]
            self._whole(text, like.new_zeros(batch, SLOT, channels), like.new_zeros(batch), (2, 2))
        return self._prefixes[id(text)][1]

    def _valid(self, text: Qwen21Text) -> Tensor | None:
        """Which keys of text and references are no padding, bool [B, keys], or None where all are."""
        if text.mask is None:
            return None
        return text.mask.bool().repeat_interleave(torch.where(text.slots[0], SLOT, 1), dim=1)

    def _table(self, text: Qwen21Text, positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Rotary table (cos, sin) fp32 [n, D] of a target's tokens at fp32 [n, 3], (0, row, column) in grid units."""
        embedding = self.transformer.pos_embed
        start = text.slots.shape[1] - text.vision + sum(max(g) for g in self.grids)
        placed = centred(positions, (grid,))
        placed = torch.cat([placed[:, :1] + start, placed[:, 1:]], dim=1)
        return rotary_table(placed, embedding.axes_dim, embedding.theta)

    def dense_layout(self, text: Qwen21Text, pictures: Pictures, grids: Sequence[Grid]) -> Qwen21Layout:
        if grids[0] == self.grid:
            return Qwen21Layout(self.grid, None)
        return Qwen21Layout(None, self._whole_target(text, grids[0]))

    def _whole_target(self, text: Qwen21Text, grid: Grid) -> StepLayout:
        place = token_positions(grid, text.embeds.device)
        cos, sin = self._table(text, F.pad(place, (1, 0)), grid)
        return self._behind_prefix(text, whole_step_layout(0, (cos[None], sin[None]), len(text.embeds)))

    def _behind_prefix(self, text: Qwen21Text, made: StepLayout) -> StepLayout:
        """The layout of a target whose tokens attend to text and references too, whose keys come first."""
        sequence, valid, prefix = made.sequence, self._valid(text), self._prefix(text)
        bias, keys = sequence.key_bias, sequence.keys
        assert keys is not None
        if bias is not None or valid is not None:
            if bias is None:
                bias = sequence.cos.new_zeros(len(text.embeds), sequence.cos.shape[1])
            bias = F.pad(bias, (prefix, 0))
            if valid is not None:
                bias[:, :prefix].masked_fill_(~valid, float("-inf"))
        return replace(made, sequence=replace(sequence, key_bias=bias, keys=keys + prefix))

    def _prefix(self, text: Qwen21Text) -> int:
        """Keys of text and references."""
        return text.slots.shape[1] + (SLOT - 1) * text.vision

    def watched_layout(
        self, text: Qwen21Text, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> Qwen21Layout:
        raise NotImplementedError("the target's attention to the text is not recorded (FlashEdit)")

    def mixed_layout(
        self, text: Qwen21Text, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> Qwen21Layout:
        rows = table_positions(pictures.target, layout.index.device, pictures.others, pictures.coarse_others)
        # of the target's rows alone: the others have another picture's number
        places = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1:]], dim=1)
        cos, sin = (in_order(x, layout) for x in self._table(text, places, pictures.target))
        bias = key_bias_in_order(pictures, layout) if key_bias else None
        made = mixed_step_layout(0, (cos, sin), layout, bias, self.new_cache() if cached else None)
        return Qwen21Layout(None, self._behind_prefix(text, made))

    def active_layout(
        self, text: Qwen21Text, layout: Qwen21Layout, first: int | None, lock_text: bool = False
    ) -> Qwen21Layout:
        assert layout.attention is not None
        # the text is a part of no call
        return replace(layout, attention=layout.attention.active(0, first))

    def velocity(self, text: Qwen21Text, tokens: Tensor, conditioning: Tensor, layout: Qwen21Layout) -> Tensor:
        timestep = conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000
        if layout.attention is None:
            assert layout.grid is not None
            return self._whole(text, tokens, timestep, layout.grid)
        cache, transformer = self._cache(text, tokens), self.transformer

        def run(tokens: Tensor, timestep: Tensor) -> Tensor:
            x = transformer.img_in(tokens)
            temb = transformer.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]), x)
            modulation = transformer.modulation(temb)
            target = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
            for i, block in enumerate(transformer.transformer_blocks):
                x = block(hidden_states=x, modulation=modulation, target_token_mask=target,
                          layer_cache=cache.get_layer(i), kv_cache_mode="cached")  # fmt: skip
            return transformer.proj_out(transformer.norm_out(x, temb, target))

        with with_layout(transformer, layout.attention, whole=True), self._scaled():
            return through(transformer, run, tokens, timestep)

    def _scaled(self):
        return scaled_adapters(self.transformer, self.attention_kwargs.get("scale", 1.0))

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)

    def flops(self, text: Qwen21Text, tokens: int, keys: int | None = None, lock_text: bool = False) -> int:
        """Of the target's tokens alone, with the gated MLP's 18 d^2 for each, in place of 16 d^2."""
        heads, dim = self.heads
        keys = self._prefix(text) + (tokens if keys is None else keys)
        more = (6 * self.transformer.config.mlp_ratio - 16) * (heads * dim) ** 2 * tokens * self.blocks
        return transformer_flops(tokens, keys, heads * dim, self.blocks) + more


class FusedQwen21Model(FusedQwenCodecModel, Qwen21Model):
    """The same model through `fused_forward`, its steps and its autoencoder launched by a runner."""

    @property
    def _block(self) -> Block:
        # a compiled block does not know of changed weights, nor of those in fp8
        apart = self.runner.name != "compile" or active_serial() or fp8.is_active()
        return fused_block if apart else compiled_block()

    def _with_prefix(self, layout: Qwen21Layout, name: str, packed: bool, at_least: int = 0) -> Qwen21Layout:
        """A layout whose keys and values are kept in places of that name, behind those of text and references.

        packed: the target's in fp8. at_least: rows of the target's that the places are made for.
        """
        text, made = layout.text, layout.attention
        assert text is not None and made is not None
        prefix, rows = self._prefix(text), made.sequence.cos.shape[1]
        self.runner.bring(self._own)
        known = self._cache(text, text.embeds)
        places = self._kept(name, len(text.embeds), max(rows, at_least), text.embeds, prefix, packed)
        for i, kept in enumerate(places):
            for place, x in zip(kept.prefix if isinstance(kept, PrefixedKV) else kept, known.get_layer(i).get()):
                place[:, :prefix].copy_(x)
        if not packed:
            places = [tuple(x[:, : prefix + rows] for x in pair) for pair in places]
        own = torch.arange(prefix, prefix + rows, dtype=torch.int32, device=text.embeds.device)
        sequence = replace(made.sequence, rows=own.expand(len(text.embeds), -1).contiguous())
        return replace(layout, attention=replace(made, sequence=sequence, cache=places, buffers=name))

    def dense_layout(self, text: Qwen21Text, pictures: Pictures, grids: Sequence[Grid]) -> Qwen21Layout:
        made = self._whole_target(text, grids[0])
        # no slot is empty
        sequence = replace(made.sequence, queries=None, keys=None, backend=self._backend, passing=True)
        layout = Qwen21Layout(grids[0], replace(made, sequence=sequence), text)
        self._cache(text, text.embeds)
        branch = list(self._prefixes).index(id(text))
        # of all grids of a run in one place, as long as the longest from the first: graphs are of a place
        return self._with_prefix(layout, f"keys and values of branch {branch}", False, math.prod(self.grid))

    def mixed_layout(
        self, text: Qwen21Text, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> Qwen21Layout:
        made = super().mixed_layout(text, pictures, layout, key_bias, cached=False)
        return self._in_another_place(replace(made, text=text), cached and self.fp8_cache)

    def _in_another_place(self, layout: Qwen21Layout, packed: bool) -> Qwen21Layout:
        name, self._caches = f"keys and values {self._caches}", self._caches + 1
        return self._with_prefix(layout, name, packed)

    def another_cache(self, layout: Qwen21Layout) -> Qwen21Layout:
        return self._in_another_place(layout, self.fp8_cache)

    def blend(self, layout: Qwen21Layout, near: Qwen21Layout, far: Qwen21Layout, weight: Tensor) -> None:
        # of the target's alone: the others are the same in all of them
        super().blend(self._without_prefix(layout), self._without_prefix(near), self._without_prefix(far), weight)

    def _without_prefix(self, layout: Qwen21Layout) -> Qwen21Layout:
        text, made = layout.text, layout.attention
        assert text is not None and made is not None
        start = self._prefix(text)
        own = [kept.own if isinstance(kept, PrefixedKV) else tuple(x[:, start:] for x in kept) for kept in made.cache]
        return replace(layout, attention=replace(made, cache=own))

    def active_layout(
        self, text: Qwen21Text, layout: Qwen21Layout, first: int | None, lock_text: bool = False
    ) -> Qwen21Layout:
        made = super().active_layout(text, layout, first, lock_text)
        assert made.attention is not None
        rows = made.attention.sequence.rows
        assert rows is not None
        return self._with_sequence(made, rows=torch.where(rows < 0, rows, rows + self._prefix(text)))

    def timestep_conditioning(self, text: Qwen21Text, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation, a row for each timestep."""
        self.runner.bring(self._own)
        with self._scaled():
            return modulation(self.transformer, timesteps, text.embeds).split(1)

    def velocity(self, text: Qwen21Text, tokens: Tensor, conditioning: Tensor, layout: Qwen21Layout) -> Tensor:
        made = layout.attention
        assert made is not None
        sequence, cache = made.sequence, made.cache
        inputs = dict(tokens=tokens, modulation=conditioning)
        inputs |= {name: getattr(sequence, name) for name in ("cos", "sin", "key_bias", "queries", "keys", "rows")}

        def step(tokens: Tensor, modulation: Tensor, **given: Any) -> Tensor:
            with self._scaled():
                return fused_forward(
                    self.transformer,
                    tokens,
                    modulation.expand(len(tokens), -1),
                    replace(sequence, **given),
                    cache,
                    self._block,
                )

        self.runner.bring(self._own)
        tag = ("step", id(self._own), self._prefix(text), sequence.passing, self.attention_kwargs.get("scale"),
               cache[0][0].shape[1], sequence.backend)  # fmt: skip
        return self.runner(tag, step, inputs, made.buffers)


class SpecEditQwenImage21Pipeline(SpecEditMixin, QwenImage21Pipeline):
    """QwenImage21Pipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline; weights are never touched. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs the stock pipeline's own call, untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many. Without effect, as
        in the stock pipeline, where the folder has `sample_sigmas`.
    image: a PIL picture or a list of them, seen by every prompt. The first is the one that is edited: the draft is
        compared with it, and what does not change is taken from it. All are seen fine in every stage, through keys and
        values that are computed once; `coarse_condition` and `coarse_references` are without effect. Pictures have an
        alpha channel here, results too.
    height, width: as in the stock pipeline: multiples of 32 pixels, the ratio of the *last* picture where left out.
    latents: packed white noise on the fine grid, [B, N, C].
    true_cfg_scale: both branches share one draft, one mask and one layout.
    use_kv_cache: without effect: keys and values are always kept.

    With no image given, or `specedit=False`, the stock call runs.
    """

    FLASH_RUNNERS = ()
    TEXT = ("prompt", "prompt_embeds", "prompt_embeds_mask")
    KWARGS = "attention_kwargs"
    PIXELS = False
    EDITED = 1
    DETAILS = ("working",)  # its text has a place for each token of the references
    TEXT_TO_IMAGE = True

    def _resolve(self, call: Call) -> tuple[EditConfig, tuple[int, int, int]]:
        if not issubclass(self.CONFIG, SpecEditConfig):
            raise ValueError("pipe: FlashEdit does not support models whose text does not see the target")
        if not self.transformer.config.causal_condition:
            raise ValueError("transformer: expected causal_condition=True, got False")
        if call.sigmas is None and self.config.sample_sigmas is not None:
            call.sigmas = list(self.config.sample_sigmas)
        return super()._resolve(call)

    def _size(self, call: Call) -> tuple[int, int]:
        """By the stock pipeline's rules. Keeps `call.seen`, [(picture, its (height, width))], and `call.shown`."""
        pictures = call.image if isinstance(call.image, list) else [call.image]
        area = call.output_resolution**2
        call.seen, call.shown = [], []
        for picture in pictures:
            picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
            width, height = stock.calculate_dimensions(area, picture.width / picture.height)[:2]
            call.seen.append((picture, (height, width)))
            call.shown.append(self.image_processor.resize(picture, width=width, height=height))
        # the edited picture comes back at its own ratio
        multiple, own = 2 * self.vae_scale_factor, call.seen[0 if call.output_size == "source" else -1][1]
        return tuple((asked or side) // multiple * multiple for asked, side in zip((call.height, call.width), own))

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        def pixels_of(picture: PIL.Image.Image, size: tuple[int, int]) -> Tensor:
            return preprocess(self.image_processor, picture, *size, device)

        size = (call.height, call.width)
        seen = [pixels_of(*each) for each in call.seen]
        return seen[0] if call.seen[0][1] == size else pixels_of(call.seen[0][0], size), seen

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> Qwen21Text:
        embeds, mask, slots = self.encode_prompt(
            **fields, image=call.shown, device=device, num_images_per_prompt=call.num_images_per_prompt
        )
        return Qwen21Text(embeds, mask, slots[:1])

    def _run(self, run: Run, *stages: Any) -> Any:
        assert isinstance(run.model, Qwen21Model)
        run.model.begin(run)
        return super()._run(run, *stages)

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> Qwen21Model:
        parts = (self.transformer, self.vae, None, attention_kwargs)
        return Qwen21Model(*parts) if runner is None else FusedQwen21Model(*parts, runner)


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's side in pixels; no guidance by default."""
    options: dict[str, Any] = {"true_cfg_scale": 1.0 if true_cfg_scale is None else true_cfg_scale}
    if "resolution" in settings:
        options["output_resolution"] = settings["resolution"]
    if options["true_cfg_scale"] > 1:
        options["negative_prompt"] = " "
    return options


register(
    Model(
        name="qwen_image_21",
        pipelines={QwenImage21Pipeline: SpecEditQwenImage21Pipeline},
        processors={QwenImage21AttnProcessor: SpecEditQwen21AttnProcessor},
        codecs={AutoencoderKLQwenImage21: Qwen21Codec},
        replaced={QwenImage21Transformer2DModel: replaced},
        command=_command,
        several_pictures=("QwenImage21Pipeline",),
    )
)
