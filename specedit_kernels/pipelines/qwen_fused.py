# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image's transformer in few launches: its own modules and weights, with torch.ops.specedit between the linear
layers.

Text and image are two streams [B, tokens, C] from the first block to the last, and meet in attention, text first. A
block's modulation depends on the timestep alone, so that of all blocks and of all steps of a stage is computed at once
(`modulation`: a third of the weights, read once a stage). Every linear layer is called as a module. The numbers are
those of QwenImageTransformer2DModel.forward but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel, QwenImageTransformerBlock
from torch import Tensor

from .. import ops
from . import fused
from .fused import Kept, attend, feed_forward, linear_of_each, places, renew


@dataclass(frozen=True)
class Sequence(fused.Sequence):
    """modulate: int32 [B, image tokens], which of two timesteps modulates an image token (zero_cond_t): 0 the step's, 1
    that of clean pictures; None where all have one."""

    modulate: Tensor | None = None


def modulation(transformer: QwenImageTransformer2DModel, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts, scales and gates of all blocks: (image [R, L 6 C], text [R, L 6 C + 2 C]), for R timesteps.

    timestep: [R] in [0, 1000]. like: a tensor of the tokens' dtype. The last 2 C of the text's are the output norm's
    scale and shift. With zero_cond_t the image's are [R, 2, L 6 C], the second row that of clean pictures.
    """
    blocks, at = transformer.transformer_blocks, timestep.to(like.dtype) / 1000

    def emb(at: Tensor) -> Tensor:
        return F.silu(transformer.time_text_embed(at, like))

    def of_image(emb: Tensor) -> Tensor:
        return torch.cat([block.img_mod[1](emb) for block in blocks], dim=-1)

    moving = emb(at)
    image = of_image(moving)
    if transformer.zero_cond_t:
        clean = of_image(emb(torch.zeros_like(at[:1])))
        image = torch.stack([image, clean.expand_as(image)], dim=1)
    text = torch.cat([*(block.txt_mod[1](moving) for block in blocks), transformer.norm_out.linear(moving)], dim=-1)
    return image, text


def double_block(
    block: QwenImageTransformerBlock, text: Tensor, image: Tensor, sequence: Sequence, kept: Kept | None,
    image_mod: Tensor, text_mod: Tensor, last: bool,
) -> None:  # fmt: skip
    """QwenImageTransformerBlock on text [B, T, C] and image tokens [B, N, C], in place.

    kept: where its keys and values go, None to forget them. image_mod: [B, 6 C], or [B, 2, 6 C] where the sequence says
    which of them is whose; text_mod: [B, 6 C]. last: nothing reads the text behind this block's attention.
    """
    attn, n, which = block.attn, sequence.text, sequence.modulate
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=-1)
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=-1)
    dim = attn.inner_dim // attn.heads
    q = image.new_empty(image.shape[0], n + image.shape[1], attn.heads, dim)
    k, v = places(q, kept, sequence)

    def place(x: Tensor, at: slice, layers: tuple[torch.nn.Module, ...]) -> None:
        *projections, norm_q, norm_k = layers
        rows = None if sequence.rows is None else sequence.rows[:, at]
        k_out, v_out = (y[:, at] if rows is None else y for y in (k, v))
        ops.qk_norm_rope_scatter_(
            q[:, at], k_out, v_out, *(part.unflatten(-1, (-1, dim)) for part in linear_of_each(projections, x)),
            sequence.cos[:, at], sequence.sin[:, at],
            q_weight=norm_q.weight, k_weight=norm_k.weight, kv_out_index=rows, eps=norm_q.eps,
        )  # fmt: skip

    if n:  # else the keys and values of the text are kept ones
        words = ops.adaln_modulate(text, t_scale, t_shift, eps=block.txt_norm1.eps)
        place(words, slice(0, n),
              (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k))  # fmt: skip
    spots = ops.adaln_modulate(image, i_scale, i_shift, modulation_index=which, eps=block.img_norm1.eps)
    place(spots, slice(n, None), (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k))
    renew(kept, sequence)
    out = attend(q, k, v, sequence)
    if n and not last:
        ops.gated_residual_add_(text, attn.to_add_out(out[:, :n]), t_gate)
        words = ops.adaln_modulate(text, t_scale2, t_shift2, eps=block.txt_norm2.eps)
        ops.gated_residual_add_(text, feed_forward(block.txt_mlp, words), t_gate2)
    out = attn.to_out[0](out[:, n:])
    for layer in attn.to_out[1:]:
        out = layer(out)
    ops.gated_residual_add_(image, out, i_gate, modulation_index=which)
    spots = ops.adaln_modulate(image, i_scale2, i_shift2, modulation_index=which, eps=block.img_norm2.eps)
    ops.gated_residual_add_(image, feed_forward(block.img_mlp, spots), i_gate2, modulation_index=which)


Block = Callable[..., None]


@functools.cache
def compiled_block() -> Block:
    """`double_block` under torch.compile, without a graph break."""
    return torch.compile(double_block, fullgraph=True)


def forward(
    transformer: QwenImageTransformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: tuple[Tensor, Tensor],
    sequence: Sequence,
    cache: list[Kept] | None = None,
    block: Block = double_block,
) -> Tensor:
    """Velocity of image tokens [B, S, 4C]: QwenImageTransformer2DModel.forward.

    embeds: [B, T, E], T = sequence.text. modulation: of `modulation`, a row for each sample. cache: of each block,
    where its keys and values outlive the step: it writes those of its tokens, and attends to all.
    """
    image = transformer.img_in(tokens)
    text = transformer.txt_in(transformer.txt_norm(embeds)) if sequence.text else image[:, :0]
    layers, width = transformer.transformer_blocks, 6 * transformer.inner_dim
    of_image, of_text = modulation
    for i, layer in enumerate(layers):
        own = slice(i * width, (i + 1) * width)
        kept, last = None if cache is None else cache[i], i == len(layers) - 1
        block(layer, text, image, sequence, kept, of_image[..., own], of_text[:, own], last)
        if image.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            text.clip_(-65504, 65504)
            image.clip_(-65504, 65504)
    scale, shift = of_text[:, len(layers) * width :].chunk(2, dim=1)
    return transformer.proj_out(ops.adaln_modulate(image, scale, shift, eps=transformer.norm_out.norm.eps))
