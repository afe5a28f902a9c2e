# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's VAE as the stages' codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from specedit_kernels.sampling.grid import PATCH


def _same(latents: Tensor) -> Tensor:
    return latents


class HostCodec:
    """A VAE of the graph. Latents are clean ones, fp32 [B, C, H, W], as the transformer sees them.

    process_in, process_out: from the VAE's own latents to those and back; left out, they are the VAE's own.
    token: pixels a side of one fine token. used: whether the VAE was called since the transformer was loaded, and may
    have pushed it out of the device's memory.
    """

    patch = PATCH

    def __init__(
        self, vae: Any, device: torch.device, process_in: Callable[[Tensor], Tensor] = _same,
        process_out: Callable[[Tensor], Tensor] = _same,
    ):  # fmt: skip
        self.vae = vae
        self.device = device
        self.process_in = process_in
        self.process_out = process_out
        self.token = PATCH * vae.spacial_compression_encode()
        self.used = False

    @property
    def _frames(self) -> bool:
        return self.vae.latent_dim == 3

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> latents."""
        self.used = True
        pictures = (pixels / 2 + 0.5).movedim(1, -1)
        # a video VAE takes the pictures of a batch for frames
        found = [self.vae.encode(picture[None]) for picture in pictures]
        latents = self.process_in(torch.cat(found).to(self.device, torch.float32))
        return latents[:, :, 0] if self._frames else latents

    def _own(self, latents: Tensor) -> Tensor:
        return self.process_out(latents.float()[:, :, None] if self._frames else latents.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], [B, 3, h, w]."""
        self.used = True
        found = [self.vae.decode(own[None]) for own in self._own(latents)]
        pictures = torch.cat([picture[:, 0] if picture.ndim == 5 else picture for picture in found])
        return pictures.to(self.device, torch.float32).movedim(-1, 1) * 2 - 1

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's first layers: conv_in, middle and first up block.

        ValueError for a VAE whose decoder is not laid out like FLUX's or Qwen-Image's.
        """
        vae, model = self.vae, self.vae.first_stage_model
        layers = _first_layers(getattr(model, "decoder", None))
        if layers is None:
            raise ValueError(
                f"vae: expected FLUX's or Qwen-Image's for metric 'decoder', got {type(model).__name__}; take metric"
                " 'latent'"
            )
        self.used = True
        x = self._own(latents)
        memory = vae.memory_used_decode(x.shape, vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
        x = x.to(vae.device, vae.vae_dtype)
        # a 1x1 convolution in front of the decoder, where the VAE has one
        for name in ("post_quant_conv", "conv2"):
            before = getattr(model, name, None)
            x = x if before is None else before(x)
        found = []
        for part in layers:
            for layer in part:
                x = layer(x)
            found.append((x[:, :, 0] if self._frames else x).to(self.device))
        return found


def _first_layers(decoder: Any) -> list[list[Callable[[Tensor], Tensor]]] | None:
    """The decoder's first three parts, each its layers in order; None where it is laid out otherwise."""
    if hasattr(decoder, "conv_in") and hasattr(decoder, "mid") and hasattr(decoder, "up"):
        mid, first = decoder.mid, decoder.up[-1]  # the last is the first to run
        if len(first.attn) == 0 and hasattr(first, "upsample"):
            return [[decoder.conv_in], [mid.block_1, mid.attn_1, mid.block_2], [*first.block, first.upsample]]
    if hasattr(decoder, "conv1") and hasattr(decoder, "middle") and hasattr(decoder, "upsamples"):
        # all blocks in one row: the first block ends with the first layer that resamples
        last = next((i for i, x in enumerate(decoder.upsamples) if hasattr(x, "resample")), None)
        if last is not None:
            return [[decoder.conv1], list(decoder.middle), list(decoder.upsamples[: last + 1])]
    return None
