# SPDX-License-Identifier: Apache-2.0
"""Turning a loaded diffusers pipeline into its SpecEdit one, and back."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from . import registry
from .attention import unwrap_processors, wrap_processors
from .config import SpecEditConfig
from .output import SpecEditStats
from .pipeline import SpecEditMixin, check_supported


class SpecEditHandle:
    """What `enable_specedit` gives: the pipeline, its default config, and the figures of the last run."""

    def __init__(self, pipe: SpecEditMixin, config: SpecEditConfig):
        self.pipe = pipe
        self.config = config

    def stats(self) -> SpecEditStats | None:
        """Figures of the pipeline's last SpecEdit run, None before the first."""
        return self.pipe._specedit_stats

    def disable(self) -> None:
        """The same as `disable_specedit(pipe)`."""
        disable_specedit(self.pipe)


def enable_specedit(pipe: DiffusionPipeline, config: SpecEditConfig | None = None) -> SpecEditHandle:
    """Turn a loaded pipeline into its SpecEdit one, in place; calls with an image use `config` from then on.

    The object, its components and weights stay: its class changes, and its attention processors are wrapped. For
    FluxKontextPipeline, QwenImageEditPipeline and QwenImageEditPlusPipeline; raises TypeError for any other.
    """
    if config is None:
        config = SpecEditConfig()
    if not isinstance(config, SpecEditConfig):
        raise TypeError(f"config: expected SpecEditConfig, got {type(config).__name__}")
    kind = type(pipe) if isinstance(pipe, SpecEditMixin) else registry.pipeline_of(type(pipe))
    if kind is None:
        names = ", ".join(plain.__name__ for plain in registry.pipelines())
        raise TypeError(f"pipe: SpecEdit supports {names}, got {type(pipe).__name__}")
    check_supported(pipe)
    wrap_processors(pipe.transformer)
    pipe.__class__ = kind
    pipe._specedit_default = config
    pipe._specedit_stats = None
    return SpecEditHandle(pipe, config)


def disable_specedit(pipe: DiffusionPipeline) -> None:
    """Undo `enable_specedit`: the stock class and its own attention processors, the very objects.

    A pipeline without SpecEdit stays as it is. One made by a SpecEdit class becomes an object of the stock class.
    """
    plain = next((plain for plain, ours in registry.pipelines().items() if type(pipe) is ours), None)
    if plain is None:
        return
    unwrap_processors(pipe.transformer)
    pipe._free_runner()
    for name in ("_specedit_default", "_specedit_stats", "_specedit_runner"):
        pipe.__dict__.pop(name, None)
    pipe.__class__ = plain
