# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole Qwen-Image-2.1 edit at the published sizes, with random weights: SpecEdit beside its peers.

    python bench/models/qwen_image_21.py --out runs/models            # one GPU with 40 GB or more
    python bench/models/qwen_image_21.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script

Denoising and the autoencoder are timed; embeddings of text and vision tokens are given. The edit's region is a user's
mask, a square block of tokens. Peers run the same number of steps: the stock pipeline, which keeps the keys and values
of text and reference, eager and with compiled blocks. All rows come from one process, in the order of --rows; what is
done is on disk after each. Writes OUT/qwen_image_21.json, .md and, with matplotlib, .png.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from flux_kontext import (
    Bench,
    Row,
    chosen_rows,
    device_of,
    markdown,
    plot,
    random_modules,
    region,
    run_rows,
    setting,
    speedups_of_tenths,
    with_bars,
)
from PIL import Image

from specedit_kernels import SpecEditConfig, SpecEditQwenImage21Pipeline
from specedit_kernels.engine.config import RUNNERS

# The classes' defaults are the published transformer's and autoencoder's.
TINY = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=24, axes_dims_rope=(4, 6, 6),
            in_channels=16, out_channels=16)  # fmt: skip
TINY_VAE = dict(base_dim=4, decoder_base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1,
                latents_mean=[0.0] * 16, latents_std=[1.0] * 16)  # fmt: skip
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
                 max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential")  # fmt: skip
STEPS = 40  # the stock pipeline's default
SLOT = 32  # pixels of a reference's side that one vision token stands for
# cached: after the first mixed step only edited tokens are computed.
KINDS = {
    "full": {},
    "full-cached": dict(kv_refresh=9),
    "locked": dict(finish="locked"),
    "locked-cached": dict(finish="locked", kv_refresh=9),
    "locked-bracket": dict(finish="locked", kv_refresh="bracket"),
}
BAR = 3.0  # how many times as fast as each peer the edit of a tenth is to be


class Processor:
    """What the pipeline asks of a processor where embeddings are given: two numbers, without use then."""

    class tokenizer:
        @staticmethod
        def encode(text):
            return [0]

    def apply_chat_template(self, *args, **kwargs):
        return [[0]]


def build(tiny, device, dtype):
    """The pipeline with random weights and no text encoder."""
    transformer, vae = random_modules(
        device, dtype, lambda: QwenImage21Transformer2DModel(**(TINY if tiny else {})),
        lambda: AutoencoderKLQwenImage21(**(TINY_VAE if tiny else {})),
    )  # fmt: skip
    pipe = SpecEditQwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae, text_encoder=None, processor=Processor(),
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Qwen21Bench(Bench):
    """The same clock for Qwen-Image-2.1's pipeline and rows."""

    def __init__(self, args):
        self.args, self.device = args, device_of(args)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe, self.is_compiled = build(args.tiny, self.device, self.dtype), False
        vision, words = (args.side // SLOT) ** 2, args.text_length
        slots = torch.tensor([[False] * 3 + [True] * vision + [False] * (words - 3)], device=self.device)
        shape = (1, vision + words, self.pipe.transformer.config.context_in_dim)
        embeds = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        # the pipeline takes no mask of vision tokens beside given embeddings
        self.pipe._get_qwen_prompt_embeds = lambda *args: (embeds, torch.ones_like(slots, dtype=torch.long), slots)
        picture = np.random.default_rng(0).integers(0, 256, (args.side, args.side, 4), np.uint8)
        self.options = dict(image=[Image.fromarray(picture, "RGBA")], prompt="", height=args.side, width=args.side,
                            output_resolution=args.side, output_type="pt")  # fmt: skip

    def plain(self, steps):
        self.pipe(specedit=False, num_inference_steps=steps, **self.options)

    def plain_row(self, run):
        self.peer()
        return Row(run, lambda: self.plain(2))  # the first step and the others are compiled each

    def specedit(self, config, mask):
        return self.pipe(specedit=config, mask_image=mask, num_inference_steps=STEPS, **self.options).stats

    def compiled(self):
        if not self.is_compiled:
            self.pipe.transformer.compile_repeated_blocks()
            self.is_compiled = True

    def rows(self):
        """{name: function that makes its Row}. The compiled one changes the transformer for good."""
        rows = {f"plain-{STEPS}": lambda: self.plain_row(lambda: self.plain(STEPS))}
        for runner, (kind, options) in itertools.product(self.args.runners, KINDS.items()):
            for share in self.args.areas:
                base = {"quality": "paper", "preset": 30, "max_active": 0.95, "runner": runner}
                facts = {"kind": f"specedit-{STEPS}-{kind} {runner}", "area": share}
                config = SpecEditConfig(**base | options)
                rows[f"{facts['kind']}, {share:.0%}"] = lambda c=config, s=share, f=facts: Row(
                    lambda: self.specedit(c, region(self.args.side, s)), facts=f
                )
        if self.args.compiled:
            rows[f"compiled plain-{STEPS}"] = lambda: self.compiled() or self.plain_row(lambda: self.plain(STEPS))
        return rows


def bars(rows):
    """{what: {"value", "bar", "met"}} of the bars that the rows so far decide."""
    peers = {f"{how}plain-{STEPS}": BAR for how in ("", "compiled ")}
    return speedups_of_tenths(rows, lambda name: peers)


def report(head, rows):
    return with_bars(markdown(head, rows), bars(rows))


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--areas", type=float, nargs="+", default=[0.1], help="edited shares")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=["eager", "graph"])
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=64, help="words, beside the picture's vision tokens")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds after which a row is not repeated")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without compile_repeated_blocks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    if args.text_length < 4:
        parser.error(f"--text-length: expected at least 4, got {args.text_length}")
    bench = Qwen21Bench(args)
    every = bench.rows()
    chosen = chosen_rows(parser, every, args.rows)
    size = "tiny" if args.tiny else "Qwen-Image-2.1 (7 B)"
    head = setting(args) | {"model": f"{size}, random weights, one reference"}
    measures = {name: lambda name=name: bench.measure(every[name]()) for name in chosen}
    rows = run_rows(measures, head, args.out, "qwen_image_21", report, lambda rows: {"bars": bars(rows)})
    plot(rows, args.out / "qwen_image_21.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
