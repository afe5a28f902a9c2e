# SPDX-License-Identifier: Apache-2.0
"""LongCat-Image-Edit (LongCatImageEditPipeline): all that the engine cannot know of it.

Its transformer has FLUX.1's blocks, so the fused forward is flux_kontext's; the timestep is its only conditioning.
Position ids: the picture's kind (0 text, 1 target, 2 reference), then row and column after the text's tokens.
True guidance. The stock forward takes no attention kwargs, so a mixed sequence's layout is set on the processors.

Thresholds are not calibrated for it: drafts are judged by the decoder's features with those of the tiny FLUX editor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LongCatImageEditPipeline
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttention,
    LongCatImageAttnProcessor,
    LongCatImageSingleTransformerBlock,
    LongCatImageTransformer2DModel,
    LongCatImageTransformerBlock,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock
from torch import Tensor

from ..engine.attention import with_layout
from ..engine.fused import called
from ..engine.model import Text
from ..engine.pipeline import Call, SpecEditMixin, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import StepLayout
from ..sampling.grid import BLOCK, PATCH
from .flux_kontext import (
    FluxKontextModel,
    FluxLayout,
    FusedFluxModel,
    SpecEditFluxAttnProcessor,
    SpecEditFluxKontextPipeline,
    _modulated,
)
from .flux_kontext import replaced as replaced_of_flux

MAX_AREA = 1024 * 1024  # pixels of the picture and of the output


def modulation(transformer: LongCatImageTransformer2DModel, timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales, shifts and gates of all blocks, [R, sum of their widths], for timesteps [R] in [0, 1000]."""
    # the roundings of the pipeline and of the model's forward
    emb = F.silu(transformer.time_embed((timestep.to(dtype) / 1000) * 1000, dtype))
    return torch.cat([called(norm.linear, emb) for norm in _modulated(transformer)], dim=-1)


def replaced(
    transformer: LongCatImageTransformer2DModel,
) -> Iterable[tuple[torch.nn.Module, type | tuple[type, ...]]]:
    """Every module whose forward flux_kontext's `fused_forward` stands for, with the class that it must have."""
    kinds = (LongCatImageTransformer2DModel, LongCatImageTransformerBlock, LongCatImageSingleTransformerBlock,
             LongCatImageAttention)  # fmt: skip
    return replaced_of_flux(transformer, kinds)


class SpecEditLongCatAttnProcessor(SpecEditFluxAttnProcessor):
    """For LongCatImageAttnProcessor: FLUX.1's, with the layout that the call has set on it."""

    def __call__(
        self,
        attn: LongCatImageAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: StepLayout | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layout = self.layout if specedit_layout is None else specedit_layout
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, layout)


@dataclass
class LongCatText(Text):
    """embeds [B, T, E], text_ids fp32 [T, 3]. start: row and column of the pictures' first token, the positive text's
    length with both branches of guidance."""

    text_ids: Tensor
    start: int


class LongCatModel(FluxKontextModel):
    """LongCatImageTransformer2DModel with AutoencoderKL."""

    def ids(self, text: LongCatText, positions: Tensor) -> Tensor:
        return torch.cat([positions[:, :1] + 1, positions[:, 1:] + text.start], dim=1)

    def velocity(self, text: LongCatText, tokens: Tensor, conditioning: Tensor, layout: FluxLayout) -> Tensor:
        start = 0 if layout.attention is None else layout.attention.start
        with with_layout(self.transformer, layout.attention, whole=True):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=None,
                encoder_hidden_states=text.embeds[:, start:],
                txt_ids=text.text_ids[start:],
                img_ids=layout.ids,
                return_dict=False,
            )[0]


class FusedLongCatModel(FusedFluxModel, LongCatModel):
    """The same model through flux_kontext's `fused_forward`, its steps and its autoencoder launched by a runner."""

    def timestep_conditioning(self, text: LongCatText, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation of all blocks, [B, ...] for each timestep: it depends on nothing but the step."""
        found = modulation(self.transformer, timesteps, text.embeds.dtype)
        return [row.expand(text.embeds.shape[0], -1) for row in found.split(1)]


class SpecEditLongCatImageEditPipeline(SpecEditMixin, LongCatImageEditPipeline):
    """LongCatImageEditPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline. Weights keep their values and stay the layers' own
    parameters; on CUDA a runner other than "eager" makes those of q, k and v contiguous in memory at its first call,
    until `disable_specedit`. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs the stock pipeline's own call, untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many.
    max_area: pixels of the picture and of the output, in the picture's ratio; 1024 * 1024 if None, as in the stock
        pipeline. Sides are rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; there up to 16).
    image: one picture, of all images of the call.
    latents: packed white noise on the fine grid, [B, N, 4C].
    guidance_scale: true guidance against `negative_prompt` ("" if None) where over 1; both branches share one draft,
        one mask and one layout.
    joint_attention_kwargs: without effect, as in the stock pipeline.
    """

    ARGUMENTS = {"max_area": None}
    TEXT = ("prompt", "prompt_embeds")
    TRUE_CFG = "guidance_scale"
    NEGATIVE = ""
    PIXELS = False

    def _size(self, call: Call) -> tuple[int, int]:
        """By the stock pipeline's rules, in whole blocks."""
        if isinstance(call.image, list):
            if len(call.image) != 1:
                raise ValueError(f"image: LongCatImageEditPipeline takes one picture a call, got {len(call.image)}")
            [call.image] = call.image
        area = MAX_AREA if call.max_area is None else call.max_area
        width, height = stock.calculate_dimensions(area, call.image.width / call.image.height)
        # the picture that the stock pipeline works on, and the half of it that its text encoder sees
        call.image = self.image_processor.resize(call.image, height, width)
        call.shown = self.image_processor.resize(call.image, height // 2, width // 2)
        multiple = self.vae_scale_factor * PATCH * BLOCK
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    def _texts(self, call: Call, device: torch.device) -> dict[str, Any]:
        texts = super()._texts(call, device)
        if texts["negative"] is not None:
            texts["negative"].start = texts["positive"].start
        return texts

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> LongCatText:
        # the stock method counts prompts, of which there is one
        fields["prompt"] = "" if fields["prompt"] is None else fields["prompt"]
        embeds, ids = self.encode_prompt(**fields, image=call.shown, num_images_per_prompt=call.num_images_per_prompt)
        return LongCatText(embeds.to(device), ids.float().to(device), embeds.shape[1])

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        pixels = preprocess(self.image_processor, call.image, call.height, call.width, device)
        if pixels.shape[1] != 3:
            raise ValueError(f"image: expected pixels with 3 channels, got {pixels.shape[1]} channels")
        return pixels, [pixels]

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> LongCatModel:
        if runner is None:
            return LongCatModel(self.transformer, self.vae, None, {})
        return FusedLongCatModel(self.transformer, self.vae, None, {}, runner)

    _arrange = SpecEditFluxKontextPipeline._arrange


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's area in pixels; the guidance asked for, else the pipeline's."""
    options: dict[str, Any] = {} if true_cfg_scale is None else {"guidance_scale": true_cfg_scale}
    if "resolution" in settings:
        options["max_area"] = settings["resolution"] ** 2
    return options


register(
    Model(
        name="longcat",
        pipelines={LongCatImageEditPipeline: SpecEditLongCatImageEditPipeline},
        processors={LongCatImageAttnProcessor: SpecEditLongCatAttnProcessor},
        codecs={},  # AutoencoderKL: flux_kontext's
        replaced={LongCatImageTransformer2DModel: replaced},
        command=_command,
    )
)
