# SPDX-License-Identifier: Apache-2.0
"""SpecEdit for FLUX.1-Kontext: a thin wrapper of diffusers' FluxKontextPipeline."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux_kontext import (
    PREFERRED_KONTEXT_RESOLUTIONS,
    calculate_shift,
    retrieve_timesteps,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import ops
from ..sampling import noise as algebra
from ..sampling.grid import BLOCK, PATCH, Grid, coarse_grid, draft_grid, pack, unpack
from ..sampling.schedule import stage_levels
from . import stages
from .attention import unwrap_processors, wrap_processors
from .config import SpecEditConfig
from .output import SpecEditPipelineOutput, SpecEditStats, StageClock
from .stages import Draft, Guidance, Run, Selection

logger = logging.getLogger("specedit_kernels")

STEPS_OF_PLAIN = 28  # FluxKontextPipeline's own default


class SpecEditFluxKontextPipeline(FluxKontextPipeline):
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

    _specedit_default: SpecEditConfig | None = None
    _specedit_stats: SpecEditStats | None = None

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
                num_inference_steps=STEPS_OF_PLAIN if num_inference_steps is None else num_inference_steps,
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
        if specedit is None or specedit is True:
            specedit = self._specedit_default or SpecEditConfig()
        if not isinstance(specedit, SpecEditConfig):
            raise TypeError(f"specedit: expected SpecEditConfig, None or a bool, got {type(specedit).__name__}")
        given = (
            ip_adapter_image, ip_adapter_image_embeds, negative_ip_adapter_image, negative_ip_adapter_image_embeds
        )  # fmt: skip
        if any(x is not None for x in given):
            raise ValueError("ip_adapter_image: IP-Adapter is not supported with SpecEdit")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if specedit.preserve == "pixels" and output_type == "latent":
            raise ValueError("output_type: expected pixels with preserve='pixels', got 'latent'")
        _check_supported(self)
        counts = specedit.step_counts(len(sigmas) if sigmas is not None else num_inference_steps)
        needs_draft = mask_image is None
        if needs_draft and specedit.draft == "coarse" and counts[0] == 0:
            raise ValueError(f"draft: 'coarse' needs at least one coarse step, or a mask_image; got stages {counts}")

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
        device = self._execution_device
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
        positive = Guidance(
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
            negative = Guidance(
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

        # source picture and noise
        image = self.image_processor.resize(image, height, width) if not isinstance(image, list) else image
        pixels = self.image_processor.preprocess(image, height, width).to(device)
        if pixels.shape[1] != 3:
            raise ValueError(f"image: expected pixels with 3 channels, got {pixels.shape[1]} channels")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected {batch} generators, one for each image, got {len(generator)}")

        def encode(at: Tensor) -> Tensor:
            return _per_image(self._encode_vae_image(image=at.to(dtype), generator=generator), "image", batch)

        source = encode(pixels)
        token = self.vae_scale_factor * PATCH
        grid = (height // token, width // token)
        noise = self._start_noise(latents, source.shape, grid, generator, device, dtype)
        clock.mark("encode")

        # the plain schedule of this size and step count; the stages share it out
        levels = self._plain_levels(sum(counts), math.prod(grid), sigmas)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32).expand(batch)
        nfe = sum(counts)
        self._num_timesteps = nfe
        separate = needs_draft and specedit.draft == "quarter"
        bar = self.progress_bar(total=nfe + (specedit.draft_steps if separate else 0))

        def on_step(index: int, timestep: Tensor, tokens: Tensor) -> Tensor:
            self._current_timestep = timestep
            if callback_on_step_end is not None:
                tensors = {"latents": tokens, "prompt_embeds": run.positive.embeds}
                wanted = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, index, timestep, wanted) or {}
                tokens = changed.pop("latents", tokens)
                run.positive.embeds = changed.pop("prompt_embeds", run.positive.embeds)
            bar.update()
            return tokens

        run = Run(
            transformer=self.transformer,
            vae=self.vae,
            config=specedit,
            grid=grid,
            source=source,
            pixels=pixels,
            noise=noise,
            positive=positive,
            negative=negative,
            true_cfg_scale=true_cfg_scale,
            guidance=guidance,
            attention_kwargs=self._joint_attention_kwargs,
            encode=encode,
            generator=generator,
            on_step=on_step,
            on_draft_step=bar.update,
            interrupted=lambda: self._interrupt,
            clock=clock,
        )
        run.stats.plain_step_flops = run.flops([2 * math.prod(grid)] * batch)
        user_mask = None if needs_draft else _per_image(_token_mask(mask_image, grid), "mask_image", batch)

        wrap_processors(self.transformer)
        with bar:
            clean, selection, scores = self._run(run, counts, levels, user_mask)
        run.stats.nfe = run.step
        self._current_timestep = None

        if output_type == "latent":
            images: Any = pack(clean)
        else:
            images = self._decode(run, clean, selection, output_type)
            clock.mark("decode")
        self.maybe_free_model_hooks()
        run.stats.seconds = clock.seconds()
        self._specedit_stats = run.stats
        if not return_dict:
            return (images,)
        mask = selection.edited.reshape(batch, *grid)
        scores = None if scores is None else scores.reshape(batch, *grid)
        return SpecEditPipelineOutput(images=images, mask=mask, scores=scores, stats=run.stats)

    def _run(
        self, run: Run, counts: tuple[int, int, int], levels: list[float], user_mask: Tensor | None
    ) -> tuple[Tensor, Selection, Tensor | None]:
        """The stages in order. Returns (clean latents [B, C, H, W], selection, scores [B, N] or None)."""
        config, clock = run.config, run.clock
        coarse_steps, mixed_steps, full_steps = counts
        first_full = user_mask is None and config.draft == "full_step"
        if first_full:
            # one full-resolution step takes the place of the coarse ones
            if coarse_steps + mixed_steps == 0:
                coarse_steps, full_steps = 1, full_steps - 1
            coarse_steps, mixed_steps = 1, coarse_steps + mixed_steps - 1
        if config.finish == "locked":
            mixed_steps, full_steps = mixed_steps + full_steps, 0
        plan = stage_levels(levels, coarse_steps, mixed_steps, full_steps)
        start = run.noise.to(run.source.dtype)

        scores = selection = None
        if user_mask is not None:
            selection = stages.select(run, user_mask.to(run.device).float(), 0.5, 0)
        elif config.draft == "quarter":
            draft_levels = self._plain_levels(config.draft_steps, math.prod(draft_grid(run.grid)), None)
            scores, selection = self._verify_select(run, stages.draft(run, draft_levels), "draft")
        if selection is not None and not any(selection.changed):
            return run.source, selection, scores

        # the first stage leaves `fine` at `level`, or `coarse` at its pooled level
        if first_full:
            fine, estimate = stages.dense_steps(run, start, levels[:2], run.source, "draft_step")
            scores, selection = self._verify_select(run, Draft(estimate, run.source), "draft_step")
        elif coarse_steps:
            small = stages.source_at(run, coarse_grid(run.grid))
            coarse = algebra.pool_noise(run.noise).to(start.dtype)
            coarse, estimate = stages.dense_steps(run, coarse, plan.coarse, small, "coarse")
            if selection is None:
                scores, selection = self._verify_select(run, Draft(estimate, small), "coarse")
            else:
                clock.mark("coarse")
        if not any(selection.changed):
            return run.source, selection, scores

        level = levels[coarse_steps]
        if first_full:
            pooled = algebra.pool_state(fine.float(), level)
        elif coarse_steps:
            pooled = coarse.float()
            fine = algebra.expand_state(pooled, plan.coarse[-1], run.noise).to(start.dtype)
        else:
            fine, pooled = start, algebra.pool_noise(run.noise)
        if all(selection.dense) or not mixed_steps:
            clean, _ = stages.dense_steps(run, fine, levels[coarse_steps:], run.source, "full")
            clock.mark("full")
        else:
            run.stats.backend = ops.backend_of("mixed_res_attn", run.device)[0]
            at = algebra.pooled_level(level)
            topped = algebra.top_up(pooled, at, level, run.fresh_noise(pooled.shape)).to(start.dtype)
            state = stages.expand(run, fine, topped, level, selection)
            clock.mark("expand")
            stages.mixed_steps(run, state, plan.mixed)
            clock.mark("mixed")
            if config.finish == "locked":
                clean = stages.finish_locked(run, state, selection)
            else:
                clean = stages.finish_full(run, state, plan.mixed[-1], plan.full, selection)
            clock.mark("finish")
        if not all(selection.changed):
            changed = torch.tensor(selection.changed, device=run.device)[:, None, None, None]
            clean = torch.where(changed, clean, run.source)
        return clean, selection, scores

    def _verify_select(self, run: Run, draft: Draft, stage: str) -> tuple[Tensor, Selection]:
        run.clock.mark(stage)
        scores = stages.verify(run, draft)
        run.clock.mark("verify")
        run.stats.threshold = run.config.resolved_threshold()
        return scores, stages.select(run, scores, run.stats.threshold, run.config.dilation)

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

    def _start_noise(self, latents, shape, grid: Grid, generator, device, dtype) -> Tensor:
        """White fine noise [B, C, H, W] in fp32: drawn as FluxKontextPipeline draws it, or unpacked from `latents`."""
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype).float()
        expected = (shape[0], math.prod(grid), shape[1] * PATCH * PATCH)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected {expected}, got {tuple(latents.shape)}")
        return unpack(latents.to(device=device, dtype=dtype), grid).float()

    def _plain_levels(self, steps: int, tokens: int, sigmas: list[float] | None) -> list[float]:
        """Noise levels of FluxKontextPipeline for that many steps and target tokens, with the final 0."""
        # a copy: the pipeline's own scheduler keeps its state
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        mu = calculate_shift(
            tokens,
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        return scheduler.sigmas.tolist()

    def _decode(self, run: Run, clean: Tensor, selection: Selection, output_type: str):
        """Pixels in the output type; where the source's own are kept, they are kept exactly."""
        keep = run.config.preserve == "pixels"
        untouched = [not c for c in selection.changed]
        pixels = _per_image(run.pixels.float(), "image", run.batch)
        if all(untouched):
            decoded = pixels
        else:
            latents = clean / self.vae.config.scaling_factor + self.vae.config.shift_factor
            decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        if not keep and not any(untouched):
            return self.image_processor.postprocess(decoded, output_type=output_type)
        alpha = torch.ones_like(pixels[:, :1])
        if keep:
            pixel = pixels.shape[-2] // run.grid[0]
            alpha = stages.edit_alpha(selection.edited, run.grid, pixel, run.config.feather)
        alpha = alpha * torch.tensor(selection.changed, device=run.device)[:, None, None, None]
        # 8-bit levels, fp32: that is what the pictures hold, and x / 255 * 2 - 1 brings no level past its neighbour
        source = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round()
        edit = (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255)
        if output_type == "pil":
            edit = edit.round()
        blend = torch.where(alpha == 0, source, torch.where(alpha == 1, edit, alpha * edit + (1 - alpha) * source))
        if output_type == "pil":
            array = blend.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            return [PIL.Image.fromarray(a) for a in array]
        blend = blend / 255
        return blend if output_type == "pt" else blend.permute(0, 2, 3, 1).cpu().numpy()


