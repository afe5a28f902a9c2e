# SPDX-License-Identifier: Apache-2.0
"""Trains FlashEdit's one-step generator and inversion network for a tiny model, as low-rank changes of it.

    python bench/quality/train_cosi.py --out runs/cosi --compile

Four parts, each with its own seconds: the generator is distilled from the editor's own multi-step answers, and then
sharpened by distribution matching; the inversion network is trained in its two stages. Writes OUT/generator.safetensors
and OUT/inverter.safetensors, what `load_cosi` takes, as soon as each exists, OUT/distilled/generator.safetensors before
the sharpening, a CSV log of each part, and checkpoints; the same command goes on from these, with more --seconds also
after the end.

--model: the tiny editor, or a base that does not see its source (train_editor.py --family text-flux). That one's
answers are guided away from the empty caption by --guidance, and its source branch has the source's caption.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import torch
from families import Flux, family_in
from runtime import autocast, compile_blocks, device, log, memory
from sampler import encode_images, encode_text, euler, shift_mu
from scenes import TASKS, Renderer
from stream import EditStream
from table_runs import SHIPPED
from train_editor import CAPTIONED

from specedit_kernels.flash_edit import GENERATOR, INVERTER
from specedit_kernels.flash_edit.cosi import CosiWeights, Loop, distil_loss, inversion_loss, matching_loss
from specedit_kernels.flash_edit.cosi.low_rank import add_low_rank, low_rank_state, merged_copy, save_low_rank
from specedit_kernels.models.flux_kontext import FluxKontextModel, FluxText
from specedit_kernels.sampling.grid import unpack

PARTS = ("generator", "matching", "inverter_1", "inverter_2")
MAX_BYTES = 15e6
# The hard edits more often than the editor met them.
SHARES = dict(replace=0.40, remove=0.12, recolor=0.14, add=0.18, add_open=0.09)
EMPTY = 0.12  # rows of the generator's batch that have the source branch's text, and the source as the answer
ALONE = 40  # steps of the matching part in which the second model learns alone


def white(shape, generator, dev):
    """White noise on the device, by a seed from a CPU generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(dev).manual_seed(seed), device=dev)


def rows_of(text, count):
    """A text of one row, or of `count`, as `count` rows in fp32."""
    return tuple(x.float().expand(count, *x.shape[1:]) for x in text)


class Guided(FluxKontextModel):
    """A model whose every velocity is guided away from a text. away: (text, scale)."""

    away = None

    def velocity(self, text, tokens, conditioning, layout):
        return self.guide(
            super().velocity(text, tokens, conditioning, layout),
            super().velocity(self.away[0], tokens, conditioning, layout),
            self.away[1],
        )


