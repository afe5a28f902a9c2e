# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-Kontext as the stages see it: position ids for each token, text at the origin, one kind of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.grid import Grid, token_positions
from ..sampling.layout import SequenceLayout, table_positions
from .attention import AttentionLayout, TextWatch
from .model import EditModel, Pictures, Text, in_order, key_bias_in_order


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
            cache={} if cached else None,
        )
        # the model makes one rotary table for the whole batch from these; the processor takes each sample's own
        return FluxLayout(torch.zeros(layout.capacity, 3, device=device, dtype=text.embeds.dtype), attention)

    def first_layout(self, text: FluxText, layout: FluxLayout, first: int) -> FluxLayout:
        return FluxLayout(layout.ids[:first], layout.attention.of_first(text.embeds.shape[1] + first))

    def velocity(self, text: FluxText, tokens: Tensor, timestep: Tensor, layout: FluxLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        if layout.attention is not None:
            kwargs["specedit_layout"] = layout.attention
        return self.transformer(
            hidden_states=tokens,
            timestep=timestep.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
            guidance=self.guidance,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=text.text_ids,
            img_ids=layout.ids,
            joint_attention_kwargs=kwargs,
            return_dict=False,
        )[0]

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)
