# SPDX-License-Identifier: Apache-2.0
import torch

from .._words import as_words
from ._precision import as_written


@as_written
def gather_tokens(x, index, length):
    """y[b, i] = x[b, index[b, i]]; a -1 gives zeros (all bits of them)."""
    y = torch.empty((x.shape[0], length, *x.shape[2:]), dtype=x.dtype, device=x.device)
    index = index[:, :length].long()
    batch, slot = torch.nonzero(index >= 0, as_tuple=True)
    words = as_words(y).zero_()
    words[batch, slot] = as_words(x)[batch, index[batch, slot]]
    return y
