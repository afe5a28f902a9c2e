# SPDX-License-Identifier: Apache-2.0
"""``lerp_fp8_``: interpolation between keys or values kept in e4m3."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "lerp_fp8_"
_E4M3 = (torch.float8_e4m3fn,)


def _check(out, out_scale, a, a_scale, b, b_scale, weight):
    _checks.check_dtype(_OP, "out", out, _E4M3)
    if out.dim() not in (4, 5):
        _checks.value_error(_OP, "out", "[B, S, H, D], or panels [B, P, H, D, keys]", _checks.shape_of(out))
    for name, x in (("a", a), ("b", b)):
        _checks.check_dtype(_OP, name, x, _E4M3)
        _checks.check_shape(_OP, name, x, out.shape, f"{_checks.shape_of(out)} (out's)")
    for name, x in (("out", out), ("a", a), ("b", b)):
        if not x[:1, :1, :1].is_contiguous():
            _checks.value_error(_OP, name, "each head's part contiguous", f"strides {list(x.stride())}")
    shape = (out.shape[0], 1, out.shape[2])
    for name, scale in (("out_scale", out_scale), ("a_scale", a_scale), ("b_scale", b_scale)):
        _checks.check_dtype(_OP, name, scale, _checks.FP32)
        _checks.check_shape(_OP, name, scale, shape, f"{list(shape)}, one a head")
    _checks.check_dtype(_OP, "weight", weight, _checks.FP32)
    _checks.check_shape(_OP, "weight", weight, (), "[]")
    given = dict(out_scale=out_scale, a=a, a_scale=a_scale, b=b, b_scale=b_scale, weight=weight)
    for name, x in given.items():
        _checks.check_device(_OP, name, x, out.device)


def _implementation(*args):
    _check(*args)
    _backends.implementation(_OP, args[0].device)(*args)


_op = register(
    "lerp_fp8_(Tensor(a!) out, Tensor(b!) out_scale, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
    "Tensor weight) -> ()",
    _implementation,
    _check,
)
# numbers of e4m3
_backends.add(_OP, "lerp_fp8", capability=(8, 9))


def lerp_fp8_(out, out_scale, a, a_scale, b, b_scale, weight):
    """Interpolate keys or values that are kept in e4m3, a scale a head, in place.

        out_scale = max(a_scale, b_scale),   out = ((1 - weight) a a_scale + weight b b_scale) / out_scale

    in fp32, rounded to the nearest e4m3 number.

    Args:
        out: e4m3 (torch.float8_e4m3fn): keys [B, S, H, D], or values in panels [B, P, H, D, keys], as
            `mixed_res_attn_fp8` takes them. out_scale: fp32 [B, 1, H]. Both are written.
        a, b: e4m3, out's shape. Of all three what follows H is contiguous.
        a_scale, b_scale: fp32 > 0, [B, 1, H].
        weight: fp32 [], from 0 to 1, on the device.

    On CUDA devices below compute capability 8.9, and on a CPU, the reference serves it.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; the outputs are then untouched.
    """
    _op(out, out_scale, a, a_scale, b, b_scale, weight)
