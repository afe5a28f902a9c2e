# SPDX-License-Identifier: Apache-2.0
"""The stages of a SpecEdit run on any model that has an adapter, under the paper's names (arXiv 2605.02152).

draft -> verify -> select -> expand -> mixed-resolution steps -> finish. The state that goes from stage to stage is a
latent image [B, C, H, W] at one sigma. Nothing in a step loop waits for the device; `select` reads a few counts
on the host, once, of what a draft found, because the length of the mixed sequence has to be known there.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import ops
from ..sampling import noise as algebra
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
from ..sampling.layout import CHILDREN, SequenceLayout, build_layout, picture_rows, sequence_length, whole_layout
from ..sampling.solver import Solver, euler
from .config import BRACKET, LAST
from .model import EditModel, Pictures, Text, version_of
from .output import SpecEditStats, StageClock, StepRecord
from .parallel import of_each

logger = logging.getLogger("specedit_kernels")


@dataclass(frozen=True)
class Reference:
    """A picture that the model sees as clean condition tokens.

    pixels: in [-1, 1], [n, 3, h, w], n divides the batch; latents: its clean ones, [B, C, patch*rows, patch*columns].
    """

    pixels: Tensor
    latents: Tensor
    patch: int = PATCH

    @property
    def grid(self) -> Grid:
        return self.latents.shape[-2] // self.patch, self.latents.shape[-1] // self.patch


@dataclass
class Run:
    """All that the stages of one call share.

    source: clean latents of the edited picture on the fine grid, [B, C, patch*rows, patch*columns]; pixels: its
    pictures in [-1, 1], [n, 3, H, W], n divides B; noise: the white fine noise of the run, fp32, the shape of `source`.
    references: the pictures after the target in the model's sequence, the edited one first; where that has the
    target's grid its latents are `source`. encode: pixels [n, ...] -> clean latents [B, ...].
    source_text: of a method that runs the source under a text of its own (FlashEdit), or None.
    joined: how the user's mask joins the draft's region, "limit" or "add", and its tokens, bool [B, N]; or None.
    preview: the run ends when its region is known.
    start: clean latents that a run with the locked finish begins from and keeps where nothing is selected, the shape of
    `source`; None: the source's.
    on_start: called before each step of the main trajectory with its timestep; on_step: after it, with (index,
    timestep, tokens); gives the next tokens. timesteps: of all steps of the main trajectory, as far as known.
    """

    model: EditModel
    config: Any  # the method's EditConfig
    grid: Grid
    source: Tensor
    pixels: Tensor
    references: tuple[Reference, ...]
    noise: Tensor
    positive: Text
    negative: Text | None
    true_cfg_scale: float
    encode: Callable[[Tensor], Tensor]
    generator: torch.Generator | list[torch.Generator] | None
    on_start: Callable[[Tensor], None]
    on_step: Callable[[int, Tensor, Tensor], Tensor]
    on_draft_step: Callable[[], None]
    interrupted: Callable[[], bool]
    clock: StageClock
    source_text: Any = None
    joined: tuple[str, Tensor] | None = None
    preview: bool = False
    start: Tensor | None = None
    stats: SpecEditStats = field(default_factory=SpecEditStats)
    timesteps: list[float] = field(default_factory=list)
    step: int = 0

    @property
    def batch(self) -> int:
        return self.source.shape[0]

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def patch(self) -> int:
        """Latent pixels a side of one token."""
        return self.model.codec.patch

    @property
    def kept(self) -> Tensor:
        """Clean latents of what is not selected."""
        return self.source if self.start is None else self.start

    @property
    def pictures(self) -> Pictures:
        return Pictures(self.grid, tuple(r.grid for r in self.references), self.config.coarse_references)

    @property
    def branches(self) -> tuple[Text, ...]:
        return (self.positive,) if self.negative is None else (self.positive, self.negative)

    @property
    def texts(self) -> tuple[Text, ...]:
        """What the model is called with, one after another: each branch's text, or one of all branches. Where the
        branches are shared out, this rank's."""
        guides = self.model.guides
        if guides is not None and self.negative is not None:
            return (self.branches[guides.rank],)
        whole = self.model.joined(self.branches)
        return self.branches if whole is None else (whole,)

    @property
    def plain_tokens(self) -> int:
        """Image tokens of a plain step, of one sample."""
        seen = () if self.model.keeps_references else self.references
        return sum(math.prod(grid) for grid in (self.grid, *(r.grid for r in seen)))

    def ends(self, selection: Selection) -> bool:
        """Whether nothing is left to compute: nothing changes, or the region is all that is asked for."""
        return self.preview or not any(selection.changed)

    def join(self, tokens: Tensor) -> Tensor:
        """Tokens of the draft's, bool [B, N], with the user's mask."""
        if self.joined is None:
            return tokens
        mode, mask = self.joined
        return tokens & mask if mode == "limit" else tokens | mask

    def fresh_noise(self, shape: Sequence[int]) -> Tensor:
        """White fp32 noise from the call's generators."""
        generator = self.generator[0] if isinstance(self.generator, list) else self.generator
        device = self.device if generator is None else generator.device
        noise = randn_tensor(tuple(shape), generator=self.generator, device=device, dtype=torch.float32)
        if noise.device.type != self.device.type:
            # from pinned memory: another copy would wait for the stage before
            noise = noise.pin_memory().to(self.device, non_blocking=True)
        return self.model.agreed(noise)

    def flops(
        self, tokens: Sequence[int], keys: Sequence[int] | None = None, passes: int = 2, lock_text: bool = False
    ) -> int:
        """Useful FLOPs of one step over sequences with that many image tokens, which attend to `keys` of them.

        passes: of the guidance branches at most so many. lock_text: no text is computed.
        """
        pairs = zip(tokens, tokens if keys is None else keys)
        return sum(self.model.flops(text, n, m, lock_text) for n, m in pairs for text in self.branches[:passes])

    def called_with(self, guided: bool) -> tuple[Text, ...]:
        """`texts`, or without guidance the positive branch's alone."""
        return self.texts if guided else (self.positive,)

    @property
    def joined_branches(self) -> int:
        """How many branches each of `texts` holds."""
        return 1 if self.model.guides is not None else len(self.branches) // len(self.texts)

    def timestep_conditioning(self, timesteps: Tensor, guided: bool = True) -> list[tuple[Any, ...]]:
        """The model's of each timestep, fp32 [n] in [0, 1000], one for each of `called_with`."""
        return list(zip(*(self.model.timestep_conditioning(text, timesteps) for text in self.called_with(guided))))

    def velocity(
        self, tokens: Tensor, conditioning: tuple[Any, ...] | Tensor, layouts: Sequence[Any], first: int | None = None,
        guided: bool = True,
    ) -> Tensor:  # fmt: skip
        """The guided velocity of the first `first` of the image tokens [B, S, 4C], of all where None.

        conditioning: one of `timestep_conditioning`, or a timestep in [0, 1000], 0-dim. layouts: the model's, one for
        each of `texts`, or of the positive branch alone where not guided.
        """
        if isinstance(conditioning, Tensor):
            [conditioning] = self.timestep_conditioning(conditioning[None], guided)
        if guided and self.joined_branches > 1:  # branches that run as one batch see the same tokens
            tokens = tokens.repeat(self.joined_branches, 1, 1)
        found = [
            self.model.velocity(text, tokens, at, layout)[:, :first]
            for text, at, layout in zip(self.called_with(guided), conditioning, layouts)
        ]
        if not guided or self.negative is None:
            return found[0]
        if self.model.guides is not None:
            found = of_each(found[0], self.model.guides)
        elif self.joined_branches > 1:
            found = list(found[0].chunk(2))
            found = found[::-1] if self.model.negative_first else found
        positive, negative = found
        return self.model.guide(positive, negative, self.true_cfg_scale)

    def record(
        self, stage: str, sigma: float, tokens: Sequence[int], keys: Sequence[int] | None = None, **how: Any
    ) -> None:
        """how: what else `flops` takes."""
        keys = tokens if keys is None else keys
        flops = self.flops(tokens, keys, **how)
        self.stats.steps.append(StepRecord(stage, sigma, tuple(tokens), tuple(keys), flops, **how))


