# SPDX-License-Identifier: Apache-2.0
"""``sparse_cross_attn``: image queries attend to the text tokens that their region sees."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "sparse_cross_attn"


def _check(q, k, v, region, text_mask, scale):
    _checks.check_dtype(_OP, "q", q, _checks.FLOATS)
    _checks.check_shape(_OP, "q", q, (None,) * 4, "[B, Sq, H, D]")
    batch, queries, heads, dim = q.shape
    _checks.check_head_dim(_OP, "q", dim)
    _checks.check_shape(_OP, "k", k, (batch, None, heads, dim), f"[{batch}, St, {heads}, {dim}] (q's B, H and D)")
    if v.shape != k.shape:
        _checks.value_error(_OP, "v", f"k's shape {_checks.shape_of(k)}", _checks.shape_of(v))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            _checks.type_error(_OP, name, f"q's dtype {q.dtype}", tensor.dtype)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_last_contiguous(_OP, name, tensor)
    _checks.check_dtype(_OP, "region", region, _checks.INT32)
    _checks.check_shape(_OP, "region", region, (batch, queries), f"[{batch}, {queries}], one value a query")
    _checks.check_dtype(_OP, "text_mask", text_mask, (torch.bool,))
    _checks.check_shape(_OP, "text_mask", text_mask, (batch, None, k.shape[1]), f"[{batch}, R, {k.shape[1]}]")
    _checks.check_last_contiguous(_OP, "text_mask", text_mask)
    for name, tensor in (("k", k), ("v", v), ("region", region), ("text_mask", text_mask)):
        _checks.check_device(_OP, name, tensor, q.device)
    _checks.check_scale(_OP, scale)


def _implementation(q, k, v, region, text_mask, *, scale=None):
    _check(q, k, v, region, text_mask, scale)
    if q.device.type == "cpu" or _checks.debugging():
        _checks.check_index_range(_OP, "region", region, text_mask.shape[1])
    attend = _backends.implementation(_OP, q.device)
    return attend(q, k, v, region, text_mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _fake(q, k, v, region, text_mask, *, scale=None):
    _check(q, k, v, region, text_mask, scale)
    batch, queries, heads, dim = q.shape
    return q.new_empty((batch, queries, heads, dim)), q.new_empty((batch, heads, queries), dtype=torch.float32)


_op = register(
    "sparse_cross_attn(Tensor q, Tensor k, Tensor v, Tensor region, Tensor text_mask, *, float? scale=None) "
    "-> (Tensor, Tensor)",
    _implementation,
    _fake,
)
_backends.add(_OP, "sparse_cross_attn")


def sparse_cross_attn(q, k, v, region, text_mask, *, scale=None):
    """Attention of image queries to the text tokens that their region sees.

    With ``merge_attn`` it gives the joint softmax of an MMDiT block whose image -> text part is sparse:
    ``merge_attn(*mixed_res_attn(q, k_image, v_image), *sparse_cross_attn(q, k_text, v_text, region, text_mask))``.

    Args:
        q: [B, Sq, H, D]; k, v: [B, St, H, D]; bf16, fp16 or fp32, any strides with the last dimension contiguous; D a
            multiple of 16 up to 256.
        region: int32 [B, Sq], each query's region, 0 to R - 1; -1: none (the range is checked on CPU, and under
            SPECEDIT_DEBUG=1; a kernel takes anything else for none).
        text_mask: bool [B, R, St], the text tokens that a region sees. A token that no region sees is never read.
        scale: of the scores; None: D ** -0.5.

    Returns:
        (out, lse): out [B, Sq, H, D] in q's dtype; lse fp32 [B, H, Sq], natural log. A query that sees no token: out 0,
        lse -inf. Softmax and sums are fp32. Queries without a region cost the write of their zeros and no more.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: sparsified spatial cross-attention (SSCA), FlashEdit, arXiv 2509.22244.
    """
    return _op(q, k, v, region, text_mask, scale=scale)
