# SPDX-License-Identifier: Apache-2.0
"""A real vLLM-Omni against our diffusers pipeline, on the shipped tiny Qwen editor, on a CPU:

    VLLM_TARGET_DEVICE=cpu python bench/hosts/serving/check_vllm_omni.py

vLLM-Omni has no platform for a CPU, so its worker does not start there (set_device). What runs is the host's: plugins
by their entry points, registry, config of a folder, weight loader, request, pre- and post-processing, the output's
format. Every check's line ends in "ok"; the first difference raises AssertionError.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

os.environ["SPECEDIT_VLLM_OMNI"] = "1"  # before vLLM calls its plugins
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import plus
import torch
import vllm_omni
from vllm.config.load import LoadConfig
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.ipc import pack_diffusion_output_shm, unpack_diffusion_output_shm
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.output_formatter import format_diffusion_outputs, normalize_diffusion_postprocess_output
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.plugins import load_omni_general_plugins

import specedit_kernels.hosts.vllm_omni as host


def main() -> None:
    print("vllm-omni", vllm_omni.__version__, "torch", torch.__version__)
    load_omni_general_plugins()
    # a checkout that is not installed has no entry points: the call that the entry point makes
    by = "entry point" if "SpecEdit" in str(registry.DiffusionModelRegistry.models[host.ARCHITECTURE]) else "register()"
    if by == "register()":
        host.register()
    kind = registry.DiffusionModelRegistry._try_load_model_cls(host.ARCHITECTURE)
    from specedit_kernels.hosts.vllm_omni import pipeline

    assert kind is pipeline.SpecEditOmniPipeline, kind
    print(f"the registry gives our pipeline ({by}): ok")
    pipeline.get_local_device = lambda: torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        folder = plus.checkpoint(Path(folder))
        config = OmniDiffusionConfig(model=str(folder), dtype=torch.float32)
        config.enrich_config()
        assert config.model_class_name == host.ARCHITECTURE and config.max_multimodal_image_inputs == 4
        print("the folder's model_index.json names it: ok")
        loader = DiffusersPipelineLoader(LoadConfig(), od_config=config)
        served = loader.load_model(load_device="cpu", device=torch.device("cpu"))
        ours = plus.editor(folder)
        theirs, mine = served.transformer.state_dict(), ours.transformer.state_dict()
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
        print(f"{len(mine)} tensors loaded by their names: ok")
        before, after = (f(config) for f in (registry.get_diffusion_pre_process_func,
                                             registry.get_diffusion_post_process_func))  # fmt: skip
        for name, case in plus.CASES.items():
            prompt = {"prompt": case.prompt, "multi_modal_data": {"image": [plus.picture()]}}
            if case.mask is not None:
                prompt["multi_modal_data"]["mask_image"] = case.mask
            size = dict(height=plus.SIDE, width=plus.SIDE, height_not_provided=case.auto, width_not_provided=case.auto)
            params = OmniDiffusionSamplingParams(
                **size, generator=plus.generator(), num_inference_steps=case.steps,
                extra_args={"specedit": case.options}, num_outputs_per_prompt=case.count,
            )  # fmt: skip
            request = before(OmniDiffusionRequest(prompt=prompt, sampling_params=params, request_id="r"))
            with torch.inference_mode():  # as the host's runner calls it
                output = served.forward(DiffusionRequestBatch([request]))
            pack_diffusion_output_shm(output)  # as it goes from a worker's process to the engine's
            output = pickle.loads(pickle.dumps(output))
            unpack_diffusion_output_shm(output)
            formatted = format_diffusion_outputs(
                request=request, od_config=config, diffusion_output=output, output_data=output.output,
                postprocess_output=normalize_diffusion_postprocess_output(after(output.output)),
            )  # fmt: skip
            images = [image for each in formatted for image in each.images]
            expected = case.by(ours)
            assert len(images) == len(expected) == case.count
            assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, expected))
            print(f"{name}: the pipeline's own pictures, bit for bit: ok")
        prompt = {"prompt": "dummy run", "multi_modal_data": {"image": [plus.picture()]}}
        params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=2, generator=plus.generator())
        request = OmniDiffusionRequest(prompt=prompt, sampling_params=params, request_id="dummy_req_id")
        with torch.inference_mode():
            assert request.is_dummy_run() and served.forward(DiffusionRequestBatch([before(request)])).output
        print("the warm-up request: ok")


if __name__ == "__main__":
    main()
