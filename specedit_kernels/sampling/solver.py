# SPDX-License-Identifier: Apache-2.0
"""Steps along a velocity field from one sigma to the next."""

from __future__ import annotations

import torch
from torch import Tensor


def euler(tokens: Tensor, velocity: Tensor, span: Tensor) -> Tensor:
    """One Euler step in fp32, back in the tokens' dtype, as FlowMatchEulerDiscreteScheduler does it: there the velocity
    has it too, but under autocast guidance's norms give fp32."""
    return (tokens.to(torch.float32) + span * velocity).to(tokens.dtype)


class Solver:
    """Steps of dx/ds = velocity(x, s) from one sigma to the next, of any lengths.

    name: "euler", or "ab2": the two-step Adams-Bashforth method for uneven steps. Over a step from s to s' the velocity
    is taken for linear in sigma, through its values at s and at the start of the step before: x' = x + (s' - s)
    (v + (s' - s) / 2 * slope). Without a step before, and without a slope from elsewhere, the step is Euler's.
    """

    def __init__(self, name: str):
        self.name = name
        self._former: tuple[Tensor, Tensor] | None = None  # sigma, velocity

    def step(self, tokens: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, slope: Tensor | None = None) -> Tensor:
        """The tokens at sigma `to`. sigma, to: 0-dim. slope: the velocity's over sigma, where it is known."""
        if self.name == "euler":
            return euler(tokens, velocity, to - sigma)
        # a copy: a compiled transformer may write over its output
        present = velocity.to(torch.float32, copy=True)
        if slope is None and self._former is not None:
            before, former = self._former
            slope = (present - former) / (sigma - before)
        self._former = sigma, present
        span = to - sigma
        return euler(tokens, present if slope is None else present + span / 2 * slope, span)

    def restart(self) -> None:
        """Forget the step before: the state, or what the velocity depends on, is not what that step left."""
        self._former = None
