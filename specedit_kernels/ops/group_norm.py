# SPDX-License-Identifier: Apache-2.0
"""``group_norm``: the norm of a convolutional autoencoder, with the SiLU that follows it or without."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "group_norm"


def _check(x, num_groups, weight, bias, eps):
    _checks.check_dtype(_OP, "x", x, _checks.FLOATS)
    if x.dim() not in (3, 4):
        _checks.value_error(_OP, "x", "[B, C, H, W] or [B, C, N]", _checks.shape_of(x))
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        _checks.value_error(_OP, "x", "a contiguous tensor or one with channels last", f"strides {list(x.stride())}")
    channels = x.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        _checks.value_error(_OP, "num_groups", f"a divisor of x's {channels} channels", num_groups)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _checks.check_dtype(_OP, name, tensor, _checks.FLOATS)
        _checks.check_shape(_OP, name, tensor, (channels,), f"[{channels}]")
        _checks.check_last_contiguous(_OP, name, tensor)
        _checks.check_device(_OP, name, tensor, x.device)
    _checks.check_eps(_OP, eps)


def _implementation(x, num_groups, weight, bias, *, eps=1e-6, silu=False):
    _check(x, num_groups, weight, bias, eps)
    return _backends.implementation(_OP, x.device)(x, num_groups, weight, bias, eps, silu)


def _fake(x, num_groups, weight, bias, *, eps=1e-6, silu=False):
    _check(x, num_groups, weight, bias, eps)
    return torch.empty_like(x)


_op = register(
    "group_norm(Tensor x, int num_groups, Tensor weight, Tensor bias, *, float eps=1e-6, bool silu=False) -> Tensor",
    _implementation,
    _fake,
)
_backends.add(_OP, "group_norm")


def group_norm(x, num_groups, weight, bias, *, eps=1e-6, silu=False):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over each group's channels and all pixels.

    Args:
        x: [B, C, H, W] or [B, C, N], bf16, fp16 or fp32; contiguous or with channels last ([B, H, W, C] in memory).
        num_groups: a divisor of C; a group is C / num_groups neighbouring channels.
        weight, bias: [C], any float dtype.
        eps: added to the variance, which is the mean of squares: not corrected for the sample's size.
        silu: multiply y by sigmoid(y).

    Returns:
        x's shape, dtype and memory format. All arithmetic is fp32, with one rounding at the end, after the SiLU; the
        deviations are taken from means, so that a mean far larger than they are costs no accuracy.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Group Normalization, arXiv 1803.08494, section 3.1, equations 1, 2 and 6.
    """
    return _op(x, num_groups, weight, bias, eps=eps, silu=silu)
