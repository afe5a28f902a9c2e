# SPDX-License-Identifier: Apache-2.0
"""``cast_fp8``: weights that are kept in fp8, in the dtype of a product."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "cast_fp8"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_HALF = (torch.bfloat16, torch.float16)


def _check(x, dtype):
    _checks.check_dtype(_OP, "x", x, _FP8)
    if not x.is_contiguous():
        _checks.value_error(_OP, "x", "a contiguous tensor", f"strides {list(x.stride())}")
    if dtype not in _HALF:
        _checks.type_error(_OP, "dtype", "bfloat16 or float16", str(dtype).removeprefix("torch."))


def _implementation(x, dtype):
    _check(x, dtype)
    return _backends.implementation(_OP, x.device)(x, dtype)


def _fake(x, dtype):
    _check(x, dtype)
    return x.new_empty(x.shape, dtype=dtype)


_op = register("cast_fp8(Tensor x, ScalarType dtype) -> Tensor", _implementation, _fake)
_backends.add(_OP, "cast_fp8")


def cast_fp8(x, dtype):
    """x.to(dtype) of fp8 numbers, which are exact in 16 bits, at the speed of memory.

    Args:
        x: e4m3 (torch.float8_e4m3fn) or e5m2 (torch.float8_e5m2), contiguous, of any shape.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        The same numbers, contiguous. NaN stays NaN, its bits may differ from those of ``Tensor.to``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: OCP 8-bit floating point specification (e4m3, e5m2).
    """
    return _op(x, dtype)
