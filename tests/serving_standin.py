# SPDX-License-Identifier: Apache-2.0
"""The parts of vLLM-Omni's and SGLang diffusion's interfaces that hosts/vllm_omni and hosts/sglang rely on, as recorded
of vllm-omni 0.30.0 and sglang 0.5.23: names, signatures and what they do, written anew. bench/hosts/serving checks the
real hosts."""

import contextlib
import enum
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def _modules(monkeypatch, **members):
    """Put modules into sys.modules: dotted name with __ for a dot -> {name: member}; packages above them are made."""
    for dotted, named in members.items():
        parts = dotted.split("__")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            module = sys.modules.get(name)
            if module is None or not hasattr(module, "_standin"):
                module = types.ModuleType(name)
                module._standin, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, name, module)
        for name, member in named.items():
            setattr(module, name, member)


# vLLM-Omni


class AutoWeightsLoader:
    """vllm.model_executor.models.utils: parameters of a module by their names; a name that is not there is an error."""

    def __init__(self, module):
        self.parameters = dict(module.named_parameters())

    def load_weights(self, weights):
        loaded = set()
        for name, tensor in weights:
            if name not in self.parameters:
                raise ValueError(f"There is no module or parameter named {name!r}")
            with torch.no_grad():
                self.parameters[name].copy_(tensor)
            loaded.add(name)
        return loaded


@dataclass
class DiffusionOutput:
    output: Any = None
    stage_durations: dict = field(default_factory=dict)


class DiffusersPipelineLoader:
    @dataclass
    class ComponentSource:
        model_or_path: str
        subfolder: str | None
        revision: str | None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None


def load(pipeline, dropped=(), added=()):
    """What the host does with a pipeline that it has made: a stream of all tensors of its sources; all parameters under
    the sources' prefixes have to be among those that the pipeline says it has loaded."""

    def stream():
        for source in pipeline.weights_sources:
            for file in sorted(Path(source.model_or_path, source.subfolder).glob("*.safetensors")):
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        if source.prefix + name not in dropped:
                            yield source.prefix + name, tensors.get_tensor(name)
        yield from ((name, torch.zeros(1)) for name in added)

    prefixes = tuple(source.prefix for source in pipeline.weights_sources)
    expected = {name for name, _ in pipeline.named_parameters() if name.startswith(prefixes)}
    missing = expected - pipeline.load_weights(stream())
    if missing:
        raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
    return pipeline.eval()


class SupportImageInput:
    support_image_input = True
    color_format = "RGB"


class SupportsComponentDiscovery:
    _resident_modules = ()


def vllm_omni_config(model, **settings):
    """OmniDiffusionConfig of one device."""
    parallel = dict(tensor_parallel_size=1, sequence_parallel_size=1, cfg_parallel_size=1, pipeline_parallel_size=1,
                    vae_patch_parallel_size=1, use_hsdp=False)  # fmt: skip
    parallel |= {name: settings.pop(name) for name in [n for n in settings if n in parallel]}
    usual = dict(dtype=torch.float32, enable_cpu_offload=False, enable_layerwise_offload=False, step_execution=False,
                 streaming_output=False, quantization_config=None, cache_backend="none")  # fmt: skip
    return types.SimpleNamespace(
        model=str(model), parallel_config=types.SimpleNamespace(**parallel), **usual | settings
    )


def vllm_omni_request(prompt, dummy=False, **params):
    """DiffusionRequestBatch of one OmniDiffusionRequest, which is in its `requests`."""
    usual = dict(height=None, width=None, height_not_provided=False, width_not_provided=False, generator=None,
                 num_inference_steps=None, num_outputs_per_prompt=1, true_cfg_scale=None, output_type=None,
                 latents=None, lora_request=None, extra_args={})  # fmt: skip
    sampling = types.SimpleNamespace(**usual | params)
    request = types.SimpleNamespace(prompt=prompt, sampling_params=sampling)
    return types.SimpleNamespace(
        requests=[request], prompts=[prompt], sampling_params=sampling, is_dummy_run=lambda: dummy
    )


