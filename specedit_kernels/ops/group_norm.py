# SPDX-License-Identifier: Apache-2.0
"""``group_norm``: the norm of a convolutional autoencoder, with the SiLU that follows it or without, and
``group_norm_statistics``: what it takes of a map, for one whose parts are on several devices."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "group_norm"
_STATISTICS = "group_norm_statistics"


def _check_x(op, x, num_groups):
    _checks.check_map(op, "x", x)
    channels = x.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        _checks.value_error(op, "num_groups", f"a divisor of x's {channels} channels", num_groups)


def _check(x, num_groups, weight, bias, eps, statistics, x_bias):
    _check_x(_OP, x, num_groups)
    _checks.check_vectors(_OP, x.shape[1], x.device, weight=weight, bias=bias, x_bias=x_bias)
    _checks.check_eps(_OP, eps)
    if statistics is not None:
        _checks.check_dtype(_OP, "statistics", statistics, (torch.float32,))
        shape = (2, x.shape[0], num_groups)
        _checks.check_shape(_OP, "statistics", statistics, shape, "[2, B, num_groups]")
        if not statistics.is_contiguous():
            _checks.value_error(_OP, "statistics", "a contiguous tensor", f"strides {list(statistics.stride())}")
        _checks.check_device(_OP, "statistics", statistics, x.device)


def _implementation(x, num_groups, weight, bias, *, eps=1e-6, silu=False, statistics=None, x_bias=None):
    _check(x, num_groups, weight, bias, eps, statistics, x_bias)
    return _backends.implementation(_OP, x.device)(x, num_groups, weight, bias, eps, silu, statistics, x_bias)


def _fake(x, num_groups, weight, bias, *, eps=1e-6, silu=False, statistics=None, x_bias=None):
    _check(x, num_groups, weight, bias, eps, statistics, x_bias)
    return torch.empty_like(x)


def _statistics_implementation(x, num_groups, *, x_bias=None):
    _check_x(_STATISTICS, x, num_groups)
    _checks.check_vectors(_STATISTICS, x.shape[1], x.device, x_bias=x_bias)
    return _backends.implementation(_STATISTICS, x.device)(x, num_groups, x_bias)


def _statistics_fake(x, num_groups, *, x_bias=None):
    _check_x(_STATISTICS, x, num_groups)
    _checks.check_vectors(_STATISTICS, x.shape[1], x.device, x_bias=x_bias)
    return x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


_op = register(
    "group_norm(Tensor x, int num_groups, Tensor weight, Tensor bias, *, float eps=1e-6, bool silu=False,"
    " Tensor? statistics=None, Tensor? x_bias=None) -> Tensor",
    _implementation,
    _fake,
)
_backends.add(_OP, "group_norm")
_statistics_op = register(
    "group_norm_statistics(Tensor x, int num_groups, *, Tensor? x_bias=None) -> Tensor",
    _statistics_implementation,
    _statistics_fake,
)
_backends.add(_STATISTICS, "group_norm")


def group_norm_statistics(x, num_groups, *, x_bias=None):
    """Mean and variance of each group's channels over all pixels: what ``group_norm`` takes as ``statistics``.

    Those of a map in parts follow from its parts': with shares w of the pixels, mean = sum(w mean_i) and
    variance = sum(w (variance_i + (mean_i - mean)^2)).

    Args:
        x, num_groups, x_bias: those of ``group_norm``.

    Returns:
        fp32 [2, B, num_groups]: means, then variances, the means of squared deviations. NaN for a map of no pixels.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Group Normalization, arXiv 1803.08494, section 3.1, equation 2.
    """
    return _statistics_op(x, num_groups, x_bias=x_bias)


def group_norm(x, num_groups, weight, bias, *, eps=1e-6, silu=False, statistics=None, x_bias=None):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over each group's channels and all pixels.

    Args:
        x: [B, C, H, W] or [B, C, N], bf16, fp16 or fp32; contiguous or with channels last ([B, H, W, C] in memory).
        num_groups: a divisor of C; a group is C / num_groups neighbouring channels.
        weight, bias: [C], any float dtype.
        eps: added to the variance, which is the mean of squares: not corrected for the sample's size.
        silu: multiply y by sigmoid(y).
        statistics: fp32 [2, B, num_groups], contiguous, means and variances in the place of x's own; None takes those.
        x_bias: [C], any float dtype, added to x before all else, its statistics too: the bias of the convolution that
            made x, which then needs no pass of its own. None: nothing.

    Returns:
        x's shape, dtype and memory format. All arithmetic is fp32, with one rounding at the end, after the SiLU; the
        deviations are taken from means, so that a mean far larger than they are costs no accuracy.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Group Normalization, arXiv 1803.08494, section 3.1, equations 1, 2 and 6.
    """
    return _op(x, num_groups, weight, bias, eps=eps, silu=silu, statistics=statistics, x_bias=x_bias)
