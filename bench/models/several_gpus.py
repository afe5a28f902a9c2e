# SPDX-License-Identifier: Apache-2.0
"""One edit on several GPUs, and a folder of pictures on all of them: the same picture, and how much faster.

    torchrun --nproc-per-node 2 bench/models/several_gpus.py --out runs/models
    torchrun --nproc-per-node 2 bench/models/several_gpus.py --tiny --out /tmp/models   # any machine, gloo

    torchrun --nproc-per-node 2 bench/models/several_gpus.py --parts kontext qwen --seconds 110   # full sizes alone

Parts, in order: "links" (what an all-to-all moves), "same" (a small model on one GPU and on all: latents compared,
runner by runner), "autoencoder" (of full size, whole on each, in strips of rows on all: how far apart, seconds, bytes
beside the weights), "kontext" (FLUX.1-Kontext's size: an edit on one GPU, then with its sequence on all, side by side),
"qwen" (Qwen-Image-Edit's size with guidance: one GPU, its branches on two, a folder's pictures, the sequence on all).
Each row is on disk when it is done. Random weights, made once a part; text embeddings are given; a square tenth of the
picture is edited (--area). One-GPU rows run on every GPU at once, apart from each other; seconds are wall clock between
barriers. Writes OUT/several_gpus.json, .md.
"""

import argparse
import contextlib
import datetime
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import flux_kontext
import numpy as np
import qwen_image_edit
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, ContextParallelConfig
from diffusers.hooks.context_parallel import remove_context_parallel
from flux_kontext import Bench, region, setting
from qwen_image_edit import QwenBench

from specedit_kernels import SpecEditConfig, disable_guidance_parallelism, enable_guidance_parallelism
from specedit_kernels.cli.ranks import Share
from specedit_kernels.engine import strips
from specedit_kernels.engine.autoencoder import in_channels_last
from specedit_kernels.engine.parallel import Ranks
from specedit_kernels.engine.registry import codec_of
from specedit_kernels.engine.runner import StepRunner

LOCKED = dict(finish="locked", kv_refresh=9)
PARTS = ("links", "same", "autoencoder", "kontext", "qwen")
# {what: (times as fast as one GPU, of how many GPUs)}; for a folder it is the share of a linear gain.
SPEEDUPS = {
    "kontext 2048 cached graph": {2: 1.6, 4: 2.6}, "kontext 1024 cached graph": {2: 1.0, 4: 1.0, 8: 1.0},
    "qwen 1024 cached graph, guidance": {2: 1.8},
}  # fmt: skip
LINEAR = 0.95
SMALL = dict(num_layers=2, num_single_layers=4, joint_attention_dim=512, pooled_projection_dim=64)
SMALL_QWEN = dict(num_layers=3, joint_attention_dim=512)


class Group:
    """The ranks of this run and their clock."""

    def __init__(self):
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=timeout,
                                device_id=self.device if self.cuda else None)  # fmt: skip
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def late(self, begun, seconds):
        """Whether so many seconds have passed since `begun` on any rank."""
        late = torch.tensor(float(time.perf_counter() - begun > seconds), device=self.device)
        dist.all_reduce(late)
        return bool(late.item())

    def seconds(self, call, repeat, warm=1):
        """Median wall clock of call() from one barrier to the next; `warm` calls before warm it up."""
        found = []
        for i in range(-warm, repeat):
            self.synchronize()
            begun = time.perf_counter()
            stats = call()
            self.synchronize()
            if i >= 0:
                found.append(time.perf_counter() - begun)
        return sorted(found)[(len(found) - 1) // 2], stats

    def row(self, call, repeat):
        seconds, stats = self.seconds(call, repeat)
        return {"seconds": seconds, "runner": stats.runner, "runner_reason": stats.runner_reason,
                "stages": stats.seconds, "kv_cache_bytes": stats.kv_cache_bytes, "nfe": stats.nfe,
                "backend": stats.backend}  # fmt: skip

    @contextlib.contextmanager
    def shared(self, transformer):
        """Within it the transformer's sequence is shared by all ranks."""
        # diffusers divides by the count of devices, and finds none on a CPU
        with mock.patch.object(torch.accelerator, "device_count", lambda: self.size):
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.size))
        try:
            yield
        finally:  # diffusers has no call for it
            remove_context_parallel(transformer, transformer._cp_plan)
            transformer._parallel_config = None
            for processor in transformer.attn_processors.values():
                processor._parallel_config = None


