# SPDX-License-Identifier: Apache-2.0
"""``merge_attn``: one softmax from its two halves."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "merge_attn"


def _check(out_a, lse_a, out_b, lse_b):
    _checks.check_dtype(_OP, "out_a", out_a, _checks.FLOATS)
    if out_a.dim() not in (3, 4):
        _checks.value_error(_OP, "out_a", "[B, Nq, H, D] or [Tq, H, D]", _checks.shape_of(out_a))
    _checks.check_last_contiguous(_OP, "out_a", out_a)
    if out_b.shape != out_a.shape:
        _checks.value_error(_OP, "out_b", f"out_a's shape {_checks.shape_of(out_a)}", _checks.shape_of(out_b))
    if out_b.dtype != out_a.dtype:
        _checks.type_error(_OP, "out_b", f"out_a's dtype {out_a.dtype}", out_b.dtype)
    _checks.check_last_contiguous(_OP, "out_b", out_b)
    *batch, rows, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.check_dtype(_OP, name, lse, _checks.FP32)
        _checks.check_shape(_OP, name, lse, (*batch, heads, rows), f"{[*batch, heads, rows]} (heads before rows)")
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        _checks.check_device(_OP, name, tensor, out_a.device)


def _implementation(out_a, lse_a, out_b, lse_b):
    _check(out_a, lse_a, out_b, lse_b)
    return _backends.implementation(_OP, out_a.device)(out_a, lse_a, out_b, lse_b)


def _fake(out_a, lse_a, out_b, lse_b):
    _check(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape, dtype=torch.float32)


_op = register(
    "merge_attn(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)", _implementation, _fake
)
_backends.add(_OP, "merge_attn")


def merge_attn(out_a, lse_a, out_b, lse_b):
    """The softmax attention over two disjoint key sets from its two halves.

    Args:
        out_a, out_b: [B, Nq, H, D], or packed [Tq, H, D]; bf16, fp16 or fp32.
        lse_a, lse_b: fp32 [B, H, Nq], or [H, Tq]: natural-log sums of exponentiated scores; -inf = no key.

    Returns:
        (out, lse) in the same layout. A query without a key in one half takes the other half's bits; in both: out 0,
        lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _op(out_a, lse_a, out_b, lse_b)
