# SPDX-License-Identifier: Apache-2.0
"""``lerp_``: interpolation between two kept sets of keys or values, by a weight on the device."""

from . import _backends, _checks
from ._library import register

_OP = "lerp_"


def _check(out, a, b, weight):
    _checks.check_dtype(_OP, "out", out, _checks.FLOATS)
    if out.dim() not in (3, 4):
        _checks.value_error(_OP, "out", "[B, N, C] or [B, N, H, D]", _checks.shape_of(out))
    for name, x in (("a", a), ("b", b)):
        _checks.check_shape(_OP, name, x, out.shape, f"{_checks.shape_of(out)} (out's)")
        if x.dtype != out.dtype:
            _checks.type_error(_OP, name, f"out's dtype {out.dtype}", x.dtype)
    for name, x in (("out", out), ("a", a), ("b", b)):
        _checks.check_last_contiguous(_OP, name, x)
    _checks.check_dtype(_OP, "weight", weight, _checks.FP32)
    _checks.check_shape(_OP, "weight", weight, (), "[]")
    for name, x in (("a", a), ("b", b), ("weight", weight)):
        _checks.check_device(_OP, name, x, out.device)


def _implementation(out, a, b, weight):
    _check(out, a, b, weight)
    _backends.implementation(_OP, out.device)(out, a, b, weight)


_op = register("lerp_(Tensor(a!) out, Tensor a, Tensor b, Tensor weight) -> ()", _implementation, _check)
_backends.add(_OP, "lerp")


def lerp_(out, a, b, weight):
    """out = a + weight (b - a), in place: keys or values between those of two passes over a sequence.

    `torch.lerp` with a weight on the device, at the rate of memory; there a weight of one number is not vectorised.

    Args:
        out: [B, N, C] or [B, N, H, D], bf16, fp16 or fp32, last dimension contiguous. Written; it may be `a` or `b`
            itself, and may overlap them in no other way.
        a, b: out's shape and dtype, last dimension contiguous.
        weight: fp32 [], on the device. At 0 the result is `a`, at 1 it is `b`, to the bit.

    All arithmetic is fp32, with one rounding at the end.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ``out`` is then untouched.
    """
    _op(out, a, b, weight)
