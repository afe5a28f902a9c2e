# SPDX-License-Identifier: Apache-2.0
"""detail="native": a second pass over the edit region at the picture's own resolution.

What the edit is was decided at the working size. Windows of the picture around the region, each no larger than that
size, are noised to a sigma with the first result in them and denoised from there, with the source's own window as the
condition. In a window the tokens of the region are fine and follow the model; the others are coarse, weigh as the four
that they stand for, and follow the first result, which outside the region is the source. So the cost grows with the
region's area, and the model sees nothing but pictures of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..images.composite import composite_window, edit_weight
from ..images.files import Photo
from ..images.windows import Window, windows
from ..sampling import noise as algebra
from ..sampling.grid import BLOCK
from . import stages
from .config import BRACKET
from .output import NativeDetail, SpecEditStats, StageClock
from .source_size import compositing_device, pixels_of
from .stages import Reference, Run

SIGMA = 0.6  # of the noise that the pass begins from: above, content would be decided anew
# kv_refresh of the pass in place of "bracket", which costs as much as whole steps where there are so few.
KV_REFRESH: int | str = 2
CLOSE = 0.9  # a sigma of the schedule that is over this share of the one before is left out
LEAST_SCALE = 1.25  # pixels of the picture for one of the working size, a side, under which nothing is to be won


def native_sigmas(sigmas: list[float], sigma: float) -> list[float]:
    """The end of a plain schedule, with the final 0, that begins at `sigma`."""
    return [sigma, *(s for s in sigmas if s < CLOSE * sigma)]


def refine(
    run: Run, index: int, photo: Photo, array: np.ndarray, region: np.ndarray, sigmas: Callable[[int], list[float]]
) -> NativeDetail:
    """The second pass over one picture: changes `array`, the photo's with the first result in its region.

    run: the finished one; index: of the sample. region: bool [rows, columns] of its tokens. sigmas: of a plain run,
    with the final 0, by the number of its target tokens.
    """
    token = run.model.codec.token
    working = run.grid[1] * token, run.grid[0] * token
    scale = math.sqrt(math.prod(photo.size) / math.prod(working))
    if scale < LEAST_SCALE:
        return NativeDetail(reason=f"the picture has {scale:.2f} pixels a side for one of the working size")
    config, steps = run.config, 0
    parts = windows(region, photo.size, working, token * BLOCK, config.feather)
    weight = edit_weight(region, working, config.feather, compositing_device(run.device))
    for window in parts:
        top, bottom, left, right = window.box
        box = slice(top, bottom), slice(left, right)
        fine = window.tokens(region, photo.size, token)
        first, source = (_seen(photo.with_array(np.ascontiguousarray(x[box])), window, run.device)
                         for x in (array, photo.array))  # fmt: skip
        schedule = native_sigmas(sigmas(fine.size), SIGMA)
        decoded = _denoise(run, index, first, source, fine, schedule)
        if run.interrupted():
            break
        steps = len(schedule) - 1
        new = composite_window(photo.array, photo.unit(decoded), weight, config.feather, window.box)
        _put(array, new, window)
    (height, width), (top, bottom, left, right) = parts[0].size, parts[0].box
    own = math.sqrt(height * width / ((bottom - top) * (right - left)))
    return NativeDetail(
        windows=tuple(w.size for w in parts), scale=scale, of_native=own, sigma=SIGMA, steps=steps,
        reason="interrupted" if run.interrupted() else "",
    )  # fmt: skip


def _seen(part: Photo, window: Window, device: torch.device) -> Tensor:
    """A window's part of a photo as the model sees it: pixels in [-1, 1], [1, 3, h, w]."""
    return pixels_of([part], device, window.size[::-1])


def _put(array: np.ndarray, new: np.ndarray, window: Window) -> None:
    """What a window has found, [box's rows, columns], over what was there, in its core."""
    (top, bottom, left, right), (first, _, start, _) = window.core, window.box
    inside = slice(top - first, bottom - first), slice(left - start, right - start)
    old, new = array[top:bottom, left:right], new[inside]
    if any(window.fades):
        new = _faded(old, new, window.weight()[inside])
    old[...] = new


def _faded(old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
    weight = weight.reshape(*new.shape[:2], *(1,) * (new.ndim - 2))
    mixed = old + weight * (new.astype(np.float32) - old)
    mixed = np.rint(mixed).astype(new.dtype) if new.dtype.kind == "u" else mixed.astype(new.dtype)
    return np.where(weight == 1, new, np.where((weight == 0) | (old == new), old, mixed))


def _denoise(run: Run, index: int, first: Tensor, source: Tensor, fine: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """One window, floats in [0, 1], [h, w, 3]. first, source: pixels in [-1, 1], [1, 3, h, w]; fine: bool tokens."""
    several = run.batch > 1
    model = run.model.of_sample(index) if several else run.model
    clean, start = (model.agreed(model.encode(x.to(run.source.dtype))) for x in (source, first))

    def text(branch):
        return branch if branch is None or not several else branch.of_sample(index)

    others = tuple(
        replace(r, pixels=r.pixels[index // (run.batch // len(r.pixels)) :][:1], latents=r.latents[index : index + 1])
        for r in run.references[1:]
    )
    config = replace(run.config, finish="locked", selection="score", uniform_stride=0, max_active=1.0)
    if config.kv_refresh in (BRACKET, KV_REFRESH):  # the qualities': a locked text would stay that of the first step
        config = replace(config, kv_refresh=KV_REFRESH, lock_text=False)
    one = replace(
        run, model=model, config=config, grid=fine.shape, source=clean, start=start, pixels=source,
        references=(Reference(source, clean, run.patch), *others), positive=text(run.positive),
        negative=text(run.negative), noise=run.noise[:0], on_step=lambda step, timestep, tokens: tokens, joined=None,
        preview=False, clock=StageClock(run.device), stats=SpecEditStats(), step=0,
        generator=[run.generator[index]] if isinstance(run.generator, list) else run.generator,
    )  # fmt: skip
    one.noise = one.fresh_noise(clean.shape)
    chosen = torch.from_numpy(fine).reshape(1, -1).to(run.device)
    selection = stages.select(one, chosen.float(), 0.5, 0)
    run.stats.backend = ops.backend_of("mixed_res_attn", run.device)[0]
    noised = algebra.noised(start, sigmas[0], one.noise).to(clean.dtype)
    state = stages.expand(one, noised, algebra.pool_state(noised.float(), sigmas[0]), sigmas[0], selection)
    stages.mixed_steps(one, state, sigmas)
    run.stats.steps += [replace(step, stage="native") for step in one.stats.steps]
    run.stats.kv_cache_bytes = max(run.stats.kv_cache_bytes, one.stats.kv_cache_bytes)
    found = model.decode(stages.finish_locked(one, state, selection))
    return (found[0, :3].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
