# SPDX-License-Identifier: Apache-2.0
"""Kernels that make diffusion image editing fast, and the thin pipelines that use them.

Importing the package registers ``torch.ops.specedit.*``. It imports torch alone: kernels are imported when an op is
first called, the pipelines (diffusers, transformers) when one of their names is first read.
"""

import importlib

from specedit_kernels import ops

__version__ = "0.1.0"

_PIPELINE_NAMES = (
    "FlashEditConfig",
    "FlashEditFluxKontextPipeline",
    "FlashEditQwenImageEditPipeline",
    "FlashEditQwenImageEditPlusPipeline",
    "SpecEditConfig",
    "SpecEditFluxKontextPipeline",
    "SpecEditPipelineOutput",
    "SpecEditQwenImageEditPipeline",
    "SpecEditQwenImageEditPlusPipeline",
    "disable_specedit",
    "enable_specedit",
)

__all__ = ["__version__", "ops", *_PIPELINE_NAMES]


def __getattr__(name):
    if name in _PIPELINE_NAMES:
        return getattr(importlib.import_module("specedit_kernels.pipelines"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
