# SPDX-License-Identifier: Apache-2.0
"""All that is used of diffusers, accelerate and torch.nn beyond what they document.

The rest of the package asks here; tests/test_diffusers_api.py holds each of these against the installed versions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops

__all__ = [
    "ABOUT_FORWARD",
    "Addition",
    "attention_backend",
    "bring_in",
    "cache_hooks",
    "calculate_shift",
    "cast_by_call",
    "context_parallel",
    "dispatch_attention",
    "dora_parts",
    "dtype_of",
    "each_module",
    "execution_device",
    "foreign_forward",
    "global_hooks",
    "hooked",
    "is_cast",
    "is_wrapper",
    "low_rank_parts",
    "mirrored",
    "mirrors",
    "moved_to",
    "on_parallel",
    "one_walk",
    "retrieve_timesteps",
    "scaled_adapters",
    "through",
    "ulysses_group",
    "unwrapped",
    "waits_for_host",
    "walking_anew",
    "without_context_parallel",
]


_WALKS: ContextVar[dict[torch.nn.Module, list[torch.nn.Module]] | None] = ContextVar("specedit_walks", default=None)


def each_module(root: torch.nn.Module) -> list[torch.nn.Module]:
    """`root.modules()`, several times faster: a run begins with several walks, and a LoRA has thousands of modules."""
    walks = _WALKS.get()
    if walks is not None and root in walks:
        return walks[root]
    seen: set[torch.nn.Module] = set()
    found: list[torch.nn.Module] = []
    left: list[torch.nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found.append(module)
            children = module.__dict__["_modules"]
            if children:
                left += reversed(children.values())
    if walks is not None:
        walks[root] = found
    return found


@contextlib.contextmanager
def one_walk() -> Iterator[None]:
    """Within it, in this thread, `each_module` walks each tree once: no module joins one or leaves it, but within
    `walking_anew`."""
    token = _WALKS.set({})
    try:
        yield
    finally:
        _WALKS.reset(token)


@contextlib.contextmanager
def walking_anew() -> Iterator[None]:
    """Around a user's code within `one_walk`, which may put modules in or take some out."""
    walks, token = _WALKS.get(), _WALKS.set(None)
    try:
        yield
    finally:
        _WALKS.reset(token)
        if walks is not None:
            walks.clear()


def dtype_of(model: Any) -> torch.dtype:
    """model.dtype, which asks each module for a hook, in one quick walk where there is none."""
    cast = any("_diffusers_hook" in vars(module) for module in each_module(model))
    if not cast and not getattr(model, "_keep_in_fp32_modules", None):
        for x in model.parameters():
            if x.is_floating_point():
                return x.dtype
    return model.dtype


def unwrapped(module: torch.nn.Module) -> Any:
    """The module behind torch.compile(module), or the module itself."""
    return vars(module).get("_modules", {}).get("_orig_mod", module)


def is_wrapper(x: Any) -> bool:
    """Whether a tensor is of a class that holds other tensors (quantised weights are)."""
    return is_traceable_wrapper_subclass(x)


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes, offloaded or not."""
    return pipe._execution_device


def on_parallel(transformer: torch.nn.Module) -> bool:
    """Whether a transformer runs on several devices."""
    return getattr(transformer, "_parallel_config", None) is not None


def context_parallel(transformer: torch.nn.Module) -> Any:
    """How its sequence is (a ContextParallelConfig), None where it is not."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def ulysses_group(config: Any) -> Any:
    """The process group of a ContextParallelConfig's Ulysses ranks."""
    return config._ulysses_mesh.get_group()


def _shares_sequence(hook: Any) -> bool:
    """Whether a hook of diffusers gives a rank its part of a sequence, or makes one of the parts again."""
    return type(hook).__name__ in ("ContextParallelSplitHook", "ContextParallelGatherHook")


