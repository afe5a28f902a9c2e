# SPDX-License-Identifier: Apache-2.0
"""``mixed_res_attn``: attention over tokens of several resolutions, with gather and scatter of rows."""

import torch

from . import _backends, _checks
from ._library import define_csrc, register

_OP = "mixed_res_attn"
_SCATTER_OP = "mixed_res_attn_scatter_"


def _check_lens(op, name, lens, batch, device):
    if lens is not None:
        _checks.check_dtype(op, name, lens, _checks.INT32)
        _checks.check_shape(op, name, lens, (batch,), f"[B={batch}]")
        _checks.check_device(op, name, lens, device)


def _check_index(op, name, index, batch, device):
    if index is not None:
        _checks.check_dtype(op, name, index, _checks.INT32)
        _checks.check_shape(op, name, index, (batch, None), f"[B={batch}, slots]")
        _checks.check_device(op, name, index, device)


def _check(
    op,
    q,
    k,
    v,
    key_bias,
    q_index,
    kv_index,
    q_lens,
    kv_lens,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
):
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_dtype(op, name, tensor, _checks.FLOATS)
        if tensor.dim() != (3 if packed else 4):
            layout = (
                "[T, H, D] (packed: cu_seqlens is given)"
                if packed
                else "[B, S, H, D] (padded layout; packed rows [T, H, D] need cu_seqlens_q and cu_seqlens_k)"
            )
            _checks.value_error(op, name, layout, _checks.shape_of(tensor))
        _checks.check_last_contiguous(op, name, tensor)
    device = q.device
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            _checks.type_error(op, name, f"q's dtype {q.dtype}", tensor.dtype)
        _checks.check_device(op, name, tensor, device)
    heads, dim = q.shape[-2:]
    _checks.check_head_dim(op, "q", dim)
    if k.shape[-1] != dim or (not packed and k.shape[0] != q.shape[0]):
        batch = "" if packed else f"B={q.shape[0]}, "
        _checks.value_error(op, "k", f"shape [{batch}S, Hk, D={dim}] as q has it", _checks.shape_of(k))
    if k.shape[-2] < 1 or heads % k.shape[-2]:
        _checks.value_error(op, "k", f"heads that divide q's {heads}", k.shape[-2])
    if v.shape != k.shape:
        _checks.value_error(op, "v", f"k's shape {_checks.shape_of(k)}", _checks.shape_of(v))
    if packed:
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu_seqlens is None:
                _checks.value_error(op, name, "an int32 tensor [B + 1] (the other cu_seqlens is given)", None)
            _checks.check_dtype(op, name, cu_seqlens, _checks.INT32)
            _checks.check_device(op, name, cu_seqlens, device)
        if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
            _checks.value_error(op, "cu_seqlens_q", "shape [B + 1]", _checks.shape_of(cu_seqlens_q))
        batch = cu_seqlens_q.shape[0] - 1
        _checks.check_shape(op, "cu_seqlens_k", cu_seqlens_k, (batch + 1,), f"[B + 1 = {batch + 1}]")
        for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if length is None or length < 0:
                _checks.value_error(op, name, "an integer >= 0 (packed layout)", length)
        for name, index in (("q_index", q_index), ("kv_index", kv_index)):
            if index is not None:
                _checks.value_error(op, name, "None in the packed layout", f"a tensor {_checks.shape_of(index)}")
    else:
        batch = q.shape[0]
        for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if length is not None:
                _checks.value_error(op, name, "None in the padded layout", length)
        _check_index(op, "q_index", q_index, batch, device)
        _check_index(op, "kv_index", kv_index, batch, device)
    _check_lens(op, "q_lens", q_lens, batch, device)
    _check_lens(op, "kv_lens", kv_lens, batch, device)
    if key_bias is not None:
        _checks.check_dtype(op, "key_bias", key_bias, _checks.FP32)
        shape = tuple(k.shape[:-2])
        _checks.check_shape(op, "key_bias", key_bias, shape, f"{list(shape)}, one value a row of k")
        _checks.check_device(op, "key_bias", key_bias, device)
        _checks.check_last_contiguous(op, "key_bias", key_bias)
    _checks.check_scale(op, scale)


