# SPDX-License-Identifier: Apache-2.0
"""A real SGLang diffusion against our diffusers pipeline, on the shipped tiny Qwen editor, on a CPU:

    python bench/hosts/serving/check_sglang.py

The host's own worker (GPUWorker on its CPU platform, one process) loads the checkpoint, runs the stages and encodes the
texts. Left out are its HTTP server and scheduler. Every check's line ends in "ok"; the first difference raises
AssertionError.
"""

from __future__ import annotations

import io
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "specedit_kernels.hosts.sglang"  # before SGLang looks for it
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import PIL.Image
import plus
import sglang
import torch
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request
from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args


def worker(folder: Path) -> tuple[GPUWorker, ServerArgs]:
    args = ServerArgs.from_kwargs(model_path=str(folder), output_path=str(folder))
    args.pipeline_config.dit_precision = args.pipeline_config.vae_precision = "fp32"
    args.pipeline_config.text_encoder_precisions = ("fp32",)
    set_global_server_args(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = GPUWorker(local_rank=0, rank=0, master_port=port, server_args=args)
    if getattr(made, "pipeline", None) is None:
        made.init_device_and_model()
    return made, args


def main() -> None:
    print("sglang", sglang.__version__, "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as name:
        folder = plus.checkpoint(Path(name))
        info = get_model_info(str(folder), backend="sglang")
        from specedit_kernels.hosts.sglang import pipeline

        assert info.pipeline_cls is pipeline.SpecEditPipeline, info
        assert info.sampling_param_cls is pipeline.SpecEditSamplingParams, info
        for repository in pipeline.MODELS:
            assert get_model_info(repository, backend="sglang") == info, repository
        print("the registry gives our pipeline, by the folder's class and by the names of the models: ok")
        served, args = worker(folder)
        ours = plus.editor(folder)
        theirs, mine = (x.state_dict() for x in (served.pipeline.get_module("transformer"), ours.transformer))
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
        print(f"{len(mine)} tensors loaded by their names: ok")
        encoder, stage = served.pipeline.stages[1:]
        print("the text encoder is", type(encoder.text_encoder).__module__, type(encoder.text_encoder).__name__)
        texts: dict[str, Any] = {}
        encoded = stage._texts

        def keep(batch: Any, dtype: torch.dtype) -> dict[str, Any]:
            """What the host encoded, and of which picture, for the same call of our own."""
            texts.update(encoded(batch, dtype))
            shown[:] = batch.condition_image
            return dict(texts)

        shown: list[Any] = []
        stage._texts = keep
        # the host tells the encoder which tokens are a picture's, for their rotary positions; diffusers 0.42.1 does not
        plain_forward = ours.text_encoder.forward

        def with_positions(**given: Any) -> Any:
            of_picture = given["input_ids"] == ours.text_encoder.config.image_token_id
            return plain_forward(**given, mm_token_type_ids=of_picture.int())

        ours.text_encoder.forward = with_positions
        plus.picture().save(folder / "source.png")

        def ask(case: plus.Case, warm_up: bool = False) -> list[np.ndarray]:
            given = {} if case.auto else {"height": plus.SIDE, "width": plus.SIDE}
            if case.steps is not None:
                given["num_inference_steps"] = case.steps
            params = SamplingParams.from_user_sampling_params_args(
                str(folder), args, prompt=case.prompt, image_path=[str(folder / "source.png")], seed=0,
                guidance_scale=1.0, specedit=case.options, num_outputs_per_prompt=case.count, save_output=False,
                return_image_bytes=True, output_file_name="result.png", **given,
            )  # fmt: skip
            request = prepare_request(args, params)
            if warm_up:
                request.set_as_warmup()
            out = served.execute_forward([request])
            assert out.error is None, out.error
            print({name: round(ms) for name, ms in out.metrics.stages.items()}, "ms")
            if warm_up:
                return []
            return [np.asarray(PIL.Image.open(io.BytesIO(data))) for data in out.output_image_bytes]

        for name, case in plus.CASES.items():
            if case.mask is not None:  # the host's request has no mask
                continue
            found = ask(case)
            generators = [torch.Generator().manual_seed(seed) for seed in range(case.count)]
            expected = case.by(ours, generators, **texts)
            assert len(found) == len(expected) == case.count
            assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, expected))
            print(f"{name}: the pipeline's own pictures, bit for bit: ok")
            plain = ours.encode_prompt(case.prompt, shown)[0]
            difference = (texts["prompt_embeds"] - plain).abs().max().item()
            print(f"the host's embeddings: {difference:.1e} from diffusers', which are up to {plain.abs().max():.1f}")
            assert difference < 1e-3, difference
        print("the host's embeddings: ok")
        ask(plus.CASES["options of the request"], warm_up=True)
        print("the warm-up request: ok")


if __name__ == "__main__":
    main()
