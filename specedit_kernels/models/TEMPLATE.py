# SPDX-License-Identifier: Apache-2.0
"""NAME OF THE MODEL: all that the engine cannot know of it, and its registration.

A copy of this file under a name in lower case is a model; this one is not imported. docs/add_a_model.md says what each
part is asked for, under the same numbers. As it stands it fits a transformer of double-stream blocks with an
AutoencoderKL. Replace the Stock* names by diffusers', and take out what your model does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StockPipeline
from diffusers.models.transformers.transformer_stock import StockAttnProcessor, _get_qkv_projections
from torch import Tensor

from ..engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from ..engine.autoencoder import KLCodec
from ..engine.model import EditModel, Pictures, Text, in_order, key_bias_in_order
from ..engine.pipeline import Call, SpecEditMixin, picture_size, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import StepLayout, TextWatch, mixed_step_layout, whole_step_layout
from ..sampling.grid import BLOCK, PATCH, Grid, token_positions
from ..sampling.layout import SequenceLayout, table_positions

# 1. The attention processor


class SpecEditStockAttnProcessor(SpecEditAttnProcessor):
    """For StockAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.layout is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        heads = (-1, attn.head_dim)  # -1: tensor parallelism shards them
        # where the stock file has no such function: attn.to_q(hidden_states) and so on
        q, k, v, tq, tk, tv = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        q, k, v = (x.unflatten(-1, heads) for x in (q, k, v))
        q, k, text = attn.norm_q(q), attn.norm_k(k), None
        if encoder_hidden_states is not None:
            tq, tk, tv = (x.unflatten(-1, heads) for x in (tq, tk, tv))
            text = (attn.norm_added_q(tq), attn.norm_added_k(tk), tv)
        # not rotated: joint_attention does that
        out = joint_attention(self, text, (q, k, v), self.layout)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, length:])), attn.to_add_out(out[:, :length])


# 2. Text


@dataclass
class StockText(Text):
    """embeds [B, T, E], ids [T, 3]."""

    PER_SAMPLE = ("embeds",)

    ids: Tensor


# 3. Position ids


def image_ids(table: Tensor, text: StockText) -> Tensor:
    """The model's ids of rows of (picture, row, column), fp32 [n, 3], fractions of rows and columns included.

    text: for ids that begin after the text, as the page says of them.
    """
    return table


@dataclass(frozen=True)
class StockLayout:
    """ids: [S, 3], shared by the batch. attention: the mixed sequence's, None for whole pictures."""

    ids: Tensor
    attention: StepLayout | None = None


class StockEditModel(EditModel):
    """StockTransformer2DModel with AutoencoderKL."""

    def embedder(self) -> torch.nn.Module:
        return self.transformer.x_embedder

    def dense_layout(self, text: StockText, pictures: Pictures, grids: Sequence[Grid]) -> StockLayout:
        device = text.embeds.device
        rows = [F.pad(token_positions(grid, device), (1, 0), value=float(i)) for i, grid in enumerate(grids)]
        return StockLayout(image_ids(torch.cat(rows), text))

    def watched_layout(
        self, text: StockText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch
    ) -> StockLayout:
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        cos, sin = self.transformer.pos_embed(torch.cat([text.ids, layout.ids]))
        return replace(layout, attention=whole_step_layout(length, (cos[None], sin[None]), batch, watch=watch))

    def mixed_layout(
        self, text: StockText, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> StockLayout:
        device, (batch, length) = layout.index.device, text.embeds.shape[:2]
        table = table_positions(pictures.target, device, pictures.others, pictures.coarse_others)
        of_text = self.transformer.pos_embed(text.ids)
        of_image = self.transformer.pos_embed(image_ids(table, text))
        both = zip(of_text, of_image)
        cos, sin = (torch.cat([a.expand(batch, *a.shape), in_order(b, layout)], dim=1) for a, b in both)
        bias = F.pad(key_bias_in_order(pictures, layout), (length, 0)) if key_bias else None
        attention = mixed_step_layout(length, (cos, sin), layout, bias, self.new_cache() if cached else None)
        # of the right length; the processors have each sample's own
        return StockLayout(torch.zeros(layout.capacity, 3, device=device, dtype=torch.float32), attention)

    def active_layout(
        self, text: StockText, layout: StockLayout, first: int | None, lock_text: bool = False
    ) -> StockLayout:
        return super().active_layout(text, replace(layout, ids=layout.ids[:first]), first, lock_text)

    # 4. One call of the transformer

    def velocity(self, text: StockText, tokens: Tensor, conditioning: Tensor, layout: StockLayout) -> Tensor:
        start = 0 if layout.attention is None else layout.attention.start
        with with_layout(self.transformer, layout.attention, whole=True):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=self.guidance,
                encoder_hidden_states=text.embeds[:, start:],
                txt_ids=text.ids[start:],
                img_ids=layout.ids,
                return_dict=False,
            )[0]

    # 5. Guidance

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)


# 6. The pipeline


class SpecEditStockPipeline(SpecEditMixin, StockPipeline):
    """StockPipeline with SpecEdit. What is different in the call goes here: users see this text."""

    RUNNERS = ("eager",)
    TEXT = ("prompt", "prompt_embeds")
    TRUE_CFG = "true_cfg_scale"

    def _size(self, call: Call) -> tuple[int, int]:
        height, width = picture_size(call.image)
        multiple = self.vae_scale_factor * PATCH * BLOCK
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> StockText:
        embeds, ids = self.encode_prompt(
            **fields, device=device, num_images_per_prompt=call.num_images_per_prompt
        )  # fmt: skip
        # positive branch first: what the negative one needs of it (its length) is kept in `call`
        return StockText(embeds, ids)

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        pixels = preprocess(self.image_processor, call.image, call.height, call.width, device)
        return pixels, [pixels]

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> StockEditModel:
        return StockEditModel(self.transformer, self.vae, guidance, attention_kwargs)


# 7. The command line


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls."""
    return {} if true_cfg_scale is None else {"true_cfg_scale": true_cfg_scale}


register(
    Model(
        name="stock",  # this file's name
        pipelines={StockPipeline: SpecEditStockPipeline},
        processors={StockAttnProcessor: SpecEditStockAttnProcessor},
        codecs={AutoencoderKL: KLCodec},
        command=_command,
    )
)
