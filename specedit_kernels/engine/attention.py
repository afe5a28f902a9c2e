# SPDX-License-Identifier: Apache-2.0
"""The attention processors of mixed-resolution steps, and how they are put in and taken out."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import registry
from ._diffusers import unwrapped
from .kv_cache import KVCache
from .parallel import Ranks, to_heads, to_tokens


@dataclass
class TextWatch:
    """Records how much of its attention each image query of one module gives to each text token.

    module: whose attention is watched. length: text tokens. mass: fp32 [B, image slots, text tokens], softmax weight,
    mean over heads; None before the module was called.
    """

    module: Any
    length: int
    mass: Tensor | None = None

    def see(self, q: Tensor, k: Tensor, lse: Tensor) -> None:
        """Called in that module. q, k: rotated, [B, S, H, D], text first; lse: fp32 [B, H, S], over all keys."""
        self.mass = text_mass(q, k, lse, self.length)


def text_mass(q: Tensor, k: Tensor, lse: Tensor, text: int) -> Tensor:
    """Softmax weight that image queries give to the `text` first keys, mean over heads: fp32 [B, Sq - text, text]."""
    with torch.autocast(q.device.type, enabled=False):
        score = torch.einsum("bqhd,bkhd->bhqk", q[:, text:].float(), k[:, :text].float())
    return (score * q.shape[-1] ** -0.5 - lse[:, :, text:, None]).exp().mean(dim=1)


@dataclass(frozen=True)
class AttentionLayout:
    """What the attention of a mixed-resolution step has to know about its sequence [text | image slots].

    cos, sin: fp32 [B, S, head dim], rotary tables, each sample its own. key_bias: fp32 [B, S] or None.
    lengths: int32 [B], used slots of the sequence, or None where all are. modulate: int32 [B, image slots], which of
    two timesteps modulates a slot: 0 the step's, 1 that of clean pictures (Qwen's zero_cond_t); None: all have one.
    cache: rotated keys and values of the whole sequence of each block, [B, S, Hk, D] each, or None to keep none. A call
    that brings the whole sequence fills it; one that brings the slots from `start` to `first` alone, counted
    from the first text slot, renews those and attends to all. fresh: int32 [B], how many slots, text included, such a
    call renews of each sample, which may be fewer than it brings, or None: all; renewed: bool [B, slots], those.
    cached_text: text slots of the call that filled the cache, where that had another text: its keys and values of image
    slots are read, none renewed. own: bool [B, first image slots], those whose keys and values are this call's.
    region: int32 [B, image slots], which row of text_mask, bool [B, regions, text slots], says what text an image slot
    attends to; None: all attend to all. Text attends to everything.
    watch: a module's attention to the text is recorded there.
    ranks: who shares the sequence: a call brings this rank's part of the `text` text slots and of the image slots, and
    all else that stands here is of the whole sequence, for this rank's heads. None: nobody.
    """

    cos: Tensor
    sin: Tensor
    key_bias: Tensor | None
    lengths: Tensor | None
    modulate: Tensor | None = None
    cache: KVCache | None = None
    first: int | None = None
    start: int = 0
    cached_text: int | None = None
    own: Tensor | None = None
    fresh: Tensor | None = None
    renewed: Tensor | None = None
    region: Tensor | None = None
    text_mask: Tensor | None = None
    watch: TextWatch | None = None
    ranks: Ranks | None = None
    text: int = 0

    def of_first(self, text: int, first: int | None, lock_text: bool = False, least_text: int = 0) -> AttentionLayout:
        """The layout of a call that brings the first so many image slots, None: all, and the `text` text slots.

        lock_text: of these it brings but the last `least_text`, and renews none.
        """
        start = text - least_text if lock_text else 0
        first = self.cos.shape[1] if first is None else text + first
        behind = self.cos.shape[1] - first
        modulate = None if self.modulate is None else self.modulate[:, : self.modulate.shape[1] - behind]
        region = None if self.region is None else self.region[:, : self.region.shape[1] - behind]
        renewed = None
        slot = torch.arange(start, first, device=self.cos.device)
        if behind and self.fresh is not None:
            renewed = slot < self.fresh[:, None]
        if lock_text and least_text:
            own = slot >= text
            renewed = own[None] if renewed is None else renewed & own
        return replace(
            self, cos=self.cos[:, start:first], sin=self.sin[:, start:first], modulate=modulate, region=region,
            first=first, start=start, renewed=renewed, text=text - start,
        )  # fmt: skip


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate neighbouring pairs of channels in fp32, back in `dtype`. x: [B, S, H, D]; cos, sin: fp32 [B, S, D]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos[:, :, None] + turned * sin[:, :, None]).to(dtype)


def joint_attention(
    processor: SpecEditAttnProcessor, text: tuple[Tensor, Tensor, Tensor] | None, image: tuple[Tensor, Tensor, Tensor],
    layout: AttentionLayout,
) -> Tensor:  # fmt: skip
    """Attention of [text | image slots] by torch.ops.specedit.mixed_res_attn: [B, S, H * D].

    processor: of the block whose attention it is; it has what the block keeps. text, image: normalised q, k, v before
    the rotation, [B, S, H, D] each; text is None where image holds both. q and k become what v is: under autocast norms
    give fp32, and layers another dtype.
    """
    if layout.ranks is not None:
        streams = [image] if text is None else [text, image]
        q, k, v = _in_order(to_heads(streams, _row_sizes(layout), layout.ranks), layout)
    else:
        q, k, v = image if text is None else (torch.cat(pair, dim=1) for pair in zip(text, image))
    q, k = (apply_rotary(x, layout.cos, layout.sin, v.dtype) for x in (q, k))
    k, v, queries = kept_keys(processor, k, v, layout)
    if layout.region is not None:
        return attend_by_region(
            q, k, v, layout.region, layout.text_mask, key_bias=layout.key_bias, queries=queries, keys=layout.lengths
        ).flatten(2)  # fmt: skip
    out, lse = ops.mixed_res_attn(q, k, v, key_bias=layout.key_bias, q_lens=queries, kv_lens=layout.lengths)
    if processor.watch is not None:
        processor.watch.see(q, k, lse)
    if layout.ranks is not None:
        return to_tokens(_by_rank(out, layout), _row_sizes(layout), layout.ranks)
    return out.flatten(2)


def _part_sizes(layout: AttentionLayout) -> list[tuple[int, int]]:
    """(text slots, image slots) of each rank, as the hooks of diffusers split them."""
    assert layout.ranks is not None
    image = layout.cos.shape[1] - layout.text
    return list(zip(layout.ranks.split(layout.text), layout.ranks.split(image)))


def _row_sizes(layout: AttentionLayout) -> list[int]:
    return [text + image for text, image in _part_sizes(layout)]


def _in_order(parts: Sequence[Tensor], layout: AttentionLayout) -> list[Tensor]:
    """[text | image slots] of [text of rank 0 | image slots of rank 0 | text of rank 1 | ...]."""
    sizes = [size for pair in _part_sizes(layout) for size in pair]
    found = [part.split(sizes, dim=1) for part in parts]
    return [torch.cat([*pieces[::2], *pieces[1::2]], dim=1) for pieces in found]


def _by_rank(x: Tensor, layout: AttentionLayout) -> Tensor:
    """The way back."""
    text, image = zip(*_part_sizes(layout))
    pieces = zip(x[:, : layout.text].split(text, dim=1), x[:, layout.text :].split(image, dim=1))
    return torch.cat([piece for pair in pieces for piece in pair], dim=1)


def kept_keys(
    processor: SpecEditAttnProcessor, k: Tensor, v: Tensor, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(keys, values, used queries) of a call that brings k and v, with those that the block keeps."""
    queries = layout.lengths
    if layout.first is not None:
        assert layout.cache is not None and processor.kept is not None
        cached = layout.cache.unpack(processor.kept, v.dtype)
        if layout.cached_text is None:
            for kept, fresh in zip(cached, (k, v)):
                place = kept[:, layout.start : layout.first]
                if layout.renewed is not None:
                    fresh = torch.where(layout.renewed[..., None, None], fresh, place)
                place.copy_(fresh)
            k, v = cached
            if layout.first == k.shape[1] and layout.cache.packed:  # no slot is left behind
                processor.kept = layout.cache.pack(k, v)
        else:
            k, v = (over_another_text(kept, fresh, layout) for kept, fresh in zip(cached, (k, v)))
        queries = None if queries is None else queries.clamp(max=layout.first) - layout.start
    elif layout.cache is not None:
        processor.kept = layout.cache.pack(k, v)
    return k, v, queries


