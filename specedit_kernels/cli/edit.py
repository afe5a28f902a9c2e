# SPDX-License-Identifier: Apache-2.0
"""`specedit edit`: run the pipeline, write the picture and the mask over the source, print a summary."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.boxes import Box
from ..images.files import Photo, reason, shown
from . import models, ranks
from .output import check_output, keep
from .text import UserError, one_line, say

# diffusers' words where its T5 text is cut; how much of it is read
CUT = re.compile(r"truncated because `max_sequence_length` is set to\s+(\d+)")


@dataclass(frozen=True)
class Edited:
    """One finished edit.

    overlay: the region over the picture, at the picture's size. mask: bool [rows, columns] of tokens. threshold: of the
    scores, or None. working: (width, height) at which the model ran. notes: what was converted, and warnings, a line
    each.
    """

    photo: Photo
    overlay: Photo
    mask: Any
    stats: Any
    threshold: float | None
    working: tuple[int, int]
    notes: tuple[str, ...]


class Editor:
    """A loaded model with the command's options, for one picture or many."""

    def __init__(self, arguments: argparse.Namespace):
        """UserError where the options, the folder or the device cannot be."""
        if arguments.preserve == "none" and arguments.output_size == "source":
            raise UserError("--preserve none: expected with --output-size working; at the source's its pixels stay")
        if arguments.detail == "native" and (arguments.output_size == "working" or arguments.method == "flash"):
            raise UserError("--detail native: expected with --output-size source and --method specedit")
        if arguments.source_prompt is not None and arguments.method != "flash":
            raise UserError("--source-prompt: expected with --method flash, whose second branch it is the text of")
        if arguments.mask_mode != "replace" and not arguments.box and arguments.mask is None:
            raise UserError(f"--mask-mode {arguments.mask_mode}: expected with --mask or --box")
        self.arguments = arguments
        self.references = [Photo.open(path).rgb for path in arguments.reference]
        folder = models.model_folder(arguments.model)
        name = models.model_class(folder)
        if self.references and not models.takes_several_pictures(name):
            raise UserError(f"--reference: {shown(folder)} is a {name}, which takes one picture")
        settings = models.model_settings(folder, name, arguments.true_cfg_scale)
        self.flash = arguments.method == "flash"
        device, dtype = models.device_of(arguments.device)
        self.config = _config(arguments)
        import specedit_kernels

        kind = getattr(specedit_kernels, f"{'FlashEdit' if self.flash else 'SpecEdit'}{name}")
        if self.flash:
            # its second branch is the source's, no guidance
            settings = {k: v for k, v in settings.items() if k not in (kind.TRUE_CFG, "negative_prompt")}
            if arguments.source_prompt is not None:
                settings["source_prompt"] = arguments.source_prompt
        self.settings = settings
        self.pipe = models.load_pipeline(kind, folder, device, dtype)
        self.pipe.set_progress_bar_config(leave=False, disable=not sys.stderr.isatty())

    def edit(self, photo: Photo, instruction: str, seed: int, mask: Any = None) -> Edited:
        """Edit one picture, or look for its region alone with --preview; mask: its array, or None.

        UserError where the run fails.
        """
        import torch

        from ..engine.registry import codec_of
        from ..engine.stages import threshold_scale

        image, settings, arguments = photo.rgb, dict(self.settings), self.arguments
        if self.references:
            # the picture that is edited sets the size, not the last one
            settings["height"], settings["width"] = self.pipe.size_of(image, settings.get("max_area"))
        with failing(self.arguments, self.pipe.device), run_notes() as notes:
            result = self.pipe(
                image=[photo, *self.references] if self.references else photo,
                prompt=instruction,
                mask_image=mask,
                region=arguments.box or None,
                mask_mode=arguments.mask_mode,
                output_size=arguments.output_size,
                detail=arguments.detail,
                preview=arguments.preview,
                num_inference_steps=self.arguments.steps,
                generator=torch.Generator().manual_seed(seed),
                specedit=self.config,
                **settings,
            )
        edited, region = result.images[0], result.mask[0].cpu().numpy()
        done = edited if isinstance(edited, Photo) else photo.with_picture(edited)
        token = codec_of(self.pipe.vae).token
        working = (region.shape[1] * token, region.shape[0] * token)
        overlay = region_overlay(image, region)
        threshold = result.stats.threshold
        if threshold is not None and not self.flash:
            relative = result.stats.config.resolved_relative()
            scale = threshold_scale(result.scores.flatten(1), relative, threshold)
            threshold *= float(scale[0])
        found = (*photo.notes, *notes)
        return Edited(done, Photo.of(overlay), region, result.stats, threshold, working, found)


