# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image-Edit and Qwen-Image-Edit-Plus: all that the engine cannot know of them, and their registration.

In order: the autoencoder, the transformer's fused forward, the attention processor, what the stages ask of the model
(`QwenImageEditModel` calls the transformer's own forward, `FusedQwenModel` the fused one), the pipelines.

Qwen's positions and its timestep of condition tokens (zero_cond_t) follow from a list of picture shapes, so a sequence
that is no list of whole pictures brings both itself: rotary tables to the attention processor, the index of the
modulation by a hook of the blocks.

Fused forward: text and image are two streams [B, tokens, C] from the first block to the last, joined in attention, text
first. A block's modulation depends on the timestep alone, so that of all blocks and of all steps of a stage is computed
at once (`modulation`: a third of the weights, read once a stage). Every linear layer is called as a module. The numbers
are those of QwenImageTransformer2DModel.forward but for rounding.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageDecoder3d,
    QwenImageEncoder3d,
    QwenImageMidBlock,
    QwenImageResample,
    QwenImageResidualBlock,
    QwenImageRMS_norm,
    QwenImageUpBlock,
    QwenImageUpsample,
)
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from .. import ops
from ..engine import fp8, strips, wide_attention
from ..engine._diffusers import foreign_forward, is_wrapper, mirrored, through
from ..engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from ..engine.autoencoder import decoder_features, in_channels_last
from ..engine.config import LAST
from ..engine.feature_maps import BiasedConv2d, doubled, padded_behind, residual_sum, with_plain_bias
from ..engine.fused import (
    FusedModel,
    called,
    compiled,
    feed_forward,
    first_of,
    linear,
    linear_of_each,
    modulated,
    replaced_of_feed_forward,
)
from ..engine.low_rank import active_serial
from ..engine.model import EditModel, Pictures, Text, in_order, key_bias_in_order, version_of
from ..engine.pipeline import Call, SpecEditMixin, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import (
    Kept,
    MixedSequence,
    StepLayout,
    Stream,
    TextWatch,
    attention,
    mixed_step_layout,
    whole_step_layout,
)
from ..engine.strips import Kind, Strips
from ..sampling.grid import BLOCK, PATCH, Grid
from ..sampling.layout import SequenceLayout, table_positions

logger = logging.getLogger("specedit_kernels")


# Qwen-Image-Edit's own, by the guidance of the draft, which departs further from its source with it. Found with the
# tiny one on 188 and 96 such edits (2 of 9 steps): .979 at 17.9 % of the tokens, and with true_cfg_scale 4 between .986
# at 18.1 % (.3) and .980 at 16.6 % (.5); "last", 4 of 9 steps, 76 edits: .989 at 18.3 %.
# Its other drafts and metrics are not calibrated, and take those above.
THRESHOLDS: dict[tuple[str, str, str], dict[bool | str, float]] = {
    ("decoder", "matched", "coarse"): {False: 0.03, True: 0.4, LAST: 0.05}
}


