# SPDX-License-Identifier: Apache-2.0
"""``scaled_softmax``: attention weights of scores that a product of its own made."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "scaled_softmax"


def _check(x, scale, dtype):
    _checks.check_dtype(_OP, "x", x, _checks.FLOATS)
    if x.dim() < 1:
        _checks.value_error(_OP, "x", "[..., N]", _checks.shape_of(x))
    if not x.is_contiguous():
        _checks.value_error(_OP, "x", "a contiguous tensor", f"strides {list(x.stride())}")
    _checks.check_scale(_OP, scale)
    if dtype not in _checks.FLOATS:
        _checks.type_error(_OP, "dtype", "bfloat16, float16 or float32", str(dtype).removeprefix("torch."))


def _implementation(x, scale, dtype):
    _check(x, scale, dtype)
    return _backends.implementation(_OP, x.device)(x, scale, dtype)


def _fake(x, scale, dtype):
    _check(x, scale, dtype)
    return torch.empty_like(x, dtype=dtype)


_op = register("scaled_softmax(Tensor x, float scale, ScalarType dtype) -> Tensor", _implementation, _fake)
_backends.add(_OP, "scaled_softmax")


def scaled_softmax(x, scale, dtype):
    """y = softmax(x * scale) over the last dimension, in another dtype.

    Args:
        x: [..., N], contiguous, bf16, fp16 or fp32: scores. A -inf has weight 0.
        scale: a finite number.
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        [..., N] in ``dtype``. All arithmetic is fp32, with one rounding at the end. A row with NaN or inf in it, or of
        -inf alone, is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Attention Is All You Need, arXiv 1706.03762, section 3.2.1, equation 1.
    """
    return _op(x, scale, dtype)
