# SPDX-License-Identifier: Apache-2.0
"""Kernels that make diffusion image editing fast, and the thin pipelines that use them.

Importing the package registers ``torch.ops.specedit.*``. It imports torch alone: kernels are imported when an op is
first called, the pipelines (diffusers, transformers) when one of their names is first read.
"""

import importlib

from . import _command

_command.watch()  # before torch is imported

from . import ops  # noqa: E402

__version__ = "0.1.0"

# name -> the module that has it. Pipeline classes are the registered models' own, see __getattr__.
_NAMES = {
    "FlashEditConfig": "flash_edit",
    "LIGHTNING_SCHEDULE": "engine.config",
    "METRICS": "engine.config",
    "EditResult": "editing",
    "PRESETS": "engine.config",
    "REFERENCES": "engine.config",
    "SpecEditConfig": "engine.config",
    "SpecEditHandle": "engine.enable",
    "SpecEditPipelineOutput": "engine.output",
    "SpecEditStats": "engine.output",
    "codec_of": "engine.registry",
    "disable_guidance_parallelism": "engine.enable",
    "disable_specedit": "engine.enable",
    "edit_alpha": "engine.stages",
    "edit_image": "editing",
    "enable_guidance_parallelism": "engine.enable",
    "enable_specedit": "engine.enable",
    "supported_models": "engine.registry",
    "threshold_scale": "engine.stages",
    "verify": "engine.stages",
}
_PIPELINES = (
    "FlashEditFluxKontextPipeline",
    "FlashEditFluxPipeline",
    "FlashEditQwenImageEditPipeline",
    "FlashEditQwenImageEditPlusPipeline",
    "SpecEditFluxKontextPipeline",
    "SpecEditQwenImageEditPipeline",
    "SpecEditQwenImageEditPlusPipeline",
)

__all__ = ["__version__", "ops", *_NAMES, *_PIPELINES]  # noqa: PLE0604  tuples and keys of strings


def _pipelines():
    """{name: class} of the SpecEdit and FlashEdit pipelines of all registered models."""
    registry = importlib.import_module(".engine.registry", __name__)
    ours = registry.pipelines().values()
    flash = importlib.import_module(".flash_edit", __name__).flash_pipelines().values()
    return {kind.__name__: kind for kind in (*ours, *flash)}


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    if name.startswith(("SpecEdit", "FlashEdit")) and name.endswith("Pipeline"):
        kind = _pipelines().get(name)
        if kind is not None:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
