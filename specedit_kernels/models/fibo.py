# SPDX-License-Identifier: Apache-2.0
"""FIBO-Edit (BriaFiboEditPipeline): all that the engine cannot know of it.

FLUX.1's blocks with a text of their own: before each block half of the text's channels are replaced by a projection of
one of the text encoder's layers. A token is one latent pixel of a 16x autoencoder (Wan 2.2's). Padded words are masked.
True guidance, whose two branches the stock pipeline runs as one batch; so does this. The fused forward is
flux_kontext's; what replaces the text's channels depends on the text alone, and is computed once.

Thresholds are not calibrated for it: drafts are judged by the decoder's features with those of the tiny FLUX editor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, BriaFiboEditPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_bria import BriaAttnProcessor
from diffusers.models.transformers.transformer_bria_fibo import (
    BriaFiboAttention,
    BriaFiboAttnProcessor,
    BriaFiboSingleTransformerBlock,
    BriaFiboTransformer2DModel,
    BriaFiboTransformerBlock,
)
from diffusers.pipelines.bria_fibo import pipeline_bria_fibo_edit as stock
from torch import Tensor

from ..engine._diffusers import execution_device, through
from ..engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from ..engine.config import SpecEditConfig
from ..engine.fused import called
from ..engine.model import Pictures, Text
from ..engine.pipeline import Call, SpecEditMixin, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import Kept, MixedSequence, StepLayout
from ..sampling.grid import BLOCK, Grid
from ..sampling.layout import SequenceLayout
from .flux_kontext import (
    BLOCKS,
    Blocks,
    FluxKontextModel,
    FluxLayout,
    FusedFluxModel,
    SpecEditFluxAttnProcessor,
    SpecEditFluxKontextPipeline,
    _modulated,
)
from .flux_kontext import fused_forward as forward_of_flux
from .flux_kontext import replaced as replaced_of_flux
from .qwen_image_edit import FusedQwenCodecModel, QwenCodec

TOKEN = 16  # pixels a side


def replaced(
    transformer: BriaFiboTransformer2DModel,
) -> Iterable[tuple[torch.nn.Module, type | tuple[type, ...]]]:
    """Every module whose forward `fused_forward` stands for, with the class that it must have."""
    kinds = (BriaFiboTransformer2DModel, BriaFiboTransformerBlock, BriaFiboSingleTransformerBlock,
             (BriaFiboAttention, Attention))  # fmt: skip
    return replaced_of_flux(transformer, kinds)


def modulation(transformer: BriaFiboTransformer2DModel, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales, shifts and gates of all blocks, [R, sum of their widths], for timesteps [R] in [0, 1000]."""
    emb = F.silu(transformer.time_embed(timestep.to(dtype), dtype))
    return torch.cat([called(norm.linear, emb) for norm in _modulated(transformer)], dim=-1)


def fused_forward(
    transformer: BriaFiboTransformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: Tensor,
    sequence: MixedSequence,
    cache: list[Kept] | None = None,
    blocks: Blocks = BLOCKS,
    watch: tuple[int, list[Tensor]] | None = None,
) -> Tensor:
    """flux_kontext's, with the text's channels of each block. embeds: `FusedFiboModel.of_text`."""
    text, width = sequence.own[0], transformer.inner_dim // 2
    embeds, *captions = embeds.split([embeds.shape[-1] - width * len(transformer.caption_projection),
                                      *[width] * len(transformer.caption_projection)], dim=-1)  # fmt: skip

    def before(i: int, x: Tensor) -> None:
        if text:
            x[:, :text, width:] = captions[i]

    return forward_of_flux(transformer, tokens, embeds, modulation, sequence, cache, blocks, watch, before)


class SpecEditFiboSingleAttnProcessor(SpecEditAttnProcessor):
    """For BriaAttnProcessor in FIBO's single blocks; `specedit_layout` is the mixed sequence's."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: StepLayout | None = None,
    ) -> Tensor:
        if specedit_layout is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        layers = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers)
        return joint_attention(self, None, (attn.norm_q(q), attn.norm_k(k), v), specedit_layout)


class WanCodec(QwenCodec):
    """AutoencoderKLWan with lone frames, a mean and a deviation for each channel; a token is one latent pixel."""

    patch = 1

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        self.token = TOKEN
        self._brought = {}

    def features(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, c, h, w] of the decoder's conv_in, mid_block and first up block."""
        decoder = self.vae.decoder

        def decoded(x: Tensor) -> list[Tensor]:
            first = decoder.conv_in(x)
            middle = decoder.mid_block(first)
            # the first frame of a video is not doubled
            return [f[:, :, 0] for f in (first, middle, decoder.up_blocks[0](middle, first_chunk=True))]

        def run(x: Tensor) -> list[Tensor]:
            return through(decoder, decoded, self.vae.post_quant_conv(x))

        return through(self.vae, run, self.unscaled(latents))

    def fused(self) -> WanCodec:
        return self


