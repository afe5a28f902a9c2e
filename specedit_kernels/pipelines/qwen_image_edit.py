# SPDX-License-Identifier: Apache-2.0
"""SpecEdit for Qwen-Image-Edit: thin wrappers of diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from torch import Tensor

from ..sampling.grid import BLOCK, PATCH
from .config import RUNNERS, SpecEditConfig
from .output import SpecEditPipelineOutput, StageClock
from .pipeline import SpecEditMixin, per_image
from .qwen_model import FusedQwenModel, QwenImageEditModel, QwenText

logger = logging.getLogger("specedit_kernels")


class _SpecEditQwenMixin(SpecEditMixin):
    """The call of both Qwen pipelines; a class says which pictures the text encoder and the model see."""

    STEPS_OF_PLAIN = 50
    RUNNERS = RUNNERS

    def _seen(
        self, image: PIL.Image.Image | list[PIL.Image.Image], max_area: int | None
    ) -> tuple[Any, list[tuple[list[PIL.Image.Image], tuple[int, int]]], tuple[int, int]]:
        """(pictures for the text encoder, [(pictures of one reference, its (height, width))], default output size)."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 512,
        max_area: int | None = None,
        specedit: SpecEditConfig | bool | None = None,
        mask_image: PipelineImageInput | None = None,
    ) -> SpecEditPipelineOutput | tuple:
        if specedit is False:
            for name, value in (("mask_image", mask_image), ("max_area", max_area)):
                if value is not None:
                    raise ValueError(f"{name}: expected None where SpecEdit is off")
            return super().__call__(
                image=image,
                prompt=prompt,
                negative_prompt=negative_prompt,
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
                prompt_embeds_mask=prompt_embeds_mask,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_prompt_embeds_mask=negative_prompt_embeds_mask,
                output_type=output_type,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
            )
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        specedit, counts = self._resolve(specedit, steps, mask_image is None, output_type)
        images = image if isinstance(image, list) else [image]
        for i, picture in enumerate(images):
            if not isinstance(picture, PIL.Image.Image):
                raise TypeError(f"image: expected a PIL image or a list of them, got {type(picture).__name__} at {i}")
        if not images:
            raise ValueError("image: expected at least one picture, got an empty list")
        shown, references, default = self._seen(image, max_area)
        height, width = self._output_size(height, width, default)
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = dict(attention_kwargs or {})
        self._current_timestep = None
        self._interrupt = False
        runner = self._runner(specedit)
        device = self._device_of(runner)
        clock = StageClock(device)

        # text
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if true_cfg_scale > 1 and not has_negative:
            logger.warning("true_cfg_scale %g is without effect: no negative_prompt is given", true_cfg_scale)

        def encode_text(prompt, embeds, mask) -> QwenText:
            # one of each: encode_prompt itself repeats embeddings and masks in different orders
            embeds, mask = self.encode_prompt(
                image=shown,
                prompt=prompt,
                prompt_embeds=embeds,
                prompt_embeds_mask=mask,
                device=device,
                num_images_per_prompt=1,
                max_sequence_length=max_sequence_length,
            )
            repeated = [x if x is None else x.repeat_interleave(num_images_per_prompt, dim=0) for x in (embeds, mask)]
            return QwenText(*repeated)

        prompts = 1 if isinstance(prompt, str) else len(prompt_embeds if prompt is None else prompt)
        self._check_batch(prompts)
        positive = encode_text(prompt, prompt_embeds, prompt_embeds_mask)
        batch, dtype = positive.embeds.shape[0], positive.embeds.dtype
        negative = None
        if true_cfg_scale > 1 and has_negative:
            negative = encode_text(negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask)
            if negative.embeds.shape[0] != batch:
                got = negative.embeds.shape[0] // num_images_per_prompt
                raise ValueError(f"negative_prompt: expected as many as prompts, {prompts}, got {got}")

        # pictures, each at its own size; the edited ones at the output's too, where tokens of both are compared
        def pixels_of(pictures: list[PIL.Image.Image], size: tuple[int, int]) -> Tensor:
            found = self.image_processor.preprocess(pictures, *size).to(device)
            if found.shape[1] != 3:
                raise ValueError(f"image: expected pictures with 3 channels (RGB), got {found.shape[1]} channels")
            return found

        edited, own_size = references[0]
        pixels = pixels_of(edited, (height, width))
        behind = [pixels if own_size == (height, width) else pixels_of(edited, own_size)]
        behind += [pixels_of(*reference) for reference in references[1:]]

        guidance = None
        if self.transformer.config.guidance_embeds:
            if guidance_scale is None:
                raise ValueError("guidance_scale: expected a number for a guidance-distilled model, got None")
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32).expand(batch)
        parts = (self.transformer, self.vae, guidance, self._attention_kwargs)
        model = QwenImageEditModel(*parts) if runner is None else FusedQwenModel(*parts, runner)

        def encode(at: Tensor) -> Tensor:
            at = at.to(dtype)
            if runner is not None:
                return per_image(model.encode(at), "image", batch)
            return per_image(self._encode_vae_image(at[:, :, None], generator)[:, :, 0], "image", batch)

        return self._edit(
            model=model,
            config=specedit,
            counts=counts,
            positive=positive,
            negative=negative,
            true_cfg_scale=true_cfg_scale,
            pixels=pixels,
            references=behind,
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

    def _check_batch(self, prompts: int) -> None:
        """ValueError for a number of prompts that the pipeline does not take."""

    def size_of(self, image: PIL.Image.Image, max_area: int | None = None) -> tuple[int, int]:
        """(height, width) that a lone picture is brought to: its ratio, `max_area` pixels (1024 * 1024 if None)."""
        return self._seen(image, max_area)[2]

    def _output_size(self, height: int | None, width: int | None, default: tuple[int, int]) -> tuple[int, int]:
        """Output size by the diffusers pipeline's rules, in whole blocks."""
        wanted = (height or default[0], width or default[1])
        multiple = self.vae_scale_factor * PATCH * BLOCK
        fitted = tuple(max(side // multiple, 1) * multiple for side in wanted)
        if fitted != wanted:
            logger.info("height and width are adjusted from %dx%d to %dx%d", *wanted, *fitted)
        return fitted


def _size(module: Any, area: int, image: PIL.Image.Image) -> tuple[int, int]:
    """(height, width) that the diffusers pipeline brings a picture to for an area in pixels."""
    width, height = module.calculate_dimensions(area, image.width / image.height)[:2]
    return height, width


class SpecEditQwenImageEditPipeline(_SpecEditQwenMixin, QwenImageEditPipeline):
    """QwenImageEditPipeline with SpecEdit: an edit computes at full resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline; weights are never touched. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs QwenImageEditPipeline's own call,
        untouched.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited.
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
        size = _size(pipeline_qwenimage_edit, 1024 * 1024 if max_area is None else max_area, images[0])
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
        stays fine in mixed steps, because its tokens lie on another grid than the output's.
    prompt: one; `num_images_per_prompt` gives several images.
    """

    def _seen(self, image, max_area):
        images, module = image if isinstance(image, list) else [image], pipeline_qwenimage_edit_plus
        area = module.VAE_IMAGE_SIZE if max_area is None else max_area
        sizes = [_size(module, area, x) for x in images]
        shown = [self.image_processor.resize(x, *_size(module, module.CONDITION_IMAGE_SIZE, x)) for x in images]
        return shown, [([x], size) for x, size in zip(images, sizes)], sizes[-1]

    def _check_batch(self, prompts: int) -> None:
        if prompts > 1:
            raise ValueError(f"prompt: QwenImageEditPlusPipeline takes one prompt a call, got {prompts}")
