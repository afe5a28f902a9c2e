# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of one FLUX.1-Kontext edit under the conditions of real use, with random weights.

    python bench/models/conditions.py --out runs/models                    # one GPU with 80 GB or more
    python bench/models/conditions.py --tiny --out /tmp/models             # a tiny model on any machine, to try it
    python bench/models/conditions.py --out runs/models --rows "day" --edits 1000

LoRA, quantised weights, layerwise casting, offloading, capped cards, threads, and a server's day: all rows come from
one process, each with a pipeline of its own, and each is compared with the row "bf16 graph". The edit is that of
bench/models/flux_kontext.py: a given square mask of a tenth of the picture, nine steps, finish locked, kv_refresh 3.
What is done is on disk after each row; a row that fails, for want of a package too, is written with its error. Writes
OUT/conditions.json and .md. "applied" of a row is how far its picture is from that of the bf16 row, as a share of that
one's norm: 0 says that the condition was left out.
"""

import argparse
import fnmatch
import gc
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import flux_kontext as base

from specedit_kernels import SpecEditConfig

# What an edit may take of the row "bf16 graph", by the row's name.
BARS = {"lora 16": 1.15, "lora 16, fused": 1.0, "torchao *": 1.3, "layerwise fp8": 1.3, "bitsandbytes int8": 1.3,
        "gguf Q8_0": 1.3, "quanto int8": 1.3}  # fmt: skip
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


# the conditions: each changes the transformer of a pipeline, in place


def linear_layers(transformer):
    """(name, layer) of the linear layers of all blocks, without those of the modulation."""
    for name, module in transformer.named_modules():
        if type(module) is torch.nn.Linear and "blocks." in name and "norm" not in name:
            yield name, module


def lora_state(transformer, rank=16, seed=0, size=1.0):
    """A LoRA file's content for the attention's layers, random: {name: CPU tensor}.

    size: the norm of what it adds to a layer's weight, as a share of a random weight's.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in linear_layers(transformer):
        name = name.removesuffix(".base_layer")  # an adapter is there already
        if name.endswith(LAYERS):
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            # a weight's own numbers are about 1 / sqrt(3 in_features)
            up *= size * (3 * rank * layer.in_features) ** -0.5
            found |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return found


def lora(pipe, rank=16, adapter="one", seed=0):
    pipe.load_lora_weights(lora_state(pipe.transformer, rank, seed), adapter_name=adapter)


def fused_lora(pipe, rank=16):
    lora(pipe, rank)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def dora(pipe, rank=16):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS), use_dora=True, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")


def torchao(kind, pipe):
    from torchao import quantization

    config = getattr(quantization, kind)()
    names = {id(layer) for _, layer in linear_layers(pipe.transformer)}
    quantization.quantize_(pipe.transformer, config, filter_fn=lambda module, name: id(module) in names)


def layerwise(pipe):
    transformer = pipe.transformer
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)


def _replace(transformer, make):
    """Put make(layer) in the place of each linear layer of the blocks."""
    for name, layer in list(linear_layers(transformer)):
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, make(layer))


def nf4(pipe):
    import bitsandbytes as bnb

    def make(layer):
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                 compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")  # fmt: skip
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.weight._quantize(layer.weight.device)
        made.bias = layer.bias
        return made

    _replace(pipe.transformer, make)


def bnb_int8(pipe, threshold=0.0):
    import bitsandbytes as bnb

    def make(layer):
        made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None,
                                   has_fp16_weights=False, threshold=threshold, device="meta")  # fmt: skip
        weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        made.weight = weight._quantize(layer.weight.device)
        made.bias = layer.bias
        return made.eval()

    _replace(pipe.transformer, make)


def gguf(kind, pipe):
    """Layers as a GGUF file's are. Of one shape all have the same numbers: packing twelve billion takes long."""
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind, packed = library.GGMLQuantizationType[kind], {}

    def make(layer):
        weight = layer.weight
        large = weight.numel() > 1 << 20
        if not large or weight.shape not in packed:
            blocks = library.quants.quantize(weight.detach().float().cpu().numpy(), kind)
            packed[weight.shape] = torch.from_numpy(blocks).to(weight.device)
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, device="meta")
        made.weight = GGUFParameter(packed[weight.shape].clone(), quant_type=kind)
        made.bias = layer.bias
        return made

    _replace(pipe.transformer, make)


def quanto(kind, pipe):
    from optimum.quanto import freeze, qfloat8, qint4, qint8, quantize

    kinds = {"int8": qint8, "fp8": qfloat8, "int4": qint4}
    # those of the modulation stay: their names have "norm"
    quantize(pipe.transformer, weights=kinds[kind], include=["*blocks.*"], exclude=["*norm*"])
    freeze(pipe.transformer)


