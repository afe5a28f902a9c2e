# SPDX-License-Identifier: Apache-2.0
"""FlashEdit (arXiv 2509.22244) on the same engine: one step each of inversion and of editing."""

from ..engine.low_rank import LowRankChange
from .pipeline import GENERATOR, INVERTER, FlashEditConfig, FlashEditMixin, flash_pipelines

__all__ = ["GENERATOR", "INVERTER", "FlashEditConfig", "FlashEditMixin", "LowRankChange", "flash_pipelines"]
