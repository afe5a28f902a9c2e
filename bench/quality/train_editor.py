# SPDX-License-Identifier: Apache-2.0
"""Trains the transformer and the text encoders of a tiny model by flow matching, on RUN_DIR/vae's latents.

    python bench/quality/train_editor.py --seconds 860

Writes RUN_DIR/editor (the whole pipeline, bf16, averaged weights) every two minutes and at the end, and
RUN_DIR/editor.pt, from which the same command goes on; with more --seconds also after the end. Several processes, a GPU
each, train one model (torchrun, or GPUS=2 train.sh): each has its own edits, all draw the same sizes, gradients are
averaged.
"""

import argparse
import math
import time
from itertools import chain
from pathlib import Path

import torch
from export import export
from families import FAMILIES, load_vae
from models import in_real_numbers, parameter_count
from muon import Muon
from runtime import (
    RUN_DIR,
    Clock,
    Ranks,
    autocast,
    compile_blocks,
    device,
    load_checkpoint,
    log,
    memory,
    save_checkpoint,
)
from sampler import shift_mu
from scenes import Renderer
from stream import EditStream

from specedit_kernels import codec_of
from specedit_kernels.sampling.grid import pack

SIZES = (512, 256, 128)
CAPTIONED = (0.20, 0.15, 0.40, 0.15, 0.10)  # of LOCAL_TASKS, where captions tell of both pictures
MAX_TEXT_TOKENS = 32_768  # of a batch: T5's attention keeps a matrix a head
MAX_BATCH = 300