class Answers:
    """A ring of edits of one size with the editor's own multi-step answers: (source, noise, answer, weight of each
    token, text, the source's text). Answers are made `count` at once: one shape, so that a compiled editor serves all.

    empty: the empty text. sees_source: else the texts are captions, and answers are those of the source's or the
    target's caption, one as often as the other."""

    def __init__(self, pipe, stream, size, count, capacity, args, dev, empty, sees_source):
        self.pipe, self.stream, self.size, self.count, self.args, self.dev = pipe, stream, size, count, args, dev
        self.empty, self.sees_source = empty, sees_source
        self.capacity = max(capacity, count) // count * count
        self.renderer, self.fields, self.at, self.filled, self.owed = Renderer(dev), None, 0, 0, 0.0

    @torch.no_grad()
    def make(self, generator):
        edits, _ = self.stream.take(self.count)
        rendered = self.renderer(edits, self.size)
        with autocast(self.dev):
            source = encode_images(self.pipe.vae, rendered.source).float()
            noise = white(source.shape, generator, self.dev)
            if self.sees_source:
                texts, away, weight = edits.phrases(), None, rendered.weight.float()
                of_source = self.empty
            else:
                pairs = edits.captions()
                texts = [pair[i % 2] for i, pair in enumerate(pairs)]
                of_source = encode_text(self.pipe, [pair[0] for pair in pairs], self.args.text_length, self.dev)
                away, weight = (rows_of(self.empty, self.count), self.args.guidance), torch.ones_like(rendered.weight)
            states, pooled = encode_text(self.pipe, texts, self.args.text_length, self.dev)
            answer = euler(self.pipe, source, states, pooled, self.args.teacher_steps, noise, away=away).float()
        fresh = (source, noise, answer, weight, states.float(), pooled.float(), *rows_of(of_source, self.count))
        if self.fields is None:
            self.fields = [x.new_empty(self.capacity, *x.shape[1:]) for x in fresh]
        for store, x in zip(self.fields, fresh):
            store[self.at : self.at + self.count] = x
        self.at = (self.at + self.count) % self.capacity
        self.filled = min(self.filled + self.count, self.capacity)

    def batch(self, count, share, generator):
        """`count` rows; so large a share of the rows that are handed out is made anew, and two batches at first."""
        self.owed += share * count / self.count
        while self.owed >= 1 or self.filled < min(2 * self.count, self.capacity):
            self.make(generator)
            self.owed = max(self.owed - 1, 0.0)
        rows = torch.randint(self.filled, (count,), generator=generator).to(self.dev)
        source, noise, answer, weight, *texts = (x[rows] for x in self.fields)
        weight = unpack(weight.flatten(1)[..., None].expand(-1, -1, 4), weight.shape[1:])
        return source, noise, answer, weight, (texts[0], texts[1]), (texts[2], texts[3])


