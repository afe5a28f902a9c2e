# SPDX-License-Identifier: Apache-2.0
"""The attention processor of mixed-resolution steps, and how it is put in and taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from .. import ops  # noqa: F401  (registers torch.ops.specedit)


@dataclass(frozen=True)
class AttentionLayout:
    """What the attention of a mixed-resolution step has to know about its sequence [text | image slots].

    cos, sin: fp32 [B, S, head dim], rotary tables, each sample its own. key_bias: fp32 [B, S] or None.
    lengths: int32 [B], used slots of the sequence, or None where all are.
    """

    cos: Tensor
    sin: Tensor
    key_bias: Tensor | None
    lengths: Tensor | None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels in fp32. x: [B, S, H, D]; cos, sin: fp32 [B, S, D]; result in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos[:, :, None] + turned * sin[:, :, None]).to(x.dtype)


class SpecEditAttnProcessor:
    """Attention of a FLUX block through torch.ops.specedit.mixed_res_attn.

    Called without `specedit_layout` it hands over to the processor it wraps, untouched.
    """

    def __init__(self, inner: FluxAttnProcessor):
        self.inner = inner

    # set_attention_backend and parallelism read and write these two on the processor: they belong to the wrapped one
    @property
    def _attention_backend(self):
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.inner._attention_backend = value

    @property
    def _parallel_config(self):
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.inner._parallel_config = value

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: AttentionLayout | None = None,
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
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            if attn.fused_projections:
                tq, tk, tv = attn.to_added_qkv(text).chunk(3, dim=-1)
            else:
                tq, tk, tv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            tq, tk, tv = (x.unflatten(-1, (-1, attn.head_dim)) for x in (tq, tk, tv))
            q = torch.cat([attn.norm_added_q(tq), q], dim=1)
            k = torch.cat([attn.norm_added_k(tk), k], dim=1)
            v = torch.cat([tv, v], dim=1)
        q, k = apply_rotary(q, layout.cos, layout.sin), apply_rotary(k, layout.cos, layout.sin)
        out, _ = torch.ops.specedit.mixed_res_attn(
            q, k, v, key_bias=layout.key_bias, q_lens=layout.lengths, kv_lens=layout.lengths
        )
        out = out.flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, length:].contiguous()))
        return image, attn.to_add_out(out[:, :length].contiguous())


def wrap_processors(transformer: torch.nn.Module) -> None:
    """Wrap every attention processor of a FLUX transformer; those wrapped already stay. TypeError for a foreign one."""
    wrapped = {}
    for name, processor in transformer.attn_processors.items():
        if isinstance(processor, SpecEditAttnProcessor):
            wrapped[name] = processor
        elif type(processor) is FluxAttnProcessor:
            wrapped[name] = SpecEditAttnProcessor(processor)
        else:
            raise TypeError(
                f"transformer: {name} is a {type(processor).__name__}; SpecEdit supports FluxAttnProcessor"
                " (IP-Adapter and custom processors are not supported)"
            )
    transformer.set_attn_processor(wrapped)


def unwrap_processors(transformer: torch.nn.Module) -> None:
    """Put the wrapped processors back, the very objects."""
    if any(isinstance(p, SpecEditAttnProcessor) for p in transformer.attn_processors.values()):
        transformer.set_attn_processor(
            {
                name: p.inner if isinstance(p, SpecEditAttnProcessor) else p
                for name, p in transformer.attn_processors.items()
            }
        )
