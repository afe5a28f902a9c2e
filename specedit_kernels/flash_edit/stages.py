# SPDX-License-Identifier: Apache-2.0
"""The stages of FlashEdit (arXiv 2509.22244) on a transformer that sees its source as condition tokens, or not at all.

draft -> select -> invert -> source branch -> edit. Each is one step of the model. The paper's U-Net has self-attention
and cross-attention apart; here both are parts of one joint attention over [text | target | condition]. Without a
condition, as in the paper, the source enters by its noise and by its branch's keys and values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine import stages
from ..engine.model import EditModel, Text
from ..engine.sequence import TextWatch
from ..engine.stages import Run, Selection
from ..sampling import noise as algebra
from ..sampling.grid import PATCH, coarse_grid, from_blocks, pack, unpack
from ..sampling.layout import CHILDREN, SequenceLayout, build_layout, sequence_length
from .one_step import complete_noise, grid_of, predict_noise


@dataclass(frozen=True)
class FlashDraft:
    """change: fp32 [B, N], the draft's distance from the source over its mean, or None. mass: fp32 [B, blocks, T],
    attention of each block's token to each text token in the watched layer, or None."""

    change: Tensor | None
    mass: Tensor | None


def draft(
    run: Run, conditioning: Any, source_conditioning: Any, watched: torch.nn.Module | None,
    invert: Callable[[Tensor, Tensor], Tensor] | None = None, compare: bool = True,
) -> FlashDraft:  # fmt: skip
    """One step of the generator at 2x lower resolution a side: what changes, and what text the changes attend to.

    change: mean over channels of |prediction - source|, both at that resolution, divided by its mean over the picture.
    The source stands for the source branch's prediction, which is to be it. conditioning: the model's, of sigma 1;
    source_conditioning: that of the source's text, of a model that does not see its source.
    watched: the attention whose text is watched (`watched_module`), or None. invert: of a model that does not see its
    source: (clean latents, white noise) -> the noise that both predictions begin from, the source branch's too.
    compare: False where the change is not asked for.
    """
    grid = coarse_grid(run.grid)
    source = stages.source_at(run, grid)
    references = stages.references_at(run, 2, source)
    noise = algebra.pool_noise(run.noise)
    noise = noise if invert is None else invert(source, noise)
    tokens = pack(noise.to(run.source.dtype))
    grids = [grid, *((x.shape[-2] // 2, x.shape[-1] // 2) for x in references)]
    watch, count = None if watched is None else TextWatch(watched), tokens.shape[1]

    def layout_of(text: Text, watch: TextWatch | None) -> Any:
        if watch is None:
            return run.model.dense_layout(text, run.pictures, grids)
        return run.model.watched_layout(text, run.pictures, grids, watch)

    layout = layout_of(run.positive, watch)
    every = torch.cat([tokens, *(pack(x) for x in references)], dim=1)
    velocity = run.model.velocity(run.positive, every, conditioning, layout)
    run.record("draft", 1.0, [every.shape[1]] * run.batch)
    mass = None if watch is None or watch.mass is None else watch.mass[:, :count]
    if not compare:
        return FlashDraft(None, mass)
    prediction = tokens.float() - velocity[:, :count].float()
    against = pack(source).float()
    if invert is not None:
        # in the same arithmetic, so that equal texts differ in nothing
        text, layout = run.source_text, layout_of(run.source_text, None if watched is None else TextWatch(watched))
        found = run.model.velocity(text, every, source_conditioning, layout)
        against = tokens.float() - found[:, :count].float()
        run.record("draft", 1.0, [every.shape[1]] * run.batch)
    difference = (prediction - against).abs().mean(dim=2)
    change = difference / difference.mean(dim=1, keepdim=True).clamp(min=1e-12)
    return FlashDraft(from_blocks(change, run.grid), mass)


def watched_module(model: EditModel, layer: int | None) -> torch.nn.Module:
    """The attention of the block with that index, in the order of the model's blocks; None: the one at 3/8 of them."""
    attentions = model.attentions
    if layer is None:
        layer = 3 * len(attentions) // 8
    if not 0 <= layer < len(attentions):
        raise ValueError(f"layer: expected an index of one of {len(attentions)} blocks, got {layer}")
    return attentions[layer]


def key_tokens(mass: Tensor, edited: Tensor, ratio: float) -> Tensor:
    """The key semantic tokens of an instruction: bool [B, T].

    mass: fp32 [B, n, T]; edited: bool [B, n]. A token stands out by the mean attention mass that the edit region's
    queries give it beyond what the background's do; key ones stand out more than `ratio` times the mean over all T.
    """
    inside = edited[..., None].float()
    fore = (mass * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
    back = (mass * (1 - inside)).sum(dim=1) / (1 - inside).sum(dim=1).clamp(min=1)
    beyond = (fore - back).clamp(min=0)
    return beyond > ratio * beyond.mean(dim=1, keepdim=True)


def invert(run: Run, inverter: EditModel, text: Text, clean: Tensor, noise: Tensor) -> Tensor:
    """Noise of clean latents in one step of the inversion network (COSI), fp32, their shape [B, C, H, W]. noise: white,
    for what they cannot tell."""
    predicted_noise = predict_noise(inverter, text, clean)
    run.record("invert", 0.0, [math.prod(grid_of(clean))] * run.batch)
    return complete_noise(predicted_noise, noise).float()


def white_inside(run: Run, noise: Tensor, selection: Selection) -> Tensor:
    """The run's own white noise in the edit region, `noise` elsewhere: fp32 [B, C, H, W]."""
    return torch.where(stages.on_pixels(selection.edited, run.grid, PATCH), run.noise.float(), noise)


@dataclass(frozen=True)
class RegionFirst:
    """The whole full-resolution sequence with the edit region's slots first.

    The region is its target tokens, the condition tokens at their places, and all of pictures with another grid.
    layout: every block is fine; its fine_lengths are the region's. region: bool [B, slots]. counts: slots of the
    region, of each sample. reached: bool [B, slots], those that key text tokens reach. fine, blocks: target tokens, and
    blocks of them; table: rows [target noise | unused | source | unused | others], the rows of `layout`.
    """

    layout: SequenceLayout
    region: Tensor
    counts: tuple[int, ...]
    reached: Tensor
    fine: int
    blocks: int
    table: Tensor

    def rows(self, of_source: bool = False) -> Tensor:
        """Tokens of all slots [B, slots, 4C]; of_source: the source's in target slots, zeros in the others."""
        index = self.layout.index
        if of_source:
            index = torch.where(self.layout.target_slots(), index + self.fine + self.blocks, -1)
        return ops.gather_tokens(self.table, index, self.layout.capacity)


def region_first(run: Run, noise: Tensor, selection: Selection, reach: Tensor) -> RegionFirst:
    """Lay out `noise` [B, C, H, W] and the condition; reach: bool [B, N], where key text tokens reach."""
    pictures = run.pictures
    blocks, fine = math.prod(coarse_grid(run.grid)), math.prod(run.grid)
    others = [r.latents for r in run.references[1 if pictures.aligned else 0 :]]
    behind = sum(math.prod(grid) for _, grid in pictures.others)
    parts: dict[str, Any] = dict(condition=pictures.aligned, others=behind)
    _, capacity = sequence_length(blocks, run.grid, **parts)
    layout = build_layout(selection.order, torch.full_like(selection.count, blocks), run.grid, capacity, **parts)
    # a condition row is as far after its target row as the halves of the table are long
    half = fine + blocks
    place = torch.where(layout.index < fine, layout.index, layout.index - half).clamp(0, fine - 1).long()
    apart = layout.index >= 2 * half
    region, reached = (x.gather(1, place) | apart for x in (selection.edited, reach))
    order = (~region).int().argsort(dim=1, stable=True)
    index, region = layout.index.gather(1, order), region.gather(1, order)
    layout = replace(layout, index=index, targets=index < fine, fine_lengths=region.sum(dim=1).int())
    start, source = pack(noise.to(run.source.dtype)), pack(run.source)
    unused = start.new_zeros(run.batch, blocks, start.shape[2])
    table = torch.cat([start, unused, source, unused, *(pack(x) for x in others)], dim=1)
    halves = 2 if pictures.aligned else 1
    counts = tuple(halves * CHILDREN * n + behind for n in selection.counts)
    return RegionFirst(layout, region, counts, reached.gather(1, order), fine, blocks, table)


def one_step_edit(
    run: Run, conditioning: Any, source_conditioning: Any, source_text: Text, noise: Tensor, selection: Selection,
    reach: Tensor, key_text: Tensor | None, shield: bool,
) -> Tensor:  # fmt: skip
    """Clean latents [B, C, H, W] in one step from `noise`, fp32 of that shape. conditioning: the model's, of sigma 1;
    source_conditioning: that of the source's text, for the shield.

    key_text: bool [B, T], key semantic tokens, which only `reach`, bool [B, N], sees (SSCA); None: all see all.
    shield: BG-Shield. The source branch (source_text) runs first, whole, and leaves its keys and values; the edit
    computes text and edit region alone over these. The background's latents are the source's own, as in SpecEdit's
    locked finish, where the paper has the source branch's reconstruction of them.
    """
    model, text, sequence = run.model, run.positive, region_first(run, noise, selection, reach)
    tokens, layout = sequence.rows(), sequence.layout
    capacity = tokens.shape[1]
    text_visibility: tuple[Tensor | None, Tensor | None] = (None, None)
    if key_text is not None:
        text_visibility = sequence.reached.int(), torch.stack([~key_text, torch.ones_like(key_text)], dim=1)
    if shield:
        first = min(model.slots(max(sequence.counts)), capacity)
        branch, edit = model.shield_layouts(source_text, text, run.pictures, layout, first, *text_visibility)
        rebuilt = tokens - model.velocity(source_text, tokens, source_conditioning, branch)
        run.record("source", 1.0, [capacity] * run.batch)
        clean = sequence.rows(of_source=True)
        error = (rebuilt.float() - clean.float()).square() * layout.target_slots()[..., None]
        run.stats.source_error = error.sum(dim=(1, 2)) / (sequence.fine * error.shape[2])
        edited = tokens[:, :first] - model.velocity(text, tokens[:, :first], conditioning, edit)
        clean[:, :first] = torch.where(sequence.region[:, :first, None], edited, clean[:, :first])
        run.record("edit", 1.0, sequence.counts, keys=[capacity] * run.batch)
    else:
        edit = model.edit_layout(text, run.pictures, layout, *text_visibility)
        clean = tokens - model.velocity(text, tokens, conditioning, edit)
        run.record("edit", 1.0, [capacity] * run.batch)
    ops.scatter_tokens_(sequence.table, clean, layout.index)
    return unpack(sequence.table[:, : sequence.fine], run.grid)


def multi_step_edit(run: Run, source_text: Text, sigmas: list[float]) -> Tensor:
    """The baseline: Euler inversion under the source's text, then Euler editing, len(sigmas) - 1 steps each.

    sigmas: from 1 down to 0. Clean latents [B, C, H, W].
    """
    behind = [r.latents for r in run.references]
    branch = replace(run, positive=source_text, on_draft_step=lambda: None)
    noise, _ = stages.dense_steps(branch, run.source, sigmas[::-1], behind, "invert", main=False)
    if run.config.guidance > 1:
        run.negative, run.true_cfg_scale = source_text, run.config.guidance
    return stages.dense_steps(run, noise, sigmas, behind, "edit")[0]
