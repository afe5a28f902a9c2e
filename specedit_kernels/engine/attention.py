# SPDX-License-Identifier: Apache-2.0
"""The attention processors of mixed-resolution steps, and how they are put in and taken out."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import registry
from ._diffusers import each_module, unwrapped
from .sequence import StepLayout, TextWatch, all_heads, attend, text_mass


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate neighbouring pairs of channels in fp32, back in `dtype`. x: [B, N, H, D]; cos, sin: [B or 1, N, D/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(dtype)


def joint_attention(
    processor: SpecEditAttnProcessor, text: tuple[Tensor, Tensor, Tensor] | None, image: tuple[Tensor, Tensor, Tensor],
    layout: StepLayout,
) -> Tensor:  # fmt: skip
    """`attend` for the tokens [text | image] of a call: [B, n, H * D].

    processor: of the block whose attention it is; it has what the block keeps. text, image: normalised q, k, v before
    the rotation, [B, n, H, D] each, of this rank's tokens; text is None where image holds both. q and k become what v
    is: under autocast norms give fp32, and layers another dtype.
    """
    sequence = layout.sequence
    q, k, v = all_heads([image] if text is None else [text, image], sequence)
    q, k = (apply_rotary(x, sequence.cos, sequence.sin, v.dtype) for x in (q, k))
    k, v = kept_keys(processor, k, v, layout)
    if processor.watch is not None:
        processor.watch.mass = text_mass(q, k, v, sequence)
    return attend(q, k, v, sequence)


def kept_keys(processor: SpecEditAttnProcessor, k: Tensor, v: Tensor, layout: StepLayout) -> tuple[Tensor, ...]:
    """All keys and values that a block has: those that it keeps, with the call's own, k and v, in their rows."""
    sequence, cache = layout.sequence, layout.cache
    if cache is None:
        return k, v
    if sequence.rows is None:
        processor.kept = cache.pack(k, v)
        return k, v
    pair = cache.blank(k, v) if processor.kept is None else cache.unpack(processor.kept, v.dtype)
    for place, x in zip(pair, (k, v)):
        ops.scatter_tokens_(place, x, sequence.rows)
    if not cache.packed:
        processor.kept = pair  # the very tensors; without a question more that a compiled block would guard on
    elif not sequence.passing:
        processor.kept = cache.pack(*pair)
    return pair


class SpecEditAttnProcessor:
    """Attention of a block through torch.ops.specedit.mixed_res_attn, wrapped about the block's own processor.

    Called without SpecEdit's arguments it hands over to that one, untouched. name: of the processor in `transformer`.
    kept, watch, layout: of the call that runs, see `with_layout`.
    """

    kept: tuple[Tensor, ...] | None = None
    watch: TextWatch | None = None
    layout: StepLayout | None = None

    def __init__(self, inner: Any, transformer: torch.nn.Module, name: str):
        self.inner = inner

    def remove(self) -> None:
        """Undo what wrapping did besides taking the inner processor's place."""

    # set_attention_backend and parallelism read and write these two on the processor: they belong to the wrapped one
    @property
    def _attention_backend(self):
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.inner._attention_backend = value

    @property
    def _parallel_config(self):
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.inner._parallel_config = value


_LOCKS_LOCK = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.Lock] = weakref.WeakKeyDictionary()


# Whether modules of a class have a processor: asked of thousands before a run's first launch, and slow to answer where
# it is not so.
_HAS_PROCESSOR: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def attention_modules(transformer: torch.nn.Module) -> list[Any]:
    """The modules that have an attention processor, in the order of the blocks."""
    found = []
    for module in each_module(unwrapped(transformer)):
        has = _HAS_PROCESSOR.get(type(module))
        if has is None:
            has = _HAS_PROCESSOR[type(module)] = hasattr(type(module), "get_processor")
        if has:
            found.append(module)
    return found


@contextlib.contextmanager
def with_layout(transformer: torch.nn.Module, layout: StepLayout | None, whole: bool = False) -> Iterator[None]:
    """A call of the transformer, within which each attention processor has what `layout` keeps of its block.

    whole: each has `layout` itself too, of a transformer whose forward hands no arguments on to its processors.
    One such call of a transformer at a time: pipelines that share one wait for each other.
    """
    if layout is None or (layout.cache is None and layout.watch is None and not whole):
        yield
        return
    transformer = unwrapped(transformer)
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(transformer, threading.Lock())
    modules = [m for m in attention_modules(transformer) if isinstance(m.processor, SpecEditAttnProcessor)]
    processors = [m.processor for m in modules]
    with lock:
        try:
            for i, (module, processor) in enumerate(zip(modules, processors)):
                processor.kept = layout.cache.pairs[i] if layout.cache and layout.cache.pairs else None
                processor.watch = layout.watch if layout.watch and module is layout.watch.module else None
                processor.layout = layout if whole else None
            yield
            if layout.cache is not None:
                layout.cache.pairs = [processor.kept for processor in processors]
        finally:
            for processor in processors:
                processor.kept = processor.watch = processor.layout = None


def _named_attentions(transformer: torch.nn.Module) -> dict[str, Any]:
    """`attention_modules` by the names of their processors, as `attn_processors` has them where a transformer does."""
    found = unwrapped(transformer).named_modules()
    return {f"{name}.processor": module for name, module in found if hasattr(type(module), "get_processor")}


def _wrapped(transformer: torch.nn.Module, name: str, processor: Any) -> SpecEditAttnProcessor:
    if isinstance(processor, SpecEditAttnProcessor):
        return processor
    wrap = registry.processor_of(type(processor))
    if wrap is None:
        names = " and ".join(registry.processor_names())
        raise TypeError(
            f"transformer: {name} is a {type(processor).__name__}; SpecEdit supports {names} (IP-Adapter and custom"
            " processors are not supported)"
        )
    return wrap(processor, transformer, name)


def wrap_processors(transformer: Any) -> None:
    """Wrap every attention processor of a transformer; those wrapped already stay. TypeError for a foreign one."""
    if all(isinstance(module.processor, SpecEditAttnProcessor) for module in attention_modules(transformer)):
        return
    modules = _named_attentions(transformer)
    wrapped: dict[str, SpecEditAttnProcessor] = {}
    try:
        for name, module in modules.items():
            wrapped[name] = _wrapped(transformer, name, module.processor)
    except TypeError:
        for name, processor in wrapped.items():
            if processor is not modules[name].processor:
                processor.remove()
        raise
    for name, processor in wrapped.items():
        modules[name].set_processor(processor)


def unwrap_processors(transformer: Any) -> None:
    """Put the wrapped processors back, the very objects."""
    for module in attention_modules(transformer):
        processor = module.processor
        if isinstance(processor, SpecEditAttnProcessor):
            processor.remove()
            module.set_processor(processor.inner)
