# SPDX-License-Identifier: Apache-2.0
"""What the fused forwards share: their sequence, its attention, the MLP with its activation, their adapter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor

from .. import ops
from .._panels import PANEL, panels_of
from . import fp8, kv_cache, merged, strips
from ._diffusers import (
    Addition,
    attention_backend,
    cast_by_call,
    dora_parts,
    foreign_forward,
    hooked,
    low_rank_parts,
    scaled_adapters,
    unwrapped,
    without_context_parallel,
)
from .fp8 import Rows
from .kv_cache import PackedKV
from .low_rank import OWN_HOOKS, active_serial, changed, changed_of_each
from .model import EditModel
from .quantised import made
from .runner import BESIDE, StepRunner
from .sequence import renew


def is_plain(layer: Any, x: Tensor | None = None) -> TypeGuard[torch.nn.Linear]:
    """Whether a layer is nothing but its weight and bias: no adapter, no quantised weight, no hook but our own.

    x: what it is called on, of another dtype or under autocast its call is more than a product.
    """
    return _is_weight(layer, x) and layer.bias is not None


def _is_weight(layer: Any, x: Tensor | None = None) -> TypeGuard[torch.nn.Linear]:
    """The same of a layer with a bias or without."""
    if type(layer) is not torch.nn.Linear or type(layer.weight) not in (torch.nn.Parameter, Tensor):
        return False
    # a runner that compiles has looked for them
    if not torch.compiler.is_compiling() and (hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer)):
        return False
    if x is None:
        return True
    return x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def weight_of(layer: Any, x: Tensor) -> Tensor | None:
    """The weight of a layer whose call on x is one product with it; None: its call is another, or more.

    What a library keeps in few bits (`made`), for products in the dtype of x, is made anew, for this call alone.
    """
    if is_plain(layer, x):
        return layer.weight
    found = None if torch.compiler.is_compiling() else made(layer)
    if found is None or x.dtype != found.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return found.make()


def _merged(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of layers whose calls on x are one product with the active low-rank change within; None where that
    is added to the product, or there is none."""
    copies = merged.now()
    if copies is None or not all(_is_weight(layer, x) for layer in layers):
        return None
    if len({(x.weight.dtype, x.weight.device, x.bias is None) for x in layers}) > 1:
        return None
    return copies.of(tuple(layers))


