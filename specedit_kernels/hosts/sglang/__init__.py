# SPDX-License-Identifier: Apache-2.0
"""SGLang diffusion: Qwen-Image-Edit-Plus with SpecEdit's stages (docs/serve.md).

SGLang imports this package, and so registers the pipeline, where the environment has
SGLANG_EXTERNAL_MODEL_PACKAGE=specedit_kernels.hosts.sglang.
"""

from .pipeline import register

register()
