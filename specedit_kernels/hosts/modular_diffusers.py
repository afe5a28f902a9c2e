# SPDX-License-Identifier: Apache-2.0
"""Blocks for diffusers' modular pipelines: SpecEdit in the place of the stock denoise block.

A block map of FLUX.1-Kontext or Qwen-Image-Edit keeps its stock text encoder. The denoise block runs the drop-in
pipeline's own call over the modular pipeline's components, and its result is that one's. It encodes pictures itself,
because the stages need them at several sizes: a stock "vae_encoder" before it is without use.

    blocks = FluxKontextAutoBlocks()
    blocks.sub_blocks["denoise"] = SpecEditFluxKontextDenoiseStep()
    pipe = blocks.init_pipeline(folder)

or a whole map of ours: `SpecEditFluxKontextBlocks()`, `SpecEditQwenImageEditBlocks()`. The folders of
integrations/modular_diffusers load these by `ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModularPipelineBlocks,
    QwenImageTransformer2DModel,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage_edit import QwenImageEditVLEncoderStep
from torch import Tensor

from .. import ops
from ..engine.config import THRESHOLDS, SpecEditConfig
from ..engine.registry import codec_of
from ..engine.source_size import pixels_of
from ..engine.stages import discrepancy
from ..models.flux_kontext import SpecEditFluxKontextPipeline
from ..models.qwen_image_edit import SpecEditQwenImageEditPipeline
from ..sampling.grid import BLOCK

MAX_COMPARED_AREA = 1024**2  # pixels

# A pipeline of each modular pipeline, so that what it keeps between calls (graphs, buffers) serves the next one. Not on
# the block: diffusers makes deep copies of blocks.
_PIPELINES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@functools.cache
def _undecoded(kind: Any) -> type:
    """A SpecEdit pipeline class whose calls give clean latents, and how they are decoded, in the place of pictures."""

    def _decode(self, run, clean, selection, output_type):
        # a plain function: diffusers makes deep copies of a state, and a function is not copied with what it refers to
        def decode(output_type: str) -> Any:
            return kind._decode(self, run, clean, selection, output_type)

        return clean, decode

    return type(kind.__name__, (kind,), {"_decode": _decode, "__doc__": kind.__doc__, "__module__": __name__})


class SpecEditDenoiseStep(ModularPipelineBlocks):
    """What both models' denoise blocks share; a class names its pipeline, its components and its text's inputs.

    Inputs: those of the drop-in pipeline's call by the same names, texts as embeddings, one for each prompt. Outputs:
    `latents`, clean, in the form that the stock decode block takes; `height` and `width` in pixels; `edit_mask`, bool
    [B, rows, columns], the tokens that were edited; `edit_scores`, fp32 of that shape, None with a mask_image;
    `specedit_stats`; `specedit_decode`, for SpecEditDecodeStep.
    """

    PIPELINE: Any
    COMPONENTS: tuple[ComponentSpec, ...]
    TEXTS: tuple[str, ...]
    OTHERS: tuple[InputParam, ...]

    def __init__(self):
        super().__init__()
        self._progress_bar_config = {}

    def set_progress_bar_config(self, **options: Any) -> None:
        """As DiffusionPipeline's: options of tqdm."""
        self._progress_bar_config = options

    @property
    def description(self) -> str:
        return "SpecEdit's denoising: full resolution only where the picture changes. Gives clean, unpacked latents."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return list(self.COMPONENTS)

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("image", required=True, description="The picture to edit, or as many as prompts."),
            InputParam("specedit", type_hint=SpecEditConfig, description="Options of the edit; None: the defaults."),
            InputParam("mask_image", description="White where the edit is; it replaces the draft."),
            *(InputParam(name, type_hint=Tensor, required=name == "prompt_embeds") for name in self.TEXTS),
            InputParam("height", type_hint=int),
            InputParam("width", type_hint=int),
            InputParam("num_images_per_prompt", type_hint=int, default=1),
            InputParam("num_inference_steps", type_hint=int, description="None: the steps of the options."),
            InputParam("sigmas", type_hint=list),
            InputParam("latents", type_hint=Tensor, description="Packed white noise on the fine grid, [B, N, 4C]."),
            InputParam("generator"),
            *self.OTHERS,
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=Tensor, description="Clean latents, scaled, not packed."),
            OutputParam("height", type_hint=int),
            OutputParam("width", type_hint=int),
            OutputParam("edit_mask", type_hint=Tensor, description="bool [B, rows, columns]: edited tokens."),
            OutputParam("edit_scores", type_hint=Tensor, description="fp32 [B, rows, columns], None with a mask."),
            OutputParam("specedit_stats", description="SpecEditStats of the edit."),
            OutputParam("specedit_decode", type_hint=Callable, description="output_type -> the decoded pictures."),
        ]

    def _options(self, components: Any) -> dict[str, Any]:
        """Options of the call that are no inputs."""
        raise NotImplementedError

    def _pipeline(self, components: Any) -> Any:
        """The pipeline over these components, made again where one of them was exchanged."""
        parts = {spec.name: getattr(components, spec.name) for spec in self.COMPONENTS if spec.name != "guider"}
        made = _PIPELINES.get(components)
        if made is None or any(getattr(made, name) is not part for name, part in parts.items()):
            texts = dict.fromkeys(self.PIPELINE._get_signature_keys(self.PIPELINE)[0] - parts.keys())
            if made is not None:
                made._release()
            made = _PIPELINES[components] = _undecoded(self.PIPELINE)(**parts, **texts)
        made.set_progress_bar_config(**self._progress_bar_config)
        return made

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        options = {param.name: getattr(block, param.name) for param in self.inputs} | self._options(components)
        if options["specedit"] is False:
            raise ValueError("specedit: expected a SpecEditConfig or None, got False; the stock block runs without it")
        out = self._pipeline(components)(**options, output_type="pt")
        clean, block.specedit_decode = out.images
        block.latents = self._stock_form(clean)
        token = codec_of(components.vae).token
        block.height, block.width = (side * token for side in out.mask.shape[-2:])
        block.edit_mask, block.edit_scores, block.specedit_stats = out.mask, out.scores, out.stats
        self.set_block_state(state, block)
        return components, state

    @staticmethod
    def _stock_form(clean: Tensor) -> Tensor:
        """Clean latents [B, C, H, W] as the stock decode block takes them."""
        return clean


