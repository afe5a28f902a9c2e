# SPDX-License-Identifier: Apache-2.0
"""What the fused forwards share: their sequence, its attention, the MLP with its activation, their adapter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor

from .. import ops
from ..sampling.layout import SequenceLayout
from . import fp8, kv_cache
from ._diffusers import (
    attention_backend,
    cast_by_call,
    dispatch_attention,
    foreign_forward,
    hooked,
    low_rank_parts,
    scaled_adapters,
    unwrapped,
    without_context_parallel,
)
from .attention import AttentionLayout, TextWatch, attend_by_region, text_mass
from .fp8 import Rows
from .kv_cache import PackedKV
from .low_rank import OWN_HOOKS, active_serial, changed
from .model import EditModel, Text
from .parallel import Ranks, all_tokens, to_heads, to_tokens
from .runner import BESIDE, StepRunner


@dataclass(frozen=True)
class MixedSequence:
    """What a step has to know of its sequence: `text` tokens, then image tokens; N tokens in all.

    cos, sin: fp32 [B or 1, N, D/2], rotary tables. key_bias: fp32 [B, keys] or None. queries, keys: int32 [B], how many
    tokens ask and how many keys are there, None: all. rows: int32 [B, N], the key that each token is, -1: none, to be
    left as it is; None: in order. Without text tokens those of the text stay as they were kept. text_at: the key of the
    first text token, behind those of the image or 0. used: keys there are where that is known beforehand, None: all.
    region: int32 [B, image tokens], which row of text_mask, bool [B, regions, text], says what text an image token
    sees; None: all see all. watched: what attention the image gives to the text is asked for. passing: later steps
    compute the keys and values of these tokens anew in any case, so packed ones need not be renewed. modulate:
    int32 [B, image tokens], which of two timesteps modulates an image token: 0 the step's, 1 that of clean pictures;
    None: all have one. backend: diffusers' name of the attention that the user asked for, for steps without lengths
    and bias. ranks: who shares the tokens, None: nobody. Each rank has the tokens `own` of the N and all that is said
    here of the whole sequence, for its heads.
    """

    text: int
    cos: Tensor
    sin: Tensor
    key_bias: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    rows: Tensor | None = None
    text_at: int = 0
    used: int | None = None
    region: Tensor | None = None
    text_mask: Tensor | None = None
    watched: bool = False
    passing: bool = False
    modulate: Tensor | None = None
    backend: str | None = None
    ranks: Ranks | None = None

    @property
    def own(self) -> tuple[int, int]:
        """(first, end) of this rank's tokens."""
        tokens = self.cos.shape[1]
        return (0, tokens) if self.ranks is None else self.ranks.bounds(tokens)

    @property
    def own_text(self) -> int:
        """How many of them are text."""
        if self.ranks is None:
            return self.text
        first, end = self.own
        return min(end, self.text) - min(first, self.text)

    def own_image(self, x: Tensor) -> Tensor:
        """This rank's of x, [B, image tokens, ...]."""
        if self.ranks is None:
            return x
        first, end = self.own
        return x[:, max(first - self.text, 0) : max(end - self.text, 0)]

    def of_all(self, x: Tensor) -> Tensor:
        """[B, this rank's image tokens, C] -> those of all ranks, on every rank."""
        if self.ranks is None:
            return x
        sizes, before = [], 0
        for size in self.ranks.split(self.cos.shape[1]):
            sizes.append(max(before + size - self.text, 0) - max(before - self.text, 0))
            before += size
        return all_tokens(x, sizes, self.ranks)


# Keys and values of a block that outlive a step, [B, keys, H, D] each. Tensors of their own: torch.compile takes views
# of one tensor at several offsets for views at the first of them.
Kept = tuple[Tensor, Tensor] | PackedKV


def places(q: Tensor, kept: Kept | None, sequence: MixedSequence) -> tuple[Tensor, Tensor]:
    """Where a block writes its keys and values and reads all: `kept`, [B, keys, H, D], or new ones like q."""
    if kept is None:
        return torch.empty_like(q), torch.empty_like(q)
    if isinstance(kept, PackedKV):
        if sequence.rows is not None:  # else all of them are written
            kept.load()
        return kept.scratch
    return kept