def product_of(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of the one product that a layer's call on x is, with the active low-rank change; None where it is
    another call, or more."""
    found = _merged([layer], x)
    if found is not None or active_serial():
        return found
    weight = layer.weight if _is_weight(layer, x) else weight_of(layer, x)
    return None if weight is None else (weight, layer.bias)


def of_both(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """A linear layer on a and b side by side, [B, N, C1] and [B, N, C2]: one product without the copy of both."""
    found = None if fp8.serves([layer]) else product_of(layer, a)
    if found is None:
        return linear(layer, torch.cat([a, b], dim=-1))
    (weight, bias), at = found, a.shape[-1]
    y = F.linear(a, weight[:, :at], bias)
    y.flatten(0, -2).addmm_(b.flatten(0, -2), weight[:, at:].t())
    return y


def _product(layer: Any, x: Tensor) -> Tensor | None:
    """layer(x) by `weight_of`, None where it has none."""
    weight = weight_of(layer, x)
    return None if weight is None else changed(layer, x, F.linear(x, weight, layer.bias))


def called(layer: Any, x: Tensor) -> Tensor:
    """layer(x) in the model's own dtype, by `weight_of` where it has one: of layers beside the blocks."""
    found = _product(layer, x)
    return layer(x) if found is None else found


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
        parts: list[Any] = [getattr(layer, name, None) for layer in layers]
        if any(type(x) not in (torch.nn.Parameter, Tensor) for x in parts) or _as_one(parts) is None:
            continue
        for x in parts:
            with torch.inference_mode(x.is_inference()), torch.no_grad():
                x.data = x.detach().clone()


def linear_of_each(layers: Iterable[Any], x: Tensor | Rows) -> list[Tensor]:
    """[layer(x) for layer in layers]: views of one product where `join_` has joined them, or where they compute in fp8,
    with what adapters of low rank add to each, themselves in few products."""
    layers = list(layers)
    found = fp8.products(layers, x)
    if found is not None:
        return found
    assert isinstance(x, Tensor)
    whole = _merged(layers, x)
    if whole is not None:
        return list(F.linear(x, *whole).split([layer.out_features for layer in layers], dim=-1))
    if torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    bases, added = zip(*(low_rank_parts(layer) for layer in layers))
    if all(is_plain(base, x) for base in bases):
        weight, bias = (_as_one([getattr(base, name) for base in bases]) for name in ("weight", "bias"))
        if weight is not None and bias is not None:
            parts = F.linear(x, weight, bias).split([base.out_features for base in bases], dim=-1)
        elif any(added):
            parts = [F.linear(x, base.weight, base.bias) for base in bases]
        else:
            return [layer(x) for layer in layers]
        return _with_added(x, changed_of_each(bases, x, parts), added)
    products = [_product(base, x) for base in bases]
    parts = [_with_dora(layer, x) if y is None else y for layer, y in zip(layers, products)]
    return _with_added(x, parts, [[] if y is None else of for y, of in zip(products, added)])


def _with_added(x: Tensor, parts: list[Tensor], added: Sequence[list[Addition]]) -> list[Tensor]:
    """Each of `parts` and what adapters add to it, up(down(x)) * scale, in place: they are the caller's own.

    One product for the `down` of all parts, joined in each call, since an adapter's weights may be written to where
    they lie; then one for each `up`, which scales and adds as it writes. The sum is rounded once.
    """
    every = [of for each in added for of in each]
    if not every:
        return parts
    # in place: not where autograd may ask for what was there
    if torch.is_grad_enabled() or not all(_is_product(layer, x) for down, up, _ in every for layer in (down, up)):
        return [_with_called(x, y, of) for y, of in zip(parts, added)]
    downs = [down.weight for down, _, _ in every]
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    inner = iter(F.linear(x, down).flatten(0, -2).split([len(each) for each in downs], dim=-1))
    for y, each in zip(parts, added):
        for (_, up, scale), h in zip(each, inner):
            if isinstance(scale, Tensor):  # a number on the device, which may change
                h, scale = h * scale, 1.0
            y.view(-1, y.shape[-1]).addmm_(h, up.weight.t(), alpha=scale)
    return parts


def _with_dora(layer: Any, x: Tensor) -> Tensor:
    """layer(x), of a DoRA by products with the weight below alone: PEFT makes the whole change in each call, since its
    length in each row is |W + s B A|.

    |W + s B A|^2 = |W|^2 + B . (2 s W A^T + s^2 B A A^T), row by row.
    """
    parts = None if torch.is_grad_enabled() or active_serial() else dora_parts(layer)
    if parts is None or isinstance(parts[3], Tensor) or not all(_is_product(each, x) for each in parts[1:3]):
        return layer(x)
    base, down, up, scale, magnitude = parts
    weight = weight_of(base, x)
    if weight is None:
        return layer(x)
    a, b = down.weight, up.weight
    length = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    of_change = torch.addmm(F.linear(weight, a), b, F.linear(a, a), beta=2 * scale, alpha=scale * scale)
    squares = torch.addcmul((b.float() * of_change).sum(1), length, length)
    factor = (magnitude * squares.rsqrt()).to(x.dtype)
    y = F.linear(x, weight)
    y.view(-1, y.shape[-1]).addmm_(F.linear(x, a).flatten(0, -2), b.t(), alpha=scale)
    return y.mul_(factor) if base.bias is None else torch.addcmul(base.bias, y, factor)


def _is_product(layer: Any, x: Tensor) -> bool:
    """Whether a call of this layer on what has the dtype of x is a product with its weight, and no more."""
    kinds = (type(layer), type(layer.weight), type(layer.bias))
    if kinds != (torch.nn.Linear, torch.nn.Parameter, type(None)):
        return False
    return layer.weight.dtype == x.dtype and not hooked(vars(layer), frozenset()) and not foreign_forward(layer)


def _with_called(x: Tensor, y: Tensor, added: list[Addition]) -> Tensor:
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
    if fp8.serves(*groups):
        return Rows(*ops.quantize_fp8(x, **options))
    return ops.adaln_modulate(x, **options)


def hidden(
    layer: torch.nn.Module, x: Tensor | Rows, then: torch.nn.Module, before: Tensor | None = None
) -> Tensor | Rows:
    """gelu(layer(x)); where `then` computes in fp8, that of it and of `before`, the channels in front, in e4m3."""
    if fp8.serves([then]):
        return Rows(*ops.quantize_fp8(linear(layer, x), before=before, gelu=True))
    return gelu(layer, x)


def gelu(layer: Any, x: Tensor | Rows) -> Tensor:
    """GELU, by tanh, of a linear layer on x [B, N, C]: within the product where that is a plain one on CUDA.

    Not in fp32: what the product's end knows of tanh is good for 16 bits.
    """
    if fp8.serves([layer]):
        return F.gelu(linear(layer, x), approximate="tanh")
    assert isinstance(x, Tensor)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and getattr(layer, "bias", None) is not None:
        weight, bias = product_of(layer, x) or (None, None)
        if weight is not None and bias is not None:
            y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
            return y.unflatten(0, x.shape[:-1])
    return F.gelu(linear(layer, x), approximate="tanh")


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


# A block is compiled for each kind of call: of whole, mixed and active steps, of the last block and others, with a bias
# and without one, of fixed lengths and then of any. torch's own limit is 8, and a call beyond it would end the run.
KINDS_OF_CALLS = 64


def compiled(block: Callable[..., Any]) -> Callable[..., Any]:
    """A block under torch.compile, without a graph break, for as many kinds of calls as there are."""
    made = torch.compile(block, fullgraph=True)

    @functools.wraps(block)
    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=KINDS_OF_CALLS):
            return made(*args)

    return call


