# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-Kontext: all that the engine cannot know of it, and its registration.

In order: the transformer's fused forward, the attention processor, what the stages ask of the model (`FluxKontextModel`
calls the transformer's own forward, `FusedFluxModel` the fused one), the pipeline.

Fused forward: text and image are one tensor [B, text | image, C] from the first block to the last. A block's
modulation depends on the timestep alone, so that of all blocks and of all steps of a stage is computed at once
(`modulation`), and a step (`fused_forward`) is left with what depends on its tokens. A linear layer with an adapter or
a quantised weight is called as a module, but where it is known to be one product (`weight_of`). The numbers are those
of FluxTransformer2DModel.forward but for rounding: norms, rotation, residuals and GELU round once, where that one
rounds after each operation, and the sum over attention and MLP in a single block's last layer rounds between the two.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxKontextPipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from .. import ops
from ..engine import fp8
from ..engine._diffusers import dtype_of, unwrapped
from ..engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from ..engine.autoencoder import KLCodec, in_channels_last
from ..engine.fp8 import Rows
from ..engine.fused import (
    FusedModel,
    called,
    compiled,
    feed_forward,
    first_of,
    hidden,
    join_,
    linear,
    linear_of_each,
    modulated,
    of_both,
    replaced_of_feed_forward,
    separate_,
)
from ..engine.low_rank import active_serial
from ..engine.model import EditModel, Pictures, Text, in_order, key_bias_in_order
from ..engine.pipeline import Call, SpecEditMixin, picture_size, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import (
    Kept,
    MixedSequence,
    StepLayout,
    Stream,
    TextWatch,
    attention,
    embedded,
    mixed_step_layout,
    whole_step_layout,
)
from ..sampling.grid import BLOCK, PATCH, Grid, token_positions
from ..sampling.layout import SequenceLayout, table_positions

logger = logging.getLogger("specedit_kernels")


def _modulated(transformer: FluxTransformer2DModel) -> list[Any]:
    """The norms that have a modulation, in the order of its vectors."""
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return [*(n for b in double for n in (b.norm1, b.norm1_context)), *(b.norm for b in single), transformer.norm_out]


def modulation(
    transformer: FluxTransformer2DModel, timestep: Tensor, guidance: Tensor | None, pooled: Tensor
) -> Tensor:
    """Scales, shifts and gates of all blocks: [R, sum of their widths], for R (sample, timestep) pairs.

    timestep: [R] in [0, 1000]. guidance: [R] or None. pooled: [R, P].
    """
    # the roundings of the pipeline and of the model's forward
    at = (timestep.to(pooled.dtype) / 1000) * 1000
    about = (at, pooled) if guidance is None else (at, guidance.to(pooled.dtype) * 1000, pooled)
    emb = F.silu(transformer.time_text_embed(*about))
    return torch.cat([called(norm.linear, emb) for norm in _modulated(transformer)], dim=-1)


# Of a transformer that `fused_forward` stands for: itself, its double-stream and single-stream blocks, their attention.
Kinds = tuple[type, type, type, type | tuple[type, ...]]
KINDS: Kinds = (FluxTransformer2DModel, FluxTransformerBlock, FluxSingleTransformerBlock, FluxAttention)


def replaced(transformer: Any, kinds: Kinds = KINDS) -> Iterable[tuple[torch.nn.Module, type | tuple[type, ...]]]:
    """Every module whose forward `fused_forward` stands for, with the class that it must have. All others are called;
    linear layers too, where they are more than a weight and a bias. kinds: those of a model of FLUX.1's shape."""
    whole, double, single, attention = kinds
    norms = (torch.nn.RMSNorm, RMSNorm)
    yield transformer, whole
    for block in transformer.transformer_blocks:
        yield block, double
        yield block.attn, attention
        for norm in (block.norm1, block.norm1_context):
            yield from ((norm, AdaLayerNormZero), (norm.silu, torch.nn.SiLU), (norm.norm, torch.nn.LayerNorm))
        for norm in (block.norm2, block.norm2_context):
            yield norm, torch.nn.LayerNorm
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            yield norm, norms
        for ff in (block.ff, block.ff_context):
            yield from replaced_of_feed_forward(ff)
    for block in transformer.single_transformer_blocks:
        yield block, single
        yield block.attn, attention
        yield block.norm, AdaLayerNormZeroSingle
        yield from ((block.norm.silu, torch.nn.SiLU), (block.norm.norm, torch.nn.LayerNorm))
        yield from ((block.attn.norm_q, norms), (block.attn.norm_k, norms))
        yield block.act_mlp, torch.nn.GELU
    norm = transformer.norm_out
    yield from ((norm, AdaLayerNormContinuous), (norm.silu, torch.nn.SiLU), (norm.norm, torch.nn.LayerNorm))


