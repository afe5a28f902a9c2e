# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI against our diffusers pipeline, on the shipped tiny Kontext, over ComfyUI's API server, on a CPU:

    python bench/hosts/comfyui/check.py --comfyui FOLDER --python FOLDER/venv/bin/python

ComfyUI's Python needs ComfyUI's requirements and what specedit_kernels needs. Nothing in its folder is changed: models,
nodes and outputs are in a folder of this run. Every case compares final latents, fp32, with the pipeline's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import convert
import numpy as np
import PIL.Image
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file
from torch import Tensor

import specedit_kernels
from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline
from specedit_kernels.sampling.grid import pack

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
SIDE = 128
GUIDANCE = 2.5
SIGMAS = [1.0, 0.93, 0.86, 0.78, 0.69, 0.59, 0.47, 0.33, 0.17, 0.0]
FURTHER_NOISE = 0x5EED  # specedit_kernels/hosts/comfyui/sampler.py
TOLERANCE = 2e-5  # of latents with a standard deviation of about 1
PROMPTS = ["color the turtle purple", "remove the turtle"]
MASK_BOX = (16, 64, 64, 128)


class Server:
    """ComfyUI as a child process, spoken to at 127.0.0.1."""

    def __init__(self, comfyui: Path, python: Path, base: Path, port: int, flags: list[str]):
        self.url, self.base = f"http://127.0.0.1:{port}", base
        command = [
            str(python), "main.py", *flags, "--listen", "127.0.0.1", "--port", str(port),
            "--base-directory", str(base), "--disable-api-nodes", "--front-end-root", str(base / "front"),
            "--database-url", f"sqlite:///{base / 'comfyui.db'}", "--preview-method", "latent2rgb",
        ]  # fmt: skip
        self.log = (base / "comfyui.log").open("w")
        self.process = subprocess.Popen(command, cwd=comfyui, stdout=self.log, stderr=subprocess.STDOUT)

    def call(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait(self, seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                return self.call("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start; see {self.log.name}")

    def start(self, prompt: dict[str, Any]) -> str:
        try:
            return self.call("/prompt", {"prompt": prompt, "client_id": "check"})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def end(self, name: str, seconds: float = 300) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.call(f"/history/{name}")
            if name in found:
                return found[name]
            time.sleep(0.1)
        raise RuntimeError("a prompt did not end")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def prompt_of(
    image: str = "first.png", text: int = 0, seed: int = 1, weight_dtype: str = "default",
    loras: tuple[float, ...] = (), sampler: dict[str, Any] | None = None, masked: bool = False, stock: bool = False,
    advanced: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The shipped workflow with the tiny model in it, and its latents saved."""
    prompt = copy.deepcopy(json.loads((REPOSITORY / "integrations/comfyui/workflow.json").read_text()))
    prompt["1"]["inputs"]["image"] = image
    prompt["2"]["inputs"]["megapixels"] = SIDE * SIDE / 1024**2
    prompt["3"] = {"class_type": "TinyVAE", "inputs": {}}
    prompt["5"]["inputs"] = {"unet_name": "tiny_kontext.safetensors", "weight_dtype": weight_dtype}
    del prompt["6"]
    prompt["7"] = {"class_type": "TinyPrompt", "inputs": {"number": text}}
    prompt["9"]["inputs"]["guidance"] = GUIDANCE
    model = "5"
    for i, strength in enumerate(loras):
        name = f"lora{i}"
        inputs = {"model": [model, 0], "lora_name": "tiny_kontext_lora.safetensors", "strength_model": strength}
        prompt[name] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        model = name
    prompt["11"]["inputs"]["model"] = [model, 0]
    prompt["13"] = {"class_type": "TinySigmas", "inputs": {"sigmas": " ".join(map(str, SIGMAS))}}
    prompt["14"]["inputs"]["noise_seed"] = seed
    prompt["15"]["inputs"] |= sampler or {}
    if masked:
        prompt["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
        prompt["15"]["inputs"]["mask"] = ["mask", 0]
    if stock:
        prompt["15"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    if stock or advanced:
        prompt["16"]["class_type"] = "SamplerCustomAdvanced"
        for name in ("18", "19"):
            del prompt[name]
    inputs = {"samples": ["16", 0], "filename_prefix": uuid.uuid4().hex}
    prompt["latent"] = {"class_type": "SaveLatent", "inputs": inputs}
    return prompt


class Pipeline(SpecEditFluxKontextPipeline):
    """With the sigmas of the workflow."""

    def _plain_sigmas(self, steps, tokens, given):
        return list(SIGMAS)


class Check:
    def __init__(self, server: Server, pipe: FluxKontextPipeline):
        self.server = server
        self.pipe = Pipeline.from_pipe(pipe)
        self.pipe.set_progress_bar_config(disable=True)
        self.plain = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
        self.lora = load_file(server.base / "models/loras/tiny_kontext_lora.safetensors")
        self.failed: list[str] = []

    def host(self, **options: Any) -> Tensor:
        prompt = prompt_of(**options)
        ended = self.server.end(self.server.start(prompt))
        if ended["status"]["status_str"] != "success":
            said = ended["status"]["messages"][-1][1]
            where = "".join(said.get("traceback", []))
            raise RuntimeError(f"{said.get('node_type')}: {said.get('exception_message')}{where}")
        [saved] = self.server.base.glob(f"output/{prompt['latent']['inputs']['filename_prefix']}*")
        latents = load_file(saved)["latent_tensor"]
        return (latents - convert.HOST_SHIFT) * convert.HOST_SCALE

    def ours(self, image: str = "first.png", text: int = 0, seed: int = 1, fp8: bool = False, lora: float = 0.0,
             masked: bool = False, **options: Any) -> Tensor:  # fmt: skip
        weights = dict(self.plain)
        if fp8:
            weights = {name: x.to(torch.float8_e4m3fn).float() for name, x in weights.items()}
        for name in self.lora if lora else ():
            if name.endswith("lora_A.weight"):
                target = name.removeprefix("transformer.").replace("lora_A.", "")
                weights[target] = weights[target] + lora * self.lora[name.replace("lora_A", "lora_B")] @ self.lora[name]
        self.pipe.transformer.load_state_dict(weights)
        noise = torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=torch.manual_seed(seed))
        tokens = self.pipe(
            image=PIL.Image.open(self.server.base / "input" / image),
            prompt=PROMPTS[text],
            max_sequence_length=64,
            height=SIDE,
            width=SIDE,
            max_area=SIDE * SIDE,
            guidance_scale=GUIDANCE,
            latents=pack(noise),
            generator=torch.Generator().manual_seed(seed + FURTHER_NOISE),
            mask_image=PIL.Image.open(self.server.base / "input/mask.png") if masked else None,
            specedit=SpecEditConfig(**options),
            output_type="latent",
        ).images
        return specedit_kernels.sampling.grid.unpack(tokens, (SIDE // 16, SIDE // 16))

    def say(self, name: str, found: Tensor, expected: Tensor, limit: float = TOLERANCE) -> None:
        off = float((found - expected).abs().max())
        spread = float(expected.std())
        good = off <= limit
        said = "ok  " if good else "FAIL"
        print(f"{said} {name}: largest difference {off:.2e} (limit {limit:.0e}, std {spread:.2f})")
        if not good:
            self.failed.append(name)

    def differs(self, name: str, a: Tensor, b: Tensor) -> None:
        off = float((a - b).abs().max())
        print(f"{'ok  ' if off > 20 * TOLERANCE else 'FAIL'} {name}: {off:.2e} apart")
        if off <= 20 * TOLERANCE:
            self.failed.append(name)

    def run(self) -> None:
        euler = self.host(stock=True)
        first = self.host()
        plain = self.ours()
        self.say("quality balanced: draft, locked finish, bracketed keys and values", first, plain)
        paper = self.host(sampler=dict(quality="paper"))
        self.say("quality paper: draft, full finish", paper, self.ours(quality="paper"))
        self.say("the sampler in SamplerCustomAdvanced", self.host(advanced=True), first, 0.0)
        again = self.host(seed=2)
        self.say("another seed", again, self.ours(seed=2))
        self.say("another picture and prompt next", self.host(image="second.png", text=1), self.ours("second.png", 1))
        masked = self.host(masked=True)
        self.say("mask", masked, self.ours(masked=True))
        self.composited()
        masked = self.host(masked=True, sampler=dict(kv_refresh="2"))
        self.say("mask, kv_refresh 2", masked, self.ours(masked=True, kv_refresh=2))
        self.say("metric latent", self.host(sampler=dict(metric="latent")), self.ours(metric="latent"))
        self.say("preset 30's shares, dilation 0", self.host(sampler=dict(preset="30", dilation=0)),
                 self.ours(preset=30, dilation=0, stages=(2, 4, 3)))  # fmt: skip
        on = self.host(loras=(1.0,))
        self.say("LoRA on", on, self.ours(lora=1.0))
        self.differs("LoRA takes effect", on, plain)
        self.say("LoRA off again", self.host(image="second.png"), self.ours("second.png"))
        self.say("model patched twice (two LoRAs)", self.host(loras=(0.5, 0.5)), self.ours(lora=1.0))
        fp8 = self.host(weight_dtype="fp8_e4m3fn")
        self.say("weights in fp8", fp8, self.ours(fp8=True))
        self.differs("fp8 weights are others", fp8, plain)
        self.cancel()
        self.say("the same as at first, after all of that", self.host(image="first.png", seed=1), first, 0.0)
        self.say("stock Euler sampler, before and after", self.host(stock=True, seed=1), euler, 0.0)

    def composited(self) -> None:
        """The picture that the workflow saved last: its source but for the mask and the seam."""
        newest = max(self.server.base.glob("output/specedit*.png"), key=lambda path: path.stat().st_mtime_ns)
        saved, source = (np.asarray(PIL.Image.open(x).convert("RGB")).astype(int)
                         for x in (newest, self.server.base / "input/first.png"))  # fmt: skip
        # whole blocks of tokens are edited
        left, top, right, bottom = (side // 32 * 32 for side in (*MASK_BOX[:2], *(x + 31 for x in MASK_BOX[2:])))
        inside = np.zeros(saved.shape[:2], bool)
        inside[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = True
        changed = (saved != source).any(axis=2)
        good = not changed[~inside].any() and changed[top:bottom, left:right].mean() > 0.5
        off, share = changed[~inside].sum(), changed[top:bottom, left:right].mean()
        print(f"{'ok  ' if good else 'FAIL'} composite: {off} pixels changed beyond mask and seam, {share:.0%} inside")
        if not good:
            self.failed.append("composite")

    def cancel(self) -> None:
        prompt = prompt_of(seed=77, sampler=dict(preset="30"))
        # many steps, so that there is a middle
        sigmas = [1 - i / 400 for i in range(401)]
        prompt["13"]["inputs"]["sigmas"] = " ".join(map(str, sigmas))
        name = self.server.start(prompt)
        time.sleep(3)
        began = time.monotonic()
        self.server.call("/interrupt", {})
        ended = self.server.end(name)
        kinds = [kind for kind, _ in ended["status"]["messages"]]
        at = dict(ended["status"]["messages"]).get("execution_interrupted", {}).get("node_type")
        good = "execution_interrupted" in kinds and at == "SpecEditSample"
        print(f"{'ok  ' if good else 'FAIL'} cancel in the middle: in {at}, after {time.monotonic() - began:.1f} s")
        if not good:
            self.failed.append("cancel")
        self.say("a run after the cancelled one", self.host(seed=3), self.ours(seed=3))


def lay_out(base: Path, pipe: FluxKontextPipeline) -> None:
    """Models, nodes and pictures of a run."""
    for name in ("input", "output", "temp", "user", "custom_nodes", "models", "front"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "front/index.html").write_text("")
    convert.write(base, pipe, PROMPTS)
    (base / "custom_nodes/specedit").symlink_to(REPOSITORY / "integrations/comfyui")
    (base / "custom_nodes/tiny").symlink_to(HERE / "tiny_nodes")
    picture = PIL.Image.open(REPOSITORY / "specedit_kernels/assets/example.png").convert("RGB")
    small = picture.resize((SIDE, SIDE), PIL.Image.LANCZOS)
    small.save(base / "input/first.png")
    small.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(base / "input/second.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    left, top, right, bottom = MASK_BOX
    mask[top:bottom, left:right] = 255
    PIL.Image.fromarray(mask).convert("RGB").save(base / "input/mask.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--flags", default="--cpu --force-fp32", help="ComfyUI's, say --force-fp32 --lowvram on a GPU")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder")
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="comfyui-check-"))
    pipe = FluxKontextPipeline.from_pretrained(convert.SHIPPED, torch_dtype=torch.float32)
    lay_out(base, pipe)
    comfyui, python = arguments.comfyui.resolve(), arguments.python.absolute()
    server = Server(comfyui, python, base, arguments.port, arguments.flags.split())
    try:
        server.wait()
        check = Check(server, pipe)
        check.run()
    finally:
        server.stop()
        if arguments.keep:
            print(base)
        else:
            shutil.rmtree(base)
    if check.failed:
        raise SystemExit(f"failed: {', '.join(check.failed)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