def run(arguments: argparse.Namespace) -> int:
    """`specedit edit`. Returns the exit code."""
    if ranks.several():
        raise UserError("WORLD_SIZE: expected one process for one picture; several take a folder or a list of pictures")
    inputs = [arguments.image, *filter(None, [arguments.mask]), *arguments.reference]
    out = check_output(arguments.output or "edited.png", inputs)
    mask_out = check_output(arguments.mask_output or out.with_name("mask.png"), inputs)
    if mask_out == out or (mask_out.exists() and out.exists() and mask_out.samefile(out)):
        raise UserError(f"{shown(out)}: the edited picture and the mask overlay have one name; give --mask-output")
    check_instruction(arguments.instruction)
    photo = Photo.open(arguments.image)
    check_boxes(photo, arguments.box)
    mask = None if arguments.mask is None else Photo.open(arguments.mask).array
    editor = Editor(arguments)
    edited = editor.edit(photo, arguments.instruction, arguments.seed, mask)
    kept = keep({mask_out: edited.overlay} if arguments.preview else {out: edited.photo, mask_out: edited.overlay})
    say(edit_summary(arguments, editor, edited, out, mask_out, kept.get(out, ())))
    return 0


def check_boxes(photo: Photo, boxes: Sequence[Box]) -> None:
    """UserError for one that selects nothing of a picture."""
    for box in boxes:
        try:
            box.pixels(photo.size)
        except ValueError as error:
            raise UserError(f"--{error}") from None


def drift_of(stats: Any) -> str | None:
    """What was found of the run's drift against its source, in words; None where it was not looked for."""
    found = stats.drift[0] if stats.drift else None
    return None if found is None else f"{found}{'; undone' * (found.moved or found.recoloured)}"


def check_instruction(text: str | None) -> None:
    """UserError for one that no model can read."""
    if text is None:
        raise UserError("instruction: expected a text, got none")
    if not text.strip():
        raise UserError("instruction: expected a text, got an empty one")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("instruction: expected a text in UTF-8, got other bytes") from None


def _config(arguments: argparse.Namespace) -> Any:
    """The config that the options ask for, checked against the steps."""
    from ..engine.config import SpecEditConfig
    from ..flash_edit import FlashEditConfig

    options: dict[str, Any] = dict(
        preserve=None if arguments.preserve == "none" else arguments.preserve, runner=arguments.runner
    )
    try:
        if arguments.method == "flash":
            if arguments.threshold is not None:
                options["mask_ratio"] = arguments.threshold
            config: Any = FlashEditConfig(**options)
        else:
            config = SpecEditConfig(
                quality=arguments.quality,
                preset=arguments.preset,
                draft=arguments.draft,
                finish=arguments.finish,
                threshold=arguments.threshold,
                **options,
            )
        config.step_counts(arguments.steps)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    return config