def _shares_alone(module: torch.nn.Module) -> bool:
    """Whether all hooks of diffusers about a module's forward are those of context parallelism, and there are any."""
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and bool(registry.hooks) and all(map(_shares_sequence, registry.hooks.values()))


def without_context_parallel(transformer: torch.nn.Module) -> torch.nn.Module:
    """The same transformer without the hooks of context parallelism: for what shares the sequence itself.

    The transformer itself where its sequence is not shared. Modules that have such hooks are made anew, and all that
    hold them: a whole `mirrored` tree takes longer than all else before a run's first launch.
    """
    if context_parallel(transformer) is None:
        return transformer
    holders: dict[torch.nn.Module, list[torch.nn.Module]] = {transformer: []}
    left = [transformer]
    while left:
        holder = left.pop()
        for child in vars(holder)["_modules"].values():
            if child is not None:
                if child not in holders:
                    holders[child] = []
                    left.append(child)
                holders[child].append(holder)
    anew: set[torch.nn.Module] = set()
    left = [each for each in holders if "_diffusers_hook" in vars(each) and _shares_alone(each)]
    while left:
        each = left.pop()
        if each not in anew:
            anew.add(each)
            left += holders[each]
    twin = mirrored(transformer, anew)
    for each in each_module(twin):
        if _shares_alone(each):
            vars(each).pop("_diffusers_hook")
            vars(each).pop("forward", None)
    return twin


def attention_backend(transformer: torch.nn.Module) -> str | None:
    """The attention that the user asked diffusers for (`set_attention_backend`, its context manager or its environment
    variable), None: torch's own. Read from the first processor."""
    held = (vars(module).get("processor") for module in each_module(transformer))
    own = next((getattr(p, "_attention_backend", None) for p in held if p is not None), None)
    name = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0] if own is None else own)
    return None if name is AttentionBackendName.NATIVE else name.value


def dispatch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """Attention [B, S, H, D] by one of diffusers' backends."""
    return dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend))


def _hooks(module: torch.nn.Module) -> list[Any]:
    """Hooks of diffusers and accelerate about a module's forward, the outermost first."""
    own = vars(module)
    registry, found = own.get("_diffusers_hook"), []
    if registry is not None:
        found = [registry.hooks[name] for name in reversed(registry._hook_order)]
        # a part of a module has other arguments
        found = [hook for hook in found if not _shares_sequence(hook)]
    if own.get("_hf_hook") is not None:
        found.append(own["_hf_hook"])
    return found


# What a module has of its own where something of a library's, or a user's, is about its forward.
ABOUT_FORWARD = frozenset({"_hf_hook", "_diffusers_hook", "forward"})


def hooked(own: dict[str, Any], known: frozenset[Callable[..., Any]]) -> bool:
    """Whether a module, `own` its vars, has hooks about its forward: a library's, or torch's that are not `known`."""
    if own.get("_hf_hook") is not None or ("_diffusers_hook" in own and own["_diffusers_hook"].hooks):
        return True
    of_torch = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return any(hook not in known for hook in of_torch)


def moved_to(module: torch.nn.Module) -> torch.device | None:
    """Where a hook of accelerate brings the whole module when it is called (`enable_model_cpu_offload`); None: none."""
    hook = vars(module).get("_hf_hook")
    if hook is None or all(kind.__name__ != "CpuOffload" for kind in type(hook).__mro__):
        return None
    return torch.device(hook.execution_device)


def bring_in(module: torch.nn.Module) -> None:
    """Move a module that is `moved_to` a device there. Cheap where it is there already."""
    if moved_to(module) is not None:
        vars(module)["_hf_hook"].pre_forward(module)


def _by_library(own: dict[str, Any]) -> list[str]:
    """Names of the classes of a library's hooks about a module's forward, `own` its vars."""
    found, registry = [own["_hf_hook"]] if own.get("_hf_hook") is not None else [], own.get("_diffusers_hook")
    return [type(hook).__name__ for hook in (*found, *(registry.hooks.values() if registry else ()))]


