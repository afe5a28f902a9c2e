# SPDX-License-Identifier: Apache-2.0
"""A training loop that goes on where it stopped."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm


class Loop:
    """AdamW on a few parameters, to a number of steps or of seconds, whichever is given.

    loss: called with a torch.Generator on the CPU, from which all that is random is to be drawn; returns {"loss": what
    is minimised, further terms for the log}. Files in `folder`: {name}.pt, the checkpoint (parameters, optimiser,
    states of the generator and of the global ones, steps and seconds so far), from which `run` goes on, after its end
    too if given more; {name}.csv, a line every `log_every` steps; TensorBoard's events where that is installed.
    rate: of learning; it rises over `warmup` steps, and falls linearly to a fiftieth over the last half.
    """

    def __init__(
        self, name: str, parameters: Sequence[torch.nn.Parameter], loss: Callable[[torch.Generator], dict[str, Tensor]],
        folder: str | Path, steps: int | None = None, seconds: float | None = None, rate: float = 1e-3,
        warmup: int = 50, seed: int = 0, log_every: int = 20, save_every: float = 60.0, progress: bool = True,
    ):  # fmt: skip
        if (steps is None) == (seconds is None):
            raise ValueError(f"steps: expected steps or seconds, one of them, got {steps} and {seconds}")
        self.name, self.parameters, self.loss = name, list(parameters), loss
        self.folder, self.steps, self.seconds = Path(folder), steps, seconds
        self.rate, self.warmup, self.log_every, self.save_every = rate, warmup, log_every, save_every
        self.progress = progress
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.elapsed = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.folder / f"{name}.pt"
        if self.checkpoint.exists():
            self._load()

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if self.steps is not None:
            return min(self.step / self.steps, 1.0)
        assert self.seconds is not None  # one of the two is given
        return min(self.elapsed / self.seconds, 1.0)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(), "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "step": self.step, "elapsed": self.elapsed,
        }  # fmt: skip
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["cpu"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def run(self) -> None:
        """Train until the budget is spent, then save."""
        begun, saved = time.perf_counter() - self.elapsed, time.perf_counter()
        writer, sums = _board(self.folder / self.name), dict[str, Tensor]()
        bar = tqdm(
            total=100, initial=int(100 * self.fraction), desc=self.name, unit="%", mininterval=2,
            disable=not self.progress,
        )  # fmt: skip
        with open(self.folder / f"{self.name}.csv", "a", newline="", encoding="utf-8") as file, bar:
            log = csv.writer(file)
            while self.fraction < 1:
                factor = min(1.0, (self.step + 1) / self.warmup) * min(1.0, 0.02 + 1.96 * (1 - self.fraction))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * factor
                terms = self.loss(self.generator)
                self.optimizer.zero_grad(set_to_none=True)
                terms["loss"].backward()
                # a batch whose gradient is not finite is left out
                if torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite():
                    self.optimizer.step()
                self.step, self.elapsed = self.step + 1, time.perf_counter() - begun
                for key, value in terms.items():
                    sums[key] = sums[key] + value.detach() if key in sums else value.detach()
                bar.update(int(100 * self.fraction) - bar.n)
                if self.step % self.log_every == 0:
                    means = {key: float(value) / self.log_every for key, value in sums.items()}
                    if not file.tell():
                        log.writerow(["step", "seconds", "rate", *means])
                    row = [self.step, f"{self.elapsed:.1f}", f"{self.rate * factor:.3g}"]
                    log.writerow([*row, *(f"{x:.6g}" for x in means.values())])
                    file.flush()
                    bar.set_postfix(step=self.step, **{k: f"{x:.4f}" for k, x in means.items()})
                    if writer is not None:
                        for key, mean in means.items():
                            writer.add_scalar(key, mean, self.step)
                    sums = {}
                if time.perf_counter() - saved > self.save_every:
                    self.save()
                    saved = time.perf_counter()
        if writer is not None:
            writer.close()
        self.save()


def _board(folder: Path):
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)
