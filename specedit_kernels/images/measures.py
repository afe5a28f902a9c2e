# SPDX-License-Identifier: Apache-2.0
"""How alike two pictures are within a region: PSNR, SSIM, levels. Pictures are tensors [3, H, W] in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# of SSIM as published (Wang et al. 2004): a Gaussian of 11 pixels, and two constants of the range 1
SIGMA, RADIUS, C1, C2 = 1.5, 5, 0.01**2, 0.03**2
LUMA = (0.299, 0.587, 0.114)
CHANGED_FLOOR = 0.08  # a pixel has changed visibly if a channel differs by more
CHANGED_SHARE = 0.04  # a token has if a larger share of its pixels has


def psnr(a: Tensor, b: Tensor, where: Tensor) -> float | None:
    """dB over the pixels of `where`, bool [H, W]: inf where they are equal, None where there is none."""
    if not where.any():
        return None
    error = (a.double() - b.double()).square().mean(0)[where].mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pixel, the mean over channels: fp32 [H, W]. Pictures go on beyond their edges as
    their own mirror images, edge pixels twice; the larger of 11 pixels and a side is not asked for."""
    at = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    weight = torch.exp(-at.square() / (2 * SIGMA**2))
    weight /= weight.sum()

    def blurred(x: Tensor) -> Tensor:
        for dim in (-2, -1):
            n = x.shape[dim]
            index = torch.arange(-RADIUS, n + RADIUS) % (2 * n)
            x = x.index_select(dim, torch.where(index < n, index, 2 * n - 1 - index))
            kernel = weight.view((1, 1, -1, 1) if dim == -2 else (1, 1, 1, -1)).expand(x.shape[0], 1, -1, -1)
            x = F.conv2d(x[None], kernel, groups=x.shape[0])[0]
        return x

    a, b = a.double().cpu(), b.double().cpu()
    mean_a, mean_b = blurred(a), blurred(b)
    of_a, of_b = blurred(a * a) - mean_a.square(), blurred(b * b) - mean_b.square()
    both = blurred(a * b) - mean_a * mean_b
    found = (2 * mean_a * mean_b + C1) * (2 * both + C2)
    found /= (mean_a.square() + mean_b.square() + C1) * (of_a + of_b + C2)
    return found.mean(0).float()


def ssim(a: Tensor, b: Tensor, where: Tensor) -> float | None:
    """The mean of `ssim_map` over the pixels of `where`, bool [H, W]; None where there is none."""
    return ssim_map(a, b)[where.cpu()].double().mean().item() if where.any() else None


def level_differences(a: Tensor, b: Tensor, where: Tensor) -> tuple[float, float] | None:
    """(mean, largest) difference of 8-bit levels over the pixels of `where`, bool [H, W]; None where there is none."""
    if not where.any():
        return None
    a, b = ((x.float().clamp(0, 1) * 255).round() for x in (a, b))
    difference = (a - b).abs()[:, where]
    return difference.mean().item(), difference.max().item()


def changed_tokens(a: Tensor, b: Tensor, token: int) -> Tensor:
    """bool [H / token, W / token]: tokens, `token` pixels a side, that differ visibly."""
    pixels = ((a.float() - b.float()).abs().amax(0) > CHANGED_FLOOR).float()
    return F.avg_pool2d(pixels[None], token)[0] > CHANGED_SHARE


def to_pixels(tokens: Tensor, token: int) -> Tensor:
    """bool [rows, columns] -> [token * rows, token * columns]."""
    return tokens.repeat_interleave(token, 0).repeat_interleave(token, 1)


def texture_ratio(source: np.ndarray, edited: np.ndarray, token: int) -> np.ndarray:
    """How strong a picture's finest detail is against its source's: fp32 [rows, columns], NaN where neither has any.

    source, edited: floats in [0, 1], [token rows, token columns, 3]. The amplitude of the luma less its mean over 3 x 3
    pixels (binomial weights), of each token's pixels; under a level of 8 bits it counts as none.
    """
    energies = []
    for picture in (source, edited):
        luma = picture.astype(np.float32) @ np.array(LUMA, np.float32)
        wide = np.pad(luma, 1, mode="edge")
        tall = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
        low = (tall[:, :-2] + 2 * tall[:, 1:-1] + tall[:, 2:]) / 4
        rows, columns = (side // token for side in luma.shape)
        energies.append(np.square(luma - low).reshape(rows, token, columns, token).mean(axis=(1, 3)))
    floor = (1 / 255) ** 2
    before, after = energies
    return np.where(np.maximum(before, after) > floor, np.sqrt((after + floor / 4) / (before + floor / 4)), np.nan)