def is_cast(module: torch.nn.Module, known: frozenset[Callable[..., Any]]) -> bool:
    """Whether a linear layer keeps its weights in a smaller dtype between its calls (`enable_layerwise_casting`), and
    nothing else is about its forward but hooks of torch that are `known`."""
    if type(module) is not torch.nn.Linear:
        return False
    own = vars(module)
    if _by_library(own) != ["LayerwiseCastingHook"]:
        return False
    of_torch = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return all(hook in known for hook in of_torch)


def _in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), of fp8 on CUDA by an op: torch's own cast of it is slower (bench/kernels/fp8.py, "dequantise")."""
    fp8 = x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and dtype in (torch.bfloat16, torch.float16)
    return ops.dequantize(x, dtype) if fp8 and x.is_cuda and x.is_contiguous() else x.to(dtype)


def _cast_linear(layer: torch.nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x, _in_dtype(layer.weight, dtype), bias)


def cast_by_call(transformer: torch.nn.Module, known: frozenset[Callable[..., Any]]) -> torch.nn.Module:
    """The same transformer, in whose `is_cast` layers each call makes the weights that it computes with.

    The transformer itself where it has no such layer.

    The hook moves a layer's own weights to and fro, so two threads may not call it at once, and no graph finds the
    weights again. The numbers are the hook's.
    """
    if not any(is_cast(module, known) for module in each_module(transformer)):
        return transformer
    twin = mirrored(transformer)
    layer: Any
    for layer in twin.modules():
        if is_cast(layer, known):
            [hook] = vars(layer).pop("_diffusers_hook").hooks.values()
            layer.forward = functools.partial(_cast_linear, layer, hook.compute_dtype)
    return twin


# Types of GGUF that diffusers unpacks by operations on the device alone; for others it brings numbers from the host.
_GGUF_ON_DEVICE = ("Q8_0", "BF16")


def waits_for_host(module: Any, compiled: bool = False) -> str:
    """Why the call of a quantised layer cannot be captured, "" where it can: what a library is known to ask the host
    for within it. compiled: whether torch.compile compiles the call before."""
    weight = vars(module)["_parameters"].get("weight")
    if type(weight) is torch.nn.Parameter or weight is None:
        return ""
    dynamic = getattr(weight, "act_quant_kwargs", None) is not None
    if type(weight).__name__ == "Int8Tensor" and dynamic and not compiled:
        return (
            "a weight is torchao's int8 with quantised activations, whose product looks at its input's text on the host"
            " (runner='compile' compiles it)"
        )
    kind = getattr(getattr(weight, "quant_type", None), "name", "")
    if type(weight).__name__ == "GGUFParameter" and kind not in _GGUF_ON_DEVICE:
        return f"a weight is GGUF's {kind}, which is unpacked with numbers from the host"
    if type(module).__name__ == "Linear8bitLt" and module.state.threshold > 0:
        return (
            "an int8 layer of bitsandbytes looks for outliers, whose number the host waits for (llm_int8_threshold=0)"
        )
    return ""


def cache_hooks(transformer: torch.nn.Module) -> list[str]:
    """Names of the hooks in a transformer that answer for a forward (caches of steps): they have a `new_forward`."""
    hooks = (h for m in each_module(transformer) if "_diffusers_hook" in vars(m) for h in _hooks(m))
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
    if kind is None:
        return False
    kinds: tuple[Any, ...] = kind if isinstance(kind, tuple) else (kind,)
    return not any(issubclass(cls, k) and cls.forward is k.forward for k in kinds)


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


def mirrors(module: torch.nn.Module) -> torch.nn.Module:
    """The module that one of a `mirrored` tree stands for, or the module itself."""
    return vars(module).get("_specedit_mirrors", module)


