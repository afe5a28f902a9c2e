# SPDX-License-Identifier: Apache-2.0
"""FlashEdit: an edit in one step, with the one-step networks of the model's folder cosi/.

    python examples/flash_edit.py                                                  # the tiny editor, on any machine
    python examples/flash_edit.py photo.png "paint the door red" -o out.png --model FOLDER --size 512

A model without cosi/ takes its own first step, which is less often right; bench/quality/train_cosi.py trains networks.
"""

import argparse
from pathlib import Path

import PIL.Image
import torch

from specedit_kernels import FlashEditConfig, FlashEditFluxKontextPipeline

ASSETS = Path(__file__).resolve().parents[1] / "specedit_kernels" / "assets"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", default=str(ASSETS / "example.png"))
    parser.add_argument("prompt", nargs="?", default="color the turtle purple")
    parser.add_argument("-o", "--output", default="edited.png")
    parser.add_argument("--model", default=str(ASSETS / "tiny_kontext"), help="a FLUX.1-Kontext folder")
    parser.add_argument("--size", type=int, default=512, help="side of a square of the output's area, in pixels")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FlashEditFluxKontextPipeline.from_pretrained(args.model, torch_dtype=dtype, local_files_only=True).to(device)
    result = pipe(
        image=PIL.Image.open(args.image).convert("RGB"),
        prompt=args.prompt,
        max_area=args.size**2,
        _auto_resize=False,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
        specedit=FlashEditConfig(preserve="pixels", runner="graph" if device == "cuda" else "eager"),
    )
    result.images[0].save(args.output)
    stats = result.stats
    noise = "of the source, by the inversion network" if stats.inverted else "white"
    print(f"{args.output}: {100 * stats.edited[0]:.1f} % of the tokens edited; noise {noise}")
    print("seconds: " + ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stats.seconds.items()))


if __name__ == "__main__":
    main()