def renew(kept: Kept | None, sequence: MixedSequence) -> None:
    """Call when a block's keys and values are written."""
    if isinstance(kept, PackedKV) and not sequence.passing:
        kept.store()


def is_plain(layer: torch.nn.Module, x: Tensor | None = None) -> bool:
    """Whether a layer is nothing but its weight and bias: no adapter, no quantised weight, no hook but our own.

    x: what it is called on, of another dtype or under autocast its call is more than a product.
    """
    plain = type(layer) is torch.nn.Linear and layer.bias is not None
    if not plain or type(layer.weight) not in (torch.nn.Parameter, Tensor):
        return False
    # a runner that compiles has looked for them
    if not torch.compiler.is_compiling() and (hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer)):
        return False
    if x is None:
        return True
    return x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def replaced_of_feed_forward(ff: FeedForward) -> list[tuple[torch.nn.Module, type]]:
    """The modules of an MLP whose forward `feed_forward` stands for, each with the class that it must have."""
    if type(ff.net[0]) is not GELU or ff.net[0].approximate != "tanh":
        return []
    return [(ff, FeedForward), (ff.net[0], GELU)]


def _as_one(tensors: list[Tensor]) -> Tensor | None:
    """Tensors of one dtype that are contiguous in memory as one, joined at the first dimension; else None."""
    first, end = tensors[0], tensors[0].data_ptr()
    for x in tensors:
        if x.data_ptr() != end or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype or not x.is_contiguous():
            return None
        if x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += x.numel() * x.element_size()
    return first.as_strided((sum(len(x) for x in tensors), *first.shape[1:]), first.stride())


def join_(layers: Iterable[torch.nn.Module]) -> bool:
    """Make the weights of these linear layers contiguous in memory, so that one product serves all of them.

    They stay the layers' own parameters, and keep their values; their memory alone is another. Nothing is done where a
    layer is no plain one. `separate_` undoes it, and so does whatever moves weights. Returns whether any was moved.
    """
    layers, moved = [low_rank_parts(layer)[0] for layer in layers], False
    if not all(map(is_plain, layers)):
        return False
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if len({(x.dtype, x.device, x.shape[1:]) for x in parts}) > 1 or _as_one(parts) is not None:
            continue
        # as they are: what trains the layers later could not use inference tensors, nor may one hold another's memory
        with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
            joined = parts[0].new_empty(sum(len(x) for x in parts), *parts[0].shape[1:])
            for x, place in zip(parts, joined.split([len(x) for x in parts])):
                place.copy_(x)
                x.data = place
        moved = True
    return moved


def separate_(layers: Iterable[torch.nn.Module]) -> None:
    """Undo `join_`: each weight in memory of its own again."""
    for name in ("weight", "bias"):
        parts = [getattr(layer, name, None) for layer in layers]
        if any(type(x) not in (torch.nn.Parameter, Tensor) for x in parts) or _as_one(parts) is None:
            continue
        for x in parts:
            with torch.inference_mode(x.is_inference()), torch.no_grad():
                x.data = x.detach().clone()


def linear_of_each(layers: Iterable[torch.nn.Module], x: Tensor | Rows) -> list[Tensor]:
    """[layer(x) for layer in layers]: views of one product where `join_` has joined them, or where they compute in fp8,
    with what adapters of low rank add to each."""
    layers, joined = list(layers), ()
    y = fp8.product(layers, x)
    if y is not None:
        parts = y.split([layer.out_features for layer in layers], dim=-1)
        return [changed(layer, x, part) for layer, part in zip(layers, parts)]
    if torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    bases, added = zip(*map(low_rank_parts, layers))
    if all(is_plain(base, x) for base in bases):
        joined = [_as_one([getattr(base, name) for base in bases]) for name in ("weight", "bias")]
    if not joined or any(part is None for part in joined):
        return [layer(x) for layer in layers]
    parts = F.linear(x, *joined).split([base.out_features for base in bases], dim=-1)
    return [_with_added(x, changed(base, x, part), of) for base, part, of in zip(bases, parts, added)]


