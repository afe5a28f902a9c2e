# SPDX-License-Identifier: Apache-2.0
"""A folder for ComfyUI's custom_nodes, as a link or a copy: the nodes are in specedit_kernels.hosts.comfyui.

Where specedit_kernels is not installed, a link finds the checkout that it leads to.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("specedit_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from specedit_kernels.hosts.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
