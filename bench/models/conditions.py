# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of one FLUX.1-Kontext edit under the conditions of real use, with random weights.

    python bench/models/conditions.py --out runs/models                    # one GPU with 80 GB or more
    python bench/models/conditions.py --tiny --out /tmp/models             # a tiny model on any machine, to try it
    python bench/models/conditions.py --out runs/models --rows day --edits 1000 --layers 2
    python bench/models/conditions.py --out runs/models --rows day --edits 1000 --side 512 --model FOLDER

LoRA, quantised weights, layerwise casting, offloading, capped cards, batches, callbacks, threads, and a server's day:
all rows come from one process, each with a pipeline of its own, and each is compared with the row "bf16 graph". The
edit is that of bench/models/flux_kontext.py: a given square mask of a tenth of the picture, nine steps, finish locked,
kv_refresh 3. What is done is on disk after each row; a row that fails, for want of a package too, is written with its
error. Writes OUT/conditions.json and .md. "applied" of a row is how far its picture is from that of the bf16 row, as a
share of that one's norm: 0 says that the condition was left out. "right" says whether that, and what else a row looks
at, is as it has to be.
"""

import argparse
import fnmatch
import gc
import itertools
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import flux_kontext as base

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline

# What an edit may take of the row "bf16 graph", by the row's name.
BARS = {"lora 16": 1.15, "lora 16, fused": 1.0, "torchao *": 1.3, "layerwise fp8": 1.3, "bitsandbytes int8": 1.3,
        "gguf *": 1.3, "quanto *": 1.3}  # fmt: skip
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
# How far a row's picture is to be from the bf16 row's, by the row's name: from rounding alone, or by what is applied.
# The weights of GGUF rows are other ones (`gguf`).
SAME, FEW_BITS, CHANGED = (0.0, 0.03), (1e-4, 0.3), (1e-3, 2.0)
RIGHT = {
    "bf16 *": SAME,
    "* offload*": SAME,
    "lora *": CHANGED,
    "dora *": CHANGED,
    "gguf *": CHANGED,
    "*nf4": CHANGED,
    "*": FEW_BITS,
}
FLAT = 64 << 20  # bytes by which memory may differ between like edits of a day
CYCLE = 30  # edits after which a day's conditions come again


# the conditions: each changes the transformer of a pipeline, in place


def linear_layers(transformer, every=False):
    """(name, layer) of the linear layers of all blocks, without those of the modulation; every: of all there are, as a
    quantisation config of diffusers has them."""
    for name, module in transformer.named_modules():
        if type(module) is torch.nn.Linear and (every or ("blocks." in name and "norm" not in name)):
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


def torchao(kind, pipe, by_row=False, every=False):
    from torchao import quantization

    config = getattr(quantization, kind)(**(dict(granularity=quantization.PerRow()) if by_row else {}))
    names = {id(layer) for _, layer in linear_layers(pipe.transformer, every)}
    quantization.quantize_(pipe.transformer, config, filter_fn=lambda module, name: id(module) in names)


def layerwise(pipe):
    transformer = pipe.transformer
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)


def _replace(transformer, make, every=False):
    """Put make(layer) in the place of each of `linear_layers`."""
    for name, layer in list(linear_layers(transformer, every)):
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, make(layer))


def nf4(pipe, every=False):
    import bitsandbytes as bnb

    def make(layer):
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                 compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")  # fmt: skip
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.weight._quantize(layer.weight.device)
        made.bias = layer.bias
        return made

    _replace(pipe.transformer, make, every)


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


def pack_q4_k(weight):
    """A weight [N, K] in blocks of Q4_K, each with one scale for its 256 numbers. The gguf package packs none."""
    blocks = weight.float().reshape(-1, 256)
    step = (blocks.abs().amax(1, keepdim=True) / 7.5 / 63).half().clamp_min(6e-8)
    codes = (blocks / (step.float() * 63) + 7.5).round().clamp(0, 15).to(torch.uint8).view(-1, 4, 2, 32)
    codes = codes[:, :, 0] | codes[:, :, 1] << 4
    halves = torch.cat([step, step * 7.5], dim=1).view(torch.uint8)
    # the largest code, 63, for each scale and minimum
    packed = torch.cat([halves, torch.full_like(codes[:, 0, :12], 255), codes.flatten(1)], dim=1)
    return packed.view(len(weight), -1)


def gguf(kind, pipe):
    """Layers as a GGUF file's are. Of one shape all have the same numbers: packing twelve billion takes long."""
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind, packed = library.GGMLQuantizationType[kind], {}

    def make(layer):
        weight = layer.weight
        large = weight.numel() > 1 << 20
        if not large or weight.shape not in packed:
            if kind.name == "Q4_K":
                packed[weight.shape] = pack_q4_k(weight.detach())
            else:
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
    "torchao fp8 dynamic, by row": partial(torchao, "Float8DynamicActivationFloat8WeightConfig", by_row=True),
    "layerwise fp8": layerwise,
    "bitsandbytes nf4": nf4,
    "bitsandbytes int8": bnb_int8,
    "gguf Q8_0": partial(gguf, "Q8_0"),
    "gguf Q4_0": partial(gguf, "Q4_0"),
    "gguf Q4_K": partial(gguf, "Q4_K"),
    "quanto int8": partial(quanto, "int8"),
    "quanto fp8": partial(quanto, "fp8"),
}


