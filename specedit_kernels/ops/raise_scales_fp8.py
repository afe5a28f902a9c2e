# SPDX-License-Identifier: Apache-2.0
"""``raise_scales_fp8_``: the scales that rows of q, k and v need in e4m3."""

from . import _backends, _checks
from ._library import register

_OP = "raise_scales_fp8_"


def _check(q_scale, k_scale, v_scale, v, *, q_weight=None, k_weight=None, headroom=1.0):
    _checks.check_dtype(_OP, "v", v, _checks.FLOATS)
    _checks.check_shape(_OP, "v", v, (None,) * 4, "[B, N, Hk, D]")
    _checks.check_last_contiguous(_OP, "v", v)
    batch, _, heads, dim = v.shape
    for name, scale, of_heads in (("q_scale", q_scale, None), ("k_scale", k_scale, heads), ("v_scale", v_scale, heads)):
        _checks.check_dtype(_OP, name, scale, _checks.FP32)
        _checks.check_shape(_OP, name, scale, (batch, 1, of_heads), f"[{batch}, 1, {of_heads or 'H'}]")
        _checks.check_last_contiguous(_OP, name, scale)
        _checks.check_device(_OP, name, scale, v.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        _checks.check_dtype(_OP, name, weight, _checks.FLOATS)
        _checks.check_shape(_OP, name, weight, (dim,), f"[{dim}]")
        _checks.check_last_contiguous(_OP, name, weight)
        _checks.check_device(_OP, name, weight, v.device)
    if not 0 < headroom <= _checks.FP32_MAX:
        _checks.value_error(_OP, "headroom", "a finite number > 0 (in fp32)", headroom)


def _implementation(q_scale, k_scale, v_scale, v, *, q_weight=None, k_weight=None, headroom=1.0):
    _check(q_scale, k_scale, v_scale, v, q_weight=q_weight, k_weight=k_weight, headroom=headroom)
    _backends.implementation(_OP, v.device)(q_scale, k_scale, v_scale, v, q_weight, k_weight, headroom)


_op = register(
    "raise_scales_fp8_(Tensor(a!) q_scale, Tensor(b!) k_scale, Tensor(c!) v_scale, Tensor v, *, "
    "Tensor? q_weight=None, Tensor? k_weight=None, float headroom=1.0) -> ()",
    _implementation,
    _check,
)
_backends.add(_OP, "raise_scales_fp8")


def raise_scales_fp8_(q_scale, k_scale, v_scale, v, *, q_weight=None, k_weight=None, headroom=1.0):
    """Raise the scales of e4m3 numbers to what these rows need, in place, in one launch.

        q_scale[b, 0, h] = max(q_scale[b, 0, h], sqrt(D) max |q_weight| / 448),    k_scale with k_weight
        v_scale[b, 0, h] = max(v_scale[b, 0, h], headroom max |v[b, :, h]| / 448)

    q and k are those that `qk_norm_rope_scatter_fp8_` writes: normed rows, no component of which is above sqrt(D) max
    |weight|. Called for each stream of a sequence; before the first, fill the scales with the least one (2^-126).

    Args:
        q_scale: fp32 [B, 1, H], k_scale, v_scale: fp32 [B, 1, Hk], > 0, last dimension contiguous. Written.
        v: [B, N, Hk, D], bf16, fp16 or fp32, last dimension contiguous.
        q_weight, k_weight: RMSNorm weights [D], any of these dtypes. None: 1.
        headroom: a finite number > 0; room for rows that are written under the same scale later.

    An infinite or NaN number gives a scale that is one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; the scales are then untouched.
    """
    _op(q_scale, k_scale, v_scale, v, q_weight=q_weight, k_weight=k_weight, headroom=headroom)
