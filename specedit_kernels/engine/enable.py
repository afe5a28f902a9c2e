# SPDX-License-Identifier: Apache-2.0
"""Turning a loaded diffusers pipeline into its SpecEdit one, and back."""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from diffusers import DiffusionPipeline

from . import registry
from .attention import unwrap_processors, wrap_processors
from .config import SpecEditConfig
from .output import SpecEditStats
from .parallel import Ranks
from .pipeline import SpecEditMixin, check_served, check_supported, stock_class


class SpecEditHandle:
    """What `enable_specedit` gives: the pipeline, its default config, and the figures of the last run."""

    def __init__(self, pipe: SpecEditMixin, config: SpecEditConfig):
        self.pipe = pipe
        self.config = config

    def stats(self) -> SpecEditStats | None:
        """Figures of the pipeline's last SpecEdit run; None before the first, and when it is disabled."""
        return getattr(self.pipe, "_specedit_stats", None)

    def disable(self) -> None:
        """The same as `disable_specedit(pipe)`."""
        disable_specedit(self.pipe)


def enable_specedit(pipe: DiffusionPipeline, config: SpecEditConfig | None = None) -> SpecEditHandle:
    """Turn a loaded pipeline into its SpecEdit one, in place; calls with an image use `config` from then on.

    The object, its components and weights stay: its class changes, and its attention processors are wrapped. For the
    pipelines of `supported_models()` and subclasses of them; raises TypeError for any other.
    """
    if config is None:
        config = SpecEditConfig()
    if not isinstance(config, SpecEditConfig):
        raise TypeError(f"config: expected SpecEditConfig, got {type(config).__name__}")
    kind: Any = type(pipe)
    if not isinstance(pipe, SpecEditMixin):
        ours = registry.pipeline_of(kind)
        if ours is None:
            known: dict[type, Any] = registry.pipelines()
            names = ", ".join(plain.__name__ for plain, made in known.items() if made.SEES_SOURCE)
            raise TypeError(f"pipe: SpecEdit supports {names}, got {kind.__name__}")
        kind = ours if kind in registry.pipelines() else _subclass(ours, kind)
    elif not issubclass(pipe.CONFIG, SpecEditConfig):
        raise TypeError(f"pipe: expected a pipeline without FlashEdit, got {type(pipe).__name__}")
    check_served(kind)
    check_supported(pipe, kind.UNSUPPORTED, kind.SEVERAL_GPUS)
    wrap_processors(pipe.transformer)
    pipe.__class__ = kind
    pipe._specedit_default = config
    pipe._specedit_stats = None
    return SpecEditHandle(pipe, config)


@functools.cache
def _subclass(ours: type, kind: type) -> type:
    """The SpecEdit class of a user's subclass of a stock pipeline: its own methods stay, the call is ours."""
    return type(f"SpecEdit{kind.__name__}", (ours, kind), {"__doc__": ours.__doc__, "__module__": kind.__module__})


def disable_specedit(pipe: DiffusionPipeline) -> None:
    """Undo `enable_specedit`: the class before, and its own attention processors, the very objects.

    A pipeline without SpecEdit stays as it is. One made by a SpecEdit or FlashEdit class becomes an object of the stock
    class.
    """
    if not isinstance(pipe, SpecEditMixin):
        return
    unwrap_processors(pipe.transformer)
    pipe._release()
    for name in [name for name in vars(pipe) if name.startswith("_specedit_")]:
        del pipe.__dict__[name]
    pipe.__class__ = stock_class(type(pipe))


def enable_guidance_parallelism(pipe: DiffusionPipeline, group: Any = None) -> None:
    """Run the two branches of true guidance on two ranks: from then on each rank's calls compute one of them.

    pipe: a pipeline with SpecEdit. group: a torch.distributed process group of two, the default one where None. Both
    ranks call the pipeline with the same arguments and get the same pictures. Without guidance both compute the same.
    """
    if not isinstance(pipe, SpecEditMixin) or not issubclass(pipe.CONFIG, SpecEditConfig):
        raise TypeError(f"pipe: expected a pipeline with SpecEdit, got {type(pipe).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed.init_process_group() to have been called")
    guides = Ranks.of(group)
    if guides.size != 2:
        raise ValueError(f"group: expected 2 ranks, one for each branch of guidance, got {guides.size}")
    pipe._specedit_guides = guides


def disable_guidance_parallelism(pipe: DiffusionPipeline) -> None:
    """Undo `enable_guidance_parallelism`: each rank computes both branches."""
    vars(pipe).pop("_specedit_guides", None)
