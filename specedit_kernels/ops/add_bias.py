# SPDX-License-Identifier: Apache-2.0
"""``add_bias_``: the bias of a convolution, and the residual that its result is added to."""

from . import _backends, _checks
from ._library import register

_OP = "add_bias_"


def _check(x, bias, residual=None, residual_bias=None):
    _checks.check_map(_OP, "x", x)
    channels = x.shape[1]
    if residual is not None:
        _checks.check_shape(_OP, "residual", residual, x.shape, _checks.shape_of(x))
        if residual.dtype != x.dtype:
            _checks.type_error(_OP, "residual", f"x's dtype {x.dtype}", residual.dtype)
        _checks.check_device(_OP, "residual", residual, x.device)
        if not (residual if x.is_contiguous() else residual.movedim(1, -1)).is_contiguous():
            expected = "x's memory format, " + ("contiguous" if x.is_contiguous() else "channels last")
            _checks.value_error(_OP, "residual", expected, f"strides {list(residual.stride())}")
    elif residual_bias is not None:
        _checks.value_error(_OP, "residual_bias", "None, since residual is None", "a tensor")
    _checks.check_vectors(_OP, channels, x.device, bias=bias, residual_bias=residual_bias)


def _implementation(x, bias, residual=None, residual_bias=None):
    _check(x, bias, residual, residual_bias)
    _backends.implementation(_OP, x.device)(x, bias, residual, residual_bias)


_op = register(
    "add_bias_(Tensor(a!) x, Tensor bias, Tensor? residual=None, Tensor? residual_bias=None) -> ()",
    _implementation,
    _check,
)
_backends.add(_OP, "add_bias")


def add_bias_(x, bias, residual=None, residual_bias=None):
    """x[b, c] += bias[c] + residual[b, c] + residual_bias[c] in place, of each pixel.

    Args:
        x: [B, C, H, W] or [B, C, N], bf16, fp16 or fp32; contiguous or with channels last ([B, H, W, C] in memory).
            Written; it may not overlap residual, other than be it.
        bias: [C], any float dtype.
        residual: x's shape, dtype and memory format; None: nothing.
        residual_bias: [C], any float dtype; None: nothing. Given with residual alone.

    All arithmetic is fp32, with one rounding at the end; a sum beyond fp16's range is infinite, as in PyTorch.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ``x`` is then untouched.

    Source: Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 3.2, equation 1.
    """
    _op(x, bias, residual, residual_bias)
