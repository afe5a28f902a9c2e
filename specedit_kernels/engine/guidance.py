# SPDX-License-Identifier: Apache-2.0
"""True guidance from step to step: which steps compute both branches, and what these leave for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .stages import Run


class StageVelocity:
    """Guided velocities of one stage's steps, with the difference of the two branches kept between them (the guidance
    cache of FasterCache, arXiv 2410.19355).

    A call computes both branches where it is asked to `renew`, where the last one that did so is `refresh` calls ago,
    first of all, and after `restart`. It keeps conditional minus unconditional velocity, fp32. The calls between
    compute the conditional branch alone, and take for the unconditional velocity theirs minus the kept difference.

    timesteps: fp32 [n] in [0, 1000], those of all steps. guided: False leaves true guidance out. passes: how many
    branches the last call computed, at most.
    """

    def __init__(self, run: Run, timesteps: Tensor, guided: bool = True, refresh: int = 1):
        self.run, self.guided = run, guided
        self.conditionings = run.timestep_conditioning(timesteps, guided)
        # with a rank for each branch both take the time of one
        self.refresh = refresh if guided and run.negative is not None and run.model.guides is None else 1
        self.passes = 2 if guided else 1
        self._alone = self.conditionings
        if self.refresh > 1 and run.joined_branches > 1:
            self._alone = [(x,) for x in run.model.timestep_conditioning(run.conditional_text, timesteps)]
        self._layouts: list[tuple[Sequence[Any], Any]] = []
        self._age = 0
        self._difference: Tensor | None = None

    def restart(self) -> None:
        """The next call computes both branches."""
        self._difference = None

    def __call__(
        self, step: int, tokens: Tensor, layouts: Sequence[Any], first: int | None = None, renew: bool = False
    ) -> Tensor:
        """`Run.velocity` of a step. A call that does not `renew` has tokens that the last one which did so had, in its
        order: the first of them, or all."""
        run, at = self.run, self.conditionings[step]
        if self.refresh == 1:
            return run.velocity(tokens, at, layouts, first, self.guided)
        if renew or self._difference is None or self._age >= self.refresh:
            positive, negative = run.both_velocities(tokens, at, layouts, first)
            self._age, self.passes, self._difference = 1, 2, positive.float() - negative.float()
            return run.model.guide(positive, negative, run.true_cfg_scale)
        self._age, self.passes = self._age + 1, 1
        text, layout = run.conditional_text, self._conditional(layouts)
        positive = run.model.velocity(text, tokens, self._alone[step][0], layout)[:, :first]
        # rounded once, since the formula multiplies what is between the two
        exact = positive.float()
        negative = exact - self._difference[:, : exact.shape[1]]
        return run.model.guide(exact, negative, run.true_cfg_scale).to(positive.dtype)

    def _conditional(self, layouts: Sequence[Any]) -> Any:
        """The conditional branch's own of some layouts: made once, the layouts outlive the stage's steps."""
        for of, made in self._layouts:
            if of is layouts:
                return made
        run, made = self.run, layouts[0]
        if run.joined_branches > 1:
            made = run.model.layout_of_samples(made, run.conditional_samples)
        self._layouts.append((layouts, made))
        return made
