# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-Kontext as the stages see it: position ids for each token, text at the origin, one kind of guidance.

`FluxKontextModel` calls the transformer's own forward, `FusedFluxModel` that of few launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.grid import Grid, token_positions
from ..sampling.layout import SequenceLayout, table_positions
from . import flux_fused as fused
from .attention import AttentionLayout, TextWatch
from .fused_model import FusedLayout, FusedModel
from .model import EditModel, Pictures, Text, in_order, key_bias_in_order
from .vae import in_few_launches


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
            fresh=layout.fine_lengths + length if cached else None,
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


class FusedFluxModel(FusedModel, FluxKontextModel):
    """The same model through `flux_fused`, its steps and its autoencoder launched by a runner."""

    @property
    def _blocks(self) -> fused.Blocks:
        return fused.compiled_blocks() if self.runner.name == "compile" else fused.BLOCKS

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
        slot, name = torch.arange(image, dtype=torch.int32, device=device), "keys and values of the source"
        cache, made = self._kept(name, batch, image + max(lengths), text.embeds), []
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
        same = super().mixed_layout(text, pictures, layout, True, key_bias, False).attention
        return self._mixed(text, layout, same, cached, fused.Sequence)

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

        rows = None if cache is None else cache[0][0].shape[1]
        scale, transformer = self.attention_kwargs.get("scale"), id(self.transformer)
        tag = ("step", transformer, sequence.text, sequence.text_at, sequence.used, sequence.passing, scale, rows,
               watched)  # fmt: skip
        found, *seen = self.runner(tag, step, inputs, layout.buffers)
        if seen:
            [layout.watch.mass] = seen
        return found

    def decode(self, latents: Tensor) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            return in_few_launches(self.codec.vae, self.codec.decode, latents)

        tag = ("decode", self.codec.vae.use_slicing, self.codec.vae.use_tiling)
        return self.runner(tag, run, {"latents": latents})
