# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole FLUX.1-Kontext edit at the published sizes, with random weights: SpecEdit beside its peers.

    python bench/models/flux_kontext.py --out runs/models            # one GPU with 40 GB or more
    python bench/models/flux_kontext.py --tiny --out /tmp/models     # a tiny model on any machine, to try the script

Denoising and the autoencoder are timed; text embeddings are given. The edit's region is a user's mask (a square block
of tokens, or scattered ones), since random weights draw nothing that a draft could find. "active step" rows time one
step of a locked finish alone: text and a tenth of the fine tokens, over the keys of both whole pictures, beside its
roofline. All rows of a table come from one process; ratios are printed between rows of it alone. Rows run in the order
of --rows, and what is done is on disk after each. Writes OUT/flux_kontext.json, .md and, with matplotlib, .png; rows
that --profile names are run once more under torch.profiler, and OUT/profile NAME.txt says where their time goes.
    python bench/models/flux_kontext.py --out runs/models --draw     # .md and .png again from a .json
Eight and four steps, stock and compiled, beside SpecEdit's presets for them, in one process:
    python bench/models/flux_kontext.py --out runs/few --compiled --runners graph --areas .064 .159 .354 --rows \\
        'preset * graph, *' plain-8 plain-4 'compiled plain-8' 'compiled plain-4'
"""

import argparse
import contextlib
import datetime
import fnmatch
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

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

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, ops
from specedit_kernels.engine import fp8
from specedit_kernels.engine.attention import unwrap_processors
from specedit_kernels.engine.autoencoder import in_channels_last
from specedit_kernels.engine.config import RUNNERS
from specedit_kernels.engine.registry import codec_of
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.models import flux_kontext as flux_fused
from specedit_kernels.models.flux_kontext import FluxLayout, FluxText, FusedFluxModel, StepLayout
from specedit_kernels.sampling.flops import transformer_flops

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


def random_modules(device, dtype, *makers):
    """What each maker makes, with random weights on a device in a dtype, for inference."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return [make().eval() for make in makers]
    finally:
        torch.set_default_dtype(before)


