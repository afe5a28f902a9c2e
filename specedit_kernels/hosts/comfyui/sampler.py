# SPDX-License-Identifier: Apache-2.0
"""The stages as a sampler of ComfyUI."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from specedit_kernels.engine import stages
from specedit_kernels.engine.config import SpecEditConfig
from specedit_kernels.engine.model import Text
from specedit_kernels.engine.output import SpecEditStats, StageClock, group_steps
from specedit_kernels.engine.run import run_stages
from specedit_kernels.engine.stages import Reference, Run
from specedit_kernels.images.masks import token_mask
from specedit_kernels.sampling.grid import BLOCK, PATCH, Grid

from .codec import HostCodec
from .model import HostModel, adapter_of

logger = logging.getLogger("specedit_kernels")

# The draft's noise shall not be the run's own, which the host draws from the seed itself.
FURTHER_NOISE = 0x5EED
# The scales of guidance that the host's guiders have.
GUIDANCE_SCALES = ("cfg", "cfg1", "cfg2")


class SpecEditSampler(comfy.samplers.Sampler):
    """A SAMPLER that runs the stages of SpecEdit with the model of the guider that calls it.

    config: a quality's values are those under guidance where the guider guides. Its locked or kept text is left out,
    since ComfyUI's models compute the text in each call; lock_text=True is refused, and so is a coarse_text_refresh
    over 1. draft_guidance is without effect: the guider calls the model for all of its branches.
    vae: the graph's. image: the picture to edit, [n, H, W, C] in [0, 1]. mask: [n, H, W] in [0, 1], over the whole
    picture, in place of a draft, or None: the latent's noise mask, where it has one. preserve: outside the edit region
    the latents are the source's at the end. result: of the last run, (mask bool [B, rows, columns], its figures).
    """

    def __init__(
        self, config: SpecEditConfig, vae: Any, image: Tensor, mask: Tensor | None = None, preserve: bool = False
    ):
        self.config = config
        self.vae = vae
        self.image = image
        self.mask = mask
        self.preserve = preserve
        self.result: tuple[Tensor, SpecEditStats] | None = None

    @torch.no_grad()
    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: Mapping[str, Any],
        callback: Callable[[int, Tensor, Tensor, int], None] | None, noise: Tensor,
        latent_image: Tensor | None = None, denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        """Clean latents of the noise's shape. model_wrap: the guider. noise: white, [B, C, h, w] or [B, C, 1, h, w].

        ValueError or TypeError, naming the input, for what SpecEdit cannot serve.
        """
        self.result = None
        falling = _checked_sigmas(sigmas)
        text: dict[str, Any] = dict(lock_text=False, coarse_text_refresh=1)
        given = replace(self.config, **{k: x for k, x in text.items() if getattr(self.config, k) is None})
        guided = _guides(model_wrap)
        config = given.resolved(guided)
        counts = config.step_counts(len(falling) - 1, sigmas_given=True)
        base, device = model_wrap.inner_model, noise.device
        kind = adapter_of(base.diffusion_model)
        if not isinstance(base.model_sampling, comfy.model_sampling.CONST):
            raise TypeError(f"model: expected a flow model's sampling, got {type(base.model_sampling).__name__}")
        if noise.ndim == 5 and noise.shape[2] != 1:
            raise ValueError(f"latent_image: expected one frame, got {noise.shape[2]}")
        conds = _checked(model_wrap.conds)
        white = (noise[:, :, 0] if noise.ndim == 5 else noise).float()
        batch, grid = len(white), _grid(white)
        codec = HostCodec(self.vae, device, base.process_latent_in, base.process_latent_out)

        options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
        seed = extra_args.get("seed") or 0

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            if codec.used:  # the VAE may have taken the transformer's place in the device's memory
                models = [model_wrap.model_patcher, *model_wrap.loaded_models]
                comfy.model_management.load_models_gpu(models, memory_required=memory)
                codec.used = False
            return model_wrap(x, sigma, model_options=options, seed=seed)

        seen, method = (conds["model_conds"].get(name) for name in ("ref_latents", "ref_latents_method"))
        seen = seen.cond
        shapes = {name: [shape] for name, shape in base.extra_conds_shapes(reference_latents=seen).items()}
        memory = base.memory_required([2 * len(noise), *noise.shape[1:]], cond_shapes=shapes)
        model = kind(base.diffusion_model, codec, predict, None if method is None else method.cond)
        model.thresholds = _thresholds(kind, guided)
        at = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        comfy.patcher_extension.add_wrapper_with_key(at, "specedit", model.wrapper, options, is_model_options=True)

        def encode(pixels: Tensor) -> Tensor:
            return _for_batch(codec.encode(pixels), batch, "image")

        pixels = self._pixels((grid[0] * codec.token, grid[1] * codec.token), device)
        latents = [_for_batch(_picture(x, device), batch, "ref_latents") for x in seen]
        aligned = latents[0].shape == white.shape
        source = latents[0] if aligned else encode(pixels)
        clock = StageClock(device)
        references = tuple(
            Reference(pixels, x) if aligned and i == 0 else Reference(codec.decode(x), x) for i, x in enumerate(latents)
        )
        clock.mark("encode")

        def on_start(timestep: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()

        def on_step(index: int, timestep: Tensor, tokens: Tensor) -> Tensor:
            if callback is not None:
                assert model.fine is not None
                seen = model._host(model.fine)
                callback(index, seen, seen, len(falling) - 1)
            return tokens

        run = Run(
            model=model,
            config=config,
            grid=grid,
            source=source,
            pixels=pixels,
            references=references,
            noise=white,
            positive=Text(conds["model_conds"]["c_crossattn"].cond),
            negative=None,  # the guider calls the model for all of its branches
            true_cfg_scale=1.0,
            encode=encode,
            generator=torch.Generator().manual_seed((seed + FURTHER_NOISE) % 2**63),
            on_start=on_start,
            on_step=on_step,
            on_draft_step=lambda: None,
            interrupted=lambda: False,
            clock=clock,
        )
        run.stats.config = config
        run.stats.plain_step_flops = run.flops([run.plain_tokens] * batch)
        run.stats.plain_tokens = run.plain_tokens
        model.fine = source if callback is not None else None
        clean, selection, _ = run_stages(run, counts, falling, self._user_mask(grid, batch, denoise_mask))
        if self.preserve:
            clean = torch.where(stages.on_pixels(selection.edited, grid, PATCH), clean, source)
        run.stats.nfe = run.step
        run.stats.seconds = clock.seconds()
        logger.info("%s", summary(run.stats))
        self.result = selection.edited.reshape(batch, *grid), run.stats
        return clean.reshape(noise.shape).to(noise.dtype)

    def _pixels(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """The picture to edit at the output's size, in [-1, 1], [n, 3, H, W]."""
        image = self.image[..., :3].movedim(-1, 1)
        if image.shape[-2:] != size:
            logger.info("image: brought from %s to %s pixels", tuple(image.shape[-2:]), size)
            image = comfy.utils.common_upscale(image, size[1], size[0], "lanczos", "disabled")
        return (image * 2 - 1).to(device, torch.float32)

    def _user_mask(self, grid: Grid, batch: int, denoise_mask: Tensor | None) -> Tensor | None:
        """A given mask as tokens, bool [B, N]. denoise_mask: the host's, [B, C, h, w] or [B, C, 1, h, w]."""
        mask, name = self.mask, "mask"
        if mask is None and denoise_mask is not None:
            mask, name = denoise_mask.amax(dim=1).flatten(0, -3), "noise_mask"
        return None if mask is None else _for_batch(token_mask(mask, grid, name), batch, name)


