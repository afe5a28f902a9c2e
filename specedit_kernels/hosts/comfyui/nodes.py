# SPDX-License-Identifier: Apache-2.0
"""The nodes: sampler, sampling with the found mask, mask from two pictures, composite at the source's size.

What imports diffusers is imported when a node first runs: that takes seconds, which ComfyUI's start shall not.
"""

from __future__ import annotations

import copy

import comfy.utils
import torch
from comfy_api.latest import ComfyExtension, io

from specedit_kernels import ops
from specedit_kernels.engine.config import BRACKET, FINISHES, PRESETS, QUALITIES, THRESHOLDS, SpecEditConfig

CATEGORY = "sampling/specedit"
METRICS = ("decoder", "latent")
LEFT = "by quality"
MULTIPLE = 32  # pixels: a block of tokens


class ScaleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpecEditScale",
            display_name="SpecEdit image size",
            category=CATEGORY,
            description="Brings a picture to a size that SpecEdit takes: sides in multiples of 32 pixels.",
            inputs=[
                io.Image.Input("image"),
                io.Float.Input("megapixels", default=1.0, min=0.01, max=16.0, step=0.01, tooltip="Of 1024 x 1024."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image, megapixels) -> io.NodeOutput:
        height, width = image.shape[1:3]
        times = (megapixels * 1024 * 1024 / (height * width)) ** 0.5
        size = [max(round(side * times / MULTIPLE), 1) * MULTIPLE for side in (width, height)]
        if size == [width, height]:
            return io.NodeOutput(image)
        scaled = comfy.utils.common_upscale(image.movedim(-1, 1), *size, "lanczos", "disabled")
        return io.NodeOutput(scaled.movedim(1, -1))


class SamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpecEditSampler",
            display_name="SpecEdit sampler",
            category=CATEGORY,
            description="A sampler for edits: it finds what the edit changes at low resolution, and computes at full"
            " resolution there alone. FLUX.1-Kontext and Qwen-Image-Edit; needs a ReferenceLatent.",
            inputs=[
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="The picture to edit: that of the first reference latent."),
                io.Mask.Input("mask", optional=True, tooltip="Where the edit is, in place of looking for it."),
                io.Combo.Input(
                    "quality", options=list(QUALITIES), default="balanced",
                    tooltip="Sets steps, finish and kv_refresh where they are left to it. paper: SpecEdit as its paper"
                    " has it.",
                ),
                io.Boolean.Input(
                    "preserve", default=False, tooltip="Put the source's latents back outside the edit at the end."
                ),
                io.Float.Input(
                    "threshold", default=0.0, min=0.0, max=4.0, step=0.01, optional=True,
                    tooltip="A score above it is an edit. 0: the calibrated one.",
                ),
                io.Int.Input("dilation", default=1, min=0, max=16, optional=True,
                             tooltip="Tokens of 16 pixels by which the found region grows."),
                io.Combo.Input(
                    "preset", options=[LEFT, *(str(n) for n in PRESETS)], default=LEFT, optional=True,
                    tooltip="How Euler steps are divided among the stages, in place of the quality's steps; the sigmas"
                    " say how many there are.",
                ),
                io.Combo.Input(
                    "finish", options=[LEFT, *FINISHES], default=LEFT, optional=True,
                    tooltip="full: the last steps compute all of the picture. locked: they stay at the edit, and the"
                    " latents outside are the source's.",
                ),
                io.Combo.Input(
                    "kv_refresh", options=[LEFT, BRACKET, *map(str, range(1, 10))], default=LEFT, optional=True,
                    tooltip="Every k-th mixed step computes its whole sequence, the others the edit alone; bracket: the"
                    " first one does, and from there the pixels outside go to the last one's.",
                ),
                io.Combo.Input("metric", options=list(METRICS), default="decoder", optional=True),
            ],
            outputs=[io.Sampler.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, vae, image, quality, preserve, mask=None, threshold=0.0, dilation=1, preset=LEFT, finish=LEFT,
        kv_refresh=LEFT, metric="decoder",
    ) -> io.NodeOutput:  # fmt: skip
        from .sampler import SpecEditSampler

        config = SpecEditConfig(
            quality=quality,
            preset=None if preset == LEFT else int(preset),
            finish=None if finish == LEFT else finish,
            kv_refresh=None if kv_refresh == LEFT else kv_refresh if kv_refresh == BRACKET else int(kv_refresh),
            metric=metric,
            dilation=dilation,
            threshold=threshold or None,
        )
        return io.NodeOutput(SpecEditSampler(config, vae, image, mask, preserve))


class SampleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpecEditSample",
            display_name="SpecEdit sample",
            category=CATEGORY,
            description="SamplerCustomAdvanced for a SpecEdit sampler, which also gives the mask of what was edited.",
            inputs=[
                io.Noise.Input("noise"),
                io.Guider.Input("guider"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
            ],
            outputs=[io.Latent.Output(), io.Mask.Output(display_name="mask"), io.String.Output(display_name="stats")],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image) -> io.NodeOutput:
        from .sampler import SpecEditSampler, summary

        if not isinstance(sampler, SpecEditSampler):
            raise TypeError(f"sampler: expected one of node SpecEdit sampler, got {type(sampler).__name__}")
        sampler = copy.copy(sampler)  # which keeps the result of this call alone
        latent = _stock_sampling()(noise, guider, sampler, sigmas, latent_image)
        mask, stats = sampler.result
        token = 8 * latent["samples"].shape[-1] // mask.shape[-1]
        return io.NodeOutput(latent, _on_pixels(mask, token), summary(stats))


def _stock_sampling():
    """The host's SamplerCustomAdvanced as a function to its latent."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced as Stock

    if hasattr(Stock, "execute"):
        return lambda *args: Stock.execute(*args).args[0]
    return lambda *args: Stock().sample(*args)[0]


def _on_pixels(mask: torch.Tensor, token: int) -> torch.Tensor:
    """bool [B, rows, columns] -> the host's MASK, fp32 [B, H, W]."""
    from specedit_kernels.engine import stages

    rows, columns = mask.shape[1:]
    return stages.on_pixels(mask.flatten(1), (rows, columns), token)[:, 0].float().cpu()


class MaskNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpecEditMask",
            display_name="Edit mask from two images",
            category=CATEGORY,
            description="Where an edited picture differs from its source in what it shows, not in how it was coded.",
            inputs=[
                io.Vae.Input("vae"),
                io.Image.Input("source"),
                io.Image.Input("edited"),
                io.Float.Input("threshold", default=0.0, min=0.0, max=4.0, step=0.01,
                               tooltip="A score above it is an edit. 0: the calibrated one."),
                io.Int.Input("dilation", default=1, min=0, max=16,
                             tooltip="Tokens of 16 pixels by which the found region grows."),
            ],
            outputs=[io.Mask.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae, source, edited, threshold, dilation) -> io.NodeOutput:
        from specedit_kernels.engine import stages

        from .codec import HostCodec

        codec = HostCodec(vae, torch.device("cpu"))
        rows, columns = (max(round(side / codec.token), 1) for side in source.shape[1:3])
        grid = (rows, columns)
        size = grid[0] * codec.token, grid[1] * codec.token
        with torch.no_grad():
            latents = []
            for image in (edited, source):
                image = image[..., :3].movedim(-1, 1)
                if image.shape[-2:] != size:
                    image = comfy.utils.common_upscale(image, size[1], size[0], "lanczos", "disabled")
                latents.append(codec.encode(image.float() * 2 - 1))
            count = max(len(x) for x in latents)
            if any(len(x) not in (1, count) for x in latents):
                raise ValueError(f"edited: expected as many pictures as sources or one, got {len(edited)}")
            a, b = (x.expand(count, *x.shape[1:]) for x in latents)
            scores = stages.discrepancy(codec, None, "decoder", a, b, grid)
            limit = threshold or THRESHOLDS["decoder", "matched", "full_step"]
            found, _, _ = ops.select_tokens(scores, grid, limit, dilation, 0)
        mask = _on_pixels(found.reshape(-1, *grid), codec.token)
        if mask.shape[1:] != source.shape[1:3]:
            mask = torch.nn.functional.interpolate(mask[:, None], size=source.shape[1:3], mode="nearest-exact")[:, 0]
        return io.NodeOutput(mask)


class CompositeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpecEditComposite",
            display_name="Composite at native size",
            category=CATEGORY,
            description="The source at its own size with the edit in the masked region; outside it no pixel changes.",
            inputs=[
                io.Image.Input("source", tooltip="The picture as it was loaded, of any size."),
                io.Image.Input("edited", tooltip="The whole edited picture, of any size."),
                io.Mask.Input("mask"),
                io.Int.Input("feather", default=8, min=0, max=256,
                             tooltip="Pixels of the edited picture over which the two mix, outside the mask."),
                io.Boolean.Input("match", default=True,
                                 tooltip="Bring the edit's brightness and colour to the source's around the region."),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, source, edited, mask, feather, match) -> io.NodeOutput:
        from specedit_kernels.images.composite import composite

        count = max(len(source), len(edited), len(mask))
        for name, several in (("source", source), ("edited", edited), ("mask", mask)):
            if len(several) not in (1, count):
                raise ValueError(f"{name}: expected 1 or {count} pictures, got {len(several)}")
        found = []
        for i in range(count):
            picture, edit, region = (x[i % len(x)].float().cpu() for x in (source, edited, mask))
            region = region.clamp(0, 1).numpy()
            found.append(torch.from_numpy(composite(picture.numpy(), edit[..., :3].numpy(), region, feather, match)))
        return io.NodeOutput(torch.stack(found))


class SpecEditExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ScaleNode, SamplerNode, SampleNode, MaskNode, CompositeNode]
