# SPDX-License-Identifier: Apache-2.0
"""Bits in the place of numbers: what copies rows of any dtype, among them those that PyTorch hardly computes with."""

import torch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(x):
    """``x`` with its elements reinterpreted as integers of their size (16-byte complex ones as two)."""
    if x.dtype == torch.complex128:
        x = torch.view_as_real(x)
    return x.view(_WORDS[x.element_size()])