# Recipes of docs/memory.md, by the cards that they are for. Layerwise casting leaves the modulation as it is.
CARDS = {
    "torchao fp8 weight-only": ((24, 16), partial(torchao, "Float8WeightOnlyConfig", every=True)),
    "layerwise fp8": ((24,), layerwise),
    "bitsandbytes nf4": ((24, 16), partial(nf4, every=True)),
}


class Conditions:
    """Rows of one process."""

    def __init__(self, args):
        self.args, self.device = args, base.device_of(args)
        self.reference = None  # the picture of the bf16 row
        self.ends = time.perf_counter() + args.limit

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
        options = dict(generator=torch.Generator().manual_seed(seed)) | options
        return bench.pipe(specedit=config, mask_image=base.region(side, share), **options)

    def figures(self, name, bench, warm=2, repeat=None, **options):
        """Median seconds after warm-up edits, peak memory, the runner and why no faster one."""
        cuda = self.device.type == "cuda"
        for _ in range(warm):
            self.edit(bench, **options)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeat or self.args.repeat):
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
        low, high = next(bounds for glob, bounds in RIGHT.items() if fnmatch.fnmatchcase(name, glob))
        found["right"] = found["finite"] and low <= found["applied"] <= high
        if cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found

    def plain(self, name, runner):
        return self.figures(name, self.bench(), runner=runner)

    def condition(self, name, change, runner):
        bench = self.bench()
        change(bench.pipe)
        return self.figures(name, bench, runner=runner)

    def offload(self, name, kind, disk=False, **options):
        """Offloading of a whole pipeline. What is moved in each edit is timed once: that takes long."""
        bench = self.bench()
        folder = tempfile.TemporaryDirectory() if disk else None
        if kind == "model":
            bench.pipe.enable_model_cpu_offload(device=self.device)
        elif kind == "sequential":
            bench.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            for part in (bench.pipe.transformer, bench.pipe.vae):
                own = {} if folder is None else {"offload_to_disk_path": f"{folder.name}/{type(part).__name__}"}
                part.enable_group_offload(
                    onload_device=self.device, offload_device=torch.device("cpu"), offload_type=kind, **options, **own
                )  # fmt: skip
        try:
            return self.figures(name, bench, warm=1, repeat=1)
        finally:
            if folder is not None:
                folder.cleanup()

    def card(self, name, gib, change):
        """A recipe of docs/memory.md with no more memory than such a card has: what is asked for beyond fails.

        The driver and libraries have theirs beside the allocator's, which is capped at what they leave.
        """
        if self.device.type != "cuda":
            raise RuntimeError("a capped card needs a CUDA device")
        bench = self.bench()
        change(bench.pipe)
        bench.pipe.enable_model_cpu_offload(device=self.device)
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        beside = total - free - torch.cuda.memory_reserved(self.device)
        torch.cuda.set_per_process_memory_fraction(min((gib * 2**30 - beside) / total, 1.0), self.device)
        try:
            found = self.figures(name, bench, warm=1, repeat=1, kv="fp8")
            return found | {"beside_bytes": beside, "card_bytes": found["reserved_bytes"] + beside}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def batch(self, name):
        """Two pictures and prompts in a call, each beside its own call; and a negative prompt."""
        bench = self.bench()
        images = [bench.options["image"], bench.options["image"].rotate(90)]
        names = ("prompt_embeds", "pooled_prompt_embeds")
        texts = {n: torch.cat([bench.options[n], -bench.options[n]]) for n in names}
        alone = [self.edit(bench, seed=i, image=images[i], **{n: texts[n][i : i + 1] for n in names}).images
                 for i in range(2)]  # fmt: skip

        def both():
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            return self.edit(bench, image=images, generator=generators, **texts).images

        both()
        bench.synchronize()
        started = time.perf_counter()
        pictures = both()
        bench.synchronize()
        seconds = time.perf_counter() - started
        apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(pictures, torch.cat(alone)))
        negative = {f"negative_{n}": texts[n][1:] for n in names}
        guided = self.edit(bench, image=images[0], true_cfg_scale=2.0, **negative).images
        applied = ((guided - alone[0]).norm() / alone[0].norm()).item()
        right = apart <= SAME[1] and applied > CHANGED[0] and bool(pictures.isfinite().all())
        return {"seconds": seconds / 2, "apart": apart, "applied": applied, "right": right}

    def callbacks(self, name):
        """What a callback sees, changes and interrupts."""
        bench, seen = self.bench(), []
        expected = self.edit(bench).images
        steps = self.edit(bench).stats.nfe

        def watched(pipe, index, timestep, tensors):
            seen.append((index, float(timestep), bool(tensors["latents"].isfinite().all())))
            return {}

        def changed(pipe, index, timestep, tensors):
            return {"latents": tensors["latents"] * 0.5 if index == 2 else tensors["latents"]}

        def stopped(pipe, index, timestep, tensors):
            pipe._interrupt = index == 3
            return {}

        bench.synchronize()
        started = time.perf_counter()
        same = self.edit(bench, callback_on_step_end=watched).images
        bench.synchronize()
        seconds = time.perf_counter() - started
        other = self.edit(bench, callback_on_step_end=changed).images
        few = self.edit(bench, callback_on_step_end=stopped).stats.nfe
        applied = ((other - expected).norm() / expected.norm()).item()
        right = torch.equal(same, expected) and [i for i, *_ in seen] == list(range(steps)) and few == 4
        right = right and all(a > b for (_, a, _), (_, b, _) in itertools.pairwise(seen)) and all(x[2] for x in seen)
        return {"seconds": seconds, "applied": applied, "right": right and applied > CHANGED[0]}

    def threads(self, name, count=4):
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
        return {"seconds": together / count, "throughput": alone / together, "wrong": wrong, "right": not wrong}

    def editor(self):
        """The model in --model's folder in the place of a bench's."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        pipe = SpecEditFluxKontextPipeline.from_pretrained(self.args.model, torch_dtype=dtype).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        picture = base.noise_picture(self.args.side)
        options = dict(image=picture, _auto_resize=False, output_type="pt", max_sequence_length=64)
        return SimpleNamespace(pipe=pipe, options=options, synchronize=partial(base.Bench.synchronize, self))

    def day(self, name):
        """`--edits` edits of mixed sizes, masks, prompts and LoRAs, as of a server. Every 50th is made again by another
        pipeline over the same weights, with a runner of its own, whose bits it has to have. Memory is compared between
        edits that are CYCLE apart, whose conditions are the same, after the first 50."""
        bench, cuda = self.editor() if self.args.model else self.bench(), self.device.type == "cuda"
        pipe, sides = bench.pipe, [self.args.side, self.args.side // 2 // 64 * 64 or 64]
        states = [lora_state(pipe.transformer, seed=seed, size=0.3) for seed in range(2)]
        prompts = ("make it red", "remove the tree", "a house in the snow", "turn the sky green", "")
        loaded, memory, stale, seconds, differs = None, [], [], [], []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for i in range(self.args.edits):
            if time.perf_counter() > self.ends:
                break
            wanted = (None, 0, 1)[i // 10 % 3]
            if wanted != loaded:
                if loaded is not None:
                    pipe.unload_lora_weights()
                if wanted is not None:
                    pipe.load_lora_weights(states[wanted], adapter_name=f"style{wanted}")
                loaded = wanted
            options = dict(seed=i, side=sides[i % 2], share=(0.05, 0.1, 0.2)[i % 3])
            if self.args.model:
                options["prompt"] = prompts[i % 5]
            else:
                options["prompt_embeds"] = bench.options["prompt_embeds"] * (1 + i % 5 / 10)
            at = time.perf_counter()
            picture = self.edit(bench, **options).images
            bench.synchronize()
            seconds.append(time.perf_counter() - at)
            if cuda:
                memory.append(torch.cuda.memory_allocated())
            if i % 50 == 49 or i == min(self.args.edits, 50) - 1:
                other = type(pipe).from_pipe(pipe)
                other.set_progress_bar_config(disable=True)
                fresh = SimpleNamespace(pipe=other, options=bench.options)
                if not torch.equal(self.edit(fresh, **options).images, picture):
                    stale.append(i)
                # another seed is another picture: what is compared is no constant
                differs.append(not torch.equal(self.edit(fresh, **options | {"seed": i + 1}).images, picture))
                other._free_runner()
        found = {"seconds": statistics.median(seconds), "edits": len(seconds), "stale": stale,
                 "total_seconds": time.perf_counter() - started,
                 "right": not stale and bool(differs) and all(differs)}  # fmt: skip
        like = [memory[50:][k::CYCLE] for k in range(CYCLE)]
        if any(like):
            grown = max(x[-1] - x[0] for x in like if x)
            found |= {"memory_spread_bytes": max(max(x) - min(x) for x in like if x), "memory_grown_bytes": grown,
                      "peak_bytes": torch.cuda.max_memory_allocated()}  # fmt: skip
            found["right"] = found["right"] and found["memory_spread_bytes"] <= FLAT
        return found

    def rows(self):
        """{name: function that makes its figures}."""
        rows = {f"bf16 {runner}": partial(self.plain, runner=runner) for runner in ("graph", "fused", "eager")}
        rows |= {name: partial(self.condition, change=change, runner="auto") for name, change in CONDITIONS.items()}
        # where graphs cannot be had, by the reason that is given
        change = partial(bnb_int8, threshold=6.0)
        rows["bitsandbytes int8, outliers"] = partial(self.condition, change=change, runner="auto")
        # torch.compile makes one kernel of what a library does to a layer's input
        name = "torchao int8 dynamic"
        rows[f"{name}, compiled"] = partial(self.condition, change=CONDITIONS[name], runner="compile")
        rows["model offload"] = partial(self.offload, kind="model")
        rows["sequential offload"] = partial(self.offload, kind="sequential")
        blocks = dict(kind="block_level", num_blocks_per_group=1)
        rows["group offload, blocks"] = partial(self.offload, **blocks)
        rows["group offload, blocks, stream"] = partial(self.offload, use_stream=True, **blocks)
        rows["group offload, leaves, stream"] = partial(self.offload, kind="leaf_level", use_stream=True)
        rows["group offload, blocks, disk"] = partial(self.offload, disk=True, **blocks)
        for name, (sizes, change) in CARDS.items():
            rows |= {f"{gib} GiB card, {name}": partial(self.card, gib=gib, change=change) for gib in sizes}
        rows |= {"batch of two": self.batch, "callbacks": self.callbacks, "four threads": self.threads, "day": self.day}
        return {name: partial(row, name) for name, row in rows.items()}


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
            lines.append(f"| {name} | failed | | | | | | {row['error'].splitlines()[0][:160]} |")
            continue
        of = f"{row['seconds'] / whole:.2f} x" if whole else "–"
        bar = f"{met[name]['bar']:g} ({'met' if met[name]['met'] else 'missed'})" if name in met else "–"
        peak = f"{(row['peak_bytes'] + row.get('graph_bytes', 0)) / 2**30:.1f}" if "peak_bytes" in row else "–"
        applied = f"{row['applied']:.3f}" if "applied" in row else "–"
        notes = row.get("runner_reason", "")
        # fmt: off
        notes += ", ".join(f"{k} {row[k]}" for k in ("throughput", "wrong", "edits", "stale", "memory_spread_bytes",
                                                     "memory_grown_bytes", "apart", "card_bytes") if k in row)
        # fmt: on
        notes = notes if row.get("right", True) else f"WRONG {notes}"
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
    parser.add_argument("--model", help="folder of the model that the row 'day' has, in place of random weights")
    parser.add_argument("--layers", type=int, help="double blocks, and half the single ones, of the random model")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds until the last row or edit")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.side = args.side or (128 if args.tiny else 1024)
    if args.side % 64 or args.side < 64:
        parser.error(f"--side: expected a multiple of 64, got {args.side}")
    conditions = Conditions(args)
    every = conditions.rows()
    chosen = base.chosen_rows(parser, every, args.rows)
    head = base.setting(args)
    if args.layers:
        base.TRANSFORMER |= dict(num_layers=args.layers, num_single_layers=2 * args.layers)
        head["model"] = f"FLUX.1-Kontext with {args.layers} + {2 * args.layers} blocks, random weights"
    if args.model:
        head["model"] = Path(args.model).name

    def within(row):
        if time.perf_counter() > conditions.ends:
            raise TimeoutError(f"not begun: {args.limit:g} s are over")
        return row()

    # conditions compare with the plain row, which comes first
    base.run_rows({n: partial(within, every[n]) for n in chosen}, head, args.out, "conditions", report,
                  lambda rows: {"bars": bars(rows)})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
