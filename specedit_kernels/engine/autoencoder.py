# SPDX-License-Identifier: Apache-2.0
"""AutoencoderKL as a codec, its decoder's features, and its calls with fused norms."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeGuard

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from .. import ops
from ..sampling.grid import PATCH
from . import strips
from ._diffusers import foreign_forward, mirrored, through
from .strips import Kind
from .wide_attention import WideAttnProcessor


class _GroupNorm(torch.nn.Module):
    """Stands for a group norm, and for the SiLU after it."""

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool):
        super().__init__()
        self.norm = norm
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=self.silu)


def _served(module: Any) -> TypeGuard[torch.nn.GroupNorm]:
    return type(module) is torch.nn.GroupNorm and module.affine and not foreign_forward(module)


def _activated(owner: Any) -> tuple[str, tuple[str, ...]]:
    """(name of a SiLU, names of the group norms that it follows at once) in a module of diffusers, or ("", ())."""
    name: str = ""
    norms: tuple[str, ...] = ()
    if any(not foreign_forward(owner, kind) for kind in (Encoder, Decoder)):
        name, norms = "conv_act", ("conv_norm_out",)
    elif not foreign_forward(owner, ResnetBlock2D):
        # with a time embedding the activation is that one's too, or a shift comes between
        if owner.time_emb_proj is None and owner.time_embedding_norm != "scale_shift":
            name, norms = "nonlinearity", ("norm1", "norm2")
    if norms and type(getattr(owner, name)) is torch.nn.SiLU and all(_served(getattr(owner, n)) for n in norms):
        return name, norms
    return "", ()


def with_fused_norms(vae: torch.nn.Module) -> torch.nn.Module:
    """The same autoencoder, a tree of modules of its own over the same weights, where the op `group_norm` serves the
    group norms, with the SiLU of those that one follows, and `wide_attention` the attention."""
    twin = mirrored(vae)
    owner: Any
    for owner in list(twin.modules()):
        if type(owner) is Attention and _plain_attention(owner):
            owner.processor = WideAttnProcessor()
        name, norms = _activated(owner)
        for child, module in list(owner.named_children()):
            if _served(module):
                setattr(owner, child, _GroupNorm(module, child in norms))
        if name:
            setattr(owner, name, torch.nn.Identity())
    return twin


def in_channels_last(x: Tensor) -> Tensor:
    """A picture [B, C, H, W] as convolutions on CUDA work on it, channels last: they would else turn every map to and
    fro."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


def decoder_features(decoder: Any, x: Tensor) -> list[Tensor]:
    """Outputs of the decoder's conv_in, mid_block and first up block."""

    def run(x: Tensor) -> list[Tensor]:
        features = []
        for layer in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
            x = layer(x)
            features.append(x)
        return features

    return through(decoder, run, x)


def _plain_attention(attn: Attention) -> bool:
    more = (attn.spatial_norm, attn.norm_q, attn.norm_k)
    return (
        type(attn.processor) is AttnProcessor2_0
        and attn.group_norm is not None
        and all(x is None for x in more)
        and attn.residual_connection
    )


# What strips of rows make of the modules of AutoencoderKL; strips.Kind.
STRIPS: Mapping[type, Kind] = MappingProxyType(
    dict.fromkeys(
        (Encoder, Decoder, DownEncoderBlock2D, UpDecoderBlock2D, UNetMidBlock2D, torch.nn.ModuleList, torch.nn.Linear,
         torch.nn.SiLU, torch.nn.Identity, torch.nn.Dropout),
        Kind(),
    )
    | {
        torch.nn.GroupNorm: Kind(strips.norm_of_map, lambda norm: norm.affine),
        _GroupNorm: Kind(lambda stands, of, x: strips.norm_of_map(stands.norm, of, x, stands.silu)),
        torch.nn.Conv2d: Kind(strips.conv2d, strips.plain_conv),
        ResnetBlock2D: Kind(None, lambda block: block.upsample is None and block.downsample is None),
        Downsample2D: Kind(
            strips.downsample, lambda down: down.norm is None and down.use_conv and down.padding == 0
        ),
        Upsample2D: Kind(
            None, lambda up: up.norm is None and up.interpolate and not up.use_conv_transpose
        ),
        Attention: Kind(strips.attention, _plain_attention),
    }
)  # fmt: skip


class KLCodec:
    """AutoencoderKL, as FLUX has it: latents have one scale and one shift.

    Latents are clean, scaled ones, [B, C, H, W]. token: pixels a side of one fine token; patch: latent pixels.
    """

    patch = PATCH
    STRIPS: ClassVar[Mapping[type, Kind]] = STRIPS

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.token = PATCH * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> latents, the mode of the posterior."""
        latents = through(self.vae, lambda x: self.vae.encode(x).latent_dist.mode(), pixels)
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], [B, 3, h, w]."""
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return through(self.vae, lambda x: self.vae.decode(x, return_dict=False)[0], latents.to(self.vae.dtype))

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's conv_in, mid_block and first up block."""
        x = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)

        def run(x: Tensor) -> list[Tensor]:
            if self.vae.post_quant_conv is not None:
                x = self.vae.post_quant_conv(x)
            return decoder_features(self.vae.decoder, x)

        return through(self.vae, run, x)

    def fused(self) -> KLCodec:
        """The same codec with the autoencoder's norms by an op, `with_fused_norms`."""
        return KLCodec(with_fused_norms(self.vae))
