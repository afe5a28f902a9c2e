# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny editor as a folder that its pipeline's `from_pretrained` loads, in bf16, in small shards."""

import json
import shutil
from pathlib import Path

import torch

SHARD = "14MB"
LIMIT = 40_000_000  # bytes of the whole folder


def folder_size(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def build_pipeline(family, vae, weights, dtype=torch.bfloat16):
    """The family's pipeline on the CPU; weights: a state dict for each of its parts."""
    components = {}
    for name, (component, make) in family.parts.items():
        part = make()
        part.load_state_dict(weights[name])
        components[component] = part.to(dtype).eval()
    return family.pipeline(
        scheduler=family.make_scheduler(),
        vae=vae.to("cpu", dtype),
        **components,
        **family.tokenizers(),
        **family.arguments,
    )


def export(family, vae, weights, folder):
    """Writes `folder` in one step: a reader sees the former one or the new one, whole."""
    folder = Path(folder)
    staging, former = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (staging, former):
        shutil.rmtree(stale, ignore_errors=True)
    pipe = build_pipeline(family, vae, weights)
    pipe.save_pretrained(staging, max_shard_size=SHARD)
    for path in staging.glob("text_encoder*/config.json"):
        # transformers loads the dtype that stands here where none is asked for, diffusers loads fp32: one must give.
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    family.finish(staging)
    (staging / "specedit.json").write_text(json.dumps(family.settings) + "\n")
    size = folder_size(staging)
    if size > LIMIT:
        raise ValueError(f"the folder takes {size} bytes, more than {LIMIT}")
    if folder.exists():
        folder.rename(former)
    staging.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    return size
