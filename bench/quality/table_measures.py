# SPDX-License-Identifier: Apache-2.0
"""Measures of n edits and of the masks they were made with: token grids [n, rows, columns], pictures in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from scenes import TOKEN

BLOCK = 2  # tokens a side that are selected together
CHANGED_FLOOR = 0.08  # of [0, 1]: a pixel of an output has changed if a channel differs by more
CHANGED_SHARE = 0.04  # of a token's pixels that must have, for the token to have changed


def changed_tokens(before, after):
    """Pictures [n, 3, H, W] -> bool [n, H/16, W/16]: tokens that differ visibly.

    `before` is to be the source as the VAE gives it back, so that the VAE's own errors do not count.
    """
    pixels = (before.float() - after.float()).abs().amax(1, keepdim=True) > CHANGED_FLOOR
    return F.avg_pool2d(pixels.float(), TOKEN)[:, 0] > CHANGED_SHARE


def grow(tokens, radius):
    """bool [n, rows, columns], grown by a square of `radius` tokens."""
    return F.max_pool2d(tokens[:, None].float(), 2 * radius + 1, 1, radius)[:, 0] > 0


def to_pixels(tokens):
    """bool [n, rows, columns] -> [n, 16 rows, 16 columns]."""
    return tokens.repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2)


def masked_psnr(a, b, mask):
    """[n] dB over the pixels of mask [n, H, W]; nan where there is none. Pictures [n, 3, H, W] in [0, 1]."""
    error = ((a - b).square().mean(1) * mask).sum((1, 2)) / mask.sum((1, 2))
    return -10 * error.clamp(min=1e-10).log10()


def sharpness(images, mask):
    """[n]: mean squared gradient of the luma over mask [n, H, W]: the gradient energy."""
    luma = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    energy = torch.zeros_like(luma)
    energy[:, :, :-1] += luma.diff(dim=2).square()
    energy[:, :-1] += luma.diff(dim=1).square()
    return (energy * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def recall_precision(selected, reference):
    """bool [n, rows, columns] each -> ([n], [n]); nan where nothing is to be found, or nothing was selected."""
    hits = (selected & reference).flatten(1).sum(1).float()
    return hits / reference.flatten(1).sum(1), hits / selected.flatten(1).sum(1)


def area_under_curve(scores, reference):
    """Area under the ROC curve of each edit's scores, [n]: the chance that a token of the reference scores higher than
    one outside it, ties counting half. nan where all tokens are on one side, or a score is nan."""
    out = []
    for values, inside in zip(scores.flatten(1).double(), reference.flatten(1)):
        wanted, others = values[inside], values[~inside].sort().values
        if len(wanted) == 0 or len(others) == 0 or values.isnan().any():
            out.append(math.nan)
            continue
        below = torch.searchsorted(others, wanted) + torch.searchsorted(others, wanted, right=True)
        out.append((below.double().mean() / 2 / len(others)).item())
    return torch.tensor(out)


def effective_scores(scores, dilation):
    """fp32 [n, rows, columns] -> the same shape: a token is selected at threshold t, after growing by `dilation` and
    rounding up to whole blocks, exactly where its effective score is over t. A nan is always selected."""
    scores = scores.float().nan_to_num(nan=math.inf)[:, None]
    grown = F.max_pool2d(scores, 2 * dilation + 1, 1, dilation)
    return F.interpolate(F.max_pool2d(grown, BLOCK), scale_factor=BLOCK, mode="nearest")[:, 0]


def levels(images):
    """Pictures in [0, 1] -> their 8-bit levels, int16."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.int16)


def largest_difference(a, b, where):
    """Largest difference of 8-bit levels over the pixels of `where` bool [n, H, W]: [n], nan where there is none."""
    difference = (levels(a) - levels(b)).abs().amax(1).float()
    largest = difference.masked_fill(~where, 0.0).flatten(1).amax(1)
    return largest.masked_fill(~where.flatten(1).any(1), math.nan)


def _finite(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return values[values.isfinite()]


def mean(values):
    """Mean of the finite ones; nan if there are none."""
    values = _finite(values)
    return values.mean().item() if len(values) else math.nan


def median(values):
    """Median of the finite ones; nan if there are none."""
    values = _finite(values)
    return values.quantile(0.5).item() if len(values) else math.nan


def largest(values):
    """The largest finite one; nan if there are none."""
    values = _finite(values)
    return values.max().item() if len(values) else math.nan
