# SPDX-License-Identifier: Apache-2.0
"""Edit the part of a picture that a mask shows; every pixel outside it stays the source's own.

    python examples/edit_with_mask.py                                              # the tiny editor, on any machine
    python examples/edit_with_mask.py photo.png mask.png "remove the car" --model FOLDER --size 1024

The mask is white where the picture may change. With a mask no draft is scored: the mask says what is recomputed.
"""

import argparse
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch
from diffusers import FluxKontextPipeline

from specedit_kernels import SpecEditConfig, enable_specedit

ASSETS = Path(__file__).resolve().parents[1] / "specedit_kernels" / "assets"


def turtle_mask(size):
    """The example's own mask: a box around the turtle."""
    mask = PIL.Image.new("L", size, 0)
    PIL.ImageDraw.Draw(mask).rectangle([size[0] * x // 512 for x in (8, 292, 196, 476)], fill=255)
    return mask


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", default=str(ASSETS / "example.png"))
    parser.add_argument("mask", nargs="?", help="white where to edit (default: a box around the example's turtle)")
    parser.add_argument("prompt", nargs="?", default="color the turtle purple")
    parser.add_argument("-o", "--output", default="edited.png")
    parser.add_argument("--model", default=str(ASSETS / "tiny_kontext"), help="a FLUX.1-Kontext folder")
    parser.add_argument("--size", type=int, default=512, help="side of a square of the output's area, in pixels")
    args = parser.parse_args()

    image = PIL.Image.open(args.image).convert("RGB")
    mask = PIL.Image.open(args.mask).convert("L") if args.mask else turtle_mask(image.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxKontextPipeline.from_pretrained(args.model, torch_dtype=dtype, local_files_only=True).to(device)
    enable_specedit(pipe, SpecEditConfig(preset=9, finish="locked", preserve="pixels"))
    result = pipe(
        image=image,
        mask_image=mask,
        prompt=args.prompt,
        max_area=args.size**2,
        _auto_resize=False,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
    )
    result.images[0].save(args.output)
    print(f"{args.output}: {int(result.mask.sum())} of {result.mask.numel()} tokens recomputed")


if __name__ == "__main__":
    main()
