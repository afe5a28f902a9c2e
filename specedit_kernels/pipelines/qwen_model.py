# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-Edit as the stages see it.

Its positions and its timestep of condition tokens (zero_cond_t) follow from a list of picture shapes, so a sequence
that is no list of whole pictures has to bring both itself: rotary tables by the attention processor, the index of the
modulation by a hook of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sampling.grid import Grid
from ..sampling.layout import SequenceLayout, table_positions
from .attention import AttentionLayout, TextWatch
from .model import EditModel, Pictures, Text, in_order, key_bias_in_order


@dataclass
class QwenText(Text):
    """embeds [B, T, E], mask [B, T] (0 or False: padding) or None where every token counts."""

    mask: Tensor | None


@dataclass(frozen=True)
class QwenLayout:
    """shapes: (frames, rows, columns) of each picture, what the transformer makes its own positions from.

    rotary: complex tables (image tokens, text tokens) in place of those, or None. attention: the mixed sequence's, None
    for whole pictures.
    """

    shapes: tuple[tuple[int, int, int], ...]
    rotary: tuple[Tensor, Tensor] | None
    attention: AttentionLayout | None


def _shapes(grids: Sequence[Grid]) -> tuple[tuple[int, int, int], ...]:
    return tuple((1, rows, columns) for rows, columns in grids)


def text_offset(grids: Sequence[Grid]) -> int:
    """Position of the first text token on all three axes: past the largest half side of the centred pictures."""
    return max(max(rows // 2, columns // 2) for rows, columns in grids)


def centred(positions: Tensor, grids: Sequence[Grid]) -> Tensor:
    """(picture, row, column) from the top left corner -> Qwen's positions, rows and columns counted from the centre.

    positions: fp32 [n, 3]; picture i has the grid grids[i]. A side of n tokens runs from -ceil(n / 2).
    """
    start = torch.tensor([[0, -(-r // 2), -(-c // 2)] for r, c in grids], dtype=torch.float32)
    return positions - start.to(positions.device)[positions[:, 0].long()]


def rotary_table(positions: Tensor, axes: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin), fp32 [n, sum(axes)], for positions fp32 [n, len(axes)], fractions allowed.

    Neighbouring channels share an angle: position * theta^(-2i / axis) for pair i of an axis.
    """
    angles = []
    for i, dim in enumerate(axes):
        power = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device).div(dim)
        angles.append(torch.outer(positions[:, i], 1.0 / torch.pow(theta, power)))
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


class QwenImageEditModel(EditModel):
    """QwenImageTransformer2DModel with AutoencoderKLQwenImage."""

    @property
    def blocks(self) -> int:
        return self.transformer.config.num_layers

    def embedder(self) -> torch.nn.Module:
        return self.transformer.img_in

    def dense_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid]) -> QwenLayout:
        shapes, full = _shapes(grids), _shapes((pictures.target, *pictures.references))
        if shapes == full:
            return QwenLayout(shapes, None, None)
        # smaller pictures lie about the centre on grids of their own; the text stays where the full ones put it
        table, options = self.transformer.pos_embed, dict(max_txt_seq_len=text.embeds.shape[1])
        image, _ = table([list(shapes)], device=text.embeds.device, **options)
        _, words = table([list(full)], device=text.embeds.device, **options)
        return QwenLayout(shapes, (image, words), None)

    def watched_layout(
        self, text: QwenText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> QwenLayout:
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        image, words = layout.rotary or self.transformer.pos_embed(
            [list(layout.shapes)], device=text.embeds.device, max_txt_seq_len=length
        )
        turn = torch.cat([words, image])
        cos, sin = (x.repeat_interleave(2, dim=1).expand(batch, -1, -1) for x in (turn.real, turn.imag))
        bias = None
        if text.mask is not None:
            bias = cos.new_zeros(cos.shape[:2])
            bias[:, :length].masked_fill_(~text.mask.to(bias.device, torch.bool), float("-inf"))
        return replace(layout, rotary=None, attention=AttentionLayout(cos, sin, bias, lengths=None, watch=watch))

    def mixed_layout(
        self, text: QwenText, pictures: Pictures, layout: SequenceLayout, padded: bool, key_bias: bool, cached: bool
    ) -> QwenLayout:
        device = layout.index.device
        batch, length = text.embeds.shape[:2]
        embedding, grids = self.transformer.pos_embed, (pictures.target, *pictures.references)
        table = table_positions(pictures.target, device, pictures.others, pictures.coarse_others)
        words = torch.arange(length, dtype=torch.float32, device=device)[:, None] + text_offset(grids)
        axes, theta = embedding.axes_dim, embedding.theta
        ahead = rotary_table(words.expand(length, 3), axes, theta)
        behind = rotary_table(centred(table, grids), axes, theta)
        cos, sin = (torch.cat([a.expand(batch, *a.shape), in_order(b, layout)], dim=1) for a, b in zip(ahead, behind))
        bias = None
        if key_bias or text.mask is not None:
            bias = cos.new_zeros(batch, length + layout.capacity)
            if key_bias:
                bias[:, length:] = key_bias_in_order(pictures, layout)
            if text.mask is not None:
                bias[:, :length].masked_fill_(~text.mask.to(device, torch.bool), float("-inf"))
        modulate = None
        if self.transformer.zero_cond_t:
            modulate = (~layout.target_slots()).int()
        lengths = layout.lengths + length if padded else None
        attention = AttentionLayout(cos, sin, bias, lengths, modulate, self.new_cache() if cached else None)
        # one token's shape: what the transformer makes of it is replaced, in the processor and in the blocks
        return QwenLayout(_shapes([(1, 1)]), None, attention)

    def first_layout(
        self, text: QwenText, layout: QwenLayout, first: int | None, lock_text: bool = False
    ) -> QwenLayout:
        return replace(layout, attention=layout.attention.of_first(text.embeds.shape[1], first, lock_text))

    def velocity(self, text: QwenText, tokens: Tensor, moment: Tensor, layout: QwenLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        if layout.rotary is not None:
            kwargs["specedit_rotary"] = layout.rotary
        if layout.attention is not None:
            kwargs["specedit_layout"] = layout.attention
        start = 0 if layout.attention is None else layout.attention.start
        return self.transformer(
            hidden_states=tokens,
            timestep=moment.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
            guidance=self.guidance,
            # in a mixed sequence the key bias holds the mask
            encoder_hidden_states_mask=text.mask if layout.attention is None else None,
            encoder_hidden_states=text.embeds[:, start:],
            img_shapes=[list(layout.shapes)] * tokens.shape[0],
            attention_kwargs=kwargs,
            return_dict=False,
        )[0]

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Guidance with each token's velocity brought back to the length of its conditional one."""
        guided = negative + scale * (positive - negative)
        length = torch.norm(positive, dim=-1, keepdim=True)
        return guided * (length / torch.norm(guided, dim=-1, keepdim=True))
