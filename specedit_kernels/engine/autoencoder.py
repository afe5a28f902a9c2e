# SPDX-License-Identifier: Apache-2.0
"""AutoencoderKL as a codec, its decoder's features, and its calls with fused norms, biases and residuals."""

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
from .feature_maps import BiasedConv2d, UnbiasedConv2d, doubled, padded_behind, residual_sum, with_plain_bias
from .strips import Kind
from .wide_attention import WideAttnProcessor


class _GroupNorm(torch.nn.Module):
    """Stands for a group norm, for the SiLU after it and for the bias of the convolution before."""

    def __init__(self, norm: torch.nn.GroupNorm, silu: bool):
        super().__init__()
        self.norm = norm
        self.silu = silu

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        norm = self.norm
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=self.silu, x_bias=x_bias)


class _ResnetBlock(ResnetBlock2D):
    """ResnetBlock2D of `_GroupNorm`s and `UnbiasedConv2d`s: biases are added in the norm, and with the residual."""

    def forward(self, x: Tensor, temb: Tensor | None = None, *unused: Any, **options: Any) -> Tensor:
        y = self.conv1(self.norm1(x))
        if temb is not None:
            y = y + temb
        y = self.conv2(self.dropout(self.norm2(y, self.conv1.bias)))
        if self.conv_shortcut is None:
            y = residual_sum(y, self.conv2.bias, x)
        else:
            y = residual_sum(y, self.conv2.bias, self.conv_shortcut(x), self.conv_shortcut.bias)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor


class _Upsample(Upsample2D):
    """Upsample2D that doubles its map and convolves it."""

    def forward(self, x: Tensor, output_size: Any = None, *unused: Any, **options: Any) -> Tensor:
        if output_size is not None:
            return Upsample2D.forward(self, x, output_size)
        return self.conv(doubled(x))


class _Downsample(Downsample2D):
    """Downsample2D whose convolution pads its map behind alone."""

    def forward(self, x: Tensor, *unused: Any, **options: Any) -> Tensor:
        return self.conv(padded_behind(x))


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


def _residual_convs(block: Any) -> list[Any]:
    """The convolutions of a ResnetBlock2D of `_GroupNorm`s whose biases `_ResnetBlock` adds, [] where it does not stand
    for it."""
    convs = [conv for conv in (block.conv1, block.conv2, block.conv_shortcut) if conv is not None]
    plain = type(block) is ResnetBlock2D and block.upsample is None and block.downsample is None
    return convs if plain and all(type(conv) is BiasedConv2d for conv in convs) else []


def _plain_upsample(up: Any) -> bool:
    return up.norm is None and up.interpolate and not up.use_conv_transpose


def _plain_downsample(down: Any) -> bool:
    return down.norm is None and down.use_conv and down.padding == 0


def with_fused_norms(vae: torch.nn.Module) -> torch.nn.Module:
    """The same autoencoder, a tree of modules of its own over the same weights, where the op `group_norm` serves the
    group norms, with the SiLU of those that one follows and the bias before, `add_bias_` the other biases and the
    residuals, and `wide_attention` the attention."""
    twin = mirrored(vae)
    owner: Any
    for owner in twin.modules():
        if with_plain_bias(owner):
            owner.__class__ = BiasedConv2d
    for owner in list(twin.modules()):
        if type(owner) is Upsample2D and _plain_upsample(owner) and owner.use_conv and owner.name == "conv":
            if not foreign_forward(owner):
                owner.__class__ = _Upsample
        elif type(owner) is Downsample2D and _plain_downsample(owner) and not foreign_forward(owner):
            owner.__class__ = _Downsample
        if type(owner) is Attention and _plain_attention(owner):
            owner.processor = WideAttnProcessor()
        name, norms = _activated(owner)
        for child, module in list(owner.named_children()):
            if _served(module):
                setattr(owner, child, _GroupNorm(module, child in norms))
        if name:
            setattr(owner, name, torch.nn.Identity())
        if name == "nonlinearity" and (convs := _residual_convs(owner)):
            owner.__class__ = _ResnetBlock
            for conv in convs:
                conv.__class__ = UnbiasedConv2d
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
        _GroupNorm: Kind(
            lambda stands, of, x, x_bias=None: strips.norm_of_map(stands.norm, of, x, stands.silu, x_bias)
        ),
        torch.nn.Conv2d: Kind(strips.conv2d, strips.plain_conv),
        BiasedConv2d: Kind(strips.biased_conv2d),
        UnbiasedConv2d: Kind(strips.unbiased_conv2d),
        _ResnetBlock: Kind(),
        _Downsample: Kind(strips.downsample),
        _Upsample: Kind(),
        ResnetBlock2D: Kind(None, lambda block: block.upsample is None and block.downsample is None),
        Downsample2D: Kind(strips.downsample, _plain_downsample),
        Upsample2D: Kind(None, _plain_upsample),
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