@dataclass
class FiboText(Text):
    """embeds [B, T, E]. layers: of each block, [B, T, L]. mask [B, T], False: padding, or None where every word counts.
    text_ids [T, 3]."""

    PER_SAMPLE = ("embeds", "layers", "mask")

    layers: list[Tensor]
    mask: Tensor | None
    text_ids: Tensor


class FiboModel(FluxKontextModel):
    """BriaFiboTransformer2DModel with AutoencoderKLWan."""

    negative_first = True
    # of `joined`, which every step asks
    _joined: tuple[tuple[FiboText, ...], FiboText | None] = ((), None)

    def joined(self, texts: Sequence[FiboText]) -> FiboText | None:
        """Both branches, the negative one first: that batch is the stock pipeline's."""
        before, made = self._joined
        if len(texts) != 2:
            return None
        if len(before) != 2 or any(a is not b for a, b in zip(before, texts)):
            first, second = texts[::-1]
            masks = [x.embeds.new_ones(x.embeds.shape[:2], dtype=torch.bool) if x.mask is None else x.mask
                     for x in (first, second)]  # fmt: skip
            mask = None if first.mask is None and second.mask is None else torch.cat(masks)
            layers = [torch.cat(pair) for pair in zip(first.layers, second.layers)]
            made = FiboText(torch.cat([first.embeds, second.embeds]), layers, mask, first.text_ids)
            self._joined = tuple(texts), made
        return made

    def mixed_layout(
        self, text: FiboText, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> FluxLayout:
        return self._masked(text, super().mixed_layout(text, pictures, layout, key_bias, cached))

    def _masked(self, text: FiboText, made: FluxLayout) -> FluxLayout:
        """A layout in whose attention nothing sees the text's padding."""
        if text.mask is None:
            return made
        assert made.attention is not None
        sequence, (batch, length) = made.attention.sequence, text.embeds.shape[:2]
        bias = sequence.key_bias
        bias = sequence.cos.new_zeros(batch, sequence.cos.shape[1]) if bias is None else bias.clone()
        bias[:, :length].masked_fill_(~text.mask.to(bias.device), float("-inf"))
        return self._with_sequence(made, key_bias=bias)

    def velocity(self, text: FiboText, tokens: Tensor, conditioning: Tensor, layout: FluxLayout) -> Tensor:
        kwargs, start = dict(self.attention_kwargs), 0
        if layout.attention is not None:
            kwargs["specedit_layout"], start = layout.attention, layout.attention.start
        elif text.mask is not None:
            seen = text.mask.new_ones(tokens.shape[:2])
            kwargs["attention_mask"] = torch.cat([text.mask, seen], dim=1)[:, None, None, :]
        with with_layout(self.transformer, layout.attention):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype),
                encoder_hidden_states=text.embeds[:, start:],
                text_encoder_layers=[layer[:, start:] for layer in text.layers],
                txt_ids=text.text_ids[start:],
                img_ids=layout.ids,
                joint_attention_kwargs=kwargs,
                return_dict=False,
            )[0]


