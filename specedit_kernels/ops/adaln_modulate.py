# SPDX-License-Identifier: Apache-2.0
"""``adaln_modulate``: the norm of a DiT block with its scale and shift, of all tokens or of the active ones."""

from . import _backends, _checks
from ._library import register
from ._modulation import check_modulation

_OP = "adaln_modulate"


def _check(x, scale, shift, *, modulation_index=None, index=None, eps=1e-6):
    _checks.check_dtype(_OP, "x", x, _checks.FLOATS)
    _checks.check_shape(_OP, "x", x, (None,) * 3, "[B, N, C]")
    _checks.check_last_contiguous(_OP, "x", x)
    check_modulation(_OP, x, {"scale": scale, "shift": shift}, modulation_index)
    if index is not None:
        _checks.check_dtype(_OP, "index", index, _checks.INT32)
        _checks.check_shape(_OP, "index", index, (x.shape[0], None), f"[{x.shape[0]}, n]")
        _checks.check_device(_OP, "index", index, x.device)
    _checks.check_eps(_OP, eps)


def _implementation(x, scale, shift, *, modulation_index=None, index=None, eps=1e-6):
    _check(x, scale, shift, modulation_index=modulation_index, index=index, eps=eps)
    if x.device.type == "cpu" or _checks.debugging():
        if modulation_index is not None:
            _checks.check_index_range(_OP, "modulation_index", modulation_index, scale.shape[1])
        if index is not None:
            _checks.check_index_range(_OP, "index", index, x.shape[1])
    return _backends.implementation(_OP, x.device)(x, scale, shift, modulation_index, index, eps)


def _fake(x, scale, shift, *, modulation_index=None, index=None, eps=1e-6):
    _check(x, scale, shift, modulation_index=modulation_index, index=index, eps=eps)
    return x.new_empty(x.shape if index is None else (*index.shape, x.shape[2]))


_op = register(
    "adaln_modulate(Tensor x, Tensor scale, Tensor shift, *, Tensor? modulation_index=None, Tensor? index=None, "
    "float eps=1e-6) -> Tensor",
    _implementation,
    _fake,
)
_backends.add(_OP, "adaln_modulate")


def adaln_modulate(x, scale, shift, *, modulation_index=None, index=None, eps=1e-6):
    """Adaptive layer norm: y[b, i] = LN(x[b, r]) * (1 + scale[b, m]) + shift[b, m], r = index[b, i].

    LN(x) = (x - mean(x)) / sqrt(var(x) + eps) over the C channels, with no weight of its own; m is the modulation row
    of token r: the only one, or modulation_index[b, r]. It follows the rows of x, not the slots of the result, so
    that a model's index of the whole sequence serves every choice of active tokens.

    Args:
        x: [B, N, C], bf16, fp16 or fp32, last dimension contiguous.
        scale, shift: one row a sample [B, C], or M rows [B, M, C] with ``modulation_index``; any float dtype, any
            strides with the last dimension contiguous (chunks of one projection are read without a copy). Qwen's
            ``zero_cond_t`` gives [2 B, C]: ``scale.unflatten(0, (2, -1)).transpose(0, 1)`` is its [B, 2, C].
        modulation_index: int32 [B, N], each token's row of ``scale`` and ``shift``, values from -1 to M - 1; -1: not
            modulated, LN(x) alone. A vector for each token is M = N and arange(N).
        index: int32 [B, n], values from -1 to N - 1: the rows of x to take; a -1 gives zeros. None: all, in order.
            (Both indices' ranges are checked on CPU, and under SPECEDIT_DEBUG=1.)
        eps: added to the variance.

    Returns:
        [B, n or N, C], x's dtype, contiguous. All arithmetic is fp32, with one rounding at the end.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: DiT, arXiv 2212.09748, section 3.2 (adaLN).
    """
    return _op(x, scale, shift, modulation_index=modulation_index, index=index, eps=eps)
