# SPDX-License-Identifier: Apache-2.0
"""The pipeline that vLLM-Omni's registry makes: written against vllm-omni 0.30.0.

The transformer is diffusers' class, filled by the host's loader through the names that the checkpoint's files have:
the stages need its modules, where the host's own has layers of vLLM with other names. The other parts are those that
the host's own pipeline has (transformers' text encoder, diffusers' autoencoder).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.interface import SupportImageInput, SupportsComponentDiscovery

from ...models.qwen_image_edit import SpecEditQwenImageEditPlusPipeline as Editor
from .._serving import WARM_UP, edit, options_of, pictures_of, refuse

logger = logging.getLogger("vllm_omni.specedit")  # under the host's, which has the handlers

TRUE_CFG_SCALE = 4.0  # the host's own default


def pictures_and_mask(prompt: Any) -> tuple[list[Any], Any]:
    """(the pictures of a prompt, its mask or None); ValueError where it has no picture."""
    data = prompt.get("multi_modal_data") if isinstance(prompt, dict) else None
    if not data or data.get("image") is None:
        raise ValueError("image: expected a picture in the prompt's multi_modal_data, got none")
    return pictures_of(data["image"]), data.get("mask_image")


def pre_process_func(od_config: OmniDiffusionConfig) -> Callable[[Any], Any]:
    """Checks of a request before it waits for its turn; pictures go to the pipeline as they came."""

    def pre_process(request: Any) -> Any:
        pictures_and_mask(request.prompt)
        options_of(request.sampling_params.extra_args.get("specedit"))
        return request

    return pre_process


def post_process_func(od_config: OmniDiffusionConfig) -> Callable[[Any], Any]:
    """Results are pictures already."""
    return lambda output: output


def check_config(od_config: OmniDiffusionConfig) -> None:
    """ValueError where the server is to run in a way that the stages do not know."""
    parallel = od_config.parallel_config
    names = ("tensor_parallel_size", "sequence_parallel_size", "cfg_parallel_size", "pipeline_parallel_size",
             "vae_patch_parallel_size")  # fmt: skip
    wanted: dict[str, tuple[Any, Any]] = {name: (getattr(parallel, name, None), 1) for name in names}
    wanted["use_hsdp"] = (getattr(parallel, "use_hsdp", None), False)
    for name in ("enable_cpu_offload", "enable_layerwise_offload", "step_execution", "streaming_output"):
        wanted[name] = (getattr(od_config, name, None), False)
    wanted["quantization_config"] = (getattr(od_config, "quantization_config", None), None)
    wanted["cache_backend"] = (getattr(od_config, "cache_backend", None), "none")
    refuse(wanted)


class SpecEditOmniPipeline(nn.Module, SupportImageInput, SupportsComponentDiscovery):
    """Qwen-Image-Edit-Plus for vLLM-Omni. One request is one prompt with one to four pictures, the first of which is
    edited, and `num_outputs_per_prompt` results.

    Of the request: `mask_image` beside the pictures; `specedit` in extra_args, the options (docs/serve.md); without
    num_inference_steps those of the options. A request whose size is not given ("auto") comes back at the picture's own
    size, equal to it outside the edit. `stage_durations` of the output are the seconds of each stage.
    """

    color_format: ClassVar[str] = "RGB"
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        check_config(od_config)
        model, dtype = od_config.model, od_config.dtype
        self.od_config = od_config
        self.device = get_local_device()
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=model, subfolder="transformer", revision=None, prefix="transformer.", fall_back_to_pt=True
            )
        ]
        config = QwenImageTransformer2DModel.load_config(model, subfolder="transformer")
        self.transformer = QwenImageTransformer2DModel.from_config(config).to(self.device, dtype).eval()
        self.editor = Editor.from_pretrained(model, transformer=None, torch_dtype=dtype)
        self.editor.register_modules(transformer=self.transformer)
        self.editor.set_progress_bar_config(disable=True)
        self.text_encoder = self.editor.text_encoder.to(self.device)
        self.vae = self.editor.vae.to(self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The host's stream of (name, tensor) into the transformer; the names that were there."""
        return AutoWeightsLoader(self).load_weights(weights)

    def setup_compile(self) -> None:
        """Instead of the host's torch.compile: steps have runners of their own (SpecEditConfig.runner)."""

    def release_captured_graphs(self) -> None:
        """Called where the host gives memory back that graphs were captured against."""
        self.editor._release()

    @torch.no_grad()
    def forward(self, req: Any) -> DiffusionOutput:
        prompt, params = req.prompts[0], req.sampling_params
        if len(req.prompts) > 1:
            raise ValueError(f"prompt: expected one a request, got {len(req.prompts)}")
        if params.lora_request is not None:
            raise ValueError("lora_request: LoRA is not served here; merge it into the checkpoint")
        if params.output_type not in (None, "pil"):
            raise ValueError(f"output_type: expected 'pil', got {params.output_type!r}")
        pictures, mask = pictures_and_mask(prompt)
        warm_up = req.is_dummy_run()
        sized = not (params.width_not_provided or params.height_not_provided)
        size = (params.height, params.width) if sized and params.height and params.width else None
        scale = TRUE_CFG_SCALE if params.true_cfg_scale is None else params.true_cfg_scale
        out = edit(
            self.editor,
            pictures,
            {"prompt": prompt.get("prompt") or "", "negative_prompt": prompt.get("negative_prompt")},
            given=WARM_UP if warm_up else params.extra_args.get("specedit"),
            mask=mask,
            size=size,
            steps=None if warm_up else params.num_inference_steps,
            true_cfg_scale=scale,
            count=max(params.num_outputs_per_prompt, 1),
            generator=params.generator,
            latents=params.latents,
        )
        seconds = {f"specedit.{stage}": value for stage, value in out.stats.seconds.items()}
        logger.info("edited %.1f %% of the picture, %s", 100 * max(out.stats.edited, default=0.0), seconds)
        return DiffusionOutput(output={"payload": {"image": out.images}}, stage_durations=seconds)