def _projections(attn: FluxAttention, text: bool = False) -> tuple[torch.nn.Module, ...]:
    """The layers of q, k and v of image tokens, or of text in a double block."""
    return (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (attn.to_q, attn.to_k, attn.to_v)


def join_projections_(transformer: FluxTransformer2DModel) -> bool:
    """`fused.join_` the layers of each q, k and v. Returns whether any weight was moved."""
    moved = [join_(layers) for layers in _joinable(transformer)]  # all of them, before any is asked
    return any(moved)


def separate_projections_(transformer: FluxTransformer2DModel) -> None:
    """Undo `join_projections_`."""
    for layers in _joinable(transformer):
        separate_(layers)


def _joinable(transformer: FluxTransformer2DModel) -> list[tuple[torch.nn.Module, ...]]:
    attentions = [(block.attn, text) for block in transformer.transformer_blocks for text in (False, True)]
    attentions += [(block.attn, False) for block in transformer.single_transformer_blocks]
    return [_projections(*each) for each in attentions if not each[0].fused_projections]


def _inputs(attn: FluxAttention, text: bool = False) -> tuple[torch.nn.Module, ...]:
    """The layers that `_project` calls."""
    if attn.fused_projections:
        return (attn.to_added_qkv if text else attn.to_qkv,)
    return _projections(attn, text)


def _project(attn: FluxAttention, x: Tensor | Rows, text: bool = False) -> list[Tensor]:
    """q, k and v [B, N, H, D] of image tokens, or of text in a double block."""
    parts = linear_of_each(_inputs(attn, text), x)
    if attn.fused_projections:
        parts = list(parts[0].chunk(3, dim=-1))
    return [part.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for part in parts]


def double_block(
    block: FluxTransformerBlock, x: Tensor, sequence: MixedSequence, kept: Kept | None, image_mod: Tensor,
    text_mod: Tensor,
) -> Tensor | None:  # fmt: skip
    """FluxTransformerBlock on text and image tokens x [B, N, C], in place. Returns what `watched_mass` does.

    kept: where its keys and values go, None to forget them. image_mod, text_mod: [B, 6 C].
    """
    attn, n = block.attn, sequence.own[0]
    text, image = x[:, :n], x[:, n:]
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=1)
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=1)
    streams = []
    if sequence.text:  # else its keys and values are kept ones
        parts = []
        if n:
            text_in = modulated(text, t_scale, t_shift, block.norm1_context.norm.eps, _inputs(attn, text=True))
            parts = _project(attn, text_in, text=True)
        streams.append(Stream(slice(0, sequence.text), parts, attn.norm_added_q, attn.norm_added_k))
    parts = []
    if image.shape[1]:
        image_in = modulated(image, i_scale, i_shift, block.norm1.norm.eps, _inputs(attn))
        parts = _project(attn, image_in)
    streams.append(Stream(slice(sequence.text, None), parts, attn.norm_q, attn.norm_k))
    out, seen = attention(streams, kept, sequence)
    del streams, parts  # the MLP needs their memory
    if n:
        ops.gated_residual_add_(text, linear(attn.to_add_out, out[:, :n]), t_gate)
        text_in = modulated(text, t_scale2, t_shift2, block.norm2_context.eps, [first_of(block.ff_context)])
        ops.gated_residual_add_(text, feed_forward(block.ff_context, text_in), t_gate2)
    if image.shape[1]:
        ops.gated_residual_add_(image, attn.to_out[1](linear(attn.to_out[0], out[:, n:])), i_gate)
        image_in = modulated(image, i_scale2, i_shift2, block.norm2.eps, [first_of(block.ff)])
        ops.gated_residual_add_(image, feed_forward(block.ff, image_in), i_gate2)
    return seen