# Mixed sequences get slots by a sixteenth of their power of two, within these bounds: one capture then serves all edits
# of nearly one size, and few slots are empty.
FEWEST_SLOTS, MOST_SLOTS = 32, 128


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
        """The codec over an autoencoder with the model's own stand-ins, shared out over `codec_ranks`: made once, used
        by all stages of a call."""
        return strips.over(self.codec.fused(), self.codec_ranks)

    @functools.cached_property
    def _backend(self) -> str | None:
        return attention_backend(self._own)

    def slots(self, count: int) -> int:
        step = min(max((1 << (count - 1).bit_length()) // 16, FEWEST_SLOTS), MOST_SLOTS)
        return -(-count // step) * step

    def _scaled(self) -> contextlib.AbstractContextManager[None]:
        """Adapters at the caller's scale, as the transformer's own forward has them."""
        return scaled_adapters(self.transformer, self.attention_kwargs.get("scale", 1.0))

    @property
    def _own_heads(self) -> tuple[int, int]:
        """(heads of a block's attention that this rank attends for, channels of each)."""
        heads, dim = self.heads
        return heads if self.ranks is None else heads // self.ranks.size, dim

    def _kept(
        self, name: str, batch: int, rows: int, like: Any, prefix: int = 0, packed: bool | None = None
    ) -> list[Any]:
        """Of each block, where `rows` keys and values are kept; the dtype and device of `like`.

        prefix: rows in front of them that are never packed. packed: whether the others are, None: as `fp8_cache` says.
        """
        heads, dim = self._own_heads

        def pairs(name: str, count: int, dim: int, dtype: torch.dtype, rows: int) -> list[tuple[Tensor, Tensor]]:
            found = iter(self.runner.buffers(name, 2 * count, (batch, rows, heads, dim), dtype, like.device))
            return list(zip(found, found))

        # layers give that under autocast
        autocast = torch.is_autocast_enabled(like.device.type)
        dtype = torch.get_autocast_dtype(like.device.type) if autocast else like.dtype
        if not (self.fp8_cache if packed is None else packed):
            return pairs(name, self.blocks, dim, dtype, prefix + rows)
        kept = pairs(name, self.blocks, dim, kv_cache.DTYPE, rows)
        scales = pairs(f"{name}, scales", self.blocks, 1, kv_cache.SCALES, rows)
        [scratch] = pairs(f"{name}, of the block at work", 1, dim, dtype, prefix + rows)
        own = [x[:, prefix:] for x in scratch]
        found = [kv_cache.PackedKV((*pair, *of), own) for pair, of in zip(kept, scales)]
        if not prefix:
            return found
        before = pairs(f"{name}, prefix", self.blocks, dim, dtype, prefix)
        return [kv_cache.PrefixedKV(x, pair, scratch) for x, pair in zip(found, before)]

    @property
    def least_text(self) -> int:
        """None: a block of no text leaves out the layers of the text."""
        return 0

    def _cached(self, layout: Any, like: Tensor) -> Any:
        """A mixed layout with a cache of the runner's. like: StepLayout's."""
        return self.another_cache(replace(layout, attention=replace(layout.attention, like=like)))

    def another_cache(self, layout: Any) -> Any:
        name, self._caches = f"keys and values {self._caches}", self._caches + 1
        attention, sequence = layout.attention, layout.attention.sequence
        like, rows = attention.like, sequence.cos.shape[1]
        if fp8.attends(like.device, like.dtype, self.heads[1]):
            rows = panels_of(rows) * PANEL
            cache = self._kept_in_fp8(name, like.shape[0], rows, like.device)
            if sequence.key_bias is not None:  # a value a row; no key is beyond `sequence.keys`
                bias = F.pad(sequence.key_bias, (0, rows - sequence.key_bias.shape[1]))
                attention = replace(attention, sequence=replace(sequence, key_bias=bias))
        else:
            cache = self._kept(name, like.shape[0], rows, like)
        return replace(layout, attention=replace(attention, cache=cache, buffers=name))

    def _kept_in_fp8(self, name: str, batch: int, rows: int, device: torch.device) -> list[Any]:
        """The same for attention in e4m3."""
        heads, dim = self._own_heads
        found = iter(self.runner.buffers(name, 2 * self.blocks, (batch, rows, heads, dim), kv_cache.DTYPE, device))
        pairs = [(k, v.view(batch, rows // PANEL, heads, dim, PANEL)) for k, v in zip(found, found)]
        of_all = (batch, 3 * self.blocks, heads)
        [scales] = self.runner.buffers(f"{name}, scales of heads", 1, of_all, kv_cache.SCALES, device)
        of_block = (scales[:, 3 * i : 3 * i + 3].split(1, dim=1) for i in range(self.blocks))
        return [kv_cache.Fp8KV(*pair, *of) for pair, of in zip(pairs, of_block)]

    def blend(self, layout: Any, near: Any, far: Any, weight: Tensor) -> None:
        of, *ends = (x.attention for x in (layout, near, far))

        def run(weight: Tensor) -> Tensor:
            for kept, a, b in zip(of.cache, *(x.cache for x in ends)):
                if isinstance(kept, kv_cache.Fp8KV):
                    kept.blend_(a, b, weight)
                    continue
                pairs = [(x.values() if isinstance(x, PackedKV) else x) for x in (a, b)]
                into = kept.scratch if isinstance(kept, PackedKV) else kept
                for out, x, y in zip(into, *pairs):
                    ops.lerp_(out, x, y, weight)
                renew(kept, of.sequence)
            return weight

        names = BESIDE.join(x.buffers for x in (of, *ends))
        kept = of.cache[0][0]
        self.runner(("blend", kept.shape[1], kept.storage_offset()), run, {"weight": weight}, names)

    def release(self, layouts: Sequence[Any]) -> None:
        self._caches -= len(layouts)  # buffers have names by this count

    def kv_bytes(self, layouts: Sequence[Any]) -> int:
        return self.runner.buffer_bytes
