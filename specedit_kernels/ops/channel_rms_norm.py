# SPDX-License-Identifier: Apache-2.0
"""``channel_rms_norm``: the norm of a Wan-like autoencoder, with the bias before it and the SiLU behind, or without."""

import torch

from . import _backends, _checks
from ._library import register

_OP = "channel_rms_norm"


def _check(x, weight, bias, eps, x_bias):
    _checks.check_map(_OP, "x", x)
    _checks.check_vectors(_OP, x.shape[1], x.device, weight=weight, bias=bias, x_bias=x_bias)
    _checks.check_eps(_OP, eps)


def _implementation(x, weight, bias=None, *, eps=1e-12, silu=False, x_bias=None):
    _check(x, weight, bias, eps, x_bias)
    return _backends.implementation(_OP, x.device)(x, weight, bias, eps, silu, x_bias)


def _fake(x, weight, bias=None, *, eps=1e-12, silu=False, x_bias=None):
    _check(x, weight, bias, eps, x_bias)
    return torch.empty_like(x)


_op = register(
    "channel_rms_norm(Tensor x, Tensor weight, Tensor? bias=None, *, float eps=1e-12, bool silu=False,"
    " Tensor? x_bias=None) -> Tensor",
    _implementation,
    _fake,
)
_backends.add(_OP, "channel_rms_norm")


def channel_rms_norm(x, weight, bias=None, *, eps=1e-12, silu=False, x_bias=None):
    """y = v / max(|v|, eps) * sqrt(C) * weight + bias with v = x + x_bias: of each pixel, |v| its length over channels.

    Args:
        x: [B, C, H, W] or [B, C, N], bf16, fp16 or fp32; contiguous or with channels last ([B, H, W, C] in memory).
        weight: [C], any float dtype.
        bias: [C], any float dtype; None: nothing.
        eps: the shortest length that divides.
        silu: multiply y by sigmoid(y).
        x_bias: [C], any float dtype, added to x before all else: the bias of the convolution before. None: nothing.

    Returns:
        x's shape, dtype and memory format. All arithmetic is fp32, with one rounding at the end, after the SiLU.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Root Mean Square Layer Normalization, arXiv 1910.07467, section 3, equation 4.
    """
    return _op(x, weight, bias, eps=eps, silu=silu, x_bias=x_bias)