def single_block(
    block: FluxSingleTransformerBlock, x: Tensor, sequence: MixedSequence, kept: Kept | None, mod: Tensor
) -> Tensor | None:
    """FluxSingleTransformerBlock on text and image tokens x [B, N, C], in place; kept as above, mod: [B, 3 C]."""
    attn = block.attn
    shift, scale, gate = mod.chunk(3, dim=1)
    y = modulated(x, scale, shift, block.norm.norm.eps, _inputs(attn), [block.proj_mlp])
    attended, seen = attention([Stream(slice(None), _project(attn, y), attn.norm_q, attn.norm_k)], kept, sequence)
    y = hidden(block.proj_mlp, y, block.proj_out, attended)
    out = linear(block.proj_out, y) if isinstance(y, Rows) else of_both(block.proj_out, attended, y)
    ops.gated_residual_add_(x, out, gate)
    return seen


Blocks = tuple[Callable[..., Tensor | None], Callable[..., Tensor | None]]
BLOCKS: Blocks = (double_block, single_block)


@functools.cache
def compiled_blocks() -> Blocks:
    double, single = map(compiled, BLOCKS)
    return double, single


def fused_forward(
    transformer: FluxTransformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: Tensor,
    sequence: MixedSequence,
    cache: list[Kept] | None = None,
    blocks: Blocks = BLOCKS,
    watch: tuple[int, list[Tensor]] | None = None,
    before: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Velocity of image tokens [B, S, 4C]: FluxTransformer2DModel.forward.

    embeds: [B, T, E], T = sequence.text. modulation: [B, ...], rows of `modulation`. cache: of each block, where its
    keys and values outlive the step: it writes those of its tokens, and attends to all. watch: index of a block,
    and where what its attention gives to the text is added. before: called before each block,
    with its index and its tokens.
    """
    text_in, image_in = (functools.partial(called, x) for x in (transformer.context_embedder, transformer.x_embedder))
    x = embedded(text_in, image_in, embeds, tokens, sequence)
    mods = iter(modulation.split([norm.linear.out_features for norm in _modulated(transformer)], dim=-1))
    double, single = blocks
    layers = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for i, layer in enumerate(layers):
        kept = None if cache is None else cache[i]
        known = replace(sequence, watched=True) if watch and i == watch[0] else sequence
        if before is not None:
            before(i, x)
        if i < len(transformer.transformer_blocks):
            seen = double(layer, x, known, kept, next(mods), next(mods))
        else:
            seen = single(layer, x, known, kept, next(mods))
        if watch and seen is not None:
            watch[1].append(seen)
        if x.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            x.clip_(-65504, 65504)
    scale, shift = next(mods).chunk(2, dim=1)
    image = ops.adaln_modulate(x[:, sequence.own[0] :], scale, shift, eps=transformer.norm_out.norm.eps)
    return sequence.whole_image(called(transformer.proj_out, image))


class SpecEditFluxAttnProcessor(SpecEditAttnProcessor):
    """For FluxAttnProcessor; `specedit_layout` is the mixed sequence's."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: StepLayout | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if specedit_layout is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        layout = specedit_layout
        # -1 for the heads: tensor parallelism shards them
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (q, k, v))
        q, k, text_qkv = attn.norm_q(q), attn.norm_k(k), None
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            if attn.fused_projections:
                tq, tk, tv = attn.to_added_qkv(text).chunk(3, dim=-1)
            else:
                tq, tk, tv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            tq, tk, tv = (x.unflatten(-1, (-1, attn.head_dim)) for x in (tq, tk, tv))
            text_qkv = (attn.norm_added_q(tq), attn.norm_added_k(tk), tv)
        out = joint_attention(self, text_qkv, (q, k, v), layout)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, length:].contiguous()))
        return image, attn.to_add_out(out[:, :length].contiguous())


