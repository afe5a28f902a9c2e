# SPDX-License-Identifier: Apache-2.0
"""Row gather: y[b, i] = x[b, index[b, i]], zeros where the index is empty."""

import torch

from .._words import as_words
from ._rows import copy_rows


def gather_tokens(x, index, length):
    """x: [B, N, ...] of any dtype and strides, index: int32 [B, >= length]. Returns [B, length, ...], contiguous."""
    y = torch.empty((x.shape[0], length, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        as_words(y).zero_()
        return y
    copy_rows(x, y, index, scatter=False)
    return y