class Replay:
    """A ring of encoded edits of one size on the device: rendering and encoding every sample afresh would take as
    long as the training step itself."""

    def __init__(self, size, capacity, ids_width, dev, dtype):
        side = size // 8
        self.capacity, self.filled, self.at = capacity, 0, 0
        self.source = torch.empty(capacity, 16, side, side, device=dev, dtype=dtype)
        self.target = torch.empty_like(self.source)
        self.weight = torch.empty(capacity, side * side // 4, device=dev, dtype=dtype)
        self.ids = torch.empty(capacity, ids_width, device=dev, dtype=torch.int32)

    def put(self, *fields):
        n = len(fields[0])
        rows = torch.arange(self.at, self.at + n, device=self.source.device) % self.capacity
        for store, field in zip((self.source, self.target, self.weight, self.ids), fields):
            store[rows] = field.to(store.device, store.dtype, non_blocking=True)
        self.at = (self.at + n) % self.capacity
        self.filled = min(self.filled + n, self.capacity)
        return rows

    def get(self, rows):
        return self.source[rows].float(), self.target[rows].float(), self.weight[rows].float(), self.ids[rows].long()


class Feeder:
    """Batches of one size: a share of fresh edits, the rest from the ring.

    A model that does not see its source has two rows of an edit, source and target, each with its own caption."""

    def __init__(self, vae, stream, dev, capacities, fresh, family):
        self.codec, self.stream, self.dev, self.fresh = codec_of(vae), stream, dev, fresh
        self.sees_source, ids_width = family.sees_source, family.ids_width
        self.renderer = Renderer(dev)
        dtype = torch.bfloat16 if dev.type == "cuda" else torch.float32
        self.rings = {size: Replay(size, capacity, ids_width, dev, dtype) for size, capacity in zip(SIZES, capacities)}

    @torch.no_grad()
    def render(self, size, count):
        count = count if self.sees_source else max(count // 2, 1)
        edits, ids = self.stream.take(count)
        rendered = self.renderer(edits, size)
        images = torch.cat([rendered.source, rendered.target]) * 2 - 1
        with autocast(self.dev):
            z = torch.cat(
                [
                    self.codec.encode(part)
                    for part in images.split(max(1, 64 * (256 // size) ** 2 if size <= 256 else 16))
                ]
            )
        if self.sees_source:
            return self.rings[size].put(z[:count], z[count:], rendered.weight.flatten(1), ids)
        ids = torch.cat(ids.chunk(2, dim=1))
        return self.rings[size].put(z, z, torch.ones(len(z), (size // 16) ** 2, device=self.dev), ids)

    def batch(self, size, count):
        ring = self.rings[size]
        while ring.filled < min(2 * count, ring.capacity):
            self.render(size, min(64, count, ring.capacity))
        fresh = self.render(size, min(max(2, round(count * self.fresh)), count, ring.capacity))
        old = torch.randint(ring.filled, (count - len(fresh),), device=self.dev)
        return ring.get(torch.cat([fresh, old]))


def draw_sigma(count, mu, dev):
    """Logit-normal, with some uniform to cover both ends, then the pipeline's timestep shift."""
    normal = torch.randn(count, device=dev).sigmoid()
    uniform = torch.rand(count, device=dev).clamp(1e-4, 1 - 1e-4)
    sigma = torch.where(torch.rand(count, device=dev) < 0.2, uniform, normal)
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


class Editor(torch.nn.Module):
    """Transformer and text encoders as one set of weights."""

    def __init__(self, family):
        super().__init__()
        self.family = family
        self.parts = torch.nn.ModuleDict({name: make() for name, (_, make) in family.parts.items()})
        in_real_numbers(self.parts["transformer"])
        wordless = list(chain(*family.encoder()("")))
        self.register_buffer("wordless", torch.tensor(wordless), persistent=False)

    def loss(self, fields, length, sigma, noise, guidance):
        """Mean over the batch of the weighted squared velocity error, and the same unweighted by weight class."""
        source, target, weight, ids = fields
        if self.family.empty_share:
            empty = torch.rand(len(source), device=source.device) < self.family.empty_share
            target = torch.where(empty.view(-1, 1, 1, 1), source, target)
            weight = torch.where(empty[:, None], 1.0, weight)
            ids = torch.where(empty[:, None], self.wordless, ids)
        z, condition, noise = pack(target), pack(source), pack(noise)
        level = sigma.view(-1, 1, 1)
        noised = (1 - level) * z + level * noise
        text = self.family.text(self.parts, ids, length)
        grid = (source.shape[2] // 2, source.shape[3] // 2)
        velocity = self.family.velocity(self.parts["transformer"], noised, condition, sigma, grid, text, guidance)
        error = (velocity.float() - (noise - z)).square().mean(2)
        loss = (error * weight).sum() / weight.sum()
        with torch.no_grad():
            inside = (weight > 3.5).float()
            apart = torch.stack(
                [
                    (error * inside).sum() / inside.sum().clamp(min=1),
                    (error * (weight < 1.5)).sum() / (weight < 1.5).sum().clamp(min=1),
                ]
            )
        return loss, apart

    def begin_from(self, folder):
        """Takes the weights of an exported editor."""
        pipe = self.family.pipeline.from_pretrained(folder)
        for name, (component, _) in self.family.parts.items():
            self.parts[name].load_state_dict(getattr(pipe, component).state_dict())
        log(f"editor: begins from {folder}")

    def state(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def batch_size(family, size, length, tokens, factor=1.0):
    pictures = (2 if family.sees_source else 1) * (size // 16) ** 2
    count = min(tokens // (pictures + length), MAX_TEXT_TOKENS // length, MAX_BATCH)
    return max(2, int(count * factor))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="flux")
    parser.add_argument("--seconds", type=float, default=860, help="of training over all pieces, compiling included")
    parser.add_argument(
        "--piece", type=float, default=math.inf, help="end after so many of them; go on by the same call"
    )
    parser.add_argument("--tail", type=float, default=45, help="how long the decay takes once a file STOP appears")
    parser.add_argument("--tokens", type=int, default=104_000, help="of a batch, text included")
    parser.add_argument("--fresh", type=float, default=0.12, help="share of each batch that is newly rendered")
    parser.add_argument("--capacity", type=int, nargs=3, default=(12_000, 30_000, 30_000), help="of the rings")
    parser.add_argument("--compile", choices=("dynamic", "static", "none"), default="dynamic")
    parser.add_argument("--early", type=float, default=0.40, help="the share of the time spent on small pictures alone")
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--export-every", type=float, default=120)
    parser.add_argument("--save-every", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=6, help="processes that draw scenes")
    parser.add_argument(
        "--start",
        type=Path,
        help="an exported editor to begin from, in place of random weights; its "
        "autoencoder must be RUN_DIR/vae (train.sh copies it there)",
    )
    parser.add_argument(
        "--try-only",
        action="store_true",
        help="one step of every size on noise, to compile and to see that nothing fails; no files",
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="that --try-only tries")
    args = parser.parse_args()
    dev = device()
    ranks, family = Ranks(), FAMILIES[args.family]
    torch.manual_seed(args.seed)
    editor = Editor(family)
    if args.start is not None and not args.try_only:
        editor.begin_from(args.start)
    editor.to(dev).train()
    if args.compile != "none":
        compile_blocks(editor.parts["transformer"], args.compile == "dynamic")
    static = args.compile == "static"
    lengths, shares_of = (family.static_lengths, family.static_shares) if static else (family.lengths, family.shares)
    scheduler = family.make_scheduler()
    if args.try_only:
        try_steps(editor, lengths, args, dev, scheduler)
        return
    torch.manual_seed(args.seed + ranks.rank)
    generator = torch.Generator().manual_seed(args.seed)  # of the sizes: all ranks draw the same
    vae = load_vae(family, RUN_DIR / "vae").to(dev).eval().requires_grad_(False)
    transformer = editor.parts["transformer"]
    blocks = [p for name, p in transformer.named_parameters() if "transformer_blocks" in name and p.ndim == 2]
    inner = {id(p) for p in blocks}
    others = [p for p in editor.parameters() if id(p) not in inner]
    muon = Muon(blocks, lr=args.muon_lr)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=dev.type == "cuda")
    average = {name: {k: v.clone() for k, v in part.items()} for name, part in editor.state().items()}
    log(
        f"editor: {parameter_count(editor) / 1e6:.2f} M parameters ({sum(p.numel() for p in blocks) / 1e6:.2f} M by "
        f"Muon) on {dev}, rank {ranks.rank} of {ranks.count}, compile {args.compile}"
    )

    checkpoint = RUN_DIR / "editor.pt"
    step, elapsed = 0, 0.0

    def restore():
        state = load_checkpoint(checkpoint)
        for name, part in editor.parts.items():
            part.load_state_dict(state["editor"][name])
            for key, value in average[name].items():
                value.copy_(state["average"][name][key])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        generator.manual_seed(args.seed + state["step"])
        return state["step"], state["elapsed"]

    if checkpoint.exists():
        step, elapsed = restore()
        log(f"editor: resumed at step {step}, {elapsed:.0f} s")
    clock = Clock(args.seconds, elapsed, args.tail, ranks)
    shares = None if family.sees_source else CAPTIONED
    stream = EditStream(args.seed + 1 + step + 100_000 * ranks.rank, 64, args.workers, shares, encoder=family.encoder)
    feeder = Feeder(vae, stream, dev, args.capacity, args.fresh, family)
    live = [p for part in editor.state().values() for p in part.values() if p.is_floating_point()]
    smooth = [p for part in average.values() for p in part.values() if p.is_floating_point()]
    export_vae = load_vae(family, RUN_DIR / "vae")
    factor = dict.fromkeys(SIZES, 1.0)
    sums = {size: torch.zeros(4, device=dev) for size in SIZES}
    logged = exported = saved = elapsed
    since, bad_logs, first = 0, 0, True

    def write(final=False):
        size = export(family, export_vae, average, RUN_DIR / "editor")
        log(f"editor: exported {'at the end' if final else ''} at step {step}, {size / 1e6:.2f} MB")

    until = clock.elapsed + args.piece
    while (not clock.done() and clock.elapsed < until) or step == 0:
        mix = family.mix["early" if clock.fraction < args.early else "late"]
        size = SIZES[torch.multinomial(torch.tensor(mix), 1, generator=generator).item()]
        length = lengths[torch.multinomial(torch.tensor(shares_of[size]), 1, generator=generator).item()]
        if first:  # the same shape as --try-only's first, so that its compiled kernels are found again
            size, length, first = SIZES[-1], lengths[0], False
        count = batch_size(family, size, length, args.tokens, factor[size])
        rate = min(1.0, (step + 1) / 150) * clock.decay(0.55, 0.02)
        for optimizer, base in ((muon, args.muon_lr), (adam, args.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        try:
            fields = feeder.batch(size, count)
            sigma = draw_sigma(count, shift_mu(scheduler, (size // 16) ** 2, editor.family), dev)
            guidance = 1 + 4 * torch.rand(count, device=dev)
            with autocast(dev):
                loss, apart = editor.loss(fields, length, sigma, torch.randn_like(fields[0]), guidance)
            loss.backward()
        except torch.cuda.OutOfMemoryError:
            if ranks.count > 1:  # the others wait for this rank's gradients
                raise
            muon.zero_grad(set_to_none=True)
            adam.zero_grad(set_to_none=True)
            fields = loss = None
            torch.cuda.empty_cache()
            factor[size] /= 2
            log(f"editor: out of memory at {size} px with {count} edits; half as many from here")
            if factor[size] < 0.05:
                raise
            continue
        grads = [p.grad for p in editor.parameters() if p.grad is not None]
        ranks.mean_(grads)
        norm = torch.nn.utils.get_total_norm(grads)
        scale = torch.where(norm.isfinite(), (1.0 / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        torch._foreach_mul_(grads, scale)
        for grad in grads:  # 0 x inf; without waiting for the device to know whether there was one
            torch.nan_to_num_(grad, 0.0, 0.0, 0.0)
        muon.step()
        adam.step()
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        step, since = step + 1, since + 1
        with torch.no_grad():
            torch._foreach_lerp_(smooth, live, 1 - min(args.ema, step / (10 + step)))
            sums[size] += torch.stack([loss.detach(), apart[0], apart[1], torch.ones_like(apart[0])])
        now = clock.elapsed
        if now - logged > 10 or step == 1:
            if ranks.first:
                clock.poll_stop()
            ranks.mean_(list(sums.values()))
            report, broken = [], False
            for name, value in sums.items():
                total, inside, outside, n = value.tolist()
                if n:
                    broken |= not math.isfinite(total)
                    report.append(f"{name}px {total / n:.4f} (in {inside / n:.4f} out {outside / n:.4f}, {n:.0f})")
                value.zero_()
            if ranks.first:
                log(
                    f"editor step {step} {clock.elapsed:.0f}/{args.seconds:.0f} s {' '.join(report)} lr {rate:.3f} "
                    f"{(now - logged) / since * 1e3:.0f} ms/step {memory()}"
                )
            bad_logs = bad_logs + 1 if broken else 0
            if bad_logs >= 2:
                if not checkpoint.exists():
                    raise RuntimeError("the loss is not finite and there is no checkpoint to go back to")
                step, _ = restore()
                bad_logs = 0
                args.muon_lr, args.adam_lr = args.muon_lr * 0.7, args.adam_lr * 0.7
                log(f"editor: the loss is not finite; back to step {step} with smaller rates")
            logged, since = now, 0
            if ranks.first and not broken and now - exported > args.export_every:
                write()
                exported = now
            if ranks.first and not broken and now - saved > args.save_every:
                save_checkpoint(
                    {
                        "editor": editor.state(),
                        "average": average,
                        "muon": muon.state_dict(),
                        "adam": adam.state_dict(),
                        "step": step,
                        "elapsed": clock.elapsed,
                    },
                    checkpoint,
                )
                saved = now
    if not ranks.first:
        return
    write(final=True)
    save_checkpoint(
        {
            "editor": editor.state(),
            "average": average,
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "step": step,
            "elapsed": clock.elapsed,
        },
        checkpoint,
    )


def try_steps(editor, lengths, args, dev, scheduler):
    """Forward and backward of each size with two text lengths, on noise; raises where the loss is not finite."""
    for size in sorted(args.sizes):
        for length in dict.fromkeys((lengths[0], lengths[-1])):
            started = time.perf_counter()
            count = batch_size(editor.family, size, length, args.tokens)
            side = size // 8
            z = torch.randn(count, 16, side, side, device=dev)
            fields = (
                z,
                torch.randn_like(z),
                torch.ones(count, side * side // 4, device=dev),
                editor.wordless.expand(count, -1),
            )
            sigma = draw_sigma(count, shift_mu(scheduler, (size // 16) ** 2, editor.family), dev)
            for _ in range(2):
                editor.zero_grad(set_to_none=True)
                with autocast(dev):
                    loss, _ = editor.loss(fields, length, sigma, torch.randn_like(z), torch.full_like(sigma, 3.5))
                loss.backward()
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss is {loss.item()} at {size} px, length {length}")
            log(
                f"try {size} px, length {length}, batch {count}: {time.perf_counter() - started:.1f} s, "
                f"loss {loss.item():.3f}, {memory()}"
            )


if __name__ == "__main__":
    main()
