# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (FluxPipeline), a model that makes pictures from captions and does not see its source: for FlashEdit alone.

Transformer, autoencoder and text are FLUX.1-Kontext's. What is its own: a sequence is [text | target], with no picture
after it, so the source reaches an edit by its noise and by its branch's keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from ..engine.pipeline import Call, SpecEditMixin, picture_size
from ..engine.registry import Model, register
from ..sampling.grid import BLOCK, PATCH
from .flux_kontext import SpecEditFluxKontextPipeline, refuse_ip_adapter

MAX_AREA = 1024 * 1024  # pixels of the output where no size is given


class SpecEditFluxPipeline(SpecEditMixin, FluxPipeline):
    """FluxPipeline as FlashEdit's base: `FlashEditFluxPipeline` edits with it, SpecEdit itself does not serve it.

    prompt, prompt_2: the caption of the picture to be; source_prompt: that of the source.
    image: the source. A batch or list has one picture or as many as prompts; picture and prompt i give the images
        i * num_images_per_prompt and following. Without it the stock call runs.
    height, width: of the output; where one is left out, both are the source's, or at `max_area` pixels if it has more.
        Rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens).
    latents: packed white noise on the fine grid, [B, N, 4C].

    IP-Adapter is not supported.
    """

    ARGUMENTS = {"image": None, "max_area": MAX_AREA}
    TEXT = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")
    KWARGS = "joint_attention_kwargs"
    TEXT_TO_IMAGE = True
    PHOTOS = True
    SEES_SOURCE = False

    def _size(self, call: Call) -> tuple[int, int]:
        refuse_ip_adapter(call)
        height, width = call.height, call.width
        area = call.max_area
        if isinstance(area, bool) or not isinstance(area, (int, float)) or not area > 0:
            raise ValueError(f"max_area: expected a number of pixels above 0, got {area!r}")
        if height is None or width is None:
            height, width = picture_size(call.image)
            scale = min((area / (height * width)) ** 0.5, 1.0)
            height, width = round(height * scale), round(width * scale)
        multiple = self.vae_scale_factor * PATCH * BLOCK
        return max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        pixels, _ = SpecEditFluxKontextPipeline._pictures(self, call, device)
        return pixels, []

    _encode_text = SpecEditFluxKontextPipeline._encode_text
    _model = SpecEditFluxKontextPipeline._model
    _arrange = SpecEditFluxKontextPipeline._arrange


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's area in pixels, which small sources have too."""
    return {"max_area": settings["resolution"] ** 2} if "resolution" in settings else {}


register(
    Model(
        name="flux",
        pipelines={FluxPipeline: SpecEditFluxPipeline},
        processors={},  # FluxAttnProcessor, AutoencoderKL, FluxTransformer2DModel: flux_kontext's
        codecs={},
        command=_command,
    )
)
