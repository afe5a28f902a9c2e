# SPDX-License-Identifier: Apache-2.0
"""`specedit mask`: score an edited picture against its source, draw the heat map, print the shares."""

from __future__ import annotations

import argparse

from ..images.files import Photo, shown
from . import models
from .edit import failing, share
from .output import check_output, keep
from .text import UserError, say

MAX_SCORED_AREA = 1024**2


def run(arguments: argparse.Namespace) -> int:
    """`specedit mask`. Returns the exit code."""
    out = check_output(arguments.output, [arguments.source, arguments.edited])
    source = Photo.open(arguments.source).rgb
    edited = Photo.open(arguments.edited).rgb
    folder = models.model_folder(arguments.vae, "--vae")
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    if subfolder is None and not (folder / "config.json").is_file():
        raise UserError(f"{shown(folder)}: expected a folder with a VAE's config.json, or a pipeline folder with vae/")
    device, dtype = models.device_of(arguments.device)
    models.quiet()
    import numpy as np
    import PIL.Image
    import torch

    from .. import ops
    from ..engine.config import THRESHOLDS
    from ..engine.stages import discrepancy

    codec = models.load_codec(folder, subfolder, device, dtype)
    token = codec.token
    width, height = _scored_size(source.size, token)
    pair = [p.resize((width, height), PIL.Image.LANCZOS) for p in (source, edited)]
    grid = (height // token, width // token)
    threshold = arguments.threshold
    if threshold is None:
        threshold = THRESHOLDS[arguments.metric, "matched", "full_step"]
    with failing(arguments, device), torch.no_grad():
        latents = []
        for picture in pair:
            pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            latents.append(codec.encode(pixels.to(device, dtype)))
        scores = discrepancy(codec, None, arguments.metric, latents[1], latents[0], grid)
        _, _, count = ops.select_tokens(scores, grid, threshold, 0, 0)
        _, _, grown = ops.select_tokens(scores, grid, threshold, 1, 0)
    scores = scores[0].float().cpu().reshape(grid)
    keep({out: Photo.of(heat_map(pair[0], scores, threshold))})
    total = scores.numel()
    note = "" if source.size == edited.size else f"; {shown(arguments.edited)} was {edited.width} x {edited.height}"
    say(
        f"compared    {width} x {height} pixels, {grid[0]} x {grid[1]} tokens of {token} pixels{note}\n"
        f"score       {arguments.metric}, 0 to 4: mean {scores.mean():.4f}, median {scores.median():.4f}, "
        f"largest {scores.max():.4f}\n"
        f"changed     {int(count)} of {total} tokens over {threshold:g}: {share(int(count) / total)}; "
        f"grown by one token {share(int(grown) / total)}\n"
        f"heat map    {shown(out)}"
    )
    return 0


def _scored_size(size: tuple[int, int], token: int) -> tuple[int, int]:
    """The source's size in whole tokens, at most a megapixel."""
    scale = min(1.0, (MAX_SCORED_AREA / (size[0] * size[1])) ** 0.5)
    width, height = (max(int(side * scale) // token, 1) * token for side in size)
    return width, height


def heat_map(source, scores, threshold: float):
    """Scores, fp32 [rows, columns], over the greyed source: a tint below the threshold, red to yellow above it."""
    import numpy as np
    import PIL.Image

    base = np.asarray(source.convert("L").convert("RGB"), np.float32)
    height, width = source.height // scores.shape[0], source.width // scores.shape[1]
    level = scores.numpy().repeat(height, 0).repeat(width, 1)[..., None]
    # log scale between a tenth of the threshold and the largest score: scores span decades
    low, high = threshold / 10, max(float(scores.max()), threshold * 2)
    heat = np.clip(np.log(np.maximum(level, 1e-9) / low) / np.log(high / low), 0, 1) if low > 0 else level / high
    colour = np.concatenate(
        [255 * np.minimum(2 * heat, 1), 255 * np.maximum(2 * heat - 1, 0), 60 * (1 - heat)], axis=-1
    )
    weight = np.where(level > threshold, 0.65, 0.35 * heat)
    return PIL.Image.fromarray(((1 - weight) * base + weight * colour).round().astype(np.uint8))
