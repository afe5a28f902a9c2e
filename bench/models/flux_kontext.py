# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole FLUX.1-Kontext edit at the published sizes, with random weights: SpecEdit beside its peers.

    python bench/models/flux_kontext.py --out runs/models            # one GPU with 40 GB or more
    python bench/models/flux_kontext.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script

Denoising and the autoencoder are timed; text embeddings are given. The edit's region is a user's mask (a square block
of tokens, or scattered ones), since random weights draw nothing that a draft could find. All rows of a table come from
one process; ratios are printed between rows of it alone. Writes OUT/flux_kontext.json, .md and, with matplotlib, .png.
"""

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextInpaintPipeline,
    FluxTransformer2DModel,
    TaylorSeerCacheConfig,
)
from PIL import Image

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline

TOKEN = 16  # pixels a side
# black-forest-labs/FLUX.1-Kontext-dev: transformer/config.json, vae/config.json, scheduler/scheduler_config.json
TRANSFORMER = dict(
    in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
    sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
TINY_TRANSFORMER = TRANSFORMER | dict(
    num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
    pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
TINY_VAE = VAE | dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
SCHEDULER = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                 max_image_seq_len=4096, shift=3.0)  # fmt: skip


def build(tiny, device, dtype):
    """The pipeline with random weights and no text encoders."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = FluxTransformer2DModel(**(TINY_TRANSFORMER if tiny else TRANSFORMER))
            vae = AutoencoderKL(**(TINY_VAE if tiny else VAE))
    finally:
        torch.set_default_dtype(before)
    pipe = SpecEditFluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae.eval(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def region(side, share, scattered=False):
    """A mask picture with about `share` of the side x side pixels' tokens set: a square block, or tokens at random."""
    cells = side // TOKEN
    mask = np.zeros((cells, cells), dtype=np.uint8)
    if scattered:
        chosen = np.random.default_rng(0).permutation(cells * cells)[: round(share * cells * cells)]
        mask.reshape(-1)[chosen] = 255
    else:
        edge = round(share**0.5 * cells)
        low = (cells - edge) // 2
        mask[low : low + edge, low : low + edge] = 255
    return Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)


class Bench:
    """Rows of one process. Each row is a callable that makes one edit; None where it gives no SpecEdit stats."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = build(args.tiny, self.device, self.dtype)
        self.is_compiled = False
        config = self.pipe.transformer.config
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        self.options = dict(
            image=Image.fromarray(np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), np.uint8)),
            prompt_embeds=normal(1, args.text_length, config.joint_attention_dim),
            pooled_prompt_embeds=normal(1, config.pooled_projection_dim), height=args.side, width=args.side,
            max_area=args.side**2, _auto_resize=False, output_type="pt",
        )  # fmt: skip

    def plain(self, steps):
        self.pipe(specedit=False, num_inference_steps=steps, **self.options)

    def cached(self, config, steps):
        """A cache of diffusers. Kontext's pipeline opens no cache context, so it is opened here."""
        transformer = self.pipe.transformer
        transformer.enable_cache(config)
        try:
            with transformer.cache_context("cond"):
                self.plain(steps)
        finally:
            transformer.disable_cache()

    def inpaint(self, mask, steps):
        pipe = FluxKontextInpaintPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        options = {k: v for k, v in self.options.items() if k not in ("max_area", "_auto_resize")}
        pipe(mask_image=mask, strength=1.0, num_inference_steps=steps, max_area=self.args.side**2,
             _auto_resize=False, **options)  # fmt: skip

    def specedit(self, config, mask):
        return self.pipe(specedit=config, mask_image=mask, **self.options).stats

    def rows(self):
        """{name: callable}. The compiled ones come last: compiling changes the transformer for good."""
        rows = {f"plain-{n}": lambda n=n: self.plain(n) for n in (50, 28, 9, 4)}
        rows["first block cache-28"] = lambda: self.cached(FirstBlockCacheConfig(threshold=0.05), 28)
        rows["taylorseer-28"] = lambda: self.cached(TaylorSeerCacheConfig(cache_interval=5), 28)
        tenth = region(self.args.side, 0.1)
        rows["inpaint-28, 10 %"] = lambda: self.inpaint(tenth, 28)
        # cached: after the first mixed step only text and edited tokens are computed
        for kind, options in (("full", {}), ("locked", dict(finish="locked")),
                              ("locked-cached", dict(finish="locked", kv_refresh=9))):  # fmt: skip
            config = SpecEditConfig(preset=9, max_active=0.95, **options)
            for scattered in (False, True):
                for share in self.args.areas:
                    if scattered and share != 0.1:
                        continue
                    name = f"specedit-9-{kind}, {share:.0%}" + (" scattered" if scattered else "")
                    mask = region(self.args.side, share, scattered)
                    rows[name] = lambda c=config, m=mask: self.specedit(c, m)
        if self.args.compiled:
            for n in (28, 9):
                rows[f"compiled plain-{n}"] = lambda n=n: self.compiled(n)
        return rows

    def compiled(self, steps):
        if not self.is_compiled:
            self.pipe.transformer.compile_repeated_blocks(fullgraph=True)
            self.is_compiled = True
        self.plain(steps)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, run):
        """A row's figures: median seconds after one warm-up call, seconds of each stage, peak memory in bytes."""
        run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, stages = [], []
        begun = time.perf_counter()
        while not seconds or (len(seconds) < self.args.repeat and time.perf_counter() - begun < self.args.patience):
            self.synchronize()
            started = time.perf_counter()
            stats = run()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
            stages.append({} if stats is None else stats.seconds)
        middle = seconds.index(statistics.median_low(seconds))
        figures = {"seconds": seconds[middle], "calls": len(seconds), "stages": stages[middle]}
        if self.device.type == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        if stats is not None:
            figures |= {"flops": stats.flops, "nfe": stats.nfe, "active": stats.active[0], "fallback": stats.fallback,
                        "backend": stats.backend}  # fmt: skip
        return figures


