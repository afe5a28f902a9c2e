# SPDX-License-Identifier: Apache-2.0
"""``quantize_fp8``: the activations of an fp8 product, a scale a row, with the norm or GELU in front of them."""

import torch

from . import _backends, _checks
from ._library import register
from ._modulation import check_modulation

_OP = "quantize_fp8"


def _check(x, *, scale=None, shift=None, modulation_index=None, before=None, gelu=False, eps=1e-6):
    _checks.check_dtype(_OP, "x", x, _checks.FLOATS)
    if not 1 <= x.dim() <= 4 or x.shape[-1] == 0:
        _checks.value_error(_OP, "x", "shape [..., C] of 1 to 4 dimensions, C >= 1", _checks.shape_of(x))
    _checks.check_last_contiguous(_OP, "x", x)
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        _checks.value_error(_OP, missing, "a tensor (scale and shift come together)", None)
    if scale is not None:
        _checks.check_shape(_OP, "x", x, (None,) * 3, "[B, N, C], since scale is given")
        check_modulation(_OP, x, {"scale": scale, "shift": shift}, modulation_index)
        if gelu:
            _checks.value_error(_OP, "gelu", "False with scale and shift", gelu)
    elif modulation_index is not None:
        _checks.value_error(_OP, "modulation_index", "None, since scale is None", "a tensor")
    if before is not None:
        _checks.check_dtype(_OP, "before", before, _checks.FLOATS)
        shape = (*x.shape[:-1], None)
        _checks.check_shape(_OP, "before", before, shape, f"{[*x.shape[:-1]]} + [C0], x's rows")
        if before.shape[-1] == 0:
            _checks.value_error(_OP, "before", "at least one channel", _checks.shape_of(before))
        _checks.check_last_contiguous(_OP, "before", before)
        _checks.check_device(_OP, "before", before, x.device)
    _checks.check_eps(_OP, eps)


def _implementation(x, *, scale=None, shift=None, modulation_index=None, before=None, gelu=False, eps=1e-6):
    _check(x, scale=scale, shift=shift, modulation_index=modulation_index, before=before, gelu=gelu, eps=eps)
    if modulation_index is not None and (x.device.type == "cpu" or _checks.debugging()):
        _checks.check_index_range(_OP, "modulation_index", modulation_index, scale.shape[1])
    return _backends.implementation(_OP, x.device)(x, scale, shift, modulation_index, before, gelu, eps)


def _fake(x, *, scale=None, shift=None, modulation_index=None, before=None, gelu=False, eps=1e-6):
    _check(x, scale=scale, shift=shift, modulation_index=modulation_index, before=before, gelu=gelu, eps=eps)
    channels = x.shape[-1] + (0 if before is None else before.shape[-1])
    values = x.new_empty((*x.shape[:-1], channels), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_op = register(
    "quantize_fp8(Tensor x, *, Tensor? scale=None, Tensor? shift=None, Tensor? modulation_index=None, "
    "Tensor? before=None, bool gelu=False, float eps=1e-6) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
_backends.add(_OP, "quantize_fp8")


def quantize_fp8(x, *, scale=None, shift=None, modulation_index=None, before=None, gelu=False, eps=1e-6):
    """Rows of x, or what the op in front of a linear layer makes of them, in e4m3 with a scale a row.

    z = x, or LN(x) * (1 + scale) + shift as `adaln_modulate` has it, or GELU(x) by tanh; row_scale = max |z| / 448;
    values = z / row_scale, rounded to the nearest e4m3 number: z = values * row_scale to within 1/16 of it, and of
    a magnitude under row_scale / 64 to within row_scale / 1024.

    Args:
        x: [..., C], 1 to 4 dimensions, bf16, fp16 or fp32; any strides with the last dimension contiguous.
        scale, shift, modulation_index, eps: as `adaln_modulate`; x is then [B, N, C].
        before: [..., C0], x's rows: channels in front of z's, as they are. The row has one scale for both.
        gelu: apply GELU to x. Not with ``scale``.

    Returns:
        values: e4m3 (torch.float8_e4m3fn) [..., C0 + C], contiguous.
        row_scale: fp32 [..., 1], contiguous, at least 2^-126; what ``torch._scaled_mm`` takes as a scale a row.
        A row of zeros gives zeros. A row with an infinity has the scale inf, and values 448 and -448 at infinities,
        else 0. A row with a NaN has the scale NaN.

    All arithmetic is fp32, with one rounding at the end.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: OCP 8-bit floating point specification (e4m3); FP8 formats for deep learning, arXiv 2209.05433.
    """
    return _op(x, scale=scale, shift=shift, modulation_index=modulation_index, before=before, gelu=gelu, eps=eps)
