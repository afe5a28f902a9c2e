# SPDX-License-Identifier: Apache-2.0
"""Sigmas of a run whose resolution changes, and the edges of its stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .noise import pooled_sigma


@dataclass(frozen=True)
class StageSigmas:
    """Sigmas of the three stages, each a tuple of n + 1 sigmas for its n steps (one where n = 0).

    A step goes from one sigma to the next. `coarse` ends at `pooled_sigma(s)` where `mixed` begins at s, and `mixed`
    ends at `pooled_sigma(s)` where `full` begins at s: those are the two transitions that raise the noise again.
    """

    coarse: tuple[float, ...]
    mixed: tuple[float, ...]
    full: tuple[float, ...]


def stage_sigmas(sigmas: Sequence[float], coarse: int, mixed: int, full: int) -> StageSigmas:
    """Share out one full-resolution schedule over three stages.

    sigmas: n + 1 decreasing sigmas of the plain full-resolution run (its own resolution-dependent shift
    included), from 1 to 0, n = coarse + mixed + full.

    The coarse stage runs at the pooled sigmas of the plain ones, s / (2 - s): a shift of the schedule by -ln 2, about
    what the resolution-dependent shift of FLUX gives for a quarter of the tokens, and exactly the sigmas at which a
    pooled picture shows as much as the fine one does at s. The mixed stage begins at its plain sigma and ends, if a
    full stage follows, at the pooled sigma of the plain one, because its coarse tokens are expanded there; the sigmas
    between are the plain ones, scaled linearly into that span. The full stage is the plain schedule's own end.
    """
    n = coarse + mixed + full
    if min(coarse, mixed, full) < 0 or n < 1:
        raise ValueError(f"stages: expected three counts >= 0 with a sum >= 1, got {(coarse, mixed, full)}")
    if len(sigmas) != n + 1:
        raise ValueError(f"sigmas: expected {n + 1} sigmas for {n} steps, got {len(sigmas)}")
    if any(a <= b for a, b in itertools.pairwise(sigmas)) or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(f"sigmas: expected strictly decreasing sigmas within [0, 1], got {list(sigmas)}")
    plain_mixed = sigmas[coarse : coarse + mixed + 1]
    start, end = plain_mixed[0], plain_mixed[-1]
    # without a full stage the mixed one ends the run, without a mixed one nothing is coarse at its end
    target = pooled_sigma(end) if full and mixed else end
    scale = (start - target) / (start - end) if mixed else 1.0
    return StageSigmas(
        coarse=tuple(pooled_sigma(s) for s in sigmas[: coarse + 1]),
        mixed=tuple(target + (s - end) * scale for s in plain_mixed),
        full=tuple(sigmas[coarse + mixed :]),
    )


def split_steps(stages: tuple[int, int, int], steps: int) -> tuple[int, int, int]:
    """Scale (coarse, mixed, full) step counts to a new total, keeping every used stage at one step at least.

    Raises ValueError where `steps` is less than the number of stages in use.
    """
    used = [i for i in range(3) if stages[i] > 0]
    if steps < len(used):
        raise ValueError(f"steps: expected at least {len(used)} for the stages {stages}, got {steps}")
    total = sum(stages)
    exact = [s * steps / total for s in stages]
    counts = [max(int(e), 1) if i in used else 0 for i, e in enumerate(exact)]
    while sum(counts) != steps:
        missing = steps > sum(counts)
        # give to (take from) the stage that is furthest under (over) its exact share
        order = sorted(used, key=lambda i: exact[i] - counts[i], reverse=missing)
        chosen = next(i for i in order if missing or counts[i] > 1)
        counts[chosen] += 1 if missing else -1
    return counts[0], counts[1], counts[2]
