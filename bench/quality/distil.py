# SPDX-License-Identifier: Apache-2.0
"""Distils a tiny editor to a few Euler steps: the FLUX Kontext one as a LoRA that `pipe.load_lora_weights` takes.

    python bench/quality/distil.py --steps 8 --out runs/distil --compile     # a GPU; goes on where it stopped
    python bench/quality/distil.py --model runs/klein/editor --steps 4 --rank 0 --rate 2e-4 --out runs/distil  # whole
    python bench/quality/solver.py --lora runs/distil/8_steps.safetensors --rows plain-8 'lora plain-8' 'lora preset-8'

The student's step from one sigma to the next is to end where the teacher's flow ends from the same state: its answer is
the teacher's mean velocity over that step, from several two-step Adams-Bashforth ones. So there is one right answer for
each state, and steps at the pipeline's own sigmas are all that the student learns. States are those that the student's
own steps lead to, and for some rows the teacher's, so that a run meets no state that training has not met. The sizes
are the editor's: a run's, that of its coarse steps, at their sigmas too, and that of a separate draft.

--rank 0 trains the transformer's own weights, and the folder OUT/N_steps, an editor like --model, comes in place of the
LoRA. Writes OUT/N_steps.safetensors every two minutes and at the end, OUT/N_steps.csv (the log), OUT/N_steps.pt (the
checkpoint) and, at the end, OUT/N_steps.json: how far whole runs end from the teacher's, with the LoRA and without.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from export import export
from families import editor_in
from runtime import autocast, compile_blocks, device, load_checkpoint, log, memory, replace_file
from safetensors.torch import save_file
from sampler import encode_images, encode_text, shift_mu
from scenes import TASKS, Renderer
from stream import EditStream
from table_runs import SHIPPED
from train_cosi import white

from specedit_kernels.flash_edit.cosi import Loop
from specedit_kernels.flash_edit.cosi.losses import answer_loss
from specedit_kernels.flash_edit.cosi.low_rank import add_low_rank, low_rank_state
from specedit_kernels.sampling.grid import pack, unpack
from specedit_kernels.sampling.solver import Solver

MAX_BYTES = 10e6
# What the noise decides more often than the editor met it.
SHARES = dict(replace=0.32, remove=0.11, recolor=0.12, add=0.18, add_open=0.20)
GUIDANCE = 3.5  # the pipeline's default; the editor's training made it indifferent
ODDS = {"early": (0.35, 0.45, 0.20), "late": (0.65, 0.25, 0.10)}  # of the sizes, the run's own first
EARLY = 0.35  # of the training


def shifts_of(scheduler, size, sizes, family, steps):
    """Shifts a of a size's schedules, sigma = a t / (1 + (a - 1) t) of t from 1 to 0 in even steps: the plain one; and
    where pictures of twice the size are trained too, that of their coarse steps, s / (2 - s) of theirs: half their a.
    """
    own, larger = (math.exp(shift_mu(scheduler, (side // 16) ** 2, family, steps)) for side in (size, 2 * size))
    return (own, larger / 2) if 2 * size in sizes else (own,)


def level(shift, step, steps):
    """The sigma at which a step of so many begins, 1 at the first, 0 after the last; step may lie between two."""
    at = 1 - step / steps
    return shift * at / (1 + (shift - 1) * at)


@torch.no_grad()
def mean_velocity(velocity, state, shift, step, steps, parts):
    """The flow's mean velocity over a step, by `parts` evaluations: fp32 like state [B, C, H, W].

    velocity: of (state, sigma [B]). shift, step: fp32 [B], whose step of which schedule it is.
    """

    def sigma(part):
        return level(shift, step + part / parts, steps).view(-1, 1, 1, 1)

    solver, x = Solver("ab2"), state
    for part in range(parts):
        x = solver.step(x, velocity(x, sigma(part).flatten()), sigma(part), sigma(part + 1))
    return (x - state) / (sigma(parts) - sigma(0))


def following(rows, velocity, steps):
    """Rows at the end of their step along a velocity; those at the end of their run are left out."""
    here, there = (level(rows["shift"], rows["step"] + i, steps).view(-1, 1, 1, 1) for i in (0, 1))
    moved = rows | {"state": rows["state"] + (there - here) * velocity, "step": rows["step"] + 1}
    left = moved["step"] < steps
    return {name: x[left] for name, x in moved.items() if name != "aim"}


def joined(parts, count=None):
    return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}


class Ring:
    """Rows of one size, a dict of tensors [n, ...] on the device; pictures and texts are kept in half precision."""

    def __init__(self, capacity, half):
        self.capacity, self.half, self.at, self.filled, self.fields = capacity, half, 0, 0, {}

    def put(self, rows):
        count = len(rows["step"])
        if not self.fields:
            kept = {name: x.to(self.half) if x.ndim > 1 else x for name, x in rows.items()}
            self.capacity = max(self.capacity // count, 1) * count
            self.fields = {name: x.new_empty(self.capacity, *x.shape[1:]) for name, x in kept.items()}
        for name, x in rows.items():
            self.fields[name][self.at : self.at + count] = x
        self.at = (self.at + count) % self.capacity
        self.filled = min(self.filled + count, self.capacity)

    def draw(self, count, generator):
        chosen = torch.randint(self.filled, (count,), generator=generator)
        return {name: x[chosen.to(x.device)].float() for name, x in self.fields.items()}


class Lessons:
    """Rows of one size with the teacher's answers ("aim"), made `count` at once, so that one compiled shape serves."""

    def __init__(self, training, size, count, capacity):
        self.training, self.size, self.count, args = training, size, count, training.args
        self.shifts = shifts_of(training.pipe.scheduler, size, args.sizes, training.family, args.steps)
        self.renderer = Renderer(training.dev)
        self.ring = Ring(capacity, torch.float16 if training.dev.type == "cuda" else torch.float32)
        self.fresh = -(-count // args.steps)  # runs begun at once: as many as end, on average
        self.owed, self.next = 0.0, None

    @torch.no_grad()
    def begin(self, generator):
        """`fresh` edits in noise, at the first step of a schedule of this size."""
        training, count = self.training, self.fresh
        edits, _ = training.stream.take(count)
        rendered = self.renderer(edits, self.size)
        with autocast(training.dev):
            source = encode_images(training.pipe.vae, rendered.source).float()
            embeds, pooled = encode_text(training.pipe, edits.phrases(), training.args.text_length, training.dev)
        shift = torch.tensor(self.shifts)[torch.randint(len(self.shifts), (count,), generator=generator)]
        if pooled is None:  # a family without; a row has tensors alone
            pooled = embeds.new_zeros(count, 0)
        return {
            "source": source,
            "state": white(source.shape, generator, training.dev),
            "weight": rendered.weight.float().flatten(1),
            "embeds": embeds.float(),
            "pooled": pooled.float(),
            "shift": shift.to(training.dev),
            "step": torch.zeros(count, device=training.dev),
        }

    def full(self, rows, generator):
        """`count` rows: some, as far as they go beside `fresh` new ones, and new ones."""
        parts = [] if rows is None else [{name: x[: self.count - self.fresh] for name, x in rows.items()}]
        while sum(len(part["step"]) for part in parts) < self.count:
            parts.append(self.begin(generator))
        return joined(parts, self.count)

    def answer(self, rows):
        return rows | {"aim": self.training.teach(rows)}

    def batch(self, generator):
        """Rows to learn from. `args.fresh` of those handed out are answered anew: the states that the student's last
        batch led to, and new runs. At first, whole runs of the teacher's."""
        steps = self.training.args.steps
        if not self.ring.filled:
            rows = self.full(None, generator)
            for step in range(steps):
                rows = self.answer(rows)
                self.ring.put(rows)
                rows = following(rows, rows["aim"], steps) if step + 1 < steps else None
        self.owed += self.training.args.fresh
        if self.owed >= 1:
            self.ring.put(self.answer(self.full(self.next, generator)))
            self.owed -= 1
        return self.ring.draw(self.count, generator)


class Training:
    def __init__(self, args, dev):
        self.args, self.dev = args, dev
        self.family = editor_in(args.model)
        self.pipe = self.family.pipeline.from_pretrained(args.model).to(dev)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        self.student = copy.deepcopy(self.pipe.transformer)
        if args.rank:
            self.parameters = add_low_rank(self.student, args.rank)
        else:
            self.parameters = list(self.student.requires_grad_(True).parameters())
        if args.compile:
            compile_blocks(self.pipe.transformer)
            compile_blocks(self.student)
        shares = [SHARES.get(task, 0.014) for task in TASKS]
        self.stream = EditStream(args.seed + 78, 64, args.workers, shares=shares)
        self.lessons = {
            size: Lessons(self, size, max(2, args.tokens // (2 * (size // 16) ** 2 + args.text_length)), capacity)
            for size, capacity in zip(args.sizes, args.capacity)
        }
        self.parts = max(1, round(args.teacher_steps / args.steps))
        self.fraction, self.written = 0.0, time.perf_counter()

    def velocity(self, transformer, rows, state, sigma):
        """Of states [B, C, H, W] at sigmas fp32 [B], of the rows' edits."""
        side = state.shape[-1] // 2
        guidance = torch.full((len(state),), GUIDANCE, device=self.dev)
        with autocast(self.dev):
            velocity = self.family.velocity(
                transformer, pack(state), pack(rows["source"]), sigma, (side, side), (rows["embeds"], rows["pooled"]),
                guidance,
            )  # fmt: skip
        return unpack(velocity.float(), (side, side))

    def teach(self, rows):
        """The teacher's mean velocity over each row's step."""
        return mean_velocity(
            lambda state, sigma: self.velocity(self.pipe.transformer, rows, state, sigma),
            rows["state"], rows["shift"], rows["step"], self.args.steps, self.parts,
        )  # fmt: skip

    def size(self, generator):
        odds = ODDS["early" if self.fraction < EARLY else "late"][: len(self.args.sizes)]
        return self.args.sizes[int(torch.multinomial(torch.tensor(odds), 1, generator=generator))]

    def loss(self, generator, size=None):
        """{"loss"}: of a batch of one size. Leaves behind the states that it leads to."""
        lessons = self.lessons[size or self.size(generator)]
        rows, steps = lessons.batch(generator), self.args.steps
        made = self.velocity(self.student, rows, rows["state"], level(rows["shift"], rows["step"], steps)).float()
        side = rows["state"].shape[-1] // 2
        weight = unpack(rows["weight"][..., None].expand(-1, -1, 4), (side, side))
        loss = answer_loss(rows["aim"], made, weight)
        with torch.no_grad():
            own = torch.rand(len(made), generator=generator) < self.args.rollout
            taken = torch.where(own.to(self.dev).view(-1, 1, 1, 1), made, rows["aim"])
            lessons.next = following(rows, taken, steps)
        return {"loss": loss}

    def run(self, path, left=None):
        """Trains, and writes the LoRA. left: seconds that this process has for it, beside those of former pieces."""
        args, seconds = self.args, self.args.seconds
        if left is not None:
            former = load_checkpoint(path.with_suffix(".pt"))["elapsed"] if path.with_suffix(".pt").exists() else 0.0
            seconds = former + max(left, 1.0)
        budget = {"steps": args.train_steps} if args.train_steps else {"seconds": seconds}
        name = f"{args.steps}_steps"

        def loss(generator):
            self.fraction = loop.fraction
            if time.perf_counter() - self.written > 120:
                self.write(path)
            return self.loss(generator)

        loop = Loop(name, self.parameters, loss, args.out, rate=args.rate, seed=args.seed, save_every=60, **budget)
        loop.run()
        log(f"{name}: {loop.step} steps in {loop.elapsed:.0f} s, {memory()}")
        self.write(path)
        return {"training_steps": loop.step, "training_seconds": round(loop.elapsed, 1)}

    def write(self, path):
        self.written = time.perf_counter()
        if not self.args.rank:
            weights = {name: getattr(self.pipe, part).state_dict() for name, (part, _) in self.family.parts.items()}
            weights["transformer"] = self.student.state_dict()
            size = export(self.family, copy.deepcopy(self.pipe.vae), weights, path.with_suffix(""))
            log(f"{path.with_suffix('')}: {size / 1e6:.2f} MB")
            return
        state = peft_state(low_rank_state(self.student), self.args.rank)
        replace_file(path, lambda part: save_file(state, part))
        log(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

    @torch.no_grad()
    def check(self, size):
        """Of whole runs on new edits: how far they end from the teacher's with its `parts` a step (`answer_loss`), in
        the student's steps with the LoRA and without."""
        lessons, steps = self.lessons[size], self.args.steps
        start = lessons.full(None, torch.Generator().manual_seed(1))

        def end(velocity):
            rows = start
            for _ in range(steps):
                here, there = (level(rows["shift"], rows["step"] + i, steps).view(-1, 1, 1, 1) for i in (0, 1))
                moved = rows["state"] + (there - here) * velocity(rows, here.flatten())
                rows = rows | {"state": moved, "step": rows["step"] + 1}
            return rows["state"]

        def of(transformer):
            def velocity(rows, sigma):
                with torch.set_grad_enabled(transformer is self.student):  # as it was compiled
                    return self.velocity(transformer, rows, rows["state"], sigma).detach().float()

            return velocity

        aim, side = end(lambda rows, sigma: self.teach(rows)), size // 16
        weight = unpack(start["weight"][..., None].expand(-1, -1, 4), (side, side))
        found = {"edits": len(aim)}
        for name, transformer in (("with", self.student), ("without", self.pipe.transformer)):
            found[name] = answer_loss(aim, end(of(transformer)), weight).item()
        return found


def peft_state(state, rank):
    """A file's content in PEFT's names, bf16, of {layer}.down and {layer}.up. Each has the full rank, with zeros where
    a layer's smaller side is less: diffusers gives all layers the scale of one rank."""
    found = {}
    for name, x in state.items():
        layer, _, part = name.rpartition(".")
        padded = x.new_zeros((rank, x.shape[1]) if part == "down" else (x.shape[0], rank))
        padded[: x.shape[0], : x.shape[1]] = x
        side = {"down": "lora_A", "up": "lora_B"}[part]
        found[f"transformer.{layer}.{side}.weight"] = padded.to("cpu", torch.bfloat16).contiguous()
    size = sum(x.numel() * x.element_size() for x in found.values())
    if size > MAX_BYTES:
        raise ValueError(f"rank: expected one of a file up to {MAX_BYTES / 1e6:g} MB, got {rank}: {size / 1e6:.1f} MB")
    return found


def try_sizes(training, sizes):
    """A training step of each size, which compiles it; the rings keep the answers."""
    for size in sizes:
        begun, generator = time.perf_counter(), torch.Generator().manual_seed(training.args.seed + 1)
        loss = training.loss(generator, size)["loss"]
        loss.backward()
        for parameter in training.parameters:
            parameter.grad = None
        count = training.lessons[size].count
        log(f"try {size} px, batch {count}: {time.perf_counter() - begun:.1f} s, loss {loss.item():.4f}, {memory()}")


CLOSING = 25.0  # seconds that --wall leaves for the checks


def main(argv=None):
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the editor")
    parser.add_argument("--out", type=Path, default=Path("runs/distil"))
    parser.add_argument("--steps", type=int, default=8, help="of the student's runs")
    parser.add_argument("--seconds", type=float, default=460, help="of training over all pieces, without compiling")
    parser.add_argument("--train-steps", type=int, help="in place of --seconds")
    parser.add_argument("--wall", type=float, help="in place of --seconds: of this process, compiling and checks too")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA; 0: all weights of the transformer")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--teacher-steps", type=int, default=32, help="evaluations of the teacher's in a whole run")
    parser.add_argument("--rollout", type=float, default=0.75, help="share of rows that go on along the student's step")
    parser.add_argument("--fresh", type=float, default=0.35, help="share of a batch that is newly answered")
    parser.add_argument("--tokens", type=int, default=48_000, help="of a batch, text included")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 256, 128], help="pixels; multiples of 64")
    parser.add_argument("--capacity", type=int, nargs="+", default=[3_000, 8_000, 8_000], help="of each size's ring")
    parser.add_argument("--text-length", type=int, default=64, help="length that prompts are padded to")
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--compile", action="store_true", help="the teacher's and the student's blocks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1 or len(args.sizes) > 3 or len(args.capacity) < len(args.sizes):
        parser.error("expected --steps >= 1, at most three --sizes, and a --capacity for each")
    dev = device()
    torch.manual_seed(args.seed)
    training = Training(args, dev)
    count = sum(p.numel() for p in training.parameters)
    log(f"{args.steps} steps of {training.parts} evaluations: rank {args.rank}, {count / 1e6:.2f} M on {dev}")
    path = args.out / f"{args.steps}_steps.safetensors"
    try_sizes(training, args.sizes)
    left = None if args.wall is None else args.wall - CLOSING - (time.perf_counter() - begun)
    found = training.run(path, left)
    found["distances"] = {size: training.check(size) for size in args.sizes}
    found |= {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    replace_file(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    log(f"from the teacher's ends, with the LoRA and without: {found['distances']}")


if __name__ == "__main__":
    main()
