# SPDX-License-Identifier: Apache-2.0
"""``select_tokens``: from scores to the tokens that are recomputed, without a host synchronisation."""

import math

import torch

from . import _backends, _checks
from ._library import define_csrc, register
from .token_discrepancy import _grid

_OP = "select_tokens"


def _check(score, grid, threshold, dilation, uniform_stride):
    rows, columns = _grid(_OP, grid)
    _checks.check_dtype(_OP, "score", score, _checks.FLOATS)
    _checks.check_shape(_OP, "score", score, (None, rows * columns), f"[B, {rows} * {columns}]")
    _checks.check_last_contiguous(_OP, "score", score)
    if math.isnan(threshold):
        _checks.value_error(_OP, "threshold", "a number", threshold)
    for name, value in (("dilation", dilation), ("uniform_stride", uniform_stride)):
        if value < 0:
            _checks.value_error(_OP, name, "an integer >= 0", value)
    return rows, columns


def _implementation(score, grid, threshold, dilation=0, uniform_stride=0):
    rows, columns = _check(score, grid, threshold, dilation, uniform_stride)
    # A square that covers the grid from any cell, a stride past its end: more changes nothing, and kernels may loop
    # over the radius and count in 32 bits.
    most = max(rows, columns)
    threshold = float(threshold)
    if abs(threshold) > _checks.FP32_MAX:
        threshold = math.copysign(math.inf, threshold)
    select = _backends.implementation(_OP, score.device)
    return select(score, rows, columns, threshold, min(dilation, most), min(uniform_stride, most))


def _outputs(score):
    return (
        torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format),
        torch.empty_like(score, dtype=torch.int32, memory_format=torch.contiguous_format),
        score.new_empty((score.shape[0],), dtype=torch.int32),
    )


def _fake(score, grid, threshold, dilation=0, uniform_stride=0):
    _check(score, grid, threshold, dilation, uniform_stride)
    return _outputs(score)


def _csrc_fake(score, grid_h, grid_w, threshold, dilation, uniform_stride):
    return _outputs(score)


_op = register(
    "select_tokens(Tensor score, SymInt[] grid, float threshold, SymInt dilation=0, SymInt uniform_stride=0)"
    " -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
_backends.add(
    _OP,
    "select_tokens",
    define_csrc(
        "select_tokens_csrc(Tensor score, int grid_h, int grid_w, float threshold, int dilation, int uniform_stride)"
        " -> (Tensor, Tensor, Tensor)",
        _csrc_fake,
    ),
)


def select_tokens(score, grid, threshold, dilation=0, uniform_stride=0):
    """The tokens to recompute (SpecEdit, arXiv 2605.02152, eqs. 7, 9, 10).

    Selected: score > threshold, or NaN (an unknown token is recomputed, never dropped); then grown by a square of
    radius ``dilation`` within the grid; then, where ``uniform_stride`` = k > 0, every token with row % k == 0 and
    column % k == 0.

    Args:
        score: [B, N], N = grid[0] * grid[1], as `token_discrepancy` gives it; compared in fp32.
        grid: (rows, columns).
        threshold: on score's scale; may be infinite.
        dilation: tokens, >= 0.
        uniform_stride: tokens, 0 = none.

    Returns:
        mask: bool [B, N].
        index: int32 [B, N], a permutation: the selected tokens in raster order, then the others in raster order.
        count: int32 [B], how many are selected; on the device.

    Raises:
        ValueError: a shape that is not the grid's, a NaN threshold, a negative radius or stride.
        TypeError: another dtype.
    """
    return _op(score, grid, threshold, dilation, uniform_stride)
