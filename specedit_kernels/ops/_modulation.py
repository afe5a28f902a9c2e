# SPDX-License-Identifier: Apache-2.0
"""The check that the adaLN ops share: modulation rows, one a sample or several with an index of each token."""

from . import _checks


def check_modulation(op, tokens, vectors, index):
    """``tokens``: [B, N, C]. ``vectors``: {name: [B, C], or [B, M, C] with ``index`` int32 [B, N] (then not None)}."""
    batch, rows, channels = tokens.shape
    shape = None
    for name, vector in vectors.items():
        _checks.check_dtype(op, name, vector, _checks.FLOATS)
        if index is None:
            _checks.check_shape(
                op, name, vector, (batch, channels), f"[{batch}, {channels}], since modulation_index is None"
            )
        else:
            _checks.check_shape(
                op, name, vector, (batch, None, channels), f"[{batch}, M, {channels}], since modulation_index is given"
            )
            if vector.shape[1] == 0:
                _checks.value_error(op, name, "at least one modulation row", _checks.shape_of(vector))
        if shape is not None and vector.shape != shape:
            _checks.value_error(op, name, f"shape {list(shape)}", _checks.shape_of(vector))
        shape = vector.shape
        _checks.check_last_contiguous(op, name, vector)
        _checks.check_device(op, name, vector, tokens.device)
    if index is not None:
        _checks.check_dtype(op, "modulation_index", index, _checks.INT32)
        _checks.check_shape(op, "modulation_index", index, (batch, rows), f"[{batch}, {rows}]")
        _checks.check_device(op, "modulation_index", index, tokens.device)