@dataclass
class FluxText(Text):
    """embeds [B, T, E], pooled [B, P], text_ids [T, 3]."""

    PER_SAMPLE = ("embeds", "pooled")

    pooled: Tensor
    text_ids: Tensor


@dataclass(frozen=True)
class FluxLayout:
    """ids: [S, 3], shared by the batch; attention: the mixed sequence's, None for whole pictures."""

    ids: Tensor
    attention: StepLayout | None = None


class FluxKontextModel(EditModel):
    """FluxTransformer2DModel with AutoencoderKL.

    A model of its shape has its own `ids` and `velocity`, and in the place of FluxText one of its own, with `text_ids`,
    [T, axes].
    """

    def embedder(self) -> torch.nn.Module:
        return self.transformer.x_embedder

    def ids(self, text: Any, positions: Tensor) -> Tensor:
        """Position ids [n, axes] of image tokens at fp32 [n, 3], (picture, row, column), the target being picture 0."""
        return positions

    def dense_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid]) -> FluxLayout:
        places = []
        for image, grid in enumerate(grids):
            place = token_positions(grid, text.embeds.device)
            places.append(torch.cat([torch.full_like(place[:, :1], image), place], dim=1))
        # in the text's dtype, as the pipelines give them
        return FluxLayout(self.ids(text, torch.cat(places)).to(text.text_ids.dtype))

    def watched_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch) -> FluxLayout:
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        cos, sin = self.transformer.pos_embed(torch.cat([text.text_ids, layout.ids]))
        return replace(layout, attention=whole_step_layout(length, (cos[None], sin[None]), batch, watch=watch))

    def mixed_layout(
        self, text: Any, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> FluxLayout:
        batch, length = text.embeds.shape[:2]
        positions = table_positions(pictures.target, layout.index.device, pictures.others, pictures.coarse_others)
        ids = self.ids(text, positions)
        of_text, of_image = (self.transformer.pos_embed(x) for x in (text.text_ids, ids))
        cos, sin = (
            torch.cat([a.expand(batch, *a.shape), in_order(b, layout)], dim=1) for a, b in zip(of_text, of_image)
        )
        bias = F.pad(key_bias_in_order(pictures, layout), (length, 0)) if key_bias else None
        attention = mixed_step_layout(length, (cos, sin), layout, bias, self.new_cache() if cached else None)
        # the model makes one rotary table for the whole batch from these; the processor takes each sample's own
        return FluxLayout(ids.new_zeros(layout.capacity, ids.shape[1]), attention)

    def active_layout(self, text: Any, layout: FluxLayout, first: int | None, lock_text: bool = False) -> FluxLayout:
        return super().active_layout(text, replace(layout, ids=layout.ids[:first]), first, lock_text)

    def velocity(self, text: Any, tokens: Tensor, conditioning: Tensor, layout: FluxLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        start = 0 if layout.attention is None else layout.attention.start
        attention = self.shared(layout.attention, text.embeds.shape[1] - start, tokens.shape[1])
        if attention is not None:
            kwargs["specedit_layout"] = attention
        with with_layout(self.transformer, attention):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=self.guidance,
                pooled_projections=text.pooled,
                encoder_hidden_states=text.embeds[:, start:],
                txt_ids=text.text_ids[start:],
                img_ids=layout.ids,
                joint_attention_kwargs=kwargs or None,
                return_dict=False,
            )[0]

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)