def install_vllm_omni(monkeypatch):
    """The host's modules in sys.modules. Its calls of register_diffusion_model: [(args, kwargs)]."""
    registered = []
    _modules(
        monkeypatch,
        vllm__model_executor__models__utils={"AutoWeightsLoader": AutoWeightsLoader},
        vllm_omni__diffusion__registry={"register_diffusion_model": lambda *a, **k: registered.append((a, k))},
        vllm_omni__diffusion__data={"DiffusionOutput": DiffusionOutput, "OmniDiffusionConfig": types.SimpleNamespace},
        vllm_omni__diffusion__distributed__utils={"get_local_device": lambda: torch.device("cpu")},
        vllm_omni__diffusion__model_loader__diffusers_loader={"DiffusersPipelineLoader": DiffusersPipelineLoader},
        vllm_omni__diffusion__models__interface={
            "SupportImageInput": SupportImageInput, "SupportsComponentDiscovery": SupportsComponentDiscovery,
        },
    )  # fmt: skip
    return registered


# SGLang


class RoleType(str, enum.Enum):
    MONOLITHIC = "monolithic"
    ENCODER = "encoder"
    DENOISER = "denoiser"


@dataclass
class QwenImageEditPlusPipelineConfig:
    dit_precision: str = "fp32"
    vae_precision: str = "fp32"

    def preprocess_vae_image(self, batch, vae_image_processor):
        raise AssertionError("the host encodes no picture")


@dataclass
class QwenImageEditPlusSamplingParams:
    prompt: str | None = None
    negative_prompt: str = " "
    num_inference_steps: int = 40
    guidance_scale: float = 4.0
    true_cfg_scale: float | None = None
    num_outputs_per_prompt: int = 1
    height: int | None = None
    width: int | None = None

    @classmethod
    def image_request_extra_fields(cls):
        return frozenset()


class Req:
    """The state of a request: its sampling parameters' fields are its own too."""

    def __init__(self, sampling_params, explicit=(), **fields):
        self.sampling_params, self.metrics = sampling_params, Metrics()
        self.extra = {"explicit_fields": sorted(explicit)}
        self.prompt_embeds, self.negative_prompt_embeds = [], []
        self.prompt_embeds_mask = self.negative_prompt_embeds_mask = self.usage = None
        self.generator, self.condition_image, self.is_warmup = None, None, False
        scale = sampling_params.true_cfg_scale
        self.do_classifier_free_guidance = (sampling_params.guidance_scale if scale is None else scale) > 1
        vars(self).update(fields)

    def __getattr__(self, name):
        return getattr(vars(self)["sampling_params"], name)


class Metrics:
    def __init__(self):
        self.stages = {}

    def record_stage(self, name, seconds):
        self.stages[name] = seconds * 1000


@dataclass
class OutputBatch:
    output: Any = None
    metrics: Any = None
    usage: Any = None


@dataclass
class ComponentUse:
    stage_name: str
    component_name: str
    phase: str | None = None
    memory_intensive: bool = False


class ComponentLoader:
    expected_library = ""


class PipelineStage:
    def _component_stage_name(self, name=None):
        return name or type(self).__name__

    @contextlib.contextmanager
    def use_declared_component(self, *, component_name, module=None):
        assert component_name in [use.component_name for use in self.component_uses(None)]
        yield module

    def __call__(self, batch, server_args):
        return self.forward(batch, server_args)


