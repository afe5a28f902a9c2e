# SPDX-License-Identifier: Apache-2.0
"""Tiny autoencoders in two plain files of weights, as FLUX.2's (taef2): what `specedit mask` can compare pictures by.

The structure is read off the tensors: 3 x 3 convolutions, residual blocks of three, an optional branch of group norm
in a block. Pixels go in as [0, 1], a picture of 8 x 8 pixels a latent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.grid import PATCH

ENDINGS = (".safetensors", ".pth", ".pt")
GROUPS = 4  # of a block's group norm
RANGE = 3.0  # of latents, softly


class _Block(torch.nn.Module):
    """ReLU of the input and three convolutions; with `pooled`, the input has had a branch over the whole map added."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        conv = [torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        relu = torch.nn.ReLU()
        self.conv = torch.nn.Sequential(conv[0], relu, conv[1], relu, conv[2])
        self.pool = None
        if pooled:
            ends = torch.nn.Conv2d(width, pooled, 1, bias=False), torch.nn.Conv2d(pooled, width, 1, bias=False)
            self.pool = torch.nn.Sequential(ends[0], torch.nn.GroupNorm(GROUPS, pooled), relu, ends[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


def _layers(weights: Mapping[str, Tensor], encoder: bool) -> torch.nn.ModuleDict:
    """The numbered layers that have weights. ValueError for tensors of another structure."""
    made = torch.nn.ModuleDict()
    for name in dict.fromkeys(key.split(".")[0] for key in weights):
        kernel = weights.get(f"{name}.weight")
        if kernel is None:
            kernel, pool = weights.get(f"{name}.conv.0.weight"), weights.get(f"{name}.pool.0.weight")
            if kernel is None:
                raise ValueError(f"{name}: no layer of a tiny autoencoder")
            made[name] = _Block(kernel.shape[0], 0 if pool is None else pool.shape[0])
            continue
        # a convolution without a bias changes the resolution in an encoder; in a decoder it follows such a change
        bias = f"{name}.bias" in weights
        stride = 2 if encoder and not bias else 1
        made[name] = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, stride, padding=1, bias=bias)
    made.load_state_dict(dict(weights))
    return made


class TinyCodec:
    """A tiny autoencoder's latents and features, with the names of a model's codec.

    token: pixels a side of a token, 2 x 2 latents. THRESHOLDS: {metric: score over which a token is changed}.
    """

    THRESHOLDS = {"decoder": 0.14, "latent": 0.12}
    patch = PATCH

    def __init__(self, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]):
        self.encoder, self.decoder = _layers(encoder, True), _layers(decoder, False)
        halvings = sum(isinstance(x, torch.nn.Conv2d) and x.stride == (2, 2) for x in self.encoder.values())
        self.token = PATCH * 2**halvings

    @staticmethod
    def files(folder: Path) -> tuple[Path, Path] | None:
        """NAME_encoder.* and NAME_decoder.* of a folder, None where it has not one of each."""
        found = [
            [p for p in sorted(folder.iterdir()) if p.suffix in ENDINGS and re.search(rf"(^|_){part}$", p.stem)]
            for part in ("encoder", "decoder")
        ]
        return (found[0][0], found[1][0]) if all(len(paths) == 1 for paths in found) else None

    @staticmethod
    def load(paths: tuple[Path, Path], device: torch.device, dtype: torch.dtype) -> TinyCodec:
        """Of the two files. ValueError or RuntimeError where they hold something else."""
        parts = []
        for path in paths:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                held = load_file(path)
            else:
                held = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
                raise ValueError(f"{path.name}: expected tensors by name")
            if not all(torch.isfinite(x).all() for x in held.values()):
                raise ValueError(f"{path.name}: not finite")
            parts.append(held)
        made = TinyCodec(*parts)
        for part in (made.encoder, made.decoder):
            part.to(device, dtype).requires_grad_(False)
        return made

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> latents."""
        x = pixels / 2 + 0.5
        for layer in self.encoder.values():
            x = layer(x)
        return x

    def _decoded(self, latents: Tensor) -> list[Tensor]:
        """The first convolution's output, then the map after each resolution's blocks, then pixels in [0, 1]."""
        x = torch.tanh(latents / RANGE) * RANGE
        maps, layers = [], list(self.decoder.values())
        for i, layer in enumerate(layers):
            if isinstance(layer, torch.nn.Conv2d):
                if i:
                    maps.append(x)
                if layer.bias is None:
                    x = F.interpolate(x, scale_factor=2.0)
                x = layer(x)
                if i == 0:
                    x = F.relu(x)
                    maps.append(x)
            else:
                x = layer(x)
        return [*maps, x]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], [B, 3, h, w]."""
        return self._decoded(latents)[-1] * 2 - 1

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w]: the decoder's first convolution and the outputs of its first two resolutions."""
        return self._decoded(latents)[:3]
