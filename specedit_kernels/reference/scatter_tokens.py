# SPDX-License-Identifier: Apache-2.0
import torch


def scatter_tokens_(dst, src, index):
    """dst[b, index[b, i]] = src[b, i] in place; a -1 is skipped."""
    batch, slot = torch.nonzero(index >= 0, as_tuple=True)
    dst[batch, index[batch, slot].long()] = src[batch, slot]
