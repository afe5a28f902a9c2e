# SPDX-License-Identifier: Apache-2.0
"""SpecEdit for FLUX.1-Kontext: a thin wrapper of diffusers' FluxKontextPipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from ..sampling.grid import BLOCK, PATCH
from .config import RUNNERS, SpecEditConfig
from .flux_fused import join_projections_
from .flux_model import FluxKontextModel, FluxText, FusedFluxModel
from .output import SpecEditPipelineOutput, StageClock
from .pipeline import SpecEditMixin, per_image, preprocess
from .vae import in_few_launches

logger = logging.getLogger("specedit_kernels")


class SpecEditFluxKontextPipeline(SpecEditMixin, FluxKontextPipeline):
    """FluxKontextPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline; weights are never touched. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs FluxKontextPipeline's own call, untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many.
    height, width: the ratio of these, at `max_area` pixels, as in FluxKontextPipeline; where left out, the source's.
        Sizes are rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; FluxKontextPipeline has 16), and
        the source is brought to the size of the output, because tokens of both are compared at one place. A draft at 4x
        lower resolution a side has ceil(side / 64) tokens.
    several pictures: `image` may be a batch or list with one picture or as many as prompts;
        picture and prompt i give the images i * num_images_per_prompt and following.
    latents: packed white noise on the fine grid, [B, N, 4C].
    callback_on_step_end: `latents` holds the packed tokens of the step at hand: coarse grid, mixed sequence
        (target, then condition slots), or fine grid.

    With no image given, or `specedit=False`, the stock call runs. IP-Adapter is not supported.
    """

    STEPS_OF_PLAIN = 28
    RUNNERS = RUNNERS

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput | None = None,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 512,
        max_area: int = 1024**2,
        _auto_resize: bool = True,
        specedit: SpecEditConfig | bool | None = None,
        mask_image: PipelineImageInput | None = None,
    ) -> SpecEditPipelineOutput | tuple:
        if specedit is False or image is None:
            if mask_image is not None:
                raise ValueError("mask_image: expected None where SpecEdit is off or no image is given")
            return super().__call__(
                image=image,
                prompt=prompt,
                prompt_2=prompt_2,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                true_cfg_scale=true_cfg_scale,
                height=height,
                width=width,
                num_inference_steps=self.STEPS_OF_PLAIN if num_inference_steps is None else num_inference_steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                ip_adapter_image=ip_adapter_image,
                ip_adapter_image_embeds=ip_adapter_image_embeds,
                negative_ip_adapter_image=negative_ip_adapter_image,
                negative_ip_adapter_image_embeds=negative_ip_adapter_image_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
                output_type=output_type,
                return_dict=return_dict,
                joint_attention_kwargs=joint_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                max_area=max_area,
                _auto_resize=_auto_resize,
            )
        given = (
            ip_adapter_image, ip_adapter_image_embeds, negative_ip_adapter_image, negative_ip_adapter_image_embeds
        )  # fmt: skip
        if any(x is not None for x in given):
            raise ValueError("ip_adapter_image: IP-Adapter is not supported with SpecEdit")
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        specedit, counts = self._resolve(specedit, steps, mask_image is None, output_type)
        height, width = self._output_size(image, height, width, max_area, _auto_resize)
        self.check_inputs(
            prompt,
            prompt_2,
            height,
            width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._guidance_scale = guidance_scale
        self._joint_attention_kwargs = dict(joint_attention_kwargs or {})
        self._current_timestep = None
        self._interrupt = False
        runner = self._runner(specedit)
        device = self._device_of(runner)
        clock = StageClock(device)

        # text
        has_negative = negative_prompt is not None or (
            negative_prompt_embeds is not None and negative_pooled_prompt_embeds is not None
        )
        text_options = dict(
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            lora_scale=self._joint_attention_kwargs.get("scale"),
        )
        positive = FluxText(
            *self.encode_prompt(
                prompt=prompt,
                prompt_2=prompt_2,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                **text_options,
            )
        )
        negative = None
        if true_cfg_scale > 1 and has_negative:
            negative = FluxText(
                *self.encode_prompt(
                    prompt=negative_prompt,
                    prompt_2=negative_prompt_2,
                    prompt_embeds=negative_prompt_embeds,
                    pooled_prompt_embeds=negative_pooled_prompt_embeds,
                    **text_options,
                )
            )
        batch = positive.embeds.shape[0]
        dtype = positive.embeds.dtype

        # source picture
        image = self.image_processor.resize(image, height, width) if not isinstance(image, list) else image
        pixels = preprocess(self.image_processor, image, height, width, device)
        if pixels.shape[1] != 3:
            raise ValueError(f"image: expected pixels with 3 channels, got {pixels.shape[1]} channels")

        def encode_whole(pixels: Tensor) -> Tensor:
            return self._encode_vae_image(image=pixels, generator=generator)

        def encode(at: Tensor) -> Tensor:
            at = at.to(dtype)
            if runner is None:
                return per_image(encode_whole(at), "image", batch)

            def run(pixels: Tensor) -> Tensor:
                return in_few_launches(self.vae, encode_whole, pixels)

            tag = ("encode", isinstance(generator, list), self.vae.use_slicing, self.vae.use_tiling)
            return per_image(runner(tag, run, {"pixels": at}), "image", batch)

        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32).expand(batch)
        parts = (self.transformer, self.vae, guidance, self._joint_attention_kwargs)
        return self._edit(
            model=FluxKontextModel(*parts) if runner is None else FusedFluxModel(*parts, runner),
            config=specedit,
            counts=counts,
            positive=positive,
            negative=negative,
            true_cfg_scale=true_cfg_scale,
            pixels=pixels,
            references=[pixels],
            encode=encode,
            generator=generator,
            latents=latents,
            sigmas=sigmas,
            mask_image=mask_image,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            output_type=output_type,
            return_dict=return_dict,
            clock=clock,
            runner=runner,
        )

    def _arrange(self) -> bool:
        # elsewhere nothing is gained, and weights that are a file's own pages would be copied
        moved = self.transformer.device.type == "cuda" and join_projections_(self.transformer)
        if moved:
            torch.cuda.empty_cache()  # the former places are too small for the new ones
        return moved

    def _output_size(
        self, image: PipelineImageInput, height: int | None, width: int | None, max_area: int, auto_resize: bool
    ) -> tuple[int, int]:
        """Output size by FluxKontextPipeline's rules, in whole blocks; the source's ratio where none is given."""
        first = image[0] if isinstance(image, list) else image
        if isinstance(first, (torch.Tensor, np.ndarray)) and first.ndim == 3:
            first = first[None]
        rows, columns = self.image_processor.get_default_height_width(first)
        if height is None and width is None:
            height, width = rows, columns
            if auto_resize:
                ratio = columns / rows
                _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        ratio = width / height
        multiple = self.vae_scale_factor * PATCH * BLOCK
        fitted = [round((max_area / ratio) ** 0.5), round((max_area * ratio) ** 0.5)]
        fitted = [max(side // multiple, 1) * multiple for side in fitted]
        if fitted != [height, width]:
            logger.info("height and width are adjusted from %dx%d to %dx%d", height, width, *fitted)
        return fitted[0], fitted[1]
