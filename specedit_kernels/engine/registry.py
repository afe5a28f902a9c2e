# SPDX-License-Identifier: Apache-2.0
"""What is known of the models: each file in specedit_kernels/models registers its own here.

Files of that folder and the entry points of the group `specedit_kernels.models` (names of modules) are imported at the
first question. The engine asks by type, and names no model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ._diffusers import unwrapped

ENTRY_POINTS = "specedit_kernels.models"


@dataclass(frozen=True)
class Model:
    """What a model file registers.

    name: the file's stem. pipelines: {stock diffusers pipeline class: its SpecEdit class}. processors: {attention
    processor class: make(processor, transformer, its name) -> SpecEditAttnProcessor}. codecs: {autoencoder class: codec
    class}. replaced: {transformer class: function of a transformer that gives (module, class or classes) of everything
    whose forward the model's fused forward stands for}; a module with another forward is run eagerly. pre_hooks:
    forward pre-hooks that the model's own processors put on blocks: runners accept them.
    command: (model folder's settings, true_cfg_scale or None) -> options of a call, for the command.
    several_pictures: names of the stock pipelines that take further reference pictures.
    """

    name: str
    pipelines: Mapping[type, type]
    processors: Mapping[type, Callable[[Any, torch.nn.Module, str], Any]]
    codecs: Mapping[type, type]
    command: Callable[[Mapping[str, Any], float | None], dict[str, Any]]
    replaced: Mapping[type, Callable[[torch.nn.Module], Iterable[tuple[torch.nn.Module, Any]]]] = field(
        default_factory=dict
    )
    pre_hooks: tuple[Callable[..., Any], ...] = ()
    several_pictures: tuple[str, ...] = field(default=())


_MODELS: dict[str, Model] = {}


def register(model: Model) -> None:
    """Make a model known. ValueError where another one has its name or one of its pipeline classes."""
    for other in _MODELS.values():
        if other.name == model.name:
            raise ValueError(f"name: expected a new one, got {model.name!r}, which is registered")
        for kind in other.pipelines.keys() & model.pipelines.keys():
            raise ValueError(f"pipelines: {kind.__name__} is registered by {other.name!r}")
    _MODELS[model.name] = model


def unregister(name: str) -> None:
    """Forget a model; pipelines that are made of its classes stay what they are. KeyError where there is none."""
    del _MODELS[name]


@functools.cache
def _load() -> None:
    folder = importlib.import_module("..models", __package__)
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_") and module.name.islower():  # TEMPLATE is no model
            importlib.import_module(f"..models.{module.name}", __package__)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def models() -> tuple[Model, ...]:
    """All registered models."""
    _load()
    return tuple(_MODELS.values())


def supported_models() -> dict[str, tuple[str, ...]]:
    """{name of a registered model: names of its diffusers pipeline classes}."""
    return {model.name: tuple(kind.__name__ for kind in model.pipelines) for model in models()}


def _of_type(table: str, kind: type) -> Any:
    """The value of `kind`, or of its nearest base class, in all models' tables of that name; None where none has it."""
    merged = {key: value for model in models() for key, value in getattr(model, table).items()}
    return next((merged[base] for base in kind.__mro__ if base in merged), None)


def pipelines() -> dict[type, type]:
    """{stock pipeline class: its SpecEdit class} of all models."""
    return {plain: ours for model in models() for plain, ours in model.pipelines.items()}


def pipeline_of(kind: type) -> type | None:
    """The SpecEdit class for a stock pipeline class or a subclass of one; None for any other."""
    return _of_type("pipelines", kind)


def model_of(pipeline_name: str) -> Model | None:
    """The model that has a stock pipeline class of that name."""
    return next((m for m in models() if any(k.__name__ == pipeline_name for k in m.pipelines)), None)


def processor_of(kind: type) -> Callable[[Any, torch.nn.Module, str], Any] | None:
    """How an attention processor of exactly that class is wrapped; None where no model knows it."""
    return next((m.processors[kind] for m in models() if kind in m.processors), None)


def processor_names() -> list[str]:
    """Names of the attention processor classes that are known."""
    return sorted({kind.__name__ for m in models() for kind in m.processors})


def codecs() -> dict[type, type]:
    """{autoencoder class: codec class} of all models."""
    return {kind: codec for m in models() for kind, codec in m.codecs.items()}


def codec_of(vae: torch.nn.Module) -> Any:
    """The codec of an autoencoder, under torch.compile or not. TypeError for one that no model has."""
    vae = unwrapped(vae)
    codec = _of_type("codecs", type(vae))
    if codec is None:
        names = " or ".join(sorted(kind.__name__ for kind in codecs()))
        raise TypeError(f"vae: expected {names}, got {type(vae).__name__}")
    return codec(vae)


def replaced_by(transformer: torch.nn.Module) -> Iterable[tuple[torch.nn.Module, Any]]:
    """(module, class or classes) of all whose forward the fused forward of a transformer's model stands for."""
    found = _of_type("replaced", type(transformer))
    return () if found is None else found(transformer)


def own_pre_hooks() -> frozenset[Callable[..., Any]]:
    """Forward pre-hooks of the models' own processors."""
    return frozenset(hook for m in models() for hook in m.pre_hooks)
