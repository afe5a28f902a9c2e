# SPDX-License-Identifier: Apache-2.0
"""FlashEdit (arXiv 2509.22244) on the same engine: one step each of inversion and of editing."""

from .pipeline import FlashEditConfig, FlashEditMixin, flash_pipelines

__all__ = ["FlashEditConfig", "FlashEditMixin", "flash_pipelines"]