class SpecEditFluxKontextDenoiseStep(SpecEditDenoiseStep):
    """For "denoise" of FluxKontextAutoBlocks."""

    model_name = "flux-kontext"
    PIPELINE = SpecEditFluxKontextPipeline
    COMPONENTS = (
        ComponentSpec("transformer", FluxTransformer2DModel),
        ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
        ComponentSpec("vae", AutoencoderKL),
    )
    TEXTS = ("prompt_embeds", "pooled_prompt_embeds")
    OTHERS = (
        InputParam("guidance_scale", type_hint=float, default=3.5),
        InputParam("max_area", type_hint=int, default=1024**2),
        InputParam("_auto_resize", type_hint=bool, default=True),
        InputParam("joint_attention_kwargs"),
    )

    def _options(self, components: Any) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}


class SpecEditQwenImageEditDenoiseStep(SpecEditDenoiseStep):
    """For "denoise" of QwenImageEditAutoBlocks. The guider's scale is that of true guidance, with the rescaling that
    QwenImageEditPipeline has."""

    model_name = "qwenimage-edit"
    PIPELINE = SpecEditQwenImageEditPipeline
    COMPONENTS = (
        ComponentSpec("transformer", QwenImageTransformer2DModel),
        ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
        ComponentSpec("vae", AutoencoderKLQwenImage),
        # as the text encoder's block has it
        *(spec for spec in QwenImageEditVLEncoderStep().expected_components if spec.name == "guider"),
    )
    TEXTS = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    OTHERS = (InputParam("max_area", type_hint=int), InputParam("attention_kwargs"))

    def _options(self, components: Any) -> dict[str, Any]:
        guider = components.guider
        if type(guider) is not ClassifierFreeGuidance:
            raise TypeError(f"guider: SpecEdit supports ClassifierFreeGuidance, got {type(guider).__name__}")
        return {"true_cfg_scale": guider.guidance_scale if components.requires_unconditional_embeds else 1.0}

    @staticmethod
    def _stock_form(clean: Tensor) -> Tensor:
        return clean.unsqueeze(2)


