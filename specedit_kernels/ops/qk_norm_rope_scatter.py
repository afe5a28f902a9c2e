# SPDX-License-Identifier: Apache-2.0
"""``qk_norm_rope_scatter_``: what stands between the q, k, v projections and attention, in one launch; and the same for
attention on e4m3 numbers."""

import torch

from .._panels import PANEL, panels_of
from . import _backends, _checks
from ._library import register

_OP = "qk_norm_rope_scatter_"
_FP8_OP = "qk_norm_rope_scatter_fp8_"


def _check_call(
    op, of_outs, q_out, k_out, v_out, q, k, v, cos, sin, *,
    q_weight=None, k_weight=None, split=None, q_out_index=None, kv_out_index=None, eps=1e-6,
):  # fmt: skip
    _checks.check_dtype(op, "q", q, _checks.FLOATS)
    _checks.check_shape(op, "q", q, (None,) * 4, "[B, N, H, D]")
    batch, rows, heads, dim = q.shape
    if dim % 2 or dim == 0:
        _checks.value_error(op, "q", "an even last dimension (rotary pairs)", _checks.shape_of(q))
    _checks.check_shape(op, "k", k, (batch, rows, None, dim), f"[{batch}, {rows}, Hk, {dim}] (q's B, N and D)")
    kv_heads = k.shape[2]
    if (heads % kv_heads if kv_heads else heads) != 0:
        _checks.value_error(op, "k", f"a number of heads that divides q's {heads}", kv_heads)
    _checks.check_shape(op, "v", v, k.shape, f"{_checks.shape_of(k)} (k's)")
    _checks.check_shape(op, "q_out", q_out, (batch, None, heads, dim), f"[{batch}, rows, {heads}, {dim}]")
    _checks.check_shape(op, "k_out", k_out, (batch, None, kv_heads, dim), f"[{batch}, rows, {kv_heads}, {dim}]")
    if of_outs is None:
        _checks.check_shape(op, "v_out", v_out, k_out.shape, f"{_checks.shape_of(k_out)} (k_out's)")
    else:
        panels = (batch, panels_of(k_out.shape[1]), kv_heads, dim, PANEL)
        _checks.check_shape(op, "v_out", v_out, panels, f"{list(panels)}, panels for k_out's {k_out.shape[1]} rows")
    for name, tensor in (("k", k), ("v", v), ("q_out", q_out), ("k_out", k_out), ("v_out", v_out)):
        if tensor.dtype != (of_outs if "out" in name and of_outs else q.dtype):
            expected = of_outs if "out" in name and of_outs else f"q's dtype {q.dtype}"
            _checks.type_error(op, name, expected, tensor.dtype)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("q_out", q_out), ("k_out", k_out), ("v_out", v_out)):
        _checks.check_last_contiguous(op, name, tensor)

    for name, table in (("cos", cos), ("sin", sin)):
        _checks.check_dtype(op, name, table, _checks.FP32)
        _checks.check_shape(op, name, table, (None, rows, dim // 2), f"[B or 1, {rows}, {dim // 2}]")
        if table.shape[0] != batch and table.shape[0] != 1:
            _checks.value_error(op, name, f"shape [{batch} or 1, {rows}, {dim // 2}]", _checks.shape_of(table))

    two_sets = False
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        _checks.check_dtype(op, name, weight, _checks.FLOATS)
        if weight.dim() == 2:
            _checks.check_shape(op, name, weight, (2, dim), f"[{dim}] or [2, {dim}]")
            two_sets = True
        else:
            _checks.check_shape(op, name, weight, (dim,), f"[{dim}] or [2, {dim}]")
        _checks.check_last_contiguous(op, name, weight)
    if two_sets and split is None:
        _checks.value_error(op, "split", f"a row from 0 to {rows}, since a weight has two sets", None)
    if split is not None:
        if not two_sets:
            _checks.value_error(op, "split", f"None, since no weight has shape [2, {dim}]", split)
        if split < 0 or split > rows:
            _checks.value_error(op, "split", f"a row from 0 to {rows}", split)

    for name, index, out_name, out in (
        ("q_out_index", q_out_index, "q_out", q_out), ("kv_out_index", kv_out_index, "k_out", k_out)
    ):  # fmt: skip
        if index is None:
            if out.shape[1] < rows:
                _checks.value_error(op, out_name, f">= {rows} rows, since {name} is None", _checks.shape_of(out))
            continue
        _checks.check_dtype(op, name, index, _checks.INT32)
        if index.dim() != 2 or index.shape[0] != batch or index.shape[1] < rows:
            _checks.value_error(op, name, f"shape [B={batch}, >= {rows}]", _checks.shape_of(index))

    for name, tensor in dict(
        k=k, v=v, q_out=q_out, k_out=k_out, v_out=v_out, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight,
        q_out_index=q_out_index, kv_out_index=kv_out_index,
    ).items():  # fmt: skip
        if tensor is not None:
            _checks.check_device(op, name, tensor, q.device)
    _checks.check_eps(op, eps)


def _check(q_out, k_out, v_out, *inputs, **options):
    _check_call(_OP, None, q_out, k_out, v_out, *inputs, **options)


def _check_fp8(q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, **options):
    _check_call(_FP8_OP, torch.float8_e4m3fn, q_out, k_out, v_out, q, k, v, cos, sin, **options)
    for name, scale, of in (("q_scale", q_scale, q), ("k_scale", k_scale, k), ("v_scale", v_scale, v)):
        _checks.check_dtype(_FP8_OP, name, scale, _checks.FP32)
        shape = (q.shape[0], 1, of.shape[2])
        _checks.check_shape(_FP8_OP, name, scale, shape, f"{list(shape)}, one a head")
        _checks.check_device(_FP8_OP, name, scale, q.device)


def _check_values(op, q_out, k_out, q, q_out_index, kv_out_index):
    rows = q.shape[1]
    for name, index, out in (("q_out_index", q_out_index, q_out), ("kv_out_index", kv_out_index, k_out)):
        if index is None:
            continue
        if q.device.type == "cpu" or _checks.debugging():
            _checks.check_index_range(op, name, index[:, :rows], out.shape[1])
        if _checks.debugging():
            _checks.check_no_duplicates(op, name, index[:, :rows])


def _implementation(
    q_out, k_out, v_out, q, k, v, cos, sin, *,
    q_weight=None, k_weight=None, split=None, q_out_index=None, kv_out_index=None, eps=1e-6,
):  # fmt: skip
    _check(q_out, k_out, v_out, q, k, v, cos, sin, q_weight=q_weight, k_weight=k_weight, split=split,
           q_out_index=q_out_index, kv_out_index=kv_out_index, eps=eps)  # fmt: skip
    _check_values(_OP, q_out, k_out, q, q_out_index, kv_out_index)
    _backends.implementation(_OP, q.device)(
        q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, split or 0, q_out_index, kv_out_index, eps
    )


_op = register(
    "qk_norm_rope_scatter_(Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!) v_out, Tensor q, Tensor k, Tensor v, "
    "Tensor cos, Tensor sin, *, Tensor? q_weight=None, Tensor? k_weight=None, SymInt? split=None, "
    "Tensor? q_out_index=None, Tensor? kv_out_index=None, float eps=1e-6) -> ()",
    _implementation,
    _check,
)
_backends.add(_OP, "qk_norm_rope_scatter")


def _fp8_implementation(
    q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, *,
    q_weight=None, k_weight=None, split=None, q_out_index=None, kv_out_index=None, eps=1e-6,
):  # fmt: skip
    _check_fp8(q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, q_weight=q_weight, k_weight=k_weight,
               split=split, q_out_index=q_out_index, kv_out_index=kv_out_index, eps=eps)  # fmt: skip
    _check_values(_FP8_OP, q_out, k_out, q, q_out_index, kv_out_index)
    _backends.implementation(_FP8_OP, q.device)(
        q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, q_weight, k_weight, split or 0, q_out_index,
        kv_out_index, eps,
    )  # fmt: skip


_fp8_op = register(
    "qk_norm_rope_scatter_fp8_(Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!) v_out, Tensor q, Tensor k, Tensor v, "
    "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor cos, Tensor sin, *, Tensor? q_weight=None, "
    "Tensor? k_weight=None, SymInt? split=None, Tensor? q_out_index=None, Tensor? kv_out_index=None, float eps=1e-6) "
    "-> ()",
    _fp8_implementation,
    _check_fp8,
)
_backends.add(_FP8_OP, "qk_norm_rope_scatter")


def qk_norm_rope_scatter_(
    q_out, k_out, v_out, q, k, v, cos, sin, *,
    q_weight=None, k_weight=None, split=None, q_out_index=None, kv_out_index=None, eps=1e-6,
):  # fmt: skip
    """RMSNorm of q and k per head, rotary embedding of both, and the write of q, k and v to their rows, in place.

        n(x, w) = x / sqrt(mean(x^2) + eps) * w                                          (over the head's D channels)
        r(x)[2j], r(x)[2j + 1] = x[2j] cos[j] - x[2j + 1] sin[j],  x[2j + 1] cos[j] + x[2j] sin[j]
        q_out[b, q_out_index[b, i]] = r(n(q[b, i], q_weight))
        k_out[b, kv_out_index[b, i]] = r(n(k[b, i], k_weight)),    v_out[b, kv_out_index[b, i]] = v[b, i]

    for the N fresh rows i. A -1 is skipped; rows that no index names keep their bits. The outputs are the caller's:
    a per-layer K/V buffer of the whole sequence that only fresh rows are written to, a compact q (``q_out_index``
    None), or views of longer ones. They may not overlap the inputs.

    The streams of a double block (text, image) have weights of their own. Either call once a stream, with views of
    the joint outputs (``q_out[:, :T]``, ``q_out[:, T:]``): no concatenation, any linear layers. Or, where the two
    projections were written side by side into one tensor, call once with weights [2, D] and ``split`` = T: one launch.

    Args:
        q_out: [B, >= 1 row, H, D]; k_out, v_out: [B, rows, Hk, D]. q's dtype. Written.
        q: [B, N, H, D]; k, v: [B, N, Hk, D], Hk divides H, D even; bf16, fp16 or fp32, any strides with the last
            dimension contiguous: views of one [B, N, (H + 2 Hk) D] projection are read without a copy.
        cos, sin: fp32 [B or 1, N, D/2], the tables of row i (of each sample, or of all), any strides. diffusers' FLUX
            tables ([N, D], each value twice): ``cos[None, :, ::2]``, ``sin[None, :, ::2]``; its Qwen tables (complex
            [N, D/2]): ``freqs.real[None]``, ``freqs.imag[None]``. Both are views, and give the same numbers. A row
            without a position has cos 1 and sin 0.
        q_weight, k_weight: RMSNorm weights [D], or [2, D]: set 0 for the rows i < split, set 1 for the others. Any of
            the float dtypes. None: no weight.
        split: given if and only if a weight is [2, D].
        q_out_index, kv_out_index: int32 [B, >= N], the row of q_out (of k_out and v_out) that row i goes to, values
            from -1 to rows - 1, no destination twice (SPECEDIT_DEBUG=1 checks both; the range is checked on CPU
            always). None: row i.
        eps: added to the mean square.

    All arithmetic is fp32 and a result is rounded once, when it is written; v's bits are copied. diffusers rounds the
    norm's result to the model's dtype (Qwen's before its weight, too) before it rotates in fp32: in bf16 its error
    against float64 is larger.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; the outputs are then untouched.

    Source: RMSNorm, arXiv 1910.07467; rotary embedding, arXiv 2104.09864, pairs of neighbouring channels.
    """
    _op(
        q_out, k_out, v_out, q, k, v, cos, sin, q_weight=q_weight, k_weight=k_weight, split=split,
        q_out_index=q_out_index, kv_out_index=kv_out_index, eps=eps,
    )  # fmt: skip


def qk_norm_rope_scatter_fp8_(
    q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, *,
    q_weight=None, k_weight=None, split=None, q_out_index=None, kv_out_index=None, eps=1e-6,
):  # fmt: skip
    """`qk_norm_rope_scatter_` into e4m3 numbers, which `mixed_res_attn_fp8` takes.

    What `qk_norm_rope_scatter_` would write, not rounded, is divided by the scale of its head, and rounded to the
    nearest e4m3 number; beyond 448 it becomes 448, and NaN stays NaN.

    Args:
        q_out, k_out: as there, e4m3 (torch.float8_e4m3fn). v_out: e4m3 [B, ceil(rows / 64), Hk, D, 64], rows those of
            k_out: row i goes to v_out[b, i // 64, :, :, i % 64]. Last dimensions contiguous. Written.
        q_scale: fp32 [B, 1, H], k_scale, v_scale: [B, 1, Hk], from 2^-126 on. No component of a normed and rotated row
            is above sqrt(D) max |weight|: a scale of a 448th of that cuts nothing off q and k.
        q, k, v, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index, eps: as there.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; the outputs are then untouched.
    """
    _fp8_op(
        q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, q_weight=q_weight, k_weight=k_weight,
        split=split, q_out_index=q_out_index, kv_out_index=kv_out_index, eps=eps,
    )  # fmt: skip
