# SPDX-License-Identifier: Apache-2.0
"""Trains FlashEdit's one-step generator and inversion network for the tiny editor, as low-rank changes of it.

    python bench/quality/train_cosi.py --out runs/cosi --seconds 300

First the generator is distilled from the editor's own multi-step answers, then the inversion network is trained in its
two stages. Writes OUT/generator.safetensors and OUT/inverter.safetensors, what `load_cosi` takes, as soon as each
exists, a CSV log of each part, and checkpoints; the same command goes on from these, with more --seconds also after
the end.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from torch.nn.utils import parametrize

from runtime import autocast, device, log
from sampler import encode_images, encode_text, euler
from scenes import Renderer
from specedit_kernels.cosi import CosiWeights, Loop, distil_loss, inversion_loss
from specedit_kernels.pipelines.flash_edit import GENERATOR, INVERTER
from specedit_kernels.pipelines.flux_model import FluxKontextModel, FluxText
from specedit_kernels.pipelines.low_rank import add_low_rank, low_rank_state, save_low_rank
from specedit_kernels.sampling.grid import unpack
from stream import EditStream
from table_runs import SHIPPED

SHARES = {"generator": 0.55, "inverter_1": 0.30, "inverter_2": 0.15}  # of the seconds
MAX_BYTES = 15e6


def white(shape, generator, dev):
    """White noise on the device, by a seed from a CPU generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(dev).manual_seed(seed), device=dev)


class Answers:
    """A ring of edits of one size with the editor's own multi-step answers: (source, noise, answer, weight, text)."""

    def __init__(self, pipe, stream, size, args, dev):
        self.pipe, self.stream, self.size, self.args, self.dev = pipe, stream, size, args, dev
        self.renderer, self.fields, self.at = Renderer(dev), None, 0

    @torch.no_grad()
    def make(self, count, generator):
        edits, _ = self.stream.take(count)
        rendered = self.renderer(edits, self.size)
        with autocast(self.dev):
            source = encode_images(self.pipe.vae, rendered.source).float()
            states, pooled = encode_text(self.pipe, edits.phrases(), self.args.text_length, self.dev)
            noise = white(source.shape, generator, self.dev)
            answer = euler(self.pipe, source, states, pooled, self.args.teacher_steps, noise).float()
        weight = unpack(rendered.weight.flatten(1)[..., None].expand(-1, -1, 4), rendered.weight.shape[1:])
        fresh = (source, noise, answer, weight, states.float(), pooled.float())
        if self.fields is None:
            self.fields = [x.new_empty(self.args.capacity, *x.shape[1:]) for x in fresh]
            self.filled = 0
        rows = torch.arange(self.at, self.at + count, device=self.dev) % self.args.capacity
        for store, x in zip(self.fields, fresh):
            store[rows] = x
        self.at += count
        self.filled = min(self.at, self.args.capacity)

    def batch(self, count, share, generator):
        """`count` rows; before, a share of so many is made anew, and four batches at first."""
        wanted = count * 4 if self.fields is None else max(1, round(count * share))
        for part in torch.arange(wanted).split(max(count, 1)):
            self.make(len(part), generator)
        rows = torch.randint(self.filled, (count,), generator=generator).to(self.dev)
        return [x[rows] for x in self.fields]