class InputValidationStage(PipelineStage):
    def __init__(self, vae_image_processor=None):
        self.vae_image_processor = vae_image_processor

    def forward(self, batch, server_args):
        """Loads the pictures, and makes those that the text encoder sees of them, in their place."""
        if batch.condition_image is not None:
            self.preprocess_condition_image(batch, server_args, *batch.condition_image[0].size)
        batch.height, batch.width = batch.sampling_params.height or 999, batch.sampling_params.width or 999
        return batch

    def preprocess_condition_image(self, batch, server_args, condition_image_width, condition_image_height):
        server_args.pipeline_config.preprocess_vae_image(batch, self.vae_image_processor)
        batch.condition_image = [picture.resize((32, 32)) for picture in batch.condition_image]


class ImageEncodingStage(PipelineStage):
    """text_encoder: (picture, text) -> (embeddings, mask)."""

    def __init__(self, image_processor, image_encoder=None, text_encoder=None):
        self.image_processor, self.text_encoder = image_processor, text_encoder

    def forward(self, batch, server_args):
        if batch.condition_image is None:
            return batch
        for branch in ("", "negative_") if batch.do_classifier_free_guidance else ("",):
            embeds, mask = self.text_encoder(batch.condition_image, getattr(batch, f"{branch}prompt"))
            setattr(batch, f"{branch}prompt_embeds", [embeds])
            setattr(batch, f"{branch}prompt_embeds_mask", [mask])
        return batch


class ComposedPipelineBase:
    """modules: those that the test gives in the place of the checkpoint's; `component_loaders` load the others."""

    component_loaders: dict = {}

    def __init__(self, model_path, server_args, modules=()):
        self.validate_disagg_role(server_args.disagg_role)
        self.modules, self.stages = dict(modules), []
        for name in self._required_config_modules:
            if name not in self.modules:
                loader = self.component_loaders[name]()
                assert loader.expected_library == "diffusers"
                self.modules[name] = loader.load_customized(str(Path(model_path, name)), server_args, name)
        self.initialize_pipeline(server_args)
        self.create_pipeline_stages(server_args)

    def get_module(self, name, default_value=None):
        return self.modules.get(name, default_value)

    def add_stage(self, stage, stage_name=None):
        self.stages.append(stage)
        return self

    def forward(self, batch, server_args):
        for stage in self.stages:
            batch = stage(batch, server_args)
        return batch


def sglang_args(config, **settings):
    """ServerArgs of one device."""
    usual = dict(tp_size=1, sp_degree=1, enable_cfg_parallel=False, lora_path=None, disagg_role=RoleType.MONOLITHIC)
    return types.SimpleNamespace(pipeline_config=config, **usual | settings)


def install_sglang(monkeypatch):
    """The host's modules in sys.modules. Its calls of register_pipeline: [(args, kwargs)]."""
    registered = []
    root = "sglang__multimodal_gen__"
    stages = {kind.__name__: kind for kind in (ImageEncodingStage, InputValidationStage, PipelineStage)}
    types_of = {"float32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    members = {
        "configs__pipeline_configs__qwen_image": {"QwenImageEditPlusPipelineConfig": QwenImageEditPlusPipelineConfig},
        "configs__sample__qwenimage": {"QwenImageEditPlusSamplingParams": QwenImageEditPlusSamplingParams},
        "registry": {"register_pipeline": lambda *a, **k: registered.append((a, k))},
        "runtime__disaggregation__roles": {"RoleType": RoleType},
        "runtime__loader__component_loaders__component_loader": {"ComponentLoader": ComponentLoader},
        "runtime__managers__memory_managers__component_manager": {"ComponentUse": ComponentUse},
        "runtime__pipelines_core__composed_pipeline_base": {"ComposedPipelineBase": ComposedPipelineBase},
        "runtime__pipelines_core__schedule_batch": {"OutputBatch": OutputBatch, "Req": Req},
        "runtime__pipelines_core__stages": stages,
        "runtime__server_args": {"ServerArgs": types.SimpleNamespace},
        "runtime__utils__precision_types": {"PRECISION_TO_TYPE": types_of},
    }
    _modules(monkeypatch, **{root + name: found for name, found in members.items()})
    return registered
