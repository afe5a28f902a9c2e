# SPDX-License-Identifier: Apache-2.0
"""AutoencoderKL as a codec, its decoder's features, and its calls in few launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from .. import ops
from ..sampling.grid import PATCH


def bring_in(module: torch.nn.Module) -> None:
    """Offloading moves a model in when its forward is called; call this where only a part of it will be."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)


class _GroupNorm(torch.nn.Module):
    """Stands for a group norm, and for the SiLU behind it."""

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool):
        super().__init__()
        self.norm = norm
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=self.silu)


def _served(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.GroupNorm and module.affine


def _activated(owner: torch.nn.Module) -> tuple[str, tuple[str, ...]]:
    """(name of a SiLU, names of the group norms that it follows at once) in a module of diffusers, or ("", ())."""
    name, norms = "", ()
    if isinstance(owner, (Encoder, Decoder)):
        name, norms = "conv_act", ("conv_norm_out",)
    elif isinstance(owner, ResnetBlock2D):
        # with a time embedding the activation is that one's too, or a shift comes between
        if owner.time_emb_proj is None and owner.time_embedding_norm != "scale_shift":
            name, norms = "nonlinearity", ("norm1", "norm2")
    if norms and type(getattr(owner, name)) is torch.nn.SiLU and all(_served(getattr(owner, n)) for n in norms):
        return name, norms
    return "", ()


@contextlib.contextmanager
def fused_norms(vae: torch.nn.Module) -> Iterator[None]:
    """Within it the op `group_norm` serves the group norms of `vae`, with the SiLU of those that one follows."""
    swaps = []
    for owner in vae.modules():
        name, norms = _activated(owner)
        swaps += [(owner, n, m, _GroupNorm(m, n in norms)) for n, m in owner.named_children() if _served(m)]
        if name:
            swaps.append((owner, name, getattr(owner, name), torch.nn.Identity()))
    try:
        for owner, name, _, stand_in in swaps:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, module, _ in swaps:
            setattr(owner, name, module)


def in_few_launches(vae: torch.nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which calls an AutoencoderKL on a picture [B, C, H, W]: with `fused_norms`, and on CUDA with maps
    whose channels lie together, as convolutions there work on them; they would else turn every map to and fro."""
    with fused_norms(vae):
        return function(x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x)


def decoder_features(decoder: torch.nn.Module, x: Tensor) -> list[Tensor]:
    features = []
    for layer in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        x = layer(x)
        features.append(x)
    return features


class KLCodec:
    """AutoencoderKL, as FLUX has it: latents have one scale and one shift.

    Latents are clean, scaled ones, [B, C, H, W]. token: pixels a side of one fine token.
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.token = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> latents, the mode of the posterior."""
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], [B, 3, h, w]."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's conv_in, mid_block and first up block."""
        bring_in(self.vae)
        x = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        if self.vae.post_quant_conv is not None:
            x = self.vae.post_quant_conv(x)
        return decoder_features(self.vae.decoder, x)