def setting(args):
    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit = os.environ.get("SPECEDIT_COMMIT")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                               capture_output=True, text=True, check=False)  # fmt: skip
        commit = found.stdout.strip() or "unknown"
    cuda = torch.device(args.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit,
        "versions": {n: installed(n) for n in ("torch", "triton", "diffusers")}, "python": platform.python_version(),
        "side": args.side, "text_length": args.text_length,
        "model": "tiny, random weights" if args.tiny else "FLUX.1-Kontext (11.9 B), random weights",
    }  # fmt: skip


def markdown(head, rows):
    lines = [f"{head['model']}, {head['side']} x {head['side']}, {head['text_length']} text tokens, batch 1;"
             f" {head['device']}, " + ", ".join(f"{k} {v}" for k, v in head["versions"].items())
             + f", commit {head['commit']}, {head['date']}. Seconds of denoising and autoencoder; text embeddings given.",
             "", "| row | seconds | calls | against plain-50 | against plain-28 | peak GiB | stages, s |",
             "|---|---:|---:|---:|---:|---:|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error'][:120]} | | | | | |")
            continue

        def ratio(other):
            base = rows.get(other, {}).get("seconds")
            return f"{base / row['seconds']:.2f} x" if base else "–"

        peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "–"
        stages = ", ".join(f"{k} {v:.3f}" for k, v in row["stages"].items())
        lines.append(f"| {name} | {row['seconds']:.3f} | {row['calls']} | {ratio('plain-50')} | {ratio('plain-28')} |"
                     f" {peak} | {stages} |")
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Stacked bars of each SpecEdit row's stages; nothing without matplotlib."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shown = {name: row for name, row in rows.items() if row.get("stages")}
        if not shown:
            return
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(shown)), layout="constrained")
        left = np.zeros(len(shown))
        for stage in dict.fromkeys(s for row in shown.values() for s in row["stages"]):
            width = np.array([row["stages"].get(stage, 0.0) for row in shown.values()])
            axes.barh(list(shown), width, left=left, label=stage)
            left += width
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.legend(loc="lower right", fontsize="small")
        figure.savefig(path, dpi=110)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--areas", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 1.0], help="edited shares")
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds after which a row is not repeated")
    parser.add_argument("--compiled", action="store_true", help="the rows with compile_repeated_blocks too")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    bench = Bench(args)
    every = bench.rows()
    chosen = [n for n in every if any(fnmatch.fnmatchcase(n, glob) for glob in args.rows)]
    if not chosen:
        parser.error(f"--rows: none of {list(every)} matches {args.rows}")
    args.out.mkdir(parents=True, exist_ok=True)
    head, rows = setting(args), {}
    for name in chosen:
        try:
            rows[name] = bench.measure(every[name])
        except Exception as error:  # a peer that fails is reported as failed, and the others go on
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(rows[name]), flush=True)
        (args.out / "flux_kontext.json").write_text(json.dumps({**head, "rows": rows}, indent=1))
        (args.out / "flux_kontext.md").write_text(markdown(head, rows))
    plot(rows, args.out / "flux_kontext.png")
    print((args.out / "flux_kontext.md").read_text())
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
