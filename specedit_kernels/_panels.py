# SPDX-License-Identifier: Apache-2.0
"""Values as attention in e4m3 keeps them: in panels of keys, in which each channel has its keys side by side."""

import torch.nn.functional as F

from ._words import as_words

PANEL = 64  # keys


def panels_of(rows):
    """How many panels hold so many keys."""
    return -(-rows // PANEL)


def in_panels(v):
    """v [B, S, H, D] as [B, panels, H, D, PANEL]; what is beyond S is 0."""
    rows = v.shape[1]
    words = F.pad(as_words(v), (0, 0, 0, 0, 0, panels_of(rows) * PANEL - rows))
    return words.unflatten(1, (-1, PANEL)).permute(0, 1, 3, 4, 2).contiguous().view(v.dtype)


def of_panels(v, rows):
    """[B, rows, H, D] of [B, panels, H, D, PANEL]: a copy."""
    return as_words(v).permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :rows].view(v.dtype)