class Training:
    def __init__(self, args, dev):
        self.args, self.dev = args, dev
        self.pipe = FluxKontextPipeline.from_pretrained(args.model).to(dev)
        for part in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False)
        stream = EditStream(args.seed + 77, 64, args.workers)
        self.answers = {size: Answers(self.pipe, stream, size, args, dev) for size in args.sizes}
        self.empty = encode_text(self.pipe, [""], args.text_length, dev)

    def adapter(self, transformer, count):
        return FluxKontextModel(transformer, self.pipe.vae, torch.full((count,), 3.5, device=self.dev), {})

    def text(self, states, pooled):
        return FluxText(states, pooled, torch.zeros(states.shape[1], 3, device=self.dev))

    def source_text(self, count):
        return self.text(*(x.float().expand(count, *x.shape[1:]) for x in self.empty))

    def batch(self, generator, share, factor):
        size = self.args.sizes[int(torch.randint(len(self.args.sizes), (), generator=generator))]
        count = max(2, int(factor * self.args.tokens / (2 * (size // 16) ** 2 + self.args.text_length)))
        return self.answers[size].batch(count, share, generator)

    def distil(self, transformer, generator):
        """The editor's own answers, and for one row in four the source under the source branch's text."""
        source, noise, answer, weight, states, pooled = self.batch(generator, self.args.fresh, 1.0)
        count = len(source)
        keep = (torch.rand(count, generator=generator) < 0.25).to(self.dev)
        text = self.source_text(count)
        chosen = self.text(torch.where(keep[:, None, None], text.embeds, states),
                           torch.where(keep[:, None], text.pooled, pooled))
        aside = keep[:, None, None, None]
        with autocast(self.dev):
            loss = distil_loss(self.adapter(transformer, count), chosen, noise, torch.where(aside, source, answer),
                               [source], torch.where(aside, 1.0, weight))
        return {"loss": loss}

    def invert(self, generating, inverting, stage, generator):
        source, noise, _, _, states, pooled = self.batch(generator, self.args.fresh / 8, 0.4)
        count = len(source)
        fresh = white((2 * count, *source.shape[1:]), generator, self.dev)
        teacher = None
        if stage == 2:
            level = torch.rand((), generator=generator).to(self.dev) * 0.98 + 0.01
            teacher = (self.adapter(self.pipe.transformer, count), level)
        with autocast(self.dev):
            return inversion_loss(self.adapter(generating, count), self.adapter(inverting, count),
                                  self.source_text(count), (self.text(states, pooled), noise, source), source, fresh,
                                  CosiWeights(), teacher)

    def run(self, name, parameters, loss):
        args = self.args
        budget = {"steps": args.steps} if args.steps else {"seconds": args.seconds * SHARES[name]}
        loop = Loop(name, parameters, loss, args.out, rate=args.rate, seed=args.seed, save_every=30, **budget)
        loop.run()
        log(f"{name}: {loop.step} steps in {loop.elapsed:.0f} s")


def write(module, path):
    save_low_rank(low_rank_state(module), path)
    log(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the editor")
    parser.add_argument("--out", type=Path, default=Path("runs/cosi"))
    parser.add_argument("--seconds", type=float, default=300, help="of training in all, over all pieces")
    parser.add_argument("--steps", type=int, help="of each of the three parts, in place of --seconds")
    parser.add_argument("--rank", type=int, default=48, help="of the generator's change")
    parser.add_argument("--inverter-rank", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=64_000, help="of a batch, text included")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256], help="pixels; multiples of 64")
    parser.add_argument("--text-length", type=int, default=64, help="length that prompts are padded to")
    parser.add_argument("--teacher-steps", type=int, default=8, help="Euler steps of the editor's answers")
    parser.add_argument("--fresh", type=float, default=0.25, help="share of a batch that is newly answered")
    parser.add_argument("--capacity", type=int, default=6000, help="of the ring of answers of each size")
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    dev = device()
    torch.manual_seed(args.seed)
    training = Training(args, dev)
    generating = copy.deepcopy(training.pipe.transformer)
    parameters = add_low_rank(generating, args.rank)
    log(f"generator: rank {args.rank}, {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters on {dev}")
    training.run("generator", parameters, lambda g: training.distil(generating, g))
    write(generating, args.out / GENERATOR)
    generating.requires_grad_(False)
    for layer in list(generating.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")

    inverting = copy.deepcopy(training.pipe.transformer)
    parameters = add_low_rank(inverting, args.inverter_rank)
    for stage in (1, 2):
        training.run(f"inverter_{stage}", parameters, partial(training.invert, generating, inverting, stage))
        write(inverting, args.out / INVERTER)
    total = sum((args.out / name).stat().st_size for name in (GENERATOR, INVERTER))
    if total > MAX_BYTES:
        raise SystemExit(f"{args.out}: {total / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}; take smaller ranks")


if __name__ == "__main__":
    main()