def lone_frame(conv: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The convolution's forward, which computes a lone frame in two dimensions: before it there are zeros alone, so of
    each kernel the last slice is all that counts, a third of the work."""
    if x.shape[2] != 1 or cache_x is not None:
        return QwenImageCausalConv3d.forward(conv, x, cache_x)
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], padding)[:, :, None]


class _FrameConv(QwenImageCausalConv3d):
    """The convolution of a lone frame [B, C, H, W], whose bias an op adds."""

    def unbiased(self, x: Tensor) -> Tensor:
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x, self.weight[:, :, -1], None, self.stride[1:], padding)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        y = self.unbiased(x)
        ops.add_bias_(y, self.bias)
        return y


class _UnbiasedFrameConv(_FrameConv):
    """A convolution of a lone frame whose bias is added by what takes its result."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return self.unbiased(x)


class _FrameNorm(QwenImageRMS_norm):
    """The norm of a lone frame [B, C, H, W], with the bias before it and the SiLU behind, or without."""

    def forward(self, x: Tensor, x_bias: Tensor | None = None, silu: bool = False) -> Tensor:
        bias = self.bias.flatten() if isinstance(self.bias, Tensor) else None
        return ops.channel_rms_norm(x, self.gamma.flatten(), bias, silu=silu, x_bias=x_bias)


class _FrameResidualBlock(QwenImageResidualBlock):
    """On lone frames [B, C, H, W]: biases are added in the norm, and with the residual."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        y = self.conv1(self.norm1(x, silu=True))
        y = self.conv2(self.dropout(self.norm2(y, self.conv1.bias, silu=True)))
        if isinstance(self.conv_shortcut, torch.nn.Identity):
            return residual_sum(y, self.conv2.bias, x)
        return residual_sum(y, self.conv2.bias, self.conv_shortcut(x), self.conv_shortcut.bias)


def _frame_attention(block: Any, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """QwenImageAttentionBlock on a lone frame [B, C, H, W]. attend: of queries, keys and values [B, N, C]."""
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    q, k, v = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
    out = F.linear(attend(q, k, v), block.proj.weight.flatten(1), block.proj.bias)
    return out.transpose(1, 2).unflatten(2, x.shape[2:]) + x


class _FrameAttentionBlock(QwenImageAttentionBlock):
    """On lone frames [B, C, H, W]."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        return _frame_attention(self, x, partial(wide_attention.of_heads, heads=1))


class _FrameUpsample(QwenImageUpsample):
    """Nearest upsampling by two."""

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


class _FramePad(torch.nn.ZeroPad2d):
    """A row of zeros below, and a column at the right."""

    def forward(self, x: Tensor) -> Tensor:
        return padded_behind(x)


class _FrameResample(QwenImageResample):
    """On lone frames [B, C, H, W]: the first frame of a video is not joined with others."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        return self.resample(x)


def _first_frame(x: Tensor, feat_cache: Any) -> Tensor:
    """The lone frame of x [B, C, 1, H, W], channels last on CUDA. ValueError for a frame that has others before it."""
    if x.shape[2] != 1 or (feat_cache and feat_cache[0] is not None):
        raise ValueError("frames: expected a single one, got several: this autoencoder was made for lone frames")
    if feat_cache:
        feat_cache[0] = x
    return in_channels_last(x[:, :, 0])


class _FrameEncoder(QwenImageEncoder3d):
    """Of one frame [B, C, 1, H, W], inside [B, C, H, W]."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        y = self.conv_in(_first_frame(x, feat_cache))
        for layer in self.down_blocks:
            y = layer(y)
        y = self.norm_out(self.mid_block(y), silu=True)
        return self.conv_out(y)[:, :, None]


class _FrameDecoder(QwenImageDecoder3d):
    """Of one frame [B, C, 1, H, W], inside [B, C, H, W]."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        y = self.mid_block(self.conv_in(_first_frame(x, feat_cache)))
        for block in self.up_blocks:
            y = block(y)
        return self.conv_out(self.norm_out(y, silu=True))[:, :, None]


# Classes that stand for those of the library where all that an encoder or a decoder holds is known. Blocks that only
# call others serve maps of either kind.
_OF_FRAMES: Mapping[type, type] = MappingProxyType(
    {
        QwenImageEncoder3d: _FrameEncoder, QwenImageDecoder3d: _FrameDecoder, QwenImageCausalConv3d: _FrameConv,
        QwenImageRMS_norm: _FrameNorm, QwenImageResidualBlock: _FrameResidualBlock,
        QwenImageAttentionBlock: _FrameAttentionBlock, QwenImageUpsample: _FrameUpsample,
        QwenImageResample: _FrameResample, torch.nn.ZeroPad2d: _FramePad,
    }
)  # fmt: skip


def _plain_weights(part: torch.nn.Module) -> bool:
    """Whether all convolutions have biases, and no weight is a wrapper."""
    convs = [conv for conv in part.modules() if isinstance(conv, (torch.nn.Conv2d, torch.nn.Conv3d))]
    return all(conv.bias is not None for conv in convs) and not any(is_wrapper(x) for x in part.parameters())


def with_lone_frames(vae: torch.nn.Module) -> torch.nn.Module:
    """The same AutoencoderKLQwenImage for lone frames, a tree of modules of its own over the same weights.

    Encoder and decoder compute maps [B, C, H, W], channels last on CUDA, with the op `channel_rms_norm` for norms and
    their SiLUs, `add_bias_` for biases and residuals and `wide_attention`. One with a module of any other kind, with a
    hook, a forward of its own or wrapped weights keeps the library's maps and calls; its causal convolutions compute
    lone frames in two dimensions.
    """
    twin = mirrored(vae)
    module: Any
    part: Any
    for part in (twin.encoder, twin.decoder):
        if part is None or not (strips.known(part, STRIPS) and _plain_weights(part)):
            continue
        for module in part.modules():
            if type(module) is torch.nn.Sequential:
                for conv in module:
                    if with_plain_bias(conv):
                        conv.__class__ = BiasedConv2d
            elif type(module) in _OF_FRAMES:
                module.__class__ = _OF_FRAMES[type(module)]
        for block in part.modules():
            if isinstance(block, _FrameResidualBlock):
                for module in (block.conv1, block.conv2, block.conv_shortcut):
                    if type(module) is _FrameConv:
                        module.__class__ = _UnbiasedFrameConv
    for module in twin.modules():
        if type(module) is QwenImageCausalConv3d and not foreign_forward(module):
            module.forward = partial(lone_frame, module)
    return twin


def _unbiased_strip(conv: Any, of: Strips, x: Tensor) -> Tensor:
    """A convolution of a lone frame [B, C, h, W] on a strip of rows, without its bias."""
    padding = (conv._padding[2], conv._padding[0])
    return strips.convolved(x, conv.weight[:, :, -1], None, conv.stride[1:], padding, conv.groups, of)


def _biased_strip(conv: Any, of: Strips, x: Tensor) -> Tensor:
    y = _unbiased_strip(conv, of, x)
    ops.add_bias_(y, conv.bias)
    return y


def _strip_of_frame(conv: QwenImageCausalConv3d, of: Strips, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """`lone_frame` on a strip of rows."""
    assert x.shape[2] == 1 and cache_x is None
    padding = (conv._padding[2], conv._padding[0])
    weight = conv.weight[:, :, -1]
    return strips.convolved(x[:, :, 0], weight, conv.bias, conv.stride[1:], padding, conv.groups, of)[:, :, None]


def _strip_attention(block: QwenImageAttentionBlock, of: Strips, x: Tensor) -> Tensor:
    """QwenImageAttentionBlock on a strip of rows of lone frames [B, C, 1, h, W]."""
    return _strip_attention_of_frame(block, of, x[:, :, 0])[:, :, None]


def _strip_attention_of_frame(block: Any, of: Strips, x: Tensor) -> Tensor:
    return _frame_attention(block, x, partial(strips.attend, heads=1, strips=of))


# What strips of rows make of the modules of AutoencoderKLQwenImage, of one frame; strips.Kind.
STRIPS: Mapping[type, Kind] = MappingProxyType(
    dict.fromkeys(
        (QwenImageEncoder3d, QwenImageDecoder3d, QwenImageMidBlock, QwenImageUpBlock, QwenImageResidualBlock,
         QwenImageResample, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.SiLU, torch.nn.Identity,
         torch.nn.Dropout, *_OF_FRAMES.values()),
        Kind(),
    )
    | {
        QwenImageRMS_norm: Kind(None, lambda norm: norm.channel_first),
        QwenImageUpsample: Kind(None, lambda up: up.scale_factor == (2.0, 2.0) and up.mode == "nearest-exact"),
        QwenImageCausalConv3d: Kind(_strip_of_frame, lambda conv: conv._padding[2] in (0, 1)),
        _FrameConv: Kind(_biased_strip),
        _UnbiasedFrameConv: Kind(_unbiased_strip),
        QwenImageAttentionBlock: Kind(_strip_attention),
        _FrameAttentionBlock: Kind(_strip_attention_of_frame),
        torch.nn.Conv2d: Kind(strips.conv2d, strips.plain_conv),
        BiasedConv2d: Kind(strips.biased_conv2d),
        torch.nn.ZeroPad2d: Kind(strips.pads_behind, lambda pad: pad.padding == (0, 1, 0, 1)),
        _FramePad: Kind(strips.pads_behind),
    }
)  # fmt: skip


class QwenCodec:
    """AutoencoderKLQwenImage: a causal video autoencoder with one frame, a mean and a deviation for each channel.

    Latents are clean, normalised ones, [B, C, H, W]; the axis of frames is added and taken away here.
    """

    patch = PATCH
    STRIPS: ClassVar[Mapping[type, Kind]] = STRIPS

    def __init__(self, vae: AutoencoderKLQwenImage):
        self.vae = vae
        self.token = PATCH * 2 ** len(vae.temperal_downsample)
        self._brought: dict[tuple, Tensor] = {}

    def _channels(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._brought:
            values = torch.tensor(self.vae.config[name], dtype=torch.float32).view(1, -1, 1, 1, 1)
            # a blocking copy would wait for the encoder
            self._brought[key] = values.to(like.device, like.dtype, non_blocking=True)
        return self._brought[key]

    def mode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, h, w] -> the posterior's mode, as the model has it: [B, C, 1, H, W]."""
        return through(self.vae, lambda x: self.vae.encode(x).latent_dist.mode(), pixels[:, :, None])

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
        return through(self.vae, lambda x: self.vae.decode(x, return_dict=False)[0][:, :, 0], latents)

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's conv_in, mid_block and first up block.

        A first frame sees zeros before it, so the layers need no cache of earlier frames.
        """

        def run(x: Tensor) -> list[Tensor]:
            decoder, x = self.vae.decoder, self.vae.post_quant_conv(x)
            if isinstance(decoder, _FrameDecoder):
                return decoder_features(decoder, in_channels_last(x[:, :, 0]))
            return [f[:, :, 0] for f in decoder_features(decoder, x)]

        return through(self.vae, run, self.unscaled(latents))

    def fused(self) -> QwenCodec:
        """The same codec over an autoencoder for lone frames, `with_lone_frames`."""
        codec = copy.copy(self)
        codec.vae = with_lone_frames(self.vae)
        return codec


def replaced(transformer: QwenImageTransformer2DModel) -> Iterable[tuple[torch.nn.Module, type | tuple[type, ...]]]:
    """Every module whose forward `fused_forward` stands for, with the class that it must have. All others are called;
    linear layers too, where they are more than a weight and a bias."""
    norms = (torch.nn.RMSNorm, RMSNorm)
    yield transformer, QwenImageTransformer2DModel
    for block in transformer.transformer_blocks:
        attn = block.attn
        yield from ((block, QwenImageTransformerBlock), (attn, Attention))
        for modulate in (block.img_mod, block.txt_mod):
            yield from ((modulate, torch.nn.Sequential), (modulate[0], torch.nn.SiLU))
        for norm in (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2):
            yield norm, torch.nn.LayerNorm
        for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
            yield norm, norms
        for ff in (block.img_mlp, block.txt_mlp):
            yield from replaced_of_feed_forward(ff)
    norm = transformer.norm_out
    yield from ((norm, AdaLayerNormContinuous), (norm.silu, torch.nn.SiLU), (norm.norm, torch.nn.LayerNorm))


def modulation(transformer: QwenImageTransformer2DModel, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts, scales and gates of all blocks: (image [R, L 6 C], text [R, L 6 C + 2 C]), for R timesteps.

    timestep: [R] in [0, 1000]. like: a tensor of the tokens' dtype. The last 2 C of the text's are the output norm's
    scale and shift. With zero_cond_t the image's are [R, 2, L 6 C], the second row that of clean pictures.
    """
    blocks, at = transformer.transformer_blocks, timestep.to(like.dtype) / 1000

    def emb(at: Tensor) -> Tensor:
        return F.silu(transformer.time_text_embed(at, like))

    def of_image(emb: Tensor) -> Tensor:
        return torch.cat([called(block.img_mod[1], emb) for block in blocks], dim=-1)

    moving = emb(at)
    image = of_image(moving)
    if transformer.zero_cond_t:
        clean = of_image(emb(torch.zeros_like(at[:1])))
        image = torch.stack([image, clean.expand_as(image)], dim=1)
    of_text = [*(block.txt_mod[1] for block in blocks), transformer.norm_out.linear]
    text = torch.cat([called(layer, moving) for layer in of_text], dim=-1)
    return image, text


def double_block(
    block: QwenImageTransformerBlock, text: Tensor, image: Tensor, sequence: MixedSequence, kept: Kept | None,
    image_mod: Tensor, text_mod: Tensor, last: bool,
) -> None:  # fmt: skip
    """QwenImageTransformerBlock on text [B, T, C] and image tokens [B, N, C], this rank's, in place.

    kept: where its keys and values go, None to forget them. image_mod: [B, 6 C], or [B, 2, 6 C] where the sequence says
    which of them is whose; text_mod: [B, 6 C]. last: nothing reads the text after this block's attention.
    """
    attn, n, which = block.attn, sequence.own[0], sequence.modulate
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=-1)
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=-1)
    dim = attn.inner_dim // attn.heads
    streams = []

    def project(x: Tensor, shift: Tensor, scale: Tensor, eps: float, at: slice, *layers: Any) -> None:
        *projections, norm_q, norm_k = layers
        parts = []
        if x.shape[1]:
            rows_in = modulated(x, scale, shift, eps, projections, modulation_index=which if x is image else None)
            parts = [part.unflatten(-1, (-1, dim)) for part in linear_of_each(projections, rows_in)]
        streams.append(Stream(at, parts, norm_q, norm_k))

    if sequence.text:  # else the keys and values of the text are kept ones
        project(text, t_shift, t_scale, block.txt_norm1.eps, slice(0, sequence.text),
                attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)  # fmt: skip
    project(image, i_shift, i_scale, block.img_norm1.eps, slice(sequence.text, None),
            attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)  # fmt: skip
    out, _ = attention(streams, kept, sequence)
    streams.clear()  # the MLP needs its memory
    if n and not last:
        ops.gated_residual_add_(text, linear(attn.to_add_out, out[:, :n]), t_gate)
        text_in = modulated(text, t_scale2, t_shift2, block.txt_norm2.eps, [first_of(block.txt_mlp)])
        ops.gated_residual_add_(text, feed_forward(block.txt_mlp, text_in), t_gate2)
    if not image.shape[1]:
        return
    out = linear(attn.to_out[0], out[:, n:])
    for layer in attn.to_out[1:]:
        out = layer(out)
    ops.gated_residual_add_(image, out, i_gate, modulation_index=which)
    second = [first_of(block.img_mlp)]
    image_in = modulated(image, i_scale2, i_shift2, block.img_norm2.eps, second, modulation_index=which)
    ops.gated_residual_add_(image, feed_forward(block.img_mlp, image_in), i_gate2, modulation_index=which)


