# SPDX-License-Identifier: Apache-2.0
"""``mixed_res_attn_fp8``: attention over tokens of several resolutions, on e4m3 numbers."""

import torch

from .._panels import PANEL, panels_of
from . import _backends, _checks
from ._library import define_csrc, register
from .mixed_res_attn import unaligned

_OP = "mixed_res_attn_fp8"
_E4M3 = (torch.float8_e4m3fn,)


def _check(
    q, k, v, q_scale, k_scale, v_scale, *, key_bias=None, q_index=None, kv_index=None, q_lens=None, kv_lens=None,
    scale=None,
):  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        _checks.check_dtype(_OP, name, x, _E4M3)
        if x.dim() != 4 and (name != "v" or x.dim() != 5):
            _checks.value_error(_OP, name, "[B, S, H, D]", _checks.shape_of(x))
        _checks.check_device(_OP, name, x, q.device)
        _checks.check_last_contiguous(_OP, name, x)
    batch, rows, heads, dim = q.shape
    _checks.check_head_dim(_OP, "q", dim)
    _checks.check_shape(_OP, "k", k, (batch, None, None, dim), f"[B={batch}, S, Hk, D={dim}] as q has it")
    if k.shape[2] < 1 or heads % k.shape[2]:
        _checks.value_error(_OP, "k", f"heads that divide q's {heads}", k.shape[2])
    panels = (batch, panels_of(k.shape[1]), k.shape[2], dim, PANEL)
    if v.shape != k.shape and v.shape != panels:
        expected = f"k's shape {_checks.shape_of(k)}, or panels {list(panels)}"
        _checks.value_error(_OP, "v", expected, _checks.shape_of(v))
    for name, x, of in (("q_scale", q_scale, q), ("k_scale", k_scale, k), ("v_scale", v_scale, k)):
        _checks.check_dtype(_OP, name, x, _checks.FP32)
        rows, heads = of.shape[1:3]
        if x.dim() != 3 or x.shape[0] != batch or x.shape[1] not in (1, rows) or x.shape[2] != heads:
            expected = f"shape {[batch, rows, heads]}, a scale a row and head, or {[batch, 1, heads]}, one a head"
            _checks.value_error(_OP, name, expected, _checks.shape_of(x))
        _checks.check_device(_OP, name, x, q.device)
    for name, index in (("q_index", q_index), ("kv_index", kv_index)):
        if index is not None:
            _checks.check_dtype(_OP, name, index, _checks.INT32)
            _checks.check_shape(_OP, name, index, (batch, None), f"[B={batch}, slots]")
            _checks.check_device(_OP, name, index, q.device)
            _checks.check_last_contiguous(_OP, name, index)
    for name, lens in (("q_lens", q_lens), ("kv_lens", kv_lens)):
        if lens is not None:
            _checks.check_dtype(_OP, name, lens, _checks.INT32)
            _checks.check_shape(_OP, name, lens, (batch,), f"[B={batch}]")
            _checks.check_device(_OP, name, lens, q.device)
    if key_bias is not None:
        _checks.check_dtype(_OP, "key_bias", key_bias, _checks.FP32)
        shape = (batch, k.shape[1])
        _checks.check_shape(_OP, "key_bias", key_bias, shape, f"{list(shape)}, one value a row of k")
        _checks.check_device(_OP, "key_bias", key_bias, q.device)
        _checks.check_last_contiguous(_OP, "key_bias", key_bias)
    _checks.check_scale(_OP, scale)


def _implementation(
    q, k, v, q_scale, k_scale, v_scale, *, key_bias=None, q_index=None, kv_index=None, q_lens=None, kv_lens=None,
    scale=None,
):  # fmt: skip
    _check(q, k, v, q_scale, k_scale, v_scale, key_bias=key_bias, q_index=q_index, kv_index=kv_index, q_lens=q_lens,
           kv_lens=kv_lens, scale=scale)  # fmt: skip
    if q.device.type == "cpu" or _checks.debugging():
        for name, index, rows in (("q_index", q_index, q.shape[1]), ("kv_index", kv_index, k.shape[1])):
            if index is not None:
                _checks.check_index_range(_OP, name, index, rows)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = (q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale)
    return _backends.implementation(_OP, q.device, call)(*call)


def _fake(
    q, k, v, q_scale, k_scale, v_scale, *, key_bias=None, q_index=None, kv_index=None, q_lens=None, kv_lens=None,
    scale=None,
):  # fmt: skip
    _check(q, k, v, q_scale, k_scale, v_scale, key_bias=key_bias, q_index=q_index, kv_index=kv_index, q_lens=q_lens,
           kv_lens=kv_lens, scale=scale)  # fmt: skip
    batch, rows, heads, dim = q.shape
    if q_index is not None:
        rows = q_index.shape[1]
    out = q.new_empty((batch, rows, heads, dim), dtype=torch.bfloat16)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


