# SPDX-License-Identifier: Apache-2.0
"""What the SpecEdit pipelines share: checks, the order of the stages, noise, sigmas, pixels."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..images.boxes import box_tokens, boxes_of
from ..images.files import Photo
from ..images.masks import token_mask
from ..sampling.grid import Grid, draft_grid, pack, unpack
from . import fp8, stages
from ._diffusers import (
    cache_hooks,
    calculate_shift,
    context_parallel,
    execution_device,
    moved_to,
    one_walk,
    retrieve_timesteps,
    unwrapped,
    walking_anew,
)
from .attention import wrap_processors
from .checkpoint import HARMLESS, check_folder, check_pipeline, load_notes
from .config import RUNNERS, EditConfig, SpecEditConfig, _number
from .model import EditModel, Text
from .native import refine
from .output import SpecEditPipelineOutput, SpecEditStats, StageClock
from .parallel import Ranks, sequence_ranks, texts_of_each
from .run import run_stages, verify_select
from .runner import StepRunner
from .runner import inspect as inspect_weights
from .source_size import as_given, compositing_device, photos_of, pixels_of, put_back
from .stages import Draft, Reference, Run, Selection

logger = logging.getLogger("specedit_kernels")

Call = SimpleNamespace  # the arguments of one call by name

# What an argument is to a stock call that does not have it.
ABSENT: dict[str, Any] = {
    "prompt": None, "prompt_embeds": None, "num_images_per_prompt": 1, "height": None, "width": None, "sigmas": None,
    "generator": None, "latents": None, "guidance_scale": None, "output_type": "pil", "return_dict": True,
    "callback_on_step_end": None, "callback_on_step_end_tensor_inputs": (),
}  # fmt: skip
MASK_MODES = ("replace", "limit", "add")
OUTPUT_SIZES = ("working", "source")
DETAILS = ("working", "native")
SCHEDULES = 32  # that a pipeline keeps: those of a call, and of windows of many sizes


_CALLS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LISTING = threading.Lock()


def _one_call(transformer: torch.nn.Module) -> threading.RLock:
    """Held for a whole call: steps share the graphs and buffers of a runner, and what a pipeline knows of its call;
    pipelines that share a transformer (`from_pipe`) share the scales of its adapters, and the memory of its weights."""
    with _LISTING:
        return _CALLS.setdefault(transformer, threading.RLock())


def stock_class(kind: type) -> type:
    """The diffusers pipeline class behind a SpecEdit one."""
    return next(k for k in kind.__mro__ if issubclass(k, DiffusionPipeline) and not issubclass(k, SpecEditMixin))


def _stock_parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """Those of the stock call. A user's subclass may hide them behind *args and **kwargs: then its base class tells."""
    for each in kind.__mro__:
        if issubclass(each, DiffusionPipeline) and not issubclass(each, SpecEditMixin):
            found = inspect.signature(each.__call__).parameters
            if "num_inference_steps" in found:
                return found
    raise TypeError(f"{kind.__name__}: expected a base class whose call has num_inference_steps")


def _signature(kind: type) -> inspect.Signature:
    """That of a pipeline class's calls: the stock class's arguments, the model's own, ours. Steps default to None."""
    stock = _stock_parameters(kind).values()
    found = [p.replace(default=None) if p.name == "num_inference_steps" else p for p in stock]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for each in reversed(kind.__mro__)
        for name, default in vars(each).get("ARGUMENTS", {}).items()
    ]
    return inspect.Signature([*found, *own])


