# SPDX-License-Identifier: Apache-2.0
"""Attention whose heads are wider than flash kernels serve: an autoencoder's one head of 384 or 512.

There torch takes a kernel of compute capability 8.0. Two products of cuBLAS with a softmax between, for as many queries
at a time as the second-level cache holds scores of, are faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops

FLASH_DIM = 256  # of a head, up to which flash attention and cuDNN serve on compute capability 9.0
SCORES_BYTES = 32 << 20  # of fp32 scores at a time


def serves(q: Tensor) -> bool:
    """Whether `attend` computes in products of its own: without autograd alone."""
    return (
        q.is_cuda
        and not torch.is_grad_enabled()
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] > FLASH_DIM
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [B, H, N, D] of q [B, H, N, D] to k and v [B, H, M, D], scaled by D^-1/2: scores and softmax in fp32,
    weights in the dtype of v. What it does not serve is `F.scaled_dot_product_attention`'s."""
    if not serves(q) or k.shape[-2] == 0:
        return F.scaled_dot_product_attention(q, k, v)
    return by_products(q, k, v)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` in chunks of queries, whatever the device."""
    lead, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, turned = torch.empty_like(q), k.transpose(1, 2)
    rows = max(16, SCORES_BYTES // (4 * k.shape[1]))
    for sample in range(q.shape[0]):
        one = slice(sample, sample + 1)
        for at in range(0, q.shape[1], rows):
            scores = _product(q[one, at : at + rows], turned[one])
            weights = ops.scaled_softmax(scores, scale, v.dtype)
            torch.bmm(weights, v[one], out=out[one, at : at + rows])
    return out.unflatten(0, lead)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def of_map(attn: Any, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """diffusers' Attention of an autoencoder on a map x [B, C, h, w], as AttnProcessor2_0 computes it.

    attend: of queries, keys and values [B, N, C], the heads side by side.
    """
    tokens = attn.group_norm(x.flatten(2)).transpose(1, 2)
    out = attend(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
    for layer in attn.to_out:
        out = layer(out)
    out = out.transpose(1, 2).unflatten(2, x.shape[2:]) + x
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def of_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attend` of q, k and v [B, N, C] whose heads lie side by side, as its result's do."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v).transpose(1, 2).flatten(2)


class WideAttnProcessor:
    """Stands for AttnProcessor2_0 in an autoencoder of our own modules."""

    # diffusers warns of each argument that a processor has no name for; an autoencoder's block gives temb, always None
    def __call__(self, attn: Any, x: Tensor, *unused: Any, temb: Tensor | None = None, **options: Any) -> Tensor:
        return of_map(attn, x, functools.partial(of_heads, heads=attn.heads))
