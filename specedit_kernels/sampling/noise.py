# SPDX-License-Identifier: Apache-2.0
"""Noise algebra of a resolution change for rectified flow, x = (1 - s) z + s n with white unit noise n.

All functions work on latent images [B, C, H, W] and on one sigma a call. A coarse latent pixel stands for a 2x2
block of fine ones: its clean value is their mean. The block transform is the orthonormal 4x4 Hadamard matrix H/2 acting
on the four *latent pixels* of a block. On packed tokens this is not the same as repeating a token four times, which
would tile a patch; working on latent pixels keeps the noise exactly white per latent pixel.

Where a coarse state at sigma s is expanded, the four children get the sigma s' = 2 s / (1 + s) (SpecEdit, arXiv
2605.02152, eq. 8, with the coefficients that keep mean and covariance exact: signal 1 - s', covariance s'^2 I).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def expanded_sigma(sigma: float) -> float:
    """Sigma of the children of a coarse state at `sigma` in [0, 1]: 2 s / (1 + s)."""
    return 2.0 * sigma / (1.0 + sigma)


def pooled_sigma(sigma: float) -> float:
    """Sigma of the coarse state got by pooling a fine one at `sigma`: s / (2 - s), the inverse of the above."""
    return sigma / (2.0 - sigma)


def noised(clean: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """A clean picture at a sigma in [0, 1], (1 - s) z + s n: fp32, the shape of `clean` and `noise`."""
    return (1.0 - sigma) * clean.float() + sigma * noise.float()


def _blocks(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]


def hadamard_split(fine: Tensor) -> tuple[Tensor, Tensor]:
    """Fine [B, C, 2H, 2W] -> (parent [B, C, H, W], details [3, B, C, H, W]) = H/2 applied to each 2x2 block."""
    a, b, c, d = _blocks(fine)
    details = torch.stack([a - b + c - d, a + b - c - d, a - b - c + d])
    return (a + b + c + d) / 2, details / 2


def hadamard_merge(parent: Tensor, details: Tensor) -> Tensor:
    """Inverse of `hadamard_split` (H/2 is symmetric and orthonormal): -> [B, C, 2H, 2W]."""
    u, v, w = details
    out = parent.new_empty((*parent.shape[:-2], parent.shape[-2] * 2, parent.shape[-1] * 2))
    out[..., 0::2, 0::2] = (parent + u + v + w) / 2
    out[..., 0::2, 1::2] = (parent - u + v - w) / 2
    out[..., 1::2, 0::2] = (parent + u - v - w) / 2
    out[..., 1::2, 1::2] = (parent - u - v + w) / 2
    return out


def pool_noise(noise: Tensor) -> Tensor:
    """White fine noise [B, C, 2H, 2W] -> white coarse noise [B, C, H, W] of the same composition: twice the mean."""
    return 2.0 * F.avg_pool2d(noise, 2)


def expand_state(coarse: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Bring a coarse state to the fine grid with white noise: the Hadamard expansion, scaled by 2 / (1 + s).

    coarse: [B, C, H, W] at `sigma` s. noise: white fine noise [B, C, 2H, 2W]; only its three details per block are
    used, so the noise whose `pool_noise` the coarse trajectory began with may be given again (its details are still
    unused). Returns [B, C, 2H, 2W] at `expanded_sigma(s)`: mean (1 - s') z upsampled, covariance s'^2 I.
    """
    _, details = hadamard_split(noise)
    return hadamard_merge(coarse, sigma * details) * (2.0 / (1.0 + sigma))


def pool_state(fine: Tensor, sigma: float) -> Tensor:
    """Bring a fine state [B, C, 2H, 2W] at `sigma` to the coarse grid: [B, C, H, W] at `pooled_sigma(sigma)`."""
    # the block mean halves the noise; 2 / (2 - s) restores signal + noise to a rectified-flow pair
    return F.avg_pool2d(fine, 2) * (2.0 / (2.0 - sigma))


def top_up(state: Tensor, sigma: float, to_sigma: float, noise: Tensor) -> Tensor:
    """Raise a state's noise from `sigma` to `to_sigma` >= sigma with fresh white `noise` of the same shape.

    x' = b x + sqrt(t^2 - (b s)^2) n with b = (1 - t) / (1 - s): mean (1 - t) z, covariance t^2 I.
    """
    if not 0.0 <= sigma <= to_sigma <= 1.0:
        raise ValueError(f"to_sigma: expected sigma <= to_sigma <= 1, got sigma {sigma}, to_sigma {to_sigma}")
    if to_sigma == sigma:
        return state
    keep = (1.0 - to_sigma) / (1.0 - sigma)
    return keep * state + math.sqrt(to_sigma**2 - (keep * sigma) ** 2) * noise
