# SPDX-License-Identifier: Apache-2.0
"""SpecEdit pipelines on diffusers' models, their config and output classes."""

from .config import PRESETS, SpecEditConfig
from .flux_kontext import SpecEditFluxKontextPipeline, SpecEditHandle, disable_specedit, enable_specedit
from .output import SpecEditPipelineOutput, SpecEditStats

__all__ = [
    "PRESETS",
    "SpecEditConfig",
    "SpecEditFluxKontextPipeline",
    "SpecEditHandle",
    "SpecEditPipelineOutput",
    "SpecEditStats",
    "disable_specedit",
    "enable_specedit",
]
