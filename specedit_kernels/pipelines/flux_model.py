# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-Kontext as the stages see it: position ids for each token, text at the origin, one kind of guidance.

`FluxKontextModel` calls the transformer's own forward, `FusedFluxModel` that of few launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ..sampling.grid import Grid, token_positions
from ..sampling.layout import SequenceLayout, table_positions
from . import flux_fused as fused
from . import kv_cache
from .attention import AttentionLayout, TextWatch
from .model import EditModel, Pictures, Text, in_order, key_bias_in_order
from .runner import StepRunner
from .vae import fused_norms


@dataclass
class FluxText(Text):
    """embeds [B, T, E], pooled [B, P], text_ids [T, 3]."""

    pooled: Tensor
    text_ids: Tensor


@dataclass(frozen=True)
class FluxLayout:
    """ids: [S, 3], shared by the batch; attention: the mixed sequence's, None for whole pictures."""

    ids: Tensor
    attention: AttentionLayout | None


class FluxKontextModel(EditModel):
    """FluxTransformer2DModel with AutoencoderKL."""

    @property
    def blocks(self) -> int:
        return self.transformer.config.num_layers + self.transformer.config.num_single_layers

    def embedder(self) -> torch.nn.Module:
        return self.transformer.x_embedder

    def dense_layout(self, text: FluxText, pictures: Pictures, grids: Sequence[Grid]) -> FluxLayout:
        device, ids = text.embeds.device, []
        for image, grid in enumerate(grids):
            place = token_positions(grid, device)
            ids.append(torch.cat([torch.full_like(place[:, :1], image), place], dim=1))
        return FluxLayout(torch.cat(ids).to(text.embeds.dtype), None)

    def watched_layout(
        self, text: FluxText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> FluxLayout:
        layout, batch = self.dense_layout(text, pictures, grids), text.embeds.shape[0]
        table = self.transformer.pos_embed(torch.cat([text.text_ids, layout.ids]))
        cos, sin = (x.expand(batch, *x.shape) for x in table)
        return replace(layout, attention=AttentionLayout(cos, sin, key_bias=None, lengths=None, watch=watch))

    def mixed_layout(
        self, text: FluxText, pictures: Pictures, layout: SequenceLayout, padded: bool, key_bias: bool, cached: bool
    ) -> FluxLayout:
        device, length = layout.index.device, text.embeds.shape[1]
        positions = table_positions(pictures.target, device, pictures.others, pictures.coarse_others)
        cos, sin = (in_order(x, layout) for x in self.transformer.pos_embed(positions))
        # text stands at the origin: rotated by nothing
        attention = AttentionLayout(
            cos=F.pad(cos, (0, 0, length, 0), value=1.0),
            sin=F.pad(sin, (0, 0, length, 0)),
            key_bias=F.pad(key_bias_in_order(pictures, layout), (length, 0)) if key_bias else None,
            lengths=layout.lengths + length if padded else None,
            cache=self.new_cache() if cached else None,
        )
        # the model makes one rotary table for the whole batch from these; the processor takes each sample's own
        return FluxLayout(torch.zeros(layout.capacity, 3, device=device, dtype=text.embeds.dtype), attention)

    def first_layout(
        self, text: FluxText, layout: FluxLayout, first: int | None, lock_text: bool = False
    ) -> FluxLayout:
        return FluxLayout(layout.ids[:first], layout.attention.of_first(text.embeds.shape[1], first, lock_text))

    def velocity(self, text: FluxText, tokens: Tensor, moment: Tensor, layout: FluxLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        if layout.attention is not None:
            kwargs["specedit_layout"] = layout.attention
        start = 0 if layout.attention is None else layout.attention.start
        return self.transformer(
            hidden_states=tokens,
            timestep=moment.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
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


# Mixed sequences get slots by so many: one capture then serves all edits of nearly one size. A matrix product computes
# whole tiles of 128 rows in any case.
SLOTS = 128


@dataclass(frozen=True)
class FusedLayout:
    """sequence: the step's. fresh: int32 [B], the tokens that an active step computes, text included, or None.

    cache: where the keys and values of each block are kept, None to keep none; buffers: the runner's name for them.
    watch: a module's attention to the text is recorded there.
    """

    sequence: fused.Sequence
    fresh: Tensor | None = None
    cache: list[fused.Kept] | None = None
    buffers: str = ""
    watch: TextWatch | None = None


def of_first(layout: FusedLayout, text: int, first: int | None, lock_text: bool) -> fused.Sequence:
    """The sequence of a call that brings the first so many image slots of a cached mixed one of `text` text tokens."""
    whole, start = layout.sequence, text if lock_text else 0
    # each sample's own fine tokens alone are computed anew
    fresh = whole.keys if first is None else layout.fresh
    end = whole.cos.shape[1] if first is None else text + first
    order = torch.arange(start, end, dtype=torch.int32, device=whole.cos.device)
    return replace(
        whole,
        text=text - start,
        cos=whole.cos[:, start:end],
        sin=whole.sin[:, start:end],
        queries=fresh - start,
        rows=torch.where(order < fresh[:, None], order, -1),
        passing=first is not None,
    )


class FusedFluxModel(FluxKontextModel):
    """The same model through `flux_fused`, its steps and its autoencoder launched by a runner."""

    def __init__(
        self, transformer: torch.nn.Module, vae: torch.nn.Module, guidance: Tensor | None,
        attention_kwargs: dict[str, Any], runner: StepRunner,
    ):  # fmt: skip
        super().__init__(transformer, vae, guidance, attention_kwargs)
        self.runner = runner
        self._blocks = fused.compiled_blocks() if runner.name == "compile" else fused.BLOCKS
        self._caches = 0

    def slots(self, count: int) -> int:
        return -(-count // SLOTS) * SLOTS

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        """Adapters at the caller's scale, as the transformer's own forward has them."""
        scale = self.attention_kwargs.get("scale", 1.0)
        if not USE_PEFT_BACKEND or scale == 1.0:
            yield
            return
        scale_lora_layers(self.transformer, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.transformer, scale)

    def dense_layout(self, text: FluxText, pictures: Pictures, grids: Sequence[Grid]) -> FusedLayout:
        ids = super().dense_layout(text, pictures, grids).ids
        cos, sin = self.transformer.pos_embed(torch.cat([text.text_ids, ids]))
        return FusedLayout(fused.Sequence(len(text.text_ids), *(x[None, :, ::2].contiguous() for x in (cos, sin))))

    def watched_layout(
        self, text: FluxText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> FusedLayout:
        return replace(self.dense_layout(text, pictures, grids), watch=watch)

    def edit_layout(
        self, text: FluxText, pictures: Pictures, layout: SequenceLayout, region: Tensor | None,
        text_mask: Tensor | None,
    ) -> FusedLayout:  # fmt: skip
        made = self.mixed_layout(text, pictures, layout, padded=False, key_bias=False, cached=False)
        # no slot is empty
        whole = replace(made.sequence, queries=None, keys=None, region=region, text_mask=text_mask)
        return replace(made, sequence=whole)

    def shield_layouts(
        self, source: FluxText, text: FluxText, pictures: Pictures, layout: SequenceLayout, first: int,
        region: Tensor | None, text_mask: Tensor | None,
    ) -> tuple[FusedLayout, FusedLayout]:  # fmt: skip
        # keys and values of the image first, then the text's: the two texts differ in length
        batch, image = layout.index.shape
        device, lengths = layout.index.device, [x.embeds.shape[1] for x in (source, text)]
        config, slot = self.transformer.config, torch.arange(image, dtype=torch.int32, device=device)
        shape = (batch, image + max(lengths), config.num_attention_heads, config.attention_head_dim)
        name = "keys and values of the source"
        kept = iter(self.runner.buffers(name, 2 * self.blocks, shape, text.embeds.dtype, device))
        cache, made = list(zip(kept, kept)), []
        own = torch.where(slot[:first] < layout.fine_lengths[:, None], slot[:first], -1)
        for x, length, rows in ((source, lengths[0], slot.expand(batch, image)), (text, lengths[1], own)):
            whole = self.edit_layout(x, pictures, layout, None, None).sequence
            words = torch.arange(image, image + length, dtype=torch.int32, device=device).expand(batch, length)
            tokens = length + rows.shape[1]
            sequence = replace(
                whole, cos=whole.cos[:, :tokens], sin=whole.sin[:, :tokens], rows=torch.cat([words, rows], dim=1),
                text_at=image, used=image + length,
            )  # fmt: skip
            made.append(FusedLayout(sequence, None, cache, name))
        branch, edit = made
        if region is not None:
            region = region[:, :first].contiguous()
        fresh = layout.fine_lengths + lengths[1]
        keys = torch.full_like(fresh, image + lengths[1])
        sequence = replace(edit.sequence, queries=fresh, keys=keys, region=region, text_mask=text_mask)
        return branch, replace(edit, sequence=sequence)

    def mixed_layout(
        self, text: FluxText, pictures: Pictures, layout: SequenceLayout, padded: bool, key_bias: bool, cached: bool
    ) -> FusedLayout:
        # lengths in any case: a capture with them serves sequences with and without empty slots
        same = super().mixed_layout(text, pictures, layout, True, key_bias, False).attention
        batch, length = text.embeds.shape[:2]
        cos, sin = (x[..., ::2].contiguous() for x in (same.cos, same.sin))
        sequence = fused.Sequence(length, cos, sin, same.key_bias, same.lengths, same.lengths)
        if not cached:
            return FusedLayout(sequence)
        config = self.transformer.config
        shape = (batch, length + layout.capacity, config.num_attention_heads, config.attention_head_dim)
        name, self._caches = f"keys and values {self._caches}", self._caches + 1
        cache = self._kept(name, shape, text.embeds.dtype, cos.device)
        return FusedLayout(sequence, layout.fine_lengths + length, cache, name)

    def _kept(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[fused.Kept]:
        """The runner's keys and values [B, keys, H, D] of each block under that name."""
        def buffers(name: str, blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[fused.Kept]:
            found = iter(self.runner.buffers(name, 2 * blocks, shape, dtype, device))
            return list(zip(found, found))

        if not self.fp8_cache:
            return buffers(name, self.blocks, shape, dtype)
        packed = buffers(name, self.blocks, shape, kv_cache.DTYPE)
        scales = buffers(f"{name}, scales", self.blocks, (*shape[:-1], 1), kv_cache.SCALES)
        [scratch] = buffers(f"{name}, of the block at work", 1, shape, dtype)
        return [kv_cache.PackedKV((*pair, *of), scratch) for pair, of in zip(packed, scales)]

    def first_layout(
        self, text: FluxText, layout: FusedLayout, first: int | None, lock_text: bool = False
    ) -> FusedLayout:
        return replace(layout, sequence=of_first(layout, text.embeds.shape[1], first, lock_text))

    def moments(self, text: FluxText, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation of all blocks, [B, ...] for each timestep."""
        steps, batch = len(timesteps), text.pooled.shape[0]
        guidance = None if self.guidance is None else self.guidance.repeat(steps)
        with self._scaled():
            found = fused.modulation(
                self.transformer, timesteps[:, None].expand(-1, batch).flatten(), guidance, text.pooled.repeat(steps, 1)
            )
        return found.unflatten(0, (steps, batch)).unbind()

    def velocity(self, text: FluxText, tokens: Tensor, moment: Tensor, layout: FusedLayout) -> Tensor:
        sequence, cache = layout.sequence, layout.cache
        names = ("cos", "sin", "key_bias", "queries", "keys", "rows", "region", "text_mask")
        watched = None
        if layout.watch is not None:
            blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
            watched = next(i for i, block in enumerate(blocks) if block.attn is layout.watch.module)
        inputs = dict(tokens=tokens, embeds=text.embeds[:, : sequence.text], modulation=moment)
        inputs |= {name: getattr(sequence, name) for name in names}

        def step(tokens: Tensor, embeds: Tensor, modulation: Tensor, **given: Tensor | None) -> tuple[Tensor, ...]:
            with self._scaled():
                seen: list[Tensor] = []
                found = fused.forward(
                    self.transformer, tokens, embeds, modulation, replace(sequence, **given), cache, self._blocks,
                    None if watched is None else (watched, seen),
                )  # fmt: skip
                return (found, *seen)

        kept = cache and (cache[0].scratch if self.fp8_cache else cache[0])
        rows = kept and kept[0].shape[1]
        scale, transformer = self.attention_kwargs.get("scale"), id(self.transformer)
        tag = ("step", transformer, sequence.text, sequence.text_at, sequence.used, sequence.passing, scale, rows, watched)
        found, *seen = self.runner(tag, step, inputs, layout.buffers)
        if seen:
            [layout.watch.mass] = seen
        return found

    def kv_bytes(self, layouts: Sequence[FusedLayout]) -> int:
        return self.runner.buffer_bytes

    def decode(self, latents: Tensor) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            with fused_norms(self.codec.vae):
                return self.codec.decode(latents)

        tag = ("decode", self.codec.vae.use_slicing, self.codec.vae.use_tiling)
        return self.runner(tag, run, {"latents": latents})
