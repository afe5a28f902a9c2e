# SPDX-License-Identifier: Apache-2.0
"""Edit all pictures of a folder by one instruction: several pictures a call, one loaded model.

    python examples/batch_folder.py FOLDER "make it night" OUT                     # the tiny editor, on any machine
    python examples/batch_folder.py FOLDER "make it night" OUT --model MODEL --size 1024 --batch 4

The pictures of a call have one size, so each is resized to a square. Each picture of a batch has an edit region of its
own; a call takes as long as its largest edit needs.
"""

import argparse
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline

TINY = Path(__file__).resolve().parents[1] / "specedit_kernels" / "assets" / "tiny_kontext"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(TINY), help="a FLUX.1-Kontext folder")
    parser.add_argument("--size", type=int, default=512, help="side of the square pictures, in pixels")
    parser.add_argument("--batch", type=int, default=2, help="pictures a call")
    args = parser.parse_args()

    paths = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{args.folder}: no picture that ends in one of {', '.join(SUFFIXES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = SpecEditFluxKontextPipeline.from_pretrained(args.model, torch_dtype=dtype, local_files_only=True).to(device)
    # "graph" captures a size once and replays it for all further calls
    config = SpecEditConfig(preset=9, preserve="pixels", runner="graph" if device == "cuda" else "eager")
    for start in range(0, len(paths), args.batch):
        batch = paths[start : start + args.batch]
        pictures = [PIL.ImageOps.fit(PIL.Image.open(p).convert("RGB"), (args.size, args.size)) for p in batch]
        result = pipe(
            image=pictures,
            prompt=[args.prompt] * len(batch),
            max_area=args.size**2,
            _auto_resize=False,
            max_sequence_length=64,
            generator=torch.Generator().manual_seed(start),
            specedit=config,
        )
        for path, picture, edited in zip(batch, result.images, result.stats.edited):
            picture.save(args.out / f"{path.stem}.png")
            print(f"{args.out / path.stem}.png: {100 * edited:.1f} % of the tokens edited")


if __name__ == "__main__":
    main()
