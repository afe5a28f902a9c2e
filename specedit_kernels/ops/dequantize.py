# SPDX-License-Identifier: Apache-2.0
"""``dequantize``: weights that are kept in 8 bits, in the dtype of a product."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "dequantize"
_KEPT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _check(x, dtype, *, scale=None):
    _checks.check_dtype(_OP, "x", x, _KEPT)
    if not x.is_contiguous():
        _checks.value_error(_OP, "x", "a contiguous tensor", f"strides {list(x.stride())}")
    if dtype not in _checks.FLOATS:
        _checks.type_error(_OP, "dtype", "bfloat16, float16 or float32", str(dtype).removeprefix("torch."))
    if scale is None:
        return
    _checks.check_dtype(_OP, "scale", scale, _checks.FLOATS)
    _checks.check_device(_OP, "scale", scale, x.device)
    by_row = (*x.shape[:-1], 1)
    if scale.shape != by_row and scale.numel() != 1:
        _checks.value_error(_OP, "scale", f"one number, or shape {list(by_row)}, x's rows", _checks.shape_of(scale))
    if not scale.is_contiguous():
        _checks.value_error(_OP, "scale", "a contiguous tensor", f"strides {list(scale.stride())}")


def _implementation(x, dtype, *, scale=None):
    _check(x, dtype, scale=scale)
    return _backends.implementation(_OP, x.device)(x, dtype, scale)


def _fake(x, dtype, *, scale=None):
    _check(x, dtype, scale=scale)
    return x.new_empty(x.shape, dtype=dtype)


_op = register("dequantize(Tensor x, ScalarType dtype, *, Tensor? scale=None) -> Tensor", _implementation, _fake)
_backends.add(_OP, "dequantize")


def dequantize(x, dtype, *, scale=None):
    """x * scale of 8-bit numbers, in the dtype of a product, at the speed of memory.

    Args:
        x: int8, e4m3 (torch.float8_e4m3fn) or e5m2 (torch.float8_e5m2), contiguous, of any shape.
        dtype: torch.bfloat16, torch.float16 or torch.float32.
        scale: fp32, bf16 or fp16, contiguous: one number, or [..., 1], one for each row of x. None: the numbers as they
            are, which are exact in each dtype.

    Returns:
        x's shape, contiguous: the fp32 product rounded once. NaN stays NaN, its bits may differ from those of
        ``Tensor.to``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: OCP 8-bit floating point specification (e4m3, e5m2).
    """
    return _op(x, dtype, scale=scale)
