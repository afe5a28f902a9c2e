# SPDX-License-Identifier: Apache-2.0
"""What the SpecEdit pipelines share: checks, the order of the stages, noise, levels, pixels."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import ops
from ..sampling import noise as algebra
from ..sampling.grid import PATCH, Grid, coarse_grid, draft_grid, pack, unpack
from ..sampling.schedule import stage_levels
from . import stages
from .attention import wrap_processors
from .config import SpecEditConfig
from .model import EditModel, Text
from .output import SpecEditPipelineOutput, SpecEditStats, StageClock
from .runner import StepRunner, inspect
from .stages import Draft, Reference, Run, Selection

logger = logging.getLogger("specedit_kernels")


class SpecEditMixin:
    """The part of a SpecEdit pipeline that knows no model; a class has it before its diffusers pipeline.

    STEPS_OF_PLAIN: the diffusers pipeline's own default number of steps. RUNNERS: what its model can be run by. CONFIG:
    the class of a call's options.
    """

    STEPS_OF_PLAIN: int
    RUNNERS: tuple[str, ...] = ("eager",)
    CONFIG = SpecEditConfig

    _specedit_default: SpecEditConfig | None = None
    _specedit_stats: SpecEditStats | None = None
    _specedit_runner: StepRunner | None = None

    def _resolve(
        self, specedit: SpecEditConfig | bool | None, steps: int | None, needs_draft: bool, output_type: str | None
    ) -> tuple[SpecEditConfig, tuple[int, int, int]]:
        """The config of a call and its (coarse, mixed, full) steps, checked against each other and the pipeline."""
        if specedit is None or specedit is True:
            specedit = self._specedit_default or self.CONFIG()
        if not isinstance(specedit, self.CONFIG):
            expected = f"{self.CONFIG.__name__}, None or a bool"
            raise TypeError(f"specedit: expected {expected}, got {type(specedit).__name__}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if specedit.preserve == "pixels" and output_type == "latent":
            raise ValueError("output_type: expected pixels with preserve='pixels', got 'latent'")
        check_supported(self)
        counts = specedit.step_counts(steps)
        if needs_draft and specedit.draft == "coarse" and counts[0] == 0:
            raise ValueError(f"draft: 'coarse' needs at least one coarse step, or a mask_image; got stages {counts}")
        return specedit, counts

    def _runner(self, config: SpecEditConfig) -> StepRunner | None:
        """The runner of the config, None for "eager": where that is asked for, or no other is possible."""
        name = config.runner
        if name == "eager":
            return None
        reason, signature = f"{type(self).__name__} has no other", []
        if name in self.RUNNERS:
            reason, signature = inspect(name, self.transformer, self.vae)
            kept = self._specedit_runner
            arranged = kept is not None and kept.name == name and kept.watches(signature)
            if not (reason or arranged) and self._arrange():
                reason, signature = inspect(name, self.transformer, self.vae)
        if reason:
            _warn_once(f"runner={name!r}: steps run eagerly: {reason}")
            return None
        if self._specedit_runner is None or self._specedit_runner.name != name:
            self._free_runner()
            self._specedit_runner = StepRunner(name)
        self._specedit_runner.watch(signature)
        return self._specedit_runner

    def _arrange(self) -> bool:
        """Bring weights into the order in memory that a runner's steps like best. Whether any was moved."""
        return False

    def _device_of(self, runner: StepRunner | None) -> torch.device:
        """Where a call computes. A runner's modules have no hooks, which the pipeline's own answer looks for in every
        module: that takes longer than a launch of any stage."""
        return self._execution_device if runner is None else next(self.transformer.parameters()).device

    def _free_runner(self) -> None:
        if self._specedit_runner is not None:
            self._specedit_runner.clear()
            self._specedit_runner = None

    def _edit(
        self,
        model: EditModel,
        config: SpecEditConfig,
        counts: tuple[int, int, int],
        positive: Text,
        negative: Text | None,
        true_cfg_scale: float,
        pixels: Tensor,
        references: Sequence[Tensor],
        encode: Callable[[Tensor], Tensor],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        sigmas: list[float] | None,
        mask_image: PipelineImageInput | None,
        callback_on_step_end: Callable[..., dict] | None,
        callback_on_step_end_tensor_inputs: list[str],
        output_type: str | None,
        return_dict: bool,
        clock: StageClock,
        runner: StepRunner | None = None,
    ) -> SpecEditPipelineOutput | tuple:
        """A call from the point where text and pictures are ready.

        pixels: the edited pictures at the output's size, [n, 3, H, W]; references: pixels of every picture that the
        model sees, the edited ones first (the tensor `pixels` itself where they have the output's size). encode: pixels
        [n, ...] -> clean latents [B, ...]. runner: the model's, or None.
        """
        captures = runner.captures if runner else 0
        model.fp8_cache = config.kv_cache_dtype == "fp8"
        batch, dtype = positive.embeds.shape[0], positive.embeds.dtype
        device = pixels.device
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected {batch} generators, one for each image, got {len(generator)}")
        needs_draft = mask_image is None
        source = encode(pixels)
        seen = tuple(Reference(p, source if p is pixels else encode(p)) for p in references)
        grid = tuple(side // model.codec.token for side in pixels.shape[-2:])
        noise = self._start_noise(latents, source.shape, grid, generator, device, dtype)
        clock.mark("encode")

        # the plain schedule of this size and step count; the stages share it out
        levels = self._plain_levels(sum(counts), math.prod(grid), sigmas)
        nfe = sum(counts)
        self._num_timesteps = nfe
        separate = needs_draft and config.draft == "quarter"
        bar = self.progress_bar(total=nfe + (config.draft_steps if separate else 0))

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
            model=model,
            config=config,
            grid=grid,
            source=source,
            pixels=pixels,
            references=seen,
            noise=noise,
            positive=positive,
            negative=negative,
            true_cfg_scale=true_cfg_scale,
            encode=encode,
            generator=generator,
            on_step=on_step,
            on_draft_step=bar.update,
            interrupted=lambda: self._interrupt,
            clock=clock,
        )
        run.stats.plain_step_flops = run.flops([run.plain_tokens] * batch)
        run.stats.plain_tokens = run.plain_tokens
        user_mask = None if needs_draft else per_image(_token_mask(mask_image, grid), "mask_image", batch)

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
        if runner is None:  # which leaves modules with hooks alone
            self.maybe_free_model_hooks()
        run.stats.seconds = clock.seconds()
        if runner:
            run.stats.runner, run.stats.graph_bytes = runner.mode, runner.graph_bytes
            run.stats.captures = runner.captures - captures
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
        full = [r.latents for r in run.references]

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
            guided = config.draft_guidance
            fine, (estimate, _) = stages.dense_steps(run, start, levels[:2], full, "draft_step", guided=guided)
            scores, selection = self._verify_select(run, Draft(estimate, run.source), "draft_step")
        elif coarse_steps:
            small = stages.source_at(run, coarse_grid(run.grid))
            coarse = algebra.pool_noise(run.noise).to(start.dtype)
            behind = stages.references_at(run, 2, small)
            coarse, (first, last) = stages.dense_steps(
                run, coarse, plan.coarse, behind, "coarse", guided=config.draft_guidance
            )
            if selection is None:
                found = Draft(last, small, first if coarse_steps > 1 else None)
                scores, selection = self._verify_select(run, found, "coarse")
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
            clean, _ = stages.dense_steps(run, fine, levels[coarse_steps:], full, "full")
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
        return stages.keep_unchanged(run, clean, selection), selection, scores

    def _verify_select(self, run: Run, draft: Draft, stage: str) -> tuple[Tensor, Selection]:
        run.clock.mark(stage)
        scores = stages.verify(run, draft)
        run.clock.mark("verify")
        guided = run.negative is not None and run.config.draft_guidance
        run.stats.threshold = run.config.resolved_threshold(run.model.thresholds, guided)
        relative = run.config.resolved_relative()
        # one threshold for the batch
        scaled = scores / stages.threshold_scale(scores, relative) if relative else scores
        return scores, stages.select(run, scaled, run.stats.threshold, run.config.dilation)

    def _start_noise(self, latents, shape, grid: Grid, generator, device, dtype) -> Tensor:
        """White fine noise [B, C, H, W] in fp32: drawn as the plain pipeline draws it, or unpacked from `latents`."""
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype).float()
        expected = (shape[0], math.prod(grid), shape[1] * PATCH * PATCH)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected {expected}, got {tuple(latents.shape)}")
        return unpack(latents.to(device=device, dtype=dtype), grid).float()

    def _plain_levels(self, steps: int, tokens: int, sigmas: list[float] | None) -> list[float]:
        """Noise levels of the plain pipeline for that many steps and target tokens, with the final 0."""
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
        with np.errstate(invalid="ignore"):
            retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        levels = scheduler.sigmas.tolist()
        # the one step of a schedule with a terminal level is 0 / 0 to the scheduler; it begins with noise alone
        return [1.0, 0.0] if len(levels) == 2 and math.isnan(levels[0]) else levels

    def _decode(self, run: Run, clean: Tensor, selection: Selection, output_type: str):
        """Pixels in the output type; where the source's own are kept, they are kept exactly."""
        keep = run.config.preserve == "pixels"
        untouched = [not c for c in selection.changed]
        pixels = per_image(run.pixels.float(), "image", run.batch)
        if all(untouched):
            decoded = pixels
        else:
            decoded = run.model.decode(clean)
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


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def pixels_of(pictures: Sequence[PIL.Image.Image], device: torch.device) -> Tensor:
    """RGB pictures of one size as pixels in [-1, 1], fp32 [n, 3, H, W]: to the last bit those of VaeImageProcessor.

    They go to the device as bytes and become numbers there: the host would take longer than the device for a step.
    """
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(device)
    # a tensor: a division by a number multiplies by its reciprocal
    return 2.0 * (levels.permute(0, 3, 1, 2).float() / torch.full((), 255.0, device=device)) - 1.0


