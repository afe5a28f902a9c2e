# SPDX-License-Identifier: Apache-2.0
"""FlashEdit pipelines: an edit in one step each of inversion and generation, over the SpecEdit ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine import merged, registry, stages
from ..engine.config import EditConfig, _flag, _integer, _number, _one_of
from ..engine.low_rank import LowRankChange, active, detach
from ..engine.pipeline import Call, SpecEditMixin, stock_class
from ..engine.stages import Run, Selection
from ..sampling.grid import from_blocks, pack, to_blocks, unpack
from . import stages as flash_stages

METHODS = ("flash", "inversion")
REGION_NOISES = ("white", "inverted")
COSI = "cosi"  # the folder of both files in a model's own
GENERATOR, INVERTER = "generator.safetensors", "inverter.safetensors"


@dataclass(frozen=True)
class FlashEditConfig(EditConfig):
    """Options of a FlashEdit run. Every wrong value raises ValueError or TypeError that names the field.

    Attributes:
        method: "flash": one step (FlashEdit, arXiv 2509.22244). "inversion": the multi-step baseline, Euler inversion
            under the source's text and Euler editing, without any of the options below.
        steps: of the inversion and of the editing of "inversion", each.
        guidance: of the editing of "inversion": over 1 it has both branches, with true guidance from the source's text
            to the edit's.
        cosi: the noise is the source's, from the inversion network (in the background, see region_noise); False, or
            without its weights: white noise.
        region_noise: with cosi, the noise in the edit region: "white", the run's own, or "inverted", the source's there
            too. None: inverted where the model does not see its source otherwise, as in the paper, else white. From an
            editor the inverted noise takes half of the instructions' answers (bench/log/flash_edit.md).
        bg_shield: outside the edit region keys and values are the source branch's and the latents the source's own, and
            the edit computes its region alone; False: the whole picture.
        ssca: text reaches the background without the key semantic tokens of the instruction. A mask of the user's and
            bg_shield leave nothing to it: the edit computes the mask alone, which sees all of the text. No draft is
            run then.
        mask_ratio: a token is edited where the draft's change is over this many times its mean over the picture. The
            change is from the source, or from the draft under the source's text where the model does not see it.
        layer: index of the transformer's block whose attention ranks the text tokens, double-stream blocks first; None:
            the block at 3/8 of the depth, where the tiny editor's words stood out most clearly from the padding.
        merged: the one-step networks' changes are in copies of the blocks' weights, one for each network, which stay in
            memory between calls (FLUX.1-Kontext: 17 GB each in bf16), in place of being added to each product: faster,
            and rounded as `fuse_lora` rounds. With precision="fp8" the copies in fp8 have them in any case. Not with
            runner="eager", nor where the model is offloaded.
        token_ratio: a text token is a key one if the attention that the edit region gives it beyond the background's is
            over this many times the mean over all text tokens.

    All else: EditConfig. Above max_active the whole picture is edited.
    """

    method: str = "flash"
    steps: int = 50
    guidance: float = 1.0
    cosi: bool = True
    region_noise: str | None = None
    bg_shield: bool = True
    ssca: bool = True
    # on 11 calibration edits, the shipped editor's own first step: recall .995 at 23 % of the tokens (true share: 10 %)
    mask_ratio: float = 1.5
    layer: int | None = None
    token_ratio: float = 1.5
    merged: bool = False

    def __post_init__(self):
        super().__post_init__()
        _one_of("method", self.method, METHODS)
        if self.region_noise is not None:
            _one_of("region_noise", self.region_noise, REGION_NOISES)
        for name in ("cosi", "bg_shield", "ssca", "merged"):
            _flag(name, getattr(self, name))
        _integer("steps", self.steps, 1)
        if self.layer is not None:
            _integer("layer", self.layer, 0)
        _number("guidance", self.guidance, 1.0, float("inf"))
        _number("mask_ratio", self.mask_ratio, 0.0, float("inf"))
        _number("token_ratio", self.token_ratio, 0.0, float("inf"))
        if self.method == "inversion" and self.preserve is not None:
            raise ValueError(f"preserve: expected None with method='inversion' (no mask), got {self.preserve!r}")

    def noise_of_region(self, sees_source: bool) -> str:
        """`region_noise` for a model that sees its source or does not."""
        return self.region_noise or ("white" if sees_source else "inverted")

    @property
    def may_drift(self) -> bool:
        return not self.bg_shield

    def step_counts(self, steps: int | None = None, sigmas_given: bool = False) -> tuple[int, int, int]:
        """(coarse, mixed, full) steps of the edit."""
        if self.method == "inversion":
            return 0, 0, self.steps if steps is None else steps
        if steps not in (None, 1):
            raise ValueError(f"num_inference_steps: expected None or 1 with method='flash', got {steps}")
        return 0, 0, 1


class FlashEditMixin(SpecEditMixin):
    """What FlashEdit changes of a SpecEdit pipeline; a class has it before that one.

    specedit: a FlashEditConfig. source_prompt: the source branch's text; prompts of an edit model tell what to change,
    so the empty one stands for the source. A model that does not see its source has captions, here the source's: it
    makes the source from the noise that the inversion network gives. Where prompt embeddings are given, the source
    branch's take the names of the negative ones, `negative_prompt_embeds` and the like. mask_image, preserve, output:
    as in SpecEdit.
    The generator is the pipeline's own transformer until `load_cosi` brings low-rank changes that distil it to one step
    and make an inversion network of it. `from_pretrained` does so from a local folder's `cosi/`, where it has one.
    """

    CONFIG = FlashEditConfig
    ARGUMENTS = {"source_prompt": ""}
    SEVERAL_GPUS = False
    DETAILS = ("working",)  # its networks know one step, from noise alone

    _generator: LowRankChange | None = None
    _inverter: LowRankChange | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> Any:
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        weights = Path(pretrained_model_name_or_path) / COSI
        if weights.is_dir():
            pipe.load_cosi(weights)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline, **options) -> Any:
        made = super().from_pipe(pipeline, **options)
        if isinstance(pipeline, FlashEditMixin):
            made._generator, made._inverter = pipeline._generator, pipeline._inverter
        return made

    def save_pretrained(self, save_directory, *args, **options) -> None:
        super().save_pretrained(save_directory, *args, **options)
        for change, name in ((self._generator, GENERATOR), (self._inverter, INVERTER)):
            if change is not None:
                folder = Path(save_directory) / COSI
                folder.mkdir(exist_ok=True)
                change.save(folder / name)

    def load_cosi(self, folder: str | Path) -> None:
        """Take the one-step generator and the inversion network from a folder that COSI training wrote.

        Each is a low-rank change of the transformer, added in the calls that need it: its weights stay as they are.
        FileNotFoundError without the two files; ValueError where they belong to another model.
        """
        paths = [Path(folder) / name for name in (GENERATOR, INVERTER)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"folder: expected {path.name} in {folder}")
        found = [LowRankChange.load(path) for path in paths]
        for path, change in zip(paths, found):
            try:
                change.attach(self.transformer)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        self._forget_copies()  # those of the former networks, and of the weights without one
        self._generator, self._inverter = found

    def _forget_copies(self) -> None:
        if self._specedit_runner is not None:
            self._specedit_runner.clear()

    def unload_cosi(self) -> None:
        """Undo `load_cosi`, its hooks on the transformer's layers too."""
        self._forget_copies()
        self._generator = self._inverter = None
        detach(list(self.transformer.modules()))

    def _release(self) -> None:
        super()._release()
        self.unload_cosi()

    def _resolve(self, call: Call) -> Any:
        if not self.FLASH_RUNNERS:
            raise TypeError(f"specedit: FlashEdit does not serve {stock_class(type(self)).__name__}")
        return super()._resolve(call)

    def _texts(self, call: Call, device: torch.device) -> dict[str, Any]:
        for name in ("negative_prompt", "negative_prompt_2", self.TRUE_CFG):
            if hasattr(call, name) and getattr(call, name) != self._default_of(name):
                raise ValueError(f"{name}: expected none with FlashEdit, whose second branch is the source's")
        call.true_cfg_scale = 1.0
        positive = self._encode_text(call, device, **self._text_fields(call, ""))
        fields = self._text_fields(call, "negative_")
        if not self._given(fields):
            if any(value is not None for value in fields.values()):
                missing = next(name for name, value in fields.items() if name.endswith("embeds") and value is None)
                raise ValueError(
                    f"negative_{missing}: expected the source text's, as its other embeddings are given, got None"
                )
            encoders = [part for name, part in self.components.items() if name.startswith("text_encoder")]
            if encoders and all(part is None for part in encoders):
                raise ValueError(
                    "source_prompt: expected the source text's embeddings (negative_prompt_embeds and the like), since"
                    " the pipeline has no text encoder"
                )
            texts = call.source_prompt if isinstance(call.source_prompt, list | tuple) else [call.source_prompt]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"source_prompt: expected a str or a list of them, got {call.source_prompt!r}")
            fields["prompt"] = call.source_prompt
            if not self.SEES_SOURCE and not call.source_prompt:
                self._say_once("source_prompt: no caption of the source is given, which this model does not see")
        source = self._encode_text(call, device, **self._for_each_prompt(call, fields, "source_prompt"))
        return {"positive": positive, "negative": None, "source_text": source}

    def _run(
        self, run: Run, counts: tuple[int, int, int], sigmas: list[float], user_mask: Tensor | None
    ) -> tuple[Tensor, Selection, Tensor | None]:
        run.timesteps = [1000 * sigma for sigma in sigmas[:-1]]
        if run.config.method == "inversion":
            if run.preview or run.joined is not None:
                raise ValueError("method: 'inversion' looks for no region to show or to join with a mask")
            clean = flash_stages.multi_step_edit(run, run.source_text, sigmas)
            run.clock.mark("inversion")
            return clean, stages.everything(run), None
        # looked at once, while the device encodes the source
        for change in (self._generator, self._inverter):
            if change is not None:
                change.attach(self.transformer)
        copies = self._copies(run)
        with active(self._generator, None), merged.active(copies):
            found = self._one_step(run, user_mask)
        if copies is not None:
            run.stats.merged_bytes = copies.bytes
        return found

    def _copies(self, run: Run) -> merged.MergedLinears | None:
        """The runner's copies of weights with the networks' changes in them, where they are asked for and possible."""
        runner = getattr(run.model, "runner", None)
        if not run.config.merged or self._generator is self._inverter is None:
            return None
        if runner is None:
            self._say_once("merged: the changes are added: the transformer's own forward is called (runner='eager')")
            return None
        if runner.moving:
            self._say_once("merged: the changes are added: the model is offloaded")
            return None
        return runner.merged

    def _one_step(self, run: Run, user_mask: Tensor | None) -> tuple[Tensor, Selection, Tensor | None]:
        config, clock, source_text = run.config, run.clock, run.source_text
        region_noise = config.noise_of_region(self.SEES_SOURCE)
        if config.cosi and self._inverter is None:
            self._say_once("cosi: no inversion network is loaded (load_cosi): the noise is white")
        cosi = config.cosi and self._inverter is not None

        def invert(clean: Tensor, white: Tensor) -> Tensor:
            if not cosi:
                return white
            with active(self._inverter, None):
                return flash_stages.invert(run, run.model, source_text, clean, white)

        # of the draft and of the edit, and where a branch is run under the source's text, of that
        first = torch.full((1,), 1000.0, dtype=torch.float32, device=run.device)
        texts = [run.positive, source_text] if config.bg_shield or not self.SEES_SOURCE else [run.positive]
        conditioning, *of_source = run.model.conditionings(texts, first)
        source_conditioning = of_source[0] if of_source else None
        scores = mass = None
        # a user's mask is where the text reaches; with the shield nothing else is computed
        ssca = config.ssca and (user_mask is None or not config.bg_shield)
        if user_mask is None or ssca:
            watched = flash_stages.watched_module(run.model, config.layer) if ssca else None
            draft = flash_stages.draft(
                run,
                conditioning,
                source_conditioning,
                watched,
                None if self.SEES_SOURCE else invert,
                compare=user_mask is None,
            )
            scores, mass = draft.change, draft.mass
            clock.mark("draft")
        if user_mask is not None:
            selection = stages.select_given(run, user_mask)
            reach = selection.edited
        else:
            assert scores is not None  # the draft has compared
            run.stats.threshold = config.mask_ratio
            selection = stages.select(run, scores, config.mask_ratio, config.dilation)
            # without the growth; a picture that is edited whole has no other part
            reach = run.join(scores > config.mask_ratio)
            reach = from_blocks(to_blocks(reach, run.grid), run.grid) | selection.edited.all(dim=1, keepdim=True)
        if run.ends(selection):
            return run.source, selection, scores

        noise, key_text, whole = run.noise, None, all(selection.dense)
        if cosi and not (whole and region_noise == "white"):
            noise = invert(run.source, run.noise)
            if region_noise == "white":
                noise = flash_stages.white_inside(run, noise, selection)
            run.stats.inverted = True
            clock.mark("invert")
        if ssca and not whole:
            assert mass is not None  # the draft has watched
            key_text = flash_stages.key_tokens(mass, to_blocks(reach, run.grid), config.token_ratio)
            run.stats.key_tokens = key_text
        run.stats.backend = ops.backend_of("mixed_res_attn", run.device)[0]
        # where all is edited there is no background to shield
        shield = config.bg_shield and not whole
        clean = flash_stages.one_step_edit(
            run, conditioning, source_conditioning, source_text, noise, selection, reach, key_text, shield
        )
        run.on_start(torch.full((), 1000.0, dtype=torch.float32, device=run.device))
        tokens = run.on_step(0, torch.full((), 1000.0, dtype=torch.float32, device=run.device), pack(clean))
        run.step = 1
        clock.mark("edit")
        return stages.keep_unchanged(run, unpack(tokens, run.grid), selection), selection, scores


@functools.cache
def _flash_pipeline(kind: Any) -> type:
    name = kind.__name__.replace("SpecEdit", "FlashEdit", 1)
    text = f"FlashEdit on the models of {kind.__name__}: its call, with what FlashEditMixin says."
    runners = tuple(runner for runner in kind.RUNNERS if runner in kind.FLASH_RUNNERS)
    return type(name, (FlashEditMixin, kind), {"__doc__": text, "__module__": __name__, "RUNNERS": runners})


def flash_pipelines() -> dict[type, type]:
    """{SpecEdit pipeline class: its FlashEdit class} of all registered models."""
    return {kind: _flash_pipeline(kind) for kind in registry.pipelines().values()}
