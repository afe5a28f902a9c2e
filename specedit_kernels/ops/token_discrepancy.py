# SPDX-License-Identifier: Apache-2.0
"""``token_discrepancy``: how far a draft is from its source, per token."""

import torch

from . import _backends, _checks
from ._library import define_csrc, register

_OP = "token_discrepancy"


def _grid(op, grid):
    if len(grid) != 2:
        _checks.value_error(op, "grid", "(rows, columns)", tuple(grid))
    rows, columns = grid
    if rows < 1 or columns < 1:
        _checks.value_error(op, "grid", "positive rows and columns", (rows, columns))
    return rows, columns


def _check(draft, source, grid):
    rows, columns = _grid(_OP, grid)
    for name, tensor in (("draft", draft), ("source", source)):
        _checks.check_dtype(_OP, name, tensor, _checks.FLOATS)
    if draft.dim() not in (3, 4):
        _checks.value_error(_OP, "draft", "[B, C, H, W] or [B, N, C]", _checks.shape_of(draft))
    if source.shape != draft.shape:
        _checks.value_error(_OP, "source", f"draft's shape {_checks.shape_of(draft)}", _checks.shape_of(source))
    if source.dtype != draft.dtype:
        _checks.type_error(_OP, "source", f"draft's dtype {draft.dtype}", source.dtype)
    _checks.check_device(_OP, "source", source, draft.device)
    if draft.dim() == 3 and draft.shape[1] != rows * columns:
        _checks.value_error(_OP, "draft", f"[B, N, C] with N = {rows} * {columns}", _checks.shape_of(draft))
    if draft.dim() == 4 and (draft.shape[2] % rows or draft.shape[3] % columns or 0 in draft.shape[2:]):
        _checks.value_error(
            _OP, "draft", f"[B, C, H, W] with H, W multiples of grid {(rows, columns)}", _checks.shape_of(draft)
        )
    channels = draft.shape[1] if draft.dim() == 4 else draft.shape[2]
    if channels < 1:
        _checks.value_error(_OP, "draft", "at least one channel", _checks.shape_of(draft))
    for name, tensor in (("draft", draft), ("source", source)):
        channel = 1 if tensor.dim() == 4 else 2
        if tensor.stride(-1) != 1 and tensor.stride(channel) != 1 and tensor.shape[-1] > 1 and channels > 1:
            _checks.value_error(
                _OP, name, "a contiguous last (or channel) dimension", f"strides {list(tensor.stride())}"
            )
    return rows, columns


def _implementation(draft, source, grid):
    rows, columns = _check(draft, source, grid)
    return _backends.implementation(_OP, draft.device)(draft, source, rows, columns)


def _fake(draft, source, grid):
    rows, columns = _check(draft, source, grid)
    return draft.new_empty((draft.shape[0], rows * columns), dtype=torch.float32)


def _csrc_fake(draft, source, grid_h, grid_w):
    return draft.new_empty((draft.shape[0], grid_h * grid_w), dtype=torch.float32)


_op = register("token_discrepancy(Tensor draft, Tensor source, SymInt[] grid) -> Tensor", _implementation, _fake)
_backends.add(
    _OP,
    "token_discrepancy",
    define_csrc("token_discrepancy_csrc(Tensor draft, Tensor source, int grid_h, int grid_w) -> Tensor", _csrc_fake),
)


def token_discrepancy(draft, source, grid):
    """Per-token discrepancy of two feature maps (SpecEdit, arXiv 2605.02152, eq. 6, one layer).

    Args:
        draft: [B, C, H, W] (contiguous or channels_last; H, W multiples of the grid) or [B, N, C] with
            N = grid[0] * grid[1]; bf16, fp16 or fp32.
        source: like ``draft`` in shape, dtype and device.
        grid: (rows, columns) of tokens.

    Returns:
        fp32 [B, N]: the mean over each cell's pixels of ||d^ - s^||^2 with x^ = x / max(||x||, 1e-6) over the
        channels, which is 2 * (1 - cos), in [0, 4]. Two zero vectors score 0, one zero vector 1; NaN gives NaN.
        The sum over several layers is the caller's. Squares are summed in fp32, which bounds |x| to about 1e19.

    Raises:
        ValueError: shapes that do not fit each other or the grid, another device, an input that requires grad.
        TypeError: another dtype.
    """
    return _op(draft, source, grid)