Block = Callable[..., None]


@functools.cache
def compiled_block() -> Block:
    return compiled(double_block)


def fused_forward(
    transformer: QwenImageTransformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: tuple[Tensor, Tensor],
    sequence: MixedSequence,
    cache: list[Kept] | None = None,
    block: Block = double_block,
) -> Tensor:
    """Velocity of image tokens [B, S, 4C]: QwenImageTransformer2DModel.forward.

    embeds: [B, T, E], T = sequence.text. modulation: of `modulation`, a row for each sample. cache: of each block,
    where its keys and values outlive the step: it writes those of its tokens, and attends to all.
    """
    embeds = sequence.own_text(embeds)
    if sequence.ranks is not None and sequence.modulate is not None:
        sequence = replace(sequence, modulate=sequence.own_image(sequence.modulate).contiguous())
    image = called(transformer.img_in, sequence.own_image(tokens))
    text = called(transformer.txt_in, transformer.txt_norm(embeds)) if embeds.shape[1] else image[:, :0]
    layers, width = transformer.transformer_blocks, 6 * transformer.inner_dim
    of_image, of_text = modulation
    for i, layer in enumerate(layers):
        own = slice(i * width, (i + 1) * width)
        kept, last = None if cache is None else cache[i], i == len(layers) - 1
        block(layer, text, image, sequence, kept, of_image[..., own], of_text[:, own], last)
        if image.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            text.clip_(-65504, 65504)
            image.clip_(-65504, 65504)
    scale, shift = of_text[:, len(layers) * width :].chunk(2, dim=1)
    image = ops.adaln_modulate(image, scale, shift, eps=transformer.norm_out.norm.eps)
    return sequence.whole_image(called(transformer.proj_out, image))


