# SPDX-License-Identifier: Apache-2.0
"""``gather_tokens``: rows of a token sequence by index."""

from . import _backends, _checks
from ._library import register

_OP = "gather_tokens"


def _check(x, index, length):
    if x.dim() < 2:
        _checks.value_error(_OP, "x", "[B, N, ...]", _checks.shape_of(x))
    if x.dim() > 2:
        _checks.check_last_contiguous(_OP, "x", x)
    _checks.check_dtype(_OP, "index", index, _checks.INT32)
    _checks.check_shape(_OP, "index", index, (x.shape[0], None), f"[B={x.shape[0]}, >= length]")
    _checks.check_device(_OP, "index", index, x.device)
    if length < 0 or length > index.shape[1]:
        _checks.value_error(_OP, "length", f"0 to {index.shape[1]} (index's columns)", length)


def _implementation(x, index, length):
    _check(x, index, length)
    if x.device.type == "cpu" or _checks.debugging():
        _checks.check_index_range(_OP, "index", index[:, :length], x.shape[1])
    return _backends.implementation(_OP, x.device)(x, index, length)


def _fake(x, index, length):
    _check(x, index, length)
    return x.new_empty((x.shape[0], length, *x.shape[2:]))


_op = register("gather_tokens(Tensor x, Tensor index, SymInt length) -> Tensor", _implementation, _fake)
_backends.add(_OP, "gather_tokens")


def gather_tokens(x, index, length):
    """y[b, i] = x[b, index[b, i]] for i < length; a -1 gives zeros.

    Args:
        x: [B, N, ...], any dtype, last dimension contiguous.
        index: int32 [B, >= length], values from -1 to N - 1 (checked on CPU, and under SPECEDIT_DEBUG=1).
        length: how many rows to take.

    Returns:
        [B, length, ...], x's dtype, contiguous.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _op(x, index, length)
