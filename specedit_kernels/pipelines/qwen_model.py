# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-Edit as the stages see it.

Its positions and its timestep of condition tokens (zero_cond_t) follow from a list of picture shapes, so a sequence
that is no list of whole pictures has to bring both itself: rotary tables to the attention processor, the index of the
modulation by a hook of the blocks. `QwenImageEditModel` calls the transformer's own forward, `FusedQwenModel` that of
few launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.grid import Grid
from ..sampling.layout import SequenceLayout, table_positions
from . import qwen_fused as fused
from .attention import AttentionLayout, TextWatch
from .config import QWEN_THRESHOLDS
from .fused_model import FusedLayout, FusedModel
from .model import EditModel, Pictures, Text, in_order, key_bias_in_order
from .vae import lone_frames


@dataclass
class QwenText(Text):
    """embeds [B, T, E], mask [B, T] (0 or False: padding) or None where every token counts."""

    mask: Tensor | None


@dataclass(frozen=True)
class QwenLayout:
    """shapes: (frames, rows, columns) of each picture, from which the transformer makes positions of its own.

    attention: the mixed sequence's, None for whole pictures.
    """

    shapes: tuple[tuple[int, int, int], ...]
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

    thresholds = QWEN_THRESHOLDS

    @property
    def blocks(self) -> int:
        return self.transformer.config.num_layers

    def embedder(self) -> torch.nn.Module:
        return self.transformer.img_in

    def dense_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid]) -> QwenLayout:
        # Smaller pictures are a plain run of their own, so the text stands where that has it, right behind them.
        return QwenLayout(_shapes(grids), None)

    def _turns(self, text: QwenText, layout: QwenLayout) -> Tensor:
        """Complex rotary table of text and whole pictures, [tokens, head dim / 2]."""
        device, length = text.embeds.device, text.embeds.shape[1]
        return torch.cat(self.transformer.pos_embed([list(layout.shapes)], device=device, max_txt_seq_len=length)[::-1])

    def watched_layout(
        self, text: QwenText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> QwenLayout:
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        turn = self._turns(text, layout)
        cos, sin = (x.repeat_interleave(2, dim=1).expand(batch, -1, -1) for x in (turn.real, turn.imag))
        bias = None
        if text.mask is not None:
            bias = cos.new_zeros(cos.shape[:2])
            bias[:, :length].masked_fill_(~text.mask.to(bias.device, torch.bool), float("-inf"))
        return replace(layout, attention=AttentionLayout(cos, sin, bias, lengths=None, watch=watch))

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
        attention = AttentionLayout(cos, sin, bias, lengths, modulate)
        if cached:
            attention = replace(attention, cache=self.new_cache(), fresh=layout.fine_lengths + length)
        # one token's shape: what the transformer makes of it is replaced, in the processor and in the blocks
        return QwenLayout(_shapes([(1, 1)]), attention)

    def first_layout(
        self, text: QwenText, layout: QwenLayout, first: int | None, lock_text: bool = False
    ) -> QwenLayout:
        return replace(layout, attention=layout.attention.of_first(text.embeds.shape[1], first, lock_text))

    def velocity(self, text: QwenText, tokens: Tensor, moment: Tensor, layout: QwenLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
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


class FusedQwenModel(FusedModel, QwenImageEditModel):
    """The same model through `qwen_fused`, its steps and its autoencoder launched by a runner."""

    # Two branches run as one batch where their texts differ by no more tokens than this: the shorter one is padded.
    JOINED = 256

    # the timesteps of the last call of `moments`, and what it gave
    _moments: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] = (None, [])
    # the same of `joined`, which every step asks
    _joined: tuple[tuple[QwenText, ...], QwenText | None] = ((), None)

    @property
    def _block(self) -> fused.Block:
        return fused.compiled_block() if self.runner.name == "compile" else fused.double_block

    def joined(self, texts: Sequence[QwenText]) -> QwenText | None:
        before = self._joined[0]
        if len(before) != len(texts) or any(a is not b for a, b in zip(before, texts)):
            self._joined = tuple(texts), self._join(texts)
        return self._joined[1]

    def _join(self, texts: Sequence[QwenText]) -> QwenText | None:
        lengths = [text.embeds.shape[1] for text in texts]
        longest = max(lengths)
        if len(texts) == 1 or longest - min(lengths) > self.JOINED:
            return None
        embeds = torch.cat([F.pad(x.embeds, (0, 0, 0, longest - n)) for x, n in zip(texts, lengths)])
        if min(lengths) == longest and all(text.mask is None for text in texts):
            return QwenText(embeds, None)
        masks = [x.embeds.new_ones(x.embeds.shape[:2]) if x.mask is None else x.mask for x in texts]
        return QwenText(embeds, torch.cat([F.pad(m.bool(), (0, longest - n)) for m, n in zip(masks, lengths)]))

    def dense_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid]) -> FusedLayout:
        layout, (batch, length) = super().dense_layout(text, pictures, grids), text.embeds.shape[:2]
        device = text.embeds.device
        turn = self._turns(text, layout)[None]
        counts = [math.prod(grid) for grid in grids]
        bias = modulate = None
        if text.mask is not None:
            bias = turn.real.new_zeros(batch, length + sum(counts))
            bias[:, :length].masked_fill_(~text.mask.to(device, torch.bool), float("-inf"))
        if self.transformer.zero_cond_t:
            behind = torch.arange(sum(counts), device=device) >= counts[0]
            modulate = behind.int().expand(batch, -1).contiguous()
        cos, sin = turn.real.contiguous(), turn.imag.contiguous()
        return FusedLayout(fused.Sequence(length, cos, sin, bias, modulate=modulate))

    def mixed_layout(
        self, text: QwenText, pictures: Pictures, layout: SequenceLayout, padded: bool, key_bias: bool, cached: bool
    ) -> FusedLayout:
        same = super().mixed_layout(text, pictures, layout, True, key_bias, False).attention
        return self._mixed(text, layout, same, cached, fused.Sequence, modulate=same.modulate)

    def first_layout(
        self, text: QwenText, layout: FusedLayout, first: int | None, lock_text: bool = False
    ) -> FusedLayout:
        made = super().first_layout(text, layout, first, lock_text)
        modulate = made.sequence.modulate
        if modulate is None or first is None:
            return made
        return replace(made, sequence=replace(made.sequence, modulate=modulate[:, :first].contiguous()))

    def moments(self, text: QwenText, timesteps: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """The modulation of all blocks for each timestep, (image, text), a row each: all branches share it."""
        if self._moments[0] is not timesteps:
            with self._scaled():
                found = fused.modulation(self.transformer, timesteps, text.embeds)
            self._moments = timesteps, list(zip(*(x.split(1) for x in found)))
        return self._moments[1]

    def velocity(
        self, text: QwenText, tokens: Tensor, moment: tuple[Tensor, Tensor], layout: FusedLayout
    ) -> Tensor:
        sequence, cache = layout.sequence, layout.cache
        names = ("cos", "sin", "key_bias", "queries", "keys", "rows", "modulate")
        inputs = dict(tokens=tokens, embeds=text.embeds[:, : sequence.text], of_image=moment[0], of_text=moment[1])
        inputs |= {name: getattr(sequence, name) for name in names}

        def step(tokens: Tensor, embeds: Tensor, of_image: Tensor, of_text: Tensor, **given: Tensor | None) -> Tensor:
            modulation = tuple(x.expand(tokens.shape[0], *x.shape[1:]) for x in (of_image, of_text))
            with self._scaled():
                return fused.forward(
                    self.transformer, tokens, embeds, modulation, replace(sequence, **given), cache, self._block
                )

        rows = None if cache is None else cache[0][0].shape[1]
        tag = ("step", id(self.transformer), sequence.text, sequence.passing,
               self.attention_kwargs.get("scale"), rows)  # fmt: skip
        return self.runner(tag, step, inputs, layout.buffers)

    def _with_vae(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        vae = self.codec.vae

        def run(x: Tensor) -> Tensor:
            with lone_frames(vae):
                return function(x)

        # scaling stays outside: its numbers come from the host on every call
        return self.runner((name, vae.use_slicing, vae.use_tiling), run, {"x": x})

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, H, W] -> clean latents [B, C, h, w]."""
        return self.codec.scaled(self._with_vae("encode", self.codec.mode, pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self._with_vae("decode", self.codec.pixels, self.codec.unscaled(latents))