def mirrored(module: torch.nn.Module, anew: Collection[torch.nn.Module] | None = None) -> torch.nn.Module:
    """A tree of new modules of the same classes over the very parameters and buffers of `module`.

    Its modules may be replaced, and what calls keep on it is its own: the user's modules stay as they are, whatever
    else uses them at the same time. Costs no memory of the device.
    anew: the modules that are made anew, which hold one another up to `module`; others stay the user's. None: all.
    """
    twins: dict[torch.nn.Module, torch.nn.Module] = {}

    def twin(module: torch.nn.Module) -> torch.nn.Module:
        if anew is not None and module not in anew:
            return module
        if module not in twins:  # one that stands at two places stays one
            made = object.__new__(type(module))
            vars(made).update(vars(module))
            if not foreign_forward(module):
                vars(made).pop("forward", None)
            vars(made)["_compiled_call_impl"] = None  # of the other one
            vars(made)["_specedit_mirrors"] = mirrors(module)
            twins[module] = made
            children = vars(module)["_modules"].items()
            vars(made)["_modules"] = {name: None if child is None else twin(child) for name, child in children}
        return twins[module]

    return twin(module)


@contextlib.contextmanager
def scaled_adapters(transformer: torch.nn.Module, scale: float) -> Iterator[None]:
    """Within it adapters (PEFT) are scaled, as the transformer's own forward has them; then their scales are as before.

    A scale that is a tensor (`enable_lora_hotswap`) stays the same tensor: it is scaled in place.
    """
    if not USE_PEFT_BACKEND or scale == 1.0:
        yield
        return
    before = []
    for module in each_module(transformer):
        scaling = vars(module).get("scaling")
        if isinstance(scaling, dict):
            kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in scaling.items()}
            before.append((scaling, dict(scaling), kept))
    try:
        scale_lora_layers(transformer, scale)
        yield
    finally:
        for scaling, values, kept in before:
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(kept[name])
                scaling[name] = value


# (down, up, scale) of what an adapter adds, up(down(x)) * scale: two modules and a number.
Addition = tuple[Any, Any, Any]


def low_rank_parts(layer: Any) -> tuple[Any, list[Addition]]:
    """(the layer below adapters, what they add in order) of one whose call is no more than that sum: (`layer` itself,
    []) for any other. PEFT's LoRA without dropout, DoRA and the like."""
    own = vars(layer)
    if "scaling" not in own or "base_layer" not in own["_modules"]:
        return layer, []
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or hooked(own, frozenset()) or foreign_forward(layer):
        return layer, []
    if layer.merged or layer.disable_adapters:
        return (layer, []) if layer.merged and layer.disable_adapters else (layer.base_layer, [])
    added = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        idle = isinstance(dropout, torch.nn.Identity) or not dropout.training
        if name in layer.lora_variant or not idle or hooked(vars(dropout), frozenset()):
            return layer, []
        added.append((down, up, layer.scaling[name]))
    return layer.base_layer, added


def dora_parts(layer: Any) -> tuple[Any, Any, Any, Any, torch.Tensor] | None:
    """(the layer below, down, up, scale, magnitude) of one on which a DoRA of PEFT's is, and nothing else: its weight
    is weight + scale * up @ down, of which each row has the length that `magnitude` says. None for any other."""
    own = vars(layer)
    if "scaling" not in own or "base_layer" not in own["_modules"]:
        return None
    from peft.tuners.lora import Linear
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    if type(layer) is not Linear or hooked(own, frozenset()) or foreign_forward(layer):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or len(names) != 1:
        return None
    [name] = names
    if type(layer.lora_variant.get(name)) is not DoraLinearVariant:
        return None
    length, dropout = layer.lora_magnitude_vector[name], layer.lora_dropout[name]
    if type(length) is not DoraLinearLayer or length.fan_in_fan_out:
        return None
    if any(hooked(vars(x), frozenset()) or foreign_forward(x) for x in (length, dropout)):
        return None
    if not isinstance(dropout, torch.nn.Identity) and (dropout.training or layer.training):
        return None
    return layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name], length.weight
