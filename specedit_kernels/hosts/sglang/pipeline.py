# SPDX-License-Identifier: Apache-2.0
"""The pipeline that SGLang's registry makes: written against sglang 0.5.23.

SGLang checks the request and encodes the texts, with its own Qwen2.5-VL; one stage of ours does the rest. The
transformer, the autoencoder and the scheduler are diffusers' classes, loaded from the checkpoint's folder in the place
of SGLang's, which have layers and names of their own that the stages do not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from sglang.multimodal_gen.configs.pipeline_configs.qwen_image import QwenImageEditPlusPipelineConfig
from sglang.multimodal_gen.configs.sample.qwenimage import QwenImageEditPlusSamplingParams
from sglang.multimodal_gen.registry import register_pipeline
from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType
from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentLoader
from sglang.multimodal_gen.runtime.managers.memory_managers.component_manager import ComponentUse
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch, Req
from sglang.multimodal_gen.runtime.pipelines_core.stages import (
    ImageEncodingStage,
    InputValidationStage,
    PipelineStage,
)
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.runtime.utils.precision_types import PRECISION_TO_TYPE

from ...models.qwen_image_edit import SpecEditQwenImageEditPlusPipeline as Editor
from .._serving import WARM_UP, edit, options_of, refuse

MODELS = ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511")
PICTURES = "specedit_pictures"  # in a request's `extra`: the pictures as they came


@dataclass
class SpecEditSamplingParams(QwenImageEditPlusSamplingParams):
    """specedit: options of the request (docs/serve.md), in JSON requests and Python calls; a form has none, and takes
    those of the server's SPECEDIT_OPTIONS. num_inference_steps: where it is not given, the options' own number."""

    specedit: dict | None = None

    @classmethod
    def image_request_extra_fields(cls) -> frozenset[str]:
        return super().image_request_extra_fields() | {"specedit"}


@dataclass
class SpecEditPipelineConfig(QwenImageEditPlusPipelineConfig):
    """The host's, without its own encoding of the pictures: the stages encode them at several sizes."""

    def preprocess_vae_image(self, batch: Req, vae_image_processor: Any) -> Req:
        return batch

    def supports_disaggregation(self) -> bool:
        return False


class DiffusersLoader(ComponentLoader):
    """A component in diffusers' own class, from the checkpoint's folder."""

    expected_library = "diffusers"
    CLASSES: ClassVar[dict[str, Any]] = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }

    def should_raise_customized_load_error(self, server_args: ServerArgs, component_name: str) -> bool:
        return True  # or SGLang loads what diffusers' AutoModel finds, in another dtype

    def load_customized(self, component_model_path: str, server_args: ServerArgs, component_name: str) -> Any:
        kind, config = self.CLASSES[component_name], server_args.pipeline_config
        if component_name == "scheduler":
            return kind.from_pretrained(component_model_path)
        precision = config.dit_precision if component_name == "transformer" else config.vae_precision
        return kind.from_pretrained(component_model_path, torch_dtype=PRECISION_TO_TYPE[precision]).eval()


class SpecEditInputStage(InputValidationStage):
    """The host's checks; keeps the pictures as they came beside the smaller ones that the text encoder sees."""

    def preprocess_condition_image(self, batch: Req, server_args: ServerArgs, *size: Any) -> None:
        pictures = batch.condition_image
        batch.extra[PICTURES] = list(pictures) if isinstance(pictures, list) else [pictures]
        super().preprocess_condition_image(batch, server_args, *size)


