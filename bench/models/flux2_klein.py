# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole FLUX.2-klein edit at the published sizes, with random weights: SpecEdit beside its peers.

    python bench/models/flux2_klein.py --out runs/models            # 4B: one GPU with 24 GB or more
    python bench/models/flux2_klein.py --size 9B --references 4     # 9B with three further pictures
    python bench/models/flux2_klein.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script

Denoising and the autoencoder are timed; text embeddings are given. The edit's region is a user's mask, a square block
of tokens, since random weights draw nothing that a draft could find. Peers run the same number of steps: the stock
pipeline eager and with compiled blocks, and Flux2KleinKVPipeline, which computes the references in its first step
alone (its weights are other ones: a reference there sees nothing but the references). All rows come from one process,
in the order of --rows; what is done is on disk after each. Writes OUT/flux2_klein.json, .md and, with matplotlib, .png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2Transformer2DModel
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

from specedit_kernels import SpecEditConfig, SpecEditFlux2KleinPipeline
from specedit_kernels.engine.config import RUNNERS

# What FLUX.2-klein's transformer/config.json has beside the class's defaults; its autoencoder has the defaults.
SIZES = {
    "4B": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    "9B": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
}
TINY = dict(num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4))  # fmt: skip
TINY_VAE = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
STEPS = (4, 8)  # of the distilled weights
# cached: after the first mixed step only text and edited tokens are computed. locked text: the edited tokens alone.
KINDS = {
    "full": {},
    "locked": dict(finish="locked"),
    "locked-cached": dict(finish="locked", kv_refresh=9),
    "locked-cached, locked text": dict(finish="locked", kv_refresh=9, lock_text=True),
    "locked-bracket": dict(finish="locked", kv_refresh="bracket"),
}
# How many times as fast as each peer at its own step count the edit of a tenth is to be.
BARS = {4: 2.0, 8: 3.0}


def build(size, tiny, device, dtype):
    """The pipeline with random weights and no text encoder."""
    config = (TINY if tiny else SIZES[size]) | dict(guidance_embeds=False)
    transformer, vae = random_modules(
        device, dtype, lambda: Flux2Transformer2DModel(**config),
        lambda: AutoencoderKLFlux2(**(TINY_VAE if tiny else {})),
    )  # fmt: skip
    pipe = SpecEditFlux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae, text_encoder=None, tokenizer=None,
        transformer=transformer, is_distilled=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class KleinBench(Bench):
    """The same clock for klein's pipeline and rows."""

    def __init__(self, args):
        self.args, self.device = args, device_of(args)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe, self.is_compiled = build(args.size, args.tiny, self.device, self.dtype), False
        random, width = np.random.default_rng(0), self.pipe.transformer.config.joint_attention_dim
        pictures = [Image.fromarray(random.integers(0, 256, (args.side, args.side, 3), np.uint8))
                    for _ in range(args.references)]  # fmt: skip
        embeds = torch.randn(1, args.text_length, width, generator=torch.Generator().manual_seed(0))
        self.options = dict(image=pictures, prompt_embeds=embeds.to(self.device, self.dtype), height=args.side,
                            width=args.side, output_type="pt")  # fmt: skip

    def plain(self, steps):
        # a distilled model has no guidance; over 1 the stock pipeline says so on every call
        self.pipe(specedit=False, num_inference_steps=steps, guidance_scale=1.0, **self.options)

    def specedit(self, config, mask):
        return self.pipe(specedit=config, mask_image=mask, guidance_scale=1.0, **self.options).stats

    def kept_references(self, steps):
        """A Row of Flux2KleinKVPipeline on the same weights. Its processors are in place while it runs alone."""
        self.peer()
        transformer = self.pipe.transformer
        before = dict(transformer.attn_processors)
        pipe = Flux2KleinKVPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        ours = dict(transformer.attn_processors)
        transformer.set_attn_processor(dict(before))

        def run(steps=steps):
            transformer.set_attn_processor(dict(ours))
            try:
                pipe(num_inference_steps=steps, **self.options)
            finally:
                transformer.set_attn_processor(dict(before))

        return Row(run, lambda: run(2))

    def rows(self):
        """{name: function that makes its Row}. The compiled ones change the transformer for good."""
        rows = {}
        for n in STEPS:
            rows[f"plain-{n}"] = lambda n=n: self.plain_row(lambda: self.plain(n))
            rows[f"kept references-{n}"] = lambda n=n: self.kept_references(n)
        for runner in self.args.runners:
            for n in STEPS:
                for kind, options in KINDS.items():
                    base = {"quality": "paper", "preset": n, "max_active": 0.95, "runner": runner}
                    config = SpecEditConfig(**base | options)
                    for share in self.args.areas:
                        facts = {"kind": f"specedit-{n}-{kind} {runner}", "area": share}
                        rows[f"{facts['kind']}, {share:.0%}"] = lambda c=config, s=share, f=facts: Row(
                            lambda: self.specedit(c, region(self.args.side, s)), facts=f
                        )
        if self.args.compiled:
            for n in STEPS:
                rows[f"compiled plain-{n}"] = lambda n=n: self.compiled() or self.plain_row(lambda: self.plain(n))
            for n in STEPS:
                rows[f"compiled kept references-{n}"] = lambda n=n: self.compiled_kept_references(n)
        return rows

    def compiled_kept_references(self, steps):
        self.compiled()
        # what the plain pipeline compiled would have blocks of other lengths compiled for any length, which is slower
        torch.compiler.reset()
        return self.kept_references(steps)


def bars(rows):
    """{what: {"value", "bar", "met"}} of the bars that the rows so far decide."""

    def wanted(name):
        steps = int(name.split("-")[1])
        peers = ("plain", "compiled plain", "kept references", "compiled kept references")
        return {f"{peer}-{steps}": BARS[steps] for peer in peers}

    return speedups_of_tenths(rows, wanted)


def report(head, rows):
    return with_bars(markdown(head, rows), bars(rows))


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--areas", type=float, nargs="+", default=[0.1], help="edited shares")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=["eager", "graph"])
    parser.add_argument("--size", choices=tuple(SIZES), default="4B")
    parser.add_argument("--references", type=int, default=1, help="pictures that the model sees, the edited one too")
    parser.add_argument("--side", type=int, help="of the pictures in pixels, a multiple of 64 (1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds after which a row is not repeated")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without compile_repeated_blocks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    if args.references < 1:
        parser.error(f"--references: expected at least 1, got {args.references}")
    bench = KleinBench(args)
    every = bench.rows()
    chosen = chosen_rows(parser, every, args.rows)
    size = "tiny" if args.tiny else f"FLUX.2-klein {args.size}"
    head = setting(args) | {"model": f"{size}, random weights, {args.references} reference(s)"}
    measures = {name: lambda name=name: bench.measure(every[name]()) for name in chosen}
    rows = run_rows(measures, head, args.out, "flux2_klein", report, lambda rows: {"bars": bars(rows)})
    plot(rows, args.out / "flux2_klein.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