class FusedFluxModel(FusedModel, FluxKontextModel):
    """The same model through `fused_forward`, its steps and its autoencoder launched by a runner.

    A model of its shape has its own `forward`, `_blocks`, `of_text` and `timestep_conditioning`.
    """

    forward: Callable[..., Tensor] = staticmethod(fused_forward)

    @property
    def _blocks(self) -> Blocks:
        # a compiled block does not know of changed weights, nor of those in fp8
        apart = self.runner.name != "compile" or active_serial() or fp8.is_active()
        return BLOCKS if apart else compiled_blocks()

    def of_text(self, text: Any) -> Tensor:
        """What `forward` takes of the text: [B, T, ...]."""
        return text.embeds

    def dense_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid]) -> FluxLayout:
        layout = super().dense_layout(text, pictures, grids)
        cos, sin = (
            x[None, :, ::2].contiguous() for x in self.transformer.pos_embed(torch.cat([text.text_ids, layout.ids]))
        )
        return replace(layout, attention=StepLayout(MixedSequence(len(text.text_ids), cos, sin, backend=self._backend)))

    def watched_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch) -> FluxLayout:
        made = self.dense_layout(text, pictures, grids)
        assert made.attention is not None
        return replace(made, attention=replace(made.attention, watch=watch))

    def edit_layout(
        self, text: Any, pictures: Pictures, layout: SequenceLayout, region: Tensor | None, text_mask: Tensor | None
    ) -> FluxLayout:
        made = super().edit_layout(text, pictures, layout, region, text_mask)
        # no slot is empty
        return self._with_sequence(made, queries=None, keys=None)

    def shield_layouts(
        self, source: Any, text: Any, pictures: Pictures, layout: SequenceLayout, first: int, region: Tensor | None,
        text_mask: Tensor | None,
    ) -> tuple[FluxLayout, FluxLayout]:  # fmt: skip
        # keys and values of the image first, then the text's: the two texts differ in length
        batch, image = layout.index.shape
        device, lengths = layout.index.device, [x.embeds.shape[1] for x in (source, text)]
        slot, name = torch.arange(image, dtype=torch.int32, device=device), "keys and values of the source"
        cache, made = self._kept(name, batch, image + max(lengths), text.embeds), []
        own = torch.where(slot[:first] < layout.fine_lengths[:, None], slot[:first], -1)
        for x, length, rows in ((source, lengths[0], slot.expand(batch, image)), (text, lengths[1], own)):
            whole = self.edit_layout(x, pictures, layout, None, None)
            text_rows = torch.arange(image, image + length, dtype=torch.int32, device=device).expand(batch, length)
            assert whole.attention is not None
            tokens, sequence = length + rows.shape[1], whole.attention.sequence
            cos, sin = (table[:, :tokens] for table in (sequence.cos, sequence.sin))
            found = self._with_sequence(
                whole,
                cos=cos,
                sin=sin,
                rows=torch.cat([text_rows, rows], dim=1),
                text_at=image,
                span=(0, image + length),
            )
            made.append(replace(found, attention=StepLayout(found.attention.sequence, None, cache, name)))
        branch, edit = made
        if region is not None:
            region = region[:, :first].contiguous()
        fresh = layout.fine_lengths + lengths[1]
        keys = torch.full_like(fresh, image + lengths[1])
        return branch, self._with_sequence(edit, queries=fresh, keys=keys, region=region, text_mask=text_mask)

    def mixed_layout(
        self, text: Any, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> FluxLayout:
        made = super().mixed_layout(text, pictures, layout, key_bias, cached=False)
        return self._cached(made, text.embeds) if cached else made

    def timestep_conditioning(self, text: Any, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation of all blocks, [B, ...] for each timestep."""
        self.runner.bring(self._own)
        steps, batch = len(timesteps), text.pooled.shape[0]
        guidance = None if self.guidance is None else self.guidance.repeat(steps)
        with self._scaled():
            found = modulation(
                self.transformer, timesteps[:, None].expand(-1, batch).flatten(), guidance, text.pooled.repeat(steps, 1)
            )
        return found.unflatten(0, (steps, batch)).unbind()

    def conditionings(self, texts: Sequence[Any], timestep: Tensor) -> list[Tensor]:
        # the weights, 3.2 B of FLUX.1's, are read once for all texts, and one graph has some 250 small launches
        if not all(type(text) is FluxText for text in texts):
            return super().conditionings(texts, timestep)
        self.runner.bring(self._own)
        pooled = torch.cat([text.pooled for text in texts])
        guidance = None if self.guidance is None else self.guidance.repeat(len(texts))

        def run(timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
            with self._scaled():
                return modulation(self.transformer, timestep, guidance, pooled)

        tag = ("modulation", id(self._own), self.attention_kwargs.get("scale"))
        inputs = dict(timestep=timestep.expand(len(pooled)), guidance=guidance, pooled=pooled)
        return list(self.runner(tag, run, inputs).chunk(len(texts)))

    def velocity(self, text: Any, tokens: Tensor, conditioning: Tensor, layout: FluxLayout) -> Tensor:
        attention = layout.attention
        assert attention is not None
        sequence, cache, watch = attention.sequence, attention.cache, attention.watch
        names = ("cos", "sin", "key_bias", "queries", "keys", "rows", "region", "text_mask")
        watched = None
        if watch is not None:
            blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
            watched = next(i for i, block in enumerate(blocks) if block.attn is watch.module)
        inputs = dict(tokens=tokens, embeds=self.of_text(text)[:, : sequence.text], modulation=conditioning)
        inputs |= {name: getattr(sequence, name) for name in names}

        def step(tokens: Tensor, embeds: Tensor, modulation: Tensor, **given: Any) -> tuple[Tensor, ...]:
            with self._scaled():
                seen: list[Tensor] = []
                found = self.forward(
                    self.transformer, tokens, embeds, modulation, replace(sequence, **given, ranks=self.ranks), cache,
                    self._blocks, None if watched is None else (watched, seen),
                )  # fmt: skip
                return (found, *seen)

        rows = None if cache is None else cache[0][0].shape[1]
        self.runner.bring(self._own)
        scale, transformer = self.attention_kwargs.get("scale"), id(self._own)
        tag = ("step", transformer, sequence.text, sequence.text_at, sequence.span, sequence.passing, scale, rows,
               watched, sequence.backend, self.ranks)  # fmt: skip
        found, *seen = self.runner(tag, step, inputs, attention.buffers)
        if watch is not None:
            [watch.mass] = seen
        return found

    def _with_vae(self, name: str, x: Tensor) -> Tensor:
        vae = self.codec.vae

        def run(x: Tensor) -> Tensor:
            return getattr(self.fused_codec, name)(in_channels_last(x))

        return self.runner((name, vae.use_slicing, vae.use_tiling, self.codec_ranks), run, {"x": x})

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels) if self.runner.moving else self._with_vae("encode", pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) if self.runner.moving else self._with_vae("decode", latents)


def refuse_ip_adapter(call: Call) -> None:
    """ValueError where a call has an IP-Adapter's pictures or their embeddings."""
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        for prefix in ("", "negative_"):
            if getattr(call, prefix + name) is not None:
                raise ValueError(f"{prefix}{name}: IP-Adapter is not supported with SpecEdit")


class SpecEditFluxKontextPipeline(SpecEditMixin, FluxKontextPipeline):
    """FluxKontextPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline. Weights keep their values and stay the layers' own
    parameters; on CUDA a runner other than "eager" makes those of q, k and v contiguous in memory at its first call,
    until `disable_specedit`. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs FluxKontextPipeline's own call, untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited. region: the same as boxes (x0, y0, x1, y1). mask_mode="limit" or "add": the draft
        runs too, and what it finds is limited to the mask, or the mask added to it.
    output_size: "source": pictures come back at their own size and mode, equal to the source outside the edit region.
    preview: True: the region alone is looked for.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many.
    height, width: the ratio of these, at `max_area` pixels, as in FluxKontextPipeline; where left out, the source's.
        Sizes are rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; FluxKontextPipeline has 16), and
        the source is brought to the size of the output, because tokens of both are compared at one place. A draft at 4x
        lower resolution a side has ceil(side / 64) tokens.
    several pictures: `image` may be a batch or list with one picture or as many as prompts;
        picture and prompt i give the images i * num_images_per_prompt and following.
    latents: packed white noise on the fine grid, [B, N, 4C].
    callback_on_step_end: `latents` holds the packed tokens of the step at hand: coarse grid, mixed sequence
        (target, then condition slots), or fine grid.

    With no image given, or `specedit=False`, the stock call runs. IP-Adapter is not supported.
    """

    TEXT = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")
    KWARGS = "joint_attention_kwargs"
    TEXT_TO_IMAGE = True
    PHOTOS = True
    SEVERAL_GPUS = True

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> FluxText:
        embeds, pooled = fields["prompt_embeds"], fields["pooled_prompt_embeds"]
        given = embeds is not None and pooled is not None and self._joint_attention_kwargs.get("scale") is None
        if given and self.text_encoder is None and type(self).encode_prompt is FluxKontextPipeline.encode_prompt:
            # what it does of these, whose first step after it waits for the transformer's dtype
            dtype = dtype_of(unwrapped(self.transformer))
            return FluxText(embeds, pooled, torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype))
        found = self.encode_prompt(
            **fields,
            device=device,
            num_images_per_prompt=call.num_images_per_prompt,
            max_sequence_length=call.max_sequence_length,
            lora_scale=self._joint_attention_kwargs.get("scale"),
        )
        return FluxText(*found)

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        image, size = call.image, (call.height, call.width)
        image = self.image_processor.resize(image, *size) if isinstance(image, (np.ndarray, Tensor)) else image
        pixels = preprocess(self.image_processor, image, *size, device)
        if pixels.shape[1] != 3:
            raise ValueError(f"image: expected pixels with 3 channels, got {pixels.shape[1]} channels")
        return pixels, [pixels]

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> FluxKontextModel:
        parts = (self.transformer, self.vae, guidance, attention_kwargs)
        return FluxKontextModel(*parts) if runner is None else FusedFluxModel(*parts, runner)

    def _arrange(self) -> Callable[[], None] | None:
        # elsewhere nothing is gained, and weights that are a file's own pages would be copied
        transformer = unwrapped(self.transformer)
        if next(transformer.parameters()).device.type != "cuda" or not join_projections_(transformer):
            return None
        torch.cuda.empty_cache()  # the former places are too small for the new ones
        return functools.partial(separate_projections_, transformer)

    def _size(self, call: Call) -> tuple[int, int]:
        """By FluxKontextPipeline's rules, in whole blocks; the source's ratio where none is given."""
        refuse_ip_adapter(call)
        height, width, max_area = call.height, call.width, call.max_area
        if height is None and width is None:
            height, width = picture_size(call.image)
            if call._auto_resize:
                ratio = width / height
                _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        ratio = width / height
        multiple = self.vae_scale_factor * PATCH * BLOCK
        fitted = [round((max_area / ratio) ** 0.5), round((max_area * ratio) ** 0.5)]
        # where the shorter side is a block at least, the longer one has the area that is left
        fitted = [max(min(side, max_area // multiple) // multiple, 1) * multiple for side in fitted]
        if fitted != [height, width]:
            logger.info("height and width are adjusted from %dx%d to %dx%d", height, width, *fitted)
        return fitted[0], fitted[1]


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's area in pixels, in the source's ratio; no guidance by default."""
    options: dict[str, Any] = {"true_cfg_scale": 1.0 if true_cfg_scale is None else true_cfg_scale}
    if "resolution" in settings:
        options |= {"max_area": settings["resolution"] ** 2, "_auto_resize": False}
    if options["true_cfg_scale"] > 1:
        options["negative_prompt"] = ""
    return options


register(
    Model(
        name="flux_kontext",
        pipelines={FluxKontextPipeline: SpecEditFluxKontextPipeline},
        processors={FluxAttnProcessor: SpecEditFluxAttnProcessor},
        codecs={AutoencoderKL: KLCodec},
        replaced={FluxTransformer2DModel: replaced},
        command=_command,
    )
)