class Training:
    def __init__(self, args, dev):
        self.args, self.dev = args, dev
        family = family_in(args.model)
        if not issubclass(family, Flux):
            raise ValueError(f"--model: expected one of FLUX.1's classes, got {args.model}")
        self.pipe, self.sees_source = family.pipeline.from_pretrained(args.model).to(dev), family.sees_source
        for part in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False)
        self.editor = copy.deepcopy(self.pipe.transformer)  # never compiled
        self.compile(self.pipe.transformer)
        shares = [SHARES.get(task, 0.014) for task in TASKS] if self.sees_source else CAPTIONED
        stream = EditStream(args.seed + 77, 64, args.workers, shares=shares)
        pictures = 2 if self.sees_source else 1
        self.counts = {
            size: max(2, args.tokens // (pictures * (size // 16) ** 2 + args.text_length)) for size in args.sizes
        }
        self.empty = encode_text(self.pipe, [""], args.text_length, dev)
        self.answers = {
            size: Answers(self.pipe, stream, size, self.counts[size], capacity, args, dev, self.empty, self.sees_source)
            for size, capacity in zip(args.sizes, args.capacity)
        }
        self.fraction = lambda: 1.0

    def compile(self, transformer):
        if self.args.compile:
            compile_blocks(transformer)

    def adapter(self, transformer, count, kind=FluxKontextModel):
        return kind(transformer, self.pipe.vae, torch.full((count,), 3.5, device=self.dev), {})

    def text(self, states, pooled):
        return FluxText(states, pooled, torch.zeros(states.shape[1], 3, device=self.dev))

    def teacher(self, count):
        """The model whose likelihood the generator is held to: it answers as `Answers` has it."""
        if self.sees_source:
            return self.adapter(self.pipe.transformer, count)
        made = self.adapter(self.pipe.transformer, count, Guided)
        made.away = self.text(*rows_of(self.empty, count)), self.args.guidance
        return made

    def seen(self, source):
        """The references of a call."""
        return [source] if self.sees_source else []

    def batch(self, generator, fresh, factor=1.0, size=None):
        """Rows of a size: of the first one, which is the editor's own, more often once the part has settled."""
        if size is None:
            first = 0.35 if self.fraction() < 0.35 else 0.75
            others = (1 - first) / max(len(self.args.sizes) - 1, 1)
            odds = [first] + [others] * (len(self.args.sizes) - 1)
            size = self.args.sizes[int(torch.multinomial(torch.tensor(odds), 1, generator=generator))]
        return self.answers[size].batch(max(2, int(factor * self.counts[size])), fresh, generator)

    def distil(self, transformer, generator, fresh, size=None):
        """(loss, what `sharpen` needs): the editor's own answers, and for some rows the source under the empty text,
        where the model sees it."""
        source, noise, answer, weight, (states, pooled), of_source = self.batch(generator, fresh, size=size)
        count = len(source)
        keep = (torch.rand(count, generator=generator) < (EMPTY if self.sees_source else 0)).to(self.dev)
        text = self.text(*of_source)
        chosen = self.text(
            torch.where(keep[:, None, None], text.embeds, states), torch.where(keep[:, None], text.pooled, pooled)
        )
        aside = keep[:, None, None, None]
        weight = torch.where(aside, 1.0, weight)
        with autocast(self.dev):
            loss, made = distil_loss(
                self.adapter(transformer, count),
                chosen,
                noise,
                torch.where(aside, source, answer),
                self.seen(source),
                weight,
            )
        # the editor has never met the empty text: those rows take no part in the matching
        return loss, (chosen, made.float(), source, torch.where(aside, 1e-6, weight))

    def sigmas(self, count, size, generator):
        """Sigmas, uniform in time by the editor's own shift, fp32 [count]."""
        time_ = torch.rand(count, generator=generator) * 0.96 + 0.02
        shift = torch.tensor(shift_mu(self.pipe.scheduler, (size // 16) ** 2)).exp()
        return (shift * time_ / (1 + (shift - 1) * time_)).to(self.dev)

    def sharpen(self, transformer, second, generator, size=None):
        """One step of the second model on the generator's pictures, and the generator's loss against it."""
        loss, (text, made, source, weight) = self.distil(transformer, generator, self.args.fresh / 5, size)
        count = len(made)
        models = [self.teacher(count), self.adapter(second.module, count)]
        with autocast(self.dev):
            matching, second_loss = matching_loss(
                *models,
                text,
                made,
                self.seen(source),
                white(made.shape, generator, self.dev),
                self.sigmas(count, made.shape[-1] * 8, generator),
                weight,
            )
        second.learn(second_loss)
        total = self.args.anchor * loss + (matching if second.steps > ALONE else 0)
        return {"loss": total, "distil": loss, "second": second_loss, "matching": matching}

    def invert(self, generating, inverting, stage, generator):
        source, noise, _, _, text, of_source = self.batch(generator, 0.0 if self.sees_source else 0.02, 0.4)
        count = len(source)
        fresh = white((2 * count, *source.shape[1:]), generator, self.dev)
        teacher = None
        if stage == 2:
            sigma = torch.rand((), generator=generator).to(self.dev) * 0.98 + 0.01
            teacher = (self.adapter(self.editor, count), sigma)
        with autocast(self.dev):
            return inversion_loss(
                self.adapter(generating, count),
                self.adapter(inverting, count),
                self.text(*of_source),
                (self.text(*text), noise, source) if self.sees_source else (self.text(*of_source), noise, None),
                source,
                fresh,
                CosiWeights(noise=self.args.noise_weight),
                teacher,
            )

    def run(self, name, parameters, loss, rate):
        args = self.args
        budget = {"steps": args.steps} if args.steps else {"seconds": args.seconds[PARTS.index(name)]}
        loop = Loop(name, parameters, loss, args.out, rate=rate, seed=args.seed, save_every=60, **budget)
        self.fraction = lambda: loop.fraction
        loop.run()
        log(f"{name}: {loop.step} steps in {loop.elapsed:.0f} s, {memory()}")


class Second:
    """The model of the generator's own pictures that distribution matching holds against the editor."""

    def __init__(self, training, rank, rate):
        self.module = copy.deepcopy(training.editor)
        self.parameters = add_low_rank(self.module, rank)
        training.compile(self.module)
        self.optimizer, self.steps = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.5, 0.99)), 0

    def learn(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite():
            self.optimizer.step()
        self.steps += 1


def write(module, path):
    path.parent.mkdir(exist_ok=True)
    save_low_rank(low_rank_state(module), path)
    log(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def try_sizes(training, generating, second, sizes):
    """Each call of the first two parts once, at each size: compiles them, into Inductor's cache too."""
    for size in sizes:
        begun, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        training.sharpen(generating, second, generator, size)["loss"].backward()
        generating.zero_grad(set_to_none=True)
        log(f"try {size} px, batch {training.counts[size]}: {time.perf_counter() - begun:.1f} s, {memory()}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the editor")
    parser.add_argument("--out", type=Path, default=Path("runs/cosi"))
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=4,
        default=(200, 100, 50, 20),
        metavar="S",
        help=f"of training of each part: {', '.join(PARTS)}; over all pieces",
    )
    parser.add_argument("--steps", type=int, help="of each part, in place of --seconds")
    parser.add_argument("--rank", type=int, default=80, help="of the generator's change")
    parser.add_argument("--inverter-rank", type=int, default=20)
    parser.add_argument("--noise-weight", type=float, default=CosiWeights.noise, help="in the inverter's loss")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--sharpen-rate", type=float, default=3e-4, help="the generator's, in the matching part")
    parser.add_argument("--anchor", type=float, default=0.5, help="weight of the answers in the matching part")
    parser.add_argument("--tokens", type=int, default=48_000, help="of a batch, text included")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256], help="pixels; multiples of 64")
    parser.add_argument("--text-length", type=int, default=64, help="length that prompts are padded to")
    parser.add_argument("--guidance", type=float, default=2.5, help="of the answers of a base, from the empty caption")
    parser.add_argument("--teacher-steps", type=int, default=8, help="Euler steps of the editor's answers")
    parser.add_argument("--fresh", type=float, default=0.25, help="share of a batch that is newly answered")
    parser.add_argument("--capacity", type=int, nargs="+", default=[12_000, 24_000], help="of each size's ring")
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--compile", action="store_true", help="the editor's and the generator's blocks")
    parser.add_argument("--try-only", type=int, nargs="*", metavar="SIZE", help="compile for these sizes; no files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    dev = device()
    torch.manual_seed(args.seed)
    training = Training(args, dev)
    generating = copy.deepcopy(training.editor)
    parameters = add_low_rank(generating, args.rank)
    training.compile(generating)
    second = Second(training, args.rank, args.rate)
    log(f"generator: rank {args.rank}, {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters on {dev}")
    if args.try_only is not None:
        try_sizes(training, generating, second, args.try_only or args.sizes)
        return
    if args.compile:
        try_sizes(training, generating, second, args.sizes)
        second = Second(training, args.rank, args.rate)

    def distil(generator):
        return {"loss": training.distil(generating, generator, args.fresh)[0]}

    training.run("generator", parameters, distil, args.rate)
    write(generating, args.out / "distilled" / GENERATOR)
    training.run("matching", parameters, partial(training.sharpen, generating, second), args.sharpen_rate)
    write(generating, args.out / GENERATOR)
    generator = merged_copy(training.editor, args.out / GENERATOR).requires_grad_(False)
    inverting = copy.deepcopy(training.editor)
    parameters = add_low_rank(inverting, args.inverter_rank)
    for stage in (1, 2):
        training.run(f"inverter_{stage}", parameters, partial(training.invert, generator, inverting, stage), args.rate)
        write(inverting, args.out / INVERTER)
    total = sum((args.out / name).stat().st_size for name in (GENERATOR, INVERTER))
    if args.model == SHIPPED and total > MAX_BYTES:
        raise SystemExit(f"{args.out}: {total / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}; take smaller ranks")


if __name__ == "__main__":
    main()
