# SPDX-License-Identifier: Apache-2.0
"""The stages of a SpecEdit run on a FLUX.1-Kontext model, under the paper's names (arXiv 2605.02152).

draft -> verify -> select -> expand -> mixed-resolution steps -> finish. The state that goes from stage to stage is a
latent image [B, C, H, W] at one noise level. Nothing in a step loop waits for the device; `select` reads a few counts
on the host, once, because the length of the mixed sequence has to be known there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import ops
from ..sampling import noise as algebra
from ..sampling.flops import transformer_flops
from ..sampling.grid import (
    PATCH,
    Grid,
    coarse_grid,
    draft_grid,
    from_blocks,
    pack,
    pool,
    to_blocks,
    token_positions,
    unpack,
)
from ..sampling.layout import (
    SequenceLayout,
    build_layout,
    sequence_length,
    table_key_bias,
    table_positions,
)
from .attention import AttentionLayout
from .config import SpecEditConfig
from .output import SpecEditStats, StageClock, StepRecord

logger = logging.getLogger("specedit_kernels")


@dataclass
class Guidance:
    """Text side of one guidance branch: embeddings [B, T, E], pooled [B, P], ids [T, 3]."""

    embeds: Tensor
    pooled: Tensor
    text_ids: Tensor


@dataclass
class Run:
    """All that the stages of one call share.

    source: clean latents of the source on the fine grid, [B, C, 2*rows, 2*columns]; pixels: its pictures in [-1, 1],
    [n, 3, H, W], n divides B; noise: the white fine noise of the run, fp32, the shape of `source`. encode: pixels
    [n, ...] -> clean latents [B, ...].
    on_step: called after each step of the main trajectory with (index, timestep, tokens); gives the next tokens.
    """

    transformer: torch.nn.Module
    vae: torch.nn.Module
    config: SpecEditConfig
    grid: Grid
    source: Tensor
    pixels: Tensor
    noise: Tensor
    positive: Guidance
    negative: Guidance | None
    true_cfg_scale: float
    guidance: Tensor | None
    attention_kwargs: dict[str, Any]
    encode: Callable[[Tensor], Tensor]
    generator: torch.Generator | list[torch.Generator] | None
    on_step: Callable[[int, Tensor, Tensor], Tensor]
    on_draft_step: Callable[[], None]
    interrupted: Callable[[], bool]
    clock: StageClock
    stats: SpecEditStats = field(default_factory=SpecEditStats)
    step: int = 0

    @property
    def batch(self) -> int:
        return self.source.shape[0]

    @property
    def device(self) -> torch.device:
        return self.source.device

    def fresh_noise(self, shape: Sequence[int]) -> Tensor:
        """White fp32 noise from the call's generators."""
        return randn_tensor(tuple(shape), generator=self.generator, device=self.device, dtype=torch.float32)

    def flops(self, tokens: Sequence[int]) -> int:
        """Useful FLOPs of one step over sequences with that many image tokens."""
        config = self.transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        blocks = config.num_layers + config.num_single_layers
        branches = [self.positive] + ([self.negative] if self.negative is not None else [])
        return sum(
            transformer_flops(b.embeds.shape[1] + n, b.embeds.shape[1] + n, dim, blocks)
            for n in tokens
            for b in branches
        )

    def velocity(
        self, tokens: Tensor, timestep: Tensor, ids: Tensor, layouts: dict[int, AttentionLayout] | None
    ) -> Tensor:
        """The model's velocity for image tokens [B, S, 4C] at a timestep in [0, 1000] (0-dim tensor)."""

        def branch(text: Guidance) -> Tensor:
            kwargs = dict(self.attention_kwargs)
            if layouts is not None:
                kwargs["specedit_layout"] = layouts[text.embeds.shape[1]]
            return self.transformer(
                hidden_states=tokens,
                timestep=timestep.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=self.guidance,
                pooled_projections=text.pooled,
                encoder_hidden_states=text.embeds,
                txt_ids=text.text_ids,
                img_ids=ids,
                joint_attention_kwargs=kwargs,
                return_dict=False,
            )[0]

        velocity = branch(self.positive)
        if self.negative is not None:
            negative = branch(self.negative)
            velocity = negative + self.true_cfg_scale * (velocity - negative)
        return velocity

    def record(self, stage: str, level: float, tokens: Sequence[int]) -> None:
        self.stats.steps.append(StepRecord(stage, level, tuple(tokens), self.flops(tokens)))