def _with_added(x: Tensor, y: Tensor, added: list[Any]) -> Tensor:
    """y and what adapters add to it, as PEFT's layer does."""
    found = y
    for down, up, scale in added:
        found = found + up(down(x.to(down.weight.dtype))) * scale
    return found.to(y.dtype)


def linear(layer: torch.nn.Module, x: Tensor | Rows) -> Tensor:
    """layer(x), in fp8 where it computes in that."""
    return linear_of_each([layer], x)[0]


def modulated(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *groups: Sequence[torch.nn.Module],
    modulation_index: Tensor | None = None,
) -> Tensor | Rows:  # fmt: skip
    """`ops.adaln_modulate` of x for these layers alone, in e4m3 where all of them compute in fp8.

    groups: layers that `linear_of_each` has together.
    """
    options = dict(scale=scale, shift=shift, modulation_index=modulation_index, eps=eps)
    # what changes a layer reads its input
    if fp8.serves(*groups) and not active_serial():
        return Rows(*ops.quantize_fp8(x, **options))
    return ops.adaln_modulate(x, **options)


def hidden(
    layer: torch.nn.Module, x: Tensor | Rows, then: torch.nn.Module, before: Tensor | None = None
) -> Tensor | Rows:
    """gelu(layer(x)); where `then` computes in fp8, that of it and of `before`, the channels in front, in e4m3."""
    if fp8.serves([then]) and not active_serial():
        return Rows(*ops.quantize_fp8(linear(layer, x), before=before, gelu=True))
    return gelu(layer, x)


def gelu(layer: torch.nn.Module, x: Tensor | Rows) -> Tensor:
    """GELU, by tanh, of a linear layer on x [B, N, C]: within the product where that is a plain one on CUDA.

    Not in fp32: what the product's end knows of tanh is good for 16 bits.
    """
    if fp8.serves([layer]):
        return F.gelu(linear(layer, x), approximate="tanh")
    if is_plain(layer, x) and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not active_serial():
        y = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return F.gelu(layer(x), approximate="tanh")


def first_of(ff: FeedForward) -> torch.nn.Module:
    """The layer of a block's MLP that takes its input."""
    first = ff.net[0]
    return first.proj if type(first) is GELU and first.approximate == "tanh" else ff


def feed_forward(ff: FeedForward, x: Tensor | Rows) -> Tensor:
    """A block's MLP."""
    if first_of(ff) is ff:
        return ff(x)
    first, *rest = ff.net
    last = [layer for layer in rest if not isinstance(layer, torch.nn.Dropout)]
    x = hidden(first.proj, x, *last)
    if isinstance(x, Rows):
        return linear(last[0], x)
    for layer in rest:
        x = layer(x) if isinstance(layer, torch.nn.Dropout) else linear(layer, x)
    return x


def all_heads(streams: Sequence[list[Tensor]], sequence: MixedSequence) -> list[Tensor]:
    """q, k and v of all tokens, for this rank's heads, of those of its tokens. streams: as of `to_heads`, not empty."""
    assert sequence.ranks is not None
    return to_heads(streams, sequence.ranks.split(sequence.cos.shape[1]), sequence.ranks)


