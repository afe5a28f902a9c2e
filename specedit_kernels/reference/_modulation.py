# SPDX-License-Identifier: Apache-2.0
import torch


def modulation_rows(vectors, index, tokens, dtype):
    """The vector of each token [B, n, C] at `dtype`, zeros for a -1: broadcast of [B, C], or rows of [B, M, C].

    ``index``: int32 [B, N] or None; ``tokens``: int64 [B, n], the token of each slot, or None for all in order.
    """
    vectors = vectors.to(dtype)
    if index is None:
        return vectors[:, None]
    index = index.long()
    if tokens is not None:
        index = index.gather(1, tokens)
    picked = vectors.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, vectors.shape[2]))
    return torch.where((index >= 0)[..., None], picked, 0)