def build(tiny, device, dtype):
    """The pipeline with random weights and no text encoders."""
    transformer, vae = random_modules(
        device, dtype, lambda: FluxTransformer2DModel(**(TINY_TRANSFORMER if tiny else TRANSFORMER)),
        lambda: AutoencoderKL(**(TINY_VAE if tiny else VAE)),
    )  # fmt: skip
    pipe = SpecEditFluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_picture(side):
    """A picture of side x side pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


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


# What an H100 gives at best in practice (bench/log/flux_kontext.md): a long copy, and large products in bf16.
BYTES_A_SECOND, FLOPS_A_SECOND = 3.0e12, 700e12


@dataclass
class Row:
    """run: makes one edit, or `times` of whatever the row is; gives SpecEditStats or None. warm: called before, in
    place of a first run. facts: what is known of the row beforehand; written beside its figures."""

    run: Callable
    warm: Callable | None = None
    times: int = 1
    facts: dict = field(default_factory=dict)


def device_of(args):
    """The device of --device, with an index, which torch asks for where the allocator gets a limit."""
    return torch.empty(0, device=args.device).device


class Bench:
    """Rows of one process."""

    def __init__(self, args):
        self.args, self.device = args, device_of(args)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = build(args.tiny, self.device, self.dtype)
        self.is_compiled = False
        config = self.pipe.transformer.config
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        self.options = dict(
            image=noise_picture(args.side),
            prompt_embeds=normal(1, args.text_length, config.joint_attention_dim),
            pooled_prompt_embeds=normal(1, config.pooled_projection_dim), height=args.side, width=args.side,
            max_area=args.side**2, _auto_resize=False, output_type="pt",
        )  # fmt: skip

    def peer(self):
        """Leave to diffusers what is its own: nothing of ours is kept or wrapped."""
        self.pipe._free_runner()
        unwrap_processors(self.pipe.transformer)

    def plain_row(self, run):
        """A Row of diffusers' own; one step warms it up."""
        self.peer()
        return Row(run, lambda: self.plain(1))

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

    def specedit(self, config, mask, text=None, attends=fp8.attends, drafted=False):
        """attends: stands for `fp8.attends`. drafted: the draft runs and is compared too, and adds nothing."""
        options = self.options | {"prompt_embeds": self.options["prompt_embeds"][:, :text]}
        if drafted:
            config, options = replace(config, threshold=4.0), options | {"mask_mode": "add"}
        with mock.patch.object(fp8, "attends", attends):
            return self.pipe(specedit=config, mask_image=mask, **options).stats

    def active_step(self, runner, apart=False, precision="auto", seen=None, attention="auto"):
        """A Row of steps with text and a tenth of the fine target tokens as queries, all tokens as keys.

        apart: with a product for each of q, k and v; only before any edit was run by a runner. seen: a list, in which
        the last step's velocity is left. precision: of the products, attention: of that; both may be "fp8".
        """
        torch.manual_seed(0)
        if not apart and self.device.type == "cuda":
            flux_fused.join_projections_(self.pipe.transformer)
        text, image = self.args.text_length, 2 * (self.args.side // TOKEN) ** 2
        active = round(0.1 * image / 2)
        transformer, config = self.pipe.transformer, self.pipe.transformer.config
        model = FusedFluxModel(transformer, self.pipe.vae, torch.full([1], 2.5, device=self.device), {},
                               StepRunner(runner))  # fmt: skip
        heads, dim = config.num_attention_heads, config.attention_head_dim
        slots, keys = model.slots(active), text + image

        def normal(*shape):
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        def lengths(n):
            return torch.full([1], n, dtype=torch.int32, device=self.device)

        order = torch.arange(text + slots, dtype=torch.int32, device=self.device)[None]
        angle = normal(1, text + slots, dim // 2).float()
        sequence = flux_fused.MixedSequence(
            text, angle.cos(), angle.sin(), torch.zeros(1, keys, device=self.device), lengths(text + active),
            lengths(keys), torch.where(order < text + active, order, -1),
        )  # fmt: skip
        words = FluxText(self.options["prompt_embeds"], self.options["pooled_prompt_embeds"],
                         torch.zeros(text, 3, device=self.device))  # fmt: skip
        [conditioning] = model.timestep_conditioning(words, torch.full([1], 500.0, device=self.device))
        tokens = normal(1, slots, config.in_channels)
        layouts = []

        def step():
            if not layouts:
                if attention == "fp8":
                    cache = model._kept_in_fp8("kept", 1, keys, self.device)
                    for kept in cache:
                        self.fill_in_fp8(kept)
                else:
                    shape = (1, keys, heads, dim)
                    kept = model.runner.buffers("kept", 2 * model.blocks, shape, self.dtype, self.device)
                    for x in kept:
                        x.normal_()
                    cache = list(zip(kept[::2], kept[1::2]))
                layout = StepLayout(sequence, None, cache, "kept")
                layouts.append(FluxLayout(torch.zeros(slots, 3, device=self.device), layout))
            with fp8.active(model.runner.linears if precision == "fp8" else None):
                for _ in range(10):
                    found = model.velocity(words, tokens, conditioning, layouts[0])
            if seen is not None:
                seen[:] = [found]

        flops = transformer_flops(text + active, keys, heads * dim, model.blocks)
        moved = sum(p.numel() * p.element_size() for p in transformer.parameters())
        moved += 2 * model.blocks * keys * heads * dim * tokens.element_size()
        roofline = max(flops / FLOPS_A_SECOND, moved / BYTES_A_SECOND)
        return Row(step, times=10, facts={"flops": flops, "bytes": moved, "roofline_seconds": roofline})

    def fill_in_fp8(self, kept):
        """The numbers that keys and values in the model's dtype get, rounded; scales that hold them, and q."""
        for x, scale in ((kept.k, kept.k_scale), (kept.v, kept.v_scale)):
            scale.fill_(16 / 448)
            x.copy_(torch.empty(x.shape, dtype=self.dtype, device=self.device).normal_() * (448 / 16))
        kept.q_scale.fill_(16 / 448)

    def autoencoder(self, decode, fused):
        pixels = torch.rand(1, 3, self.args.side, self.args.side, device=self.device, dtype=self.dtype) * 2 - 1

        codec = codec_of(self.pipe.vae)
        x = codec.encode(pixels) if decode else pixels
        codec = codec.fused() if fused else codec
        function = codec.decode if decode else codec.encode

        def run():
            for _ in range(5):
                function(in_channels_last(x) if fused else x)

        return Row(run, times=5)

    def autoencoder_rows(self):
        return {
            ("decode" if decode else "encode") + (", fused norms" if fused else ""): partial(
                self.autoencoder, decode, fused
            )
            for fused in (False, True)
            for decode in (False, True)
        }

    def rows(self):
        """{name: function that makes its Row}. Those that change the transformer for good come last."""
        rows = {}
        if "graph" in self.args.runners:
            rows["q, k, v apart: active step graph"] = lambda: self.active_step("graph", apart=True)
        for n in (50, 28, 9, 8, 4):
            rows[f"plain-{n}"] = lambda n=n: self.plain_row(lambda: self.plain(n))
        for name, config in (("first block cache", FirstBlockCacheConfig(threshold=0.05)),
                             ("taylorseer", TaylorSeerCacheConfig(cache_interval=5))):  # fmt: skip
            rows[f"{name}-28"] = lambda c=config: self.plain_row(lambda: self.cached(c, 28))
        tenth = region(self.args.side, 0.1)
        rows["inpaint-28, 10 %"] = lambda: self.plain_row(lambda: self.inpaint(tenth, 28))
        # cached: after the first mixed step only text and edited tokens are computed; kv2, kv3: after every 2nd, 3rd
        kinds = {"full": {}, "full-cached": dict(kv_refresh=9), "locked": dict(finish="locked"),
                 "locked-kv2": dict(finish="locked", kv_refresh=2), "locked-kv3": dict(finish="locked", kv_refresh=3),
                 "locked-cached": dict(finish="locked", kv_refresh=9),
                 "locked-bracket": dict(finish="locked", kv_refresh="bracket"),
                 "locked-cached-fp8": dict(finish="locked", kv_refresh=9, kv_cache_dtype="fp8"),
                 "locked-cached-fp8-precision": dict(finish="locked", kv_refresh=9, precision="fp8"),
                 "locked-cached-fp8-products": dict(finish="locked", kv_refresh=9, precision="fp8")}  # fmt: skip
        kinds = {f"specedit-9-{kind}": options for kind, options in kinds.items()}
        kinds |= TIERS | STEPS | DRAFTED | FEW_STEPS
        for ending, of in (("fp8", TIERS | STEPS | DRAFTED), ("fp8-products", TIERS)):
            kinds |= {f"{kind} {ending}": options | dict(precision="fp8") for kind, options in of.items()}
        for runner in self.args.runners:
            for kind, options in kinds.items():
                config = SpecEditConfig(**{"quality": "paper", "max_active": 0.95, "runner": runner} | options)
                # products: without attention in fp8
                attends = (lambda *_: False) if kind.endswith("-products") else fp8.attends
                drafted = " drafted" in kind
                for scattered in (False, True):
                    for share in self.args.areas:
                        kind_of = f"{kind} {runner}" + (" scattered" if scattered else "")
                        mask, facts = (share, scattered), {"kind": kind_of, "area": share}
                        rows[f"{kind_of}, {100 * share:g}%"] = lambda c=config, m=mask, f=facts, a=attends, d=drafted: (
                            Row(lambda: self.specedit(c, region(self.args.side, *m), attends=a, drafted=d), facts=f)
                        )
            # without the padding of short prompts, as max_sequence_length leaves it out
            for text in (128, 256):
                config = SpecEditConfig(quality="paper", runner=runner, **kinds["specedit-9-locked-cached"])
                rows[f"specedit-9-locked-cached {runner}, 10%, {text} text tokens"] = lambda c=config, n=text: Row(
                    lambda: self.specedit(c, tenth, n)
                )
            if runner != "eager":
                rows[f"active step {runner}"] = lambda r=runner: self.active_step(r)
                rows[f"active step {runner}, products in fp8"] = lambda r=runner: self.active_step(r, precision="fp8")
                if self.device.type == "cuda" and ops.backend_of("mixed_res_attn_fp8")[0] == "cuda":
                    rows[f"active step {runner}, products and attention in fp8"] = lambda r=runner: self.active_step(
                        r, precision="fp8", attention="fp8"
                    )
        rows |= self.autoencoder_rows()
        if self.args.compiled:
            for n in (28, 9, 8, 4):
                rows[f"compiled plain-{n}"] = lambda n=n: self.compiled() or self.plain_row(lambda: self.plain(n))
        return rows

    def compiled(self):
        if not self.is_compiled:
            self.pipe.transformer.compile_repeated_blocks(fullgraph=True)
            self.is_compiled = True

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def profile(self, row, path):
        """Where the time of a row's run goes, kernel by kernel: a table at `path`. Gives its total, in seconds."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA] if self.device.type == "cuda" else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            row.run()
            self.synchronize()
        spent = {}
        for event in profiler.events():
            took = event.self_cpu_time_total
            if self.device.type == "cuda":
                if event.device_type != torch.autograd.DeviceType.CUDA:
                    continue  # the host's part in it
                took = event.time_range.elapsed_us()
            calls, total = spent.get(event.name, (0, 0.0))
            spent[event.name] = calls + 1, total + took
        total = sum(took for _, took in spent.values())
        lines = [f"{total / row.times / 1e3:.3f} ms, {sum(n for n, _ in spent.values()) / row.times:g} calls",
                 "us, share, calls, name; of one turn"]  # fmt: skip
        lines += [f"{took / row.times:10.1f} {took / total:6.1%} {calls / row.times:7g}  {name}"
                  for name, (calls, took) in sorted(spent.items(), key=lambda x: -x[1][1])]  # fmt: skip
        path.write_text("\n".join(lines) + "\n")
        return total / row.times / 1e6

    def measure_and_profile(self, name, row):
        """`measure` of a row, and `profile` where --profile names it."""
        figures = self.measure(row)
        if any(fnmatch.fnmatchcase(name, glob) for glob in self.args.profile):
            figures["profiled_seconds"] = self.profile(row, self.args.out / f"profile {name}.txt")
        return figures

    def measure(self, row):
        """A row's figures: median seconds after a warm-up, seconds of each stage, peak memory in bytes."""
        self.synchronize()
        started = time.perf_counter()
        (row.warm or row.run)()
        self.synchronize()
        warm = time.perf_counter() - started
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, stages = [], []
        begun = time.perf_counter()
        while not seconds or (len(seconds) < self.args.repeat and time.perf_counter() - begun < self.args.patience):
            self.synchronize()
            started = time.perf_counter()
            stats = row.run()
            self.synchronize()
            seconds.append((time.perf_counter() - started) / row.times)
            stages.append({} if stats is None else stats.seconds)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        middle = seconds.index(statistics.median_low(seconds))
        figures = {"seconds": seconds[middle], "calls": len(seconds), "stages": stages[middle],
                   "times": row.times, **row.facts}  # fmt: skip
        if row.warm is None:
            figures["first_seconds"] = warm
        if "roofline_seconds" in row.facts:
            figures["of_roofline"] = seconds[middle] / row.facts["roofline_seconds"]
        if peak is not None:
            figures["peak_bytes"] = peak
        if stats is not None:
            figures |= {"flops": stats.flops, "nfe": stats.nfe, "active": stats.active[0], "fallback": stats.fallback,
                        "backend": stats.backend, "runner": stats.runner, "graph_bytes": stats.graph_bytes,
                        "kv_cache_bytes": stats.kv_cache_bytes, "fp8_bytes": stats.fp8_bytes,
                        "merged_bytes": stats.merged_bytes}  # fmt: skip
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


TIERS = {f"quality {name}": dict(quality=name) for name in ("fast", "balanced", "best")}
# Coarse + mixed steps, named as bench/quality/solver.py has them. half: the coarse steps are a draft alone; ck: those
# but the first, ckK: but every K-th, over its keys and values; lt: the first mixed step alone computes the text; kv N:
# the whole sequence every N mixed steps, not bracketed.
STEPS = {
    f"steps {coarse}+{mixed}{name}": dict(
        stages=(coarse, mixed, 0), mixed_from=7 / 9, solver="ab2", finish="locked", kv_refresh=renewed or "bracket",
        draft="half" if " half" in name else "coarse", lock_text=" lt" in name,
        coarse_refresh=int(kept or coarse),
    )
    for coarse, mixed in ((2, 2), (2, 3), (3, 3), (3, 4), (3, 5), (4, 3), (4, 4), (4, 5), (4, 6), (4, 7), (5, 5),
                          (5, 6), (6, 7), (7, 5))
    for renewed in (0, 2, 3)
    for kind, kept in (("", 1), (" lt", 1), (" half", 1), (" half lt", 1), (" ck lt", ""), (" ck2 lt", 2),
                       (" ck3 lt", 3), (" ck4 lt", 4), (" half ck lt", ""))
    for name in (f"{kind} kv {renewed}" if renewed else kind,)
}  # fmt: skip
# The mask is given, so it is the region; "drafted": beside a draft that runs all the same.
DRAFTED = {f"{name} drafted": options for name, options in (TIERS | STEPS).items()}
# Of step-distilled weights, whose steps take as long as any others'.
FEW_STEPS = {f"preset {n}{name}": dict(quality="balanced", preset=n) | change
             for n in (8, 4) for name, change in (("", {}), (" cached", dict(kv_refresh=9)))}  # fmt: skip
PEERS = tuple(f"{how}plain-{n}" for n in (50, 28, 9, 8, 4) for how in ("", "compiled "))
EDITS = tuple(f"specedit-9-{kind} graph, 10%" for kind in ("locked-cached", "locked-kv3", "locked-kv2", "locked"))
# How many times as fast as a row of PEERS such an edit is to be, and what an active step may take of its roofline.
SPEEDUPS = {"plain-50": 20.0, "plain-28": 11.0, "compiled plain-28": 8.5, "compiled plain-9": 2.5}
OF_ROOFLINE = 1.25
# (edit, peer) -> the same of 8 steps, by the edited area.
FEW_STEPS_SPEEDUPS = {(f"preset 8 graph, {area}%", "compiled plain-8"): bar
                      for area, bar in (("6.4", 3.5), ("15.9", 2.59), ("35.4", 1.67))}  # fmt: skip


def bars(rows):
    """{what: {"value", "bar", "met"}} of the bars that the rows so far decide."""
    found = {}
    wanted = {(edit, peer): bar for edit, (peer, bar) in itertools.product(EDITS, SPEEDUPS.items())}
    for (edit, peer), bar in (wanted | FEW_STEPS_SPEEDUPS).items():
        ours, theirs = (rows.get(name, {}).get("seconds") for name in (edit, peer))
        if ours and theirs:
            value = theirs / ours
            found[f"{edit}: times as fast as {peer}"] = {"value": value, "bar": bar, "met": value >= bar}
    for name, row in rows.items():
        if "of_roofline" in row:
            value = row["of_roofline"]
            found[f"{name}: of its roofline"] = {"value": value, "bar": OF_ROOFLINE, "met": value <= OF_ROOFLINE}
    return found


def speedups_of_tenths(rows, wanted):
    """`bars` of the edits of a tenth. wanted: of a row's name, {its peer: how many times as fast the edit is to be}."""
    found = {}
    for name, row in rows.items():
        if row.get("area") != 0.1 or "seconds" not in row:
            continue
        for peer, bar in wanted(name).items():
            theirs = rows.get(peer, {}).get("seconds")
            if theirs:
                value = theirs / row["seconds"]
                found[f"{name}: times as fast as {peer}"] = {"value": value, "bar": bar, "met": value >= bar}
    return found


def with_bars(text, found):
    """A report and a line for each of its bars."""
    lines = (f"{what}: {x['value']:.2f}, wanted {x['bar']:g}{'' if x['met'] else ' (missed)'}"
             for what, x in found.items())  # fmt: skip
    return "\n".join([text, *lines]) + "\n"


def chosen_rows(parser, every, globs):
    """{name: None} of the rows that --rows names, in its order."""
    chosen = dict.fromkeys(n for glob in globs for n in every if fnmatch.fnmatchcase(n, glob))
    if not chosen:
        parser.error(f"--rows: none of {list(every)} matches {globs}")
    return chosen


def markdown(head, rows):
    peers = [name for name in PEERS if rows.get(name, {}).get("seconds")]
    lines = [f"{head['model']}, {head['side']} x {head['side']}, {head['text_length']} text tokens, batch 1;"
             f" {head['device']}, " + ", ".join(f"{k} {v}" for k, v in head["versions"].items())
             + f", commit {head['commit']}, {head['date']}. Seconds of denoising and autoencoder; text given.",
             "", "| row | seconds | calls | " + "".join(f"against {name} | " for name in peers)
             + "peak GiB | stages, s |",
             "|---|---:|---:|" + "---:|" * (len(peers) + 1) + "---|"]  # fmt: skip
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error'][:120]} |" + " |" * (len(peers) + 3))
            continue
        ratios = "".join(
            " – |" if row["times"] > 1 else f" {rows[other]['seconds'] / row['seconds']:.2f} x |" for other in peers
        )
        # tensors at their peak, and the graphs' pool, which no tensor holds between replays
        peak = f"{(row['peak_bytes'] + row.get('graph_bytes', 0)) / 2**30:.1f}" if "peak_bytes" in row else "–"
        stages = ", ".join(f"{k} {v:.3f}" for k, v in row["stages"].items())
        if "of_roofline" in row:
            stages = f"{row['of_roofline']:.2f} x its roofline of {row['roofline_seconds'] * 1000:.1f} ms"
        lines.append(f"| {name} | {row['seconds']:.4g} | {row['calls']} |{ratios} {peak} | {stages} |")
    return "\n".join(lines) + "\n"


def report(head, rows):
    return with_bars(markdown(head, rows), bars(rows))


def plot(rows, path):
    """Seconds over the edited area of each kind of row, and stacked bars of each row's stages; needs matplotlib."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shown = {name: row for name, row in rows.items() if row.get("stages")}
        if not shown:
            return
        figure, (lines, bars) = pyplot.subplots(
            1, 2, figsize=(15, max(4, 1 + 0.3 * len(shown))), layout="constrained", width_ratios=(2, 3)
        )
        for kind in dict.fromkeys(row["kind"] for row in shown.values() if "kind" in row):
            points = sorted((row["area"], row["seconds"]) for row in shown.values() if row.get("kind") == kind)
            lines.plot([100 * area for area, _ in points], [s for _, s in points], marker="o", label=kind)
        for name in PEERS:
            if rows.get(name, {}).get("seconds"):
                lines.axhline(rows[name]["seconds"], color="grey", linestyle=":")
                lines.text(0.99, rows[name]["seconds"], name, transform=lines.get_yaxis_transform(), ha="right",
                           va="bottom", fontsize="small")  # fmt: skip
        lines.set(xlabel="edited area, %", ylabel="seconds", yscale="log")
        lines.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0, 0.62))
        left = np.zeros(len(shown))
        for stage in dict.fromkeys(s for row in shown.values() for s in row["stages"]):
            width = np.array([row["stages"].get(stage, 0.0) for row in shown.values()])
            bars.barh(list(shown), width, left=left, label=stage)
            left += width
        bars.invert_yaxis()
        bars.set_xlabel("seconds")
        bars.legend(loc="lower right", fontsize="small")
        figure.savefig(path, dpi=110)


def run_rows(measures, head, out, name, report, derived=lambda rows: {}):
    """{row: figures} of {row: function that measures it}. Writes OUT/name.json and .md, report(head, rows), after each.

    derived: what else of the rows belongs into the file.

    A row that fails is reported as failed, and the others go on.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for row, measure in measures.items():
        try:
            rows[row] = measure()
        except Exception as error:
            rows[row] = {"error": f"{type(error).__name__}: {error}"}
            torch.cuda.empty_cache()
        print(row, json.dumps(rows[row]), flush=True)
        (out / f"{name}.json").write_text(json.dumps({**head, **derived(rows), "rows": rows}, indent=1))
        (out / f"{name}.md").write_text(report(head, rows))
    print((out / f"{name}.md").read_text())
    return rows


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--areas", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 1.0], help="edited shares")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=["eager", "graph"])
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of a row at most")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds after which a row is not repeated")
    parser.add_argument("--compiled", action="store_true", help="the rows with compile_repeated_blocks too")
    parser.add_argument("--profile", nargs="+", metavar="GLOB", default=[], help="rows whose kernels are listed too")
    parser.add_argument("--draw", action="store_true", help="no rows: draw OUT/flux_kontext.json anew")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    if args.draw:
        head = json.loads((args.out / "flux_kontext.json").read_text())
        (args.out / "flux_kontext.md").write_text(report(head, head["rows"]))
        plot(head["rows"], args.out / "flux_kontext.png")
        return 0
    bench = Bench(args)
    every = bench.rows()
    chosen = chosen_rows(parser, every, args.rows)

    args.out.mkdir(parents=True, exist_ok=True)
    measures = {name: lambda name=name: bench.measure_and_profile(name, every[name]()) for name in chosen}
    rows = run_rows(measures, setting(args), args.out, "flux_kontext", report, lambda rows: {"bars": bars(rows)})
    plot(rows, args.out / "flux_kontext.png")
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