def of_bench(args, group, side, text, **more):
    return SimpleNamespace(tiny=args.tiny, device=str(group.device), side=side, text_length=text, runners=["graph"],
                           areas=[args.area], **more)  # fmt: skip


def links(args, group):
    """What a rank sends in an all-to-all of q, k and v of a block at 2048 x 2048, and of a small one, and how fast."""
    dtype, found = torch.bfloat16 if group.cuda else torch.float32, {}
    for name, rows in (("large", 16 if args.tiny else 8704 // group.size), ("small", 64)):
        sent = torch.randn(rows * group.size, 3 * 3072 // group.size, device=group.device, dtype=dtype)
        got = torch.empty_like(sent)

        def call(sent=sent, got=got):
            for _ in range(20):
                dist.all_to_all_single(got, sent)

        seconds, _ = group.seconds(call, 2)
        sent_bytes = sent.numel() * sent.element_size() * (group.size - 1) / group.size
        found[name] = {"bytes": sent_bytes, "seconds": seconds / 20, "gb_per_second": sent_bytes * 20 / seconds / 1e9}
    if group.cuda:
        found["peer_access"] = torch.cuda.can_device_access_peer(0, 1) if torch.cuda.device_count() > 1 else None
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def edit(bench, config, mask):
    options = bench.options | dict(output_type="latent", generator=torch.Generator().manual_seed(0))
    if isinstance(bench, QwenBench):
        options["max_area"] = bench.args.side**2
    found = bench.pipe(specedit=config, mask_image=mask, **options)
    return found.images.float(), found.stats


# Of "same": (runner, options), those that a GPU has beside the others behind.
SAME = {
    "full": (("eager", "fused", "graph"), {}),
    "cached": (("eager", "fused", "graph"), LOCKED),
    "bracket": (("fused",), LOCKED | dict(kv_refresh="bracket")),
    "locked text, fp8 cache": (("eager", "graph"), LOCKED | dict(lock_text=True, kv_cache_dtype="fp8")),
    "second order": (("fused", "graph"), {"quality": "balanced"}),
    "fp8 products": (("graph",), LOCKED | dict(precision="fp8")),
}


def small(args, group, name):
    """A Bench of a small model of that name, and its mask."""
    heads = max(2, group.size) if args.tiny else 8
    if args.tiny:
        sizes = flux_kontext.TINY_TRANSFORMER, qwen_image_edit.TINY_TRANSFORMER, qwen_image_edit.TINY_VAE
    else:
        sizes = flux_kontext.TRANSFORMER | SMALL, SMALL_QWEN, qwen_image_edit.TINY_VAE | dict(base_dim=16)
    of_kontext, of_qwen, vae = sizes
    side = 128 if args.tiny else 512
    given = of_bench(args, group, side, 64, true_cfg_scale=4.0)
    given.tiny = True
    with (
        mock.patch.object(flux_kontext, "TINY_TRANSFORMER", of_kontext | dict(num_attention_heads=heads)),
        mock.patch.object(qwen_image_edit, "TINY_TRANSFORMER", of_qwen | dict(num_attention_heads=heads)),
        mock.patch.object(qwen_image_edit, "TINY_VAE", vae),
    ):
        return (Bench if name == "kontext" else QwenBench)(given), region(side, 0.25)


def far(a, b):
    """Root mean square of a difference over that of b."""
    return ((a - b).float().pow(2).mean().sqrt() / b.float().pow(2).mean().sqrt()).item()


def same(args, group):
    """{what: how far its latents are from one GPU's, and one GPU's runners from each other}, `far`."""
    found = {}
    runs = [
        (kind, runner) for kind, (runners, _) in SAME.items() for runner in runners if group.cuda or runner != "graph"
    ]

    for name in ("kontext", "qwen"):
        bench, mask = small(args, group, name)

        def run(kind, runner, bench=bench, mask=mask):
            bench.pipe._free_runner()  # whose buffers are counted
            options = {"quality": "paper", "max_active": 0.95, "runner": runner} | SAME[kind][1]
            return edit(bench, SpecEditConfig(**options), mask)

        expected = {each: run(*each) for each in runs}

        def compared(where, times=1, name=name, run=run, expected=expected):
            for kind, runner in runs:
                images, stats = run(kind, runner)
                one, of_one = expected[kind, runner]
                row = {"far": far(images, one), "runner": stats.runner, "captures": stats.captures}
                if times > 1:
                    kept = of_one.kv_cache_bytes
                    row["kv_share"] = stats.kv_cache_bytes / kept if kept else None
                found[f"{name} {kind} {runner}: {where}"] = row

        for kind, runner in runs:
            if runner != "eager" and (kind, "eager") in expected:
                row = {"far": far(expected[kind, runner][0], expected[kind, "eager"][0])}
                found[f"{name} {kind} {runner}: one GPU, against eager"] = row
        if name == "qwen" and group.size == 2:
            enable_guidance_parallelism(bench.pipe)
            compared("guidance on 2")
            disable_guidance_parallelism(bench.pipe)
        with group.shared(bench.pipe.transformer):
            compared(f"sequence on {group.size}", 2)
        bench.pipe._free_runner()
    return found


def autoencoder(args, group):
    """{what: how far strips are from the whole, seconds of both, most bytes beside the weights of both}.

    The last height is one that the ranks do not divide in rows of latents.
    """
    sizes = {
        "kontext": (AutoencoderKL, flux_kontext.TINY_VAE if args.tiny else flux_kontext.VAE, "encode", "decode"),
        "qwen": (AutoencoderKLQwenImage, qwen_image_edit.TINY_VAE if args.tiny else {}, "mode", "pixels"),
    }
    dtype, found = torch.bfloat16 if group.cuda else torch.float32, {}
    heights = {side: side for side in args.sides} | {args.sides[0]: args.sides[0] + 8 * (group.size - 1)}
    for name, (kind, config, encode, decode) in sizes.items():
        [vae] = flux_kontext.random_modules(group.device, dtype, lambda kind=kind, config=config: kind(**config))
        whole = codec_of(vae).fused()
        codecs = {"whole": whole, "strips": strips.over(whole, Ranks.of(None))}
        for side, height in heights.items():
            pixels = torch.randn(1, 3, height, side, generator=torch.Generator().manual_seed(0))
            given = {encode: pixels.to(group.device, dtype).clamp(-1, 1)}
            given[decode] = getattr(whole, encode)(in_channels_last(given[encode]))
            for what, x in given.items():
                row, results = {}, {}
                for where, codec in codecs.items():
                    runner = StepRunner("graph" if group.cuda else "fused")

                    def call(codec=codec, what=what, x=x, runner=runner):
                        # Qwen's latents have an axis of frames
                        run = lambda x: getattr(codec, what)(in_channels_last(x) if x.dim() == 4 else x)  # noqa: E731
                        return runner(what, run, {"x": x})

                    if group.cuda:  # uncaptured: a graph's memory stays
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                        getattr(codec, what)(in_channels_last(x) if x.dim() == 4 else x)
                        row[f"bytes_{where}"] = torch.cuda.max_memory_allocated() - before
                    row[f"seconds_{where}"], results[where] = group.seconds(call, args.repeat)
                    row["runner"] = runner.mode
                    runner.close()
                row["far"] = far(results["strips"], results["whole"])
                row["times_as_fast"] = row["seconds_whole"] / row["seconds_strips"]
                found[f"{name} {'encode' if what == encode else 'decode'} {height} x {side}"] = row
    return found


def kontext(args, group, put):
    bench = Bench(of_bench(args, group, args.sides[0], args.text_length))
    kinds = {f"cached {args.runner}": (LOCKED, args.runner)}
    if args.more:
        kinds |= {"cached eager": (LOCKED, "eager"), f"whole steps {args.runner}": ({"finish": "locked"}, args.runner)}
    places = {
        "1 GPU": contextlib.nullcontext,
        f"sequence on {group.size}": lambda: group.shared(bench.pipe.transformer),
    }
    for side in args.sides:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        bench.options |= dict(image=flux_kontext.Image.fromarray(pixels), height=side, width=side, max_area=side**2)
        for where, place in places.items():
            for kind, (options, runner) in kinds.items():
                config = SpecEditConfig(quality="paper", max_active=0.95, runner=runner, **options)
                call = lambda c=config, s=side: bench.specedit(c, region(s, args.area))  # noqa: E731
                with place():
                    put(f"kontext {side} {kind}: {where}", lambda call=call: group.row(call, args.repeat))
        bench.pipe._free_runner()


def folder(args, group, call):
    """Pictures of a folder: as many on the first GPU alone as each gets where all take from one heap."""
    count = args.pictures

    def alone():
        if group.rank == 0:
            for _ in range(count):
                call()

    call()
    one, _ = group.seconds(alone, 1, warm=0)

    def together():
        prefix = dist.PrefixStore("folder", dist.distributed_c10d._get_default_store())
        for _ in Share(prefix, group.rank, group.size).take(count * group.size):
            call()

    all_of, _ = group.seconds(together, 1, warm=0)
    return {"pictures": count, "seconds_of_one": one, "seconds_of_all": all_of, "of_linear": one / all_of}


def qwen(args, group, put):
    side = args.sides[0]
    bench = QwenBench(of_bench(args, group, side, args.qwen_text_length, true_cfg_scale=4.0))
    config = SpecEditConfig(quality="paper", max_active=0.95, runner=args.runner, **LOCKED)

    def call():
        return bench.specedit(config, region(side, args.area))

    def row():
        return group.row(call, args.repeat)

    kind = f"qwen {side} cached {args.runner}"
    put(f"{kind}: 1 GPU", row)
    if group.size == 2:
        enable_guidance_parallelism(bench.pipe)
        put(f"{kind}, guidance: guidance on 2", row)
        disable_guidance_parallelism(bench.pipe)
    put("folder", lambda: folder(args, group, call))
    with group.shared(bench.pipe.transformer):
        put(f"{kind}: sequence on {group.size}", row)
    bench.pipe._free_runner()


def bars(found, size):
    """{what: {"value", "bar", "met"}}."""
    rows, made = found.get("rows", {}), {}
    for name, row in rows.items():
        what, _, where = name.partition(": ")
        one = rows.get(f"{what.removesuffix(', guidance')}: 1 GPU", {}).get("seconds")
        if where != "1 GPU" and one and row.get("seconds"):
            bar = SPEEDUPS.get(what, {}).get(size)
            value = one / row["seconds"]
            made[f"{name}: times as fast as 1 GPU"] = {
                "value": value, "bar": bar, "met": None if bar is None else value >= bar
            }  # fmt: skip
    if "of_linear" in rows.get("folder", {}):
        value = rows["folder"]["of_linear"]
        made["folder: of linear"] = {"value": value, "bar": LINEAR, "met": value >= LINEAR}
    return made


def markdown(head, found):
    versions = ", ".join(f"{k} {v}" for k, v in head["versions"].items())
    lines = [f"{head['gpus']} x {head['device']}, {versions}, commit {head['commit']}, {head['date']}. Random weights,"
             f" {head['area']:.0%} edited.", ""]  # fmt: skip
    if "links" in found:
        lines += [f"- {name}: {json.dumps(value)}" for name, value in found["links"].items()] + [""]
    if found.get("same"):
        lines += [
            "| small model | far from one GPU | runner | graphs | keys and values kept |",
            "|---|---:|---|---:|---:|",
        ]
        for name, x in found["same"].items():
            share = "" if x.get("kv_share") is None else f"{x['kv_share']:.2f}"
            lines.append(f"| {name} | {x['far']:.2e} | {x.get('runner', '')} | {x.get('captures', '')} | {share} |")
        lines.append("")
    if found.get("autoencoder"):
        lines += ["| autoencoder | whole, s | in strips, s | far from the whole | MB whole | MB in strips |",
                  "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
        for name, x in found["autoencoder"].items():
            used = " | ".join(f"{x.get(f'bytes_{where}', 0) / 2**20:.0f}" for where in ("whole", "strips"))
            lines.append(f"| {name} | {x['seconds_whole']:.4f} | {x['seconds_strips']:.4f} | {x['far']:.2e} | {used} |")
        lines.append("")
    if found.get("rows"):
        lines += ["| row | seconds | runner | stages, s |", "|---|---:|---|---|"]
        for name, x in found["rows"].items():
            if "error" in x:
                lines.append(f"| {name} | failed: {x['error'][:200]} | | |")
            elif "seconds" in x:
                stages = ", ".join(f"{k} {v:.3f}" for k, v in x["stages"].items())
                lines.append(f"| {name} | {x['seconds']:.4g} | {x['runner']} {x['runner_reason'][:80]} | {stages} |")
            else:
                lines.append(f"| {name} | {json.dumps(x)} | | |")
        lines.append("")
    for what, x in head["bars"].items():
        bar = "" if x["bar"] is None else f", wanted {x['bar']:g}" + ("" if x["met"] else " (missed)")
        lines.append(f"- {what}: {x['value']:.2f}{bar}")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", type=int, nargs="+", help="Kontext's pictures in pixels; the first is Qwen's too")
    parser.add_argument("--area", type=float, default=0.1, help="edited share")
    parser.add_argument("--runner", help="of the seconds (default: graph; tiny: fused)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--qwen-text-length", type=int, default=1540)
    parser.add_argument("--more", action="store_true", help="Kontext's edits run eagerly, and without a cache, too")
    parser.add_argument("--repeat", type=int, default=2, help="timed edits of a row, after one that warms it up")
    parser.add_argument("--pictures", type=int, default=5, help="of the folder, for each GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further row is begun after so many")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    diffusers.utils.logging.set_verbosity_error()
    group = Group()
    args.sides = args.sides or ([128, 256] if args.tiny else [1024, 2048])
    args.runner = args.runner or ("graph" if group.cuda else "fused")
    if args.tiny:
        args.text_length = min(args.text_length, 64)
        args.qwen_text_length = min(args.qwen_text_length, 64)
    given = of_bench(args, group, args.sides[0], args.text_length)
    head = setting(given) | {"gpus": group.size, "area": args.area, "sides": args.sides}
    found = {}

    def write():
        head["bars"] = bars(found, group.size)
        if group.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "several_gpus.json").write_text(json.dumps(head | found, indent=1))
            (args.out / "several_gpus.md").write_text(markdown(head, found))

    def said(name, figures=""):
        if group.rank == 0:
            print(f"{time.perf_counter() - begun:6.1f} s  {name} {figures}", flush=True)

    def put(name, measure):
        """Measure a row, if there is time, and write it."""
        rows = found.setdefault("rows", {})
        if group.late(begun, args.seconds):
            rows[name] = {"error": "not begun, the time was over"}
        else:
            try:
                rows[name] = measure()
            except Exception as error:
                rows[name] = {"error": f"rank {group.rank}: {type(error).__name__}: {error}"}
                write()
                raise
        write()
        said(name, json.dumps(rows[name])[:300])

    failed = False
    for part in args.parts:
        try:
            if group.late(begun, args.seconds):
                said(part, "not begun, the time was over")
            elif part in ("links", "same", "autoencoder"):
                found[part] = {"links": links, "same": same, "autoencoder": autoencoder}[part](args, group)
                write()
                said(part, "done")
            else:
                {"kontext": kontext, "qwen": qwen}[part](args, group, put)
        except torch.cuda.OutOfMemoryError as error:
            failed = True
            said(part, str(error))
        if group.cuda:
            torch.cuda.empty_cache()
    if group.rank == 0:
        print((args.out / "several_gpus.md").read_text())
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
