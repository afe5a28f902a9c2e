# SPDX-License-Identifier: Apache-2.0
"""What differs between the autoencoders: scaling of latents, the axis of frames, the decoder's first layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
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


def one_frame(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The convolution's forward, which computes a lone frame in two dimensions: before it there are zeros alone, so of
    each kernel the last slice is all that counts, a third of the work."""
    if x.shape[2] != 1 or cache_x is not None:
        return type(conv).forward(conv, x, cache_x)
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], padding)[:, :, None]


@contextlib.contextmanager
def lone_frames(vae: torch.nn.Module) -> Iterator[None]:
    """Within it `one_frame` serves the causal convolutions of an AutoencoderKLQwenImage."""
    convs = [m for m in vae.modules() if isinstance(m, QwenImageCausalConv3d) and "forward" not in vars(m)]
    try:
        for conv in convs:
            conv.forward = partial(one_frame, conv)
        yield
    finally:
        for conv in convs:
            vars(conv).pop("forward", None)


def _decoder_features(decoder: torch.nn.Module, x: Tensor) -> list[Tensor]:
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
        return _decoder_features(self.vae.decoder, x)


class QwenCodec:
    """AutoencoderKLQwenImage: a causal video autoencoder with one frame, a mean and a deviation for each channel.

    Latents are clean, normalised ones, [B, C, H, W]; the axis of frames is added and taken away here.
    """

    def __init__(self, vae: AutoencoderKLQwenImage):
        self.vae = vae
        self.token = PATCH * 2 ** len(vae.temperal_downsample)
        self._brought: dict[tuple, Tensor] = {}

    def _channels(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._brought:  # once: the copy waits for all that the device was given before
            values = torch.tensor(self.vae.config[name]).view(1, -1, 1, 1, 1)
            self._brought[key] = values.to(like.device, like.dtype)
        return self._brought[key]

    def mode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> the posterior's mode, as the model has it: [B, C, 1, H, W]."""
        return self.vae.encode(pixels[:, :, None]).latent_dist.mode()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> latents, the mode of the posterior."""
        return self.scaled(self.mode(pixels))

    def scaled(self, latents: Tensor) -> Tensor:
        """The model's own latents -> normalised ones, without the axis of frames."""
        mean = self._channels("latents_mean", latents)
        return ((latents - mean) / self._channels("latents_std", latents))[:, :, 0]

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        # a division by the rounded reciprocal: the pipelines of diffusers do so, and their bits are ours
        x = latents[:, :, None].to(self.vae.dtype)
        reciprocal = 1.0 / self._channels("latents_std", x)
        return x / reciprocal + self._channels("latents_mean", x)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels in [-1, 1], [B, 3, h, w]."""
        return self.pixels(self.unscaled(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """The model's own latents [B, C, 1, H, W] -> pixels in [-1, 1], [B, 3, h, w]."""
        return self.vae.decode(latents, return_dict=False)[0][:, :, 0]

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's conv_in, mid_block and first up block.

        A first frame sees zeros before it, so the layers need no cache of earlier frames.
        """
        bring_in(self.vae)
        x = self.vae.post_quant_conv(self.unscaled(latents))
        return [f[:, :, 0] for f in _decoder_features(self.vae.decoder, x)]


CODECS = {AutoencoderKL: KLCodec, AutoencoderKLQwenImage: QwenCodec}


def codec_of(vae: torch.nn.Module) -> KLCodec | QwenCodec:
    """The codec of an autoencoder. TypeError for one that is not supported."""
    for kind, codec in CODECS.items():
        if isinstance(vae, kind):
            return codec(vae)
    names = " or ".join(kind.__name__ for kind in CODECS)
    raise TypeError(f"vae: expected {names}, got {type(vae).__name__}")