def _called_back(run: Run, solver: Solver, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, bool, bool]:
    """(the tokens after the callback of a step of the main trajectory, whether that changed them, whether the text);
    the solver restarts where it changed one of them."""
    before, text = version_of(tokens), version_of(run.positive.embeds)
    found = run.on_step(run.step, timestep, tokens)
    run.step += 1
    changed = version_of(found) != before, version_of(run.positive.embeds) != text
    if any(changed):
        solver.restart()
    return found, *changed


def _device_sigmas(sigmas: Sequence[float], device: torch.device) -> Tensor:
    # a blocking copy would wait for the stage before
    return torch.tensor(sigmas, dtype=torch.float32).to(device, non_blocking=True)


def _kept_layouts(
    run: Run, texts: Sequence[Any], grids: Sequence[Grid], branches: int, keeps_text: bool = False
) -> tuple[list[Any], list[Any], int, int, list[Any], list[Any]]:
    """Layouts, one for each text, of whole pictures that keep keys and values, and of the target alone over these; how
    many slots each of the two has; with keeps_text both without the text, else none.

    grids: the target's, then each reference's. branches: how many each of the texts holds.
    """
    capacity, first = run.model.slots(sum(map(math.prod, grids))), run.model.slots(math.prod(grids[0]))
    shared = whole_layout(run.batch * branches, grids, capacity, run.device)
    # a mixed sequence whose blocks are all active: positions are those of whole pictures
    pictures = Pictures(grids[0], tuple(grids[1:]))
    layouts = [run.model.mixed_layout(text, pictures, shared, key_bias=False, cached=True) for text in texts]
    pairs = list(zip(texts, layouts))
    alone = [run.model.active_layout(*pair, first) for pair in pairs]
    if not keeps_text:
        return layouts, alone, capacity, first, [], []
    locked, bare = ([run.model.active_layout(*pair, n, lock_text=True) for pair in pairs] for n in (None, first))
    # later steps read the keys and values of a text that was computed with the target alone
    return layouts, [run.model.renewing(layout) for layout in alone], capacity, first, locked, bare