def _checked_sigmas(sigmas: Tensor) -> list[float]:
    found = [min(float(s), 1.0) for s in sigmas]
    if len(found) < 2 or found[-1] != 0:
        raise ValueError(f"sigmas: expected them to fall to 0, got {[round(s, 4) for s in found]}")
    if found[0] < 0.999:
        raise ValueError(f"sigmas: expected to begin at 1, pure noise (denoise 1.0), got {found[0]:.4g}")
    return found


def _grid(noise: Tensor) -> Grid:
    side = PATCH * BLOCK
    height, width = noise.shape[-2:]
    if height % side or width % side:
        raise ValueError(
            f"latent_image: expected sides in multiples of {8 * side} pixels, got {8 * width} x {8 * height}"
        )
    return height // PATCH, width // PATCH


def _checked(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Mapping[str, Any]:
    """The positive conditioning. ValueError for what does not fit a mixed-resolution sequence."""
    for name, several in conds.items():
        for cond in several:
            for key, what in (("control", "ControlNet"), ("area", "areas"), ("mask", "masks"), ("gligen", "GLIGEN")):
                if cond.get(key) is not None:
                    raise ValueError(f"{name}: {what} do not fit a mixed-resolution sequence")
            if "c_concat" in cond["model_conds"]:
                raise ValueError(f"{name}: a model with further input channels (Fill, Depth, Canny) is not served")
    positive = conds.get("positive") or []
    if len(positive) != 1:
        raise ValueError(f"positive: expected one conditioning, got {len(positive)}")
    if "ref_latents" not in positive[0]["model_conds"]:
        raise ValueError("positive: expected a reference latent (node ReferenceLatent), got none")
    for latents in positive[0]["model_conds"]["ref_latents"].cond:
        if latents.shape[-2] % PATCH or latents.shape[-1] % PATCH:
            raise ValueError(
                f"ref_latents: expected sides in multiples of {8 * PATCH} pixels, got"
                f" {8 * latents.shape[-1]} x {8 * latents.shape[-2]}"
            )
    return positive[0]


def _picture(latents: Tensor, device: torch.device) -> Tensor:
    return (latents[:, :, 0] if latents.ndim == 5 else latents).to(device, torch.float32)


def _for_batch(x: Tensor, batch: int, name: str) -> Tensor:
    if len(x) not in (1, batch):
        raise ValueError(f"{name}: expected 1 or as many pictures as latents, {batch}, got {len(x)}")
    return x if len(x) == batch else x.repeat(batch, *[1] * (x.ndim - 1))


def _guides(guider: Any) -> bool:
    """Whether a guider calls the model for more than its positive conditioning."""
    scales = (getattr(guider, name, 1.0) for name in GUIDANCE_SCALES)
    return "negative" in guider.conds and any(not math.isclose(scale, 1.0) for scale in scales)


def _thresholds(kind: type[HostModel], guided: bool) -> Mapping[tuple[str, str, str], Mapping[bool | str, float]]:
    """The model's own thresholds, of drafts with guidance or without."""
    return MappingProxyType({key: dict.fromkeys(own, own[guided]) for key, own in kind.calibrated().items()})


def summary(stats: SpecEditStats) -> str:
    """One line on a run."""
    steps = ", ".join(f"{count} {stage} of {tokens:.0f} tokens" for stage, tokens, count in group_steps(stats))
    edited = ", ".join(f"{share:.1%}" for share in stats.edited)
    times = stats.plain_flops / stats.flops if stats.flops else math.inf
    fallback = f", {stats.fallback}" if stats.fallback else ""
    cost = f"{times:.2f} x fewer FLOPs than {stats.nfe} plain steps"
    return f"SpecEdit: edited {edited}{fallback}; steps: {steps}; {cost}"