class FusedFiboModel(FusedQwenCodecModel, FusedFluxModel, FiboModel):
    """The same model through `fused_forward`, its steps and its autoencoder launched by a runner."""

    forward = staticmethod(fused_forward)
    # of `of_text`, which every step asks
    _of_text: tuple[FiboText, Tensor] | None = None

    def of_text(self, text: FiboText) -> Tensor:
        """The embeddings and, side by side with them, the channels that each block takes of it."""
        if self._of_text is None or self._of_text[0] is not text:
            self.runner.bring(self._own)
            with self._scaled():
                captions = (layer(x) for layer, x in zip(self.transformer.caption_projection, text.layers))
                self._of_text = text, torch.cat([text.embeds, *captions], dim=-1)
        return self._of_text[1]

    def dense_layout(self, text: FiboText, pictures: Pictures, grids: Sequence[Grid]) -> FluxLayout:
        return self._masked(text, super().dense_layout(text, pictures, grids))

    def timestep_conditioning(self, text: FiboText, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation of all blocks, [B, ...] for each timestep: it depends on nothing but the step."""
        self.runner.bring(self._own)
        with self._scaled():
            found = modulation(self.transformer, timesteps, text.embeds.dtype)
        return [row.expand(len(text.embeds), -1) for row in found.split(1)]


class SpecEditBriaFiboEditPipeline(SpecEditMixin, BriaFiboEditPipeline):
    """BriaFiboEditPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline. Weights keep their values and stay the layers' own
    parameters; on CUDA a runner other than "eager" makes those of q, k and v contiguous in memory at its first call,
    until `disable_specedit`. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs the stock pipeline's own call, untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited. The stock pipeline's own `mask`, which hides that part from the model, is refused.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many.
    image: a PIL picture or a list of them, seen by every prompt. The first is the one that is edited: the draft is
        compared with it, what does not change is taken from it, and its condition tokens are coarse outside the edit.
        The others are seen whole.
    height, width: as in the stock pipeline, rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; there
        16). Where that is not the first picture's own size (multiples of 16, a megapixel at most), the model sees it at
        its own size, all of it fine in mixed steps, and a copy at the output's size is what a draft is compared with
        and what stays outside the edit. `_auto_resize=False` takes the first picture's own size.
    latents: packed white noise on the fine grid, [B, N, C].
    guidance_scale: true guidance where over 1; both branches share one draft, one mask and one layout.
    timesteps, do_patching: refused.
    """

    FLASH_RUNNERS = ()
    TEXT = ("prompt",)
    TRUE_CFG = "guidance_scale"
    NEGATIVE = ""
    KWARGS = "joint_attention_kwargs"
    PIXELS = False
    EDITED = 1
    TEXT_TO_IMAGE = True

    def _size(self, call: Call) -> tuple[int, int]:
        """By the stock pipeline's rules, in whole blocks. Keeps `call.seen`, [(picture, its (height, width))]."""
        if not issubclass(self.CONFIG, SpecEditConfig):
            raise ValueError("pipe: FlashEdit does not support models whose tokens are single latent pixels")
        for name, instead in (("mask", "mask_image"), ("timesteps", "num_inference_steps")):
            if getattr(call, name) is not None:
                raise ValueError(f"{name}: expected None with SpecEdit, which takes {instead}")
        if call.do_patching:
            raise ValueError("do_patching: expected False with SpecEdit, got True")
        call.references = call.image if isinstance(call.image, list) else [call.image]
        if isinstance(call.prompt, dict):
            call.prompt = json.dumps(call.prompt)
        elif isinstance(call.prompt, list):
            call.prompt = [json.dumps(p) if isinstance(p, dict) else p for p in call.prompt]
        if call.generator is None and call.seed is not None:
            call.generator = torch.Generator(execution_device(self)).manual_seed(call.seed)
        sizes = [stock._vae_safe_dims(*picture.size) for picture in call.references]
        call.seen = [(picture, (height, width)) for picture, (width, height) in zip(call.references, sizes)]
        width, height = sizes[0]
        if call.height is not None and call.width is not None:
            width, height = call.width, call.height
        elif call._auto_resize and call.output_size != "source":
            ratio, fitting = width / height, stock.PREFERRED_RESOLUTION[1024 * 1024]
            width, height = min(fitting, key=lambda size: abs(size[0] / size[1] - ratio))
        multiple = TOKEN * BLOCK
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        def pixels_of(picture: PIL.Image.Image, size: tuple[int, int]) -> Tensor:
            return preprocess(self.image_processor, picture.convert("RGB"), *size, device)

        size = (call.height, call.width)
        seen = [pixels_of(*each) for each in call.seen]
        return seen[0] if call.seen[0][1] == size else pixels_of(call.seen[0][0], size), seen

    def _texts(self, call: Call, device: torch.device) -> dict[str, Any]:
        """Both branches, padded to one length by the stock method."""
        positive, negative, ids, mask, negative_mask, layers, negative_layers = self.encode_prompt(
            prompt=call.prompt,
            negative_prompt=call.negative_prompt,
            guidance_scale=call.guidance_scale,
            device=device,
            max_sequence_length=call.max_sequence_length,
            num_images_per_prompt=call.num_images_per_prompt,
            lora_scale=(call.joint_attention_kwargs or {}).get("scale"),
        )
        blocks = len(self.transformer.transformer_blocks) + len(self.transformer.single_transformer_blocks)

        def text(embeds: Tensor, layers: list[Tensor], mask: Tensor) -> FiboText:
            # the last layers, one for each block; the last one again where there are fewer
            layers = layers[-blocks:] + [layers[-1]] * (blocks - len(layers))
            return FiboText(embeds, layers, None if mask.bool().all() else mask.bool(), ids[0])

        call.true_cfg_scale = call.guidance_scale
        second = None if negative is None else text(negative, negative_layers, negative_mask)
        return {"positive": text(positive, layers, mask), "negative": second}

    def _model(self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]) -> FiboModel:
        parts = (self.transformer, self.vae, None, attention_kwargs)
        return FiboModel(*parts) if runner is None else FusedFiboModel(*parts, runner)

    _arrange = SpecEditFluxKontextPipeline._arrange


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: the guidance that is asked for, else the pipeline's."""
    options = {} if true_cfg_scale is None else {"guidance_scale": true_cfg_scale}
    return options | {"_auto_resize": False} if "resolution" in settings else options


register(
    Model(
        name="fibo",
        pipelines={BriaFiboEditPipeline: SpecEditBriaFiboEditPipeline},
        processors={
            BriaFiboAttnProcessor: SpecEditFluxAttnProcessor,
            BriaAttnProcessor: SpecEditFiboSingleAttnProcessor,
        },
        codecs={AutoencoderKLWan: WanCodec},
        replaced={BriaFiboTransformer2DModel: replaced},
        command=_command,
        several_pictures=("BriaFiboEditPipeline",),
    )
)
