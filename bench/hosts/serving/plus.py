# SPDX-License-Identifier: Apache-2.0
"""What both checks share: the shipped tiny Qwen editor as a Qwen-Image-Edit-Plus checkpoint, and requests with what our
own pipeline makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

import specedit_kernels
from specedit_kernels import SpecEditConfig, SpecEditQwenImageEditPlusPipeline

ASSETS = Path(specedit_kernels.__file__).parent / "assets"
SIDE = 128


def _small(of: int, ratio: float, real: Any = pipeline_qwenimage_edit_plus.calculate_dimensions) -> Any:
    return real(SIDE * SIDE if of == 1024 * 1024 else of, ratio)


# The model works on a megapixel whatever it is given: here on SIDE * SIDE pixels.
pipeline_qwenimage_edit_plus.calculate_dimensions = _small


def checkpoint(folder: Path) -> Path:
    """The tiny editor's folder under Plus's name in model_index.json, with two things that the published one has and
    the hosts look for: a processor, which shows the text encoder pictures, and a text encoder whose output layer has
    weights of its own."""
    made = folder / "tiny-plus"
    shutil.copytree(ASSETS / "tiny_qwen_image_edit", made)
    tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor()).save_pretrained(made / "processor")
    file, config = made / "text_encoder" / "model.safetensors", made / "text_encoder" / "config.json"
    weights = load_file(file)
    [embedding] = [tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight")]
    save_file(weights | {"lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    index = json.loads((made / "model_index.json").read_text())
    index |= {"_class_name": "QwenImageEditPlusPipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    (made / "model_index.json").write_text(json.dumps(index))
    return made


def editor(folder: Path) -> SpecEditQwenImageEditPlusPipeline:
    pipe = SpecEditQwenImageEditPlusPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> PIL.Image.Image:
    return PIL.Image.open(ASSETS / "example.png").convert("RGB").resize((SIDE, SIDE))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _mask() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (SIDE, SIDE))
    PIL.ImageDraw.Draw(mask).rectangle((32, 32, 79, 95), fill=255)
    return mask


@dataclass
class Case:
    """A request. auto: its size is not given, and results have the source's own."""

    options: dict[str, Any] = field(default_factory=dict)
    mask: PIL.Image.Image | None = None
    steps: int | None = None
    count: int = 1
    auto: bool = True
    prompt: str = "color the turtle purple"

    def by(
        self, pipe: SpecEditQwenImageEditPlusPipeline, generators: Any = None, **texts: Any
    ) -> list[PIL.Image.Image]:
        """Our pipeline's pictures. texts: in place of the prompt."""
        call = {name: self.options[name] for name in ("region", "mask_mode") if name in self.options}
        config = SpecEditConfig(**{k: v for k, v in self.options.items() if k not in call})
        size = {"output_size": "source"} if self.auto else {"height": SIDE, "width": SIDE}
        return pipe(
            image=[picture()], **(texts or {"prompt": self.prompt}), **size, **call, specedit=config,
            mask_image=self.mask, num_inference_steps=self.steps, num_images_per_prompt=self.count,
            generator=generator() if generators is None else generators, true_cfg_scale=1.0,
        ).images  # fmt: skip


CASES = {
    "options of the request": Case({"preset": 4, "threshold": 0.3, "relative": 0.0}),
    "a region, 6 steps, two results": Case({"finish": "locked", "region": "25%,25%,75%,75%"}, steps=6, count=2),
    "a size": Case({"preset": 4, "region": "25%,25%,75%,75%", "preserve": "pixels"}, auto=False),
    "a mask": Case({"preset": 4}, mask=_mask()),
}
