# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole Qwen-Image-Edit edit at the published sizes, with random weights: SpecEdit beside plain steps.

    python bench/models/qwen_image_edit.py --out runs/models        # one GPU with 80 GB
    python bench/models/qwen_image_edit.py --true-cfg-scale 1       # one guidance branch
    python bench/models/qwen_image_edit.py --tiny --out /tmp/models # a tiny model on any machine

Denoising and the autoencoder are timed; embeddings of text and vision tokens are given, as many for either guidance
branch. The edit's region is a user's mask, a square block of tokens. All rows come from one process, in the order of
--rows; what is done is on disk after each. Writes OUT/qwen_image_edit.json, .md and, with matplotlib, .png; where the
time goes of rows that --profile names, OUT/profile NAME.txt says. "encode" and "decode" are the autoencoder alone, as
the library has it and as fused steps do.
"""

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from flux_kontext import (
    STEPS,
    TIERS,
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
)
from PIL import Image

from specedit_kernels import SpecEditConfig, SpecEditQwenImageEditPipeline
from specedit_kernels.engine.config import RUNNERS
from specedit_kernels.models.qwen_image_edit import FusedQwenModel

# The classes' defaults are Qwen/Qwen-Image-Edit's transformer/config.json and vae/config.json.
TINY_TRANSFORMER = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                        axes_dims_rope=(4, 6, 6))  # fmt: skip
TINY_VAE = dict(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
                 max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential")  # fmt: skip
STOCK_SIDE = 1024  # the diffusers pipeline works on a megapixel whatever it is given
LOCKED = dict(finish="locked", kv_refresh=9)
# cached: after the first mixed step only text and edited tokens are computed. locked text: the edited tokens alone.
# unguided draft: the coarse steps run one branch of guidance.
UNGUIDED = dict(lock_text=True, draft_guidance=False)
PRESET = {
    "full": {}, "full-cached": dict(kv_refresh=9), "locked": dict(finish="locked"), "locked-cached": LOCKED,
    "locked-cached, locked text": LOCKED | dict(lock_text=True),
    "locked-cached, locked text, unguided draft": LOCKED | UNGUIDED,
}  # fmt: skip
KINDS = {f"specedit-9-{kind}": options for kind, options in PRESET.items()} | TIERS
KINDS |= {f"{kind}, locked text, unguided draft": options | UNGUIDED for kind, options in TIERS.items()} | STEPS
KINDS |= {f"{kind}, unguided draft": options | dict(draft_guidance=False) for kind, options in STEPS.items()}
KINDS |= {f"{kind}, draft guided last": options | dict(draft_guidance="last") for kind, options in STEPS.items()}
# ct: every coarse step but the first has its text's keys and values.
KINDS |= {f"{kind}, ct": options | dict(coarse_text_refresh=9) for kind, options in KINDS.items() if " ck" in kind}
KINDS |= {f"{kind} fp8": options | dict(precision="fp8") for kind, options in KINDS.items()}


def build(tiny, device, dtype):
    """The pipeline with random weights and no text encoder."""
    transformer, vae = random_modules(
        device, dtype, lambda: QwenImageTransformer2DModel(**(TINY_TRANSFORMER if tiny else {})),
        lambda: AutoencoderKLQwenImage(**(TINY_VAE if tiny else {})),
    )  # fmt: skip
    pipe = SpecEditQwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae, text_encoder=None, tokenizer=None,
        processor=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


class QwenBench(Bench):
    """The same clock for Qwen's pipeline and rows."""

    def __init__(self, args):
        self.args, self.device = args, device_of(args)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe, self.is_compiled = build(args.tiny, self.device, self.dtype), False
        generator = torch.Generator().manual_seed(0)
        width = self.pipe.transformer.config.joint_attention_dim

        def normal():
            return torch.randn(1, args.text_length, width, generator=generator).to(self.device, self.dtype)

        self.options = dict(
            image=Image.fromarray(np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), np.uint8)),
            prompt_embeds=normal(), height=args.side, width=args.side, output_type="pt",
            true_cfg_scale=args.true_cfg_scale,
        )  # fmt: skip
        if args.true_cfg_scale > 1:
            self.options["negative_prompt_embeds"] = normal()

    def plain(self, steps):
        if self.args.side == STOCK_SIDE:
            self.pipe(specedit=False, num_inference_steps=steps, **self.options)
        else:  # the same steps on the same tokens
            config = SpecEditConfig(quality="paper", runner="eager", stages=(0, 0, steps))
            self.specedit(config, region(self.args.side, 1.0))

    def specedit(self, config, mask):
        return self.pipe(specedit=config, mask_image=mask, max_area=self.args.side**2, **self.options).stats

    def apart(self, call):
        """A call whose guidance branches run one after the other."""
        with mock.patch.object(FusedQwenModel, "JOINED", -1):
            return call()

    def rows(self):
        """{name: function that makes its Row}. The compiled ones change the transformer for good."""
        rows = {}
        for n in (50, 28, 9, 4):
            rows[f"plain-{n}"] = lambda n=n: Row(lambda: self.plain(n), lambda: self.plain(1))
        for runner in self.args.runners:
            for kind, options in KINDS.items():
                config = SpecEditConfig(**{"quality": "paper", "max_active": 0.95, "runner": runner} | options)
                for share in self.args.areas:
                    facts = {"kind": f"{kind} {runner}", "area": share}
                    call = lambda c=config, s=share: self.specedit(c, region(self.args.side, s))  # noqa: E731
                    rows[f"{facts['kind']}, {share:.0%}"] = lambda call=call, f=facts: Row(call, facts=f)
                    if runner != "eager" and self.args.true_cfg_scale > 1:
                        rows[f"{facts['kind']}, branches apart, {share:.0%}"] = lambda call=call: Row(
                            lambda: self.apart(call)
                        )
            if runner != "eager":  # as plain steps, through our launches
                config = SpecEditConfig(quality="paper", stages=(0, 0, 9), runner=runner)
                rows[f"plain-9 {runner}"] = lambda c=config: Row(lambda: self.specedit(c, region(self.args.side, 1.0)))
        rows |= self.autoencoder_rows()
        for n in (50, 9):
            rows[f"compiled plain-{n}"] = lambda n=n: (
                self.compiled() or Row(lambda: self.plain(n), lambda: self.plain(1))
            )
        return rows


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--areas", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 1.0], help="edited shares")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=["eager", "graph"])
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=1540, help="text and vision tokens of a branch")
    parser.add_argument("--true-cfg-scale", type=float, default=4.0)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds after which a row is not repeated")
    parser.add_argument("--profile", nargs="+", metavar="GLOB", default=[], help="rows whose kernels are listed too")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else STOCK_SIDE)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    bench = QwenBench(args)
    every = bench.rows()
    chosen = chosen_rows(parser, every, args.rows)
    size = "tiny" if args.tiny else "Qwen-Image-Edit (20.4 B)"
    head = setting(args) | {"model": f"{size}, random weights, true_cfg_scale {args.true_cfg_scale:g}"}
    args.out.mkdir(parents=True, exist_ok=True)
    measures = {name: lambda name=name: bench.measure_and_profile(name, every[name]()) for name in chosen}
    rows = run_rows(measures, head, args.out, "qwen_image_edit", markdown)
    plot(rows, args.out / "qwen_image_edit.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