class SpecEditQwenAttnProcessor(SpecEditAttnProcessor):
    """For QwenDoubleStreamAttnProcessor2_0; `specedit_layout` is the mixed sequence's."""

    def __init__(self, inner: QwenDoubleStreamAttnProcessor2_0, transformer: torch.nn.Module, name: str):
        super().__init__(inner, transformer, name)
        block = transformer.get_submodule(name.removesuffix(".attn.processor"))
        # the transformer computes the index of the modulation from whole pictures: a mixed sequence brings its own
        self._hook = None
        if block.zero_cond_t:
            self._hook = block.register_forward_pre_hook(own_modulation, with_kwargs=True)

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: StepLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        if specedit_layout is None:
            return self.inner(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        text = encoder_hidden_states
        assert text is not None
        # -1 for the heads: tensor parallelism shards them
        head_dim = attn.inner_dim // attn.heads
        q, k, v, tq, tk, tv = (
            x.unflatten(-1, (-1, head_dim))
            for x in (
                attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states),
                attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text),
            )
        )  # fmt: skip
        norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        q, k, tq, tk = (x if norm is None else norm(x) for norm, x in zip(norms, (q, k, tq, tk)))
        out = joint_attention(self, (tq, tk, tv), (q, k, v), specedit_layout)
        length = text.shape[1]
        image = attn.to_out[0](out[:, length:].contiguous())
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        return image, attn.to_add_out(out[:, :length].contiguous())