def euler(tokens: Tensor, velocity: Tensor, span: Tensor) -> Tensor:
    """One Euler step in fp32, back in the velocity's dtype, as FlowMatchEulerDiscreteScheduler does it."""
    return (tokens.to(torch.float32) + span * velocity).to(velocity.dtype)


def _device_levels(levels: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _dense_ids(grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ids [2N, 3] of target and condition tokens that lie on one grid."""
    place = token_positions(grid, device)
    target = torch.cat([torch.zeros_like(place[:, :1]), place], dim=1)
    condition = target.clone()
    condition[:, 0] = 1
    return torch.cat([target, condition]).to(dtype)


def dense_steps(
    run: Run, state: Tensor, levels: Sequence[float], condition: Tensor, stage: str, main: bool = True
) -> tuple[Tensor, Tensor]:
    """Plain steps on one grid: every token of `state` is computed, with `condition` (same shape) behind it.

    Returns (the state at the last level, the clean estimate x - s v at the last step's start); both as latent images.
    """
    grid = (state.shape[-2] // PATCH, state.shape[-1] // PATCH)
    tokens, behind = pack(state), pack(condition)
    ids = _dense_ids(grid, run.device, tokens.dtype)
    at = _device_levels(levels, run.device)
    count = tokens.shape[1]
    estimate = tokens
    for i in range(len(levels) - 1):
        if run.interrupted():
            continue
        timestep = at[i] * 1000
        velocity = run.velocity(torch.cat([tokens, behind], dim=1), timestep, ids, None)[:, :count]
        estimate = euler(tokens, velocity, -at[i])
        tokens = euler(tokens, velocity, at[i + 1] - at[i])
        run.record(stage, levels[i], [2 * count] * run.batch)
        if main:
            tokens = run.on_step(run.step, timestep, tokens)
            run.step += 1
        else:
            run.on_draft_step()
    return unpack(tokens, grid), unpack(estimate, grid)


@dataclass(frozen=True)
class Draft:
    """A draft: the clean latents it proposes, and the source's at the same resolution. [B, C, h, w] each."""

    proposal: Tensor
    source: Tensor


def source_at(run: Run, grid: Grid) -> Tensor:
    """Clean latents of the source brought to a smaller token grid: its pixels are resized, then encoded."""
    pixel = run.pixels.shape[-2] // run.grid[0]
    size = (grid[0] * pixel, grid[1] * pixel)
    small = F.interpolate(run.pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return run.encode(small)


def draft(run: Run, levels: Sequence[float]) -> Draft:
    """The paper's draft: a whole run at 4x lower resolution a side, condition at that resolution too.

    Its noise is that of the main trajectory, pooled twice, so that both see the same composition.
    """
    grid = draft_grid(run.grid)
    coarse = algebra.pool_noise(run.noise)
    needed = (grid[0] * PATCH * 2, grid[1] * PATCH * 2)
    if coarse.shape[-2:] != needed:
        # the fine grid is no multiple of 4: the draft's last row or column stands for less, and gets noise of its own
        padded = run.fresh_noise((*coarse.shape[:2], *needed))
        padded[..., : coarse.shape[-2], : coarse.shape[-1]] = coarse
        coarse = padded
    source = source_at(run, grid)
    start = algebra.pool_noise(coarse).to(run.source.dtype)
    proposal, _ = dense_steps(run, start, levels, source, "draft", main=False)
    run.stats.draft_nfe = len(levels) - 1
    return Draft(proposal, source)


def _bring_in(module: torch.nn.Module) -> None:
    """Offloading moves a model in when its forward is called; call this where only a part of it will be."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)


def decoder_features(vae: torch.nn.Module, latents: Tensor) -> list[Tensor]:
    """Feature maps of the decoder's conv_in, mid_block and first up block for scaled latents [B, C, H, W]."""
    _bring_in(vae)
    x = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    if vae.post_quant_conv is not None:
        x = vae.post_quant_conv(x)
    features = []
    for layer in (vae.decoder.conv_in, vae.decoder.mid_block, vae.decoder.up_blocks[0]):
        x = layer(x)
        features.append(x)
    return features


def discrepancy(
    vae: torch.nn.Module, transformer: torch.nn.Module | None, metric: str, proposal: Tensor, source: Tensor, grid: Grid
) -> Tensor:
    """Eq. 6 for one named metric: the mean over its feature maps of token_discrepancy. fp32 [B, N] in [0, 4].

    proposal, source: scaled clean latents on the fine grid. `transformer` is needed for "projected" alone.
    """
    if metric == "decoder":
        pairs = list(zip(decoder_features(vae, proposal), decoder_features(vae, source)))
    else:
        a, b = pack(proposal), pack(source)
        if metric == "projected":
            _bring_in(transformer)
            a, b = transformer.x_embedder(a), transformer.x_embedder(b)
        pairs = [(a, b)]
    scores = [ops.token_discrepancy(a, b, grid) for a, b in pairs]
    return scores[0] if len(scores) == 1 else torch.stack(scores).mean(dim=0)


def verify(run: Run, draft: Draft) -> Tensor:
    """Score each fine token by how far the draft departs from the source: fp32 [B, N].

    "matched" compares the draft with the source at the draft's resolution, both brought up by bilinear interpolation of
    their latents; a draft lacks fine detail, and "literal", against the full-resolution source, marks that lack too.
    """

    def bring_up(latents: Tensor) -> Tensor:
        size = run.source.shape[-2:]
        if latents.shape[-2:] == size:
            return latents
        return F.interpolate(latents.float(), size=size, mode="bilinear", align_corners=False).to(latents.dtype)

    reference = run.source if run.config.reference == "literal" else bring_up(draft.source)
    return discrepancy(run.vae, run.transformer, run.config.metric, bring_up(draft.proposal), reference, run.grid)


@dataclass(frozen=True)
class Selection:
    """Which blocks are recomputed at full resolution.

    edited: bool [B, N], the edit region on the fine grid, whole 2x2 blocks. active: bool [B, N], what is computed fine:
    the region and the uniform coverage. order, count: the blocks with the active ones first, and how many, on the
    device. counts: the same on the host. changed: whether a sample has an edit at all. dense: whether all its blocks
    are active.
    """

    edited: Tensor
    active: Tensor
    order: Tensor
    count: Tensor
    counts: tuple[int, ...]
    changed: tuple[bool, ...]
    dense: tuple[bool, ...]


def _control(run: Run, blocks: Tensor) -> Tensor:
    """As many blocks as `blocks` has in each sample, placed by another rule: the controls of the evaluation."""
    rows, columns = coarse_grid(run.grid)
    if run.config.selection == "random":
        key = run.fresh_noise(blocks.shape)
    else:
        # a rank-1 lattice (plastic number): every prefix of it covers the grid evenly
        place = token_positions((rows, columns), run.device)
        key = (place[:, 0] * 0.7548776662466927 + place[:, 1] * 0.5698402909980532).frac()[None].expand(blocks.shape)
    rank = key.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank < blocks.sum(dim=1, keepdim=True)


def _say_fallbacks(run: Run) -> None:
    for kind, text in (
        ("dense", "nearly everything changes: all tokens are computed at full resolution"),
        ("source", "nothing changes: the source is returned"),
    ):
        which = [i for i, k in enumerate(run.stats.fallbacks) if k == kind]
        if which:
            where = "" if run.batch == 1 else f" (images {', '.join(map(str, which))})"
            logger.warning("%s%s", text, where)


def select(run: Run, scores: Tensor, threshold: float, dilation: int) -> Selection:
    """Eq. 7, 9 and 10: tokens over the threshold, grown, rounded up to 2x2 blocks, and the uniform coverage.

    The one place where the host waits for the device: it reads how many blocks each sample has.
    """
    config, grid = run.config, run.grid
    blocks_grid = coarse_grid(grid)
    total = math.prod(blocks_grid)
    mask, _, _ = ops.select_tokens(scores, grid, threshold, dilation, 0)
    over = (~(scores <= threshold)).sum(dim=1)  # a NaN is selected, so it counts
    changed = over >= max(config.min_active, 1)
    blocks = to_blocks(mask, grid)
    if config.selection != "score":
        blocks = _control(run, blocks)
    dense = changed & (blocks.sum(dim=1) > config.max_active * total)
    blocks = (blocks | dense[:, None]) & changed[:, None]
    stride = config.uniform_stride
    active, order, count = ops.select_tokens(blocks.float(), blocks_grid, 0.5, 0, stride)
    host = torch.stack([count.long(), changed.long(), dense.long(), blocks.sum(dim=1)]).tolist()
    counts = tuple(host[0])
    run.stats.active = [c / total for c in counts]
    run.stats.edited = [c / total for c in host[3]]
    run.stats.fallbacks = ["source" if not c else ("dense" if d else None) for c, d in zip(host[1], host[2])]
    _say_fallbacks(run)
    run.clock.mark("select")
    return Selection(
        edited=from_blocks(blocks, grid),
        active=from_blocks(active, grid),
        order=order,
        count=count,
        counts=counts,
        changed=tuple(bool(c) for c in host[1]),
        dense=tuple(c == total for c in counts),
    )


@dataclass
class MixedState:
    """The sequence of the mixed-resolution steps, at one noise level.

    tokens: [B, capacity, 4C], target then condition slots. table: all rows, [B, rows, 4C], to scatter back into.
    free: bool [B, capacity, 1], slots that follow the model; the others follow `drift`, [B, capacity, 4C].
    """

    tokens: Tensor
    table: Tensor
    free: Tensor
    drift: Tensor
    layout: SequenceLayout
    attention: dict[int, AttentionLayout]
    lengths: tuple[int, ...]


def _attention_layouts(run: Run, layout: SequenceLayout, lengths: Sequence[int]) -> dict[int, AttentionLayout]:
    """Rotary tables, key bias and lengths of [text | slots], by length of the text."""
    b, capacity = run.batch, layout.capacity
    cos, sin = run.transformer.pos_embed(table_positions(run.grid, run.device))
    bias = table_key_bias(run.grid, run.device)

    def in_order(rows: Tensor) -> Tensor:
        return ops.gather_tokens(rows[None].expand(b, *rows.shape), layout.index, capacity)

    cos, sin, bias = in_order(cos), in_order(sin), in_order(bias[:, None])[..., 0]
    out = {}
    for text in {g.embeds.shape[1] for g in (run.positive, run.negative) if g is not None}:
        # text stands at the origin: rotated by nothing
        out[text] = AttentionLayout(
            cos=F.pad(cos, (0, 0, text, 0), value=1.0),
            sin=F.pad(sin, (0, 0, text, 0)),
            key_bias=F.pad(bias, (text, 0)) if run.config.key_bias else None,
            lengths=None if min(lengths) == capacity else layout.lengths + text,
        )
    return out


def expand(run: Run, fine: Tensor, coarse: Tensor, level: float, selection: Selection) -> MixedState:
    """Lay out the mixed sequence: active blocks from `fine`, the rest from `coarse`, both at noise `level`.

    fine: [B, C, 2*rows, 2*columns], the expanded state (eq. 8, `expand_state`). coarse: [B, C, rows, columns].
    Unless unselected="coarse" leaves them to the model (with the full finish), the coarse tokens are the source's,
    noised to the level, and follow it from here on.
    """
    config = run.config
    source_coarse = pool(run.source)
    drift = None
    if config.finish == "locked" or config.unselected == "source":
        noise = algebra.pool_noise(run.noise)
        coarse = algebra.noised(source_coarse, level, noise).to(run.source.dtype)
        drift = noise - source_coarse
    table = torch.cat([pack(x) for x in (fine, coarse, run.source, source_coarse)], dim=1)
    sizes = [sequence_length(c, run.grid, config.coarse_condition) for c in selection.counts]
    lengths = tuple(size for _, size in sizes)
    layout = build_layout(selection.order, selection.count, run.grid, max(lengths), config.coarse_condition)
    capacity = layout.capacity
    tokens = ops.gather_tokens(table, layout.index, capacity)
    if drift is None:
        free, moves = layout.target_slots(), torch.zeros_like(tokens)
    else:
        rows = torch.zeros_like(table)
        n = math.prod(run.grid)
        rows[:, n : n + n // 4] = pack(drift.to(table.dtype))
        free, moves = layout.fine_target_slots(), ops.gather_tokens(rows, layout.index, capacity)
    attention = _attention_layouts(run, layout, lengths)
    return MixedState(tokens, table, free[..., None], moves, layout, attention, lengths)


def mixed_steps(run: Run, state: MixedState, levels: Sequence[float]) -> None:
    """Steps on the mixed sequence, in place of `state.tokens`."""
    at = _device_levels(levels, run.device)
    # the model makes one rotary table for the whole batch from these; the processor takes each sample's from the layout
    ids = torch.zeros(state.layout.capacity, 3, device=run.device, dtype=state.tokens.dtype)
    for i in range(len(levels) - 1):
        if run.interrupted():
            continue
        timestep = at[i] * 1000
        velocity = run.velocity(state.tokens, timestep, ids, state.attention)
        velocity = torch.where(state.free, velocity, state.drift)
        state.tokens = euler(state.tokens, velocity, at[i + 1] - at[i])
        run.record("mixed", levels[i], state.lengths)
        state.tokens = run.on_step(run.step, timestep, state.tokens)
        run.step += 1


def _scatter_back(run: Run, state: MixedState) -> tuple[Tensor, Tensor]:
    """(fine, coarse) latent images of the target; rows outside the sequence hold their values from `expand`."""
    ops.scatter_tokens_(state.table, state.tokens, state.layout.index)
    n = math.prod(run.grid)
    fine, coarse = state.table[:, :n], state.table[:, n : n + n // 4]
    return unpack(fine, run.grid), unpack(coarse, coarse_grid(run.grid))


def _on_pixels(mask: Tensor, grid: Grid, times: int) -> Tensor:
    """Token mask bool [B, N] -> [B, 1, times*rows, times*columns]."""
    image = mask.reshape(-1, 1, *grid)
    return image.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


def finish_full(run: Run, state: MixedState, level: float, levels: Sequence[float], selection: Selection) -> Tensor:
    """The paper's finish: bring every token to full resolution, then plain steps. Clean latents [B, C, H, W].

    The fine tokens, at `level`, get fresh noise up to levels[0]. The others begin there from the coarse ones, expanded
    (unselected="coarse"), or from the fine source with the run's first noise: a white field of which the coarse tokens
    that followed the source held the pool, so that pooling this state gives exactly what they are at `level`.
    """
    fine, coarse = _scatter_back(run, state)
    to = levels[0]
    if run.config.unselected == "source":
        rest = algebra.noised(run.source, to, run.noise)
    else:
        rest = algebra.expand_state(coarse.float(), level, run.noise)
    topped = algebra.top_up(fine.float(), level, to, run.fresh_noise(fine.shape))
    mask = _on_pixels(selection.active, run.grid, PATCH)
    joined = torch.where(mask, topped, rest).to(run.source.dtype)
    return dense_steps(run, joined, levels, run.source, "full")[0]


def finish_locked(run: Run, state: MixedState, selection: Selection) -> Tensor:
    """The locked finish: clean latents of the edit region from the sequence, the source's everywhere else."""
    fine, _ = _scatter_back(run, state)
    return torch.where(_on_pixels(selection.edited, run.grid, PATCH), fine, run.source)


def edit_alpha(edited: Tensor, grid: Grid, pixel: int, feather: int) -> Tensor:
    """Weight of the edit at each pixel, fp32 [B, 1, H, W]: 1 in the region, exactly 0 from `feather` pixels off.

    edited: bool [B, N]. pixel: pixels a side of a fine token. The seam falls linearly, outside the region.
    """
    region = _on_pixels(edited, grid, pixel)
    mask = region.float()
    radius = feather // 2
    if radius == 0:
        return mask
    width = 2 * radius + 1
    grown = F.max_pool2d(mask, width, stride=1, padding=radius)
    padded = F.pad(grown, (radius,) * 4, mode="replicate")
    # a mean of ones need not be one to the last bit
    return F.avg_pool2d(padded, width, stride=1).masked_fill(region, 1.0)
