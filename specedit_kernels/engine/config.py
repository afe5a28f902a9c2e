# SPDX-License-Identifier: Apache-2.0
"""The options of a SpecEdit run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from ..sampling.schedule import split_steps

# Steps of the main trajectory by preset (number of function evaluations): all coarse, mixed resolution, all fine.
# 8 and 4 are the step counts of step-distilled weights (Lightning); 30 to 9 are the paper's.
PRESETS: dict[int, tuple[int, int, int]] = {
    30: (7, 13, 10), 18: (4, 8, 6), 11: (2, 5, 4), 9: (2, 4, 3), 8: (3, 3, 2), 6: (2, 3, 1), 4: (1, 2, 1)
}  # fmt: skip

# The schedule that Qwen-Image-Lightning weights were distilled for, as changes to a scheduler's config. Weights, their
# schedule and guidance (true_cfg_scale=1.0) belong together and to the pipeline, so a preset changes none of them:
#   pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **LIGHTNING_SCHEDULE)
LIGHTNING_SCHEDULE = {
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "shift_terminal": None,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}

BRACKET = "bracket"
LAST = "last"

# What a quality sets where nothing else is asked for. Measured in docs/choose.md. "paper" is SpecEdit as its paper has
# it: every mixed step computes its whole sequence, and the last steps compute all tokens.
_LOCKED: dict[str, Any] = dict(mixed_from=7 / 9, solver="ab2", finish="locked", lock_text=True)
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": dict(stages=(3, 2, 1), draft="half", coarse_refresh=3, kv_refresh="bracket", **_LOCKED),
    "balanced": dict(stages=(4, 3, 2), draft="coarse", coarse_refresh=2, kv_refresh=2, **_LOCKED),
    "best": dict(stages=(7, 3, 2), draft="coarse", coarse_refresh=4, kv_refresh=2, **_LOCKED),
    "paper": dict(
        preset=9, draft="coarse", mixed_from=None, solver="euler", finish="full", kv_refresh=1, lock_text=False,
        coarse_refresh=1,
    ),
}  # fmt: skip
# What differs under true guidance, whose two branches make a field that few steps from noise do not follow: measured
# in docs/choose.md.
GUIDED: dict[str, dict[str, Any]] = {
    "fast": dict(stages=(3, 3, 2), draft="coarse", coarse_refresh=3, kv_refresh=3, draft_guidance=LAST),
    "balanced": dict(coarse_refresh=4),
    "best": dict(stages=(4, 4, 2)),
}
DRAFTS = ("coarse", "half", "quarter", "full_step")
FINISHES = ("full", "locked")
UNSELECTED = ("source", "coarse")
METRICS = ("decoder", "latent", "projected")
REFERENCES = ("matched", "literal")
SELECTIONS = ("score", "random", "uniform")
KV_CACHE_DTYPES = ("auto", "fp8")
PRECISIONS = ("auto", "fp8")
SOLVERS = ("euler", "ab2")
RUNNERS = ("auto", "eager", "fused", "graph", "compile")

# draft -> how far its calibrated thresholds follow a picture's largest score; compared by bench/quality/selection.py,
# the "coarse" one alone so far.
RELATIVE = {"coarse": 0.5, "half": 0.5, "quarter": 0.0, "full_step": 0.0}

# (metric, reference, draft) -> threshold on the [0, 4] scale of token_discrepancy, for use with dilation 1.
# Found by bench/quality/calibrate.py on an H100 with the shipped editor, on 188 local and small calibration edits at
# 512 px, where the edits' own share is 7.7 %: recall .98 at 14 % of the tokens for "full_step", .95 at 21 % for
# "quarter", and .989 at 16.7 % for "coarse" (2 of 9 steps; by bench/quality/selection.py on 187 such edits: .984 at
# 17.1 % with the last step's scores alone over .059). The other four of "coarse" are still of that form.
# That editor is a FLUX.1-Kontext; what other models have for themselves stands in their files.
THRESHOLDS: dict[tuple[str, str, str], float] = {
    ("decoder", "matched", "quarter"): 0.073,
    ("decoder", "matched", "coarse"): 0.1,
    ("decoder", "matched", "full_step"): 0.14,
    ("decoder", "literal", "quarter"): 1.8,
    ("decoder", "literal", "coarse"): 1.4,
    ("decoder", "literal", "full_step"): 0.14,
    ("latent", "matched", "quarter"): 0.085,
    ("latent", "matched", "coarse"): 0.047,
    ("latent", "matched", "full_step"): 0.12,
    ("latent", "literal", "quarter"): 2.0,
    ("latent", "literal", "coarse"): 1.6,
    ("latent", "literal", "full_step"): 0.12,
    ("projected", "matched", "quarter"): 0.054,
    ("projected", "matched", "coarse"): 0.038,
    ("projected", "matched", "full_step"): 0.13,
    ("projected", "literal", "quarter"): 2.0,
    ("projected", "literal", "coarse"): 1.3,
    ("projected", "literal", "full_step"): 0.13,
}


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value}")


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Options that every method has. Every wrong value raises ValueError or TypeError that names the field.

    Attributes:
        preserve: None, or "pixels": pixels outside the feathered edit region are the source's own.
        feather: width in pixels of the seam, outside the edit region, over which "pixels" blends.
        dilation: radius, in fine tokens, by which the edited region is grown.
        uniform_stride: every k-th block a side is recomputed too (SpecEdit has 3); 0 for none.
        min_active: with fewer edited tokens than this nothing has changed, and the source is returned.
        max_active: above this share of active blocks all tokens are computed.
        coarse_references: in mixed steps, tokens of further reference pictures, which no edit mask covers, are all
            coarse (False: all fine). In coarse and draft steps every picture has the resolution of the step.
        kv_cache_dtype: how keys and values that outlive a step are kept. "auto": as the model computes. "fp8": e4m3 and
            a scale for each token and head, half the memory; a step converts those of one layer at a time.
        selection: "score", or a control at an equal number of blocks: "random" or "uniform".
        runner: how the transformer's steps run. "auto": "graph" where it is possible, else "fused" for quantised
            weights on a CUDA device, else "eager"; `stats.runner_reason` says why. "eager": the transformer's own
            forward; with the plain pipeline's steps its numbers are that one's to the last bit where all is selected,
            and it holds no memory between calls. "fused": the same modules in about a third of the launches, and the
            autoencoder's norms by an op (FLUX) or its causal convolutions in two dimensions (Qwen), equal but for
            rounding; Qwen's two branches of guidance run as one batch where their texts are nearly of one length.
            "graph" (on a CUDA device): fused steps, and the autoencoder, captured as CUDA graphs at the first edit of a
            size and replayed from then on; below about 1,000 tokens a step is bound by its launches without. "compile":
            the same with the blocks under torch.compile. A pipeline that cannot have the runner asked for takes
            what "auto" takes, and warns why.
        precision: of the linear layers of the transformer's blocks. "auto": as the model has them. "fp8": e4m3 weights
            with a scale for each output (a copy, half the model's bytes, beside its own), activations with a scale for
            each token; on sm_90 with heads of 128 channels steps that keep keys and values attend in e4m3 too, whatever
            kv_cache_dtype is. With every runner but "eager", on CUDA devices of compute capability 8.9 and up with bf16
            weights, and in emulation on a CPU; elsewhere, and in layers with an adapter or a quantised weight, as
            "auto", with a warning that says why. torchao's e4m3 weights (0.18) serve as they lie, without a copy. Where
            such a checkpoint quantises activations too (dynamic fp8), "auto" computes its layers, and no others, in
            the same way: by row, the rows once for all layers with the same input. With runner="compile" blocks are
            then not compiled.
    """

    preserve: str | None = None
    feather: int = 8
    dilation: int = 1
    uniform_stride: int = 0
    min_active: int = 1
    max_active: float = 0.8
    coarse_references: bool = False
    kv_cache_dtype: str = "auto"
    selection: str = "score"
    runner: str = "auto"
    precision: str = "auto"

    def __post_init__(self):
        _one_of("preserve", self.preserve, (None, "pixels"))
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("runner", self.runner, RUNNERS)
        _one_of("precision", self.precision, PRECISIONS)
        _integer("feather", self.feather, 0)
        _integer("dilation", self.dilation, 0)
        _integer("uniform_stride", self.uniform_stride, 0)
        _integer("min_active", self.min_active, 0)
        _number("max_active", self.max_active, 0.0, 1.0)
        _flag("coarse_references", self.coarse_references)

    def step_counts(self, steps: int | None = None, sigmas_given: bool = False) -> tuple[int, int, int]:
        """(coarse, mixed, full) steps of the main trajectory; `steps`: a number that the call asks for;
        `sigmas_given`: whether it gives their sigmas too."""
        raise NotImplementedError

    def resolved(self, guided: bool = False) -> EditConfig:
        """This config as a run has it, with values in place of what is left to others. guided: true guidance."""
        return self

    def sigmas(self, counts: tuple[int, int, int]) -> list[float] | None:
        """Of those steps, before the scheduler's shift; None: the plain pipeline's."""
        return None

    @property
    def draft_of_coarse_steps(self) -> str | None:
        """The draft of a run without a mask, where that has to begin with coarse steps."""
        return None

    def separate_steps(self, counts: tuple[int, int, int]) -> int:
        """Steps of a draft that is no part of the main trajectory. counts: those of `step_counts`."""
        return 0

    @property
    def may_drift(self) -> bool:
        """Whether the model computes what it is not to edit too, and may move or recolour it."""
        return True


