# SPDX-License-Identifier: Apache-2.0
"""`specedit mask`: score an edited picture against its source, draw the heat map, print the shares."""

from __future__ import annotations

import argparse
from typing import Any

from ..images.files import Photo, shown
from . import models
from .edit import failing, share
from .output import check_output, keep
from .text import say

MAX_SCORED_AREA = 1024**2
# Of decoder features: the threshold is so many times the lower quartile of a pair's scores, which is what saving and
# resizing leave in tokens that nobody edited, within these bounds. bench/log/selection.md has what it was chosen by.
QUIET_TIMES, LEAST_THRESHOLD = 10.0, 0.05


def run(arguments: argparse.Namespace) -> int:
    """`specedit mask`. Returns the exit code."""
    out = check_output(arguments.output, [arguments.source, arguments.edited])
    source = Photo.open(arguments.source).rgb
    edited = Photo.open(arguments.edited).rgb
    folder = models.model_folder(arguments.vae, "--vae")
    device, dtype = models.device_of(arguments.device)
    models.quiet()
    import numpy as np
    import torch

    from .. import ops
    from ..engine.config import THRESHOLDS
    from ..engine.stages import discrepancy
    from ..images.align import Drift, align, estimate_drift
    from ..images.measures import texture_ratio

    codec = models.load_codec(folder, device, dtype)
    token = codec.token
    width, height = _scored_size(source.size, token)
    grid = (height // token, width // token)
    threshold, own = arguments.threshold, getattr(codec, "THRESHOLDS", {})
    if threshold is None:
        threshold = own.get(arguments.metric, THRESHOLDS[arguments.metric, "matched", "full_step"])
    follows = arguments.threshold is None and arguments.metric == "decoder" and not own
    with failing(arguments, device), torch.no_grad():
        first, second = np.asarray(source), np.asarray(edited)
        plain = Drift(source.size, edited.size)
        drift = estimate_drift(first, second) if arguments.align else plain
        small, _ = align(first, Drift(source.size, source.size), (width, height))
        brought, seen = align(second, drift, (width, height))
        brought = np.where(seen[..., None], brought, small)
        latents = []
        for picture in (small, brought):
            pixels = torch.from_numpy(np.rint(picture * 255) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
            latents.append(codec.encode(pixels.to(device, dtype)))
        scores = discrepancy(codec, None, arguments.metric, latents[1], latents[0], grid)
        # tokens of which the edited picture shows less than half
        cells = torch.from_numpy(seen).reshape(grid[0], token, grid[1], token)
        absent = (cells.float().mean(dim=(1, 3)) < 0.5).flatten()
        scores[:, absent.to(scores.device)] = 0
        if follows:
            threshold = pair_threshold(scores[:, ~absent.to(scores.device)], threshold)
        _, _, count = ops.select_tokens(scores, grid, threshold, 0, 0)
        _, _, grown = ops.select_tokens(scores, grid, threshold, 1, 0)
    scores = scores[0].float().cpu().reshape(grid)
    keep({out: Photo.of(heat_map(first, scores, threshold))})
    total = scores.numel()
    lines = [f"compared    {width} x {height} pixels, {grid[0]} x {grid[1]} tokens of {token} pixels"]
    how = placed(drift, arguments.align)
    if how:
        lines.append(f"placed      {how}")
    if not seen.all():
        left = share(1 - seen.mean())
        lines.append(f"left out    {left} of the picture, which {shown(arguments.edited)} does not show")
    lines += [
        f"score       {arguments.metric}, 0 to 4: mean {scores.mean():.4f}, median {scores.median():.4f}, "
        f"largest {scores.max():.4f}",
        f"changed     {int(count)} of {total} tokens over {threshold:g}: {share(int(count) / total)}; "
        f"grown by one token {share(int(grown) / total)}",
        texture(texture_ratio(small, brought, token)[((scores <= threshold) & ~absent.reshape(grid)).numpy()]),
        f"heat map    {shown(out)}",
    ]
    say("\n".join(lines))
    return 0


def pair_threshold(scores: Any, most: float) -> float:
    """The threshold of a pair's decoder scores, a tensor: low where the two are alike but for an edit."""
    if scores.numel() == 0:
        return most
    return min(max(QUIET_TIMES * float(scores.float().quantile(0.25)), LEAST_THRESHOLD), most)


def texture(ratios: Any) -> str:
    """The line on the finest detail of unchanged tokens, which the score hardly sees. ratios: of `texture_ratio`."""
    import numpy as np

    ratios = ratios[~np.isnan(ratios)]
    if not ratios.size:
        return "texture     no fine detail in unchanged tokens"
    other = ((ratios < 0.5) | (ratios > 2)).sum()
    return (
        f"texture     fine detail {np.median(ratios):.2f} of the source's, median of {ratios.size} unchanged tokens; "
        f"under half or over twice in {share(other / ratios.size)}"
    )


def placed(drift: Any, aligned: bool) -> str:
    """How the edited picture was brought onto the source, in one line; "" where it was only there.

    drift: an images.align.Drift. aligned: whether it was looked for.
    """
    if not aligned:
        (ws, hs), (we, he) = drift.source_size, drift.edited_size
        if (ws, hs) == (we, he):
            return ""
        stretched = "" if drift.same_aspect else f", of another aspect ({100 * abs(we * hs / (he * ws) - 1):.1f} %)"
        return f"{we} x {he} for {ws} x {hs}{stretched}: stretched, as --no-align asks"
    if not drift.found:
        return f"{drift}: perhaps the whole scene changed; compared without alignment"
    return f"{drift}{'; undone' * (drift.moved or drift.recoloured)}"


def _scored_size(size: tuple[int, int], token: int) -> tuple[int, int]:
    """The source's size in whole tokens, at most a megapixel."""
    scale = min(1.0, (MAX_SCORED_AREA / (size[0] * size[1])) ** 0.5)
    width, height = (max(int(side * scale) // token, 1) * token for side in size)
    return width, height


def heat_map(source: Any, scores: Any, threshold: float) -> Any:
    """Scores over the greyed source, at its size: a tint below the threshold, red to yellow above it.

    source: uint8 [h, w, 3]. scores: fp32 [rows, columns]. Returns uint8 [h, w, 3].
    """
    import numpy as np

    height, width = source.shape[:2]
    # log scale between a tenth of the threshold and the largest score: scores span decades
    low, high = threshold / 10, max(float(scores.max()), threshold * 2)
    level = scores.numpy()
    heat = np.clip(np.log(np.maximum(level, 1e-9) / low) / np.log(high / low), 0, 1) if low > 0 else level / high
    colour = np.stack([255 * np.minimum(2 * heat, 1), 255 * np.maximum(2 * heat - 1, 0), 60 * (1 - heat)], axis=-1)
    weight = np.where(level > threshold, 0.65, 0.35 * heat)[..., None]
    columns = np.arange(width) * level.shape[1] // width
    out = np.empty_like(source)
    for row in range(level.shape[0]):
        top, bottom = (-(-i * height // level.shape[0]) for i in (row, row + 1))
        grey = source[top:bottom] @ np.array((0.299, 0.587, 0.114), np.float32)
        share_of, tint = weight[row][columns], colour[row][columns]
        out[top:bottom] = ((1 - share_of) * grey[..., None] + share_of * tint).round()
    return out