def own_modulation(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Hook of a Qwen block: a mixed sequence's index of the modulation in place of the transformer's."""
    layout = (kwargs.get("joint_attention_kwargs") or {}).get("specedit_layout")
    if layout is None or layout.sequence.modulate is None:
        return None
    return args, {**kwargs, "modulate_index": layout.sequence.modulate}


@dataclass
class QwenText(Text):
    """embeds [B, T, E], mask [B, T] (0 or False: padding) or None where every token counts."""

    PER_SAMPLE = ("embeds", "mask")

    mask: Tensor | None


@dataclass(frozen=True)
class QwenLayout:
    """shapes: (frames, rows, columns) of each picture, from which the transformer makes positions of its own.

    attention: the mixed sequence's, None for whole pictures.
    """

    shapes: tuple[tuple[int, int, int], ...]
    attention: StepLayout | None = None


def _shapes(grids: Sequence[Grid]) -> tuple[tuple[int, int, int], ...]:
    return tuple((1, rows, columns) for rows, columns in grids)


def text_offset(grids: Sequence[Grid]) -> int:
    """Position of the first text token on all three axes: past the largest half side of the centred pictures."""
    return max(max(rows // 2, columns // 2) for rows, columns in grids)


def centred(positions: Tensor, grids: Sequence[Grid]) -> Tensor:
    """(picture, row, column) from the top left corner -> Qwen's positions, rows and columns counted from the centre.

    positions: fp32 [n, 3]; picture i has the grid grids[i]. A side of n tokens runs from -ceil(n / 2).
    """
    start = torch.tensor([[0, -(-r // 2), -(-c // 2)] for r, c in grids], dtype=torch.float32)
    # a blocking copy would wait for the steps before
    return positions - start.to(positions.device, non_blocking=True)[positions[:, 0].long()]


def rotary_table(positions: Tensor, axes: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin), fp32 [n, sum(axes)], for positions fp32 [n, len(axes)], fractions allowed.

    Neighbouring channels share an angle: position * theta^(-2i / axis) for pair i of an axis.
    """
    angles = []
    for i, dim in enumerate(axes):
        power = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device).div(dim)
        angles.append(torch.outer(positions[:, i], 1.0 / torch.pow(theta, power)))
    angle = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


