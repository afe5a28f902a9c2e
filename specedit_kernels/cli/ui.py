# SPDX-License-Identifier: Apache-2.0
"""`specedit ui`: a page to try an edit. On this machine alone by default; it sends nothing anywhere.

A picture is uploaded as a file, so that its depth, profile and size stay; the brush paints on a small copy.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..images.boxes import boxes_of
from ..images.files import ImageFileError, Photo, check_target, reason
from . import models
from .edit import check_instruction, region_overlay, share
from .mask import heat_map
from .text import UserError, say

SHOWN = 1024  # largest side of what the page shows and the brush paints on
QUALITIES = ("fast", "balanced", "best", "paper")
MODES = ("replace", "limit", "add")


class Cancelled(Exception):
    """The person stopped the run."""


class Session:
    """A loaded model, one run at a time."""

    def __init__(self, model: str | None, device: str | None, out: Path):
        import specedit_kernels

        folder = models.model_folder(model)
        name = models.model_class(folder)
        self.settings = models.model_settings(folder, name)
        kind = getattr(specedit_kernels, f"SpecEdit{name}")
        self.pipe = models.load_pipeline(kind, folder, *models.device_of(device))
        self.pipe.set_progress_bar_config(disable=True)
        self.out = out
        self._lock, self._cancelled = threading.Lock(), False

    def cancel(self) -> None:
        """Stop the run at its next step."""
        self._cancelled = True
        self.pipe._interrupt = True

    def run(
        self, path: str | None, instruction: str, painted: Any, box: str, mode: str, quality: str, seed: int,
        preview: bool, progress: Callable[[int, int], None],
    ) -> tuple[Any, Any, str, str | None]:  # fmt: skip
        """(picture before and after, the region or the scores over it, figures, path of the edited file or None).

        path: of the source. painted: of the brush, a PIL picture whose opaque pixels are the mask, or None. UserError
        in one line for input that cannot be; Cancelled.
        """
        import torch

        from ..engine.config import SpecEditConfig

        if path is None:
            raise UserError("picture: expected one, got none")
        check_instruction(instruction)
        photo, mask = Photo.open(path), None
        if painted is not None and painted.getchannel("A").getextrema()[1] > 0:
            mask = painted.getchannel("A").point(lambda level: 255 * (level > 0))
        region = boxes_of(box) if box and box.strip() else None
        if mode != "replace" and mask is None and region is None:
            raise UserError(f"mask mode {mode}: expected a painted mask or a box")
        config = SpecEditConfig(quality=quality)

        def on_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if self._cancelled:
                raise Cancelled
            progress(index + 1, pipe.num_timesteps)  # guidance can have others than the config says
            return {}

        with self._lock:
            self._cancelled = False
            found = self.pipe(
                image=photo, prompt=instruction, mask_image=mask, region=region, mask_mode=mode, preview=preview,
                output_size="source", specedit=config, generator=torch.Generator().manual_seed(int(seed)),
                callback_on_step_end=on_step, **self.settings,
            )  # fmt: skip
            if self._cancelled:
                raise Cancelled
        edited, stats = found.images[0], found.stats
        edited = edited if isinstance(edited, Photo) else photo.with_picture(edited)
        tokens, before = found.mask[0].cpu().numpy(), small(photo.pil())
        lines = [f"{photo.size[0]} × {photo.size[1]}: {int(tokens.sum())} of {tokens.size} tokens in the edit region, "
                 f"{share(float(tokens.mean()))}"]  # fmt: skip
        over = region_overlay(before, tokens)
        if preview:
            return None, over, lines[0], None
        if found.scores is not None and stats.threshold is not None:
            import numpy as np
            import PIL.Image

            heat = heat_map(np.asarray(before), found.scores[0].float().cpu(), stats.threshold)
            over = PIL.Image.fromarray(heat)
        target = check_target(self.out / f"{Path(path).stem}-edited.png")
        lines += photo.notes
        lines += edited.save(target)
        if stats.fallback is not None:
            lines.append({"dense": "nearly everything changes: all tokens were computed at full resolution",
                          "source": "nothing changes: the source is returned"}[stats.fallback])  # fmt: skip
        if stats.nfe:
            part = share(stats.flops / stats.plain_flops)
            lines.append(f"{stats.nfe} steps; transformer: {part} of as many plain steps")
        lines.append("seconds: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stats.seconds.items()))
        return (before, small(edited.pil())), over, "\n".join(lines), str(target)


def small(picture: Any) -> Any:
    """A PIL picture in RGB, for the page."""
    shown = picture.convert("RGB")
    shown.thumbnail((SHOWN, SHOWN))
    return shown


def page(session: Session) -> Any:
    """The page, as gradio's Blocks."""
    import gradio as gr

    def load(path: str | None) -> Any:
        if path is None:
            return None
        try:
            return {"background": small(Photo.open(path).pil()), "layers": [], "composite": None}
        except (ImageFileError, OSError, ValueError) as error:
            raise gr.Error(reason(error), print_exception=False) from None

    def painted(value: Any) -> Any:
        layers = [layer for layer in (value or {}).get("layers", []) if layer is not None]
        if not layers:
            return None
        import PIL.Image

        whole = layers[0].convert("RGBA")
        for layer in layers[1:]:
            whole = PIL.Image.alpha_composite(whole, layer.convert("RGBA"))
        return whole

    def started(preview: bool) -> Callable[..., Any]:
        def run(path, instruction, canvas, box, mode, quality, seed, progress=gr.Progress()):  # noqa: B008
            progress(0, desc="draft")
            try:
                pair, over, text, file = session.run(
                    path, instruction, painted(canvas), box, mode, quality, seed, preview,
                    lambda done, total: progress((done, total), unit="steps"),
                )  # fmt: skip
            except Cancelled:
                return gr.skip(), gr.skip(), "cancelled", gr.skip()
            except (UserError, ImageFileError, ValueError, TypeError) as error:
                raise gr.Error(reason(error), print_exception=False) from None
            return pair if pair else gr.skip(), over, text, gr.update(value=file, interactive=file is not None)

        return run

    with gr.Blocks(title="specedit", analytics_enabled=False) as blocks:
        with gr.Row():
            with gr.Column():
                source = gr.File(label="Picture", file_types=["image"], type="filepath", elem_id="source")
                canvas = gr.ImageEditor(
                    label="Brush (where to edit; leave it empty and the draft looks for it)", type="pil", sources=(),
                    transforms=(), layers=False, brush=gr.Brush(colors=["#ff3030"], color_mode="fixed"),
                    elem_id="canvas",
                )  # fmt: skip
                instruction = gr.Textbox(label="Instruction", elem_id="instruction")
                with gr.Row():
                    quality = gr.Dropdown(QUALITIES, value="balanced", label="Quality")
                    mode = gr.Dropdown(MODES, value="replace", label="Brush and box: in place of the draft's region")
                    box = gr.Textbox(label="Box: left,top,right,bottom in pixels or %", elem_id="box")
                    seed = gr.Number(value=0, precision=0, label="Seed")
                with gr.Row():
                    look = gr.Button("Show the region", elem_id="look")
                    edit = gr.Button("Edit", variant="primary", elem_id="edit")
                    stop = gr.Button("Cancel", elem_id="stop")
            with gr.Column():
                pair = gr.ImageSlider(label="Before and after", interactive=False, elem_id="pair", type="pil")
                over = gr.Image(label="Region, or scores of the draft", interactive=False, elem_id="over",
                                buttons=["download", "fullscreen"])  # fmt: skip
                figures = gr.Textbox(label="Figures", interactive=False, lines=4, elem_id="figures")
                file = gr.DownloadButton("Download at the source's size", interactive=False, elem_id="file")
        source.change(load, source, canvas, show_progress="hidden")
        inputs, outputs = [source, instruction, canvas, box, mode, quality, seed], [pair, over, figures, file]
        for button, preview in ((look, True), (edit, False)):
            button.click(started(preview), inputs, outputs, concurrency_limit=1, concurrency_id="model")
        stop.click(session.cancel, None, None, queue=False)
    return blocks


def run(arguments: argparse.Namespace) -> int:
    """`specedit ui`. Returns the exit code."""
    # before gradio is imported: neither it nor the hub's client reports anything
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install 'specedit-kernels[ui]'") from None
    models.quiet()
    with tempfile.TemporaryDirectory(prefix="specedit-") as out:
        session = Session(arguments.model, arguments.device, Path(out))
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
        say(f"specedit: http://{arguments.host}:{arguments.port}  (Ctrl-C ends it)")
        blocks = page(session).queue(default_concurrency_limit=1)
        blocks.launch(
            server_name=arguments.host, server_port=arguments.port, share=False, quiet=True, theme=theme,
            allowed_paths=[out], show_error=True, footer_links=[],
        )  # fmt: skip
    return 0
