# SPDX-License-Identifier: Apache-2.0
"""The order of the stages, for every caller that has a model's adapter: the pipelines and other hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import ops
from ..sampling import noise as algebra
from ..sampling.grid import coarse_grid
from ..sampling.schedule import stage_sigmas
from . import stages
from .stages import Draft, Run, Selection


def run_stages(
    run: Run,
    counts: tuple[int, int, int],
    sigmas: Sequence[float],
    user_mask: Tensor | None,
    draft_sigmas: Sequence[float] | None = None,
    verify: Callable[[Run, Draft, str], tuple[Tensor, Selection]] | None = None,
) -> tuple[Tensor, Selection, Tensor | None]:
    """The stages in order. Returns (clean latents [B, C, H, W], selection, scores [B, N] or None).

    counts: (coarse, mixed, full) steps. sigmas: those of the plain full-resolution run, with the final 0.
    user_mask: bool [B, N] on the fine grid, in place of a draft. draft_sigmas: those of a "quarter" draft.
    verify: what scores a draft and selects by it, `verify_select` where None.

    ValueError where there is neither a mask nor what the draft needs.
    """
    config, clock, verify = run.config, run.clock, verify or verify_select
    coarse_steps, mixed_steps, full_steps = counts
    first_full = user_mask is None and config.draft == "full_step"
    if first_full:
        # one full-resolution step takes the place of the coarse ones
        if coarse_steps + mixed_steps == 0:
            coarse_steps, full_steps = 1, full_steps - 1
        coarse_steps, mixed_steps = 1, coarse_steps + mixed_steps - 1
    if config.finish == "locked":
        mixed_steps, full_steps = mixed_steps + full_steps, 0
    plan = stage_sigmas(sigmas, coarse_steps, mixed_steps, full_steps)
    run.timesteps = [1000 * s for part in (plan.coarse, plan.mixed, plan.full) for s in part[:-1]]
    start = run.noise.to(run.source.dtype)
    full = [r.latents for r in run.references]

    scores = selection = None
    if user_mask is not None:
        selection = stages.select_given(run, user_mask)
    elif config.draft == "quarter":
        if draft_sigmas is None:
            raise ValueError("draft_sigmas: expected those of draft='quarter', got None")
        scores, selection = verify(run, stages.draft(run, draft_sigmas), "draft")
    if selection is not None and run.ends(selection):
        return run.source, selection, scores
    # coarse steps that are a draft alone: the main trajectory begins at noise, and needs none of them under a mask
    half = config.draft == "half" and not (selection is not None and all(selection.dense))
    if half:
        whole = stage_sigmas(sigmas, 0, coarse_steps + mixed_steps, full_steps)
        run.timesteps = [1000 * s for part in (whole.mixed, whole.full) for s in part[:-1]]

    # the first stage leaves `fine` at `sigma`, or `coarse` at its pooled sigma
    if first_full:
        fine, (estimate, _) = stages.draft_steps(run, start, sigmas[:2], full, "draft_step")
        scores, selection = verify(run, Draft(estimate, run.source), "draft_step")
    elif coarse_steps and not (half and selection is not None):
        stage = "draft" if half else "coarse"
        small = stages.source_at(run, coarse_grid(run.grid))
        coarse = algebra.pool_noise(run.noise).to(start.dtype)
        behind = stages.references_at(run, 2, small)
        coarse, (first, last) = stages.draft_steps(
            run, coarse, plan.coarse, behind, stage, main=not half, solver=config.solver,
            refresh=config.coarse_refresh, text_refresh=config.coarse_text_refresh,
        )  # fmt: skip
        if half:
            run.stats.draft_nfe = coarse_steps
        if selection is None:
            found = Draft(last, small, first if coarse_steps > 1 else None)
            scores, selection = verify(run, found, stage)
        else:
            clock.mark(stage)
    if selection is None:
        raise ValueError(f"counts: expected a coarse step for draft='coarse' without a mask, got {counts}")
    if run.ends(selection):
        return run.source, selection, scores

    if half and not all(selection.dense):
        coarse_steps, mixed_steps, plan = 0, coarse_steps + mixed_steps, whole
    sigma = sigmas[coarse_steps]
    if first_full:
        pooled = algebra.pool_state(fine.float(), sigma)
    elif coarse_steps:
        pooled = coarse.float()
        fine = algebra.expand_state(pooled, plan.coarse[-1], run.noise).to(start.dtype)
    else:
        fine, pooled = start, algebra.pool_noise(run.noise)
    if all(selection.dense) or not mixed_steps:
        run.timesteps[run.step :] = [1000 * s for s in sigmas[coarse_steps:-1]]
        clean, _ = stages.dense_steps(run, fine, sigmas[coarse_steps:], full, "full", solver=config.solver)
        clock.mark("full")
    else:
        run.stats.backend = ops.backend_of("mixed_res_attn", run.device)[0]
        at = algebra.pooled_sigma(sigma)
        topped = algebra.top_up(pooled, at, sigma, run.fresh_noise(pooled.shape)).to(start.dtype)
        state = stages.expand(run, fine, topped, sigma, selection)
        clock.mark("expand")
        stages.mixed_steps(run, state, plan.mixed)
        clock.mark("mixed")
        if config.finish == "locked":
            clean = stages.finish_locked(run, state, selection)
        else:
            clean = stages.finish_full(run, state, plan.mixed[-1], plan.full, selection)
        clock.mark("finish")
    return stages.keep_unchanged(run, clean, selection), selection, scores


def verify_select(run: Run, draft: Draft, stage: str) -> tuple[Tensor, Selection]:
    run.clock.mark(stage)
    scores = run.model.agreed(stages.verify(run, draft))
    run.clock.mark("verify")
    steps = 1 if draft.first is None else 2
    guidance = run.config.guidance_of_draft(steps, run.negative is not None)
    run.stats.threshold = run.config.resolved_threshold(run.model.thresholds, guidance)
    relative = run.config.resolved_relative()
    # one threshold for the batch
    scaled = scores / stages.threshold_scale(scores, relative, run.stats.threshold) if relative else scores
    return scores, stages.select(run, scaled, run.stats.threshold, run.config.dilation)