class QwenImageEditModel(EditModel):
    """QwenImageTransformer2DModel with AutoencoderKLQwenImage."""

    thresholds = THRESHOLDS

    def embedder(self) -> torch.nn.Module:
        return self.transformer.img_in

    def dense_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid]) -> QwenLayout:
        # Smaller pictures are a plain run of their own, so the text stands where that has it, right after them.
        return QwenLayout(_shapes(grids))

    def _turns(self, text: QwenText, layout: QwenLayout) -> Tensor:
        """Complex rotary table of text and whole pictures, [tokens, head dim / 2]."""
        device, length = text.embeds.device, text.embeds.shape[1]
        return torch.cat(self.transformer.pos_embed([list(layout.shapes)], device=device, max_txt_seq_len=length)[::-1])

    def watched_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch) -> QwenLayout:
        layout, (batch, length) = self.dense_layout(text, pictures, grids), text.embeds.shape[:2]
        turn = self._turns(text, layout)
        cos, sin = (x.repeat_interleave(2, dim=1)[None] for x in (turn.real, turn.imag))
        bias = None
        if text.mask is not None:
            bias = turn.real.new_zeros(batch, len(turn))
            bias[:, :length].masked_fill_(~text.mask.to(bias.device, torch.bool), float("-inf"))
        return replace(layout, attention=whole_step_layout(length, (cos, sin), batch, bias, watch))

    def mixed_layout(
        self, text: QwenText, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> QwenLayout:
        device = layout.index.device
        batch, length = text.embeds.shape[:2]
        embedding, grids = self.transformer.pos_embed, (pictures.target, *pictures.references)
        table = table_positions(pictures.target, device, pictures.others, pictures.coarse_others)
        order = torch.arange(length, dtype=torch.float32, device=device)[:, None] + text_offset(grids)
        axes, theta = embedding.axes_dim, embedding.theta
        text_tables = rotary_table(order.expand(length, 3), axes, theta)
        image_tables = rotary_table(centred(table, grids), axes, theta)
        cos, sin = (
            torch.cat([a.expand(batch, *a.shape), in_order(b, layout)], dim=1)
            for a, b in zip(text_tables, image_tables)
        )
        bias = None
        if key_bias or text.mask is not None:
            bias = cos.new_zeros(batch, length + layout.capacity)
            if key_bias:
                bias[:, length:] = key_bias_in_order(pictures, layout)
            if text.mask is not None:
                bias[:, :length].masked_fill_(~text.mask.to(device, torch.bool), float("-inf"))
        modulate = None
        if self.transformer.zero_cond_t:
            modulate = (~layout.target_slots()).int()
        cache = self.new_cache() if cached else None
        attention = mixed_step_layout(length, (cos, sin), layout, bias, cache, modulate=modulate)
        # one token's shape, or one for each rank: what the transformer makes of it is replaced, in the processor and in
        # the blocks
        return QwenLayout(_shapes([(1, 1 if self.ranks is None else self.ranks.size)]), attention)

    def velocity(self, text: QwenText, tokens: Tensor, conditioning: Any, layout: QwenLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        start = 0 if layout.attention is None else layout.attention.start
        attention = self.shared(layout.attention, text.embeds.shape[1] - start, tokens.shape[1])
        if attention is not None:
            kwargs["specedit_layout"] = attention
        with with_layout(self.transformer, attention):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=self.guidance,
                # in a mixed sequence the key bias holds the mask
                encoder_hidden_states_mask=text.mask if layout.attention is None else None,
                encoder_hidden_states=text.embeds[:, start:],
                img_shapes=[list(layout.shapes)] * tokens.shape[0],
                attention_kwargs=kwargs,
                return_dict=False,
            )[0]

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Guidance with each token's velocity brought back to the length of its conditional one."""
        guided = negative + scale * (positive - negative)
        length = torch.norm(positive, dim=-1, keepdim=True)
        return guided * (length / torch.norm(guided, dim=-1, keepdim=True))


class FusedQwenCodecModel(FusedModel):
    """The part of a fused adapter whose codec is a `QwenCodec`: its autoencoder launched by a runner."""

    def _with_vae(self, name: str, x: Tensor) -> Tensor:
        vae = self.codec.vae

        def run(x: Tensor) -> Tensor:
            return getattr(self.fused_codec, name)(x)

        # scaling stays outside: its numbers come from the host on every call
        return self.runner((name, vae.use_slicing, vae.use_tiling, self.codec_ranks), run, {"x": x})

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, H, W] -> clean latents [B, C, h, w]."""
        if self.runner.moving:
            return super().encode(pixels)
        return self.codec.scaled(self._with_vae("mode", pixels))

    def decode(self, latents: Tensor) -> Tensor:
        if self.runner.moving:
            return super().decode(latents)
        return self._with_vae("pixels", self.codec.unscaled(latents))


class FusedQwenModel(FusedQwenCodecModel, QwenImageEditModel):
    """The same model through `qwen_fused`, its steps and its autoencoder launched by a runner."""

    # Two branches run as one batch where their texts differ by no more tokens than this: the shorter one is padded.
    JOINED = 256

    # the timesteps of the last call of `timestep_conditioning`, and what it gave
    _timestep_conditioning: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] = (None, [])
    # the same of `joined`, which every step asks: versions, embeddings (so that none is of another tensor), and it
    _joined: tuple[list[tuple[int, int]], list[Tensor], QwenText | None] = ([], [], None)

    @property
    def _block(self) -> Block:
        # a compiled block does not know of changed weights
        apart = self.runner.name != "compile" or active_serial() or fp8.is_active()
        return double_block if apart else compiled_block()

    def joined(self, texts: Sequence[QwenText]) -> QwenText | None:
        # a callback may give a text other embeddings, or write to these
        embeds = [text.embeds for text in texts]
        now = [version_of(x) for x in embeds]
        if self._joined[0] != now:
            self._joined = now, embeds, self._join(texts)
        return self._joined[2]

    def _join(self, texts: Sequence[QwenText]) -> QwenText | None:
        lengths = [text.embeds.shape[1] for text in texts]
        longest = max(lengths)
        if len(texts) == 1 or longest - min(lengths) > self.JOINED:
            return None
        embeds = torch.cat([F.pad(x.embeds, (0, 0, 0, longest - n)) for x, n in zip(texts, lengths)])
        if min(lengths) == longest and all(text.mask is None for text in texts):
            return QwenText(embeds, None)
        masks = [x.embeds.new_ones(x.embeds.shape[:2]) if x.mask is None else x.mask for x in texts]
        return QwenText(embeds, torch.cat([F.pad(m.bool(), (0, longest - n)) for m, n in zip(masks, lengths)]))

    def dense_layout(self, text: QwenText, pictures: Pictures, grids: Sequence[Grid]) -> QwenLayout:
        layout, (batch, length) = super().dense_layout(text, pictures, grids), text.embeds.shape[:2]
        device = text.embeds.device
        turn = self._turns(text, layout)[None]
        counts = [math.prod(grid) for grid in grids]
        bias = modulate = None
        if text.mask is not None:
            bias = turn.real.new_zeros(batch, length + sum(counts))
            bias[:, :length].masked_fill_(~text.mask.to(device, torch.bool), float("-inf"))
        if self.transformer.zero_cond_t:
            behind = torch.arange(sum(counts), device=device) >= counts[0]
            modulate = behind.int().expand(batch, -1).contiguous()
        cos, sin = turn.real.contiguous(), turn.imag.contiguous()
        sequence = MixedSequence(length, cos, sin, bias, modulate=modulate, backend=self._backend)
        return replace(layout, attention=StepLayout(sequence))

    def mixed_layout(
        self, text: QwenText, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> QwenLayout:
        made = super().mixed_layout(text, pictures, layout, key_bias, cached=False)
        return self._cached(made, text.embeds) if cached else made

    def timestep_conditioning(self, text: QwenText, timesteps: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """The modulation of all blocks for each timestep, (image, text), a row each: all branches share it."""
        self.runner.bring(self._own)
        if self._timestep_conditioning[0] is not timesteps:
            with self._scaled():
                found = modulation(self.transformer, timesteps, text.embeds)
            self._timestep_conditioning = timesteps, list(zip(*(x.split(1) for x in found)))
        return self._timestep_conditioning[1]

    def velocity(
        self, text: QwenText, tokens: Tensor, conditioning: tuple[Tensor, Tensor], layout: QwenLayout
    ) -> Tensor:
        attention = layout.attention
        assert attention is not None
        sequence, cache = attention.sequence, attention.cache
        names = ("cos", "sin", "key_bias", "queries", "keys", "rows", "modulate")
        of_image, of_text = conditioning
        inputs = dict(tokens=tokens, embeds=text.embeds[:, : sequence.text], of_image=of_image, of_text=of_text)
        inputs |= {name: getattr(sequence, name) for name in names}

        def step(tokens: Tensor, embeds: Tensor, of_image: Tensor, of_text: Tensor, **given: Any) -> Tensor:
            image_mod, text_mod = (x.expand(tokens.shape[0], *x.shape[1:]) for x in (of_image, of_text))
            with self._scaled():
                return fused_forward(
                    self.transformer,
                    tokens,
                    embeds,
                    (image_mod, text_mod),
                    replace(sequence, **given, ranks=self.ranks),
                    cache,
                    self._block,
                )

        rows = None if cache is None else cache[0][0].shape[1]
        self.runner.bring(self._own)
        tag = ("step", id(self._own), sequence.text, sequence.passing,
               self.attention_kwargs.get("scale"), rows, sequence.backend, self.ranks)  # fmt: skip
        return self.runner(tag, step, inputs, attention.buffers)


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's area in pixels, by default guidance 4 against a blank text."""
    options: dict[str, Any] = {"true_cfg_scale": 4.0 if true_cfg_scale is None else true_cfg_scale}
    if "resolution" in settings:
        options["max_area"] = settings["resolution"] ** 2
    if options["true_cfg_scale"] > 1:
        options["negative_prompt"] = " "
    return options