def _check_values(op, q, k, q_index, kv_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Checks that read index values: on CPU, where reading is free, and when debugging."""
    if q_index is not None:
        _checks.check_index_range(op, "q_index", q_index, q.shape[1])
    if kv_index is not None:
        _checks.check_index_range(op, "kv_index", kv_index, k.shape[1])
    for name, cu_seqlens, rows, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        if cu_seqlens is not None:
            steps = cu_seqlens.diff()
            if int(cu_seqlens[0]) != 0 or (steps < 0).any() or int(cu_seqlens[-1]) > rows or (steps > longest).any():
                expected = f"0, then never decreasing, steps of at most {longest} (the maximum), {rows} rows at the end"
                _checks.value_error(op, name, expected, cu_seqlens.tolist())


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _implementation(
    q,
    k,
    v,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    _check(
        _OP,
        q,
        k,
        v,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
    )
    if q.device.type == "cpu" or _checks.debugging():
        _check_values(_OP, q, k, q_index, kv_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = (
        q,
        k,
        v,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        _scale(q, scale),
    )
    return _backends.implementation(_OP, q.device, call)(*call)


def _fake(
    q,
    k,
    v,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    _check(
        _OP,
        q,
        k,
        v,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
    )
    if cu_seqlens_q is not None:
        rows, heads, dim = q.shape
        return q.new_empty((rows, heads, dim)), q.new_empty((heads, rows), dtype=torch.float32)
    batch, rows, heads, dim = q.shape
    if q_index is not None:
        rows = q_index.shape[1]
    return q.new_empty((batch, rows, heads, dim)), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _check_scatter(out, q, out_index, q_index, cu_seqlens_q):
    op = _SCATTER_OP
    if cu_seqlens_q is not None:
        _checks.value_error(op, "cu_seqlens_q", "None (rows are scattered in the padded layout)", "a tensor")
    batch, rows, heads, dim = q.shape
    if q_index is not None:
        rows = q_index.shape[1]
    if out.dtype != q.dtype:
        _checks.type_error(op, "out", f"q's dtype {q.dtype}", out.dtype)
    _checks.check_shape(op, "out", out, (batch, None, heads, dim), f"[B={batch}, rows, H={heads}, D={dim}]")
    _checks.check_device(op, "out", out, q.device)
    _checks.check_last_contiguous(op, "out", out)
    _checks.check_dtype(op, "out_index", out_index, _checks.INT32)
    _checks.check_shape(op, "out_index", out_index, (batch, rows), f"[B={batch}, Nq={rows}]")
    _checks.check_device(op, "out_index", out_index, q.device)


def _scatter_implementation(
    out,
    q,
    k,
    v,
    out_index,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    _check(
        _SCATTER_OP,
        q,
        k,
        v,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
    )
    _check_scatter(out, q, out_index, q_index, cu_seqlens_q)
    if q.device.type == "cpu" or _checks.debugging():
        _check_values(_SCATTER_OP, q, k, q_index, kv_index, None, None, None, None)
        _checks.check_index_range(_SCATTER_OP, "out_index", out_index, out.shape[1])
    if _checks.debugging():
        _checks.check_no_duplicates(_SCATTER_OP, "out_index", out_index)
    call = (
        out,
        q,
        k,
        v,
        out_index,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        None,
        None,
        None,
        None,
        _scale(q, scale),
    )
    return _backends.implementation(_SCATTER_OP, q.device, call)(*call)


def _scatter_fake(
    out,
    q,
    k,
    v,
    out_index,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    _check(
        _SCATTER_OP,
        q,
        k,
        v,
        key_bias,
        q_index,
        kv_index,
        q_lens,
        kv_lens,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
    )
    _check_scatter(out, q, out_index, q_index, cu_seqlens_q)
    return q.new_empty((q.shape[0], q.shape[2], out_index.shape[1]), dtype=torch.float32)


_OPTIONS = (
    "*, Tensor? key_bias=None, Tensor? q_index=None, Tensor? kv_index=None, Tensor? q_lens=None, Tensor? kv_lens=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,"
    " float? scale=None"
)
_op = register(f"{_OP}(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", _implementation, _fake)
_scatter_op = register(
    f"{_SCATTER_OP}(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor out_index, {_OPTIONS}) -> Tensor",
    _scatter_implementation,
    _scatter_fake,
)


def _csrc_fake(
    out,
    out_index,
    q,
    k,
    v,
    key_bias,
    q_index,
    kv_index,
    q_lens,
    kv_lens,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
):
    if cu_seqlens_q is not None:
        return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    rows = q.shape[1] if q_index is None else q_index.shape[1]
    return q.new_empty((q.shape[0], q.shape[2], rows), dtype=torch.float32)


_csrc_op = define_csrc(
    "mixed_res_attn_csrc(Tensor(a!) out, Tensor? out_index, Tensor q, Tensor k, Tensor v, Tensor? key_bias,"
    " Tensor? q_index, Tensor? kv_index, Tensor? q_lens, Tensor? kv_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " int? max_seqlen_q, int? max_seqlen_k, float scale) -> Tensor",
    _csrc_fake,
)


def _csrc(q, k, v, key_bias, q_index, *rest):
    shape = q.shape if q_index is None else (*q_index.shape, *q.shape[2:])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    return out, _csrc_op(out, None, q, k, v, key_bias, q_index, *rest)


def _csrc_scatter(out, q, k, v, out_index, *rest):
    return _csrc_op(out, out_index, q, k, v, *rest)


def unaligned(x):
    """Whether a row of a head may be not 16-byte aligned, or rows overlap in memory."""
    if x.data_ptr() % 16:
        return True
    grid = 16 // x.element_size()
    return any(size > 1 and (stride % grid or stride <= 0) for size, stride in zip(x.shape[:-1], x.stride()))


def _csrc_refuses(
    q,
    k,
    v,
    key_bias,
    q_index,
    kv_index,
    q_lens,
    kv_lens,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    out=None,
    out_index=None,
):
    """Why the CUDA C++ kernel does not serve a call, or ""."""
    if q.dtype == torch.float32:
        return "the kernel takes bf16 and fp16, not fp32"
    if q.shape[-1] not in (64, 128):
        return f"the kernel takes head dimensions 64 and 128, not {q.shape[-1]}"
    if not 1e-6 < scale < 1e6:
        return f"the kernel takes a scale from 1e-6 to 1e6, not {scale}"
    if (q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1) > 512:
        return "the kernel takes at most 512 batch entries"
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x is not None and unaligned(x):
            return f"{name}: the kernel needs rows on a 16-byte grid, got strides {list(x.stride())}"
    for name, x in (
        ("q_index", q_index), ("kv_index", kv_index), ("out_index", out_index), ("q_lens", q_lens),
        ("kv_lens", kv_lens), ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k),
    ):  # fmt: skip
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{name}: the kernel needs a contiguous last dimension, got strides {list(x.stride())}"
    return ""


def _csrc_scatter_refuses(out, q, k, v, out_index, *rest):
    return _csrc_refuses(*(q, k, v, *rest, out, out_index))


_SCOPE = "bf16 and fp16, D 64 or 128, rows on a 16-byte grid, scale > 0, B up to 512; other calls: triton"
_backends.add(_OP, "mixed_res_attn", _csrc, _csrc_refuses, "90a", _SCOPE)
_backends.add(_SCATTER_OP, "mixed_res_attn", _csrc_scatter, _csrc_scatter_refuses, "90a", _SCOPE)


def mixed_res_attn(
    q,
    k,
    v,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    """Softmax attention with a bias per key, rows taken by index, and lengths that live on the device.

    A coarse key that stands for m fine ones gets ``key_bias`` log m, so that it weighs as much as they would.

    Args:
        q: [B, Sq, H, D], or packed [Tq, H, D]; bf16, fp16 or fp32; last dimension contiguous. D is a multiple of 16,
            up to 256 (64 and 128 are fast).
        k, v: [B, Sk, Hk, D], or packed [Tk, Hk, D]; Hk divides H.
        key_bias: fp32 [B, Sk] or [Tk], natural log, added to the scaled scores of every head; -inf removes a key
            (whose rows must still be finite: use ``kv_lens`` or a -1 for rows never written). It follows the rows of
            k, not the slots of ``kv_index``.
        q_index, kv_index: int32 [B, Nq], [B, Nk]: the row of q (of k and v) that feeds slot i; -1 = empty slot.
            Padded layout only. Values are checked on CPU, and under SPECEDIT_DEBUG=1.
        q_lens, kv_lens: int32 [B], on the device: slots from there on are empty.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], on the device: packed layout. Rows past the last one are empty.
        max_seqlen_q, max_seqlen_k: the longest sequence (packed layout: required).
        scale: of the scores; D ** -0.5 by default.

    Returns:
        out: q's dtype, [B, Nq, H, D] or [Tq, H, D].
        lse: fp32 [B, H, Nq] or [H, Tq], natural log.
        A query with no key, or an empty slot: out 0, lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    return _op(
        q,
        k,
        v,
        key_bias=key_bias,
        q_index=q_index,
        kv_index=kv_index,
        q_lens=q_lens,
        kv_lens=kv_lens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
    )


def mixed_res_attn_scatter_(
    out,
    q,
    k,
    v,
    out_index,
    *,
    key_bias=None,
    q_index=None,
    kv_index=None,
    q_lens=None,
    kv_lens=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    scale=None,
):
    """`mixed_res_attn` that writes row i of its result to out[b, out_index[b, i]] and leaves the rest of ``out``.

    Args:
        out: [B, rows, H, D], q's dtype; written in place, untouched rows keep their bits.
        out_index: int32 [B, Nq], values from -1 (not written) to rows - 1, no destination twice.
        The others: as `mixed_res_attn`, padded layout.

    Returns:
        lse: fp32 [B, H, Nq].

    Raises:
        ValueError, TypeError: as `mixed_res_attn`; ``out`` is then untouched.
    """
    return _scatter_op(
        out,
        q,
        k,
        v,
        out_index,
        key_bias=key_bias,
        q_index=q_index,
        kv_index=kv_index,
        q_lens=q_lens,
        kv_lens=kv_lens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
    )
