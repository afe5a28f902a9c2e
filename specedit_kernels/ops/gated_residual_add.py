# SPDX-License-Identifier: Apache-2.0
"""``gated_residual_add_``: a branch's result added to its residual stream, of all tokens or of the active ones."""

from . import _backends, _checks
from ._library import register
from ._modulation import check_modulation

_OP = "gated_residual_add_"


def _check(residual, x, gate, *, modulation_index=None, index=None):
    _checks.check_dtype(_OP, "residual", residual, _checks.FLOATS)
    _checks.check_shape(_OP, "residual", residual, (None,) * 3, "[B, N, C]")
    batch, _, channels = residual.shape
    if index is None:
        _checks.check_shape(_OP, "x", x, residual.shape, f"{_checks.shape_of(residual)}, since index is None")
    else:
        _checks.check_shape(_OP, "x", x, (batch, None, channels), f"[{batch}, n, {channels}]")
    if x.dtype != residual.dtype:
        _checks.type_error(_OP, "x", f"residual's dtype {residual.dtype}", x.dtype)
    _checks.check_device(_OP, "x", x, residual.device)
    for name, tensor in (("residual", residual), ("x", x)):
        _checks.check_last_contiguous(_OP, name, tensor)
    check_modulation(_OP, residual, {"gate": gate}, modulation_index)
    if index is not None:
        _checks.check_dtype(_OP, "index", index, _checks.INT32)
        if index.dim() != 2 or index.shape[0] != batch or index.shape[1] < x.shape[1]:
            _checks.value_error(_OP, "index", f"shape [B={batch}, >= {x.shape[1]}]", _checks.shape_of(index))
        _checks.check_device(_OP, "index", index, residual.device)


def _implementation(residual, x, gate, *, modulation_index=None, index=None):
    _check(residual, x, gate, modulation_index=modulation_index, index=index)
    if index is not None:
        index = index[:, : x.shape[1]]
    if residual.device.type == "cpu" or _checks.debugging():
        if modulation_index is not None:
            _checks.check_index_range(_OP, "modulation_index", modulation_index, gate.shape[1])
        if index is not None:
            _checks.check_index_range(_OP, "index", index, residual.shape[1])
    if index is not None and _checks.debugging():
        _checks.check_no_duplicates(_OP, "index", index)
    _backends.implementation(_OP, residual.device)(residual, x, gate, modulation_index, index)


_op = register(
    "gated_residual_add_(Tensor(a!) residual, Tensor x, Tensor gate, *, Tensor? modulation_index=None, "
    "Tensor? index=None) -> ()",
    _implementation,
    _check,
)
_backends.add(_OP, "gated_residual_add")


def gated_residual_add_(residual, x, gate, *, modulation_index=None, index=None):
    """residual[b, r] += gate[b, m] * x[b, i] in place, r = index[b, i]; a -1 is skipped, other rows keep their bits.

    m is the modulation row of token r: the only one, or modulation_index[b, r]. Like ``adaln_modulate``'s it follows
    the rows of the whole sequence, not the slots of x.

    Args:
        residual: [B, N, C], bf16, fp16 or fp32, last dimension contiguous. Written; it may not overlap x.
        x: [B, n, C], residual's dtype (n = N without ``index``).
        gate: one row a sample [B, C], or M rows [B, M, C] with ``modulation_index``; any float dtype, any strides
            with the last dimension contiguous.
        modulation_index: int32 [B, N], each token's row of ``gate``, values from -1 to M - 1; -1: gate 0.
        index: int32 [B, >= n], values from -1 to N - 1, no destination twice (SPECEDIT_DEBUG=1 checks this, and the
            ranges of both indices, which are checked on CPU always). None: row i.

    All arithmetic is fp32, with one rounding at the end; a sum beyond fp16's range is infinite, as in PyTorch.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ``residual`` is then untouched.

    Source: DiT, arXiv 2212.09748, section 3.2 (adaLN-Zero's gate).
    """
    _op(residual, x, gate, modulation_index=modulation_index, index=index)