_op = register(
    f"{_OP}(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, *, Tensor? key_bias=None,"
    " Tensor? q_index=None, Tensor? kv_index=None, Tensor? q_lens=None, Tensor? kv_lens=None, float? scale=None)"
    " -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


def _csrc_fake(out, q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale):
    rows = q.shape[1] if q_index is None else q_index.shape[1]
    return q.new_empty((q.shape[0], q.shape[2], rows), dtype=torch.float32)


_csrc_op = define_csrc(
    "mixed_res_attn_fp8_csrc(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale,"
    " Tensor v_scale, Tensor? key_bias, Tensor? q_index, Tensor? kv_index, Tensor? q_lens, Tensor? kv_lens,"
    " float scale) -> Tensor",
    _csrc_fake,
)


def _csrc(q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, *rest):
    shape = q.shape if q_index is None else (*q_index.shape, *q.shape[2:])
    out = torch.empty(shape, dtype=torch.bfloat16, device=q.device)
    return out, _csrc_op(out, q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, *rest)


def _csrc_refuses(q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale):
    """Why the CUDA C++ kernel does not serve a call, or ""."""
    if q.shape[-1] != 128:
        return f"the kernel takes head dimension 128, not {q.shape[-1]}"
    if not 1e-6 < scale < 1e6:
        return f"the kernel takes a scale from 1e-6 to 1e6, not {scale}"
    if q.shape[0] > 512:
        return "the kernel takes at most 512 batch entries"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if unaligned(x):
            return f"{name}: the kernel needs rows on a 16-byte grid, got strides {list(x.stride())}"
    lasts = (("q_index", q_index), ("kv_index", kv_index), ("q_lens", q_lens), ("kv_lens", kv_lens))
    for name, x in lasts:
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{name}: the kernel needs a contiguous last dimension, got strides {list(x.stride())}"
    return ""


_SCOPE = "D 128, q, k and v with rows on a 16-byte grid, scale > 0, B up to 512; other calls: triton"
# e4m3 operands of matrix products
_backends.add(_OP, "mixed_res_attn_fp8", _csrc, _csrc_refuses, "90a", _SCOPE, capability=(8, 9))


def mixed_res_attn_fp8(
    q, k, v, q_scale, k_scale, v_scale, *, key_bias=None, q_index=None, kv_index=None, q_lens=None, kv_lens=None,
    scale=None,
):  # fmt: skip
    """`mixed_res_attn` of q * q_scale, k * k_scale and v * v_scale, whose numbers are e4m3 (padded layout).

    Both products are e4m3 ones with fp32 sums; softmax, bias and scales are fp32. A weight is rounded to e4m3 before
    the second product: relative to the largest so far of its row, by at most 2^-4 of it, or 2^-18 where it is small.

    Args:
        q: e4m3 (torch.float8_e4m3fn) [B, Sq, H, D], last dimension contiguous; D a multiple of 16, 16 to 256.
        k: e4m3 [B, Sk, Hk, D]; Hk divides H.
        v: e4m3, k's shape; or in panels of 64 keys, [B, ceil(Sk / 64), Hk, D, 64], as `qk_norm_rope_scatter_fp8_`
            writes it: v[b, i // 64, h, d, i % 64] is channel d of key i. Last dimension contiguous. sm_90's products
            read panels without a transposition (with D 128 where Sk is a multiple of 4 and there is no ``kv_index``;
            else the call makes a copy of k and v). What a panel has beyond Sk may be anything, NaN too.
        q_scale, k_scale, v_scale: fp32, >= 0: a scale a row and head, [B, Sq, H] or [B, Sk, Hk] (as `quantize_fp8`
            gives of rows of D, without its last dimension), or one a head, [B, 1, H] or [B, 1, Hk], which is faster for
            k and v.
        key_bias, q_index, kv_index, q_lens, kv_lens, scale: as `mixed_res_attn`.

    Returns:
        out: bf16 [B, Nq, H, D]. lse: fp32 [B, H, Nq], natural log. A query with no key, or an empty slot: 0 and -inf.

    On CUDA devices below compute capability 8.9, and on a CPU, the reference serves it.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _op(
        q, k, v, q_scale, k_scale, v_scale, key_bias=key_bias, q_index=q_index, kv_index=kv_index, q_lens=q_lens,
        kv_lens=kv_lens, scale=scale,
    )  # fmt: skip
