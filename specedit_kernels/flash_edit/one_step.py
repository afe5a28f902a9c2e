# SPDX-License-Identifier: Apache-2.0
"""One-step generation and its inversion on a rectified-flow edit model, x = (1 - s) z + s e, velocity e - z.

Differentiable: training uses the same functions as the pipelines. Latents are clean, scaled ones, [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.model import EditModel, Pictures, Text
from ..sampling.grid import PATCH, Grid, pack, unpack


def grid_of(latents: Tensor) -> Grid:
    """The token grid of latents [B, C, 2*rows, 2*columns]."""
    return latents.shape[-2] // PATCH, latents.shape[-1] // PATCH


def velocity_of(
    model: EditModel, text: Text, state: Tensor, sigma: Tensor, references: Sequence[Tensor], pictures: Pictures
) -> Tensor:
    """Velocity [B, C, H, W] of a state, after it the clean references. sigma: fp32 in [0, 1], 0-dim or each sample's
    [B] (the latter through an adapter that calls the transformer's own forward)."""
    grids = [grid_of(x) for x in (state, *references)]
    tokens = torch.cat([pack(x) for x in (state, *references)], dim=1)
    [conditioning] = model.conditionings([text], sigma[None] * 1000)
    found = model.velocity(text, tokens, conditioning, model.dense_layout(text, pictures, grids))
    return unpack(found[:, : grids[0][0] * grids[0][1]], grids[0])


def predict_clean(model: EditModel, text: Text, noise: Tensor, references: Sequence[Tensor]) -> Tensor:
    """The generator: the clean picture of white noise in one step from sigma 1, z = e - v(e, 1)."""
    pictures = Pictures(grid_of(noise), tuple(grid_of(x) for x in references))
    return noise - velocity_of(model, text, noise, noise.new_ones((), dtype=torch.float32), references, pictures)


def predict_noise(model: EditModel, text: Text, clean: Tensor) -> Tensor:
    """The inversion network: what a clean picture tells of its noise, in one step at sigma 0, e = z + v(z, 0).

    It sees the picture itself as the target, so it needs no condition tokens.
    """
    pictures = Pictures(grid_of(clean), (grid_of(clean),))
    return clean + velocity_of(model, text, clean, clean.new_zeros((), dtype=torch.float32), (), pictures)


def complete_noise(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """Noise of unit variance: what the picture tells of it, and white `noise` for what it cannot tell.

    predicted_noise + sqrt(1 - mean(predicted_noise^2)) noise, for each sample. A network trained by the squared error
    gives the mean of the noise given the picture. Where an edit model sees its source, that is little, and would be no
    noise by itself.
    """
    left = (1 - predicted_noise.float().square().mean(dim=(1, 2, 3), keepdim=True)).clamp(min=1e-6).sqrt()
    return (predicted_noise.float() + left * noise.float()).to(predicted_noise.dtype)