@dataclass(frozen=True)
class SpecEditConfig(EditConfig):
    """Options of a SpecEdit run. Every wrong value raises ValueError or TypeError that names the field.

    Attributes:
        quality: sets finish where it is None, and where preset and stages are, the steps: their counts, mixed_from,
            solver, draft, coarse_refresh, kv_refresh and lock_text. "fast", "balanced", "best", or "paper", SpecEdit as
            its paper has it, with kv_refresh=1 in any case. QUALITIES has the values, GUIDED those that differ under
            true guidance, docs/choose.md what each costs. Fields keep what was given: those that are
            None follow the quality also after dataclasses.replace, and `resolved` has all of their values.
        preset: number of function evaluations of the main trajectory in place of the quality's: 30, 18, 11, 9 or 6, and
            8 or 4 for step-distilled weights. A separate draft is counted apart.
        stages: (coarse, mixed, full) step counts in place of those.
        mixed_from: the sigma in (0, 1), before the scheduler's shift, at which the mixed steps begin: the coarse ones
            go there from 1 in even steps, the mixed and full ones from there to 0. None, with a preset or stages: all
            steps are even, as the plain pipeline's. A call's own `sigmas` are kept, and shared out as even ones are: to
            coarse steps the first (1 - mixed_from) of them.
        solver: of the flow's differential equation. "euler": the scheduler's, where preset or stages are given. "ab2":
            the two-step Adams-Bashforth method for steps of any length, of second order: a step has the velocity at its
            middle, extrapolated from the velocities at its start and at the step before. It costs no evaluation. The
            first step of each stage, and one after a callback that changes the latents or the text, is Euler's; with
            kv_refresh="bracket" the first mixed step has the second whole pass for its other velocity. A "quarter"
            draft is Euler's.
        draft: what is verified. "coarse": the clean estimates of the main trajectory's own coarse steps, the first's
            and the last's, no extra step. "half": the same, but these steps are a separate run: the main trajectory
            begins at noise, and mixed steps at the sigmas of the coarse ones draw the region at full resolution from
            the start; a mask in the draft's place saves the coarse steps. Where all tokens are computed it goes on from
            the coarse ones. "quarter": a separate run at 4x lower resolution a side, `draft_steps` steps
            (the paper's). "full_step": the clean estimate after one full-resolution step, which takes the place of the
            coarse steps. None: the quality's, "half" of "fast", else "coarse"; "coarse" with preset or stages.
        draft_steps: steps of the "quarter" draft (the paper's N_draft).
        finish: "full": the last steps run on all tokens at full resolution (the paper's). "locked": they stay mixed,
            coarse tokens follow the source, and latents that were not selected are the source's.
        unselected: what target tokens that were not selected are until the full steps of finish="full". "source": in
            the mixed steps the coarse ones follow the source, and the full steps begin from the fine source at their
            sigma. "coarse": the coarse ones follow the model, and are expanded for the full steps (the paper's).
            Without effect with finish="locked", whose coarse tokens follow the source in any case.
        metric: "decoder": features of the VAE decoder's first layers (the paper's eq. 6). "latent": packed latent
            tokens. "projected": the transformer's embedding of them.
        reference: "matched": the source at the draft's resolution, brought up in the same way. "literal": the
            full-resolution source (the paper's).
        threshold: a score above it marks a token as edited, on the [0, 4] scale; None takes the one calibrated for the
            model.
        relative: how far the threshold follows the picture: it is multiplied by (its largest score / 2) ** relative, 2
            being the score of unrelated features, so that a weak draft's edit is found and a strong one's fringe is not
            taken. A largest score under 0.1 counts as 0.1, and a threshold does not fall under 0.03, or noise would be
            an edit. 0: the threshold as it is; None: 0.5 with the calibrated threshold of the "coarse" or the "half"
            draft, else 0.
        key_bias: weigh a coarse key by the four fine ones it stands for.
        coarse_condition: condition tokens outside the edit are coarse too.
        kv_refresh: every k-th mixed step computes its whole sequence and keeps each layer's keys and values; the steps
            between compute the text and the edited tokens alone, over those. 1: every step computes all. "bracket": the
            first mixed step does so, then the whole sequence is computed once more at the last mixed step's noise
            sigma, which it reaches in one step; the tokens that are not recomputed then have keys and values between
            those two, by the sigma of each step. All but 1 needs tokens outside the edit that follow the source: not
            with finish="full" and unselected="coarse", where the default is 1.
        lock_text: the first mixed step alone computes the text; those after it keep its keys and values of that step,
            or between those of the two whole passes with kv_refresh="bracket". The text (with Qwen's vision tokens some
            1,500) is most of a step over the edited tokens. None: the quality's, which is True but for "paper"; False
            with preset or stages, and with finish="full" and unselected="coarse".
        coarse_refresh: every k-th coarse step, the first one and one after a callback that changes latents or text
            compute [text | target | references] and keep each layer's keys and values; the steps between compute text
            and target over those of the references. 1: every step computes all. Of a megapixel with one reference and
            512 text tokens that is 1536 tokens of 2560; what is kept is memory that the mixed steps take over. Without
            effect on a "quarter" draft, and on models that keep them in any case. None: the quality's; 1 with preset or
            stages.
        coarse_text_refresh: the same of the text: every k-th coarse step computes it, those between have the keys and
            values that it had then. With coarse_refresh they compute the target alone. 1: every coarse step computes
            the text. None: 1, but what GUIDED has for the quality.
        draft_guidance: False leaves true guidance out of the steps that a draft is made of: half their cost. "last":
            the last of them alone has it. None: True, but what GUIDED has for the quality.

    All else: EditConfig.
    """

    quality: str = "balanced"
    preset: int | None = None
    stages: tuple[int, int, int] | None = None
    mixed_from: float | None = None
    solver: str | None = None
    draft: str | None = None
    draft_steps: int = 8
    finish: str | None = None
    unselected: str = "source"
    metric: str = "decoder"
    reference: str = "matched"
    threshold: float | None = None
    relative: float | None = None
    key_bias: bool = True
    coarse_condition: bool = True
    kv_refresh: int | str | None = None
    lock_text: bool | None = None
    coarse_refresh: int | None = None
    coarse_text_refresh: int | None = None
    draft_guidance: bool | str | None = None

    def __post_init__(self):
        super().__post_init__()
        _one_of("quality", self.quality, tuple(QUALITIES))
        _one_of("unselected", self.unselected, UNSELECTED)
        for name, allowed in (
            ("preset", tuple(PRESETS)), ("solver", SOLVERS), ("draft", DRAFTS), ("finish", FINISHES),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), allowed)
        if self.mixed_from is not None:
            _number("mixed_from", self.mixed_from, 0.0, 1.0)
            if self.mixed_from in (0, 1):
                raise ValueError(f"mixed_from: expected a number between 0 and 1, got {self.mixed_from}")
        _one_of("metric", self.metric, METRICS)
        _one_of("reference", self.reference, REFERENCES)
        _integer("draft_steps", self.draft_steps, 1)
        for name in ("kv_refresh", "coarse_refresh", "coarse_text_refresh"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("kv_refresh", BRACKET):
                _integer(name, value, 1)
        finish = self.finish or self._own(guided=False)["finish"]
        if self.kv_refresh not in (None, 1) and finish == "full" and self.unselected == "coarse":
            raise ValueError(
                f"kv_refresh: expected 1 with finish='full' and unselected='coarse', got {self.kv_refresh!r}"
            )
        if self.threshold is not None:
            _number("threshold", self.threshold, float("-inf"), float("inf"))
        if self.relative is not None:
            _number("relative", self.relative, 0.0, 1.0)
        _flag("key_bias", self.key_bias)
        _flag("coarse_condition", self.coarse_condition)
        if self.lock_text is not None:
            _flag("lock_text", self.lock_text)
        if self.draft_guidance not in (None, LAST) and not isinstance(self.draft_guidance, bool):
            raise TypeError(f"draft_guidance: expected True, False or {LAST!r}, got {self.draft_guidance!r}")
        if self.stages is not None:
            if not isinstance(self.stages, (tuple, list)) or len(self.stages) != 3:
                raise ValueError(f"stages: expected (coarse, mixed, full) step counts, got {self.stages!r}")
            for count in self.stages:
                _integer("stages", count, 0)
            if sum(self.stages) == 0:
                raise ValueError(f"stages: expected at least one step, got {self.stages!r}")
            if finish == "full" and self.stages[1] and not self.stages[2]:
                raise ValueError(f"stages: finish='full' needs full steps after mixed ones, got {self.stages!r}")
            object.__setattr__(self, "stages", tuple(self.stages))

    def step_counts(self, steps: int | None = None, sigmas_given: bool = False) -> tuple[int, int, int]:
        """(coarse, mixed, full) steps of the main trajectory; `steps` scales them to another total.

        sigmas_given: their sigmas are the caller's, and taken for even: as many are coarse as lie over mixed_from.
        """
        used = self.resolved()
        counts = used.stages or PRESETS[cast(int, used.preset)]
        if steps is None:
            return counts
        coarse, mixed, full = counts
        if not sigmas_given or used.mixed_from is None or not coarse or not mixed + full:
            return self._with_a_whole_last_step(split_steps(counts, steps), counts)
        least = (mixed > 0) + (full > 0)
        coarse = min(max(round(steps * (1 - used.mixed_from)), 1), max(steps - least, 1))
        _, mixed, full = split_steps((0, mixed, full), steps - coarse)
        return self._with_a_whole_last_step((coarse, mixed, full), counts)

    def _with_a_whole_last_step(
        self, scaled: tuple[int, int, int], counts: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        """With kv_refresh=2 the last of an odd number of mixed steps computes its whole sequence: where `counts` are
        odd, scaled ones that are not have a coarse step less for a mixed one more."""
        used, (coarse, mixed, full) = self.resolved(), scaled
        renewed = used.kv_refresh == 2 and used.finish == "locked" and mixed > 0 and sum(counts[1:]) % 2
        return (coarse - 1, mixed + 1, full) if renewed and (mixed + full) % 2 == 0 and coarse > 1 else scaled

    def resolved(self, guided: bool = False) -> SpecEditConfig:
        """This config as a run has it: with the quality's values in the fields that are None.

        guided: of a run with true guidance. What is still None has no value there: mixed_from of even steps, one of
        preset and stages; threshold and relative are the model's. Resolved once more it is the same.
        """
        own = {name: value for name, value in self._own(guided).items() if value is not None}
        missing = {name: value for name, value in own.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    def _own(self, guided: bool) -> dict[str, Any]:
        """What the quality gives the fields that are None, by name."""
        own = {"coarse_text_refresh": 1, "draft_guidance": True} | QUALITIES[self.quality]
        if self.preset is not None or self.stages is not None:
            own |= dict(preset=None, stages=None)
            own |= dict(mixed_from=None, solver="euler", draft="coarse", coarse_refresh=1, lock_text=False)
            if own["kv_refresh"] != 1:
                own["kv_refresh"] = BRACKET
        elif guided:
            own |= GUIDED.get(self.quality, {})
        if (self.finish or own["finish"]) == "full" and self.unselected == "coarse":
            own |= dict(kv_refresh=1, lock_text=False)
        return own

    def sigmas(self, counts: tuple[int, int, int]) -> list[float] | None:
        coarse, rest, mixed_from = counts[0], counts[1] + counts[2], self.resolved().mixed_from
        if mixed_from is None or not coarse or not rest:
            return None
        ahead = [1 - (1 - mixed_from) * i / coarse for i in range(coarse)]
        return ahead + [mixed_from * (1 - i / rest) for i in range(rest)]

    @property
    def draft_of_coarse_steps(self) -> str | None:
        draft = self.resolved().draft
        return draft if draft in ("coarse", "half") else None

    def separate_steps(self, counts: tuple[int, int, int]) -> int:
        return {"half": counts[0], "quarter": self.draft_steps}.get(str(self.resolved().draft), 0)

    @property
    def may_drift(self) -> bool:
        return self.resolved().finish == "full"

    def guidance_of_draft(self, steps: int, guided: bool) -> bool | str:
        """draft_guidance of a draft of so many steps, as it comes about: False where the run has no true guidance
        (guided), and True for "last" of a single step."""
        found = cast("bool | str", self.resolved(guided).draft_guidance) if guided else False
        return True if found == LAST and steps == 1 else found

    def resolved_threshold(
        self,
        own: Mapping[tuple[str, str, str], Mapping[bool | str, float]] = MappingProxyType({}),
        guidance: bool | str = False,
    ) -> float:
        """The threshold in use: the given one, or the calibrated one for this metric, reference and draft.

        own: a model's, where it has some, by the draft's guidance; guidance: this one's, of guidance_of_draft.
        """
        if self.threshold is not None:
            return float(self.threshold)
        draft = str(self.resolved().draft)
        key = self.metric, self.reference, "coarse" if draft == "half" else draft  # the same steps
        return own[key][guidance] if key in own else THRESHOLDS[key]

    def resolved_relative(self) -> float:
        """How far the threshold follows the picture: the given share, or the one for this kind of threshold."""
        if self.relative is not None:
            return float(self.relative)
        return RELATIVE[str(self.resolved().draft)] if self.threshold is None else 0.0
