# SPDX-License-Identifier: Apache-2.0
"""SpecEdit pipelines on diffusers' models, their config and output classes."""

from .config import LIGHTNING_SCHEDULE, PRESETS, SpecEditConfig
from .enable import PIPELINES, SpecEditHandle, disable_specedit, enable_specedit
from .flux_kontext import SpecEditFluxKontextPipeline
from .output import SpecEditPipelineOutput, SpecEditStats
from .qwen_image_edit import SpecEditQwenImageEditPipeline, SpecEditQwenImageEditPlusPipeline

__all__ = [
    "LIGHTNING_SCHEDULE",
    "PIPELINES",
    "PRESETS",
    "SpecEditConfig",
    "SpecEditFluxKontextPipeline",
    "SpecEditHandle",
    "SpecEditPipelineOutput",
    "SpecEditQwenImageEditPipeline",
    "SpecEditQwenImageEditPlusPipeline",
    "SpecEditStats",
    "disable_specedit",
    "enable_specedit",
]