class SpecEditDecodeStep(ModularPipelineBlocks):
    """Pictures of a SpecEdit denoise block: with preserve="pixels" those outside the edit are the source's own, which
    the stock decode block cannot know of."""

    @property
    def description(self) -> str:
        return "Decodes a SpecEdit denoise block's latents; keeps the source's own pixels where its options say so."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("specedit_decode", required=True, type_hint=Callable),
            InputParam("output_type", type_hint=str, default="pil"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        if block.output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: expected 'pil', 'np' or 'pt', got {block.output_type!r}")
        block.images = block.specedit_decode(block.output_type)
        self.set_block_state(state, block)
        return components, state


class SpecEditMaskStep(ModularPipelineBlocks):
    """The edit mask from two pictures: `image`, and `edited_image`, an edit of it by any means (few steps, a smaller
    model, a person). Does nothing where there is a mask_image already, or no edited_image: then the denoise block's
    draft finds the region.
    """

    VAE: type = AutoencoderKL

    @property
    def description(self) -> str:
        return "Makes mask_image of where edited_image differs from image, where both are given."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", self.VAE)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("image"),
            InputParam("edited_image", type_hint=PIL.Image.Image, description="An edit of image, by any means."),
            InputParam("mask_image"),
            InputParam("mask_threshold", type_hint=float, description="On the scale of token_discrepancy, 0 to 4."),
            InputParam("specedit", type_hint=SpecEditConfig),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("mask_image", description="bool [1, rows, columns]: tokens to edit; or what was given.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        if block.mask_image is None and block.edited_image is not None:
            config = block.specedit or SpecEditConfig()
            block.mask_image = self._mask(components, block, config)
        self.set_block_state(state, block)
        return components, state

    @staticmethod
    def _mask(components: Any, block: Any, config: SpecEditConfig) -> Tensor:
        pair = block.image, block.edited_image
        for name, picture in zip(("image", "edited_image"), pair):
            if not isinstance(picture, PIL.Image.Image):
                raise TypeError(f"{name}: expected a PIL picture for a mask from two, got {type(picture).__name__}")
        if config.metric == "projected":
            raise ValueError("specedit: expected metric 'decoder' or 'latent' for a mask from two pictures")
        codec, (width, height) = codec_of(components.vae), block.image.size
        multiple = codec.token * BLOCK
        scale = min(1.0, (MAX_COMPARED_AREA / (width * height)) ** 0.5)
        size = tuple(max(int(side * scale) // multiple, 1) * multiple for side in (width, height))
        shown = [picture.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS) for picture in pair]
        pixels = pixels_of(shown, components._execution_device).to(components.vae.dtype)
        source, edited = codec.encode(pixels).chunk(2)
        grid = (size[1] // codec.token, size[0] // codec.token)
        scores = discrepancy(codec, None, config.metric, edited, source, grid)
        threshold = block.mask_threshold
        if threshold is None:
            threshold = THRESHOLDS[config.metric, "matched", "full_step"]
        return ops.select_tokens(scores, grid, threshold, config.dilation, 0)[0].reshape(-1, *grid).cpu()


class SpecEditQwenImageEditMaskStep(SpecEditMaskStep):
    VAE = AutoencoderKLQwenImage


class SpecEditFluxKontextBlocks(SequentialPipelineBlocks):
    """FluxKontextAutoBlocks with SpecEdit: text encoder (stock), mask, denoise, decode."""

    model_name = "flux-kontext"
    block_classes = (FluxTextEncoderStep, SpecEditMaskStep, SpecEditFluxKontextDenoiseStep, SpecEditDecodeStep)
    block_names = ("text_encoder", "mask", "denoise", "decode")

    @property
    def description(self) -> str:
        return "FLUX.1-Kontext edits with SpecEdit."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]


class SpecEditQwenImageEditBlocks(SequentialPipelineBlocks):
    """QwenImageEditAutoBlocks with SpecEdit: text encoder (stock, which sees the picture at 1024 * 1024 pixels), mask,
    denoise, decode."""

    model_name = "qwenimage-edit"
    block_classes = (
        QwenImageEditVLEncoderStep, SpecEditQwenImageEditMaskStep, SpecEditQwenImageEditDenoiseStep, SpecEditDecodeStep
    )  # fmt: skip
    block_names = ("text_encoder", "mask", "denoise", "decode")

    @property
    def description(self) -> str:
        return "Qwen-Image-Edit edits with SpecEdit."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]
