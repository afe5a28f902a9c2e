# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni: Qwen-Image-Edit-Plus with SpecEdit's stages (docs/serve.md).

`register` is an entry point of the group vllm.general_plugins, which every process of vLLM calls. It does nothing, and
imports nothing, unless the environment has SPECEDIT_VLLM_OMNI=1.
"""

import os

VARIABLE = "SPECEDIT_VLLM_OMNI"
ARCHITECTURE = "QwenImageEditPlusPipeline"


def register() -> None:
    """Put our pipeline in the place of vLLM-Omni's for Qwen-Image-Edit-2509 and -2511. May be called again."""
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return
    if value != "1":
        raise ValueError(f"{VARIABLE}: expected '0' or '1', got {value!r}")
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(
        ARCHITECTURE,
        f"{__name__}.pipeline",
        "SpecEditOmniPipeline",
        pre_process_func_name="pre_process_func",
        post_process_func_name="post_process_func",
    )