CONDITIONS = {
    "lora 16": lora,
    "lora 16, fused": fused_lora,
    "dora 16": dora,
    "torchao int8 weight-only": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao int8 dynamic": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8 weight-only": partial(torchao, "Float8WeightOnlyConfig"),
    "torchao fp8 dynamic": partial(torchao, "Float8DynamicActivationFloat8WeightConfig"),
    "layerwise fp8": layerwise,
    "bitsandbytes nf4": nf4,
    "bitsandbytes int8": bnb_int8,
    "gguf Q8_0": partial(gguf, "Q8_0"),
    "gguf Q4_0": partial(gguf, "Q4_0"),
    "quanto int8": partial(quanto, "int8"),
    "quanto fp8": partial(quanto, "fp8"),
}


class Conditions:
    """Rows of one process."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.reference = None  # the picture of the bf16 row

    def bench(self):
        """A new model with its options of a call; the last row's is gone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return base.Bench(self.args)

    def edit(self, bench, seed=0, side=None, share=0.1, runner="auto", kv="auto", **options):
        side = side or self.args.side
        config = SpecEditConfig(quality="paper", finish="locked", kv_refresh=3, max_active=0.95, runner=runner,
                                kv_cache_dtype=kv)  # fmt: skip
        options = bench.options | dict(height=side, width=side, max_area=side**2) | options
        return bench.pipe(specedit=config, mask_image=base.region(side, share),
                          generator=torch.Generator().manual_seed(seed), **options)  # fmt: skip

    def figures(self, bench, **options):
        """Median seconds after two warm-up edits, peak memory, the runner and why no faster one."""
        cuda = self.device.type == "cuda"
        for _ in range(2):
            self.edit(bench, **options)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.args.repeat):
            bench.synchronize()
            started = time.perf_counter()
            out = self.edit(bench, **options)
            bench.synchronize()
            seconds.append(time.perf_counter() - started)
        picture, stats = out.images.float().cpu(), out.stats
        if self.reference is None:
            self.reference = picture
        applied = (picture - self.reference).norm() / self.reference.norm()
        found = {"seconds": statistics.median(seconds), "runner": stats.runner, "runner_reason": stats.runner_reason,
                 "captures": stats.captures, "stages": stats.seconds, "graph_bytes": stats.graph_bytes,
                 "applied": applied.item(), "finite": bool(picture.isfinite().all())}  # fmt: skip
        if cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found

    def plain(self, runner):
        return self.figures(self.bench(), runner=runner)

    def condition(self, change, runner):
        bench = self.bench()
        change(bench.pipe)
        return self.figures(bench, runner=runner)

    def offload(self, kind, **options):
        """Offloading of a whole pipeline; on a machine without a GPU it has nowhere to go, and raises."""
        bench = self.bench()
        if kind == "model":
            bench.pipe.enable_model_cpu_offload(device=self.device)
        elif kind == "sequential":
            bench.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            for part in (bench.pipe.transformer, bench.pipe.vae):
                part.enable_group_offload(
                    onload_device=self.device, offload_device=torch.device("cpu"), offload_type=kind, **options
                )  # fmt: skip
        return self.figures(bench, runner="auto")

    def card(self, gib, change):
        """A recipe of docs/memory.md with no more memory than such a card has."""
        if self.device.type != "cuda":
            raise RuntimeError("a capped card needs a CUDA device")
        bench = self.bench()
        change(bench.pipe)
        bench.pipe.enable_model_cpu_offload(device=self.device)
        gc.collect()
        torch.cuda.empty_cache()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), index)
        try:
            return self.figures(bench, kv="fp8")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)

    def threads(self, count=4):
        """Edits a second of `count` threads on one pipeline, as a share of one thread's."""
        bench = self.bench()
        expected = [self.edit(bench, seed).images for seed in range(count)]
        self.edit(bench)
        bench.synchronize()
        started = time.perf_counter()
        for seed in range(count):
            self.edit(bench, seed)
        bench.synchronize()
        alone, wrong = time.perf_counter() - started, []

        def work(seed):
            with torch.inference_mode():  # a thread's own
                if not torch.equal(self.edit(bench, seed).images, expected[seed]):
                    wrong.append(seed)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        bench.synchronize()
        together = time.perf_counter() - started
        return {"seconds": together / count, "throughput": alone / together, "wrong": wrong}

    def day(self):
        """`--edits` edits of mixed sizes, masks, prompts and LoRAs, as of a server. Every 50th is made again by a fresh
        runner, whose bits it has to have."""
        bench, cuda = self.bench(), self.device.type == "cuda"
        pipe, sides = bench.pipe, [self.args.side, self.args.side // 2 // 64 * 64 or 64]
        states = [lora_state(pipe.transformer, seed=seed) for seed in range(2)]
        loaded, memory, stale, seconds, started = None, [], [], [], time.perf_counter()
        for i in range(self.args.edits):
            wanted = (None, 0, 1)[i // 10 % 3]
            if wanted != loaded:
                if loaded is not None:
                    pipe.unload_lora_weights()
                if wanted is not None:
                    pipe.load_lora_weights(states[wanted], adapter_name=f"style{wanted}")
                loaded = wanted
            options = dict(seed=i, side=sides[i % 2], share=(0.05, 0.1, 0.2)[i % 3])
            options["prompt_embeds"] = bench.options["prompt_embeds"] * (1 + i % 5 / 10)
            at = time.perf_counter()
            picture = self.edit(bench, **options).images
            bench.synchronize()
            seconds.append(time.perf_counter() - at)
            if cuda:
                memory.append(torch.cuda.memory_allocated())
            if i % 50 == 49 or i == self.args.edits - 1:
                pipe._free_runner()
                if not torch.equal(self.edit(bench, **options).images, picture):
                    stale.append(i)
        found = {"seconds": statistics.median(seconds), "edits": self.args.edits, "stale": stale,
                 "total_seconds": time.perf_counter() - started}  # fmt: skip
        after = memory[50:]
        if after:
            found |= {"memory_spread_bytes": max(after) - min(after), "memory_drift_bytes": after[-1] - after[0],
                      "peak_bytes": torch.cuda.max_memory_allocated()}  # fmt: skip
        return found

    def rows(self):
        rows = {f"bf16 {runner}": partial(self.plain, runner) for runner in ("graph", "fused", "eager")}
        rows |= {name: partial(self.condition, change, "auto") for name, change in CONDITIONS.items()}
        # where graphs cannot be had, by the reason that is given
        rows["bitsandbytes int8, outliers"] = partial(self.condition, partial(bnb_int8, threshold=6.0), "auto")
        rows["model offload"] = partial(self.offload, "model")
        rows["sequential offload"] = partial(self.offload, "sequential")
        rows["group offload, blocks, stream"] = partial(
            self.offload, "block_level", num_blocks_per_group=1, use_stream=True
        )
        rows["group offload, leaves, stream"] = partial(self.offload, "leaf_level", use_stream=True)
        for gib in (24, 16):
            for name in ("torchao fp8 weight-only", "layerwise fp8", "bitsandbytes nf4"):
                rows[f"{gib} GiB card, {name}"] = partial(self.card, gib, CONDITIONS[name])
        rows["four threads"] = self.threads
        rows["day"] = self.day
        return rows


def bars(rows):
    """{row: {"value", "bar", "met"}}: its seconds as a share of the bf16 graph row's."""
    whole, found = rows.get("bf16 graph", {}).get("seconds"), {}
    for name, row in rows.items():
        bar = next((bar for glob, bar in BARS.items() if fnmatch.fnmatchcase(name, glob)), None)
        if whole and bar and "seconds" in row:
            value = row["seconds"] / whole
            found[name] = {"value": value, "bar": bar, "met": value <= bar}
    return found


def report(head, rows):
    whole = rows.get("bf16 graph", {}).get("seconds")
    lines = [f"{head['model']}, {head['side']} x {head['side']}, {head['device']}, "
             + ", ".join(f"{k} {v}" for k, v in head["versions"].items())
             + f", commit {head['commit']}, {head['date']}. Seconds of one edit, text given.",
             "", "| condition | seconds | of bf16 graph | bar | runner | peak GiB | applied | notes |",
             "|---|---:|---:|---:|---|---:|---:|---|"]  # fmt: skip
    met = bars(rows)
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed | | | | | | {row['error'][:160]} |")
            continue
        of = f"{row['seconds'] / whole:.2f} x" if whole else "–"
        bar = f"{met[name]['bar']:g} ({'met' if met[name]['met'] else 'missed'})" if name in met else "–"
        peak = f"{(row['peak_bytes'] + row.get('graph_bytes', 0)) / 2**30:.1f}" if "peak_bytes" in row else "–"
        applied = f"{row['applied']:.3f}" if "applied" in row else "–"
        notes = row.get("runner_reason", "")
        notes += ", ".join(f"{k} {row[k]}" for k in ("throughput", "wrong", "edits", "stale", "memory_spread_bytes",
                                                     "memory_drift_bytes") if k in row)  # fmt: skip
        lines.append(f"| {name} | {row['seconds']:.4g} | {of} | {bar} | {row.get('runner', '–')} | {peak} | {applied} |"
                     f" {notes} |")  # fmt: skip
    return "\n".join(lines) + "\n"


@torch.inference_mode(False)
@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--side", type=int, help="of the picture in pixels, a multiple of 64 (default 1024; tiny: 128)")
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="timed edits of a row")
    parser.add_argument("--edits", type=int, default=200, help="of the row 'day'")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    every = Conditions(args).rows()
    chosen = dict.fromkeys(n for glob in args.rows for n in every if fnmatch.fnmatchcase(n, glob))
    if not chosen:
        parser.error(f"--rows: none of {args.rows} is a row; there are {', '.join(every)}")
    # conditions compare with the plain row, which comes first
    base.run_rows({n: every[n] for n in chosen}, base.setting(args), args.out, "conditions", report,
                  lambda rows: {"bars": bars(rows)})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