class _SpecEditQwenMixin(SpecEditMixin):
    """What both Qwen pipelines share; a class says which pictures the text encoder and the model see."""

    ARGUMENTS = {"max_area": None}
    TEXT = ("prompt", "prompt_embeds", "prompt_embeds_mask")
    KWARGS = "attention_kwargs"
    UNSUPPORTED = ("use_layer3d_rope", "use_additional_t_cond")
    FLASH_RUNNERS = ("eager",)
    PIXELS = False
    SEVERAL_GPUS = True

    def _seen(
        self, image: PIL.Image.Image | list[PIL.Image.Image], max_area: int | None
    ) -> tuple[Any, list[tuple[list[PIL.Image.Image], tuple[int, int]]], tuple[int, int]]:
        """(pictures for the text encoder, [(pictures of one reference, its (height, width))], default output size)."""
        raise NotImplementedError

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> QwenText:
        # one of each: encode_prompt itself repeats embeddings and masks in different orders
        found = self.encode_prompt(
            image=call.shown,
            **fields,
            device=device,
            num_images_per_prompt=1,
            max_sequence_length=call.max_sequence_length,
        )
        embeds, mask = (None if x is None else x.repeat_interleave(call.num_images_per_prompt, dim=0) for x in found)
        assert embeds is not None
        return QwenText(embeds, mask)

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        # each at its own size; the edited ones at the output's too, where tokens of both are compared
        def pixels_of(pictures: list[PIL.Image.Image], size: tuple[int, int]) -> Tensor:
            found = preprocess(self.image_processor, pictures, *size, device)
            if found.shape[1] != 3:
                raise ValueError(f"image: expected pictures with 3 channels (RGB), got {found.shape[1]} channels")
            return found

        (edited, own_size), *others = call.references
        size = (call.height, call.width)
        pixels = pixels_of(edited, size)
        behind = [pixels if own_size == size else pixels_of(edited, own_size)]
        return pixels, behind + [pixels_of(*reference) for reference in others]

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> QwenImageEditModel:
        parts = (self.transformer, self.vae, guidance, attention_kwargs)
        return QwenImageEditModel(*parts) if runner is None else FusedQwenModel(*parts, runner)

    def _check_batch(self, prompts: int) -> None:
        """ValueError for a number of prompts that the pipeline does not take."""

    def size_of(self, image: PIL.Image.Image, max_area: int | None = None) -> tuple[int, int]:
        """(height, width) that a lone picture is brought to: its ratio, `max_area` pixels (1024 * 1024 if None)."""
        return self._seen(image, max_area)[2]

    def _size(self, call: Call) -> tuple[int, int]:
        """By the diffusers pipeline's rules, in whole blocks."""
        self._check_batch(self._prompts(call) if call.prompt is not None or call.prompt_embeds is not None else 1)
        call.shown, call.references, default = self._seen(call.image, call.max_area)
        if call.output_size == "source" and self.EDITED:
            default = call.references[0][1]  # the edited picture's, for it comes back at its own ratio
        wanted = (call.height or default[0], call.width or default[1])
        multiple = self.vae_scale_factor * PATCH * BLOCK
        fitted = tuple(max(side // multiple, 1) * multiple for side in wanted)
        if fitted != wanted:
            logger.info("height and width are adjusted from %dx%d to %dx%d", *wanted, *fitted)
        return fitted


def _stock_size(module: Any, area: int, image: PIL.Image.Image) -> tuple[int, int]:
    """(height, width) that the diffusers pipeline brings a picture to for an area in pixels."""
    width, height = module.calculate_dimensions(area, image.width / image.height)[:2]
    return height, width


class SpecEditQwenImageEditPipeline(_SpecEditQwenMixin, QwenImageEditPipeline):
    """QwenImageEditPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline; weights are never touched. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs QwenImageEditPipeline's own call,
        untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited. region: the same as boxes (x0, y0, x1, y1). mask_mode="limit" or "add": the draft
        runs too, and what it finds is limited to the mask, or the mask added to it.
    output_size: "source": pictures come back at their own size and mode, equal to the source outside the edit region.
    preview: True: the region alone is looked for.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many.
    max_area: pixels of the source and of the output where height and width are left out, 1024 * 1024 if None.
    height, width: as in QwenImageEditPipeline, rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; it
        has 16). Where they are not the source's own (its ratio at `max_area`), the model sees the source at that own
        size, all of it fine in mixed steps, and a copy at the output's size is what a draft is compared with and what
        stays outside the edit.
    image: a PIL picture, or a list with one or as many as prompts; all are brought to the size of the first. Picture
        and prompt i give the images i * num_images_per_prompt and following.
    latents: packed white noise on the fine grid, [B, N, 4C].
    true_cfg_scale: both branches share one draft, one mask and one layout.
    callback_on_step_end: `latents` holds the packed tokens of the step at hand: coarse grid, mixed sequence
        (target, then condition slots), or fine grid.
    """

    def _seen(self, image, max_area):
        images = image if isinstance(image, list) else [image]
        size = _stock_size(pipeline_qwenimage_edit, 1024 * 1024 if max_area is None else max_area, images[0])
        # a list reaches the text encoder as it is given: so it does in QwenImageEditPipeline
        return self.image_processor.resize(image, *size), [(images, size)], size


class SpecEditQwenImageEditPlusPipeline(_SpecEditQwenMixin, QwenImageEditPlusPipeline):
    """QwenImageEditPlusPipeline (2509, 2511) with SpecEdit; the call is SpecEditQwenImageEditPipeline's but for:

    image: a PIL picture or a list of them, all of one prompt. The first is the one that is edited: the draft is
        compared with it, what does not change is taken from it, and its condition tokens are coarse outside the edit.
        The others are seen whole: fine in mixed steps (`coarse_references=True`: coarse), at the stage's resolution in
        coarse and draft steps.
    height, width: as in QwenImageEditPlusPipeline, whose default is the ratio of the *last* picture. Give the first
        one's where they differ: else the first is stretched to the last one's ratio before it is compared, and it
        stays fine in mixed steps, because its grid is not the output's.
    prompt: one; `num_images_per_prompt` gives several images.
    """

    EDITED = 1

    def _seen(self, image, max_area):
        images, module = image if isinstance(image, list) else [image], pipeline_qwenimage_edit_plus
        area = module.VAE_IMAGE_SIZE if max_area is None else max_area
        sizes = [_stock_size(module, area, x) for x in images]
        shown = [self.image_processor.resize(x, *_stock_size(module, module.CONDITION_IMAGE_SIZE, x)) for x in images]
        return shown, [([x], size) for x, size in zip(images, sizes)], sizes[-1]

    def _check_batch(self, prompts: int) -> None:
        if prompts > 1:
            raise ValueError(f"prompt: QwenImageEditPlusPipeline takes one prompt a call, got {prompts}")


register(
    Model(
        name="qwen_image_edit",
        pipelines={
            QwenImageEditPipeline: SpecEditQwenImageEditPipeline,
            QwenImageEditPlusPipeline: SpecEditQwenImageEditPlusPipeline,
        },
        processors={QwenDoubleStreamAttnProcessor2_0: SpecEditQwenAttnProcessor},
        codecs={AutoencoderKLQwenImage: QwenCodec},
        replaced={QwenImageTransformer2DModel: replaced},
        command=_command,
        pre_hooks=(own_modulation,),
        several_pictures=("QwenImageEditPlusPipeline",),
    )
)
