# SPDX-License-Identifier: Apache-2.0
"""FLUX's transformer in few launches: its own modules and weights, with torch.ops.specedit between the linear layers.

Text and image lie in one tensor [B, text | image, C] from the first block to the last. A block's modulation depends on
the timestep alone, so that of all blocks and of all steps of a stage is computed at once (`modulation`), and a step
(`forward`) is left with what depends on its tokens. A linear layer that is no plain one is called as a module: adapters
and quantised weights pass. The numbers are those of FluxTransformer2DModel.forward but for rounding: norms, rotation,
residuals and GELU round once, where that one rounds after each operation, and the sum over attention and MLP in a
single block's last layer rounds between the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor

from .. import ops
from .fused import (
    Kept,
    Sequence,
    attend,
    feed_forward,
    gelu,
    is_plain,
    join_,
    linear_of_each,
    places,
    renew,
    watched_mass,
)


def _modulated(transformer: FluxTransformer2DModel) -> list[torch.nn.Module]:
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
    return torch.cat([norm.linear(emb) for norm in _modulated(transformer)], dim=-1)


def _projections(attn: FluxAttention, text: bool = False) -> tuple[torch.nn.Module, ...]:
    """The layers of q, k and v of image tokens, or of text in a double block."""
    return (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (attn.to_q, attn.to_k, attn.to_v)


def join_projections_(transformer: FluxTransformer2DModel) -> bool:
    """`fused.join_` the layers of each q, k and v. Returns whether any weight was moved."""
    attentions = [(block.attn, text) for block in transformer.transformer_blocks for text in (False, True)]
    attentions += [(block.attn, False) for block in transformer.single_transformer_blocks]
    return any([join_(_projections(*each)) for each in attentions if not each[0].fused_projections])


def _project(attn: FluxAttention, x: Tensor, text: bool = False) -> list[Tensor]:
    """q, k and v [B, N, H, D] of image tokens, or of text in a double block."""
    if attn.fused_projections:
        parts = (attn.to_added_qkv if text else attn.to_qkv)(x).chunk(3, dim=-1)
    else:
        parts = linear_of_each(_projections(attn, text), x)
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def _of_both(layer: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """A linear layer on a and b side by side, [B, N, C1] and [B, N, C2]: a plain one without the copy of both."""
    if not is_plain(layer):
        return layer(torch.cat([a, b], dim=-1))
    at = a.shape[-1]
    y = F.linear(a, layer.weight[:, :at], layer.bias)
    y.flatten(0, -2).addmm_(b.flatten(0, -2), layer.weight[:, at:].t())
    return y


def _buffers(
    x: Tensor, attn: FluxAttention, kept: Kept | None, sequence: Sequence
) -> tuple[Tensor, Tensor, Tensor]:
    """Where q, k and v of tokens x go, [B, N, H, D]; k and v to `kept` where that is given."""
    q = x.new_empty(*x.shape[:2], attn.inner_dim // attn.head_dim, attn.head_dim)
    return q, *places(q, kept, sequence)


def double_block(
    block: FluxTransformerBlock, x: Tensor, sequence: Sequence, kept: Kept | None, image_mod: Tensor, text_mod: Tensor
) -> Tensor | None:
    """FluxTransformerBlock on text and image tokens x [B, N, C], in place. Returns what `watched_mass` does.

    kept: where its keys and values go, None to forget them. image_mod, text_mod: [B, 6 C].
    """
    attn, n = block.attn, sequence.text
    text, image = x[:, :n], x[:, n:]
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=1)
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=1)
    q, k, v = _buffers(x, attn, kept, sequence)

    def place(parts: list[Tensor], at: slice, norm_q: torch.nn.RMSNorm, norm_k: torch.nn.RMSNorm) -> None:
        rows = None if sequence.rows is None else sequence.rows[:, at]
        k_out, v_out = (y[:, at] if rows is None else y for y in (k, v))
        ops.qk_norm_rope_scatter_(
            q[:, at], k_out, v_out, *parts, sequence.cos[:, at], sequence.sin[:, at],
            q_weight=norm_q.weight, k_weight=norm_k.weight, kv_out_index=rows, eps=norm_q.eps,
        )  # fmt: skip

    if n:  # else its keys and values are kept ones
        words = ops.adaln_modulate(text, t_scale, t_shift, eps=block.norm1_context.norm.eps)
        place(_project(attn, words, text=True), slice(0, n), attn.norm_added_q, attn.norm_added_k)
    spots = ops.adaln_modulate(image, i_scale, i_shift, eps=block.norm1.norm.eps)
    place(_project(attn, spots), slice(n, None), attn.norm_q, attn.norm_k)
    renew(kept, sequence)
    out = attend(q, k, v, sequence)
    if n:
        ops.gated_residual_add_(text, attn.to_add_out(out[:, :n]), t_gate)
        words = ops.adaln_modulate(text, t_scale2, t_shift2, eps=block.norm2_context.eps)
        ops.gated_residual_add_(text, feed_forward(block.ff_context, words), t_gate2)
    ops.gated_residual_add_(image, attn.to_out[1](attn.to_out[0](out[:, n:])), i_gate)
    spots = ops.adaln_modulate(image, i_scale2, i_shift2, eps=block.norm2.eps)
    ops.gated_residual_add_(image, feed_forward(block.ff, spots), i_gate2)
    return watched_mass(q, k, v, sequence)


def single_block(
    block: FluxSingleTransformerBlock, x: Tensor, sequence: Sequence, kept: Kept | None, mod: Tensor
) -> Tensor | None:
    """FluxSingleTransformerBlock on text and image tokens x [B, N, C], in place; kept as above, mod: [B, 3 C]."""
    attn = block.attn
    shift, scale, gate = mod.chunk(3, dim=1)
    y = ops.adaln_modulate(x, scale, shift, eps=block.norm.norm.eps)
    q, k, v = _buffers(y, attn, kept, sequence)
    ops.qk_norm_rope_scatter_(
        q, k, v, *_project(attn, y), sequence.cos, sequence.sin,
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, kv_out_index=sequence.rows, eps=attn.norm_q.eps,
    )  # fmt: skip
    renew(kept, sequence)
    attended, hidden = attend(q, k, v, sequence), gelu(block.proj_mlp, y)
    ops.gated_residual_add_(x, _of_both(block.proj_out, attended, hidden), gate)
    return watched_mass(q, k, v, sequence)


Blocks = tuple[Callable[..., Tensor | None], Callable[..., Tensor | None]]
BLOCKS: Blocks = (double_block, single_block)


@functools.cache
def compiled_blocks() -> Blocks:
    """`double_block` and `single_block` under torch.compile, without a graph break."""
    return tuple(torch.compile(block, fullgraph=True) for block in BLOCKS)


def forward(
    transformer: FluxTransformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: Tensor,
    sequence: Sequence,
    cache: list[Kept] | None = None,
    blocks: Blocks = BLOCKS,
    watch: tuple[int, list[Tensor]] | None = None,
) -> Tensor:
    """Velocity of image tokens [B, S, 4C]: FluxTransformer2DModel.forward.

    embeds: [B, T, E], T = sequence.text. modulation: [B, ...], rows of `modulation`. cache: of each block, where its
    keys and values outlive the step: it writes those of its tokens, and attends to all. watch: index of a block,
    and where what its attention gives to the text is added.
    """
    x = transformer.x_embedder(tokens)
    if sequence.text:
        x = torch.cat([transformer.context_embedder(embeds), x], dim=1)
    mods = iter(modulation.split([norm.linear.out_features for norm in _modulated(transformer)], dim=-1))
    double, single = blocks
    layers = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for i, layer in enumerate(layers):
        kept = None if cache is None else cache[i]
        known = replace(sequence, watched=True) if watch and i == watch[0] else sequence
        if i < len(transformer.transformer_blocks):
            seen = double(layer, x, known, kept, next(mods), next(mods))
        else:
            seen = single(layer, x, known, kept, next(mods))
        if seen is not None:
            watch[1].append(seen)
        if x.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            x.clip_(-65504, 65504)
    scale, shift = next(mods).chunk(2, dim=1)
    image = x[:, sequence.text :]
    return transformer.proj_out(ops.adaln_modulate(image, scale, shift, eps=transformer.norm_out.norm.eps))
