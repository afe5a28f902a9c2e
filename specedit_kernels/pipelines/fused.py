# SPDX-License-Identifier: Apache-2.0
"""What the transformers in few launches share: their sequence, its attention, the MLP with its activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from .attention import text_mass


@dataclass(frozen=True)
class Sequence:
    """What a step has to know of its sequence: `text` tokens, then image tokens; N tokens in all.

    cos, sin: fp32 [B or 1, N, D/2], rotary tables. key_bias: fp32 [B, keys] or None. queries, keys: int32 [B], how many
    tokens ask and how many keys are there, None: all. rows: int32 [B, N], the key that each token is, -1: none, to be
    left as it is; None: in order. Without text tokens those of the text stay as they were kept. text_at: the key of the
    first text token, behind those of the image or 0. used: keys there are where that is known beforehand, None: all.
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


def is_plain(layer: torch.nn.Module) -> bool:
    """Whether a layer is nothing but its weight and bias: no adapter, no quantised weight."""
    return type(layer) is torch.nn.Linear and layer.bias is not None and not is_traceable_wrapper_subclass(layer.weight)


def gelu(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """GELU, by tanh, of a linear layer on x [B, N, C]: within the product where that is a plain one on CUDA."""
    if is_plain(layer) and x.is_cuda:
        y = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return F.gelu(layer(x), approximate="tanh")


def feed_forward(ff: FeedForward, x: Tensor) -> Tensor:
    """A block's MLP."""
    first, *rest = ff.net
    if type(first) is not GELU or first.approximate != "tanh":
        return ff(x)
    x = gelu(first.proj, x)
    for layer in rest:
        x = layer(x)
    return x


def attend(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
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


def watched_mass(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor | None:
    """What `attention.TextWatch` records, where it is asked for: fp32 [B, image tokens, text tokens]."""
    if not sequence.watched:
        return None
    return text_mass(q, k, ops.mixed_res_attn(q, k, v)[1], sequence.text)
