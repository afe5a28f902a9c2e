# SPDX-License-Identifier: Apache-2.0
"""FlashEdit pipelines: an edit in one step each of inversion and generation, over the SpecEdit ones."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..engine import registry, stages
from ..engine.attention import wrap_processors
from ..engine.config import RUNNERS, _flag, _integer, _number, _one_of
from ..engine.pipeline import SpecEditMixin
from ..engine.stages import Run, Selection
from ..sampling.grid import from_blocks, pack, to_blocks, unpack
from . import stages as flash_stages
from .low_rank import merged_copy

logger = logging.getLogger("specedit_kernels")

METHODS = ("flash", "inversion")
REGION_NOISES = ("white", "inverted")
COSI = "cosi"  # the folder of both files in a model's own
GENERATOR, INVERTER = "generator.safetensors", "inverter.safetensors"


@dataclass(frozen=True)
class FlashEditConfig:
    """Options of a FlashEdit run. Every wrong value raises ValueError or TypeError that names the field.

    method: "flash": one step (FlashEdit, arXiv 2509.22244). "inversion": the multi-step baseline, Euler inversion under
        the source's text and Euler editing, without any of the options below.
    steps: of the inversion and of the editing of "inversion", each.
    guidance: of the editing of "inversion": over 1 it has both branches, with true guidance from the source's text to
        the edit's.
    cosi: the noise is the source's, from the inversion network (in the background, see region_noise); False, or
        without its weights: white noise.
    region_noise: with cosi, the noise in the edit region: "white", the run's own, or "inverted", the source's there too.
        That one carries the source along, and one step gives half of the instructions' answers from it (bench/LOG.md).
    bg_shield: outside the edit region keys and values are the source branch's and the latents the source's own, and the
        edit computes its region alone; False: the whole picture.
    ssca: text reaches the background without the key semantic tokens of the instruction.
    mask_ratio: a token is edited where the draft's change is over this many times its mean over the picture.
    dilation: radius, in fine tokens, by which that region is grown.
    layer: index of the transformer's block whose attention ranks the text tokens, double-stream blocks first; None: the
        block at 3/8 of the depth, where the tiny editor's words stood out most clearly from the padding.
    token_ratio: a text token is a key one if the attention that the edit region gives it beyond the background's is
        over this many times the mean over all text tokens.
    max_active: above this share of active blocks the whole picture is edited.
    preserve, feather, runner: as in SpecEditConfig.
    """

    method: str = "flash"
    steps: int = 50
    guidance: float = 1.0
    cosi: bool = True
    region_noise: str = "white"
    bg_shield: bool = True
    ssca: bool = True
    # on 11 calibration edits, the shipped editor's own first step: recall .995 at 23 % of the tokens (true share: 10 %)
    mask_ratio: float = 1.5
    dilation: int = 1
    layer: int | None = None
    token_ratio: float = 1.5
    max_active: float = 0.8
    preserve: str | None = None
    feather: int = 8
    runner: str = "eager"

    # what the stages shared with SpecEdit ask of a config
    draft: ClassVar[str] = "one_step"
    selection: ClassVar[str] = "score"
    uniform_stride: ClassVar[int] = 0
    min_active: ClassVar[int] = 1
    coarse_references: ClassVar[bool] = False
    kv_cache_dtype: ClassVar[str] = "auto"

    def __post_init__(self):
        _one_of("method", self.method, METHODS)
        _one_of("runner", self.runner, RUNNERS)
        _one_of("region_noise", self.region_noise, REGION_NOISES)
        _one_of("preserve", self.preserve, (None, "pixels"))
        for name in ("cosi", "bg_shield", "ssca"):
            _flag(name, getattr(self, name))
        _integer("steps", self.steps, 1)
        _integer("dilation", self.dilation, 0)
        _integer("feather", self.feather, 0)
        if self.layer is not None:
            _integer("layer", self.layer, 0)
        _number("guidance", self.guidance, 1.0, float("inf"))
        _number("mask_ratio", self.mask_ratio, 0.0, float("inf"))
        _number("token_ratio", self.token_ratio, 0.0, float("inf"))
        _number("max_active", self.max_active, 0.0, 1.0)
        if self.method == "inversion" and self.preserve is not None:
            raise ValueError(f"preserve: expected None with method='inversion' (no mask), got {self.preserve!r}")

    def step_counts(self, steps: int | None = None) -> tuple[int, int, int]:
        """(coarse, mixed, full) steps of the edit."""
        if self.method == "inversion":
            return 0, 0, self.steps if steps is None else steps
        if steps not in (None, 1):
            raise ValueError(f"num_inference_steps: expected None or 1 with method='flash', got {steps}")
        return 0, 0, 1


class FlashEditMixin(SpecEditMixin):
    """What FlashEdit changes of a SpecEdit pipeline; a class has it before that one.

    specedit: a FlashEditConfig. source_prompt: the source branch's text; prompts of an edit model tell what to change,
    so the empty one stands for the source. Where prompt embeddings are given, the source branch's take the names of the
    negative ones, `negative_prompt_embeds` and the like. mask_image, preserve, output: as in SpecEdit.
    The generator is the pipeline's own transformer until `load_cosi` brings a distilled one and its inversion network.
    `from_pretrained` does so from a local folder's `cosi/`, where it has one.
    """

    CONFIG = FlashEditConfig

    _generator = None
    _inverter = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> Any:
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        weights = Path(pretrained_model_name_or_path) / COSI
        if weights.is_dir():
            pipe.load_cosi(weights)
        return pipe

    def to(self, *args, **options) -> Any:
        """As any pipeline's; the one-step networks go along with the transformer."""
        pipe = super().to(*args, **options)
        for module in (self._generator, self._inverter):
            if module is not None:
                module.to(device=self.transformer.device, dtype=self.transformer.dtype)
        return pipe

    def load_cosi(self, folder: str | Path) -> None:
        """Take the one-step generator and the inversion network from a folder that COSI training wrote.

        Each is a copy of the transformer with the file's low-rank changes. FileNotFoundError without the two files;
        ValueError where they belong to another model.
        """
        paths = [Path(folder) / name for name in (GENERATOR, INVERTER)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"folder: expected {path.name} in {folder}")
        self._generator, self._inverter = (merged_copy(self.transformer, path) for path in paths)
        # its graphs are of the weights before
        self._free_runner()

    def __call__(
        self, image=None, prompt=None, *, source_prompt: str | list[str] = "", specedit=None, **options
    ) -> Any:
        if specedit is False or image is None:
            return super().__call__(image=image, prompt=prompt, specedit=specedit, **options)
        for name in ("negative_prompt", "true_cfg_scale"):
            if name in options:
                raise ValueError(f"{name}: expected none with FlashEdit, whose second branch is the source's")
        if options.get("negative_prompt_embeds") is None:
            if isinstance(prompt, list) and isinstance(source_prompt, str):
                source_prompt = [source_prompt] * len(prompt)
            options["negative_prompt"] = source_prompt
        # any scale over 1 has the second text encoded; no guidance is done with it
        return super().__call__(image=image, prompt=prompt, true_cfg_scale=2.0, specedit=specedit, **options)

    def _run(
        self, run: Run, counts: tuple[int, int, int], levels: list[float], user_mask: Tensor | None
    ) -> tuple[Tensor, Selection, Tensor | None]:
        config, clock, source_text = run.config, run.clock, run.negative
        if source_text is None or source_text.embeds.shape[0] != run.batch:
            got = "none" if source_text is None else source_text.embeds.shape[0]
            raise ValueError(f"source_prompt: expected texts for {run.batch} images, got {got}")
        run.negative = None
        run.stats.plain_step_flops = run.flops([run.plain_tokens] * run.batch)
        if config.method == "inversion":
            clean = flash_stages.multi_step_edit(run, source_text, levels)
            clock.mark("inversion")
            return clean, stages.everything(run), None
        if self._generator is not None:
            wrap_processors(self._generator)
            run.model = run.model.using(self._generator)

        # of the draft and of the edit
        [moment] = run.model.moments(run.positive, torch.full((1,), 1000.0, device=run.device))
        scores = mass = None
        if user_mask is None or config.ssca:
            watched = flash_stages.watched_module(run.model.transformer, config.layer) if config.ssca else None
            draft = flash_stages.draft(run, moment, watched)
            mass = draft.mass
            clock.mark("draft")
        if user_mask is not None:
            selection = stages.select(run, user_mask.to(run.device).float(), 0.5, 0)
            reach = selection.edited
        else:
            scores, run.stats.threshold = draft.change, config.mask_ratio
            selection = stages.select(run, scores, config.mask_ratio, config.dilation)
            # without the growth; a picture that is edited whole has no other part
            reach = scores > config.mask_ratio
            reach = from_blocks(to_blocks(reach, run.grid), run.grid) | selection.edited.all(dim=1, keepdim=True)
        if not any(selection.changed):
            return run.source, selection, scores

        noise, words, whole = run.noise, None, all(selection.dense)
        if config.cosi and self._inverter is None:
            logger.warning("cosi: no inversion network is loaded (load_cosi): the noise is white")
        elif config.cosi and not (whole and config.region_noise == "white"):
            noise = flash_stages.invert(run, run.model.using(self._inverter), source_text)
            if config.region_noise == "white":
                noise = flash_stages.white_inside(run, noise, selection)
            run.stats.inverted = True
            clock.mark("invert")
        if config.ssca and not whole:
            words = flash_stages.key_tokens(mass, to_blocks(reach, run.grid), config.token_ratio)
            run.stats.key_tokens = words
        run.stats.backend = ops.backend_of("mixed_res_attn", run.device)[0]
        # where all is edited there is no background to shield
        shield = config.bg_shield and not whole
        clean = flash_stages.one_step_edit(run, moment, source_text, noise, selection, reach, words, shield)
        tokens = run.on_step(0, torch.full((), 1000.0, device=run.device), pack(clean))
        run.step = 1
        clock.mark("edit")
        return stages.keep_unchanged(run, unpack(tokens, run.grid), selection), selection, scores


@functools.cache
def _flash_pipeline(kind: type) -> type:
    name = kind.__name__.replace("SpecEdit", "FlashEdit", 1)
    text = f"FlashEdit on the models of {kind.__name__}: its call, with what FlashEditMixin says."
    return type(name, (FlashEditMixin, kind), {"__doc__": text, "__module__": __name__})


def flash_pipelines() -> dict[type, type]:
    """{SpecEdit pipeline class: its FlashEdit class} of all registered models."""
    return {kind: _flash_pipeline(kind) for kind in registry.pipelines().values()}
