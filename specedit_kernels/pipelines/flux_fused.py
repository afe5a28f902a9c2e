# SPDX-License-Identifier: Apache-2.0
"""FLUX's transformer in few launches: its own modules and weights, with torch.ops.specedit between the linear layers.

Text and image lie in one tensor [B, text | image, C] from the first block to the last. A block's modulation depends on
the timestep alone, so that of all blocks and of all steps of a stage is computed at once (`modulation`), and a step
(`forward`) is left with what depends on its tokens. A linear layer that is no plain one is called as a module: adapters
and quantised weights pass. The numbers are those of FluxTransformer2DModel.forward but for rounding: norms, rotation,
residuals and GELU round once, where that one rounds after each operation, and the sum over attention and MLP in a single
block's last layer rounds between the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from .attention import text_mass


@dataclass(frozen=True)
class Sequence:
    """What a step has to know of its sequence: `text` tokens, then image tokens; N tokens in all.

    cos, sin: fp32 [B or 1, N, D/2], rotary tables. key_bias: fp32 [B, keys] or None. queries, keys: int32 [B], how many
    tokens ask and how many keys are there, None: all. rows: int32 [B, N], the key that each token is, -1: none, to be
    left as it is; None: in order. (No text tokens: those keys stay as they were kept.) text_at: the key of the first text token, behind those of the image or 0. used: keys
    there are where that is known beforehand, None: all.
    region: int32 [B, image tokens], which row of text_mask, bool [B, regions, text], says what text an image token
    sees; None: all see all. watched: what attention the image gives to the text is asked for.
    """

    text: int
    cos: Tensor
    sin: Tensor
    key_bias: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    rows: Tensor | None = None
    text_at: int = 0
    used: int | None = None
    region: Tensor | None = None
    text_mask: Tensor | None = None
    watched: bool = False


# Keys and values of a block that outlive a step, [B, keys, H, D] each. Tensors of their own: torch.compile takes views
# of one tensor at several offsets for views at the first of them.
Kept = tuple[Tensor, Tensor]


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


def _project(attn: FluxAttention, x: Tensor, text: bool = False) -> list[Tensor]:
    """q, k and v [B, N, H, D] of image tokens, or of text in a double block."""
    if attn.fused_projections:
        parts = (attn.to_added_qkv if text else attn.to_qkv)(x).chunk(3, dim=-1)
    else:
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (attn.to_q, attn.to_k, attn.to_v)
        parts = [layer(x) for layer in layers]
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a layer is nothing but its weight and bias: no adapter, no quantised weight."""
    return type(layer) is torch.nn.Linear and layer.bias is not None and not is_traceable_wrapper_subclass(layer.weight)