class SpecEditStage(PipelineStage):
    """Encoding, denoising and decoding of one request, by the drop-in pipeline."""

    COMPONENTS = ("transformer", "vae")

    def __init__(self, transformer: Any, vae: Any, scheduler: Any):
        super().__init__()
        self.editor = Editor(
            scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, processor=None, transformer=transformer
        )
        self.editor.set_progress_bar_config(disable=True)

    @property
    def role_affinity(self) -> RoleType:
        return RoleType.DENOISER

    def component_uses(self, server_args: ServerArgs, stage_name: str | None = None) -> list[ComponentUse]:
        stage_name = self._component_stage_name(stage_name)
        return [
            ComponentUse(stage_name, name, phase=name, memory_intensive=name == "transformer")
            for name in self.COMPONENTS
        ]

    def _texts(self, batch: Req, dtype: torch.dtype) -> dict[str, Any]:
        """Embeddings and masks of a request, by the names of the pipeline's call."""
        found = {}
        branches = ("", "negative_") if batch.do_classifier_free_guidance else ("",)
        for name in (f"{branch}prompt_embeds" for branch in branches):
            embeds, mask = getattr(batch, name), getattr(batch, f"{name}_mask")
            if not embeds:
                raise ValueError(f"{name}: expected those of the image encoding stage, got none; is there a picture?")
            found[name], found[f"{name}_mask"] = embeds[0].to(dtype), mask[0] if mask else None
        return found

    @torch.no_grad()
    def forward(self, batch: Req, server_args: ServerArgs) -> OutputBatch:
        if isinstance(batch.prompt, list) and len(batch.prompt) > 1:
            raise ValueError(f"prompt: expected one a request, got {len(batch.prompt)}")
        pictures = batch.extra.get(PICTURES)
        if not pictures:
            raise ValueError("image: expected a picture to edit, got none")
        explicit = batch.extra.get("explicit_fields", ())
        size = (batch.height, batch.width) if {"height", "width"} & set(explicit) else None
        scale = batch.guidance_scale if batch.true_cfg_scale is None else batch.true_cfg_scale
        with (
            self.use_declared_component(component_name="transformer", module=self.editor.transformer) as transformer,
            self.use_declared_component(component_name="vae", module=self.editor.vae) as vae,
        ):
            if transformer is not self.editor.transformer or vae is not self.editor.vae:
                self.editor.register_modules(transformer=transformer, vae=vae)
            out = edit(
                self.editor,
                pictures,
                self._texts(batch, transformer.dtype),
                given=WARM_UP if batch.is_warmup else getattr(batch, "specedit", None),
                size=size,
                steps=batch.num_inference_steps if "num_inference_steps" in explicit and not batch.is_warmup else None,
                true_cfg_scale=scale if batch.do_classifier_free_guidance else 1.0,
                count=batch.num_outputs_per_prompt,
                generator=batch.generator,
            )
        if batch.metrics is not None:
            for stage, seconds in out.stats.seconds.items():
                batch.metrics.record_stage(f"specedit.{stage}", seconds)
        frames = [np.asarray(image.convert("RGB")) for image in out.images]
        return OutputBatch(output=frames, metrics=batch.metrics, usage=batch.usage)


class SpecEditPipeline(ComposedPipelineBase):
    """In the place of SGLang's own QwenImageEditPlusPipeline."""

    pipeline_name = "QwenImageEditPlusPipeline"
    _required_config_modules = ["processor", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    component_loaders = dict.fromkeys(DiffusersLoader.CLASSES, DiffusersLoader)

    def validate_disagg_role(self, role: RoleType) -> None:
        refuse({"disagg_role": (role, RoleType.MONOLITHIC)})

    def initialize_pipeline(self, server_args: ServerArgs) -> None:
        refuse(
            {
                "tp_size": (server_args.tp_size, 1),
                "sp_degree": (server_args.sp_degree, 1),
                "enable_cfg_parallel": (server_args.enable_cfg_parallel, False),
                "lora_path": (server_args.lora_path, None),
            }
        )
        options_of()  # the server's own, before the first request

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        self.add_stage(SpecEditInputStage())
        self.add_stage(
            ImageEncodingStage(
                image_processor=self.get_module("processor"), text_encoder=self.get_module("text_encoder")
            )
        )
        self.add_stage(SpecEditStage(*(self.get_module(name) for name in ("transformer", "vae", "scheduler"))))


def register() -> None:
    """Put our pipeline in the place of SGLang's for Qwen-Image-Edit-2509 and -2511, and folders of them."""
    register_pipeline(
        SpecEditPipeline,
        sampling_param_cls=SpecEditSamplingParams,
        pipeline_config_cls=SpecEditPipelineConfig,
        hf_model_paths=list(MODELS),
        model_detectors=[lambda name: name == SpecEditPipeline.pipeline_name.lower()],
        overwrite=True,
    )
