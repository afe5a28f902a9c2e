# SPDX-License-Identifier: Apache-2.0
"""Writes the tiny editor as a folder that `FluxKontextPipeline.from_pretrained` loads, in bf16, in small shards."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

from models import make_clip, make_scheduler, make_t5, make_transformer
from text import clip_tokenizer, t5_tokenizer

SHARD = "14MB"
LIMIT = 40_000_000  # bytes of the whole folder


def folder_size(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def build_pipeline(vae, weights, dtype=torch.bfloat16):
    """FluxKontextPipeline on the CPU; weights: {"transformer", "clip", "t5": state dict}."""
    parts = {"transformer": make_transformer(), "clip": make_clip(), "t5": make_t5()}
    for name, part in parts.items():
        part.load_state_dict(weights[name])
        part.to(dtype).eval()
    return FluxKontextPipeline(
        scheduler=make_scheduler(), vae=vae.to("cpu", dtype), text_encoder=parts["clip"], tokenizer=clip_tokenizer(),
        text_encoder_2=parts["t5"], tokenizer_2=t5_tokenizer(), transformer=parts["transformer"],
    )


def export(vae, weights, folder):
    """Writes `folder` in one step: a reader sees the former one or the new one, whole."""
    folder = Path(folder)
    staging, former = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (staging, former):
        shutil.rmtree(stale, ignore_errors=True)
    pipe = build_pipeline(vae, weights)
    pipe.save_pretrained(staging, max_shard_size=SHARD)
    # Older transformers know the fast class by this name only, and want CLIP's two files.
    index = json.loads((staging / "model_index.json").read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads the dtype that stands here where none is asked for, diffusers loads fp32: one must give.
        config = json.loads((staging / name / "config.json").read_text())
        config["dtype"] = "float32"
        (staging / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (staging / "specedit.json").write_text(json.dumps({"resolution": 512, "max_sequence_length": 64}) + "\n")
    model = json.loads((staging / "tokenizer" / "tokenizer.json").read_text())["model"]
    (staging / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]) + "\n")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (staging / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    size = folder_size(staging)
    if size > LIMIT:
        raise ValueError(f"the folder takes {size} bytes, more than {LIMIT}")
    if folder.exists():
        folder.rename(former)
    staging.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    return size