def _calls(kind: type) -> Callable[..., Any]:
    """`__call__` of a pipeline class, with the signature that its users are to see."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        return self._call(args, kwargs)

    vars(__call__)["__signature__"] = _signature(kind)
    __call__.__qualname__ = f"{kind.__qualname__}.__call__"
    __call__.__doc__ = kind.__doc__
    return __call__


if TYPE_CHECKING:
    Stock: Any = DiffusionPipeline  # whose methods and parts a pipeline's class has behind the mixin
else:
    Stock = object


class SpecEditMixin(Stock):
    """The part of a SpecEdit pipeline that knows no model; a class has it before its diffusers pipeline.

    A call takes the stock pipeline's arguments and those of ARGUMENTS:

    specedit: the config, None for the pipeline's default, False for the stock call.
    mask_image: a picture, white where to edit. region: a box (x0, y0, x1, y1) in pixels of the source, or in per cent
        as "10%,0,50%,100%", or a list of boxes; joins mask_image.
    mask_mode: what these do: "replace" the draft's region; or the draft looks for one, which they "limit" (what is in
        both is edited) or to which they "add".
    output_size: "working": results as the model gives them. "source": each picture at its own size, as it was given (a
        PIL picture of its mode, an array of its type, a Photo), equal to its source bit for bit outside the feathered
        region, whatever `preserve` is; images are a list then, of arrays with output_type="np". Modes without
        channels of 8 or 16 bits (palette, CMYK) become RGB, which is said.
    detail: of the region in a picture at its own size. "working": the model's result, brought up. "native": then a
        second pass over the region at the picture's own resolution, from a sigma on; `stats.native` tells what
        it did. Callbacks do not see its steps. A picture that is hardly larger than the working size has none.
    preview: look for the region alone; the images are the sources.

    What a model's class says:

    STEPS_OF_PLAIN: the stock pipeline's own default number of steps. RUNNERS: what its model can be run by.
    FLASH_RUNNERS: those that FlashEdit can be run by, whose layouts record attention to the text and have regions of
    it; () for none. CONFIG: the class of a call's options. ARGUMENTS: {name: default} of further arguments of its
    calls. TEXT: the stock arguments that give one guidance branch's text; the other branch's have the
    prefix `negative_`. TRUE_CFG: the stock argument that is the scale of true classifier-free guidance, "" where there
    is none. NEGATIVE: the negative prompt that the stock call has where none is given; None: it has no guidance then.
    KWARGS: the stock argument that is given to each attention processor, "" where there is none. UNSUPPORTED: flags of
    the transformer's config that have to be off. PIXELS: whether pictures may be arrays and tensors. PHOTOS: whether
    `_size` and `_pictures` take Photos (by `preprocess`), which a large picture does not become PIL for. TEXT_TO_IMAGE:
    whether the stock call runs without a picture. EDITED: how many of a call's pictures are edited, the first ones;
    None: all. SEES_SOURCE: whether the model has the edited picture as condition; where not, FlashEdit alone serves it.
    SEVERAL_GPUS: whether several may share the sequence of a call. DETAILS: what `detail` may be.
    `_size`, `_encode_text`, `_pictures`, `_model`: see there.
    """

    STEPS_OF_PLAIN: int
    RUNNERS: tuple[str, ...] = RUNNERS
    FLASH_RUNNERS: tuple[str, ...] = RUNNERS
    CONFIG: type[EditConfig] = SpecEditConfig
    ARGUMENTS: Mapping[str, Any] = {
        "specedit": None, "mask_image": None, "region": None, "mask_mode": "replace", "output_size": "working",
        "detail": "working", "preview": False,
    }  # fmt: skip
    TEXT: tuple[str, ...]
    TRUE_CFG: str = "true_cfg_scale"
    NEGATIVE: str | None = None
    KWARGS: str = ""
    UNSUPPORTED: tuple[str, ...] = ()
    PIXELS = True
    PHOTOS = False
    TEXT_TO_IMAGE = False
    EDITED: int | None = None
    SEES_SOURCE = True
    SEVERAL_GPUS = False
    DETAILS: tuple[str, ...] = DETAILS

    _specedit_default: EditConfig | None = None
    _specedit_stats: SpecEditStats | None = None
    _specedit_runner: StepRunner | None = None
    _specedit_guides: Ranks | None = None
    _runner_reason: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, DiffusionPipeline):
            cls.__call__ = _calls(cls)
            cls.STEPS_OF_PLAIN = _stock_parameters(cls)["num_inference_steps"].default

    # what a model's class gives

    def _size(self, call: Call) -> tuple[int, int]:
        """(height, width) of the output in pixels, whole blocks. May keep what it found out in `call`."""
        raise NotImplementedError

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> Text:
        """The text of one guidance branch for all images of the call. fields: the values of TEXT."""
        raise NotImplementedError

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """(the edited pictures at the output's size, [n, 3, H, W] in [-1, 1]; pixels of every picture that the model
        sees, the edited ones first: the former tensor itself where they have the output's size)."""
        raise NotImplementedError

    def _model(self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]) -> EditModel:
        """What the stages ask: of the fused forward where there is a runner, else of the transformer's own."""
        raise NotImplementedError

    def _shift(self, tokens: int, steps: int) -> float:
        """mu of the scheduler's resolution-dependent shift, for so many target tokens and steps."""
        get = self.scheduler.config.get
        return calculate_shift(
            tokens,
            get("base_image_seq_len", 256),
            get("max_image_seq_len", 4096),
            get("base_shift", 0.5),
            get("max_shift", 1.15),
        )

    def _latents(self, model: EditModel, clean: Tensor) -> Tensor:
        """What output_type="latent" gives of clean latents [B, C, H, W]: packed tokens [B, N, 4C]."""
        return pack(clean, model.codec.patch)

    # loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> DiffusionPipeline:
        """As any pipeline's. ValueError where a local folder lacks a component, a tokenizer's files or a tensor, or has
        weights that are not finite: the libraries draw such tensors at random, and go on. Tensors that the model does
        not have are left out, with a warning."""
        folder = Path(pretrained_model_name_or_path)
        given = [name for name in options if name in inspect.signature(cls.__init__).parameters]
        local = (folder / "model_index.json").is_file() and options.get("quantization_config") is None
        if local:
            _refuse(folder, check_folder(cls, folder, given))
        with load_notes() as notes:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        if local:
            _refuse(folder, notes + check_pipeline(pipe, folder, given))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> DiffusionPipeline:
        """As any pipeline's, but weights keep their dtypes where none is asked for."""
        if options.get("torch_dtype") is not None or options.get("dtype") is not None:
            return super().from_pipe(pipeline, **options)
        # the stock method ends with a cast of the shared modules, to fp32 where no dtype is given
        stays: Any = type(cls.__name__, (cls,), {"to": lambda self, *args, **kwargs: self})
        made = super(SpecEditMixin, stays).from_pipe(pipeline, **options)
        made.__class__ = cls
        return made

    def to_json_string(self) -> str:
        """The pipeline's config for a file, under the stock class's name: plain diffusers loads it too."""
        content = json.loads(super().to_json_string())
        content["_class_name"] = stock_class(type(self)).__name__
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    # one call

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(type(self).__call__).bind(self, *args, **kwargs)
        off = bound.arguments.get("specedit") is False
        if off or (self.TEXT_TO_IMAGE and bound.arguments.get("image") is None):
            self._check_off(bound.arguments)
            stock = {k: v for k, v in kwargs.items() if k not in self._own_arguments()}
            if stock.get("num_inference_steps", 0) is None:
                del stock["num_inference_steps"]
            return super().__call__(*args, **stock)
        bound.apply_defaults()
        call = Call(**ABSENT | bound.arguments)
        call.true_cfg_scale = bound.arguments.get(self.TRUE_CFG, 1.0)
        if self.TRUE_CFG:
            _number(self.TRUE_CFG, call.true_cfg_scale, float("-inf"), float("inf"))
        with _one_call(unwrapped(self.transformer)), one_walk():
            return self._specedit(call)

    def _specedit(self, call: Call) -> Any:
        """A call with SpecEdit, its arguments complete."""
        config, counts = self._resolve(call)
        self._take_pictures(call)
        call.height, call.width = self._size(call)
        self._check_stock_inputs(call)
        attention_kwargs: dict[str, Any] = {}
        if self.KWARGS:
            attention_kwargs = dict(getattr(call, self.KWARGS) or {})
            setattr(self, f"_{self.KWARGS}", attention_kwargs)
        self._guidance_scale = call.guidance_scale
        self._current_timestep: Tensor | None = None
        self._interrupt = False
        runner = self._runner(config)
        device = self._device_of(runner)
        clock = StageClock(device)
        texts = self._texts(call, device)
        pixels, references = self._pictures(call, device)
        guidance = self._guidance(call, device, texts["positive"].embeds.shape[0])
        model = self._model(runner, guidance, attention_kwargs)
        model.ranks, model.guides = sequence_ranks(unwrapped(self.transformer)), self._specedit_guides
        return self._edit(call, config, counts, model, texts, pixels, references, clock, runner)

    @classmethod
    def _own_arguments(cls) -> set[str]:
        return {name for each in cls.__mro__ for name in vars(each).get("ARGUMENTS", {})}

    def _check_off(self, arguments: Mapping[str, Any]) -> None:
        """ValueError where an argument of ours is given that the stock call has no use for."""
        defaults = {k: v for each in type(self).__mro__ for k, v in vars(each).get("ARGUMENTS", {}).items()}
        for name in sorted(self._own_arguments() - {"specedit"}):
            value, default = arguments.get(name, defaults[name]), defaults[name]
            if value is not default and not (isinstance(value, str) and value == default):
                raise ValueError(f"{name}: expected {default!r} where SpecEdit is off or no image is given")

    def _resolve(self, call: Call) -> tuple[EditConfig, tuple[int, int, int]]:
        """The config of a call and its (coarse, mixed, full) steps, checked against each other and the pipeline."""
        check_served(type(self))
        config = call.specedit
        if config is None or config is True:
            config = self._specedit_default or self.CONFIG()
        if not isinstance(config, self.CONFIG):
            expected = f"{self.CONFIG.__name__}, None or a bool"
            raise TypeError(f"specedit: expected {expected}, got {type(config).__name__}")
        config = config.resolved(self._guides(call))
        if call.output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected 'pil', 'np', 'pt' or 'latent', got {call.output_type!r}")
        if config.preserve == "pixels" and call.output_type == "latent":
            raise ValueError("output_type: expected pixels with preserve='pixels', got 'latent'")
        for name, allowed in (("output_size", OUTPUT_SIZES), ("mask_mode", MASK_MODES), ("preview", (False, True))):
            if getattr(call, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(call, name)!r}")
        if call.detail not in self.DETAILS:
            raise ValueError(
                f"detail: expected one of {list(self.DETAILS)} of {type(self).__name__}, got {call.detail!r}"
            )
        if call.detail == "native" and call.output_size != "source":
            raise ValueError("detail: expected 'working' without output_size='source', got 'native'")
        if call.output_size == "source" and call.output_type not in ("pil", "np"):
            raise ValueError(f"output_type: expected 'pil' or 'np' with output_size='source', got {call.output_type!r}")
        call.boxes = [] if call.region is None else boxes_of(call.region)
        masked = call.mask_image is not None or bool(call.boxes)
        if call.mask_mode != "replace" and not masked:
            raise ValueError(f"mask_mode: expected 'replace' without mask_image and region, got {call.mask_mode!r}")
        call.needs_draft = not masked or call.mask_mode != "replace"
        check_supported(self, self.UNSUPPORTED, self.SEVERAL_GPUS)
        steps = call.num_inference_steps
        if call.sigmas is not None:
            check_sigmas(call.sigmas)
            steps = len(call.sigmas)
        usual = config.step_counts()
        try:
            counts = config.step_counts(steps, call.sigmas is not None)
        except (ValueError, TypeError) as error:
            if call.sigmas is None:
                raise
            raise ValueError(f"sigmas: {steps} of them were given: {error}") from None
        if sum(counts) != sum(usual):
            given = "sigmas" if call.sigmas is not None else "num_inference_steps"
            self._say_once(f"{given}: the config's {sum(usual)} steps are scaled to {steps}, which was given")
        draft = config.draft_of_coarse_steps
        if call.needs_draft and draft and counts[0] == 0:
            raise ValueError(f"draft: {draft!r} needs at least one coarse step, or a mask_image; got stages {counts}")
        return config, counts

    def _take_pictures(self, call: Call) -> None:
        """What the model sees in place of what was given, which `call` keeps with the pictures' sizes: `given`,
        `photos`, of the edited ones, and `sizes`."""
        call.given = call.photos = None
        if call.output_size == "source":
            several = isinstance(call.image, list) or getattr(call.image, "ndim", 0) == 4
            call.given, call.photos = photos_of(call.image)
            for given, photo in zip(call.given, call.photos):
                for note in () if isinstance(given, Photo) else photo.notes:
                    self._say_once(f"image: {note}")
            call.image = list(call.photos) if self.PHOTOS else seen(call.photos)
            call.image = call.image if several else call.image[0]
        else:
            call.image = seen(call.image)
        check_pictures(call.image, self.PIXELS)
        call.image = in_fp32(call.image)
        call.sizes = picture_sizes(call.image)[: self.EDITED]

    def working_size(self, image: Any, **arguments: Any) -> tuple[int, int]:
        """(height, width) that a call with these arguments would compute at. Nothing is computed."""
        bound = inspect.signature(type(self).__call__).bind(self, image=image, **arguments)
        bound.apply_defaults()
        call = Call(**ABSENT | bound.arguments)
        self._take_pictures(call)
        return self._size(call)

    def _user_mask(self, call: Call, grid: Grid, batch: int) -> Tensor | None:
        """The tokens that mask_image and region select together, bool [B, N]; None where neither is given."""
        found = []
        if call.mask_image is not None:
            found.append(per_image(token_mask(call.mask_image, grid), "mask_image", batch))
        if call.boxes:
            tokens = torch.stack([box_tokens(call.boxes, size, grid) for size in call.sizes])
            found.append(per_image(tokens, "region", batch))
        return found[0] | found[-1] if found else None

    def _check_stock_inputs(self, call: Call) -> None:
        """The stock pipeline's own checks, of the arguments that both have."""
        names = inspect.signature(self.check_inputs).parameters
        self.check_inputs(**{name: getattr(call, name) for name in names if hasattr(call, name)})

    def _say_once(self, text: str) -> None:
        """A warning, once a pipeline."""
        said = self.__dict__.setdefault("_specedit_said", set())
        if text not in said:
            said.add(text)
            logger.warning("%s", text)

    def _runner(self, config: EditConfig) -> StepRunner | None:
        """The runner of the config, None for "eager": where that is asked for, or no other is possible."""
        name, self._runner_reason, found = self._chosen(config.runner)
        if name == "eager":
            return None
        if self._specedit_runner is not None and self._specedit_runner.name != name:
            self._free_runner()  # it brings weights back to where they were
            found = None
        signature = (found or inspect_weights(name, self.transformer, self.vae))[1]
        kept = self._specedit_runner
        arranged = self._moving() or (kept is not None and kept.watches(signature))
        undo = None if arranged else self._arrange()
        if undo:
            signature = inspect_weights(name, self.transformer, self.vae)[1]
        if self._specedit_runner is None:
            self._specedit_runner = StepRunner(name)
        self._specedit_runner.moving = self._moving()
        if self._specedit_runner.moving:
            self._specedit_runner.begin_moving()  # it watches what it brings in
        else:
            self._specedit_runner.watch(signature)
        if undo:
            self._specedit_runner.undoes(undo)
        return self._specedit_runner

    def _chosen(self, asked: str) -> tuple[str, str, tuple[str, list[Any]] | None]:
        """(the runner for the one asked for, why it is no other or no faster one, what `inspect_weights` found of it).

        One that is not possible becomes what "auto" stands for, with a warning.
        """
        if asked == "eager":
            return asked, "", None
        if asked == "auto":
            return self._fastest_runner()
        found = None
        reason = f"{type(self).__name__} has no other"
        if asked in self.RUNNERS:
            found = inspect_weights(asked, self.transformer, self.vae)
            reason = found[0]
        if not reason:
            return asked, "", found
        name, _, found = self._fastest_runner()
        how = "eagerly" if name == "eager" else f"with runner={name!r}"
        self._say_once(f"runner={asked!r}: steps run {how}: {reason}")
        return name, reason, found

    def _fp8(self, config: EditConfig, runner: StepRunner | None) -> fp8.Fp8Linears | None:
        """The runner's weights in fp8, or None: where no one asks for them, or they are not possible."""
        if config.precision == "auto":
            asked = runner is not None and fp8.asked_by(unwrapped(self.transformer))
            possible = asked and not fp8.reason_against(self._device_of(runner))
            return runner.linears if runner is not None and possible else None
        reason = "the transformer's own forward is called (runner='eager')"
        if runner is not None:
            reason = fp8.reason_against(self._device_of(runner))
        if runner is None or reason:
            self._say_once(f"precision='fp8': layers compute as they are: {reason}")
            return None
        return runner.linears

    def _moving(self) -> bool:
        """Whether a hook brings the transformer or the autoencoder in as a whole (model offloading)."""
        return any(moved_to(unwrapped(part)) is not None for part in (self.transformer, self.vae))

    def fastest_runner(self) -> tuple[str, str]:
        """(the runner that "auto" stands for, why no faster one), by what was measured (docs/benchmarks.md)."""
        return self._fastest_runner()[:2]

    def _fastest_runner(self) -> tuple[str, str, tuple[str, list[Any]] | None]:
        """`fastest_runner`, and what `inspect_weights` found of it, which takes long enough to be done once."""
        if "graph" not in self.RUNNERS:
            return "eager", f"{type(self).__name__} has no other", None
        # the pipeline's own answer looks for hooks in every module
        if next(self.transformer.parameters()).device.type != "cuda" and execution_device(self).type != "cuda":
            return "eager", "graphs need a CUDA device", None
        found = inspect_weights("graph", self.transformer, self.vae)
        reason = found[0]
        if not reason:
            return "graph", "", found
        # without graphs the host's launches bound a step, and only products of quantised weights gain by fewer of them
        quantised = any(type(x) is not torch.nn.Parameter for x in self.transformer.parameters())
        if quantised:
            found = inspect_weights("fused", self.transformer, self.vae)
            if not found[0]:
                return "fused", reason, found
        return "eager", reason, None

    def _arrange(self) -> Callable[[], None] | None:
        """Bring weights into the order in memory that a runner likes best. What undoes it; None: none was moved."""
        return None

    def _device_of(self, runner: StepRunner | None) -> torch.device:
        """Where a call computes: without offloading where the transformer is. The pipeline's own answer looks for hooks
        in every module, which takes longer than a launch of any stage."""
        known = runner is not None and not runner.moving
        return next(self.transformer.parameters()).device if known else execution_device(self)

    def _release(self) -> None:
        """Give up all that calls keep, and undo what they did to the modules: `disable_specedit`."""
        self._free_runner()

    def _free_runner(self) -> None:
        if self._specedit_runner is not None:
            self._specedit_runner.close()
            self._specedit_runner = None

    def _prompts(self, call: Call) -> int:
        """How many prompts a call has."""
        if call.prompt is not None:
            return 1 if isinstance(call.prompt, str) else len(call.prompt)
        return call.prompt_embeds.shape[0]

    def _negative_fields(self, call: Call) -> dict[str, Any]:
        fields = self._text_fields(call, "negative_")
        return fields if self._given(fields) else fields | {"prompt": self.NEGATIVE}

    def _guides(self, call: Call) -> bool:
        """Whether a call has true guidance."""
        return call.true_cfg_scale > 1 and self._given(self._negative_fields(call))

    def _texts(self, call: Call, device: torch.device) -> dict[str, Any]:
        """The texts of a run: `positive`, and `negative` where there is true guidance. Names are Run's fields."""
        fields, others = self._text_fields(call, ""), self._negative_fields(call)
        if not self._guides(call):
            if call.true_cfg_scale > 1 and call.true_cfg_scale != self._default_of(self.TRUE_CFG):
                self._say_once(
                    f"{self.TRUE_CFG} {call.true_cfg_scale:g} is without effect: no negative_prompt is given"
                )
            return {"positive": self._encode_text(call, device, **fields), "negative": None}
        branches = fields, self._for_each_prompt(call, others, "negative_prompt")
        guides = self._specedit_guides
        if guides is not None and all(each["prompt"] is not None for each in branches):
            # the text encoder has read a branch's prompt on its own rank
            texts = texts_of_each(self._encode_text(call, device, **branches[guides.rank]), device, guides)
        else:
            texts = [self._encode_text(call, device, **each) for each in branches]
        return dict(zip(("positive", "negative"), texts))

    @classmethod
    def _default_of(cls, name: str) -> Any:
        return inspect.signature(cls.__call__).parameters[name].default

    def _text_fields(self, call: Call, prefix: str) -> dict[str, Any]:
        return {name: getattr(call, prefix + name, None) for name in self.TEXT}

    @staticmethod
    def _given(fields: Mapping[str, Any]) -> bool:
        """Whether a branch's text is there: a prompt, or all of its embeddings."""
        needed = [value for name, value in fields.items() if name.endswith("embeds")]
        return fields["prompt"] is not None or (bool(needed) and all(value is not None for value in needed))

    def _for_each_prompt(self, call: Call, fields: dict[str, Any], name: str) -> dict[str, Any]:
        """Texts of a further branch, one for each prompt: one alone serves all. ValueError for any other number."""
        prompts, found = self._prompts(call), {}
        for key, value in fields.items():
            if isinstance(value, str):
                value = [value]
            if value is not None and len(value) == 1 and prompts > 1:
                each = [1] * (value.dim() - 1) if isinstance(value, Tensor) else []
                value = value.repeat(prompts, *each) if isinstance(value, Tensor) else value * prompts
            if value is not None and len(value) != prompts:
                where = name if not isinstance(value, Tensor) else f"{name.removesuffix('prompt')}{key}"
                expected = "1" if prompts == 1 else f"1 or {prompts}, as many as prompts"
                raise ValueError(f"{where}: expected {expected}, got {len(value)}")
            found[key] = value
        return found

    def _guidance(self, call: Call, device: torch.device, batch: int) -> Tensor | None:
        """The distilled guidance scale of each image, fp32 [B]; None for a model without one."""
        if not self.transformer.config.get("guidance_embeds", False):
            return None
        if call.guidance_scale is None:
            raise ValueError("guidance_scale: expected a number for a guidance-distilled model, got None")
        return torch.full([1], call.guidance_scale, device=device, dtype=torch.float32).expand(batch)

    def _edit(
        self,
        call: Call,
        config: EditConfig,
        counts: tuple[int, int, int],
        model: EditModel,
        texts: dict[str, Any],
        pixels: Tensor,
        references: Sequence[Tensor],
        clock: StageClock,
        runner: StepRunner | None,
    ) -> SpecEditPipelineOutput | tuple:
        """A call from the point where texts and pictures are ready; pixels, references: of `_pictures`."""
        captures = runner.captures if runner else 0
        model.fp8_cache = config.kv_cache_dtype == "fp8"
        batch, dtype = texts["positive"].embeds.shape[0], texts["positive"].embeds.dtype
        device, generator, callback = pixels.device, call.generator, call.callback_on_step_end
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected {batch} generators, one for each image, got {len(generator)}")

        def encode(at: Tensor) -> Tensor:
            # one by one where each has a generator of its own, as the stock pipelines do
            parts = at.to(dtype).split(1 if isinstance(generator, list) else len(at))
            return per_image(model.agreed(torch.cat([model.encode(part) for part in parts])), "image", batch)

        source = encode(pixels)
        seen = tuple(Reference(p, source if p is pixels else encode(p), model.codec.patch) for p in references)
        grid = tuple(side // model.codec.token for side in pixels.shape[-2:])
        noise = model.agreed(self._start_noise(call.latents, source.shape, grid, generator, device, dtype))
        clock.mark("encode")

        # the plain schedule of this size and step count; the stages share it out
        sigmas = config.sigmas(counts) if call.sigmas is None else call.sigmas
        sigmas = self._plain_sigmas(sum(counts), math.prod(grid), sigmas)
        nfe = sum(counts)
        self._num_timesteps = nfe
        bar = self.progress_bar(total=nfe + (config.separate_steps(counts) if call.needs_draft else 0))

        def on_step(index: int, timestep: Tensor, tokens: Tensor) -> Tensor:
            self._current_timestep = timestep
            if callback is not None:
                self._show_schedule(run.timesteps, index)
                tensors = {"latents": tokens, "prompt_embeds": run.positive.embeds}
                wanted = {k: tensors[k] for k in call.callback_on_step_end_tensor_inputs}
                with walking_anew():
                    changed = callback(self, index, timestep, wanted) or {}
                tokens = changed.pop("latents", tokens)
                run.positive.embeds = changed.pop("prompt_embeds", run.positive.embeds)
            bar.update()
            return tokens

        run = Run(
            model=model,
            config=config,
            grid=grid,
            source=source,
            pixels=pixels,
            references=seen,
            noise=noise,
            **texts,
            true_cfg_scale=call.true_cfg_scale,
            encode=encode,
            generator=generator,
            on_start=lambda timestep: setattr(self, "_current_timestep", timestep),
            on_step=on_step,
            on_draft_step=bar.update,
            interrupted=lambda: self._interrupt,
            clock=clock,
        )
        run.stats.config = config
        user_mask, run.preview = self._user_mask(call, grid, batch), call.preview
        if call.needs_draft and user_mask is not None:
            run.joined, user_mask = (call.mask_mode, user_mask.to(device)), None

        wrap_processors(self.transformer)
        linears = self._fp8(config, runner)
        in_fp8 = functools.partial(fp8.active, linears, every=config.precision == "fp8")
        with bar, in_fp8():
            clean, selection, scores = self._run(run, counts, sigmas, user_mask)
        if linears is not None:
            run.stats.precision, run.stats.fp8_bytes = config.precision, linears.bytes
            for reason, layers in linears.refused.items() if config.precision == "fp8" else ():
                self._say_once(f"precision='fp8': {len(layers)} layers compute as they are: {reason}")
        # counted here, where the device has work: it would wait for them before its steps
        run.stats.plain_step_flops = run.flops([run.plain_tokens] * batch)
        run.stats.plain_tokens = run.plain_tokens
        run.stats.nfe = run.step
        self._current_timestep = None

        shown = replace(selection, changed=(False,) * batch) if call.preview else selection
        if call.output_type == "latent":
            images: Any = self._latents(model, clean)
        elif call.photos is not None:
            with in_fp8():
                images = self._at_source_size(run, clean, shown, call, sum(counts))
        else:
            images = self._decode(run, clean, shown, call.output_type)
            clock.mark("decode")
        if runner is None or runner.moving:  # no other one runs modules that are offloaded
            self.maybe_free_model_hooks()
        run.stats.seconds = clock.seconds()
        run.stats.runner_reason = self._runner_reason
        if runner:
            run.stats.runner, run.stats.graph_bytes = runner.mode, runner.graph_bytes
            run.stats.runner_reason = run.stats.runner_reason or runner.failure
            run.stats.captures = runner.captures - captures
        self._specedit_stats = run.stats
        if not call.return_dict:
            return (images,)
        mask = selection.edited.reshape(batch, *grid)
        scores = None if scores is None else scores.reshape(batch, *grid)
        return SpecEditPipelineOutput(images=images, mask=mask, scores=scores, stats=run.stats)

    def _run(
        self, run: Run, counts: tuple[int, int, int], sigmas: list[float], user_mask: Tensor | None
    ) -> tuple[Tensor, Selection, Tensor | None]:
        """`run_stages` for this pipeline's schedule; a method with another order of stages has its own."""
        draft_sigmas = None
        if user_mask is None and run.config.draft == "quarter":
            draft_sigmas = self._plain_sigmas(run.config.draft_steps, math.prod(draft_grid(run.grid)), None)
        return run_stages(run, counts, sigmas, user_mask, draft_sigmas, self._verify_select)

    def _verify_select(self, run: Run, draft: Draft, stage: str) -> tuple[Tensor, Selection]:
        """Score a draft and select by it; what studies selections has its own."""
        return verify_select(run, draft, stage)

    def _start_noise(self, latents, shape, grid: Grid, generator, device, dtype) -> Tensor:
        """White fine noise [B, C, H, W] in fp32: drawn as the plain pipeline draws it, or unpacked from `latents`."""
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype).float()
        patch = shape[-2] // grid[0]
        expected = (shape[0], math.prod(grid), shape[1] * patch * patch)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected {expected}, got {tuple(latents.shape)}")
        return unpack(latents.to(device=device, dtype=dtype), grid, patch).float()

    def _plain_sigmas(self, steps: int, tokens: int, given: list[float] | None) -> list[float]:
        """Sigmas of the plain pipeline for that many steps and target tokens, with the final 0. given: the call's."""
        config, key = self.scheduler.config, (steps, tokens, None if given is None else tuple(given))
        found = self.__dict__.setdefault("_specedit_sigmas", OrderedDict())
        if key in found and found[key][0] is config:  # another one has another object, and it is kept here
            return list(found[key][1])
        # a copy: the pipeline's own scheduler keeps its state
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        unshifted = np.linspace(1.0, 1 / steps, steps) if given is None else given
        mu = self._shift(tokens, steps)
        with np.errstate(invalid="ignore"):
            retrieve_timesteps(scheduler, steps, "cpu", sigmas=unshifted, mu=mu)
        sigmas = scheduler.sigmas.tolist()
        # the one step of a schedule with a terminal sigma is 0 / 0 to the scheduler; it begins with noise alone
        sigmas = [1.0, 0.0] if len(sigmas) == 2 and math.isnan(sigmas[0]) else sigmas
        found[key] = config, tuple(sigmas)
        if len(found) > SCHEDULES:
            found.popitem(last=False)
        return sigmas

    def _show_schedule(self, timesteps: Sequence[float], index: int) -> None:
        """Give the pipeline's scheduler the run's own timesteps and sigmas, as the stock call leaves them there, for
        callbacks that read it. Steps of a call take none of this."""
        scheduler = self.scheduler
        scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        scheduler.sigmas = torch.cat([scheduler.timesteps / 1000, torch.zeros(1, dtype=torch.float32)])
        scheduler.num_inference_steps = len(timesteps)
        # the stock loop calls back after the step has been taken
        scheduler._step_index = index + 1

    def _decode(self, run: Run, clean: Tensor, selection: Selection, output_type: str):
        """Pixels in the output type; where the source's own are kept, they are kept exactly."""
        keep = run.config.preserve == "pixels"
        untouched = [not c for c in selection.changed]
        pixels = per_image(run.pixels.float(), "image", run.batch)
        decoded = pixels if all(untouched) else run.model.decode(clean)
        if not keep and not any(untouched):
            return postprocess(self.image_processor, decoded, output_type)
        alpha = torch.ones_like(pixels[:, :1])
        if keep:
            pixel = pixels.shape[-2] // run.grid[0]
            alpha = stages.edit_alpha(selection.edited, run.grid, pixel, run.config.feather)
        if any(untouched):
            alpha = torch.where(stages.of_samples(selection.changed, run.device), alpha, 0.0)
        # 8-bit levels, fp32: that is what the pictures hold, and x / 255 * 2 - 1 brings no level past its neighbour
        source = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round()
        edit = (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255)
        if output_type == "pil":
            edit = edit.round()
        blend = torch.where(alpha == 0, source, torch.where(alpha == 1, edit, alpha * edit + (1 - alpha) * source))
        if output_type == "pil":
            return _pictures_of(blend)
        blend = blend / 255
        return blend if output_type == "pt" else blend.permute(0, 2, 3, 1).cpu().numpy()

    def _at_source_size(self, run: Run, clean: Tensor, selection: Selection, call: Call, steps: int) -> list[Any]:
        """Each picture at its source's size, as it was given; what was found of its drift goes into the stats.

        steps: of the schedule.
        """
        config, changed = run.config, selection.changed
        pixels = per_image(run.pixels, "image", run.batch)
        source, decoded = (
            # an autoencoder's alpha is left out: the source has its own, or none
            (x[:, :3].float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            for x in (pixels, run.model.decode(clean) if any(changed) else pixels)
        )
        regions = selection.edited.reshape(run.batch, *run.grid).cpu().numpy()
        run.clock.mark("decode")
        images, times = [], run.batch // len(call.photos[: self.EDITED])
        for i in range(run.batch):
            given, photo = call.given[i // times], call.photos[i // times]
            if changed[i]:
                array, drift = put_back(
                    photo, source[i], decoded[i], regions[i], config.feather, config.may_drift,
                    compositing_device(run.device),
                )  # fmt: skip
            else:
                array, drift = photo.array.copy(), None
            run.stats.drift.append(drift)
            if call.detail == "native":
                run.clock.mark("composite")
                if changed[i]:
                    found = refine(run, i, photo, array, regions[i], lambda n: self._plain_sigmas(steps, n, None))
                run.stats.native.append(found if changed[i] else None)
                run.clock.mark("native")
            images.append(as_given(given, photo, array, call.output_type))
        run.clock.mark("composite")
        return images


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    """ValueError for the first of a folder's problems; a warning for those that are harmless."""
    harmful = [text for text in problems if not text.endswith(HARMLESS)]
    for text in problems:
        if text.endswith(HARMLESS):
            logger.warning("%s: %s", folder, text)
    if harmful:
        more = f" (and {len(harmful) - 1} more)" if len(harmful) > 1 else ""
        raise ValueError(f"{harmful[0]}{more}")


def seen(image: Any) -> Any:
    """Pictures for a model in place of Photos; what else there is stays as it is."""
    if isinstance(image, list):
        return [seen(picture) for picture in image]
    return image.rgb if isinstance(image, Photo) else image


def check_pictures(image: Any, arrays: bool) -> None:
    """TypeError or ValueError where `image` is no picture and no list of pictures. arrays: whether they may be arrays
    and tensors."""
    kinds = (PIL.Image.Image, Photo, np.ndarray, Tensor) if arrays else (PIL.Image.Image, Photo)
    names = "a PIL image" + (", an array or a tensor" if arrays else "")
    if isinstance(image, kinds):
        return
    if not isinstance(image, list):
        raise TypeError(f"image: expected {names} or a list of them, got {type(image).__name__}")
    if not image:
        raise ValueError("image: expected at least one picture, got an empty list")
    for i, picture in enumerate(image):
        if not isinstance(picture, kinds):
            raise TypeError(f"image: expected {names} in the list, got {type(picture).__name__} at {i}")


def in_fp32(image: PipelineImageInput) -> PipelineImageInput:
    """Pictures with floating-point arrays and tensors in fp32: interpolation has no kernel for half ones on a CPU."""
    if isinstance(image, list):
        return [in_fp32(picture) for picture in image]
    if isinstance(image, Tensor):
        return image.float() if image.is_floating_point() else image
    return image.astype(np.float32) if isinstance(image, np.ndarray) and image.dtype.kind == "f" else image


def picture_size(image: PipelineImageInput) -> tuple[int, int]:
    """(height, width) of a picture or the first of several: PIL, Photo, array [.., H, W, C] or [H, W], tensor
    [.., H, W]."""
    first = image[0] if isinstance(image, list) else image
    if isinstance(first, (PIL.Image.Image, Photo)):
        return first.size[1], first.size[0]
    at = first.ndim - 3 if isinstance(first, np.ndarray) and first.ndim > 2 else first.ndim - 2
    if at < 0:
        raise ValueError(f"image: expected at least two dimensions, got {tuple(first.shape)}")
    height, width = (int(side) for side in first.shape[at : at + 2])
    if height < 1 or width < 1:
        raise ValueError(f"image: expected at least one pixel, got {tuple(first.shape)}")
    return height, width


def picture_sizes(image: PipelineImageInput) -> list[tuple[int, int]]:
    """(width, height) of every picture of a call; arrays and tensors may hold several."""
    found = []
    for picture in image if isinstance(image, list) else [image]:
        height, width = picture_size(picture)
        found += [(width, height)] * (picture.shape[0] if getattr(picture, "ndim", 0) == 4 else 1)
    return found


def check_sigmas(sigmas: Sequence[float]) -> None:
    """ValueError where they do not fall strictly within (0, 1]."""
    if len(sigmas) == 0:
        raise ValueError("sigmas: expected at least one, got none")
    found = [float(s) for s in sigmas]
    if any(not 0 < s <= 1 for s in found) or any(a <= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"sigmas: expected strictly decreasing numbers in (0, 1], got {found}")


def preprocess(
    processor: VaeImageProcessor, image: PipelineImageInput, height: int, width: int, device: torch.device
) -> Tensor:
    """processor.preprocess(image, height, width) on a device; of Photos as of their `rgb`."""
    pictures = image if isinstance(image, list) else [image]
    if device.type == "cpu" or not goes_as_bytes(processor, pictures):
        return processor.preprocess(seen(image), height, width).to(device)
    rows, columns = processor.get_default_height_width(pictures[0], height, width)
    if getattr(pictures[0], "mode", None) == "RGBA":  # Pillow weighs colours by alpha
        pictures = [processor.resize(picture, rows, columns) for picture in pictures]
    return pixels_of(pictures, device, (columns, rows))


# The methods of VaeImageProcessor that `pixels_of` stands for.
_OF_PIXELS = (
    "preprocess", "get_default_height_width", "resize", "convert_to_rgb", "pil_to_numpy", "numpy_to_pt", "normalize",
)  # fmt: skip


def goes_as_bytes(processor: VaeImageProcessor, pictures: Sequence[Any]) -> bool:
    """Whether what a processor makes of pictures is what `pixels_of` makes of them: RGB ones, or RGBA ones as such."""
    config, kind = processor.config, type(processor)
    usual = config.do_resize and config.do_normalize and not (config.do_binarize or config.do_convert_grayscale)
    usual = usual and config.resample == "lanczos" and not config.reducing_gap
    usual = usual and all(getattr(kind, name) is getattr(VaeImageProcessor, name) for name in _OF_PIXELS)
    modes = {"RGB" if isinstance(p, Photo) else getattr(p, "mode", None) for p in pictures}
    return usual and (modes == {"RGB"} or (modes == {"RGBA"} and not config.do_convert_rgb))


def _pictures_of(levels: Tensor) -> list[PIL.Image.Image]:
    """Pictures of levels fp32 [n, 3 or 4, H, W] in [0, 255]. They leave the device as bytes."""
    return [PIL.Image.fromarray(x) for x in levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]


# The methods of VaeImageProcessor that `postprocess` stands for.
_OF_PICTURES = ("postprocess", "pt_to_numpy", "numpy_to_pil")


def postprocess(processor: VaeImageProcessor, pixels: Tensor, output_type: str) -> Any:
    """processor.postprocess(pixels, output_type), to the last bit; pictures are made on the device: the host takes
    longer for it than the device for a step."""
    kind = type(processor)
    usual = all(getattr(kind, name) is getattr(VaeImageProcessor, name) for name in _OF_PICTURES)
    if output_type != "pil" or pixels.shape[1] not in (3, 4) or not usual:
        return processor.postprocess(pixels, output_type=output_type)
    return _pictures_of(processor.postprocess(pixels, output_type="pt").float() * 255)


def per_image(x: Tensor, name: str, batch: int) -> Tensor:
    """Repeat pictures so that each of `batch` outputs has its own: [n, ...] -> [batch, ...], picture-major."""
    if batch % x.shape[0]:
        raise ValueError(f"{name}: expected 1 or as many pictures as prompts, got {x.shape[0]} for {batch} images")
    return x.repeat_interleave(batch // x.shape[0], dim=0)


# Of a cache of steps.
_INSTEAD = "to save steps take a smaller preset and kv_refresh of SpecEditConfig"


def check_served(kind: type[SpecEditMixin]) -> None:
    """TypeError where SpecEdit's own stages do not serve the models of a pipeline class."""
    if issubclass(kind.CONFIG, SpecEditConfig) and not kind.SEES_SOURCE:
        name = stock_class(kind).__name__
        raise TypeError(f"pipe: SpecEdit needs a model that sees its source, got {name}, which FlashEdit{name} serves")


def check_supported(pipe: DiffusionPipeline, flags: Sequence[str], several_gpus: bool = False) -> None:
    """TypeError or ValueError where a pipeline has what no run can serve. flags: of its transformer, to be off.
    several_gpus: whether its runs may share a sequence."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(
            "scheduler: SpecEdit supports FlowMatchEulerDiscreteScheduler, whose step is one evaluation and depends on"
            f" no earlier one (the sequence changes between steps), got {type(scheduler).__name__}"
        )
    for flag in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(flag, False):
            raise ValueError(f"scheduler: expected {flag}=False, got True")
    transformer = pipe.transformer
    for flag in flags:
        if transformer.config.get(flag, False):
            raise ValueError(f"transformer: expected {flag}=False, got True")
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "transformer: expected no cache (call disable_cache()): its tensors keep one length, ours change;"
            f" {_INSTEAD}"
        )
    caches = cache_hooks(transformer)
    if caches:
        names = ", ".join(caches)
        raise ValueError(
            f"transformer: expected no cache (its tensors keep one length, ours change), got {names}; {_INSTEAD}"
        )
    if context_parallel(transformer) is not None and not several_gpus:
        raise ValueError(
            "transformer: expected no context parallelism (enable_parallelism): this model's edits run on one GPU"
        )
    sequence_ranks(transformer)