def _gelu(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """GELU, by tanh, of a linear layer on x [B, N, C]: within the product where that is a plain one of a CUDA device."""
    if _is_plain(layer) and x.is_cuda:
        y = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return F.gelu(layer(x), approximate="tanh")


def _feed_forward(ff: FeedForward, x: Tensor) -> Tensor:
    first, *rest = ff.net
    if type(first) is not GELU or first.approximate != "tanh":
        return ff(x)
    x = _gelu(first.proj, x)
    for layer in rest:
        x = layer(x)
    return x


def _of_both(layer: torch.nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """A linear layer on a and b side by side, [B, N, C1] and [B, N, C2]: a plain one without the copy that joins them."""
    if not _is_plain(layer):
        return layer(torch.cat([a, b], dim=-1))
    at = a.shape[-1]
    y = F.linear(a, layer.weight[:, :at], layer.bias)
    y.flatten(0, -2).addmm_(b.flatten(0, -2), layer.weight[:, at:].t())
    return y


def _buffers(x: Tensor, attn: FluxAttention, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where q, k and v of tokens x go, [B, N, H, D]; k and v to `kept` where that is given."""
    q = x.new_empty(*x.shape[:2], attn.inner_dim // attn.head_dim, attn.head_dim)
    return q, *((torch.empty_like(q), torch.empty_like(q)) if kept is None else kept)


def _attend(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """Attention [B, N, H * D]."""
    k, v = k[:, : sequence.used], v[:, : sequence.used]
    if sequence.region is not None:
        out = _attend_by_region(q, k, v, sequence)
    elif sequence.key_bias is None and sequence.keys is None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    else:
        out = ops.mixed_res_attn(
            q, k, v, key_bias=sequence.key_bias, q_lens=sequence.queries, kv_lens=sequence.keys
        )[0]  # fmt: skip
    return out.flatten(2)


def _attend_by_region(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """Attention [B, N, H, D] whose image -> text part goes by region, as `attention.sparse_text_attention` has it."""
    n, at = sequence.text, sequence.text_at
    text, image = slice(at, at + n), slice(0, at) if at else slice(n, None)
    asking = sequence.queries
    words = ops.mixed_res_attn(q[:, :n], k, v)[0]
    picture = ops.mixed_res_attn(q[:, n:], k[:, image], v[:, image], q_lens=None if asking is None else asking - n)
    sparse = ops.sparse_cross_attn(q[:, n:], k[:, text], v[:, text], sequence.region, sequence.text_mask)
    return torch.cat([words, ops.merge_attn(*picture, *sparse)[0]], dim=1)


def _watched(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor | None:
    """What `attention.TextWatch` records, where it is asked for: fp32 [B, image tokens, text tokens]."""
    if not sequence.watched:
        return None
    return text_mass(q, k, ops.mixed_res_attn(q, k, v)[1], sequence.text)


def double_block(
    block: FluxTransformerBlock, x: Tensor, sequence: Sequence, kept: Kept | None, image_mod: Tensor, text_mod: Tensor
) -> Tensor | None:
    """FluxTransformerBlock on text and image tokens x [B, N, C], in place. Returns what `_watched` does.

    kept: where its keys and values go, None to forget them. image_mod, text_mod: [B, 6 C].
    """
    attn, n = block.attn, sequence.text
    text, image = x[:, :n], x[:, n:]
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=1)
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=1)
    q, k, v = _buffers(x, attn, kept)

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
    out = _attend(q, k, v, sequence)
    if n:
        ops.gated_residual_add_(text, attn.to_add_out(out[:, :n]), t_gate)
        words = ops.adaln_modulate(text, t_scale2, t_shift2, eps=block.norm2_context.eps)
        ops.gated_residual_add_(text, _feed_forward(block.ff_context, words), t_gate2)
    ops.gated_residual_add_(image, attn.to_out[1](attn.to_out[0](out[:, n:])), i_gate)
    spots = ops.adaln_modulate(image, i_scale2, i_shift2, eps=block.norm2.eps)
    ops.gated_residual_add_(image, _feed_forward(block.ff, spots), i_gate2)
    return _watched(q, k, v, sequence)


def single_block(
    block: FluxSingleTransformerBlock, x: Tensor, sequence: Sequence, kept: Kept | None, mod: Tensor
) -> Tensor | None:
    """FluxSingleTransformerBlock on text and image tokens x [B, N, C], in place; kept as above, mod: [B, 3 C]."""
    attn = block.attn
    shift, scale, gate = mod.chunk(3, dim=1)
    y = ops.adaln_modulate(x, scale, shift, eps=block.norm.norm.eps)
    q, k, v = _buffers(y, attn, kept)
    ops.qk_norm_rope_scatter_(
        q, k, v, *_project(attn, y), sequence.cos, sequence.sin,
        q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight, kv_out_index=sequence.rows, eps=attn.norm_q.eps,
    )  # fmt: skip
    attended, hidden = _attend(q, k, v, sequence), _gelu(block.proj_mlp, y)
    ops.gated_residual_add_(x, _of_both(block.proj_out, attended, hidden), gate)
    return _watched(q, k, v, sequence)


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