def over_another_text(kept: Tensor, fresh: Tensor, layout: AttentionLayout) -> Tensor:
    """Keys or values of [text | image slots]: `fresh` [B, first, Hk, D], and of the slots that are not its own, the
    cache's, `kept` [B, cached_text + image slots, Hk, D]."""
    assert layout.own is not None
    image, count = kept[:, layout.cached_text :], layout.own.shape[1]
    text = fresh.shape[1] - count
    own = torch.where(layout.own[..., None, None], fresh[:, text:], image[:, :count])
    return torch.cat([fresh[:, :text], own, image[:, count:]], dim=1)


def attend_by_region(
    q: Tensor, k: Tensor, v: Tensor, region: Tensor, text_mask: Tensor, *, text_at: int = 0,
    key_bias: Tensor | None = None, queries: Tensor | None = None, keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Joint attention whose image -> text part is sparse (SSCA, FlashEdit, arXiv 2509.22244): [B, Sq, H, D].

    Image -> image is dense, image -> text goes by the slots' regions, and merge_attn makes one softmax of the two; text
    attends to everything. q: text first. text_at: the key of the first text token, 0 or behind those of the image.
    key_bias, queries, keys: key_bias, q_lens and kv_lens of mixed_res_attn, the last two with the text; None: no bias,
    all slots in use.
    """
    n = text_mask.shape[-1]
    text, image = slice(text_at, text_at + n), slice(0, text_at) if text_at else slice(n, None)
    words = ops.mixed_res_attn(q[:, :n], k, v, key_bias=key_bias, kv_lens=keys)[0]
    picture = ops.mixed_res_attn(
        q[:, n:], k[:, image], v[:, image],
        key_bias=None if key_bias is None else key_bias[:, image].contiguous(),
        q_lens=None if queries is None else queries - n,
        kv_lens=None if keys is None else keys - n,
    )  # fmt: skip
    sparse = ops.sparse_cross_attn(q[:, n:], k[:, text], v[:, text], region, text_mask)
    return torch.cat([words, ops.merge_attn(*picture, *sparse)[0]], dim=1)


class SpecEditAttnProcessor:
    """Attention of a block through torch.ops.specedit.mixed_res_attn, wrapped about the block's own processor.

    Called without SpecEdit's arguments it hands over to that one, untouched. name: of the processor in `transformer`.
    kept, watch, layout: of the call that runs, see `with_layout`.
    """

    kept: tuple[Tensor, ...] | None = None
    watch: TextWatch | None = None
    layout: AttentionLayout | None = None

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


def attention_modules(transformer: torch.nn.Module) -> list[Any]:
    """The modules that have an attention processor, in the order of the blocks."""
    return [module for module in unwrapped(transformer).modules() if hasattr(type(module), "get_processor")]


@contextlib.contextmanager
def with_layout(transformer: torch.nn.Module, layout: AttentionLayout | None, whole: bool = False) -> Iterator[None]:
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


def _named_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
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