@contextmanager
def failing(arguments: argparse.Namespace, device: Any):
    """What the run raises within is one line, or as it is with --traceback."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"--device {device}: {str(error).split('. ')[0]}") from None
    except Exception as error:
        if arguments.traceback:
            raise
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        raise UserError(f"the edit failed: {kind}{reason(error)} (--traceback shows where)") from None


@contextmanager
def run_notes():
    """While it is open: what our own loggers warn of, and a prompt that diffusers cuts, a line each."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            cut = CUT.search(text)
            if text.startswith("num_inference_steps:"):  # which --steps asks for
                return
            if record.name.startswith("specedit_kernels"):
                text = one_line(text)
            elif cut is not None:
                text = f"the instruction is cut: the model reads its first {cut[1]} tokens"
            else:
                return
            if text not in found:
                found.append(text)

    loggers = [logging.getLogger(name) for name in ("specedit_kernels", "diffusers")]
    kept = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]

    def unseen(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    collector = Collector()
    for logger, (_, _, handlers) in zip(loggers, kept, strict=True):
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(collector)
        for handler in handlers:
            handler.addFilter(unseen)
    try:
        yield found
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, kept, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(collector)
            for handler in handlers:
                handler.removeFilter(unseen)


def region_overlay(source: Any, mask: Any) -> Any:
    """The source, PIL RGB, with the edit region tinted and its border drawn. mask: bool [rows, columns], numpy."""
    import numpy as np
    import PIL.Image

    rows = np.arange(source.height) * mask.shape[0] // source.height
    columns = np.arange(source.width) * mask.shape[1] // source.width
    region = mask[rows[:, None], columns]
    pixels = np.asarray(source)
    table = np.arange(256)
    out = np.rint(0.55 * table).astype(np.uint8)[pixels]
    for channel, tint in enumerate((255, 40, 60)):
        out[..., channel][region] = np.rint(0.6 * table + 0.4 * tint).astype(np.uint8)[pixels[..., channel][region]]
    border = max(2, max(source.size) // 512)
    edge = np.zeros_like(region)
    padded = np.pad(region, border)
    for down, right in ((0, border), (2 * border, border), (border, 0), (border, 2 * border)):
        edge |= region & ~padded[down : down + region.shape[0], right : right + region.shape[1]]
    out[edge] = (255, 230, 0)
    return PIL.Image.fromarray(out)


def region_ends(mask: Any, size: tuple[int, int], working: tuple[int, int], feather: int) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) of a picture of that size, as for --box, that holds an edit region with its seam.

    mask: bool [rows, columns] of tokens, one or more set. working: (width, height) that the seam's `feather` pixels are
    of.
    """
    import numpy as np

    ends = []
    for axis, side, small in ((1, size[0], working[0]), (0, size[1], working[1])):
        filled = np.flatnonzero(mask.any(axis=1 - axis))
        cell, seam = side / mask.shape[axis], (feather + 1) * side / small  # one pixel for the interpolation
        ends.append((math.floor(filled[0] * cell - seam), math.ceil((filled[-1] + 1) * cell + seam)))
    (x0, x1), (y0, y1) = ends
    return max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _flops(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.2f} {unit}FLOP"
    return f"{value:.0f} FLOP"


def edit_summary(
    arguments: argparse.Namespace, editor: Editor, edited: Edited, out: Path, mask_out: Path, notes: Sequence[str] = ()
) -> str:
    """What an edit did, on one screen. notes: lines beside its own."""
    from ..engine.output import group_steps

    config, stats, mask, threshold = editor.config, edited.stats, edited.mask, edited.threshold
    device, many, size = editor.pipe.device, editor.pipe.STEPS_OF_PLAIN, edited.photo.size
    at = "" if edited.working == size else f" (run at {edited.working[0]} x {edited.working[1]})"
    inside = f"{int(mask.sum())} of {mask.size} tokens in the edit region, {share(stats.edited[0])}"
    steps = "  ".join(f"{count} x {stage} {tokens:.0f}" for stage, tokens, count in group_steps(stats))
    plain_step = stats.plain_step_flops
    lines = [
        f'"{one_line(arguments.instruction)}"  {size[0]} x {size[1]}{at}, seed {arguments.seed}, {device}',
        "edited      nothing: a preview of the region" if arguments.preview else f"edited      {shown(out)}",
        f"mask        {shown(mask_out)}: {inside}",
    ]
    if size != edited.working and mask.any() and arguments.output_size == "source":
        box = region_ends(mask, size, edited.working, config.feather)
        lines.append(f"within      {','.join(map(str, box))} of the picture; beyond, every pixel is the source's")
    if threshold is not None:
        draft, unit = ("one step", " times the mean") if editor.flash else (stats.config.draft, "")
        lines.append(f"draft       {draft}, scores over {threshold:.3g}{unit} are edited, grown by {config.dilation}")
    if arguments.method == "flash":
        noise = "white"
        if stats.inverted:
            inside = config.noise_of_region(editor.pipe.SEES_SOURCE)
            noise = "of the source" + (", white in the edit region" if inside == "white" else "")
        elif stats.fallback is None:
            noise += ": the model folder has no one-step weights (cosi/)"
        words = "" if stats.key_tokens is None else f"; {int(stats.key_tokens[0].sum())} key text tokens"
        lines.append(f"noise       {noise}{words}")
    drift = drift_of(stats)
    if drift is not None:
        lines.append(f"drift       {drift}")
    if stats.native and stats.native[0] is not None:
        lines.append(f"native      {stats.native[0]}")
    said = [note for note in (*edited.notes, *notes) if not (arguments.preview and note.startswith("nothing changes"))]
    if stats.fallback == "source" and arguments.preview:  # which returns no picture
        said.append("nothing changes")
    lines += [f"note        {note}" for note in said]
    apart = f" and {stats.draft_nfe} of the draft" if stats.draft_nfe else ""
    same = f"{share(stats.flops / stats.plain_flops)} of a plain run with {stats.nfe} steps, " if stats.nfe else ""
    lines += [
        f"steps       {stats.nfe}{apart}; image tokens: {steps} (plain: {stats.plain_tokens})",
        f"transformer {_flops(stats.flops)}: {same}{share(stats.flops / (plain_step * many))} of one with {many} steps",
        "seconds     " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stats.seconds.items()),
        f"attention   {stats.backend or 'no mixed-resolution step'}" + (f" ({_why(device)})" if stats.backend else ""),
    ]
    return "\n".join(lines)


def _why(device) -> str:
    from .. import ops

    return ops.backend_of("mixed_res_attn", device)[1] or "the fastest here"
