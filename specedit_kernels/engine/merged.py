# SPDX-License-Identifier: Apache-2.0
"""Weights of linear layers with a low-rank change in them, in the model's own dtype, beside the model's own.

A change that is added to each product costs two more products of low rank, one of which reads and writes all of the
output, and leaves the activation and the concatenation of a fused forward apart (bench/log/flash_edit.md). Within
`active` the layers that a fused forward calls by their weights have one product instead, at the price of a copy of
these weights for each change. Rounded to the model's dtype, as `fuse_lora` rounds them. All other layers add the change
as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import fp8
from .low_rank import LowRankChange, active_change


@dataclass(frozen=True)
class _Merged:
    """Of layers that take the same rows. weight: [sum of outputs, in]; bias: [sum of outputs] or None. looked:
    `fp8.Written.look`'s of then."""

    weight: Tensor
    bias: Tensor | None
    looked: fp8.Looked


class MergedLinears:
    """The copies, of each change its own, as long as it lives."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[LowRankChange, dict[tuple[torch.nn.Module, ...], _Merged]] = WeakKeyDictionary()
        self._written = fp8.Written()

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        pairs = ((x.weight, x.bias) for copies in self._of.values() for x in copies.values())
        return sum(x.numel() * x.element_size() for pair in pairs for x in pair if x is not None)

    def of(self, layers: tuple[Any, ...]) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of layers whose call is one product, one after another, with the active change; None where
        none is active, or changes none of them."""
        change = active_change()
        if change is None or not any(change.changes(layer) for layer in layers):
            return None
        copies = self._of.setdefault(change, {})
        found, at = copies.get(layers), fp8.places(layers)
        if found is None or not self._written.serves(found.looked, layers, at):
            found = copies[layers] = _Merged(*_merge(layers, change), self._written.look(layers, at))
        return found.weight, found.bias

    def stale(self) -> bool:
        """Whether a weight was written in place since it was merged (fuse_lora does that). Waits for the device."""
        return self._written.found()

    def clear(self) -> None:
        """Free the copies."""
        self._of.clear()
        self._written.clear()


def _merge(layers: Sequence[Any], change: LowRankChange) -> tuple[Tensor, Tensor | None]:
    first = layers[0].weight
    with torch.inference_mode(False), torch.no_grad():
        weight = first.new_empty(sum(len(x.weight) for x in layers), first.shape[1])
        for part, layer in zip(weight.split([len(x.weight) for x in layers]), layers):
            part.copy_(change.weight_of(layer))
        bias = None if layers[0].bias is None else torch.cat([x.bias for x in layers])
    return weight, bias


_ACTIVE: ContextVar[MergedLinears | None] = ContextVar("specedit_merged", default=None)


@contextlib.contextmanager
def active(copies: MergedLinears | None) -> Iterator[None]:
    """Within it, in this thread, an active change is in the weights where `copies` can hold them; None: it is added."""
    token = _ACTIVE.set(copies)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def now() -> MergedLinears | None:
    """What is active. torch.compile cannot trace the question; what is compiled runs without."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()
