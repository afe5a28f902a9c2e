# SPDX-License-Identifier: Apache-2.0
"""SpecEdit and FlashEdit pipelines on diffusers' models, their config and output classes."""

from .config import LIGHTNING_SCHEDULE, PRESETS, SpecEditConfig
from .enable import PIPELINES, SpecEditHandle, disable_specedit, enable_specedit
from .flash_edit import (
    FlashEditConfig,
    FlashEditFluxKontextPipeline,
    FlashEditQwenImageEditPipeline,
    FlashEditQwenImageEditPlusPipeline,
)
from .flux_kontext import SpecEditFluxKontextPipeline
from .output import SpecEditPipelineOutput, SpecEditStats
from .qwen_image_edit import SpecEditQwenImageEditPipeline, SpecEditQwenImageEditPlusPipeline

__all__ = [
    "FlashEditConfig",
    "FlashEditFluxKontextPipeline",
    "FlashEditQwenImageEditPipeline",
    "FlashEditQwenImageEditPlusPipeline",
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
