# SPDX-License-Identifier: Apache-2.0
"""What a SpecEdit run gives back: images, mask, scores and figures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..images.align import Drift
from .config import EditConfig


@dataclass(frozen=True)
class StepRecord:
    """One model step. `tokens`: image tokens (target and condition) of each sample, `keys`: those they attend to.

    sigma: where it begins. `flops`: useful ones, batch sum. passes: of the guidance branches, at most so many.
    lock_text: the text was attended to, not computed.
    """

    stage: str
    sigma: float
    tokens: tuple[int, ...]
    keys: tuple[int, ...]
    flops: int
    passes: int = 2
    lock_text: bool = False

    @property
    def level(self) -> float:
        """The former name of `sigma`."""
        return self.sigma


@dataclass(frozen=True)
class NativeDetail:
    """What detail="native" did for one picture.

    windows: (height, width) of each pass. scale: pixels of the picture for one of the working size, a side. of_native:
    pixels of a pass for one of the picture, a side; under 1 where a picture is so large that the passes leave its
    finest detail out. sigma: of the noise that they began from. steps: of each pass. reason: why there was none, or no
    whole one, "" where there is nothing to say.
    """

    windows: tuple[tuple[int, int], ...] = ()
    scale: float = 1.0
    of_native: float = 1.0
    sigma: float = 0.0
    steps: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if not self.windows:
            return f"none: {self.reason}"
        sizes = ", ".join(dict.fromkeys(f"{w} x {h}" for h, w in self.windows))
        part = "" if self.of_native > 0.99 else f", {100 * self.of_native:.0f} % of its own resolution"
        said = f"; {self.reason}" if self.reason else ""
        return f"{len(self.windows)} of {sizes}, {self.steps} steps from sigma {self.sigma:g}{part}{said}"


@dataclass
class SpecEditStats:
    """Figures of one run. `flops` and `plain_flops` are sums: of this run, draft included, and of as many plain steps.

    Attributes:
        config: of the run, with the quality's values where none were given, those under guidance included.
        steps: each step of the model in order (StepRecord).
        nfe: steps of the main trajectory; a step with true guidance counts once.
        draft_nfe: steps of a separate draft.
        plain_step_flops: useful transformer FLOPs of one plain step at full resolution. The VAE and the text encoders
            are in no figure.
        plain_tokens: image tokens of a plain step, of one sample.
        active: share of the fine tokens that are recomputed in mixed steps, of each sample.
        edited: share of the fine tokens in the edit region, of each sample.
        fallbacks: of each sample: None, "dense" (an edit of nearly everything: all tokens are computed) or "source"
            (nothing changes: the source is returned). `fallback` is the one that all share, or "mixed".
        threshold: of the scores, before it is scaled to a picture (SpecEditConfig.relative).
        drift: with output_size="source", of each picture: how the run lay on its source outside the edit, which was
            undone; None where nothing was to be compared (nothing edited, or all, or a method that leaves the rest
            alone).
        native: with detail="native", of each picture: what its second pass did; None where nothing is edited.
        key_tokens: bool [B, T], text tokens that the background does not see (FlashEdit), or None.
        inverted: whether the noise came from an inversion network.
        source_error: fp32 [B], mean squared error of the source branch's prediction of the source's latents
            (BG-Shield), or None.
        seconds: wall-clock time of each stage.
        backend: of the attention op in mixed steps, None where there were none.
        runner: what ran the transformer's steps.
        runner_reason: why no faster one did, "" where there is none.
        captures: CUDA graphs that this run had to capture.
        graph_bytes: device memory of all graphs that the pipeline keeps.
        kv_cache_bytes: of the keys and values that mixed or coarse steps kept, the larger of the two.
        precision: of the linear layers of the transformer's blocks, "auto" or "fp8".
        fp8_bytes: memory of the weights' copies in fp8, and of scales for each output where a weight of a checkpoint,
            which serves as it lies, has one for all.
        merged_bytes: memory of the weights' copies with the changes of one-step networks in them (FlashEdit).
    """

    config: EditConfig | None = None
    steps: list[StepRecord] = field(default_factory=list)
    nfe: int = 0
    draft_nfe: int = 0
    plain_step_flops: int = 0
    plain_tokens: int = 0
    active: list[float] = field(default_factory=list)
    edited: list[float] = field(default_factory=list)
    fallbacks: list[str | None] = field(default_factory=list)
    threshold: float | None = None
    drift: list[Drift | None] = field(default_factory=list)
    native: list[NativeDetail | None] = field(default_factory=list)
    key_tokens: Tensor | None = None
    inverted: bool = False
    source_error: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    backend: str | None = None
    runner: str = "eager"
    runner_reason: str = ""
    captures: int = 0
    graph_bytes: int = 0
    kv_cache_bytes: int = 0
    precision: str = "auto"
    fp8_bytes: int = 0
    merged_bytes: int = 0

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def plain_flops(self) -> int:
        return self.plain_step_flops * self.nfe

    @property
    def fallback(self) -> str | None:
        kinds = set(self.fallbacks)
        return kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else None)

    def tokens_per_step(self) -> list[tuple[str, float]]:
        """(stage, mean image tokens of a sample) for each step in order."""
        return [(step.stage, sum(step.tokens) / len(step.tokens)) for step in self.steps]


def group_steps(stats: SpecEditStats) -> list[tuple[str, float, int]]:
    """(stage, mean image tokens, count) of each run of alike steps, in order; detail="native", whose windows
    differ, is one run."""
    groups: list[tuple[str, float, int]] = []
    for stage, tokens in stats.tokens_per_step():
        last, mean, count = groups[-1] if groups else ("", 0.0, 0)
        if (last, mean) == (stage, tokens) or last == stage == "native":
            groups[-1] = (stage, mean + (tokens - mean) / (count + 1), count + 1)
        else:
            groups.append((stage, tokens, 1))
    return groups


@dataclass
class SpecEditPipelineOutput(BaseOutput):
    """Output of a SpecEdit pipeline.

    images: as the diffusers pipeline gives them for the `output_type`; with output_size="source" a list, each picture
        as its source was given.
    mask: bool [B, rows, columns], the edit region on the fine token grid (16 pixels a side).
    scores: fp32 [B, rows, columns], the discrepancy on the same grid; None where a mask was given.
    stats: SpecEditStats.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    mask: Tensor | None = None
    scores: Tensor | None = None
    stats: Any = None


class StageClock:
    """Wall-clock time between marks. On CUDA it records events and reads them at the end: no wait before."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._start = self._now()

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self, stage: str) -> None:
        """Name the span since the last mark."""
        self._marks.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage; spans of one name add up."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        out: dict[str, float] = {}
        last = self._start
        for stage, at in self._marks:
            span = last.elapsed_time(at) / 1000 if self._cuda else at - last
            out[stage] = out.get(stage, 0.0) + span
            last = at
        return out