def _per_image(x: Tensor, name: str, batch: int) -> Tensor:
    """Repeat pictures so that each of `batch` outputs has its own: [n, ...] -> [batch, ...], picture-major."""
    if batch % x.shape[0]:
        raise ValueError(f"{name}: expected 1 or as many pictures as prompts, got {x.shape[0]} for {batch} images")
    return x.repeat_interleave(batch // x.shape[0], dim=0)


def _token_mask(mask: PipelineImageInput, grid: Grid) -> Tensor:
    """A user's mask -> bool [n, N] on the fine grid: a token with a pixel over one half is set."""
    masks = mask if isinstance(mask, list) else [mask]
    planes = []
    for m in masks:
        if isinstance(m, PIL.Image.Image):
            m = np.asarray(m.convert("L"), dtype=np.float32) / 255
        m = torch.as_tensor(m).float().cpu()
        if m.ndim == 4 and m.shape[1] == 1:
            m = m[:, 0]
        if m.ndim == 2:
            m = m[None]
        if m.ndim != 3:
            raise ValueError(f"mask_image: expected [H, W], [B, H, W] or [B, 1, H, W], got {tuple(m.shape)}")
        planes.append(F.adaptive_max_pool2d(m[:, None], grid))
    return (torch.cat(planes) > 0.5).reshape(-1, math.prod(grid))


def _check_supported(pipe: FluxKontextPipeline) -> None:
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(f"scheduler: SpecEdit supports FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
    for flag in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(flag, False):
            raise ValueError(f"scheduler: expected {flag}=False, got True")
    transformer = pipe.transformer
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "transformer: expected no cache (call disable_cache()): its tensors keep one length, ours change"
        )
    parallel = getattr(transformer, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError("transformer: context parallelism is not supported, its shards do not fit a mixed sequence")


class SpecEditHandle:
    """What `enable_specedit` gives: the pipeline, its default config, and the figures of the last run."""

    def __init__(self, pipe: SpecEditFluxKontextPipeline, config: SpecEditConfig):
        self.pipe = pipe
        self.config = config

    def stats(self) -> SpecEditStats | None:
        """Figures of the pipeline's last SpecEdit run, None before the first."""
        return self.pipe._specedit_stats

    def disable(self) -> None:
        """The same as `disable_specedit(pipe)`."""
        disable_specedit(self.pipe)


def enable_specedit(pipe: FluxKontextPipeline, config: SpecEditConfig | None = None) -> SpecEditHandle:
    """Turn a loaded pipeline into its SpecEdit one, in place; calls with an image use `config` from then on.

    The object, its components and weights stay: its class changes, and its attention processors are wrapped.
    Raises TypeError for a pipeline that is not supported.
    """
    if config is None:
        config = SpecEditConfig()
    if not isinstance(config, SpecEditConfig):
        raise TypeError(f"config: expected SpecEditConfig, got {type(config).__name__}")
    if type(pipe) not in (FluxKontextPipeline, SpecEditFluxKontextPipeline):
        raise TypeError(f"pipe: SpecEdit supports FluxKontextPipeline, got {type(pipe).__name__}")
    _check_supported(pipe)
    wrap_processors(pipe.transformer)
    pipe.__class__ = SpecEditFluxKontextPipeline
    pipe._specedit_default = config
    pipe._specedit_stats = None
    return SpecEditHandle(pipe, config)


def disable_specedit(pipe: FluxKontextPipeline) -> None:
    """Undo `enable_specedit`: FluxKontextPipeline's class and its own attention processors, the very objects.

    A pipeline without SpecEdit stays as it is. One made by SpecEditFluxKontextPipeline becomes a FluxKontextPipeline.
    """
    if type(pipe) is not SpecEditFluxKontextPipeline:
        return
    unwrap_processors(pipe.transformer)
    for name in ("_specedit_default", "_specedit_stats"):
        pipe.__dict__.pop(name, None)
    pipe.__class__ = FluxKontextPipeline