def preprocess(
    processor: VaeImageProcessor, image: PipelineImageInput, height: int, width: int, device: torch.device
) -> Tensor:
    """processor.preprocess(image, height, width) on a device."""
    pictures = image if isinstance(image, list) else [image]
    config = processor.config
    usual = config.do_resize and config.do_normalize and not (config.do_binarize or config.do_convert_grayscale)
    rgb = all(isinstance(picture, PIL.Image.Image) and picture.mode == "RGB" for picture in pictures)
    if device.type == "cpu" or type(processor) is not VaeImageProcessor or not usual or not rgb:
        return processor.preprocess(image, height, width).to(device)
    size = processor.get_default_height_width(pictures[0], height, width)
    return pixels_of([processor.resize(picture, *size) for picture in pictures], device)


def per_image(x: Tensor, name: str, batch: int) -> Tensor:
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


def check_supported(pipe: DiffusionPipeline) -> None:
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(f"scheduler: SpecEdit supports FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
    for flag in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(flag, False):
            raise ValueError(f"scheduler: expected {flag}=False, got True")
    transformer = pipe.transformer
    for flag in ("use_layer3d_rope", "use_additional_t_cond"):
        if transformer.config.get(flag, False):
            raise ValueError(f"transformer: expected {flag}=False, got True")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "transformer: expected no cache (call disable_cache()): its tensors keep one length, ours change"
        )
    parallel = getattr(transformer, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError("transformer: context parallelism is not supported, its shards do not fit a mixed sequence")