def dense_steps(
    run: Run, state: Tensor, sigmas: Sequence[float], condition: Sequence[Tensor], stage: str, main: bool = True,
    guided: bool = True, solver: str = "euler", refresh: int = 1, text_refresh: int = 1,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Plain steps: every token of `state` is computed, with the clean latents of each reference after it.

    guided: False leaves true guidance out. main: whether they are the main trajectory's. refresh: every so many-th
    step, and one after a callback that changes tokens or text, computes all and keeps keys and values; those between
    compute text and target alone, over the kept ones. text_refresh: the same of the text; both without effect where the
    sequence has no references.

    Returns (the state at the last sigma, the clean estimates x - s v at the first and the last step's start), all as
    latent images.
    """
    patch, condition = run.patch, [] if run.model.keeps_references else condition
    grids = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in (state, *condition)]
    tokens, behind = pack(state, patch), [pack(x, patch) for x in condition]
    texts = run.called_with(guided)
    count, total = tokens.shape[1], sum(math.prod(grid) for grid in grids)
    branches, keeps_text = run.joined_branches if guided else 1, text_refresh > 1
    kept = (refresh > 1 or keeps_text) and bool(condition) and len(sigmas) > 2
    if kept:
        layouts, alone, capacity, slots, locked, bare = _kept_layouts(run, texts, grids, branches, keeps_text)
        behind.append(tokens.new_zeros(run.batch, capacity - total, tokens.shape[2]))
    else:
        layouts = [run.model.dense_layout(text, run.pictures, grids) for text in texts]
    at = _device_sigmas(sigmas, run.device)
    conditionings = run.timestep_conditioning(at[:-1] * 1000, guided)
    first = estimate = tokens
    solve, age = Solver(solver), 0
    for i in range(len(sigmas) - 1):
        if run.interrupted():
            continue
        timestep = at[i] * 1000
        if main:
            run.on_start(timestep)
        sequence, of, computed = torch.cat([tokens, *behind], dim=1), layouts, total
        whole, with_text = not kept or age % refresh == 0, not kept or age % text_refresh == 0
        if not whole:
            sequence, of, computed = sequence[:, :slots], alone if with_text else bare, count
        elif not with_text:
            of = locked
        velocity = run.velocity(sequence, conditionings[i], of, count, guided)
        age += 1
        estimate = euler(tokens, velocity, -at[i])
        first = estimate if i == 0 else first
        tokens = solve.step(tokens, velocity, at[i], at[i + 1])
        how = dict(passes=2 if guided else 1, lock_text=not with_text)
        run.record(stage, sigmas[i], [computed] * run.batch, [total] * run.batch, **how)
        if main:
            tokens, *changed = _called_back(run, solve, timestep, tokens)
            age = 0 if any(changed) else age
        else:
            run.on_draft_step()
    if kept:
        run.stats.kv_cache_bytes = run.model.kv_bytes(layouts)
        run.model.release(layouts)
    state, first, estimate = (unpack(x, grids[0], patch) for x in (tokens, first, estimate))
    return state, (first, estimate)


def draft_steps(
    run: Run, state: Tensor, sigmas: Sequence[float], condition: Sequence[Tensor], stage: str, **options: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The steps that a draft is made of: `dense_steps`, with true guidance as draft_guidance has it."""
    guidance = run.config.guidance_of_draft(len(sigmas) - 1, run.negative is not None)
    if guidance != LAST:
        guided = bool(guidance) or run.negative is None
        return dense_steps(run, state, sigmas, condition, stage, guided=guided, **options)
    state, (first, _) = dense_steps(run, state, sigmas[:-1], condition, stage, guided=False, **options)
    # its step is Euler's: the velocity before has no guidance
    state, (_, last) = dense_steps(run, state, sigmas[-2:], condition, stage, **options)
    return state, (first, last)


@dataclass(frozen=True)
class Draft:
    """A draft: the clean latents it proposes, and the source's at the same resolution. [B, C, h, w] each.

    first: another proposal, of the first step. That is the mean of all answers, and departs from the source wherever
    one of them does; a later one has settled for some.
    """

    proposal: Tensor
    source: Tensor
    first: Tensor | None = None


def _encode_at(run: Run, pixels: Tensor, grid: Grid) -> Tensor:
    """Clean latents of pixels that are brought to a smaller token grid first."""
    token = run.model.codec.token
    size = (grid[0] * token, grid[1] * token)
    return run.encode(F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1))


def source_at(run: Run, grid: Grid) -> Tensor:
    """Clean latents of the source brought to a smaller token grid: its pixels are resized, then encoded."""
    return _encode_at(run, run.pixels, grid)


def references_at(run: Run, times: int, source: Tensor) -> list[Tensor]:
    """Clean latents of each reference at `times` lower resolution a side.

    source: the edited picture's at that resolution of the target, the first of them where the two grids are one.
    """
    if run.model.keeps_references:
        return []
    found = [source] if run.pictures.aligned else []
    for reference in run.references[len(found) :]:
        rows, columns = reference.grid
        found.append(_encode_at(run, reference.pixels, (-(-rows // times), -(-columns // times))))
    return found


def draft(run: Run, sigmas: Sequence[float]) -> Draft:
    """The paper's draft: a whole run at 4x lower resolution a side, references at that resolution too.

    Its noise is that of the main trajectory, pooled twice, so that both see the same composition.
    """
    grid = draft_grid(run.grid)
    coarse = algebra.pool_noise(run.noise)
    needed = (grid[0] * run.patch * 2, grid[1] * run.patch * 2)
    if coarse.shape[-2:] != needed:
        # the fine grid is no multiple of 4: the draft's last row or column stands for less, and gets noise of its own
        padded = run.fresh_noise((*coarse.shape[:2], *needed))
        padded[..., : coarse.shape[-2], : coarse.shape[-1]] = coarse
        coarse = padded
    source = source_at(run, grid)
    start = algebra.pool_noise(coarse).to(run.source.dtype)
    behind = references_at(run, 4, source)
    proposal, _ = draft_steps(run, start, sigmas, behind, "draft", main=False)
    run.stats.draft_nfe = len(sigmas) - 1
    return Draft(proposal, source)


def feature_maps(codec: Any, embed: Callable[[Tensor], Tensor] | None, metric: str, latents: Tensor) -> list[Tensor]:
    """What one named metric compares, of scaled clean latents on the fine grid; embed as in `discrepancy`."""
    if metric == "decoder":
        return codec.features(latents)
    tokens = pack(latents, codec.patch)
    if metric != "projected":
        return [tokens]
    assert embed is not None
    return [embed(tokens)]


def _mean_discrepancy(a: Sequence[Tensor], b: Sequence[Tensor], grid: Grid) -> Tensor:
    scores = [ops.token_discrepancy(x, y, grid) for x, y in zip(a, b)]
    return scores[0] if len(scores) == 1 else torch.stack(scores).mean(dim=0)


def discrepancy(
    codec: Any,
    embed: Callable[[Tensor], Tensor] | None,
    metric: str,
    proposal: Tensor,
    source: Tensor,
    grid: Grid,
) -> Tensor:
    """Eq. 6 for one named metric: the mean over its feature maps of token_discrepancy. fp32 [B, N] in [0, 4].

    proposal, source: scaled clean latents on the fine grid. embed: the transformer's, needed for "projected" alone.
    """
    a, b = (feature_maps(codec, embed, metric, x) for x in (proposal, source))
    return _mean_discrepancy(a, b, grid)


def verify(run: Run, draft: Draft) -> Tensor:
    """Score each fine token by how far the draft departs from the source: fp32 [B, N].

    "matched" compares the draft with the source at the draft's resolution, both brought up by bilinear interpolation of
    their latents; a draft lacks fine detail, and "literal", against the full-resolution source, marks that lack too.
    Of two proposals the larger score counts.
    """

    def bring_up(latents: Tensor) -> Tensor:
        size = run.source.shape[-2:]
        if latents.shape[-2:] == size:
            return latents
        return F.interpolate(latents.float(), size=size, mode="bilinear", align_corners=False).to(latents.dtype)

    reference = run.source if run.config.reference == "literal" else bring_up(draft.source)
    maps = functools.partial(feature_maps, run.model.codec, run.model.embed, run.config.metric)
    against = maps(reference)
    scores = _mean_discrepancy(maps(bring_up(draft.proposal)), against, run.grid)
    if draft.first is not None:
        scores = torch.maximum(scores, _mean_discrepancy(maps(bring_up(draft.first)), against, run.grid))
    return scores


UNRELATED_SCORE = 2.0  # of orthogonal features: cosine 0
WEAKEST_SCORE = 0.1  # a largest score under it is taken for it
LEAST_THRESHOLD = 0.03  # what a picture that was only saved again, as a JPEG of quality 75 or better, does not reach


def threshold_scale(scores: Tensor, relative: float, threshold: float | None = None) -> Tensor:
    """What a threshold is multiplied by for each picture, fp32 [B, 1]: (largest score / 2) ** relative.

    scores: fp32 [B, N], where a NaN does not count. All scores of a strong draft are higher, those around its edit too.
    threshold: what is multiplied; one over LEAST_THRESHOLD does not fall under it.
    """
    largest = scores.nan_to_num(nan=0.0).amax(dim=1, keepdim=True)
    scale = (largest.clamp(min=WEAKEST_SCORE) / UNRELATED_SCORE) ** relative
    if threshold is None or threshold <= LEAST_THRESHOLD:
        return scale
    return scale.clamp(min=LEAST_THRESHOLD / threshold)


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

    A mask of the user's that joins the draft's region does so once that is grown.
    The one place where the host waits for the device of `scores`: it reads how many blocks each sample has.
    """
    config, grid = run.config, run.grid
    blocks_grid = coarse_grid(grid)
    total = math.prod(blocks_grid)
    mask, _, _ = ops.select_tokens(scores, grid, threshold, dilation, 0)
    over = run.join(~(scores <= threshold)).sum(dim=1)  # a NaN is selected, so it counts
    changed = over >= max(config.min_active, 1)
    blocks = to_blocks(run.join(mask), grid)
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


def select_given(run: Run, mask: Tensor) -> Selection:
    """`select` of a user's mask, bool [B, N]: on the host where it lies there, so that nothing waits for the device."""
    if mask.device.type != "cpu" or run.config.selection != "score":
        return select(run, mask.to(run.device).float(), 0.5, 0)
    found = select(run, mask.float(), 0.5, 0)
    moved = {name: getattr(found, name).to(run.device, non_blocking=True) for name in _ON_DEVICE}
    return replace(found, **moved)


_ON_DEVICE = ("edited", "active", "order", "count")


@dataclass
class MixedState:
    """The sequence of the mixed-resolution steps, at one sigma.

    tokens: [B, capacity, 4C], target then condition slots. table: all rows, [B, rows, 4C], to scatter back into.
    free: bool [B, capacity, 1], slots that follow the model; the others follow `drift`, [B, capacity, 4C].
    layouts: the model's, one for each of the run's texts. fine: the fine target tokens of each sample; first: slots,
    the sequence's first ones, that hold them all. Over cached keys and values, where there are any: active_layouts, the
    model's for these alone; locked_layouts, for all slots without the text. brackets: for each of `layouts`, with
    kv_refresh="bracket", (the layout that keeps those of the last sigma, the one that keeps the interpolated).
    """

    tokens: Tensor
    table: Tensor
    free: Tensor
    drift: Tensor
    layout: SequenceLayout
    layouts: list[Any]
    lengths: tuple[int, ...]
    fine: tuple[int, ...]
    first: int
    active_layouts: list[Any]
    locked_layouts: list[Any]
    brackets: list[tuple[Any, Any]]


def expand(run: Run, fine: Tensor, coarse: Tensor, sigma: float, selection: Selection) -> MixedState:
    """Lay out the mixed sequence: active blocks from `fine`, the rest from `coarse`, both at `sigma`.

    fine: [B, C, H, W], the expanded state (eq. 8, `expand_state`). coarse: [B, C, H / 2, W / 2].
    Unless unselected="coarse" leaves them to the model (with the full finish), the coarse tokens are the source's,
    noised to the sigma, and follow it from here on.
    """
    config, pictures = run.config, run.pictures
    source_coarse = pool(run.source)
    drift = None
    if config.finish == "locked" or config.unselected == "source":
        noise = algebra.pool_noise(run.noise)
        kept = pool(run.kept)
        coarse = algebra.noised(kept, sigma, noise).to(run.source.dtype)
        drift = noise - kept
    shown = not run.model.keeps_references
    others = [r.latents for r in run.references[1 if pictures.aligned else 0 :]] if shown else []
    if pictures.coarse_others:
        others = [pool(x) for x in others]
    table = torch.cat([pack(x, run.patch) for x in (fine, coarse, run.source, source_coarse, *others)], dim=1)
    parts: dict[str, Any] = dict(
        coarse_condition=config.coarse_condition,
        condition=pictures.aligned and shown,
        others=sum(picture_rows(grid, pictures.coarse_others) for _, grid in pictures.others) if shown else 0,
    )
    lengths = tuple(sequence_length(c, run.grid, **parts)[1] for c in selection.counts)
    layout = build_layout(selection.order, selection.count, run.grid, run.model.slots(max(lengths)), **parts)
    capacity = layout.capacity
    tokens = ops.gather_tokens(table, layout.index, capacity)
    if drift is None:
        free, moves = layout.target_slots(), torch.zeros_like(tokens)
    else:
        rows = torch.zeros_like(table)
        n = math.prod(run.grid)
        rows[:, n : n + n // 4] = pack(drift.to(table.dtype), run.patch)
        free, moves = layout.fine_target_slots(), ops.gather_tokens(rows, layout.index, capacity)
    fine_counts = tuple(CHILDREN * count for count in selection.counts)
    lock, first = config.lock_text, run.model.slots(max(fine_counts))
    cached = lock or config.kv_refresh != 1
    texts = run.texts
    shared = layout.repeat(run.joined_branches)
    layouts = [run.model.mixed_layout(text, pictures, shared, config.key_bias, cached) for text in texts]
    pairs, active_layouts, locked_layouts, brackets = list(zip(texts, layouts)), [], [], []
    if config.kv_refresh == BRACKET:
        brackets = [(run.model.another_cache(x), run.model.another_cache(x)) for x in layouts]
        active_layouts = [run.model.active_layout(text, x, first, lock) for text, (_, x) in zip(texts, brackets)]
    elif config.kv_refresh > 1:
        active_layouts = [run.model.active_layout(text, x, first, lock) for text, x in pairs]
    if lock:
        locked_layouts = [run.model.active_layout(text, x, None, lock) for text, x in pairs]
    return MixedState(
        tokens, table, free[..., None], moves, layout, layouts, lengths, fine_counts, first, active_layouts,
        locked_layouts, brackets,
    )  # fmt: skip


def mixed_steps(run: Run, state: MixedState, sigmas: Sequence[float]) -> None:
    """Steps on the mixed sequence, in place of `state.tokens`.

    Every kv_refresh-th computes it whole and leaves keys and values behind. The steps between ("active") compute the
    text and the fine target tokens alone, over the keys and values that the others had then; the others follow the
    source, so nothing but their keys and values is missing. With lock_text the first step alone computes the text.

    kv_refresh="bracket": the first step alone computes the whole sequence, and one pass more ("bracket") at the last
    step's sigma. The other tokens' keys and values of an active step are interpolated between those two by its sigma.
    With solver="ab2" that pass's velocity is the first step's second one.

    A step after a callback that changes the text is as the first one: nothing that was kept knows of that text.
    """
    lock, every = run.config.lock_text, run.config.kv_refresh
    steps = len(sigmas) - 1
    bracket = every == BRACKET and steps > 2
    if every == BRACKET:
        every = steps if bracket else 1
    at = _device_sigmas(sigmas, run.device)
    conditionings = run.timestep_conditioning(at[:-1] * 1000)
    solve, begun, anew = Solver(run.config.solver), 0, True
    for i in range(steps):
        if run.interrupted():
            continue
        timestep, slope = at[i] * 1000, None
        run.on_start(timestep)
        begun = i if anew else begun
        if anew or (i - begun) % every == 0:
            locked, anew = lock and not anew, False
            velocity = run.velocity(state.tokens, conditionings[i], state.locked_layouts if locked else state.layouts)
            velocity = torch.where(state.free, velocity, state.drift)
            run.record("mixed", sigmas[i], state.lengths, lock_text=locked)
            if bracket and i < steps - 1:
                ahead = euler(state.tokens, velocity, at[-2] - at[i])
                behind = run.velocity(ahead, conditionings[-1], [far for far, _ in state.brackets])
                run.record("bracket", sigmas[-2], state.lengths)
                if solve.name != "euler":
                    behind = torch.where(state.free, behind, state.drift)
                    slope = (behind.float() - velocity.float()) / (at[-2] - at[i])
        else:
            if bracket:
                weight = (at[begun] - at[i]) / (at[begun] - at[-2])
                for near, (far, between) in zip(state.layouts, state.brackets):
                    run.model.blend(between, near, far, weight)
            n = state.first
            velocity = run.velocity(state.tokens[:, :n], conditionings[i], state.active_layouts)
            velocity = torch.where(state.free[:, :n], velocity, state.drift[:, :n])
            velocity = torch.cat([velocity, state.drift[:, n:]], dim=1)
            run.record("active", sigmas[i], state.fine, keys=state.lengths, lock_text=lock)
        state.tokens = solve.step(state.tokens, velocity, at[i], at[i + 1], slope)
        state.tokens, _, anew = _called_back(run, solve, timestep, state.tokens)
    if lock or state.active_layouts:
        kept = [*state.layouts, *(x for pair in state.brackets for x in pair)]
        run.stats.kv_cache_bytes = max(run.stats.kv_cache_bytes, run.model.kv_bytes(kept))
        run.model.release(kept)


def _scatter_back(run: Run, state: MixedState) -> tuple[Tensor, Tensor]:
    """(fine, coarse) latent images of the target; rows outside the sequence hold their values from `expand`."""
    ops.scatter_tokens_(state.table, state.tokens, state.layout.index)
    n = math.prod(run.grid)
    fine, coarse = state.table[:, :n], state.table[:, n : n + n // 4]
    return unpack(fine, run.grid, run.patch), unpack(coarse, coarse_grid(run.grid), run.patch)


def on_pixels(mask: Tensor, grid: Grid, times: int) -> Tensor:
    """Token mask bool [B, N] -> [B, 1, times*rows, times*columns]."""
    image = mask.reshape(-1, 1, *grid)
    return image.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


def finish_full(run: Run, state: MixedState, sigma: float, sigmas: Sequence[float], selection: Selection) -> Tensor:
    """The paper's finish: bring every token to full resolution, then plain steps. Clean latents [B, C, H, W].

    The fine tokens, at `sigma`, get fresh noise up to sigmas[0]. The others begin there from the coarse ones, expanded
    (unselected="coarse"), or from the fine source with the run's first noise: a white field of which the coarse tokens
    that followed the source held the pool, so that pooling this state gives exactly what they are at `sigma`.
    """
    fine, coarse = _scatter_back(run, state)
    to = sigmas[0]
    if run.config.unselected == "source":
        rest = algebra.noised(run.source, to, run.noise)
    else:
        rest = algebra.expand_state(coarse.float(), sigma, run.noise)
    topped = algebra.top_up(fine.float(), sigma, to, run.fresh_noise(fine.shape))
    mask = on_pixels(selection.active, run.grid, run.patch)
    joined = torch.where(mask, topped, rest).to(run.source.dtype)
    shown = [r.latents for r in run.references]
    return dense_steps(run, joined, sigmas, shown, "full", solver=run.config.solver)[0]


def finish_locked(run: Run, state: MixedState, selection: Selection) -> Tensor:
    """The locked finish: clean latents of the edit region from the sequence, what is kept everywhere else."""
    fine, _ = _scatter_back(run, state)
    return torch.where(on_pixels(selection.edited, run.grid, run.patch), fine, run.kept)


def everything(run: Run) -> Selection:
    """The selection of all blocks, for a run that looks for no region."""
    blocks, tokens = math.prod(coarse_grid(run.grid)), math.prod(run.grid)
    all_of = torch.ones(run.batch, tokens, dtype=torch.bool, device=run.device)
    order = torch.arange(blocks, dtype=torch.int32, device=run.device).expand(run.batch, blocks)
    count = torch.full((run.batch,), blocks, dtype=torch.int32, device=run.device)
    yes = (True,) * run.batch
    run.stats.active = run.stats.edited = [1.0] * run.batch
    run.stats.fallbacks = [None] * run.batch
    return Selection(all_of, all_of, order, count, (blocks,) * run.batch, changed=yes, dense=yes)


def of_samples(flags: Sequence[bool], device: torch.device) -> Tensor:
    """A flag of each sample, bool [B, 1, 1, 1]."""
    # a blocking copy would wait for the stage before
    return torch.tensor(flags, dtype=torch.bool).to(device, non_blocking=True)[:, None, None, None]


def keep_unchanged(run: Run, clean: Tensor, selection: Selection) -> Tensor:
    """Clean latents, but the source's in samples where nothing changes."""
    if all(selection.changed):
        return clean
    return torch.where(of_samples(selection.changed, run.device), clean, run.source)


def edit_alpha(edited: Tensor, grid: Grid, pixel: int, feather: int) -> Tensor:
    """Weight of the edit at each pixel, fp32 [B, 1, H, W]: 1 in the region, exactly 0 from `feather` pixels off.

    edited: bool [B, N]. pixel: pixels a side of a fine token. The seam falls linearly, outside the region.
    """
    region = on_pixels(edited, grid, pixel)
    mask = region.float()
    radius = feather // 2
    if radius == 0:
        return mask
    width = 2 * radius + 1
    grown = F.max_pool2d(mask, width, stride=1, padding=radius)
    padded = F.pad(grown, (radius,) * 4, mode="replicate")
    # a mean of ones need not be one to the last bit
    return F.avg_pool2d(padded, width, stride=1).masked_fill(region, 1.0)
