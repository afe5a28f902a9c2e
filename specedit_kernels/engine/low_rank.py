# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of a transformer's linear layers, applied to calls within a `with` block: weight + up @ down.

The weights stay as they are, so adapters, quantisation and offloading of the transformer hold for the changed one too,
and there is no second transformer in memory. A change is active in its own thread alone.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._diffusers import each_module, mirrors

_ACTIVE: ContextVar[LowRankChange | None] = ContextVar("specedit_low_rank", default=None)
_HOOKED: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
_SERIAL = itertools.count(1)


# Rows of low rank begin at multiples of 16 bytes then, in 16 bits: products are slower where they do not.
RANKS = 8


class LowRankChange:
    """Changes of some linear layers. layers: {layer's name: (down [rank, in], up [out, rank])}, CPU tensors."""

    def __init__(self, layers: Mapping[str, tuple[Tensor, Tensor]]):
        self.layers = dict(layers)
        self.serial = next(_SERIAL)  # of no other change, in place of an id that may come again
        self._names: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
        self._brought: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._joined: dict[tuple[tuple[str, ...], torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def load(cls, path: str | Path) -> LowRankChange:
        """From a safetensors file with {layer}.down and {layer}.up."""
        with safe_open(path, "pt") as file:
            names = sorted({key.rpartition(".")[0] for key in file.keys()})
            return cls({n: (file.get_tensor(f"{n}.down"), file.get_tensor(f"{n}.up")) for n in names})

    def save(self, path: str | Path) -> None:
        """The file that `load` reads."""
        tensors = {f"{n}.{part}": x for n, pair in self.layers.items() for part, x in zip(("down", "up"), pair)}
        save_file({key: x.contiguous() for key, x in tensors.items()}, path)

    def attach(self, transformer: torch.nn.Module) -> None:
        """Have the layers of a transformer add their change while this is active. One walk where they do already.

        ValueError where a layer is missing, has another shape, or is replaced by one of joined projections.
        """
        known, joined = 0, False
        for module in each_module(transformer):
            own = module.__dict__
            known += bool(own["_forward_hooks"]) and module in _HOOKED and module in self._names
            joined = joined or own.get("fused_projections", False)
        if known == len(self.layers) and not joined:
            return
        for name, (down, up) in self.layers.items():
            layer = _layer(transformer, name)
            expected = (up.shape[0], down.shape[1])
            if layer is None or (layer.out_features, layer.in_features) != expected:
                got = "none" if layer is None else (layer.out_features, layer.in_features)
                raise ValueError(f"expected a linear layer {name} of {expected}, got {got}")
            self._names[layer] = name
            if layer not in _HOOKED:
                _unhook(layer)  # a deep copy has the hook of the layer that it is of
                _HOOKED[layer] = layer.register_forward_hook(add_change)
        if any(getattr(module, "fused_projections", False) for module in each_module(transformer)):
            raise ValueError(
                "expected separate projections of q, k and v (call unfuse_qkv_projections()), got fused ones"
            )

    def changes(self, layer: torch.nn.Module) -> bool:
        """Whether a layer is one of those that are changed."""
        return mirrors(layer) in self._names

    def of(self, layer: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(down, up) of a layer, in the dtype and on the device of `like`, their rank brought to a multiple of RANKS by
        zeros; None where it is not changed."""
        name = self._names.get(mirrors(layer))
        if name is None:
            return None
        key = (name, like.device, like.dtype)
        if key not in self._brought:
            down, up = (x.to(like.device, like.dtype) for x in self.layers[name])
            more = -len(down) % RANKS
            self._brought[key] = F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more))
        return self._brought[key]

    def down_of_each(self, layers: Sequence[torch.nn.Module], like: Tensor) -> Tensor:
        """The `down` of each layer, all of them changed, one after another."""
        names = tuple(self._names[mirrors(layer)] for layer in layers)
        key = (names, like.device, like.dtype)
        if key not in self._joined:
            pairs = [self.of(layer, like) for layer in layers]
            self._joined[key] = torch.cat([pair[0] for pair in pairs if pair is not None])
        return self._joined[key]

    def weight_of(self, layer: torch.nn.Module) -> Tensor:
        """A layer's weight with its change, fp32 [out, in]; the weight itself where it is not changed."""
        weight: Any = layer.weight
        pair = self.of(layer, weight)
        return weight if pair is None else torch.addmm(weight.float(), pair[1].float(), pair[0].float())


def _layer(transformer: torch.nn.Module, name: str) -> Any:
    """The linear layer of a name, below any adapter that wraps it, or None: anything with in_ and out_features."""
    try:
        layer: Any = transformer.get_submodule(name)
    except AttributeError:
        return None
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer if hasattr(layer, "out_features") and hasattr(layer, "in_features") else None


def add_change(layer: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of changed layers."""
    return changed(layer, args[0], output)


def active_change() -> LowRankChange | None:
    """This thread's active change. torch.compile cannot trace the question; what is compiled runs without a change."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()


# Hooks of layers whose work the fused forwards know of.
OWN_HOOKS = frozenset({add_change})


def changed(layer: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y = layer(x) with the active change; y itself where there is none.

    Added in place, but for autograd and where y is not what a product gives: of another dtype (autocast), or with rows
    that are not one after another.
    """
    change = active_change()
    pair = None if change is None else change.of(layer, y)
    if pair is None:
        return y
    down, up = pair
    return _added(y, F.linear(x.to(y.dtype), down), up)


def _added(y: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    needs_grad = torch.is_grad_enabled() and (y.requires_grad or inner.requires_grad)
    if needs_grad or inner.dtype != y.dtype or not _has_rows(y):
        return (y + F.linear(inner, up)).to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(inner.flatten(0, -2), up.t())
    return y


def changed_of_each(layers: Sequence[torch.nn.Module], x: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """`changed` of each layer's output, all of one input x, with one product to the low ranks of all."""
    change = active_change()
    pairs = [None if change is None else change.of(layer, y) for layer, y in zip(layers, parts)]
    if change is None or len({y.dtype for y in parts}) > 1 or any(pair is None for pair in pairs):
        return [changed(layer, x, y) for layer, y in zip(layers, parts)]
    ups = [pair[1] for pair in pairs if pair is not None]
    inner = F.linear(x.to(parts[0].dtype), change.down_of_each(layers, parts[0]))
    return [_added(y, h, up) for y, h, up in zip(parts, inner.split([up.shape[1] for up in ups], dim=-1), ups)]


def _has_rows(y: Tensor) -> bool:
    """Whether y.view(-1, channels) is there, and no two of its elements share memory."""
    if y.dim() < 2 or y.stride(-1) != 1 or y.stride(-2) < y.shape[-1]:
        return False
    return all(y.stride(i) == y.stride(i + 1) * y.shape[i + 1] for i in range(y.dim() - 2))


def active_serial() -> int:
    """Which change is active in this thread, 0: none. What was captured under one serves no other."""
    change = active_change()
    return 0 if change is None else change.serial


@contextlib.contextmanager
def active(change: LowRankChange | None, transformer: torch.nn.Module | None) -> Iterator[None]:
    """Within it calls of the transformer's layers, in this thread, are the changed ones'. None: of one that the change
    is attached to."""
    if change is not None and transformer is not None:
        change.attach(transformer)
    token = _ACTIVE.set(change)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def detach(layers: Sequence[torch.nn.Module]) -> None:
    """Take the hooks off these modules."""
    for layer in layers:
        _HOOKED.pop(layer, None)
        _unhook(layer)


def _unhook(layer: torch.nn.Module) -> None:
    hooks = layer._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is add_change]:
        del hooks[key]
