# SPDX-License-Identifier: Apache-2.0
import torch


def gather_tokens(x, index, length):
    """y[b, i] = x[b, index[b, i]]; a -1 gives zeros."""
    y = x.new_zeros((x.shape[0], length, *x.shape[2:]))
    index = index[:, :length].long()
    batch, slot = torch.nonzero(index >= 0, as_tuple=True)
    y[batch, slot] = x[batch, index[batch, slot]]
    return y
