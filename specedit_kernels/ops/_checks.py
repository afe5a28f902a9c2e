# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Every message names the op, the argument, what was expected and what came."""

import os

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT32 = (torch.int32,)
FP32 = (torch.float32,)
FP32_MAX = torch.finfo(torch.float32).max


def debugging():
    """Whether SPECEDIT_DEBUG=1 asks for checks of index values, which synchronise the host."""
    return os.environ.get("SPECEDIT_DEBUG", "0") not in ("", "0")


def value_error(op, name, expected, got):
    raise ValueError(f"{op}: {name}: expected {expected}, got {got}")


def type_error(op, name, expected, got):
    raise TypeError(f"{op}: {name}: expected {expected}, got {got}")


def shape_of(tensor):
    return list(tensor.shape)


def check_dtype(op, name, tensor, dtypes):
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        type_error(op, name, f"dtype {names}", str(tensor.dtype).removeprefix("torch."))


def check_device(op, name, tensor, device):
    if tensor.device != device:
        value_error(op, name, f"a tensor on {device}", f"one on {tensor.device}")


def check_shape(op, name, tensor, shape, meaning):
    """``shape``: one entry a dimension; None leaves it free. ``meaning``: the shape in words, for the message."""
    same = tensor.dim() == len(shape)
    if same:
        for have, want in zip(tensor.shape, shape):
            if want is not None and have != want:
                same = False
    if not same:
        value_error(op, name, f"shape {meaning}", shape_of(tensor))


def check_last_contiguous(op, name, tensor):
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        value_error(op, name, "a contiguous last dimension", f"strides {list(tensor.stride())}")


def check_map(op, name, tensor):
    """A map [B, C, H, W] or [B, C, N], contiguous or with channels last."""
    check_dtype(op, name, tensor, FLOATS)
    if tensor.dim() not in (3, 4):
        value_error(op, name, "[B, C, H, W] or [B, C, N]", shape_of(tensor))
    if not (tensor.is_contiguous() or tensor.movedim(1, -1).is_contiguous()):
        value_error(op, name, "a contiguous tensor or one with channels last", f"strides {list(tensor.stride())}")


def check_vectors(op, channels, device, **vectors):
    """Vectors [C] of any float dtype, a value for each channel; None is left out."""
    for name, tensor in vectors.items():
        if tensor is not None:
            check_dtype(op, name, tensor, FLOATS)
            check_shape(op, name, tensor, (channels,), f"[{channels}]")
            check_last_contiguous(op, name, tensor)
            check_device(op, name, tensor, device)


def check_head_dim(op, name, dim):
    if dim % 16 or not 16 <= dim <= 256:
        value_error(op, name, "a head dimension that is a multiple of 16, 16 to 256", dim)


def check_scale(op, scale):
    """``scale``: of attention scores, None for the default."""
    if scale is not None and not abs(scale) <= FP32_MAX:
        value_error(op, "scale", "a finite number (in fp32)", scale)


def check_eps(op, eps):
    if not 0 <= eps <= FP32_MAX:
        value_error(op, "eps", "a finite number >= 0 (in fp32)", eps)


def check_index_range(op, name, index, rows):
    """Values of ``index`` are in [-1, rows). Reads the data: called on CPU, or when debugging."""
    if index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= rows:
            value_error(op, name, f"values from -1 to {rows - 1}", f"values from {low} to {high}")


def check_no_duplicates(op, name, index):
    """No row of ``index`` [B, M] names a destination twice. Reads the data: called when debugging."""
    for b, row in enumerate(index.cpu()):
        row = row[row >= 0]
        unique, counts = row.unique(return_counts=True)
        if unique.numel() != row.numel():
            twice = unique[counts > 1][:5].tolist()
            value_error(op, name, "each destination once", f"{twice} more than once in batch element {b}")
