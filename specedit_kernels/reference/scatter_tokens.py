# SPDX-License-Identifier: Apache-2.0
import torch

from .._words import as_words
from ._precision import as_written


@as_written
def scatter_tokens_(dst, src, index):
    """dst[b, index[b, i]] = src[b, i] in place; a -1 is skipped."""
    batch, slot = torch.nonzero(index >= 0, as_tuple=True)
    as_words(dst)[batch, index[batch, slot].long()] = as_words(src)[batch, slot]
