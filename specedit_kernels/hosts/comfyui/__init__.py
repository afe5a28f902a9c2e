# SPDX-License-Identifier: Apache-2.0
"""ComfyUI: nodes that run an edit's stages with the model of the graph (docs/hosts.md). Imported by ComfyUI alone."""

from .nodes import SpecEditExtension


async def comfy_entrypoint() -> SpecEditExtension:
    return SpecEditExtension()
