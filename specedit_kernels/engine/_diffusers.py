# SPDX-License-Identifier: Apache-2.0
"""All that is used of diffusers, accelerate and torch.nn beyond what they document.

The rest of the package asks here; tests/test_diffusers_api.py holds each of these against the installed versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers

__all__ = [
    "cache_hooks",
    "calculate_shift",
    "execution_device",
    "foreign_forward",
    "global_hooks",
    "hooked",
    "mirrored",
    "on_context_parallel",
    "on_parallel",
    "retrieve_timesteps",
    "scaled_adapters",
    "through",
    "unwrapped",
]


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module behind torch.compile(module), or the module itself."""
    return vars(module).get("_modules", {}).get("_orig_mod", module)


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes, offloaded or not."""
    return pipe._execution_device


def on_parallel(transformer: torch.nn.Module) -> bool:
    """Whether a transformer's work is shared out over several devices."""
    return getattr(transformer, "_parallel_config", None) is not None


def on_context_parallel(transformer: torch.nn.Module) -> bool:
    """Whether its sequence is."""
    config = getattr(transformer, "_parallel_config", None)
    return config is not None and getattr(config, "context_parallel_config", None) is not None


def _hooks(module: torch.nn.Module) -> list[Any]:
    """Hooks of diffusers and accelerate about a module's forward, the outermost first."""
    own = vars(module)
    registry, found = own.get("_diffusers_hook"), []
    if registry is not None:
        found = [registry.hooks[name] for name in reversed(registry._hook_order)]
    if own.get("_hf_hook") is not None:
        found.append(own["_hf_hook"])
    return found


def hooked(own: dict[str, Any], known: frozenset[Callable[..., Any]]) -> bool:
    """Whether a module, `own` its vars, has hooks about its forward: a library's, or torch's that are not `known`."""
    registry = own.get("_diffusers_hook")
    by_library = own.get("_hf_hook") is not None or bool(registry and registry.hooks)
    of_torch = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return by_library or any(hook not in known for hook in of_torch)


def cache_hooks(transformer: torch.nn.Module) -> list[str]:
    """Names of the hooks in a transformer that answer for a forward (caches of steps): they have a `new_forward`."""
    hooks = (h for m in transformer.modules() if "_diffusers_hook" in vars(m) for h in _hooks(m))
    return sorted({type(hook).__name__ for hook in hooks if callable(getattr(hook, "new_forward", None))})


def foreign_forward(module: torch.nn.Module, kind: type | tuple[type, ...] | None = None) -> bool:
    """Whether calling a module is more than its class's forward: a forward or a call of its own was put on the object
    or, where `kind` is given, its class is not that class, or one of those, or has another forward.

    What an offloading that was taken away leaves behind, the class's own forward bound to the object, does not count.
    """
    own, cls = vars(module), type(module)
    forward = own.get("forward")
    if forward is not None and not (
        getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is cls.forward
    ):
        return True
    if cls.__call__ is not torch.nn.Module.__call__:
        return True
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return kind is not None and not any(issubclass(cls, k) and cls.forward is k.forward for k in kinds)


def global_hooks() -> bool:
    """Whether torch has hooks about the forward of every module."""
    of_all = torch.nn.modules.module
    return bool(of_all._global_forward_pre_hooks or of_all._global_forward_hooks)


def through(module: torch.nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), which runs a part of `module`, with the hooks about the module's forward before and after it.

    Offloading (accelerate's of models and of layers, diffusers' of groups of layers, in memory or on disk) brings
    weights in by such hooks; what calls a part of a module past its forward goes through here, or finds no weights.
    """
    hooks = [hook for hook in _hooks(module) if hasattr(hook, "pre_forward")]
    # one that learns the order of layers from the first forward would learn a part of it for the whole
    hooks = [hook for hook in hooks if type(hook).__name__ != "LazyPrefetchGroupOffloadingHook"]
    for hook in hooks:
        args, _ = hook.pre_forward(module, *args)
    output = function(*args)
    for hook in reversed(hooks):
        output = hook.post_forward(module, output)
    return output


def mirrored(module: torch.nn.Module) -> torch.nn.Module:
    """A tree of new modules of the same classes over the very parameters and buffers of `module`.

    Its modules may be replaced, and what calls keep on it is its own: the user's modules stay as they are, whatever
    else uses them at the same time. Costs no memory of the device.
    """
    twins: dict[torch.nn.Module, torch.nn.Module] = {}

    def twin(module: torch.nn.Module) -> torch.nn.Module:
        if module not in twins:  # one that stands at two places stays one
            made = object.__new__(type(module))
            vars(made).update(vars(module))
            if not foreign_forward(module):
                vars(made).pop("forward", None)
            vars(made)["_compiled_call_impl"] = None  # of the other one
            twins[module] = made
            children = vars(module)["_modules"].items()
            vars(made)["_modules"] = {name: None if child is None else twin(child) for name, child in children}
        return twins[module]

    return twin(module)


@contextlib.contextmanager
def scaled_adapters(transformer: torch.nn.Module, scale: float) -> Iterator[None]:
    """Within it adapters (PEFT) are scaled, as the transformer's own forward has them; then as they were before."""
    if not USE_PEFT_BACKEND or scale == 1.0:
        yield
        return
    before = [(m.scaling, dict(m.scaling)) for m in transformer.modules() if isinstance(vars(m).get("scaling"), dict)]
    try:
        scale_lora_layers(transformer, scale)
        yield
    finally:
        for scaling, values in before:
            scaling.update(values)
