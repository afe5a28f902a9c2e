# SPDX-License-Identifier: Apache-2.0
"""Row scatter in place: dst[b, index[b, i]] = src[b, i], nothing where the index is empty."""

from ._rows import copy_rows


def scatter_tokens_(dst, src, index):
    """dst: [B, N, ...], src: [B, M, ...] of one dtype and any strides, index: int32 [B, M]. Writes into dst."""
    if src.numel() and dst.numel():
        copy_rows(dst, src, index, scatter=True)