def of_streams(
    text: list[Tensor] | None, image: list[Tensor] | None, sequence: MixedSequence
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """q, k and v [B, n, H, D] of text and of image tokens, None where there are none: of this rank's -> of all."""
    if sequence.ranks is None:
        return text, image
    whole = all_heads([x for x in (text, image) if x is not None], sequence)
    n = sequence.text
    return [x[:, :n] for x in whole] if n else None, [x[:, n:] for x in whole]


def embedded(
    of_text: torch.nn.Module, of_image: torch.nn.Module, embeds: Tensor, tokens: Tensor, sequence: MixedSequence
) -> Tensor:
    """This rank's text and image tokens through their embedders, [B, n, C]."""
    first, end = sequence.own
    parts = [of_text(embeds[:, first : min(end, sequence.text)])] if sequence.own_text else []
    image = sequence.own_image(tokens)
    if image.shape[1]:
        parts.append(of_image(image))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def new_queries(x: Tensor, heads: int, dim: int, sequence: MixedSequence) -> Tensor:
    """Where a block's queries go, [B, N, heads, dim] of all tokens, or of this rank's share of the heads."""
    ranks = sequence.ranks
    return x.new_empty(x.shape[0], sequence.cos.shape[1], heads if ranks is None else heads // ranks.size, dim)


def attend(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor:
    """Attention [B, this rank's tokens, H * D]."""
    out = _attend(q, k, v, sequence)
    if sequence.ranks is None:
        return out.flatten(2)
    return to_tokens(out, sequence.ranks.split(sequence.cos.shape[1]), sequence.ranks)


def _attend(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor:
    """Attention [B, N, H, D]."""
    k, v = k[:, : sequence.used], v[:, : sequence.used]
    if sequence.region is not None:
        out = attend_by_region(
            q, k, v, sequence.region, sequence.text_mask, text_at=sequence.text_at, queries=sequence.queries
        )  # fmt: skip
    elif sequence.key_bias is None and sequence.keys is None and sequence.backend is not None:
        out = dispatch_attention(q, k, v, sequence.backend)
    elif sequence.key_bias is None and sequence.keys is None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    else:
        out = ops.mixed_res_attn(
            q, k, v, key_bias=sequence.key_bias, q_lens=sequence.queries, kv_lens=sequence.keys
        )[0]  # fmt: skip
    return out


def watched_mass(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor | None:
    """What `attention.TextWatch` records, where it is asked for: fp32 [B, image tokens, text tokens]."""
    if not sequence.watched:
        return None
    return text_mass(q, k, ops.mixed_res_attn(q, k, v)[1], sequence.text)


# Mixed sequences get slots by a sixteenth of their power of two, within these bounds: one capture then serves all edits
# of nearly one size, and few slots are empty.
FEWEST_SLOTS, MOST_SLOTS = 32, 128


@dataclass(frozen=True)
class FusedLayout:
    """sequence: the step's. fresh: int32 [B], the tokens that an active step computes, text included, or None.

    cache: where the keys and values of each block are kept, None to keep none; buffers: the runner's name for them.
    like: a tensor [B, ...] of the dtype and on the device of the tokens, for caches.
    watch: a module's attention to the text is recorded there.
    """

    sequence: MixedSequence
    fresh: Tensor | None = None
    cache: list[Kept] | None = None
    buffers: str = ""
    like: Tensor | None = None
    watch: TextWatch | None = None


if TYPE_CHECKING:
    _Eager: Any = EditModel  # which a class has behind it
else:
    _Eager = object


class FusedModel(_Eager):
    """The part of a fused adapter that knows no model; a class has it before its EditModel."""

    def __init__(
        self, transformer: torch.nn.Module, vae: torch.nn.Module, guidance: Tensor | None,
        attention_kwargs: dict[str, Any], runner: StepRunner,
    ):  # fmt: skip
        self._own = unwrapped(transformer)
        super().__init__(self._as_called(self._own), vae, guidance, attention_kwargs)
        self.runner = runner
        self._caches = 0

    @staticmethod
    def _as_called(transformer: torch.nn.Module) -> torch.nn.Module:
        return cast_by_call(without_context_parallel(transformer), OWN_HOOKS)

    def using(self, transformer: torch.nn.Module) -> FusedModel:
        other = super().using(self._as_called(transformer))
        other._own = transformer
        return other

    @functools.cached_property
    def fused_codec(self) -> Any:
        """The codec over an autoencoder with the model's own stand-ins: made once, used by all stages of a call."""
        return self.codec.fused()

    @functools.cached_property
    def _backend(self) -> str | None:
        return attention_backend(self._own)

    def slots(self, count: int) -> int:
        step = min(max((1 << (count - 1).bit_length()) // 16, FEWEST_SLOTS), MOST_SLOTS)
        return -(-count // step) * step

    def _scaled(self) -> contextlib.AbstractContextManager[None]:
        """Adapters at the caller's scale, as the transformer's own forward has them."""
        return scaled_adapters(self.transformer, self.attention_kwargs.get("scale", 1.0))

    def _kept(self, name: str, batch: int, rows: int, like: Any) -> list[Any]:
        """Of each block, where `rows` keys and values are kept; the dtype and device of `like`."""
        heads, dim = self.heads
        if self.ranks is not None:
            heads //= self.ranks.size

        def pairs(name: str, count: int, dim: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
            found = iter(self.runner.buffers(name, 2 * count, (batch, rows, heads, dim), dtype, like.device))
            return list(zip(found, found))

        # layers give that under autocast
        autocast = torch.is_autocast_enabled(like.device.type)
        dtype = torch.get_autocast_dtype(like.device.type) if autocast else like.dtype
        if not self.fp8_cache:
            return pairs(name, self.blocks, dim, dtype)
        packed = pairs(name, self.blocks, dim, kv_cache.DTYPE)
        scales = pairs(f"{name}, scales", self.blocks, 1, kv_cache.SCALES)
        [scratch] = pairs(f"{name}, of the block at work", 1, dim, dtype)
        return [kv_cache.PackedKV((*pair, *of), scratch) for pair, of in zip(packed, scales)]

    def _mixed(
        self, text: Text, layout: SequenceLayout, same: AttentionLayout, cached: bool, **more: Any
    ) -> FusedLayout:
        """The layout of a mixed sequence from the eager adapter's. more: further fields of the sequence.

        `same` has lengths in any case: a capture with them serves sequences with and without empty slots.
        """
        length = text.embeds.shape[1]
        cos, sin = (x[..., ::2].contiguous() for x in (same.cos, same.sin))
        sequence = MixedSequence(length, cos, sin, same.key_bias, same.lengths, same.lengths, **more)
        if not cached:
            return FusedLayout(sequence)
        made = FusedLayout(sequence, layout.fine_lengths + length, like=text.embeds)
        return self.another_cache(made)

    def another_cache(self, layout: FusedLayout) -> FusedLayout:
        name, self._caches = f"keys and values {self._caches}", self._caches + 1
        rows = layout.sequence.cos.shape[1]
        return replace(layout, cache=self._kept(name, layout.like.shape[0], rows, layout.like), buffers=name)

    def blend(self, layout: FusedLayout, near: FusedLayout, far: FusedLayout, weight: Tensor) -> None:
        def run(weight: Tensor) -> Tensor:
            for of, a, b in zip(layout.cache, near.cache, far.cache):
                pairs = [(x.values() if isinstance(x, PackedKV) else x) for x in (a, b)]
                into = of.scratch if isinstance(of, PackedKV) else of
                for out, x, y in zip(into, *pairs):
                    torch.lerp(x, y, weight.to(x.dtype), out=out)
                renew(of, layout.sequence)
            return weight

        names = BESIDE.join(x.buffers for x in (layout, near, far))
        self.runner(("blend", layout.sequence.cos.shape[1]), run, {"weight": weight}, names)

    def active_layout(self, text: Text, layout: FusedLayout, first: int | None, lock_text: bool = False) -> FusedLayout:
        whole, length = layout.sequence, text.embeds.shape[1]
        start = length if lock_text else 0
        # each sample's own fine tokens alone are computed anew
        fresh = whole.keys if first is None else layout.fresh
        end = whole.cos.shape[1] if first is None else length + first
        order = torch.arange(start, end, dtype=torch.int32, device=whole.cos.device)
        sequence = replace(
            whole,
            text=length - start,
            cos=whole.cos[:, start:end],
            sin=whole.sin[:, start:end],
            queries=fresh - start,
            rows=torch.where(order < fresh[:, None], order, -1),
            passing=first is not None,
        )
        return replace(layout, sequence=sequence)

    def kv_bytes(self, layouts: Sequence[FusedLayout]) -> int:
        return self.runner.buffer_bytes
